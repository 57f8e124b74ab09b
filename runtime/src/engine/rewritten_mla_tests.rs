use crate::engine::{Engine, LogitsMode};
use crate::options::LoadOptions;
use crate::plans::in_memory::all_in_memory;
use std::path::PathBuf;
use std::sync::Arc;
use tier_plan_formats::gguf::testing::Writer;
use tier_plan_formats::gguf::{Gguf, Value};
use tier_plan_formats::model::ModelError;
use tier_plan_formats::model::kv::KvRows;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::shape::{CacheShape, shape_of};
use tier_plan_formats::model::spec::MoeSpec;
use tier_plan_formats::model::spec::{Gating, Groups, KvUp, Mixer, MlaSpec, ModelSpec};
use tier_plan_kernels::quant::TensorType;

const KEY_DIM: f32 = 80.0;

fn data(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/data/arch")
        .join(name)
}

/// The small DeepSeek V3 of the golden test, to be changed.
fn fixture() -> Writer {
    let gguf = Gguf::open(&data("deepseek-v3.gguf")).unwrap();
    Writer::from_gguf(&gguf)
}

fn without(mut file: Writer, keys: &[&str]) -> Writer {
    file.metadata
        .retain(|(key, _)| !keys.iter().any(|k| *key == format!("deepseek2.{k}")));
    file
}

fn with(file: Writer, key: &str, value: Value) -> Writer {
    without(file, &[key]).key(&format!("deepseek2.{key}"), value)
}

fn opened(file: &Writer) -> Arc<Gguf> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model.gguf");
    std::fs::write(&path, file.finish()).unwrap();
    Arc::new(Gguf::open(&path).unwrap())
}

fn described(file: &Writer) -> Result<ModelSpec, ModelError> {
    tier_plan_formats::model::describe(&opened(file))
}

fn mla(spec: &ModelSpec, layer: usize) -> &MlaSpec {
    match &spec.layers[layer].mixer {
        Mixer::Mla(mla) => mla,
        other => panic!("{other:?}"),
    }
}

fn moe(spec: &ModelSpec, layer: usize) -> &MoeSpec {
    spec.layers[layer].moe().unwrap()
}

/// Merges keys and values of every layer into the older tensor, and gives the sizes of heads in the
/// older keys.
pub(super) fn fused(file: Writer) -> Writer {
    let (nope, rank, value, n_head) = (48, 64, 48, 4);
    let mut file = without(
        file,
        &["attention.key_length_mla", "attention.value_length_mla"],
    );
    file = with(file, "attention.key_length", Value::U32(80));
    file = with(file, "attention.value_length", Value::U32(48));
    for layer in 0..3 {
        let mut take = |name: &str| {
            let name = format!("blk.{layer}.{name}.weight");
            let at = file.tensors.iter().position(|t| t.name == name).unwrap();
            let tensor = file.tensors.remove(at);
            assert_eq!(tensor.type_id, TensorType::F16 as u32);
            tensor
                .data
                .chunks_exact(2)
                .map(|b| [b[0], b[1]])
                .collect::<Vec<_>>()
        };
        let (k, v) = (take("attn_k_b"), take("attn_v_b"));
        let mut both = Vec::new();
        for head in 0..n_head {
            for i in 0..nope {
                both.extend((0..rank).flat_map(|r| k[(head * rank + r) * nope + i]));
            }
            both.extend(
                v[head * value * rank..(head + 1) * value * rank]
                    .iter()
                    .flatten(),
            );
        }
        let dims = [rank as u64, (n_head * (nope + value)) as u64];
        file = file.tensor(
            &format!("blk.{layer}.attn_kv_b.weight"),
            TensorType::F16,
            &dims,
            both,
        );
    }
    file
}

#[test]
fn the_scale_and_the_magnitude_follow_the_reference_engine() {
    let ln8 = 8f32.ln();
    let l = "rope.scaling.yarn_log_multiplier";
    let kind = |name: &str| Value::Str(name.into());
    // (file, factor on scores times sqrt of the head, magnitude of what rotates)
    let cases = [
        ("multiplier 0.1", fixture(), 1.0 + 0.1 * ln8, 1.0),
        (
            "multiplier 0.0707",
            with(fixture(), l, Value::F32(0.0707)),
            1.0 + 0.0707 * ln8,
            1.0,
        ),
        (
            "no multiplier",
            without(fixture(), &[l]),
            1.0 + 0.1 * ln8,
            1.0 + 0.1 * ln8,
        ),
        (
            "factor",
            with(fixture(), "rope.scaling.attn_factor", Value::F32(1.2)),
            1.2 * (1.0 + 0.1 * ln8),
            1.2,
        ),
        (
            "linear",
            without(with(fixture(), "rope.scaling.type", kind("linear")), &[l]),
            1.0 + 0.1 * ln8,
            1.0,
        ),
        (
            "none",
            with(fixture(), "rope.scaling.type", kind("none")),
            1.0,
            1.0,
        ),
    ];
    for (name, file, sharpness, magnitude) in cases {
        let spec = described(&file).unwrap();
        let mla = mla(&spec, 0);
        let rope = mla.rope.as_ref().unwrap();
        let want = sharpness * sharpness / KEY_DIM.sqrt();
        assert!(
            (mla.scale - want).abs() < 1e-6,
            "{name}: scale {}, expected {want}",
            mla.scale
        );
        assert!(
            (rope.magnitude - magnitude).abs() < 1e-6,
            "{name}: magnitude {}",
            rope.magnitude
        );
    }
}

#[test]
fn a_scale_that_is_no_number_is_refused() {
    let file = with(
        fixture(),
        "rope.scaling.yarn_log_multiplier",
        Value::F32(1e38),
    );
    let error = described(&file).unwrap_err().to_string();
    assert!(error.contains("yarn_log_multiplier"), "{error}");
}

#[test]
fn routing_options_come_from_the_file() {
    let spec = described(&fixture()).unwrap();
    assert!(spec.layers[0].moe().is_none());
    let m = moe(&spec, 1);
    assert_eq!(
        (m.gating, m.groups, m.normalize, m.scale),
        (Gating::Sigmoid, Some(Groups { n: 4, kept: 2 }), true, 2.5)
    );
    assert!(m.selection_bias.is_some());
    assert_eq!(m.shared.unwrap().ffn.up.n_out, 32);
}

#[test]
fn the_first_models_of_the_family_have_defaults() {
    let mut file = without(
        fixture(),
        &[
            "expert_gating_func",
            "expert_weights_norm",
            "expert_weights_scale",
            "expert_group_count",
        ],
    );
    // One query matrix in place of two and a norm; the rank in the metadata then means nothing.
    for layer in 0..3 {
        let p = format!("blk.{layer}.");
        file.tensors.retain(|t| {
            !t.name.starts_with(&format!("{p}attn_q_")) && t.name != format!("{p}exp_probs_b.bias")
        });
        file = file.tensor(
            &format!("{p}attn_q.weight"),
            TensorType::F16,
            &[64, 320],
            vec![0; 2 * 64 * 320],
        );
    }
    for file in [file.clone(), without(file, &["attention.q_lora_rank"])] {
        let spec = described(&fused(file)).unwrap();
        let m = moe(&spec, 1);
        assert_eq!(
            (m.gating, m.groups, m.normalize, m.scale),
            (Gating::Softmax, None, false, 1.0)
        );
        assert!(m.selection_bias.is_none());
        let mla = mla(&spec, 0);
        assert!(mla.q_down.is_none() && matches!(mla.kv_up, KvUp::Fused(_)));
        assert_eq!(
            (mla.q.n_in, mla.q.n_out, mla.nope_dim, mla.value_dim),
            (64, 320, 48, 48)
        );
    }
}

#[test]
fn older_files_give_the_same_logits() {
    let logits = |file: &Writer| {
        let gguf = opened(file);
        let spec = tier_plan_formats::model::describe(&gguf).unwrap();
        let plan = all_in_memory(&shape_of(&gguf, &spec), 16, KvType::F32);
        let options = LoadOptions {
            threads: Some(2),
            ..LoadOptions::default()
        };
        let mut engine = Engine::load(gguf, &plan, &options, &mut |_, _| {}).unwrap();
        engine
            .forward(&[82, 71, 24, 12, 77, 74, 64, 50], LogitsMode::All)
            .unwrap()
            .to_vec()
    };
    let (new, old) = (logits(&fixture()), logits(&fused(fixture())));
    let off: f64 = new
        .iter()
        .zip(&old)
        .map(|(a, b)| f64::from(a - b).powi(2))
        .sum();
    let size: f64 = new.iter().map(|a| f64::from(*a).powi(2)).sum();
    assert!(size > 0.0 && off / size < 1e-10, "{:e}", off / size);
}

#[test]
fn every_tensor_is_placed_once_and_a_token_caches_its_latent() {
    for file in [fixture(), fused(fixture())] {
        let gguf = opened(&file);
        let spec = tier_plan_formats::model::describe(&gguf).unwrap();
        let shape = shape_of(&gguf, &spec);
        let rows = vec![KvRows {
            width: 64 + 32,
            per_token: 1,
            every: 1,
            queries: 2 * 4,
            window: None,
            chosen: None,
        }];
        assert_eq!(
            shape.caches,
            vec![
                CacheShape {
                    rows,
                    state_bytes: 0,
                    more_readers: 0
                };
                3
            ]
        );
        assert_eq!(
            KvType::ALL.map(|ty| ty.token_bytes(&shape)),
            [3 * 192, 3 * (96 + 6), 3 * 384]
        );
        let mut placed: Vec<usize> = spec
            .dense_groups()
            .into_iter()
            .flat_map(|g| g.tensors)
            .collect();
        placed.extend(spec.moe_layers().flat_map(|(_, m)| m.expert_tensors()));
        placed.sort_unstable();
        assert_eq!(placed, (0..gguf.tensors().len()).collect::<Vec<_>>());
        let up = if gguf.tensor("blk.1.attn_kv_b.weight").is_some() {
            "attn_kv_b"
        } else {
            "attn_k_b"
        };
        let up = gguf
            .tensors()
            .iter()
            .position(|t| t.name == format!("blk.1.{up}.weight"))
            .unwrap();
        assert!(spec.matrices().contains(&up));
    }
}

#[test]
fn contradictions_are_told() {
    let error = |file: Writer| described(&file).unwrap_err().to_string();
    let said = error(with(fixture(), "rope.dimension_count", Value::U32(80)));
    assert!(
        said.contains("rope.dimension_count") && said.contains("80"),
        "{said}"
    );
    let said = error(with(fixture(), "attention.kv_lora_rank", Value::U32(32)));
    assert!(said.contains("attn_k"), "{said}");
    let said = error(with(
        fixture(),
        "attention.value_length_mla",
        Value::U32(40),
    ));
    assert!(said.contains("attn_v_b"), "{said}");
    let said = error(with(fixture(), "expert_shared_count", Value::U32(u32::MAX)));
    assert!(said.contains("expert_shared_count"), "{said}");
    let said = error(with(
        fixture(),
        "attention.temperature_scale",
        Value::F32(0.1),
    ));
    assert!(said.contains("attention.temperature_length"), "{said}");
}
