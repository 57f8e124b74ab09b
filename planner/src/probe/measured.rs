//! Summaries of repeated measurements, and how often to repeat them.

use std::time::{Duration, Instant};

/// Part of the median to which it has to be known before repeating ends: `IQR / √n`, about the
/// standard error of a median (0.93 of it for normally distributed values).
const STABLE: f64 = 0.02;

/// Repetitions from which on the moment of each counts less than the drift of all.
const MANY: usize = 10;

/// A figure from several repetitions.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Measured {
    /// Median.
    pub value: f64,
    /// (largest − smallest) / median, of the means of fifths in order of time where there are many.
    pub spread: f64,
    /// Interquartile range / median.
    pub iqr: f64,
}

/// How often something is measured.
#[derive(Debug, Clone, Copy)]
pub struct Repeats {
    /// Fewest repetitions.
    pub least: usize,
    /// Time after which repeating ends, whether the figure is stable or not.
    pub time: Duration,
}

impl Repeats {
    /// Measures until the median is known to 2 %, or the time is over.
    pub fn measure(self, measure: impl FnMut() -> f64) -> Measured {
        let start = Instant::now();
        self.measure_by(|| start.elapsed(), measure)
    }

    /// Measures as [`measure`](Self::measure) does, by a clock.
    fn measure_by(
        self,
        mut elapsed: impl FnMut() -> Duration,
        mut measure: impl FnMut() -> f64,
    ) -> Measured {
        let mut values = Vec::new();
        while values.len() < self.least.max(1)
            || (!Measured::is_stable(&values) && elapsed() < self.time)
        {
            values.push(measure());
        }
        if values.len() < MANY {
            Measured::of(values)
        } else {
            Measured::of_many(&values)
        }
    }
}

impl Measured {
    /// Summarizes repetitions; of an empty list, all figures are 0.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let (Some(first), Some(last)) = (values.first(), values.last()) else {
            return Measured::default();
        };
        let value = quantile(&values, 0.5);
        let part = |range: f64| if value > 0.0 { range / value } else { 0.0 };
        Measured {
            value,
            spread: part(last - first),
            iqr: part(quantile(&values, 0.75) - quantile(&values, 0.25)),
        }
    }

    /// Summarizes many short repetitions in order of time: the median of all, and the spread of the
    /// means of fifths. Single short repetitions say more about the moment than about the machine.
    pub fn of_many(values: &[f64]) -> Self {
        let fifths: Vec<f64> = values
            .chunks(values.len().div_ceil(5).max(1))
            .map(|part| part.iter().sum::<f64>() / part.len() as f64)
            .collect();
        Measured {
            spread: Measured::of(fifths).spread,
            ..Measured::of(values.to_vec())
        }
    }

    /// Whether the median of repetitions is known well enough.
    pub fn is_stable(values: &[f64]) -> bool {
        let n = values.len() as f64;
        n > 1.0 && Measured::of(values.to_vec()).iqr / n.sqrt() <= STABLE
    }
}

/// Returns a quantile of ascending values, between two of them in proportion; 0 of none.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    let at = share * sorted.len().saturating_sub(1) as f64;
    let (below, above) = (at.floor() as usize, at.ceil() as usize);
    match (sorted.get(below), sorted.get(above)) {
        (Some(below), Some(above)) => below + (above - below) * at.fract(),
        _ => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Repeats with values that take a tenth of a second each.
    fn repeat(least: usize, seconds: u64, value: impl Fn(usize) -> f64) -> (Measured, usize) {
        let done = std::cell::Cell::new(0);
        let limits = Repeats {
            least,
            time: Duration::from_secs(seconds),
        };
        let measured = limits.measure_by(
            || Duration::from_millis(100 * done.get() as u64),
            || {
                done.set(done.get() + 1);
                value(done.get())
            },
        );
        (measured, done.get())
    }

    #[test]
    fn a_stable_figure_is_measured_a_few_times() {
        let (measured, times) = repeat(5, 60, |n| 20.0 + 0.1 * (n % 3) as f64);
        assert_eq!(times, 5);
        assert!((measured.value - 20.1).abs() < 0.11 && measured.iqr < 0.01);
    }

    #[test]
    fn a_noisy_figure_is_repeated_until_its_median_is_known() {
        // Every second value is a third below.
        let noisy = |n: usize| if n.is_multiple_of(2) { 20.0 } else { 30.0 };
        let (measured, times) = repeat(5, 3600, noisy);
        assert!((250..1000).contains(&times), "{times}");
        assert!((20.0..=30.0).contains(&measured.value));
        assert!(measured.iqr > 0.3 && measured.spread < 0.05, "{measured:?}");
    }

    #[test]
    fn time_ends_what_stays_unknown_and_the_drift_is_told() {
        let falling = |n: usize| 30.0 / (1.0 + 0.2 * n as f64);
        let (measured, times) = repeat(5, 4, falling);
        assert_eq!(times, 40);
        assert!(measured.spread > 0.4, "{measured:?}");
        // Even without any time there is a figure.
        assert_eq!(repeat(0, 0, falling).1, 1);
    }

    #[test]
    fn quantiles_lie_between_values() {
        assert_eq!(quantile(&[], 0.5), 0.0);
        assert_eq!(quantile(&[7.0], 0.75), 7.0);
        assert_eq!(quantile(&[1.0, 2.0, 3.0, 4.0], 0.5), 2.5);
        assert_eq!(quantile(&[1.0, 2.0, 3.0, 4.0, 5.0], 0.25), 2.0);
    }
}
