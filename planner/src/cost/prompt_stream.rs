//! Predicts which experts in main memory a prompt streams through a GPU, and what that takes.
//!
//! The engine streams those of a layer whose router is on the GPU, the busiest first, as many as balance
//! its link against the arithmetic of the CPU (`tier_plan_runtime`'s `moe::offload`). This is that choice
//! with the expected uses of a batch. Where the plan has experts streamed for tokens, their memory is
//! locked, and the GPU reads it. Elsewhere CPU threads copy each expert first, at half of the memory's
//! rate, since a copy reads and writes.

use super::prompt::Touched;
use super::{BATCH, read_s};
use tier_plan_runtime::formats::machine::{Tier, TierKind};
use tier_plan_runtime::formats::placement::{PerTier, Placement, TierIdx};
use tier_plan_runtime::model::gpu::Part;
use tier_plan_runtime::model::shape::{DenseKind, ExpertShape, ModelShape};

/// A GPU that the experts of a layer pass through, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct PromptStream {
    /// Tier of the GPU.
    pub(super) gpu: TierIdx,
    /// Bytes of an expert over the link.
    link_s: f64,
    /// A CPU's copy of an expert, 0 where the GPU reads it itself.
    copy_s: f64,
    /// The rows of a batch over the link, and the sums back.
    rows_s: f64,
    /// The CPU's arithmetic of one expert for one token.
    use_s: f64,
}

/// Experts of a layer that pass through a GPU.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Streamed {
    /// How many of the busiest.
    pub(super) n: usize,
    /// Time of the link, or of the copies if they take longer, and of the rows.
    pub(super) link_s: f64,
    /// Time of the CPU for copies.
    pub(super) copy_s: f64,
}

impl PromptStream {
    /// Returns the GPU that a layer's experts may pass through, where all is known that this takes.
    pub(super) fn of(
        plan: &Placement,
        model: &ModelShape,
        layer: &ExpertShape,
        tiers: &PerTier<Tier>,
    ) -> Option<Self> {
        if tiers.iter().any(|tier| tier.emulated) {
            return None;
        }
        let here = Some(layer.layer);
        let mut groups = plan.dense.iter();
        let router = groups.find(|d| d.kind == DenseKind::Router && d.layer == here)?;
        let gpu = Some(router.tier).filter(|tier| tiers[*tier].is_gpu())?;
        if model.cpu_only.iter().any(|o| o.is(Part::Experts, here)) {
            return None;
        }
        let rates = tiers.iter().zip(&plan.predicted.prompt_gflops);
        let of_cpu = rates.filter(|(tier, rate)| tier.kind != TierKind::Vram && **rate > 0.0);
        let gflops = of_cpu.map(|(_, rate)| *rate).next()?;
        let link = tiers[gpu]
            .accelerator
            .link_gbps
            .filter(|rate| *rate > 0.0)?
            * 1e9;
        let is_locked = plan
            .streaming
            .is_some_and(|streaming| streaming.tier == gpu);
        let memory = tiers.iter().find(|tier| tier.kind == TierKind::Dram)?;
        let bytes = layer.expert_bytes as f64;
        Some(Self {
            gpu,
            link_s: bytes / link,
            copy_s: match is_locked {
                true => 0.0,
                false => 2.0 * read_s(memory, bytes),
            },
            rows_s: 8.0 * f64::from(model.hidden) * f64::from(BATCH) / link,
            use_s: 2.0 * layer.expert_macs as f64 / (gflops * 1e9),
        })
    }

    /// Chooses how many of these experts pass, which are the busiest first; `uses` are those of all
    /// experts that the CPU would compute.
    pub(super) fn choose(&self, busiest: &[Touched], uses: f64) -> Streamed {
        // The engine measures the slower of the link and the copies, which go on side by side.
        let stream_s = self.link_s.max(self.copy_s);
        let mut cpu_s = self.use_s * uses;
        let (mut best_s, mut best, mut experts) = (cpu_s, Streamed::default(), 0.0);
        for (n, touched) in busiest.iter().enumerate() {
            cpu_s -= self.use_s * touched.uses;
            experts += touched.experts;
            let seconds = cpu_s.max(self.rows_s + stream_s * experts);
            if seconds < best_s {
                best_s = seconds;
                best = Streamed {
                    n: n + 1,
                    link_s: self.rows_s + stream_s * experts,
                    copy_s: self.copy_s * experts,
                };
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::super::prompt::batch_s;
    use super::*;
    use crate::catalogue;
    use crate::profile::Evidence;
    use crate::solve::{Options, Problem, solve_with_evidence};
    use std::path::Path;
    use tier_plan_runtime::KvType;
    use tier_plan_runtime::formats::machine;
    use tier_plan_runtime::formats::placement::Streaming;
    use tier_plan_testing::Random;

    #[test]
    fn the_number_of_experts_balances_both_sides() {
        let mut random = Random(7);
        for _ in 0..200 {
            let mut draw = || random.below(1000) as f64 / 100.0;
            let stream = PromptStream {
                gpu: TierIdx::FIRST,
                link_s: draw(),
                copy_s: draw(),
                rows_s: draw(),
                use_s: draw() / 20.0,
            };
            let mut busiest: Vec<Touched> = (0..6)
                .map(|_| Touched {
                    experts: draw() / 10.0,
                    uses: 4.0 * draw(),
                })
                .collect();
            busiest.sort_by(|a, b| b.uses.total_cmp(&a.uses));
            let all = 30.0 + busiest.iter().map(|t| t.uses).sum::<f64>();
            let found = stream.choose(&busiest, all);
            let seconds = |n: usize| {
                let [experts, uses] = busiest[..n].iter().fold([0.0, 0.0], |[experts, uses], t| {
                    [experts + t.experts, uses + t.uses]
                });
                let cpu_s = stream.use_s * (all - uses);
                let stream_s = experts * stream.link_s.max(stream.copy_s);
                match n {
                    0 => cpu_s,
                    _ => cpu_s.max(stream.rows_s + stream_s),
                }
            };
            let least = (0..=6).map(seconds).fold(f64::INFINITY, f64::min);
            assert!((seconds(found.n) - least).abs() < 1e-9, "{stream:?}");
        }
    }

    /// A plan of experts in main memory, with attention and routers on a GPU.
    fn plan(shape: &ModelShape, evidence: &Evidence) -> Placement {
        let text = "format = \"tier-plan machine\"\nversion = 4\nname = \"m\"\nlayer_overhead_us = 0\n\
                    token_overhead_us = 0\n[[tier]]\nname = \"vram\"\nkind = \"vram\"\ncapacity = \"8GiB\"\n\
                    read_gbps = 800\nlatency_us = 0\nprompt_gflops = 50000\ndevice = 0\nlink_gbps = 20\nsource = \"test\"\n\
                    [[tier]]\nname = \"dram\"\nkind = \"dram\"\ncapacity = \"64GiB\"\nread_gbps = 50\nlatency_us = 0\n\
                    prompt_gflops = 100\nsource = \"test\"\n";
        let machine = machine::decode(text.as_bytes(), Path::new("m.toml")).unwrap();
        let problem = Problem {
            shape,
            profile: None,
            machine: &machine,
            budgets: vec![2 << 30, 64 << 30],
            context: 1024,
            sequences: 1,
            kv_type: KvType::F16,
            position: None,
        };
        let options = Options {
            time_limit_s: 1.0,
            ..Options::default()
        };
        let mut plan = solve_with_evidence(&problem, evidence, &options)
            .unwrap()
            .plan;
        plan.layers
            .iter_mut()
            .for_each(|layer| layer.pinned.clear());
        plan
    }

    #[test]
    fn prompts_pass_through_a_gpu_as_fast_as_its_link() {
        let known = catalogue::model(Path::new("qwen3-30b-a3b"), Some("q4_k_m")).unwrap();
        let (shape, evidence) = (&known.sizes, Evidence::uniform(&known.sizes).unwrap());
        let mut plan = plan(shape, &evidence);
        let with = |plan: &Placement| batch_s(plan, shape, &evidence);
        let copied = with(&plan);
        plan.streaming = Some(Streaming {
            tier: TierIdx::FIRST,
            from: TierIdx::new(1),
            experts: 2,
            link_gbps: 20.0,
            cpu_share: 1.0,
        });
        let locked = with(&plan);
        plan.tiers[TierIdx::FIRST].tier.accelerator.link_gbps = None;
        let cpu = with(&plan);
        plan.tiers[TierIdx::FIRST].tier.accelerator.link_gbps = Some(20.0);
        plan.tiers[TierIdx::new(1)].tier.emulated = true;
        assert_eq!(with(&plan), cpu, "of an emulated tier nothing is streamed");
        plan.tiers[TierIdx::new(1)].tier.emulated = false;
        // A GPU that needs as long for its products as the CPU helps little.
        plan.predicted.prompt_gflops[TierIdx::FIRST] = 100.0;
        assert!(with(&plan) > 0.4 * cpu);

        // 512 tokens use all of 128 experts. The CPU's arithmetic and the link end together, and a copy of
        // each expert takes the CPU another 2 / 50 of a second per gigabyte.
        let bytes: u64 = shape.experts.iter().map(|e| 128 * e.expert_bytes).sum();
        let link = bytes as f64 / 20e9;
        let rows = shape.experts.len() as f64 * 8.0 * 2048.0 * 512.0 / 20e9;
        assert!(locked < copied && copied < cpu, "{locked} {copied} {cpu}");
        let share = 1.0 / (1.0 + link / cpu);
        let expected = link * share + rows;
        assert!(
            (locked / expected - 1.0).abs() < 0.15,
            "{locked} {expected}"
        );
    }
}
