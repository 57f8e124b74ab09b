//! The routed experts of a few tokens, such as one each of several texts: experts that are ready
//! compute together while others are read.
//!
//! Threads meet a few times per layer and not, as for the many tokens of a prompt, a few times per
//! expert.

use super::MoeRun;
use super::ffn::{activate_shared, result_weight, weigh};
use super::routing::TokensByExpert;
use crate::error::RunError;
use crate::experts::store::Step;
use tier_plan_kernels::needs_quants;
use tier_plan_kernels::pooled::{MatJob, matmul_all};

/// Computes the experts of the tokens into `run.out`, `[tokens, hidden]`. Tokens and choices must
/// fit the scratch.
pub(super) fn run(run: &mut MoeRun<'_>) -> Result<Step, RunError> {
    let (tokens, step) = run.begin();
    let mut few = FewRun {
        run,
        step,
        tokens: &tokens,
    };
    few.compute()?;
    let step = few.step;
    sum(run, &tokens, step.experts());
    Ok(step)
}

/// Adds up what the experts made of each token, in ascending order of the experts.
fn sum(run: &mut MoeRun<'_>, tokens: &TokensByExpert, experts: &[u32]) {
    let (hidden, n_used) = (run.layer.spec.expert_width(), run.routing.n_used);
    // `[tokens, n_used]`: rows of the results, with their weights.
    let mut terms = vec![(0, 0.0); run.routing.experts.len()];
    let mut n_terms = vec![0; run.routing.experts.len() / n_used.max(1)];
    for expert in experts {
        let first = tokens.first_of(*expert as usize);
        for (i, (token, weight)) in tokens.of(*expert as usize).iter().enumerate() {
            let weight = result_weight(run.layer.spec, *weight);
            terms[token * n_used + n_terms[*token]] = (first + i, weight);
            n_terms[*token] += 1;
        }
    }
    let (kernels, results) = (run.cpu.kernels, &run.scratch.results);
    run.cpu.pool.for_each_slice(run.out, hidden, |token, out| {
        out.fill(0.0);
        for (row, weight) in &terms[token * n_used..][..n_used] {
            kernels.axpy(*weight, &results[row * hidden..][..hidden], out);
        }
    });
}

struct FewRun<'r, 'a> {
    run: &'r mut MoeRun<'a>,
    step: Step,
    tokens: &'r TokensByExpert,
}

impl FewRun<'_, '_> {
    /// Computes every expert into its rows of `scratch.results`, `[choices, hidden]`.
    fn compute(&mut self) -> Result<(), RunError> {
        let n = self.step.experts().len();
        let mut ready: Vec<usize> = (0..n).filter(|at| self.step.is_ready(*at)).collect();
        let mut left = n;
        loop {
            if !ready.is_empty() {
                self.on_cpu(&ready);
                for at in &ready {
                    self.run.store.release(&mut self.step, *at);
                }
                left -= ready.len();
            }
            if left == 0 {
                break;
            }
            if self.run.store.cancel.is_requested() {
                self.run.store.give_up(&mut self.step);
                return Err(RunError::Canceled);
            }
            ready.clear();
            ready.push(self.run.store.wait(&mut self.step)?);
        }
        Ok(self.run.store.finish(&mut self.step)?)
    }

    /// Computes the experts at positions `ready` of the step, ascending, all together.
    fn on_cpu(&mut self, ready: &[usize]) {
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
        let users = |at: usize| self.tokens.of(experts[at] as usize);
        let views: Vec<_> = ready
            .iter()
            .map(|at| (*at, users(*at).len(), store.view(&self.step, *at)))
            .collect();
        for (_, _, (_, tier)) in &views {
            computed.add(*tier, store.expert_bytes(layer.index.get()));
        }
        let is_float = |ty| !needs_quants(ty);
        let floats = views.iter().any(|(_, _, (view, _))| {
            is_float(view.gate.weights.ty()) || is_float(view.up.weights.ty())
        });
        let tokens = ready.iter().flat_map(|at| users(*at));
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
            let tokens = ready.iter().flat_map(|at| users(*at));
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
        for (at, n, (view, _)) in &views {
            let row = self.tokens.first_of(experts[*at] as usize);
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
        for (at, n, (view, _)) in &views {
            let row = self.tokens.first_of(experts[*at] as usize);
            let rows = row * hidden..(row + n) * hidden;
            view.down.add_bias(&mut s.results[rows], &mut s.bias);
        }
    }
}
