//! `*.profile`: which experts each token chose, layer by layer, over the calibration prompts.

mod wire;

#[cfg(test)]
mod tests;

use super::kind::{PROFILE, PROFILE_MAGIC};
use crate::model::spec::{ModelSpec, MoeSpec};
use crate::source_id::SourceId;
use crate::{FormatError, safely};
use std::ops::Range;
use std::path::Path;

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
    /// Weight of each chosen expert in 255ths, `[token, moe layer, used]`.
    pub weights: Vec<u8>,
}

impl PromptTrace {
    /// Returns the number of prompt and decoded tokens.
    pub fn tokens(&self) -> usize {
        self.prompt_tokens as usize + self.decode_tokens as usize
    }

    /// Adds the choices of one or more tokens: experts and their weights, `[token, moe layer, used]`.
    pub fn add(&mut self, experts: &[u16], weights: &[f32]) {
        self.experts.extend_from_slice(experts);
        let in_255ths = |w: &f32| (w * 255.0).round().clamp(0.0, 255.0) as u8;
        self.weights.extend(weights.iter().map(in_255ths));
    }

    /// Returns the positions of the tokens of a phase, of all tokens for `None`.
    pub fn token_range(&self, phase: Option<Phase>) -> Range<usize> {
        let prompt = self.prompt_tokens as usize;
        match phase {
            None => 0..self.tokens(),
            Some(Phase::Prompt) => 0..prompt,
            Some(Phase::Decode) => prompt..self.tokens(),
        }
    }
}

/// Accuracy of predicted experts of a layer, by which the engine prefetches. Predictions are made
/// from the hidden state before the layer's input is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Guesses {
    /// Experts predicted for decoded tokens.
    pub made: u64,
    /// Predicted experts that the router then chose.
    pub right: u64,
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
    /// Experts per token in each of those layers.
    pub n_used: u32,
    /// How it was made: settings and seeds.
    pub made: String,
    /// One entry per prompt; none where only counts are known.
    pub prompts: Vec<PromptTrace>,
    /// Where only counts are known: how often prompt tokens chose each expert, `[layer
    /// position][expert]`. Such a profile has no order in time and no decoded tokens. Its model's
    /// hash may be empty, as counts hold for every file of a model.
    pub counted: Option<Vec<Vec<u64>>>,
    /// Accuracy of predictions, `[layer position]`, where they were scored; none are made of the
    /// first layer.
    pub guesses: Option<Vec<Guesses>>,
    /// Hash of the file it was read from, under the model's name.
    pub id: SourceId,
}

/// Why a model cannot be profiled.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NoProfile {
    /// It has no routed experts.
    #[error("'{model}' has no routed experts, so there is nothing to profile")]
    NoExperts {
        /// Name of the model.
        model: String,
    },
    /// Its layers have different numbers of experts.
    #[error(
        "a token of '{model}' uses {} of {} experts in layer {layer}, and {} of {} in layer {first}; \
         profiles hold one number for all layers, so solve without one",
        here.0, here.1, there.0, there.1
    )]
    Uneven {
        /// Name of the model.
        model: String,
        /// The first layer with experts.
        first: usize,
        /// Its experts: used by a token, and in all.
        there: (usize, usize),
        /// A layer with others.
        layer: usize,
        /// Its experts.
        here: (usize, usize),
    },
}

impl Profile {
    /// Returns a profile of a model, before its first prompt.
    ///
    /// # Errors
    /// When the model cannot be profiled.
    pub fn of_model(model: SourceId, spec: &ModelSpec, made: String) -> Result<Profile, NoProfile> {
        let experts = |moe: &MoeSpec| (moe.n_used, moe.n_expert);
        let mut layers = spec.moe_layers().map(|(layer, moe)| (layer, experts(moe)));
        let Some((first, there)) = layers.next() else {
            return Err(NoProfile::NoExperts { model: model.name });
        };
        if let Some((layer, here)) = layers.find(|(_, here)| *here != there) {
            return Err(NoProfile::Uneven {
                model: model.name,
                first,
                there,
                layer,
                here,
            });
        }
        Ok(Profile {
            model,
            layers: spec.moe_layers().map(|(layer, _)| layer as u32).collect(),
            n_expert: there.1 as u32,
            n_used: there.0 as u32,
            made,
            prompts: Vec::new(),
            counted: None,
            guesses: None,
            id: SourceId {
                name: String::new(),
                hash: String::new(),
            },
        })
    }

    /// Returns the experts that one token of one prompt chose in one layer, `[n_used]`. Prompt,
    /// token, and layer are positions.
    pub fn chosen(&self, prompt: usize, token: usize, layer: usize) -> &[u16] {
        let used = self.n_used as usize;
        let at = (token * self.layers.len() + layer) * used;
        &self.prompts[prompt].experts[at..at + used]
    }

    /// Counts how often each expert was chosen, `[layer position][expert]`, over the prompts that
    /// match; `None` matches all.
    pub fn counts(
        &self,
        phase: Option<Phase>,
        split: Option<Split>,
        domain: Option<&str>,
    ) -> Vec<Vec<u64>> {
        if let Some(counted) = &self.counted
            && phase != Some(Phase::Decode)
            && split != Some(Split::HeldOut)
            && domain.is_none()
        {
            return counted.clone();
        }
        let mut counts = vec![vec![0u64; self.n_expert as usize]; self.layers.len()];
        let used = self.n_used as usize;
        let per_token = self.layers.len() * used;
        if per_token == 0 {
            return counts;
        }
        for prompt in self
            .matching(split)
            .filter(|p| domain.is_none_or(|d| p.domain == d))
        {
            let tokens = prompt.token_range(phase);
            for token in prompt
                .experts
                .chunks_exact(per_token)
                .take(tokens.end)
                .skip(tokens.start)
            {
                for (layer, chosen) in counts.iter_mut().zip(token.chunks_exact(used)) {
                    for &expert in chosen {
                        if let Some(count) = layer.get_mut(usize::from(expert)) {
                            *count += 1;
                        }
                    }
                }
            }
        }
        counts
    }

    /// Returns the domains of the prompts, each once, in the order in which they first come.
    pub fn domains(&self) -> Vec<String> {
        let mut domains: Vec<String> = Vec::new();
        for prompt in &self.prompts {
            if !domains.contains(&prompt.domain) {
                domains.push(prompt.domain.clone());
            }
        }
        domains
    }

    /// Counts the tokens of a phase over the prompts of a split; `None` takes all.
    pub fn n_tokens(&self, phase: Option<Phase>, split: Option<Split>) -> u64 {
        self.matching(split)
            .map(|p| p.token_range(phase).len() as u64)
            .sum()
    }

    fn matching(&self, split: Option<Split>) -> impl Iterator<Item = &PromptTrace> {
        self.prompts
            .iter()
            .filter(move |p| split.is_none_or(|s| p.split == s))
    }

    /// Encodes the file. The identity is not written: it is the hash of these bytes.
    pub fn encode(&self) -> Vec<u8> {
        wire::encode(self)
    }

    /// Writes the file, or says why its content would not be readable again.
    pub fn write(&self, path: &Path) -> Result<(), FormatError> {
        wire::check(self).map_err(|what| FormatError::invalid(path, what))?;
        safely::write(path, &self.encode())
    }

    /// Returns the profile with the identity that its own file would have.
    pub fn identified(mut self) -> Profile {
        self.id = wire::identify(&self.model.name, self.counted.is_some(), &self.encode());
        self
    }

    /// Whether it holds for every file of a model with these layers and experts, as counts without
    /// a hash do.
    pub fn is_unbound(&self) -> bool {
        self.counted.is_some() && self.model.hash.is_empty()
    }

    /// Refuses a profile that has counts and no traces; `what` names the purpose that needs traces.
    pub fn check_traces(&self, what: &str, path: &Path) -> Result<(), FormatError> {
        if self.counted.is_none() {
            return Ok(());
        }
        let words = format!(
            "this profile has only counts of an importance matrix, but {what} needs the choices of every token; make a \
             profile with `tier-plan profile MODEL`"
        );
        Err(FormatError::invalid(path, words))
    }

    /// Refuses a profile of another model, naming both.
    pub fn check_model(&self, id: &SourceId, path: &Path) -> Result<(), FormatError> {
        if self.is_unbound() {
            return Ok(());
        }
        super::check_model(
            &self.model,
            id,
            "profile",
            "give its own model, or run `tier-plan profile` on this one",
            path,
        )
    }
}

/// Whether a file begins as profiles do; `false` where it cannot be read.
pub fn is_profile(path: &Path) -> bool {
    let mut head = [0; PROFILE_MAGIC.len()];
    let read = std::fs::File::open(path)
        .and_then(|mut file| std::io::Read::read_exact(&mut file, &mut head));
    read.is_ok() && head == PROFILE_MAGIC
}

/// Reads a profile from the bytes of its file. `path` is only named in errors.
pub fn decode(bytes: &[u8], path: &Path) -> Result<Profile, FormatError> {
    wire::decode(bytes, path)
}

/// Reads a profile from its file.
///
/// ```
/// use std::path::Path;
/// use tier_plan_formats::profile;
///
/// let profile = profile::read(Path::new("../../tests/data/formats/profile.v3.profile"))?;
/// let counts = profile.counts(None, None, None);
/// assert_eq!(counts.len(), profile.layers.len());
/// assert!(counts.iter().all(|layer| layer.len() == profile.n_expert as usize));
/// # Ok::<(), tier_plan_formats::FormatError>(())
/// ```
///
/// # Errors
/// When the file can't be read, is another kind of file, is newer than this program, or is damaged.
pub fn read(path: &Path) -> Result<Profile, FormatError> {
    decode(&PROFILE.read(path)?, path)
}

/// Reads a profile from an open file. `path` is only named in errors.
///
/// # Errors
/// As [`read`].
pub fn read_from(file: std::fs::File, path: &Path) -> Result<Profile, FormatError> {
    decode(&PROFILE.read_from(file, path)?, path)
}
