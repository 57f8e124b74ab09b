//! Tests plans that have a GPU compute experts of main memory.

use super::*;
use tier_plan_runtime::formats::machine::Link;
use tier_plan_runtime::formats::placement::Streaming;

/// A GPU with a link, main memory, and a drive.
fn linked(contended_gbps: f64, dram_contended_gbps: f64) -> Machine {
    let mut machine = machine(three_tiers());
    machine.tiers.iter_mut().for_each(|t| t.emulated = false);
    let link = Link {
        to_gbps: 12.0,
        to_pageable_gbps: 6.0,
        from_gbps: 12.0,
        from_pageable_gbps: 6.0,
        contended_gbps,
        dram_contended_gbps,
    };
    machine.extras.links.insert("vram".into(), link);
    machine
}

/// Solves with so many megabytes of VRAM, all experts in memory, as the shape needs.
fn solved(
    machine: &Machine,
    shape: &ModelShape,
    profile: Option<&Profile>,
    budgets: [u64; 3],
) -> Result<Solution> {
    let problem = Problem {
        shape,
        profile,
        machine,
        budgets: budgets.to_vec(),
        context: 100,
        sequences: 1,
        kv_type: KvType::F16,
        position: None,
    };
    let solution = solve(&problem, &options())?;
    let evidence = Evidence::new(shape, profile)?;
    let wrong = verify::verify(&solution.plan, shape, &evidence);
    assert_eq!(wrong, Vec::<String>::new());
    Ok(solution)
}

const MB: u64 = 1_000_000;

/// A problem whose experts are all in memory, a few of them in VRAM.
fn in_memory<'a>(shape: &'a ModelShape, machine: &'a Machine) -> Problem<'a> {
    Problem {
        shape,
        profile: None,
        machine,
        budgets: vec![30 * MB, 1000 * MB, 1 << 40],
        context: 100,
        sequences: 1,
        kv_type: KvType::F16,
        position: None,
    }
}

#[test]
fn a_link_that_brings_more_than_it_takes_is_used() -> Result<()> {
    let shape = shape(4, 16, 8, 2 * MB);
    let budgets = [30 * MB, 1000 * MB, 1 << 40];
    // Alone, the CPU reads 20 GB/s; both together read 25.
    let linked = linked(9.0, 16.0);
    let found = solved(&linked, &shape, None, budgets)?;
    let streaming = found.plan.streaming.expect("streaming pays");
    assert_eq!((streaming.tier.get(), streaming.from.get()), (0, 1));
    // Of eight experts the GPU takes about 9 of 25 parts.
    assert!((2..=3).contains(&streaming.experts), "{streaming:?}");
    let vram = &found.plan.tiers[TierIdx::FIRST];
    assert_eq!(vram.bytes.staging, u64::from(streaming.experts) * 2 * MB);
    assert_eq!(vram.budget_bytes, budgets[0]);
    assert!(
        found
            .notes
            .iter()
            .any(|n| n.contains("are streamed from 'dram' to 'vram'")),
        "{:?}",
        found.notes
    );
    // The same machine without the measurement.
    let mut unknown = linked.clone();
    unknown.extras.links.clear();
    let without = solved(&unknown, &shape, None, budgets)?;
    assert_eq!(without.plan.streaming, None);
    let [with_s, without_s] = [&found, &without].map(|s| token_s(&s.plan.predicted));
    assert!(with_s < 0.97 * without_s, "{with_s} of {without_s}");
    // A bound of what is divided holds for what is not.
    let bound = found.plan.solver.bound_s.expect("a bound");
    assert!(
        bound <= with_s && bound > 0.7 * with_s,
        "{bound} of {with_s}"
    );
    let text = found.plan.encode();
    let read = tier_plan_runtime::formats::placement::decode(
        text.as_bytes(),
        std::path::Path::new("p.toml"),
    )?;
    assert_eq!(read.streaming, found.plan.streaming);
    Ok(())
}

#[test]
fn nothing_is_streamed_where_that_is_turned_off() -> Result<()> {
    let shape = shape(4, 16, 8, 2 * MB);
    let machine = linked(9.0, 16.0);
    let problem = in_memory(&shape, &machine);
    assert!(solve(&problem, &options())?.plan.streaming.is_some());
    let options = Options {
        streaming: false,
        ..options()
    };
    let found = solve(&problem, &options)?;
    assert_eq!(found.plan.streaming, None);
    let said = found.notes.iter().any(|n| n.contains("streamed"));
    assert!(!said, "{:?}", found.notes);
    Ok(())
}

#[test]
fn a_link_that_takes_what_it_brings_is_not_used() -> Result<()> {
    let shape = shape(4, 16, 8, 2 * MB);
    let budgets = [30 * MB, 1000 * MB, 1 << 40];
    for (link, beside, note) in [(9.0, 11.0, false), (9.0, 12.7, true)] {
        let found = solved(&linked(link, beside), &shape, None, budgets)?;
        assert_eq!(found.plan.streaming, None, "{link} {beside}");
        let said = found.notes.iter().any(|n| n.contains("would not save 3 %"));
        assert_eq!(said, note, "{link} {beside}: {:?}", found.notes);
    }
    Ok(())
}

#[test]
fn recorded_tokens_are_divided_one_by_one() -> Result<()> {
    let shape = shape(4, 16, 6, 2 * MB);
    let all = 4 * 16 * 2 * MB;
    // Room in memory for all experts, and for half of them.
    for (memory, expected) in [(1000 * MB, true), (all / 2, false)] {
        for seed in 0..4 {
            let profile = synthetic::profile(&shape, &routing(seed));
            let budgets = [30 * MB, memory, 1 << 40];
            let found = solved(&linked(12.0, 15.0), &shape, Some(&profile), budgets)?;
            // Where tokens wait for the drive, no rate of memory matters.
            assert_eq!(found.plan.streaming.is_some(), expected, "{memory} {seed}");
        }
    }
    Ok(())
}

#[test]
fn experts_that_are_kept_off_a_gpu_are_not_streamed_to_it() -> Result<()> {
    let shape = shape(4, 16, 8, 2 * MB);
    let machine = linked(9.0, 16.0);
    let problem = in_memory(&shape, &machine);
    let forbid = ["vram:experts".to_string()];
    let constraints = problem::constraints::Constraints::parse(&[], &forbid, &shape, &machine)?;
    let options = Options {
        constraints,
        ..options()
    };
    assert_eq!(solve(&problem, &options)?.plan.streaming, None);
    Ok(())
}

/// Whatever room a GPU has, as many buffers are made in it as bring most.
#[test]
fn the_number_of_buffers_is_worth_their_room() -> Result<()> {
    let shape = shape(4, 16, 8, 2 * MB);
    let machine = linked(12.0, 18.0);
    let mut unknown = machine.clone();
    unknown.extras.links.clear();
    let evidence = Evidence::uniform(&shape)?;
    let mut streamed = 0;
    for vram in [1, 4, 12, 30, 60, 90, 100, 110, 115, 130] {
        let budget = vram * MB;
        let rest = [1000 * MB, 1 << 40];
        let found = solved(&machine, &shape, None, [budget, rest[0], rest[1]])?.plan;
        streamed += u32::from(found.streaming.is_some());
        let seconds = token_s(&found.predicted);
        // Each number with its room taken away beforehand.
        for experts in 0..=4 {
            let buffers = experts * 2 * MB;
            if buffers > budget {
                continue;
            }
            let budgets = [budget - buffers, rest[0], rest[1]];
            let mut plan = solved(&unknown, &shape, None, budgets)?.plan;
            if experts > 0 {
                plan.streaming = Some(Streaming {
                    tier: TierIdx::FIRST,
                    from: TierIdx::new(1),
                    experts: experts as u32,
                    link_gbps: 12.0,
                    cpu_share: 0.9,
                });
            }
            let other = predict(&plan, &shape, &evidence);
            // Streaming is left alone where it saves less than 3 %, and a buffer that saves 0.1 %.
            let allowed = if found.streaming.is_some() {
                0.002
            } else {
                0.03
            };
            assert!(
                seconds * (1.0 - allowed) <= token_s(&other),
                "{vram} MB, {experts} buffers: {seconds} {}",
                token_s(&other)
            );
        }
    }
    assert!(streamed > 5, "{streamed}");
    Ok(())
}

#[test]
fn layers_of_which_no_gpu_computes_the_experts_stay() -> Result<()> {
    use tier_plan_runtime::model::gpu::{CpuOnly, CpuReason, Part};
    let mut shape = shape(4, 32, 16, 2 * MB);
    shape.cpu_only = (0..2)
        .map(|layer| CpuOnly {
            part: Part::Experts,
            layer: Some(layer),
            why: CpuReason::Factor("blk.0.ffn_gate_exps.weight".into()),
        })
        .collect();
    let budgets = [15 * MB, 1000 * MB, 1 << 40];
    let found = solved(&linked(16.0, 19.0), &shape, None, budgets)?;
    assert!(found.plan.streaming.is_some(), "{:?}", found.notes);
    Ok(())
}

#[test]
fn experts_that_no_gpu_can_compute_stay() -> Result<()> {
    use tier_plan_runtime::model::gpu::{CpuOnly, CpuReason, Part};
    let mut shape = shape(4, 16, 8, 2 * MB);
    shape.cpu_only = (0..4)
        .map(|layer| CpuOnly {
            part: Part::Experts,
            layer: Some(layer),
            why: CpuReason::Factor("blk.0.ffn_gate_exps.weight".into()),
        })
        .collect();
    let budgets = [30 * MB, 1000 * MB, 1 << 40];
    let found = solved(&linked(9.0, 16.0), &shape, None, budgets)?;
    assert_eq!(found.plan.streaming, None);
    Ok(())
}
