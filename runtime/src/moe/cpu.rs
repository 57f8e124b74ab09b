//! The routed experts of several tokens where no GPU takes part: as many experts compute together as
//! the scratch has rows for.
//!
//! So threads meet a few times per group of experts, and in a small batch a few times per layer.
//! What experts made of a token is added up in ascending order of the experts, whatever the groups.

use super::MoeRun;
use super::experts::{self, ExpertTokens};
use super::ffn::{FfnScratch, Sums, Term, result_weight};
use super::routing::TokensByExpert;
use crate::error::RunError;
use crate::experts::store::Step;
use std::ops::Range;

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
        let (spec, experts, by_expert) = (self.run.layer.spec, self.step.experts(), self.tokens);
        let hidden = spec.expert_width();
        let expert = |part: &Part| experts[part.at] as usize;
        let users = |part: &Part| &by_expert.of(expert(part))[part.tokens.clone()];
        let FfnScratch { sums, results, .. } = &mut *self.run.scratch;
        let Sums {
            starts,
            next,
            terms,
        } = sums;
        starts.clear();
        starts.resize(self.run.out.len() / hidden + 1, 0);
        for (token, _) in parts.iter().flat_map(users) {
            starts[token + 1] += 1;
        }
        for token in 1..starts.len() {
            starts[token] += starts[token - 1];
        }
        next.clone_from(starts);
        terms.clear();
        terms.resize(starts.last().copied().unwrap_or(0), Term::default());
        for part in parts {
            let first = by_expert.first_of(expert(part)) + part.tokens.start - base;
            for (i, (token, weight)) in users(part).iter().enumerate() {
                terms[next[*token]] = Term {
                    row: first + i,
                    weight: result_weight(spec, *weight),
                };
                next[*token] += 1;
            }
        }
        let kernels = self.run.cpu.kernels;
        let add = |token: usize, out: &mut [f32]| {
            for Term { row, weight } in &terms[starts[token]..starts[token + 1]] {
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
            scratch,
            computed,
            ..
        } = &mut *self.run;
        let mut experts = Vec::with_capacity(parts.len());
        for part in parts {
            let expert = self.step.experts()[part.at] as usize;
            let (view, tier) = store.view(&self.step, part.at);
            // An expert that computes in parts counts once.
            if part.tokens.start == 0 {
                computed.add(tier, store.expert_bytes(layer.index.get()));
            }
            experts.push(ExpertTokens {
                view,
                tokens: &self.tokens.of(expert)[part.tokens.clone()],
                first_row: self.tokens.first_of(expert) + part.tokens.start - base,
            });
        }
        experts::compute(*cpu, layer.spec, *x, &experts, scratch);
    }
}
