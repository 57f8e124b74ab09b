//! Experts on the CPU, each for some tokens of a batch, all of them together.

use super::ffn::{FfnScratch, activate_shared, weigh};
use crate::experts::view::ExpertView;
use crate::layers::cpu_context::CpuContext;
use tier_plan_formats::model::spec::MoeSpec;
use tier_plan_kernels::pooled::{MatJob, matmul_all};
use tier_plan_kernels::{ActView, needs_quants};

/// An expert, and the tokens that it computes.
pub(super) struct ExpertTokens<'a> {
    pub(super) view: ExpertView<'a>,
    /// Tokens, ascending, each with the expert's weight.
    pub(super) tokens: &'a [(usize, f32)],
    /// Row of the results that the first token has.
    pub(super) first_row: usize,
}

/// Writes to `s.results`, `[rows, hidden]`, what experts make of rows of `x`, not weighted yet. Rows of
/// results ascend with the experts.
pub(super) fn compute(
    cpu: CpuContext<'_>,
    moe: &MoeSpec,
    x: ActView<'_>,
    experts: &[ExpertTokens<'_>],
    s: &mut FfnScratch,
) {
    let (width, hidden) = (moe.expert_ffn, moe.expert_width());
    let tokens = || experts.iter().flat_map(|expert| expert.tokens);
    let n: usize = experts.iter().map(|expert| expert.tokens.len()).sum();
    let types = experts
        .iter()
        .flat_map(|e| [e.view.gate.weights.ty(), e.view.up.weights.ty()]);
    let floats = types.into_iter().any(|ty| !needs_quants(ty));
    s.rows_of_x.clear();
    s.rows_of_x.extend(tokens().map(|(token, _)| *token));
    s.gathered.gather_shared(cpu.pool, x, &s.rows_of_x, floats);
    let (acts, mut jobs) = (s.gathered.view(), Vec::with_capacity(2 * experts.len()));
    let (mut gates, mut ups) = (&mut s.gate[..n * width], &mut s.up[..n * width]);
    let mut first = 0;
    for ExpertTokens { view, tokens, .. } in experts {
        let (gate, up);
        (gate, gates) = gates.split_at_mut(tokens.len() * width);
        (up, ups) = ups.split_at_mut(tokens.len() * width);
        let acts = acts.rows_range(first..first + tokens.len());
        if view.is_gated {
            jobs.push(MatJob::new(view.gate.weights, acts, gate));
        }
        jobs.push(MatJob::new(view.up.weights, acts, up));
        first += tokens.len();
    }
    matmul_all(cpu.pool, cpu.kernels, &jobs);
    drop(jobs);
    let (gate, up) = (&mut s.gate[..n * width], &mut s.up[..n * width]);
    if moe.weigh_input {
        weigh(gate, up, width, tokens().map(|(_, weight)| *weight));
    }
    let mut first = 0;
    for ExpertTokens { view, tokens, .. } in experts {
        let rows = first * width..(first + tokens.len()) * width;
        if view.is_gated {
            view.gate.add_bias(&mut gate[rows.clone()], &mut s.bias);
        }
        view.up.add_bias(&mut up[rows], &mut s.bias);
        first += tokens.len();
    }
    activate_shared(cpu, moe.activation, width, gate, up);
    let quantize = experts
        .iter()
        .any(|expert| needs_quants(expert.view.down.weights.ty()));
    s.inner
        .fill_shared(cpu.pool, cpu.kernels, n, width, gate, quantize);
    let inner = s.inner.view();
    let (mut results, mut done) = (&mut s.results[..], 0);
    let (mut jobs, mut first) = (Vec::with_capacity(experts.len()), 0);
    for expert in experts {
        let n = expert.tokens.len();
        let rows;
        (_, results) = results.split_at_mut((expert.first_row - done) * hidden);
        (rows, results) = results.split_at_mut(n * hidden);
        done = expert.first_row + n;
        let inner = inner.rows_range(first..first + n);
        jobs.push(MatJob::new(expert.view.down.weights, inner, rows));
        first += n;
    }
    matmul_all(cpu.pool, cpu.kernels, &jobs);
    drop(jobs);
    for ExpertTokens {
        view,
        tokens,
        first_row,
    } in experts
    {
        let rows = first_row * hidden..(first_row + tokens.len()) * hidden;
        view.down.add_bias(&mut s.results[rows], &mut s.bias);
    }
}
