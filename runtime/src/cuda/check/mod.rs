//! Every kernel against the plain ones of the processor, over random data: the same checks on a GPU, where `selftest`
//! runs them, and on the emulated device of the tests.

mod attention;
mod products;
mod random;
mod small;

use super::{CudaError, Device, Ops};
use random::Random;
use std::sync::Arc;

/// One kernel, compared.
pub struct Check {
    /// The kernel and what it was given.
    pub name: String,
    run: Box<dyn Fn(&Ops, &mut Random) -> Result<Outcome, CudaError> + Send + Sync>,
}

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
    fn floats(&mut self, got: &[f32], expected: impl IntoIterator<Item = (f64, f64)>) {
        let mut n = 0;
        for (got, (expected, allowed)) in got.iter().zip(expected) {
            let got = f64::from(*got);
            let off = if got == expected || got.is_nan() && expected.is_nan() {
                0.0
            } else {
                ((got - expected) / allowed.max(f64::MIN_POSITIVE)).abs()
            };
            // A NaN is worst, and stays.
            if !(off <= self.worst) && !self.worst.is_nan() {
                self.worst = off;
            }
            n += 1;
        }
        if n != got.len() {
            self.worst = f64::INFINITY;
        }
        self.compared += n;
    }

    /// Takes in values that must be the same to the bit.
    fn exactly<T: PartialEq>(&mut self, got: &[T], expected: &[T]) {
        self.compared += got.len();
        if got != expected {
            self.worst = f64::INFINITY;
        }
    }

    /// Takes in another's.
    fn also(&mut self, other: Outcome) {
        self.compared += other.compared;
        if !(other.worst <= self.worst) && !self.worst.is_nan() {
            self.worst = other.worst;
        }
    }
}

impl Check {
    fn new(
        name: impl Into<String>,
        run: impl Fn(&Ops, &mut Random) -> Result<Outcome, CudaError> + Send + Sync + 'static,
    ) -> Self {
        Self { name: name.into(), run: Box::new(run) }
    }

    /// Compares on a device.
    ///
    /// # Errors
    /// When a kernel can't be compiled or the device fails.
    pub fn run(&self, device: &Arc<dyn Device>) -> Result<Outcome, CudaError> {
        let ops = Ops::new(Arc::clone(device));
        let outcome = (self.run)(&ops, &mut Random::new(&self.name))?;
        device.wait()?;
        Ok(outcome)
    }
}

/// All checks, those of each tensor type first.
pub fn all() -> Vec<Check> {
    let mut checks = products::checks();
    checks.extend(small::checks());
    checks.extend(attention::checks());
    checks
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::{shim, source};

    #[test]
    fn every_kernel_agrees_with_the_processor() {
        let shim = shim::shared();
        let device: Arc<dyn Device> = shim.clone();
        for check in all() {
            let outcome = check.run(&device).unwrap_or_else(|error| panic!("{}: {error}", check.name));
            assert!(outcome.is_well(), "{}: {outcome:?}", check.name);
        }
        let launched = shim.launched();
        for kernel in source::MODULES.iter().flat_map(|m| m.kernels) {
            let timed_only = ["read_all", "nothing"].contains(kernel);
            assert!(timed_only || launched.contains(kernel), "no check launches {kernel}");
        }
    }

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
