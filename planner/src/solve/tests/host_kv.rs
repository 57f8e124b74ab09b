//! Tests plans that keep the KV cache of layers off the GPU that has their attention.

use super::*;
use crate::solve::problem::constraints::Constraints;
use tier_plan_runtime::formats::placement::validate;

const CONTEXT: u32 = 1000;

/// Three layers with keys and values of their own: 2 MB of attention each, and 1 MB of cache for the
/// context.
fn model() -> ModelShape {
    let mut shape = shape(3, 16, 2, 2_000_000);
    let mut of_layer = cache(250);
    of_layer.rows[0].per_token = 2;
    shape.caches = vec![of_layer; 3];
    let heads = shape.dense.iter_mut().filter(|d| d.kind == DenseKind::Head);
    heads.for_each(|d| d.token_bytes = 100);
    shape
}

/// A GPU whose layers take a little longer, memory, and a drive; none is emulated.
fn gpu_machine() -> Machine {
    let mut machine = machine(three_tiers());
    machine.tiers.iter_mut().for_each(|t| t.emulated = false);
    machine.tiers[0].accelerator.layer_us = Some(5.0);
    machine
}

fn solved(
    shape: &ModelShape,
    (vram, position): (u64, Option<u32>),
    constraints: Constraints,
) -> Result<Placement> {
    let machine = gpu_machine();
    let problem = Problem {
        shape,
        profile: None,
        machine: &machine,
        budgets: vec![vram, 200_000_000, 1 << 40],
        context: CONTEXT,
        sequences: 1,
        kv_type: KvType::F16,
        position,
    };
    let options = Options {
        constraints: constraints.clone(),
        ..options()
    };
    let plan = solve(&problem, &options)?.plan;
    assert!(constraints.holds(&plan));
    let evidence = Evidence::uniform(shape)?;
    assert_eq!(
        verify::verify(&plan, shape, &evidence),
        Vec::<String>::new()
    );
    assert_eq!(validate(&plan, shape), []);
    Ok(plan)
}

fn flags(fix: &[String], forbid: &[String], shape: &ModelShape) -> Result<Constraints> {
    Constraints::parse(fix, forbid, shape, &gpu_machine())
}

/// Whatever is chosen is as fast as the best of all ways to place attention and its cache.
#[test]
fn what_is_kept_off_a_gpu_is_the_best_of_all_ways() -> Result<()> {
    let shape = model();
    let mut counts = [0; 4];
    for position in [Some(5), Some(100), None] {
        for vram in [
            2_500_000, 5_000_000, 6_500_000, 8_000_000, 12_000_000, 40_000_000,
        ] {
            let of = (vram, position);
            let plan = solved(&shape, of, Constraints::default())?;
            let mut least = f64::INFINITY;
            // Alike layers differ by how many are on the CPU, on the GPU, and on the GPU without a cache.
            for on_cpu in 0..=3u32 {
                for apart in 0..=3 - on_cpu {
                    let place = |layer: u32| {
                        let tier = if layer < on_cpu { "dram" } else { "vram" };
                        format!("{tier}:attention:{layer}")
                    };
                    let fix: Vec<String> = (0..3).map(place).collect();
                    let constraints = flags(&fix, &[], &shape)?;
                    let constraints = constraints.settling_host_kv(on_cpu..on_cpu + apart);
                    if let Ok(plan) = solved(&shape, of, constraints) {
                        assert_eq!(plan.host_kv.len(), apart as usize);
                        least = least.min(plan.solver.objective_s);
                    }
                }
            }
            let found = plan.solver.objective_s;
            assert!(
                (found - least).abs() <= 1e-9 * least,
                "{vram} {position:?}: {found} {least}"
            );
            assert!(
                plan.solver
                    .bound_s
                    .is_none_or(|bound| bound <= least * (1.0 + 1e-9))
            );
            counts[plan.host_kv.len()] += 1;
        }
    }
    assert!(
        counts[0] > 0 && counts[1] > 0 && counts[3] > 0,
        "{counts:?}"
    );
    Ok(())
}

#[test]
fn a_cache_may_be_kept_in_memory_by_hand() -> Result<()> {
    let shape = model();
    let much = (100_000_000, None);
    let by = |fix: &[&str], forbid: &[&str]| {
        let text = |of: &[&str]| of.iter().map(ToString::to_string).collect::<Vec<_>>();
        solved(&shape, much, flags(&text(fix), &text(forbid), &shape)?)
    };
    let free = by(&[], &[])?;
    assert!(free.host_kv.is_empty() && free.kv_tier == TierIdx::FIRST);
    for plan in [by(&["dram:cache"], &[])?, by(&[], &["vram:cache"])?] {
        assert_eq!(
            (plan.host_kv.as_slice(), plan.kv_tier.get()),
            (&[0, 1, 2][..], 1)
        );
        assert_eq!(plan.tiers[TierIdx::FIRST].bytes.kv, 0);
    }
    // What is loaded keeps its caches where they are.
    let plan = by(&["dram:cache"], &[])?;
    let evidence = Evidence::uniform(&shape)?;
    let keeping = |plan| Constraints::keeping(plan, &evidence);
    let kept = solved(&shape, (much.0, Some(500)), keeping(&plan))?;
    assert_eq!(kept.host_kv, plan.host_kv);
    let kept = solved(&shape, (much.0, Some(5)), keeping(&free))?;
    assert!(kept.host_kv.is_empty());
    Ok(())
}

#[test]
fn caches_that_cannot_be_apart_stay_with_their_attention() -> Result<()> {
    let mut shape = model();
    shape.caches[0].state_bytes = 64;
    shape.caches[1].rows[0].chosen = Some(100);
    let constraints = flags(&["dram:cache".into()], &[], &shape)?;
    let plan = solved(&shape, (100_000_000, None), constraints)?;
    assert_eq!(plan.host_kv, [2]);
    let attention = plan.dense.iter().filter(|d| d.kind == DenseKind::Attention);
    let tiers: Vec<usize> = attention.map(|d| d.tier.get()).collect();
    assert_eq!(tiers, [1, 1, 0]);
    Ok(())
}

#[test]
fn planted_mistakes_about_what_is_apart_are_found() -> Result<()> {
    let shape = model();
    let evidence = Evidence::uniform(&shape)?;
    let constraints = flags(&["dram:cache".into()], &[], &shape)?;
    let good = solved(&shape, (100_000_000, None), constraints)?;
    let finds = |word: &str, spoil: &dyn Fn(&mut Placement)| {
        let mut plan = good.clone();
        spoil(&mut plan);
        let wrong = verify::verify(&plan, &shape, &evidence).join("; ");
        assert!(wrong.contains(word), "{word}: {wrong}");
    };
    finds("kv bytes, but they are", &|p| p.host_kv = vec![0, 1]);
    finds("is not apart from its attention", &|p| {
        p.kv_tier = TierIdx::FIRST
    });
    finds("is not apart from its attention", &|p| {
        let attention = p.dense.iter_mut();
        let attention = attention.filter(|d| d.kind == DenseKind::Attention);
        attention.for_each(|d| d.tier = TierIdx::new(1));
    });
    finds("nothing that can be apart", &|p| p.host_kv.push(7));
    // Each layer makes two trips to the GPU.
    finds("but a replay gives", &|p| {
        p.tiers[TierIdx::FIRST].tier.accelerator.layer_us = Some(500.0);
    });
    Ok(())
}

#[test]
fn attention_that_does_not_fit_is_told_without_a_cache_that_may_be_elsewhere() {
    let mut shape = model();
    let refused = |shape: &ModelShape, vram: u64, fix: &[&str], words: &[&str], not: &str| {
        let fix: Vec<String> = fix.iter().map(ToString::to_string).collect();
        let constraints = flags(&fix, &[], shape).unwrap();
        let found = solved(shape, (vram, None), constraints);
        let error = found.err().map(|e| format!("{e:#}")).unwrap_or_default();
        assert!(
            words.iter().all(|w| error.contains(w)) && !error.contains(not),
            "{words:?}: {error}"
        );
    };
    // Each layer's attention takes 2 MB, and its cache 1 MB.
    refused(
        &shape,
        5_000_000,
        &["vram:attention"],
        &["--fix puts 5.72 MiB on 'vram'"],
        "8.58",
    );
    for cache in ["vram:attention:1", "dram:cache"] {
        refused(
            &shape,
            1_500_000,
            &["vram:attention:1", cache],
            &["attention of layer 1", "it takes 1.91 MiB of the 1.43 MiB"],
            "keys and values",
        );
    }
    shape.caches[1].rows[0].chosen = Some(100);
    refused(
        &shape,
        1_500_000,
        &["vram:attention:1"],
        &["with the layer's keys and values it takes 2.86 MiB"],
        "nothing",
    );
}

/// A slower memory beside main memory, which has room for the cache too.
#[test]
fn a_loaded_model_keeps_the_tier_of_its_caches() -> Result<()> {
    let shape = model();
    let mut machine = gpu_machine();
    let mut far = tier("cxl", TierKind::Cxl, 20.0, 0.0);
    far.emulated = false;
    machine.tiers.insert(2, far);
    let solved = |fix: &[&str], keep: Option<&Placement>| {
        let fix: Vec<String> = fix.iter().map(ToString::to_string).collect();
        let problem = Problem {
            shape: &shape,
            profile: None,
            machine: &machine,
            budgets: vec![7_000_000, 60_000_000, 200_000_000, 1 << 40],
            context: CONTEXT,
            sequences: 1,
            kv_type: KvType::F16,
            position: Some(5),
        };
        let constraints = match keep {
            Some(plan) => Constraints::keeping(plan, &Evidence::uniform(&shape)?),
            None => Constraints::parse(&fix, &[], &shape, &machine)?,
        };
        let options = Options {
            constraints,
            ..options()
        };
        Ok::<_, anyhow::Error>(solve(&problem, &options)?.plan)
    };
    let free = solved(&["vram:attention"], None)?;
    let other = ["dram:cache", "cxl:cache"];
    let other = other[usize::from(free.kv_tier == TierIdx::new(1))];
    let plan = solved(&["vram:attention", other], None)?;
    assert!(plan.host_kv.len() == 3 && plan.kv_tier != free.kv_tier);
    let kept = solved(&[], Some(&plan))?;
    assert_eq!((kept.kv_tier, kept.host_kv), (plan.kv_tier, plan.host_kv));
    Ok(())
}
