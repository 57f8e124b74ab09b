//! Tests attention on real GPUs, which have its KV cache: GPUs too small for all layers, and
//! constraints.

use super::*;
use crate::solve::problem::constraints::Constraints;

const CONTEXT: u32 = 1000;

fn solved(
    shape: &ModelShape,
    tiers: &[Tier],
    budgets: &[u64],
    fix: &[&str],
    forbid: &[&str],
) -> Result<Placement> {
    let mut machine = machine(tiers.to_vec());
    machine.tiers.iter_mut().for_each(|t| t.emulated = false);
    let kv_type = KvType::F16;
    let budgets = budgets.to_vec();
    let problem = Problem {
        shape,
        profile: None,
        machine: &machine,
        budgets,
        context: CONTEXT,
        sequences: 1,
        kv_type,
        position: None,
    };
    let text = |of: &[&str]| of.iter().map(|s| s.to_string()).collect::<Vec<_>>();
    let constraints = Constraints::parse(&text(fix), &text(forbid), shape, &machine)?;
    let solved = solve(
        &problem,
        &Options {
            constraints: constraints.clone(),
            ..options()
        },
    )?;
    assert!(constraints.holds(&solved.plan));
    let evidence = Evidence::uniform(shape)?;
    for plan in solved.baselines.iter().chain([&solved.plan]) {
        assert_eq!(verify::verify(plan, shape, &evidence), Vec::<String>::new());
        assert_eq!(
            plan.tiers
                .iter()
                .map(|t| t.bytes.kv)
                .collect::<PerTier<_>>(),
            plan.cache_bytes(shape)
        );
    }
    Ok(solved.plan)
}

fn model() -> ModelShape {
    let mut shape = shape(4, 16, 2, 2_000_000);
    shape.caches = vec![cache(500); 4];
    // A head that is read whole would be worth more VRAM than attention.
    shape
        .dense
        .iter_mut()
        .filter(|d| d.kind == DenseKind::Head)
        .for_each(|d| d.token_bytes = 100);
    shape
}

/// Returns the numbers of the KV tier of layers on no GPU, and of each layer's attention tier.
fn attention(plan: &Placement) -> (usize, Vec<usize>) {
    let attention = plan.dense.iter().filter(|d| d.kind == DenseKind::Attention);
    (
        plan.kv_tier.get(),
        attention.map(|d| d.tier.get()).collect(),
    )
}

#[test]
fn a_gpu_has_as_many_layers_as_fit_with_their_kv_cache() -> Result<()> {
    let shape = model();
    // Two megabytes of attention and one of KV cache per layer.
    let plan = |vram: u64, fix: &[&str], forbid: &[&str]| {
        solved(
            &shape,
            &three_tiers(),
            &[vram, 200_000_000, 1 << 40],
            fix,
            forbid,
        )
    };
    assert_eq!(attention(&plan(12_000_000, &[], &[])?), (0, vec![0; 4]));
    let split = plan(11_999_999, &[], &[])?;
    // The last layers, beside the head.
    assert_eq!(attention(&split), (1, vec![1, 0, 0, 0]));
    assert_eq!(
        [
            split.tiers[TierIdx::new(0)].bytes.kv,
            split.tiers[TierIdx::new(1)].bytes.kv
        ],
        [3_000_000, 1_000_000]
    );
    assert_eq!(
        attention(&plan(3_000_000, &[], &[])?),
        (1, vec![1, 1, 1, 0])
    );
    assert_eq!(attention(&plan(2_999_999, &[], &[])?), (1, vec![1; 4]));
    // Fixed or forbidden by hand.
    assert_eq!(
        attention(&plan(100_000_000, &[], &["vram:attention:2"])?),
        (1, vec![0, 0, 1, 0])
    );
    assert_eq!(
        attention(&plan(100_000_000, &[], &["vram:cache"])?),
        (1, vec![1; 4])
    );
    assert_eq!(
        attention(&plan(100_000_000, &["dram:cache"], &[])?),
        (1, vec![1; 4])
    );
    assert_eq!(
        attention(&plan(100_000_000, &["vram:cache"], &[])?),
        (0, vec![0; 4])
    );
    assert_eq!(
        attention(&plan(3_000_000, &["vram:attention:3"], &[])?),
        (1, vec![1, 1, 1, 0])
    );
    assert_eq!(
        attention(&plan(100_000_000, &[], &["dram:cache"])?),
        (0, vec![0; 4])
    );
    Ok(())
}

#[test]
fn two_gpus_share_what_neither_can_hold() -> Result<()> {
    let shape = model();
    let mut tiers = five_tiers();
    tiers.remove(3);
    let plan = |a: u64, b: u64, fix: &[&str], forbid: &[&str]| {
        solved(&shape, &tiers, &[a, b, 200_000_000, 1 << 40], fix, forbid)
    };
    let both = plan(6_000_000, 6_000_000, &[], &[])?;
    assert_eq!(attention(&both), (2, vec![1, 1, 0, 0]));
    assert_eq!(
        both.tiers.iter().map(|t| t.bytes.kv).collect::<Vec<_>>(),
        [2_000_000, 2_000_000, 0, 0]
    );
    assert_eq!(
        attention(&plan(6_000_000, 3_000_000, &[], &[])?),
        (2, vec![2, 1, 0, 0])
    );
    let by_hand = plan(
        6_000_000,
        6_000_000,
        &["gpu-b:attention:0-1"],
        &["gpu-a:cache"],
    )?;
    assert_eq!(attention(&by_hand), (2, vec![1, 1, 2, 2]));
    Ok(())
}

#[test]
fn gpus_without_host_memory_hold_the_whole_kv_cache() -> Result<()> {
    let shape = model();
    // Without CPU memory, what is not pinned computes where it is mapped: on a GPU, for this
    // machine file.
    let gpus = vec![
        tier("gpu-a", TierKind::Vram, 300.0, 8.0),
        tier("gpu-b", TierKind::Vram, 150.0, 12.0),
    ];
    let plan = solved(&shape, &gpus, &[80_000_000, 200_000_000], &[], &[])?;
    assert_eq!(
        plan.tiers.iter().map(|t| t.bytes.kv).sum::<u64>(),
        4_000_000
    );
    let small = solved(&shape, &gpus, &[2_000_000, 2_500_000], &[], &[])
        .err()
        .map(|e| format!("{e:#}"));
    assert!(small.is_some_and(
        |e| e.contains("no room for the attention of every layer") && e.contains("DRAM")
    ));
    Ok(())
}

#[test]
fn constraints_that_no_gpu_can_meet_are_explained() {
    let shape = model();
    let refused = |shape: &ModelShape, vram: u64, fix: &[&str], forbid: &[&str], words: &[&str]| {
        let found = solved(
            shape,
            &three_tiers(),
            &[vram, 200_000_000, 1 << 40],
            fix,
            forbid,
        );
        let error = found.err().map(|e| format!("{e:#}")).unwrap_or_default();
        assert!(
            words.iter().all(|w| error.contains(w)),
            "{words:?}: {error}"
        );
    };
    let many = 100_000_000;
    refused(
        &shape,
        11_000_000,
        &["vram:cache"],
        &[],
        &["attention of all layers", "vram:attention:LAYERS", "raise"],
    );
    refused(
        &shape,
        many,
        &["vram:cache", "dram:attention:1"],
        &[],
        &["keys and values of layer 1", "take one of them back"],
    );
    refused(
        &shape,
        many,
        &["vram:attention:1"],
        &["vram:cache"],
        &["attention of layer 1", "which they want elsewhere"],
    );
    refused(
        &shape,
        2_500_000,
        &["vram:attention:2"],
        &[],
        &["layer 2", "'vram'", "raise the budget of 'vram'"],
    );
    refused(&shape, many, &["vram:cache:1"], &[], &["name no layers"]);
    refused(
        &shape,
        5_000_000,
        &["vram:attention"],
        &[],
        &["--fix puts", "'vram'", "too much"],
    );
}

#[test]
fn recurrent_state_goes_with_its_layer() -> Result<()> {
    let mut shape = model();
    shape.caches[1] = CacheShape {
        rows: Vec::new(),
        state_bytes: 5000,
        more_readers: 0,
    };
    let plan = |forbid: &[&str]| {
        solved(
            &shape,
            &three_tiers(),
            &[100_000_000, 200_000_000, 1 << 40],
            &[],
            forbid,
        )
    };
    let all = plan(&[])?;
    assert_eq!(attention(&all), (0, vec![0; 4]));
    assert_eq!(
        (
            all.tiers[TierIdx::new(0)].bytes.kv,
            all.tiers[TierIdx::new(1)].bytes.kv
        ),
        (all.kv_type.cache_bytes(&shape, all.room()), 0)
    );
    let but_one = plan(&["vram:attention:1"])?;
    assert_eq!(attention(&but_one), (1, vec![0, 1, 0, 0]));
    assert_eq!(but_one.tiers[TierIdx::new(1)].bytes.kv, 5000);
    Ok(())
}

#[test]
fn windows_save_memory_on_the_host_only() -> Result<()> {
    let mut shape = model();
    for layer in [1, 2] {
        shape.caches[layer].rows[0].window = Some(128);
    }
    let mut machine = machine(three_tiers());
    machine.tiers.iter_mut().for_each(|t| t.emulated = false);
    let evidence = Evidence::uniform(&shape)?;
    let plan = |sequences, forbid: &[&str]| -> Result<Placement> {
        let text: Vec<String> = forbid.iter().map(ToString::to_string).collect();
        let problem = Problem {
            shape: &shape,
            profile: None,
            machine: &machine,
            budgets: vec![100_000_000, 200_000_000, 1 << 40],
            context: 10_000,
            sequences,
            kv_type: KvType::F16,
            position: None,
        };
        let options = Options {
            constraints: Constraints::parse(&[], &text, &shape, &machine)?,
            ..options()
        };
        let plan = solve(&problem, &options)?.plan;
        let wrong = verify::verify(&plan, &shape, &evidence);
        assert_eq!(wrong, Vec::<String>::new());
        let mut spoilt = plan.clone();
        spoilt.window_chunk = Some(64);
        let wrong = verify::verify(&spoilt, &shape, &evidence);
        assert_eq!(wrong.is_empty(), attention(&plan).1 == [0; 4]);
        Ok(plan)
    };
    let kv = |plan: &Placement| [0, 1].map(|t| plan.tiers[TierIdx::new(t)].bytes.kv);
    // A position takes 1000 bytes in a layer.
    let all = plan(1, &[])?;
    assert_eq!(kv(&all), [40_000_000, 0]);
    let window = (4 + 32 + 4 * 3) * 64 * 1000;
    assert_eq!(kv(&plan(1, &["vram:attention:1"])?), [30_000_000, window]);
    let windows = 2 * (4 * 4 + 32 + 16 * 3) * 64 * 1000;
    let whole = 2 * 4 * 157 * 64 * 1000;
    let texts = plan(4, &[])?;
    // Two layers fit the GPU.
    assert_eq!(kv(&texts), [whole, windows]);
    assert_eq!((texts.window_chunk, texts.checkpoints), (Some(2048), 16));
    Ok(())
}

#[test]
fn planted_mistakes_about_the_kv_cache_are_found() -> Result<()> {
    let shape = model();
    let evidence = Evidence::uniform(&shape)?;
    let good = solved(
        &shape,
        &three_tiers(),
        &[9_000_000, 200_000_000, 1 << 40],
        &[],
        &[],
    )?;
    let finds = |word: &str, spoil: &dyn Fn(&mut Placement)| {
        let mut plan = good.clone();
        spoil(&mut plan);
        let wrong = verify::verify(&plan, &shape, &evidence).join("; ");
        assert!(wrong.contains(word), "{word}: {wrong}");
    };
    finds("kv bytes, but they are", &|p| {
        (
            p.tiers[TierIdx::new(0)].bytes.kv,
            p.tiers[TierIdx::new(1)].bytes.kv,
        ) = (0, 4_000_000)
    });
    finds("is on a GPU, but not its attention", &|p| {
        p.kv_tier = TierIdx::new(0)
    });
    finds("where nothing computes", &|p| p.kv_tier = TierIdx::new(2));
    // A layer whose attention moves takes its KV cache with it.
    finds("kv bytes, but they are", &|p| {
        let moved = p
            .dense
            .iter_mut()
            .find(|d| d.kind == DenseKind::Attention && d.tier == TierIdx::new(0));
        moved.into_iter().for_each(|d| d.tier = TierIdx::new(1));
        p.tiers[TierIdx::new(0)].bytes.dense -= 2_000_000;
        p.tiers[TierIdx::new(1)].bytes.dense += 2_000_000;
    });
    Ok(())
}
