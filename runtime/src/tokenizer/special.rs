//! Tokens that are not text: which ones there are, which end the generation, and finding them in a
//! prompt.
//!
//! GGUF files name only one or two end tokens; chat models have more. As in llama.cpp, the rest are
//! known by their texts, because a generation that misses one never stops.

use std::collections::HashSet;

/// What a token is for (`tokenizer.ggml.token_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TokenKind {
    /// Text.
    Normal,
    /// Stands for text the vocabulary can't spell.
    Unknown,
    /// Structure, like the end of a turn; not part of the text.
    Control,
    /// Added to a trained vocabulary: text, but found before anything is split.
    UserDefined,
    /// Unused: never produced.
    Unused,
    /// One byte (`<0x0A>`).
    Byte,
}

impl TokenKind {
    /// Returns the kind that a file's number means; numbers without a meaning are unused tokens.
    pub(super) fn from_gguf(number: i32) -> Self {
        match number {
            1 => Self::Normal,
            2 => Self::Unknown,
            3 => Self::Control,
            4 => Self::UserDefined,
            6 => Self::Byte,
            _ => Self::Unused,
        }
    }

    /// Returns whether the token's text belongs to the generated text.
    pub fn is_text(self) -> bool {
        matches!(self, Self::Normal | Self::UserDefined | Self::Byte)
    }
}

/// Texts of tokens that end a generation, whatever their type in the file.
const END_TEXTS: &[&str] = &[
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
    "<eos>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "[e~[",
];

/// Texts that end a generation because nothing sensible follows them: padding and the borders
/// between the files of a repository. Only the first found of each group counts.
const FILE_TEXTS: &[&[&str]] = &[
    &["<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "[PAD]"],
    &[
        "<|fim_repo|>",
        "<|repo_name|>",
        "<fim-repo>",
        "<REPO>",
        "<reponame>",
    ],
    &["<|file_sep|>"],
];

/// Texts that gpt-oss marks its channels with; a reader wants to see them.
const SHOWN_TEXTS: &[&str] = &["<|channel|>", "<|message|>", "<|start|>", "<|constrain|>"];

/// The tokens that are looked for in a prompt, and those that end a generation.
#[derive(Debug, Default)]
pub(super) struct Specials {
    /// Text, id and kind; longest text first.
    list: Vec<(String, u32, TokenKind)>,
    /// Indices into `list` by the first byte of the text.
    by_first: Vec<Vec<u32>>,
    /// Ids that end a generation.
    pub eog: HashSet<u32>,
}

/// A stretch of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fragment<'t> {
    /// Text to be split and encoded.
    Text(&'t str),
    /// Id of a special token.
    Token(u32),
}

impl Specials {
    /// Gathers the special tokens; corrects `kinds` where a token's text says more than the file
    /// does. `ends` are the ids the file names as the end of a text, a turn or a message.
    pub fn new(tokens: &[String], kinds: &mut [TokenKind], ends: &[u32]) -> Self {
        let mut eog: HashSet<u32> = ends.iter().copied().collect();
        let wanted: HashSet<&str> = END_TEXTS
            .iter()
            .chain(SHOWN_TEXTS)
            .chain(FILE_TEXTS.iter().copied().flatten())
            .copied()
            .collect();
        let mut named = std::collections::HashMap::new();
        for (id, token) in (0u32..).zip(tokens) {
            if let Some(text) = wanted.get(token.as_str()) {
                named.insert(*text, id);
            }
        }
        let mut set = |id: u32, kind: TokenKind| {
            if let Some(k) = kinds.get_mut(id as usize) {
                *k = kind;
            }
        };
        for id in END_TEXTS.iter().filter_map(|t| named.get(t)) {
            set(*id, TokenKind::Control);
            eog.insert(*id);
        }
        for id in FILE_TEXTS
            .iter()
            .filter_map(|group| group.iter().find_map(|t| named.get(t)))
        {
            set(*id, TokenKind::Control);
            eog.insert(*id);
        }
        for id in SHOWN_TEXTS.iter().filter_map(|t| named.get(t)) {
            set(*id, TokenKind::UserDefined);
        }
        // Where a model has tokens of its own for the end of a reply, `<|end|>` only closes one of
        // its messages.
        let has = |t: &str| named.contains_key(t);
        if let Some(&end) = named.get("<|end|>")
            && ((has("<|return|>") && has("<|call|>"))
                || (has("<|flush|>") && (has("<|calls|>") || has("<|call|>"))))
        {
            eog.remove(&end);
            set(end, TokenKind::UserDefined);
        }
        let special = |k: TokenKind| {
            matches!(
                k,
                TokenKind::Control | TokenKind::UserDefined | TokenKind::Unknown
            )
        };
        let mut list: Vec<_> = (0u32..)
            .zip(tokens)
            .zip(kinds.iter())
            .filter(|((_, text), kind)| special(**kind) && !text.is_empty())
            .map(|((id, text), kind)| (text.clone(), id, *kind))
            .collect();
        list.sort_by_key(|(text, id, _)| (std::cmp::Reverse(text.len()), *id));
        let mut by_first = vec![Vec::new(); 256];
        for (i, (text, _, _)) in (0u32..).zip(&list) {
            by_first[text.as_bytes()[0] as usize].push(i);
        }
        Self {
            list,
            by_first,
            eog,
        }
    }

    /// Cuts `text` at its special tokens. Where two overlap the longer one wins, and of equals the
    /// first in the text. Without `parse` only user-defined tokens are special.
    pub fn partition<'t>(&self, text: &'t str, parse: bool) -> Vec<Fragment<'t>> {
        let mut fragments = vec![Fragment::Text(text)];
        for i in self.present(text, parse) {
            let (special, id, _) = &self.list[i];
            let mut next = Vec::with_capacity(fragments.len() + 2);
            for fragment in fragments {
                let Fragment::Text(mut rest) = fragment else {
                    next.push(fragment);
                    continue;
                };
                while let Some((before, after)) = rest.split_once(special.as_str()) {
                    next.extend((!before.is_empty()).then_some(Fragment::Text(before)));
                    next.push(Fragment::Token(*id));
                    rest = after;
                }
                next.extend((!rest.is_empty()).then_some(Fragment::Text(rest)));
            }
            fragments = next;
        }
        fragments
    }

    /// Returns the indices of the entries of `list` that occur in `text`, in order. Takes one pass
    /// over the text: some vocabularies have a thousand special tokens, and searching for each
    /// would take a thousand passes.
    fn present(&self, text: &str, parse: bool) -> Vec<usize> {
        let bytes = text.as_bytes();
        let mut found = vec![false; self.list.len()];
        if self.list.is_empty() {
            return Vec::new();
        }
        for (at, b) in bytes.iter().enumerate() {
            for &i in &self.by_first[*b as usize] {
                let (special, _, kind) = &self.list[i as usize];
                if (parse || *kind == TokenKind::UserDefined)
                    && bytes[at..].starts_with(special.as_bytes())
                {
                    found[i as usize] = true;
                }
            }
        }
        found
            .iter()
            .enumerate()
            .filter_map(|(i, f)| f.then_some(i))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specials(tokens: &[(&str, TokenKind)]) -> (Specials, Vec<TokenKind>) {
        let texts: Vec<String> = tokens.iter().map(|t| t.0.to_string()).collect();
        let mut kinds: Vec<TokenKind> = tokens.iter().map(|t| t.1).collect();
        let s = Specials::new(&texts, &mut kinds, &[]);
        (s, kinds)
    }

    #[test]
    fn the_longer_of_two_overlapping_tokens_wins() {
        use TokenKind::{Control, UserDefined};
        let (s, _) = specials(&[("<a>", Control), ("b<a>", Control), ("  ", UserDefined)]);
        use Fragment::{Text, Token};
        assert_eq!(
            s.partition("x<a>yb<a>", true),
            [Text("x"), Token(0), Text("y"), Token(1)]
        );
        assert_eq!(
            s.partition("<a>   z", false),
            [Text("<a>"), Token(2), Text(" z")]
        );
        assert_eq!(s.partition("<a", true), [Text("<a")]);
    }

    #[test]
    fn end_tokens_are_known_by_their_text() {
        use TokenKind::{Control, Normal};
        let (s, kinds) = specials(&[("<|im_end|>", Normal), ("<|end|>", Control), ("x", Normal)]);
        assert!(s.eog.contains(&0) && s.eog.contains(&1) && !s.eog.contains(&2));
        assert_eq!(kinds[0], Control);
    }

    #[test]
    fn harmony_end_closes_a_message_only() {
        use TokenKind::{Control, UserDefined};
        let (s, kinds) = specials(&[
            ("<|end|>", Control),
            ("<|return|>", Control),
            ("<|call|>", Control),
            ("<|channel|>", Control),
        ]);
        assert!(!s.eog.contains(&0) && s.eog.contains(&1) && s.eog.contains(&2));
        assert_eq!((kinds[0], kinds[3]), (UserDefined, UserDefined));
    }
}
