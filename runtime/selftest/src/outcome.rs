//! Comparing kernels with the plain ones on the machine at hand: what `selftest` runs.

/// What a comparison found.
#[derive(Debug, Clone, Copy, Default)]
pub struct Outcome {
    /// Values compared.
    pub compared: usize,
    /// The largest difference as a share of what is allowed; at most 1 is well. NaN where only one of two is one.
    pub worst: f64,
}

impl Outcome {
    /// Whether nothing was too far off.
    pub fn is_well(&self) -> bool {
        self.worst <= 1.0 && self.compared > 0
    }

    /// Takes in values and the difference allowed for each.
    pub(crate) fn floats(&mut self, got: &[f32], expected: impl IntoIterator<Item = (f64, f64)>) {
        let mut n = 0;
        for (got, (expected, allowed)) in got.iter().zip(expected) {
            let got = f64::from(*got);
            let off = if got == expected || got.is_nan() && expected.is_nan() {
                0.0
            } else {
                ((got - expected) / allowed.max(f64::MIN_POSITIVE)).abs()
            };
            self.worse(off);
            n += 1;
        }
        if n != got.len() {
            self.worst = f64::INFINITY;
        }
        self.compared += n;
    }

    /// Takes in values that must be the same to the bit.
    pub(crate) fn exactly<T: PartialEq>(&mut self, got: &[T], expected: &[T]) {
        self.compared += got.len();
        if got != expected {
            self.worst = f64::INFINITY;
        }
    }

    /// Takes in another's.
    pub(crate) fn also(&mut self, other: Outcome) {
        self.compared += other.compared;
        self.worse(other.worst);
    }

    /// A NaN is worst, and stays.
    fn worse(&mut self, off: f64) {
        if off.is_nan() || off > self.worst {
            self.worst = off;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_found() {
        let mut outcome = Outcome::default();
        outcome.floats(&[1.0, 2.0], [(1.0, 0.1), (2.05, 0.1)]);
        assert!(outcome.is_well() && outcome.compared == 2 && outcome.worst > 0.4);
        outcome.floats(&[1.0], [(2.0, 0.1)]);
        assert!(!outcome.is_well());
        for (got, expected) in [(f32::NAN, 1.0), (1.0, f64::NAN), (f32::INFINITY, 1.0)] {
            let mut outcome = Outcome::default();
            outcome.floats(&[got, 0.0], [(expected, 1.0), (0.0, 1.0)]);
            assert!(!outcome.is_well(), "{got} {expected}");
        }
        assert!(!Outcome::default().is_well(), "nothing was compared");
        let mut outcome = Outcome::default();
        outcome.exactly(&[1, 2], &[1, 3]);
        assert!(!outcome.is_well());
        let mut all = Outcome { compared: 1, worst: 0.5 };
        all.also(outcome);
        assert!(!all.is_well());
    }
}
