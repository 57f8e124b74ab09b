//! Compares every GPU kernel with the CPU's scalar kernels, over random data. The same checks run
//! on a GPU, in `tier-plan selftest`, and on the GPU emulator, in the tests.

mod attention;
mod block_index;
mod by_token;
mod chosen;
mod compressed;
mod delta;
mod gated;
mod index;
mod inputs;
mod kda;
mod kv_rows;
mod mamba;
mod mean_keys;
mod ngram;
mod open_blocks;
mod pooled_index;
mod products;
mod short_conv;
mod small;
mod stream;
mod streams;
mod texts;

use crate::outcome::Outcome;
use std::sync::Arc;
use tier_plan_cuda::{CudaError, Device, Ops};
use tier_plan_formats::model::spec::Activation;
use tier_plan_kernels::random::Random;

/// Every activation, with bounds within what random products reach.
const ACTIVATIONS: [Activation; 7] = [
    Activation::Silu,
    Activation::ClampedSwiglu {
        alpha: 1.702,
        limit: 7.0,
    },
    Activation::ClampedSilu { limit: 0.75 },
    Activation::LimitedSilu { limit: 0.5 },
    Activation::Gelu,
    Activation::Situ {
        beta: 4.0,
        linear: 25.0,
    },
    Activation::SquaredRelu,
];

type Comparison = Box<dyn Fn(&Ops, &mut Random) -> Result<Outcome, CudaError> + Send + Sync>;

/// A comparison of one kernel.
pub struct Check {
    /// Name of the kernel and its input.
    pub name: String,
    run: Comparison,
}

impl Check {
    fn new(
        name: impl Into<String>,
        run: impl Fn(&Ops, &mut Random) -> Result<Outcome, CudaError> + Send + Sync + 'static,
    ) -> Self {
        Self {
            name: name.into(),
            run: Box::new(run),
        }
    }

    /// Runs the comparison on a device.
    ///
    /// # Errors
    /// When a kernel can't be compiled, or the device fails.
    pub fn run(&self, device: &Arc<dyn Device>) -> Result<Outcome, CudaError> {
        let ops = Ops::new(Arc::clone(device));
        let outcome = (self.run)(&ops, &mut Random::new(&self.name))?;
        device.wait()?;
        Ok(outcome)
    }
}

/// Returns all checks, those per format first.
pub fn all() -> Vec<Check> {
    let mut checks = products::checks();
    checks.extend(gated::checks());
    checks.extend(chosen::checks());
    checks.extend(small::checks());
    checks.extend(by_token::checks());
    checks.extend(kv_rows::checks());
    checks.extend(attention::checks());
    checks.extend(index::checks());
    checks.extend(block_index::checks());
    checks.extend(mean_keys::checks());
    checks.extend(pooled_index::checks());
    checks.extend(compressed::checks());
    checks.extend(open_blocks::checks());
    checks.extend(delta::checks());
    checks.extend(kda::checks());
    checks.extend(mamba::checks());
    checks.extend(short_conv::checks());
    checks.extend(stream::checks());
    checks.extend(streams::checks());
    checks.extend(ngram::checks());
    checks.extend(inputs::checks());
    checks
}

#[cfg(test)]
mod tests {
    use super::*;
    use tier_plan_cuda::{shim, source};

    #[test]
    fn every_kernel_agrees_with_the_cpu() {
        let shim = shim::shared();
        let device: Arc<dyn Device> = shim.clone();
        for check in all() {
            let outcome = check
                .run(&device)
                .unwrap_or_else(|error| panic!("{}: {error}", check.name));
            assert!(outcome.passed(), "{}: {outcome:?}", check.name);
        }
        let launched = shim.launched();
        for kernel in source::MODULES.iter().flat_map(|m| m.kernels) {
            let timed_only = ["read_all", "nothing"].contains(kernel);
            assert!(
                timed_only || launched.contains(kernel),
                "no check launches {kernel}"
            );
        }
    }
}
