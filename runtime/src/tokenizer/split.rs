//! Pre-tokenization: cuts text into the words that byte pairs are merged within.
//!
//! A vocabulary is only good with the split it was trained with, so each family of models has its
//! own pattern, named by `tokenizer.ggml.pre`. The patterns are those that the models were trained
//! with. The module knows nothing of vocabularies.
//!
//! llama.cpp takes the same words except where it has to approximate a pattern, so a few rare texts
//! get other tokens there: letter case and combining marks in `gpt-4o`, `tekken` and `kimi-k2`
//! (which it does not split at a capital), and white space outside ASCII in the older `deepseek`
//! patterns.
//!
//! Nearly all patterns end in `\s+(?!\S)|\s+`: a run of white space leaves its last character to
//! the word behind it. Look-ahead needs a backtracking engine, whose time and stack grow with
//! hostile input, so that ending is matched as a plain `\s+` (which runs in linear time) and the
//! last character is given back here.

use super::families::{BEFORE_THREES, DIGITS_IN_THREES, Family, HALVING_SPACES, NUMBERS_IN_THREES};
use std::sync::LazyLock;
use tokenizers::utils::SysRegex;

/// One pattern, ready to use.
#[derive(Debug)]
enum Stage {
    Regex(Regex),
    Digits(DigitGroups),
}

impl Stage {
    fn new(pattern: &str) -> Result<Self, String> {
        Ok(match DigitGroups::of(pattern) {
            Some(groups) => Self::Digits(groups),
            None => Self::Regex(Regex::new(pattern)?),
        })
    }

    /// Gives `out` the matches in `piece` and what lies between them, in order and without loss.
    fn cut<'t, E>(
        &self,
        piece: &'t str,
        out: &mut dyn FnMut(&'t str) -> Result<(), E>,
    ) -> Result<(), E> {
        match self {
            Self::Regex(regex) => regex.cut(piece, out),
            Self::Digits(groups) => groups.cut(piece, out),
        }
    }
}

/// Patterns that cut runs of digits into threes from the right. Their look-ahead takes time that
/// grows with the square of a run, so they are computed here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum DigitGroups {
    /// Numbers of any kind, each group apart.
    Numbers,
    /// Decimal digits that end a word, each group apart.
    EndingWords,
    /// Cuts before threes only: digits that are left over stay with what is before them.
    BeforeThrees,
}

impl DigitGroups {
    fn of(pattern: &str) -> Option<Self> {
        match pattern {
            NUMBERS_IN_THREES => Some(Self::Numbers),
            DIGITS_IN_THREES => Some(Self::EndingWords),
            BEFORE_THREES => Some(Self::BeforeThrees),
            _ => None,
        }
    }

    fn is_digit(self, c: char) -> bool {
        match self {
            Self::Numbers => NUMBER.is_match(c),
            Self::EndingWords | Self::BeforeThrees => DIGIT.is_match(c),
        }
    }

    /// Gives `out` the groups of all runs in `piece`, and what lies between.
    fn cut<'t, E>(
        self,
        piece: &'t str,
        out: &mut dyn FnMut(&'t str) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut done = 0;
        let mut run: Vec<usize> = Vec::new();
        let mut chars = piece.char_indices().peekable();
        while let Some((at, c)) = chars.next() {
            if !self.is_digit(c) {
                continue;
            }
            run.clear();
            run.push(at);
            while let Some((at, _)) = chars.next_if(|(_, c)| self.is_digit(*c)) {
                run.push(at);
            }
            let after = chars.peek();
            if self == Self::EndingWords && after.is_some_and(|(_, c)| WORD.is_match(*c)) {
                continue;
            }
            let end = after.map_or(piece.len(), |(at, _)| *at);
            let apart = self != Self::BeforeThrees;
            let is_cut = |i: &usize| (run.len() - i).is_multiple_of(3) || apart && *i == 0;
            let last = apart.then_some(end);
            for cut in (0..run.len()).filter(is_cut).map(|i| run[i]).chain(last) {
                if cut > done {
                    out(&piece[done..cut])?;
                    done = cut;
                }
            }
        }
        if done < piece.len() {
            out(&piece[done..])?;
        }
        Ok(())
    }
}

/// A class of characters, as patterns write it.
struct Class(LazyLock<Option<SysRegex>>);

impl Class {
    fn is_match(&self, c: char) -> bool {
        let mut buffer = [0; 4];
        let text = c.encode_utf8(&mut buffer);
        (*self.0)
            .as_ref()
            .is_some_and(|regex| regex.find_iter(text).next().is_some())
    }
}

static NUMBER: Class = Class(LazyLock::new(|| SysRegex::new(r"\p{N}").ok()));
static DIGIT: Class = Class(LazyLock::new(|| SysRegex::new(r"\d").ok()));
static WORD: Class = Class(LazyLock::new(|| SysRegex::new(r"\w").ok()));

/// How a run of white space that no word takes is cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Runs {
    /// Not at all.
    Whole,
    /// Its last character is left to the word behind it.
    GiveBack,
    /// As `GiveBack`, in pieces of 512, 256, … characters.
    Halving,
}

/// Lengths of the pieces of [`Runs::Halving`].
const HALVES: [usize; 10] = [512, 256, 128, 64, 32, 16, 8, 4, 2, 1];

/// A pattern, compiled.
#[derive(Debug)]
struct Regex {
    regex: SysRegex,
    runs: Runs,
    /// Whether such a run never ends in a line break, because another branch of the pattern takes
    /// those first.
    breaks_apart: bool,
}

impl Regex {
    fn new(pattern: &str) -> Result<Self, String> {
        let endings = [
            (r"|\s+(?!\S)|\s+", Runs::GiveBack),
            (HALVING_SPACES, Runs::Halving),
        ];
        let known = endings
            .into_iter()
            .find_map(|(ending, runs)| Some((pattern.strip_suffix(ending)?, runs)));
        let short = known.map(|(short, _)| short);
        let source = short.map_or_else(|| pattern.to_string(), |s| format!(r"{s}|\s+"));
        let regex = SysRegex::new(&source).map_err(|e| format!("pattern {source}: {e}"))?;
        Ok(Self {
            regex,
            runs: known.map_or(Runs::Whole, |(_, runs)| runs),
            breaks_apart: pattern.contains(r"|\s*[\r\n]"),
        })
    }

    /// Gives `out` the matches in `piece` and what lies between them, in order and without loss.
    fn cut<'t, E>(
        &self,
        piece: &'t str,
        out: &mut dyn FnMut(&'t str) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut done = 0;
        'search: while done < piece.len() {
            let from = done;
            for (start, end) in self.regex.find_iter(&piece[from..]) {
                let (start, mut end) = (from + start, from + end);
                if start > done {
                    out(&piece[done..start])?;
                }
                let kept = self.kept(&piece[start..end], end == piece.len());
                let shorter = kept < end - start;
                end = start + kept;
                if end > start {
                    out(&piece[start..end])?;
                }
                done = end;
                if shorter {
                    continue 'search;
                }
            }
            if done < piece.len() {
                out(&piece[done..])?;
            }
            return Ok(());
        }
        Ok(())
    }

    /// Returns how many bytes of the match `found` stay with it.
    fn kept(&self, found: &str, at_end: bool) -> usize {
        let Some((last, c)) = found.char_indices().next_back() else {
            return 0;
        };
        let is_run = c.is_whitespace() && !(self.breaks_apart && matches!(c, '\r' | '\n'));
        match self.runs {
            Runs::GiveBack if is_run && !at_end && last > 0 => last,
            Runs::Halving if is_run => {
                let n = found.chars().count();
                let free = if at_end { n } else { (n - 1).max(1) };
                let kept = HALVES.into_iter().find(|half| *half <= free).unwrap_or(1);
                let end = found.char_indices().nth(kept);
                end.map_or(found.len(), |(at, _)| at)
            }
            _ => found.len(),
        }
    }
}

/// The patterns of a family, ready to use.
#[derive(Debug)]
pub(super) struct Splitter(Vec<Stage>);

impl Splitter {
    /// Compiles the patterns of `family`.
    pub fn new(family: &Family) -> Result<Self, String> {
        family
            .patterns
            .iter()
            .map(|p| Stage::new(p))
            .collect::<Result<_, _>>()
            .map(Self)
    }

    /// Gives `out` the words of `text` one by one; together they are `text` again.
    pub fn split<'t, E>(
        &self,
        text: &'t str,
        out: &mut dyn FnMut(&'t str) -> Result<(), E>,
    ) -> Result<(), E> {
        through(&self.0, text, out)
    }
}

/// Cuts `piece` by the first stage, and what that leaves by the others.
fn through<'t, E>(
    stages: &[Stage],
    piece: &'t str,
    out: &mut dyn FnMut(&'t str) -> Result<(), E>,
) -> Result<(), E> {
    match stages {
        [] if piece.is_empty() => Ok(()),
        [] => out(piece),
        [stage, rest @ ..] => stage.cut(piece, &mut |part| through(rest, part, out)),
    }
}

#[cfg(test)]
mod tests {
    use super::super::families::{FAMILIES, family};
    use super::*;
    use proptest::prelude::*;
    use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
    use tokenizers::{
        OffsetReferential, OffsetType, PreTokenizedString, PreTokenizer, SplitDelimiterBehavior,
    };

    /// The patterns as written, look-ahead and all, for the backtracking engine.
    fn plainly(family: &Family) -> Vec<Split> {
        let split = |p: &&str| {
            Split::new(
                SplitPattern::Regex((*p).to_string()),
                SplitDelimiterBehavior::Isolated,
                false,
            )
            .unwrap()
        };
        family.patterns.iter().map(split).collect()
    }

    /// Our splitter and the plain one of every family.
    static BOTH: LazyLock<Vec<(&str, Splitter, Vec<Split>)>> = LazyLock::new(|| {
        FAMILIES
            .iter()
            .map(|f| (f.name, Splitter::new(f).unwrap(), plainly(f)))
            .collect()
    });

    fn words<'t>(splitter: &Splitter, text: &'t str) -> Vec<&'t str> {
        let mut words = Vec::new();
        let Ok(()) = splitter.split(text, &mut |word| {
            words.push(word);
            Ok::<(), std::convert::Infallible>(())
        });
        words
    }

    fn cut(pre: &str, text: &str) -> Vec<String> {
        let splitter = Splitter::new(family(pre).unwrap()).unwrap();
        words(&splitter, text)
            .into_iter()
            .map(String::from)
            .collect()
    }

    #[test]
    fn names_are_unique_and_patterns_compile() {
        let mut seen = std::collections::HashSet::new();
        for f in FAMILIES {
            Splitter::new(f).unwrap_or_else(|e| panic!("{}: {e}", f.name));
            for name in f.aliases.iter().chain([&f.name]) {
                assert!(seen.insert(*name), "{name} twice");
                assert_eq!(family(name).map(|f| f.name), Some(f.name));
            }
        }
        assert!(family("qwen3").is_none());
    }

    #[test]
    fn digits_are_grouped_from_the_right() {
        assert_eq!(cut("afmoe", "a12345 b"), ["a", "12", "345", " b"]);
        assert_eq!(cut("tiny_aya", "1234567"), ["1", "234", "567"]);
        // Within a word they are not, so the words' own pattern cuts them from the left.
        assert_eq!(cut("tiny_aya", "1234abc"), ["123", "4", "abc"]);
        assert_eq!(
            cut("superbpe", "to 1234567 of 12"),
            ["to ", "1", "234", "567", " of ", "12"]
        );
    }

    #[test]
    fn white_space_is_halved() {
        let spaces = " ".repeat(15);
        let found = cut("jais-2", &format!("a{spaces}b"));
        let lengths: Vec<usize> = found.iter().map(String::len).collect();
        assert_eq!(lengths, [1, 8, 4, 2, 2]);
        assert_eq!(cut("jais-2", "a   1"), ["a", "  ", " ", "1"]);
    }

    #[test]
    fn known_words() {
        assert_eq!(
            cut("qwen2", "I'LL  say 123\n\n x"),
            ["I", "'LL", " ", " say", " ", "1", "2", "3", "\n\n", " x"]
        );
        assert_eq!(cut("llama-bpe", "a1234 b"), ["a", "123", "4", " b"]);
        assert_eq!(cut("gpt-2", "it's \n\n 42"), ["it", "'s", " \n\n", " 42"]);
        assert_eq!(cut("smollm", "it 42"), ["it", " ", "4", "2"]);
        assert_eq!(cut("gpt-4o", "HelloWorld's"), ["Hello", "World's"]);
        assert_eq!(cut("kimi-k2", "你好world"), ["你好", "world"]);
        assert_eq!(cut("qwen2", "你好world"), ["你好world"]);
        assert_eq!(
            cut("deepseek-v3", "_self日本1234"),
            ["_self", "日本", "123", "4"]
        );
        assert_eq!(
            cut("viking", "Hi, it 42"),
            ["Hi", ",", " it", " ", "4", "2"]
        );
        assert_eq!(cut("bloom", "Hi, it 42"), ["Hi", ",", " it", " 42"]);
        assert_eq!(
            cut("youtu", "한글일본日本，x12"),
            ["한글일본", "日本", "，", "x", "1", "2"]
        );
        assert_eq!(
            cut("minicpm5", "a1234 don't"),
            ["a", "123", "4", " don", "'t"]
        );
        assert_eq!(cut("ufakzeka", "Ali'nin"), ["Ali", "'nin"]);
        assert_eq!(cut("exaone-moe", "one two 3"), ["one two", " ", "3"]);
        assert_eq!(cut("falcon", "a`1234"), ["a", "`", "123", "4"]);
        assert_eq!(cut("laguna", "a \n b"), ["a", " ", "\n", " b"]);
        assert_eq!(
            cut("spark2_5", "1234.\n\n"),
            ["1", "2", "3", "4", ".", "\n", "\n"]
        );
        assert_eq!(
            cut("chameleon", "IMGIMGABZ 42"),
            ["IMGIMGABZ", " ", "4", "2"]
        );
    }

    #[test]
    fn long_runs_are_cut_in_linear_time() {
        let spaces = " ".repeat(3_000_000) + "x";
        let words = cut("qwen2", &spaces);
        assert_eq!(
            (words.len(), words[0].len(), words[1].as_str()),
            (2, 2_999_999, " x")
        );
    }

    fn nasty() -> impl Strategy<Value = String> {
        let bits = prop::sample::select(vec![
            " ",
            "  ",
            "\t",
            "\n",
            "\r\n",
            "\u{a0}",
            "\u{85}",
            "\u{3000}",
            "\u{200b}",
            "'s",
            "'LL",
            "'",
            "a",
            "Ab",
            "ñ",
            "n\u{303}",
            "1",
            "٣",
            "½",
            "12345",
            ".",
            "...",
            "/",
            "//",
            "_x",
            "-",
            "日本",
            "ア",
            "한글",
            "👩\u{200d}🚀",
            "€",
            "\u{1}",
            "ǅ",
            "ʰ",
            "(",
            "—",
            "$",
        ]);
        prop::collection::vec(bits, 0..14).prop_map(|v| v.concat())
    }

    proptest! {
        #[test]
        fn as_the_patterns_say(text in nasty()) {
            for (name, ours, plain) in BOTH.iter() {
                let mut pieces = PreTokenizedString::from(text.as_str());
                plain.iter().for_each(|p| p.pre_tokenize(&mut pieces).unwrap());
                let pieces = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
                let pieces: Vec<&str> = pieces.iter().map(|(s, _, _)| *s).filter(|s| !s.is_empty()).collect();
                let words = words(ours, &text);
                prop_assert_eq!(words.concat(), text.clone());
                prop_assert_eq!(words, pieces, "{}", name);
            }
        }
    }
}
