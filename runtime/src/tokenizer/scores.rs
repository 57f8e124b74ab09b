//! SentencePiece-style merging by score (`llama` vocabularies).
//!
//! Spaces are written `▁`. The text starts as single characters; of all neighbors whose texts
//! together are a token, the pair with the highest score is merged first (the leftmost of equals),
//! until none is left. Characters that aren't tokens are spelled with the byte tokens `<0x00>` to
//! `<0xFF>`.
//!
//! No merge crosses a place that no token of the vocabulary crosses. Such places are found before
//! spaces, so that a text is encoded word by word and memory depends on the longest of them.

use super::TokenizerError;
use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap, HashSet};

/// How a space is written inside tokens.
pub(super) const SPACE: char = '▁';

/// A vocabulary with scores.
#[derive(Debug)]
pub(super) struct ScoreMerges {
    ids: HashMap<String, u32>,
    scores: Vec<f32>,
    /// By byte: the token that spells it.
    bytes: Box<[Option<u32>; 256]>,
    unk: Option<u32>,
    /// Characters that some token has before a space.
    before_space: HashSet<char>,
    /// Bytes of the longest token; no longer text needs to be looked up.
    longest: usize,
}

/// No neighbor.
const NONE: u32 = u32::MAX;

/// A stretch of a piece that is one token so far; neighbors are linked by index.
struct Symbol {
    start: u32,
    /// One past the last byte; `end == start` once merged into its left neighbor.
    end: u32,
    prev: u32,
    next: u32,
}

/// Two neighbors that could be merged.
struct Pair {
    score: f32,
    left: u32,
    right: u32,
    /// Bytes of both when the pair was found; it is stale once they differ.
    len: u32,
}

/// Buffers of one call, which its pieces share.
#[derive(Default)]
struct Buffers {
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Pair>,
}

impl Ord for Pair {
    fn cmp(&self, other: &Self) -> Ordering {
        self.score
            .total_cmp(&other.score)
            .then(other.left.cmp(&self.left))
    }
}

impl PartialOrd for Pair {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Pair {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Pair {}

impl ScoreMerges {
    /// Builds the encoder; `scores` has one entry per token, or none where all are equal.
    pub fn new(tokens: Vec<String>, scores: Vec<f32>, unk: Option<u32>) -> Self {
        let longest = tokens.iter().map(String::len).max().unwrap_or(1).max(1);
        let before = tokens.iter().flat_map(|token| {
            let characters = token.chars().zip(token.chars().skip(1));
            characters.filter_map(|(before, c)| (c == SPACE).then_some(before))
        });
        let before_space = before.collect();
        let mut ids = HashMap::with_capacity(tokens.len());
        for (id, token) in (0u32..).zip(tokens) {
            if !token.is_empty() {
                ids.insert(token, id);
            }
        }
        let mut bytes = Box::new([None; 256]);
        for (b, id) in (0u8..=255).zip(bytes.iter_mut()) {
            let plain = || {
                b.is_ascii()
                    .then(|| ids.get(char::from(b).encode_utf8(&mut [0; 4]) as &str))
                    .flatten()
            };
            *id = ids.get(&format!("<0x{b:02X}>")).or_else(plain).copied();
        }
        Self {
            ids,
            scores,
            bytes,
            unk,
            before_space,
            longest,
        }
    }

    /// Appends the tokens of `text`, whose spaces are already written [`SPACE`]. Stops with an
    /// error where more than `most` are certain.
    pub fn encode(
        &self,
        text: &str,
        most: usize,
        out: &mut Vec<u32>,
    ) -> Result<(), TokenizerError> {
        let mut buffers = Buffers::default();
        let mut rest = text;
        while !rest.is_empty() {
            let (piece, after) = rest.split_at(self.cut(rest));
            // An unknown character of up to 4 bytes may be one token too.
            let least = out.len() + piece.len().div_ceil(self.longest.max(4));
            if least > most {
                return Err(TokenizerError::TooLong { least, most });
            }
            self.piece(piece, &mut buffers, out)?;
            rest = after;
        }
        Ok(())
    }

    /// Returns where the first piece of `text` ends: before a space, where no token has both the
    /// space and what is before it.
    fn cut(&self, text: &str) -> usize {
        let mut before = None;
        for (at, c) in text.char_indices() {
            if c == SPACE && before.is_some_and(|before| !self.before_space.contains(&before)) {
                return at;
            }
            before = Some(c);
        }
        text.len()
    }

    /// Appends the tokens of one piece.
    fn piece(
        &self,
        text: &str,
        buffers: &mut Buffers,
        out: &mut Vec<u32>,
    ) -> Result<(), TokenizerError> {
        let Buffers { symbols, queue } = buffers;
        symbols.clear();
        queue.clear();
        for (i, (start, c)) in (0u32..).zip(text.char_indices()) {
            symbols.push(Symbol {
                start: start as u32,
                end: (start + c.len_utf8()) as u32,
                prev: i.wrapping_sub(1),
                next: i + 1,
            });
        }
        if let Some(last) = symbols.last_mut() {
            last.next = NONE;
        }
        for i in 1..symbols.len() as u32 {
            self.offer(text, symbols, i - 1, i, queue);
        }
        while let Some(Pair {
            left, right, len, ..
        }) = queue.pop()
        {
            let (l, r) = (&symbols[left as usize], &symbols[right as usize]);
            if l.start == l.end || r.start == r.end || r.end - l.start != len {
                continue;
            }
            let (end, prev, next) = (r.end, l.prev, r.next);
            symbols[left as usize].end = end;
            symbols[left as usize].next = next;
            symbols[right as usize].end = symbols[right as usize].start;
            if let Some(next) = symbols.get_mut(next as usize) {
                next.prev = left;
            }
            self.offer(text, symbols, prev, left, queue);
            self.offer(text, symbols, left, next, queue);
        }
        let mut at = 0;
        while let Some(symbol) = symbols.get(at as usize) {
            self.emit(&text[symbol.start as usize..symbol.end as usize], out)?;
            at = symbol.next;
        }
        Ok(())
    }

    /// Queues the neighbors `left` and `right` if together they are a token.
    fn offer(
        &self,
        text: &str,
        symbols: &[Symbol],
        left: u32,
        right: u32,
        queue: &mut BinaryHeap<Pair>,
    ) {
        let (Some(l), Some(r)) = (symbols.get(left as usize), symbols.get(right as usize)) else {
            return;
        };
        let both = &text[l.start as usize..r.end as usize];
        if both.len() > self.longest {
            return;
        }
        let Some(&id) = self.ids.get(both) else {
            return;
        };
        // Adding 0 makes 0 of -0, which are equal scores.
        let score = self.scores.get(id as usize).copied().unwrap_or(0.0) + 0.0;
        queue.push(Pair {
            score,
            left,
            right,
            len: both.len() as u32,
        });
    }

    fn emit(&self, symbol: &str, out: &mut Vec<u32>) -> Result<(), TokenizerError> {
        if let Some(&id) = self.ids.get(symbol) {
            out.push(id);
            return Ok(());
        }
        if symbol.bytes().all(|b| self.bytes[b as usize].is_some()) {
            out.extend(symbol.bytes().filter_map(|b| self.bytes[b as usize]));
            return Ok(());
        }
        out.push(self.unk.ok_or_else(|| TokenizerError::NoByte {
            byte: symbol.as_bytes()[0],
        })?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Merges the best pair of the whole text, again and again.
    fn plainly(tokens: &[(String, f32)], text: &str) -> Vec<String> {
        let score = |t: &str| {
            tokens
                .iter()
                .rev()
                .find(|(token, _)| token == t)
                .map(|(_, s)| *s)
        };
        let mut parts: Vec<String> = text.chars().map(String::from).collect();
        loop {
            let mut best: Option<(f32, usize)> = None;
            for i in 1..parts.len() {
                if let Some(s) = score(&format!("{}{}", parts[i - 1], parts[i]))
                    && best.is_none_or(|(b, _)| s > b)
                {
                    best = Some((s, i - 1));
                }
            }
            let Some((_, i)) = best else { return parts };
            let right = parts.remove(i + 1);
            parts[i] += &right;
        }
    }

    proptest! {
        #[test]
        fn as_the_plain_way(
            tokens in prop::collection::vec(("[abé▁]{2,5}", (-6i8..0).prop_map(f32::from)), 0..40),
            text in "[abé▁]{0,24}",
        ) {
            let mut all: Vec<(String, f32)> = ["a", "b", "é", "▁"].map(|c| (c.to_string(), -9.0)).to_vec();
            all.extend(tokens);
            let (texts, scores): (Vec<_>, Vec<_>) = all.iter().cloned().unzip();
            let mut ids = Vec::new();
            ScoreMerges::new(texts, scores, None).encode(&text, usize::MAX, &mut ids).unwrap();
            let found: Vec<&str> = ids.iter().map(|id| all[*id as usize].0.as_str()).collect();
            prop_assert_eq!(found, plainly(&all, &text));
        }
    }

    #[test]
    fn unknown_characters_are_spelled_or_unknown_or_refused() {
        let ids = |tokens: &[&str], unk| {
            let tokens: Vec<String> = tokens.iter().map(|t| t.to_string()).collect();
            let scores = vec![0.0; tokens.len()];
            let mut out = Vec::new();
            ScoreMerges::new(tokens, scores, unk)
                .encode("aé", usize::MAX, &mut out)
                .map(|()| out)
        };
        assert_eq!(ids(&["a", "<0xA9>", "<0xC3>"], None).unwrap(), [0, 2, 1]);
        assert_eq!(ids(&["a", "<0xA9>", "<unk>"], Some(2)).unwrap(), [0, 2]);
        assert!(matches!(
            ids(&["a"], None),
            Err(TokenizerError::NoByte { byte: 0xC3 })
        ));
    }
}
