//! The tokens of a prompt: the one rule that every command follows.

use super::special::Parse;
use super::{Tokenizer, TokenizerError};
use std::ops::Range;

impl Tokenizer {
    /// Returns the tokens of `text`.
    ///
    /// With `special`, the text is a prompt: special tokens written out in it become their ids, and
    /// it begins with one BOS where the model wants it, unless it has that already. EOS is never
    /// added, since a prompt is continued. Without, all of `text` is plain text and nothing is
    /// added.
    ///
    /// # Errors
    /// When the model has no vocabulary, or the vocabulary can't spell the text.
    pub fn encode(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenizerError> {
        self.encode_within(text, special, usize::MAX)
    }

    /// Returns the tokens of `text` as [`encode`](Self::encode) does, unless they are more than
    /// `most`. A text far longer than that is refused before it takes memory.
    ///
    /// # Errors
    /// As [`encode`](Self::encode), and [`TokenizerError::TooLong`].
    pub fn encode_within(
        &self,
        text: &str,
        special: bool,
        most: usize,
    ) -> Result<Vec<u32>, TokenizerError> {
        if special {
            self.encode_prompt(text, &[], most)
        } else {
            self.encode_as(text, Parse::UserDefined, most)
        }
    }

    /// Returns the tokens of a prompt like [`encode_within`](Self::encode_within), of which some
    /// ranges of bytes are a person's text: no control token comes of what is written there. The
    /// ranges are sorted and do not overlap. Merges cross their borders, as they do in a text
    /// without ranges.
    ///
    /// # Errors
    /// As [`encode_within`](Self::encode_within).
    pub fn encode_prompt(
        &self,
        text: &str,
        plain: &[Range<usize>],
        most: usize,
    ) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = self.encode_as(text, Parse::Outside(plain), most)?;
        if let Some(bos) = self.prefix()
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        if ids.len() > most {
            let least = ids.len();
            return Err(TokenizerError::TooLong { least, most });
        }
        Ok(ids)
    }

    /// Returns the text of the first token written out in `text` that is structure in a prompt,
    /// like the end of a turn.
    pub fn structure_in(&self, text: &str) -> Option<&str> {
        self.specials.structure_in(text)
    }
}
