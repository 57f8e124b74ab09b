//! What networks with recurrent layers need beyond the golden values: the same logits however the
//! tokens are cut into passes, contexts that begin again, and plans with room for the state.

use std::sync::Arc;
use tier_plan_runtime::formats::placement::TierIdx;
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::describe;
use tier_plan_runtime::model::shape::shape_of;
use tier_plan_runtime::plans::in_memory::all_in_memory;
use tier_plan_runtime::{Engine, KvType, LoadOptions, LogitsMode, RunError};
use tier_plan_testing::Golden;

const NAMES: [&str; 2] = ["qwen3next", "qwen35moe"];

/// A model with what another engine computed from it.
struct Model {
    gguf: Arc<Gguf>,
    golden: Golden,
}

impl Model {
    fn open(name: &str) -> Self {
        let golden = Golden::read(&format!("arch/{name}"));
        Self {
            gguf: Arc::new(Gguf::open(&golden.path).expect("a model")),
            golden,
        }
    }

    fn engine(&self, batch: usize, threads: usize) -> Engine {
        let spec = describe(&self.gguf).expect("a network");
        let shape = shape_of(&self.gguf, &spec);
        let plan = all_in_memory(&shape, self.golden.tokens.len() as u32, KvType::F32);
        let options = LoadOptions {
            threads: Some(threads),
            batch: Some(batch),
            ..LoadOptions::default()
        };
        Engine::load(Arc::clone(&self.gguf), &plan, &options, &mut |_, _| {})
            .expect("a loaded model")
    }
}

#[test]
fn logits_do_not_depend_on_the_passes() {
    for name in NAMES {
        let model = Model::open(name);
        for (passes, batch) in [(1, 512), (2, 512), (5, 3), (48, 7)] {
            let mut engine = model.engine(batch, 2);
            let mut logits = Vec::new();
            for tokens in model.golden.tokens.chunks(passes) {
                logits.extend_from_slice(engine.forward(tokens, LogitsMode::All).expect("a pass"));
            }
            let nmse = model.golden.nmse(&logits);
            assert!(
                nmse < 1e-9,
                "{name}, passes of {passes}, batches of {batch}: {nmse:e}"
            );
        }
    }
}

#[test]
fn a_context_can_begin_again_but_not_go_back() {
    for name in NAMES {
        let model = Model::open(name);
        let mut engine = model.engine(16, 2);
        let first = engine
            .forward(&model.golden.tokens, LogitsMode::Last)
            .expect("a pass")
            .to_vec();
        let n = model.golden.tokens.len();
        engine.truncate(n).expect("nothing to do");
        engine.truncate(n + 5).expect("nothing to do");
        match engine.truncate(n - 1) {
            Err(RunError::CannotRewind { n_past, wanted }) => {
                assert_eq!((n_past, wanted), (n, n - 1))
            }
            other => panic!("{name}: {other:?}"),
        }
        assert_eq!(engine.n_past(), n);
        engine.truncate(0).expect("always possible");
        assert_eq!(engine.n_past(), 0);
        assert_eq!(
            engine
                .forward(&model.golden.tokens, LogitsMode::Last)
                .expect("a pass"),
            first,
            "{name}"
        );
    }
}

#[test]
fn plans_have_room_for_the_state() {
    let model = Model::open("qwen3next");
    let spec = describe(&model.gguf).expect("a network");
    let shape = shape_of(&model.gguf, &spec);
    // Two of three layers: three past inputs of 128 channels, and four matrices of 16 x 16.
    assert_eq!(shape.state_bytes(), 2 * 4 * (3 * 128 + 4 * 16 * 16));
    // One of three layers: two heads of keys and values of 16.
    for (kv_type, bytes) in [
        (KvType::F16, 2 * 2 * (16 + 16)),
        (KvType::Q8_0, 2 * (18 + 18)),
        (KvType::F32, 256),
    ] {
        assert_eq!(kv_type.token_bytes(&shape), bytes);
        let mut plan = all_in_memory(&shape, 100, kv_type);
        assert_eq!(
            plan.tiers[TierIdx::new(0)].bytes.kv,
            100 * bytes + shape.state_bytes()
        );
        let options = LoadOptions {
            threads: Some(1),
            ..LoadOptions::default()
        };
        let load = |plan: &_| {
            Engine::load(Arc::clone(&model.gguf), plan, &options, &mut |_, _| {}).map(|_| ())
        };
        load(&plan).expect("a plan with room");
        plan.tiers[TierIdx::new(0)].bytes.kv -= 1;
        let error = load(&plan).expect_err("a byte too few").to_string();
        assert!(error.contains("recurrent state"), "{error}");
    }
}
