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
                " {} prompt tokens ({} cached), {} new",
                counts.prompt, counts.cached, counts.new,
            );
            // A text has its times once it ends.
            if texts.complete {
                line += &format!(
                    ", queue {:.2} s, prompt {:.2} s",
                    texts.timings.queue.as_secs_f64(),
                    texts.timings.prompt.as_secs_f64(),
                );
            }
            let rate = texts.timings.decode_tok_s(counts.new);
            if let (1, true, Some(rate)) = (texts.n, texts.complete, rate) {
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
            if texts.complete {
                value["timings"] = texts.timings.json(texts.counts);
            } else {
                let counts = texts.counts;
                value["timings"] = json!({ "cache_n": counts.cached, "predicted_n": counts.new });
            }
            if let (1, true, Some(loaded)) = (texts.n, texts.complete, state.loaded()) {
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

    #[test]
    fn a_text_that_was_left_has_no_times() {
        let entry = |complete| Entry {
            method: "POST",
            path: "/v1/messages",
            status: 499,
            took: Duration::from_secs(2),
            error: None,
            texts: Some(Texts {
                id: "i".into(),
                counts: Counts {
                    prompt: 9,
                    new: 5,
                    ..Counts::default()
                },
                n: 1,
                timings: Timings {
                    decode: Duration::from_secs(if complete { 2 } else { 0 }),
                    ..Timings::default()
                },
                complete,
            }),
        };
        let line = entry(false).text(false);
        let expected =
            "POST /v1/messages 499 9 prompt tokens (0 cached), 5 new, not complete in 2.000 s";
        assert_eq!(line, expected);
        let line = entry(true).text(false);
        assert!(
            line.contains("prompt 0.00 s, 2.0 tok/s in 2.000 s"),
            "{line}"
        );
    }
}
