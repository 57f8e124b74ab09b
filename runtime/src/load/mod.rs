//! Loads a model as a plan says: checks the plan against the file, makes one arena a tier, fills it, and counts.

mod check;
mod to_gpu;

use crate::error::LoadError;
use crate::experts::layer::{Home, LayerExperts, Layout};
use crate::experts::store::ExpertStore;
use crate::gpu::devices::{Devices, GiveDevice};
use crate::gpu::{fits, parts};
use crate::layers::weights::{DenseWeights, Held};
use crate::options::{LoadOptions, Progress};
use crate::tiers::arena::{Arena, Piece};
use crate::tiers::file::{Check, Extent, FileTier, ReadMode, Span};
use crate::tiers::nodes::Pages;
use std::collections::{HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use tier_plan_cuda::experts::PinnedExperts;
use tier_plan_cuda::{Buffer, Device};
use tier_plan_formats::gguf::{Advice, Gguf};
use tier_plan_formats::machine::{Medium, Tier};
use tier_plan_formats::model::shape::{DenseKind, ModelShape};
use tier_plan_formats::model::spec::{ModelSpec, MoeSpec, TensorId};
use tier_plan_formats::placement::{LayerPlacement, Pins, Placement, PlanTier};
use tier_plan_kernels::quant::{TensorType, dequantize_row};
use tier_plan_kernels::threads::physical_cores;

/// What loading made.
pub(crate) struct Loaded {
    pub weights: DenseWeights,
    pub experts: ExpertStore,
    /// The GPUs of the plan, by tier.
    pub devices: Devices,
    /// Bytes counted in each tier, key and value cache not included.
    pub resident_bytes: Vec<u64>,
    /// Bytes beyond those in each tier, so that slots and staging have room for whole pages.
    pub padding_bytes: Vec<u64>,
    pub embedding_tier: usize,
    pub head_tier: usize,
    /// By layer: bytes by tier that the dense stage reads.
    pub dense_bytes: Vec<Vec<u64>>,
}

/// How a tier holds bytes.
enum Backing {
    /// Copied into memory that this program owns: weights for good, packed; and buffers, whose bytes come and go.
    Arena { weights: Arena, buffers: Arena },
    /// Read in place from the mapped file.
    Mapped,
    /// Read from the file into slots and staging.
    File,
    /// Copied to a GPU.
    Gpu,
}

struct Loader<'a> {
    gguf: &'a Arc<Gguf>,
    spec: &'a ModelSpec,
    plan: &'a Placement,
    options: &'a LoadOptions,
    backings: Vec<Backing>,
    files: Option<FileTier>,
    mode: ReadMode,
    layout: Layout,
    resident: Vec<u64>,
    padding: Vec<u64>,
    done: u64,
    total: u64,
    devices: Devices,
    /// Experts on GPUs, by tier.
    gpus: Vec<Option<PinnedExperts>>,
}

/// Loads. Nothing is allocated before the whole plan has been checked.
pub(crate) fn load(
    gguf: &Arc<Gguf>,
    spec: &ModelSpec,
    shape: &ModelShape,
    plan: &Placement,
    options: &LoadOptions,
    give: Option<GiveDevice<'_>>,
    progress: Progress<'_>,
) -> Result<Loaded, LoadError> {
    check::plan(shape, plan)?;
    parts::check(gguf, spec, plan)?;
    check::context_fits(shape, plan)?;
    check::memory_nodes(plan)?;
    let devices = Devices::open(plan, give)?;
    fits::check(spec, plan, options, &devices)?;
    let gpus = to_gpu::open(plan, &devices)?;
    let slow = plan.tiers.len() - 1;
    // What only stands for a slow device, or for memory, is read as fast as it goes.
    let mode = if plan.tiers[slow].tier.is_drive() { ReadMode::from_env()? } else { ReadMode::Cached };
    let mapped = |t: &Tier| t.medium() == Medium::Addressable;
    let reads_files = slow > 0 || !mapped(&plan.tiers[slow].tier);
    let mut paths: Vec<PathBuf> = (0..gguf.n_parts()).map(|p| gguf.part_path(p).to_path_buf()).collect();
    let pack = options.pack.as_ref().filter(|_| plan.tiers[slow].tier.medium() == Medium::Drive);
    paths.extend(pack.map(|pack| pack.path().to_path_buf()));
    let files = if reads_files { Some(FileTier::open(&paths, mode)?) } else { None };
    let layers: Vec<LayerExperts> = plan
        .layers
        .iter()
        .zip(spec.moe_layers())
        .map(|(placed, (_, moe))| {
            let homes = homes(placed, moe, mapped(&plan.tiers[slow].tier));
            let mut layer = LayerExperts::new(gguf, moe, homes, placed.slot_tier);
            if let Some(places) = pack.and_then(|pack| pack.places(placed.layer)) {
                let pinned: HashSet<u32> = placed.pinned.iter().flat_map(|pins| &pins.experts).copied().collect();
                layer.use_copy(gguf.n_parts(), places, |expert| !pinned.contains(&(expert as u32)));
            }
            layer
        })
        .collect();
    let (layout, padding) = layout(plan, &layers, files.as_ref().is_some_and(FileTier::is_direct));
    let mut backings = Vec::new();
    for (i, t) in plan.tiers.iter().enumerate() {
        let pages = Pages::of_tier(&t.tier);
        backings.push(match t.tier.medium() {
            Medium::Drive if i == slow => Backing::File,
            _ if t.uses_gpu() => Backing::Gpu,
            _ if i == slow && mapped(&t.tier) => Backing::Mapped,
            _ => Backing::Arena {
                weights: Arena::on(&t.tier.name, t.bytes.dense + t.bytes.pinned, &pages)?,
                buffers: Arena::on(&t.tier.name, t.bytes.slots + t.bytes.staging + padding[i], &pages)?,
            },
        });
    }
    if !backings.iter().any(|b| matches!(b, Backing::Mapped)) {
        // Little of the mapping is looked at from here on; what lies around that would only take up memory.
        gguf.advise_all(Advice::Random);
    }
    let mut total = plan.tiers.iter().map(|t| t.bytes.dense + t.bytes.pinned).sum();
    if options.checks.is_some() && matches!(backings[slow], Backing::Mapped) {
        total += plan.tiers[slow].bytes.home;
    }
    let resident = vec![0; plan.tiers.len()];
    let mut loader = Loader {
        gguf,
        spec,
        plan,
        options,
        backings,
        files,
        mode,
        layout,
        resident,
        padding,
        done: 0,
        total,
        devices,
        gpus,
    };
    let tiers: HashMap<(DenseKind, Option<u32>), usize> =
        plan.dense.iter().map(|d| ((d.kind, d.layer), d.tier)).collect();
    let weights = loader.dense(&tiers, progress)?;
    let experts = loader.experts(layers, progress)?;
    let mut dense_bytes = vec![vec![0; plan.tiers.len()]; spec.layers.len()];
    for group in &shape.dense {
        if let Some(layer) = group.layer {
            dense_bytes[layer as usize][tiers[&(group.kind, group.layer)]] += group.token_bytes;
        }
    }
    let head_tier = tiers[&(DenseKind::Head, None)];
    let embedding_tier = tiers.get(&(DenseKind::Embedding, None)).copied().unwrap_or(head_tier);
    let Loader { resident: resident_bytes, padding: padding_bytes, devices, .. } = loader;
    Ok(Loaded { weights, experts, devices, resident_bytes, padding_bytes, embedding_tier, head_tier, dense_bytes })
}

/// Where each expert of a layer is before any is pinned.
fn homes(placed: &LayerPlacement, moe: &MoeSpec, mapped: bool) -> Vec<Home> {
    let pooled = |_| if mapped && placed.slots == 0 { Home::Mapped } else { Home::Pooled };
    (0..moe.n_expert).map(pooled).collect()
}

/// How slots and staging hold experts, and what that takes beyond the plan in each tier: room for whole pages where
/// files are read past the page cache and every tier's budget has the bytes left.
fn layout(plan: &Placement, layers: &[LayerExperts], direct: bool) -> (Layout, Vec<u64>) {
    let none = (Layout::Packed, vec![0; plan.tiers.len()]);
    let (packed, paged) = (largest(layers, Layout::Packed), largest(layers, Layout::WholePages));
    let mut padding = none.1.clone();
    padding[plan.staging_tier] += u64::from(plan.staging_experts) * (paged - packed) as u64;
    for (placed, layer) in plan.layers.iter().zip(layers) {
        // A GPU's slots are filled from staging, with nothing around an expert.
        if plan.tiers.get(placed.slot_tier).is_some_and(PlanTier::uses_gpu) {
            continue;
        }
        let more = layer.buffer_bytes(Layout::WholePages) - layer.buffer_bytes(Layout::Packed);
        padding[placed.slot_tier] += u64::from(placed.slots) * more as u64;
    }
    let fits = plan.tiers.iter().zip(&padding).all(|(t, more)| *more <= t.budget_bytes.saturating_sub(t.used_bytes()));
    if direct && fits { (Layout::WholePages, padding) } else { none }
}

/// Bytes of a buffer for any expert of the model.
fn largest(layers: &[LayerExperts], layout: Layout) -> usize {
    layers.iter().map(|layer| layer.buffer_bytes(layout)).max().unwrap_or(0)
}

impl Loader<'_> {
    /// Fills a buffer from the files.
    fn read(&self, spans: &[Span], checks: Vec<Check>, into: Piece) -> Result<Piece, LoadError> {
        match &self.files {
            Some(files) => Ok(files.read_checked(spans, checks, into)?),
            None => unreachable!("files are open wherever a tier has an arena"),
        }
    }

    /// Reads a tensor as the only content of a buffer.
    fn whole_tensor(&self, id: TensorId, into: Piece) -> Result<Piece, LoadError> {
        let tensor = &self.gguf.tensors()[id];
        let extent = Extent { part: tensor.part, offset: tensor.offset, len: tensor.n_bytes as usize };
        let check = self.options.checks.as_ref().map(|checks| checks.slice(self.gguf, id, 0, 0, extent));
        self.read(&[Span { extent, at: 0, whole_pages: false }], check.into_iter().collect(), into)
    }

    /// A tensor's bytes where they are mapped.
    fn mapped_tensor(&self, id: TensorId) -> Result<&[u8], LoadError> {
        let bytes = self.gguf.bytes(&self.gguf.tensors()[id]);
        if let Some(checks) = &self.options.checks {
            checks.tensor(self.gguf, id, bytes)?;
        }
        Ok(bytes)
    }

    fn dense(
        &mut self,
        tiers: &HashMap<(DenseKind, Option<u32>), usize>,
        progress: Progress<'_>,
    ) -> Result<DenseWeights, LoadError> {
        let mut weights = DenseWeights::new(Arc::clone(self.gguf));
        let matrices = self.spec.matrices();
        for group in self.spec.dense_groups() {
            let tier = tiers[&(group.kind, group.layer)];
            for id in group.tensors {
                let n_bytes = self.gguf.tensors()[id].n_bytes;
                let held = if !matrices.contains(&id) {
                    Held::Vector(self.vector(id)?)
                } else if let Some(device) = self.devices.of(tier) {
                    Held::Device(Arc::new(self.to_device(id, device)?))
                } else if let Backing::Arena { weights, .. } = &mut self.backings[tier] {
                    let piece = weights.take(n_bytes as usize)?;
                    Held::Piece(self.whole_tensor(id, piece)?)
                } else {
                    if self.options.checks.is_some() {
                        self.mapped_tensor(id)?;
                    }
                    Held::Mapped
                };
                weights.hold(id, tier, held);
                self.done += n_bytes;
                progress(self.done, self.total);
            }
        }
        for (_, tier, bytes) in weights.placed() {
            self.resident[tier] += bytes;
        }
        Ok(weights)
    }

    /// Copies a tensor to a GPU, by way of main memory.
    fn to_device(&self, id: TensorId, device: &Arc<dyn Device>) -> Result<Buffer, LoadError> {
        let n_bytes = self.gguf.tensors()[id].n_bytes;
        let copied = if self.mode == ReadMode::Cached {
            Buffer::of_bytes(device, self.mapped_tensor(id)?)
        } else {
            let piece = Arena::new("", n_bytes)?.take(n_bytes as usize)?;
            Buffer::of_bytes(device, &self.whole_tensor(id, piece)?)
        };
        copied.map_err(|source| LoadError::Gpu { plan: self.plan.name.clone(), source })
    }

    fn vector(&self, id: TensorId) -> Result<Box<[f32]>, LoadError> {
        let tensor = &self.gguf.tensors()[id];
        let n = tensor.n_bytes as usize / tensor.ty.block_bytes();
        debug_assert!(matches!(tensor.ty, TensorType::F32 | TensorType::F16 | TensorType::BF16));
        let mut values = vec![0.0; n].into_boxed_slice();
        if self.mode == ReadMode::Cached {
            dequantize_row(tensor.ty, self.mapped_tensor(id)?, &mut values);
        } else {
            let piece = Arena::new("", tensor.n_bytes)?.take(tensor.n_bytes as usize)?;
            dequantize_row(tensor.ty, &self.whole_tensor(id, piece)?, &mut values);
        }
        Ok(values)
    }

    fn experts(&mut self, mut layers: Vec<LayerExperts>, progress: Progress<'_>) -> Result<ExpertStore, LoadError> {
        let plan = self.plan;
        let slow = plan.tiers.len() - 1;
        let moes: Vec<&MoeSpec> = self.spec.moe_layers().map(|(_, moe)| moe).collect();
        for (at, (placed, layer)) in plan.layers.iter().zip(&mut layers).enumerate() {
            self.layer((at, moes[at]), placed, layer, progress)?;
        }
        let (packed, room) = (largest(&layers, Layout::Packed), largest(&layers, self.layout));
        let mut staging = Vec::new();
        if matches!(self.backings[slow], Backing::File) {
            for _ in 0..plan.staging_experts {
                staging.push(self.buffer(plan.staging_tier, packed, room)?);
            }
        }
        let files = self.files.take();
        // An emulated device takes the declared time, and what stands for memory needs no reading ahead.
        let looks_ahead = self.mode != ReadMode::Cached;
        let mut store =
            ExpertStore::new(Arc::clone(self.gguf), layers, files, staging, plan.staging_tier, slow, looks_ahead);
        if let Some(checks) = &self.options.checks {
            if matches!(self.backings[slow], Backing::Mapped) {
                let threads = self.options.threads.unwrap_or_else(physical_cores);
                let (done, total) = (self.done, self.total);
                let mut more = 0;
                checks.mapped(self.gguf, &store.in_place(), threads, &mut |bytes| {
                    more += bytes;
                    progress((done + more).min(total), total);
                })?;
            }
            store.verify(Arc::clone(checks));
        }
        store.set_gpus(self.ready_gpus()?);
        Ok(store)
    }

    fn layer(
        &mut self,
        at: (usize, &MoeSpec),
        placed: &LayerPlacement,
        layer: &mut LayerExperts,
        progress: Progress<'_>,
    ) -> Result<(), LoadError> {
        let slow = self.plan.tiers.len() - 1;
        let bytes = layer.expert_bytes;
        let mut n_pinned = 0;
        for tier in 0..self.plan.tiers.len() {
            if matches!(self.backings[tier], Backing::Gpu) {
                self.experts_on_gpu(at, placed, layer, tier)?;
                progress(self.done, self.total);
            }
        }
        for Pins { tier, experts } in &placed.pinned {
            if matches!(self.backings[*tier], Backing::Gpu) {
                n_pinned += experts.len();
                continue;
            }
            for expert in experts {
                self.done += bytes as u64;
                n_pinned += 1;
                progress(self.done, self.total);
                self.resident[*tier] += bytes as u64;
                let piece = match &mut self.backings[*tier] {
                    Backing::Arena { weights, .. } => weights.take(bytes)?,
                    // The only tier of its plan: pinned or not, an expert computes where it is mapped.
                    Backing::Mapped => continue,
                    Backing::File | Backing::Gpu => unreachable!("a checked plan pins nothing to files"),
                };
                let spans = layer.spans(self.gguf, *expert as usize, Layout::Packed);
                let checks = layer.checks(self.gguf, self.options.checks.as_deref(), *expert as usize, Layout::Packed);
                layer.pin(*expert as usize, *tier, self.read(&spans, checks, piece)?);
            }
        }
        self.resident[slow] += (layer.n_expert() - n_pinned) as u64 * bytes as u64;
        if placed.slots > 0 && matches!(self.backings[placed.slot_tier], Backing::Gpu) {
            layer.set_slots_on_gpu(placed.slots, self.layout, placed.policy);
            return Ok(());
        }
        let room = layer.buffer_bytes(self.layout);
        let slots = (0..placed.slots).map(|_| self.buffer(placed.slot_tier, bytes, room)).collect::<Result<_, _>>()?;
        layer.set_slots(slots, self.layout, placed.policy);
        Ok(())
    }

    /// A buffer of `room` bytes in a tier's arena, which the plan counts as `planned`.
    fn buffer(&mut self, tier: usize, planned: usize, room: usize) -> Result<Piece, LoadError> {
        match &mut self.backings[tier] {
            Backing::Arena { buffers, .. } => {
                self.resident[tier] += planned as u64;
                Ok(buffers.take(room)?)
            }
            _ => unreachable!("a checked plan takes memory only from tiers that have an arena"),
        }
    }
}
