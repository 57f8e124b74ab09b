//! Learning from use: which experts a run's texts chose, added to what earlier runs chose.
//!
//! The recorder is that of the server. It holds numbers of experts and their weights, no tokens.

use crate::printable::printable;
use std::path::{Path, PathBuf};
use tier_plan_runtime::Engine;
use tier_plan_runtime::batcher::StepRows;
use tier_plan_runtime::formats::SourceId;
use tier_plan_runtime::formats::profile::{Phase, Profile, Split};
use tier_plan_runtime::model::spec::ModelSpec;
use tier_plan_runtime::schedule::TextId;
use tier_plan_serve::Traces;

/// Most choices that are kept of a model, of three bytes each: 24 MiB.
pub const MAX_CHOICES: usize = 8 << 20;

/// Uses per expert and layer, on average, from which plans are made of what was learned.
const MIN_USES: u64 = 16;

/// Fewest decoded tokens that plans are made of.
const MIN_TOKENS: u64 = 128;

/// Whether a profile of real use has enough of it to plan with: tokens to choose by, and others to
/// judge by.
pub fn is_enough(profile: &Profile) -> bool {
    let decoded = |split| profile.n_tokens(Some(Phase::Decode), Some(split));
    let (train, held_out) = (decoded(Split::Train), decoded(Split::HeldOut));
    let uses = train.saturating_mul(profile.n_used.into());
    train >= MIN_TOKENS && held_out > 0 && uses >= MIN_USES.saturating_mul(profile.n_expert.into())
}

/// Records the texts of one run.
pub struct Learner {
    traces: Traces,
    path: PathBuf,
    spec: ModelSpec,
    /// The text at work, if any was begun.
    text: TextId,
    n_prompt: usize,
}

impl Learner {
    /// Begins to record for a file. `None` for a model that cannot be profiled.
    pub fn new(path: &Path, model: SourceId, spec: &ModelSpec) -> Option<Self> {
        let traces = Traces::of_nothing(path, model, spec).ok()?;
        Some(Self {
            traces: traces.at_most(MAX_CHOICES),
            path: path.to_path_buf(),
            spec: spec.clone(),
            text: TextId(0),
            n_prompt: 0,
        })
    }

    /// Begins a text, of which the engine's context has `n_prompt` tokens once its prompt is read.
    pub fn begin(&mut self, n_prompt: usize) {
        self.traces.end(self.text);
        self.text.0 += 1;
        self.n_prompt = n_prompt;
    }

    /// Records what the engine's last step computed of the text, whose first `n_text` tokens are
    /// known to be right. Tokens after them may be a wrong draft.
    pub fn see(&mut self, engine: &Engine, n_text: usize) {
        let routing = engine.routing();
        let per_token: usize = self.spec.moe_layers().map(|(_, moe)| moe.n_used).sum();
        let n_computed = routing.experts.len() / per_token.max(1);
        let Some(from) = engine.n_past().checked_sub(n_computed) else {
            return;
        };
        let rows = StepRows {
            id: self.text,
            n_prompt: self.n_prompt,
            from,
            n_computed,
            n_kept: n_text.saturating_sub(from).min(n_computed),
        };
        self.traces.record((routing, &[rows]));
    }

    /// Adds what was recorded to the file. A run is not failed for what it could not learn; a note
    /// says why.
    pub fn keep(mut self) {
        self.traces.end(self.text);
        if let Err(error) = self.traces.write() {
            eprintln!(
                "note: nothing was learned from this run: {}: {}",
                self.path.display(),
                printable(&error.to_string())
            );
        }
    }
}
