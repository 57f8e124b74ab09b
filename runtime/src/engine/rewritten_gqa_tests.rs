//! Models of the second group in other clothes, as `rewritten_tests` does with the first.

use super::rewritten_tests::{change, error, logits, open};
use crate::engine::{Engine, LogitsMode};
use crate::error::LoadError;
use crate::options::LoadOptions;
use crate::plans::in_memory::{all_in_memory, all_on_gpu};
use proptest::prelude::*;
use std::sync::Arc;
use tier_plan_cuda::{Device, shim};
use tier_plan_formats::gguf::testing::{Writer, WriterTensor};
use tier_plan_formats::gguf::{ArrayValue, Gguf, Value};
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::shape::shape_of;
use tier_plan_formats::model::spec::{Mixer, WindowKind};
use tier_plan_formats::model::{ModelError, describe};
use tier_plan_testing::{data, is_nightly};

pub(super) fn fixture(name: &str) -> Writer {
    Writer::from_gguf(&Gguf::open(&data(&format!("arch2/{name}.gguf"))).unwrap())
}

fn blocks(writer: &Writer, arch: &str) -> u32 {
    writer.count(&format!("{arch}.block_count"))
}

fn tensor<'w>(writer: &'w mut Writer, name: &str) -> &'w mut WriterTensor {
    let mut tensors = writer.tensors.iter_mut();
    tensors.find(|t| t.name == name).expect(name)
}

/// Cuts a tensor's rows into several tensors.
fn cut(writer: &mut Writer, from: &str, to: &[(String, u64)]) {
    let whole = writer.take(from).expect(from);
    let rows: u64 = to.iter().map(|(_, rows)| rows).sum();
    assert_eq!(whole.dims[1], rows, "{from}");
    let row = whole.data.len() / rows as usize;
    let mut first = 0;
    for (name, rows) in to {
        let end = first + *rows as usize;
        writer.tensors.push(WriterTensor {
            name: name.clone(),
            dims: vec![whole.dims[0], *rows],
            type_id: whole.type_id,
            data: whole.data[first * row..end * row].to_vec(),
        });
        first = end;
    }
}

#[test]
fn queries_keys_and_values_may_be_fused_or_apart() {
    for name in [
        "hy_v3",
        "exaone-moe",
        "afmoe",
        "granitemoe",
        "smollm3",
        "mistral3",
    ] {
        let plain = fixture(name);
        let mut fused = plain.clone();
        for i in 0..blocks(&plain, name) {
            let names = ["q", "k", "v"].map(|n| format!("blk.{i}.attn_{n}.weight"));
            fused.fuse(&names, &format!("blk.{i}.attn_qkv.weight"), 1, 1);
        }
        assert!(logits(&fused) == logits(&plain), "{name}");
    }
    for name in ["bailingmoe2", "phi3"] {
        let plain = fixture(name);
        let mut apart = plain.clone();
        let heads = plain.count(&format!("{name}.attention.head_count")) as u64;
        let kv = plain.count(&format!("{name}.attention.head_count_kv")) as u64;
        let width = plain.count(&format!("{name}.embedding_length")) as u64;
        for i in 0..blocks(&plain, name) {
            let part = |n: &str, rows| (format!("blk.{i}.attn_{n}.weight"), rows);
            let parts = [
                part("q", width),
                part("k", width / heads * kv),
                part("v", width / heads * kv),
            ];
            cut(&mut apart, &format!("blk.{i}.attn_qkv.weight"), &parts);
        }
        assert!(logits(&apart) == logits(&plain), "{name}");
    }
}

#[test]
fn gates_and_ups_of_a_dense_block_may_be_fused_or_apart() {
    let plain = fixture("phi3");
    let mut apart = plain.clone();
    let width = u64::from(plain.count("phi3.feed_forward_length"));
    for i in 0..blocks(&plain, "phi3") {
        let parts = ["gate", "up"].map(|n| (format!("blk.{i}.ffn_{n}.weight"), width));
        cut(&mut apart, &format!("blk.{i}.ffn_up.weight"), &parts);
    }
    assert!(logits(&apart) == logits(&plain));
}

#[test]
fn values_that_are_keys_are_the_same_as_a_copy_of_them() {
    let keys = fixture("gemma4");
    let (mut shared, mut copied) = (keys.clone(), keys);
    // Layer 2 has its own keys and values, and attends to everything.
    shared.take("blk.2.attn_v.weight");
    copied.take("blk.2.attn_v.weight");
    let mut values = tensor(&mut copied, "blk.2.attn_k.weight").clone();
    values.name = "blk.2.attn_v.weight".into();
    copied.tensors.push(values);
    assert!(logits(&shared) == logits(&copied));
}

#[test]
fn layers_that_share_keys_and_values_need_none() {
    let plain = fixture("gemma4");
    let mut more = plain.clone();
    for name in ["attn_k.weight", "attn_v.weight", "attn_k_norm.weight"] {
        let mut unused = tensor(&mut more, &format!("blk.0.{name}")).clone();
        unused.name = format!("blk.3.{name}");
        more.take(&unused.name);
        more.tensors.push(unused);
    }
    assert!(logits(&more) == logits(&plain));
}

#[test]
fn gates_may_be_per_head_or_per_value() {
    let plain = fixture("laguna");
    let mut per_value = plain.clone();
    for i in 0..blocks(&plain, "laguna") {
        let inner = tensor(&mut per_value, &format!("blk.{i}.attn_output.weight")).dims[0];
        let gate = tensor(&mut per_value, &format!("blk.{i}.attn_gate.weight"));
        let (heads, row) = (gate.dims[1], gate.data.len() / gate.dims[1] as usize);
        let values = (inner / heads) as usize;
        gate.data = gate
            .data
            .chunks_exact(row)
            .flat_map(|r| r.repeat(values))
            .collect();
        gate.dims[1] = inner;
    }
    assert!(logits(&per_value) == logits(&plain));
}

#[test]
fn windows_may_be_a_period_or_a_list() {
    for (name, period, full) in [("laguna", 4, 0), ("exaone-moe", 4, 3), ("afmoe", 4, 3)] {
        let mut writer = fixture(name);
        let n = blocks(&writer, name);
        let key = format!("{name}.attention.sliding_window_pattern");
        let mut bits = |value: Option<Value>| {
            match value {
                Some(value) => writer.set(&key, value),
                None => writer.metadata.retain(|(k, _)| *k != key),
            }
            logits(&writer)
        };
        let expected = bits(None);
        assert!(bits(Some(Value::U32(period))) == expected, "{name}");
        let list: Vec<bool> = (0..n).map(|i| i % period != full).collect();
        let integers = list.iter().map(|w| i32::from(*w)).collect();
        assert!(
            bits(Some(Value::Array(ArrayValue::Bool(list)))) == expected,
            "{name}"
        );
        assert!(
            bits(Some(Value::Array(ArrayValue::I32(integers)))) == expected,
            "{name}"
        );
        assert!(bits(Some(Value::U32(1))) != expected, "{name}");
    }
}

#[test]
fn numbers_of_layers_may_be_one_or_a_list() {
    let plain = fixture("step35");
    let n = blocks(&plain, "step35") as usize;
    let bits = |value: Value| {
        let mut writer = plain.clone();
        writer.set("step35.swiglu_clamp_exp", value);
        logits(&writer)
    };
    let list = bits(Value::Array(ArrayValue::F32(vec![0.25; n])));
    assert!(bits(Value::F32(0.25)) == list);
    // So little stands for none.
    let none = bits(Value::F32(0.0));
    assert!(bits(Value::F32(1e-7)) == none && none != list);
}

#[test]
fn keys_that_an_architecture_does_not_read_change_nothing() {
    for (name, key, value) in [
        ("mimo2", "expert_gating_func", Value::U32(1)),
        ("mimo2", "expert_weights_norm", Value::Bool(false)),
        ("mimo2", "expert_weights_scale", Value::F32(3.0)),
        ("laguna", "rope.scaling.yarn_beta_fast", Value::F32(2.0)),
        ("mistral4", "rope.scaling.yarn_beta_slow", Value::F32(4.0)),
        ("ernie4_5-moe", "expert_weights_scale", Value::F32(3.0)),
        ("hunyuan-moe", "expert_feed_forward_length", Value::U32(7)),
        ("phi3", "attention.sliding_window", Value::U32(3)),
        ("exaone-moe", "rope.freq_base_swa", Value::F32(7.0)),
        ("grok", "router_logit_softcapping", Value::F32(2.0)),
        ("grok", "rope.scaling.yarn_attn_factor", Value::F32(2.0)),
        ("hy_v3", "leading_dense_block_count", Value::U32(3)),
    ] {
        let plain = fixture(name);
        let mut changed = plain.clone();
        changed.set(&format!("{name}.{key}"), value);
        assert!(logits(&changed) == logits(&plain), "{name}.{key}");
    }
}

#[test]
fn chunks_are_windows_that_begin_at_multiples() {
    let gguf = Gguf::open(&data("arch2/llama4.gguf")).unwrap();
    let spec = describe(&gguf).unwrap();
    let kinds: Vec<_> = spec
        .layers
        .iter()
        .map(|layer| match &layer.mixer {
            Mixer::Gqa(a) => (
                a.window,
                a.window_kind,
                a.rope.is_some(),
                a.temperature.is_some(),
            ),
            other => panic!("{other:?}"),
        })
        .collect();
    for (i, kind) in kinds.iter().enumerate() {
        let expected = if (i + 1).is_multiple_of(4) {
            (None, WindowKind::Sliding, false, true)
        } else {
            (Some(8192), WindowKind::Chunked, true, false)
        };
        assert_eq!(*kind, expected, "layer {i}");
    }
}

#[test]
fn what_contradicts_itself_is_refused_by_name() {
    let list = |n: usize| Value::Array(ArrayValue::U32(vec![2; n]));
    let flags = |n: usize| Value::Array(ArrayValue::Bool(vec![true; n]));
    let cases = [
        ("mimo2", "attention.sliding_window", Value::U32(0)),
        ("step35", "attention.sliding_window", Value::U32(0)),
        ("afmoe", "attention.sliding_window", Value::U32(0)),
        ("exaone-moe", "attention.sliding_window", Value::U32(0)),
        ("gemma4", "attention.sliding_window", Value::U32(0)),
        ("mimo2", "attention.sliding_window_pattern", flags(1)),
        ("gemma4", "attention.sliding_window_pattern", flags(2)),
        ("gemma4", "attention.shared_kv_layers", Value::U32(6)),
        ("gemma4", "attention.shared_kv_layers", Value::U32(9)),
        ("gemma4", "attention.shared_kv_layers", Value::U32(4)),
        ("gemma4", "attention.value_length", Value::U32(8)),
        ("gemma4", "attention.key_length_swa", Value::U32(0)),
        ("gemma4", "rope.dimension_count_swa", Value::U32(34)),
        (
            "gemma4",
            "embedding_length_per_layer_input",
            Value::U32(1 << 30),
        ),
        ("gemma4", "final_logit_softcapping", Value::F32(f32::NAN)),
        (
            "step35",
            "swiglu_clamp_exp",
            Value::Array(ArrayValue::F32(vec![1.0])),
        ),
        ("step35", "swiglu_clamp_shexp", Value::F32(f32::INFINITY)),
        ("step35", "rope.dimension_count", Value::U32(6)),
        ("step35", "attention.head_count", list(1)),
        ("laguna", "rope.dimension_count_swa", Value::U32(3)),
        ("laguna", "attention.sliding_window_pattern", Value::U32(0)),
        ("bailingmoe2", "expert_gating_func", Value::U32(9)),
        ("bailingmoe2", "expert_shared_count", Value::U32(u32::MAX)),
        ("ernie4_5-moe", "interleave_moe_layer_step", Value::U32(0)),
        ("llama4", "interleave_moe_layer_step", Value::U32(0)),
        ("qwen3vlmoe", "rope.dimension_sections", list(5)),
        ("qwen35", "ssm.conv_kernel", Value::U32(0)),
        ("lfm2moe", "shortconv.l_cache", Value::U32(1)),
        ("lfm2moe", "shortconv.l_cache", Value::U32(1 << 20)),
        ("lfm2moe", "attention.head_count_kv", list(1)),
        ("granitemoe", "logit_scale", Value::F32(0.0)),
        (
            "mistral3",
            "rope.scaling.original_context_length",
            Value::U32(0),
        ),
        ("mistral4", "attention.temperature_length", Value::U32(0)),
        ("phi3", "rope.dimension_count", Value::U32(5)),
        ("hy_v3", "nextn_predict_layers", Value::U32(99)),
        ("dots1", "expert_used_count", Value::U32(0)),
        ("grok", "embedding_scale", Value::F32(f32::NAN)),
        ("qwen2", "attention.head_count_kv", Value::U32(3)),
    ];
    for (name, key, value) in cases {
        let mut writer = fixture(name);
        writer.set(&format!("{name}.{key}"), value.clone());
        let message = error(&writer);
        assert!(message.contains(key), "{name}.{key} = {value:?}: {message}");
    }
}

#[test]
fn missing_tensors_are_named() {
    for (name, missing) in [
        ("gemma3", "blk.1.post_ffw_norm.weight"),
        ("gemma4", "blk.0.ffn_gate_inp.scale"),
        ("gemma4", "per_layer_token_embd.weight"),
        ("gemma4", "blk.1.proj.weight"),
        ("afmoe", "blk.0.attn_gate.weight"),
        ("laguna", "blk.1.attn_gate.weight"),
        ("grok", "blk.0.attn_output_norm.weight"),
        ("hy_v3", "blk.1.ffn_up_shexp.weight"),
        ("lfm2moe", "token_embd_norm.weight"),
        ("phi3", "blk.0.ffn_up.weight"),
    ] {
        let mut writer = fixture(name);
        writer.take(missing).expect(missing);
        let (_file, gguf) = open(&writer);
        match describe(&gguf).unwrap_err() {
            ModelError::MissingTensor { name: found, .. } => assert_eq!(found, missing),
            other => panic!("{missing}: {other}"),
        }
    }
}

#[test]
fn tensors_of_another_shape_are_refused() {
    for (name, wrong) in [
        ("step35", "rope_freqs.weight"),
        ("laguna", "blk.0.attn_gate.weight"),
        ("phi3", "rope_factors_long.weight"),
        ("gemma4", "per_layer_proj_norm.weight"),
        ("gemma4", "blk.0.ffn_down_exps.scale"),
        ("mimo2", "blk.1.attn_sinks.weight"),
        ("lfm2moe", "token_embd_norm.weight"),
    ] {
        let mut writer = fixture(name);
        let tensor = tensor(&mut writer, wrong);
        let last = tensor.dims.len() - 1;
        let bytes = tensor.data.len() / tensor.dims[last] as usize;
        tensor.dims[last] += 1;
        tensor.data.extend(vec![0; bytes]);
        let message = error(&writer);
        assert!(message.contains(wrong), "{wrong}: {message}");
    }
}

#[test]
fn gpus_refuse_by_name_what_they_do_not_compute() {
    for (name, what) in [
        ("gemma4", "a table of inputs, of which a token reads a row"),
        (
            "qwen4exp",
            "a table of n-grams, of which a token reads a few rows",
        ),
    ] {
        let gguf = Arc::new(Gguf::open(&data(&format!("arch2/{name}.gguf"))).unwrap());
        let spec = describe(&gguf).unwrap();
        let plan = all_on_gpu(&shape_of(&gguf, &spec), 64, KvType::F16);
        let options = LoadOptions::default();
        let give = |_: usize| Ok(shim::shared() as Arc<dyn Device>);
        let loaded = Engine::load_on(gguf, &plan, &options, Some(&give), &mut |_, _| {});
        match loaded.map(|_| ()) {
            Err(LoadError::OnGpu { why, .. }) => assert_eq!(why, what, "{name}"),
            Err(other) => panic!("{name}: {other}"),
            // A model that has none of it in the file at hand.
            Ok(()) => panic!("{name} was loaded"),
        }
    }
}

/// Keys that the second group reads.
const KEYS: [&str; 34] = [
    "block_count",
    "nextn_predict_layers",
    "embedding_length",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.key_length_swa",
    "attention.value_length_swa",
    "attention.sliding_window",
    "attention.sliding_window_pattern",
    "attention.shared_kv_layers",
    "attention.temperature_scale",
    "attention.temperature_length",
    "rope.dimension_count",
    "rope.dimension_count_swa",
    "rope.dimension_sections",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_ext_factor",
    "rope.scaling.yarn_log_multiplier",
    "embedding_length_per_layer_input",
    "embedding_scale",
    "logit_scale",
    "final_logit_softcapping",
    "swiglu_clamp_exp",
    "swiglu_clamp_shexp",
    "interleave_moe_layer_step",
    "leading_dense_block_count",
    "expert_count",
    "expert_used_count",
    "expert_shared_count",
    "shortconv.l_cache",
];

const MODELS: [&str; 22] = [
    "afmoe",
    "bailingmoe2",
    "dots1",
    "ernie4_5-moe",
    "exaone-moe",
    "gemma3",
    "gemma4",
    "granitemoe",
    "grok",
    "hunyuan-moe",
    "hy_v3",
    "laguna",
    "lfm2moe",
    "llama4",
    "mimo2",
    "mistral3",
    "mistral4",
    "phi3",
    "qwen35",
    "qwen3vlmoe",
    "smollm3",
    "step35",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if is_nightly() { 4000 } else { 400 }))]

    /// Whatever the metadata say, a file is described or refused; and what is described runs, or
    /// says that its logits are not numbers.
    #[test]
    fn no_metadata_panic(
        name in prop::sample::select(MODELS.to_vec()),
        changes in prop::collection::vec((any::<prop::sample::Index>(), change()), 1..3),
    ) {
        let mut writer = fixture(name);
        for (index, change) in changes {
            let key = format!("{name}.{}", KEYS[index.index(KEYS.len())]);
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
            if engine.forward(&[1, 2, 3], LogitsMode::All).is_ok() {
                let _ = engine.forward(&[4], LogitsMode::Last);
            }
        }
    }
}
