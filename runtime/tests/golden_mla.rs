//! Latent attention against another engine: logits of small random models in 32-bit floats, and the tokens that follow.

use serde_json::Value;
use std::path::PathBuf;
use std::sync::Arc;
use tier_plan_runtime::exec::plan::obvious;
use tier_plan_runtime::exec::{Engine, KvType, LoadOptions, Wanted};
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::describe;
use tier_plan_runtime::model::shape::shape_of;

fn numbers(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|v| v.as_u64().unwrap() as u32).collect()
}

fn largest(logits: &[f32]) -> u32 {
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b])).unwrap() as u32
}

/// Logits of all tokens, and the tokens that follow when the likeliest is taken each time.
fn compute(path: &std::path::Path, tokens: &[u32], batch: usize, follow: usize) -> (Vec<f32>, Vec<u32>) {
    let gguf = Arc::new(Gguf::open(path).unwrap());
    let spec = describe(&gguf).unwrap();
    let plan = obvious(&shape_of(&gguf, &spec), (tokens.len() + follow) as u32, KvType::F32);
    let options = LoadOptions { threads: Some(2), batch: Some(batch), kv_type: KvType::F32 };
    let mut engine = Engine::load(gguf, &plan, &options, &mut |_, _| {}).unwrap();
    let logits = engine.forward(tokens, Wanted::All).unwrap().to_vec();
    let mut followed = vec![largest(&logits[logits.len() - spec.n_vocab..])];
    while followed.len() < follow {
        followed.push(largest(engine.forward(&followed[followed.len() - 1..], Wanted::Last).unwrap()));
    }
    (logits, followed)
}

#[test]
fn logits_and_tokens_are_those_of_the_reference_engine() {
    for name in ["deepseek-v3", "kimi-k2"] {
        let base = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/data/arch").join(name);
        let facts: Value = serde_json::from_slice(&std::fs::read(base.with_extension("json")).unwrap()).unwrap();
        let (tokens, greedy) = (numbers(&facts["tokens"]), numbers(&facts["greedy"]));
        let want = std::fs::read(base.with_extension("logits")).unwrap();
        let want: Vec<f32> = want.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        for batch in [1, 7, 512] {
            let (got, followed) = compute(&base.with_extension("gguf"), &tokens, batch, greedy.len());
            assert_eq!(got.len(), want.len());
            let off: f64 = got.iter().zip(&want).map(|(g, w)| f64::from(g - w).powi(2)).sum();
            let nmse = off / want.iter().map(|w| f64::from(*w).powi(2)).sum::<f64>();
            assert!(nmse < 1e-10, "{name}, batches of {batch}: {nmse:e}");
            assert_eq!(followed, greedy, "{name}, batches of {batch}");
        }
    }
}
