//! Printing: the macros of this crate, and statistics of a run (on standard error, so that standard
//! output is the text).
//!
//! The standard library's macros panic when the reader of a pipe has gone, as in `| head`. These
//! macros of equal names end the program quietly on standard output, and continue without standard
//! error. What they print has no control characters, wherever its parts come from.

use crate::conditions::{busy_line, prediction_line};
use crate::printable::{lines, one_line, printable};
use std::fmt::Arguments;
use std::io::{ErrorKind, Write};
use std::sync::{PoisonError, RwLock};
use tier_plan_runtime::formats::record::{LayerRecord, RunRecord};

/// Prints to standard output.
macro_rules! print {
    ($($arg:tt)*) => { $crate::print::out(format_args!($($arg)*)) };
}

/// Prints a line to standard output.
macro_rules! println {
    () => { $crate::print::out(format_args!("\n")) };
    ($($arg:tt)*) => { $crate::print::out(format_args!("{}\n", format_args!($($arg)*))) };
}

/// Prints a line to standard error.
macro_rules! eprintln {
    ($($arg:tt)*) => { $crate::print::err(format_args!("{}\n", format_args!($($arg)*))) };
}

/// Writes to standard output, for `print!` and `println!`.
pub fn out(text: Arguments<'_>) {
    if let Err(error) = write(&mut std::io::stdout(), text) {
        cannot_print(&error);
    }
}

/// Writes to standard error, for `eprintln!`.
pub fn err(text: Arguments<'_>) {
    // A closed standard error leaves no place for a message.
    let _ = write(&mut std::io::stderr(), text);
}

fn write(to: &mut impl Write, text: Arguments<'_>) -> std::io::Result<()> {
    if let Some(text) = text.as_str() {
        return to.write_all(text.as_bytes());
    }
    let mut text = text.to_string();
    let shown = SHOWN.read().unwrap_or_else(PoisonError::into_inner);
    if let Some(shown) = &*shown {
        text = text.replace(&shown.temporary, &shown.name);
    }
    to.write_all(lines(&text).as_bytes())
}

/// A name that is printed instead of a temporary one.
struct ShownName {
    temporary: String,
    name: String,
}

static SHOWN: RwLock<Option<ShownName>> = RwLock::new(None);

/// Prints `name` from now on for a temporary name that occurs in no other text: for an output that
/// gets its name when it is whole.
pub fn show_final_name(temporary: &str, name: &str) {
    let shown = ShownName {
        temporary: temporary.to_string(),
        name: name.to_string(),
    };
    *SHOWN.write().unwrap_or_else(PoisonError::into_inner) = Some(shown);
}

/// Prints an error, and advice on it, each on a line of its own.
pub fn error(error: &anyhow::Error) {
    eprintln!("error: {}", one_line(&format!("{error:#}")));
    if let Some(hint) = crate::hint::hint_for(error) {
        eprintln!("hint: {}", one_line(&hint));
    }
}

/// Ends the program: with success if the reader has gone, since it has what it wanted.
pub fn cannot_print(error: &std::io::Error) -> ! {
    if error.kind() == ErrorKind::BrokenPipe {
        std::process::exit(0);
    }
    err(format_args!("error: writing to standard output: {error}\n"));
    std::process::exit(1);
}

/// Prints the speed of a run, measured and predicted.
pub fn speed(record: &RunRecord) {
    let emulated = if record.emulated {
        " on emulated tiers"
    } else {
        ""
    };
    eprintln!(
        "prompt {} tokens, {:.1} tok/s · decode {} tokens, {:.1} tok/s{emulated} · first token after {:.2} s",
        record.prompt_tokens,
        record.prompt_tok_s(),
        record.decode_tokens,
        record.decode_tok_s(),
        record.first_token_s
    );
    let read: u64 = record.tiers.iter().map(|t| t.read_bytes).sum();
    if record.decode_s > 0.0 {
        eprintln!(
            "read {:.2} MB per decoded token, {:.2} GB/s{emulated}",
            read as f64 / record.decode_tokens.max(1) as f64 / 1e6,
            read as f64 / record.decode_s / 1e9
        );
    }
    if let Some(predicted) = &record.predicted
        && record.decode_tokens > 0
    {
        let line = prediction_line(
            predicted.decode_tok_s,
            record.decode_tok_s(),
            emulated,
            record.conditions.as_ref(),
        );
        eprintln!("{line}");
    }
    let observed = record
        .conditions
        .as_ref()
        .and_then(|c| c.predicted.as_ref());
    if let Some(line) = busy_line([record].into_iter()).filter(|_| observed.is_none()) {
        eprintln!("{line}");
    }
}

/// Prints hits, misses and times of every MoE layer.
pub fn layers(record: &RunRecord) {
    let reads = record.layers.iter().any(|l| l.missed_bytes > 0);
    let more = if reads {
        "   missed MB/token   GB/s   hidden ms/token   waited ms/token"
    } else {
        ""
    };
    let streams = record.has_streamed();
    let streamed = if streams { "   streamed" } else { "" };
    eprintln!(
        "layer   pinned    slots   misses{streamed}   hit rate   dense ms/token   experts ms/token{more}"
    );
    for l in &record.layers {
        let accesses = l.pinned_hits + l.slot_hits + l.misses;
        let streamed = match streams {
            true => format!("{:>11}", l.streamed),
            false => String::new(),
        };
        eprintln!(
            "{:>5} {:>8} {:>8} {:>8}{streamed} {:>9.1}% {:>16.3} {:>18.3}{}",
            l.layer,
            l.pinned_hits,
            l.slot_hits,
            l.misses,
            (accesses - l.misses) as f64 / accesses.max(1) as f64 * 100.0,
            l.dense_s * 1e3,
            l.expert_s * 1e3,
            if reads {
                reads_of(l, record.decode_tokens.max(1) as f64)
            } else {
                String::new()
            }
        );
    }
    for t in &record.tiers {
        let emulated = if t.emulated { " (emulated)" } else { "" };
        eprintln!(
            "{}{emulated}: {:.2} MB read per token, {:.3} ms waited per token",
            printable(&t.name),
            t.read_bytes as f64 / record.decode_tokens.max(1) as f64 / 1e6,
            t.busy_s / record.decode_tokens.max(1) as f64 * 1e3
        );
    }
}

/// Formats the bytes of a layer's misses, their rate, and the time hidden behind compute.
fn reads_of(l: &LayerRecord, tokens: f64) -> String {
    let bytes = l.missed_bytes as f64 / tokens;
    let rate = if l.reading_s > 0.0 {
        bytes / l.reading_s / 1e9
    } else {
        0.0
    };
    let hidden = (l.reading_s - l.waited_s).max(0.0);
    format!(
        "{:>18.3} {rate:>6.2} {:>17.3} {:>17.3}",
        bytes / 1e6,
        hidden * 1e3,
        l.waited_s * 1e3
    )
}

/// Formats a number with about three significant digits.
pub fn digits(value: f64) -> String {
    let digits = if value < 10.0 {
        2
    } else {
        usize::from(value < 100.0)
    };
    format!("{value:.digits$}")
}
