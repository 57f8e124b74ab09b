//! Plans that are kept between starts, and those that are solved for want of one.

use super::machine;
use super::place::{DIGITS, Place};
use super::uses::Uses;
use super::words;
use crate::budget::{self, Basis, Model};
use crate::print::digits;
use crate::printable::printable;
use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use std::time::Instant;
use tier_plan_runtime::formats::placement::{self, Placement, validate};
use tier_plan_runtime::formats::{SourceId, safely};
use tier_plan_runtime::model::kv::{CacheRoom, KvType};
use tier_plan_runtime::units::show_bytes;

/// Version of [`About`].
const VERSION: u32 = 1;

/// What is kept beside a plan.
#[derive(Debug, Serialize, Deserialize)]
struct About {
    version: u32,
    made: String,
    advice: String,
}

/// What a plan is wanted for.
pub(super) struct Wanted<'a> {
    pub model: Model<'a>,
    pub found: &'a machine::Found,
    pub uses: &'a Uses,
    pub room: CacheRoom,
    pub kv_type: KvType,
    /// Bytes of main memory for what plans count.
    pub left: u64,
    /// Bytes of memory with which all would fit.
    pub missing: u64,
}

/// A plan, and where it is from.
pub(super) struct Planned {
    pub plan: Placement,
    pub path: Option<PathBuf>,
    pub advice: String,
    pub from: String,
    pub is_new: bool,
}

impl Wanted<'_> {
    /// Returns the plan of an earlier start, or solves for one.
    ///
    /// # Errors
    /// When there is none that fits.
    pub fn kept_or_solved(&self, place: &Place, notes: &mut Vec<String>) -> Result<Planned> {
        let name = self.name();
        let paths = place.found(&format!("{name}.toml"));
        if let Some(path) = paths {
            match self.kept(&path) {
                Ok(planned) => {
                    place.used(&path);
                    return Ok(planned);
                }
                Err(error) => notes.push(format!(
                    "note: the plan is solved again: {}",
                    printable(&format!("{error:#}"))
                )),
            }
        }
        self.solved(place, &name, notes)
    }

    /// Returns the name of the plan's files, which differs where anything differs that it rests on.
    fn name(&self) -> String {
        let profile = self.uses.profile.as_ref();
        let text = format!(
            "{} {} {:?} {} {} {}",
            env!("CARGO_PKG_VERSION"),
            self.found.machine.id.hash,
            profile.map(|profile| &profile.id.hash),
            show_room(self.room),
            self.kv_type,
            self.left
        );
        let hash = SourceId::of_bytes("", text.as_bytes()).hash;
        format!("plan-{}", &hash[..DIGITS.min(hash.len())])
    }

    /// Reads a plan that an earlier start made.
    fn kept(&self, path: &Path) -> Result<Planned> {
        let plan = placement::read(path)?;
        let shape = self.model.shape;
        plan.check_model(&shape.id, path)?;
        let shown = path.display();
        let wrong = validate(&plan, shape);
        ensure!(
            wrong.is_empty() && plan.context == self.room.context,
            "{shown}: the plan does not hold for the model"
        );
        let memory = plan.tiers.iter().filter(|tier| !tier.tier.is_gpu());
        let memory = memory.clone().take(memory.count().saturating_sub(1));
        let used = memory
            .map(|tier| tier.used_bytes())
            .fold(0, u64::saturating_add);
        ensure!(
            used <= self.left,
            "{shown}: it takes {} of memory, expected at most {}",
            show_bytes(used),
            show_bytes(self.left)
        );
        let beside = path.with_extension("json");
        let named = || beside.display().to_string();
        let text = std::fs::read_to_string(&beside).with_context(named)?;
        let about: About = serde_json::from_str(&text).with_context(named)?;
        ensure!(
            about.version == VERSION,
            "{}: version {}, expected {VERSION}",
            beside.display(),
            about.version
        );
        Ok(Planned {
            plan,
            path: Some(path.to_path_buf()),
            advice: printable(&about.advice).into_owned(),
            from: format!("the plan of {}", printable(&about.made)),
            is_new: false,
        })
    }

    /// Solves, and keeps the plan.
    fn solved(&self, place: &Place, name: &str, notes: &mut Vec<String>) -> Result<Planned> {
        let started = Instant::now();
        let shape = self.model.shape;
        eprintln!("auto: solving for a plan, for at most some 10 seconds");
        let basis = Basis {
            machine: &self.found.machine,
            profile: self.uses.profile.as_ref(),
            evidence: &self.uses.evidence,
        };
        let plan = budget::solved(self.model, &basis, self.room, self.kv_type, self.left)?;
        let advice = words::advice(&plan, shape, &self.uses.evidence, self.missing);
        let about = About {
            version: VERSION,
            made: machine::today(),
            advice,
        };
        let path = self.keep(place, name, &plan, &about, notes);
        place.tidy();
        Ok(Planned {
            plan,
            path,
            advice: about.advice,
            from: format!(
                "a plan solved just now in {} s",
                digits(started.elapsed().as_secs_f64())
            ),
            is_new: true,
        })
    }

    fn keep(
        &self,
        place: &Place,
        name: &str,
        plan: &Placement,
        about: &About,
        notes: &mut Vec<String>,
    ) -> Option<PathBuf> {
        let text = serde_json::to_string_pretty(about).ok()?;
        place.keep(&format!("{name}.toml"), notes, |path| {
            safely::write_together(&[
                (path.with_extension("json"), text.into_bytes()),
                (path.to_path_buf(), plan.encode().into_bytes()),
            ])
        })
    }
}

fn show_room(room: CacheRoom) -> String {
    format!("{} {} {}", room.context, room.sequences, room.checkpoints)
}
