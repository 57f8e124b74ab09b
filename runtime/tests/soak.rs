//! A model larger than its memory, prompt after prompt: nothing fails, nothing grows, and the same
//! prompt always gives the same text.
//!
//! Eight rounds as it stands, and some minutes in `.ci/nightly`. For an hour under a limit of
//! memory, with a model of one's own (the file's experts should be larger than the limit):
//!
//! ```text
//! TIER_PLAN_SOAK_S=3600 TIER_PLAN_SOAK_MODEL=model.gguf cargo test --release -p tier-plan-runtime --test soak -- --nocapture
//! ```

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tier_plan_runtime::engine::generate::{Limits, generate};
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::describe;
use tier_plan_runtime::model::shape::shape_of;
use tier_plan_runtime::plans::budget::{Budgeted, within};
use tier_plan_runtime::sampler::{Sampler, SamplerConfig};
use tier_plan_runtime::tiers::limits::memory_limit;
use tier_plan_runtime::units::show_bytes;
use tier_plan_runtime::{Engine, KvType, LoadOptions};
use tier_plan_testing::Random;

const CONTEXT: u32 = 768;

/// Memory that may come after the first rounds: what an allocator keeps in fragments.
const GROWTH: u64 = 8 << 20;

/// Memory of this process's own: pages of mapped files come and go as the system likes.
fn resident_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("RssAnon:"))?;
    line.split_whitespace()
        .nth(1)?
        .parse::<u64>()
        .ok()
        .map(|kib| kib << 10)
}

/// No huge pages for this process: the system makes them of what lies beside memory in use,
/// whenever it likes.
fn small_pages() {
    #[cfg(target_os = "linux")]
    // SAFETY: sets a flag of this process.
    unsafe {
        libc::prctl(libc::PR_SET_THP_DISABLE, 1, 0, 0, 0);
    }
}

/// A little more than half of the experts fit, or as much as there is memory if that is less. Also
/// the budget.
fn open(path: &Path) -> (Engine, u64) {
    let gguf = Arc::new(Gguf::open(path).unwrap());
    let spec = describe(&gguf).unwrap();
    let shape = shape_of(&gguf, &spec);
    let plan = |budget| within(&gguf, &spec, &shape, CONTEXT, KvType::F16, budget);
    let least = plan(1 << 20).unwrap_err().least_bytes;
    let experts: u64 = shape
        .experts
        .iter()
        .map(|e| e.expert_bytes * u64::from(e.n_expert))
        .sum();
    let budget = memory_limit()
        .map_or(u64::MAX, |limit| limit.bytes)
        .min(least + experts / 2);
    let Budgeted { plan, batch, .. } = plan(budget).unwrap();
    let options = LoadOptions {
        threads: Some(2),
        batch: Some(batch),
        ..LoadOptions::default()
    };
    (
        Engine::load(gguf, &plan, &options, &mut |_, _| {}).unwrap(),
        budget,
    )
}

#[test]
fn a_long_run_neither_fails_nor_grows() {
    let seconds = std::env::var("TIER_PLAN_SOAK_S").map_or(0, |s| s.parse().unwrap());
    let bundled = || {
        PathBuf::from(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/../profiles/demo/demo.gguf"
        ))
    };
    let path = std::env::var_os("TIER_PLAN_SOAK_MODEL").map_or_else(bundled, PathBuf::from);
    small_pages();
    let (mut engine, budget) = open(&path);
    let n_vocab = engine.spec().n_vocab as u64;

    let mut draw = Random(7);
    let mut prompt = |n: u64| -> Vec<u32> { (0..n).map(|_| draw.below(n_vocab) as u32).collect() };
    let mut answer = |prompt: &[u32], max_tokens| {
        engine.clear();
        let limits = Limits {
            max_tokens,
            is_end: &|_| false,
            draft: 0,
        };
        let mut sampler = Sampler::new(SamplerConfig::default());
        let go_on = |_: &Engine, _| ControlFlow::Continue(());
        let tokens = generate(&mut engine, prompt, &mut sampler, &limits, go_on)
            .unwrap()
            .tokens;
        let (hits, misses) = engine
            .counters()
            .layers
            .iter()
            .fold((0, 0), |(h, m), l| (h + l.slot_hits, m + l.misses));
        (tokens, hits, misses)
    };
    // The largest prompt comes first, so that all buffers have their sizes.
    answer(&prompt(u64::from(CONTEXT) - 40), 40);
    let asked = prompt(48);
    let (expected, ..) = answer(&asked, 32);

    let (start, mut said) = (Instant::now(), Instant::now());
    let (mut rounds, mut settled, mut most) = (0u32, None, 0);
    while start.elapsed() < Duration::from_secs(seconds) || rounds < 8 {
        let n = 1 + u64::from(rounds * 97 % 600);
        answer(&prompt(n), 24);
        let (found, hits, misses) = answer(&asked, 32);
        assert_eq!(found, expected, "round {rounds}");
        assert!(hits > 0 && misses > 0, "{hits} hits and {misses} misses");
        rounds += 1;
        let now = resident_bytes().unwrap_or(0);
        if rounds == 4 {
            settled = Some(now);
        }
        most = most.max(now);
        if said.elapsed() > Duration::from_secs(60) {
            said = Instant::now();
            println!(
                "{} s: {rounds} rounds, {}, {misses} misses",
                start.elapsed().as_secs(),
                show_bytes(now)
            );
        }
    }
    let settled = settled.unwrap();
    println!(
        "{rounds} rounds: {} after four of them, {} at most",
        show_bytes(settled),
        show_bytes(most)
    );
    assert!(
        most <= budget,
        "{} of a budget of {}",
        show_bytes(most),
        show_bytes(budget)
    );
    assert!(
        most <= settled + GROWTH,
        "{} became {}",
        show_bytes(settled),
        show_bytes(most)
    );
}
