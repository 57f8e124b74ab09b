//! What a token costs beyond its bytes, measured on the bundled model, which fits the processor's caches.

use super::Measured;
use super::memory::Memory;
use crate::bundled;
use crate::session::Session;
use anyhow::Result;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::shape::DenseKind;
use tier_plan_runtime::model::{describe, shape::shape_of};
use tier_plan_runtime::plans::budget::within;
use tier_plan_runtime::plans::in_memory::obvious;
use tier_plan_runtime::quant::TensorType;
use tier_plan_runtime::threads::ThreadPool;
use tier_plan_runtime::tiers::limits::memory_limit;
use tier_plan_runtime::{KvType, Wanted};

/// Tokens decoded for one figure.
const TOKENS: u32 = 160;

/// Repetitions, of which the fastest counts: what is fixed is what nothing can shorten.
const REPEATS: usize = 5;

/// Where the bundled model is not at hand: loops of all threads in a layer, and outside layers.
const ENTRIES: (f64, f64) = (10.0, 6.0);

/// Bytes that fit the caches of the cores.
const CACHED: usize = 8 << 20;

/// Fixed times.
#[derive(Debug, Clone, PartialEq)]
pub struct Fixed {
    /// Of a layer, in microseconds.
    pub layer_us: f64,
    /// Of a token beyond its layers, in microseconds.
    pub token_us: f64,
    /// One entry of all threads into a loop, in microseconds.
    pub entry_us: f64,
    /// How they were found, in words.
    pub how: String,
}

/// Measures them.
///
/// The bundled model decodes from the caches; what its tokens take beyond its bytes at the kernels' rate there is the
/// overhead: of the layers by their own clocks, and of the rest.
///
/// # Errors
/// When the bundled model is damaged.
pub fn measure(pool: &ThreadPool, memory: &mut Memory) -> Result<Fixed> {
    let entry_us = memory.entry_us(pool);
    let Ok(path) = bundled::path("demo/demo.gguf") else {
        let (layer, token) = ENTRIES;
        let how = format!(
            "the bundled model was not found, so {layer} and {token} loops of all threads were counted for a layer and a \
             token, of {entry_us:.1} µs each"
        );
        return Ok(Fixed { layer_us: layer * entry_us, token_us: token * entry_us, entry_us, how });
    };
    let cached_gbps = memory.cached_gbps(pool, TensorType::Q4_K, CACHED);
    let gguf = Gguf::open(&path)?;
    let spec = describe(&gguf)?;
    let shape = shape_of(&gguf, &spec);
    let plan = obvious(&shape, TOKENS + 1, KvType::F16);
    let mut session = Session::load(Arc::new(gguf), &plan, Some(pool.n_threads()))?;
    let engine = &mut session.engine;
    let (mut layer_us, mut token_us) = (f64::INFINITY, f64::INFINITY);
    let head: u64 = shape.dense.iter().filter(|d| d.kind == DenseKind::Head).map(|d| d.token_bytes).sum();
    let layers = shape.token_bytes().saturating_sub(head);
    let read_us = |bytes: u64| bytes as f64 / cached_gbps.max(1e-9) / 1e3;
    let n_vocab = shape.n_vocab.max(1);
    for repeat in 0..=REPEATS {
        engine.clear();
        engine.forward(&[0], Wanted::Last)?;
        engine.reset_counters();
        for token in 0..TOKENS {
            // Any token does; these are spread over the vocabulary, so that routing is too.
            engine.forward(&[token.wrapping_mul(2_654_435_761) % n_vocab], Wanted::Last)?;
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
    Ok(Fixed { layer_us: layer_us.max(entry_us), token_us: token_us.max(entry_us), entry_us, how })
}

/// Rounds decoded with a model of the user's, and seconds that they may take.
const ROUNDS: (usize, usize) = (3, 12);
const MODEL_TIME: Duration = Duration::from_secs(5);

/// Tokens of a round, and bytes of experts that they may choose: as much memory as makes pages as hard to find as in a
/// real run, and no more than a drive reads in a few seconds.
const ROUND: u64 = 8;
const ROUND_BYTES: u64 = 4 << 30;

/// What the layers of a model that is at hand take, its experts in memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OwnLayers {
    /// Bytes of the chosen experts over the time of the expert stages, in 10⁹ bytes a second.
    pub expert_gbps: Measured,
    /// What a layer's dense stage takes beyond its bytes at that rate, in microseconds.
    pub layer_us: f64,
}

/// Decodes a few tokens over and over, so that their experts stay in memory.
///
/// # Errors
/// When it does not fit memory, or can't be read.
pub fn own_layers(path: &Path, threads: usize) -> Result<OwnLayers> {
    let gguf = Gguf::open(path)?;
    let spec = describe(&gguf)?;
    let shape = shape_of(&gguf, &spec);
    let budget = memory_limit().map_or(u64::MAX >> 8, |limit| limit.bytes);
    let mut plan = within(&gguf, &spec, &shape, 2, KvType::F16, budget)?.plan;
    // Room for the experts of a round, which come again and again: after the first time nothing is read beside the stages
    // that are timed.
    let experts: u64 = shape.experts.iter().map(|e| e.expert_bytes * u64::from(e.n_used)).sum();
    let fitting = plan.layers.iter().zip(&shape.experts).map(|(l, e)| match l.slots {
        // All experts are pinned, or mapped.
        0 => ROUND,
        // Beside those of the token before them all.
        slots => u64::from(slots / e.n_used.max(1)).saturating_sub(1),
    });
    let round = fitting.min().unwrap_or(1).min(ROUND).min(ROUND_BYTES / experts.max(1)).max(1);
    for (layer, experts) in plan.layers.iter_mut().zip(&shape.experts) {
        layer.slots = layer.slots.min((round as u32 + 1) * experts.n_used);
    }
    plan.fill_sums(&shape);
    let mut session = Session::load(Arc::new(gguf), &plan, Some(threads))?;
    let engine = &mut session.engine;
    let n_vocab = u64::from(shape.n_vocab.max(1));
    let (mut dense_us, mut gbps) = (Vec::new(), Vec::new());
    let mut start = Instant::now();
    for done in 0..=ROUNDS.1 {
        if done > ROUNDS.0 && start.elapsed() > MODEL_TIME {
            break;
        }
        for token in 0..round {
            // The first token of a text is a prompt to the counters.
            engine.clear();
            engine.forward(&[0], Wanted::Last)?;
            engine.reset_counters();
            engine.forward(&[(token.wrapping_mul(2_654_435_761) % n_vocab) as u32], Wanted::Last)?;
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
    Ok(OwnLayers { expert_gbps, layer_us: dense_us / layers })
}
