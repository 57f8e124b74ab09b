//! A batch's experts on GPUs: each GPU computes as many rows at a time as its buffers hold, while
//! the CPU computes its own experts.

use super::ffn::result_weight;
use super::routing::Batch;
use crate::error::RunError;
use crate::experts::store::{ExpertStore, Step};
use crate::gpu::rows::GpuRows;
use std::collections::VecDeque;
use std::ops::Range;
use tier_plan_kernels::Kernels;

/// A step of the expert store that is under way.
pub(crate) struct StoreStep<'a> {
    pub(crate) store: &'a mut ExpertStore,
    pub(crate) step: &'a mut Step,
}

/// How much of the pending work to take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Flush {
    /// What can be had without delaying the CPU's own experts.
    Some,
    /// Everything, waiting for it.
    All,
}

/// An expert of the step, and which of its tokens are meant.
#[derive(Debug, Clone)]
struct ExpertTokens {
    /// Position in the step.
    position: usize,
    /// Range in the tokens that chose the expert.
    tokens: Range<usize>,
}

/// The experts of a batch's step that are on GPUs.
pub(crate) struct GpuBatch {
    /// By GPU: what is still to be asked for.
    waiting: Vec<VecDeque<ExpertTokens>>,
    /// By GPU: what was asked for, in that order.
    asked: Vec<Vec<ExpertTokens>>,
}

impl GpuBatch {
    pub(crate) fn new(n_gpus: usize) -> Self {
        Self {
            waiting: vec![VecDeque::new(); n_gpus],
            asked: vec![Vec::new(); n_gpus],
        }
    }

    /// Adds the expert at `position` of the step, which is on a GPU now.
    pub(crate) fn add(&mut self, gpu: usize, position: usize, n_tokens: usize) {
        self.waiting[gpu].push_back(ExpertTokens {
            position,
            tokens: 0..n_tokens,
        });
    }

    /// Asks each GPU for as many rows as its buffers hold.
    ///
    /// # Errors
    /// When a GPU fails.
    pub(crate) fn ask(
        &mut self,
        on: &mut StoreStep<'_>,
        batch: Batch<'_>,
        rows: &mut GpuRows,
    ) -> Result<(), RunError> {
        for gpu in 0..self.waiting.len() {
            let mut free_rows = on.store.gpu_capacity(gpu);
            let (mut positions, mut done) = (Vec::new(), Vec::new());
            rows.sent.clear();
            rows.weights.clear();
            while free_rows > 0
                && let Some(ExpertTokens { position, tokens }) = self.waiting[gpu].front_mut()
            {
                let position = *position;
                let now = tokens.start..tokens.end.min(tokens.start + free_rows);
                for (token, weight) in
                    &batch.users.of(on.step.experts()[position] as usize)[now.clone()]
                {
                    rows.sent.extend_from_slice(
                        &batch.x.values()[token * batch.hidden..][..batch.hidden],
                    );
                    rows.weights.push(*weight);
                }
                positions.extend(std::iter::repeat_n(position, now.len()));
                free_rows -= now.len();
                tokens.start = now.end;
                let finished = tokens.start >= tokens.end;
                self.asked[gpu].push(ExpertTokens {
                    position,
                    tokens: now,
                });
                if finished {
                    done.push(position);
                    self.waiting[gpu].pop_front();
                }
            }
            if !positions.is_empty() {
                on.store.ask_rows(on.step, gpu, &positions, rows)?;
            }
            // The GPU executes in order, so the experts' slots may be refilled.
            done.into_iter()
                .for_each(|position| on.store.release(on.step, position));
        }
        Ok(())
    }

    /// Waits for results and adds them to `out`, `[tokens, hidden]`: those of all GPUs, or of the
    /// GPUs that have more to do.
    ///
    /// # Errors
    /// When a GPU fails.
    pub(crate) fn fetch(
        &mut self,
        on: &mut StoreStep<'_>,
        batch: Batch<'_>,
        rows: &mut GpuRows,
        kernels: Kernels,
        flush: Flush,
        out: &mut [f32],
    ) -> Result<(), RunError> {
        for gpu in 0..self.asked.len() {
            if self.asked[gpu].is_empty() || flush == Flush::Some && self.waiting[gpu].is_empty() {
                continue;
            }
            on.store
                .fetch_gpu(on.step, gpu, batch.hidden, &mut rows.fetched)?;
            let mut results = rows.fetched.chunks_exact(batch.hidden);
            for ExpertTokens { position, tokens } in self.asked[gpu].drain(..) {
                // The tokens come first: the shorter side of a zip must not take a result of the
                // next expert.
                let tokens = &batch.users.of(on.step.experts()[position] as usize)[tokens];
                for ((token, weight), result) in tokens.iter().zip(&mut results) {
                    kernels.axpy(
                        result_weight(batch.moe, *weight),
                        result,
                        &mut out[token * batch.hidden..][..batch.hidden],
                    );
                }
            }
        }
        Ok(())
    }

    /// Whether anything is still to be asked for or fetched.
    pub(crate) fn is_busy(&self) -> bool {
        self.waiting.iter().any(|w| !w.is_empty()) || self.asked.iter().any(|a| !a.is_empty())
    }

    /// Whether a GPU has more to do than its buffers held.
    pub(crate) fn has_more(&self) -> bool {
        self.waiting.iter().any(|w| !w.is_empty())
    }
}
