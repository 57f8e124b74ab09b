//! `tier-plan replan`: has a running server make a plan of what its texts choose, and move to it.

use crate::client::Client;
use crate::cmd::args::{JsonArgs, ServerArgs};
use crate::print::digits;
use crate::printable::printable;
use crate::progress;
use crate::solve::time_limit;
use anyhow::{Result, bail, ensure};
use clap::Args;
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::Duration;
use tier_plan_runtime::formats::safely;
use tier_plan_runtime::units::show_bytes;

/// How often the server is asked how far it is.
const POLL: Duration = Duration::from_millis(200);

/// Options of `tier-plan replan`.
#[derive(Debug, Args)]
#[command(
    about = "Have a running server plan for what its texts choose, and move to the plan",
    after_long_help = "Example:\n  tier-plan serve MODEL.gguf --plan placement.toml --profile-out use.profile\n  \
                       tier-plan replan                 # what a plan for this use would bring\n  \
                       tier-plan replan --apply         # move to it while it answers"
)]
pub struct ReplanArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub server: ServerArgs,
    /// Move pins and slots to where the plan has them
    #[arg(long, help_heading = "Plan")]
    pub apply: bool,
    /// Least predicted gain for which they move, 0.1 for a tenth
    #[arg(long, value_name = "X", default_value_t = 0.01, help_heading = "Plan")]
    pub min_gain: f64,
    /// Time limit of the search, in seconds
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 10.0,
        help_heading = "Plan"
    )]
    pub time_limit: f64,
    /// Plan to write
    #[arg(short, long, value_name = "FILE", help_heading = "Output")]
    pub output: Option<PathBuf>,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub format: JsonArgs,
}

/// Runs the command.
///
/// # Errors
/// When an option is invalid, there is no server, or it can't make a plan.
pub fn run(args: &ReplanArgs) -> Result<()> {
    ensure!(
        (0.0..=10.0).contains(&args.min_gain),
        "--min-gain {}: give a number from 0 to 10",
        args.min_gain
    );
    let seconds = time_limit(args.time_limit)?.ceil().clamp(1.0, 600.0) as u64;
    if let Some(path) = &args.output {
        safely::check(path)?;
    }
    let client = args.server.client()?;
    let body = json!({ "apply": args.apply, "min_gain": args.min_gain, "time_limit_s": seconds });
    client.post("/plan", &body)?;
    let found = settled(&client)?;
    if found["status"] == "failed" {
        bail!("no other plan: {}", text(&found["error"]));
    }
    let proposal = &found["proposal"];
    if let Some(path) = &args.output {
        let plan = proposal["placement"].as_str().unwrap_or_default();
        safely::write(path, plan.as_bytes())?;
    }
    if args.format.json {
        println!("{}", serde_json::to_string_pretty(&found)?);
        return Ok(());
    }
    print_text(args, &found);
    if let Some(path) = &args.output {
        println!("wrote {}", path.display());
    }
    Ok(())
}

/// Waits until the plan is made, and pins and slots have moved. Shows how far they are.
fn settled(client: &Client) -> Result<Value> {
    let planning = progress::steps();
    planning.set_message("planning");
    let moving = progress::bytes("moving");
    loop {
        let found = client.get("/plan")?;
        match found["status"].as_str() {
            Some("planning") => {}
            Some("moving") => {
                planning.finish_and_clear();
                let bytes = |name: &str| found["move"][name].as_u64().unwrap_or(0);
                moving.set_length(bytes("total_bytes"));
                moving.set_position(bytes("done_bytes"));
            }
            _ => {
                planning.finish_and_clear();
                moving.finish_and_clear();
                return Ok(found);
            }
        }
        std::thread::sleep(POLL);
    }
}

/// Returns a string of the server, for a terminal.
fn text(value: &Value) -> String {
    printable(value.as_str().unwrap_or("it says nothing")).into_owned()
}

fn print_text(args: &ReplanArgs, found: &Value) {
    let proposal = &found["proposal"];
    let (uses, predicted) = (&found["uses"], &proposal["predicted"]);
    println!(
        "made from {} texts that were served, with {} decoded tokens",
        uses["texts"], uses["decoded_tokens"]
    );
    let tiers = match predicted["then"]["emulated"] == true {
        true => " on emulated tiers",
        false => "",
    };
    println!("predicted for these texts{tiers}:");
    println!("{:<14} {:>14} {:>10}", "plan", "decode tok/s", "hit rate");
    for (name, key) in [("present", "now"), ("new", "then")] {
        let of = &predicted[key];
        let speed = of["decode_tok_s"]
            .as_f64()
            .map_or("not known".to_string(), digits);
        let hits = 100.0 * of["hit_rate"].as_f64().unwrap_or(0.0);
        println!("{name:<14} {speed:>14} {hits:>9.1}%");
    }
    let gain = 100.0 * proposal["gain"].as_f64().unwrap_or(0.0);
    let rates = match predicted["then"]["decode_tok_s"].is_null() {
        true => " at supposed rates of memory and drive",
        false => "",
    };
    println!("{gain:+.1} % tokens per second, predicted{rates}");
    println!(
        "pins: {} new ({}), {} dropped; slots: {} → {}",
        proposal["new_pins"],
        show_bytes(proposal["new_pin_bytes"].as_u64().unwrap_or(0)),
        proposal["dropped_pins"],
        proposal["slots"]["now"],
        proposal["slots"]["then"]
    );
    for note in proposal["notes"].as_array().into_iter().flatten() {
        println!("note: {}", text(note));
    }
    println!("{}", outcome(args, found));
}

/// Returns a sentence on what has moved.
fn outcome(args: &ReplanArgs, found: &Value) -> String {
    if found["status"] != "moved" {
        return match args.apply {
            true => format!(
                "nothing moved: the gain is below --min-gain {}",
                args.min_gain
            ),
            false => "nothing moved: pass --apply to move pins and slots there".to_string(),
        };
    }
    let count = |name: &str| found["move"][name].as_u64().unwrap_or(0);
    let (pins, slots) = (
        count("failed_pins") + count("left_pins"),
        count("left_slots"),
    );
    let words = "pins and slots have moved";
    match pins + slots {
        0 => words.to_string(),
        _ => format!("{words}; not moved: pins: {pins}, slots: {slots}"),
    }
}
