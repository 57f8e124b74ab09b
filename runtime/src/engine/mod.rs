//! The engine: a loaded model with one text, and the pass that takes tokens through the layers.
//!
//! [`pass`](Engine::pass) shows the order of the work. What each step does is elsewhere: `backend`
//! has the dense stages on the CPU and on GPUs, `experts` the routed experts, `meter` the clocks,
//! counters and pacing, `sequence` the state of the text.

mod backend;
mod batch;
mod cpu;
mod experts;
mod fully_on_gpu;
pub mod generate;
mod gpu_backend;
#[cfg(test)]
mod gpu_delta_tests;
#[cfg(test)]
#[allow(unsafe_code)]
mod gpu_slot_tests;
#[cfg(test)]
#[allow(unsafe_code)]
mod gpu_split_tests;
#[cfg(test)]
#[allow(unsafe_code)]
mod gpu_tests;
mod load;
pub mod measure;
mod meter;
#[cfg(test)]
mod node_tests;
mod predictor;
#[cfg(test)]
#[allow(unsafe_code)]
mod prompt_gpu_tests;
#[cfg(test)]
mod rewritten_mla_tests;
#[cfg(test)]
mod rewritten_tests;
mod sequence;
mod warm;

pub use batch::{LogitsMode, Routing};

use crate::cancel::Cancel;
use crate::error::RunError;
use crate::experts::counters::Counters;
use crate::layers::index::layers;
use crate::load::MemoryUse;
use backend::Backends;
use batch::{Batch, Output, Phase};
use experts::Experts;
use meter::Meter;
use sequence::Sequence;
use std::time::Instant;
use tier_plan_formats::model::Model;
use tier_plan_formats::model::shape::ModelShape;
use tier_plan_formats::model::spec::ModelSpec;
use tier_plan_formats::placement::{PerTier, Placement, TierIdx};
use tier_plan_kernels::Kernels;

/// A loaded model with one text.
///
/// ```
/// use tier_plan_runtime::model::Model;
/// use tier_plan_runtime::plans::in_memory::all_in_memory;
/// use tier_plan_runtime::{Engine, KvType, LoadOptions, LogitsMode};
///
/// let model = Model::open("../profiles/demo/demo.gguf".as_ref())?;
/// let plan = all_in_memory(model.shape(), 64, KvType::F16);
/// let mut engine = Engine::load(model.gguf().clone(), &plan, &LoadOptions::default(), &mut |_, _| ())?;
///
/// let logits = engine.forward(&[1, 2, 3], LogitsMode::Last)?;
/// assert_eq!(logits.len(), model.spec().n_vocab);
/// assert_eq!(engine.n_past(), 3);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Engine {
    model: Model,
    plan: Placement,
    backends: Backends,
    experts: Experts,
    sequence: Sequence,
    meter: Meter,
    output: Output,
    memory: MemoryUse,
    /// Tokens of a call that go through a layer together.
    batch: usize,
    /// The tier whose GPU has all of the model but perhaps the embedding, if one has.
    fully_on_gpu: Option<TierIdx>,
    /// Polled by every pass.
    cancel: Cancel,
}

impl Engine {
    /// Takes tokens through the network and returns logits, `[1, n_vocab]` or `[tokens, n_vocab]`.
    ///
    /// # Errors
    /// When the context is full, a token is out of range, the slow tier fails, logits are not
    /// numbers, or the caller canceled. After the last three the context is as before the call. A
    /// network with recurrent states can't go back, so that only [`clear`](Self::clear) helps then.
    pub fn forward(&mut self, tokens: &[u32], mode: LogitsMode) -> Result<&[f32], RunError> {
        self.sequence.check_room(tokens.len())?;
        let n_vocab = self.model.spec().n_vocab;
        if let Some(token) = tokens.iter().find(|t| **t as usize >= n_vocab) {
            return Err(RunError::Token {
                token: *token,
                n_vocab,
            });
        }
        let used = self
            .model
            .spec()
            .moe_layers()
            .next()
            .map_or(0, |(_, moe)| moe.n_used);
        self.output.begin(tokens.len() * self.meter.n_moe() * used);
        // A file that was cut short must not be looked at where it is mapped.
        self.experts.store.check_files()?;
        let (start, n_past) = (Instant::now(), self.sequence.n_past());
        let phase = Phase::of_call(tokens.len(), n_past);
        for batch in Batch::split(tokens, self.batch, mode, phase) {
            let result = self.pass(&batch).and_then(|()| self.check_canceled());
            // What was read from a file that changed is worth nothing, however well the reads went.
            if let Err(error) = result.and_then(|()| Ok(self.experts.store.check_files()?)) {
                self.sequence.undo(n_past);
                return Err(error);
            }
        }
        // Without all tokens' logits, the row is that of the last token.
        if let Some(row) = first_not_finite(&self.output.logits, n_vocab) {
            let n_rows = self.output.logits.len() / n_vocab;
            self.sequence.undo(n_past);
            return Err(RunError::NotANumber {
                position: n_past + tokens.len() - n_rows + row,
            });
        }
        self.meter.finish_call(start, phase, tokens.len());
        self.meter
            .count_prefetched(self.experts.store.take_prefetch_count());
        Ok(&self.output.logits)
    }

    /// Fails if the caller requested that passes stop.
    fn check_canceled(&self) -> Result<(), RunError> {
        if self.cancel.is_requested() {
            Err(RunError::Canceled)
        } else {
            Ok(())
        }
    }

    /// Takes a batch through all layers.
    fn pass(&mut self, batch: &Batch<'_>) -> Result<(), RunError> {
        if let Some(tier) = self
            .fully_on_gpu
            .filter(|_| batch.single && !self.experts.scores_predictions)
        {
            return self.pass_on_gpu(tier, batch);
        }
        let Self {
            model,
            backends,
            experts,
            sequence,
            meter,
            output,
            cancel,
            ..
        } = self;
        let spec = model.spec();
        meter.begin_pass(batch);
        let mut place = backends.embed(spec, batch, sequence)?;
        let mut layers = layers(spec).peekable();
        while let Some(layer) = layers.next() {
            let start = Instant::now();
            backends.begin_layer();
            let mut next_place = place;
            for rows in batch.micro_batches(backends.buffers.micro_batch) {
                if cancel.is_requested() {
                    return Err(RunError::Canceled);
                }
                let start = Instant::now();
                next_place = backends.dense_stage(spec, layer, rows.clone(), place, sequence)?;
                meter.pace_dense(start, layer.index, sequence.n_past() + rows.end, rows.len());
            }
            place = next_place;
            let clock = meter.finish_dense(start, layer, batch.phase, sequence.n_past());
            let Some(moe) = layer.moe else { continue };
            if batch.phase == Phase::Decode {
                meter.count_prediction(moe.index, experts.score(moe, backends));
            }
            if let Some(next) = layers.peek() {
                experts.prefetch(spec, *next, batch, place, backends, sequence)?;
            }
            if cancel.is_requested() {
                return Err(RunError::Canceled);
            }
            let step = experts.run(moe, batch, backends, &mut meter.computed)?;
            backends.add_experts(spec, batch.len(), place, sequence)?;
            output.record(moe, meter.n_moe(), batch, &backends.buffers);
            meter.finish_experts(clock, moe.index, batch.phase, &step);
        }
        sequence.advance(batch.len());
        let start = Instant::now();
        if let Some(rows) = batch.logit_rows() {
            backends.head(spec, rows, place, sequence, &mut output.logits)?;
        }
        meter.finish_head(start, batch);
        Ok(())
    }

    /// Returns the network.
    pub fn spec(&self) -> &ModelSpec {
        self.model.spec()
    }

    /// Returns the sizes of the network.
    pub fn shape(&self) -> &ModelShape {
        self.model.shape()
    }

    /// Returns the plan that the engine was loaded from.
    pub fn plan(&self) -> &Placement {
        &self.plan
    }

    /// Returns the bytes counted in each tier after loading: dense groups, pinned experts, slots,
    /// staging, KV cache and recurrent states. The last tier's include the backing copies of pooled
    /// experts.
    pub fn resident_bytes(&self) -> &PerTier<u64> {
        &self.memory.resident_bytes
    }

    /// Returns the bytes by tier that slots and staging take beyond the plan, within its budget, so
    /// that a block device is read straight into them.
    pub fn padding_bytes(&self) -> &PerTier<u64> {
        &self.memory.padding_bytes
    }

    /// Returns how many experts of main memory were streamed to a GPU for prompts; an expert counts
    /// once per batch.
    pub fn experts_streamed(&self) -> u64 {
        self.experts.streams.n_streamed()
    }

    /// Returns what was counted since the engine was loaded or
    /// [`reset_counters`](Self::reset_counters).
    pub fn counters(&self) -> &Counters {
        self.meter.counters()
    }

    /// Starts counting at zero.
    pub fn reset_counters(&mut self) {
        self.meter.reset();
    }

    /// Predicts what a decoded token's next layer needs even where nothing is prefetched, so that
    /// the counters tell how good predictions are.
    pub fn score_predictions(&mut self) {
        self.experts.scores_predictions = true;
    }

    /// Returns the number of compute threads.
    pub fn n_threads(&self) -> usize {
        self.backends.pool.n_threads()
    }

    /// Returns the kernels in use.
    pub fn kernels(&self) -> Kernels {
        self.backends.kernels
    }

    /// Returns the number of tokens in the context.
    pub fn n_past(&self) -> usize {
        self.sequence.n_past()
    }

    /// Returns how many tokens the context may hold.
    pub fn context(&self) -> usize {
        self.sequence.capacity()
    }

    /// Returns how many tokens of a prompt go through a layer together.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Lets the context hold fewer tokens than planned; its memory stays as planned.
    pub fn limit_context(&mut self, context: u32) {
        self.sequence.limit(context as usize);
    }

    /// Forgets all tokens but the first `n`; does nothing where there are no more.
    ///
    /// # Errors
    /// When a layer has one recurrent state for all past tokens, and `n` is neither 0 nor all of
    /// them. Nothing is forgotten then.
    pub fn truncate(&mut self, n: usize) -> Result<(), RunError> {
        self.sequence.truncate(n)
    }

    /// Forgets all tokens.
    pub fn clear(&mut self) {
        self.sequence.clear();
    }

    /// Returns the experts that the routers chose for the tokens of the last
    /// [`forward`](Self::forward).
    pub fn routing(&self) -> &Routing {
        &self.output.routing
    }
}

/// Returns the first row of logits that has a NaN or an infinity.
fn first_not_finite(logits: &[f32], n_vocab: usize) -> Option<usize> {
    // No early exit within a row, so that the loop is vectorized.
    let is_finite = |row: &[f32]| row.iter().fold(true, |all, x| all & x.is_finite());
    logits
        .chunks(n_vocab.max(1))
        .position(|row| !is_finite(row))
}

#[cfg(test)]
mod tests {
    use super::first_not_finite;

    #[test]
    fn the_first_row_with_a_nan_or_an_infinity_is_found() {
        let mut logits = [0.5f32; 12];
        assert_eq!(first_not_finite(&logits, 4), None);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            logits[11] = bad;
            assert_eq!(first_not_finite(&logits, 4), Some(2));
            logits[4] = bad;
            assert_eq!(first_not_finite(&logits, 4), Some(1));
            logits[4] = f32::MAX;
        }
        assert_eq!(first_not_finite(&[], 4), None);
    }
}
