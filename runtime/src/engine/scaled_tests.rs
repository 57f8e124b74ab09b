//! Factors beside matrices: a file that has them must give the same bits as one whose weights were
//! multiplied, where the factors are powers of two.

use super::gpu_tests::half_on_gpu;
use super::rewritten_mla_tests::fused;
use super::rewritten_tests::{error, fixture, logits};
use crate::engine::Engine;
use crate::error::LoadError;
use crate::options::LoadOptions;
use crate::plans::in_memory::all_in_memory;
use half::f16;
use std::sync::Arc;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::gguf::testing::{Writer, WriterTensor};
use tier_plan_formats::machine::TierKind;
use tier_plan_formats::model::describe;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::shape::{DenseKind, shape_of};
use tier_plan_formats::placement::{Placement, TierIdx};
use tier_plan_kernels::quant::TensorType;

/// Whether a tensor is a matrix, or a stack of experts' matrices, that may have a factor.
fn may_have_factor(tensor: &WriterTensor) -> bool {
    let is_matrix = tensor.type_id == TensorType::F16 as u32 && tensor.dims.len() > 1;
    let of_block = tensor.name.starts_with("blk.") || tensor.name == "output.weight";
    is_matrix && of_block && !tensor.name.contains("ffn_gate_inp")
}

/// Multiplies every matrix by powers of two, and puts the inverse factors beside them.
fn with_factors(plain: &Writer) -> Writer {
    let mut scaled = plain.clone();
    let mut factors = Vec::new();
    for (i, tensor) in scaled.tensors.iter_mut().enumerate() {
        if !may_have_factor(tensor) {
            continue;
        }
        let n = if tensor.name.contains("_exps.") {
            tensor.dims[2] as usize
        } else {
            1
        };
        let size = tensor.data.len() / n;
        let mut values = Vec::with_capacity(4 * n);
        for (e, slice) in tensor.data.chunks_exact_mut(size).enumerate() {
            let power = [2.0f32, 4.0, 8.0][(i + e) % 3];
            for value in slice.chunks_exact_mut(2) {
                let v = f16::from_le_bytes([value[0], value[1]]).to_f32();
                value.copy_from_slice(&f16::from_f32(v * power).to_le_bytes());
            }
            values.extend(power.recip().to_le_bytes());
        }
        let name = tensor.name.replace(".weight", ".scale");
        factors.push((name, n as u64, values));
    }
    assert!(factors.len() > 8, "few matrices: {}", factors.len());
    for (name, n, values) in factors {
        // What kernels with 4-bit activations would use is left alone.
        let unread = vec![0xff; values.len()];
        let input = name.replace(".scale", ".input_scale");
        scaled = scaled.tensor(&input, TensorType::F32, &[n], unread);
        scaled = scaled.tensor(&name, TensorType::F32, &[n], values);
    }
    scaled
}

#[test]
fn factors_are_as_if_the_weights_were_multiplied() {
    // Biases, fused tensors, shared experts, latents, delta nets, a dense model.
    for name in [
        "gpt-oss",
        "glm4moe",
        "qwen2moe",
        "deepseek-v3",
        "qwen3next",
        "llama-dense",
    ] {
        let plain = fixture(name);
        assert!(logits(&with_factors(&plain)) == logits(&plain), "{name}");
    }
}

#[test]
fn factors_of_fused_keys_and_values_of_latents_count() {
    let plain = fused(fixture("deepseek-v3"));
    assert!(logits(&with_factors(&plain)) == logits(&plain));
}

#[test]
fn factors_of_fused_gates_and_ups_are_per_expert() {
    let mut fused = fixture("qwen2moe");
    let n_expert = fused.count("qwen2moe.expert_count") as usize;
    for i in 0..fused.count("qwen2moe.block_count") {
        let names = ["gate", "up"].map(|n| format!("blk.{i}.ffn_{n}_exps.weight"));
        let to = format!("blk.{i}.ffn_gate_up_exps.weight");
        fused.fuse(&names, &to, 1, n_expert);
    }
    assert!(logits(&with_factors(&fused)) == logits(&fused));
}

#[test]
fn wrong_factors_are_refused_by_name() {
    let with = |name: &str, dims: &[u64], ty: TensorType, data: Vec<u8>| {
        let file = fixture("qwen2moe").tensor(name, ty, dims, data);
        let message = error(&file);
        assert!(message.contains(name), "{message}");
        message
    };
    let floats = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect();
    let two = floats(&[1.0, 2.0]);
    with("blk.0.attn_q.scale", &[2], TensorType::F32, two);
    let one = floats(&[2.0]);
    with("blk.1.ffn_up_exps.scale", &[1], TensorType::F32, one);
    let infinite = floats(&[f32::INFINITY]);
    with("blk.0.attn_output.scale", &[1], TensorType::F32, infinite);
    let integer = 2i32.to_le_bytes().to_vec();
    let message = with("blk.0.attn_k.scale", &[1], TensorType::I32, integer);
    assert!(message.contains("is I32"), "{message}");
}

#[test]
fn a_matrix_of_integers_is_refused_by_name() {
    let mut file = fixture("qwen2moe");
    let name = "blk.1.attn_k.weight";
    let mut tensor = file.take(name).unwrap();
    tensor.type_id = TensorType::I16 as u32;
    file.tensors.push(tensor);
    let message = error(&file);
    assert!(
        message.contains(name) && message.contains("is I16"),
        "{message}"
    );
}

#[test]
fn a_plan_with_a_gpu_is_refused() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), with_factors(&fixture("qwen2moe")).finish()).unwrap();
    let gguf = Arc::new(Gguf::open(file.path()).unwrap());
    let shape = shape_of(&gguf, &describe(&gguf).unwrap());
    let options = LoadOptions {
        threads: Some(1),
        ..LoadOptions::default()
    };
    // Experts on the GPU, then one layer's attention, then the head.
    let mut attention = all_in_memory(&shape, 8, KvType::F32);
    add_gpu(&mut attention);
    let mut head = attention.clone();
    for (plan, kind) in [
        (&mut attention, DenseKind::Attention),
        (&mut head, DenseKind::Head),
    ] {
        let mut dense = plan.dense.iter_mut();
        dense.find(|d| d.kind == kind).unwrap().tier = TierIdx::FIRST;
        plan.fill_sums(&shape);
    }
    for (plan, tensor) in [
        (half_on_gpu(&shape, 8), "blk.0.ffn_gate_exps.weight"),
        (attention, "blk.0.attn_q.weight"),
        (head, "output.weight"),
    ] {
        let loaded = Engine::load(Arc::clone(&gguf), &plan, &options, &mut |_, _| {});
        match loaded.map(|_| ()).unwrap_err() {
            LoadError::FactorOnGpu { tensor: found, .. } => assert_eq!(found, tensor),
            other => panic!("{tensor}: {other}"),
        }
    }
}

/// Puts a GPU before the tiers of a plan, which uses nothing of it yet.
fn add_gpu(plan: &mut Placement) {
    let mut vram = plan.tiers[TierIdx::FIRST].clone();
    vram.tier.name = "vram".into();
    vram.tier.kind = TierKind::Vram;
    plan.tiers = [vram].into_iter().chain(plan.tiers.clone()).collect();
    let memory = TierIdx::new(1);
    (plan.kv_tier, plan.staging_tier) = (memory, memory);
    plan.dense.iter_mut().for_each(|d| d.tier = memory);
    plan.layers.iter_mut().for_each(|l| l.slot_tier = memory);
}
