//! `tier-plan doctor`: what of this machine slows models down, what that costs, and what mends it.
//!
//! A [`Check`] is made from what the system says. System files are read through [`System`], whose
//! root folder tests replace; what only calls can tell comes as [`Process`] and [`Gpus`]. So every
//! machine can be described in a test. Nothing is changed, and nothing is written but a trial file
//! where a folder has none to try direct I/O with, and the file that [`Options::measure`] reads.
//!
//! A cost is in tokens per second where a model is given and its plan and the rates of the machine
//! are known ([`Forecast`]). Else it names the figure that it rests on.

mod busy;
mod drive;
mod files;
mod forecast;
mod gpu;
mod memory;
mod model;
mod numa;
mod private;
mod processor;
mod rate;
mod system;
#[cfg(test)]
mod tests;
mod versions;

pub use drive::Drive;
pub use forecast::{Change, Forecast, Rates};
pub use gpu::{Gpus, Missing};
pub use private::Private;
pub use system::{Process, System};

use crate::hub::ToFetch;
use crate::printable::one_line;
use anyhow::Result;
use model::Given;
use serde_json::{Map, Value, json};
use std::path::Path;
use tier_plan_runtime::tiers::limits::memory_limit_below;

/// Version of the JSON form.
pub const VERSION: u64 = 1;

/// What a check found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    /// Nothing is lost.
    Ok,
    /// Something is lost, which [`Cost`] states.
    Warning,
    /// Something does not work.
    Failure,
}

impl Status {
    /// Returns the word in output.
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Ok => "ok",
            Status::Warning => "warning",
            Status::Failure => "failure",
        }
    }
}

/// Predicted speeds in tokens per second.
#[derive(Debug, Clone, Copy, PartialEq)]
#[allow(missing_docs)]
pub struct Speeds {
    pub now_tok_s: f64,
    pub mended_tok_s: f64,
}

/// What a warning costs.
#[derive(Debug, Clone, PartialEq)]
pub struct Cost {
    /// Clause that names the figure it rests on.
    pub words: String,
    /// Predicted speed of the model, as the machine is and as it would be.
    pub speeds: Option<Speeds>,
}

impl<T: Into<String>> From<T> for Cost {
    fn from(words: T) -> Self {
        Self {
            words: words.into(),
            speeds: None,
        }
    }
}

impl std::fmt::Display for Cost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(Speeds {
            now_tok_s,
            mended_tok_s,
        }) = self.speeds
        {
            let digits = crate::print::digits;
            write!(
                f,
                "predicted {} instead of {} tok/s, as ",
                digits(now_tok_s),
                digits(mended_tok_s)
            )?;
        }
        f.write_str(&self.words)
    }
}

/// One check.
#[derive(Debug, Clone, PartialEq)]
pub struct Check {
    /// Group and name: `memory.huge_pages`.
    pub id: &'static str,
    /// What came of it.
    pub status: Status,
    /// What was found, as a clause.
    pub found: String,
    /// What a warning costs.
    pub cost: Option<Cost>,
    /// Command, or where there is none a clause, that mends it.
    pub mend: Option<String>,
    /// The figures in `found`, for programs.
    pub facts: Map<String, Value>,
}

impl Check {
    /// Returns a check that found nothing amiss.
    pub fn ok(id: &'static str, found: impl Into<String>) -> Self {
        Self {
            id,
            status: Status::Ok,
            found: found.into(),
            cost: None,
            mend: None,
            facts: Map::new(),
        }
    }

    /// Makes it a warning with a cost.
    #[must_use]
    pub fn warning(self, cost: impl Into<Cost>) -> Self {
        Self {
            status: Status::Warning,
            cost: Some(cost.into()),
            ..self
        }
    }

    /// Makes it a failure with what mends it.
    #[must_use]
    pub fn failure(self, mend: impl Into<String>) -> Self {
        Self {
            status: Status::Failure,
            mend: Some(mend.into()),
            ..self
        }
    }

    /// Adds what mends it.
    #[must_use]
    pub fn mend(self, mend: impl Into<String>) -> Self {
        Self {
            mend: Some(mend.into()),
            ..self
        }
    }

    /// Adds a figure.
    #[must_use]
    pub fn fact(mut self, key: &str, value: impl Into<Value>) -> Self {
        self.facts.insert(key.to_string(), value.into());
        self
    }

    /// Returns the check as one line.
    pub fn line(&self) -> String {
        let name = self.id.replace(['.', '_'], " ");
        let mut line = format!("{:<8} {name:<22} {}", self.status.as_str(), self.found);
        if let Some(cost) = &self.cost {
            line.push_str(&format!("; cost: {cost}"));
        }
        if let Some(mend) = &self.mend {
            line.push_str(&format!("; mend: {mend}"));
        }
        line
    }

    fn as_json(&self) -> Value {
        let (group, name) = self.id.split_once('.').unwrap_or(("", self.id));
        json!({
            "group": group,
            "check": name,
            "status": self.status.as_str(),
            "found": self.found,
            "cost": self.cost.as_ref().map(|cost| json!({
                "words": cost.words,
                "now_tok_s": cost.speeds.map(|s| s.now_tok_s),
                "mended_tok_s": cost.speeds.map(|s| s.mended_tok_s),
            })),
            "mend": self.mend,
            "facts": self.facts,
        })
    }
}

/// What to check.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options<'a> {
    /// Model to check for.
    pub model: Option<&'a Path>,
    /// What is missing of the model, if its file has no more than the header.
    pub to_fetch: Option<&'a ToFetch>,
    /// Machine file of this machine; `machine.toml` in the current folder if there is one.
    pub machine: Option<&'a Path>,
    /// Tokens of context to plan for; what `run` would plan for when `None`.
    pub context: Option<u32>,
    /// Threads; the physical cores when `None`.
    pub threads: Option<usize>,
    /// Whether to measure the drive.
    pub measure: bool,
}

/// All checks of a machine, in their order.
#[derive(Debug, Clone, PartialEq)]
pub struct Report {
    /// The checks.
    pub checks: Vec<Check>,
}

impl Report {
    /// Returns how many checks came to this.
    pub fn count(&self, status: Status) -> usize {
        self.checks.iter().filter(|c| c.status == status).count()
    }

    /// Returns the sentence after the lines.
    pub fn summary(&self) -> String {
        let plural = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
        format!(
            "{}: {}, {}",
            plural(self.checks.len(), "check"),
            plural(self.count(Status::Warning), "warning"),
            plural(self.count(Status::Failure), "failure")
        )
    }

    /// Returns the report as JSON.
    pub fn as_json(&self) -> Value {
        json!({
            "version": VERSION,
            "ok": self.count(Status::Ok),
            "warnings": self.count(Status::Warning),
            "failures": self.count(Status::Failure),
            "checks": self.checks.iter().map(Check::as_json).collect::<Vec<_>>(),
        })
    }
}

/// Checks this machine.
///
/// # Errors
/// When the machine file that was asked for is unreadable, or Ctrl-C came.
pub fn examine(options: &Options<'_>) -> Result<Report> {
    let system = System::of_this_machine();
    let process = Process::of_this();
    let limit = memory_limit_below(system.root());
    let probed = files::machine(options.machine)?;
    let given = options.model.map(|path| Given {
        path,
        to_fetch: options.to_fetch,
    });
    let opened = given
        .as_ref()
        .map(|given| model::Opened::open(given, options.context));
    // The file with the header says nothing of the drive that the model would be read from.
    let (folder, on_drive) = match options.to_fetch {
        Some(to_fetch) => (drive::future(&to_fetch.folder), None),
        None => (drive::folder(options.model), options.model),
    };
    let rate = rate::measured(options)?;
    let known = rate.as_ref().and_then(|rate| rate.as_ref().ok());
    let forecast = match &opened {
        Some(Ok(opened)) => {
            forecast::rates(opened, &probed, &process, limit.as_ref(), known, options)
                .and_then(|rates| Forecast::new(opened, rates, limit.clone()))
        }
        _ => Err(String::new()),
    };
    let forecast = forecast.as_ref();

    let mut checks = processor::checks(&system, &process);
    checks.extend(memory::checks(&system, limit.as_ref(), forecast.ok()));
    checks.extend(numa::checks(&system));
    let direct = drive::try_direct(on_drive, drive::existing(&folder));
    let drive = Drive::of(&system, &folder);
    checks.extend(drive.checks(&process, direct, forecast.ok()));
    checks.push(rate::check(rate.as_ref()));
    checks.extend(gpu::checks(&system, &Gpus::of_this_machine()));
    checks.extend(versions::checks(&system, &process));
    checks.extend(busy::checks(&system, &process, forecast.ok()));
    checks.push(files::machine_check(&probed, limit.as_ref()));
    if let (Some(given), Some(opened)) = (&given, &opened) {
        checks.extend(given.to_fetch.map(|f| model::fetch(f, drive.free_bytes())));
        checks.extend(model::checks(
            given,
            opened,
            &process,
            limit.as_ref(),
            forecast.map_err(String::as_str),
        ));
    }
    Ok(Report {
        checks: checks.into_iter().map(published).collect(),
    })
}

/// Returns what mends a setting of this system that denies huge pages; `None` where it does not.
pub fn small_pages_mend() -> Option<String> {
    memory::huge_pages_mend(&System::of_this_machine())
}

/// Returns a check whose texts may be pasted anywhere: no names of users, one line each.
fn published(check: Check) -> Check {
    let private = Private::of_this_user();
    let text = |text: &str| one_line(&private.text(text)).into_owned();
    let fact = |value: Value| match value {
        Value::String(value) => Value::String(text(&value)),
        other => other,
    };
    Check {
        found: text(&check.found),
        cost: check.cost.map(|cost| Cost {
            words: text(&cost.words),
            ..cost
        }),
        mend: check.mend.as_deref().map(text),
        facts: check
            .facts
            .into_iter()
            .map(|(key, value)| (key, fact(value)))
            .collect(),
        ..check
    }
}
