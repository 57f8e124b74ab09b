//! Benchmarks solving at the size of the largest models: seconds, proven gap, and memory.
//!
//! A table is printed first, one solve per row. Criterion then times the named cases.
#![allow(missing_docs)]

use criterion::{Criterion, criterion_group, criterion_main};
use std::hint::black_box;
use std::path::Path;
use std::time::Instant;
use tier_plan_planner::catalogue;
use tier_plan_planner::profile::Evidence;
use tier_plan_planner::profile::pattern::Pattern;
use tier_plan_planner::profile::synthetic::{Routing, profile};
use tier_plan_planner::solve::options::Strategy;
use tier_plan_planner::solve::{Options, Problem, solve_with_evidence};
use tier_plan_planner::whatif::purchase::purchases;
use tier_plan_planner::whatif::{Question, Supposed, answer_supposing};
use tier_plan_runtime::KvType;
use tier_plan_runtime::formats::SourceId;
use tier_plan_runtime::formats::machine::{Accelerator, Machine, Tier, TierKind};
use tier_plan_runtime::formats::profile::Profile;
use tier_plan_runtime::model::shape::ModelShape;

const GB: u64 = 1_000_000_000;

fn id(name: &str) -> SourceId {
    SourceId {
        name: name.to_string(),
        hash: "0".repeat(32),
    }
}

fn machine(tiers: &[(&str, TierKind, u64, f64, f64)]) -> Machine {
    let tier = |&(name, kind, gb, read_gbps, latency_us): &(&str, TierKind, u64, f64, f64)| Tier {
        name: name.to_string(),
        kind,
        capacity_bytes: gb * GB,
        read_gbps,
        latency_us,
        emulated: false,
        unit: None,
        accelerator: Accelerator::default(),
        source: "chosen for this benchmark".to_string(),
    };
    Machine {
        name: format!("{} tiers", tiers.len()),
        description: String::new(),
        tiers: tiers.iter().map(tier).collect(),
        layer_overhead_us: 50.0,
        token_overhead_us: 500.0,
        extras: Default::default(),
        id: id("bench"),
    }
}

fn machines() -> Vec<Machine> {
    use TierKind::{Cxl, Dram, Nvme, Vram};
    let slow = [
        ("dram", Dram, 192, 60.0, 0.0),
        ("cxl", Cxl, 256, 30.0, 0.3),
        ("nvme", Nvme, 16_000, 12.0, 80.0),
    ];
    let four = [&[("vram", Vram, 24, 860.0, 10.0)], &slow[..]].concat();
    let five = [
        &[
            ("gpu-a", Vram, 32, 1500.0, 10.0),
            ("gpu-b", Vram, 24, 860.0, 10.0),
        ],
        &slow[..],
    ]
    .concat();
    vec![machine(&four), machine(&five)]
}

/// A case: what is known of the routing.
enum Known {
    Supposed(Pattern),
    Recorded(&'static str, Routing),
}

fn knowns() -> Vec<Known> {
    let routing = |skew, repeat| Routing {
        skew,
        repeat,
        prompts: 16,
        prompt_tokens: 192,
        decode_tokens: 128,
        seed: 1,
    };
    vec![
        Known::Supposed(Pattern::Flat),
        Known::Supposed(Pattern::Zipf),
        Known::Supposed(Pattern::Bursty),
        Known::Recorded("flat", routing(0.0, 0.0)),
        Known::Recorded("zipf", routing(0.8, 0.1)),
        Known::Recorded("bursty", routing(0.3, 0.7)),
    ]
}

fn evidence(shape: &ModelShape, known: &Known) -> Option<(Evidence, Option<Profile>)> {
    match known {
        Known::Supposed(pattern) => Some((Evidence::supposed(shape, *pattern).ok()?, None)),
        Known::Recorded(_, routing) => {
            let profile = profile(shape, routing);
            Some((Evidence::recorded(shape, &profile).ok()?, Some(profile)))
        }
    }
}

/// Resets the peak memory of this process, where the system can.
fn reset_peak() {
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Returns the peak and present memory of this process, in MiB.
fn memory_mib() -> [u64; 2] {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    ["VmHWM:", "VmRSS:"].map(|key| {
        let line = status
            .lines()
            .find_map(|l| l.strip_prefix(key))
            .unwrap_or("0");
        line.split_whitespace()
            .next()
            .and_then(|n| n.parse::<u64>().ok())
            .unwrap_or(0)
            / 1024
    })
}

fn solving(c: &mut Criterion) {
    let only = std::env::var("CASE").unwrap_or_default();
    println!(
        "| model | tiers | routing | seconds | proven gap | predicted tok/s | backend | peak MiB |"
    );
    let mut group = c.benchmark_group("solve");
    group.sample_size(10);
    for (model, seconds) in [("kimi-k2.5", 5.0), ("moe-10t", 30.0)] {
        let Ok(known_model) = catalogue::model(Path::new(model), None) else {
            continue;
        };
        let shape = &known_model.sizes;
        for machine in machines() {
            for known in knowns() {
                let name = match &known {
                    Known::Supposed(pattern) => format!("supposed {}", pattern.name()),
                    Known::Recorded(name, _) => format!("recorded {name}"),
                };
                let title = format!("{model}, {}, {name}", machine.name);
                if !title.contains(&only) {
                    continue;
                }
                let Some((evidence, profile)) = evidence(shape, &known) else {
                    continue;
                };
                let problem = Problem {
                    shape,
                    profile: profile.as_ref(),
                    machine: &machine,
                    budgets: machine.tiers.iter().map(|t| t.capacity_bytes).collect(),
                    context: 4096,
                    sequences: 1,
                    kv_type: KvType::F16,
                    position: None,
                };
                let seconds = std::env::var("TL")
                    .ok()
                    .and_then(|t| t.parse().ok())
                    .unwrap_or(seconds);
                let options = Options {
                    strategy: Strategy::Optimal,
                    time_limit_s: seconds,
                    ..Options::default()
                };
                let [_, before] = memory_mib();
                reset_peak();
                let start = Instant::now();
                match solve_with_evidence(&problem, &evidence, &options) {
                    Ok(solved) => {
                        let report = &solved.plan.solver;
                        let gap = report
                            .gap
                            .map_or("none".to_string(), |gap| format!("{:.4} %", gap * 100.0));
                        println!(
                            "| {model} | {} | {name} | {:.2} | {gap} | {:.3} | {} | {} (+{}) |{}",
                            machine.tiers.len(),
                            start.elapsed().as_secs_f64(),
                            solved.plan.predicted.decode_tok_s,
                            report.backend,
                            memory_mib()[0],
                            memory_mib()[0].saturating_sub(before),
                            if std::env::var("NOTES").is_ok() {
                                solved.notes.join("; ")
                            } else {
                                String::new()
                            },
                        );
                    }
                    Err(error) => println!("| {title} | {error:#} |"),
                }
                if model == "kimi-k2.5"
                    && machine.tiers.len() == 4
                    && matches!(known, Known::Supposed(_))
                    && only.is_empty()
                {
                    group.bench_function(&title, |b| {
                        b.iter(|| black_box(solve_with_evidence(&problem, &evidence, &options)))
                    });
                }
            }
        }
    }
}

/// Times the whole answer of `tier-plan what-if`: three patterns of routing, and what to buy next.
fn what_if(c: &mut Criterion) {
    let mut group = c.benchmark_group("what-if");
    group.sample_size(10);
    for (model, machine) in [
        ("kimi-k2.5", "article-optane-4090"),
        ("kimi-k2.5", "article-4090x4"),
        ("glm-4.6", "xeon-6248x2-ada"),
        ("qwen3-30b-a3b", "desktop-5090-gen5"),
    ] {
        let (Ok(known), Ok(machine)) = (
            catalogue::model(Path::new(model), None),
            catalogue::machine(Path::new(machine)),
        ) else {
            continue;
        };
        let question = Question {
            known: &known,
            machine: &machine,
            budgets: machine.tiers.iter().map(|t| t.capacity_bytes).collect(),
            profile: None,
            context: 4096,
            sequences: 1,
            at: None,
            kv_type: KvType::F16,
            time_limit_s: 60.0,
        };
        let ask = || {
            let supposed = Supposed::new(&question).ok()?;
            let answer = answer_supposing(&question, &supposed).ok()?;
            Some(purchases(&question, &answer, &supposed))
        };
        group.bench_function(format!("{model}, {}", machine.name), |b| {
            b.iter(|| black_box(ask()))
        });
    }
}

criterion_group!(benches, solving, what_if);
criterion_main!(benches);
