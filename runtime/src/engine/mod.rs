//! The engine: a loaded model with any number of texts, and the pass that takes tokens through the
//! layers.
//!
//! [`pass`](Engine::pass) shows the order of the work. What each stage does is elsewhere: `backend`
//! has the dense stages on the CPU and on GPUs, `experts` the routed experts, `meter` the clocks,
//! counters and pacing, `sequences` the states of the texts, `texts` what programs do with them.

mod apart;
#[cfg(test)]
mod apart_tests;
mod backend;
mod batch;
pub mod burst;
mod choices;
mod cpu;
pub mod draft;
mod experts;
mod fully_on_gpu;
pub mod generate;
mod gpu_backend;
#[cfg(test)]
mod gpu_compressed_tests;
#[cfg(test)]
mod gpu_delta_tests;
#[cfg(test)]
#[allow(unsafe_code)]
mod gpu_golden_tests;
#[cfg(test)]
mod gpu_host_kv_tests;
#[cfg(test)]
mod gpu_index_tests;
#[cfg(test)]
mod gpu_latent_tests;
#[cfg(test)]
mod gpu_places_tests;
#[cfg(test)]
mod gpu_rearrange_tests;
#[cfg(test)]
#[allow(unsafe_code)]
mod gpu_slot_tests;
#[cfg(test)]
#[allow(unsafe_code)]
mod gpu_split_tests;
#[cfg(test)]
mod gpu_streamed_tests;
#[cfg(test)]
#[allow(unsafe_code)]
mod gpu_tests;
#[cfg(test)]
mod gpu_texts_tests;
#[cfg(test)]
mod gpu_together_tests;
mod kept_files;
mod load;
pub mod measure;
mod meter;
#[cfg(test)]
mod node_tests;
mod predictor;
mod prefixes;
#[cfg(test)]
#[allow(unsafe_code)]
mod prompt_gpu_tests;
mod rearrange;
mod residual;
#[cfg(test)]
mod rewritten_gqa_tests;
#[cfg(test)]
mod rewritten_mla_tests;
#[cfg(test)]
mod rewritten_pooled_tests;
#[cfg(test)]
mod rewritten_sparse_tests;
#[cfg(test)]
mod rewritten_streams_tests;
#[cfg(test)]
mod rewritten_tests;
mod rows;
#[cfg(test)]
mod scaled_tests;
mod sequences;
#[cfg(test)]
mod sequences_tests;
mod texts;
mod warm;
#[cfg(test)]
mod window_tests;

pub use crate::experts::rearrange::Rearranged;
pub use apart::RowsOutcome;
pub use batch::{LogitsMode, Routing, Rows};
pub use rearrange::{OnGpu, RearrangeError};
pub use sequences::{Pages, SequenceId};

use crate::cancel::Cancel;
use crate::error::RunError;
use crate::experts::counters::Counters;
use crate::layers::index::layers;
use crate::load::MemoryUse;
use backend::{Backends, TextRows};
use batch::{Batch, Choices, Output, Phase, split};
use experts::Experts;
use meter::Meter;
use rearrange::Rearrangement;
use sequences::Sequences;
use std::time::Instant;
use tier_plan_formats::model::Model;
use tier_plan_formats::model::shape::ModelShape;
use tier_plan_formats::model::spec::ModelSpec;
use tier_plan_formats::placement::{PerTier, Placement, TierIdx};
use tier_plan_kernels::Kernels;
use tier_plan_kernels::shards::NodeReads;

/// A loaded model with any number of texts.
///
/// A program with one text uses [`forward`](Self::forward) and [`truncate`](Self::truncate). One
/// with several [adds](Self::add_sequence) each, and takes tokens of all of them through the layers
/// together in a [`step`](Self::step). A text's logits are the same to the bit either way, whatever
/// is beside it, as long as the CPU computes them.
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
    sequences: Sequences,
    /// The text of a program that has one, once it has tokens.
    own: Option<SequenceId>,
    meter: Meter,
    output: Output,
    choices: Choices,
    memory: MemoryUse,
    /// Tokens of a step that go through a layer together.
    batch: usize,
    /// The tier whose GPU has all of the model but perhaps the embedding, if one has.
    fully_on_gpu: Option<TierIdx>,
    /// Polled by every pass.
    cancel: Cancel,
    rearrangement: Rearrangement,
}

impl Engine {
    /// Takes the next tokens of the engine's own text through the network and returns logits, `[1,
    /// n_vocab]` or `[tokens, n_vocab]`.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    pub fn forward(&mut self, tokens: &[u32], mode: LogitsMode) -> Result<&[f32], RunError> {
        let sequence = match self.own {
            Some(own) => own,
            None => *self.own.insert(self.sequences.add()?),
        };
        self.step(&[Rows {
            sequence,
            tokens,
            logits: Some(mode),
        }])
    }

    /// Takes a token of the engine's own text through the network, and a draft of those after it.
    /// All count as decoded.
    pub(crate) fn decode(&mut self, tokens: &[u32], mode: LogitsMode) -> Result<&[f32], RunError> {
        let sequence = self.own.ok_or(RunError::NoText)?;
        let rows = Rows {
            sequence,
            tokens,
            logits: Some(mode),
        };
        self.step_as(&[rows], Phase::Decode)
    }

    /// Forgets the last `n` tokens of the engine's own text, which were a wrong draft.
    pub(crate) fn take_back(&mut self, n: usize) -> Result<(), RunError> {
        self.meter.uncount_decoded(n);
        self.truncate(self.n_past() - n)
    }

    /// Returns whether a text can go back to where it was before the last batch, and has the same
    /// bits then: all of it is computed by the CPU.
    pub fn repeats(&self) -> bool {
        self.sequences.can_take_back()
            && self.experts.store.n_gpus() == 0
            && !self.experts.streams.any()
            && !self.backends.processors.gpus.places.any()
    }

    /// Takes tokens of several texts through the network together, and returns the logits of the
    /// tokens that want them, `[wanted tokens, n_vocab]`, in the order of `rows`.
    ///
    /// An expert that several tokens chose is read and computed once per
    /// [batch](Self::batch) of tokens.
    ///
    /// # Errors
    /// When a text is unknown or is there twice, its context or the KV cache is full, a token is out
    /// of range, the slow tier fails, logits are not numbers, or the caller canceled. Then all texts
    /// are as before the step. A text with recurrent states can't go back, nor can one with windows
    /// after the first [batch](Self::batch) of a step: after a failed pass, only removing or clearing
    /// it helps.
    pub fn step(&mut self, rows: &[Rows<'_>]) -> Result<&[f32], RunError> {
        let past = |rows: &Rows<'_>| (rows.tokens.len(), self.n_past_of(rows.sequence));
        self.step_as(rows, Phase::of_step(rows.iter().map(past)))
    }

    /// [`step`](Self::step), counted as `phase`.
    fn step_as(&mut self, rows: &[Rows<'_>], phase: Phase) -> Result<&[f32], RunError> {
        let before = self.begin_step(rows)?;
        let start = Instant::now();
        let n_vocab = self.model.spec().n_vocab;
        let passes = self.compute_step(rows, phase).and_then(|()| {
            match first_not_finite(&self.output.logits, n_vocab) {
                Some(wanted) => Err(not_a_number(rows, &before, wanted)),
                None => Ok(()),
            }
        });
        if let Err(error) = passes {
            for (rows, n_past) in rows.iter().zip(before) {
                self.sequences.undo(rows.sequence, n_past);
            }
            return Err(error);
        }
        self.end_step(rows, phase, start);
        Ok(&self.output.logits)
    }

    /// Takes a step's tokens through the network. Its texts have their pages, and are neither
    /// committed nor undone.
    fn compute_step(&mut self, rows: &[Rows<'_>], phase: Phase) -> Result<(), RunError> {
        self.output.begin(n_tokens(rows) * self.choices.per_token);
        self.pass_all(rows, phase)
    }

    /// Commits the texts of a step, which began at `start`, and counts it.
    fn end_step(&mut self, rows: &[Rows<'_>], phase: Phase, start: Instant) {
        for rows in rows {
            self.sequences.commit(rows.sequence);
            if phase == Phase::Prompt && rows.tokens.len() > 1 {
                self.sequences.mark_prompt(rows.sequence);
            }
        }
        self.meter.finish_step(start, phase, n_tokens(rows));
        self.meter
            .count_reads(self.experts.store.drive_usage(), phase);
        self.meter
            .count_prefetched(self.experts.store.take_prefetch_count());
    }

    /// Checks a step, and gives its texts the pages for it. Returns the tokens that each has before.
    fn begin_step(&mut self, rows: &[Rows<'_>]) -> Result<Vec<usize>, RunError> {
        let checked = (0..rows.len()).map(|i| self.check_rows(&rows[..i], &rows[i]));
        let before = checked.collect::<Result<Vec<usize>, RunError>>()?;
        self.check_before_step()?;
        for (
            n,
            Rows {
                sequence, tokens, ..
            },
        ) in rows.iter().enumerate()
        {
            if let Err(error) = self.sequences.reserve(*sequence, tokens.len()) {
                rows[..n]
                    .iter()
                    .for_each(|r| self.sequences.trim(r.sequence));
                return Err(error);
            }
        }
        Ok(before)
    }

    /// Checks a text's tokens in a step after those of `others`. Returns the tokens that it has
    /// before.
    fn check_rows(&self, others: &[Rows<'_>], rows: &Rows<'_>) -> Result<usize, RunError> {
        let n_vocab = self.model.spec().n_vocab;
        if others.iter().any(|other| other.sequence == rows.sequence) {
            return Err(RunError::TwiceInStep);
        }
        if let Some(token) = rows.tokens.iter().find(|t| **t as usize >= n_vocab) {
            return Err(RunError::Token {
                token: *token,
                n_vocab,
            });
        }
        Ok(self.sequences.get(rows.sequence)?.n_past())
    }

    /// Checks what no text of a step is to blame for.
    fn check_before_step(&mut self) -> Result<(), RunError> {
        // What was left early before concerns no one now.
        self.backends.pool.take_gave_up();
        // A file that was cut short must not be looked at where it is mapped.
        self.experts.store.check_files()?;
        self.continue_rearranging();
        Ok(())
    }

    /// Takes a step's tokens through all layers, a batch at a time.
    fn pass_all(&mut self, rows: &[Rows<'_>], phase: Phase) -> Result<(), RunError> {
        let mut done = 0;
        for cuts in split(rows, self.batch) {
            let parts = cuts.iter();
            let parts = parts.map(|(entry, part)| (rows[*entry].sequence, part.len()));
            self.sequences.reserve_windows(parts)?;
            let batch = Batch::new(rows, &cuts, done, phase, &self.sequences)?;
            done += batch.len();
            let result = self.pass(&batch);
            let result = self.check_canceled().and(result);
            // What was read from a file that changed is worth nothing, however well the reads went.
            result.and_then(|()| Ok(self.experts.store.check_files()?))?;
        }
        Ok(())
    }

    /// Fails if the caller requested that passes stop.
    fn check_canceled(&self) -> Result<(), RunError> {
        // A loop that was left early has computed nothing of use, even if nobody asks any more.
        if self.backends.pool.take_gave_up() || self.cancel.is_requested() {
            Err(RunError::Canceled)
        } else {
            Ok(())
        }
    }

    /// Takes a batch through all layers.
    fn pass(&mut self, batch: &Batch) -> Result<(), RunError> {
        if let Some(tier) = self.gpu_of_step(batch) {
            return self.pass_on_gpu(tier, batch);
        }
        let Self {
            model,
            backends,
            experts,
            sequences,
            meter,
            output,
            choices,
            cancel,
            ..
        } = self;
        let spec = model.spec();
        let mut on = TextRows {
            batch,
            cache: &mut sequences.cache,
        };
        meter.begin_pass(batch);
        let mut place = backends.embed(spec, on.lend())?;
        let mut layers = layers(spec).peekable();
        if let Some(first) = layers.peek() {
            experts.read_known(spec, *first, on.lend(), place, backends)?;
        }
        while let Some(layer) = layers.next() {
            let start = Instant::now();
            backends.begin_layer();
            let mut next_place = place;
            for rows in batch.micro_batches(backends.buffers.micro_batch) {
                if cancel.is_requested() {
                    return Err(RunError::Canceled);
                }
                let start = Instant::now();
                next_place = backends.dense_stage(spec, layer, rows.clone(), place, on.lend())?;
                meter.pace_dense(start, layer.index, batch, &rows);
            }
            place = next_place;
            let clock = meter.finish_dense(start, layer, batch);
            let Some(moe) = layer.moe else {
                if let Some(next) = layers.peek() {
                    experts.read_known(spec, *next, on.lend(), place, backends)?;
                }
                continue;
            };
            if batch.phase == Phase::Decode {
                meter.count_prediction(moe.index, experts.score(moe, backends));
            }
            if let Some(next) = layers.peek() {
                experts.prefetch(spec, *next, on.lend(), place, backends)?;
            }
            if cancel.is_requested() {
                return Err(RunError::Canceled);
            }
            let step = experts.run(moe, batch, backends, &mut meter.computed)?;
            // Buffers that the step gave back at its end.
            if layers.peek().is_some_and(|next| next.chooses_by_token()) {
                experts.store.start_predicted();
            }
            backends.add_experts(spec, layer, place, on.lend())?;
            output.record(moe, choices, batch, &backends.buffers);
            meter.finish_experts(clock, moe.index, batch, &step);
        }
        let start = Instant::now();
        backends.head(spec, place, on.lend(), &mut output.logits)?;
        for span in &batch.spans {
            sequences.advance(span.sequence, &batch.tokens[span.rows.clone()]);
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

    /// Whether the plan has experts streamed to a GPU for decoded tokens, and the driver has locked no
    /// memory for that. The CPU computes these experts then.
    pub fn lacks_locked_memory(&self) -> bool {
        self.plan.streaming.is_some() && !self.experts.store.can_stream_any()
    }

    /// Returns the GPUs that experts of main memory would be streamed to for prompts, had they room
    /// for that. The CPU computes these experts, which predictions of prompts do not suppose.
    pub fn gpus_without_room_to_stream(&self) -> &[crate::FullGpu] {
        self.experts.streams.full()
    }

    /// Returns how many experts of main memory were streamed to a GPU for decoded tokens.
    pub fn experts_streamed_for_tokens(&self) -> u64 {
        self.experts.store.n_streamed_for_tokens()
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

    /// Returns how many bytes of weights were read since loading, and by which node's threads; zeros
    /// where nodes don't matter.
    pub fn node_reads(&self) -> NodeReads {
        self.backends.pool.node_reads()
    }

    /// Returns the number of compute threads.
    pub fn n_threads(&self) -> usize {
        self.backends.pool.n_threads()
    }

    /// Returns the kernels in use.
    pub fn kernels(&self) -> Kernels {
        self.backends.kernels
    }

    /// Returns how many tokens of a step go through a layer together.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Returns the experts that the routers chose for the tokens of the last
    /// [`step`](Self::step), in the order of its rows.
    pub fn routing(&self) -> &Routing {
        &self.output.routing
    }
}

fn n_tokens(rows: &[Rows<'_>]) -> usize {
    rows.iter().map(|rows| rows.tokens.len()).sum()
}

/// Returns the error of a step whose wanted row of this number has logits that are not numbers.
fn not_a_number(rows: &[Rows<'_>], before: &[usize], wanted: usize) -> RunError {
    let positions = rows.iter().zip(before).flat_map(|(rows, past)| {
        let n = rows.tokens.len();
        let wanted = match rows.logits {
            Some(LogitsMode::All) => 0..n,
            Some(LogitsMode::Last) => n.saturating_sub(1)..n,
            None => n..n,
        };
        wanted.map(move |token| past + token)
    });
    let position = positions.into_iter().nth(wanted).unwrap_or(0);
    RunError::NotANumber { position }
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
