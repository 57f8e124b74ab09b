//! What a row of the table of plans says beside speeds: ratio, limit, and settings.

use super::view::PlanView;
use tier_plan_runtime::formats::record::Setup;

/// What took the largest part of a token's time.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Limit {
    /// A tier, or what is not a tier's time.
    pub by: String,
    /// Part of a token's time, 0 to 1.
    pub share: f64,
    /// Whether it was measured; predicted otherwise.
    pub is_measured: bool,
}

/// Name of the measured time in which no tier was waited for.
const REST: &str = "computing";

/// Name of the predicted fixed times.
const FIXED: &str = "fixed times";

impl PlanView<'_> {
    /// Returns measured / predicted decode rate.
    pub(super) fn ratio(&self) -> Option<f64> {
        self.error.map(|error| error + 1.0)
    }

    /// Returns what the run was set up with, where its record says so.
    pub(super) fn setup(&self) -> Option<&Setup> {
        self.entry.records.iter().find_map(|r| r.setup.as_ref())
    }

    /// Returns the bytes of the model's weights, where a record says so.
    pub(super) fn model_bytes(&self) -> Option<u64> {
        self.setup().map(|s| s.model_bytes).filter(|b| *b > 0)
    }

    /// Returns the threads of the runs, if all had as many.
    pub(super) fn threads(&self) -> Option<u32> {
        let mut all = self.entry.records.iter().map(|r| r.threads);
        let first = all.next().filter(|n| *n > 0)?;
        all.all(|n| n == first).then_some(first)
    }

    /// Returns the tokens of context that there is room for.
    pub(super) fn context(&self) -> Option<u32> {
        let of_plan = self.entry.placement.as_ref().map(|p| p.context);
        of_plan
            .or(self.setup().map(|s| s.context))
            .filter(|c| *c > 0)
    }

    /// Returns what took the largest part of a token's time, as measured where tiers were waited
    /// for, otherwise as predicted.
    pub(super) fn limit(&self) -> Option<Limit> {
        self.measured_limit().or_else(|| self.predicted_limit())
    }

    fn measured_limit(&self) -> Option<Limit> {
        let token_s = 1.0 / self.decode?.tok_s;
        let waits = self
            .tiers
            .iter()
            .filter_map(|t| Some((t.name.clone(), t.busy_s?)));
        let waits: Vec<(String, f64)> = waits.filter(|(_, s)| s.is_finite() && *s > 0.0).collect();
        let sum: f64 = waits.iter().map(|(_, s)| s).sum();
        // Waits for tiers that are read at the same time may add up to more than the token takes.
        let whole = token_s.max(sum);
        let rest = (REST.to_string(), whole - sum);
        largest(waits.into_iter().chain([rest]), whole, true).filter(|_| sum > 0.0)
    }

    fn predicted_limit(&self) -> Option<Limit> {
        let predicted = self.predicted?;
        let whole = 1.0 / self.predicted_tok_s()?;
        let at = |of: &[f64], i: usize| of.get(i).copied().unwrap_or(0.0);
        let dense: Vec<f64> = predicted.dense_s.iter().copied().collect();
        let experts: Vec<f64> = predicted.expert_s.iter().copied().collect();
        let names = self.tiers.iter().enumerate();
        let tiers = names.map(|(i, t)| (t.name.clone(), at(&dense, i) + at(&experts, i)));
        let fixed = (FIXED.to_string(), predicted.overhead_s);
        largest(tiers.chain([fixed]), whole, false)
    }
}

/// Returns the part that takes longest of a token's time.
fn largest(
    parts: impl Iterator<Item = (String, f64)>,
    whole: f64,
    is_measured: bool,
) -> Option<Limit> {
    let sound = parts.filter(|(_, seconds)| seconds.is_finite());
    let (by, seconds) = sound.max_by(|a, b| a.1.total_cmp(&b.1))?;
    let share = (seconds / whole).clamp(0.0, 1.0);
    (share > 0.0).then_some(Limit {
        by,
        share,
        is_measured,
    })
}

#[cfg(test)]
mod tests {
    use crate::report::view::Overview;
    use crate::report::{PlanEntry, Report, sample};
    use tier_plan_runtime::formats::record::{RunRecord, TierRecord};

    fn limits(report: &Report) -> Vec<(String, bool)> {
        let overview = Overview::new(report);
        let limits = overview.plans.iter().filter_map(|p| p.limit());
        limits.map(|l| (l.by, l.is_measured)).collect()
    }

    fn waited(seconds: [f64; 2]) -> Report {
        let tiers = ["dram", "nvme"].iter().zip(seconds);
        let tiers = tiers.map(|(name, busy_s)| TierRecord {
            name: (*name).into(),
            busy_s,
            ..TierRecord::default()
        });
        let record = RunRecord {
            decode_tokens: 10,
            decode_s: 1.0,
            tiers: tiers.collect(),
            ..RunRecord::default()
        };
        Report {
            plans: vec![PlanEntry {
                records: vec![record],
                ..PlanEntry::default()
            }],
            ..Report::default()
        }
    }

    #[test]
    fn the_longest_wait_limits() {
        assert_eq!(limits(&waited([0.2, 0.5])), [("nvme".to_string(), true)]);
        assert_eq!(
            limits(&waited([0.1, 0.2])),
            [("computing".to_string(), true)]
        );
        // Both at once, for longer than the tokens took.
        let report = waited([0.9, 1.1]);
        let limit = Overview::new(&report).plans[0].limit().unwrap();
        assert_eq!((limit.by.as_str(), limit.share), ("nvme", 0.55));
        assert!(limits(&waited([0.0, 0.0])).is_empty());
    }

    #[test]
    fn what_did_not_run_is_limited_as_predicted() {
        let mut report = sample::report(4, 16, 2, 3, 1, false);
        report.plans[0].records.clear();
        let found = limits(&report);
        assert_eq!(found.len(), 1);
        assert!(!found[0].1);
    }
}
