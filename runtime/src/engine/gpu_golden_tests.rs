//! The second group of architectures with all parts that a GPU takes on an emulated one, against
//! golden values. What it doesn't take is refused by name, and stays on the CPU.

use crate::engine::gpu_tests::{Experts, load, open, plan};
use crate::engine::{Engine, LogitsMode};
use crate::error::LoadError;
use crate::options::LoadOptions;
use std::collections::BTreeSet;
use std::sync::Arc;
use tier_plan_cuda::{Device, shim};
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::model::gpu::Part;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::shape::{DenseKind, ModelShape};
use tier_plan_formats::placement::Placement;
use tier_plan_testing::{Golden, is_nightly, models, nmse};

/// A model with thousands of tokens, for chunks of attention.
const LONG: &str = "llama4-long";

/// Models that run on a GPU as a whole, beside tables of n-grams and of inputs.
const WHOLE: [&str; 40] = [
    "afmoe",
    "bailingmoe2",
    "bailingmoe3",
    "bailingmoe3-vl",
    "deepseek",
    "deepseek32",
    "deepseek4",
    "dots1",
    "dots3note",
    "ernie4_5-moe",
    "exaone-moe",
    "gemma3",
    "gemma4",
    "glm-dsa",
    "glm5-next",
    "granitemoe",
    "grok",
    "hunyuan-moe",
    "hy_v3",
    "hy_v4",
    "hy_v4-full",
    "kimi-k3",
    "kimi-linear",
    "laguna",
    "lfm2moe",
    "llama4",
    "mimo2",
    "minimax-m3",
    "mistral3",
    "mistral4",
    "nemotron_h_moe",
    "nemotron_h_moe-puzzle",
    "phi3",
    "phi3-long",
    "qwen2",
    "qwen35",
    "qwen3vlmoe",
    "qwen4exp",
    "smollm3",
    "step35",
];

/// The largest error of logits. Sums of a GPU have another order than those of the CPU, and the
/// golden values a third one.
const BOUND: f64 = 1e-10;

/// What of a model a plan leaves on the CPU.
#[derive(Default)]
struct Left {
    /// Tensor groups, with the layer of those that have one.
    groups: BTreeSet<(&'static str, Option<u32>)>,
    /// Each refusal, without its layer.
    reasons: BTreeSet<(&'static str, String)>,
}

impl Left {
    fn has(&self, group: &'static str, layer: Option<u32>) -> bool {
        self.groups.contains(&(group, layer))
    }

    fn plan(&self, shape: &ModelShape, context: u32) -> Placement {
        let on_gpu = |kind: DenseKind, layer| !self.has(Part::Dense(kind).name(), layer);
        let experts = if self.has("experts", None) {
            Experts::Memory
        } else {
            Experts::Gpu
        };
        let cache = !self.has("kv_cache", None);
        plan(shape, (context, KvType::F32), on_gpu, cache, experts)
    }

    /// Notes what a plan was refused for.
    fn add(&mut self, refusal: LoadError) {
        let LoadError::OnGpu {
            group, layer, why, ..
        } = refusal
        else {
            panic!("{refusal}");
        };
        let of_layer = !matches!(group, "embedding" | "head" | "experts" | "kv_cache");
        let layer = of_layer.then_some(layer as u32);
        assert!(self.groups.insert((group, layer)), "refused again: {why}");
        self.reasons.insert((group, why));
    }
}

/// Moves to the CPU what the GPU refuses, until it refuses nothing.
fn as_much_as_it_takes(gguf: &Arc<Gguf>, shape: &ModelShape, context: u32) -> (Placement, Left) {
    let mut left = Left::default();
    loop {
        let plan = left.plan(shape, context);
        let give = |_: usize| Ok(shim::shared() as Arc<dyn Device>);
        let options = LoadOptions::default();
        match Engine::load_on(
            Arc::clone(gguf),
            &plan,
            &options,
            Some(&give),
            &mut |_, _| {},
        ) {
            Ok(_) => return (plan, left),
            Err(refusal) => left.add(refusal),
        }
    }
}

#[test]
fn what_a_gpu_takes_of_each_model_gives_its_golden_values() {
    for name in models("arch2").iter().filter(|name| *name != LONG) {
        let golden = Golden::read(&format!("arch2/{name}"));
        let (gguf, shape) = open(&format!("arch2/{name}.gguf"));
        let n_tokens = golden.tokens.len() + golden.greedy.len();
        let (plan, left) = as_much_as_it_takes(&gguf, &shape, n_tokens as u32);
        let mut engine = load(&gguf, &plan, 13);
        let logits = engine.forward(&golden.tokens, LogitsMode::All).unwrap();
        let error = golden.nmse(logits);
        assert!(error <= BOUND, "{name}: {error:e}");
        // Token by token too, where a token stays on the GPU until its logits.
        if left.reasons.is_empty() {
            engine.clear();
            // All tokens at night.
            let n = golden.tokens.len() / if is_nightly() { 1 } else { 4 };
            let (mut logits, n_vocab) = (Vec::new(), engine.spec().n_vocab);
            for token in &golden.tokens[..n] {
                logits.extend_from_slice(engine.forward(&[*token], LogitsMode::Last).unwrap());
            }
            let error = nmse(&logits, &golden.logits[..n * n_vocab]);
            assert!(error <= BOUND, "{name}, token by token: {error:e}");
        }
        // What is worth most of a GPU's memory.
        assert!(!left.has("experts", None), "{name}: {:?}", left.reasons);
        let whole = WHOLE.contains(&name.as_str());
        assert_eq!(left.reasons.is_empty(), whole, "{name}: {:?}", left.reasons);
    }
}
