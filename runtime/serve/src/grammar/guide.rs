//! A vocabulary as llguidance needs it, and texts on their way through a grammar.

use llguidance::api::TopLevelGrammar;
use llguidance::toktrie::{ApproximateTokEnv, TokEnv, TokRxInfo, TokTrie};
use llguidance::{Matcher, ParserFactory};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use tier_plan_runtime::batcher::{Grammar, Guide};
use tier_plan_runtime::tokenizer::{TokenKind, Tokenizer};

/// Longest token that a grammar can have in bytes, a bound of the tree of tokens.
const MAX_TOKEN_BYTES: usize = 1000;

/// Most items of the parser per mask, half a second or so. Grammars whose lexemes are single characters
/// have many.
const MAX_ITEMS: usize = 2_000_000;

/// The tokens of a model.
pub(super) struct Vocabulary {
    factory: ParserFactory,
    /// Tokens of whole marks by their texts.
    marks: HashMap<Vec<u8>, (u32, TokenKind)>,
    longest_mark: usize,
}

impl Vocabulary {
    /// Puts the tokens in order.
    ///
    /// # Errors
    /// When the vocabulary has no token that ends a text.
    pub fn new(tokenizer: &Tokenizer) -> Result<Self, String> {
        let n_vocab = u32::try_from(tokenizer.n_vocab()).unwrap_or(u32::MAX);
        let ends: Vec<u32> = (0..n_vocab).filter(|id| tokenizer.is_eog(*id)).collect();
        let Some(&end) = ends.first() else {
            return Err("this model has no token that ends a text, expected one".into());
        };
        let words: Vec<Vec<u8>> = (0..n_vocab).map(|id| word(tokenizer, id)).collect();
        let mut marks = HashMap::new();
        for id in 0..n_vocab {
            if let Some(kind @ (TokenKind::Control | TokenKind::UserDefined)) = tokenizer.kind(id) {
                marks.insert(tokenizer.piece(id).to_vec(), (id, kind));
            }
        }
        marks.remove(&Vec::new());
        let trie = TokTrie::from(&TokRxInfo::new(n_vocab, end), &words).with_eos_tokens(&ends);
        let env: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory = ParserFactory::new_simple(&env).map_err(|error| error.to_string())?;
        factory.quiet();
        factory.limits_mut().step_max_items = MAX_ITEMS;
        Ok(Self {
            factory,
            longest_mark: marks.keys().map(Vec::len).max().unwrap_or(0),
            marks,
        })
    }

    /// Returns the control token that a text begins with, the longest one, and the bytes of it.
    pub fn control(&self, text: &str) -> Option<(u32, usize)> {
        let most = self.longest_mark.min(text.len());
        (1..=most).rev().find_map(|n| {
            let (id, kind) = self.marks.get(&text.as_bytes()[..n])?;
            (*kind == TokenKind::Control).then_some((*id, n))
        })
    }

    /// Whether there is a token of its own for a mark.
    pub fn has(&self, text: &str) -> bool {
        self.marks.contains_key(text.as_bytes())
    }

    /// Compiles a grammar.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn compile(&self, lark: &str) -> Result<Grammar, String> {
        let grammar = TopLevelGrammar::from_lark(lark.to_string());
        let matcher = Matcher::new(self.factory.create_parser(grammar));
        if let Some(error) = matcher.get_error() {
            return Err(plain(&error));
        }
        // A grammar of no text at all shows only here.
        let first = matcher.deep_clone().compute_mask_or_eos();
        first.map_err(|_| "no text goes by it".to_string())?;
        let start = Mutex::new(matcher);
        Ok(Grammar::new(move || {
            let start = start.lock().unwrap_or_else(PoisonError::into_inner);
            Box::new(Way(start.deep_clone()))
        }))
    }
}

/// Returns a token as the tree of tokens has it: texts as they are, structure marked as such, and what
/// is never produced empty.
fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let piece = tokenizer.piece(id);
    let is_control = tokenizer.is_eog(id) || tokenizer.kind(id) == Some(TokenKind::Control);
    let is_text = tokenizer.kind(id).is_some_and(TokenKind::is_text);
    if piece.len() > MAX_TOKEN_BYTES {
        Vec::new()
    } else if is_control {
        [&[TokTrie::SPECIAL_TOKEN_MARKER], piece].concat()
    } else if is_text && piece.first() != Some(&TokTrie::SPECIAL_TOKEN_MARKER) {
        piece.to_vec()
    } else {
        Vec::new()
    }
}

/// Returns what is wrong of a message that also shows the grammar and the place in it.
fn plain(message: &str) -> String {
    let line = message.lines().next().unwrap_or_default().trim();
    let is_place = |text: &str| {
        let text = text.strip_prefix("at ").unwrap_or(text);
        text.ends_with(')') && text.starts_with(|c: char| c.is_ascii_digit())
    };
    match line.split_once(": ") {
        Some((place, what)) if is_place(place) => plain(what),
        _ => line.to_string(),
    }
}

/// A text on its way.
struct Way(Matcher);

impl Guide for Way {
    fn accept(&mut self, token: u32) -> Result<(), String> {
        self.0
            .consume_token(token)
            .map_err(|error| plain(&error.to_string()))
    }

    fn mask(&mut self) -> Result<Vec<u32>, String> {
        let mask = self.0.compute_mask_or_eos();
        let mask = mask.map_err(|error| plain(&error.to_string()))?;
        Ok(mask.as_slice().to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::plain;

    #[test]
    fn messages_are_one_line_without_places() {
        for (message, expected) in [
            ("at 2(5): failed: a: b\n   1 | start", "failed: a: b"),
            ("4(2): 3(2): Expected token ':'\n", "Expected token ':'"),
            ("unknown grammar @other", "unknown grammar @other"),
            ("regex parse error: (a)", "regex parse error: (a)"),
            ("", ""),
        ] {
            assert_eq!(plain(message), expected);
        }
    }
}
