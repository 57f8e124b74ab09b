//! Everything that a run of a model larger than memory needs, without being asked: measures the
//! machine once, takes the best profile there is, solves, and keeps the plan for the next start.
//!
//! What is kept lies in a folder per model below the user's state folder ([`Place`]), as files that
//! the other commands read. A model that fits memory needs none of it.

mod learn;
mod machine;
mod place;
mod uses;
mod words;

pub use learn::{Learner, MAX_CHOICES};
pub use place::Place;

use crate::budget::{self, Basis, Chosen, Decision, Fit, Model};
use crate::json::path_json;
use crate::opening::Opening;
use crate::print::digits;
use crate::printable::printable;
use anyhow::{Result, ensure};
use place::DIGITS;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::time::Instant;
use tier_plan_runtime::formats::placement::{self, Placement, validate};
use tier_plan_runtime::formats::{SourceId, safely};
use tier_plan_runtime::model::kv::{CacheRoom, KvType};
use tier_plan_runtime::plans::budget::FixedMemory;
use tier_plan_runtime::tiers::limits::memory_limit;
use tier_plan_runtime::tiers::numa::NumaPolicy;
use tier_plan_runtime::tiers::shards::Shards;
use tier_plan_runtime::units::show_bytes;
use uses::{LEARNED, Uses};

/// Version of [`About`].
const VERSION: u32 = 1;

/// Free memory is planned for in steps of a part (1/n) of the power of two above it: it is never
/// the same twice, and most starts are to find the plan of an earlier one.
const STEPS: u64 = 64;

/// What is decided without being asked, and how.
#[derive(Debug, Clone, Copy, Default)]
pub struct Auto<'a> {
    /// Machine file to plan for instead of measuring.
    pub machine: Option<&'a Path>,
    /// Whether to measure the machine, even if that was done.
    pub probe: bool,
    /// Whether to record which experts texts choose.
    pub learn: bool,
}

/// What a machine and its measurements are for.
#[derive(Clone, Copy)]
pub(crate) struct Asked<'a> {
    pub auto: Auto<'a>,
    pub model: &'a Path,
    pub threads: Option<usize>,
    pub numa: Option<NumaPolicy>,
    pub shards: Option<&'a Shards>,
}

/// What a start decided, and what that rests on.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// What lies where, and the predicted speed.
    pub decision: String,
    /// Machine, profile, and plan.
    pub basis: String,
    /// What would help most.
    pub advice: String,
    /// Predicted tokens per second while decoding, if the machine is known.
    pub predicted_tok_s: Option<f64>,
    /// Whether everything fits memory.
    pub fits: bool,
    /// Whether the machine was measured now.
    pub probed: bool,
    /// Whether the plan was solved now.
    pub solved: bool,
    /// Machine file, if there is one.
    pub machine: Option<PathBuf>,
    /// Profile that the plan was made from, if it has a file.
    pub profile: Option<PathBuf>,
    /// The plan, if it was kept.
    pub plan: Option<PathBuf>,
    /// Profile that this run's texts are to be added to.
    pub learns: Option<PathBuf>,
}

impl Report {
    /// Returns the report for programs.
    pub fn as_json(&self) -> Value {
        let path = |path: &Option<PathBuf>| path.as_ref().map(path_json);
        json!({
            "decision": self.decision,
            "basis": self.basis,
            "advice": self.advice,
            "predicted_decode_tok_s": self.predicted_tok_s,
            "fits": self.fits,
            "probed": self.probed,
            "solved": self.solved,
            "machine": path(&self.machine),
            "profile": path(&self.profile),
            "plan": path(&self.plan),
            "learns": path(&self.learns),
        })
    }
}

/// A plan, and what is to be said about it.
pub(crate) struct Decided {
    pub chosen: Chosen,
    pub report: Report,
}

/// What is kept beside a plan.
#[derive(Debug, Serialize, Deserialize)]
struct About {
    version: u32,
    made: String,
    advice: String,
}

/// Returns a plan for a model without one, and prints what it rests on.
///
/// # Errors
/// When the model does not fit the memory asked for, or a file that was asked for is unusable.
pub(crate) fn choose(
    model: Model<'_>,
    opening: &Opening<'_>,
    asked: &Asked<'_>,
) -> Result<Decided> {
    let limit = memory_limit();
    let without_profile = Opening {
        profile: None,
        ..*opening
    };
    let decision = budget::decide(model, &without_profile, limit.as_ref())?;
    let decided = match (decision.chosen.fit(), decision.budget) {
        (Fit::Budget, Some(budget)) => within(model, opening, asked, decision, budget)?,
        (fit, budget) => {
            decision.notes.iter().for_each(|note| eprintln!("{note}"));
            let mut report = of_whole(model, fit, budget);
            if asked.auto.probe && fit == Fit::Memory {
                measured(model, asked, &mut report)?;
            }
            Decided {
                chosen: decision.chosen,
                report,
            }
        }
    };
    decided
        .report
        .lines()
        .iter()
        .for_each(|line| eprintln!("{line}"));
    Ok(decided)
}

/// Reports a model that needs no plan, or for which there is none.
fn of_whole(model: Model<'_>, fit: Fit, budget: Option<u64>) -> Report {
    let weights = show_bytes(model.shape.weight_bytes());
    let fits = fit == Fit::Memory;
    let room = budget.map_or("unbounded memory".to_string(), |bytes| {
        format!("{} of memory", show_bytes(bytes))
    });
    Report {
        decision: match fits {
            true => format!("all {weights} of weights fit in memory, so there is nothing to plan"),
            false => format!("the {weights} of weights stay in the mapped file"),
        },
        basis: format!("{room}; nothing was measured"),
        advice: match fits {
            true => {
                "nothing that memory or a drive could bring; --probe measures the machine".into()
            }
            false => "more memory, or a smaller --context".into(),
        },
        fits,
        ..Report::default()
    }
}

/// Measures the machine for a model that fits, whose plan does not change by that.
fn measured(model: Model<'_>, asked: &Asked<'_>, report: &mut Report) -> Result<()> {
    let mut place = Place::of(&model.gguf.id());
    let mut notes: Vec<String> = place.make().into_iter().collect();
    let found = machine::find(&place, asked, &mut notes)?;
    notes.iter().for_each(|note| eprintln!("{note}"));
    report.basis = found.from;
    report.probed = found.is_new;
    report.machine = found.path;
    report.advice = "nothing that more memory or a faster drive could bring".to_string();
    Ok(())
}

/// Plans for a model that is larger than memory.
fn within(
    model: Model<'_>,
    opening: &Opening<'_>,
    asked: &Asked<'_>,
    decision: Decision,
    budget: u64,
) -> Result<Decided> {
    let shape = model.shape;
    let mut place = Place::of(&model.gguf.id());
    let mut notes: Vec<String> = place.make().into_iter().collect();
    let found = machine::find(&place, asked, &mut notes)?;
    let uses = uses::find(&place, opening.profile, asked.model, shape, &mut notes)?;
    let budget = match opening.memory {
        Some(_) => budget,
        None => in_steps(budget),
    };
    let kv_type = opening.kv_type.unwrap_or_default();
    let room = decision.room;
    let fixed = FixedMemory::new(model.gguf, model.spec, shape, room, kv_type, budget);
    let wanted = Wanted {
        model,
        found: &found,
        uses: &uses,
        room,
        kv_type,
        left: budget.saturating_sub(fixed.outside_bytes(budget)),
        missing: model
            .gguf
            .file_bytes()
            .saturating_add(fixed.bytes(budget))
            .saturating_sub(budget),
    };
    let planned = wanted.kept_or_solved(&place, &mut notes);
    notes.iter().for_each(|note| eprintln!("{note}"));
    let learns = (asked.auto.learn && place.is_writable())
        .then(|| place.file(LEARNED))
        .flatten();
    let mut report = Report {
        probed: found.is_new,
        machine: found.path.clone(),
        profile: uses.path.clone(),
        learns,
        ..Report::default()
    };
    let planned = match planned {
        Ok(planned) => planned,
        Err(error) => {
            eprintln!(
                "note: no plan was solved, so every layer has as many slots as fit: {}",
                printable(&format!("{error:#}"))
            );
            report.decision = format!(
                "as many of the {} of weights in memory as fit, the others read from the file",
                show_bytes(shape.weight_bytes())
            );
            report.basis = format!("{} of memory", show_bytes(budget));
            report.advice = "more memory".to_string();
            return Ok(Decided {
                chosen: decision.chosen,
                report,
            });
        }
    };
    report.decision = words::decision(&planned.plan, shape);
    report.basis = format!("{}, and {}; {}", found.from, uses.from, planned.from);
    report.advice = planned.advice;
    report.predicted_tok_s = Some(planned.plan.predicted.decode_tok_s);
    report.solved = planned.is_new;
    report.plan = planned.path;
    Ok(Decided {
        chosen: Chosen {
            plan: planned.plan,
            batch: Some(fixed.batch),
            fits: false,
        },
        report,
    })
}

/// Rounds free memory down to one of few steps.
fn in_steps(bytes: u64) -> u64 {
    let step = (bytes.checked_next_power_of_two().unwrap_or(1 << 63) / STEPS).max(1);
    bytes / step * step
}

/// What a plan is wanted for.
struct Wanted<'a> {
    model: Model<'a>,
    found: &'a machine::Found,
    uses: &'a Uses,
    room: CacheRoom,
    kv_type: KvType,
    /// Bytes of main memory for what plans count.
    left: u64,
    /// Bytes of memory with which all would fit.
    missing: u64,
}

/// A plan, and where it is from.
struct Planned {
    plan: Placement,
    path: Option<PathBuf>,
    advice: String,
    from: String,
    is_new: bool,
}

impl Wanted<'_> {
    fn kept_or_solved(&self, place: &Place, notes: &mut Vec<String>) -> Result<Planned> {
        let name = self.name();
        let paths = place.found(&format!("{name}.toml"));
        if let Some(path) = paths {
            match self.kept(&path) {
                Ok(planned) => return Ok(planned),
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
        let path_of_about = path.with_extension("json");
        let text = std::fs::read_to_string(&path_of_about)
            .map_err(|error| anyhow::anyhow!("{}: {error}", path_of_about.display()))?;
        let about: About = serde_json::from_str(&text)
            .map_err(|error| anyhow::anyhow!("{}: {error}", path_of_about.display()))?;
        ensure!(
            about.version == VERSION,
            "{}: version {}, expected {VERSION}",
            path_of_about.display(),
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

/// Returns lines that say where the files of a model are, without making any.
///
/// # Errors
/// When the kernels that were asked for do not run here.
pub(crate) fn listed(model: &SourceId, asked: &Asked<'_>) -> Result<Vec<String>> {
    let place = Place::of(model);
    let Some(folder) = place.folder() else {
        return Ok(vec![
            "nothing is kept: neither XDG_STATE_HOME nor HOME has an absolute path".to_string(),
        ]);
    };
    let mut lines = vec![format!("folder   {}", folder.display())];
    let shown = |path: &Path| match path.exists() {
        true => path.display().to_string(),
        false => format!("{} (not there yet)", path.display()),
    };
    let machine = match asked.auto.machine {
        Some(path) => path.to_path_buf(),
        None => folder.join(machine::name(asked)?),
    };
    lines.push(format!("machine  {}", shown(&machine)));
    let beside = asked.model.with_extension("profile");
    let profiles = [beside, folder.join(uses::GIVEN), folder.join(LEARNED)];
    let planned = folder.join(uses::PLANNED);
    for path in profiles.iter().chain([&planned]) {
        lines.push(format!("profile  {}", shown(path)));
    }
    for plan in place::plans(folder) {
        let speed = match placement::read(&plan.path) {
            Ok(read) => format!("predicted {} tok/s", digits(read.predicted.decode_tok_s)),
            Err(_) => "damaged".to_string(),
        };
        lines.push(format!("plan     {} ({speed})", plan.path.display()));
    }
    Ok(lines)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn free_memory_has_few_steps() {
        for bytes in [0, 1, 63, 1 << 20, (1 << 34) + 12_345, u64::MAX] {
            let rounded = in_steps(bytes);
            assert!(rounded <= bytes && bytes - rounded <= bytes / 32, "{bytes}");
        }
        let gib = 1u64 << 30;
        assert_eq!(in_steps(20 * gib), in_steps(20 * gib + (1 << 20)));
    }
}
