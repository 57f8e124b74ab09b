//! The routed experts of a batch where a GPU takes part: each computes once, for all tokens that chose
//! it, in ascending order. Without a GPU, see `cpu`.
//!
//! The CPU computes several of its experts together where they have few tokens and nothing waits for the
//! GPU in between, so that its threads meet a few times per group. Results are added up in the same order
//! either way.

use super::MoeRun;
use super::experts::{self, ExpertTokens};
use super::ffn::result_weight;
use super::gpu::{Flush, GpuBatch, StoreStep};
use super::offload::StreamedExperts;
use super::routing::{Batch, TokensByExpert};
use crate::error::RunError;
use crate::experts::store::Step;
use tier_plan_formats::placement::TierIdx;

/// Computes a batch's experts into `run.out`, `[tokens, hidden]`.
pub(super) fn run(run: &mut MoeRun<'_>) -> Result<Step, RunError> {
    let (tokens, step) = run.begin();
    run.out.fill(0.0);
    let (gpu, streamed) = (
        GpuBatch::new(run.store.n_gpus()),
        StreamedExperts::default(),
    );
    let mut batch = BatchRun {
        run,
        step,
        tokens: &tokens,
        gpu,
        streamed,
    };
    batch.compute()?;
    Ok(batch.step)
}

/// A batch whose experts are shared out among the CPU and GPUs.
struct BatchRun<'r, 'a> {
    run: &'r mut MoeRun<'a>,
    step: Step,
    tokens: &'r TokensByExpert,
    /// Experts that lie on GPUs.
    gpu: GpuBatch,
    /// Experts of main memory that are streamed to a GPU.
    streamed: StreamedExperts,
}

impl BatchRun<'_, '_> {
    fn compute(&mut self) -> Result<(), RunError> {
        // GPUs work while the CPU computes the rest.
        let rest = self.start_gpu()?;
        let rest = self.start_streamed(rest)?;
        let mut rest = &rest[..];
        while let Some(&at) = rest.first() {
            if self.run.store.cancel.is_requested() {
                self.run.store.give_up(&mut self.step);
                return Err(RunError::Canceled);
            }
            self.send_streamed(Flush::Some)?;
            while !self.step.is_ready(at) {
                self.run.store.wait(&mut self.step)?;
            }
            let mut n = 1;
            match self.run.store.gpu_slot(&self.step, at) {
                Some(spot) => {
                    self.add_to_gpu(at, spot.gpu, spot.tier);
                    self.ask_gpu()?;
                }
                None => {
                    n = self.n_together(rest);
                    self.cpu(&rest[..n])?;
                }
            }
            rest = &rest[n..];
        }
        self.send_streamed(Flush::All)?;
        while self.gpu.is_busy() {
            self.fetch_gpu(Flush::All)?;
            self.ask_gpu()?;
        }
        let run = &mut *self.run;
        let mut on = StoreStep {
            store: &mut *run.store,
            step: &mut self.step,
        };
        self.streamed
            .finish(run.streams, &mut on, run.cpu.kernels, run.out)?;
        run.store.finish(&mut self.step)?;
        Ok(run.store.check_gpus()?)
    }

    /// Has GPUs compute the experts that they had when the step began. Returns the positions of the
    /// others.
    fn start_gpu(&mut self) -> Result<Vec<usize>, RunError> {
        let mut others = Vec::new();
        for at in 0..self.step.experts().len() {
            // When which results are added must not depend on what happened to be prefetched.
            match self
                .run
                .store
                .gpu_slot(&self.step, at)
                .filter(|_| self.step.was_resident(at))
            {
                Some(spot) => self.add_to_gpu(at, spot.gpu, spot.tier),
                None => others.push(at),
            }
        }
        self.ask_gpu()?;
        Ok(others)
    }

    /// Chooses which of these experts are streamed to a GPU, and sends the rows for them. Returns
    /// the positions of the others.
    fn start_streamed(&mut self, mut positions: Vec<usize>) -> Result<Vec<usize>, RunError> {
        let run = &mut *self.run;
        self.streamed = run.streams.choose(
            run.store,
            &self.step,
            self.tokens,
            run.layer.spec,
            run.x.rows(),
        );
        positions.retain(|at| !self.streamed.has(*at));
        let batch = Batch {
            x: run.x,
            users: self.tokens,
            moe: run.layer.spec,
            hidden: run.layer.spec.expert_width(),
        };
        let mut on = StoreStep {
            store: &mut *run.store,
            step: &mut self.step,
        };
        self.streamed.begin(run.streams, &mut on, batch)?;
        Ok(positions)
    }

    /// Sends streamed experts: as many as there are free buffers for, or all.
    fn send_streamed(&mut self, flush: Flush) -> Result<(), RunError> {
        let run = &mut *self.run;
        let mut on = StoreStep {
            store: &mut *run.store,
            step: &mut self.step,
        };
        self.streamed.send(
            run.streams,
            &mut on,
            run.cpu.pool,
            run.layer.spec,
            flush,
            run.computed,
        )
    }

    /// Gives the expert at position `at` of the step to the GPU of `tier`, where it lies.
    fn add_to_gpu(&mut self, at: usize, gpu: usize, tier: TierIdx) {
        self.run.count(tier);
        self.gpu.add(
            gpu,
            at,
            self.tokens.of(self.step.experts()[at] as usize).len(),
        );
    }

    /// Asks each GPU for as many rows as it has room for.
    fn ask_gpu(&mut self) -> Result<(), RunError> {
        let run = &mut *self.run;
        let batch = Batch {
            x: run.x,
            users: self.tokens,
            moe: run.layer.spec,
            hidden: run.layer.spec.expert_width(),
        };
        let mut on = StoreStep {
            store: &mut *run.store,
            step: &mut self.step,
        };
        self.gpu.ask(&mut on, batch, run.gpu_rows)
    }

    /// Adds what GPUs have computed to the sums: of GPUs with more to do, or of all.
    fn fetch_gpu(&mut self, flush: Flush) -> Result<(), RunError> {
        let run = &mut *self.run;
        let batch = Batch {
            x: run.x,
            users: self.tokens,
            moe: run.layer.spec,
            hidden: run.layer.spec.expert_width(),
        };
        let mut on = StoreStep {
            store: &mut *run.store,
            step: &mut self.step,
        };
        self.gpu.fetch(
            &mut on,
            batch,
            run.gpu_rows,
            run.cpu.kernels,
            flush,
            run.out,
        )
    }

    /// Returns how many of these experts the CPU computes together: the first, and those after it that need
    /// no read, as far as the scratch has rows.
    fn n_together(&self, rest: &[usize]) -> usize {
        // What is added up in between must not depend on what is ready.
        if self.gpu.has_more() || !self.streamed.is_empty() {
            return 1;
        }
        let mut left = self.run.scratch.rows;
        let fits = |at: &usize| {
            let needed = self.tokens.of(self.step.experts()[*at] as usize).len();
            let fits = needed <= left;
            left = left.saturating_sub(needed);
            let on_cpu = self.run.store.gpu_slot(&self.step, *at).is_none();
            // A staging buffer is wanted for the next read as soon as its expert has computed.
            fits && on_cpu && self.step.is_ready(*at) && !self.step.is_staged(*at)
        };
        rest.iter().copied().take_while(fits).count().max(1)
    }

    /// Computes the experts at these positions on the CPU, and adds their weighted results to the sums.
    fn cpu(&mut self, positions: &[usize]) -> Result<(), RunError> {
        let layer = self.run.layer.index.get();
        for at in positions {
            let (_, tier) = self.run.store.view(&self.step, *at);
            let bytes = self.run.store.expert_bytes(layer);
            self.run.computed.add(tier, bytes);
        }
        let by_expert = self.tokens;
        let part = |at: &usize| (*at, by_expert.of(self.step.experts()[*at] as usize));
        let parts: Vec<_> = positions.iter().map(part).collect();
        match parts[..] {
            // Its tokens in turn, if they are more than there are rows for.
            [(at, tokens)] => tokens
                .chunks(self.run.scratch.rows)
                .for_each(|tokens| self.add_parts(&[(at, tokens)])),
            _ => self.add_parts(&parts),
        }
        for at in positions {
            self.run.store.release(&mut self.step, *at);
        }
        if self.gpu.has_more() {
            self.fetch_gpu(Flush::Some)?;
            self.ask_gpu()?;
        }
        Ok(())
    }

    /// Computes experts by position for some of their tokens, all together, and adds up their weighted
    /// results in this order.
    fn add_parts(&mut self, parts: &[(usize, &[(usize, f32)])]) {
        let MoeRun {
            cpu,
            store,
            layer,
            x,
            scratch,
            out,
            ..
        } = &mut *self.run;
        let hidden = layer.spec.expert_width();
        let mut first_row = 0;
        let experts: Vec<ExpertTokens<'_>> = parts
            .iter()
            .map(|(at, tokens)| {
                let expert = ExpertTokens {
                    view: store.view(&self.step, *at).0,
                    tokens,
                    first_row,
                };
                first_row += tokens.len();
                expert
            })
            .collect();
        experts::compute(*cpu, layer.spec, *x, &experts, scratch);
        let uses = parts.iter().flat_map(|(_, tokens)| *tokens);
        for (result, (token, weight)) in scratch.results.chunks_exact(hidden).zip(uses) {
            let weight = result_weight(layer.spec, *weight);
            let out = &mut out[token * hidden..(token + 1) * hidden];
            cpu.kernels.axpy(weight, result, out);
        }
    }
}
