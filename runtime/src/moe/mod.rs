//! The feed-forward blocks: dense ones, and routed experts for one token or for a batch.

pub(crate) mod gpu;
pub(crate) mod offload;
pub(crate) mod routing;

use crate::error::RunError;
use crate::experts::store::{ExpertStore, Step};
use crate::experts::view::ExpertView;
use crate::gpu::rows::GpuRows;
use crate::layers::compute::{Compute, add_bias};
use crate::layers::weights::DenseWeights;
use crate::tiers::pace::StageBytes;
use gpu::{Flush, GpuBatch, StoreStep};
use offload::Streams;
use routing::Batch;
use routing::{Choices, Users};
use tier_plan_formats::model::spec::{Activation, GatedFfn, MoeSpec, SharedSpec};
use tier_plan_kernels::pooled::{MatJob, matmul_all};
use tier_plan_kernels::{ActView, Activations, Kernels, needs_quants};

/// Buffers of the feed-forward blocks.
pub(crate) struct FfnScratch {
    gate: Vec<f32>,
    up: Vec<f32>,
    inner: Activations,
    gathered: Activations,
    /// One bias, decoded.
    bias: Vec<f32>,
    /// `[rows, hidden]` results of experts before they are weighted and summed.
    results: Vec<f32>,
    /// Rows that a block takes at once.
    rows: usize,
    /// Rows for GPUs.
    pub(crate) gpu: GpuRows,
    /// GPUs that experts of main memory pass through.
    pub(crate) streams: Streams,
}

impl FfnScratch {
    /// For blocks that take up to `rows` tokens at once, of a network whose blocks are at most `ffn` wide.
    pub(crate) fn new(rows: usize, hidden: usize, ffn: usize, n_used: usize) -> Self {
        let rows = rows.max(n_used);
        Self {
            rows,
            gate: vec![0.0; rows * ffn],
            up: vec![0.0; rows * ffn],
            inner: Activations::new(rows, ffn),
            gathered: Activations::new(rows, hidden),
            bias: Vec::with_capacity(ffn.max(hidden)),
            results: vec![0.0; rows * hidden],
            gpu: GpuRows::default(),
            streams: Streams::default(),
        }
    }
}

/// `out = down(silu(gate x) · up x)`, all rows of `x`.
pub(crate) fn dense_ffn(
    c: Compute<'_>,
    weights: &DenseWeights,
    ffn: &GatedFfn,
    x: ActView<'_>,
    s: &mut FfnScratch,
    out: &mut [f32],
) {
    let rows = x.rows();
    let width = ffn.gate.n_out;
    let (gate, up) = (&mut s.gate[..rows * width], &mut s.up[..rows * width]);
    let jobs = [MatJob::new(weights.linear(&ffn.gate), x, gate), MatJob::new(weights.linear(&ffn.up), x, up)];
    matmul_all(c.pool, c.kernels, &jobs);
    add_bias(gate, weights.bias(&ffn.gate));
    add_bias(up, weights.bias(&ffn.up));
    activate_shared(c, Activation::Silu, width, gate, up);
    s.inner.fill_shared(c.pool, c.kernels, rows, width, gate, needs_quants(weights.ty(ffn.down.weight)));
    matmul_all(c.pool, c.kernels, &[MatJob::new(weights.linear(&ffn.down), s.inner.view(), out)]);
    add_bias(out, weights.bias(&ffn.down));
}

/// The shared expert of a layer, all rows of `x`; `values` are the same rows as plain floats, `[rows, hidden]`.
pub(crate) fn shared_expert(
    c: Compute<'_>,
    weights: &DenseWeights,
    shared: &SharedSpec,
    x: ActView<'_>,
    values: &[f32],
    s: &mut FfnScratch,
    out: &mut [f32],
) {
    dense_ffn(c, weights, &shared.ffn, x, s, out);
    if let Some(gate) = weights.opt_vector(shared.gate) {
        let width = gate.len();
        for (x, out) in values.chunks_exact(width).zip(out.chunks_exact_mut(width)) {
            let factor = 1.0 / (1.0 + (-c.kernels.dot(gate, x)).exp());
            out.iter_mut().for_each(|o| *o *= factor);
        }
    }
}

fn activate(kernels: Kernels, activation: Activation, gate: &mut [f32], up: &[f32]) {
    match activation {
        Activation::Silu => kernels.silu_mul(gate, up),
        Activation::ClampedSwiglu { alpha, limit } => kernels.clamped_swiglu(gate, up, alpha, limit),
    }
}

/// [`activate`] for `[rows, width]`, shared out among the threads.
fn activate_shared(c: Compute<'_>, activation: Activation, width: usize, gate: &mut [f32], up: &[f32]) {
    c.pool.for_each_slice(gate, width, |row, gate| activate(c.kernels, activation, gate, &up[row * width..][..width]));
}

/// Routed experts of one token: those at hand compute while the others are read. `out` is `[hidden]`.
pub(crate) fn moe_token(
    c: Compute<'_>,
    store: &mut ExpertStore,
    layer: usize,
    moe: &MoeSpec,
    x: ActView<'_>,
    choices: &Choices<'_>,
    s: &mut FfnScratch,
    out: &mut [f32],
    computed: &mut StageBytes,
) -> Result<Step, RunError> {
    let hidden = out.len();
    let used: Vec<u32> = choices.experts.iter().map(|e| u32::from(*e)).collect();
    store.note(layer, choices.experts);
    let mut step = store.begin(layer, &used, used.clone());
    let (on_gpu, mut ready): (Vec<usize>, Vec<usize>) =
        (0..used.len()).filter(|at| step.is_ready(*at)).partition(|at| store.spot(&step, *at).is_some());
    // The processor computes the others meanwhile.
    ask_for(store, &mut step, &on_gpu, x, computed)?;
    let mut left = used.len() - on_gpu.len();
    loop {
        if !ready.is_empty() {
            experts_of_token(c, store, &step, &ready, moe, x, s, hidden, computed);
            for at in &ready {
                store.release(&mut step, *at);
            }
            left -= ready.len();
        }
        if left == 0 {
            break;
        }
        ready.clear();
        let at = store.wait(&mut step)?;
        if store.spot(&step, at).is_some() {
            ask_for(store, &mut step, &[at], x, computed)?;
            left -= 1;
        } else {
            ready.push(at);
        }
    }
    for gpu in 0..store.n_gpus() {
        let positions = store.fetch_gpu(&mut step, gpu, hidden, &mut s.gpu.fetched)?;
        for (at, result) in positions.iter().zip(s.gpu.fetched.chunks_exact(hidden)) {
            s.results[at * hidden..][..hidden].copy_from_slice(result);
        }
    }
    store.finish(&mut step)?;
    store.check_gpus()?;
    // Summed in the router's order whatever the order of arrival: the plan must not change the result.
    out.fill(0.0);
    for (weight, result) in choices.weights.iter().zip(s.results.chunks_exact(hidden)) {
        c.kernels.axpy(*weight, result, out);
    }
    Ok(step)
}

/// Asks GPUs for experts of a token that are there.
fn ask_for(
    store: &mut ExpertStore,
    step: &mut Step,
    positions: &[usize],
    x: ActView<'_>,
    computed: &mut StageBytes,
) -> Result<(), RunError> {
    if positions.is_empty() {
        return Ok(());
    }
    for spot in positions.iter().filter_map(|at| store.spot(step, *at)) {
        computed.add(spot.tier, store.expert_bytes(step.layer()));
    }
    store.ask_token(step, positions, x.values())?;
    // What comes to their slots now comes after them on the GPU.
    positions.iter().for_each(|at| store.release(step, *at));
    Ok(())
}

/// Computes the experts at positions `ready` of the step into their rows of `results`.
fn experts_of_token(
    c: Compute<'_>,
    store: &ExpertStore,
    step: &Step,
    ready: &[usize],
    moe: &MoeSpec,
    x: ActView<'_>,
    s: &mut FfnScratch,
    hidden: usize,
    computed: &mut StageBytes,
) {
    let width = moe.expert_ffn;
    let views: Vec<_> = ready.iter().map(|at| store.view(step, *at)).collect();
    for (_, tier) in &views {
        computed.add(*tier, store.expert_bytes(step.layer()));
    }
    let n = ready.len();
    let mut jobs = Vec::with_capacity(2 * n);
    for ((view, _), (gate, up)) in views.iter().zip(s.gate.chunks_exact_mut(width).zip(s.up.chunks_exact_mut(width))) {
        jobs.push(MatJob::new(view.gate.weights, x, gate));
        jobs.push(MatJob::new(view.up.weights, x, up));
    }
    matmul_all(c.pool, c.kernels, &jobs);
    drop(jobs);
    for ((view, _), (gate, up)) in views.iter().zip(s.gate.chunks_exact_mut(width).zip(s.up.chunks_exact_mut(width))) {
        view.gate.add_bias(gate, &mut s.bias);
        view.up.add_bias(up, &mut s.bias);
    }
    activate(c.kernels, moe.activation, &mut s.gate[..n * width], &s.up[..n * width]);
    let quantize = views.iter().any(|(v, _)| needs_quants(v.down.weights.ty()));
    s.inner.fill(c.kernels, n, width, &s.gate[..n * width], quantize);
    let inner = s.inner.view();
    let mut rows: Vec<Option<&mut [f32]>> = s.results.chunks_exact_mut(hidden).map(Some).collect();
    let mut jobs = Vec::with_capacity(n);
    for (i, (at, (view, _))) in ready.iter().zip(&views).enumerate() {
        if let Some(row) = rows[*at].take() {
            jobs.push(MatJob::new(view.down.weights, inner.rows_range(i..i + 1), row));
        }
    }
    matmul_all(c.pool, c.kernels, &jobs);
    drop(jobs);
    for (at, (view, _)) in ready.iter().zip(&views) {
        view.down.add_bias(&mut s.results[at * hidden..(at + 1) * hidden], &mut s.bias);
    }
}

/// Routed experts of a batch: each expert computes once, for all tokens that chose it, in ascending order so that the
/// sums do not depend on the plan; those of GPUs come when they have been fetched. `x` has a row a token; `out` is `[tokens, hidden]`.
pub(crate) fn moe_batch(
    c: Compute<'_>,
    store: &mut ExpertStore,
    layer: usize,
    moe: &MoeSpec,
    x: ActView<'_>,
    choices: &Choices<'_>,
    s: &mut FfnScratch,
    out: &mut [f32],
    computed: &mut StageBytes,
) -> Result<Step, RunError> {
    let hidden = moe.router.n_in;
    let users = Users::new(choices, moe.n_expert);
    choices.experts.chunks_exact(choices.n_used.max(1)).for_each(|chosen| store.note(layer, chosen));
    let mut step = store.begin(layer, &users.by_last_use(choices), users.present());
    out.fill(0.0);
    // When which results are added must not depend on what happened to be read ahead.
    let batch = Batch { x, users: &users, hidden };
    let mut work = GpuBatch::new(store.n_gpus());
    let mut here = Vec::new();
    for at in 0..step.experts().len() {
        match store.spot(&step, at).filter(|_| step.was_at_hand(at)) {
            Some(spot) => {
                computed.add(spot.tier, store.expert_bytes(layer));
                work.add(spot.gpu, at, users.of(step.experts()[at] as usize).len());
            }
            None => here.push(at),
        }
    }
    // The processor computes the others meanwhile.
    work.ask(&mut StoreStep { store, step: &mut step }, batch, &mut s.gpu)?;
    let mut streamed = s.streams.choose(store, &step, &users, moe, x.rows());
    here.retain(|at| !streamed.has(*at));
    streamed.begin(&mut s.streams, &mut StoreStep { store, step: &mut step }, batch)?;
    for at in here {
        let mut on = StoreStep { store, step: &mut step };
        streamed.send(&mut s.streams, &mut on, c.pool, moe, Flush::Some, computed)?;
        while !step.is_ready(at) {
            store.wait(&mut step)?;
        }
        if let Some(spot) = store.spot(&step, at) {
            computed.add(spot.tier, store.expert_bytes(layer));
            work.add(spot.gpu, at, users.of(step.experts()[at] as usize).len());
            work.ask(&mut StoreStep { store, step: &mut step }, batch, &mut s.gpu)?;
            continue;
        }
        let (view, tier) = store.view(&step, at);
        computed.add(tier, store.expert_bytes(layer));
        for tokens in users.of(step.experts()[at] as usize).chunks(s.rows) {
            let results = expert_of_batch(c, &view, moe, x, tokens, s);
            for (result, (token, weight)) in results.chunks_exact(hidden).zip(tokens) {
                c.kernels.axpy(*weight, result, &mut out[token * hidden..(token + 1) * hidden]);
            }
        }
        store.release(&mut step, at);
        if work.has_more() {
            let mut on = StoreStep { store, step: &mut step };
            work.fetch(&mut on, batch, &mut s.gpu, c.kernels, Flush::Some, out)?;
            work.ask(&mut on, batch, &mut s.gpu)?;
        }
    }
    let mut on = StoreStep { store, step: &mut step };
    streamed.send(&mut s.streams, &mut on, c.pool, moe, Flush::All, computed)?;
    while work.is_busy() {
        work.fetch(&mut on, batch, &mut s.gpu, c.kernels, Flush::All, out)?;
        work.ask(&mut on, batch, &mut s.gpu)?;
    }
    streamed.finish(&mut s.streams, &mut on, c.kernels, out)?;
    store.finish(&mut step)?;
    store.check_gpus()?;
    Ok(step)
}

/// What one expert makes of some tokens of a batch, `[tokens, hidden]`, not weighted yet.
fn expert_of_batch<'s>(
    c: Compute<'_>,
    view: &ExpertView<'_>,
    moe: &MoeSpec,
    x: ActView<'_>,
    tokens: &[(usize, f32)],
    s: &'s mut FfnScratch,
) -> &'s [f32] {
    let (n, width, hidden) = (tokens.len(), moe.expert_ffn, moe.router.n_in);
    let floats = [view.gate.weights.ty(), view.up.weights.ty()].into_iter().any(|ty| !needs_quants(ty));
    s.gathered.gather(x, tokens.iter().map(|(token, _)| *token), floats);
    let acts = s.gathered.view();
    let (gate, up) = (&mut s.gate[..n * width], &mut s.up[..n * width]);
    let jobs = [MatJob::new(view.gate.weights, acts, gate), MatJob::new(view.up.weights, acts, up)];
    matmul_all(c.pool, c.kernels, &jobs);
    view.gate.add_bias(gate, &mut s.bias);
    view.up.add_bias(up, &mut s.bias);
    activate_shared(c, moe.activation, width, gate, up);
    s.inner.fill_shared(c.pool, c.kernels, n, width, gate, needs_quants(view.down.weights.ty()));
    let results = &mut s.results[..n * hidden];
    matmul_all(c.pool, c.kernels, &[MatJob::new(view.down.weights, s.inner.view(), results)]);
    view.down.add_bias(results, &mut s.bias);
    results
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_grouped_and_ordered() {
        let choices = Choices { experts: &[3, 1, 1, 0, 3, 2], weights: &[0.1, 0.2, 0.3, 0.4, 0.5, 0.6], n_used: 2 };
        let users = Users::new(&choices, 5);
        assert_eq!(users.present(), [0, 1, 2, 3]);
        assert_eq!(users.of(3), [(0, 0.1), (2, 0.5)]);
        assert_eq!(users.of(1), [(0, 0.2), (1, 0.3)]);
        assert!(users.of(4).is_empty());
        assert_eq!(users.by_last_use(&choices), [1, 0, 3, 2]);
    }
}
