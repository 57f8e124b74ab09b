//! What the machine gave while a run decoded, where that was not what its plan counted on.

use crate::placement::Prediction;
use crate::text::check_amount;
use serde::{Deserialize, Serialize};

/// What the machine gave while a run decoded, as measured apart from its tokens.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Conditions {
    /// Who had the processors.
    pub processors: Processors,
    /// Tiers whose rates were measured, fastest first by the plan.
    pub rates: Vec<TierRate>,
    /// What the plan predicts with these rates and this share of the processors.
    pub predicted: Option<Prediction>,
}

/// Who had the processors while a run decoded. What the system does not count is `None`.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Processors {
    /// Share of the time that tokens got of what the compute threads asked for, at most 1.
    pub share: Option<f64>,
    /// Part of the machine's busy time that a hypervisor took.
    pub stolen: Option<f64>,
    /// Processors that other programs used, on average.
    pub others: Option<f64>,
    /// Processors of the machine.
    pub count: Option<f64>,
    /// Part of the time in which any thread of the machine waited for a processor.
    pub pressure: Option<f64>,
    /// Times per second that a thread of the run was taken off a processor against its will.
    pub preempted_per_s: Option<f64>,
}

/// The rate of a tier during a run, in 10⁹ bytes per second.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TierRate {
    /// Name of the tier in the plan.
    pub name: String,
    /// Rate that the plan counts on.
    pub planned_gbps: f64,
    /// Rate that was measured.
    pub measured_gbps: f64,
}

impl Conditions {
    /// Says what is wrong with the numbers.
    pub(super) fn check(&self) -> Result<(), String> {
        let Processors {
            share,
            stolen,
            others,
            count,
            pressure,
            preempted_per_s,
        } = self.processors;
        for (key, part) in [("share", share), ("stolen", stolen), ("pressure", pressure)] {
            if let Some(part) = part.filter(|part| !(0.0..=1.0).contains(part)) {
                return Err(format!(
                    "conditions.processors.{key} is {part}, but must be between 0 and 1"
                ));
            }
        }
        for (key, value) in [
            ("others", others),
            ("count", count),
            ("preempted_per_s", preempted_per_s),
        ] {
            check_amount(
                &format!("conditions.processors.{key}"),
                value.unwrap_or(0.0),
            )?;
        }
        for rate in &self.rates {
            for (key, value) in [
                ("planned_gbps", rate.planned_gbps),
                ("measured_gbps", rate.measured_gbps),
            ] {
                check_amount(
                    &format!("{key} of tier '{}' in conditions", rate.name),
                    value,
                )?;
            }
        }
        Ok(())
    }
}
