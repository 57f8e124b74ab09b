//! What tokens alone name: tables, and the experts of hash-routed layers; and what GPUs refuse.

use super::*;
use crate::catalogue;
use std::collections::BTreeSet;
use std::path::Path;
use tier_plan_runtime::formats::placement::DensePlacement;
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::gpu::check_parts;
use tier_plan_runtime::model::gpu::{CpuOnly, CpuReason, Part};
use tier_plan_runtime::model::kv::CacheRoom;
use tier_plan_runtime::model::{describe, shape::shape_of};

const DRAM: usize = 0;
const DRIVE: usize = 1;

/// Main memory and a real drive.
fn two_tiers() -> Machine {
    machine(three_tiers().split_off(1))
}

fn problem<'a>(shape: &'a ModelShape, machine: &'a Machine, budgets: &[u64]) -> Problem<'a> {
    Problem {
        shape,
        profile: None,
        machine,
        budgets: budgets.to_vec(),
        context: 100,
        sequences: 1,
        kv_type: KvType::F16,
        position: None,
    }
}

/// Returns the tier of the group of a kind that belongs to no layer.
fn tier_of(plan: &Placement, kind: DenseKind) -> usize {
    let group = plan.dense.iter().find(|d| d.kind == kind).unwrap();
    group.tier.get()
}

/// Returns the experts of a layer that main memory holds, pinned or in slots.
fn held(layer: &LayerPlacement) -> u32 {
    let pins = layer.pinned.iter().map(|pins| pins.experts.len() as u32);
    pins.sum::<u32>() + layer.slots
}

/// Adds a table that takes more than all experts.
fn with_table(token_bytes: u64) -> ModelShape {
    let mut shape = shape(6, 16, 2, 1_000_000);
    shape.dense.push(DenseShape {
        kind: DenseKind::TokenTable,
        layer: None,
        bytes: 200_000_000,
        token_bytes,
        macs: 0,
    });
    shape
}

#[test]
fn a_table_of_few_rows_leaves_memory_to_experts() -> Result<()> {
    // Main memory has room for the table, or for half of the experts.
    let (machine, budgets) = (two_tiers(), [220_000_000, 1 << 40]);
    let few = with_table(5_000);
    let problem_of_few = problem(&few, &machine, &budgets);
    let solved = solve(&problem_of_few, &options())?;
    for plan in solved.baselines.iter().chain([&solved.plan]) {
        assert_eq!(tier_of(plan, DenseKind::TokenTable), DRIVE, "{}", plan.name);
    }
    let experts: u32 = solved.plan.layers.iter().map(held).sum();
    assert_eq!(experts, 6 * 16);
    // The read of the rows is predicted: the drive's latency, and their bytes.
    let dense_s = solved.plan.predicted.dense_s[TierIdx::new(DRIVE)];
    let embedding = match tier_of(&solved.plan, DenseKind::Embedding) {
        DRIVE => 100.0 / 2e9,
        _ => 0.0,
    };
    assert!(
        (dense_s - embedding - (60e-6 + 5_000.0 / 2e9)).abs() < 1e-12,
        "{dense_s}"
    );

    // A table of which a token reads most is worth more than experts.
    let most = with_table(150_000_000);
    let plan = plan_of(&problem(&most, &machine, &budgets), &options())?;
    assert_eq!(tier_of(&plan, DenseKind::TokenTable), DRAM);
    Ok(())
}

#[test]
fn experts_that_tokens_choose_get_memory_last() -> Result<()> {
    // The dense stage of a layer takes 1.5 ms, the reads of two experts 1.06 ms.
    let mut shape = shape(6, 16, 2, 1_000_000);
    for group in &mut shape.dense {
        if group.kind == DenseKind::Attention {
            (group.bytes, group.token_bytes) = (30_000_000, 30_000_000);
        }
    }
    let machine = two_tiers();
    // Beside dense groups and staging: 24 of 96 experts.
    let budgets = [6 * 30_000_000 + 2_000_000 + 3_000_000 + 28_100_000, 1 << 40];
    let held_by = |shape: &ModelShape| -> Result<Vec<u32>> {
        let plan = plan_of(&problem(shape, &machine, &budgets), &options())?;
        Ok(plan.layers.iter().map(held).collect())
    };
    let routed = held_by(&shape)?;
    assert!(routed.iter().sum::<u32>() >= 24, "{routed:?}");
    for layer in &mut shape.experts[..3] {
        layer.by_token = true;
    }
    let held = held_by(&shape)?;
    assert_eq!(held[..3], [0, 0, 0], "their reads are hidden");
    assert!(held[3..].iter().sum::<u32>() >= 24, "{held:?}");
    Ok(())
}

#[test]
fn what_is_hidden_of_exact_reads_is_the_dense_stage() -> Result<()> {
    let mut shape = shape(1, 16, 2, 1_000_000);
    let machine = two_tiers();
    let budgets = [10_000_000, 1 << 40];
    let time = |shape: &ModelShape| -> Result<f64> {
        let baseline = Options {
            strategy: Strategy::Uniform,
            ..options()
        };
        let plan = plan_of(&problem(shape, &machine, &budgets), &baseline)?;
        Ok(plan.predicted.expert_critical_s)
    };
    let routed = time(&shape)?;
    shape.experts[0].by_token = true;
    let chosen = time(&shape)?;
    // A megabyte of attention at 20 GB/s, in each token that misses an expert.
    let hidden = routed - chosen;
    assert!(hidden > 0.0 && hidden <= 50e-6 + 1e-12, "{hidden}");
    Ok(())
}

/// A real GPU with room for everything, main memory, and a drive.
fn with_gpu() -> (Machine, [u64; 3]) {
    let mut machine = machine(three_tiers());
    machine.tiers.iter_mut().for_each(|t| t.emulated = false);
    (machine, [1 << 36, 1 << 36, 1 << 40])
}

#[test]
fn parts_that_run_together_only_are_all_on_a_gpu_or_none_is() -> Result<()> {
    let (machine, budgets) = with_gpu();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/arch2/gemma4.gguf");
    let gguf = Gguf::open(&path)?;
    let shape = shape_of(&gguf, &describe(&gguf)?);
    let is_together = |d: &DensePlacement| {
        let mut together = shape.cpu_only.iter().filter(|only| only.is_together());
        together.any(|only| (only.part, only.layer) == (Part::Dense(d.kind), d.layer))
    };
    let bytes: u64 = shape.dense.iter().map(|d| d.bytes).sum();
    let groups = shape.dense.iter().enumerate();
    let of_together = groups.filter(|(_, d)| {
        let mut together = shape.cpu_only.iter().filter(|only| only.is_together());
        together.any(|only| (only.part, only.layer) == (Part::Dense(d.kind), d.layer))
    });
    let caches: u64 = shape
        .caches
        .iter()
        .map(|c| c.bytes(KvType::F16, CacheRoom::of_one(64)))
        .sum();
    let least = of_together.map(|(_, d)| d.bytes).sum::<u64>() + caches;
    let cases = [(budgets[0], true), (least + 4096, true), (bytes / 3, false)];
    for (vram, on_gpu) in cases {
        let mut budgets = budgets;
        budgets[0] = vram;
        let problem = Problem {
            context: 64,
            ..problem(&shape, &machine, &budgets)
        };
        let solved = solve(&problem, &options())?;
        for plan in solved.baselines.iter().chain([&solved.plan]) {
            check_parts(&shape, plan).unwrap_or_else(|e| panic!("{}: {e}", plan.name));
            let together = plan.dense.iter().filter(|d| is_together(d));
            let n = together.filter(|d| d.tier.get() == 0).count();
            assert_eq!(n > 0, on_gpu, "{} with {vram}", plan.name);
        }
        // Of what a tier has to spare, more is worth nothing.
        let evidence = Evidence::new(&shape, None)?;
        let why = crate::explain::explain(&solved.plan, &shape, &evidence, 1.0)?;
        for (tier, placed) in why.tiers.iter().zip(&solved.plan.tiers) {
            let half = placed.budget_bytes / 2;
            assert!(
                tier.spare_bytes < half || tier.seconds_per_gib == 0.0,
                "{tier:?}"
            );
        }
        let together = solved.plan.dense.iter().filter(|d| is_together(d));
        let tiers: BTreeSet<usize> = together.map(|d| d.tier.get()).collect();
        assert_eq!(tiers.contains(&0), on_gpu, "{vram}: {tiers:?}");
        assert!(!on_gpu || tiers.len() == 1, "{vram}: {tiers:?}");
        // What no GPU needs of it stays outside.
        let table = solved
            .plan
            .dense
            .iter()
            .find(|d| d.kind == DenseKind::TokenTable);
        assert!(table.is_some_and(|d| d.tier.get() > 0));
        let says_why = solved
            .notes
            .iter()
            .any(|n| n.contains("unless one GPU has all"));
        assert_eq!(says_why, !on_gpu, "{:?}", solved.notes);
    }
    Ok(())
}

#[test]
fn flags_that_part_what_is_together_are_refused_by_name() -> Result<()> {
    use crate::solve::problem::constraints::Constraints;
    let (machine, budgets) = with_gpu();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data/arch2/gemma4.gguf");
    let gguf = Gguf::open(&path)?;
    let shape = shape_of(&gguf, &describe(&gguf)?);
    let problem = Problem {
        context: 64,
        ..problem(&shape, &machine, &budgets)
    };
    let [gpu, memory] = [0, 1].map(|tier| machine.tiers[tier].name.as_str());
    let solved = |fix: &[String], forbid: &[String]| {
        let constraints = Constraints::parse(fix, forbid, &shape, &machine)?;
        let options = Options {
            constraints,
            ..options()
        };
        solve(&problem, &options)
    };
    let flag = |tier: &str, what: &str| format!("{tier}:{what}");
    let refused = solved(&[flag(gpu, "head"), flag(memory, "router:0")], &[]);
    let error = refused.err().map(|e| format!("{e:#}")).unwrap_or_default();
    assert!(
        error.contains("have head on a GPU") && error.contains("router of layer 0 elsewhere"),
        "{error}"
    );
    // One of them decides for all.
    let is_on = |solution: &Solution, tier: usize| {
        let mut dense = solution.plan.dense.iter();
        dense.any(|d| d.kind == DenseKind::Head && d.tier.get() == tier)
    };
    assert!(is_on(&solved(&[flag(gpu, "head")], &[])?, 0));
    assert!(is_on(&solved(&[flag(memory, "router:0")], &[])?, 1));
    assert!(is_on(&solved(&[], &[flag(gpu, "router:0")])?, 1));
    Ok(())
}

#[test]
fn no_part_is_planned_for_a_gpu_that_refuses_it() -> Result<()> {
    let (machine, budgets) = with_gpu();
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/data");
    let (mut n, mut n_refused) = (0, 0);
    for folder in ["arch", "arch2"] {
        for file in std::fs::read_dir(data.join(folder))? {
            let path = file?.path();
            if path.extension().is_none_or(|e| e != "gguf") {
                continue;
            }
            let gguf = Gguf::open(&path)?;
            let mut shape = shape_of(&gguf, &describe(&gguf)?);
            // Few have such parts, so every other one gets some.
            if n % 2 == 0 {
                let groups = shape.dense.iter().filter(|d| d.layer.is_some());
                let refused = groups.step_by(3).map(|d| CpuOnly {
                    part: Part::Dense(d.kind),
                    layer: d.layer,
                    why: CpuReason::Kernel("a norm in between".into()),
                });
                shape.cpu_only.extend(refused);
            }
            let problem = Problem {
                context: shape.context.min(64),
                ..problem(&shape, &machine, &budgets)
            };
            let solved = solve(
                &problem,
                &Options {
                    time_limit_s: 0.2,
                    ..options()
                },
            )?;
            let name = path.display();
            for plan in solved.baselines.iter().chain([&solved.plan]) {
                check_parts(&shape, plan).unwrap_or_else(|e| panic!("{name}, {}: {e}", plan.name));
            }
            // What isn't refused is on the GPU, which is faster and has room.
            for group in &solved.plan.dense {
                let part = (Part::Dense(group.kind), group.layer);
                let refused = shape
                    .cpu_only
                    .iter()
                    .any(|only| (only.part, only.layer) == part);
                if group.layer.is_some() {
                    assert_eq!(group.tier.get() == 0, !refused, "{name}: {group:?}");
                }
            }
            let says_so = solved
                .notes
                .iter()
                .any(|note| note.contains("stay on the CPU"));
            assert_eq!(
                says_so,
                !shape.cpu_only.is_empty(),
                "{name}: {:?}",
                solved.notes
            );
            (n, n_refused) = (n + 1, n_refused + usize::from(says_so));
        }
    }
    assert!(
        n > 50 && n_refused > 10 && n_refused < n,
        "{n_refused} of {n}"
    );
    Ok(())
}

#[test]
fn a_part_that_is_fixed_to_a_gpu_that_refuses_it_is_an_error() -> Result<()> {
    let (machine, budgets) = with_gpu();
    let mut shape = shape(2, 16, 2, 1_000_000);
    let only = |part, layer| CpuOnly {
        part,
        layer: Some(layer),
        why: CpuReason::Kernel("a short convolution".into()),
    };
    shape.cpu_only = vec![
        only(Part::Dense(DenseKind::Attention), 1),
        only(Part::Experts, 1),
    ];
    let solve_fixed = |fix: &str| {
        let constraints = Constraints::parse(&[fix.to_string()], &[], &shape, &machine)?;
        solve(
            &problem(&shape, &machine, &budgets),
            &Options {
                constraints,
                ..options()
            },
        )
    };
    for (fix, named) in [
        (
            "vram:attention:1",
            "--fix puts attention of layer 1 on 'vram', a GPU that can't run it: a short convolution",
        ),
        (
            "vram:experts:1:3",
            "--fix puts experts of layer 1 on 'vram'",
        ),
    ] {
        let error = solve_fixed(fix).err().unwrap().to_string();
        assert!(error.contains(named), "{error}");
    }
    let solved = solve_fixed("vram:attention:0")?;
    let note = "mixers and experts of layer 1 stay on the CPU: a short convolution";
    assert!(
        solved.notes.iter().any(|said| said == note),
        "{:?}",
        solved.notes
    );
    let on_gpu =
        held(&solved.plan.layers[0]) > 0 && solved.plan.layers[0].pinned[0].tier == TierIdx::FIRST;
    assert!(on_gpu, "{:?}", solved.plan.layers[0]);
    // The verifier finds what the search would not do.
    let mut wrong = solved.plan.clone();
    for d in wrong
        .dense
        .iter_mut()
        .filter(|d| d.kind == DenseKind::Attention)
    {
        d.tier = TierIdx::FIRST;
    }
    wrong.fill_sums(&shape);
    let said = verify::verify(&wrong, &shape, &Evidence::uniform(&shape)?).join("; ");
    assert!(
        said.contains("the attention group of layer 1 is on the GPU 'vram'"),
        "{said}"
    );
    Ok(())
}

#[test]
fn parts_of_architectures_that_gpus_lack_stay_on_the_cpu() -> Result<()> {
    let machine = catalogue::machine(Path::new("desktop-4090-ddr5-nvme"))?;
    let gpu = machine.tiers.iter().position(Tier::is_gpu).unwrap();
    for (name, lacks) in [("qwen3.8-flash-next", true), ("kimi-k3", false)] {
        let known = catalogue::model(Path::new(name), Some("q4_k_m"))?;
        let shape = &known.sizes;
        // Less main memory than the experts take.
        let budget = |t: &Tier| {
            t.capacity_bytes.min(if t.kind == TierKind::Dram {
                40 << 30
            } else {
                u64::MAX
            })
        };
        let budgets: Vec<u64> = machine.tiers.iter().map(budget).collect();
        let problem = Problem {
            context: 4096,
            ..problem(shape, &machine, &budgets)
        };
        let solved = solve(
            &problem,
            &Options {
                time_limit_s: 2.0,
                ..options()
            },
        )?;
        check_parts(shape, &solved.plan)?;
        let on_gpu = solved.plan.dense.iter().any(|d| {
            let refused =
                |only: &CpuOnly| (only.part, only.layer) == (Part::Dense(d.kind), d.layer);
            d.tier.get() == gpu && shape.cpu_only.iter().any(refused)
        });
        assert!(!on_gpu, "{name}");
        assert_eq!(!shape.cpu_only.is_empty(), lacks, "{name}");
        let mut notes = solved.notes.iter();
        let says_so = notes.any(|note| note.contains("stay on the CPU"));
        assert_eq!(says_so, lacks, "{name}: {:?}", solved.notes);
        if shape.dense.iter().any(|d| d.kind == DenseKind::TokenTable) {
            assert_eq!(
                tier_of(&solved.plan, DenseKind::TokenTable),
                machine.tiers.len() - 1
            );
        }
    }
    Ok(())
}
