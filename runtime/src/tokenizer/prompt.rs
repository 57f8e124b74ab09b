//! The tokens of a prompt: the one rule that every command follows.

use super::special::Parse;
use super::{Tokenizer, TokenizerError};
use std::ops::Range;

/// A stretch of a prompt whose tokens are known, such as an answer of the model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownTokens<'a> {
    /// Where the stretch is in the prompt, in bytes.
    pub range: Range<usize>,
    /// Tokens that spell it.
    pub ids: &'a [u32],
}

/// Returns the parts of sorted ranges that lie in `part`, counted from its start.
fn cut(ranges: &[Range<usize>], part: &Range<usize>) -> Vec<Range<usize>> {
    ranges
        .iter()
        .map(|range| range.start.max(part.start)..range.end.min(part.end))
        .filter(|range| !range.is_empty())
        .map(|range| range.start - part.start..range.end - part.start)
        .collect()
}

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
        self.encode_known(text, plain, &[], most)
    }

    /// Returns the tokens of a prompt like [`encode_prompt`](Self::encode_prompt), of which some
    /// stretches get tokens that are known. The stretches are sorted and do not overlap. No token
    /// crosses their borders.
    ///
    /// # Errors
    /// As [`encode_within`](Self::encode_within).
    pub fn encode_known(
        &self,
        text: &str,
        plain: &[Range<usize>],
        known: &[KnownTokens<'_>],
        most: usize,
    ) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = Vec::with_capacity((text.len() / 3).min(most).min(1 << 16) + 2);
        // The space prefix also goes before text that follows a special token.
        let mut after_special = true;
        let mut at = 0;
        let end = KnownTokens {
            range: text.len()..text.len(),
            ids: &[],
        };
        for known in known.iter().chain([&end]) {
            let part = at..known.range.start;
            if !part.is_empty() || known.range.is_empty() {
                let inside = cut(plain, &part);
                let parse = Parse::Outside(&inside);
                after_special =
                    self.encode_onto(&text[part], parse, most, after_special, &mut ids)?;
            }
            if !known.ids.is_empty() {
                ids.extend_from_slice(known.ids);
                after_special = false;
            }
            at = known.range.end;
        }
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
