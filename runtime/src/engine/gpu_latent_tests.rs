//! Nemotron 3 in 8-bit blocks on a GPU, which is emulated on the processor: the kernels are those of
//! a real one.

use super::gpu_tests::{ALL, Experts, compare_plans, plan};
use super::rewritten_tests::open;
use crate::plans::in_memory::all_in_memory;
use tier_plan_formats::gguf::testing::Writer;
use tier_plan_formats::gguf::{Gguf, Value};
use tier_plan_formats::model::describe;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::shape::{DenseKind, shape_of};
use tier_plan_kernels::quant::{TensorType, dequantize_row};
use tier_plan_testing::data;

/// Returns the fixture with its matrices in blocks of Q8_0, and with one group of heads, so that
/// groups consist of whole blocks.
fn in_blocks() -> Writer {
    let gguf = Gguf::open(&data("arch2/nemotron_h_moe.gguf")).unwrap();
    let mut writer = Writer::from_gguf(&gguf);
    for (key, value) in [("group_count", 1), ("state_size", 32)] {
        writer.set(&format!("nemotron_h_moe.ssm.{key}"), Value::U32(value));
    }
    for tensor in &mut writer.tensors {
        if tensor.name.ends_with("ssm_norm.weight") {
            tensor.dims = vec![tensor.dims.iter().product(), 1];
        }
        if tensor.type_id == TensorType::F16 as u32 {
            let mut values = vec![0.0; tensor.data.len() / 2];
            dequantize_row(TensorType::F16, &tensor.data, &mut values);
            tensor.data = values.chunks_exact(32).flat_map(block).collect();
            tensor.type_id = TensorType::Q8_0 as u32;
        }
    }
    writer
}

/// Returns a block of Q8_0 whose scale is a power of two.
fn block(values: &[f32]) -> Vec<u8> {
    let largest = values.iter().fold(1e-3f32, |most, v| most.max(v.abs()));
    let exponent = (largest / 127.0).log2().ceil() as i32;
    // A 16-bit float without a fraction.
    let scale = ((exponent + 15) as u16) << 10;
    let codes = values.iter().map(|v| (v / 2f32.powi(exponent)).round());
    let codes = codes.map(|code| code as i8 as u8);
    scale.to_le_bytes().into_iter().chain(codes).collect()
}

#[test]
fn latent_experts_and_mamba_in_8_bits_give_the_same_text() {
    let (_file, gguf) = open(&in_blocks());
    let shape = shape_of(&gguf, &describe(&gguf).unwrap());
    let of = (64, KvType::F32);
    let but_shared = |kind, _| kind != DenseKind::SharedExpert;
    let but_router = |kind, _| kind != DenseKind::Router;
    let plans = [
        plan(&shape, of, ALL, true, Experts::Gpu),
        plan(&shape, of, ALL, true, Experts::File),
        plan(&shape, of, but_shared, true, Experts::Gpu),
        plan(&shape, of, but_router, true, Experts::Memory),
    ];
    for (i, on_gpu) in plans.into_iter().enumerate() {
        let plain = all_in_memory(&shape, of.0, of.1);
        compare_plans(&format!("plan {i}"), &gguf, [plain, on_gpu]);
    }
}
