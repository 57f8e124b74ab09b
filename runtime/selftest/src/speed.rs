//! How fast a model is with everything on a device, with its experts in main memory, and on the processor alone: the same
//! tokens each time, so that the same experts are chosen.

use crate::counting::Counting;
use crate::{Stop, TargetError};
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

/// Keys and values of what is timed, as `run` stores them.
pub const KV_TYPE: KvType = KvType::F16;

/// The part of a prompt that says how long all of it will take.
const PART: usize = 8;

/// Decoded tokens below which a round is not cut short.
const LEAST_DECODED: usize = 4;

/// Where a model is.
#[derive(Debug, Clone, Copy)]
pub enum Place<'a> {
    /// All of it on a device.
    Resident(&'a Arc<dyn Device>),
    /// All but its routed experts.
    Hybrid(&'a Arc<dyn Device>),
    /// Nothing on a device.
    Processor,
}

impl Place<'_> {
    fn plan(&self, shape: &ModelShape, context: u32) -> Placement {
        match self {
            Place::Resident(_) => all_on_gpu(shape, context, KV_TYPE),
            Place::Hybrid(_) => experts_in_memory(shape, context, KV_TYPE),
            Place::Processor => all_in_memory(shape, context, KV_TYPE),
        }
    }

    fn device(&self) -> Option<&Arc<dyn Device>> {
        match self {
            Place::Resident(device) | Place::Hybrid(device) => Some(device),
            Place::Processor => None,
        }
    }
}

/// How much is done for a figure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Effort {
    /// Tokens of the prompt.
    pub prompt: usize,
    /// Tokens decoded in a round, after [`warm`](Self::warm).
    pub decode: usize,
    /// Tokens decoded before a round is timed: launches are recorded then.
    pub warm: usize,
    /// Rounds, of which the median counts.
    pub rounds: usize,
    /// Time after which prompts get shorter and rounds fewer.
    pub limit: Duration,
}

impl Effort {
    /// What real models need.
    pub const FULL: Effort = Effort { prompt: 512, decode: 128, warm: 8, rounds: 3, limit: Duration::from_secs(60) };

    /// Enough to see that all of it runs.
    pub const LITTLE: Effort = Effort { prompt: 32, decode: 8, warm: 3, rounds: 1, limit: Duration::from_secs(60) };

    /// Tokens of context that it needs.
    pub fn context(&self) -> u32 {
        u32::try_from(self.prompt.max(1 + self.warm + self.decode)).unwrap_or(u32::MAX)
    }

    /// Positions that a decoded token attends to, halfway through a round.
    pub fn middle(&self) -> u32 {
        u32::try_from(1 + self.warm + self.decode.div_ceil(2)).unwrap_or(u32::MAX)
    }
}

/// What was measured.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Timed {
    /// Tokens of the prompts, fewer than asked for where all would have taken too long.
    pub prompt_tokens: usize,
    /// Seconds of one.
    pub prompt_s: f64,
    /// Tokens decoded in a round.
    pub decode_tokens: usize,
    /// Seconds of a decoded token.
    pub token_s: f64,
    /// Of that, the dense stages: attention, norms, routers. Of a model that is all on a device only shared out by bytes.
    pub dense_s: f64,
    /// Of that, the routed experts; as above.
    pub expert_s: f64,
    /// Weight bytes that a decoded token reads.
    pub token_bytes: f64,
    /// Bytes of keys and values that it reads and writes, halfway.
    pub cache_bytes: u64,
    /// Kernels that the device ran for a decoded token.
    pub launches: f64,
    /// Layers.
    pub layers: u32,
}

impl Timed {
    /// Decoded tokens a second.
    pub fn tok_s(&self) -> f64 {
        1.0 / self.token_s.max(1e-12)
    }

    /// Weights that decoding reads, in 10⁹ bytes a second.
    pub fn gbps(&self) -> f64 {
        self.token_bytes / self.token_s.max(1e-12) / 1e9
    }

    /// Prompt tokens a second.
    pub fn prompt_tok_s(&self) -> f64 {
        self.prompt_tokens as f64 / self.prompt_s.max(1e-12)
    }

    /// Seconds outside the layers: embedding, head, and what the engine does around them.
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

/// Times a model. Its prompt is timed after a part of one, its decoding after a few tokens.
///
/// # Errors
/// When it can't be loaded there, a pass fails, or `stop` says so.
pub fn time(gguf: &Arc<Gguf>, place: Place<'_>, effort: Effort, stop: Stop<'_>) -> Result<Timed, TargetError> {
    let shape = shape_of(gguf, &describe(gguf)?);
    let plan = place.plan(&shape, effort.context());
    let counting = place.device().map(|device| Arc::new(Counting::new(Arc::clone(device))));
    let give = |ordinal: usize| match &counting {
        Some(counting) => Ok(Arc::clone(counting) as Arc<dyn Device>),
        None => Err(CudaError::NoDevice { ordinal, found: 0 }),
    };
    let mut engine = Engine::load_on(Arc::clone(gguf), &plan, &LoadOptions::default(), Some(&give), &mut |_, _| {})?;
    // Spread over the vocabulary, so that routing is too.
    let token = |i: usize| (i as u32).wrapping_mul(2_654_435_761) % shape.n_vocab.max(1);
    let prompt: Vec<u32> = (0..effort.prompt.max(1)).map(token).collect();
    let (prompt_tokens, prompt_s) = prompts(&mut engine, &prompt, effort, stop)?;

    let launched = || counting.as_ref().map_or(0, |counting| counting.launches());
    let (begun, mut rounds) = (Instant::now(), Vec::new());
    while rounds.len() < effort.rounds.max(1) && (rounds.is_empty() || begun.elapsed() < effort.limit) {
        engine.clear();
        (0..=effort.warm).try_for_each(|i| pass(&mut engine, &[token(i)], stop))?;
        engine.reset_counters();
        let before = launched();
        for i in 0..effort.decode.max(1) {
            pass(&mut engine, &[token(effort.warm + 1 + i)], stop)?;
            if i + 1 >= LEAST_DECODED && begun.elapsed() > effort.limit {
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
        cache_bytes: shape.caches.iter().map(|cache| cache.moved_bytes(KV_TYPE, effort.middle().into(), 1)).sum(),
        launches: round.launches,
        layers: shape.n_layer,
    })
}

fn pass(engine: &mut Engine, tokens: &[u32], stop: Stop<'_>) -> Result<(), TargetError> {
    if stop() {
        return Err(TargetError::Stopped);
    }
    engine.forward(tokens, LogitsMode::Last)?;
    Ok(())
}

/// Tokens and seconds of a prompt.
fn prompts(engine: &mut Engine, prompt: &[u32], effort: Effort, stop: Stop<'_>) -> Result<(usize, f64), TargetError> {
    let mut timed = |tokens: &[u32]| -> Result<f64, TargetError> {
        engine.clear();
        let start = Instant::now();
        pass(engine, tokens, stop)?;
        Ok(start.elapsed().as_secs_f64())
    };
    let part = prompt.len().div_ceil(PART);
    let whole_s = timed(&prompt[..part])? * prompt.len() as f64 / part as f64;
    let n = shortened(prompt.len(), whole_s, effort.limit.as_secs_f64()).max(part);
    let (begun, mut times) = (Instant::now(), Vec::new());
    while times.len() < effort.rounds.max(1) && (times.is_empty() || begun.elapsed() < effort.limit) {
        times.push(timed(&prompt[..n])?);
    }
    times.sort_by(f64::total_cmp);
    Ok((n, times[times.len() / 2]))
}

/// Tokens of a prompt that take no longer than allowed, when all of them take so long.
fn shortened(tokens: usize, seconds: f64, limit: f64) -> usize {
    if seconds <= limit { tokens } else { (tokens as f64 * limit / seconds) as usize }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Temporary;
    use crate::synth::{self, Shape};
    use tier_plan_cuda::shim;

    #[test]
    fn a_small_model_is_timed_wherever_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let file = Temporary::new(folder.path(), "speed");
        synth::write(&Shape::TINY, file.path(), &|| false, &mut |_, _| {}).unwrap();
        let gguf = Arc::new(Gguf::open(file.path()).unwrap());
        let device: Arc<dyn Device> = shim::shared();
        let effort = Effort { prompt: 20, decode: 5, warm: 3, rounds: 2, ..Effort::LITTLE };
        let [resident, hybrid, processor] = [Place::Resident(&device), Place::Hybrid(&device), Place::Processor]
            .map(|place| time(&gguf, place, effort, &|| false).unwrap());
        for timed in [resident, hybrid, processor] {
            assert_eq!((timed.prompt_tokens, timed.decode_tokens, timed.layers), (20, 5, 2), "{timed:?}");
            let parts = [timed.prompt_s, timed.token_s, timed.dense_s, timed.expert_s, timed.gbps(), timed.tok_s()];
            assert!(parts.iter().all(|v| v.is_finite() && *v > 0.0), "{timed:?}");
            assert!(timed.dense_s + timed.expert_s <= timed.token_s * 1.001, "{timed:?}");
            // Wherever it is, a token reads the same.
            assert_eq!(timed.token_bytes, resident.token_bytes);
        }
        let shape = shape_of(&gguf, &describe(&gguf).unwrap());
        assert_eq!(resident.token_bytes, shape.token_bytes() as f64);
        // Each of the replayed tokens is as many launches, and the processor needs none.
        assert!(resident.launches > 2.0 && resident.launches.fract() == 0.0, "{resident:?}");
        assert!(hybrid.launches > 2.0 && processor.launches == 0.0, "{hybrid:?} {processor:?}");
        let stopped = time(&gguf, Place::Processor, effort, &|| true);
        assert!(matches!(stopped, Err(TargetError::Stopped)));
        // With no time at all there are shorter prompts, and one short round.
        let hurried = Effort { limit: Duration::ZERO, prompt: 24, decode: 9, ..effort };
        let timed = time(&gguf, Place::Processor, hurried, &|| false).unwrap();
        assert_eq!((timed.prompt_tokens, timed.decode_tokens), (3, LEAST_DECODED), "{timed:?}");
    }

    #[test]
    fn long_prompts_are_shortened() {
        assert_eq!(shortened(512, 59.9, 60.0), 512);
        assert_eq!(shortened(512, 120.0, 60.0), 256);
        assert_eq!(shortened(512, f64::INFINITY, 60.0), 0);
        assert_eq!((Effort::FULL.context(), Effort::FULL.middle()), (512, 73));
    }
}
