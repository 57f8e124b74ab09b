//! `tier-plan bench`: prompt and decode speed, repeated.

use crate::cli::BenchArgs;
use crate::session::{self, Opening, Session};
use anyhow::{Context, Result, ensure};
use serde_json::json;
use tier_plan_runtime::LogitsMode;
use tier_plan_runtime::threads::ThreadPool;
use tier_plan_runtime::tiers::bandwidth::dram_read_gbps;

/// One repetition.
struct Sample {
    prompt_s: f64,
    /// Of that, the dense stages and the routed experts.
    prompt_stages_s: [f64; 2],
    /// Brought in from the last tier for the prompt.
    prompt_missed_bytes: u64,
    decode_s: f64,
    decode_bytes: u64,
    /// Brought in from the last tier while decoding.
    missed_bytes: u64,
    /// Experts read before their layer chose: used, of those in time, and not used.
    ahead: [u64; 3],
    /// Share of expert accesses while decoding that found the expert at hand; `None` without experts.
    hit_rate: Option<f64>,
}

/// Runs it.
pub fn run(args: &BenchArgs) -> Result<()> {
    ensure!(args.repeat > 0, "--repeat 0 measures nothing; give 1 or more");
    ensure!(args.prompt > 0 || args.tokens > 0, "--prompt 0 and --tokens 0 leave nothing to measure");
    // One token more than asked: a decode needs something before it.
    let needed = args.prompt.max(1).checked_add(args.tokens);
    let needed = needed.context("--prompt and --tokens are more together than can be counted; give fewer")?;
    let context = args.plan.is_none().then_some(needed);
    let mut session = Session::open(
        &args.model,
        Opening {
            plan: args.plan.as_deref(),
            dram: session::dram(args.dram.as_deref())?,
            profile: args.profile.as_deref(),
            context,
            threads: args.threads,
            mapped: args.mmap,
            numa: args.numa,
            kv_type: args.kv_type,
            verify: args.store.verify.asked(),
            pack: args.store.pack.as_deref(),
            slots: args.store.slots.as_deref(),
            warm: args.store.warm.as_deref(),
        },
    )?;
    let planned = session.engine.plan().context;
    ensure!(
        needed <= planned,
        "--prompt {} and --tokens {} do not fit the context of {planned} tokens that the plan was made for; give fewer, \
         or solve again with --context {needed}",
        args.prompt,
        args.tokens
    );
    let n_vocab = session.engine.spec().n_vocab as u64;
    // Any tokens do for timing; these are spread over the vocabulary so that routing is too.
    let token = |i: u64| (i.wrapping_mul(2_654_435_761) % n_vocab) as u32;
    let prompt: Vec<u32> = (0..u64::from(args.prompt)).map(token).collect();
    let mut samples = Vec::new();
    // The first repetition only warms up.
    for repetition in 0..=args.repeat {
        let sample = repeat(&mut session, &prompt, args.tokens)?;
        if repetition > 0 {
            samples.push(sample);
        }
    }
    session.keep()?;
    report(args, &session, &samples)
}

fn repeat(session: &mut Session, prompt: &[u32], tokens: u32) -> Result<Sample> {
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
    let prompt_stages_s = engine.counters().prompt_stages.map(|stage| stage.as_secs_f64());
    engine.reset_counters();
    for _ in 0..tokens {
        next = greedy(engine.forward(&[next], LogitsMode::Last)?);
    }
    let counters = engine.counters();
    let misses: u64 = counters.layers.iter().map(|l| l.misses).sum();
    let accesses: u64 = counters.layers.iter().map(|l| l.pinned_hits + l.slot_hits + l.misses).sum();
    Ok(Sample {
        prompt_s,
        prompt_missed_bytes,
        prompt_stages_s,
        decode_s: counters.decode.as_secs_f64(),
        decode_bytes: counters.read_bytes.iter().sum(),
        ahead: [counters.prefetch.useful, counters.prefetch.in_time, counters.prefetch.wasted],
        missed_bytes: if misses > 0 { counters.read_bytes.last().copied().unwrap_or(0) } else { 0 },
        hit_rate: (accesses > 0).then(|| 1.0 - misses as f64 / accesses as f64),
    })
}

fn greedy(logits: &[f32]) -> u32 {
    let best = logits.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1).then(b.0.cmp(&a.0)));
    best.map_or(0, |(i, _)| i as u32)
}

/// Memory that is read to learn its rate.
const PROBE_BYTES: u64 = 1 << 30;

/// What main memory gives when it is only read, in GB/s; `None` where a plan leaves no memory for the measurement.
fn dram_gbps(session: &Session) -> Option<f64> {
    let obvious = session.engine.plan().solver.status == "obvious";
    let pool = ThreadPool::new(session.engine.n_threads());
    let measured = obvious.then(|| dram_read_gbps(&pool, session.engine.kernels(), PROBE_BYTES))?;
    measured.map_err(|error| eprintln!("warning: the rate of main memory was not measured: {error}")).ok()
}

fn report(args: &BenchArgs, session: &Session, samples: &[Sample]) -> Result<()> {
    let rates = |seconds: fn(&Sample) -> f64, n: u32| -> Vec<f64> {
        samples.iter().map(|s| if n > 0 { f64::from(n) / seconds(s) } else { 0.0 }).collect()
    };
    let prompt = rates(|s| s.prompt_s, args.prompt);
    let decode = rates(|s| s.decode_s, args.tokens);
    let gbps: Vec<f64> =
        samples.iter().map(|s| if args.tokens > 0 { s.decode_bytes as f64 / s.decode_s / 1e9 } else { 0.0 }).collect();
    let per_token = |s: &Sample| s.missed_bytes as f64 / f64::from(args.tokens.max(1)) / 1e6;
    let prompt_missed: Vec<f64> = samples.iter().map(|s| s.prompt_missed_bytes as f64 / 1e6).collect();
    let prompt_gbps: Vec<f64> = samples.iter().map(|s| s.prompt_missed_bytes as f64 / s.prompt_s / 1e9).collect();
    let stages = [0, 1].map(|stage| samples.iter().map(|s| s.prompt_stages_s[stage]).collect::<Vec<f64>>());
    let missed: Vec<f64> = samples.iter().map(per_token).collect();
    let hit_rate: Vec<f64> = samples.iter().filter_map(|s| s.hit_rate).collect();
    let plan = session.engine.plan();
    let emulated = plan.tiers.iter().any(|t| t.tier.emulated);
    let dram = dram_gbps(session);
    if args.json {
        let value = json!({
            "model": plan.model.name,
            "plan": plan.name,
            "emulated": emulated,
            "threads": session.engine.n_threads(),
            "isa": session.engine.kernels().isa().to_string(),
            "kv_type": plan.kv_type.name(),
            "prompt_tokens": args.prompt,
            "decode_tokens": args.tokens,
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
        println!("{}", serde_json::to_string_pretty(&value)?);
        return Ok(());
    }
    let note = if emulated { ", emulated tiers" } else { "" };
    println!(
        "{} · plan {} · {} threads · {} · keys and values {}{note}",
        plan.model.name,
        plan.name,
        session.engine.n_threads(),
        session.engine.kernels().isa(),
        plan.kv_type
    );
    session.notes().iter().for_each(|note| println!("{note}"));
    println!("{:<14} {:>10} {:>10} {:>10}", "", "median", "min", "max");
    for (name, values) in [("prompt tok/s", &prompt), ("decode tok/s", &decode), ("decode GB/s", &gbps)] {
        let (min, max) = values.iter().fold((f64::MAX, 0f64), |(a, b), v| (a.min(*v), b.max(*v)));
        println!("{name:<14} {:>10.2} {min:>10.2} {max:>10.2}", median(values));
    }
    if args.prompt > 1 {
        let [dense, experts] = [&stages[0], &stages[1]].map(|stage| 1e3 * median(stage));
        println!("prompt: {dense:.0} ms in dense stages, {experts:.0} ms in routed experts");
    }
    if let Some(dram) = dram {
        let share = 100.0 * median(&gbps) / dram;
        println!("main memory read alone, same threads: {dram:.1} GB/s; decode reads at {share:.0} % of that");
    }
    if prompt_missed.iter().chain(&missed).any(|mb| *mb > 0.0) {
        println!(
            "missed {:.0} MB for the prompt, {:.2} GB/s; {:.1} MB a decoded token, {:.2} GB/s{note}; {:.1} % of a decoded \
             token's experts were at hand",
            median(&prompt_missed),
            median(&prompt_gbps),
            median(&missed),
            median(&missed) * median(&decode) / 1e3,
            median(&hit_rate) * 100.0
        );
    }
    let ahead = samples.iter().fold([0; 3], |a, s| [a[0] + s.ahead[0], a[1] + s.ahead[1], a[2] + s.ahead[2]]);
    if ahead[0] + ahead[2] > 0 {
        let [right, in_time, wrong] = ahead;
        println!(
            "read ahead while decoding: {right} experts that were used ({in_time} in time), {wrong} that were not"
        );
    }
    Ok(())
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => 0.0,
        n if n % 2 == 1 => sorted[n / 2],
        n => (sorted[n / 2 - 1] + sorted[n / 2]) / 2.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }

    #[test]
    fn greedy_takes_the_first_of_equals() {
        assert_eq!(greedy(&[1.0, 5.0, 5.0]), 1);
    }
}
