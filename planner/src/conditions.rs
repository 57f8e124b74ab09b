//! What the machine gave while a run decoded, and what the plan predicts with that.
//!
//! A [`Watch`] accompanies a run: it reads the system's counters before and after, and measures the
//! rate of main memory for some milliseconds now and then between two tokens. Nothing that it
//! measures comes from the speed of the tokens.

use crate::cost::observed::Observed;
use crate::printable::printable;
use crate::profile::Evidence;
use std::path::Path;
use std::time::{Duration, Instant};
use tier_plan_runtime::Engine;
use tier_plan_runtime::engine::burst::Bursts;
use tier_plan_runtime::formats::machine::{Medium, Tier};
use tier_plan_runtime::formats::placement::{PerTier, Placement, PlanTier, Prediction};
use tier_plan_runtime::formats::profile;
use tier_plan_runtime::formats::record::{Conditions, Processors, RunRecord, TierRate};
use tier_plan_runtime::model::shape::ModelShape;
use tier_plan_runtime::os::processors::{Reading, Usage};
use tier_plan_runtime::tiers::file::DriveUse;

/// Time of one burst between two tokens, and the time between two bursts: 0.2 % of a run.
const BURST_TIME: Duration = Duration::from_millis(3);
const BURST_INTERVAL: Duration = Duration::from_millis(1500);

/// Time of the burst at the end of a run.
const LAST_BURST_TIME: Duration = Duration::from_millis(15);

/// Fewest bytes and separate reads of a drive that tell its rate.
const MIN_DRIVE_BYTES: u64 = 8 << 20;
const MIN_DRIVE_BURSTS: u64 = 8;

/// Shortest time that tells who had the processors, in seconds: the system counts in ticks of up to
/// a hundredth.
const MIN_WINDOW_S: f64 = 0.2;

/// Share of the processors from which on a machine counts as quiet.
const QUIET_SHARE: f64 = 0.95;

/// Part of all processors that other programs use from which on threads may have waited for them.
const MIN_OTHERS: f64 = 0.05;

/// Part of the busy time that a hypervisor takes from which on it counts.
const MIN_STOLEN: f64 = 0.01;

/// Relative difference of the two predictions up to which the rates were those of the plan.
const QUIET_DIFFERENCE: f64 = 0.05;

/// Accompanies a run.
pub struct Watch {
    before: Reading,
    bursts: Bursts,
    last_burst: Instant,
    drive: DriveUse,
    /// Whether the plan predicts anything that rates could be held against.
    wants_rates: bool,
}

/// What was measured of a run.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Given {
    /// Who had the processors.
    pub usage: Usage,
    /// The rates.
    pub observed: Observed,
}

impl Watch {
    /// Begins to watch a run, best when its prompt has been processed.
    pub fn begin(engine: &Engine) -> Self {
        Self {
            before: Reading::now(),
            bursts: Bursts::default(),
            last_burst: Instant::now(),
            drive: DriveUse::default(),
            wants_rates: engine.plan().predicted.decode_tok_s > 0.0,
        }
    }

    /// Measures main memory for a moment if it is time to. To be called between two tokens.
    pub fn between_tokens(&mut self, engine: &Engine) {
        if self.wants_rates && self.last_burst.elapsed() >= BURST_INTERVAL {
            engine.burst(BURST_TIME, &mut self.bursts);
            self.last_burst = Instant::now();
        }
    }

    /// Adds what the engine has counted of its drive, before its counters are reset.
    pub fn count_reads(&mut self, engine: &Engine) {
        self.drive += engine.counters().drive;
    }

    /// Returns what was measured.
    pub fn end(mut self, engine: &Engine) -> Given {
        let usage = Usage::between(&self.before, &Reading::now(), engine.n_threads());
        if self.wants_rates {
            engine.burst(LAST_BURST_TIME, &mut self.bursts);
        }
        let plan = engine.plan();
        let measured = self.bursts.gbps();
        let memory = |at: usize| measured.iter().nth(at).copied().flatten();
        let rate = |(at, planned): (usize, &PlanTier)| match planned.tier.medium() {
            Medium::Addressable => memory(at),
            Medium::Drive => drive_gbps(self.drive, &planned.tier),
            Medium::Gpu => None,
        };
        let gbps: PerTier<Option<f64>> = plan.tiers.iter().enumerate().map(rate).collect();
        Given {
            usage,
            observed: Observed {
                share: usage.share.filter(|_| has_rivals(&processors(&usage))),
                gbps,
            },
        }
    }
}

fn drive_gbps(reads: DriveUse, tier: &Tier) -> Option<f64> {
    let enough = reads.bytes >= MIN_DRIVE_BYTES && reads.bursts >= MIN_DRIVE_BURSTS;
    reads.gbps(tier.latency_us * 1e-6).filter(|_| enough)
}

/// Returns how the experts are used by the evidence that a plan was made from: evenly without a
/// profile, else as in the profile beside the model if that is the plan's.
pub fn evidence_of(plan: &Placement, model: &Path, shape: &ModelShape) -> Option<Evidence> {
    let Some(wanted) = &plan.profile else {
        return Evidence::uniform(shape).ok();
    };
    let found = profile::read(&model.with_extension("profile")).ok()?;
    let found = Some(found).filter(|found| found.id.hash == wanted.hash)?;
    Evidence::new(shape, Some(&found)).ok()
}

impl Given {
    /// Returns what to record of the conditions of a run that was `predicted`, `None` where the
    /// machine gave what the plan counts on, and without a prediction. `evidence` is asked for only
    /// where it did not.
    pub fn conditions(
        &self,
        plan: &Placement,
        shape: &ModelShape,
        predicted: Option<&Prediction>,
        evidence: impl FnOnce() -> Option<Evidence>,
    ) -> Option<Conditions> {
        let was = predicted.filter(|_| self.usage.seconds >= MIN_WINDOW_S)?;
        let real = plan.tiers.iter().any(|t| !t.tier.emulated);
        let as_planned = self.observed.is_as_planned(plan);
        let now = (real && !as_planned).then(|| {
            let evidence = evidence();
            self.observed
                .predict(plan, shape, evidence.as_ref(), was.at)
        });
        let differs = now
            .as_ref()
            .is_some_and(|now| differs(now.decode_tok_s, was.decode_tok_s));
        (self.is_busy() || differs).then(|| self.with_prediction(plan, now))
    }

    /// Whether others took much of the processors.
    pub fn is_busy(&self) -> bool {
        self.usage.seconds >= MIN_WINDOW_S && is_busy(&processors(&self.usage))
    }

    /// Returns what to record, with the plan's prediction at these rates.
    pub fn with_prediction(&self, plan: &Placement, predicted: Option<Prediction>) -> Conditions {
        let rate = |(tier, measured_gbps): (&Tier, f64)| TierRate {
            name: tier.name.clone(),
            planned_gbps: tier.read_gbps,
            measured_gbps,
        };
        Conditions {
            processors: processors(&self.usage),
            rates: self.observed.rates(plan).map(rate).collect(),
            predicted,
        }
    }

    /// Records the conditions of a run beside its prediction.
    pub fn add_to(
        &self,
        record: &mut RunRecord,
        engine: &Engine,
        evidence: impl FnOnce() -> Option<Evidence>,
    ) {
        let predicted = record.predicted.as_ref();
        record.conditions = self.conditions(engine.plan(), engine.shape(), predicted, evidence);
    }
}

/// Whether a prediction with the rates of a run says something else than the planned one.
pub fn differs(now_tok_s: f64, planned_tok_s: f64) -> bool {
    (now_tok_s / planned_tok_s - 1.0).abs() > QUIET_DIFFERENCE
}

/// Returns the usage as records have it.
pub fn processors(usage: &Usage) -> Processors {
    Processors {
        share: usage.share,
        stolen: usage.stolen,
        others: usage.others,
        count: usage.processors,
        pressure: usage.pressure,
        preempted_per_s: usage.preempted_per_s,
    }
}

/// Whether other programs, or other machines of the same host, took much of the processors.
pub fn is_busy(processors: &Processors) -> bool {
    has_rivals(processors) && processors.share.is_some_and(|share| share < QUIET_SHARE)
}

/// Whether anything but this program may have kept its threads waiting; so where the system does not
/// tell. Else they waited for one another, as those that compute do for those that read, on a machine
/// that is quiet.
fn has_rivals(processors: &Processors) -> bool {
    let others = processors.others.zip(processors.count);
    others.is_none_or(|(others, count)| others >= MIN_OTHERS * count)
        || processors.stolen.is_some_and(|stolen| stolen >= MIN_STOLEN)
}

/// Says who had the processors, as a clause: `its threads got 81 % of the processors' time, …`.
pub fn describe_processors(processors: &Processors) -> String {
    let percent = |part: f64| format!("{:.0} %", part * 100.0);
    let mut parts = Vec::new();
    if let Some(share) = processors.share {
        parts.push(format!(
            "its threads got {} of the processors' time",
            percent(share)
        ));
    }
    if let Some(others) = processors.others.filter(|others| *others >= 0.05) {
        let of = processors
            .count
            .map_or(String::new(), |count| format!(" of {count:.0}"));
        parts.push(format!("other programs used {others:.1}{of} processors"));
    }
    if let Some(stolen) = processors.stolen.filter(|stolen| *stolen >= MIN_STOLEN) {
        parts.push(format!("a hypervisor took {}", percent(stolen)));
    }
    parts.join(", ")
}

/// Says what differed from the plan, in brackets for a sentence: `dram 26.3 instead of 33.0 GB/s,
/// processors 81 %`.
pub fn describe(conditions: &Conditions) -> String {
    let rate = |rate: &TierRate| {
        format!(
            "{} {} instead of {} GB/s",
            printable(&rate.name),
            crate::print::digits(rate.measured_gbps),
            crate::print::digits(rate.planned_gbps)
        )
    };
    let mut parts: Vec<String> = conditions.rates.iter().map(rate).collect();
    if let Some(share) = conditions.processors.share {
        parts.push(format!("processors {:.0} %", share * 100.0));
    }
    parts.join(", ")
}

/// Returns the sentence on a prediction beside a measured speed: with the prediction by the rates of
/// the run where those differed. `emulated` follows the measured speed.
pub fn prediction_line(
    planned_tok_s: f64,
    measured_tok_s: f64,
    emulated: &str,
    conditions: Option<&Conditions>,
) -> String {
    let off = |predicted: f64| format!("{:+.1} %", (measured_tok_s / predicted - 1.0) * 100.0);
    let now = conditions.and_then(|c| Some((c, c.predicted.as_ref()?.decode_tok_s)));
    match now.filter(|(_, tok_s)| *tok_s > 0.0) {
        Some((conditions, now)) => format!(
            "predicted {planned_tok_s:.1} tok/s as planned, {now:.1} with the rates of this run ({}), measured \
             {measured_tok_s:.1}{emulated} ({} and {})",
            describe(conditions),
            off(planned_tok_s),
            off(now)
        ),
        None => format!(
            "predicted {planned_tok_s:.1} tok/s, measured {measured_tok_s:.1}{emulated} ({})",
            off(planned_tok_s)
        ),
    }
}

/// Returns the sentence on a busy machine for runs whose prediction does not know of it, those on
/// emulated tiers. `None` where no run was disturbed.
pub fn busy_line<'a>(records: impl Iterator<Item = &'a RunRecord>) -> Option<String> {
    let records: Vec<&RunRecord> = records.collect();
    let worst = records
        .iter()
        .filter_map(|record| Some((record, record.conditions.as_ref()?)))
        .filter(|(_, conditions)| is_busy(&conditions.processors))
        .min_by(|(_, a), (_, b)| {
            let share = |c: &Conditions| c.processors.share.unwrap_or(1.0);
            share(a).total_cmp(&share(b))
        });
    let (record, conditions) = worst?;
    let so = if record.emulated {
        "work took longer than emulated tiers declare, so measured speeds may be too low"
    } else {
        "measured speeds may be too low"
    };
    let of = if records.len() > 1 {
        " in the worst run"
    } else {
        ""
    };
    Some(format!(
        "This machine was busy: {}{of}; {so}; run again on a quiet machine.",
        describe_processors(&conditions.processors)
    ))
}

#[cfg(test)]
#[path = "conditions_tests.rs"]
mod tests;
