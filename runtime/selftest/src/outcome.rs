//! The outcome of comparing values with a reference.

/// A reference value with its tolerance.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Expected {
    /// The reference's value.
    pub value: f64,
    /// Largest allowed absolute difference.
    pub allowed: f64,
}

impl Expected {
    /// Makes a value with an absolute tolerance.
    pub(crate) fn within(value: f32, allowed: f64) -> Self {
        Self {
            value: f64::from(value),
            allowed,
        }
    }

    /// Makes a value with a tolerance relative to its magnitude, or to `least` if that is larger.
    pub(crate) fn relative(value: f32, tolerance: f64, least: f32) -> Self {
        Self::within(value, tolerance * f64::from(value.abs().max(least)))
    }

    /// Makes the expected values of a plain product, which come as pairs of value and tolerance.
    pub(crate) fn of_product(pairs: Vec<(f64, f64)>) -> Vec<Self> {
        pairs
            .into_iter()
            .map(|(value, allowed)| Self { value, allowed })
            .collect()
    }
}

/// The outcome of a comparison.
#[derive(Debug, Clone, Copy, Default)]
pub struct Outcome {
    /// Number of values compared.
    pub compared: usize,
    /// Largest difference as a share of the tolerance: at most 1 passes. NaN if only one of two
    /// values is NaN.
    pub worst: f64,
}

impl Outcome {
    /// Whether values were compared and all differences are within the tolerance.
    pub fn passed(&self) -> bool {
        self.worst <= 1.0 && self.compared > 0
    }

    /// Compares values with expected ones.
    pub(crate) fn compare(&mut self, got: &[f32], expected: impl IntoIterator<Item = Expected>) {
        let mut n = 0;
        for (got, Expected { value, allowed }) in got.iter().zip(expected) {
            let got = f64::from(*got);
            let share = if got == value || got.is_nan() && value.is_nan() {
                0.0
            } else {
                ((got - value) / allowed.max(f64::MIN_POSITIVE)).abs()
            };
            self.note(share);
            n += 1;
        }
        if n != got.len() {
            self.worst = f64::INFINITY;
        }
        self.compared += n;
    }

    /// Compares values that must be equal.
    pub(crate) fn compare_exact<T: PartialEq>(&mut self, got: &[T], expected: &[T]) {
        self.compared += got.len();
        if got != expected {
            self.worst = f64::INFINITY;
        }
    }

    /// Adds the outcome of another comparison.
    pub(crate) fn merge(&mut self, other: Outcome) {
        self.compared += other.compared;
        self.note(other.worst);
    }

    /// Keeps the largest share; a NaN is the largest.
    fn note(&mut self, share: f64) {
        if share.is_nan() || share > self.worst {
            self.worst = share;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_beyond_the_tolerance_fail() {
        let expected = |value, allowed| Expected { value, allowed };
        let mut outcome = Outcome::default();
        outcome.compare(&[1.0, 2.0], [expected(1.0, 0.1), expected(2.05, 0.1)]);
        assert!(outcome.passed() && outcome.compared == 2 && outcome.worst > 0.4);
        outcome.compare(&[1.0], [expected(2.0, 0.1)]);
        assert!(!outcome.passed());
        for (got, value) in [(f32::NAN, 1.0), (1.0, f64::NAN), (f32::INFINITY, 1.0)] {
            let mut outcome = Outcome::default();
            outcome.compare(&[got, 0.0], [expected(value, 1.0), expected(0.0, 1.0)]);
            assert!(!outcome.passed(), "{got} {value}");
        }
        assert!(!Outcome::default().passed(), "nothing was compared");
        let mut outcome = Outcome::default();
        outcome.compare_exact(&[1, 2], &[1, 3]);
        assert!(!outcome.passed());
        let mut merged = Outcome {
            compared: 1,
            worst: 0.5,
        };
        merged.merge(outcome);
        assert!(!merged.passed());
    }
}
