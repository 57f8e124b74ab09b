//! Streams experts from main memory over PCIe to a GPU during prompts, in layers whose router is on
//! the GPU. Chooses the number that balances transfer time against CPU compute, busiest experts
//! first.

use super::gpu::{Flush, StoreStep};
use super::routing::Batch;
use super::routing::TokensByExpert;
use crate::error::LoadError;
use crate::error::RunError;
use crate::experts::store::{ExpertStore, Step};
use crate::gpu::GPU_RESERVE_BYTES;
use crate::gpu::devices::Devices;
use crate::gpu::factors;
use crate::gpu::rows::gpu_row_values;
use crate::layers::places::Places;
use crate::options::{LoadOptions, StreamRates};
use crate::tiers::pace::StageBytes;
use tier_plan_cuda::CudaError;
use tier_plan_cuda::stream::{ExpertStream, StreamSizes, Use};
use tier_plan_formats::machine::TierKind;
use tier_plan_formats::model::shape::ModelShape;
use tier_plan_formats::model::spec::{ModelSpec, MoeSpec};
use tier_plan_formats::placement::{Placement, TierIdx};
use tier_plan_kernels::Kernels;
use tier_plan_kernels::threads::ThreadPool;

/// Smallest batch, in tokens, for which experts are streamed.
const MIN_TOKENS: usize = 32;

/// Streams of experts to GPUs.
#[derive(Default)]
pub(crate) struct Streams {
    streams: Vec<GpuStream>,
    /// Index of the stream of each layer with routed experts, if it has one.
    by_layer: Vec<Option<usize>>,
    /// Sums over streamed experts, `[tokens, hidden]`.
    sums: Vec<f32>,
    /// Experts that were streamed so far.
    n_streamed: u64,
    /// The GPUs with too little free memory for a stream.
    full: Vec<FullGpu>,
}

/// A GPU that has no room for streaming experts of prompts, so that the CPU computes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FullGpu {
    /// Tier of the GPU.
    pub tier: TierIdx,
    /// Bytes that must be free for streaming, those for the driver included.
    pub needed: u64,
    /// Bytes of the GPU that are free once the plan has been loaded.
    pub free: u64,
}

/// The stream to one GPU.
struct GpuStream {
    tier: TierIdx,
    experts: ExpertStream,
    rates: StreamRates,
}

/// What streams are made from.
pub(crate) struct StreamSetup<'a> {
    pub(crate) spec: &'a ModelSpec,
    pub(crate) shape: &'a ModelShape,
    pub(crate) plan: &'a Placement,
    pub(crate) options: &'a LoadOptions,
    pub(crate) devices: &'a Devices,
    pub(crate) places: &'a Places,
    /// Most tokens of a batch.
    pub(crate) batch: usize,
    /// Most rows that an expert takes at once.
    pub(crate) rows: usize,
    pub(crate) pool: &'a ThreadPool,
    pub(crate) store: &'a ExpertStore,
}

/// An expert of a step that is streamed.
#[derive(Debug, Clone, Copy)]
struct StreamedExpert {
    /// Position in the step.
    position: usize,
    /// Tokens that chose the expert.
    n_tokens: usize,
}

/// The experts of a step that are streamed to a GPU.
#[derive(Default)]
pub(crate) struct StreamedExperts {
    /// Index of the stream.
    stream: usize,
    /// By position in the step, ascending.
    experts: Vec<StreamedExpert>,
    /// How many of them were sent.
    n_sent: usize,
}

impl Streams {
    /// Opens a stream to every GPU that has routers of layers whose experts are in main memory, and
    /// enough free memory.
    ///
    /// # Errors
    /// When a GPU fails.
    pub(crate) fn new(setup: &StreamSetup<'_>) -> Result<Self, LoadError> {
        let &StreamSetup {
            spec,
            plan,
            options,
            devices,
            batch,
            pool,
            store,
            ..
        } = setup;
        let mut streams = Self {
            by_layer: vec![None; plan.layers.len()],
            ..Self::default()
        };
        // The time of an emulated tier is declared, and predictions of it don't include streaming.
        let emulated = plan.tiers.iter().any(|t| t.tier.emulated);
        let Some(processor_gflops) = options
            .stream
            .map(|s| s.processor_gflops)
            .or(planned_cpu_gflops(plan))
        else {
            return Ok(streams);
        };
        if emulated || batch < MIN_TOKENS || options.stream.is_some_and(|s| s.link_gbps <= 0.0) {
            return Ok(streams);
        }
        let failed = |source| LoadError::Gpu {
            plan: plan.name.clone(),
            source,
        };
        for (tier, device) in devices.all() {
            let (layers, sizes) = setup.streamed_layers(tier);
            if layers.is_empty() {
                continue;
            }
            let needed = (sizes.bytes() as u64).saturating_add(GPU_RESERVE_BYTES);
            let free = device.free_bytes().map_err(failed)? as u64;
            if free < needed {
                streams.full.push(FullGpu { tier, needed, free });
                continue;
            }
            let Some(mut experts) = ExpertStream::new(device, sizes).map_err(failed)? else {
                continue;
            };
            let rates = match options.stream {
                Some(rates) => rates,
                None => {
                    // What is locked needs no copy.
                    let is_locked = store.has_locked_all(&layers, tier);
                    let copy = |to: &mut [u8], from: &[u8]| match is_locked {
                        true => {}
                        false => pool.copy(to, from),
                    };
                    let rate = experts.measure(&copy).map_err(failed)?;
                    StreamRates {
                        link_gbps: round_to_quarter_octave(rate / 1e9),
                        processor_gflops,
                    }
                }
            };
            for layer in layers {
                streams.by_layer[layer] = Some(streams.streams.len());
            }
            streams.streams.push(GpuStream {
                tier,
                experts,
                rates,
            });
        }
        if streams.any() {
            streams.sums = vec![0.0; batch * gpu_row_values(spec)];
        }
        Ok(streams)
    }

    /// Returns the GPUs that have no room for a stream.
    pub(crate) fn full(&self) -> &[FullGpu] {
        &self.full
    }

    /// Whether there is any stream.
    pub(crate) fn any(&self) -> bool {
        !self.streams.is_empty()
    }

    /// Returns the number of experts that were streamed so far.
    pub(crate) fn n_streamed(&self) -> u64 {
        self.n_streamed
    }

    /// Chooses the experts of a batch's step that are streamed.
    pub(crate) fn choose(
        &self,
        store: &ExpertStore,
        step: &Step,
        users: &TokensByExpert,
        moe: &MoeSpec,
        tokens: usize,
    ) -> StreamedExperts {
        let Some(stream) = self
            .by_layer
            .get(step.layer())
            .copied()
            .flatten()
            .filter(|_| tokens >= MIN_TOKENS)
        else {
            return StreamedExperts::default();
        };
        let on_cpu = |position: &usize| store.gpu_slot(step, *position).is_none();
        let expert = |position: usize| StreamedExpert {
            position,
            n_tokens: users.of(step.experts()[position] as usize).len(),
        };
        let mut experts: Vec<_> = (0..step.experts().len())
            .filter(on_cpu)
            .map(expert)
            .collect();
        let total: usize = experts.iter().map(|e| e.n_tokens).sum();
        // Experts in slots or in flight would give their buffers back too soon.
        experts.retain(|e| step.is_in_place(e.position) && step.was_resident(e.position));
        experts.sort_by_key(|e| std::cmp::Reverse(e.n_tokens));
        let counts: Vec<usize> = experts.iter().map(|e| e.n_tokens).collect();
        let cost = Cost::new(
            self.streams[stream].rates,
            store.expert_bytes(step.layer()),
            moe,
            tokens,
        );
        experts.truncate(cost.best(&counts, total));
        experts.sort_unstable_by_key(|e| e.position);
        StreamedExperts {
            stream,
            experts,
            n_sent: 0,
        }
    }
}

impl StreamSetup<'_> {
    /// Returns the layers whose experts a tier's GPU may be streamed, by index among those with
    /// routed experts, and the sizes that they need.
    fn streamed_layers(&self, tier: TierIdx) -> (Vec<usize>, StreamSizes) {
        let mut sizes = StreamSizes {
            tokens: self.batch,
            rows: self.rows,
            ..StreamSizes::default()
        };
        let mut layers = Vec::new();
        for (moe_index, (index, moe)) in self.spec.moe_layers().enumerate() {
            let pinned = self.plan.layers[moe_index].pinned.iter();
            let on_gpus: usize = pinned
                .filter(|p| self.devices.of(p.tier).is_some())
                .map(|p| p.experts.len())
                .sum();
            let stays = on_gpus >= moe.n_expert || factors::of_experts(self.spec, moe);
            if self.places.layers[index].ffn != Some(tier) || stays {
                continue;
            }
            layers.push(moe_index);
            sizes.n_used = sizes.n_used.max(moe.n_used);
            sizes.hidden = sizes.hidden.max(moe.expert_width());
            sizes.ffn = sizes.ffn.max(moe.expert_ffn);
            sizes.expert_bytes = sizes
                .expert_bytes
                .max(self.shape.experts[moe_index].expert_bytes as usize);
        }
        (layers, sizes)
    }
}

/// Returns the GFLOP/s of prompts on the CPU that the plan was predicted with.
fn planned_cpu_gflops(plan: &Placement) -> Option<f64> {
    let rates = plan.tiers.iter().zip(&plan.predicted.prompt_gflops);
    rates
        .filter(|(t, rate)| t.tier.kind != TierKind::Vram && **rate > 0.0)
        .map(|(_, rate)| *rate)
        .next()
}

/// Rounds a measured rate to a quarter of an octave, so that runs make the same choices.
fn round_to_quarter_octave(rate: f64) -> f64 {
    ((4.0 * rate.log2()).round() / 4.0).exp2()
}

/// What streaming costs, and what it saves.
struct Cost {
    /// Seconds to stream an expert.
    stream_s: f64,
    /// Seconds to copy a batch's rows to the GPU and the sums back.
    rows_s: f64,
    /// Seconds of the CPU for one expert and token.
    use_s: f64,
}

impl Cost {
    fn new(rates: StreamRates, expert_bytes: u64, moe: &MoeSpec, tokens: usize) -> Self {
        let (hidden, link) = (moe.expert_width() as f64, rates.link_gbps * 1e9);
        let matrices = if moe.has_gate() { 3.0 } else { 2.0 };
        Self {
            stream_s: expert_bytes as f64 / link,
            rows_s: 8.0 * hidden * tokens as f64 / link,
            use_s: 2.0 * matrices * hidden * moe.expert_ffn as f64 / (rates.processor_gflops * 1e9),
        }
    }

    /// Returns how many of the first experts to stream. `counts` are their tokens, descending, of
    /// the `total` that the CPU would compute otherwise.
    fn best(&self, counts: &[usize], total: usize) -> usize {
        let mut cpu_s = self.use_s * total as f64;
        let mut best = (cpu_s, 0);
        for (n, count) in counts.iter().enumerate() {
            cpu_s -= self.use_s * *count as f64;
            let time = cpu_s.max(self.rows_s + self.stream_s * (n + 1) as f64);
            if time < best.0 {
                best = (time, n + 1);
            }
        }
        best.1
    }
}

impl StreamedExperts {
    /// Whether no expert is streamed.
    pub(crate) fn is_empty(&self) -> bool {
        self.experts.is_empty()
    }

    /// Whether the expert at a position of the step is streamed.
    pub(crate) fn has(&self, position: usize) -> bool {
        self.experts
            .binary_search_by_key(&position, |e| e.position)
            .is_ok()
    }

    /// Copies the rows of the batch to the GPU.
    ///
    /// # Errors
    /// When the GPU fails; the step is given up then.
    pub(crate) fn begin(
        &self,
        streams: &mut Streams,
        on: &mut StoreStep<'_>,
        batch: Batch<'_>,
    ) -> Result<(), RunError> {
        if self.experts.is_empty() {
            return Ok(());
        }
        let users = self
            .experts
            .iter()
            .flat_map(|e| batch.users.of(on.step.experts()[e.position] as usize));
        let uses: Vec<Use> = users
            .map(|(token, weight)| Use {
                token: *token,
                weight: *weight,
            })
            .collect();
        let x = &batch.x.values()[..batch.x.rows() * batch.hidden];
        let begun = streams.streams[self.stream]
            .experts
            .begin(batch.hidden, x, &uses);
        Ok(begun.inspect_err(|_| on.store.give_up(on.step))?)
    }

    /// Sends the experts that are left: all, or as many as can be sent without waiting.
    ///
    /// # Errors
    /// When the GPU fails; the step is given up then.
    pub(crate) fn send(
        &mut self,
        streams: &mut Streams,
        on: &mut StoreStep<'_>,
        pool: &ThreadPool,
        moe: &MoeSpec,
        flush: Flush,
        computed: &mut StageBytes,
    ) -> Result<(), RunError> {
        while let Some(&expert) = self.experts.get(self.n_sent) {
            let stream = &mut streams.streams[self.stream];
            let sent = match flush {
                Flush::Some => stream.experts.is_free(),
                Flush::All => Ok(true),
            };
            let sent = sent.and_then(|now| {
                if now {
                    send_one(stream, on, expert, pool, moe, computed)?;
                }
                Ok(now)
            });
            match sent {
                Ok(true) => {}
                Ok(false) => return Ok(()),
                Err(error) => {
                    on.store.give_up(on.step);
                    return Err(error.into());
                }
            }
            on.store.release(on.step, expert.position);
            self.n_sent += 1;
            streams.n_streamed += 1;
        }
        Ok(())
    }

    /// Waits for the sums over the streamed experts and adds them to `out`, `[tokens, hidden]`.
    ///
    /// # Errors
    /// When the GPU fails; the step is given up then.
    pub(crate) fn finish(
        &self,
        streams: &mut Streams,
        on: &mut StoreStep<'_>,
        kernels: Kernels,
        out: &mut [f32],
    ) -> Result<(), RunError> {
        if self.experts.is_empty() {
            return Ok(());
        }
        let sums = &mut streams.sums[..out.len()];
        let fetched = streams.streams[self.stream].experts.finish(sums);
        fetched.inspect_err(|_| on.store.give_up(on.step))?;
        kernels.add(out, sums);
        Ok(())
    }
}

/// Sends one expert to the GPU, from where it lies if the GPU can read it there, and enqueues its
/// compute.
fn send_one(
    stream: &mut GpuStream,
    on: &StoreStep<'_>,
    expert: StreamedExpert,
    pool: &ThreadPool,
    moe: &MoeSpec,
    computed: &mut StageBytes,
) -> Result<(), CudaError> {
    let (view, tier) = on.store.view(on.step, expert.position);
    computed.add(tier, on.store.expert_bytes(on.step.layer()));
    let (kind, n) = (view.kind(moe), expert.n_tokens);
    let (experts, gpu) = (&mut stream.experts, stream.tier);
    if on
        .store
        .send_locked(on.step, expert.position, gpu, experts, (&kind, n))?
    {
        return Ok(());
    }
    let biases = view.biases();
    let bytes = view.bytes(biases.as_ref());
    experts.send(&kind, &bytes, n, &|to, from| pool.copy(to, from))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_streamed_experts_balances_both_sides() {
        let cost = |stream_s, use_s| Cost {
            stream_s,
            rows_s: 0.5,
            use_s,
        };
        let counts = [40, 20, 10, 5, 1];
        for (stream_s, use_s) in [
            (1.0, 0.1),
            (10.0, 0.1),
            (0.01, 1.0),
            (3.0, 0.2),
            (1.0, 1e-4),
        ] {
            let (cost, total) = (cost(stream_s, use_s), 80);
            let time = |n: usize| {
                let cpu_s = use_s * (total - counts[..n].iter().sum::<usize>()) as f64;
                if n == 0 {
                    cpu_s
                } else {
                    cpu_s.max(0.5 + stream_s * n as f64)
                }
            };
            let best = (0..=counts.len()).map(time).fold(f64::INFINITY, f64::min);
            assert!(
                (time(cost.best(&counts, total)) - best).abs() < 1e-9,
                "{stream_s} {use_s}"
            );
        }
        // A slow link takes nothing, a fast one everything.
        assert_eq!(cost(10.0, 0.1).best(&counts, 80), 0);
        assert_eq!(cost(1e-6, 10.0).best(&counts, 80), 5);
    }

    #[test]
    fn rates_are_rounded_to_quarter_octaves() {
        assert_eq!(round_to_quarter_octave(16.0), 16.0);
        assert_eq!(round_to_quarter_octave(15.2), 16.0);
        assert!(round_to_quarter_octave(12.0) < 14.0 && round_to_quarter_octave(12.0) > 11.0);
    }
}
