//! Measures the speed of a model fully on a device, with its experts in main memory, and on the
//! CPU. All setups take the same tokens, so that they choose the same experts.

use crate::counting::CountingDevice;
use crate::{SelftestError, Stop};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tier_plan_cuda::{CudaError, Device};
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::model::describe;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::shape::{ModelShape, shape_of};
use tier_plan_formats::placement::Placement;
use tier_plan_runtime::engine::{Engine, LogitsMode};
use tier_plan_runtime::options::LoadOptions;
use tier_plan_runtime::plans::in_memory::{all_in_memory, all_on_gpu, experts_in_memory};

/// Storage type of the KV cache, the default of `tier-plan run`.
pub const KV_TYPE: KvType = KvType::F16;

/// Fraction (1/n) of the prompt that is timed first, to estimate the full run.
const CALIBRATION_FRACTION: usize = 8;

/// Decoded tokens after which a round may be cut short.
const MIN_DECODED: usize = 4;

/// Where a model's parts are.
#[derive(Debug, Clone, Copy)]
pub enum Setup<'a> {
    /// Everything on a device.
    FullyOnGpu(&'a Arc<dyn Device>),
    /// Routed experts in main memory, everything else on a device.
    ExpertsInMemory(&'a Arc<dyn Device>),
    /// Everything in main memory.
    Cpu,
}

impl Setup<'_> {
    fn plan(&self, shape: &ModelShape, context: u32) -> Placement {
        match self {
            Setup::FullyOnGpu(_) => all_on_gpu(shape, context, KV_TYPE),
            Setup::ExpertsInMemory(_) => experts_in_memory(shape, context, KV_TYPE),
            Setup::Cpu => all_in_memory(shape, context, KV_TYPE),
        }
    }

    fn device(&self) -> Option<&Arc<dyn Device>> {
        match self {
            Setup::FullyOnGpu(device) | Setup::ExpertsInMemory(device) => Some(device),
            Setup::Cpu => None,
        }
    }
}

/// Extent of a measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Effort {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Tokens decoded per round, after [`warm`](Self::warm).
    pub decode: usize,
    /// Tokens decoded before a round is timed, in which launches are recorded.
    pub warm: usize,
    /// Rounds; the median is the result.
    pub rounds: usize,
    /// Time after which prompts are shortened and rounds skipped.
    pub limit: Duration,
}

impl Effort {
    /// Extent for real models.
    pub const FULL: Effort = Effort {
        prompt: 512,
        decode: 128,
        warm: 8,
        rounds: 3,
        limit: Duration::from_secs(60),
    };

    /// For a check that everything runs.
    pub const LITTLE: Effort = Effort {
        prompt: 32,
        decode: 8,
        warm: 3,
        rounds: 1,
        limit: Duration::from_secs(60),
    };

    /// Returns the context that the measurement needs, in tokens.
    pub fn context(&self) -> u32 {
        u32::try_from(self.prompt.max(1 + self.warm + self.decode)).unwrap_or(u32::MAX)
    }

    /// Returns the positions that a decoded token attends to halfway through a round.
    pub fn middle(&self) -> u32 {
        u32::try_from(1 + self.warm + self.decode.div_ceil(2)).unwrap_or(u32::MAX)
    }
}

/// Measured speed of a model.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Timed {
    /// Tokens per prompt; fewer than requested if all of them would have taken too long.
    pub prompt_tokens: usize,
    /// Seconds per prompt.
    pub prompt_s: f64,
    /// Tokens decoded per round.
    pub decode_tokens: usize,
    /// Seconds per decoded token.
    pub token_s: f64,
    /// Seconds of `token_s` in dense stages: attention, norms, routers. For a model that is fully
    /// on a device, the time is shared out by bytes.
    pub dense_s: f64,
    /// Seconds of `token_s` in routed experts, shared out likewise.
    pub expert_s: f64,
    /// Weight bytes read per decoded token.
    pub token_bytes: f64,
    /// Bytes of the KV cache read and written per decoded token, halfway through a round.
    pub cache_bytes: u64,
    /// Launches per decoded token.
    pub launches: f64,
    /// Layers of the model.
    pub layers: u32,
}

impl Timed {
    /// Returns decoded tokens per second.
    pub fn tok_s(&self) -> f64 {
        1.0 / self.token_s.max(1e-12)
    }

    /// Returns the rate at which decoding reads weights, in GB/s.
    pub fn gbps(&self) -> f64 {
        self.token_bytes / self.token_s.max(1e-12) / 1e9
    }

    /// Returns prompt tokens per second.
    pub fn prompt_tok_s(&self) -> f64 {
        self.prompt_tokens as f64 / self.prompt_s.max(1e-12)
    }

    /// Returns the seconds of `token_s` outside of layers: embedding, head, and the engine itself.
    pub fn outside_s(&self) -> f64 {
        (self.token_s - self.dense_s - self.expert_s).max(0.0)
    }
}

/// One round of decoding.
struct Round {
    tokens: usize,
    token_s: f64,
    dense_s: f64,
    expert_s: f64,
    bytes: f64,
    launches: f64,
}

/// Measures the speed of a model, after warming up.
///
/// # Errors
/// When the model can't be loaded in this setup, a pass fails, or `stop` returns true.
pub fn time(
    gguf: &Arc<Gguf>,
    setup: Setup<'_>,
    effort: Effort,
    stop: Stop<'_>,
) -> Result<Timed, SelftestError> {
    let shape = shape_of(gguf, &describe(gguf)?);
    let plan = setup.plan(&shape, effort.context());
    let counting = setup
        .device()
        .map(|device| Arc::new(CountingDevice::new(Arc::clone(device))));
    let give = |ordinal: usize| match &counting {
        Some(counting) => Ok(Arc::clone(counting) as Arc<dyn Device>),
        None => Err(CudaError::NoDevice { ordinal, found: 0 }),
    };
    let mut engine = Engine::load_on(
        Arc::clone(gguf),
        &plan,
        &LoadOptions::default(),
        Some(&give),
        &mut |_, _| {},
    )?;
    // Spread over the vocabulary, so that tokens choose different experts.
    let token = |i: usize| (i as u32).wrapping_mul(2_654_435_761) % shape.n_vocab.max(1);
    let prompt: Vec<u32> = (0..effort.prompt.max(1)).map(token).collect();
    let (prompt_tokens, prompt_s) = prompts(&mut engine, &prompt, effort, stop)?;

    let launched = || counting.as_ref().map_or(0, |counting| counting.launches());
    let (begun, mut rounds) = (Instant::now(), Vec::new());
    while rounds.len() < effort.rounds.max(1)
        && (rounds.is_empty() || begun.elapsed() < effort.limit)
    {
        engine.clear();
        (0..=effort.warm).try_for_each(|i| pass(&mut engine, &[token(i)], stop))?;
        engine.reset_counters();
        let before = launched();
        for i in 0..effort.decode.max(1) {
            pass(&mut engine, &[token(effort.warm + 1 + i)], stop)?;
            if i + 1 >= MIN_DECODED && begun.elapsed() > effort.limit {
                break;
            }
        }
        let counters = engine.counters();
        let tokens = counters.decode_tokens.max(1);
        let each = |time: Duration| time.as_secs_f64() / tokens as f64;
        rounds.push(Round {
            tokens: tokens as usize,
            token_s: each(counters.decode),
            dense_s: each(counters.layers.iter().map(|l| l.dense).sum()),
            expert_s: each(counters.layers.iter().map(|l| l.experts).sum()),
            bytes: counters.read_bytes.iter().sum::<u64>() as f64 / tokens as f64,
            launches: (launched() - before) as f64 / tokens as f64,
        });
    }
    rounds.sort_by(|a, b| a.token_s.total_cmp(&b.token_s));
    let round = &rounds[rounds.len() / 2];
    Ok(Timed {
        prompt_tokens,
        prompt_s,
        decode_tokens: round.tokens,
        token_s: round.token_s,
        dense_s: round.dense_s,
        expert_s: round.expert_s,
        token_bytes: round.bytes,
        cache_bytes: shape
            .caches
            .iter()
            .map(|cache| cache.moved_bytes(KV_TYPE, effort.middle().into(), 1))
            .sum(),
        launches: round.launches,
        layers: shape.n_layer,
    })
}

fn pass(engine: &mut Engine, tokens: &[u32], stop: Stop<'_>) -> Result<(), SelftestError> {
    if stop() {
        return Err(SelftestError::Stopped);
    }
    engine.forward(tokens, LogitsMode::Last)?;
    Ok(())
}

/// Measures prompts. Returns the tokens and seconds per prompt.
fn prompts(
    engine: &mut Engine,
    prompt: &[u32],
    effort: Effort,
    stop: Stop<'_>,
) -> Result<(usize, f64), SelftestError> {
    let mut timed = |tokens: &[u32]| -> Result<f64, SelftestError> {
        engine.clear();
        let start = Instant::now();
        pass(engine, tokens, stop)?;
        Ok(start.elapsed().as_secs_f64())
    };
    let part = prompt.len().div_ceil(CALIBRATION_FRACTION);
    let whole_s = timed(&prompt[..part])? * prompt.len() as f64 / part as f64;
    let n = shortened(prompt.len(), whole_s, effort.limit.as_secs_f64()).max(part);
    let (begun, mut times) = (Instant::now(), Vec::new());
    while times.len() < effort.rounds.max(1) && (times.is_empty() || begun.elapsed() < effort.limit)
    {
        times.push(timed(&prompt[..n])?);
    }
    times.sort_by(f64::total_cmp);
    Ok((n, times[times.len() / 2]))
}

/// Returns the number of tokens that take at most `limit`, where all `tokens` take `seconds`.
fn shortened(tokens: usize, seconds: f64, limit: f64) -> usize {
    if seconds <= limit {
        tokens
    } else {
        (tokens as f64 * limit / seconds) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::synth::{self, Shape};
    use tier_plan_cuda::shim;

    #[test]
    fn a_small_model_is_timed_in_every_setup() {
        let folder = tempfile::tempdir().unwrap();
        let file = synth::write(&Shape::TINY, folder.path(), &|| false, &mut |_, _| {}).unwrap();
        let gguf = Arc::new(Gguf::open(file.path()).unwrap());
        let device: Arc<dyn Device> = shim::shared();
        let effort = Effort {
            prompt: 20,
            decode: 5,
            warm: 3,
            rounds: 2,
            ..Effort::LITTLE
        };
        let [on_gpu, hybrid, cpu] = [
            Setup::FullyOnGpu(&device),
            Setup::ExpertsInMemory(&device),
            Setup::Cpu,
        ]
        .map(|setup| time(&gguf, setup, effort, &|| false).unwrap());
        for timed in [on_gpu, hybrid, cpu] {
            assert_eq!(
                (timed.prompt_tokens, timed.decode_tokens, timed.layers),
                (20, 5, 2),
                "{timed:?}"
            );
            let parts = [
                timed.prompt_s,
                timed.token_s,
                timed.dense_s,
                timed.expert_s,
                timed.gbps(),
                timed.tok_s(),
            ];
            assert!(parts.iter().all(|v| v.is_finite() && *v > 0.0), "{timed:?}");
            assert!(
                timed.dense_s + timed.expert_s <= timed.token_s * 1.001,
                "{timed:?}"
            );
            // A token reads the same bytes in every setup.
            assert_eq!(timed.token_bytes, on_gpu.token_bytes);
        }
        let shape = shape_of(&gguf, &describe(&gguf).unwrap());
        assert_eq!(on_gpu.token_bytes, shape.token_bytes() as f64);
        // Every replayed token takes the same launches, and the CPU none.
        assert!(
            on_gpu.launches > 2.0 && on_gpu.launches.fract() == 0.0,
            "{on_gpu:?}"
        );
        assert!(
            hybrid.launches > 2.0 && cpu.launches == 0.0,
            "{hybrid:?} {cpu:?}"
        );
        let stopped = time(&gguf, Setup::Cpu, effort, &|| true);
        assert!(matches!(stopped, Err(SelftestError::Stopped)));
        // Without any time, prompts are shorter, and there is one short round.
        let hurried = Effort {
            limit: Duration::ZERO,
            prompt: 24,
            decode: 9,
            ..effort
        };
        let timed = time(&gguf, Setup::Cpu, hurried, &|| false).unwrap();
        assert_eq!(
            (timed.prompt_tokens, timed.decode_tokens),
            (3, MIN_DECODED),
            "{timed:?}"
        );
    }

    #[test]
    fn long_prompts_are_shortened() {
        assert_eq!(shortened(512, 59.9, 60.0), 512);
        assert_eq!(shortened(512, 120.0, 60.0), 256);
        assert_eq!(shortened(512, f64::INFINITY, 60.0), 0);
        assert_eq!((Effort::FULL.context(), Effort::FULL.middle()), (512, 73));
    }
}
