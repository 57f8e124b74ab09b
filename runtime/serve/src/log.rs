//! One line per request on standard error.

use crate::state::State;
use crate::truth::{Counts, Timings};
use serde_json::{Value, json};
use std::io::Write;
use std::time::{Duration, SystemTime};
use tier_plan_runtime::printable::{lines, printable};
use tier_plan_runtime::units::show_utc;

/// A request that has been answered.
pub(crate) struct Entry<'a> {
    pub method: &'a str,
    /// Path, as the client wrote it.
    pub path: &'a str,
    pub status: u16,
    pub took: Duration,
    /// Why it has no answer.
    pub error: Option<&'a str>,
    /// What its texts took.
    pub texts: Option<Texts>,
}

/// What the texts of a request took.
#[derive(Debug, Clone, Default)]
pub(crate) struct Texts {
    /// Name of the request.
    pub id: String,
    /// Tokens; the new ones of all texts.
    pub counts: Counts,
    /// Number of texts.
    pub n: usize,
    /// Times of the last text that ended.
    pub timings: Timings,
    /// Whether all texts ended by themselves.
    pub complete: bool,
}

/// Writes a line about what went wrong beside requests.
pub(crate) fn warn(state: &State, words: &str) {
    write(state, "warning", words);
}

/// Writes a line about what happened beside requests.
pub(crate) fn note(state: &State, words: &str) {
    write(state, "note", words);
}

fn write(state: &State, kind: &str, words: &str) {
    let line = if state.config.json_log {
        let time = show_utc(SystemTime::now());
        lines(&json!({ "time": time, kind: words }).to_string()).into_owned()
    } else {
        format!("{kind}: {}", printable(words))
    };
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

impl Entry<'_> {
    /// Writes the line. A log that nobody reads is no reason to end.
    pub fn write(&self, state: &State) {
        let line = if state.config.json_log {
            // JSON escapes fewer characters than a terminal acts on.
            lines(&self.json(state).to_string()).into_owned()
        } else {
            self.text(
                state
                    .loaded()
                    .is_some_and(|loaded| loaded.promise().emulated),
            )
        };
        let _ = writeln!(std::io::stderr().lock(), "{line}");
    }

    /// Returns the line; `emulated` is whether a speed is of emulated tiers.
    fn text(&self, emulated: bool) -> String {
        let method = printable(self.method);
        let path = printable(self.path);
        let mut line = format!("{method} {path} {}", self.status);
        if let Some(texts) = &self.texts {
            let counts = texts.counts;
            line += &format!(
                " {} prompt tokens ({} cached), {} new, queue {:.2} s, prompt {:.2} s",
                counts.prompt,
                counts.cached,
                counts.new,
                texts.timings.queue.as_secs_f64(),
                texts.timings.prompt.as_secs_f64(),
            );
            if let (1, Some(rate)) = (texts.n, texts.timings.decode_tok_s(counts.new)) {
                let tiers = if emulated { " on emulated tiers" } else { "" };
                line += &format!(", {rate:.1} tok/s{tiers}");
            }
            if !texts.complete {
                line += ", not complete";
            }
        }
        line += &format!(" in {:.3} s", self.took.as_secs_f64());
        if let Some(error) = self.error {
            line += &format!(": {}", printable(error));
        }
        line
    }

    fn json(&self, state: &State) -> Value {
        let mut value = json!({
            "time": show_utc(SystemTime::now()),
            "method": self.method,
            "path": printable(self.path),
            "status": self.status,
            "seconds": self.took.as_secs_f64(),
        });
        if let Some(error) = self.error {
            value["error"] = printable(error).into();
        }
        if let Some(texts) = &self.texts {
            value["id"] = texts.id.as_str().into();
            value["texts"] = texts.n.into();
            value["complete"] = texts.complete.into();
            value["timings"] = texts.timings.json(texts.counts);
            if let (1, Some(loaded)) = (texts.n, state.loaded()) {
                value["tier_plan"] = texts.timings.truth(texts.counts, &loaded.promise());
            }
        }
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_shows_no_control_character_of_a_stranger() {
        let entry = Entry {
            method: "GET",
            path: "/\u{1b}[2J\u{202e}\n",
            status: 404,
            took: Duration::from_millis(1500),
            error: Some("no \u{7}"),
            texts: None,
        };
        let line = entry.text(false);
        assert_eq!(line, r"GET /\u001b[2J\u202e\n 404 in 1.500 s: no \u0007");
    }
}
