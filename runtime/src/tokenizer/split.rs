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

use tokenizers::utils::SysRegex;

/// A family of split patterns, which `tokenizer.ggml.pre` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Family {
    /// The name the family goes by, `tokenizer.ggml.pre` in most files.
    pub name: &'static str,
    /// Other names of the family.
    aliases: &'static [&'static str],
    /// Patterns, applied one after the other: each cuts the pieces that the ones before left.
    patterns: &'static [&'static str],
    /// Whether a piece that is a token as a whole is taken before any merges are tried.
    pub ignore_merges: bool,
    /// Whether a text starts with the BOS token where the file doesn't say.
    pub add_bos: bool,
}

const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+";
const LLAMA3: &str = concat!(
    r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const QWEN2: &str = concat!(
    r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const QWEN35: &str = concat!(
    r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}",
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const BAILING: &str = concat!(
    r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
);
const SEED_CODER: &str = concat!(
    r"'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL])|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}",
    r"| ?[^\s\p{L}\p{N}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const GPT_4O: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"(?:'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL]))?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"(?:'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL]))?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const TEKKEN: &str = concat!(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const KIMI: &str = concat!(
    r"[\p{Han}]+",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+",
    r"(?:'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL]))?",
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*",
    r"(?:'(?:[sStTmMdD]|[rR][eE]|[vV][eE]|[lL][lL]))?",
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
const DEEPSEEK_V3: &str = concat!(
    r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"##,
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
);
/// Letters with case, as DeepSeek's first tokenizers list them.
const DEEPSEEK_CASED: &str = concat!(
    r"\s?[A-Za-z\x{B5}\x{C0}-\x{D6}\x{D8}-\x{F6}\x{F8}-\x{1BA}\x{1BC}-\x{1BF}\x{1C4}-\x{293}\x{295}-\x{2AF}",
    r"\x{370}-\x{373}\x{376}\x{377}\x{37B}-\x{37D}\x{37F}\x{386}\x{388}-\x{38A}\x{38C}\x{38E}-\x{3A1}",
    r"\x{3A3}-\x{3F5}\x{3F7}-\x{481}\x{48A}-\x{52F}\x{531}-\x{556}\x{10A0}-\x{10C5}\x{13A0}-\x{13F5}",
    r"\x{13F8}-\x{13FD}\x{1C90}-\x{1CBA}\x{1CBD}-\x{1CBF}\x{1D00}-\x{1D2B}\x{1D6B}-\x{1D77}\x{1D79}-\x{1D9A}",
    r"\x{1E00}-\x{1F15}\x{1F18}-\x{1F1D}\x{1F20}-\x{1F45}\x{1F48}-\x{1F4D}\x{1F50}-\x{1F57}\x{1F59}\x{1F5B}",
    r"\x{1F5D}\x{1F5F}-\x{1F7D}\x{1F80}-\x{1FB4}\x{1FB6}-\x{1FBC}\x{1FBE}\x{1FC2}-\x{1FC4}\x{1FC6}-\x{1FCC}",
    r"\x{1FD0}-\x{1FD3}\x{1FD6}-\x{1FDB}\x{1FE0}-\x{1FEC}\x{1FF2}-\x{1FF4}\x{1FF6}-\x{1FFC}\x{2102}\x{2107}",
    r"\x{210A}-\x{2113}\x{2115}\x{2119}-\x{211D}\x{2124}\x{2126}\x{2128}\x{212A}-\x{212D}\x{212F}-\x{2134}\x{2139}",
    r"\x{213C}-\x{213F}\x{2145}-\x{2149}\x{214E}\x{2183}\x{2184}\x{2C00}-\x{2C7B}\x{2C7E}-\x{2CE4}",
    r"\x{2CEB}-\x{2CEE}\x{2CF2}\x{2CF3}\x{A640}-\x{A66D}\x{A680}-\x{A69B}\x{A722}-\x{A76F}\x{A771}-\x{A787}",
    r"\x{A78B}-\x{A78E}\x{AB70}-\x{ABBF}\x{FB00}-\x{FB06}\x{FB13}-\x{FB17}\x{FF21}-\x{FF3A}\x{FF41}-\x{FF5A}",
    r"\x{10400}-\x{1044F}\x{104B0}-\x{104D3}\x{104D8}-\x{104FB}\x{10C80}-\x{10CB2}\x{10CC0}-\x{10CF2}",
    r"\x{118A0}-\x{118DF}\x{1E900}-\x{1E943}]+"
);

const fn plain(
    name: &'static str,
    aliases: &'static [&'static str],
    patterns: &'static [&'static str],
) -> Family {
    Family {
        name,
        aliases,
        patterns,
        ignore_merges: false,
        add_bos: false,
    }
}

/// All families.
pub(super) const FAMILIES: &[Family] = &[
    plain(
        "default",
        &[],
        &[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
    ),
    plain(
        "gpt-2",
        &[
            "phi-2",
            "mpt",
            "jais",
            "trillion",
            "granite-docling",
            "exaone4",
            "gigachat",
            "a.x-4.0",
            "mellum",
        ],
        &[GPT2],
    ),
    plain("olmo", &[], &[GPT2]),
    plain(
        "smollm",
        &[
            "starcoder",
            "refact",
            "command-r",
            "codeshell",
            "exaone",
            "minerva-7b",
            "mellum2",
        ],
        &[r"\p{N}", GPT2],
    ),
    Family {
        name: "llama-bpe",
        aliases: &[
            "llama3",
            "llama-v3",
            "falcon3",
            "falcon-h1",
            "pixtral",
            "midm-2.0",
            "lfm2",
        ],
        patterns: &[LLAMA3],
        ignore_merges: true,
        add_bos: true,
    },
    plain("dbrx", &["smaug-bpe", "chatglm-bpe"], &[LLAMA3]),
    Family {
        name: "glm4",
        aliases: &["glm5"],
        patterns: &[LLAMA3],
        ignore_merges: true,
        add_bos: false,
    },
    plain(
        "qwen2",
        &[
            "deepseek-r1-qwen",
            "kormo",
            "megrez",
            "stablelm2",
            "hunyuan",
            "solar-open",
            "grok-2",
        ],
        &[QWEN2],
    ),
    plain("qwen35", &[], &[QWEN35]),
    plain("bailingmoe", &["bailingmoe2", "llada-moe"], &[BAILING]),
    plain("seed-coder", &[], &[SEED_CODER]),
    plain("gpt-4o", &["llama4", "kanana2"], &[GPT_4O]),
    plain("minimax-m2", &[], &[GPT_4O]),
    plain("kimi-k2", &[], &[KIMI]),
    Family {
        name: "tekken",
        aliases: &[],
        patterns: &[TEKKEN],
        ignore_merges: true,
        add_bos: true,
    },
    plain(
        "deepseek-llm",
        &[],
        &[
            r"[\r\n]",
            DEEPSEEK_CASED,
            r"\s?[!-/:-~\x{FF01}-\x{FF0F}\x{FF1A}-\x{FF5E}\x{2018}-\x{201F}\x{3000}-\x{3002}]+",
            r"\s+$",
            r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+",
            r"\p{N}+",
        ],
    ),
    plain(
        "deepseek-coder",
        &[],
        &[
            r"[\r\n]",
            r"\s?\p{L}+",
            r"\s?\p{P}+",
            r"[\x{4E00}-\x{9FA5}\x{800}-\x{4E00}\x{AC00}-\x{D7FF}]+",
            r"\p{N}",
        ],
    ),
    plain(
        "deepseek-v3",
        &["hunyuan-dense", "joyai-llm"],
        &[
            r"\p{N}{1,3}",
            r"[\x{4E00}-\x{9FA5}\x{3040}-\x{309F}\x{30A0}-\x{30FF}]+",
            DEEPSEEK_V3,
        ],
    ),
];

/// Returns the family that a file's `tokenizer.ggml.pre` names.
pub(super) fn family(pre: &str) -> Option<&'static Family> {
    FAMILIES
        .iter()
        .find(|f| f.name == pre || f.aliases.contains(&pre))
}

/// Returns the names of all families, for messages.
pub(super) fn known() -> String {
    FAMILIES
        .iter()
        .map(|f| f.name)
        .collect::<Vec<_>>()
        .join(", ")
}

/// One pattern, compiled.
#[derive(Debug)]
struct Stage {
    regex: SysRegex,
    /// Whether a run of white space gives its last character back to the word behind it.
    gives_back: bool,
    /// Whether such a run never ends in a line break, because another branch of the pattern takes
    /// those first.
    breaks_apart: bool,
}

impl Stage {
    fn new(pattern: &str) -> Result<Self, String> {
        let short = pattern.strip_suffix(r"|\s+(?!\S)|\s+");
        let source = short.map_or_else(|| pattern.to_string(), |s| format!(r"{s}|\s+"));
        let regex = SysRegex::new(&source).map_err(|e| format!("pattern {source}: {e}"))?;
        Ok(Self {
            regex,
            gives_back: short.is_some(),
            breaks_apart: pattern.contains(r"|\s*[\r\n]"),
        })
    }

    /// Cuts `piece` into the matches and what lies between them, in order and without loss.
    fn cut<'t>(&self, piece: &'t str, out: &mut Vec<&'t str>) {
        let mut done = 0;
        'search: while done < piece.len() {
            let from = done;
            for (start, end) in self.regex.find_iter(&piece[from..]) {
                let (start, mut end) = (from + start, from + end);
                if start > done {
                    out.push(&piece[done..start]);
                }
                let kept = self.kept(&piece[start..end], end == piece.len());
                let shorter = kept < end - start;
                end = start + kept;
                if end > start {
                    out.push(&piece[start..end]);
                }
                done = end;
                if shorter {
                    continue 'search;
                }
            }
            if done < piece.len() {
                out.push(&piece[done..]);
            }
            return;
        }
    }

    /// Returns how many bytes of the match `found` stay with it.
    fn kept(&self, found: &str, at_end: bool) -> usize {
        let Some((last, c)) = found.char_indices().next_back() else {
            return 0;
        };
        let is_run = c.is_whitespace() && !(self.breaks_apart && matches!(c, '\r' | '\n'));
        if self.gives_back && is_run && !at_end && last > 0 {
            last
        } else {
            found.len()
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

    /// Cuts `text` into words; together they are `text` again.
    pub fn split<'t>(&self, text: &'t str) -> Vec<&'t str> {
        let mut pieces = vec![text];
        for stage in &self.0 {
            let mut next = Vec::with_capacity(pieces.len());
            for piece in pieces {
                stage.cut(piece, &mut next);
            }
            pieces = next;
        }
        pieces
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::LazyLock;
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

    fn cut(pre: &str, text: &str) -> Vec<String> {
        let splitter = Splitter::new(family(pre).unwrap()).unwrap();
        splitter.split(text).into_iter().map(String::from).collect()
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
                let words = ours.split(&text);
                prop_assert_eq!(words.concat(), text.clone());
                prop_assert_eq!(words, pieces, "{}", name);
            }
        }
    }
}
