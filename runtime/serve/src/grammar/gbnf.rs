//! Grammars in GBNF, the form that llama.cpp has, as grammars of llguidance.
//!
//! A grammar without recursion is one regular expression. For others, [`lexemes`] chooses what the
//! lexer of llguidance can tell apart, so that the language stays the same.

mod automaton;
mod chars;
mod lexemes;
mod parse;
mod rules;
#[cfg(test)]
mod tests;

use lexemes::{Lexed, Node, times};
use rules::Regular;
use std::fmt::Write;

/// Returns a grammar in GBNF in the syntax of Lark that llguidance takes.
///
/// # Errors
/// What is wrong with it, and where.
pub(crate) fn to_lark(text: &str) -> Result<String, String> {
    let rules = parse::rules(text)?;
    rules::check_left_recursion(text, &rules)?;
    let regular = Regular::of(text, &rules)?;
    let lexed = lexemes::choose(text, &rules, &regular)?;
    let mut lark = String::from("start: ");
    write(&lexed, &lexed.root, &mut lark);
    for (number, node) in lexed.rules.iter().enumerate() {
        if let Some(node) = node {
            // Writing to a string does not fail.
            let _ = write!(lark, "\nr{number}: ");
            write(&lexed, node, &mut lark);
        }
    }
    let lexemes = lexed.lexemes.iter().enumerate();
    for (number, lexeme) in lexemes.filter(|(_, lexeme)| !lexeme.is_split) {
        // A lexeme is some text; where it may be none, it may be left out.
        let and_text = if lexeme.is_nullable() {
            " & /(?s:.+)/"
        } else {
            ""
        };
        let _ = write!(lark, "\nL{number}: /{}/{and_text}", lexeme.regex);
    }
    Ok(lark)
}

/// Writes a part of a rule.
fn write(lexed: &Lexed, node: &Node, lark: &mut String) {
    match node {
        Node::Lexeme { lexeme, .. } => {
            let or_none = if lexed.lexemes[*lexeme].is_nullable() {
                "?"
            } else {
                ""
            };
            let _ = write!(lark, "L{lexeme}{or_none}");
        }
        Node::Rule(number) => {
            let _ = write!(lark, "r{number}");
        }
        Node::Seq(parts) if parts.is_empty() => lark.push_str("\"\""),
        Node::Seq(parts) => group(lexed, parts, " ", lark),
        Node::Alt(parts) => group(lexed, parts, " | ", lark),
        Node::Repeat { of, min, max } => {
            lark.push('(');
            write(lexed, of, lark);
            lark.push(')');
            lark.push_str(&times(*min, *max));
        }
    }
}

fn group(lexed: &Lexed, parts: &[Node], between: &str, lark: &mut String) {
    lark.push('(');
    for (i, part) in parts.iter().enumerate() {
        if i > 0 {
            lark.push_str(between);
        }
        write(lexed, part, lark);
    }
    lark.push(')');
}
