//! The routed experts of several tokens where no GPU takes part: as many experts compute together as
//! the scratch has rows for.
//!
//! So threads meet a few times per group of experts, and in a small batch a few times per layer.
//! What experts made of a token is added up in ascending order of the experts, whatever the groups.

use super::MoeRun;
use super::ffn::{activate_shared, result_weight, weigh};
use super::routing::TokensByExpert;
use crate::error::RunError;
use crate::experts::store::Step;
use std::ops::Range;
use tier_plan_kernels::needs_quants;
use tier_plan_kernels::pooled::{MatJob, matmul_all};

/// Computes the experts of the tokens into `run.out`, `[tokens, hidden]`.
pub(super) fn run(run: &mut MoeRun<'_>) -> Result<Step, RunError> {
    let (tokens, step) = run.begin();
    run.out.fill(0.0);
    let is_small = run.routing.experts.len() <= run.scratch.rows;
    let mut cpu = CpuRun {
        run,
        step,
        tokens: &tokens,
    };
    if is_small {
        cpu.as_they_come()?;
    } else {
        cpu.in_order()?;
    }
    Ok(cpu.step)
}

/// Some tokens of the expert at a position of the step.
struct Part {
    at: usize,
    /// Of the tokens that chose the expert.
    tokens: Range<usize>,
}

struct CpuRun<'r, 'a> {
    run: &'r mut MoeRun<'a>,
    step: Step,
    tokens: &'r TokensByExpert,
}

impl CpuRun<'_, '_> {
    /// Computes a small batch: experts that are ready compute while others are read. All results fit
    /// the scratch and are added up at the end.
    fn as_they_come(&mut self) -> Result<(), RunError> {
        let n = self.step.experts().len();
        let mut ready: Vec<usize> = (0..n).filter(|at| self.step.is_ready(*at)).collect();
        let mut left = n;
        loop {
            if !ready.is_empty() {
                let parts: Vec<Part> = ready.iter().map(|at| self.whole(*at)).collect();
                self.compute(&parts, 0);
                for at in &ready {
                    self.run.store.release(&mut self.step, *at);
                }
                left -= ready.len();
            }
            if left == 0 {
                break;
            }
            self.check_canceled()?;
            ready.clear();
            ready.push(self.run.store.wait(&mut self.step)?);
        }
        let all: Vec<Part> = (0..n).map(|at| self.whole(at)).collect();
        self.sum(&all, 0);
        Ok(self.run.store.finish(&mut self.step)?)
    }

    /// Computes a large batch in ascending order of the experts. A group is what is ready, as far as
    /// the scratch has rows.
    fn in_order(&mut self) -> Result<(), RunError> {
        let (n, rows) = (self.step.experts().len(), self.run.scratch.rows);
        let mut at = 0;
        while at < n {
            self.check_canceled()?;
            while !self.step.is_ready(at) {
                self.run.store.wait(&mut self.step)?;
            }
            let first = at;
            let mut group = vec![self.whole(at)];
            let mut n_rows = group[0].tokens.len();
            at += 1;
            while at < n && self.step.is_ready(at) {
                let next = self.whole(at);
                n_rows += next.tokens.len();
                if n_rows > rows {
                    break;
                }
                group.push(next);
                at += 1;
            }
            let base = self.tokens.first_of(self.expert(first));
            if group[0].tokens.len() > rows {
                // Alone, and its tokens in turn.
                for start in group[0].tokens.clone().step_by(rows) {
                    let end = (start + rows).min(group[0].tokens.end);
                    let tokens = start..end;
                    let part = [Part { at: first, tokens }];
                    self.compute(&part, base + start);
                    self.sum(&part, base + start);
                }
            } else {
                self.compute(&group, base);
                self.sum(&group, base);
            }
            for part in group {
                self.run.store.release(&mut self.step, part.at);
            }
        }
        Ok(self.run.store.finish(&mut self.step)?)
    }

    fn check_canceled(&mut self) -> Result<(), RunError> {
        if self.run.store.cancel.is_requested() {
            self.run.store.give_up(&mut self.step);
            return Err(RunError::Canceled);
        }
        Ok(())
    }

    /// Returns the expert at a position of the step.
    fn expert(&self, at: usize) -> usize {
        self.step.experts()[at] as usize
    }

    /// Returns all tokens of an expert.
    fn whole(&self, at: usize) -> Part {
        let tokens = 0..self.tokens.of(self.expert(at)).len();
        Part { at, tokens }
    }

    /// Adds up what the parts' experts, ascending, made of each token. Results begin with the choice
    /// `base`.
    fn sum(&mut self, parts: &[Part], base: usize) {
        let hidden = self.run.layer.spec.expert_width();
        let users = |part: &Part| &self.tokens.of(self.expert(part.at))[part.tokens.clone()];
        // Of each token the rows of its results, with their weights: those of token `t` are
        // `terms[starts[t]..starts[t + 1]]`.
        let mut starts = vec![0; self.run.out.len() / hidden + 1];
        for (token, _) in parts.iter().flat_map(users) {
            starts[token + 1] += 1;
        }
        for token in 1..starts.len() {
            starts[token] += starts[token - 1];
        }
        let mut next = starts.clone();
        let mut terms = vec![(0, 0.0); starts.last().copied().unwrap_or(0)];
        for part in parts {
            let first = self.tokens.first_of(self.expert(part.at)) + part.tokens.start - base;
            for (i, (token, weight)) in users(part).iter().enumerate() {
                let weight = result_weight(self.run.layer.spec, *weight);
                terms[next[*token]] = (first + i, weight);
                next[*token] += 1;
            }
        }
        let (kernels, results) = (self.run.cpu.kernels, &self.run.scratch.results);
        let add = |token: usize, out: &mut [f32]| {
            for (row, weight) in &terms[starts[token]..starts[token + 1]] {
                kernels.axpy(*weight, &results[row * hidden..][..hidden], out);
            }
        };
        self.run.cpu.pool.for_each_slice(self.run.out, hidden, add);
    }

    /// Computes parts, ascending, all together into `scratch.results`, `[choices, hidden]`, which
    /// begins with the choice `base`.
    fn compute(&mut self, parts: &[Part], base: usize) {
        let MoeRun {
            cpu,
            store,
            layer,
            x,
            scratch: s,
            computed,
            ..
        } = &mut *self.run;
        let (cpu, x) = (*cpu, *x);
        let (width, hidden) = (layer.spec.expert_ffn, layer.spec.expert_width());
        let experts = self.step.experts();
        let users = |part: &Part| &self.tokens.of(experts[part.at] as usize)[part.tokens.clone()];
        let first_row = |part: &Part| {
            self.tokens.first_of(experts[part.at] as usize) + part.tokens.start - base
        };
        let views: Vec<_> = parts
            .iter()
            .map(|part| (part, part.tokens.len(), store.view(&self.step, part.at)))
            .collect();
        for (part, _, (_, tier)) in &views {
            // An expert that computes in parts counts once.
            if part.tokens.start == 0 {
                computed.add(*tier, store.expert_bytes(layer.index.get()));
            }
        }
        let is_float = |ty| !needs_quants(ty);
        let floats = views.iter().any(|(_, _, (view, _))| {
            is_float(view.gate.weights.ty()) || is_float(view.up.weights.ty())
        });
        let tokens = parts.iter().flat_map(users);
        s.gathered
            .gather(x, tokens.map(|(token, _)| *token), floats);
        let n: usize = views.iter().map(|(_, n, _)| n).sum();
        let (acts, mut jobs) = (s.gathered.view(), Vec::with_capacity(2 * views.len()));
        let (mut gates, mut ups) = (&mut s.gate[..n * width], &mut s.up[..n * width]);
        let mut first = 0;
        for (_, n, (view, _)) in &views {
            let (gate, up);
            (gate, gates) = gates.split_at_mut(n * width);
            (up, ups) = ups.split_at_mut(n * width);
            let acts = acts.rows_range(first..first + n);
            if view.is_gated {
                jobs.push(MatJob::new(view.gate.weights, acts, gate));
            }
            jobs.push(MatJob::new(view.up.weights, acts, up));
            first += n;
        }
        matmul_all(cpu.pool, cpu.kernels, &jobs);
        drop(jobs);
        let (gate, up) = (&mut s.gate[..n * width], &mut s.up[..n * width]);
        if layer.spec.weigh_input {
            let tokens = parts.iter().flat_map(users);
            weigh(gate, up, width, tokens.map(|(_, weight)| *weight));
        }
        let mut first = 0;
        for (_, n, (view, _)) in &views {
            let rows = first * width..(first + n) * width;
            if view.is_gated {
                view.gate.add_bias(&mut gate[rows.clone()], &mut s.bias);
            }
            view.up.add_bias(&mut up[rows], &mut s.bias);
            first += n;
        }
        activate_shared(cpu, layer.spec.activation, width, gate, up);
        let quantize = views
            .iter()
            .any(|(_, _, (view, _))| needs_quants(view.down.weights.ty()));
        s.inner
            .fill_shared(cpu.pool, cpu.kernels, n, width, gate, quantize);
        let inner = s.inner.view();
        let (mut results, mut done) = (&mut s.results[..], 0);
        let (mut jobs, mut first) = (Vec::with_capacity(views.len()), 0);
        for (part, n, (view, _)) in &views {
            let row = first_row(part);
            let rows;
            (_, results) = results.split_at_mut((row - done) * hidden);
            (rows, results) = results.split_at_mut(n * hidden);
            done = row + n;
            let inner = inner.rows_range(first..first + n);
            jobs.push(MatJob::new(view.down.weights, inner, rows));
            first += n;
        }
        matmul_all(cpu.pool, cpu.kernels, &jobs);
        drop(jobs);
        for (part, n, (view, _)) in &views {
            let row = first_row(part);
            let rows = row * hidden..(row + n) * hidden;
            view.down.add_bias(&mut s.results[rows], &mut s.bias);
        }
    }
}
