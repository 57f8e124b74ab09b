//! Byte-pair encoding, BPE (`gpt2` and `gemma4` vocabularies).
//!
//! The text is cut into words, each word's bytes or characters become tokens, and neighboring tokens are merged
//! in the order in which the merges were learned, the leftmost of equals first.
//!
//! One word is encoded at a time, so memory depends on the longest word and not on the text.

use super::TokenizerError;
use super::bytes::{CHARS, byte_of};
use super::families::{Family, Spelling};
use super::split::Splitter;
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

/// A vocabulary with its merges.
#[derive(Debug)]
pub(super) struct BytePairs {
    splitter: Splitter,
    /// By byte: the token for it.
    bytes: Box<[Option<u32>; 256]>,
    /// By character: the token for it, where text is spelled as it is.
    characters: Option<HashMap<char, u32>>,
    /// What two neighbors become.
    merges: HashMap<(u32, u32), Merge>,
    /// Tokens by the bytes they spell, where whole words are taken before any merge.
    whole: Option<HashMap<Vec<u8>, u32>>,
    /// Bytes of the longest token.
    longest: usize,
}

/// A learned merge.
#[derive(Debug, Clone, Copy)]
struct Merge {
    /// Position in the list of merges.
    rank: u32,
    token: u32,
}

/// No neighbor.
const NONE: u32 = u32::MAX;

/// A stretch of a word that is one token so far; neighbors are linked by index.
struct Symbol {
    token: u32,
    /// [`NONE`] at the start of the word, and of a symbol that was merged into its left neighbor.
    prev: u32,
    next: u32,
    merged: bool,
}

/// Two neighbors to merge. Lower ranks go first, then the leftmost.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Pair {
    rank: u32,
    left: u32,
    /// Token of both. The pair is stale once its symbols make another.
    token: u32,
}

/// Buffers of one call, which its words share.
#[derive(Default)]
struct Buffers {
    symbols: Vec<Symbol>,
    queue: BinaryHeap<Reverse<Pair>>,
}

impl BytePairs {
    /// Builds the encoder. Of tokens with the same text the last one counts; merges of tokens that
    /// the vocabulary lacks can't ever apply and are left out, as llama.cpp does.
    pub fn new(
        family: &Family,
        tokens: Vec<String>,
        merges: &[String],
    ) -> Result<Self, TokenizerError> {
        let splitter = Splitter::new(family).map_err(TokenizerError::Build)?;
        let longest = tokens.iter().map(String::len).max().unwrap_or(1).max(1);
        let mut vocab = HashMap::with_capacity(tokens.len());
        for (id, token) in (0u32..).zip(tokens) {
            if !token.is_empty() {
                vocab.insert(token, id);
            }
        }
        let mut bytes = Box::new([None; 256]);
        let merges = learned(&vocab, merges);
        let whole;
        let mut characters = None;
        match family.spelling {
            Spelling::Bytes => {
                for (token, character) in bytes.iter_mut().zip(CHARS) {
                    *token = vocab.get(&*character.encode_utf8(&mut [0; 4])).copied();
                }
                let spelled = |text: &str| text.chars().map(byte_of).collect::<Option<Vec<u8>>>();
                let tokens = vocab.iter();
                let all = tokens.filter_map(|(text, id)| Some((spelled(text)?, *id)));
                whole = family.ignore_merges.then(|| all.collect());
            }
            Spelling::Characters { whole_line_ends } => {
                for (byte, token) in (0u8..=255).zip(bytes.iter_mut()) {
                    *token = vocab.get(&format!("<0x{byte:02X}>")).copied();
                }
                characters = Some(characters_of(&vocab));
                let ends = vocab
                    .iter()
                    .filter(|(text, _)| text.bytes().all(|b| b == b'\n'));
                whole = whole_line_ends.then(|| {
                    ends.map(|(text, id)| (text.clone().into_bytes(), *id))
                        .collect()
                });
            }
        }
        Ok(Self {
            splitter,
            bytes,
            characters,
            merges,
            whole,
            longest,
        })
    }

    /// Appends the tokens of `text`, which holds no special tokens. Stops with an error where more
    /// than `most` are certain.
    pub fn encode(
        &self,
        text: &str,
        most: usize,
        out: &mut Vec<u32>,
    ) -> Result<(), TokenizerError> {
        let mut buffers = Buffers::default();
        self.splitter.split(text, &mut |word| {
            let least = out.len() + word.len().div_ceil(self.longest);
            if least > most {
                return Err(TokenizerError::TooLong { least, most });
            }
            self.word(word, &mut buffers, out)
        })
    }

    /// Appends the tokens of one word.
    fn word(
        &self,
        word: &str,
        buffers: &mut Buffers,
        out: &mut Vec<u32>,
    ) -> Result<(), TokenizerError> {
        if let Some(token) = self
            .whole
            .as_ref()
            .and_then(|whole| whole.get(word.as_bytes()))
        {
            out.push(*token);
            return Ok(());
        }
        let Buffers { symbols, queue } = buffers;
        symbols.clear();
        queue.clear();
        self.spell(word, symbols)?;
        if let Some(last) = symbols.last_mut() {
            last.next = NONE;
        }
        for i in 0..symbols.len() as u32 {
            self.offer(symbols, i, queue);
        }
        while let Some(Reverse(Pair { left, token, .. })) = queue.pop() {
            let next = symbols[left as usize].next;
            let merge = self.merge(symbols, left);
            if symbols[left as usize].merged || merge.is_none_or(|merge| merge.token != token) {
                continue;
            }
            let after = symbols[next as usize].next;
            symbols[next as usize].merged = true;
            if let Some(after) = symbols.get_mut(after as usize) {
                after.prev = left;
            }
            let symbol = &mut symbols[left as usize];
            (symbol.token, symbol.next) = (token, after);
            let prev = symbol.prev;
            self.offer(symbols, prev, queue);
            self.offer(symbols, left, queue);
        }
        out.extend(symbols.iter().filter(|s| !s.merged).map(|s| s.token));
        Ok(())
    }

    /// Appends the symbols of a word before any merge.
    fn spell(&self, word: &str, symbols: &mut Vec<Symbol>) -> Result<(), TokenizerError> {
        let mut push = |token: u32| {
            let i = symbols.len() as u32;
            symbols.push(Symbol {
                token,
                prev: i.wrapping_sub(1),
                next: i + 1,
                merged: false,
            });
        };
        let byte = |byte: u8| self.bytes[byte as usize].ok_or(TokenizerError::NoByte { byte });
        let Some(characters) = &self.characters else {
            for b in word.bytes() {
                push(byte(b)?);
            }
            return Ok(());
        };
        for c in word.chars() {
            match characters.get(&c) {
                Some(token) => push(*token),
                None => {
                    for b in c.encode_utf8(&mut [0; 4]).bytes() {
                        push(byte(b)?);
                    }
                }
            }
        }
        Ok(())
    }

    /// Returns what the symbol at `left` and its right neighbor merge into.
    fn merge(&self, symbols: &[Symbol], left: u32) -> Option<Merge> {
        let symbol = symbols.get(left as usize)?;
        let next = symbols.get(symbol.next as usize)?;
        self.merges.get(&(symbol.token, next.token)).copied()
    }

    /// Queues the symbol at `left` and its right neighbor if they merge.
    fn offer(&self, symbols: &[Symbol], left: u32, queue: &mut BinaryHeap<Reverse<Pair>>) {
        if let Some(Merge { rank, token }) = self.merge(symbols, left) {
            queue.push(Reverse(Pair { rank, left, token }));
        }
    }
}

/// Returns the tokens that are one character.
fn characters_of(vocab: &HashMap<String, u32>) -> HashMap<char, u32> {
    let one = |text: &str| {
        let mut chars = text.chars();
        chars.next().filter(|_| chars.next().is_none())
    };
    vocab
        .iter()
        .filter_map(|(text, id)| Some((one(text)?, *id)))
        .collect()
}

/// Returns the merges whose three tokens the vocabulary has; of equals the first.
fn learned(vocab: &HashMap<String, u32>, merges: &[String]) -> HashMap<(u32, u32), Merge> {
    let mut learned = HashMap::with_capacity(merges.len());
    let mut joined = String::new();
    for (rank, merge) in (0u32..).zip(merges) {
        // A token may start with a space in vocabularies that aren't byte-level, so look from the
        // second byte.
        let middle = merge.bytes().skip(1).position(|b| b == b' ').map(|p| p + 1);
        let parts = middle.and_then(|m| Some((merge.get(..m)?, merge.get(m + 1..)?)));
        let Some((left, right)) = parts else {
            continue;
        };
        joined.clear();
        joined.push_str(left);
        joined.push_str(right);
        if let (Some(left), Some(right), Some(token)) =
            (vocab.get(left), vocab.get(right), vocab.get(&joined))
        {
            let token = *token;
            learned
                .entry((*left, *right))
                .or_insert(Merge { rank, token });
        }
    }
    learned
}

#[cfg(test)]
mod tests {
    use super::super::families::family;
    use super::*;
    use proptest::prelude::*;

    /// Merges the first learned pair of the whole word, again and again.
    fn plainly(merges: &[(String, String)], word: &str) -> Vec<String> {
        let mut parts: Vec<String> = word.chars().map(String::from).collect();
        loop {
            let best = (1..parts.len())
                .filter_map(|i| {
                    let rank = merges
                        .iter()
                        .position(|(l, r)| (l, r) == (&parts[i - 1], &parts[i]))?;
                    Some((rank, i - 1))
                })
                .min();
            let Some((_, i)) = best else { return parts };
            let right = parts.remove(i + 1);
            parts[i] += &right;
        }
    }

    fn encoder(merges: &[(String, String)]) -> (BytePairs, Vec<String>) {
        let mut tokens: Vec<String> = CHARS.iter().map(char::to_string).collect();
        for (left, right) in merges {
            for text in [left.clone(), right.clone(), format!("{left}{right}")] {
                if !tokens.contains(&text) {
                    tokens.push(text);
                }
            }
        }
        let merges: Vec<String> = merges.iter().map(|(l, r)| format!("{l} {r}")).collect();
        let pairs = BytePairs::new(family("qwen2").unwrap(), tokens.clone(), &merges).unwrap();
        (pairs, tokens)
    }

    proptest! {
        #[test]
        fn as_the_plain_way(
            merges in prop::collection::vec(("[abc]{1,3}", "[abc]{1,3}"), 0..12),
            word in "[abc]{0,20}",
        ) {
            let (pairs, tokens) = encoder(&merges);
            let mut ids = Vec::new();
            pairs.encode(&word, usize::MAX, &mut ids).unwrap();
            let found: Vec<&str> = ids.iter().map(|id| tokens[*id as usize].as_str()).collect();
            prop_assert_eq!(found, plainly(&merges, &word));
        }
    }

    #[test]
    fn a_text_that_cannot_fit_is_refused_before_it_is_merged() {
        let (pairs, _) = encoder(&[("a".into(), "a".into())]);
        let mut ids = Vec::new();
        // Ten tokens of two bytes each.
        let text = "a".repeat(20);
        assert!(pairs.encode(&text, 10, &mut ids).is_ok());
        assert_eq!(ids.len(), 10);
        ids.clear();
        let error = pairs.encode(&text, 9, &mut ids).unwrap_err();
        assert!(matches!(
            error,
            TokenizerError::TooLong { least: 10, most: 9 }
        ));
        assert!(ids.is_empty());
    }

    #[test]
    fn characters_merge_as_they_are_and_others_fall_back_to_bytes() {
        let mut tokens: Vec<String> = (0..=255u8).map(|b| format!("<0x{b:02X}>")).collect();
        let more = ["▁", "a", "é", "▁a", "\n", "\n\n", "▁aé", "\n\n\n"];
        tokens.extend(more.map(String::from));
        let merges = ["▁ a", "▁a é", "\n \n"].map(String::from);
        let of = |name: &str, text: &str| {
            let pairs = BytePairs::new(family(name).unwrap(), tokens.clone(), &merges).unwrap();
            let mut ids = Vec::new();
            pairs.encode(text, usize::MAX, &mut ids).unwrap();
            ids.iter()
                .map(|id| tokens[*id as usize].clone())
                .collect::<Vec<_>>()
        };
        assert_eq!(of("gemma4", "▁aé▁aü"), ["▁aé", "▁a", "<0xC3>", "<0xBC>"]);
        // A run of line ends is one token where the vocabulary has it.
        assert_eq!(of("gemma4", "a\n\n\na"), ["a", "\n\n\n", "a"]);
        assert_eq!(of("sarvam-moe", "a\n\n\na"), ["a", "\n\n", "\n", "a"]);
        assert_eq!(of("gemma4", "a\n\n\n\na"), ["a", "\n\n", "\n\n", "a"]);
    }

    #[test]
    fn merges_that_are_no_pairs_are_passed_over() {
        let tokens: Vec<String> = CHARS.iter().map(char::to_string).collect();
        let merges = ["ab", "", " ", "a ", "a q", "x y z"].map(String::from);
        let pairs = BytePairs::new(family("qwen2").unwrap(), tokens, &merges).unwrap();
        let mut ids = Vec::new();
        pairs.encode("ab", usize::MAX, &mut ids).unwrap();
        assert_eq!(ids, [u32::from(b'a'), u32::from(b'b')]);
    }
}
