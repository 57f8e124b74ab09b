//! Several texts at once: speed of all and of each, and the gap between two tokens of a text,
//! beside what was predicted.

use super::joining::{self, Joining};
use super::{BenchArgs, Count, greedy, median, prompt};
use crate::cmd::args::MaxStep;
use crate::conditions::{Given, Watch, describe, differs};
use crate::cost::steps::{Predictor, StepPrediction};
use crate::parallel::{Routing, choose};
use crate::printable::printable;
use crate::session::Session;
use crate::{host, progress};
use anyhow::Result;
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Instant, SystemTime};
use tier_plan_runtime::engine::generate::{Generated, Stop};
use tier_plan_runtime::engine::measure::{Circumstances, record};
use tier_plan_runtime::engine::{Rows, SequenceId};
use tier_plan_runtime::formats::record::{Conditions, ParallelPrediction, ParallelRecord};
use tier_plan_runtime::units::show_utc;
use tier_plan_runtime::{Engine, LogitsMode, RunError};

/// What one repetition measured.
struct Sample {
    prompt_s: f64,
    /// Seconds of each step: the gap between two tokens of every text.
    gaps_s: Vec<f64>,
    /// Distinct experts per layer and step; 0 without routed experts.
    distinct: f64,
}

/// Several texts with the next token of each.
struct Texts {
    ids: Vec<SequenceId>,
    next: Vec<u32>,
}

impl Texts {
    /// Takes one token of every text through the layers.
    fn step(&mut self, engine: &mut Engine) -> Result<(), RunError> {
        let n_vocab = engine.spec().n_vocab;
        let rows: Vec<Rows<'_>> = self
            .ids
            .iter()
            .zip(self.next.chunks(1))
            .map(|(&sequence, tokens)| Rows {
                sequence,
                tokens,
                logits: Some(LogitsMode::Last),
            })
            .collect();
        let logits = engine.step(&rows)?;
        self.next = logits.chunks(n_vocab).map(greedy).collect();
        Ok(())
    }
}

/// Takes the prompts of `texts` new texts through the layers, as many together as go through a
/// layer at once.
fn begin(engine: &mut Engine, prompts: &[Vec<u32>]) -> Result<Texts, RunError> {
    let n_vocab = engine.spec().n_vocab;
    let mut texts = Texts {
        ids: Vec::with_capacity(prompts.len()),
        next: Vec::with_capacity(prompts.len()),
    };
    for _ in prompts {
        texts.ids.push(engine.add_sequence()?);
    }
    let tokens = prompts.iter().map(Vec::len).max().unwrap_or(1);
    let together = (engine.batch() / tokens.max(1)).max(1);
    for (ids, prompts) in texts.ids.chunks(together).zip(prompts.chunks(together)) {
        let rows: Vec<Rows<'_>> = ids
            .iter()
            .zip(prompts)
            .map(|(&sequence, tokens)| Rows {
                sequence,
                tokens,
                logits: Some(LogitsMode::Last),
            })
            .collect();
        let logits = engine.step(&rows)?;
        texts.next.extend(logits.chunks(n_vocab).map(greedy));
    }
    Ok(texts)
}

fn repeat(
    engine: &mut Engine,
    texts: u32,
    args: &BenchArgs,
    watch: &mut Watch,
) -> Result<Sample, RunError> {
    let (n_prompt, n_gen) = (args.n_prompt, args.n_gen);
    let n_vocab = engine.spec().n_vocab;
    // Decoding needs at least one token before it.
    let prompts: Vec<Vec<u32>> = (0..texts)
        .map(|text| prompt(n_vocab, text, n_prompt.max(1)))
        .collect();
    let started = Instant::now();
    let mut texts = begin(engine, &prompts)?;
    let prompt_s = started.elapsed().as_secs_f64();
    engine.reset_counters();
    let mut gaps_s = Vec::with_capacity(n_gen as usize);
    for _ in 0..n_gen {
        let started = Instant::now();
        texts.step(engine)?;
        gaps_s.push(started.elapsed().as_secs_f64());
        watch.between_tokens(engine);
    }
    watch.count_reads(engine);
    let layers = &engine.counters().layers;
    let accesses: u64 = layers
        .iter()
        .map(|l| l.pinned_hits + l.slot_hits + l.misses)
        .sum();
    let stages = layers.len() as f64 * f64::from(n_gen);
    for id in texts.ids {
        engine.remove_sequence(id);
    }
    Ok(Sample {
        prompt_s,
        gaps_s,
        distinct: accesses as f64 / stages.max(1.0),
    })
}

/// Measures steps of each number of texts, and prints and records them beside the predictions.
///
/// # Errors
/// When a pass fails, or a file cannot be written.
pub(super) fn run(
    args: &BenchArgs,
    counts: &[Count],
    session: &mut Session,
    routing: Routing,
) -> Result<()> {
    let (counts, mut notes) = resolve(args, counts, session, &routing);
    let mut joined = Vec::new();
    let mut measured = Vec::with_capacity(counts.len());
    let mut conditions: Option<Conditions> = None;
    let repetitions = counts.len() as u64 * (u64::from(args.repeat) + 1);
    let bar = progress::count("measuring", repetitions);
    for &texts in &counts {
        let mut samples = Vec::new();
        // The first repetition is the warm-up.
        let mut watch = Watch::begin(&session.engine);
        for repetition in 0..=args.repeat {
            if repetition == 1 {
                watch = Watch::begin(&session.engine);
            }
            let sample = repeat(&mut session.engine, texts, args, &mut watch)?;
            if repetition > 0 {
                samples.push(sample);
            }
            bar.inc(1);
        }
        let given = watch.end(&session.engine);
        let mut steps = summary(
            args,
            texts,
            &samples,
            predict(args, session, &routing, texts),
        );
        steps.observed = observe(args, session, &routing, texts, &given);
        if steps.observed.is_some() || given.is_busy() {
            let now = given.with_prediction(session.engine.plan(), None);
            let share = |c: &Conditions| c.processors.share.unwrap_or(1.0);
            // Of several, the one with the least of the processors.
            conditions = match conditions {
                Some(before) if share(&before) <= share(&now) => Some(before),
                _ => Some(now),
            };
        }
        measured.push(steps);
        if let Some(step) = args.max_step_ms
            && texts > 1
        {
            let predictor = predictor(args, session, &routing);
            let longest = step.time(predictor.as_ref(), texts - 1);
            let cost = predictor.and_then(|p| p.step_cost(texts - 1));
            joined.push(joining::measure(
                &mut session.engine,
                args,
                texts,
                (longest, cost),
            )?);
        }
    }
    bar.finish_and_clear();
    session.keep()?;
    if let Some(path) = &args.record {
        write_record(session, &measured, conditions.clone(), path)?;
    }
    if let Routing::Unknown(Some(why)) = routing {
        notes.push(why);
    }
    if args.format.json {
        let mut value = as_json(args, session, &measured, &notes);
        value["joining"] = joined.iter().map(Joining::as_json).collect();
        if let Some(conditions) = &conditions {
            value["conditions"] = super::conditions_json(conditions)?;
        }
        println!("{}", serde_json::to_string_pretty(&value)?);
    } else {
        print(session, &measured);
        print_observed(&measured, conditions.as_ref());
        joined.iter().for_each(|joining| println!("{joining}"));
        notes.iter().for_each(|note| println!("note: {note}"));
    }
    Ok(())
}

/// Returns the numbers of texts to measure, ascending, and how one of them was chosen.
fn resolve(
    args: &BenchArgs,
    counts: &[Count],
    session: &Session,
    routing: &Routing,
) -> (Vec<u32>, Vec<String>) {
    let room = session.engine.plan().sequences;
    let asked = args.max_step_ms.and_then(MaxStep::asked);
    let mut why = Vec::new();
    let number = |count: &Count| match count {
        Count::Texts(n) => *n,
        Count::Auto => {
            let chosen = choose(predictor(args, session, routing).as_ref(), room, asked);
            why.push(chosen.why);
            chosen.texts
        }
    };
    let mut counts: Vec<u32> = counts.iter().map(number).collect();
    counts.sort_unstable();
    counts.dedup();
    (counts, why)
}

/// Returns what steps in the middle of the decoded tokens are predicted with.
fn predictor<'a>(
    args: &BenchArgs,
    session: &'a Session,
    routing: &'a Routing,
) -> Option<Predictor<'a>> {
    let (plan, shape) = (session.engine.plan(), session.engine.shape());
    routing.predictor(plan, shape, middle(args))
}

/// Predicts a step for the middle of the decoded tokens.
fn predict(
    args: &BenchArgs,
    session: &Session,
    routing: &Routing,
    texts: u32,
) -> Option<StepPrediction> {
    let predictor = predictor(args, session, routing)?;
    predictor.step(texts).filter(|_| args.n_gen > 0)
}

/// Predicts a step with the rates that the machine gave meanwhile; `None` where that says the same
/// as the plan.
fn observe(
    args: &BenchArgs,
    session: &Session,
    routing: &Routing,
    texts: u32,
    given: &Given,
) -> Option<ParallelPrediction> {
    let planned = predict(args, session, routing, texts)?;
    let (plan, shape) = (session.engine.plan(), session.engine.shape());
    let Routing::Known(evidence) = routing else {
        return None;
    };
    if given.observed.is_as_planned(plan) || plan.tiers.iter().all(|t| t.tier.emulated) {
        return None;
    }
    let at = middle(args);
    let mut now = given.observed.replaced(plan);
    now.predicted = given.observed.predict(plan, shape, Some(evidence), at);
    let step = routing.predictor(&now, shape, at)?.step(texts)?;
    differs(step.tok_s(), planned.tok_s()).then_some(ParallelPrediction {
        decode_tok_s: step.tok_s(),
        gap_s: step.seconds,
    })
}

/// Returns the position in the middle of the decoded tokens.
fn middle(args: &BenchArgs) -> u32 {
    args.n_prompt.max(1) + args.n_gen.div_ceil(2)
}

fn summary(
    args: &BenchArgs,
    texts: u32,
    samples: &[Sample],
    predicted: Option<StepPrediction>,
) -> ParallelRecord {
    let all = |n: u32| f64::from(texts) * f64::from(n);
    let rate = |n: u32, seconds: f64| if n > 0 { all(n) / seconds } else { 0.0 };
    let of =
        |value: &dyn Fn(&Sample) -> f64| median(&samples.iter().map(value).collect::<Vec<_>>());
    let gaps: Vec<f64> = samples.iter().flat_map(|s| &s.gaps_s).copied().collect();
    ParallelRecord {
        texts,
        prompt_tok_s: of(&|s| rate(args.n_prompt, s.prompt_s)),
        decode_tok_s: of(&|s| rate(args.n_gen, s.gaps_s.iter().sum())),
        gap_s: median(&gaps),
        gap_p95_s: percentile(&gaps, 0.95),
        distinct_experts: of(&|s| s.distinct),
        predicted: predicted.map(|step| ParallelPrediction {
            decode_tok_s: step.tok_s(),
            gap_s: step.seconds,
        }),
        observed: None,
    }
}

/// Returns the least value that at least `share` of the values do not exceed, 0 of none.
pub(super) fn percentile(values: &[f64], share: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (share * sorted.len() as f64).ceil() as usize;
    let value = sorted.get(rank.saturating_sub(1)).or(sorted.last());
    value.copied().unwrap_or(0.0)
}

fn write_record(
    session: &Session,
    measured: &[ParallelRecord],
    conditions: Option<Conditions>,
    path: &Path,
) -> Result<()> {
    let circumstances = Circumstances {
        when: show_utc(SystemTime::now()),
        host: host::describe(),
        system: host::system(),
        first_token_s: 0.0,
    };
    let nothing = Generated {
        tokens: Vec::new(),
        stop: Stop::Limit,
        first_token: Default::default(),
    };
    let mut record = record(&session.engine, &nothing, &circumstances);
    // Its other counters are of one text.
    (record.decode_tokens, record.decode_s) = (0, 0.0);
    record.layers.clear();
    for tier in &mut record.tiers {
        (tier.read_bytes, tier.busy_s) = (0, 0.0);
    }
    record.parallel = measured.to_vec();
    record.conditions = conditions;
    Ok(record.write(path)?)
}

fn as_json(
    args: &BenchArgs,
    session: &Session,
    measured: &[ParallelRecord],
    notes: &[String],
) -> Value {
    let plan = session.engine.plan();
    let row = |m: &ParallelRecord| {
        json!({
            "texts": m.texts,
            "prompt_tok_s": m.prompt_tok_s,
            "decode_tok_s": m.decode_tok_s,
            "decode_tok_s_per_text": m.decode_tok_s / f64::from(m.texts),
            "gap_s": m.gap_s,
            "gap_p95_s": m.gap_p95_s,
            "distinct_experts": m.distinct_experts,
            "predicted_decode_tok_s": m.predicted.map(|p| p.decode_tok_s),
            "predicted_gap_s": m.predicted.map(|p| p.gap_s),
        })
    };
    let row = |m: &ParallelRecord| {
        let mut value = row(m);
        if let Some(observed) = m.observed {
            value["observed_decode_tok_s"] = observed.decode_tok_s.into();
            value["observed_gap_s"] = observed.gap_s.into();
        }
        value
    };
    json!({
        "model": plan.model.name,
        "plan": plan.name,
        "emulated": plan.tiers.iter().any(|t| t.tier.emulated),
        "threads": session.engine.n_threads(),
        "isa": session.engine.kernels().isa().to_string(),
        "kv_type": plan.kv_type.name(),
        "sequences": plan.sequences,
        "prompt_tokens": args.n_prompt,
        "decode_tokens": args.n_gen,
        "parallel": measured.iter().map(row).collect::<Vec<_>>(),
        "note": notes.last(),
    })
}

fn print(session: &Session, measured: &[ParallelRecord]) {
    let plan = session.engine.plan();
    let emulated = plan.tiers.iter().any(|t| t.tier.emulated);
    println!(
        "{} · plan {} · {} threads · {} · keys and values {}{}",
        printable(&plan.model.name),
        printable(&plan.name),
        session.engine.n_threads(),
        session.engine.kernels().isa(),
        plan.kv_type,
        if emulated { ", emulated tiers" } else { "" }
    );
    session.notes().iter().for_each(|note| println!("{note}"));
    println!(
        "{:>6} {:>12} {:>12} {:>10} {:>10} {:>10} {:>10} {:>11} {:>10}",
        "texts",
        "prompt tok/s",
        "decode tok/s",
        "per text",
        "gap ms",
        "gap ms p95",
        "experts",
        "predicted",
        "differs"
    );
    for m in measured {
        let predicted = m.predicted.filter(|p| p.decode_tok_s > 0.0);
        let differs = predicted.map(|p| (m.decode_tok_s / p.decode_tok_s - 1.0) * 100.0);
        println!(
            "{:>6} {:>12.2} {:>12.2} {:>10.2} {:>10.2} {:>10.2} {:>10.1} {:>11} {:>10}",
            m.texts,
            m.prompt_tok_s,
            m.decode_tok_s,
            m.decode_tok_s / f64::from(m.texts),
            m.gap_s * 1e3,
            m.gap_p95_s * 1e3,
            m.distinct_experts,
            predicted.map_or("-".to_string(), |p| format!("{:.2}", p.decode_tok_s)),
            differs.map_or("-".to_string(), |d| format!("{d:+.1} %")),
        );
    }
    println!(
        "experts: distinct ones per layer and step; gap: between two tokens of a text; predicted: decode tok/s"
    );
}

/// Prints what the rates of the benchmark predict, where those were not as planned.
fn print_observed(measured: &[ParallelRecord], conditions: Option<&Conditions>) {
    let Some(conditions) = conditions else {
        return;
    };
    for m in measured {
        let Some(observed) = m.observed else { continue };
        println!(
            "{:>6} texts: {:.2} tok/s predicted with the rates of this benchmark, measured {:+.1} %",
            m.texts,
            observed.decode_tok_s,
            (m.decode_tok_s / observed.decode_tok_s - 1.0) * 100.0
        );
    }
    println!(
        "its machine gave: {}; {}",
        describe(conditions),
        crate::conditions::describe_processors(&conditions.processors)
    );
}

#[cfg(test)]
mod tests {
    use super::percentile;

    #[test]
    fn percentiles_are_values() {
        let values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!(percentile(&values, 0.95), 95.0);
        assert_eq!(percentile(&values[..10], 0.95), 100.0);
        assert_eq!(percentile(&[3.0], 0.95), 3.0);
        assert_eq!(percentile(&[], 0.95), 0.0);
    }
}
