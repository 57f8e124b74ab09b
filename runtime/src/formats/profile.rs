//! `*.profile`: which experts each token chose, layer by layer, over the calibration prompts.

use super::SourceId;

/// Whether a prompt may be used to choose a placement, or only to judge it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Split {
    /// Placements are chosen on it.
    Train,
    /// Placements are judged on it.
    HeldOut,
}

/// Prompt processing or one-token-at-a-time generation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Many tokens at once.
    Prompt,
    /// One token at a time.
    Decode,
}

/// The choices of one prompt's tokens, prompt tokens first, then decoded ones.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptTrace {
    /// Folder of the prompt: `scripture`, `code`.
    pub domain: String,
    /// File of the prompt.
    pub name: String,
    /// What it may be used for.
    pub split: Split,
    /// Tokens that were processed as prompt.
    pub prompt_tokens: u32,
    /// Tokens that were decoded after it.
    pub decode_tokens: u32,
    /// `[token, moe layer, used]` chosen experts in the router's order (largest weight first).
    pub experts: Vec<u16>,
    /// Same shape: the expert's weight in 255ths.
    pub weights: Vec<u8>,
}

/// A profile. Layers here are those with routed experts only, in ascending order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Profile {
    /// The model that was run.
    pub model: SourceId,
    /// Layer numbers that the second axis of the traces stands for.
    pub layers: Vec<u32>,
    /// Experts in each of those layers.
    pub n_expert: u32,
    /// Experts a token uses in each.
    pub n_used: u32,
    /// How it was made, in words (settings, seeds).
    pub made: String,
    /// One entry a prompt.
    pub prompts: Vec<PromptTrace>,
    /// Hash of the file it was read from; the name repeated.
    pub id: SourceId,
}

impl Profile {
    /// The choices of one token of one prompt in one layer (both by position): `n_used` experts.
    pub fn chosen(&self, prompt: usize, token: usize, layer: usize) -> &[u16] {
        let used = self.n_used as usize;
        let at = (token * self.layers.len() + layer) * used;
        &self.prompts[prompt].experts[at..at + used]
    }
}
