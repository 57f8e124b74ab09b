//! Plans in a process of its own: the memory that a search takes is free again afterwards, and where
//! there is too little of it, the system ends this process and not the server.
//!
//! The parent starts this program with [`ARGUMENT`] and the model's file. It writes a line of JSON
//! ([`Head`]), the present plan, and the profile of what texts chose; the process answers with JSON
//! ([`Reply`]).

use super::replan;
use crate::subprocess;
use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::io::{BufRead, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitCode};
use tier_plan_runtime::formats::placement::{self, Placement, Prediction};
use tier_plan_runtime::formats::profile;
use tier_plan_runtime::model::shape::shape_of_file;
use tier_plan_runtime::os::{ProcessLimits, limit_process};
use tier_plan_serve::{Question, Replanned};

/// Argument that makes the program such a process.
const ARGUMENT: &str = "--internal-plan";

/// Longest time of the process on a processor.
const MAX_CPU_SECONDS: u64 = 4 * 3600;

/// Most bytes of a message's parts, which come from this program itself.
const MAX_BYTES: u64 = 1 << 30;

/// What comes before the plan and the profile.
#[derive(Serialize, Deserialize)]
struct Head {
    room: Vec<u64>,
    time_limit_s: f64,
    plan_bytes: u64,
}

/// What came of it.
#[derive(Serialize, Deserialize)]
enum Reply {
    /// Plans as text, each with what is predicted of it for the texts.
    Made {
        now: String,
        then: String,
        has_speeds: bool,
        notes: Vec<String>,
    },
    /// Why there is none.
    Refused(String),
}

/// Returns whether this process was started to make a plan.
pub fn is_requested(mut args: impl Iterator<Item = OsString>) -> bool {
    args.nth(1).is_some_and(|argument| argument == ARGUMENT)
}

/// Makes one plan, and returns the exit code of the process.
pub fn serve(mut args: impl Iterator<Item = OsString>) -> ExitCode {
    let limits = ProcessLimits {
        address_space_bytes: u64::MAX,
        cpu_seconds: MAX_CPU_SECONDS,
    };
    if limit_process(limits).is_err() {
        return ExitCode::FAILURE;
    }
    let model = PathBuf::from(args.nth(2).unwrap_or_default());
    let reply = match answer(&model, std::io::stdin().lock()) {
        Ok(made) => reply(&made),
        Err(error) => Reply::Refused(format!("{error:#}")),
    };
    let mut out = BufWriter::new(std::io::stdout().lock());
    match serde_json::to_writer(&mut out, &reply).is_ok() && out.flush().is_ok() {
        true => ExitCode::SUCCESS,
        false => ExitCode::FAILURE,
    }
}

fn answer(model: &Path, input: impl Read) -> Result<Replanned> {
    let mut input = BufReader::new(input);
    let mut head = String::new();
    input.by_ref().take(1 << 16).read_line(&mut head)?;
    let head: Head = serde_json::from_str(&head).context("the question")?;
    ensure!(head.plan_bytes <= MAX_BYTES, "the plan is too large");
    let mut plan = Vec::new();
    input
        .by_ref()
        .take(head.plan_bytes)
        .read_to_end(&mut plan)?;
    let mut uses = Vec::new();
    input.take(MAX_BYTES).read_to_end(&mut uses)?;
    let question = Question {
        plan: placement::decode(&plan, Path::new("the present plan"))?,
        room: head.room.into(),
        uses: profile::decode(&uses, Path::new("what texts chose"))?,
        time_limit_s: head.time_limit_s,
    };
    replan(&shape_of_file(model)?, &question)
}

fn reply(made: &Replanned) -> Reply {
    let with = |predicted: &Prediction| {
        let plan = Placement {
            predicted: predicted.clone(),
            ..made.plan.clone()
        };
        plan.encode()
    };
    Reply::Made {
        now: with(&made.now),
        then: with(&made.then),
        has_speeds: made.has_speeds(),
        notes: made.notes.clone(),
    }
}

/// Has a process make the plan, which it does with the priority of this thread.
///
/// # Errors
/// As [`replan`], and when the process can't be started or ends without a plan.
pub fn ask(model: &Path, question: &Question) -> Result<Replanned> {
    let mut worker = start(model).context("starting a process to plan in")?;
    let mut input = worker.stdin.take().context("no way to the process")?;
    let plan = question.plan.encode();
    let head = Head {
        room: question.room.iter().copied().collect(),
        time_limit_s: question.time_limit_s,
        plan_bytes: plan.len() as u64,
    };
    // A process that has ended says why below.
    let _ = writeln!(input, "{}", serde_json::to_string(&head)?)
        .and_then(|()| input.write_all(plan.as_bytes()))
        .and_then(|()| input.write_all(&question.uses.encode()));
    drop(input);
    let mut json = Vec::new();
    let output = worker.stdout.take().context("no way from the process")?;
    let _ = output.take(MAX_BYTES).read_to_end(&mut json);
    let status = worker.wait().context("waiting for the process")?;
    let Ok(reply) = serde_json::from_slice(&json) else {
        bail!(
            "the process that plans ended without a plan ({status}); was there too little memory?"
        );
    };
    let decode = |text: String| placement::decode(text.as_bytes(), Path::new("the new plan"));
    match reply {
        Reply::Refused(why) => bail!("{why}"),
        Reply::Made {
            now,
            then,
            has_speeds,
            notes,
        } => {
            let (now, mut plan) = (decode(now)?.predicted, decode(then)?);
            let then = plan.predicted.clone();
            if !has_speeds {
                plan.predicted = Prediction::default();
            }
            Ok(Replanned {
                plan,
                now,
                then,
                notes,
            })
        }
    }
}

fn start(model: &Path) -> std::io::Result<Child> {
    subprocess::command(ARGUMENT)?.arg(model).spawn()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_question_is_refused() {
        let model = Path::new("../profiles/demo/demo.gguf");
        for text in [
            "",
            "{}",
            "{\"room\":[],\"time_limit_s\":1,\"plan_bytes\":5}\nabcde",
        ] {
            assert!(answer(model, text.as_bytes()).is_err(), "{text}");
        }
        let args = |all: &[&str]| {
            all.iter()
                .map(OsString::from)
                .collect::<Vec<_>>()
                .into_iter()
        };
        assert!(is_requested(args(&["tier-plan", ARGUMENT, "model"])));
        assert!(!is_requested(args(&["tier-plan", "solve", ARGUMENT])));
    }
}
