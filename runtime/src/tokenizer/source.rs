//! The vocabulary as a model file gives it.

use super::TokenizerSource;
use tier_plan_formats::gguf::{Gguf, GgufError};

impl TokenizerSource {
    /// Reads the `tokenizer.ggml.*` keys of a file. A file without them has the vocabulary `none`.
    ///
    /// # Errors
    /// When a key has another type than it should.
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, GgufError> {
        let key = |name: &str| format!("tokenizer.ggml.{name}");
        let id = |name: &str| gguf.opt_u32(&key(&format!("{name}_token_id")));
        let strings = |name: &str| Ok(gguf.opt_str_array(&key(name))?.unwrap_or_default().to_vec());
        let model = gguf.opt_str(&key("model"))?.unwrap_or("none").to_string();
        // An empty list is a vocabulary of bytes; without a list something is missing.
        let merges = match model.as_str() {
            "gpt2" | "gemma4" => gguf.str_array(&key("merges"))?.to_vec(),
            _ => strings("merges")?,
        };
        Ok(Self {
            model,
            pre: gguf.opt_str(&key("pre"))?.map(str::to_string),
            tokens: strings("tokens")?,
            token_types: gguf.opt_i32_array(&key("token_type"))?.unwrap_or_default(),
            scores: gguf.opt_number_array(&key("scores"))?.unwrap_or_default(),
            merges,
            bos: id("bos")?,
            eos: id("eos")?,
            eot: id("eot")?,
            eom: id("eom")?,
            unk: id("unknown")?,
            add_bos: gguf.opt_bool(&key("add_bos_token"))?,
            add_space_prefix: gguf.opt_bool(&key("add_space_prefix"))?,
        })
    }
}
