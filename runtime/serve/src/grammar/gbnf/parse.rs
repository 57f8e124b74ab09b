//! Reading the text of a grammar.

use super::chars::Chars;
use std::collections::HashMap;

/// Most rules of a grammar.
const MAX_RULES: usize = 4096;

/// Most parts of a grammar as it is written.
const MAX_PARTS: usize = 100_000;

/// Most parentheses around a part.
const MAX_DEPTH: usize = 64;

/// Most times that a part can be demanded; with more, an upper bound is none, as in llama.cpp.
const MAX_REPEAT: u32 = 2000;

/// Longest name or rest of a line that an error shows, in characters.
const MAX_SHOWN_CHARS: usize = 30;

/// A part of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Expr {
    /// One of some characters.
    Chars(Chars),
    Seq(Vec<Expr>),
    Alt(Vec<Expr>),
    /// A part `min` times up to `max` times.
    Repeat {
        of: Box<Expr>,
        min: u32,
        max: Option<u32>,
    },
    /// A rule by its number.
    Rule(usize),
}

/// A rule.
#[derive(Debug)]
pub(super) struct Rule<'t> {
    pub name: &'t str,
    /// Place where it is first used or defined, in bytes.
    pub at: usize,
    /// `None` where it is not defined.
    pub body: Option<Expr>,
}

/// Returns the rules of a grammar, `root` first.
pub(super) fn rules(text: &str) -> Result<Vec<Rule<'_>>, String> {
    let mut parser = Parser {
        text,
        at: 0,
        names: HashMap::new(),
        rules: Vec::new(),
        n_parts: 0,
    };
    parser.rule_number("root")?;
    parser.space(true);
    while !parser.rest().is_empty() {
        parser.rule()?;
    }
    if parser.rules[0].body.is_none() {
        return Err("no rule root, expected root ::= …".into());
    }
    match parser.rules.iter().find(|rule| rule.body.is_none()) {
        None => Ok(parser.rules),
        Some(rule) => Err(format!(
            "line {}: there is no rule {}",
            line(text, rule.at),
            shown(rule.name)
        )),
    }
}

/// Returns the number of the line at a place.
pub(super) fn line(text: &str, at: usize) -> usize {
    1 + text[..at].matches('\n').count()
}

/// Returns the beginning of a text, for an error.
pub(super) fn shown(text: &str) -> String {
    let line = text.lines().next().unwrap_or_default();
    match line.char_indices().nth(MAX_SHOWN_CHARS) {
        Some((end, _)) => format!("{}…", &line[..end]),
        None => line.to_string(),
    }
}

struct Parser<'t> {
    text: &'t str,
    at: usize,
    names: HashMap<&'t str, usize>,
    rules: Vec<Rule<'t>>,
    n_parts: usize,
}

impl<'t> Parser<'t> {
    fn rest(&self) -> &'t str {
        &self.text[self.at..]
    }

    fn line(&self) -> usize {
        line(self.text, self.at)
    }

    /// Returns the error of the place at hand.
    fn bad(&self, expected: &str) -> String {
        let found = match self.rest() {
            "" => "the end".to_string(),
            rest if rest.starts_with(['\n', '\r']) => "the end of the line".to_string(),
            rest => format!("`{}`", shown(rest)),
        };
        format!("line {}: {found}, expected {expected}", self.line())
    }

    fn skip(&mut self, text: &str) -> bool {
        let is_there = self.rest().starts_with(text);
        self.at += if is_there { text.len() } else { 0 };
        is_there
    }

    fn expect(&mut self, text: &str) -> Result<(), String> {
        match self.skip(text) {
            true => Ok(()),
            false => Err(self.bad(&format!("`{text}`"))),
        }
    }

    /// Skips spaces and comments, and ends of lines where those do not end the rule.
    fn space(&mut self, has_lines: bool) {
        loop {
            let rest = self.rest();
            let ends = |c| matches!(c, '\r' | '\n');
            let trimmed =
                rest.trim_start_matches(|c| matches!(c, ' ' | '\t') || has_lines && ends(c));
            let trimmed = match trimmed.starts_with('#') {
                true => &trimmed[trimmed.find(ends).unwrap_or(trimmed.len())..],
                false => trimmed,
            };
            if trimmed.len() == rest.len() {
                return;
            }
            self.at = self.text.len() - trimmed.len();
        }
    }

    /// Returns a name, which may be none.
    fn name(&mut self) -> &'t str {
        let rest = self.rest();
        let is_of_name = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        let end = rest.find(|c| !is_of_name(c)).unwrap_or(rest.len());
        self.at += end;
        &rest[..end]
    }

    fn rule_number(&mut self, name: &'t str) -> Result<usize, String> {
        if let Some(number) = self.names.get(name) {
            return Ok(*number);
        }
        if self.rules.len() == MAX_RULES {
            let line = self.line();
            return Err(format!("line {line}: more than {MAX_RULES} rules"));
        }
        self.names.insert(name, self.rules.len());
        self.rules.push(Rule {
            name,
            at: self.at,
            body: None,
        });
        Ok(self.rules.len() - 1)
    }

    fn rule(&mut self) -> Result<(), String> {
        let start = self.at;
        let name = self.name();
        if name.is_empty() {
            return Err(self.bad("the name of a rule"));
        }
        self.space(false);
        self.expect("::=")?;
        self.space(true);
        let number = self.rule_number(name)?;
        let body = self.alternatives(0)?;
        if !self.rest().is_empty() && !self.rest().starts_with(['\n', '\r']) {
            return Err(self.bad("the next part of the rule, or the end of the line"));
        }
        self.space(true);
        if self.rules[number].body.replace(body).is_some() {
            let (line, name) = (line(self.text, start), shown(name));
            return Err(format!("line {line}: rule {name} is there twice"));
        }
        Ok(())
    }

    fn alternatives(&mut self, depth: usize) -> Result<Expr, String> {
        let mut all = vec![self.sequence(depth)?];
        while self.skip("|") {
            self.space(true);
            all.push(self.sequence(depth)?);
        }
        Ok(match all.len() {
            1 => all.remove(0),
            _ => Expr::Alt(all),
        })
    }

    fn sequence(&mut self, depth: usize) -> Result<Expr, String> {
        let mut parts = Vec::new();
        while let Some(part) = self.part(depth)? {
            self.space(depth > 0);
            let part = self.repeated(part, depth)?;
            parts.push(part);
        }
        Ok(match parts.len() {
            1 => parts.remove(0),
            _ => Expr::Seq(parts),
        })
    }

    /// Returns the next part of a sequence, `None` at its end.
    fn part(&mut self, depth: usize) -> Result<Option<Expr>, String> {
        self.count(1)?;
        let start = self.at;
        let part = match self.rest().chars().next() {
            Some('"') => self.literal()?,
            Some('[') => self.class()?,
            Some('.') => {
                self.at += 1;
                Expr::Chars(Chars::any())
            }
            Some('(') if depth == MAX_DEPTH => {
                return Err(self.bad(&format!("at most {MAX_DEPTH} parentheses around a part")));
            }
            Some('(') => {
                self.at += 1;
                self.space(true);
                let inner = self.alternatives(depth + 1)?;
                self.expect(")")?;
                inner
            }
            Some('*' | '+' | '?' | '{') => return Err(self.bad("something to repeat before it")),
            Some('<' | '!') => return Err(self.bad("texts: tokens are not supported")),
            _ => match self.name() {
                "" => return Ok(None),
                name => {
                    let end = std::mem::replace(&mut self.at, start);
                    let number = self.rule_number(name)?;
                    self.at = end;
                    Expr::Rule(number)
                }
            },
        };
        Ok(Some(part))
    }

    fn count(&mut self, n: usize) -> Result<(), String> {
        self.n_parts += n;
        match self.n_parts > MAX_PARTS {
            true => Err(format!("line {}: more than {MAX_PARTS} parts", self.line())),
            false => Ok(()),
        }
    }

    /// Reads what says how often a part comes.
    fn repeated(&mut self, mut part: Expr, depth: usize) -> Result<Expr, String> {
        loop {
            let (min, max) = if self.skip("*") {
                (0, None)
            } else if self.skip("+") {
                (1, None)
            } else if self.skip("?") {
                (0, Some(1))
            } else if self.skip("{") {
                self.bounds(depth)?
            } else {
                return Ok(part);
            };
            self.count(1)?;
            self.space(depth > 0);
            part = match (part, min, max) {
                (part, 1, Some(1)) => part,
                (_, _, Some(0)) => Expr::Seq(Vec::new()),
                // Twice any number of times is any number of times.
                (
                    Expr::Repeat {
                        of,
                        min: 0,
                        max: None,
                    },
                    ..,
                ) => Expr::Repeat {
                    of,
                    min: 0,
                    max: None,
                },
                (part, min, max) => Expr::Repeat {
                    of: Box::new(part),
                    min,
                    max,
                },
            };
        }
    }

    /// Reads the bounds after `{`.
    fn bounds(&mut self, depth: usize) -> Result<(u32, Option<u32>), String> {
        let has_lines = depth > 0;
        self.space(has_lines);
        let Some(min) = self.number() else {
            return Err(self.bad("a number"));
        };
        self.space(has_lines);
        let max = match self.skip(",") {
            false => Some(min),
            true => {
                self.space(has_lines);
                let max = self.number();
                self.space(has_lines);
                max
            }
        };
        if min > MAX_REPEAT {
            return Err(self.bad(&format!("at most {MAX_REPEAT} repetitions before it")));
        }
        if max.is_some_and(|max| max < min) {
            return Err(self.bad("bounds in order before it"));
        }
        self.expect("}")?;
        Ok((min, max.filter(|max| *max <= MAX_REPEAT)))
    }

    /// Returns a number, if one is there; one that is too large is the largest.
    fn number(&mut self) -> Option<u32> {
        let rest = self.rest();
        let end = rest.find(|c: char| !c.is_ascii_digit());
        let digits = &rest[..end.unwrap_or(rest.len())];
        self.at += digits.len();
        (!digits.is_empty()).then(|| digits.parse().unwrap_or(u32::MAX))
    }

    fn literal(&mut self) -> Result<Expr, String> {
        self.at += 1;
        let mut parts = Vec::new();
        while !self.skip("\"") {
            parts.push(Expr::Chars(Chars::one(self.character("\"")?)));
        }
        self.count(parts.len())?;
        Ok(match parts.len() {
            1 => parts.remove(0),
            _ => Expr::Seq(parts),
        })
    }

    fn class(&mut self) -> Result<Expr, String> {
        let start = self.at;
        self.at += 1;
        let is_negated = self.skip("^");
        let mut ranges = Vec::new();
        while !self.skip("]") {
            let from = self.character("]")?;
            let rest = self.rest();
            let is_range = rest.starts_with('-') && !rest.starts_with("-]");
            let to = match is_range {
                false => from,
                true => {
                    self.at += 1;
                    self.character("]")?
                }
            };
            if to < from {
                return Err(self.bad("a range in order before it"));
            }
            ranges.push([from.into(), to.into()]);
        }
        self.count(ranges.len())?;
        let chars = Chars::of(ranges);
        let chars = match is_negated {
            true => chars.complement(),
            false => chars,
        };
        if chars.is_empty() {
            self.at = start;
            return Err(self.bad("a class with a character"));
        }
        Ok(Expr::Chars(chars))
    }

    /// Returns a character of what ends with `end`.
    fn character(&mut self, end: &str) -> Result<char, String> {
        let Some(c) = self.rest().chars().next() else {
            return Err(self.bad(&format!("`{end}`")));
        };
        if c != '\\' {
            self.at += c.len_utf8();
            return Ok(c);
        }
        let digits = match self.rest().chars().nth(1) {
            Some('x') => 2,
            Some('u') => 4,
            Some('U') => 8,
            Some(c @ ('t' | 'r' | 'n' | '\\' | '"' | '[' | ']' | '-')) => {
                self.at += 2;
                return Ok(match c {
                    't' => '\t',
                    'r' => '\r',
                    'n' => '\n',
                    c => c,
                });
            }
            _ => {
                return Err(
                    self.bad(r#"an escape, one of \n \r \t \\ \" \[ \] \- \xHH \uHHHH \UHHHHHHHH"#)
                );
            }
        };
        let hex = self.rest().get(2..2 + digits);
        let hex = hex.filter(|hex| hex.bytes().all(|b| b.is_ascii_hexdigit()));
        let code = hex.and_then(|hex| u32::from_str_radix(hex, 16).ok());
        let Some(c) = code.and_then(char::from_u32) else {
            return Err(self.bad(&format!("a character in {digits} hexadecimal digits")));
        };
        self.at += 2 + digits;
        Ok(c)
    }
}
