//! Every architecture against golden values of another engine (`tests/data/arch/README.md`), under
//! the plainest plan and under plans that spread the model over three tiers: the plan must not
//! change a bit of the result.

use std::collections::BTreeSet;
use std::sync::Arc;
use tier_plan_runtime::formats::machine::{Accelerator, Tier, TierKind};
use tier_plan_runtime::formats::placement::{
    DensePlacement, LayerPlacement, PerTier, Pins, Placement, PlanTier, SlotPolicy, TierIdx,
};
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::shape::{DenseKind, ModelShape};
use tier_plan_runtime::model::{SUPPORTED, shape_of_file};
use tier_plan_runtime::plans::in_memory::all_in_memory;
use tier_plan_runtime::{Engine, KvType, LoadOptions, LogitsMode};
use tier_plan_testing::{Golden, data, models, root};

/// Largest normalized mean squared error of the logits. Weights are 16-bit floats, so nothing is
/// quantized: results are near 1e-12, and anything that is left out of the arithmetic is far above
/// this.
pub(super) const BOUND: f64 = 1e-5;

/// Reads what is known of an architecture.
fn golden(name: &str) -> Golden {
    let golden = Golden::read(&format!("arch/{name}"));
    assert_eq!(golden.greedy.len(), 16);
    golden
}

/// A context that fits the tokens and all that is decoded after them.
pub(super) fn context(golden: &Golden) -> u32 {
    (golden.tokens.len() + golden.greedy.len()) as u32
}

pub(super) fn engine(fixture: &Golden, plan: &Placement, batch: usize) -> Engine {
    let gguf = Arc::new(Gguf::open(&fixture.path).unwrap());
    let options = LoadOptions {
        threads: Some(2),
        batch: Some(batch),
        ..LoadOptions::default()
    };
    Engine::load(gguf, plan, &options, &mut |_, _| {}).unwrap()
}

fn largest(logits: &[f32]) -> u32 {
    (0..logits.len())
        .rev()
        .max_by(|a, b| logits[*a].total_cmp(&logits[*b]))
        .unwrap() as u32
}

/// Logits of the whole prompt, then of each token as it is decoded; and the decoded tokens.
pub(super) fn run(
    fixture: &Golden,
    plan: &Placement,
    batch: usize,
) -> (Vec<f32>, Vec<f32>, Vec<u32>) {
    let mut engine = engine(fixture, plan, batch);
    let planned: Vec<u64> = plan.tiers.iter().map(PlanTier::used_bytes).collect();
    assert_eq!(
        engine.resident_bytes().as_slice(),
        planned,
        "{}: bytes resident and planned",
        plan.name
    );
    for (tier, padding) in plan.tiers.iter().zip(engine.padding_bytes()) {
        assert!(
            tier.used_bytes() + padding <= tier.budget_bytes,
            "{}: {padding} bytes of padding",
            plan.name
        );
    }
    let prompt = engine
        .forward(&fixture.tokens, LogitsMode::All)
        .unwrap()
        .to_vec();
    let (mut decoded, mut tokens) = (Vec::new(), Vec::new());
    let mut last = prompt[prompt.len() - fixture.n_vocab..].to_vec();
    for _ in 0..fixture.greedy.len() {
        tokens.push(largest(&last));
        last = engine
            .forward(&tokens[tokens.len() - 1..], LogitsMode::Last)
            .unwrap()
            .to_vec();
        decoded.extend_from_slice(&last);
    }
    (prompt, decoded, tokens)
}

/// How a test plan spreads a model.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spread {
    /// Every so-manieth expert is pinned to the first tier, the one after it to the second; none at
    /// 0.
    pub(super) pin_every: u32,
    /// Slots of a layer.
    pub(super) slots: u32,
    pub(super) slot_tier: TierIdx,
    /// Experts in staging beyond what a token may need.
    pub(super) extra_staging: u32,
    pub(super) slow: TierKind,
    /// The slow tier is the real file, and the others' budgets have so many bytes to spare.
    pub(super) real: Option<u64>,
}

/// A plan over two tiers of memory and a slow one, all declared and fast enough not to be waited
/// for.
pub(super) fn three_tiers(shape: &ModelShape, context: u32, spread: Spread) -> Placement {
    let tier = |name: &str, kind| {
        let tier = Tier {
            name: name.into(),
            kind,
            capacity_bytes: u64::MAX,
            read_gbps: 1e6,
            latency_us: 0.0,
            emulated: true,
            unit: None,
            accelerator: Accelerator::default(),
            source: "declared".into(),
        };
        PlanTier::new(tier, u64::MAX)
    };
    let mut plan = all_in_memory(shape, context, KvType::F32);
    plan.name = format!("{spread:?}");
    plan.tiers = PerTier::from([
        tier("vram", TierKind::Vram),
        tier("dram", TierKind::Dram),
        tier("slow", spread.slow),
    ]);
    plan.dense.clear();
    for (i, group) in shape.dense.iter().enumerate() {
        let tier = TierIdx::new(if group.kind.is_named_by_tokens() {
            2
        } else {
            i % 2
        });
        plan.dense.push(DensePlacement {
            kind: group.kind,
            layer: group.layer,
            tier,
        });
    }
    plan.layers.clear();
    plan.staging_tier = TierIdx::new(1);
    for e in &shape.experts {
        let nth = |offset: u32| -> Vec<u32> {
            (0..e.n_expert)
                .filter(|i| spread.pin_every > 0 && i % spread.pin_every == offset)
                .collect()
        };
        let pinned = [0, 1]
            .map(|tier| Pins {
                tier: TierIdx::new(tier),
                experts: nth(tier as u32),
            })
            .to_vec();
        if spread.slow == TierKind::Nvme {
            plan.staging_experts = plan.staging_experts.max(e.n_used + spread.extra_staging);
        }
        plan.layers.push(LayerPlacement {
            layer: e.layer,
            pinned,
            slots: spread.slots,
            slot_tier: spread.slot_tier,
            policy: SlotPolicy::Lru,
        });
    }
    plan.fill_sums(shape);
    for tier in &mut plan.tiers {
        tier.budget_bytes = tier.used_bytes() + spread.real.unwrap_or(0);
    }
    plan.tiers[TierIdx::new(2)].tier.emulated = spread.real.is_none();
    plan
}

#[test]
fn every_architecture_has_a_model_and_a_place_in_the_document() {
    let all = || {
        let of = |folder| models(folder).into_iter().map(move |name| (folder, name));
        of("arch").chain(of("arch2"))
    };
    let arch = |(folder, name): (&str, String)| {
        let gguf = Gguf::open(&data(&format!("{folder}/{name}.gguf"))).unwrap();
        gguf.str("general.architecture").unwrap().to_string()
    };
    let with_model: BTreeSet<String> = all().map(arch).collect();
    assert_eq!(with_model, SUPPORTED.map(String::from).into());
    let document = std::fs::read_to_string(root().join("docs/models.md")).unwrap();
    let (table, _) = document.split_once("\n## ").unwrap();
    for name in SUPPORTED {
        assert!(
            table.contains(&format!("`{name}`")),
            "docs/models.md, first table: `{name}` is missing"
        );
    }
    for (_, name) in all() {
        assert!(
            document.contains(&format!("| `{name}` | `")),
            "docs/models.md, table of errors: `{name}` is missing"
        );
    }
}

#[test]
fn logits_and_greedy_tokens_agree() {
    for name in models("arch") {
        let fixture = golden(&name);
        let shape = shape_of_file(&fixture.path).unwrap();
        let plan = all_in_memory(&shape, context(&fixture), KvType::F32);
        let (prompt, _, tokens) = run(&fixture, &plan, 512);
        let error = fixture.nmse(&prompt);
        assert!(error <= BOUND, "{name}: NMSE {error:e}");
        assert_eq!(tokens, fixture.greedy, "{name}");
    }
}

#[test]
fn tokens_one_by_one_agree() {
    for name in models("arch") {
        let fixture = golden(&name);
        let shape = shape_of_file(&fixture.path).unwrap();
        let mut engine = engine(
            &fixture,
            &all_in_memory(&shape, context(&fixture), KvType::F32),
            512,
        );
        let mut logits = Vec::new();
        for token in &fixture.tokens {
            logits.extend_from_slice(engine.forward(&[*token], LogitsMode::Last).unwrap());
        }
        let error = fixture.nmse(&logits);
        assert!(error <= BOUND, "{name}: NMSE {error:e}");
    }
}

#[test]
fn the_plan_does_not_change_a_bit() {
    let spread = |pin_every, slots, slot_tier, extra_staging, slow| {
        let (slot_tier, real) = (TierIdx::new(slot_tier), None);
        Spread {
            pin_every,
            slots,
            slot_tier,
            extra_staging,
            slow,
            real,
        }
    };
    let real = |spread: Spread, spare| Spread {
        real: Some(spare),
        ..spread
    };
    let spreads = [
        // Fewer slots than a token uses, more than that, none; nothing pinned, and all that can be.
        spread(3, 1, 1, 0, TierKind::Nvme),
        spread(4, 2, 0, 3, TierKind::Nvme),
        spread(0, 5, 1, 1, TierKind::Nvme),
        spread(0, 0, 0, 0, TierKind::Nvme),
        spread(2, 0, 0, 0, TierKind::Nvme),
        // A slow tier that is computed from in place.
        spread(3, 0, 0, 0, TierKind::Pmem),
        // The file read past the page cache, with and without room for whole pages.
        real(spread(3, 1, 1, 0, TierKind::Nvme), 1 << 20),
        real(spread(0, 5, 0, 1, TierKind::Nvme), 1 << 20),
        real(spread(4, 2, 0, 3, TierKind::Nvme), 0),
    ];
    for name in models("arch") {
        let fixture = golden(&name);
        let shape = shape_of_file(&fixture.path).unwrap();
        // Batches that do not divide the prompt, so that slots carry over from one to the next.
        let batch = 13;
        let expected = run(
            &fixture,
            &all_in_memory(&shape, context(&fixture), KvType::F32),
            batch,
        );
        assert!(fixture.nmse(&expected.0) <= BOUND, "{name}");
        for spread in spreads {
            let plan = three_tiers(&shape, context(&fixture), spread);
            let found = run(&fixture, &plan, batch);
            let same =
                |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(
                same(&found.0, &expected.0),
                "{name}: logits of the prompt, {}",
                plan.name
            );
            assert!(
                same(&found.1, &expected.1),
                "{name}: logits while decoding, {}",
                plan.name
            );
        }
    }
}

/// Fewer bits for keys and values cost little, take the bytes that they should, and whatever they
/// cost is the same under every plan.
///
/// The weights are random, so now and then a token's next best expert is a hair away, and rounding
/// anything makes it another network from there on: logits are compared up to the first token that
/// chooses other experts.
#[test]
fn keys_and_values_in_fewer_bits_stay_close() {
    let spread = Spread {
        pin_every: 3,
        slots: 1,
        slot_tier: TierIdx::new(1),
        extra_staging: 0,
        slow: TierKind::Nvme,
        real: None,
    };
    for name in models("arch") {
        let fixture = golden(&name);
        let shape = shape_of_file(&fixture.path).unwrap();
        let (context, n) = (context(&fixture), fixture.tokens.len());
        let chosen = |kv_type| -> Vec<BTreeSet<(usize, u16)>> {
            let mut engine = engine(&fixture, &all_in_memory(&shape, context, kv_type), 512);
            engine.forward(&fixture.tokens, LogitsMode::Last).unwrap();
            let experts = &engine.routing().experts;
            let used = shape.experts.first().map_or(1, |e| e.n_used as usize);
            let by_token = |t: usize| {
                experts[t * experts.len() / n..(t + 1) * experts.len() / n]
                    .iter()
                    .enumerate()
            };
            (0..n)
                .map(|t| by_token(t).map(|(i, expert)| (i / used, *expert)).collect())
                .collect()
        };
        let exact = chosen(KvType::F32);
        for (kv_type, most) in [(KvType::F16, 1e-6), (KvType::Q8_0, 5e-4)] {
            let (prompt, decoded, _) = run(&fixture, &all_in_memory(&shape, context, kv_type), 512);
            let alike = exact
                .iter()
                .zip(chosen(kv_type))
                .take_while(|(a, b)| **a == *b)
                .count();
            let square = |x: f32| f64::from(x) * f64::from(x);
            let pairs = || {
                prompt
                    .iter()
                    .zip(&fixture.logits)
                    .take(alike * fixture.n_vocab)
            };
            let error: f64 = pairs().map(|(a, b)| square(a - b)).sum();
            let error = error / pairs().map(|(_, b)| square(*b)).sum::<f64>();
            assert!(
                alike > 0 && error > 0.0 && error < most,
                "{name}, {kv_type}: NMSE {error:e} of {alike} tokens"
            );

            let mut plan = three_tiers(&shape, context, spread);
            plan.kv_type = kv_type;
            plan.fill_sums(&shape);
            let found = run(&fixture, &plan, 512);
            let same =
                |a: &[f32], b: &[f32]| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(
                same(&found.0, &prompt) && same(&found.1, &decoded),
                "{name}, {kv_type}"
            );
        }
    }
}

/// Longer than a few chunks of attention, so that threads share out one token's context.
#[test]
fn long_contexts_depend_neither_on_threads_nor_on_batches() {
    for name in ["qwen3-dense", "gpt-oss", "deepseek-v3"] {
        long_context_is_stable(&golden(name));
    }
}

/// Demands the same bits of a long text from any number of threads and batches of any size.
pub(crate) fn long_context_is_stable(fixture: &Golden) {
    let name = fixture.path.display();
    let shape = shape_of_file(&fixture.path).unwrap();
    let n_vocab = fixture.n_vocab as u32;
    let tokens: Vec<u32> = (0..600u32)
        .map(|i| i.wrapping_mul(2_654_435_761) % n_vocab)
        .collect();
    for kv_type in KvType::ALL {
        let plan = all_in_memory(&shape, 610, kv_type);
        let logits = |threads: usize, batch: usize| -> Vec<u32> {
            let gguf = Arc::new(Gguf::open(&fixture.path).unwrap());
            let options = LoadOptions {
                threads: Some(threads),
                batch: Some(batch),
                ..LoadOptions::default()
            };
            let mut engine = Engine::load(gguf, &plan, &options, &mut |_, _| {}).unwrap();
            let mut logits = engine.forward(&tokens, LogitsMode::All).unwrap().to_vec();
            for token in [3, 1, 4] {
                logits.extend_from_slice(engine.forward(&[token], LogitsMode::Last).unwrap());
            }
            assert!(logits.iter().all(|l| l.is_finite()));
            logits.into_iter().map(f32::to_bits).collect()
        };
        let expected = logits(1, 512);
        // A last batch of one token, and one of two micro-batches, too.
        for (threads, batch) in [(3, 512), (2, 64), (5, 100), (2, 599), (3, 2048)] {
            let same = logits(threads, batch) == expected;
            assert!(
                same,
                "{name}, {kv_type}: {threads} threads, batches of {batch}"
            );
        }
    }
}

#[test]
fn pins_on_the_only_tier_change_nothing() {
    let fixture = golden("gpt-oss");
    let shape = shape_of_file(&fixture.path).unwrap();
    let plain = all_in_memory(&shape, context(&fixture), KvType::F32);
    let mut pinned = plain.clone();
    for layer in &mut pinned.layers {
        layer.pinned = vec![Pins {
            tier: TierIdx::new(0),
            experts: vec![1, 2],
        }];
    }
    pinned.fill_sums(&shape);
    assert_eq!(run(&fixture, &pinned, 512), run(&fixture, &plain, 512));
}

#[test]
fn shared_experts_and_biases_are_counted() {
    for name in models("arch") {
        let fixture = golden(&name);
        let shape = shape_of_file(&fixture.path).unwrap();
        let gguf = Gguf::open(&fixture.path).unwrap();
        let total: u64 = gguf.tensors().iter().map(|t| t.n_bytes).sum();
        assert_eq!(
            shape.weight_bytes(),
            total,
            "{name}: bytes in groups and experts, and in the file"
        );
        let shared = shape
            .dense
            .iter()
            .filter(|d| d.kind == DenseKind::SharedExpert)
            .count();
        let expected = gguf
            .tensors()
            .iter()
            .filter(|t| t.name.ends_with(".ffn_up_shexp.weight"))
            .count();
        assert_eq!(shared, expected, "{name}");
    }
}

#[test]
fn a_changed_file_is_an_error_and_no_token() {
    let original = golden("qwen3moe");
    let folder = tempfile::tempdir().unwrap();
    let fixture = Golden {
        path: folder.path().join("model.gguf"),
        ..original
    };
    std::fs::copy(data("arch/qwen3moe.gguf"), &fixture.path).unwrap();
    let shape = shape_of_file(&fixture.path).unwrap();
    let (first, rest) = fixture.tokens.split_at(5);
    let mut reference = engine(
        &fixture,
        &all_in_memory(&shape, context(&fixture), KvType::F32),
        512,
    );
    reference.forward(first, LogitsMode::Last).unwrap();
    let expected = reference.forward(rest, LogitsMode::All).unwrap().to_vec();

    let spread = Spread {
        pin_every: 0,
        slots: 3,
        slot_tier: TierIdx::new(1),
        extra_staging: 0,
        slow: TierKind::Nvme,
        real: Some(1 << 20),
    };
    let mut engine = engine(
        &fixture,
        &three_tiers(&shape, context(&fixture), spread),
        512,
    );
    engine.forward(first, LogitsMode::Last).unwrap();
    let file = std::fs::File::options()
        .write(true)
        .open(&fixture.path)
        .unwrap();
    let (len, modified) = (
        file.metadata().unwrap().len(),
        file.metadata().unwrap().modified().unwrap(),
    );
    file.set_len(len + 1).unwrap();
    let message = engine
        .forward(rest, LogitsMode::All)
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("model.gguf") && message.contains("length changed"),
        "{message}"
    );
    file.set_len(len).unwrap();
    file.set_modified(modified + std::time::Duration::from_secs(1))
        .unwrap();
    let message = engine
        .forward(rest, LogitsMode::All)
        .unwrap_err()
        .to_string();
    assert!(
        message.contains("model.gguf") && message.contains("written to"),
        "{message}"
    );
    // As if it had never happened: the context is what it was, and the tokens are those of an
    // engine without a fault.
    file.set_modified(modified).unwrap();
    assert_eq!(engine.n_past(), first.len());
    let found = engine.forward(rest, LogitsMode::All).unwrap();
    assert!(
        found
            .iter()
            .zip(&expected)
            .all(|(a, b)| a.to_bits() == b.to_bits())
    );
    assert_eq!(found.len(), expected.len());
}
