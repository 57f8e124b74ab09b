//! Experts of main memory that pass through a GPU for a prompt: where a layer's router is on a GPU, as many of its experts
//! go there as make the batch's slower side least, the ones with the most tokens first. The processor computes the others
//! meanwhile.

use super::routing::Batch;
use super::routing::TokensByExpert;
use crate::error::LoadError;
use crate::error::RunError;
use crate::experts::store::{ExpertStore, Step};
use crate::gpu::devices::Devices;
use crate::layers::cpu_context::CpuContext;
use crate::layers::places::Places;
use crate::options::{LoadOptions, StreamRates};
use crate::tiers::pace::StageBytes;
use tier_plan_cuda::CudaError;
use tier_plan_cuda::experts::ExpertBytes;
use tier_plan_cuda::stream::{ExpertStream, StreamRoom};
use tier_plan_formats::machine::TierKind;
use tier_plan_formats::model::shape::ModelShape;
use tier_plan_formats::model::spec::{ModelSpec, MoeSpec};
use tier_plan_formats::placement::{Placement, TierIdx};
use tier_plan_kernels::threads::ThreadPool;

/// Tokens of a batch from which on experts pass through a GPU.
const LEAST_TOKENS: usize = 32;

/// What stays free of a GPU's memory.
const RESERVE: usize = 128 << 20;

/// The GPUs that experts of main memory pass through.
#[derive(Default)]
pub(crate) struct Streams {
    streams: Vec<(TierIdx, ExpertStream, StreamRates)>,
    /// By layer with routed experts, which of them.
    by_layer: Vec<Option<usize>>,
    /// What came back, `[tokens, hidden]`.
    back: Vec<f32>,
    /// Experts that passed so far.
    passed: u64,
}

/// Experts of a step that pass through a GPU.
#[derive(Default)]
pub(crate) struct Passing {
    /// Which GPU.
    gpu: usize,
    /// Positions in the step, ascending.
    positions: Vec<usize>,
    /// Those that were sent.
    sent: usize,
}

impl Streams {
    /// Where GPUs have routers of layers whose experts the processor has, and room for it. `rows` are those that an expert
    /// takes at once.
    ///
    /// # Errors
    /// When a GPU fails.
    pub(crate) fn new(
        (spec, shape): (&ModelSpec, &ModelShape),
        plan: &Placement,
        options: &LoadOptions,
        devices: &Devices,
        places: &Places,
        (batch, rows): (usize, usize),
        pool: &ThreadPool,
    ) -> Result<Self, LoadError> {
        let mut made = Self { by_layer: vec![None; plan.layers.len()], ..Self::default() };
        // The time of an emulated tier is declared, and no prediction knows of this.
        let emulated = plan.tiers.iter().any(|t| t.tier.emulated);
        let Some(processor_gflops) = options.stream.map(|s| s.processor_gflops).or(planned_rate(plan)) else {
            return Ok(made);
        };
        if emulated || batch < LEAST_TOKENS || options.stream.is_some_and(|s| s.link_gbps <= 0.0) {
            return Ok(made);
        }
        let failed = |source| LoadError::Gpu { plan: plan.name.clone(), source };
        for (tier, device) in devices.all() {
            let mut room = StreamRoom { tokens: batch, rows, hidden: spec.hidden, ..StreamRoom::default() };
            let mut layers = Vec::new();
            for (at, (index, moe)) in spec.moe_layers().enumerate() {
                let on_gpus: usize = plan.layers[at]
                    .pinned
                    .iter()
                    .filter(|p| devices.of(p.tier).is_some())
                    .map(|p| p.experts.len())
                    .sum();
                if places.layers[index].ffn != Some(tier) || on_gpus >= moe.n_expert {
                    continue;
                }
                layers.push(at);
                room.n_used = room.n_used.max(moe.n_used);
                room.ffn = room.ffn.max(moe.expert_ffn);
                room.expert_bytes = room.expert_bytes.max(shape.experts[at].expert_bytes as usize);
            }
            if layers.is_empty() || device.free_bytes().map_err(failed)? < room.bytes().saturating_add(RESERVE) {
                continue;
            }
            let Some(mut stream) = ExpertStream::new(device, room).map_err(failed)? else { continue };
            let rates = match options.stream {
                Some(rates) => rates,
                None => {
                    let rate = stream.measure(&|to, from| pool.copy(to, from)).map_err(failed)?;
                    StreamRates { link_gbps: steps(rate / 1e9), processor_gflops }
                }
            };
            for at in layers {
                made.by_layer[at] = Some(made.streams.len());
            }
            made.streams.push((tier, stream, rates));
        }
        if made.any() {
            made.back = vec![0.0; batch * spec.hidden];
        }
        Ok(made)
    }

    /// Whether there is any.
    pub(crate) fn any(&self) -> bool {
        !self.streams.is_empty()
    }

    /// Experts that passed so far.
    pub(crate) fn passed(&self) -> u64 {
        self.passed
    }

    /// Which experts of a batch's step pass through a GPU.
    pub(crate) fn choose(
        &self,
        store: &ExpertStore,
        step: &Step,
        users: &TokensByExpert,
        moe: &MoeSpec,
        tokens: usize,
    ) -> Passing {
        let Some(gpu) = self.by_layer.get(step.layer()).copied().flatten().filter(|_| tokens >= LEAST_TOKENS) else {
            return Passing::default();
        };
        let on_processor = |at: &usize| store.gpu_slot(step, *at).is_none();
        let all: Vec<usize> = (0..step.experts().len()).filter(on_processor).collect();
        let uses = |at: usize| users.of(step.experts()[at] as usize).len();
        let total: usize = all.iter().map(|at| uses(*at)).sum();
        // Those that lie in slots or are being read give their buffers back too soon.
        let mut may: Vec<usize> =
            all.into_iter().filter(|at| step.is_in_place(*at) && step.was_resident(*at)).collect();
        may.sort_by_key(|at| std::cmp::Reverse(uses(*at)));
        let counts: Vec<usize> = may.iter().map(|at| uses(*at)).collect();
        let cost = Cost::new(self.streams[gpu].2, store.expert_bytes(step.layer()), moe, tokens);
        may.truncate(cost.best(&counts, total));
        may.sort_unstable();
        Passing { gpu, positions: may, sent: 0 }
    }
}

/// The rate of products that the plan was predicted with, of what the processor computes.
fn planned_rate(plan: &Placement) -> Option<f64> {
    let rates = plan.tiers.iter().zip(&plan.predicted.prompt_gflops);
    rates.filter(|(t, rate)| t.tier.kind != TierKind::Vram && **rate > 0.0).map(|(_, rate)| *rate).next()
}

/// A measured rate in steps of a fifth, so that runs choose alike.
fn steps(rate: f64) -> f64 {
    ((4.0 * rate.log2()).round() / 4.0).exp2()
}

/// What decides how many experts pass.
struct Cost {
    /// Seconds of an expert's bytes.
    passing_s: f64,
    /// Seconds of a batch's rows there and back.
    rows_s: f64,
    /// Seconds of a token's products with one expert on the processor.
    use_s: f64,
}

impl Cost {
    fn new(rates: StreamRates, expert_bytes: u64, moe: &MoeSpec, tokens: usize) -> Self {
        let (hidden, link) = (moe.router.n_in as f64, rates.link_gbps * 1e9);
        Self {
            passing_s: expert_bytes as f64 / link,
            rows_s: 8.0 * hidden * tokens as f64 / link,
            use_s: 6.0 * hidden * moe.expert_ffn as f64 / (rates.processor_gflops * 1e9),
        }
    }

    /// How many of the first experts pass, whose uses are `counts`, descending, of `total` that the processor would have.
    fn best(&self, counts: &[usize], total: usize) -> usize {
        let mut here = self.use_s * total as f64;
        let mut best = (here, 0);
        for (n, count) in counts.iter().enumerate() {
            here -= self.use_s * *count as f64;
            let time = here.max(self.rows_s + self.passing_s * (n + 1) as f64);
            if time < best.0 {
                best = (time, n + 1);
            }
        }
        best.1
    }
}

impl Passing {
    /// Whether the expert at this position passes.
    pub(crate) fn has(&self, at: usize) -> bool {
        self.positions.binary_search(&at).is_ok()
    }

    /// Sends what they read.
    ///
    /// # Errors
    /// When the GPU fails; the step is given up then.
    pub(crate) fn begin(
        &self,
        streams: &mut Streams,
        batch: Batch<'_>,
        step: &mut Step,
        store: &mut ExpertStore,
    ) -> Result<(), RunError> {
        if self.positions.is_empty() {
            return Ok(());
        }
        let users = self.positions.iter().flat_map(|at| batch.users.of(step.experts()[*at] as usize));
        let uses: Vec<(usize, f32)> = users.copied().collect();
        let x = &batch.x.values()[..batch.x.rows() * batch.hidden];
        let begun = streams.streams[self.gpu].1.begin(batch.hidden, x, &uses);
        Ok(begun.inspect_err(|_| store.give_up(step))?)
    }

    /// Sends as many as are not to be waited for, or `all` that are left.
    ///
    /// # Errors
    /// As [`begin`](Self::begin).
    pub(crate) fn send(
        &mut self,
        streams: &mut Streams,
        c: CpuContext<'_>,
        (store, step): (&mut ExpertStore, &mut Step),
        users: &TokensByExpert,
        moe: &MoeSpec,
        all: bool,
        computed: &mut StageBytes,
    ) -> Result<(), RunError> {
        while let Some(at) = self.positions.get(self.sent).copied() {
            let stream = &mut streams.streams[self.gpu].1;
            let mut one = || -> Result<bool, CudaError> {
                if !all && !stream.is_free()? {
                    return Ok(false);
                }
                let (view, tier) = store.view(step, at);
                computed.add(tier, store.expert_bytes(step.layer()));
                let biases = view.biases();
                let biases = biases.as_ref().map(|[gate, up, down]| [&gate[..], &up[..], &down[..]]);
                let (gate, up, down) = (view.gate.weights.bytes(), view.up.weights.bytes(), view.down.weights.bytes());
                let n = users.of(step.experts()[at] as usize).len();
                let bytes = ExpertBytes { gate, up, down, biases };
                stream.send(&view.kind(moe), &bytes, n, &|to, from| c.pool.copy(to, from))?;
                Ok(true)
            };
            match one() {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(error) => {
                    store.give_up(step);
                    return Err(error.into());
                }
            }
            store.release(step, at);
            self.sent += 1;
            streams.passed += 1;
        }
        Ok(())
    }

    /// Adds what they make of the batch to `out`.
    ///
    /// # Errors
    /// As [`begin`](Self::begin).
    pub(crate) fn finish(
        &self,
        streams: &mut Streams,
        c: CpuContext<'_>,
        (store, step): (&mut ExpertStore, &mut Step),
        out: &mut [f32],
    ) -> Result<(), RunError> {
        if self.positions.is_empty() {
            return Ok(());
        }
        let back = &mut streams.back[..out.len()];
        let fetched = streams.streams[self.gpu].1.finish(back);
        fetched.inspect_err(|_| store.give_up(step))?;
        c.kernels.add(out, back);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_pass_as_make_the_slower_side_least() {
        let cost = |passing_s, use_s| Cost { passing_s, rows_s: 0.5, use_s };
        let counts = [40, 20, 10, 5, 1];
        for (passing_s, use_s) in [(1.0, 0.1), (10.0, 0.1), (0.01, 1.0), (3.0, 0.2), (1.0, 1e-4)] {
            let (cost, total) = (cost(passing_s, use_s), 80);
            let time = |n: usize| {
                let here = use_s * (total - counts[..n].iter().sum::<usize>()) as f64;
                if n == 0 { here } else { here.max(0.5 + passing_s * n as f64) }
            };
            let best = (0..=counts.len()).map(time).fold(f64::INFINITY, f64::min);
            assert!((time(cost.best(&counts, total)) - best).abs() < 1e-9, "{passing_s} {use_s}");
        }
        // A slow link is left alone, a fast one takes all that it may.
        assert_eq!(cost(10.0, 0.1).best(&counts, 80), 0);
        assert_eq!(cost(1e-6, 10.0).best(&counts, 80), 5);
    }

    #[test]
    fn rates_are_rounded_to_steps() {
        assert_eq!(steps(16.0), 16.0);
        assert_eq!(steps(15.2), 16.0);
        assert!(steps(12.0) < 14.0 && steps(12.0) > 11.0);
    }
}
