//! Why a vocabulary can't be used, or a text can't be encoded.

use thiserror::Error;

/// An error of building a tokenizer, or of encoding a text.
#[derive(Debug, Error)]
pub enum TokenizerError {
    /// The file holds no vocabulary.
    #[error(
        "this model has no tokenizer (tokenizer.ggml.model is 'none'): give token ids instead of text"
    )]
    NoTokenizer,
    /// The kind of vocabulary is unknown.
    #[error(
        "tokenizer.ggml.model is '{found}', but only gpt2, gemma4, llama and none are known: give token ids instead of text"
    )]
    UnknownModel {
        /// The name in the file.
        found: String,
    },
    /// The split pattern is unknown.
    #[error("unknown split pattern '{found}' (tokenizer.ggml.pre), expected one of: {known}")]
    UnknownPre {
        /// The name in the file, or the one that was forced.
        found: String,
        /// The names that are known.
        known: String,
    },
    /// The vocabulary has no tokens, or more than 32-bit ids can count.
    #[error(
        "tokenizer.ggml.tokens has {found} entries; expected 1 to {}",
        u32::MAX
    )]
    BadSize {
        /// Tokens in the file.
        found: usize,
    },
    /// An array has too few entries.
    #[error(
        "tokenizer.ggml.{array} has {found} entries, but there are {expected} tokens: the file is damaged"
    )]
    BadLength {
        /// Name of the array, without `tokenizer.ggml.`.
        array: &'static str,
        /// Entries in the file.
        found: usize,
        /// Tokens in the file.
        expected: usize,
    },
    /// The file asks for a BOS token that it doesn't name.
    #[error(
        "the file asks to begin prompts with BOS (tokenizer.ggml.add_bos_token), but names no such token"
    )]
    MissingBos,
    /// The vocabulary has no token for a byte.
    #[error("the text holds byte 0x{byte:02X}, for which the vocabulary has no token")]
    NoByte {
        /// The byte of the text.
        byte: u8,
    },
    /// The text takes more tokens than are allowed.
    #[error("the text takes {least} tokens or more, expected at most {most}")]
    TooLong {
        /// Tokens that the text takes at least.
        least: usize,
        /// Tokens that are allowed.
        most: usize,
    },
    /// The text has more bytes than are counted.
    #[error("the text has {bytes} bytes, expected at most {}", u32::MAX)]
    TooManyBytes {
        /// Bytes of the text.
        bytes: usize,
    },
    /// A split pattern does not compile.
    #[error("the tokenizer could not be built: {0}")]
    Build(String),
}
