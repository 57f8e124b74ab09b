//! Latent attention with indexers, windows and gates, and Kimi delta attention: the same network in
//! other files gives the same bits, and contradictions are refused by name.

use crate::engine::{Engine, LogitsMode};
use crate::options::LoadOptions;
use crate::plans::in_memory::all_in_memory;
use proptest::prelude::*;
use std::sync::Arc;
use tier_plan_formats::gguf::testing::Writer;
use tier_plan_formats::gguf::{ArrayValue, Gguf, Value};
use tier_plan_formats::model::kv::{KvRows, KvType};
use tier_plan_formats::model::shape::shape_of;
use tier_plan_formats::model::spec::{KvUp, Mixer, Reach};
use tier_plan_formats::model::{ModelError, describe};
use tier_plan_kernels::quant::TensorType;
use tier_plan_testing::data;

/// A fixture, ready to be rewritten.
fn fixture(name: &str) -> Writer {
    Writer::from_gguf(&Gguf::open(&data(&format!("arch2/{name}.gguf"))).unwrap())
}

fn open(writer: &Writer) -> (tempfile::NamedTempFile, Arc<Gguf>) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), writer.finish()).unwrap();
    let gguf = Gguf::open(file.path()).unwrap();
    (file, Arc::new(gguf))
}

/// Logits of a prompt and of one more token.
fn logits(writer: &Writer) -> Vec<f32> {
    let (_file, gguf) = open(writer);
    let shape = shape_of(&gguf, &describe(&gguf).unwrap());
    let plan = all_in_memory(&shape, 32, KvType::F32);
    let options = LoadOptions {
        threads: Some(1),
        batch: Some(7),
        ..LoadOptions::default()
    };
    let mut engine = Engine::load(gguf, &plan, &options, &mut |_, _| {}).unwrap();
    let tokens: Vec<u32> = (0..25).map(|i| i * i * 7 % 90 + 1).collect();
    let mut all = engine.forward(&tokens, LogitsMode::All).unwrap().to_vec();
    all.extend_from_slice(engine.forward(&[7], LogitsMode::Last).unwrap());
    all
}

fn reshape(writer: &mut Writer, name: &str, dims: &[u64]) {
    let tensor = writer.tensors.iter_mut().find(|t| t.name == name);
    let tensor = tensor.unwrap_or_else(|| panic!("{name}"));
    let values = |dims: &[u64]| dims.iter().product::<u64>();
    assert_eq!(values(&tensor.dims), values(dims), "{name}");
    tensor.dims = dims.to_vec();
}

#[test]
fn kda_layers_are_the_same_in_other_shapes() {
    for (name, layers) in [("kimi-linear", &[0, 1][..]), ("bailingmoe3", &[0, 2])] {
        let plain = fixture(name);
        let (mut fused, mut flat) = (plain.clone(), plain.clone());
        for i in layers {
            let names = ["q", "k", "v"].map(|n| format!("blk.{i}.attn_{n}.weight"));
            fused.fuse(&names, &format!("blk.{i}.attn_qkv.weight"), 1, 1);
            for n in ["q", "k", "v"] {
                reshape(
                    &mut flat,
                    &format!("blk.{i}.ssm_conv1d_{n}.weight"),
                    &[4, 64],
                );
            }
            reshape(&mut flat, &format!("blk.{i}.ssm_a"), &[4]);
        }
        let expected = logits(&plain);
        assert!(logits(&fused) == expected, "{name}, fused");
        assert!(logits(&flat) == expected, "{name}, flat");
    }
}

/// Merges keys and values of the latent layer of kimi-linear into the older tensor.
fn unsplit(mut file: Writer) -> Writer {
    let (nope, rank, value, n_head) = (24, 32, 24, 4);
    let mut take = |name: &str| -> Vec<[u8; 2]> {
        let tensor = file.take(&format!("blk.2.{name}.weight")).unwrap();
        assert_eq!(tensor.type_id, TensorType::F16 as u32);
        tensor.data.chunks_exact(2).map(|b| [b[0], b[1]]).collect()
    };
    let (k, v) = (take("attn_k_b"), take("attn_v_b"));
    let mut both = Vec::new();
    for head in 0..n_head {
        for i in 0..nope {
            both.extend((0..rank).flat_map(|r| k[(head * rank + r) * nope + i]));
        }
        let values = &v[head * value * rank..(head + 1) * value * rank];
        both.extend(values.iter().flatten());
    }
    let dims = [rank as u64, (n_head * (nope + value)) as u64];
    file.tensor("blk.2.attn_kv_b.weight", TensorType::F16, &dims, both)
}

#[test]
fn unsplit_projections_are_close() {
    let old = unsplit(fixture("kimi-linear"));
    let (_file, gguf) = open(&old);
    let spec = describe(&gguf).unwrap();
    let Mixer::Mla(mla) = &spec.layers[2].mixer else {
        panic!("latent attention");
    };
    assert!(matches!(mla.kv_up, KvUp::Fused(_)) && mla.rope.is_none());
    let off = tier_plan_testing::nmse(&logits(&old), &logits(&fixture("kimi-linear")));
    assert!(off < 1e-10, "{off:e}");
}

/// The same model as `deepseek2`, which attends to all positions.
fn without_indexer() -> Writer {
    let mut file = fixture("deepseek32");
    for (key, _) in &mut file.metadata {
        *key = key.replace("deepseek32.", "deepseek2.");
    }
    file.set("general.architecture", Value::Str("deepseek2".into()));
    file
}

#[test]
fn an_indexer_that_chooses_all_changes_no_bit() {
    let dense = logits(&without_indexer());
    for (top_k, same) in [(26, true), (1 << 20, true), (25, false), (3, false)] {
        let mut file = fixture("deepseek32");
        let key = "deepseek32.attention.indexer.top_k";
        file.set(key, Value::U32(top_k));
        assert_eq!(logits(&file) == dense, same, "{top_k}");
    }
}

#[test]
fn flags_are_truth_values_or_numbers_and_one_stands_for_all() {
    let types = "glm-dsa.attention.indexer.types";
    let plain = logits(&fixture("glm-dsa"));
    let mut numbers = fixture("glm-dsa");
    let flags = ArrayValue::U32(vec![1, 0, 1]);
    numbers.set(types, Value::Array(flags));
    assert!(logits(&numbers) == plain);

    let mut one = fixture("deepseek32");
    for (key, _) in &mut one.metadata {
        *key = key.replace("deepseek32.", "glm-dsa.");
    }
    one.set("general.architecture", Value::Str("glm-dsa".into()));
    one.unset("glm-dsa.rope.scaling.type");
    let expected = logits(&one);
    one.set(types, Value::Bool(true));
    assert!(logits(&one) == expected);
}

#[test]
fn layers_share_what_the_last_indexer_chose() {
    let (_file, gguf) = open(&fixture("glm-dsa"));
    let spec = describe(&gguf).unwrap();
    let reach = |layer: usize| match &spec.layers[layer].mixer {
        Mixer::Mla(mla) => &mla.reach,
        other => panic!("{other:?}"),
    };
    assert!(matches!(reach(0), Reach::Indexed(_)) && matches!(reach(2), Reach::Indexed(_)));
    assert!(matches!(reach(1), Reach::Reused(chosen) if chosen.most() == 12));
    let rows = |width, queries, chosen| KvRows {
        width,
        per_token: 1,
        every: 1,
        queries,
        window: None,
        chosen,
    };
    let latents = rows(48, 2 * 4, Some(12));
    let shape = shape_of(&gguf, &spec);
    // A layer of its own indexer has that one's keys too, which every token reads.
    assert_eq!(shape.caches[0].rows, [latents, rows(64, 8, None)]);
    assert_eq!(shape.caches[1].rows, [latents]);
    assert_eq!(KvType::F16.token_bytes(&shape), 2 * (3 * 48 + 2 * 64));
    assert_eq!(
        shape.caches[0].moved_bytes(KvType::F32, 100, 1),
        4 * (12 * 48 + 100 * 64)
    );
}

#[test]
fn contradictions_are_named() {
    let flags = |flags: &[bool]| Value::Array(ArrayValue::Bool(flags.to_vec()));
    let cases = [
        (
            "glm-dsa",
            "attention.indexer.types",
            flags(&[false, true, true]),
        ),
        ("glm-dsa", "attention.indexer.types", flags(&[true, true])),
        ("glm-dsa", "attention.indexer.head_count", Value::U32(0)),
        ("glm-dsa", "attention.indexer.key_length", Value::U32(8)),
        ("glm-dsa", "attention.indexer.top_k", Value::U32(0)),
        ("glm-dsa", "rope.dimension_count", Value::U32(40)),
        ("deepseek32", "expert_gating_func", Value::U32(0)),
        ("deepseek32", "attention.q_lora_rank", Value::U32(0)),
        ("kimi-linear", "kda.head_dim", Value::U32(1 << 20)),
        ("kimi-linear", "ssm.conv_kernel", Value::U32(17)),
        ("kimi-linear", "kda.gate_lower_bound", Value::F32(0.5)),
        ("bailingmoe3", "kda.safe_gate", Value::Bool(false)),
        (
            "bailingmoe3",
            "swiglu_clamp_exp",
            Value::Array(ArrayValue::F32(vec![1.0, 1.0])),
        ),
        (
            "bailingmoe3",
            "swiglu_clamp_shexp",
            Value::Array(ArrayValue::F32(vec![f32::NAN; 4])),
        ),
        (
            "bailingmoe3",
            "rope.dimension_sections",
            Value::Array(ArrayValue::I32(vec![2, 2, 2, 2])),
        ),
        ("dots3note", "attention.sliding_window", Value::U32(0)),
        (
            "dots3note",
            "attention.indexer.types",
            flags(&[false, true, true]),
        ),
        ("dots3note", "rope.freq_base_swa", Value::F32(0.0)),
        ("kimi-k3", "activation.situ_beta", Value::F32(0.0)),
        ("kimi-k3", "expert_latent_length", Value::U32(u32::MAX)),
        ("kimi-k3", "kda.gate_lower_bound", Value::F32(0.0)),
        ("hy_v4", "hyper_connection.count", Value::U32(1)),
        ("hy_v4", "attention.indexer.key_length", Value::U32(8)),
        (
            "hy_v4",
            "attention.indexer.types",
            flags(&[false, true, true]),
        ),
        ("hy_v4", "expert_gating_func", Value::U32(0)),
        ("glm5-next", "attention.indexer.kpool", Value::U32(0)),
        ("glm5-next", "attention.indexer.kpool", Value::U32(13)),
        ("glm5-next", "attention.indexer.top_k", Value::U32(3)),
        ("glm5-next", "attention.indexer.types", flags(&[true; 3])),
        (
            "glm5-next",
            "attention.indexer.types",
            flags(&[true, false, true, true]),
        ),
        (
            "glm5-next",
            "attention.layer_norm_epsilon",
            Value::F32(-1.0),
        ),
        ("glm5-next", "rope.dimension_count", Value::U32(8)),
        ("glm5-next", "attention.q_lora_rank", Value::U32(0)),
        ("glm5-next", "swiglu_clamp_exp", Value::F32(f32::NAN)),
        ("glm5-next", "hyper_connection.count", Value::U32(1)),
    ];
    for (name, key, value) in cases {
        let mut file = fixture(name);
        file.set(&format!("{name}.{key}"), value.clone());
        let (_file, gguf) = open(&file);
        let said = describe(&gguf).unwrap_err().to_string();
        let named = said.contains(key) && said.contains(name);
        assert!(named, "{name}.{key} = {value:?}: {said}");
    }
}

#[test]
fn missing_keys_and_tensors_are_named() {
    for (name, key) in [
        ("deepseek32", "expert_gating_func"),
        ("deepseek32", "attention.key_length_mla"),
        ("glm-dsa", "attention.indexer.top_k"),
        ("kimi-linear", "kda.head_dim"),
        ("bailingmoe3", "kda.gate_lower_bound"),
        ("bailingmoe3", "leading_dense_block_count"),
        ("dots3note", "attention.sliding_window_pattern"),
        ("dots3note", "attention.indexer.types"),
        ("dots3note", "attention.kv_lora_rank_swa"),
        ("kimi-k3", "attn_res.block_size"),
        ("kimi-k3", "activation.situ_linear_beta"),
        ("hy_v4", "attention.indexer.types"),
        ("hy_v4", "hyper_connection.magnitude"),
        ("glm5-next", "attention.indexer.kpool"),
        ("glm5-next", "attention.q_lora_rank"),
        ("glm5-next", "hyper_connection.epsilon"),
        ("glm5-next", "kda.head_dim"),
    ] {
        let mut file = fixture(name);
        file.unset(&format!("{name}.{key}"));
        let (_file, gguf) = open(&file);
        let said = describe(&gguf).unwrap_err().to_string();
        assert!(said.contains(&format!("{name}.{key}")), "{key}: {said}");
    }
    for (name, tensor) in [
        ("glm-dsa", "blk.2.indexer.k_norm.bias"),
        ("deepseek32", "blk.0.indexer.proj.weight"),
        ("kimi-linear", "blk.0.ssm_f_b.weight"),
        ("kimi-linear", "blk.1.exp_probs_b.bias"),
        ("kimi-linear", "blk.1.ssm_conv1d_k.weight"),
        ("bailingmoe3", "blk.1.attn_gate.weight"),
        ("bailingmoe3", "blk.0.ssm_dt.bias"),
        ("dots3note", "blk.0.attn_k_norm.weight"),
        ("kimi-k3", "blk.1.ffn_res_score.weight"),
        ("kimi-k3", "blk.1.ffn_routed_up.weight"),
        ("kimi-k3", "output_res_score.weight"),
        ("hy_v4", "blk.1.attn_sinks.weight"),
        ("hy_v4", "blk.0.hc_ffn_base.weight"),
        ("glm5-next", "blk.1.indexer_compressor_ape.weight"),
        ("glm5-next", "blk.1.indexer_compressor_gate.weight"),
        ("glm5-next", "blk.2.exp_probs_b.bias"),
        ("glm5-next", "blk.3.hc_attn_scale.weight"),
    ] {
        let mut file = fixture(name);
        file.take(tensor).unwrap();
        let (_file, gguf) = open(&file);
        match describe(&gguf).unwrap_err() {
            ModelError::MissingTensor { name: found, .. } => assert_eq!(found, tensor),
            other => panic!("{tensor}: {other}"),
        }
    }
}

#[test]
fn optional_parts_of_kimi_k3_change_logits() {
    let expected = logits(&fixture("kimi-k3"));
    let without = |change: &dyn Fn(&mut Writer)| {
        let mut file = fixture("kimi-k3");
        change(&mut file);
        logits(&file)
    };
    let changes: [&dyn Fn(&mut Writer); 4] = [
        &|file| drop(file.take("blk.2.attn_gate.weight").unwrap()),
        &|file| drop(file.take("blk.1.ffn_routed_norm.weight").unwrap()),
        &|file| file.set("kimi-k3.attn_res.block_size", Value::U32(0)),
        &|file| file.set("kimi-k3.activation.situ_linear_beta", Value::F32(0.0)),
    ];
    for (i, change) in changes.into_iter().enumerate() {
        let found = without(change);
        assert!(
            found != expected && found.iter().all(|x| x.is_finite()),
            "{i}"
        );
    }
    // Every layer banks, and a bank that only the first layer fills.
    for block in [1, 4, 1000] {
        let key = "kimi-k3.attn_res.block_size";
        assert!(without(&|file| file.set(key, Value::U32(block))) != expected);
    }
}

#[test]
fn limits_are_optional_and_one_may_stand_for_all() {
    let mut none = fixture("bailingmoe3");
    for key in ["swiglu_clamp_exp", "swiglu_clamp_shexp"] {
        none.unset(&format!("bailingmoe3.{key}"));
    }
    let mut zero = none.clone();
    zero.set("bailingmoe3.swiglu_clamp_exp", Value::F32(0.0));
    zero.set("bailingmoe3.swiglu_clamp_shexp", Value::F32(1e-7));
    let expected = logits(&none);
    assert!(logits(&zero) == expected);
    assert!(logits(&fixture("bailingmoe3")) != expected);
    let mut once = none.clone();
    once.set("bailingmoe3.swiglu_clamp_exp", Value::F32(1.0));
    let mut each = none;
    let ones = ArrayValue::F32(vec![1.0; 4]);
    each.set("bailingmoe3.swiglu_clamp_exp", Value::Array(ones));
    assert!(logits(&once) == logits(&each));
}

const NAMES: [&str; 8] = [
    "glm-dsa",
    "deepseek32",
    "kimi-linear",
    "kimi-k3",
    "bailingmoe3",
    "dots3note",
    "hy_v4",
    "glm5-next",
];

const KEYS: [&str; 41] = [
    "block_count",
    "nextn_predict_layers",
    "embedding_length",
    "context_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.q_lora_rank",
    "attention.kv_lora_rank",
    "attention.kv_lora_rank_swa",
    "attention.key_length_mla",
    "attention.value_length_mla",
    "attention.key_length_mla_swa",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attention.indexer.head_count",
    "attention.indexer.key_length",
    "attention.indexer.top_k",
    "attention.indexer.types",
    "attention.indexer.kpool",
    "attention.indexer.kpool_select_tail",
    "attention.layer_norm_epsilon",
    "rope.dimension_count",
    "rope.dimension_sections",
    "rope.freq_base",
    "rope.scaling.factor",
    "rope.scaling.yarn_log_multiplier",
    "ssm.conv_kernel",
    "kda.head_dim",
    "kda.gate_lower_bound",
    "kda.safe_gate",
    "swiglu_clamp_exp",
    "swiglu_clamp_shexp",
    "expert_shared_count",
    "expert_latent_length",
    "attn_res.block_size",
    "activation.situ_beta",
    "hyper_connection.count",
    "hyper_connection.epsilon",
    "hyper_connection.magnitude",
    "hyper_connection.sinkhorn_iterations",
    "leading_dense_block_count",
];

/// A value for a key, or its removal.
fn change() -> impl Strategy<Value = Option<Value>> {
    let sizes = [16, 24, 32, 40, 64, 1 << 24].map(Just);
    let number = prop_oneof![
        0u32..5,
        prop::sample::select(sizes.map(|Just(n)| n).to_vec())
    ];
    prop_oneof![
        Just(None),
        number.clone().prop_map(|n| Some(Value::U32(n))),
        any::<f32>().prop_map(|x| Some(Value::F32(x))),
        any::<bool>().prop_map(|b| Some(Value::Bool(b))),
        prop::collection::vec(number, 0..5).prop_map(|a| Some(Value::Array(ArrayValue::U32(a)))),
        prop::collection::vec(any::<bool>(), 0..5)
            .prop_map(|a| Some(Value::Array(ArrayValue::Bool(a)))),
        prop::collection::vec(any::<f32>(), 0..5)
            .prop_map(|a| Some(Value::Array(ArrayValue::F32(a)))),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    /// Whatever the metadata say, a file is described or refused; and what is described runs.
    #[test]
    fn no_metadata_panic(
        name in prop::sample::select(NAMES.to_vec()),
        changes in prop::collection::vec((any::<prop::sample::Index>(), change()), 1..3),
    ) {
        let mut file = fixture(name);
        for (index, change) in changes {
            let key = format!("{name}.{}", KEYS[index.index(KEYS.len())]);
            match change {
                Some(value) => file.set(&key, value),
                None => file.metadata.retain(|(k, _)| *k != key),
            }
        }
        let (_file, gguf) = open(&file);
        if let Ok(spec) = describe(&gguf) {
            let plan = all_in_memory(&shape_of(&gguf, &spec), 6, KvType::F32);
            let options = LoadOptions { threads: Some(1), batch: Some(2), ..LoadOptions::default() };
            let mut engine = Engine::load(gguf, &plan, &options, &mut |_, _| {}).unwrap();
            // Numbers that make no sense may make logits that are not numbers.
            let _ = engine.forward(&[1, 2, 3, 4], LogitsMode::All).map(<[f32]>::len);
            let _ = engine.forward(&[4], LogitsMode::Last).map(<[f32]>::len);
        }
    }
}
