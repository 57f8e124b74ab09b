//! Measures fixed times per layer and per token with the bundled model, whose weights fit the CPU
//! caches.

use super::Measured;
use super::memory::Memory;
use crate::bundled;
use crate::session::Session;
use anyhow::Result;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tier_plan_runtime::formats::placement::TierIdx;
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::kv::CacheRoom;
use tier_plan_runtime::model::shape::DenseKind;
use tier_plan_runtime::model::{describe, shape::shape_of};
use tier_plan_runtime::plans::budget::within;
use tier_plan_runtime::plans::in_memory::all_in_memory;
use tier_plan_runtime::quant::TensorType;
use tier_plan_runtime::threads::ThreadPool;
use tier_plan_runtime::tiers::limits::memory_limit;
use tier_plan_runtime::{KvType, LogitsMode};

/// Tokens decoded per repetition.
const TOKENS: u32 = 160;

/// Repetitions. The fastest counts, because a fixed time is one that nothing can shorten.
const REPEATS: usize = 5;

/// Assumed parallel loops per layer and per token where they are not measured.
const ASSUMED_LAYER_LOOPS: f64 = 10.0;
const ASSUMED_TOKEN_LOOPS: f64 = 6.0;

/// Bytes that fit the caches of the cores.
const CACHED_BYTES: usize = 8 << 20;

/// Fixed times of the machine.
#[derive(Debug, Clone, PartialEq)]
pub struct Fixed {
    /// Time per layer, in microseconds.
    pub layer_us: f64,
    /// Time per token outside its layers, in microseconds.
    pub token_us: f64,
    /// Time for all threads to enter one parallel loop, in microseconds.
    pub entry_us: f64,
    /// Human-readable description of the method.
    pub how: String,
}

impl Fixed {
    /// Counts parallel loops of `entry_us` microseconds each for a layer and a token.
    pub fn assumed(entry_us: f64) -> Self {
        let (layer, token) = (ASSUMED_LAYER_LOOPS, ASSUMED_TOKEN_LOOPS);
        Self {
            layer_us: layer * entry_us,
            token_us: token * entry_us,
            entry_us,
            how: format!(
                "{layer} and {token} loops of all threads were counted for a layer and a token, of {entry_us:.1} µs each"
            ),
        }
    }
}

/// Measures fixed times.
///
/// The bundled model decodes from the caches. The overhead is its time less its bytes at the
/// kernels' cached rate: per layer by the layers' own clocks, and per token for the rest.
///
/// # Errors
/// When the bundled model is damaged.
pub fn measure(pool: &ThreadPool, memory: &mut Memory) -> Result<Fixed> {
    let entry_us = memory.entry_us(pool);
    let Ok(path) = bundled::path("demo/demo.gguf") else {
        let assumed = Fixed::assumed(entry_us);
        return Ok(Fixed {
            how: format!("the bundled model was not found, so {}", assumed.how),
            ..assumed
        });
    };
    let cached_gbps = memory.cached_gbps(pool, TensorType::Q4_K, CACHED_BYTES);
    let gguf = Gguf::open(&path)?;
    let spec = describe(&gguf)?;
    let shape = shape_of(&gguf, &spec);
    let plan = all_in_memory(&shape, TOKENS + 1, KvType::F16);
    let mut session = Session::load(Arc::new(gguf), &plan, Some(pool.n_threads()))?;
    let engine = &mut session.engine;
    let (mut layer_us, mut token_us) = (f64::INFINITY, f64::INFINITY);
    let head: u64 = shape
        .dense
        .iter()
        .filter(|d| d.kind == DenseKind::Head)
        .map(|d| d.token_bytes)
        .sum();
    let layers = shape.token_bytes().saturating_sub(head);
    let read_us = |bytes: u64| bytes as f64 / cached_gbps.max(1e-9) / 1e3;
    let n_vocab = shape.n_vocab.max(1);
    for repeat in 0..=REPEATS {
        engine.clear();
        engine.forward(&[0], LogitsMode::Last)?;
        engine.reset_counters();
        for token in 0..TOKENS {
            // The tokens are spread over the vocabulary, so that routing is too.
            engine.forward(
                &[token.wrapping_mul(2_654_435_761) % n_vocab],
                LogitsMode::Last,
            )?;
        }
        if repeat == 0 {
            continue;
        }
        let counters = engine.counters();
        let each = |time: std::time::Duration| time.as_secs_f64() * 1e6 / f64::from(TOKENS);
        let in_layers = each(counters.layers.iter().map(|l| l.dense + l.experts).sum());
        layer_us = layer_us.min((in_layers - read_us(layers)) / f64::from(shape.n_layer.max(1)));
        token_us = token_us.min(each(counters.decode) - in_layers - read_us(head));
    }
    let how = format!(
        "decoding with the bundled model, less its bytes at {cached_gbps:.0} GB/s from the caches ({entry_us:.1} µs for \
         each loop of all threads)"
    );
    Ok(Fixed {
        layer_us: layer_us.max(entry_us),
        token_us: token_us.max(entry_us),
        entry_us,
        how,
    })
}

/// Rounds decoded with the user's model: the minimum, and the maximum where time is left.
const MIN_ROUNDS: usize = 3;
const MAX_ROUNDS: usize = 12;

/// Tokens per round, and the most bytes of experts that a round may use. That much memory makes TLB
/// misses as frequent as in a real run, and a drive reads it in a few seconds.
const MAX_ROUND_TOKENS: u64 = 8;
const MAX_ROUND_BYTES: u64 = 4 << 30;

/// Rates of the layers of the user's model, with its experts in memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OwnLayers {
    /// Bytes of the chosen experts per time of the expert stages, in 10⁹ bytes per second.
    pub expert_gbps: Measured,
    /// Time of a layer's dense stage less its bytes at that rate, in microseconds.
    pub layer_us: f64,
}

/// Decodes a few tokens repeatedly for about `time`, so that their experts stay in memory, and times
/// the layers.
///
/// # Errors
/// When the model does not fit memory or cannot be read.
pub fn own_layers(path: &Path, threads: usize, time: Duration) -> Result<OwnLayers> {
    let gguf = Gguf::open(path)?;
    let spec = describe(&gguf)?;
    let shape = shape_of(&gguf, &spec);
    let budget = memory_limit().map_or(u64::MAX >> 8, |limit| limit.bytes);
    let mut plan = within(
        &gguf,
        &spec,
        &shape,
        CacheRoom::of_one(2),
        KvType::F16,
        budget,
    )?
    .plan;
    // Slots must hold the experts of a whole round. Then nothing is read beside the timed stages
    // after the first round.
    let experts: u64 = shape
        .experts
        .iter()
        .map(|e| e.expert_bytes * u64::from(e.n_used))
        .sum();
    let fitting = plan
        .layers
        .iter()
        .zip(&shape.experts)
        .map(|(l, e)| match l.slots {
            // All experts are pinned or mapped.
            0 => MAX_ROUND_TOKENS,
            // The experts of the previous token still occupy their slots.
            slots => u64::from(slots / e.n_used.max(1)).saturating_sub(1),
        });
    let round = fitting
        .min()
        .unwrap_or(1)
        .min(MAX_ROUND_TOKENS)
        .min(MAX_ROUND_BYTES / experts.max(1))
        .max(1);
    plan.tiers[TierIdx::FIRST].bytes.slots = 0;
    for (layer, experts) in plan.layers.iter_mut().zip(&shape.experts) {
        layer.slots = layer.slots.min((round as u32 + 1) * experts.n_used);
    }
    plan.fill_sums(&shape);
    let mut session = Session::load(Arc::new(gguf), &plan, Some(threads))?;
    let engine = &mut session.engine;
    let n_vocab = u64::from(shape.n_vocab.max(1));
    let (mut dense_us, mut gbps) = (Vec::new(), Vec::new());
    let mut start = Instant::now();
    for done in 0..=MAX_ROUNDS {
        if done > MIN_ROUNDS && start.elapsed() > time {
            break;
        }
        for token in 0..round {
            // The counters treat the first token of a text as a prompt.
            engine.clear();
            engine.forward(&[0], LogitsMode::Last)?;
            engine.reset_counters();
            engine.forward(
                &[(token.wrapping_mul(2_654_435_761) % n_vocab) as u32],
                LogitsMode::Last,
            )?;
            let layers = &engine.counters().layers;
            let dense: Duration = layers.iter().map(|l| l.dense).sum();
            dense_us.push(dense.as_secs_f64() * 1e6);
            let stages: Duration = layers.iter().map(|l| l.experts).sum();
            gbps.push(experts as f64 / stages.as_secs_f64().max(1e-9) / 1e9);
        }
        if done == 0 {
            // The first round waits for the drive.
            dense_us.clear();
            gbps.clear();
            start = Instant::now();
        }
    }
    let in_layers = |layer: Option<u32>| shape.experts.iter().any(|e| Some(e.layer) == layer);
    let dense = shape.dense.iter().filter(|d| in_layers(d.layer));
    let bytes: u64 = dense.map(|d| d.token_bytes).sum();
    let layers = shape.experts.len().max(1) as f64;
    let expert_gbps = Measured::of_many(&gbps);
    let dense_us = Measured::of(dense_us).value - bytes as f64 / expert_gbps.value.max(1e-9) / 1e3;
    Ok(OwnLayers {
        expert_gbps,
        layer_us: dense_us / layers,
    })
}
