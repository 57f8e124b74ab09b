//! Tokens of the code in a tag, and where operands of `%` begin and end.

/// What a token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Space,
    /// Names and keywords.
    Name,
    Number,
    /// A string with its quotes.
    Text,
    Operator,
}

/// A token of the code in a tag.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Token {
    pub(super) kind: Kind,
    pub(super) text: String,
}

impl Token {
    pub(super) fn new(kind: Kind, text: impl Into<String>) -> Self {
        Self {
            kind,
            text: text.into(),
        }
    }

    pub(super) fn is(&self, text: &str) -> bool {
        self.text == text && matches!(self.kind, Kind::Name | Kind::Operator)
    }

    fn is_one_of(&self, texts: &[&str]) -> bool {
        texts.iter().any(|text| self.is(text))
    }

    fn opens(&self) -> bool {
        self.is_one_of(&["(", "[", "{"])
    }

    fn closes(&self) -> bool {
        self.is_one_of(&[")", "]", "}"])
    }
}

/// Longest operators first, so that `**` is not read as two `*`.
const OPERATORS: [&str; 6] = ["**", "//", "==", "!=", "<=", ">="];

/// Reads the code of a tag. Returns its tokens and the bytes before `end`, which may have a sign of
/// white space control in front; `None` if the tag has no end.
pub(super) fn code(text: &str, end: &str) -> Option<(Vec<Token>, usize)> {
    let (mut tokens, mut at, mut depth) = (Vec::new(), 0, 0usize);
    loop {
        let rest = &text[at..];
        let c = rest.chars().next()?;
        let unsigned = rest.strip_prefix(['-', '+']).unwrap_or(rest);
        if depth == 0 && (rest.starts_with(end) || unsigned.starts_with(end)) {
            return Some((tokens, at));
        }
        let run = |test: &dyn Fn(char) -> bool| rest.find(|c| !test(c)).unwrap_or(rest.len());
        let (kind, len) = if c.is_whitespace() {
            (Kind::Space, run(&char::is_whitespace))
        } else if c.is_alphabetic() || c == '_' {
            (Kind::Name, run(&|c| c.is_alphanumeric() || c == '_'))
        } else if c.is_ascii_digit() {
            (Kind::Number, number(rest))
        } else if matches!(c, '\'' | '"') {
            (Kind::Text, string(rest, c)?)
        } else {
            match c {
                '(' | '[' | '{' => depth += 1,
                ')' | ']' | '}' => depth = depth.saturating_sub(1),
                _ => {}
            }
            let pair = OPERATORS.iter().any(|pair| rest.starts_with(pair));
            (Kind::Operator, if pair { 2 } else { c.len_utf8() })
        };
        let text = &rest[..len];
        let text = match kind {
            Kind::Text => with_escapes(text),
            _ => text.to_string(),
        };
        tokens.push(Token { kind, text });
        at += len;
    }
}

/// Returns the length of a number.
fn number(text: &str) -> usize {
    let digits = |text: &str| {
        text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
            .unwrap_or(text.len())
    };
    let mut len = digits(text);
    if text[len..]
        .strip_prefix('.')
        .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
    {
        len += 1 + digits(&text[len + 1..]);
    }
    let exponent = !text.starts_with("0x") && text[..len].ends_with(['e', 'E']);
    if exponent && text[len..].starts_with(['+', '-']) {
        len += 1 + digits(&text[len + 1..]);
    }
    len
}

/// Returns the length of a string with its quotes.
fn string(text: &str, quote: char) -> Option<usize> {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        if c == quote && !escaped {
            return Some(at + 1);
        }
        escaped = c == '\\' && !escaped;
    }
    None
}

/// Replaces those of Python's escapes that minijinja reads otherwise.
fn with_escapes(literal: &str) -> String {
    let mut out = String::with_capacity(literal.len());
    let mut rest = literal;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let escape = &rest[at..];
        let (len, replaced) = python_escape(&escape[1..]);
        match replaced {
            Some(text) => out.push_str(&text),
            None => out.push_str(&escape[..=len]),
        }
        rest = &escape[1 + len..];
    }
    out.push_str(rest);
    out
}

/// Returns the length of an escape after its backslash, and what to write instead of it.
fn python_escape(text: &str) -> (usize, Option<String>) {
    let Some(c) = text.chars().next() else {
        return (0, None);
    };
    let len = c.len_utf8();
    let code = |digits: &str, radix| {
        u32::from_str_radix(digits, radix)
            .ok()
            .and_then(char::from_u32)
            .map(String::from)
    };
    match c {
        'a' => (len, Some("\u{7}".into())),
        'v' => (len, Some("\u{b}".into())),
        // Python knows no such escape, so the backslash stays.
        '/' => (len, Some("\\\\/".into())),
        // The line ends in the tag, not in the text.
        '\n' => (len, Some(String::new())),
        '0'..='7' => {
            let digits = text
                .bytes()
                .take(3)
                .take_while(|b| (b'0'..=b'7').contains(b));
            let len = digits.count();
            // Below this value minijinja reads it, and it may be a quote.
            let large = u32::from_str_radix(&text[..len], 8).is_ok_and(|code| code > 255);
            (len, large.then(|| code(&text[..len], 8)).flatten())
        }
        'U' => match text.get(1..9).and_then(|digits| code(digits, 16)) {
            Some(c) if matches!(c.as_str(), "'" | "\"" | "\\") => (9, Some(format!("\\{c}"))),
            Some(c) => (9, Some(c)),
            None => (len, None),
        },
        'N' => match text[1..]
            .strip_prefix('{')
            .and_then(|name| name.split_once('}'))
        {
            Some((name, _)) => match unicode_names2::character(name) {
                Some(c) if matches!(c, '\'' | '"' | '\\') => {
                    (name.len() + 3, Some(format!("\\{c}")))
                }
                Some(c) => (name.len() + 3, Some(c.into())),
                None => (len, None),
            },
            None => (len, None),
        },
        _ => (len, None),
    }
}

/// Whether an expression may end with this token.
pub(super) fn ends_operand(token: &Token) -> bool {
    match token.kind {
        Kind::Name => {
            !token.is_one_of(&["and", "or", "not", "if", "else", "elif", "in", "is", "for"])
        }
        Kind::Number | Kind::Text => true,
        Kind::Operator => token.closes(),
        Kind::Space => false,
    }
}

/// Returns where the left operand of the operator at `at` begins: the products, quotients, and
/// powers before it, but no sums. Code begins at `first`.
pub(super) fn operand_start(tokens: &[Token], first: usize, at: usize) -> Option<usize> {
    let before = |n: usize| {
        tokens[first..n]
            .iter()
            .rposition(|t| t.kind != Kind::Space)
            .map(|n| n + first)
    };
    let (mut start, mut n) = (None, before(at));
    while let Some(place) = n {
        let token = &tokens[place];
        let previous = before(place);
        let after = |names: &[&str]| previous.is_some_and(|p| tokens[p].is_one_of(names));
        let part = if token.closes() {
            let open = opening(tokens, first, place)?;
            start = Some(open);
            n = before(open);
            continue;
        } else if token.is("-") || token.is("+") {
            // A sign is part of the operand, a difference is not.
            !previous.is_some_and(|p| ends_operand(&tokens[p]))
        } else if token.kind == Kind::Name {
            match token.text.as_str() {
                "not" => after(&["is"]),
                "in" => after(&["is"]) || (after(&["not"]) && is_test(tokens, first, place)),
                "and" | "or" | "if" | "else" | "elif" | "for" => false,
                _ => true,
            }
        } else {
            token.kind != Kind::Operator || token.is_one_of(&["*", "/", "//", "**", "%", ".", "|"])
        };
        if !part {
            break;
        }
        start = Some(place);
        n = previous;
    }
    start
}

/// Whether the `in` at `at` belongs to `is not in`.
fn is_test(tokens: &[Token], first: usize, at: usize) -> bool {
    let mut names = tokens[first..at]
        .iter()
        .rev()
        .filter(|t| t.kind != Kind::Space);
    names.next().is_some_and(|t| t.is("not")) && names.next().is_some_and(|t| t.is("is"))
}

/// Returns the bracket that the one at `close` closes.
fn opening(tokens: &[Token], first: usize, close: usize) -> Option<usize> {
    let mut depth = 0usize;
    for n in (first..=close).rev() {
        if tokens[n].closes() {
            depth += 1;
        } else if tokens[n].opens() {
            depth -= 1;
            if depth == 0 {
                return Some(n);
            }
        }
    }
    None
}

/// Returns where the operand that begins at `at` ends: a signed primary expression with everything
/// that follows it directly, its filters, tests, and powers.
pub(super) fn operand_end(tokens: &[Token], at: usize) -> Option<usize> {
    let next = |n: usize| {
        tokens[n..]
            .iter()
            .position(|t| t.kind != Kind::Space)
            .map(|m| m + n)
    };
    let mut n = next(at)?;
    while tokens[n].is("-") || tokens[n].is("+") {
        n = next(n + 1)?;
    }
    let mut end = primary(tokens, n)?;
    while let Some(n) = next(end) {
        let token = &tokens[n];
        end = if token.is("(") || token.is("[") {
            closing(tokens, n)?
        } else if token.is(".") || token.is("|") {
            next(n + 1)? + 1
        } else if token.is("**") {
            operand_end(tokens, n + 1)?
        } else if token.is("is") {
            test_end(tokens, n + 1)?
        } else if token.kind == Kind::Text && tokens[end - 1].kind == Kind::Text {
            n + 1
        } else {
            return Some(end);
        };
    }
    Some(end)
}

/// Returns where the test after `is` ends, with its one argument if it has one without brackets.
fn test_end(tokens: &[Token], at: usize) -> Option<usize> {
    let next = |n: usize| {
        tokens[n..]
            .iter()
            .position(|t| t.kind != Kind::Space)
            .map(|m| m + n)
    };
    let mut name = next(at)?;
    if tokens[name].is("not") {
        name = next(name + 1)?;
    }
    let end = name + 1;
    let argument = next(end).filter(|&n| match tokens[n].kind {
        Kind::Name => !tokens[n].is_one_of(&["and", "or", "else", "if", "is", "in", "not"]),
        Kind::Operator => tokens[n].is("[") || tokens[n].is("{") || tokens[n].is("("),
        _ => true,
    });
    argument.map_or(Some(end), |n| primary(tokens, n))
}

/// Returns where a name, a literal, or a bracketed expression ends.
fn primary(tokens: &[Token], at: usize) -> Option<usize> {
    match &tokens[at] {
        token if token.opens() => closing(tokens, at),
        token if token.kind == Kind::Operator => None,
        _ => Some(at + 1),
    }
}

/// Returns what follows the bracket that closes the one at `open`.
pub(super) fn closing(tokens: &[Token], open: usize) -> Option<usize> {
    let mut depth = 0usize;
    for (n, token) in tokens.iter().enumerate().skip(open) {
        if token.opens() {
            depth += 1;
        } else if token.closes() {
            depth = depth.checked_sub(1)?;
            if depth == 0 {
                return Some(n + 1);
            }
        }
    }
    None
}
