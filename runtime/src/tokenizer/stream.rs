//! Streaming decoding: text as it is generated, token by token.

use super::Tokenizer;
use std::sync::Arc;

/// Turns tokens into text one at a time. Characters may be spread over several tokens; what has
/// been pushed is given out once it is whole. Control tokens give no text, but
/// for [some](Self::showing).
#[derive(Debug, Clone)]
pub struct TokenStream<'a> {
    tokenizer: &'a Tokenizer,
    /// Control tokens that give their text all the same.
    shown: Arc<[u32]>,
    /// Bytes of an unfinished character: at most three.
    pending: Vec<u8>,
}

impl<'a> TokenStream<'a> {
    pub(super) fn new(tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            shown: Arc::new([]),
            pending: Vec::with_capacity(16),
        }
    }

    /// Has some control tokens give their texts.
    #[must_use]
    pub fn showing(self, tokens: Arc<[u32]>) -> Self {
        Self {
            shown: tokens,
            ..self
        }
    }

    /// Takes the next token and returns the text that is whole with it. Bytes that can't be part of
    /// any character become U+FFFD, as in [`Tokenizer::decode`].
    pub fn push(&mut self, id: u32) -> String {
        let is_text = self.tokenizer.kind(id).is_some_and(|k| k.is_text());
        if is_text || self.shown.contains(&id) {
            self.pending.extend_from_slice(self.tokenizer.piece(id));
        }
        let mut text = String::new();
        let mut used = 0;
        for chunk in self.pending.utf8_chunks() {
            text.push_str(chunk.valid());
            used += chunk.valid().len();
            let bad = chunk.invalid();
            if bad.is_empty() {
                break;
            }
            let at_end = used + bad.len() == self.pending.len();
            if at_end && std::str::from_utf8(bad).is_err_and(|e| e.error_len().is_none()) {
                break;
            }
            text.push(char::REPLACEMENT_CHARACTER);
            used += bad.len();
        }
        self.pending.drain(..used);
        text
    }

    /// Ends the text: an unfinished character becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        let text = String::from_utf8_lossy(&self.pending).into_owned();
        self.pending.clear();
        text
    }
}
