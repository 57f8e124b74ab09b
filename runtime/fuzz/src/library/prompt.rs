//! Any text through the vocabularies of the tests and through small ones that are made up, or
//! refused with a message.
//!
//! The vocabularies of the tests can say everything, so their tokens must give the text back. Of
//! what is typed no control token comes, and a limit on the tokens changes none of them.

use arbitrary::{Arbitrary, Result, Unstructured};
use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, PoisonError};
use tier_plan_runtime::tokenizer::{TokenKind, Tokenizer, TokenizerError, TokenizerSource};

/// Most tokens of a vocabulary that is made up.
const MAX_TOKENS: usize = 48;
/// Most bytes of a text.
const MAX_TEXT_BYTES: usize = 2 << 10;
/// Names of split patterns.
const FAMILIES: &str = "default llama-bpe qwen2 qwen35 gpt-4o kimi-k2 tekken deepseek-llm deepseek-coder deepseek-v3 \
    bloom exaone-moe youtu minicpm5 laguna viking chameleon glm4 smollm falcon unknown";
/// Texts that patterns, merges, and tables of special tokens know.
const PIECES: &str = "a b ab aab c é 你 好 ▁ ▁a a▁ Ġ Ġa Ċ <s> </s> <unk> <|im_end|> <|end|> <|return|> <|call|> \
    <|channel|> <think> </think> [INST] [THINK] <0x0A> <0xC3> <0xzz> 's 'LL 1 123 . ... \u{a0} \u{301} Ⅷ ß";
const SPACES: &[&str] = &[
    "", " ", "  ", "\n", "\r\n", "\t", " \n ", "\u{3000}", "\u{85}",
];

/// A vocabulary of the tests.
#[derive(serde::Deserialize)]
struct Vocabulary {
    model: String,
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

/// Reads a vocabulary of the tests.
fn read(name: &str, pre: &str) -> TokenizerSource {
    let path = tier_plan_testing::data("tokenizer").join(name);
    let json = std::fs::read(path).expect("a vocabulary of the tests");
    let vocabulary: Vocabulary = serde_json::from_slice(&json).expect("a vocabulary of the tests");
    TokenizerSource {
        model: vocabulary.model,
        pre: Some(pre.to_string()),
        tokens: vocabulary.tokens,
        token_types: vocabulary.token_types,
        scores: vocabulary.scores,
        merges: vocabulary.merges,
        bos: vocabulary.bos,
        eos: vocabulary.eos,
        add_bos: vocabulary.add_bos,
        ..TokenizerSource::default()
    }
}

/// Returns a tokenizer of the tests: that with scores for an empty `pre`, or byte pairs.
fn known(pre: &'static str) -> Option<&'static Tokenizer> {
    type Tokenizers = HashMap<&'static str, Option<&'static Tokenizer>>;
    static MADE: LazyLock<Mutex<Tokenizers>> = LazyLock::new(Mutex::default);
    let mut made = MADE.lock().unwrap_or_else(PoisonError::into_inner);
    *made.entry(pre).or_insert_with(|| {
        let name = if pre.is_empty() { "scored" } else { "demo" };
        let tokenizer = Tokenizer::new(read(&format!("{name}-vocab.json"), pre)).ok()?;
        Some(Box::leak(Box::new(tokenizer)))
    })
}

/// Makes a text of pieces, spaces, and any characters.
fn text(input: &mut Unstructured<'_>, most: usize) -> Result<String> {
    let pieces: Vec<&str> = PIECES.split(' ').collect();
    let mut text = String::new();
    for _ in 0..input.int_in_range(0..=most)? {
        match input.int_in_range(0..=3)? {
            0 => text.push(char::arbitrary(input)?),
            1 => text.push_str(input.choose(SPACES)?),
            2 => text.push(char::from(input.int_in_range(b' '..=b'~')?)),
            _ => text.push_str(input.choose(&pieces)?),
        }
    }
    Ok(text)
}

/// Makes up a vocabulary.
fn made_up(input: &mut Unstructured<'_>) -> Result<TokenizerSource> {
    let model = *input.choose(&["gpt2", "llama", "gpt2", "llama", "none", "bert"])?;
    let families: Vec<&str> = FAMILIES.split(' ').collect();
    let mut tokens = Vec::new();
    for _ in 0..input.int_in_range(0..=MAX_TOKENS)? {
        tokens.push(text(input, 2)?);
    }
    if bool::arbitrary(input)? {
        tokens.extend((b'!'..=b'~').map(|byte| char::from(byte).to_string()));
        tokens.extend((0u8..=255).map(|byte| format!("<0x{byte:02X}>")));
    }
    let mut source = TokenizerSource {
        model: model.to_string(),
        pre: Option::<bool>::arbitrary(input)?
            .and(input.choose(&families).ok().map(|n| (*n).into())),
        bos: id(input)?,
        eos: id(input)?,
        eot: id(input)?,
        eom: id(input)?,
        unk: id(input)?,
        add_bos: Option::arbitrary(input)?,
        add_space_prefix: Option::arbitrary(input)?,
        ..TokenizerSource::default()
    };
    // Now and then more or fewer than there are tokens.
    let n = tokens
        .len()
        .saturating_sub(usize::from(u8::arbitrary(input)? == 0))
        + usize::from(bool::arbitrary(input)?);
    if bool::arbitrary(input)? {
        source.token_types = (0..n)
            .map(|_| input.int_in_range(-1..=7))
            .collect::<Result<_>>()?;
        source.scores = (0..n)
            .map(|_| f32::arbitrary(input))
            .collect::<Result<_>>()?;
    }
    if !tokens.is_empty() {
        for _ in 0..input.int_in_range(0..=32)? {
            source.merges.push(format!(
                "{} {}",
                input.choose(&tokens)?,
                input.choose(&tokens)?
            ));
        }
    }
    source.tokens = tokens;
    Ok(source)
}

/// Makes up the id of a token, often of one that exists.
fn id(input: &mut Unstructured<'_>) -> Result<Option<u32>> {
    Ok(match input.int_in_range(0..=3)? {
        0 => None,
        1 => Some(u32::arbitrary(input)?),
        _ => Some(u32::from(u8::arbitrary(input)?) / 4),
    })
}

/// Returns the tokens of a text, or of a prompt, and checks that a limit changes none of them.
fn encoded(tokenizer: &Tokenizer, text: &str, special: bool, most: usize) -> Option<Vec<u32>> {
    let limited = tokenizer.encode_within(text, special, most);
    let ids = match tokenizer.encode(text, special) {
        Ok(ids) => ids,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            assert!(limited.is_err());
            return None;
        }
    };
    assert!(ids.iter().all(|id| (*id as usize) < tokenizer.n_vocab()));
    match limited {
        Ok(limited) => assert!(limited == ids && ids.len() <= most),
        Err(TokenizerError::TooLong { least, .. }) => assert!(least > most && ids.len() >= least),
        Err(error) => panic!("{error} only within {most} tokens"),
    }
    Some(ids)
}

/// Checks what tokens give: the same text at once and one by one.
fn check_decoding(tokenizer: &Tokenizer, ids: &[u32]) {
    let mut stream = tokenizer.stream();
    let mut streamed: String = ids.iter().map(|id| stream.push(*id)).collect();
    streamed += &stream.finish();
    let whole = tokenizer.decode(ids);
    let unprefixed = streamed.strip_prefix(' ').unwrap_or(&streamed);
    assert!(
        whole == streamed || whole == unprefixed,
        "{whole:?}, streamed {streamed:?}"
    );
}

/// Checks that a text has no control tokens, except for the one that begins a prompt.
fn check_uncontrolled(tokenizer: &Tokenizer, ids: &[u32], is_prompt: bool) {
    let is_prefix =
        is_prompt && tokenizer.prefix().is_some() && tokenizer.prefix() == ids.first().copied();
    let typed = &ids[usize::from(is_prefix)..];
    let is_control = |id: &&u32| tokenizer.kind(**id) == Some(TokenKind::Control);
    assert_eq!(typed.iter().find(is_control), None);
}

/// Checks one text.
fn check_text(tokenizer: &Tokenizer, text: &str, most: usize, gives_back: bool) {
    if let Some(ids) = encoded(tokenizer, text, false, most) {
        check_uncontrolled(tokenizer, &ids, false);
        check_decoding(tokenizer, &ids);
        // Vocabularies with scores put a space behind a special token.
        let of_user = |id: &u32| tokenizer.kind(*id) == Some(TokenKind::UserDefined);
        let is_spaced = tokenizer.pre().is_none() && ids.iter().any(of_user);
        if gives_back && !is_spaced {
            assert_eq!(tokenizer.decode(&ids), text);
        }
    }
    if let Some(ids) = encoded(tokenizer, text, true, most) {
        check_decoding(tokenizer, &ids);
        if tokenizer.structure_in(text).is_none() {
            check_uncontrolled(tokenizer, &ids, true);
        }
    }
    let whole = 0..text.len();
    if let Ok(ids) = tokenizer.encode_prompt(text, std::slice::from_ref(&whole), usize::MAX) {
        check_uncontrolled(tokenizer, &ids, true);
    }
}

fn check_input(input: &mut Unstructured<'_>) -> Result<()> {
    let families: Vec<&'static str> = FAMILIES.split(' ').collect();
    let kind = input.int_in_range(0..=3)?;
    let made;
    let tokenizer = match kind {
        0 => known(""),
        1 => known(input.choose(&families)?),
        _ => {
            made = Tokenizer::new(made_up(input)?);
            if let Err(error) = &made {
                assert!(!error.to_string().is_empty());
            }
            made.as_ref().ok()
        }
    };
    let Some(tokenizer) = tokenizer else {
        return Ok(());
    };
    let most = usize::from(u8::arbitrary(input)?);
    let mut ids = Vec::new();
    for _ in 0..input.int_in_range(0..=8)? {
        ids.extend(id(input)?);
    }
    check_decoding(tokenizer, &ids);
    let raw = bool::arbitrary(input)?;
    let text = if raw {
        let bytes = input.bytes(input.len().min(MAX_TEXT_BYTES))?;
        String::from_utf8_lossy(bytes).into_owned()
    } else {
        text(input, 64)?
    };
    // Vocabularies with scores write spaces so.
    let gives_back = kind == 1 || (kind == 0 && !text.contains('▁'));
    check_text(tokenizer, &text, most, gives_back);
    Ok(())
}

/// Checks one input.
pub fn check(bytes: &[u8]) {
    let _ = check_input(&mut Unstructured::new(bytes));
}
