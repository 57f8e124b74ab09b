//! The same network in other clothes: files rewritten so that they say the same in another way must
//! give the same bits, and files that contradict themselves must be refused by name.

use crate::engine::{Engine, LogitsMode};
use crate::error::RunError;
use crate::options::LoadOptions;
use crate::plans::in_memory::all_in_memory;
use proptest::prelude::*;
use std::path::Path;
use std::sync::Arc;
use tier_plan_formats::gguf::testing::Writer;
use tier_plan_formats::gguf::{ArrayValue, Gguf, Value};
use tier_plan_formats::machine::TierKind;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::shape::{ModelShape, shape_of};
use tier_plan_formats::model::{ModelError, describe};
use tier_plan_formats::placement::{Pins, Placement, TierIdx};
use tier_plan_kernels::quant::TensorType;

/// A fixture, ready to be rewritten.
pub(super) fn fixture(name: &str) -> Writer {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../tests/data/arch/{name}.gguf"));
    let gguf = Gguf::open(&path).unwrap();
    Writer::from_gguf(&gguf)
}

/// Writes the file and opens it; it is removed with the first of the two.
pub(super) fn open(writer: &Writer) -> (tempfile::NamedTempFile, Arc<Gguf>) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), writer.finish()).unwrap();
    let gguf = Gguf::open(file.path()).unwrap();
    (file, Arc::new(gguf))
}

/// What refuses the file.
pub(super) fn error(writer: &Writer) -> String {
    let (_file, gguf) = open(writer);
    describe(&gguf).unwrap_err().to_string()
}

const TOKENS: [u32; 24] = [
    3, 1, 4, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32, 38, 46, 26, 43, 38, 32, 79, 50, 28, 84, 19,
];
const CONTEXT: u32 = 26;

/// Every expert in an arena, and a slow tier that is mapped.
fn pinned(shape: &ModelShape) -> Placement {
    let mut plan = all_in_memory(shape, CONTEXT, KvType::F32);
    let mut slow = plan.tiers[TierIdx::new(0)].clone();
    slow.tier.name = "slow".into();
    slow.tier.kind = TierKind::Pmem;
    plan.tiers = plan.tiers.into_iter().chain([slow]).collect();
    for (layer, e) in plan.layers.iter_mut().zip(&shape.experts) {
        layer.pinned = vec![Pins {
            tier: TierIdx::new(0),
            experts: (0..e.n_expert).collect(),
        }];
    }
    plan.fill_sums(shape);
    plan
}

/// Logits of a prompt and of two more tokens, experts mapped and in an arena: the same bits.
pub(super) fn logits(writer: &Writer) -> Vec<u32> {
    let (_file, gguf) = open(writer);
    let shape = shape_of(&gguf, &describe(&gguf).unwrap());
    let [mapped, pinned] =
        [all_in_memory(&shape, CONTEXT, KvType::F32), pinned(&shape)].map(|plan| {
            let options = LoadOptions {
                threads: Some(1),
                ..LoadOptions::default()
            };
            let mut engine =
                Engine::load(Arc::clone(&gguf), &plan, &options, &mut |_, _| {}).unwrap();
            let mut all = engine.forward(&TOKENS, LogitsMode::All).unwrap().to_vec();
            all.extend_from_slice(engine.forward(&[7], LogitsMode::Last).unwrap());
            all.extend_from_slice(engine.forward(&[11], LogitsMode::Last).unwrap());
            assert!(all.iter().all(|l| l.is_finite()));
            all.into_iter().map(f32::to_bits).collect::<Vec<u32>>()
        });
    assert!(
        mapped == pinned,
        "experts in place and pinned give different logits"
    );
    mapped
}

fn blocks(writer: &Writer, arch: &str) -> u32 {
    writer.count(&format!("{arch}.block_count"))
}

#[test]
fn fused_queries_keys_and_values_are_the_same() {
    for name in ["glm4moe", "gpt-oss", "minimax-m2", "olmoe", "qwen2moe"] {
        let plain = fixture(name);
        let (mut fused, mut apart) = (plain.clone(), plain.clone());
        for i in 0..blocks(&plain, name) {
            let names = |kind: &str| ["q", "k", "v"].map(|n| format!("blk.{i}.attn_{n}.{kind}"));
            for (writer, kinds) in [
                (&mut fused, &[("weight", 1), ("bias", 0)][..]),
                (&mut apart, &[("weight", 1)]),
            ] {
                for (kind, axis) in kinds {
                    writer.fuse(&names(kind), &format!("blk.{i}.attn_qkv.{kind}"), *axis, 1);
                }
            }
        }
        let expected = logits(&plain);
        assert!(logits(&fused) == expected, "{name}");
        assert!(logits(&apart) == expected, "{name}, biases apart");
    }
}

#[test]
fn fused_gates_and_ups_are_the_same() {
    for name in ["gpt-oss", "qwen2moe", "glm4moe"] {
        let plain = fixture(name);
        let mut fused = plain.clone();
        let n_expert = plain.count(&format!("{name}.expert_count")) as usize;
        for i in 0..blocks(&plain, name) {
            for (kind, axis) in [("weight", 1), ("bias", 0)] {
                let names = ["gate", "up"].map(|n| format!("blk.{i}.ffn_{n}_exps.{kind}"));
                fused.fuse(
                    &names,
                    &format!("blk.{i}.ffn_gate_up_exps.{kind}"),
                    axis,
                    n_expert,
                );
            }
        }
        assert!(fused.tensors.len() < plain.tensors.len());
        assert!(logits(&fused) == logits(&plain), "{name}");
    }
}

#[test]
fn experts_apart_are_the_same_as_stacked() {
    for name in ["olmoe", "qwen2moe"] {
        let plain = fixture(name);
        let mut apart = plain.clone();
        let n_expert = plain.count(&format!("{name}.expert_count")) as usize;
        for i in 0..blocks(&plain, name) {
            for matrix in ["gate", "up", "down"] {
                let stacked = apart.take(&format!("blk.{i}.ffn_{matrix}_exps.weight"));
                let Some(stacked) = stacked else { continue };
                let size = stacked.data.len() / n_expert;
                // Backwards, so that no stride leads from one expert to the next.
                for expert in (0..n_expert).rev() {
                    let mut one = stacked.clone();
                    one.name = format!("blk.{i}.ffn_{matrix}.{expert}.weight");
                    one.dims.pop();
                    one.data = stacked.data[expert * size..][..size].to_vec();
                    apart.tensors.push(one);
                }
            }
        }
        assert!(apart.tensors.len() > plain.tensors.len());
        assert!(logits(&apart) == logits(&plain), "{name}");
    }
}

#[test]
fn the_older_key_of_linear_scaling_counts_where_the_newer_is_missing() {
    let plain = fixture("olmoe");
    let with = |keys: &[(&str, f32)]| {
        let mut writer = plain.clone();
        for (key, value) in keys {
            writer.set(&format!("olmoe.rope.{key}"), Value::F32(*value));
        }
        logits(&writer)
    };
    let newer = with(&[("scaling.factor", 4.0)]);
    assert!(newer != logits(&plain));
    assert!(with(&[("scale_linear", 4.0)]) == newer);
    assert!(with(&[("scale_linear", 2.0), ("scaling.factor", 4.0)]) == newer);
}

#[test]
fn biases_of_experts_may_be_of_any_float_type() {
    let plain = fixture("gpt-oss");
    let mut narrow = plain.clone();
    let mut rounded = plain;
    // BF16 by cutting off: the same values widened again must be the same network.
    for writer in [&mut narrow, &mut rounded] {
        for t in writer
            .tensors
            .iter_mut()
            .filter(|t| t.name.ends_with("_exps.bias"))
        {
            t.data
                .as_chunks_mut::<4>()
                .0
                .iter_mut()
                .for_each(|b| b[..2].fill(0));
        }
    }
    for t in narrow
        .tensors
        .iter_mut()
        .filter(|t| t.name.ends_with("_exps.bias"))
    {
        t.type_id = TensorType::BF16 as u32;
        t.data = t
            .data
            .as_chunks::<4>()
            .0
            .iter()
            .flat_map(|b| [b[2], b[3]])
            .collect();
    }
    assert!(logits(&narrow) == logits(&rounded));
}

#[test]
fn trailing_prediction_blocks_are_skipped() {
    for name in ["glm4moe", "qwen2moe"] {
        let plain = fixture(name);
        let mut more = plain.clone();
        let n = blocks(&plain, name);
        more.set(&format!("{name}.block_count"), Value::U32(n + 1));
        more.set(&format!("{name}.nextn_predict_layers"), Value::U32(1));
        for suffix in ["nextn.eh_proj.weight", "attn_norm.weight"] {
            more = more.tensor(
                &format!("blk.{n}.{suffix}"),
                TensorType::F32,
                &[4],
                vec![0; 16],
            );
        }
        assert!(logits(&more) == logits(&plain), "{name}");
        more.set(&format!("{name}.nextn_predict_layers"), Value::U32(n + 1));
        assert!(error(&more).contains("nextn_predict_layers"));
    }
}

#[test]
fn sizes_may_be_given_by_layer() {
    for name in ["glm4moe", "gpt-oss", "minimax-m2", "olmoe", "qwen2moe"] {
        let plain = fixture(name);
        let mut listed = plain.clone();
        // One more than there are layers, as files with trailing blocks have it.
        let n = blocks(&plain, name) as usize + 1;
        let keys = [
            "attention.head_count",
            "attention.head_count_kv",
            "feed_forward_length",
            "expert_used_count",
        ];
        for key in keys.map(|key| format!("{name}.{key}")) {
            listed.set(
                &key,
                Value::Array(ArrayValue::U32(vec![plain.count(&key); n])),
            );
        }
        assert!(logits(&listed) == logits(&plain), "{name}");
    }
}

#[test]
fn a_tied_head_is_the_embedding() {
    let mut tied = fixture("glm4moe");
    tied.take("output.weight").unwrap();
    let mut copied = tied.clone();
    let mut embedding = copied
        .tensors
        .iter()
        .find(|t| t.name == "token_embd.weight")
        .unwrap()
        .clone();
    embedding.name = "output.weight".into();
    copied.tensors.push(embedding);
    assert!(logits(&tied) == logits(&copied));
}

#[test]
fn windows_follow_the_pattern() {
    let key = "gpt-oss.attention.sliding_window_pattern";
    let with = |value: Value| {
        let mut writer = fixture("gpt-oss");
        writer.set(key, value);
        writer
    };
    let plain = logits(&fixture("gpt-oss"));
    assert!(logits(&with(Value::U32(2))) == plain);
    assert!(
        logits(&with(Value::Array(ArrayValue::Bool(vec![
            true, false, true
        ]))))
            == plain
    );
    assert!(logits(&with(Value::Array(ArrayValue::U32(vec![1, 0, 1, 0])))) == plain);
    let none = logits(&with(Value::U32(1)));
    assert!(none != plain);
    // A window as long as the text is none.
    let mut wide = fixture("gpt-oss");
    wide.set("gpt-oss.attention.sliding_window", Value::U32(CONTEXT));
    assert!(logits(&wide) == none);
    let all = logits(&with(Value::U32(0)));
    assert!(all != plain && all != none);
    assert!(all == logits(&with(Value::Array(ArrayValue::Bool(vec![true; 3])))));
    // Windows rotate with a base of their own where there is one.
    let mut base = fixture("gpt-oss");
    base.set("gpt-oss.rope.freq_base_swa", Value::F32(10_000.0));
    assert!(logits(&base) != plain);
    base.set("gpt-oss.rope.freq_base_swa", Value::F32(150_000.0));
    assert!(logits(&base) == plain);
}

#[test]
fn what_is_optional_may_be_missing() {
    let mut bare = fixture("glm4moe");
    bare.tensors.retain(|t| {
        !t.name.contains("_norm.weight") || !(t.name.contains("_q_") || t.name.contains("_k_"))
    });
    bare.tensors
        .retain(|t| !t.name.ends_with("attn_q.bias") && !t.name.ends_with("attn_k.bias"));
    bare.unset("glm4moe.expert_gating_func");
    assert!(logits(&bare) != logits(&fixture("glm4moe")));
    let mut none_shared = fixture("glm4moe");
    none_shared.set("glm4moe.expert_shared_count", Value::U32(0));
    none_shared.tensors.retain(|t| !t.name.contains("_shexp"));
    assert!(logits(&none_shared) != logits(&fixture("glm4moe")));
    let mut one_key = fixture("minimax-m2");
    one_key.unset("minimax-m2.feed_forward_length");
    one_key.set("minimax-m2.expert_feed_forward_length", Value::U32(64));
    assert!(logits(&one_key) == logits(&fixture("minimax-m2")));
}

#[test]
fn contradictions_are_named() {
    let with = |name: &str, key: &str, value: Value| {
        let mut writer = fixture(name);
        writer.set(&format!("{name}.{key}"), value);
        error(&writer)
    };
    let said = with("glm4moe", "expert_shared_count", Value::U32(0));
    assert!(said.contains("_shexp.weight: is a shared expert"), "{said}");
    let cases = [
        ("glm4moe", "expert_gating_func", Value::U32(9)),
        ("glm4moe", "expert_used_count", Value::U32(9)),
        (
            "glm4moe",
            "expert_used_count",
            Value::Array(ArrayValue::U32(vec![2, 3, 2])),
        ),
        ("glm4moe", "expert_group_count", Value::U32(3)),
        ("glm4moe", "expert_group_count", Value::U32(8)),
        ("glm4moe", "expert_shared_count", Value::U32(5000)),
        (
            "glm4moe",
            "rope.dimension_sections",
            Value::Array(ArrayValue::I32(vec![2, 1, 0, 1])),
        ),
        ("glm4moe", "rope.dimension_count", Value::U32(7)),
        ("gpt-oss", "attention.sliding_window", Value::U32(0)),
        (
            "gpt-oss",
            "attention.sliding_window_pattern",
            Value::Array(ArrayValue::Bool(vec![true])),
        ),
        ("gpt-oss", "attention.head_count_kv", Value::U32(3)),
    ];
    for (name, key, value) in cases {
        let message = with(name, key, value.clone());
        assert!(message.contains(key), "{key} = {value:?}: {message}");
    }
    let mut groups = fixture("glm4moe");
    groups.set("glm4moe.expert_group_count", Value::U32(4));
    groups.set("glm4moe.expert_group_used_count", Value::U32(1));
    assert!(error(&groups).contains("expert_group_used_count"));
    for (name, tensor) in [
        ("gpt-oss", "blk.1.attn_sinks.weight"),
        ("gpt-oss", "blk.2.post_attention_norm.weight"),
        ("qwen2moe", "blk.0.ffn_gate_inp_shexp.weight"),
        ("glm4moe", "blk.1.ffn_up_shexp.weight"),
        ("olmoe", "blk.2.attn_k_norm.weight"),
        ("minimax-m2", "blk.0.ffn_down_exps.weight"),
    ] {
        let mut writer = fixture(name);
        writer.take(tensor).unwrap();
        let (_file, gguf) = open(&writer);
        match describe(&gguf).unwrap_err() {
            ModelError::MissingTensor { name: found, .. } => assert_eq!(found, tensor),
            other => panic!("{tensor}: {other}"),
        }
    }
}

#[test]
fn a_factor_beyond_all_numbers_is_named_when_it_is_used() {
    let mut writer = fixture("glm4moe");
    writer.set("glm4moe.attention.scale", Value::F32(1.5e38));
    let (_file, gguf) = open(&writer);
    let plan = all_in_memory(&shape_of(&gguf, &describe(&gguf).unwrap()), 4, KvType::F32);
    let mut engine = Engine::load(gguf, &plan, &LoadOptions::default(), &mut |_, _| {}).unwrap();
    let failed = engine
        .forward(&[1, 2, 3], LogitsMode::All)
        .map(<[f32]>::len);
    assert!(
        matches!(failed, Err(RunError::NotANumber { .. })),
        "{failed:?}"
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever the metadata say, a file is described or refused; and what is described runs, or says
    /// that its results are no numbers.
    #[test]
    fn no_metadata_panic(
        name in prop::sample::select(vec!["glm4moe", "gpt-oss", "minimax-m2", "olmoe", "qwen2moe"]),
        changes in prop::collection::vec((any::<prop::sample::Index>(), change()), 1..3),
    ) {
        let mut writer = fixture(name);
        for (index, change) in changes {
            let key = KEYS[index.index(KEYS.len())];
            let key = format!("{name}.{key}");
            match change {
                Some(value) => writer.set(&key, value),
                None => writer.metadata.retain(|(k, _)| *k != key),
            }
        }
        let (_file, gguf) = open(&writer);
        if let Ok(spec) = describe(&gguf) {
            let plan = all_in_memory(&shape_of(&gguf, &spec), 4, KvType::F32);
            let options = LoadOptions { threads: Some(1), batch: Some(2), ..LoadOptions::default() };
            let mut engine = Engine::load(gguf, &plan, &options, &mut |_, _| {}).unwrap();
            for tokens in [&[1, 2, 3][..], &[4]] {
                match engine.forward(tokens, LogitsMode::All) {
                    Ok(_) => {}
                    // A factor may be beyond all numbers.
                    Err(RunError::NotANumber { .. }) => break,
                    Err(other) => panic!("{other}"),
                }
            }
        }
    }
}

const KEYS: [&str; 25] = [
    "block_count",
    "nextn_predict_layers",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.scale",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.freq_base_swa",
    "expert_count",
    "expert_used_count",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
    "expert_shared_count",
    "expert_group_count",
    "expert_group_used_count",
    "expert_gating_func",
    "expert_weights_scale",
    "leading_dense_block_count",
];

/// A value for a key, or its removal.
pub(super) fn change() -> impl Strategy<Value = Option<Value>> {
    let number = prop_oneof![
        0u32..10,
        Just(16),
        Just(32),
        Just(64),
        Just(1 << 24),
        any::<u32>()
    ];
    prop_oneof![
        Just(None),
        number.clone().prop_map(|n| Some(Value::U32(n))),
        any::<f32>().prop_map(|x| Some(Value::F32(x))),
        any::<bool>().prop_map(|b| Some(Value::Bool(b))),
        prop::collection::vec(number, 0..5).prop_map(|a| Some(Value::Array(ArrayValue::U32(a)))),
        prop::collection::vec(any::<bool>(), 0..5)
            .prop_map(|a| Some(Value::Array(ArrayValue::Bool(a)))),
    ]
}
