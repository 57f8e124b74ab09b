//! The predicted time of a step, learned from measured steps.
//!
//! A step takes the time of its decoding rows and that of its prompt rows; each is a line: a fixed
//! time and a time per row. A prompt's line has a fixed time of its own, because its first rows read
//! experts that further rows share. Each line is a least-squares fit in which older steps count less.
//! All numbers are integers, so that equal steps give equal schedules on every machine.

use std::time::Duration;

/// Before anything is measured: 10 ms and 2 ms per decoding row, 5 ms and 1 ms per prompt row. The
/// first measurement scales them.
const PRIOR_DECODE: Line = Line::new(10_000_000, 2_000_000);
const PRIOR_PROMPT: Line = Line::new(5_000_000, 1_000_000);

/// Longest time and most rows that count, so that no sum overflows.
const MAX_NANOS: i128 = 3_600_000_000_000;
const MAX_ROWS: i128 = 1 << 20;

/// Weight of a new measurement; of an old one 15/16 are left each time.
const WEIGHT: i128 = 1 << 16;

/// Predicted time of a number of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RowsTime {
    /// Rows.
    pub rows: usize,
    /// Their time.
    pub time: Duration,
}

/// Estimate of the time of steps.
#[derive(Debug, Clone)]
pub struct StepCost {
    decode: Line,
    prompt: Line,
    is_predicted: bool,
}

impl Default for StepCost {
    fn default() -> Self {
        Self {
            decode: PRIOR_DECODE,
            prompt: PRIOR_PROMPT,
            is_predicted: false,
        }
    }
}

impl StepCost {
    /// Creates an estimate from predictions: two steps of decoding rows, and what two chunks of a
    /// prompt add to a step. Measured steps correct it.
    pub fn predicted(decode: [RowsTime; 2], prompt: [RowsTime; 2]) -> Self {
        Self {
            decode: Line::through(decode),
            prompt: Line::through(prompt),
            is_predicted: true,
        }
    }

    /// Returns the predicted time of a step.
    pub fn predict(&self, decode_rows: usize, prompt_rows: usize) -> Duration {
        let mut nanos = self.decode.at(rows(decode_rows));
        if prompt_rows > 0 {
            nanos += self.prompt.at(rows(prompt_rows));
        }
        duration(nanos)
    }

    /// Whether steps without prompts were measured or predicted.
    pub fn knows_decoding(&self) -> bool {
        self.is_predicted || self.decode.is_measured()
    }

    /// Returns the most prompt rows with which a step stays within a time.
    pub fn prompt_rows_within(&self, decode_rows: usize, time: Duration) -> usize {
        let left = nanos(time) - self.decode.at(rows(decode_rows)) - self.prompt.fixed;
        match (left, self.prompt.per_row) {
            (..0, _) => 0,
            (_, 0) => usize::MAX,
            (left, per_row) => usize::try_from(left / per_row).unwrap_or(usize::MAX),
        }
    }

    /// Learns from a measured step.
    pub fn learn(&mut self, decode_rows: usize, prompt_rows: usize, took: Duration) {
        let (took, decode) = (nanos(took), rows(decode_rows));
        if decode_rows == 0 && prompt_rows == 0 {
            return;
        }
        if prompt_rows == 0 {
            return self.decode.learn(decode, took);
        }
        let rest = took - self.decode.at(decode);
        if self.decode.is_measured() {
            self.prompt.learn(rows(prompt_rows), rest.max(0));
        } else if self.is_predicted {
            // Predicted steps are good enough to tell what is left to the prompts.
            self.prompt.learn(rows(prompt_rows), rest.max(took / 2));
        } else {
            // The estimate of decoding may be more than the whole step took, so this says no more
            // than how fast the machine is.
            self.prompt.scale(rows(prompt_rows), rest.max(took / 2));
        }
    }
}

/// A line through measurements, in nanoseconds, with weighted sums of what was measured.
#[derive(Debug, Clone)]
struct Line {
    fixed: i128,
    per_row: i128,
    weight: i128,
    rows: i128,
    nanos: i128,
    rows_squared: i128,
    rows_nanos: i128,
}

impl Line {
    const fn new(fixed: i128, per_row: i128) -> Self {
        Self {
            fixed,
            per_row,
            weight: 0,
            rows: 0,
            nanos: 0,
            rows_squared: 0,
            rows_nanos: 0,
        }
    }

    /// Returns the line through two points, neither part of which is negative.
    fn through([a, b]: [RowsTime; 2]) -> Self {
        let (from, to) = if a.rows <= b.rows { (a, b) } else { (b, a) };
        let (low, high) = (nanos(from.time), nanos(to.time));
        let apart = (rows(to.rows) - rows(from.rows)).max(1);
        let per_row = ((high - low) / apart).max(0);
        match low - per_row * rows(from.rows) {
            fixed @ 0.. => Self::new(fixed, per_row),
            _ => Self::new(0, high / rows(to.rows).max(1)),
        }
    }

    fn is_measured(&self) -> bool {
        self.weight > 0
    }

    fn at(&self, rows: i128) -> i128 {
        self.fixed + self.per_row * rows
    }

    fn learn(&mut self, rows: i128, nanos: i128) {
        if !self.is_measured() {
            self.scale(rows, nanos);
        }
        for (sum, value) in [
            (&mut self.weight, 1),
            (&mut self.rows, rows),
            (&mut self.nanos, nanos),
            (&mut self.rows_squared, rows * rows),
            (&mut self.rows_nanos, rows * nanos),
        ] {
            *sum = *sum - *sum / 16 + value * WEIGHT;
        }
        self.fit();
    }

    /// Keeps the proportions, and takes their size from a measurement.
    fn scale(&mut self, rows: i128, nanos: i128) {
        let predicted = self.at(rows).max(1);
        self.fixed = self.fixed * nanos / predicted;
        self.per_row = self.per_row * nanos / predicted;
    }

    fn fit(&mut self) {
        let (w, rows, nanos) = (self.weight, self.rows, self.nanos);
        let spread = w * self.rows_squared - rows * rows;
        // Steps of nearly equal size say nothing of the time per row: it stays.
        if spread > w * w / 4 {
            self.per_row = ((w * self.rows_nanos - rows * nanos) / spread).max(0);
        }
        self.fixed = (nanos - self.per_row * rows) / w;
        if self.fixed < 0 {
            self.fixed = 0;
            self.per_row = nanos / rows.max(1);
        }
    }
}

fn rows(rows: usize) -> i128 {
    i128::try_from(rows).unwrap_or(MAX_ROWS).min(MAX_ROWS)
}

fn nanos(time: Duration) -> i128 {
    i128::try_from(time.as_nanos())
        .unwrap_or(MAX_NANOS)
        .min(MAX_NANOS)
}

fn duration(nanos: i128) -> Duration {
    Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
}
