//! Several residual streams, n-grams, compressed and block-sparse attention, and layers of one block:
//! contradictions are refused by name, and what is optional may be missing.

use crate::error::LoadError;
use crate::options::LoadOptions;
use crate::plans::in_memory::all_in_memory;
use crate::{Engine, LogitsMode};
use std::sync::Arc;
use tier_plan_formats::gguf::testing::Writer;
use tier_plan_formats::gguf::{ArrayValue, Gguf, Value};
use tier_plan_formats::model::describe;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::shape::shape_of;
use tier_plan_testing::data;

fn fixture(name: &str) -> Writer {
    Writer::from_gguf(&Gguf::open(&data(&format!("arch2/{name}.gguf"))).unwrap())
}

fn open(writer: &Writer) -> (tempfile::NamedTempFile, Arc<Gguf>) {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), writer.finish()).unwrap();
    let gguf = Gguf::open(file.path()).unwrap();
    (file, Arc::new(gguf))
}

/// Returns what is said about a file with another value of a key.
fn refusal(name: &str, key: &str, value: Value) -> String {
    let mut writer = fixture(name);
    let arch = name.trim_end_matches("-puzzle");
    writer.set(&format!("{arch}.{key}"), value);
    match describe(&open(&writer).1) {
        Ok(_) => panic!("{name}, {key}: accepted"),
        Err(error) => error.to_string(),
    }
}

fn list(values: &[u32]) -> Value {
    Value::Array(ArrayValue::U32(values.to_vec()))
}

fn wide(values: &[u64]) -> Value {
    Value::Array(ArrayValue::U64(values.to_vec()))
}

#[test]
fn contradictions_are_named() {
    let u32 = Value::U32;
    let f32 = Value::F32;
    let cases: [(&str, &str, Value); 46] = [
        ("qwen4exp", "hyper_connection.count", u32(0)),
        ("qwen4exp", "hyper_connection.count", u32(1)),
        ("qwen4exp", "hyper_connection.count", u32(65)),
        ("qwen4exp", "hyper_connection.low_rank", u32(0)),
        (
            "qwen4exp",
            "attention.compress_ratios",
            list(&[0, 3, 0, 3, 3]),
        ),
        (
            "qwen4exp",
            "attention.compress_ratios",
            list(&[0, 1, 0, 1, 1]),
        ),
        (
            "qwen4exp",
            "attention.compress_ratios",
            list(&[0, 4, 0, 2, 4]),
        ),
        ("qwen4exp", "attention.compress_ratios", list(&[0, 4])),
        ("qwen4exp", "attention.indexer.head_count", u32(0)),
        ("qwen4exp", "attention.indexer.key_length", u32(4)),
        ("qwen4exp", "ple.layers", list(&[1])),
        ("qwen4exp", "ple.layers", list(&[9])),
        ("qwen4exp", "ple.layers", list(&[0, 2])),
        ("qwen4exp", "ple.ngram_size", u32(1)),
        ("qwen4exp", "ple.ngram_size", u32(17)),
        ("qwen4exp", "ple.heads_per_ngram", u32(0)),
        ("qwen4exp", "ple.conv_kernel", u32(0)),
        ("qwen4exp", "embedding_length_per_layer_input", u32(8)),
        ("qwen4exp", "ple.layer_multipliers", wide(&[1, 2])),
        ("qwen4exp", "ple.head_offsets", wide(&[0, 1])),
        ("qwen4exp", "ple.head_vocab_sizes", wide(&[109, 79, 61, 0])),
        (
            "qwen4exp",
            "ple.head_vocab_sizes",
            wide(&[109, 79, 61, 163]),
        ),
        (
            "qwen4exp",
            "ple.head_vocab_sizes",
            wide(&[u64::MAX, 1, 1, 1]),
        ),
        ("nemotron_h_moe", "ssm.time_step_rank", u32(5)),
        ("nemotron_h_moe", "ssm.group_count", u32(3)),
        ("nemotron_h_moe", "ssm.state_size", u32(0)),
        ("nemotron_h_moe", "ssm.conv_kernel", u32(0)),
        ("nemotron_h_moe", "ssm.inner_size", u32(1 << 24)),
        ("nemotron_h_moe", "feed_forward_length", list(&[0, 32])),
        ("nemotron_h_moe", "expert_used_count", u32(7)),
        ("nemotron_h_moe", "expert_group_count", u32(2)),
        (
            "nemotron_h_moe",
            "attention.layer_norm_rms_epsilon",
            f32(-1.0),
        ),
        (
            "nemotron_h_moe-puzzle",
            "expert_used_count",
            list(&[0, 0, 0, 1, 0]),
        ),
        ("minimax-m3", "attention.indexer.head_count", u32(3)),
        ("minimax-m3", "attention.indexer.block_size", u32(0)),
        ("minimax-m3", "attention.indexer.local_blocks", u32(4)),
        ("minimax-m3", "attention.indexer.top_k", u32(0)),
        ("deepseek4", "hyper_connection.sinkhorn_iterations", u32(0)),
        ("deepseek4", "hyper_connection.epsilon", f32(f32::NAN)),
        ("deepseek4", "attention.compress_ratios", list(&[0, 4, 64])),
        ("deepseek4", "attention.compress_ratios", list(&[0, 4])),
        ("deepseek4", "attention.output_group_count", u32(3)),
        ("deepseek4", "attention.value_length", u32(32)),
        ("deepseek4", "attention.sliding_window", u32(0)),
        ("deepseek4", "attention.indexer.key_length", u32(8)),
        ("deepseek4", "expert_gating_func", u32(2)),
    ];
    for (name, key, value) in cases {
        let what = format!("{name}, {key} {value:?}");
        let said = refusal(name, key, value);
        assert!(said.contains(key), "{what}: {said}");
    }
}

#[test]
fn required_keys_are_named() {
    for (name, key) in [
        ("qwen4exp", "hyper_connection.low_rank"),
        ("qwen4exp", "ple.eos_token_id"),
        ("minimax-m3", "expert_gating_func"),
        ("minimax-m3", "attention.indexer.local_blocks"),
        ("deepseek4", "hash_layer_count"),
        ("deepseek4", "attention.compress_rope_freq_base"),
        ("deepseek4", "swiglu_clamp_exp"),
        ("deepseek4", "hyper_connection.epsilon"),
    ] {
        let mut writer = fixture(name);
        writer.unset(&format!("{name}.{key}"));
        let said = describe(&open(&writer).1).unwrap_err().to_string();
        assert!(said.contains(key), "{name}, {key}: {said}");
    }
}

fn load(writer: &Writer) -> Result<Engine, LoadError> {
    let (_file, gguf) = open(writer);
    let shape = shape_of(&gguf, &describe(&gguf).unwrap());
    let plan = all_in_memory(&shape, 16, KvType::F32);
    Engine::load(gguf, &plan, &LoadOptions::default(), &mut |_, _| {})
}

#[test]
fn tables_of_experts_are_checked_before_the_first_token() {
    let mut writer = fixture("deepseek4");
    let name = "blk.0.ffn_gate_tid2eid.weight";
    let table = writer.tensors.iter_mut().find(|t| t.name == name).unwrap();
    table.data[8 * 5..8 * 5 + 4].copy_from_slice(&(-1i32).to_le_bytes());
    let said = match load(&writer) {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    };
    assert!(said.contains(name) && said.contains("of token 5"), "{said}");
}

#[test]
fn older_spellings_give_the_same_logits() {
    let logits = |writer: &Writer| {
        let (_file, gguf) = open(writer);
        let shape = shape_of(&gguf, &describe(&gguf).unwrap());
        let plan = all_in_memory(&shape, 16, KvType::F32);
        let options = LoadOptions::default();
        let mut engine = Engine::load(gguf, &plan, &options, &mut |_, _| {}).unwrap();
        let tokens = [3, 1, 4, 1, 5, 9, 2, 6, 5];
        engine.forward(&tokens, LogitsMode::All).unwrap().to_vec()
    };
    // The kinds of layers come from an interval as well.
    let plain = fixture("qwen4exp");
    let mut interval = plain.clone();
    interval.unset("qwen4exp.attention.recurrent_layers");
    assert!(logits(&plain) == logits(&interval));
    // Without an index all layers attend to everything, which in a short text is the same.
    let mut dense = plain.clone();
    dense.unset("qwen4exp.attention.compress_ratios");
    assert!(near(&logits(&plain), &logits(&dense)));
    // The clamp of the shared expert is that of the routed ones unless the file says otherwise.
    let plain = fixture("deepseek4");
    let (mut same, mut absent) = (plain.clone(), plain.clone());
    let clamps = Value::Array(ArrayValue::F32(vec![1.0, 1.25, 1.5]));
    same.set("deepseek4.swiglu_clamp_shexp", clamps);
    absent.unset("deepseek4.swiglu_clamp_shexp");
    assert!(logits(&same) == logits(&absent) && logits(&same) != logits(&plain));
    // The epsilon of layer norms stands in for that of RMS norms.
    let plain = fixture("nemotron_h_moe");
    let mut older = plain.clone();
    older.unset("nemotron_h_moe.attention.layer_norm_rms_epsilon");
    let eps = "nemotron_h_moe.attention.layer_norm_epsilon";
    older.set(eps, Value::F32(0.005));
    assert!(logits(&plain) == logits(&older));
}

fn near(a: &[f32], b: &[f32]) -> bool {
    tier_plan_testing::nmse(a, b) < 1e-9
}
