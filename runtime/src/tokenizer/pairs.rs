//! Byte-level byte-pair encoding, BPE (`gpt2` vocabularies).
//!
//! The text is cut into words, each word's bytes are written in the printable alphabet, and
//! neighboring tokens are merged in the order in which the merges were learned.

use super::TokenizerError;
use super::bytes::CHARS;
use super::split::{Family, Splitter};
use tokenizers::Model;
use tokenizers::models::bpe::{BPE, Vocab};

/// A byte-level vocabulary with its merges.
#[derive(Debug)]
pub(super) struct BytePairs {
    model: BPE,
    splitter: Splitter,
    /// By byte: whether the vocabulary has a token for it.
    has_byte: Box<[bool; 256]>,
}

impl BytePairs {
    /// Builds the encoder. Of tokens with the same text the last one counts; merges of tokens that
    /// the vocabulary lacks can't ever apply and are left out.
    pub fn new(
        family: &Family,
        tokens: Vec<String>,
        merges: &[String],
    ) -> Result<Self, TokenizerError> {
        if merges.is_empty() {
            return Err(TokenizerError::NoMerges);
        }
        let splitter = Splitter::new(family).map_err(TokenizerError::Build)?;
        let mut vocab = Vocab::with_capacity(tokens.len());
        for (id, token) in (0u32..).zip(tokens) {
            if !token.is_empty() {
                vocab.insert(token, id);
            }
        }
        let mut pairs = Vec::with_capacity(merges.len());
        let mut joined = String::new();
        for (index, merge) in merges.iter().enumerate() {
            // A token may start with a space in vocabularies that aren't byte-level, so look from
            // the second byte.
            let middle = merge.bytes().skip(1).position(|b| b == b' ').map(|p| p + 1);
            let parts = middle.and_then(|m| Some((merge.get(..m)?, merge.get(m + 1..)?)));
            let Some((left, right)) = parts.filter(|(_, right)| !right.is_empty()) else {
                return Err(TokenizerError::BadMerge {
                    index,
                    text: merge.clone(),
                });
            };
            joined.clear();
            joined.push_str(left);
            joined.push_str(right);
            if vocab.contains_key(left) && vocab.contains_key(right) && vocab.contains_key(&joined)
            {
                pairs.push((left.to_string(), right.to_string()));
            }
        }
        let mut has_byte = Box::new([false; 256]);
        for (byte, has) in has_byte.iter_mut().enumerate() {
            *has = vocab.contains_key(CHARS[byte].encode_utf8(&mut [0; 4]) as &str);
        }
        let model = BPE::builder()
            .vocab_and_merges(vocab, pairs)
            .ignore_merges(family.ignore_merges)
            .build()
            .map_err(|e| TokenizerError::Build(e.to_string()))?;
        Ok(Self {
            model,
            splitter,
            has_byte,
        })
    }

    /// Appends the tokens of `text`, which holds no special tokens.
    pub fn encode(&self, text: &str, out: &mut Vec<u32>) -> Result<(), TokenizerError> {
        let mut spelled = String::new();
        for word in self.splitter.split(text) {
            spelled.clear();
            for &b in word.as_bytes() {
                if !self.has_byte[b as usize] {
                    return Err(TokenizerError::NoByte { byte: b });
                }
                spelled.push(CHARS[b as usize]);
            }
            let tokens = self
                .model
                .tokenize(&spelled)
                .map_err(|e| TokenizerError::Build(e.to_string()))?;
            out.extend(tokens.iter().map(|t| t.id));
        }
        Ok(())
    }
}
