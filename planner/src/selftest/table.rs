//! The table of a self-test: findings beside targets, as text and as JSON. Pure: it measures
//! nothing.

use serde_json::{Value, json};

/// The target of a figure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Target {
    /// At most this value.
    AtMost(f64),
    /// At least this value.
    AtLeast(f64),
}

impl Target {
    /// Whether a figure meets the target. NaN never does.
    pub fn is_met(self, found: f64) -> bool {
        match self {
            Target::AtMost(most) => found <= most,
            Target::AtLeast(least) => found >= least,
        }
    }
}

/// The outcome of a row.
#[derive(Debug, Clone, PartialEq)]
pub enum Found {
    /// A figure.
    Figure(f64),
    /// Could not be tested here, without any failure: the reason, and what to do.
    NotRun(String),
    /// Should have been tested, and failed.
    Failed(String),
}

/// How a figure came about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// Timed on this machine.
    Measured,
    /// Compared with other results.
    Compared,
    /// Counted by the device.
    Counted,
}

impl How {
    fn name(self) -> &'static str {
        match self {
            How::Measured => "measured",
            How::Compared => "compared",
            How::Counted => "counted",
        }
    }
}

/// The verdict of a row, one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The target is met.
    Met,
    /// The target is missed.
    Missed,
    /// The figure has no target.
    NoTarget,
    /// Nothing was tested.
    NotRun,
    /// The test failed.
    Failed,
}

impl Verdict {
    fn name(self) -> &'static str {
        match self {
            Verdict::Met => "met",
            Verdict::Missed => "missed",
            Verdict::NoTarget => "no target",
            Verdict::NotRun => "not run",
            Verdict::Failed => "failed",
        }
    }
}

/// One row of the table.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// Section of the table.
    pub part: &'static str,
    /// What was tested.
    pub what: String,
    /// How the figure came about.
    pub how: How,
    /// Unit of figure and target.
    pub unit: &'static str,
    /// Target, if there is one.
    pub target: Option<Target>,
    /// Outcome.
    pub found: Found,
    /// Whether a miss means wrong results rather than low speed.
    pub results: bool,
    /// Further remarks.
    pub note: String,
}

impl Row {
    /// Makes a row with a figure and no target.
    pub fn figure(
        part: &'static str,
        what: impl Into<String>,
        value: f64,
        unit: &'static str,
    ) -> Self {
        let found = Found::Figure(value);
        Row {
            part,
            what: what.into(),
            how: How::Measured,
            unit,
            target: None,
            found,
            results: false,
            note: String::new(),
        }
    }

    /// Makes a row without a figure.
    pub fn without(part: &'static str, what: impl Into<String>, found: Found) -> Self {
        Row {
            found,
            ..Row::figure(part, what, 0.0, "")
        }
    }

    /// Adds a target.
    #[must_use]
    pub fn with(self, target: Target) -> Self {
        Row {
            target: Some(target),
            ..self
        }
    }

    /// Marks the figure as a comparison of results.
    #[must_use]
    pub fn compared(self) -> Self {
        Row {
            how: How::Compared,
            results: true,
            ..self
        }
    }

    /// Adds a remark.
    #[must_use]
    pub fn noting(self, note: impl Into<String>) -> Self {
        Row {
            note: note.into(),
            ..self
        }
    }

    /// Returns the verdict.
    pub fn verdict(&self) -> Verdict {
        match (&self.found, self.target) {
            (Found::Figure(_), None) => Verdict::NoTarget,
            (Found::Figure(value), Some(target)) if target.is_met(*value) => Verdict::Met,
            (Found::Figure(_), Some(_)) => Verdict::Missed,
            (Found::NotRun(_), _) => Verdict::NotRun,
            (Found::Failed(_), _) => Verdict::Failed,
        }
    }

    /// Whether the row shows that results are wrong or cannot be obtained.
    pub fn is_wrong(&self) -> bool {
        self.results && matches!(self.verdict(), Verdict::Missed | Verdict::Failed)
    }
}

/// All rows, and the machine that they were found on.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Table {
    /// UTC time, ISO 8601.
    pub when: String,
    /// Version of the program.
    pub version: String,
    /// CPU and memory in words.
    pub host: String,
    /// GPU in words.
    pub gpu: String,
    /// Rows, grouped by section.
    pub rows: Vec<Row>,
    /// Whether the test ended before everything was tested.
    pub cut_short: bool,
}

impl Table {
    /// Counts rows with a verdict.
    pub fn count(&self, verdict: Verdict) -> usize {
        self.rows
            .iter()
            .filter(|row| row.verdict() == verdict)
            .count()
    }

    /// Summarizes all rows in one sentence.
    pub fn summary(&self) -> String {
        let [met, missed, failed, not_run] = [
            Verdict::Met,
            Verdict::Missed,
            Verdict::Failed,
            Verdict::NotRun,
        ]
        .map(|v| self.count(v));
        let cut = if self.cut_short {
            "; ended before the rest was looked at"
        } else {
            ""
        };
        format!(
            "{met} of {} targets met, {missed} missed, {failed} failed, {not_run} not run{cut}",
            met + missed + failed
        )
    }

    /// Formats the table as text.
    pub fn text(&self) -> String {
        let widest = self
            .rows
            .iter()
            .map(|row| row.what.chars().count())
            .max()
            .unwrap_or(0)
            .max(10);
        let mut text = format!(
            "tier-plan {} · {}\n{}\n{}\n",
            self.version, self.when, self.host, self.gpu
        );
        let mut part = "";
        for row in &self.rows {
            if row.part != part {
                part = row.part;
                text += &format!(
                    "\n{part:<width$} {:>16} {:>16}\n",
                    "target",
                    "found",
                    width = widest + 2
                );
            }
            let with_unit = |value: f64| {
                format!("{} {}", show(value), row.unit)
                    .trim_end()
                    .to_string()
            };
            let target = match row.target {
                None => String::new(),
                Some(Target::AtMost(value)) => format!("≤ {}", with_unit(value)),
                Some(Target::AtLeast(value)) => format!("≥ {}", with_unit(value)),
            };
            let (found, why) = match &row.found {
                Found::Figure(value) => (with_unit(*value), None),
                Found::NotRun(why) | Found::Failed(why) => ("-".to_string(), Some(why)),
            };
            let verdict = match row.verdict() {
                Verdict::NoTarget => row.how.name().to_string(),
                verdict => format!("{} ({})", verdict.name(), row.how.name()),
            };
            let verdict = if why.is_some() {
                row.verdict().name().to_string()
            } else {
                verdict
            };
            let notes: Vec<&str> = why
                .map(String::as_str)
                .into_iter()
                .chain([row.note.as_str()])
                .filter(|n| !n.is_empty())
                .collect();
            let line = format!(
                "  {:<widest$} {target:>16} {found:>16}  {verdict:<18}  {}",
                row.what,
                notes.join("; ")
            );
            text += line.trim_end();
            text.push('\n');
        }
        text + "\n" + &self.summary() + "\n"
    }

    /// Encodes the rows as JSON, in the order of the text.
    pub fn rows_json(&self) -> Value {
        self.rows.iter().map(row_json).collect()
    }

    /// Encodes the counts of verdicts as JSON.
    pub fn summary_json(&self) -> Value {
        let mut counts = serde_json::Map::new();
        for verdict in [
            Verdict::Met,
            Verdict::Missed,
            Verdict::Failed,
            Verdict::NotRun,
            Verdict::NoTarget,
        ] {
            counts.insert(verdict.name().replace(' ', "_"), json!(self.count(verdict)));
        }
        counts.insert("cut_short".into(), json!(self.cut_short));
        Value::Object(counts)
    }
}

/// Encodes a number; JSON has none for infinity and NaN, so those become strings.
pub fn number(value: f64) -> Value {
    if value.is_finite() {
        json!(value)
    } else {
        Value::Null
    }
}

fn row_json(row: &Row) -> Value {
    let (found, why) = match &row.found {
        Found::Figure(value) => (number(*value), None),
        Found::NotRun(why) | Found::Failed(why) => (Value::Null, Some(why)),
    };
    let target = match row.target {
        None => Value::Null,
        Some(Target::AtMost(value)) => json!({ "at_most": number(value) }),
        Some(Target::AtLeast(value)) => json!({ "at_least": number(value) }),
    };
    json!({
        "part": row.part,
        "what": row.what,
        "how": row.how.name(),
        "unit": row.unit,
        "target": target,
        "found": found,
        "verdict": row.verdict().name(),
        "why": why,
        "note": row.note,
    })
}

/// Formats three or four digits.
fn show(value: f64) -> String {
    let size = value.abs();
    if value == 0.0 || !value.is_finite() {
        format!("{value}")
    } else if !(1e-3..1e7).contains(&size) {
        format!("{value:.1e}")
    } else if value.fract() == 0.0 {
        format!("{value:.0}")
    } else {
        let digits = if size < 1.0 {
            3
        } else if size < 10.0 {
            2
        } else {
            usize::from(size < 1000.0)
        };
        format!("{value:.digits$}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table {
        let why = "tests/data was not found; give --golden FOLDER".to_string();
        Table {
            when: "2026-11-26T01:02:03Z".into(),
            version: "0.1.0".into(),
            host: "a processor".into(),
            gpu: "GPU 0: a GPU".into(),
            rows: vec![
                Row::figure("kernels", "products, Q4_K", 12.34, "%")
                    .with(Target::AtMost(100.0))
                    .compared(),
                Row::figure("golden values", "qwen3moe", 2e-3, "")
                    .with(Target::AtMost(1e-4))
                    .compared(),
                Row::without("golden values", "quantized models", Found::NotRun(why)),
                Row::without(
                    "golden values",
                    "olmoe",
                    Found::Failed("the device failed".into()),
                )
                .compared(),
                Row::figure("rates", "memory, read", 1234.5, "GB/s").noting("of 256 MiB"),
                Row::figure("rates", "share of it", f64::NAN, "%").with(Target::AtLeast(70.0)),
            ],
            cut_short: false,
        }
    }

    #[test]
    fn verdicts_at_and_around_the_bounds() {
        let verdict = |value: f64, target| Row::figure("", "", value, "").with(target).verdict();
        let next = |v: f64| f64::from_bits(v.to_bits() + 1);
        let last = |v: f64| f64::from_bits(v.to_bits() - 1);
        for bound in [1e-4, 12.0, 50.0] {
            assert_eq!(verdict(bound, Target::AtMost(bound)), Verdict::Met);
            assert_eq!(verdict(next(bound), Target::AtMost(bound)), Verdict::Missed);
            assert_eq!(verdict(last(bound), Target::AtMost(bound)), Verdict::Met);
            assert_eq!(verdict(bound, Target::AtLeast(bound)), Verdict::Met);
            assert_eq!(
                verdict(last(bound), Target::AtLeast(bound)),
                Verdict::Missed
            );
            assert_eq!(verdict(next(bound), Target::AtLeast(bound)), Verdict::Met);
        }
        for target in [Target::AtMost(1.0), Target::AtLeast(1.0)] {
            assert_eq!(verdict(f64::NAN, target), Verdict::Missed);
        }
        assert_eq!(verdict(f64::INFINITY, Target::AtMost(1.0)), Verdict::Missed);
        let row = |found| Row::without("", "", found).with(Target::AtMost(1.0));
        assert_eq!(row(Found::NotRun(String::new())).verdict(), Verdict::NotRun);
        assert_eq!(row(Found::Failed(String::new())).verdict(), Verdict::Failed);
        assert_eq!(Row::figure("", "", 1.0, "").verdict(), Verdict::NoTarget);
    }

    #[test]
    fn only_results_can_be_wrong() {
        let wrong: Vec<bool> = table().rows.iter().map(Row::is_wrong).collect();
        assert_eq!(wrong, [false, true, false, true, false, false]);
    }

    #[test]
    fn the_text_has_a_line_a_row() {
        let text = table().text();
        let expected = "\
tier-plan 0.1.0 · 2026-11-26T01:02:03Z
a processor
GPU 0: a GPU

kernels                      target            found
  products, Q4_K            ≤ 100 %           12.3 %  met (compared)

golden values                target            found
  qwen3moe                 ≤ 1.0e-4         0.002  missed (compared)
  quantized models                               -  not run             tests/data was not found; give --golden FOLDER
  olmoe                                          -  failed              the device failed

rates                        target            found
  memory, read                        1234 GB/s  measured            of 256 MiB
  share of it                ≥ 70 %            NaN %  missed (measured)

1 of 4 targets met, 2 missed, 1 failed, 1 not run
";
        // Columns are as wide as their longest entry; what counts is what stands in them.
        let words = |text: &str| -> Vec<Vec<String>> {
            text.lines()
                .map(|l| l.split_whitespace().map(String::from).collect())
                .collect()
        };
        assert_eq!(words(&text), words(expected), "{text}");
        let columns = |line: &str| line.chars().position(|c| c == '(').unwrap_or(0);
        let verdicts: Vec<usize> = text
            .lines()
            .filter(|l| l.contains(" ("))
            .map(columns)
            .collect();
        assert!(verdicts.len() == 3, "{text}");
        assert!(text.lines().all(|line| line == line.trim_end()), "{text}");
        let cut = Table {
            cut_short: true,
            ..table()
        };
        assert!(cut.text().contains("ended before"), "{}", cut.text());
    }

    #[test]
    fn the_json_has_the_same_rows() {
        let (rows, summary) = (table().rows_json(), table().summary_json());
        assert_eq!(rows.as_array().unwrap().len(), 6);
        assert_eq!(rows[0]["target"]["at_most"], 100.0);
        assert_eq!(
            (&rows[0]["verdict"], &rows[0]["how"]),
            (&json!("met"), &json!("compared"))
        );
        assert_eq!(
            (&rows[1]["found"], &rows[1]["verdict"]),
            (&json!(2e-3), &json!("missed"))
        );
        assert!(
            rows[2]["found"].is_null() && rows[2]["why"].as_str().unwrap().contains("--golden")
        );
        assert_eq!(rows[3]["verdict"], "failed");
        assert!(
            rows[4]["target"].is_null()
                && rows[4]["verdict"] == "no target"
                && rows[4]["how"] == "measured"
        );
        assert!(rows[5]["found"].is_null() && rows[5]["verdict"] == "missed");
        assert_eq!(
            summary,
            json!({"met": 1, "missed": 2, "failed": 1, "not_run": 1, "no_target": 1, "cut_short": false})
        );
    }

    #[test]
    fn figures_have_few_digits() {
        let shown: Vec<String> = [
            0.0,
            1e-5,
            0.0123,
            1.234,
            12.34,
            1234.5,
            17.0,
            3e9,
            f64::INFINITY,
        ]
        .into_iter()
        .map(show)
        .collect();
        assert_eq!(
            shown,
            [
                "0", "1.0e-5", "0.012", "1.23", "12.3", "1234", "17", "3.0e9", "inf"
            ]
        );
    }
}
