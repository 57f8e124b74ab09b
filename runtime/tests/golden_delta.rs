//! What networks with recurrent layers need beyond the golden values: the same logits however the tokens are cut into
//! passes, contexts that begin again, and plans with room for the state.

use serde_json::Value;
use std::path::PathBuf;
use std::sync::Arc;
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::describe;
use tier_plan_runtime::model::shape::shape_of;
use tier_plan_runtime::plans::in_memory::obvious;
use tier_plan_runtime::{Engine, KvType, LoadOptions, RunError, Wanted};

const NAMES: [&str; 2] = ["qwen3next", "qwen35moe"];

struct Golden {
    gguf: Arc<Gguf>,
    tokens: Vec<u32>,
    /// `[tokens, n_vocab]`.
    logits: Vec<f32>,
}

impl Golden {
    fn open(name: &str) -> Self {
        let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/data/arch");
        let path = |extension: &str| folder.join(format!("{name}.{extension}"));
        let said: Value = serde_json::from_slice(&std::fs::read(path("json")).expect("json")).expect("json");
        let ids = |key: &str| serde_json::from_value::<Vec<u32>>(said[key].clone()).expect("token ids");
        let logits = std::fs::read(path("logits")).expect("logits");
        Self {
            gguf: Arc::new(Gguf::open(&path("gguf")).expect("a model")),
            tokens: ids("tokens"),
            logits: logits.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        }
    }

    fn engine(&self, batch: usize, threads: usize) -> Engine {
        let spec = describe(&self.gguf).expect("a network");
        let shape = shape_of(&self.gguf, &spec);
        let plan = obvious(&shape, self.tokens.len() as u32, KvType::F32);
        let options = LoadOptions { threads: Some(threads), batch: Some(batch), ..LoadOptions::default() };
        Engine::load(Arc::clone(&self.gguf), &plan, &options, &mut |_, _| {}).expect("a loaded model")
    }

    fn nmse(&self, found: &[f32]) -> f64 {
        assert_eq!(found.len(), self.logits.len());
        let square = |v: f32| f64::from(v) * f64::from(v);
        let error: f64 = found.iter().zip(&self.logits).map(|(a, b)| square(a - b)).sum();
        error / self.logits.iter().map(|v| square(*v)).sum::<f64>()
    }
}

#[test]
fn logits_do_not_depend_on_the_passes() {
    for name in NAMES {
        let golden = Golden::open(name);
        for (passes, batch) in [(1, 512), (2, 512), (5, 3), (48, 7)] {
            let mut engine = golden.engine(batch, 2);
            let mut logits = Vec::new();
            for tokens in golden.tokens.chunks(passes) {
                logits.extend_from_slice(engine.forward(tokens, Wanted::All).expect("a pass"));
            }
            let nmse = golden.nmse(&logits);
            assert!(nmse < 1e-9, "{name}, passes of {passes}, batches of {batch}: {nmse:e}");
        }
    }
}

#[test]
fn a_context_can_begin_again_but_not_go_back() {
    for name in NAMES {
        let golden = Golden::open(name);
        let mut engine = golden.engine(16, 2);
        let first = engine.forward(&golden.tokens, Wanted::Last).expect("a pass").to_vec();
        let n = golden.tokens.len();
        engine.truncate(n).expect("nothing to do");
        engine.truncate(n + 5).expect("nothing to do");
        match engine.truncate(n - 1) {
            Err(RunError::CannotRewind { n_past, wanted }) => assert_eq!((n_past, wanted), (n, n - 1)),
            other => panic!("{name}: {other:?}"),
        }
        assert_eq!(engine.n_past(), n);
        engine.truncate(0).expect("always possible");
        assert_eq!(engine.n_past(), 0);
        assert_eq!(engine.forward(&golden.tokens, Wanted::Last).expect("a pass"), first, "{name}");
    }
}

#[test]
fn plans_have_room_for_the_state() {
    let golden = Golden::open("qwen3next");
    let spec = describe(&golden.gguf).expect("a network");
    let shape = shape_of(&golden.gguf, &spec);
    // Two of three layers: three past inputs of 128 channels, and four matrices of 16 x 16.
    assert_eq!(shape.state_bytes(), 2 * 4 * (3 * 128 + 4 * 16 * 16));
    // One of three layers: two heads of keys and values of 16.
    for (kv_type, bytes) in [(KvType::F16, 2 * 2 * (16 + 16)), (KvType::Q8_0, 2 * (18 + 18)), (KvType::F32, 256)] {
        assert_eq!(kv_type.token_bytes(&shape), bytes);
        let mut plan = obvious(&shape, 100, kv_type);
        assert_eq!(plan.tiers[0].bytes.kv, 100 * bytes + shape.state_bytes());
        let options = LoadOptions { threads: Some(1), ..LoadOptions::default() };
        let load = |plan: &_| Engine::load(Arc::clone(&golden.gguf), plan, &options, &mut |_, _| {}).map(|_| ());
        load(&plan).expect("a plan with room");
        plan.tiers[0].bytes.kv -= 1;
        let error = load(&plan).expect_err("a byte too few").to_string();
        assert!(error.contains("recurrent state"), "{error}");
    }
}
