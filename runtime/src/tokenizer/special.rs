//! Tokens that are not text: which ones there are, which end the generation, and finding them in a
//! prompt.
//!
//! GGUF files name only one or two end tokens; chat models have more. As in llama.cpp, the rest are
//! known by their texts, because a generation that misses one never stops.

use super::thought::ThoughtMark;
use std::collections::{HashMap, HashSet};
use std::ops::Range;

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

/// Texts of tokens that end a generation, see [`Specials::named`].
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
    "<turn|>",
    "<|tool_response>",
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

/// A token that is looked for in a prompt.
#[derive(Debug)]
struct Special {
    text: String,
    id: u32,
    kind: TokenKind,
    /// Whether the token is structure although it is shown, like the marks of a channel.
    marks_structure: bool,
}

/// The tokens that are looked for in a prompt, and those that end a generation.
#[derive(Debug, Default)]
pub(super) struct Specials {
    /// Longest text first.
    list: Vec<Special>,
    /// Indices into `list` by the first byte of the text.
    by_first: Vec<Vec<u32>>,
    /// Ids that end a generation.
    pub eog: HashSet<u32>,
    /// Ids that mark a thought.
    pub thoughts: HashMap<u32, ThoughtMark>,
}

/// A stretch of a prompt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fragment<'t> {
    /// Text to be split and encoded.
    Text(&'t str),
    /// Id of a special token.
    Token(u32),
}

/// Which of the special tokens that are written out in a text become their ids.
#[derive(Debug, Clone, Copy)]
pub(super) enum Parse<'r> {
    /// User-defined tokens only: the text is no prompt.
    UserDefined,
    /// All, but in these ranges of bytes only those that are never structure. Ranges are sorted
    /// and do not overlap.
    Outside(&'r [Range<usize>]),
}

impl Specials {
    /// Gathers the special tokens; corrects `kinds` where a token's text says more than the file
    /// does. `ends` are the ids the file names as the end of a text, a turn or a message.
    pub fn new(tokens: &[String], kinds: &mut [TokenKind], ends: &[u32]) -> Self {
        let mut eog: HashSet<u32> = ends.iter().copied().collect();
        let named = Self::named(tokens, kinds, ends);
        let mut set = |id: u32, kind: TokenKind| {
            if let Some(k) = kinds.get_mut(id as usize) {
                *k = kind;
            }
        };
        let files = FILE_TEXTS
            .iter()
            .filter_map(|group| group.iter().find_map(|t| named.get(t)));
        for id in END_TEXTS.iter().filter_map(|t| named.get(t)).chain(files) {
            set(*id, TokenKind::Control);
            eog.insert(*id);
        }
        let mut shown: HashSet<u32> = SHOWN_TEXTS
            .iter()
            .filter_map(|t| named.get(t).copied())
            .collect();
        // Where a model has tokens of its own for the end of a reply, `<|end|>` only closes one of
        // its messages.
        let has = |t: &str| named.contains_key(t);
        if let Some(&end) = named.get("<|end|>")
            && ((has("<|return|>") && has("<|call|>"))
                || (has("<|flush|>") && (has("<|calls|>") || has("<|call|>"))))
        {
            eog.remove(&end);
            shown.insert(end);
        }
        for id in &shown {
            set(*id, TokenKind::UserDefined);
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
            .map(|((id, text), kind)| Special {
                text: text.clone(),
                id,
                kind: *kind,
                marks_structure: shown.contains(&id) || looks_special(text),
            })
            .collect();
        // These are shown, so that a thought and the answer after it do not run together. To the
        // list they stay control tokens.
        let thoughts: HashMap<u32, ThoughtMark> = list
            .iter()
            .filter_map(|s| Some((s.id, ThoughtMark::of(&s.text)?)))
            .collect();
        for id in thoughts.keys() {
            kinds[*id as usize] = TokenKind::UserDefined;
        }
        list.sort_by_key(|s| (std::cmp::Reverse(s.text.len()), s.id));
        let mut by_first = vec![Vec::new(); 256];
        for (i, special) in (0u32..).zip(&list) {
            by_first[special.text.as_bytes()[0] as usize].push(i);
        }
        Self {
            list,
            by_first,
            eog,
            thoughts,
        }
    }

    /// Returns the ids of control tokens.
    pub fn controls(&self) -> impl Iterator<Item = u32> {
        let controls = self.list.iter().filter(|s| s.kind == TokenKind::Control);
        controls.map(|s| s.id)
    }

    /// Returns the first special token written out in `text` that would be structure in a prompt.
    pub fn structure_in(&self, text: &str) -> Option<&str> {
        let present = self.present(text, Parse::Outside(&[]));
        let is_structure = |s: &&Special| s.kind != TokenKind::UserDefined || s.marks_structure;
        let mut found = present.iter().map(|(i, _)| &self.list[*i]);
        found.find(is_structure).map(|s| s.text.as_str())
    }

    /// Returns the ids of the tokens whose texts have a meaning.
    ///
    /// Some files give such a token the type of ordinary text. That is a mistake of the file where
    /// the text is one that nobody writes (`<|im_end|>`), and where the file has no other types.
    /// Elsewhere it is the truth: `</s>` is HTML for the end of struck-out text, and in the
    /// vocabularies of Qwen's models a token like any other.
    fn named<'t>(tokens: &'t [String], kinds: &[TokenKind], ends: &[u32]) -> HashMap<&'t str, u32> {
        let wanted: HashSet<&str> = END_TEXTS
            .iter()
            .chain(SHOWN_TEXTS)
            .chain(FILE_TEXTS.iter().copied().flatten())
            .copied()
            .collect();
        let typed = kinds
            .iter()
            .any(|k| matches!(k, TokenKind::Control | TokenKind::UserDefined));
        (0u32..)
            .zip(tokens)
            .zip(kinds)
            .filter(|((id, text), kind)| {
                let text = text.as_str();
                let is_text = typed && **kind == TokenKind::Normal;
                wanted.contains(text) && (!is_text || looks_special(text) || ends.contains(id))
            })
            .map(|((id, text), _)| (text.as_str(), id))
            .collect()
    }

    /// Cuts `text` at its special tokens. Where two overlap the longer one wins, and of equals the
    /// first in the text.
    ///
    /// In the ranges of [`Parse::Outside`] a token counts only if it is user-defined and no
    /// structure: neither marked as such, nor a word that stands outside the ranges too, as
    /// `[INST]` does in files that call it user-defined.
    pub fn partition<'t>(&self, text: &'t str, parse: Parse<'_>) -> Vec<Fragment<'t>> {
        // Stretches of the text, with the id of those that are a special token.
        let mut stretches = vec![(0..text.len(), None)];
        for (i, is_structure) in self.present(text, parse) {
            let special = &self.list[i];
            let counts = |found: &Range<usize>| match parse {
                Parse::UserDefined => true,
                Parse::Outside(plain) => !is_structure || !overlaps(plain, found),
            };
            let mut next = Vec::with_capacity(stretches.len() + 2);
            for (stretch, id) in stretches {
                if id.is_some() {
                    next.push((stretch, id));
                    continue;
                }
                let mut start = stretch.start;
                let mut from = start;
                while let Some(at) = text[from..stretch.end].find(special.text.as_str()) {
                    let found = from + at..from + at + special.text.len();
                    if !counts(&found) {
                        from = found.start
                            + text[found.start..].chars().next().map_or(1, char::len_utf8);
                        continue;
                    }
                    if start < found.start {
                        next.push((start..found.start, None));
                    }
                    start = found.end;
                    from = found.end;
                    next.push((found, Some(special.id)));
                }
                if start < stretch.end {
                    next.push((start..stretch.end, None));
                }
            }
            stretches = next;
        }
        let fragment = |(stretch, id): (Range<usize>, Option<u32>)| match id {
            Some(id) => Fragment::Token(id),
            None => Fragment::Text(&text[stretch]),
        };
        stretches.into_iter().map(fragment).collect()
    }

    /// Returns the indices of the entries of `list` that occur in `text`, in order, and whether
    /// each is structure. Takes one pass over the text: some vocabularies have a thousand special
    /// tokens, and searching for each would take a thousand passes.
    fn present(&self, text: &str, parse: Parse<'_>) -> Vec<(usize, bool)> {
        let bytes = text.as_bytes();
        let mut found = vec![None; self.list.len()];
        if self.list.is_empty() {
            return Vec::new();
        }
        for (at, b) in bytes.iter().enumerate() {
            for &i in &self.by_first[*b as usize] {
                let special = &self.list[i as usize];
                let user_defined = special.kind == TokenKind::UserDefined;
                let is_wanted = user_defined || matches!(parse, Parse::Outside(_));
                if !is_wanted || !bytes[at..].starts_with(special.text.as_bytes()) {
                    continue;
                }
                let is_structure =
                    found[i as usize].get_or_insert(!user_defined || special.marks_structure);
                if let Parse::Outside(plain) = parse
                    && !*is_structure
                    && special.text.contains(char::is_alphanumeric)
                {
                    *is_structure = !overlaps(plain, &(at..at + special.text.len()));
                }
            }
        }
        found
            .iter()
            .enumerate()
            .filter_map(|(i, f)| f.map(|is_structure| (i, is_structure)))
            .collect()
    }
}

/// Returns whether a text has the form of a control token that nobody writes in a text.
fn looks_special(text: &str) -> bool {
    ["|", "｜"].iter().any(|bar| {
        text.strip_prefix('<')
            .and_then(|t| t.strip_suffix('>'))
            .is_some_and(|t| t.len() > bar.len() && t.starts_with(bar) && t.ends_with(bar))
    })
}

/// Returns whether `range` has a byte in one of the sorted `ranges`.
fn overlaps(ranges: &[Range<usize>], range: &Range<usize>) -> bool {
    let after = ranges.partition_point(|r| r.end <= range.start);
    ranges.get(after).is_some_and(|r| r.start < range.end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::slice::from_ref;

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
            s.partition("x<a>yb<a>", Parse::Outside(&[])),
            [Text("x"), Token(0), Text("y"), Token(1)]
        );
        assert_eq!(
            s.partition("<a>   z", Parse::UserDefined),
            [Text("<a>"), Token(2), Text(" z")]
        );
        assert_eq!(s.partition("<a", Parse::Outside(&[])), [Text("<a")]);
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

    #[test]
    fn a_persons_text_is_no_structure() {
        use Fragment::{Text, Token};
        use TokenKind::{Control, Normal, UserDefined};
        let (s, _) = specials(&[
            ("<|im_end|>", Control),
            ("[INST]", UserDefined),
            ("  ", UserDefined),
            ("<|channel|>", Normal),
        ]);
        let text = "[INST]a<|im_end|>  [INST]<|channel|><|im_end|>  ";
        let person = 6..text.len() - 12;
        assert_eq!(
            s.partition(text, Parse::Outside(from_ref(&person))),
            [
                Token(1),
                Text("a<|im_end|>"),
                Token(2),
                Text("[INST]<|channel|>"),
                Token(0),
                Token(2)
            ]
        );
        // Without its use as structure, a user-defined token is text that has a token.
        assert_eq!(
            s.partition("[INST]", Parse::Outside(from_ref(&(0..6)))),
            [Token(1)]
        );
        // A token that only begins in the text is none.
        assert_eq!(
            s.partition("<|im_end|>", Parse::Outside(from_ref(&(0..4)))),
            [Text("<|im_end|>")]
        );
        // An occurrence that does not count hides none that overlaps it.
        let (s, _) = specials(&[("aa", Control)]);
        assert_eq!(
            s.partition("aaa", Parse::Outside(from_ref(&(0..1)))),
            [Text("a"), Token(0)]
        );
    }

    #[test]
    fn texts_of_ends_are_text_where_the_file_says_so() {
        use TokenKind::{Control, Normal};
        let texts = ["</s>", "[PAD]", "<eos>", "<|im_end|>"].map(str::to_string);
        let gather = |kinds: [TokenKind; 4], ends: &[u32]| {
            let mut kinds = kinds;
            let s = Specials::new(&texts, &mut kinds, ends);
            let mut eog: Vec<u32> = s.eog.into_iter().collect();
            eog.sort_unstable();
            (kinds, eog)
        };
        assert_eq!(
            gather([Normal, Normal, Normal, Control], &[3]),
            ([Normal, Normal, Normal, Control], vec![3])
        );
        assert_eq!(
            gather([Normal, Normal, Control, Normal], &[0]),
            ([Control, Normal, Control, Control], vec![0, 2, 3])
        );
        // A file without types leaves only the texts to go by.
        assert_eq!(gather([Normal; 4], &[]), ([Control; 4], vec![0, 1, 2, 3]));
    }

    #[test]
    fn marks_of_thoughts_are_shown() {
        use TokenKind::{Control, Normal, UserDefined};
        let (s, kinds) = specials(&[("[THINK]", Control), ("(think)", Normal)]);
        assert_eq!((kinds[0], kinds[1]), (UserDefined, Normal));
        assert_eq!(s.thoughts.len(), 1);
        let text = "[THINK]";
        assert_eq!(
            s.partition(text, Parse::UserDefined),
            [Fragment::Text(text)]
        );
        assert_eq!(s.structure_in("a [THINK] b"), Some(text));
        assert_eq!(s.structure_in("a (think) b"), None);
    }
}
