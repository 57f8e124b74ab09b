//! What a machine, and the tiers of a plan, must satisfy.

use super::{Accelerator, Extras, GBPS, Machine, Medium, Tier, TierKind};
use crate::copies;
use crate::text::{check_amount, check_bytes, check_rate, quote};
use std::collections::{HashMap, HashSet};

/// Most tiers of a machine.
const MAX_TIERS: usize = 16;

/// Highest number of a NUMA node or a GPU.
const MAX_UNIT: u32 = 1023;

impl Machine {
    /// Fails unless all numbers are in range and the tiers in order.
    pub(super) fn check(&self) -> Result<(), String> {
        self.extras.check()?;
        check_amount("layer_overhead_us", self.layer_overhead_us)?;
        check_amount("token_overhead_us", self.token_overhead_us)?;
        check_tiers(self.tiers.iter())?;
        let is_drive = |name: &String| {
            let tier = self.tiers.iter().find(|tier| tier.name == *name);
            tier.is_some_and(Tier::is_drive)
        };
        let is_last_drive = |name: &String| {
            let last = self.tiers.last();
            last.is_some_and(|tier| tier.name == *name && tier.is_drive())
        };
        if let Some(name) = self.extras.io.keys().find(|name| !is_drive(name)) {
            return Err(format!(
                "tier '{name}' has the key io, but is not a drive that is read: only tiers of kind \"nvme\" that are \
                 not emulated have it; leave it out"
            ));
        }
        let mut with_copies = self.extras.copies.iter();
        if let Some((name, _)) = with_copies.find(|(name, _)| !is_last_drive(name)) {
            return Err(format!(
                "tier '{name}' has the key copies, but experts are read from the last tier only, if it is of kind \"nvme\" \
                 and not emulated; leave it out"
            ));
        }
        for pair in self.tiers.windows(2) {
            if pair[0].read_gbps < pair[1].read_gbps {
                return Err(format!(
                    "tier '{}' ({} GB/s) stands before tier '{}' ({} GB/s); list the tiers from fastest to slowest, \
                     since experts that are not pinned live on the last one",
                    pair[0].name, pair[0].read_gbps, pair[1].name, pair[1].read_gbps
                ));
            }
        }
        Ok(())
    }
}

impl Extras {
    fn check(&self) -> Result<(), String> {
        if !(self.efficiency > 0.0 && self.efficiency <= 1.0) {
            return Err(format!(
                "efficiency is {}, but must be above 0 and at most 1",
                self.efficiency
            ));
        }
        if let Some(rate) = self.load_gbps {
            check_rate("load_gbps", rate, GBPS)?;
        }
        for (key, value) in [("price_usd", self.price_usd), ("watts", self.watts)] {
            check_amount(key, value.unwrap_or(0.0))?;
        }
        for (tier, price) in &self.usd_per_gb {
            check_amount(&format!("usd_per_gb of tier '{tier}'"), *price)?;
        }
        for (key, rates) in [
            ("prompt_gflops", &self.prompt_gflops),
            ("few_gflops", &self.few_gflops),
        ] {
            for (tier, rate) in rates {
                check_rate(
                    &format!("{key} of tier '{tier}'"),
                    *rate,
                    "10^9 floating-point operations per second",
                )?;
            }
        }
        for (tier, spread) in &self.spread {
            check_amount(&format!("spread of tier '{tier}'"), *spread)?;
        }
        for (tier, link) in &self.links {
            for (key, rate) in link.rates() {
                check_rate(&format!("link.{key} of tier '{tier}'"), rate, GBPS)?;
            }
        }
        for (tier, copies) in &self.copies {
            copies::check(copies).map_err(|why| format!("copies of tier '{tier}': {why}"))?;
        }
        if let Some(calibration) = &self.calibration {
            check_amount("calibration.error_before", calibration.error_before)?;
            check_amount("calibration.error_after", calibration.error_after)?;
        }
        Ok(())
    }
}

impl Accelerator {
    fn check(&self, tier: &Tier) -> Result<(), String> {
        let name = &tier.name;
        if let Some((key, _)) = self.keys().next().filter(|_| tier.medium() != Medium::Gpu) {
            return Err(format!(
                "tier '{name}' is of kind \"{}\": only VRAM has {key}; leave it out",
                tier.kind
            ));
        }
        for (key, time) in self.keys().filter(|(key, _)| *key != "link_gbps") {
            check_amount(&format!("{key} of tier '{name}'"), time)?;
            if tier.emulated {
                return Err(format!(
                    "tier '{name}' is emulated and takes what the machine declares for a layer; leave {key} out"
                ));
            }
        }
        match self.link_gbps {
            Some(rate) => Ok(check_rate(
                &format!("link_gbps of tier '{name}'"),
                rate,
                GBPS,
            )?),
            None => Ok(()),
        }
    }
}

/// Fails unless the tiers could be those of a machine or a plan, whatever their order.
pub(crate) fn check_tiers<'a>(tiers: impl Iterator<Item = &'a Tier>) -> Result<(), String> {
    let mut names = HashSet::new();
    let mut drams = Vec::new();
    let mut units = HashMap::new();
    let mut last: Option<&Tier> = None;
    for tier in tiers {
        let name = &tier.name;
        check_name(name)?;
        if !names.insert(name.as_str()) {
            return Err(format!(
                "two tiers are named '{name}'; give each its own name"
            ));
        }
        if names.len() > MAX_TIERS {
            return Err(format!(
                "more than {MAX_TIERS} tiers; merge those of like speed"
            ));
        }
        check_tier(tier)?;
        if tier.kind == TierKind::Dram {
            drams.push(tier);
        }
        if let Some(unit) = tier.unit_key()
            && let Some(other) = units.insert(unit, name)
        {
            return Err(format!(
                "tiers '{other}' and '{name}' both have {} {}; merge them",
                unit.0, unit.1
            ));
        }
        last = Some(tier);
    }
    if names.is_empty() {
        return Err("no tier; add a [[tier]] table for each kind of memory".into());
    }
    check_drams(&drams)?;
    match last.filter(|t| t.node().is_some()) {
        // Pooled experts on the last tier are read in the mapped file, whose pages the system
        // places.
        Some(tier) => Err(format!(
            "tier '{}' is the last one, where experts stay in the mapped file, and has a `node`; leave the line out, or \
             add the drive as the last tier",
            tier.name
        )),
        None => Ok(()),
    }
}

fn check_name(name: &str) -> Result<(), String> {
    let known = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-');
    if (1..=64).contains(&name.len()) && name.bytes().all(known) {
        return Ok(());
    }
    Err(format!(
        "tier name {} must be 1 to 64 letters, digits, '-' or '_'",
        quote(name)
    ))
}

/// Checks the numbers of one tier.
fn check_tier(tier: &Tier) -> Result<(), String> {
    let name = &tier.name;
    if tier.capacity_bytes == 0 {
        return Err(format!(
            "tier '{name}' has a capacity of 0; leave the tier out"
        ));
    }
    check_bytes(
        &format!("the capacity of tier '{name}'"),
        tier.capacity_bytes,
    )?;
    check_rate(&format!("read_gbps of tier '{name}'"), tier.read_gbps, GBPS)?;
    check_amount(&format!("latency_us of tier '{name}'"), tier.latency_us)?;
    tier.accelerator.check(tier)?;
    if let Some((key, number)) = tier.unit_key() {
        if tier.medium() == Medium::Drive {
            return Err(format!(
                "tier '{name}' is a block device, which has no {key}; leave the line out"
            ));
        }
        if number > MAX_UNIT {
            return Err(format!(
                "{key} of tier '{name}' is {number}, but {MAX_UNIT} is the most"
            ));
        }
    }
    Ok(())
}

/// Checks that there is one tier of kind `dram`, or one for each NUMA node.
fn check_drams(drams: &[&Tier]) -> Result<(), String> {
    match drams {
        [_] => Ok(()),
        [] => Err(
            "no tier of kind \"dram\"; add the main memory, where the rest of the program works"
                .into(),
        ),
        [first, second, ..] => match drams.iter().find(|t| t.unit.is_none()) {
            Some(without) => Err(format!(
                "tiers '{}' and '{}' are both of kind \"dram\", and '{}' does not say which NUMA node it is; there can be \
                 only one, or one for each `node`",
                first.name, second.name, without.name
            )),
            None => Ok(()),
        },
    }
}
