//! Templates by the rules in `grammar.txt`: right ones mostly, with values that are not.

use arbitrary::{Result, Unstructured};
use std::collections::HashMap;
use std::sync::LazyLock;

/// How deep code nests.
const MAX_DEPTH: usize = 5;
/// Bytes of code after which nothing nests anymore.
const MAX_NESTED_BYTES: usize = 2 << 10;
/// Rules whose alternatives name rules.
const NESTING: &str = "ATES";

/// The alternatives of every rule.
static RULES: LazyLock<HashMap<char, Vec<&str>>> = LazyLock::new(|| {
    let sections = include_str!("grammar.txt").split("\n\n[").skip(1);
    let rule = |section: &'static str| {
        let (head, body) = section.split_once("]\n").expect("a head of a section");
        let body = body.strip_suffix('\n').unwrap_or(body);
        let alternatives = match head.ends_with("words") {
            true => body.split_whitespace().collect(),
            false => body.split('\n').collect(),
        };
        (head.chars().next().expect("a letter"), alternatives)
    };
    sections.map(rule).collect()
});

/// Code that is being generated.
struct Generator<'i, 'b> {
    input: &'i mut Unstructured<'b>,
    out: String,
}

/// Generates what a rule stands for.
pub fn generate(input: &mut Unstructured<'_>, rule: char) -> Result<String> {
    let out = String::new();
    let mut generator = Generator { input, out };
    generator.expand(rule, MAX_DEPTH)?;
    Ok(generator.out)
}

impl Generator<'_, '_> {
    /// Appends what a rule stands for.
    fn expand(&mut self, rule: char, depth: usize) -> Result<()> {
        let alternatives = &RULES[&rule];
        let is_full = self.input.is_empty() || self.out.len() > MAX_NESTED_BYTES;
        let mut rest = if NESTING.contains(rule) && (is_full || depth == 0) {
            alternatives[0]
        } else {
            self.input.choose(alternatives)?
        };
        while let Some((text, after)) = rest.split_once('$') {
            self.out.push_str(text);
            let mut letters = after.chars();
            self.expand(letters.next().expect("a rule"), depth.saturating_sub(1))?;
            rest = letters.as_str();
        }
        self.out.push_str(rest);
        Ok(())
    }
}
