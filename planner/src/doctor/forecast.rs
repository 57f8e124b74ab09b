//! Speed of a model on this machine, as it is and as it would be after a change.

use super::files::Probed;
use super::model::Opened;
use super::{Cost, Options, Process, Speeds};
use crate::budget::{self, Decision, Fit};
use crate::cost::{middle, predict};
use crate::host;
use crate::opening::Opening;
use crate::probe::disk::DiskRate;
use crate::probe::fixed::Fixed;
use crate::probe::memory::Memory;
use crate::probe::{bytes_to_measure, shares};
use crate::profile::Evidence;
use anyhow::Result;
use tier_plan_runtime::formats::machine::{Machine, Medium, TierKind};
use tier_plan_runtime::formats::placement::{Placement, Prediction};
use tier_plan_runtime::formats::profile;
use tier_plan_runtime::kernels::Kernels;
use tier_plan_runtime::quant::TensorType;
use tier_plan_runtime::threads::ThreadPool;
use tier_plan_runtime::tiers::limits::Limit;

/// Rate and latency of a drive.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DriveRate {
    /// 10⁹ bytes per second.
    pub gbps: f64,
    /// Microseconds before the first byte.
    pub latency_us: f64,
}

/// Rates of this machine.
#[derive(Debug, Clone, PartialEq)]
pub struct Rates {
    /// Rate at which experts compute from main memory, in 10⁹ bytes per second.
    pub memory_gbps: f64,
    /// The drive, if its rate is known.
    pub drive: Option<DriveRate>,
    /// Fixed time per layer, in microseconds.
    pub layer_us: f64,
    /// Fixed time per token, in microseconds.
    pub token_us: f64,
    /// Where they come from, as a clause.
    pub from: String,
    /// Whether they were measured just now, with whatever else the machine is doing.
    pub is_present: bool,
}

/// A change of the machine.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Change {
    /// Factor of the rate of main memory.
    pub memory_factor: f64,
    /// Factor of the rate of the drive.
    pub drive_factor: f64,
    /// Factor of everything that the processors do.
    pub processor_factor: f64,
    /// Bytes that the process may hold; as now when `None`.
    pub limit_bytes: Option<u64>,
}

impl Default for Change {
    fn default() -> Self {
        Self {
            memory_factor: 1.0,
            drive_factor: 1.0,
            processor_factor: 1.0,
            limit_bytes: None,
        }
    }
}

/// Returns the rates of a machine file that is of this machine, or measures main memory, which takes
/// two seconds. A drive that was measured just now counts.
///
/// # Errors
/// Why main memory cannot be measured.
pub(super) fn rates(
    opened: &Opened,
    probed: &Probed,
    process: &Process,
    limit: Option<&Limit>,
    drive: Option<&DiskRate>,
    options: &Options<'_>,
) -> Result<Rates, String> {
    let mut rates = match probed.of_this_machine(&host::describe()).and_then(of_file) {
        Some(rates) => rates,
        None => measured(opened, process, limit, options).map_err(|error| format!("{error:#}"))?,
    };
    if let Some(rate) = drive {
        rates.drive = Some(DriveRate {
            gbps: rate.gbps.value,
            latency_us: rate.latency_us.value,
        });
    }
    Ok(rates)
}

/// Returns the rates of a machine file that has main memory.
fn of_file(machine: &Machine) -> Option<Rates> {
    let real = |kind| move |t: &&_| is_real(t, kind);
    let dram = machine.tiers.iter().find(real(TierKind::Dram))?;
    let drive = machine.tiers.iter().find(real(TierKind::Nvme));
    Some(Rates {
        memory_gbps: dram.read_gbps,
        drive: drive.map(|tier| DriveRate {
            gbps: tier.read_gbps,
            latency_us: tier.latency_us,
        }),
        layer_us: machine.layer_overhead_us,
        token_us: machine.token_overhead_us,
        from: "the machine file".to_string(),
        is_present: false,
    })
}

fn is_real(tier: &tier_plan_runtime::formats::machine::Tier, kind: TierKind) -> bool {
    tier.kind == kind && !tier.emulated
}

fn measured(
    opened: &Opened,
    process: &Process,
    limit: Option<&Limit>,
    options: &Options<'_>,
) -> Result<Rates> {
    let kernels = process
        .used
        .as_ref()
        .ok()
        .and_then(|isa| Kernels::with_isa(*isa))
        .unwrap_or(Kernels::best());
    let pool = ThreadPool::new(options.threads.unwrap_or(process.cores));
    let bytes = bytes_to_measure(limit.map(|limit| limit.bytes))?;
    let mut memory = Memory::new(kernels, bytes)?;
    let shares = shares(&opened.gguf, &opened.spec);
    let main = shares.iter().max_by(|(_, a), (_, b)| a.total_cmp(b));
    let main = main.map_or(TensorType::Q4_K, |(ty, _)| *ty);
    let memory_gbps = memory.matvec_gbps(&pool, main).value;
    let fixed = Fixed::assumed(memory.entry_us(&pool));
    Ok(Rates {
        memory_gbps,
        drive: None,
        layer_us: fixed.layer_us,
        token_us: fixed.token_us,
        from: format!(
            "matvecs of {main} from main memory just now, {memory_gbps:.1} GB/s with {} threads",
            pool.n_threads()
        ),
        is_present: true,
    })
}

/// A model on this machine.
pub struct Forecast<'a> {
    opened: &'a Opened,
    evidence: Evidence,
    rates: Rates,
    limit: Option<Limit>,
}

impl<'a> Forecast<'a> {
    /// Predicts a model with the plan that `run` would choose. The experts are used as in the profile
    /// beside the model, or evenly without one.
    ///
    /// # Errors
    /// When the model has more experts than can be predicted.
    pub fn new(opened: &'a Opened, rates: Rates, limit: Option<Limit>) -> Result<Self, String> {
        let path = opened.gguf.path().with_extension("profile");
        let profile = profile::read(&path).ok();
        let profile =
            profile.filter(|profile| profile.check_model(&opened.shape.id, &path).is_ok());
        let evidence = Evidence::new(&opened.shape, profile.as_ref())
            .or_else(|_| Evidence::uniform(&opened.shape))
            .map_err(|error| format!("{error:#}"))?;
        Ok(Self {
            opened,
            evidence,
            rates,
            limit,
        })
    }

    /// Returns where the rates come from.
    pub fn from(&self) -> &str {
        &self.rates.from
    }

    /// Whether the rates have what else the machine is doing in them.
    pub fn is_present(&self) -> bool {
        self.rates.is_present
    }

    /// Whether the rate of the drive is known.
    pub fn has_drive(&self) -> bool {
        self.rates.drive.is_some()
    }

    /// Returns predicted tokens per second while decoding, at half of the context; `None` where the
    /// rate of the drive counts and is unknown, or the system reads the file again and again.
    pub fn tok_s(&self, change: &Change) -> Option<f64> {
        let limit = change.limit_bytes.map(|bytes| Limit {
            bytes,
            source: "free memory",
            is_hard: false,
        });
        let limit = limit.or(self.limit.clone());
        let Decision { chosen, .. } =
            budget::decide(self.opened.model(), &Opening::default(), limit.as_ref()).ok()?;
        if chosen.fit() == Fit::Mapped && limit.is_some() {
            return None;
        }
        let plan = self.with_rates(chosen.plan, change)?;
        let speed = predict(&plan, &self.opened.shape, &self.evidence).decode_tok_s;
        Some(speed).filter(|speed| speed.is_finite() && *speed > 0.0)
    }

    /// Puts the rates of this machine into a plan.
    fn with_rates(&self, mut plan: Placement, change: &Change) -> Option<Placement> {
        let Rates {
            memory_gbps,
            drive,
            layer_us,
            token_us,
            ..
        } = &self.rates;
        for tier in plan.tiers.iter_mut() {
            match tier.tier.medium() {
                Medium::Addressable => {
                    tier.tier.read_gbps =
                        memory_gbps * change.memory_factor * change.processor_factor;
                }
                Medium::Drive => {
                    let drive = drive.as_ref()?;
                    tier.tier.read_gbps = drive.gbps * change.drive_factor;
                    tier.tier.latency_us = drive.latency_us;
                }
                Medium::Gpu => return None,
            }
        }
        plan.layer_overhead_us = layer_us / change.processor_factor;
        plan.token_overhead_us = token_us / change.processor_factor;
        plan.predicted = Prediction {
            at: middle(plan.context),
            ..Prediction::default()
        };
        Some(plan)
    }
}

/// Returns the cost of what a change would mend: in tokens per second where they can be predicted.
pub(super) fn cost(
    words: impl Into<String>,
    forecast: Option<&Forecast<'_>>,
    change: &Change,
) -> Cost {
    cost_between(words, forecast, &Change::default(), change)
}

/// Returns the cost of a machine as it is `now` beside one that is `mended`, both as changes of the
/// machine that the rates are of.
pub(super) fn cost_between(
    words: impl Into<String>,
    forecast: Option<&Forecast<'_>>,
    now: &Change,
    mended: &Change,
) -> Cost {
    let speeds = forecast.and_then(|forecast| {
        Some(Speeds {
            now_tok_s: forecast.tok_s(now)?,
            mended_tok_s: forecast.tok_s(mended)?,
        })
    });
    Cost {
        words: words.into(),
        speeds,
    }
}
