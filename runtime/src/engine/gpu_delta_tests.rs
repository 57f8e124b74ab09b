//! Models with gated delta nets or Mamba-2 on a GPU, which is emulated on the processor: the kernels are those
//! of a real one.

use super::gpu_tests::{ALL, Experts, Watched, load, open, plan};
use crate::engine::{Engine, LogitsMode};
use crate::error::RunError;
use crate::gpu::parts;
use crate::options::LoadOptions;
use crate::plans::in_memory::all_in_memory;
use std::sync::Arc;
use tier_plan_cuda::Device;
use tier_plan_formats::model::describe;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::shape::shape_of;
use tier_plan_formats::model::spec::Mixer;
use tier_plan_testing::{Golden, nmse};

const NAMES: [&str; 3] = ["arch/qwen3next", "arch/qwen35moe", "arch2/nemotron_h_moe"];

#[test]
fn logits_are_the_golden_ones_however_tokens_are_cut() {
    for name in NAMES {
        let golden = Golden::read(name);
        let tokens = &golden.tokens;
        let (gguf, shape) = open(&format!("{name}.gguf"));
        let of = (tokens.len() as u32, KvType::F32);
        for (experts, pass, batch) in [
            (Experts::Gpu, 1, 8),
            (Experts::Gpu, 5, 3),
            (Experts::Memory, 1, 8),
            (Experts::Memory, 7, 7),
            (Experts::Gpu, 48, 48),
            (Experts::File, 48, 20),
        ] {
            let mut engine = load(&gguf, &plan(&shape, of, ALL, true, experts), batch);
            let mut logits = Vec::new();
            for tokens in tokens.chunks(pass) {
                logits.extend_from_slice(engine.forward(tokens, LogitsMode::All).unwrap());
            }
            // From 16 tokens on attention is in 16-bit floats.
            let bound = if pass.min(batch) < 16 { 1e-9 } else { 1e-5 };
            let off = golden.nmse(&logits);
            assert!(
                off > 0.0 && off < bound,
                "{name}, {experts:?}, {pass} tokens, batches of {batch}: {off:e}"
            );
        }
    }
}

#[test]
fn a_replayed_token_of_a_new_text_remembers_nothing() {
    for name in NAMES {
        let (gguf, shape) = open(&format!("{name}.gguf"));
        let of = (24, KvType::F16);
        let device = Arc::new(Watched::new(usize::MAX));
        let give = |_: usize| Ok(Arc::clone(&device) as Arc<dyn Device>);
        let options = LoadOptions {
            threads: Some(2),
            batch: Some(9),
            ..LoadOptions::default()
        };
        let all = plan(&shape, of, ALL, true, Experts::Gpu);
        let mut engine = Engine::load_on(
            Arc::clone(&gguf),
            &all,
            &options,
            Some(&give),
            &mut |_, _| {},
        )
        .unwrap();
        let mut plain = load(&gguf, &all_in_memory(&shape, of.0, of.1), 9);
        let token = |i: u32| (i * 11 + 3) % shape.n_vocab;
        let mut first = Vec::new();
        for i in 0..8 {
            first.push(
                engine
                    .forward(&[token(i)], LogitsMode::Last)
                    .unwrap()
                    .to_vec(),
            );
            let off = nmse(
                &first[i as usize],
                plain.forward(&[token(i)], LogitsMode::Last).unwrap(),
            );
            assert!(off > 0.0 && off < 1e-5, "{name}, token {i}: {off:e}");
            assert_eq!(
                engine.routing().experts,
                plain.routing().experts,
                "{name}, token {i}"
            );
        }
        let back = engine.truncate(5);
        assert!(
            matches!(
                back,
                Err(RunError::CannotRewind {
                    n_past: 8,
                    wanted: 5
                })
            ),
            "{back:?}"
        );
        device.take();
        engine.truncate(0).unwrap();
        for (i, expected) in (0..).zip(&first) {
            assert_eq!(
                engine.forward(&[token(i)], LogitsMode::Last).unwrap(),
                expected,
                "{name}, token {i}"
            );
        }
        let [launches, reads, _, recordings] = device.take();
        assert_eq!(
            (launches, reads, recordings),
            (0, 2 * 8, 0),
            "all of it was recorded"
        );
        // A prompt takes the state on as single tokens do.
        let prompt: Vec<u32> = (8..20).map(token).collect();
        let got = engine.forward(&prompt, LogitsMode::All).unwrap();
        let off = nmse(got, plain.forward(&prompt, LogitsMode::All).unwrap());
        assert!(off < 1e-5, "{name}: {off:e}");
        let off = nmse(
            engine.forward(&[token(20)], LogitsMode::Last).unwrap(),
            plain.forward(&[token(20)], LogitsMode::Last).unwrap(),
        );
        assert!(off < 1e-5, "{name}: {off:e}");
    }
}

#[test]
fn heads_that_no_kernel_takes_are_refused() {
    let (gguf, shape) = open("arch/qwen3next.gguf");
    let all = plan(&shape, (64, KvType::F16), ALL, true, Experts::Memory);
    let with = |head_dim: usize| {
        let mut spec = describe(&gguf).unwrap();
        for layer in &mut spec.layers {
            if let Mixer::Delta(d) = &mut layer.mixer {
                d.head_dim = head_dim;
            }
        }
        parts::check(&shape_of(&gguf, &spec), &all).map_err(|error| error.to_string())
    };
    assert_eq!(with(16), Ok(()));
    assert_eq!(with(256), Ok(()));
    for head_dim in [18, 260] {
        let error = with(head_dim).unwrap_err();
        let named = error.contains(&format!("heads of {head_dim} values"))
            && error.contains("attention of layer");
        assert!(named, "{error}");
    }
}

#[test]
fn states_that_no_kernel_takes_are_refused() {
    let (gguf, shape) = open("arch2/nemotron_h_moe.gguf");
    let all = plan(&shape, (64, KvType::F16), ALL, true, Experts::Memory);
    let with = |state_dim: usize| {
        let mut spec = describe(&gguf).unwrap();
        for layer in &mut spec.layers {
            if let Mixer::Mamba(m) = &mut layer.mixer {
                m.state_dim = state_dim;
            }
        }
        parts::check(&shape_of(&gguf, &spec), &all).map_err(|error| error.to_string())
    };
    assert_eq!(with(4), Ok(()));
    assert_eq!(with(256), Ok(()));
    for state_dim in [18, 260] {
        let error = with(state_dim).unwrap_err();
        let named = error.contains(&format!("states of {state_dim} values"))
            && error.contains("attention of layer");
        assert!(named, "{error}");
    }
}
