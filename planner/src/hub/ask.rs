//! Asks before a model is fetched: how many bytes, where to, and how fast it would be here.

use crate::catalogue::{self, Known};
use crate::confirm::{can_ask, confirmed};
use crate::hint::HintExt;
use crate::interrupt::Interrupted;
use crate::print::digits;
use crate::printable::printable;
use crate::probe::{MACHINE_FILE, Settings, measure};
use crate::whatif::{Question, answer, bound};
use anyhow::{Context, Result, anyhow, ensure};
use std::path::{Path, PathBuf};
use tier_plan_runtime::KvType;
use tier_plan_runtime::formats::machine::Machine;
use tier_plan_runtime::units::show_bytes;

/// Longest context that a prediction is for.
const CONTEXT: u32 = 4096;

/// Time limit of each plan behind a prediction.
const PLAN_TIME_S: f64 = 5.0;

/// What is to be fetched.
pub struct Offer<'a> {
    /// The model's name, as given.
    pub name: &'a str,
    /// Bytes that are not there yet.
    pub bytes: u64,
    /// Files of the model.
    pub files: usize,
    /// Folder to fetch to.
    pub folder: &'a Path,
    /// The model's sizes, from its header.
    pub known: &'a Known,
}

/// Returns this machine: as the machine file in the current folder says, else as a short
/// measurement finds it, if it may be measured. The drive is that of `folder`.
///
/// # Errors
/// When the file cannot be read, or a measurement fails.
pub fn this_machine(folder: &Path, may_measure: bool) -> Result<Option<Machine>> {
    let file = Path::new(MACHINE_FILE);
    if file.is_file() {
        return catalogue::machine(file).map(Some);
    }
    if !may_measure {
        return Ok(None);
    }
    let there = folder.ancestors().find(|path| path.is_dir());
    let slow_dir: PathBuf = there.unwrap_or(Path::new(".")).to_path_buf();
    let found = measure(&Settings {
        slow_dir: Some(&slow_dir),
        is_quick: true,
        ..Settings::default()
    })
    .context("measuring this machine")
    .hint("measure it with `tier-plan probe`, which writes machine.toml")?;
    Ok(Some(found.machine()))
}

/// Returns the predicted speed in words.
fn predicted(known: &Known, machine: &Machine) -> Result<String> {
    let question = Question {
        known,
        machine,
        budgets: machine
            .tiers
            .iter()
            .map(|tier| tier.capacity_bytes)
            .collect(),
        profile: None,
        context: CONTEXT.min(known.sizes.context.max(1)),
        sequences: 1,
        at: None,
        kv_type: KvType::default(),
        time_limit_s: PLAN_TIME_S,
    };
    let answer = answer(&question)?;
    let middle = answer.middle().context("no plan")?;
    let [speed, low, high] = answer.decode_tok_s();
    let by = printable(&bound(&middle.plan).by).into_owned();
    let (low, high) = (digits(low), digits(high));
    let range = match low == high {
        true => String::new(),
        false => format!("{low} to {high} by routing, "),
    };
    Ok(format!(
        "predicted {} tok/s here ({range}bound by {by})",
        digits(speed)
    ))
}

/// Asks whether to fetch, on a terminal. Elsewhere only `--yes` agrees.
///
/// # Errors
/// When the answer is no, or nobody can be asked.
pub fn agree(offer: &Offer<'_>, yes: bool) -> Result<()> {
    if yes {
        return Ok(());
    }
    let is_terminal = can_ask();
    let machine = this_machine(offer.folder, is_terminal);
    let prediction = match machine {
        Ok(Some(machine)) => predicted(offer.known, &machine),
        Ok(None) => Ok(String::new()),
        Err(error) if error.is::<Interrupted>() => return Err(error),
        Err(error) => Err(error),
    };
    let speed = match prediction {
        Ok(words) => words,
        Err(error) => format!("no prediction: {}", printable(&format!("{error:#}"))),
    };
    let files = match offer.files {
        1 => String::new(),
        n => format!(" in {n} files"),
    };
    let (size, folder) = (show_bytes(offer.bytes), offer.folder.display());
    if !is_terminal {
        let speed = if speed.is_empty() {
            speed
        } else {
            format!("; {speed}")
        };
        let unasked = anyhow!("{}: {size}{files} to fetch to {folder}{speed}", offer.name);
        let hint = format!(
            "pass --yes to fetch; `tier-plan what-if {}` predicts the speed from the header alone",
            offer.name
        );
        return Err(unasked).hint(hint);
    }
    let question = format!("{speed}; fetch {size}{files} to {folder}? [y/N] ");
    ensure!(confirmed(&question)?, "{}: not fetched", offer.name);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prediction_names_speed_and_bottleneck() {
        let known = catalogue::model(Path::new("gpt-oss-20b"), None).unwrap();
        let machine = catalogue::machine(Path::new("desktop-5070-ddr5")).unwrap();
        let words = predicted(&known, &machine).unwrap();
        assert!(words.starts_with("predicted "), "{words}");
        assert!(
            words.contains("tok/s here (") && words.contains("bound by"),
            "{words}"
        );
    }
}
