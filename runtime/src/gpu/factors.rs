//! Factors beside matrices, for which GPUs have no kernels: what has some stays on the CPU.

use tier_plan_formats::model::spec::{ModelSpec, MoeSpec};

/// Whether routed experts have factors, so that none of them may go to a GPU.
pub(crate) fn of_experts(spec: &ModelSpec, moe: &MoeSpec) -> bool {
    moe.expert_linears().any(|l| spec.scales.has(l.weight))
}
