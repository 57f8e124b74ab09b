//! The second group of architectures against golden values (`tests/data/arch2/README.md`), and under
//! plans that must not change a bit.

use super::golden_arch::{
    BOUND, Spread, context, engine, long_context_is_stable, run, three_tiers,
};
use tier_plan_runtime::formats::machine::TierKind;
use tier_plan_runtime::formats::placement::TierIdx;
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::shape_of_file;
use tier_plan_runtime::plans::in_memory::all_in_memory;
use tier_plan_runtime::{KvType, LogitsMode};
use tier_plan_testing::{Golden, models};

/// A model with thousands of tokens, for chunks of attention.
const LONG: &str = "llama4-long";

fn golden(name: &str) -> Golden {
    Golden::read(&format!("arch2/{name}"))
}

#[test]
fn logits_and_greedy_tokens_agree() {
    let mut wrong = Vec::new();
    for name in models("arch2") {
        let fixture = golden(&name);
        let shape = shape_of_file(&fixture.path).unwrap();
        let plan = all_in_memory(&shape, context(&fixture), KvType::F32);
        let (prompt, _, tokens) = run(&fixture, &plan, 512);
        let error = fixture.nmse(&prompt);
        println!("| `{name}` | `{}` | {error:.1e} |", shape.arch);
        if error > BOUND || error.is_nan() || tokens != fixture.greedy {
            wrong.push(name);
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn tokens_one_by_one_agree() {
    for name in models("arch2").iter().filter(|name| *name != LONG) {
        let fixture = golden(name);
        let shape = shape_of_file(&fixture.path).unwrap();
        let plan = all_in_memory(&shape, context(&fixture), KvType::F32);
        let mut engine = engine(&fixture, &plan, 512);
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
    let spread = |pin_every, slots, slow, real| Spread {
        pin_every,
        slots,
        slot_tier: TierIdx::new(1),
        extra_staging: 0,
        slow,
        real,
    };
    let spreads = [
        // Fewer slots than a token uses, read from the file; a slow tier that is computed from.
        spread(3, 1, TierKind::Nvme, Some(1 << 20)),
        spread(3, 0, TierKind::Pmem, None),
    ];
    for name in models("arch2").iter().filter(|name| *name != LONG) {
        let fixture = golden(name);
        let shape = shape_of_file(&fixture.path).unwrap();
        // Batches that do not divide the prompt.
        let batch = 13;
        let plain = all_in_memory(&shape, context(&fixture), KvType::F32);
        let expected = run(&fixture, &plain, batch);
        let bits = |logits: &[f32]| logits.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
        for spread in spreads {
            let plan = three_tiers(&shape, context(&fixture), spread);
            let found = run(&fixture, &plan, batch);
            assert!(
                bits(&found.0) == bits(&expected.0) && bits(&found.1) == bits(&expected.1),
                "{name}: {}",
                plan.name
            );
        }
    }
}

#[test]
fn long_contexts_depend_neither_on_threads_nor_on_batches() {
    for name in ["glm-dsa", "dots3note", "glm5-next", "deepseek4"] {
        long_context_is_stable(&golden(name));
    }
}

#[test]
fn all_tensors_that_are_read_are_counted() {
    // Prediction blocks, and what files have beside what their models read.
    let unused = |name: &str, arch: &str| {
        name.contains("nextn.") || arch == "ernie4_5-moe" && name.ends_with("attn_output.bias")
    };
    for name in models("arch2") {
        let fixture = golden(&name);
        let (shape, gguf) = (
            shape_of_file(&fixture.path).unwrap(),
            Gguf::open(&fixture.path).unwrap(),
        );
        let layer = |name: &str| -> Option<u32> {
            name.strip_prefix("blk.")?.split('.').next()?.parse().ok()
        };
        let total: u64 = gguf
            .tensors()
            .iter()
            .filter(|t| layer(&t.name).is_none_or(|layer| layer < shape.n_layer))
            .filter(|t| !unused(&t.name, &shape.arch))
            .map(|t| t.n_bytes)
            .sum();
        assert_eq!(shape.weight_bytes(), total, "{name}");
    }
}
