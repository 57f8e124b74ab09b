//! One text: prompt and decode speed, where the time goes, and how near it is to main memory's rate.

use super::{BenchArgs, conditions_json, greedy, median, prompt};
use crate::conditions::{Watch, busy_line, evidence_of, prediction_line};
use crate::printable::printable;
use crate::session::Session;
use anyhow::Result;
use serde_json::json;
use tier_plan_runtime::LogitsMode;
use tier_plan_runtime::formats::placement::Prediction;
use tier_plan_runtime::formats::record::{Conditions, RunRecord};
use tier_plan_runtime::threads::ThreadPool;
use tier_plan_runtime::tiers::bandwidth::dram_read_gbps;
use tier_plan_runtime::tiers::limits::memory_left;
use tier_plan_runtime::tiers::nodes::Pages;
use tier_plan_runtime::units::show_bytes;

/// Times and counters of one repetition.
struct Sample {
    prompt_s: f64,
    /// Seconds of the prompt's dense stages and of its routed experts.
    prompt_stages_s: [f64; 2],
    /// Bytes read from the last tier for the prompt.
    prompt_missed_bytes: u64,
    decode_s: f64,
    decode_bytes: u64,
    /// Bytes read from the last tier while decoding.
    missed_bytes: u64,
    /// Prefetched experts: used, used and read in time, not used.
    ahead: [u64; 3],
    /// Experts of main memory that a GPU computed for decoded tokens.
    streamed: u64,
    /// Share of expert accesses while decoding that hit a resident expert; `None` without experts.
    hit_rate: Option<f64>,
}

/// Measures one text, and prints what was measured.
///
/// # Errors
/// When a pass fails.
pub(super) fn run(args: &BenchArgs, session: &mut Session) -> Result<()> {
    let prompt = prompt(session.engine.spec().n_vocab, 0, args.n_prompt);
    let mut samples = Vec::new();
    // The first repetition is the warm-up.
    repeat(
        session,
        &prompt,
        args.n_gen,
        &mut Watch::begin(&session.engine),
    )?;
    let mut watch = Watch::begin(&session.engine);
    for _ in 0..args.repeat {
        samples.push(repeat(session, &prompt, args.n_gen, &mut watch)?);
    }
    let given = watch.end(&session.engine);
    session.keep()?;
    let (plan, shape) = (session.engine.plan(), session.engine.shape());
    let predicted = predicted(args, session);
    let conditions = given.conditions(plan, shape, predicted.as_ref(), || {
        evidence_of(plan, args.model.path().ok()?, shape)
    });
    report(args, session, &samples, conditions.as_ref())
}

/// Returns what the plan predicts for the middle of the decoded tokens.
fn predicted(args: &BenchArgs, session: &Session) -> Option<Prediction> {
    let (plan, shape) = (session.engine.plan(), session.engine.shape());
    let at = args.n_prompt.max(1).saturating_add(args.n_gen.div_ceil(2));
    (plan.predicted.decode_tok_s > 0.0 && args.n_gen > 0).then(|| plan.predicted_at(shape, at))
}

fn repeat(session: &mut Session, prompt: &[u32], tokens: u32, watch: &mut Watch) -> Result<Sample> {
    let engine = &mut session.engine;
    engine.clear();
    engine.reset_counters();
    let started = std::time::Instant::now();
    let mut next = match prompt {
        [] => greedy(engine.forward(&[0], LogitsMode::Last)?),
        prompt => greedy(engine.forward(prompt, LogitsMode::Last)?),
    };
    let prompt_s = started.elapsed().as_secs_f64();
    let prompt_missed_bytes = engine.counters().prompt_missed_bytes;
    let prompt_stages_s = engine
        .counters()
        .prompt_stages
        .map(|stage| stage.as_secs_f64());
    engine.reset_counters();
    for _ in 0..tokens {
        next = greedy(engine.forward(&[next], LogitsMode::Last)?);
        watch.between_tokens(engine);
    }
    watch.count_reads(engine);
    let counters = engine.counters();
    let misses: u64 = counters.layers.iter().map(|l| l.misses).sum();
    let accesses: u64 = counters
        .layers
        .iter()
        .map(|l| l.pinned_hits + l.slot_hits + l.misses)
        .sum();
    Ok(Sample {
        prompt_s,
        prompt_missed_bytes,
        prompt_stages_s,
        decode_s: counters.decode.as_secs_f64(),
        decode_bytes: counters.read_bytes.iter().sum(),
        ahead: [
            counters.prefetch.useful,
            counters.prefetch.in_time,
            counters.prefetch.wasted,
        ],
        missed_bytes: if misses > 0 {
            counters.read_bytes.last().copied().unwrap_or(0)
        } else {
            0
        },
        streamed: counters.layers.iter().map(|l| l.streamed).sum(),
        hit_rate: (accesses > 0).then(|| 1.0 - misses as f64 / accesses as f64),
    })
}

/// Bytes read to measure the bandwidth of main memory, if that many are free.
const PROBE_BYTES: u64 = 1 << 30;

/// Fewest bytes that tell main memory from caches.
const MIN_PROBE_BYTES: u64 = 256 << 20;

/// Measures the read bandwidth of main memory in GB/s; `None` if a plan or the system leaves no
/// memory for the measurement.
fn dram_gbps(session: &Session) -> Option<f64> {
    if session.engine.plan().solver.status != "obvious" {
        return None;
    }
    // A fourth stays free for whatever else is in a container.
    let left = memory_left().map_or(PROBE_BYTES, |left| left - left / 4);
    let bytes = PROBE_BYTES.min(left) >> 20 << 20;
    if bytes < MIN_PROBE_BYTES {
        eprintln!(
            "warning: memory bandwidth not measured: {} may be used for it, expected {} or more",
            show_bytes(bytes),
            show_bytes(MIN_PROBE_BYTES)
        );
        return None;
    }
    let engine = &session.engine;
    let measured = match &session.shards {
        Some(shards) => {
            let pool = shards.pool(Some(engine.n_threads()));
            dram_read_gbps(&pool, engine.kernels(), bytes, &shards.pages())
        }
        None => {
            let pool = ThreadPool::new(engine.n_threads());
            dram_read_gbps(&pool, engine.kernels(), bytes, &Pages::Anywhere)
        }
    };
    measured
        .map_err(|error| eprintln!("warning: memory bandwidth not measured: {error}"))
        .ok()
}

fn report(
    args: &BenchArgs,
    session: &Session,
    samples: &[Sample],
    conditions: Option<&Conditions>,
) -> Result<()> {
    let rates = |seconds: fn(&Sample) -> f64, n: u32| -> Vec<f64> {
        samples
            .iter()
            .map(|s| {
                if n > 0 {
                    f64::from(n) / seconds(s)
                } else {
                    0.0
                }
            })
            .collect()
    };
    let prompt = rates(|s| s.prompt_s, args.n_prompt);
    let decode = rates(|s| s.decode_s, args.n_gen);
    let gbps: Vec<f64> = samples
        .iter()
        .map(|s| {
            if args.n_gen > 0 {
                s.decode_bytes as f64 / s.decode_s / 1e9
            } else {
                0.0
            }
        })
        .collect();
    let per_token = |s: &Sample| s.missed_bytes as f64 / f64::from(args.n_gen.max(1)) / 1e6;
    let prompt_missed: Vec<f64> = samples
        .iter()
        .map(|s| s.prompt_missed_bytes as f64 / 1e6)
        .collect();
    let prompt_gbps: Vec<f64> = samples
        .iter()
        .map(|s| s.prompt_missed_bytes as f64 / s.prompt_s / 1e9)
        .collect();
    let stages = [0, 1].map(|stage| {
        samples
            .iter()
            .map(|s| s.prompt_stages_s[stage])
            .collect::<Vec<f64>>()
    });
    let missed: Vec<f64> = samples.iter().map(per_token).collect();
    let streamed: Vec<f64> = samples
        .iter()
        .map(|s| s.streamed as f64 / f64::from(args.n_gen.max(1)))
        .collect();
    let streamed = Some(median(&streamed)).filter(|n| *n > 0.0);
    let hit_rate: Vec<f64> = samples.iter().filter_map(|s| s.hit_rate).collect();
    let plan = session.engine.plan();
    let emulated = plan.tiers.iter().any(|t| t.tier.emulated);
    let dram = dram_gbps(session);
    if args.format.json {
        let mut value = json!({
            "model": plan.model.name,
            "plan": plan.name,
            "emulated": emulated,
            "threads": session.engine.n_threads(),
            "isa": session.engine.kernels().isa().to_string(),
            "kv_type": plan.kv_type.name(),
            "prompt_tokens": args.n_prompt,
            "decode_tokens": args.n_gen,
            "prompt_tok_s": median(&prompt),
            "prompt_dense_s": median(&stages[0]),
            "prompt_experts_s": median(&stages[1]),
            "decode_tok_s": median(&decode),
            "decode_gbps": median(&gbps),
            "dram_read_gbps": dram,
            "decode_share_of_dram_read": dram.map(|dram| median(&gbps) / dram),
            "prompt_missed_mb": median(&prompt_missed),
            "missed_mb_per_token": median(&missed),
            "hit_rate": (!hit_rate.is_empty()).then(|| median(&hit_rate)),
            "predicted_decode_tok_s": (plan.predicted.decode_tok_s > 0.0).then_some(plan.predicted.decode_tok_s),
            "runs": { "prompt_tok_s": prompt, "decode_tok_s": decode, "decode_gbps": gbps },
        });
        if let Some(streamed) = streamed {
            value["streamed_per_token"] = json!(streamed);
        }
        if let Some(shards) = &session.shards {
            let reads = session.engine.node_reads();
            value["numa"] = json!({
                "nodes": shards.n_nodes(),
                "emulated": shards.is_emulated(),
                "share_in_place": shards.share_at_home(),
                "read_bytes": reads.bytes,
                "remote_bytes": reads.remote_bytes,
            });
        }
        if let Some(conditions) = conditions {
            value["conditions"] = conditions_json(conditions)?;
        }
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    let note = if emulated { ", emulated tiers" } else { "" };
    println!(
        "{} · plan {} · {} threads · {} · keys and values {}{note}",
        printable(&plan.model.name),
        printable(&plan.name),
        session.engine.n_threads(),
        session.engine.kernels().isa(),
        plan.kv_type
    );
    session.notes().iter().for_each(|note| println!("{note}"));
    println!("{:<14} {:>10} {:>10} {:>10}", "", "median", "min", "max");
    for (name, values) in [
        ("prompt tok/s", &prompt),
        ("decode tok/s", &decode),
        ("decode GB/s", &gbps),
    ] {
        let (min, max) = values
            .iter()
            .fold((f64::MAX, 0f64), |(a, b), v| (a.min(*v), b.max(*v)));
        println!(
            "{name:<14} {:>10.2} {min:>10.2} {max:>10.2}",
            median(values)
        );
    }
    if args.n_prompt > 1 {
        let [dense, experts] = [&stages[0], &stages[1]].map(|stage| 1e3 * median(stage));
        println!("prompt: {dense:.0} ms in dense stages, {experts:.0} ms in routed experts");
    }
    if let Some(dram) = dram {
        let share = 100.0 * median(&gbps) / dram;
        println!(
            "main memory read alone, same threads: {dram:.1} GB/s; decode reads at {share:.0} % of that"
        );
    }
    if prompt_missed.iter().chain(&missed).any(|mb| *mb > 0.0) {
        println!(
            "missed {:.0} MB for the prompt, {:.2} GB/s; {:.1} MB per decoded token, {:.2} GB/s{note}; {:.1} % of a \
             decoded token's experts were resident",
            median(&prompt_missed),
            median(&prompt_gbps),
            median(&missed),
            median(&missed) * median(&decode) / 1e3,
            median(&hit_rate) * 100.0
        );
    }
    if let Some(streamed) = streamed {
        println!("{streamed:.1} experts of main memory per decoded token were streamed to a GPU");
    }
    print_prefetches(samples);
    if let Some(line) = session.numa_line() {
        println!("{line}");
    }
    print_conditions(args, session, median(&decode), conditions);
    Ok(())
}

/// Prints the predictions as planned and with the rates of the benchmark, where those differ.
fn print_conditions(
    args: &BenchArgs,
    session: &Session,
    decode_tok_s: f64,
    conditions: Option<&Conditions>,
) {
    let emulated = session.engine.plan().tiers.iter().any(|t| t.tier.emulated);
    let note = if emulated { " on emulated tiers" } else { "" };
    let now = conditions.and_then(|c| c.predicted.as_ref());
    match predicted(args, session).filter(|_| now.is_some()) {
        Some(planned) => {
            let planned = planned.decode_tok_s;
            println!(
                "{}",
                prediction_line(planned, decode_tok_s, note, conditions)
            );
        }
        None => {
            let record = RunRecord {
                emulated,
                conditions: conditions.cloned(),
                ..RunRecord::default()
            };
            busy_line([&record].into_iter())
                .into_iter()
                .for_each(|line| println!("{line}"));
        }
    }
}

/// Prints how many prefetched experts were used.
fn print_prefetches(samples: &[Sample]) {
    let ahead = samples.iter().fold([0; 3], |a, s| {
        [a[0] + s.ahead[0], a[1] + s.ahead[1], a[2] + s.ahead[2]]
    });
    if ahead[0] + ahead[2] > 0 {
        let [right, in_time, wrong] = ahead;
        println!(
            "prefetched while decoding: {right} experts that were used ({in_time} in time), {wrong} that were not"
        );
    }
}
