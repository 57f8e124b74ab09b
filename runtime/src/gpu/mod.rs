//! The parts of a model that run on GPUs beside routed experts: mixers with their KV caches and
//! states, routers, shared experts, dense blocks, the head, and the embedding.
//!
//! The hidden state of a batch stays on a GPU while consecutive parts run there. A router's choices
//! are copied to the CPU, whose expert store knows where experts are. All buffers are allocated at
//! loading.
//!
//! A [`Gpu`] hands out parts: [`MixerPart`], [`RouterPart`]
//! and so on. Holding one proves that the part is on the GPU, so that running it needs no check.

mod block_index;
mod block_rope;
mod buffers;
mod choices;
mod compressed;
mod delta;
pub mod devices;
pub(crate) mod factors;
mod ffn;
pub(crate) mod fits;
mod full;
mod gqa;
mod indexer;
mod inputs;
mod kda;
mod latent;
mod mamba;
mod matrix;
mod mixer;
mod mla;
mod ngram;
pub(crate) mod parts;
mod projections;
mod router;
pub(crate) mod rows;
mod short_conv;
mod stages;
mod stream_buffers;
mod streams;
mod workspace;

pub(crate) use ffn::{FfnInput, HostEnd};
pub use full::fully_on_gpu;
pub(crate) use full::{Tokens, full_gpu_tier};
pub use parts::check as check_parts;
pub(crate) use router::RoutedRows;

use crate::error::LoadError;
use crate::layers::mixer::LayerCache;
use crate::layers::places::{Place, Places};
use crate::layers::rope::{LayerRopes, RopeTable};
use crate::layers::weights::DenseWeights;
use crate::options::LoadOptions;
use crate::options::batches;
use buffers::BufferSizes;
use devices::Devices;
use ffn::FfnPart;
use full::Replay;
use inputs::InputProjection;
use matrix::{GpuLoader, Matrix};
use projections::ProjectionsPart;
use router::RouterPart;
use stages::{EmbeddingPart, Head, HeadPart, Layer, MixerPart};
use std::ops::Range;
use std::sync::Arc;
use streams::BlockInput;
use tier_plan_cuda::{CudaError, Device};
use tier_plan_formats::model::spec::ModelSpec;
use tier_plan_formats::placement::{PerTier, Placement, TierIdx};
use workspace::{Residual, Workspace};

/// Bytes of a GPU's memory that are left free for the driver, the kernels and small tables.
pub(crate) const GPU_RESERVE_BYTES: u64 = 128 << 20;

/// The GPUs that have parts of a model, by tier.
pub(super) struct Gpus {
    pub(super) places: Places,
    by_tier: PerTier<Option<Gpu>>,
}

/// The parts on one GPU.
pub(super) struct Gpu {
    layers: Vec<Layer>,
    head: Option<Head>,
    embedding: Option<Matrix>,
    /// What makes tokens' inputs for every layer.
    inputs: Option<InputProjection>,
    work: Workspace,
    replay: Replay,
}

/// What layers keep of texts, and how they rotate.
#[derive(Clone, Copy)]
pub(super) struct KeptByLayers<'a> {
    /// `[layers]`.
    pub(super) caches: &'a [LayerCache],
    /// Rope tables of each layer, `[layers]`.
    pub(super) ropes: &'a [LayerRopes],
    /// The tables themselves.
    pub(super) tables: &'a [RopeTable],
}

/// The most that passes and the KV cache have room for.
#[derive(Debug, Clone, Copy)]
struct Most {
    /// Tokens of a batch.
    batch: usize,
    /// Tokens that a part takes at once.
    rows: usize,
    /// Tokens of a text.
    context: usize,
    /// Positions of the KV cache.
    positions: usize,
}

impl Most {
    fn of(plan: &Placement, options: &LoadOptions) -> Self {
        let (batch, rows) = batches(options, plan.room());
        Self {
            batch,
            rows,
            context: plan.context as usize,
            positions: plan.room().positions() as usize,
        }
    }
}

/// What the parts on a GPU are made from.
struct GpuSpec<'a> {
    spec: &'a ModelSpec,
    weights: &'a DenseWeights,
    places: &'a Places,
    tier: TierIdx,
    kept: KeptByLayers<'a>,
    most: Most,
    sizes: &'a BufferSizes,
}

impl Gpus {
    /// Makes the parts that the plan places on GPUs.
    ///
    /// # Errors
    /// When a device fails, or has too little memory.
    pub(super) fn new(
        spec: &ModelSpec,
        plan: &Placement,
        options: &LoadOptions,
        weights: &DenseWeights,
        devices: &Devices,
        places: Places,
        kept: KeptByLayers<'_>,
    ) -> Result<Self, LoadError> {
        let mut by_tier = Vec::with_capacity(plan.tiers.len());
        for tier in plan.tiers.indices() {
            let device = devices.of(tier).filter(|_| places.uses(tier));
            let gpu = device.map(|device| {
                let most = Most::of(plan, options);
                let gpu = GpuSpec {
                    spec,
                    weights,
                    places: &places,
                    tier,
                    kept,
                    most,
                    sizes: &BufferSizes::new(spec, &places, tier, most),
                };
                Gpu::new(device, &gpu).map_err(|source| LoadError::Gpu {
                    plan: plan.name.clone(),
                    source,
                })
            });
            by_tier.push(gpu.transpose()?);
        }
        Ok(Self {
            places,
            by_tier: by_tier.into(),
        })
    }

    /// Returns the parts on a tier's GPU.
    pub(super) fn of(&mut self, tier: TierIdx) -> &mut Gpu {
        match self.by_tier.get_mut(tier) {
            Some(Some(gpu)) => gpu,
            _ => unreachable!("a place is a tier whose GPU has parts"),
        }
    }
}

impl Gpu {
    /// Makes the parts; the tensors are on the device already.
    fn new(device: &Arc<dyn Device>, gpu: &GpuSpec<'_>) -> Result<Self, CudaError> {
        let &GpuSpec {
            spec,
            weights,
            places,
            tier,
            kept,
            most,
            sizes,
        } = gpu;
        let loader = GpuLoader {
            device,
            weights,
            ropes: kept.tables,
        };
        let here = |place: Place| place == Some(tier);
        let layers = spec.layers.iter().zip(&places.layers).zip(kept.ropes);
        let layers = layers.enumerate().map(|(index, ((layer, at), rope))| {
            // A layer without keys and values of its own reads those of another.
            let cache = match kept.caches.get(layer.kv_owner().unwrap_or(index)) {
                Some(LayerCache::OnGpu(cache)) => Some(cache),
                _ => None,
            };
            Layer::new(&loader, (index, layer), *at, tier, *rope, cache)
        });
        let vocabulary = |id| loader.rows(id, 0..spec.n_vocab, spec.hidden);
        let end = spec.streams.map(|streams| streams.end);
        let head = || {
            Ok(Head {
                input: BlockInput::of_head(&loader, end.as_ref(), spec.output_norm)?,
                matrix: vocabulary(spec.output),
                bias: spec.head.bias.map(|id| weights.vector(id).to_vec()),
            })
        };
        Ok(Self {
            layers: layers.collect::<Result<_, _>>()?,
            head: here(places.head).then(head).transpose()?,
            embedding: here(places.embedding).then(|| vocabulary(spec.embedding)),
            inputs: spec
                .token_inputs
                .as_ref()
                .filter(|_| here(places.head))
                .map(|own| InputProjection::new(&loader, own))
                .transpose()?,
            work: Workspace::new(device, spec, sizes, most)?,
            replay: Replay::default(),
        })
    }

    /// Returns the embedding.
    ///
    /// # Errors
    /// When it is elsewhere.
    pub(super) fn embedding(&mut self) -> Result<EmbeddingPart<'_>, CudaError> {
        let Self {
            embedding, work, ..
        } = self;
        let Some(table) = embedding else {
            return Err(work.missing("the embedding"));
        };
        Ok(EmbeddingPart { table, work })
    }

    /// Returns a layer's mixer.
    ///
    /// # Errors
    /// When it is elsewhere.
    pub(super) fn mixer(&mut self, layer: usize) -> Result<MixerPart<'_>, CudaError> {
        let Self { layers, work, .. } = self;
        let Some(mixer) = &layers[layer].mixer else {
            return Err(work.missing(&format!("the mixer of layer {layer}")));
        };
        Ok(MixerPart { mixer, work })
    }

    /// Returns the matrices of a layer's attention whose KV cache is in main memory.
    ///
    /// # Errors
    /// When they, or the cache, are elsewhere.
    pub(super) fn projections(&mut self, layer: usize) -> Result<ProjectionsPart<'_>, CudaError> {
        let Self { layers, work, .. } = self;
        let Some(projections) = &layers[layer].projections else {
            return Err(work.missing(&format!("the projections of layer {layer}")));
        };
        Ok(ProjectionsPart { projections, work })
    }

    /// Returns a layer's router.
    ///
    /// # Errors
    /// When it is elsewhere.
    pub(super) fn router(&mut self, layer: usize) -> Result<RouterPart<'_>, CudaError> {
        let Self { layers, work, .. } = self;
        let ffn = layers[layer].ffn.as_ref();
        match ffn.and_then(|ffn| Some((ffn, ffn.router.as_ref()?))) {
            Some((ffn, router)) => Ok(RouterPart {
                layer,
                ffn,
                router,
                work,
            }),
            None => Err(work.missing(&format!("the router of layer {layer}"))),
        }
    }

    /// Returns a layer's shared expert or dense block.
    ///
    /// # Errors
    /// When it is elsewhere.
    pub(super) fn ffn(&mut self, layer: usize) -> Result<FfnPart<'_>, CudaError> {
        let Self { layers, work, .. } = self;
        let ffn = layers[layer].ffn.as_ref();
        match ffn.and_then(|ffn| Some((ffn, ffn.block.as_ref()?))) {
            Some((ffn, block)) => Ok(FfnPart { ffn, block, work }),
            None => Err(work.missing(&format!("the feed-forward block of layer {layer}"))),
        }
    }

    /// Returns the head.
    ///
    /// # Errors
    /// When it is elsewhere.
    pub(super) fn head(&mut self) -> Result<HeadPart<'_>, CudaError> {
        let Self { head, work, .. } = self;
        let Some(head) = head else {
            return Err(work.missing("the head"));
        };
        Ok(HeadPart { head, work })
    }

    /// Returns what is added to logits on the host, `[n_vocab]`.
    pub(super) fn head_bias(&self) -> Option<&[f32]> {
        self.head.as_ref()?.bias.as_deref()
    }

    /// Returns what follows the sum of a layer's experts, where they are added up apart.
    pub(super) fn end_of_experts(&self, layer: usize) -> Option<&HostEnd> {
        self.layers[layer].ffn.as_ref()?.host_end.as_ref()
    }

    /// Overwrites rows of the hidden state, `[rows, streams * hidden]`.
    pub(super) fn put(&self, rows: Range<usize>, x: &[f32]) -> Result<(), CudaError> {
        self.work.state(rows).write_f32(x)
    }

    /// Copies rows of the hidden state to the host, `[rows, streams * hidden]`.
    pub(super) fn take(&self, rows: Range<usize>, x: &mut [f32]) -> Result<(), CudaError> {
        self.work.state(rows).read_f32(x)
    }

    /// Adds the sums of a layer's experts to the first rows of the hidden state, `[n, hidden]`, and
    /// does what follows the layer.
    pub(super) fn add_sums(&mut self, layer: usize, sums: &[f32]) -> Result<(), CudaError> {
        if let Some(ffn) = &self.layers[layer].ffn {
            ffn.prepare_sums(&mut self.work);
        }
        self.work.add_to_state(sums)?;
        self.end_layer(layer, sums.len() / self.work.hidden)
    }

    /// Does to the first `n` rows of the hidden state what follows a layer.
    pub(super) fn end_layer(&mut self, layer: usize, n: usize) -> Result<(), CudaError> {
        let Self { layers, work, .. } = self;
        let Some(ffn) = &layers[layer].ffn else {
            return Ok(());
        };
        for first in (0..n).step_by(work.rows) {
            let rows = first..n.min(first + work.rows);
            let left = ffn.end_layer(work, rows.clone(), Residual::None)?;
            work.complete(rows, left)?;
        }
        Ok(())
    }
}

/// Computes one layer's mixer alone on the GPU emulator. `x` is `[tokens, hidden]`, normalized, and
/// is split into batches.
#[cfg(test)]
pub(super) fn mixer_alone(
    mixer: &tier_plan_formats::model::spec::Mixer,
    norm: tier_plan_formats::model::spec::TensorId,
    eps: f32,
    mut weights: DenseWeights,
    kv_type: tier_plan_formats::model::kv::KvType,
    (x, hidden): (&[f32], usize),
    batches: &[usize],
) -> Vec<f32> {
    use crate::layers::device_cache::DeviceCache;
    use crate::layers::mixer::Segment;
    use crate::layers::pages::mixed_pages;
    use tier_plan_formats::model::spec::{Ffn, GatedFfn, LayerSpec, Linear};
    let device: Arc<dyn Device> = tier_plan_cuda::shim::shared();
    weights.move_to(&device);
    let linear = Linear {
        weight: 0,
        bias: None,
        n_out: 0,
        n_in: 0,
        first_row: 0,
    };
    let ffn = Ffn::Dense(GatedFfn {
        gate: Some(linear),
        up: linear,
        down: linear,
        activation: tier_plan_formats::model::spec::Activation::Silu,
    });
    let layer = LayerSpec {
        mixer_norm: norm,
        mixer: mixer.clone(),
        ffn_norm: norm,
        ffn,
        residual: Default::default(),
    };
    let spec = ModelSpec {
        arch: String::new(),
        hidden,
        n_vocab: 1,
        context: 0,
        norm_eps: eps,
        embedding: 0,
        embedding_scale: 1.0,
        token_inputs: None,
        ngrams: None,
        streams: None,
        output_norm: 0,
        output: 0,
        head: Default::default(),
        layers: vec![layer],
        scales: Default::default(),
    };
    let places = Places {
        layers: vec![crate::layers::places::LayerPlaces {
            mixer: Some(TierIdx::FIRST),
            ..Default::default()
        }],
        ..Places::default()
    };
    let (context, rows) = (x.len() / hidden, batches.iter().copied().max().unwrap());
    let most = Most {
        batch: context,
        rows,
        context,
        positions: context,
    };
    let sizes = BufferSizes::new(&spec, &places, TierIdx::FIRST, most);
    let mut rotations = super::layers::rope::Rotations::new(&spec, &weights, context);
    // The state of the text is not the first one.
    let (state, pages) = (1, mixed_pages(context));
    let cache = DeviceCache::new(&device, &spec.layers[0], kv_type, context, 2).unwrap();
    let kept = KeptByLayers {
        caches: &[LayerCache::OnGpu(cache)],
        ropes: &rotations.of_layer,
        tables: &rotations.tables,
    };
    let gpu = GpuSpec {
        spec: &spec,
        weights: &weights,
        places: &places,
        tier: TierIdx::FIRST,
        kept,
        most,
        sizes: &sizes,
    };
    let mut gpu = Gpu::new(&device, &gpu).unwrap();
    let (mut past, mut out) = (0, Vec::new());
    for &n in batches {
        let Gpu { layers, work, .. } = &mut gpu;
        let segment = Segment {
            rows: 0..n,
            past,
            pages: &pages,
            state,
            checkpoints: Vec::new(),
        };
        let segments = [segment];
        work.prepare(&segments, &mut rotations.tables).unwrap();
        work.buffers
            .answer
            .view()
            .write_f32(&x[past * hidden..][..n * hidden])
            .unwrap();
        let mixer = &layers[0].mixer.as_ref().unwrap().mixer;
        if mixer.takes_quants() {
            work.ops
                .quantize(
                    work.buffers.answer.view(),
                    n,
                    hidden,
                    &mut work.buffers.quants,
                )
                .unwrap();
        }
        mixer
            .run(
                &work.ops,
                &mut work.buffers,
                mixer::MixerBatch {
                    n,
                    first_row: 0,
                    eps,
                    segments: &segments,
                },
            )
            .unwrap();
        out.extend(
            work.buffers
                .out
                .view()
                .floats(0..n * hidden)
                .to_f32()
                .unwrap(),
        );
        past += n;
    }
    out
}
