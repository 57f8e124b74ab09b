//! Tokenizers: text to token ids and back, by the vocabulary in a model file.
//!
//! Three kinds of vocabulary are known. `gpt2` is byte-level BPE, whose pairs merge in the order they
//! were learned, with a split pattern that `tokenizer.ggml.pre` names. `gemma4` merges pairs of
//! characters, with a byte fallback. `llama` is SentencePiece scores with a byte fallback. Special tokens and BOS follow llama.cpp, so that both engines see
//! the same prompt.
//!
//! This module takes plain arrays ([`TokenizerSource`]) and knows nothing of files or of models.

mod bytes;
mod error;
mod families;
mod pairs;
mod prompt;
mod scores;
mod source;
mod special;
mod split;
mod stream;
#[cfg(test)]
mod tests;
mod thought;

pub use error::TokenizerError;
pub use prompt::KnownTokens;
pub use special::TokenKind;
pub use stream::TokenStream;
pub use thought::ThoughtMark;

use families::Spelling;
use pairs::BytePairs;
use scores::ScoreMerges;
use special::{Fragment, Parse, Specials};

/// A vocabulary as a model file has it; the names are those of the `tokenizer.ggml.*` keys.
#[derive(Debug, Clone, Default)]
pub struct TokenizerSource {
    /// `model`: `gpt2`, `gemma4`, `llama`, or `none` for a model without a vocabulary.
    pub model: String,
    /// `pre`: the name of the split pattern.
    pub pre: Option<String>,
    /// `tokens`: the text of every token, by id.
    pub tokens: Vec<String>,
    /// `token_type`, one per token; all are normal text when empty. Here and in `scores`, entries
    /// past the tokens are passed over.
    pub token_types: Vec<i32>,
    /// `scores`, one per token; all are equal when empty. Only `llama` vocabularies have a use for
    /// them.
    pub scores: Vec<f32>,
    /// `merges`: pairs of token texts with a space between, first learned first; others are passed
    /// over.
    pub merges: Vec<String>,
    /// `bos_token_id`. Ids past the vocabulary, here and below, count as absent.
    pub bos: Option<u32>,
    /// `eos_token_id`.
    pub eos: Option<u32>,
    /// `eot_token_id`: end of a turn.
    pub eot: Option<u32>,
    /// `eom_token_id`: end of a message.
    pub eom: Option<u32>,
    /// `unknown_token_id`.
    pub unk: Option<u32>,
    /// `add_bos_token`: whether a prompt starts with BOS.
    pub add_bos: Option<bool>,
    /// `add_space_prefix`: whether `llama` vocabularies put a space before the text.
    pub add_space_prefix: Option<bool>,
}

#[derive(Debug)]
enum Encoder {
    Pairs(Box<BytePairs>),
    Scores(ScoreMerges),
    None,
}

/// A vocabulary, ready to encode and decode.
///
/// ```
/// use tier_plan_runtime::gguf::Gguf;
/// use tier_plan_runtime::tokenizer::{Tokenizer, TokenizerSource};
///
/// let gguf = Gguf::open("../profiles/demo/demo.gguf".as_ref())?;
/// let tokenizer = Tokenizer::new(TokenizerSource::from_gguf(&gguf)?)?;
/// let ids = tokenizer.encode("Once upon a time", false)?;
/// assert_eq!(tokenizer.decode(&ids), "Once upon a time");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Tokenizer {
    encoder: Encoder,
    specials: Specials,
    kinds: Vec<TokenKind>,
    /// The bytes of all tokens, end to end.
    pieces: Vec<u8>,
    /// Where each token's bytes end in `pieces`.
    ends: Vec<usize>,
    bos: Option<u32>,
    eos: Option<u32>,
    add_bos: bool,
    space_prefix: bool,
    /// Whether pairs are merged in texts whose spaces are written [`scores::SPACE`].
    escapes_spaces: bool,
    pre: Option<&'static str>,
    warning: Option<String>,
}

impl Tokenizer {
    /// Builds the tokenizer that `source` describes.
    ///
    /// # Errors
    /// When the kind of vocabulary or its split pattern isn't known, or the arrays contradict each
    /// other.
    pub fn new(source: TokenizerSource) -> Result<Self, TokenizerError> {
        Self::with_pre(source, None)
    }

    /// Builds a tokenizer like [`new`](Self::new), with the split pattern `pre` instead of the
    /// file's if one is given.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn with_pre(source: TokenizerSource, pre: Option<&str>) -> Result<Self, TokenizerError> {
        let TokenizerSource {
            model,
            tokens,
            token_types,
            scores,
            merges,
            ..
        } = source;
        let n = tokens.len();
        let scored = match model.as_str() {
            "gpt2" | "gemma4" => false,
            "llama" => true,
            "none" | "no_vocab" => return Ok(Self::empty()),
            _ => return Err(TokenizerError::UnknownModel { found: model }),
        };
        if n == 0 || u32::try_from(n).is_err() {
            return Err(TokenizerError::BadSize { found: n });
        }
        let fits = |array, found: usize| {
            if found >= n {
                Ok(())
            } else {
                Err(TokenizerError::BadLength {
                    array,
                    found,
                    expected: n,
                })
            }
        };
        if !token_types.is_empty() {
            fits("token_type", token_types.len())?;
        }
        if scored && !scores.is_empty() {
            fits("scores", scores.len())?;
        }
        let mut warning = None;
        let family = if scored {
            warning = pre.map(|p| {
                format!("split pattern '{p}' has no effect: a llama vocabulary merges by score, without a pattern")
            });
            None
        } else {
            // This kind of vocabulary has one way of splitting, whatever its files name.
            let named = if model == "gemma4" {
                Some("gemma4")
            } else {
                source.pre.as_deref().filter(|name| !name.is_empty())
            };
            let name = pre.or(named).unwrap_or_else(|| {
                warning = Some(format!(
                    "the file does not say how text is split (tokenizer.ggml.pre), so the default is used and the \
                     text may be worse for it; known split patterns: {}",
                    families::known()
                ));
                "default"
            });
            let family = families::family(name);
            Some(family.ok_or_else(|| TokenizerError::UnknownPre {
                found: name.to_string(),
                known: families::known(),
            })?)
        };

        // Writers that mean "none" use an id past the vocabulary. The old llama files name no ids at
        // all; llama.cpp takes the usual ones then, and where a llama file's are past the vocabulary.
        let valid = |id: Option<u32>, usual: u32| {
            let exists = |id: &u32| (*id as usize) < n;
            id.filter(exists).or(scored.then_some(usual).filter(exists))
        };
        let (bos, eos, unk) = (
            valid(source.bos, 1),
            valid(source.eos, 2),
            valid(source.unk, 0),
        );
        if source.add_bos == Some(true) && bos.is_none() {
            return Err(TokenizerError::MissingBos);
        }
        let usual = family.is_none_or(|f| f.add_bos);
        let add_bos = source.add_bos.unwrap_or(usual) && bos.is_some();

        let mut kinds: Vec<TokenKind> = if token_types.is_empty() {
            vec![TokenKind::Normal; n]
        } else {
            token_types.into_iter().map(TokenKind::from_gguf).collect()
        };
        let named_ends: Vec<u32> = [eos, source.eot, source.eom]
            .into_iter()
            .flatten()
            .filter(|id| (*id as usize) < n)
            .collect();
        let specials = Specials::new(&tokens, &mut kinds, &named_ends);
        let spelled = family.map(|family| family.spelling);
        let as_is = scored || matches!(spelled, Some(Spelling::Characters { .. }));
        let (pieces, ends) = pieces(&tokens, &kinds, as_is);
        // No text may become a control token by merges, so the encoder does not know them.
        let mut tokens = tokens;
        for id in specials.controls() {
            tokens[id as usize].clear();
        }
        let encoder = match family {
            None => Encoder::Scores(ScoreMerges::new(tokens, scores, unk)),
            Some(family) => Encoder::Pairs(Box::new(BytePairs::new(family, tokens, &merges)?)),
        };
        let space_prefix = scored && source.add_space_prefix.unwrap_or(true);
        let pre = family.map(|f| f.name);
        Ok(Self {
            encoder,
            specials,
            kinds,
            pieces,
            ends,
            bos,
            eos,
            add_bos,
            space_prefix,
            escapes_spaces: as_is && !scored,
            pre,
            warning,
        })
    }

    /// Returns the tokenizer of a model without a vocabulary.
    fn empty() -> Self {
        Self {
            encoder: Encoder::None,
            specials: Specials::default(),
            kinds: Vec::new(),
            pieces: Vec::new(),
            ends: Vec::new(),
            bos: None,
            eos: None,
            add_bos: false,
            space_prefix: false,
            escapes_spaces: false,
            pre: None,
            warning: None,
        }
    }

    /// Returns the tokens of `text`, unless they are more than `most`. A text far longer than that
    /// is refused before it takes memory.
    fn encode_as(
        &self,
        text: &str,
        parse: Parse<'_>,
        most: usize,
    ) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = Vec::with_capacity((text.len() / 3).min(most).min(1 << 16) + 2);
        self.encode_onto(text, parse, most, true, &mut ids)?;
        Ok(ids)
    }

    /// Adds the tokens of `text` to `ids`, unless they are more than `most` together.
    /// `after_special` is whether a special token, or nothing, stands before the text. Returns
    /// whether one ends it.
    fn encode_onto(
        &self,
        text: &str,
        parse: Parse<'_>,
        most: usize,
        mut after_special: bool,
        ids: &mut Vec<u32>,
    ) -> Result<bool, TokenizerError> {
        // Positions in a text have 32 bits.
        if text.len() >= u32::MAX as usize {
            return Err(TokenizerError::TooManyBytes { bytes: text.len() });
        }
        for fragment in self.specials.partition(text, parse) {
            match (fragment, &self.encoder) {
                (_, Encoder::None) => return Err(TokenizerError::NoTokenizer),
                (Fragment::Token(id), _) => {
                    ids.push(id);
                    after_special = true;
                    continue;
                }
                (Fragment::Text(""), _) => {}
                (Fragment::Text(text), Encoder::Pairs(pairs)) if self.escapes_spaces => {
                    let escaped = text.replace(' ', scores::SPACE.encode_utf8(&mut [0; 4]));
                    pairs.encode(&escaped, most, ids)?;
                }
                (Fragment::Text(text), Encoder::Pairs(pairs)) => pairs.encode(text, most, ids)?,
                (Fragment::Text(text), Encoder::Scores(scores)) => {
                    let space = if self.space_prefix && after_special {
                        " "
                    } else {
                        ""
                    };
                    let spelled: String = space
                        .chars()
                        .chain(text.chars())
                        .map(|c| if c == ' ' { scores::SPACE } else { c })
                        .collect();
                    scores.encode(&spelled, most, ids)?;
                }
            }
            after_special = false;
        }
        if ids.len() > most {
            let least = ids.len();
            return Err(TokenizerError::TooLong { least, most });
        }
        Ok(after_special)
    }

    /// Returns the text of `ids`, without control tokens and without the space that
    /// [`encode`](Self::encode) put in front. Bytes that are not UTF-8 become U+FFFD; ids past the
    /// vocabulary give nothing.
    pub fn decode(&self, ids: &[u32]) -> String {
        let mut bytes = Vec::with_capacity(ids.len() * 4);
        for &id in ids {
            if self.kind(id).is_some_and(TokenKind::is_text) {
                bytes.extend_from_slice(self.piece(id));
            }
        }
        let skip = usize::from(self.space_prefix && bytes.first() == Some(&b' '));
        String::from_utf8_lossy(&bytes[skip..]).into_owned()
    }

    /// Returns the bytes of a token; of a control token, its text. Empty for ids past the
    /// vocabulary.
    pub fn piece(&self, id: u32) -> &[u8] {
        let id = id as usize;
        let Some(&end) = self.ends.get(id) else {
            return &[];
        };
        let start = id.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.pieces[start..end]
    }

    /// Returns a copy of [`piece`](Self::piece).
    pub fn token_bytes(&self, id: u32) -> Vec<u8> {
        self.piece(id).to_vec()
    }

    /// Returns what a token is for; `None` past the vocabulary.
    pub fn kind(&self, id: u32) -> Option<TokenKind> {
        self.kinds.get(id as usize).copied()
    }

    /// Returns whether some text is spelled with a token: by itself, its own is. Bytes of a part of a
    /// character are always spelled so.
    pub fn is_spelled(&self, id: u32) -> bool {
        let Ok(text) = std::str::from_utf8(self.piece(id)) else {
            return true;
        };
        let (mut ids, parse) = (Vec::new(), Parse::UserDefined);
        let encoded = self.encode_onto(text, parse, usize::MAX, false, &mut ids);
        encoded.is_ok() && ids == [id]
    }

    /// Returns a decoder for text that is generated token by token.
    pub fn stream(&self) -> TokenStream<'_> {
        TokenStream::new(self)
    }

    /// Returns the token that starts a text.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    /// Returns the token that ends a text.
    pub fn eos(&self) -> Option<u32> {
        self.eos
    }

    /// Returns the token that [`encode`](Self::encode) puts before a text: BOS, where the model
    /// wants it.
    pub fn prefix(&self) -> Option<u32> {
        self.bos.filter(|_| self.add_bos)
    }

    /// Returns whether `id` ends a generation: EOS, and what chat models end a turn with.
    pub fn is_eog(&self, id: u32) -> bool {
        self.specials.eog.contains(&id)
    }

    /// Returns which border of a thought `id` marks, `None` for other tokens.
    pub fn thought_mark(&self, id: u32) -> Option<ThoughtMark> {
        self.specials.thoughts.get(&id).copied()
    }

    /// Returns the size of the vocabulary; 0 where there is none.
    pub fn n_vocab(&self) -> usize {
        self.ends.len()
    }

    /// Returns the name of the split pattern in use; `None` where the vocabulary needs none.
    pub fn pre(&self) -> Option<&'static str> {
        self.pre
    }

    /// Returns what the user should know about this tokenizer, if anything.
    pub fn warning(&self) -> Option<&str> {
        self.warning.as_deref()
    }
}

/// Returns the bytes that each token stands for, end to end, and where each ends.
fn pieces(tokens: &[String], kinds: &[TokenKind], as_is: bool) -> (Vec<u8>, Vec<usize>) {
    let mut pieces = Vec::with_capacity(tokens.iter().map(String::len).sum());
    let mut ends = Vec::with_capacity(tokens.len());
    for (token, kind) in tokens.iter().zip(kinds) {
        match kind {
            TokenKind::Normal | TokenKind::Unused if as_is => {
                pieces.extend(token.replace(scores::SPACE, " ").bytes());
            }
            TokenKind::Normal | TokenKind::Unused => spell(token, &mut pieces),
            TokenKind::Byte => match byte_token(token) {
                Some(byte) => pieces.push(byte),
                None => pieces.extend(token.bytes()),
            },
            TokenKind::Control | TokenKind::UserDefined | TokenKind::Unknown => {
                pieces.extend(token.bytes())
            }
        }
        ends.push(pieces.len());
    }
    (pieces, ends)
}

/// Appends the bytes that a token of a byte-level vocabulary spells; characters outside the
/// alphabet stand for themselves.
fn spell(token: &str, out: &mut Vec<u8>) {
    for c in token.chars() {
        match bytes::byte_of(c) {
            Some(byte) => out.push(byte),
            None => out.extend_from_slice(c.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
}

/// Returns the byte that a token like `<0x0A>` means.
fn byte_token(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 {
        u8::from_str_radix(digits, 16).ok()
    } else {
        None
    }
}
