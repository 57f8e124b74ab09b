//! What holds the bytes of each tier: arenas, the mapped file, files that are read, or a GPU.

use crate::error::LoadError;
use crate::experts::copies::ExpertFiles;
use crate::experts::layer::{LayerExperts, Layout};
use crate::options::LoadOptions;
use crate::tiers::arena::Arena;
use crate::tiers::file::{DriveFiles, FileTier, ReadMode};
use crate::tiers::nodes::{Pages, node_of};
use crate::tiers::shards::Shards;
use std::path::PathBuf;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::machine::{Tier, TierKind};
use tier_plan_formats::placement::{PerTier, Placement, PlanTier, TierIdx};

/// What holds the bytes of a tier.
pub(super) enum Storage {
    /// Memory that this program owns, in one piece, so that what pins and buffers give back can be
    /// used for either: buffers for experts that come and go, pinned experts, and dense weights.
    Arena {
        buffers: Arena,
        pins: Arena,
        dense: Arena,
    },
    /// The mapped file, read in place.
    Mapped,
    /// The file, read into slots and staging.
    File,
    /// A GPU's memory.
    Gpu,
}

/// Returns whether a tier's bytes can be read where the system maps the file.
pub(super) fn is_mapped(tier: &Tier) -> bool {
    matches!(tier.kind, TierKind::Dram | TierKind::Pmem | TierKind::Cxl)
}

/// Takes the memory of every tier.
///
/// # Errors
/// When there is not enough.
pub(super) fn reserve(
    plan: &Placement,
    padding_bytes: &PerTier<u64>,
    shards: Option<&Shards>,
) -> Result<PerTier<Storage>, LoadError> {
    let slow = plan.home_tier();
    let storage = |(i, t): (TierIdx, &PlanTier)| {
        let shards = shards.filter(|_| node_of(&t.tier).is_none());
        let pages = shards.map_or_else(|| Pages::of_tier(&t.tier), Shards::pages);
        Ok(match t.tier.kind {
            TierKind::Nvme if i == slow => Storage::File,
            _ if t.uses_gpu() => Storage::Gpu,
            _ if i == slow && is_mapped(&t.tier) => Storage::Mapped,
            _ => {
                let buffers = t.bytes.slots + t.bytes.staging + padding_bytes[i];
                let (pins, dense) = (t.bytes.pinned, t.bytes.dense);
                // Buffers come first: they begin at a page where whole pages are read.
                let all = Arena::on(&t.tier.name, buffers + pins + dense, &pages)?;
                if let Some(shards) = shards {
                    shards.watch(all.start(), all.capacity());
                }
                let (buffers, rest) = all.split(buffers);
                let (pins, dense) = rest.split(pins);
                Storage::Arena {
                    buffers,
                    pins,
                    dense,
                }
            }
        })
    };
    plan.tiers.enumerate().map(storage).collect()
}

/// Returns the copies on other drives that reads from the last tier are shared with: none where that is
/// emulated, since its own rate is declared.
pub(super) fn copies<'a>(slow: &Tier, options: &'a LoadOptions) -> &'a [ExpertFiles] {
    if slow.is_drive() {
        &options.copies
    } else {
        &[]
    }
}

/// Returns the part of the last tier's rate that copies leave to the model's own drive.
fn own_share(options: &LoadOptions) -> f64 {
    let shares: f64 = options.copies.iter().map(ExpertFiles::share).sum();
    (1.0 - shares).clamp(f64::EPSILON, 1.0)
}

/// The files of a model.
pub(super) struct Files {
    /// Absent where nothing is read: all bytes are in place in the mapped file.
    pub(super) tier: Option<FileTier>,
    pub(super) mode: ReadMode,
}

impl Files {
    /// Opens the model's files, and the copy of its experts if there is one, where the plan reads
    /// any.
    ///
    /// # Errors
    /// When a file can't be opened.
    pub(super) fn open(
        gguf: &Gguf,
        plan: &Placement,
        options: &LoadOptions,
    ) -> Result<Self, LoadError> {
        let slow = &plan.tiers[plan.home_tier()].tier;
        // An emulated device, and what stands for memory, are read through the page cache.
        let is_device = slow.kind == TierKind::Nvme && !slow.emulated;
        let mode = if is_device {
            ReadMode::from_env_or(plan.reads.io)?
        } else {
            ReadMode::Cached
        };
        if plan.tiers.len() == 1 && is_mapped(slow) {
            return Ok(Self { tier: None, mode });
        }
        let mut paths: Vec<PathBuf> = (0..gguf.n_parts())
            .map(|part| gguf.part_path(part).to_path_buf())
            .collect();
        let pack = options
            .pack
            .as_ref()
            .filter(|_| slow.kind == TierKind::Nvme);
        paths.extend(pack.map(|pack| pack.path().to_path_buf()));
        let mut drives = vec![DriveFiles {
            paths,
            mode,
            read_gbps: slow.read_gbps * own_share(options),
        }];
        // The mode was measured on the model's own drive.
        let mode_of_copies = ReadMode::from_env_or(None)?;
        drives.extend(copies(slow, options).iter().map(|copy| DriveFiles {
            paths: copy.paths(),
            mode: mode_of_copies,
            read_gbps: slow.read_gbps * copy.share(),
        }));
        Ok(Self {
            tier: Some(FileTier::open_on(&drives)?),
            mode,
        })
    }

    /// Returns whether files are read with direct I/O, past the page cache.
    pub(super) fn are_direct(&self) -> bool {
        self.tier.as_ref().is_some_and(FileTier::is_direct)
    }
}

/// Returns how slots and staging hold experts, and the bytes by tier that they take beyond the
/// plan.
///
/// They hold whole pages where files are read with direct I/O and every tier's budget has the bytes
/// left.
pub(super) fn layout(
    plan: &Placement,
    layers: &[LayerExperts],
    direct: bool,
) -> (Layout, PerTier<u64>) {
    let none = PerTier::from_fn(plan.tiers.len(), |_| 0);
    let mut padding = none.clone();
    let staging = largest(layers, Layout::WholePages) - largest(layers, Layout::Packed);
    padding[plan.staging_tier] += u64::from(plan.staging_experts) * staging as u64;
    for (placed, layer) in plan.layers.iter().zip(layers) {
        // A GPU's slots are filled from staging, with nothing around an expert.
        if plan
            .tiers
            .get(placed.slot_tier)
            .is_some_and(PlanTier::uses_gpu)
        {
            continue;
        }
        let per_slot = layer.buffer_bytes(Layout::WholePages) - layer.buffer_bytes(Layout::Packed);
        padding[placed.slot_tier] += u64::from(placed.slots) * per_slot as u64;
    }
    let left = |t: &PlanTier| t.budget_bytes.saturating_sub(t.used_bytes());
    let fits = plan
        .tiers
        .iter()
        .zip(&padding)
        .all(|(t, bytes)| *bytes <= left(t));
    if direct && fits {
        (Layout::WholePages, padding)
    } else {
        (Layout::Packed, none)
    }
}

/// Returns the bytes of a buffer for any expert of the model.
pub(super) fn largest(layers: &[LayerExperts], layout: Layout) -> usize {
    layers
        .iter()
        .map(|layer| layer.buffer_bytes(layout))
        .max()
        .unwrap_or(0)
}
