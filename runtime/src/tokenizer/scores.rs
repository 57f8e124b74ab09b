//! SentencePiece-style merging by score (`llama` vocabularies).
//!
//! Spaces are written `▁`. The text starts as single characters; of all neighbors whose texts
//! together are a token, the pair with the highest score is merged first (the leftmost of equals),
//! until none is left. Characters that aren't tokens are spelled with the byte tokens `<0x00>` to
//! `<0xFF>`.

use super::TokenizerError;
use std::cmp::Ordering;
use std::collections::{BinaryHeap, HashMap};

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
    /// Bytes of the longest token; no longer text needs to be looked up.
    longest: usize,
}

/// A stretch of the text that is one token so far; neighbors are linked by index.
struct Symbol {
    start: usize,
    /// One past the last byte; `end == start` once merged into its left neighbor.
    end: usize,
    prev: Option<usize>,
    next: Option<usize>,
}

/// Two neighbors that could be merged.
struct Pair {
    score: f32,
    left: usize,
    right: usize,
    /// Bytes of both when the pair was found; it is stale once they differ.
    len: usize,
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
    /// Builds the encoder; `scores` has one entry per token.
    pub fn new(tokens: Vec<String>, scores: Vec<f32>, unk: Option<u32>) -> Self {
        let longest = tokens.iter().map(String::len).max().unwrap_or(0);
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
            longest,
        }
    }

    /// Appends the tokens of `text`, whose spaces are already written [`SPACE`].
    pub fn encode(&self, text: &str, out: &mut Vec<u32>) -> Result<(), TokenizerError> {
        let mut symbols: Vec<Symbol> = Vec::with_capacity(text.len());
        for (start, c) in text.char_indices() {
            let i = symbols.len();
            let end = start + c.len_utf8();
            symbols.push(Symbol {
                start,
                end,
                prev: i.checked_sub(1),
                next: (end < text.len()).then_some(i + 1),
            });
        }
        let mut queue = BinaryHeap::new();
        for i in 1..symbols.len() {
            self.offer(text, &symbols, Some(i - 1), Some(i), &mut queue);
        }
        while let Some(Pair {
            left, right, len, ..
        }) = queue.pop()
        {
            let (l, r) = (&symbols[left], &symbols[right]);
            if l.start == l.end || r.start == r.end || r.end - l.start != len {
                continue;
            }
            let (end, prev, next) = (r.end, l.prev, r.next);
            symbols[left].end = end;
            symbols[left].next = next;
            symbols[right].end = symbols[right].start;
            if let Some(next) = next {
                symbols[next].prev = Some(left);
            }
            self.offer(text, &symbols, prev, Some(left), &mut queue);
            self.offer(text, &symbols, Some(left), next, &mut queue);
        }
        let mut at = (!symbols.is_empty()).then_some(0);
        while let Some(i) = at {
            self.emit(&text[symbols[i].start..symbols[i].end], out)?;
            at = symbols[i].next;
        }
        Ok(())
    }

    /// Queues the neighbors `left` and `right` if together they are a token.
    fn offer(
        &self,
        text: &str,
        symbols: &[Symbol],
        left: Option<usize>,
        right: Option<usize>,
        queue: &mut BinaryHeap<Pair>,
    ) {
        let (Some(left), Some(right)) = (left, right) else {
            return;
        };
        let both = &text[symbols[left].start..symbols[right].end];
        if both.len() > self.longest {
            return;
        }
        let Some(&id) = self.ids.get(both) else {
            return;
        };
        let score = self
            .scores
            .get(id as usize)
            .copied()
            .unwrap_or(f32::NEG_INFINITY);
        queue.push(Pair {
            score,
            left,
            right,
            len: both.len(),
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
            tokens in prop::collection::vec(("[abé]{2,5}", (-6i8..0).prop_map(f32::from)), 0..40),
            text in "[abé]{0,24}",
        ) {
            let mut all: Vec<(String, f32)> = ["a", "b", "é"].map(|c| (c.to_string(), -9.0)).to_vec();
            all.extend(tokens);
            let (texts, scores): (Vec<_>, Vec<_>) = all.iter().cloned().unzip();
            let mut ids = Vec::new();
            ScoreMerges::new(texts, scores, None).encode(&text, &mut ids).unwrap();
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
                .encode("aé", &mut out)
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
