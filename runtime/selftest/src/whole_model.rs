//! Compares a whole model on a GPU with the same model on the CPU: logits, and greedy text.

use crate::SelftestError;
use crate::outcome::Outcome;
use std::sync::Arc;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::model::describe;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::shape::{ModelShape, shape_of};
use tier_plan_runtime::engine::{Engine, LogitsMode};
use tier_plan_runtime::error::LoadError;
use tier_plan_runtime::gpu::devices::GiveDevice;
use tier_plan_runtime::options::LoadOptions;
use tier_plan_runtime::plans::in_memory::{all_in_memory, all_on_gpu, experts_in_memory};

/// Tokens of the prompt.
const PROMPT_TOKENS: u32 = 24;

/// Tokens decoded after the prompt.
const DECODED: usize = 16;

/// Largest allowed NMSE of the logits. Sums have another order, so some codes of 8-bit activations
/// round to the other side, which grows through the layers to about the effect of other roundings.
/// On the bundled model, a KV cache of 32 instead of 16 bits changes the logits by 5e-4. Mistakes
/// are far above the bound.
const MAX_NMSE: f64 = 1e-3;

/// Margin of a token's logit above all others, as a share of the logits' spread, from which on it
/// must be the most likely token on both.
const CLEAR_MARGIN: f32 = 0.02;

/// The share of a model that is on the GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GpuShare {
    /// Every part of it.
    All,
    /// Everything but the routed experts, which are in main memory.
    AllButExperts,
}

/// Compares the logits of a prompt, and of the tokens that the CPU decodes after it. `give` opens
/// the GPU.
///
/// # Errors
/// When the model can't be loaded, or a pass fails.
pub fn compare(
    gguf: &Arc<Gguf>,
    share: GpuShare,
    give: Option<GiveDevice<'_>>,
) -> Result<Outcome, SelftestError> {
    let spec = describe(gguf).map_err(LoadError::from)?;
    let shape = shape_of(gguf, &spec);
    let context = PROMPT_TOKENS + DECODED as u32;
    let [mut on_gpu, mut on_cpu] = load_both(gguf, &shape, context, share, give)?;
    let n_vocab = spec.n_vocab as u32;
    let mut tokens: Vec<u32> = (0..PROMPT_TOKENS)
        .map(|i| i.wrapping_mul(2_654_435_761) % n_vocab)
        .collect();
    let mut outcome = Outcome::default();
    for _ in 0..=DECODED {
        let expected = on_cpu.forward(&tokens, LogitsMode::Last)?.to_vec();
        let got = on_gpu.forward(&tokens, LogitsMode::Last)?;
        let next = compare_logits(&mut outcome, got, &expected);
        tokens = vec![next];
        if on_cpu.n_past() == on_cpu.context() {
            break;
        }
    }
    Ok(outcome)
}

/// How far two engines generate the same text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TextMatch {
    /// Tokens before the first that differs.
    pub same: usize,
    /// Number of tokens requested.
    pub total: usize,
    /// Margin of the CPU's most likely token above the next one, where they differ, as a share of
    /// the logits' spread.
    pub margin: Option<f32>,
}

/// Continues a prompt greedily by `n` tokens on the CPU and on the GPU that `give` opens, until a
/// token differs.
///
/// # Errors
/// When the model can't be loaded, or a pass fails.
pub fn greedy(
    gguf: &Arc<Gguf>,
    share: GpuShare,
    give: Option<GiveDevice<'_>>,
    prompt: &[u32],
    n: usize,
) -> Result<TextMatch, SelftestError> {
    let shape = shape_of(gguf, &describe(gguf).map_err(LoadError::from)?);
    let context = u32::try_from(prompt.len().saturating_add(n)).unwrap_or(u32::MAX);
    let [mut on_gpu, mut on_cpu] = load_both(gguf, &shape, context, share, give)?;
    let mut tokens = prompt.to_vec();
    for same in 0..n {
        let expected = on_cpu.forward(&tokens, LogitsMode::Last)?;
        let got = on_gpu.forward(&tokens, LogitsMode::Last)?;
        let (best, margin) = most_likely(expected);
        // Of logits with NaN, no token is the most likely.
        if most_likely(got).0 != best || got.iter().any(|v| v.is_nan()) {
            let squares: f64 = expected.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
            let spread = (squares / expected.len().max(1) as f64).sqrt() as f32;
            return Ok(TextMatch {
                same,
                total: n,
                margin: Some(margin / spread.max(f32::MIN_POSITIVE)),
            });
        }
        tokens = vec![best];
    }
    Ok(TextMatch {
        same: n,
        total: n,
        margin: None,
    })
}

/// Loads a model twice: on the GPU and on the CPU.
fn load_both(
    gguf: &Arc<Gguf>,
    shape: &ModelShape,
    context: u32,
    share: GpuShare,
    give: Option<GiveDevice<'_>>,
) -> Result<[Engine; 2], LoadError> {
    let make = match share {
        GpuShare::All => all_on_gpu,
        GpuShare::AllButExperts => experts_in_memory,
    };
    let plan = make(shape, context, KvType::F16);
    let options = LoadOptions::default();
    let on_gpu = Engine::load_on(Arc::clone(gguf), &plan, &options, give, &mut |_, _| {})?;
    let plain = all_in_memory(shape, context, KvType::F16);
    let on_cpu = Engine::load(Arc::clone(gguf), &plain, &options, &mut |_, _| {})?;
    Ok([on_gpu, on_cpu])
}

/// Compares the logits of one token. Returns the most likely token on the CPU.
fn compare_logits(outcome: &mut Outcome, got: &[f32], expected: &[f32]) -> u32 {
    let square = |v: f32| f64::from(v) * f64::from(v);
    let error: f64 = got.iter().zip(expected).map(|(a, b)| square(a - b)).sum();
    let norm: f64 = expected.iter().map(|v| square(*v)).sum();
    let nmse = error / norm.max(f64::MIN_POSITIVE);
    outcome.merge(Outcome {
        compared: got.len().min(expected.len()),
        worst: nmse / MAX_NMSE,
    });
    let (best, margin) = most_likely(expected);
    let spread = (norm / expected.len().max(1) as f64).sqrt() as f32;
    if most_likely(got).0 != best && margin > CLEAR_MARGIN * spread {
        outcome.merge(Outcome {
            compared: 0,
            worst: f64::INFINITY,
        });
    }
    best
}

/// Returns the most likely token, and the margin of its logit above the next one.
fn most_likely(logits: &[f32]) -> (u32, f32) {
    let (mut best, mut top_two) = (0, [f32::NEG_INFINITY; 2]);
    for (token, &v) in logits.iter().enumerate() {
        if v > top_two[0] {
            (best, top_two) = (token as u32, [v, top_two[0]]);
        } else if v > top_two[1] {
            top_two[1] = v;
        }
    }
    (best, top_two[0] - top_two[1])
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;
    use tier_plan_cuda::{Device, shim};

    #[test]
    fn the_bundled_model_matches_on_the_gpu_emulator() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../profiles/demo/demo.gguf");
        let gguf = Arc::new(Gguf::open(&path).unwrap());
        let give = |_: usize| Ok(shim::shared() as Arc<dyn Device>);
        for share in [GpuShare::All, GpuShare::AllButExperts] {
            let outcome = compare(&gguf, share, Some(&give)).unwrap();
            assert!(outcome.passed(), "{outcome:?}");
            assert!(
                outcome.compared == 17 * 4096 && outcome.worst > 0.0,
                "{outcome:?}"
            );
        }
    }

    #[test]
    fn the_bundled_models_greedy_text_matches_on_the_gpu_emulator() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../profiles/demo/demo.gguf");
        let gguf = Arc::new(Gguf::open(&path).unwrap());
        let give = |_: usize| Ok(shim::shared() as Arc<dyn Device>);
        let prompt: Vec<u32> = (0..20).map(|i| i * 31 + 7).collect();
        for share in [GpuShare::All, GpuShare::AllButExperts] {
            let text = greedy(&gguf, share, Some(&give), &prompt, 24).unwrap();
            assert_eq!(
                text,
                TextMatch {
                    same: 24,
                    total: 24,
                    margin: None
                }
            );
        }
    }

    #[test]
    fn other_logits_are_detected() {
        let expected = [1.0, 5.0, -2.0, 4.99];
        let worst = |got: [f32; 4]| {
            let mut outcome = Outcome::default();
            assert_eq!(compare_logits(&mut outcome, &got, &expected), 1);
            outcome.worst
        };
        assert!(worst(expected) == 0.0);
        // Nearly the same logits may have another most likely token.
        assert!(worst([1.0, 4.99, -2.0, 5.0]) <= 1.0);
        assert!(worst([1.0, 5.0, -2.0, 5.4]) > 1.0);
        assert!(worst([5.1, 5.0, -2.0, 4.99]).is_finite() && worst([f32::NAN; 4]).is_nan());
    }
}
