//! Experts that are read on demand in `run`, `bench` and chats: a packed copy of them, and slots
//! filled beforehand.

use anyhow::{Context, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;
use tier_plan_runtime::Engine;
use tier_plan_runtime::experts::copies::ExpertFiles;
use tier_plan_runtime::experts::pack::Pack;
use tier_plan_runtime::formats::machine::{Machine, TierKind};
use tier_plan_runtime::formats::placement::{ExpertCopy, Placement};
use tier_plan_runtime::formats::profile::Profile;
use tier_plan_runtime::formats::slots::{LayerSlots, Slots};
use tier_plan_runtime::formats::{profile, safely, slots};
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::spec::ModelSpec;
use tier_plan_runtime::units::{show_bytes, show_utc};

/// Returns the default path of a model's packed experts, beside the model.
pub fn default_pack(gguf: &Gguf) -> PathBuf {
    gguf.path().with_extension("experts")
}

/// Opens the packed experts that a plan reads from: the file `asked` for, or the one beside the
/// model. Returns them with a sentence about them, or `None` if the plan reads no experts from
/// files.
///
/// # Errors
/// When the file asked for is unusable. An unusable file beside the model is a warning.
pub fn pack(
    gguf: &Gguf,
    spec: &ModelSpec,
    plan: &Placement,
    asked: Option<&Path>,
) -> Result<Option<(Arc<Pack>, String)>> {
    let reads = plan
        .tiers
        .last()
        .is_some_and(|t| t.tier.kind == TierKind::Nvme && t.bytes.home > 0);
    let found = if let Some(path) = asked {
        let pack = Pack::open(gguf, spec, path)?;
        if !reads {
            eprintln!(
                "warning: --pack {}: this plan reads no experts from a file",
                path.display()
            );
        }
        Some(pack).filter(|_| reads)
    } else {
        let beside = default_pack(gguf);
        if !reads || !beside.exists() {
            return Ok(None);
        }
        Pack::open(gguf, spec, &beside)
            .map_err(|error| eprintln!("warning: {error}; it is not used"))
            .ok()
    };
    Ok(found.map(|pack| {
        let sentence = sentence(&pack);
        (Arc::new(pack), sentence)
    }))
}

/// Opens the copies of the experts that a plan names. One that is unusable is a warning, and its drive
/// gets no reads.
pub fn copies(gguf: &Gguf, spec: &ModelSpec, plan: &Placement) -> Vec<ExpertFiles> {
    let open = |copy: &ExpertCopy| {
        ExpertFiles::open(gguf, spec, Path::new(&copy.file), copy.share)
            .map_err(|error| eprintln!("warning: {error}; reads are not shared with it"))
            .ok()
    };
    plan.reads.copies.iter().filter_map(open).collect()
}

/// Leaves the copies of a machine that are not of this model out of it, with a warning, and their drives'
/// part out of the rate of its last tier.
pub fn keep_copies_of(gguf: &Gguf, spec: &ModelSpec, machine: &mut Machine) {
    let Some(drive) = machine.tiers.last_mut() else {
        return;
    };
    let Some(mut copies) = machine.extras.copies.remove(&drive.name) else {
        return;
    };
    let mut lost = 0.0;
    copies.retain(|copy| {
        let opened = ExpertFiles::open(gguf, spec, Path::new(&copy.file), copy.share);
        if let Err(error) = &opened {
            eprintln!("warning: {error}; the plan reads nothing from it");
            lost += copy.share;
        }
        opened.is_ok()
    });
    let left = 1.0 - lost;
    drive.read_gbps *= left;
    for copy in &mut copies {
        copy.share /= left;
    }
    if !copies.is_empty() {
        machine.extras.copies.insert(drive.name.clone(), copies);
    }
}

fn sentence(pack: &Pack) -> String {
    let saving = pack.saving();
    format!(
        "experts come from {}: {} of them contiguous, {} per miss instead of {} in {:.0} places",
        pack.path().display(),
        saving.experts,
        show_bytes(saving.after_bytes as u64),
        show_bytes(saving.before_bytes as u64),
        saving.stretches
    )
}

/// Returns the experts of each layer that a profile shows as used, most used first; ties go to the
/// lower index.
pub fn by_use(profile: &Profile) -> Vec<LayerSlots> {
    let counts = profile.counts(None, None, None);
    let sorted = |counts: &Vec<u64>| {
        let mut experts: Vec<u32> = (0..counts.len() as u32)
            .filter(|e| counts[*e as usize] > 0)
            .collect();
        experts.sort_by_key(|e| std::cmp::Reverse(counts[*e as usize]));
        experts
    };
    let layers = profile.layers.iter().zip(&counts);
    layers
        .map(|(layer, counts)| LayerSlots {
            layer: *layer,
            experts: sorted(counts),
        })
        .collect()
}

/// Experts to fill the slots with, and the file that keeps them when the run ends.
#[derive(Debug)]
pub struct Start {
    wanted: Vec<LayerSlots>,
    keep: Option<PathBuf>,
}

impl Start {
    /// Reads the files of `--slots` and `--warm`. Slots kept by an earlier run come first.
    ///
    /// # Errors
    /// When a file is unreadable or of another model, or the slots file is not writable.
    pub fn read(gguf: &Gguf, keep: Option<&Path>, warm: Option<&Path>) -> Result<Self> {
        let mut wanted = Vec::new();
        if let Some(path) = keep {
            safely::check_file(path).context("--slots")?;
            if path.exists() {
                let kept = slots::read(path)?;
                kept.check_model(&gguf.id(), path)?;
                wanted = kept.layers;
            }
        }
        if let Some(path) = warm {
            let profile = profile::read(path)?;
            profile.check_model(&gguf.id(), path)?;
            for used in by_use(&profile) {
                match wanted.iter_mut().find(|l| l.layer == used.layer) {
                    Some(layer) => layer.experts.extend(used.experts),
                    None => wanted.push(used),
                }
            }
        }
        Ok(Self {
            wanted,
            keep: keep.map(Path::to_path_buf),
        })
    }

    /// Starts filling the slots in the background, and returns a sentence about it.
    ///
    /// # Errors
    /// When there is no memory for a buffer.
    pub fn fill(&self, engine: &mut Engine) -> Result<Option<String>> {
        if self.wanted.is_empty() {
            return Ok(None);
        }
        let emulated = engine.plan().tiers.last().is_some_and(|t| t.tier.emulated);
        let n = engine.warm_up(&self.wanted)?;
        Ok(Some(match n {
            _ if emulated => {
                "slots begin empty: an emulated tier would fill them in no time".to_string()
            }
            0 => "slots begin empty: no listed expert has a slot under this plan".to_string(),
            n => format!("{n} slots are filled in the background, which predictions do not count"),
        }))
    }

    /// Writes the contents of the slots, if asked for.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn keep(&self, engine: &Engine) -> Result<()> {
        let Some(path) = &self.keep else {
            return Ok(());
        };
        let slots = Slots {
            model: engine.plan().model.clone(),
            when: show_utc(SystemTime::now()),
            layers: engine.slot_contents(),
        };
        Ok(slots.write(path)?)
    }
}
