//! Rewrites the source of a template where minijinja reads it otherwise than Jinja2 and cannot be
//! told: ends of lines, Python's escapes in strings, `%` of strings, `{% generation %}`, and macros
//! that take any arguments.
//!
//! Text outside of tags stays as it is, and so do the ends of lines within tags, so that errors
//! name the lines of the original.

use super::globals::{PERCENT, VARIADIC};
use super::token::{Kind, Token, closing, code, ends_operand, operand_end, operand_start};

/// Returns the template as minijinja must read it. What cannot be read is left to its errors.
pub(super) fn prepare(source: &str) -> String {
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let mut out = String::with_capacity(source.len());
    let mut macros = Macros {
        variadic: source.contains("varargs") || source.contains("kwargs"),
        open: Vec::new(),
    };
    let mut rest = source.as_str();
    while let Some(at) = rest.find('{') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let len = match rest.as_bytes().get(1) {
            Some(b'#') => rest.find("#}").map(|end| end + 2),
            Some(b'%') => raw(rest),
            Some(b'{') => None,
            _ => Some(1),
        };
        if let Some(len) = len {
            out.push_str(&rest[..len]);
            rest = &rest[len..];
            continue;
        }
        let Some((text, len)) = tag(rest, &mut macros) else {
            break;
        };
        out.push_str(&text);
        rest = &rest[len..];
    }
    out.push_str(rest);
    out
}

/// Returns the length of a raw block, which has no tags inside.
fn raw(rest: &str) -> Option<usize> {
    let mut at = simple_tag(rest, "raw")?;
    loop {
        at += rest[at..].find("{%")?;
        if let Some(len) = simple_tag(&rest[at..], "endraw") {
            return Some(at + len);
        }
        at += 2;
    }
}

/// Returns the length of the tag `{% name %}` if the text begins with it.
fn simple_tag(text: &str, name: &str) -> Option<usize> {
    let inner = text.strip_prefix("{%")?;
    let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner).trim_start();
    let inner = inner.strip_prefix(name)?.trim_start();
    let inner = inner.strip_prefix(['-', '+']).unwrap_or(inner);
    let inner = inner.strip_prefix("%}")?;
    Some(text.len() - inner.len())
}

/// Returns the rewritten tag that the text begins with, and the length of the original; `None` if
/// it is a comment or has no end.
fn tag(text: &str, macros: &mut Macros) -> Option<(String, usize)> {
    let (opening, end) = match text.get(..2)? {
        "{%" => ("{%", "%}"),
        "{{" => ("{{", "}}"),
        _ => return None,
    };
    let signed = text[2..].starts_with(['-', '+']);
    let start = 2 + usize::from(signed);
    let (mut tokens, len) = code(&text[start..], end)?;
    let rest = &text[start + len..];
    let close = &rest[..end.len() + usize::from(!rest.starts_with(end))];
    let is_block = opening == "{%";
    let mut after = String::new();
    if is_block {
        mend_generation(&mut tokens);
        if let Some(name) = macros.see(&mut tokens) {
            // The tag's own end has the control of white space behind it.
            after = format!("%}}{{%- set {name} = {VARIADIC}({name}) ");
        }
    }
    let first = if is_block {
        first_name(&tokens).map_or(0, |n| n + 1)
    } else {
        0
    };
    drop_plus_signs(&mut tokens, first);
    mend_percent(&mut tokens, first);
    let body: String = tokens.iter().map(|token| token.text.as_str()).collect();
    Some((
        format!("{}{body}{after}{close}", &text[..start]),
        start + len + close.len(),
    ))
}

/// Returns the place of the name that a block tag begins with.
fn first_name(tokens: &[Token]) -> Option<usize> {
    let first = tokens.iter().position(|token| token.kind != Kind::Space)?;
    (tokens[first].kind == Kind::Name).then_some(first)
}

/// Replaces Hugging Face's `{% generation %}`, which only marks text for training, by a block
/// with a scope of its own and equal handling of white space.
fn mend_generation(tokens: &mut [Token]) {
    let words: Vec<usize> = (0..tokens.len())
        .filter(|&n| tokens[n].kind != Kind::Space)
        .collect();
    let [only] = words[..] else { return };
    if tokens[only].is("generation") {
        tokens[only].text = "with".into();
    } else if tokens[only].is("endgeneration") {
        tokens[only].text = "endwith".into();
    }
}

/// Drops signs `+`, which minijinja does not know.
fn drop_plus_signs(tokens: &mut [Token], first: usize) {
    let mut after_operand = false;
    for token in tokens.iter_mut().skip(first) {
        if token.is("+") && !after_operand {
            token.text.clear();
        } else if token.kind != Kind::Space {
            after_operand = ends_operand(token);
        }
    }
}

/// Replaces `a % b` by a call, since minijinja's `%` knows only numbers.
fn mend_percent(tokens: &mut Vec<Token>, first: usize) {
    let mut at = first;
    while let Some(n) = tokens.iter().skip(at).position(|token| token.is("%")) {
        at += n;
        let bounds = operand_start(tokens, first, at).zip(operand_end(tokens, at + 1));
        let Some((start, end)) = bounds else {
            at += 1;
            continue;
        };
        tokens[at].text = ",".into();
        tokens.insert(end, Token::new(Kind::Operator, ")"));
        tokens.insert(start, Token::new(Kind::Operator, "("));
        tokens.insert(start, Token::new(Kind::Name, PERCENT));
        at += 2;
    }
}

/// Macros of a template that has macros with any arguments.
struct Macros {
    /// Whether the source names `varargs` or `kwargs`.
    variadic: bool,
    /// Names of the macros that are being defined.
    open: Vec<Option<String>>,
}

impl Macros {
    /// Gives a macro parameters for the arguments that it has none for. Returns its name at its end.
    fn see(&mut self, tokens: &mut Vec<Token>) -> Option<String> {
        if !self.variadic {
            return None;
        }
        let word = first_name(tokens)?;
        if tokens[word].is("endmacro") {
            return self.open.pop().flatten();
        }
        if tokens[word].is("macro") {
            let name = Self::widen(tokens, word);
            self.open.push(name);
        }
        None
    }

    fn widen(tokens: &mut Vec<Token>, word: usize) -> Option<String> {
        let name = tokens[word + 1..].iter().find(|t| t.kind != Kind::Space)?;
        let name = (name.kind == Kind::Name).then(|| name.text.clone())?;
        let open = tokens.iter().position(|token| token.is("("))?;
        let close = closing(tokens, open)? - 1;
        let mut parameters = tokens[open + 1..close]
            .iter()
            .filter(|t| t.kind != Kind::Space);
        if parameters
            .clone()
            .any(|t| t.is("varargs") || t.is("kwargs"))
        {
            return None;
        }
        let comma = parameters.next_back().is_some_and(|last| !last.is(","));
        let more = if comma {
            ", varargs, kwargs"
        } else {
            "varargs, kwargs"
        };
        tokens.insert(close, Token::new(Kind::Name, more));
        Some(name)
    }
}
