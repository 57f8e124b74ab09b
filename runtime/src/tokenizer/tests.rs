//! Whole-tokenizer tests, against ids that ik_llama.cpp, a fork of llama.cpp, gave for the same
//! vocabularies.

use super::*;
use proptest::prelude::*;
use serde::Deserialize;
use std::sync::LazyLock;

#[derive(Deserialize)]
struct Vocabulary {
    model: String,
    pre: Option<String>,
    tokens: Vec<String>,
    token_types: Vec<i32>,
    #[serde(default)]
    scores: Vec<f32>,
    #[serde(default)]
    merges: Vec<String>,
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: Option<bool>,
}

impl From<Vocabulary> for TokenizerSource {
    fn from(v: Vocabulary) -> Self {
        let Vocabulary {
            model,
            pre,
            tokens,
            token_types,
            scores,
            merges,
            bos,
            eos,
            add_bos,
        } = v;
        Self {
            model,
            pre,
            tokens,
            token_types,
            scores,
            merges,
            bos,
            eos,
            add_bos,
            ..Self::default()
        }
    }
}

#[derive(Deserialize)]
struct Golden {
    /// Split pattern to force.
    pre: Option<String>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    text: String,
    plain: Vec<u32>,
    special: Vec<u32>,
}

fn source(json: &str) -> TokenizerSource {
    serde_json::from_str::<Vocabulary>(json).unwrap().into()
}

fn demo_source() -> TokenizerSource {
    source(include_str!(
        "../../../tests/data/tokenizer/demo-vocab.json"
    ))
}

fn scored_source() -> TokenizerSource {
    source(include_str!(
        "../../../tests/data/tokenizer/scored-vocab.json"
    ))
}

static DEMO: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::new(demo_source()).unwrap());
static SCORED: LazyLock<Tokenizer> = LazyLock::new(|| Tokenizer::new(scored_source()).unwrap());

fn check(golden: &str, tokenizer: impl Fn(Option<&str>) -> Tokenizer) {
    let groups: Vec<Golden> = serde_json::from_str(golden).unwrap();
    assert!(!groups.is_empty());
    for group in groups {
        let t = tokenizer(group.pre.as_deref());
        assert!(group.cases.len() > 10);
        for case in group.cases {
            let told = format!("pre {:?}, text {:?}", group.pre, case.text);
            assert_eq!(t.encode(&case.text, false).unwrap(), case.plain, "{told}");
            // The other engine adds a second BOS to a text that begins with one.
            let twice = t
                .prefix()
                .is_some_and(|bos| case.special.starts_with(&[bos, bos]));
            assert_eq!(
                t.encode(&case.text, true).unwrap(),
                case.special[usize::from(twice)..],
                "{told}, with special tokens"
            );
            // The space before text that follows a special token can't be told from one that was
            // there.
            if !(t.space_prefix && case.text.contains("[INST]")) {
                assert_eq!(t.decode(&case.plain), case.text, "{told}");
            }
        }
    }
}

#[test]
fn demo_ids_are_those_of_llama_cpp() {
    let golden = include_str!("../../../tests/data/tokenizer/demo-golden.json");
    check(golden, |pre| {
        Tokenizer::with_pre(demo_source(), pre).unwrap()
    });
}

#[test]
fn scored_ids_are_those_of_llama_cpp() {
    let golden = include_str!("../../../tests/data/tokenizer/scored-golden.json");
    check(golden, |pre| {
        Tokenizer::with_pre(scored_source(), pre).unwrap()
    });
}

#[test]
fn ends_and_sizes() {
    assert_eq!(
        (DEMO.n_vocab(), DEMO.bos(), DEMO.eos(), DEMO.pre()),
        (4096, Some(0), Some(0), Some("qwen2"))
    );
    assert!(DEMO.is_eog(0) && !DEMO.is_eog(1) && !DEMO.is_eog(u32::MAX));
    assert_eq!(DEMO.token_bytes(0), b"<|endoftext|>");
    assert!(DEMO.token_bytes(4096).is_empty() && DEMO.kind(4096).is_none());
    assert_eq!(DEMO.decode(&[0, u32::MAX]), "");
}

#[test]
fn a_stream_never_splits_a_character() {
    let text = "naïve 日本 👩\u{200d}🚀 end";
    let mut stream = DEMO.stream();
    let mut whole = String::new();
    for id in DEMO.encode(text, false).unwrap() {
        let part = stream.push(id);
        assert!(!part.contains('\u{fffd}'), "{part:?}");
        whole += &part;
    }
    assert_eq!(stream.finish(), "");
    assert_eq!(whole, text);
    let first_byte = DEMO.encode("日", false).unwrap()[0];
    assert_eq!(
        (stream.push(first_byte), stream.push(0), stream.finish()),
        (String::new(), String::new(), "\u{fffd}".into())
    );
    assert_eq!(stream.finish(), "");
}

#[test]
fn scored_vocabularies_start_with_bos_and_a_space() {
    assert_eq!(SCORED.encode("", true).unwrap(), [1]);
    assert!(SCORED.encode("", false).unwrap().is_empty());
    let spaced = SCORED.encode("the", false).unwrap();
    assert_eq!(
        (SCORED.piece(spaced[0])[0], SCORED.decode(&spaced)),
        (b' ', "the".to_string())
    );
    let bare = Tokenizer::new(TokenizerSource {
        add_space_prefix: Some(false),
        ..scored_source()
    })
    .unwrap();
    assert_eq!(bare.decode(&bare.encode(" the", false).unwrap()), " the");
    assert_ne!(bare.encode("the", false).unwrap(), spaced);
}

#[test]
fn a_prompt_begins_with_one_bos_and_never_ends_in_eos() {
    let the = SCORED.encode("the", false).unwrap();
    let bos_the = [&[1], &the[..]].concat();
    assert_eq!(SCORED.encode("the", true).unwrap(), bos_the);
    assert_eq!(SCORED.encode("<s>the", true).unwrap(), bos_the);
    // A person's text that looks like BOS is not one.
    let typed = SCORED
        .encode_prompt("<s>the", std::slice::from_ref(&(0..3)), usize::MAX)
        .unwrap();
    assert_eq!(typed[0], 1);
    assert!(!typed[1..].contains(&1), "{typed:?}");
    assert_eq!(SCORED.decode(&typed), "<s>the");
    // A model that wants none gets what is written.
    let bare = Tokenizer::new(TokenizerSource {
        add_bos: Some(false),
        ..scored_source()
    })
    .unwrap();
    assert_eq!(bare.encode("the", true).unwrap(), the);
    assert_eq!(bare.encode("<s>the", true).unwrap(), bos_the);
}

#[test]
fn merges_make_no_control_token() {
    let mut source = scored_source();
    let id = source.tokens.iter().position(|t| t == "th").unwrap();
    source.token_types[id] = 3;
    let t = Tokenizer::new(source).unwrap();
    let id = u32::try_from(id).unwrap();
    assert!(SCORED.encode("xthx", false).unwrap().contains(&id));
    assert!(!t.encode("xthx", false).unwrap().contains(&id));
    assert!(t.encode("xthx", true).unwrap().contains(&id));
}

#[test]
fn a_token_that_no_text_is_spelled_with_is_known() {
    let spelled = SCORED.encode("the", false).unwrap();
    assert!(spelled.iter().all(|id| SCORED.is_spelled(*id)));
    // No two parts of it are tokens, so nothing is merged to it.
    let mut source = scored_source();
    source.tokens.push("Hello there!".into());
    source.token_types.push(1);
    source.scores.push(0.0);
    let id = source.tokens.len() as u32 - 1;
    let t = Tokenizer::new(source).unwrap();
    assert_eq!(t.piece(id), b"Hello there!");
    assert!(!t.is_spelled(id));
    let pairs = DEMO.encode("Once upon a time", false).unwrap();
    assert!(pairs.iter().all(|id| DEMO.is_spelled(*id)));
    assert!(!DEMO.is_spelled(1 << 30));
}

#[test]
fn no_vocabulary_no_ids() {
    let t = Tokenizer::new(TokenizerSource {
        model: "none".into(),
        ..Default::default()
    })
    .unwrap();
    assert_eq!(t.n_vocab(), 0);
    assert!(matches!(
        t.encode("", false),
        Err(TokenizerError::NoTokenizer)
    ));
    assert!(
        t.encode("a", true)
            .unwrap_err()
            .to_string()
            .contains("token ids")
    );
}

#[test]
fn damaged_sources_are_refused_by_name() {
    let broken = |f: &dyn Fn(&mut TokenizerSource)| {
        let mut s = demo_source();
        f(&mut s);
        Tokenizer::new(s).unwrap_err().to_string()
    };
    assert!(broken(&|s| s.model = "rwkv".into()).contains("'rwkv'"));
    let pre = broken(&|s| s.pre = Some("qwen9".into()));
    assert!(
        pre.contains("'qwen9'") && pre.contains("llama-bpe"),
        "{pre}"
    );
    assert!(broken(&|s| s.tokens.clear()).contains("0 entries"));
    assert!(
        broken(&|s| s.token_types.truncate(7))
            .contains("token_type has 7 entries, but there are 4096")
    );
    assert!(broken(&|s| (s.add_bos, s.bos) = (Some(true), Some(5000))).contains("add_bos_token"));
    let mut s = scored_source();
    s.scores.pop();
    assert!(matches!(
        Tokenizer::new(s),
        Err(TokenizerError::BadLength {
            array: "scores",
            ..
        })
    ));
}

#[test]
fn arrays_that_other_engines_take_are_taken() {
    let text = "the cat\n  sat";
    let want = SCORED.encode(text, true).unwrap();
    let mut s = scored_source();
    s.scores.extend([1e9; 3]);
    s.token_types.extend([4; 3]);
    assert_eq!(Tokenizer::new(s).unwrap().encode(text, true).unwrap(), want);
    // Without scores all are equal: the leftmost pair merges first.
    let mut s = scored_source();
    s.scores.clear();
    let unscored = Tokenizer::new(s).unwrap();
    let mut s = scored_source();
    s.scores = vec![0.0; s.tokens.len()];
    s.scores[300] = -0.0;
    let zeros = Tokenizer::new(s).unwrap();
    let ids = unscored.encode(text, true).unwrap();
    assert_eq!(ids, zeros.encode(text, true).unwrap());
    assert_eq!(unscored.decode(&ids), text);
    // Without merges a vocabulary spells bytes.
    let mut s = demo_source();
    s.merges.clear();
    let bytes = Tokenizer::new(s).unwrap();
    let ids = bytes.encode(text, false).unwrap();
    assert_eq!((ids.len(), bytes.decode(&ids)), (text.len(), text.into()));
    let mut s = demo_source();
    s.pre = Some(String::new());
    assert_eq!(Tokenizer::new(s).unwrap().pre(), Some("default"));
}

#[test]
fn a_limit_changes_no_token_and_is_exact() {
    let text = "Once upon a time, there were  12345 words.\n".repeat(20);
    for t in [&*DEMO, &*SCORED] {
        let ids = t.encode(&text, true).unwrap();
        let within = |most| t.encode_within(&text, true, most);
        assert_eq!(within(ids.len()).unwrap(), ids);
        let least = match within(ids.len() - 1) {
            Err(TokenizerError::TooLong { least, .. }) => least,
            other => panic!("{other:?}"),
        };
        assert!(least <= ids.len());
    }
}

#[test]
fn a_missing_pattern_is_said_and_can_be_forced() {
    let t = Tokenizer::new(TokenizerSource {
        pre: None,
        ..demo_source()
    })
    .unwrap();
    assert!(
        t.warning()
            .is_some_and(|w| w.contains("known split patterns"))
    );
    assert_eq!(t.pre(), Some("default"));
    let t = Tokenizer::with_pre(
        TokenizerSource {
            pre: Some("qwen9".into()),
            ..demo_source()
        },
        Some("qwen2"),
    )
    .unwrap();
    assert_eq!((t.pre(), t.warning()), (Some("qwen2"), None));
    let t = Tokenizer::with_pre(scored_source(), Some("qwen2")).unwrap();
    assert!(t.pre().is_none() && t.warning().is_some_and(|w| w.contains("no effect")));
    assert_eq!(SCORED.warning(), None);
}

#[test]
fn whole_words_come_before_merges_where_the_family_says_so() {
    let source = |pre: &str| {
        // Every byte, then "ab", then "abc", which no merge makes.
        let mut tokens: Vec<String> = bytes::CHARS.iter().map(char::to_string).collect();
        tokens.extend(["ab".into(), "abc".into()]);
        TokenizerSource {
            model: "gpt2".into(),
            pre: Some(pre.into()),
            tokens,
            merges: vec!["a b".into(), "x yz".into()],
            ..Default::default()
        }
    };
    let ids = |pre| {
        Tokenizer::new(source(pre))
            .unwrap()
            .encode("abc", false)
            .unwrap()
    };
    assert_eq!(ids("qwen2"), [256, u32::from(b'c')]);
    assert_eq!(ids("llama-bpe"), [257]);
}

#[test]
fn bytes_without_a_token_are_named() {
    let mut s = demo_source();
    let at = s.tokens.iter().position(|t| t == "Ā").unwrap();
    s.tokens[at] = "[gone]".into();
    let e = Tokenizer::new(s)
        .unwrap()
        .encode("a\0b", false)
        .unwrap_err();
    assert!(e.to_string().contains("0x00"), "{e}");
}

#[test]
fn large_vocabularies_load_fast() {
    let mut s = demo_source();
    let mut texts: std::collections::HashSet<String> = s.tokens.iter().cloned().collect();
    let words = s.tokens[300..4000].to_vec();
    'all: for left in &words {
        for right in words.iter().step_by(23) {
            if s.tokens.len() == 160_000 {
                break 'all;
            }
            if texts.insert(format!("{left}{right}")) {
                s.tokens.push(format!("{left}{right}"));
                s.merges.push(format!("{left} {right}"));
                s.token_types.push(1);
            }
        }
    }
    assert_eq!(s.tokens.len(), 160_000);
    let start = std::time::Instant::now();
    let t = Tokenizer::new(s).unwrap();
    let seconds = start.elapsed().as_secs_f64();
    assert_eq!(t.n_vocab(), 160_000);
    println!("160 000 tokens load in {seconds:.3} s");
    // Twenty times what it takes, as test machines are busy.
    assert!(seconds < 3.0, "{seconds} s");
}

proptest! {
    #[test]
    fn any_text_comes_back(text in "\\PC{0,40}", breaks in "[ \t\r\n]{0,6}", special in any::<bool>()) {
        let text = format!("{breaks}{text}{breaks}");
        for t in [&*DEMO, &*SCORED] {
            let ids = t.encode(&text, false).unwrap();
            prop_assert_eq!(t.decode(&ids), text.clone());
            let mut stream = t.stream();
            let streamed: String = ids.iter().map(|id| stream.push(*id)).collect();
            prop_assert_eq!(streamed.trim_start_matches(' '), text.trim_start_matches(' '));
            prop_assert!(t.encode(&text, special).is_ok());
        }
    }

    #[test]
    fn any_ids_decode_alike_whole_and_streamed(ids in prop::collection::vec(0u32..4200, 0..60)) {
        let mut stream = DEMO.stream();
        let mut text: String = ids.iter().map(|id| stream.push(*id)).collect();
        text += &stream.finish();
        prop_assert_eq!(text, DEMO.decode(&ids));
    }

    #[test]
    fn any_source_is_built_or_refused(
        tokens in prop::collection::vec("[ab▁<0x>ĠC]{0,4}", 0..40),
        merges in prop::collection::vec("[ab Ġ]{0,4}", 0..10),
        types in prop::collection::vec(-1i32..8, 0..40),
        bos in prop::option::of(0u32..60),
        scored in any::<bool>(),
        text in "[ab c▁é]{0,10}",
    ) {
        let scores = vec![f32::NAN; tokens.len()];
        let token_types = if types.len() == tokens.len() { types } else { Vec::new() };
        let model = if scored { "llama" } else { "gpt2" }.to_string();
        let source = TokenizerSource { model, tokens, merges, token_types, scores, bos, ..Default::default() };
        if let Ok(t) = Tokenizer::new(source)
            && let Ok(ids) = t.encode(&text, true)
        {
            prop_assert!(ids.iter().all(|id| (*id as usize) < t.n_vocab()));
            t.decode(&ids);
        }
    }
}
