//! Predicts the plans that the self-test timed from this machine's own rates.

use crate::cost;
use crate::probe::{self, Settings};
use crate::profile::Evidence;
use anyhow::{Context, Result};
use std::path::Path;
use tier_plan_runtime::formats::machine::{Machine, Tier, TierKind};
use tier_plan_runtime::formats::placement::{Placement, Prediction, TierIdx};
use tier_plan_runtime::model::shape::ModelShape;

/// Probes this machine for a model, which takes about a minute.
///
/// # Errors
/// As for `probe --model`.
pub fn machine(model: &Path) -> Result<Machine> {
    Ok(probe::measure(&Settings {
        model: Some(model),
        ..Settings::default()
    })?
    .machine())
}

/// Returns predicted decode tokens per second of a plan over a GPU's memory and main memory, in
/// this order, where a token attends to `at` positions.
///
/// # Errors
/// When the machine has no such GPU, or the model has more experts than can be predicted.
pub fn tok_s(
    machine: &Machine,
    device: u32,
    shape: &ModelShape,
    mut plan: Placement,
    at: u32,
) -> Result<f64> {
    let find = |is_it: &dyn Fn(&Tier) -> bool| machine.tiers.iter().position(is_it);
    let vram = find(&|t| t.kind == TierKind::Vram && t.device() == Some(device));
    let vram = vram.with_context(|| format!("the probe left GPU {device} out"))?;
    let dram = find(&|t| t.kind == TierKind::Dram).context("the probe found no main memory")?;
    let rates = machine.prompt_gflops();
    let mut prompt_gflops = Vec::new();
    for (tier, of) in plan.tiers.iter_mut().zip([vram, dram]) {
        tier.tier = machine.tiers[of].clone();
        prompt_gflops.extend(rates.get(TierIdx::new(of)));
    }
    (plan.layer_overhead_us, plan.token_overhead_us) =
        (machine.layer_overhead_us, machine.token_overhead_us);
    plan.predicted = Prediction {
        at,
        prompt_gflops: prompt_gflops.into(),
        ..Prediction::default()
    };
    Ok(cost::predict(&plan, shape, &Evidence::uniform(shape)?).decode_tok_s)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundled;
    use std::collections::BTreeMap;
    use tier_plan_runtime::KvType;
    use tier_plan_runtime::formats::SourceId;
    use tier_plan_runtime::formats::machine::{Accelerator, Extras};
    use tier_plan_runtime::model::shape::shape_of_file;
    use tier_plan_runtime::plans::in_memory::{all_on_gpu, experts_in_memory};

    fn tier(name: &str, kind: TierKind, read_gbps: f64, unit: Option<u32>) -> Tier {
        let (name, source) = (name.into(), "made up".into());
        Tier {
            name,
            kind,
            capacity_bytes: 1 << 40,
            read_gbps,
            latency_us: 0.0,
            emulated: false,
            unit,
            accelerator: Accelerator::default(),
            source,
        }
    }

    #[test]
    fn a_token_takes_its_bytes_at_the_machines_rates() {
        let shape = shape_of_file(&bundled::path("demo/demo.gguf").unwrap()).unwrap();
        let machine = Machine {
            name: "made up".into(),
            description: String::new(),
            tiers: vec![
                tier("vram", TierKind::Vram, 500.0, Some(1)),
                tier("dram", TierKind::Dram, 10.0, None),
                tier("nvme", TierKind::Nvme, 1.0, None),
            ],
            layer_overhead_us: 0.0,
            token_overhead_us: 7.0,
            extras: Extras {
                prompt_gflops: BTreeMap::from([("dram".into(), 100.0)]),
                ..Extras::default()
            },
            id: SourceId {
                name: "made up".into(),
                hash: String::new(),
            },
        };
        let at = 9;
        let cache: u64 = shape
            .caches
            .iter()
            .map(|c| c.moved_bytes(KvType::F16, at.into(), 1))
            .sum();
        let cache = cache as f64;
        let resident = tok_s(&machine, 1, &shape, all_on_gpu(&shape, 64, KvType::F16), at).unwrap();
        let expected = 7e-6 + (shape.token_bytes() as f64 + cache) / 500e9;
        assert!((resident * expected - 1.0).abs() < 1e-6, "{resident}");
        let hybrid = tok_s(
            &machine,
            1,
            &shape,
            experts_in_memory(&shape, 64, KvType::F16),
            at,
        )
        .unwrap();
        let experts: f64 = shape
            .experts
            .iter()
            .map(|e| (e.expert_bytes * u64::from(e.n_used)) as f64)
            .sum();
        let expected =
            7e-6 + (shape.token_bytes() as f64 - experts + cache) / 500e9 + experts / 10e9;
        assert!((hybrid * expected - 1.0).abs() < 1e-6, "{hybrid}");
        let why = tok_s(&machine, 0, &shape, all_on_gpu(&shape, 64, KvType::F16), at)
            .unwrap_err()
            .to_string();
        assert!(why.contains("GPU 0"), "{why}");
    }
}
