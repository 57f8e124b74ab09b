//! Everything that a run of a model larger than memory needs, without being asked: measures the
//! machine once, takes the best profile there is, solves, and keeps the plan for the next start.
//!
//! What is kept lies in a folder per model below the user's state folder ([`Place`]), as files that
//! the other commands read. A model that fits memory needs none of it.

mod kept;
mod learn;
mod machine;
mod place;
mod uses;
mod words;

pub use learn::{Learner, MAX_CHOICES};
pub use place::Place;

use crate::budget::{self, Chosen, Decision, Fit, Model};
use crate::json::path_json;
use crate::opening::Opening;
use crate::print::digits;
use crate::printable::printable;
use anyhow::Result;
use kept::Wanted;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tier_plan_runtime::formats::SourceId;
use tier_plan_runtime::formats::placement;
use tier_plan_runtime::plans::budget::FixedMemory;
use tier_plan_runtime::tiers::limits::memory_limit;
use tier_plan_runtime::tiers::numa::NumaPolicy;
use tier_plan_runtime::tiers::shards::Shards;
use tier_plan_runtime::units::show_bytes;
use uses::LEARNED;

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
    let found = match machine::find(&place, asked, &mut notes) {
        Ok(found) => found,
        Err(error) if asked.auto.machine.is_some() => return Err(error),
        Err(error) => {
            notes.push(format!("note: {}", printable(&format!("{error:#}"))));
            notes.iter().for_each(|note| eprintln!("{note}"));
            return Ok(unsolved(model, decision, budget));
        }
    };
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
            let mut decided = unsolved(model, decision, budget);
            decided.report.learns = report.learns;
            return Ok(decided);
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

/// Returns the plan that is made without a solver, for want of a better one.
fn unsolved(model: Model<'_>, decision: Decision, budget: u64) -> Decided {
    let report = Report {
        decision: format!(
            "as many of the {} of weights in memory as fit, the others read from the file",
            show_bytes(model.shape.weight_bytes())
        ),
        basis: format!("{} of memory, no measurements", show_bytes(budget)),
        advice: "more memory".to_string(),
        ..Report::default()
    };
    Decided {
        chosen: decision.chosen,
        report,
    }
}

/// Rounds free memory down to one of few steps.
fn in_steps(bytes: u64) -> u64 {
    let step = (bytes.checked_next_power_of_two().unwrap_or(1 << 63) / STEPS).max(1);
    bytes / step * step
}

/// Returns lines that say where the files of a model are, without making any. `beside` is the profile
/// beside the model.
///
/// # Errors
/// When the kernels that were asked for do not run here.
pub(crate) fn listed(
    model: &SourceId,
    asked: &Asked<'_>,
    beside: Option<PathBuf>,
) -> Result<Vec<String>> {
    let place = Place::of(model);
    let Some(folder) = place.folder() else {
        return Ok(vec![
            "nothing is kept: neither XDG_STATE_HOME nor HOME has an absolute path".to_string(),
        ]);
    };
    let mut lines = vec![
        format!("model    {}", printable(&model.name)),
        format!("folder   {}", folder.display()),
    ];
    let shown = |path: &Path| match path.exists() {
        true => path.display().to_string(),
        false => format!("{} (not there yet)", path.display()),
    };
    let machine = match asked.auto.machine {
        Some(path) => path.to_path_buf(),
        None => folder.join(machine::name(asked)?),
    };
    lines.push(format!("machine  {}", shown(&machine)));
    let kept = [uses::GIVEN, LEARNED, uses::PLANNED].map(|name| folder.join(name));
    for path in beside.into_iter().chain(kept) {
        lines.push(format!("profile  {}", uses::shown(&path, model)));
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
