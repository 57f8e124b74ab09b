//! Loading a model as a plan says: checks the plan, reserves the tiers' memory, fills it, and
//! counts.

pub(crate) mod bands;
mod check;
mod dense;
mod experts;
mod storage;
mod to_gpu;

use crate::error::LoadError;
use crate::experts::layer::Layout;
use crate::experts::store::ExpertStore;
use crate::gpu::devices::{Devices, GiveDevice};
use crate::gpu::{fits, parts};
use crate::layers::weights::DenseWeights;
use crate::options::{LoadOptions, Progress};
use crate::tiers::arena::ArenaSlice;
use crate::tiers::file::{BandsInBuffer, Extent, Finish, Span};
use storage::{Files, Storage};
use tier_plan_cuda::experts::PinnedExperts;
use tier_plan_formats::gguf::Advice;
use tier_plan_formats::model::Model;
use tier_plan_formats::model::spec::TensorId;
use tier_plan_formats::placement::{PerTier, Placement, TierIdx};
use tier_plan_kernels::{Kernels, RowOrder};

/// A model whose tensors are where the plan puts them.
pub(crate) struct Loaded {
    pub weights: DenseWeights,
    pub experts: ExpertStore,
    pub devices: Devices,
    pub memory: MemoryUse,
}

/// Bytes by tier.
pub(crate) struct MemoryUse {
    /// What the plan counts. KV cache and recurrent states come with the engine.
    pub resident_bytes: PerTier<u64>,
    /// What slots and staging take beyond the plan to hold whole pages.
    pub padding_bytes: PerTier<u64>,
}

/// Loads a model. Nothing is allocated before the whole plan has been checked.
///
/// # Errors
/// When the plan does not fit the model or the machine; when memory, a file or a GPU fails.
pub(crate) fn load(
    model: &Model,
    plan: &Placement,
    options: &LoadOptions,
    give: Option<GiveDevice<'_>>,
    kernels: Kernels,
    progress: Progress<'_>,
) -> Result<Loaded, LoadError> {
    check::plan(model.shape(), plan)?;
    parts::check(model.shape(), plan)?;
    check::context_fits(model.shape(), plan)?;
    check::memory_nodes(plan)?;
    let devices = Devices::open(plan, give)?;
    fits::check(model.spec(), plan, options, &devices)?;

    let gpu_experts = to_gpu::open(plan, &devices)?;
    let files = Files::open(model.gguf(), plan, options)?;
    let layers = experts::layers(model, plan, options, kernels);
    let (layout, padding_bytes) = storage::layout(plan, &layers, files.are_direct());
    let storage = storage::reserve(plan, &padding_bytes, options.shards.as_deref())?;
    if !storage.iter().any(|s| matches!(s, Storage::Mapped)) {
        // Little of the mapping is looked at from here on; readahead around that would only take up
        // memory.
        model.gguf().advise_all(Advice::Random);
    }

    let total = bytes_to_load(plan, options, &storage);
    let memory = MemoryUse {
        resident_bytes: PerTier::from_fn(plan.tiers.len(), |_| 0),
        padding_bytes,
    };
    let progress = LoadProgress {
        done: 0,
        total,
        report: progress,
    };
    let mut loader = Loader {
        model,
        plan,
        options,
        kernels,
        devices,
        gpu_experts,
        files,
        storage,
        layout,
        memory,
        progress,
    };
    let weights = loader.dense()?;
    let experts = loader.experts(layers)?;
    let Loader {
        devices, memory, ..
    } = loader;
    Ok(Loaded {
        weights,
        experts,
        devices,
        memory,
    })
}

/// Returns the bytes that are copied while loading, and those that are compared with their
/// checksums in place.
fn bytes_to_load(plan: &Placement, options: &LoadOptions, storage: &PerTier<Storage>) -> u64 {
    let copied: u64 = plan
        .tiers
        .iter()
        .map(|t| t.bytes.dense + t.bytes.pinned)
        .sum();
    match (plan.tiers.last(), storage.last()) {
        (Some(slow), Some(Storage::Mapped)) if options.checks.is_some() => copied + slow.bytes.home,
        _ => copied,
    }
}

/// A model that is being loaded.
struct Loader<'a> {
    model: &'a Model,
    plan: &'a Placement,
    options: &'a LoadOptions,
    kernels: Kernels,
    devices: Devices,
    /// Experts in a GPU's memory.
    gpu_experts: PerTier<Option<PinnedExperts>>,
    files: Files,
    storage: PerTier<Storage>,
    /// How slots and staging hold experts.
    layout: Layout,
    memory: MemoryUse,
    progress: LoadProgress<'a>,
}

/// How far loading is.
struct LoadProgress<'a> {
    /// Bytes in place.
    done: u64,
    /// Bytes.
    total: u64,
    report: Progress<'a>,
}

impl LoadProgress<'_> {
    /// Counts bytes that are in place.
    fn add(&mut self, bytes: u64) {
        self.done += bytes;
        (self.report)(self.done, self.total);
    }
}

impl Loader<'_> {
    /// Returns the last tier, which experts are read from.
    fn slow_tier(&self) -> TierIdx {
        self.plan.home_tier()
    }

    /// Fills a buffer from the files.
    fn read(
        &self,
        spans: &[Span],
        finish: Finish,
        into: ArenaSlice,
    ) -> Result<ArenaSlice, LoadError> {
        match &self.files.tier {
            Some(files) => Ok(files.read_finished(spans, finish, into)?),
            None => unreachable!("files are open wherever a tier has an arena"),
        }
    }

    /// Reads a tensor as the only content of a buffer, with its rows in this order.
    fn whole_tensor(
        &self,
        id: TensorId,
        order: RowOrder,
        into: ArenaSlice,
    ) -> Result<ArenaSlice, LoadError> {
        let gguf = self.model.gguf();
        let tensor = &gguf.tensors()[id];
        let extent = Extent {
            part: tensor.part,
            offset: tensor.offset,
            len: tensor.n_bytes as usize,
        };
        let check = self
            .options
            .checks
            .as_ref()
            .map(|checks| checks.slice(gguf, id, 0, 0, extent));
        let bands = match order {
            RowOrder::Sequential => Vec::new(),
            RowOrder::Interleaved => vec![BandsInBuffer {
                kernels: self.kernels,
                ty: tensor.ty,
                range: 0..extent.len,
                row_bytes: extent.len / tensor.rows().max(1) as usize,
            }],
        };
        self.read(
            &[Span {
                extent,
                at: 0,
                whole_pages: false,
            }],
            Finish {
                checks: check.into_iter().collect(),
                bands,
            },
            into,
        )
    }

    /// Returns a tensor's bytes where they are mapped, compared with their checksums where there
    /// are some.
    fn mapped_tensor(&self, id: TensorId) -> Result<&[u8], LoadError> {
        let gguf = self.model.gguf();
        let bytes = gguf.bytes(&gguf.tensors()[id]);
        if let Some(checks) = &self.options.checks {
            checks.tensor(gguf, id, bytes)?;
        }
        Ok(bytes)
    }
}
