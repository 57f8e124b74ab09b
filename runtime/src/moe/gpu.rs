//! What a batch asks of GPUs: each as many rows at a time as it has room for, while the processor computes its own experts.

use super::routing::Batch;
use crate::error::RunError;
use crate::experts::store::{ExpertStore, Step};
use crate::gpu::rows::GpuRows;
use std::collections::VecDeque;
use std::ops::Range;
use tier_plan_kernels::Kernels;

/// What a batch's step has for GPUs.
pub(crate) struct GpuBatch {
    /// By GPU: positions in the step, and which of their users are still to be asked for.
    waiting: Vec<VecDeque<(usize, Range<usize>)>>,
    /// By GPU: what it was asked for, in that order.
    asked: Vec<Vec<(usize, Range<usize>)>>,
}

impl GpuBatch {
    pub(crate) fn new(n_gpus: usize) -> Self {
        Self { waiting: vec![VecDeque::new(); n_gpus], asked: vec![Vec::new(); n_gpus] }
    }

    /// An expert of the step that is on a GPU now.
    pub(crate) fn add(&mut self, gpu: usize, at: usize, n_users: usize) {
        self.waiting[gpu].push_back((at, 0..n_users));
    }

    /// Asks each GPU for as much as it has room for.
    ///
    /// # Errors
    /// When one fails.
    pub(crate) fn ask(
        &mut self,
        store: &mut ExpertStore,
        step: &mut Step,
        batch: Batch<'_>,
        rows: &mut GpuRows,
    ) -> Result<(), RunError> {
        for gpu in 0..self.waiting.len() {
            let mut room = store.gpu_capacity(gpu);
            let (mut positions, mut done) = (Vec::new(), Vec::new());
            rows.sent.clear();
            while room > 0
                && let Some((at, users)) = self.waiting[gpu].front_mut()
            {
                let now = users.start..users.end.min(users.start + room);
                for (token, _) in &batch.users.of(step.experts()[*at] as usize)[now.clone()] {
                    rows.sent.extend_from_slice(&batch.x.values()[token * batch.hidden..][..batch.hidden]);
                }
                positions.extend(std::iter::repeat_n(*at, now.len()));
                room -= now.len();
                users.start = now.end;
                if users.start >= users.end {
                    done.push(*at);
                }
                self.asked[gpu].push((*at, now));
                if users.start >= users.end {
                    self.waiting[gpu].pop_front();
                }
            }
            if !positions.is_empty() {
                store.ask_rows(step, gpu, &positions, &rows.sent)?;
            }
            // What comes after it to its slot comes after it on the GPU.
            done.into_iter().for_each(|at| store.release(step, at));
        }
        Ok(())
    }

    /// Waits for what GPUs were asked for and adds it to `out`, where some of them have more to do, or `all` of them.
    ///
    /// # Errors
    /// When one fails.
    pub(crate) fn fetch(
        &mut self,
        store: &mut ExpertStore,
        step: &mut Step,
        batch: Batch<'_>,
        rows: &mut GpuRows,
        kernels: Kernels,
        all: bool,
        out: &mut [f32],
    ) -> Result<(), RunError> {
        for gpu in 0..self.asked.len() {
            if self.asked[gpu].is_empty() || !all && self.waiting[gpu].is_empty() {
                continue;
            }
            store.fetch_gpu(step, gpu, batch.hidden, &mut rows.fetched)?;
            let mut results = rows.fetched.chunks_exact(batch.hidden);
            for (at, range) in self.asked[gpu].drain(..) {
                // The users come first: the shorter side of a pair must not swallow a result of the next expert.
                let users = &batch.users.of(step.experts()[at] as usize)[range];
                for ((token, weight), result) in users.iter().zip(&mut results) {
                    kernels.axpy(*weight, result, &mut out[token * batch.hidden..][..batch.hidden]);
                }
            }
        }
        Ok(())
    }

    /// Whether anything is left to be asked for or fetched.
    pub(crate) fn is_busy(&self) -> bool {
        self.waiting.iter().any(|w| !w.is_empty()) || self.asked.iter().any(|a| !a.is_empty())
    }

    /// Whether a GPU has more to do than it had room for.
    pub(crate) fn has_more(&self) -> bool {
        self.waiting.iter().any(|w| !w.is_empty())
    }
}
