//! The text of a machine file, laid out by hand: what [`super::wire`] reads.

use super::{Accelerator, Extras, MACHINE, Machine, Tier};
use crate::copies;
use crate::text::{float, quote};
use crate::units::parse_bytes;

impl Machine {
    /// Encodes the file as text. The identity is not written: it is the hash of this text.
    pub fn encode(&self) -> String {
        let mut out = String::new();
        out.push_str(&format!(
            "format = {}\nversion = {}\n",
            quote(MACHINE.format),
            self.version()
        ));
        out.push_str(&format!("name = {}\n", quote(&self.name)));
        out.push_str(&format!("description = {}\n", quote(&self.description)));
        out.push_str(&format!(
            "layer_overhead_us = {}\n",
            float(self.layer_overhead_us)
        ));
        out.push_str(&format!(
            "token_overhead_us = {}\n",
            float(self.token_overhead_us)
        ));
        let extras = &self.extras;
        let efficiency = (extras.efficiency != 1.0).then_some(extras.efficiency);
        for (key, value) in [
            ("efficiency", efficiency),
            ("load_gbps", extras.load_gbps),
            ("price_usd", extras.price_usd),
            ("watts", extras.watts),
        ] {
            if let Some(value) = value {
                out.push_str(&format!("{key} = {}\n", float(value)));
            }
        }
        if let Some(source) = &extras.watts_source {
            out.push_str(&format!("watts_source = {}\n", quote(source)));
        }
        if let Some(calibration) = &extras.calibration {
            out.push_str(&format!(
                "\n[calibration]\nwhen = {}\n",
                quote(&calibration.when)
            ));
            out.push_str(&format!("records = {}\n", calibration.records));
            out.push_str(&format!(
                "error_before = {}\n",
                float(calibration.error_before)
            ));
            out.push_str(&format!(
                "error_after = {}\n",
                float(calibration.error_after)
            ));
        }
        self.tiers
            .iter()
            .for_each(|tier| encode_tier(tier, &self.extras, &mut out));
        out
    }

    /// Returns the oldest version that has all its keys.
    fn version(&self) -> u32 {
        let extras = &self.extras;
        let units = self.tiers.iter().any(|t| t.unit.is_some());
        match () {
            () if !extras.few_gflops.is_empty() => 7,
            () if !extras.copies.is_empty() => 6,
            () if !extras.io.is_empty() || !extras.spread.is_empty() => 5,
            () if self
                .tiers
                .iter()
                .any(|t| t.accelerator != Accelerator::default()) =>
            {
                4
            }
            () if units || !extras.links.is_empty() || extras.watts_source.is_some() => 3,
            () if extras.prompt_gflops.is_empty() && extras.calibration.is_none() => 1,
            () => 2,
        }
    }
}

fn encode_tier(tier: &Tier, extras: &Extras, out: &mut String) {
    out.push_str("\n[[tier]]\n");
    out.push_str(&format!("name = {}\n", quote(&tier.name)));
    out.push_str(&format!("kind = {}\n", quote(tier.kind.as_str())));
    out.push_str(&format!(
        "capacity = {}\n",
        show_capacity(tier.capacity_bytes)
    ));
    out.push_str(&format!("read_gbps = {}\n", float(tier.read_gbps)));
    out.push_str(&format!("latency_us = {}\n", float(tier.latency_us)));
    out.push_str(&format!("emulated = {}\n", tier.emulated));
    if let Some((key, number)) = tier.unit_key() {
        out.push_str(&format!("{key} = {number}\n"));
    }
    for (key, value) in tier.accelerator.keys() {
        out.push_str(&format!("{key} = {}\n", float(value)));
    }
    if let Some(io) = extras.io.get(&tier.name) {
        out.push_str(&format!("io = {}\n", quote(io.as_str())));
    }
    if let Some(copies) = extras.copies.get(&tier.name) {
        out.push_str(&format!("copies = {}\n", copies::encode(copies)));
    }
    if let Some(price) = extras.usd_per_gb.get(&tier.name) {
        out.push_str(&format!("usd_per_gb = {}\n", float(*price)));
    }
    if let Some(rate) = extras.prompt_gflops.get(&tier.name) {
        out.push_str(&format!("prompt_gflops = {}\n", float(*rate)));
    }
    if let Some(rate) = extras.few_gflops.get(&tier.name) {
        out.push_str(&format!("few_gflops = {}\n", float(*rate)));
    }
    if let Some(spread) = extras.spread.get(&tier.name) {
        out.push_str(&format!("spread = {}\n", float(*spread)));
    }
    if let Some(link) = extras.links.get(&tier.name) {
        let rates = link
            .rates()
            .map(|(key, rate)| format!("{key} = {}", float(rate)));
        out.push_str(&format!("link = {{ {} }}\n", rates.join(", ")));
    }
    out.push_str(&format!("source = {}\n", quote(&tier.source)));
}

/// Formats a capacity with its unit where that is short and exact (`"24GiB"`, `"768GB"`), else as a
/// number of bytes.
pub(super) fn show_capacity(bytes: u64) -> String {
    const UNITS: [(u64, &str); 7] = [
        (1 << 40, "TiB"),
        (1 << 30, "GiB"),
        (1 << 20, "MiB"),
        (1 << 10, "KiB"),
        (1_000_000_000_000, "TB"),
        (1_000_000_000, "GB"),
        (1_000_000, "MB"),
    ];
    for (scale, unit) in UNITS {
        let text = format!("{}{unit}", bytes as f64 / scale as f64);
        // A longer decimal says no more than the number of bytes does.
        if bytes >= scale && text.len() <= 10 && parse_bytes(&text) == Ok(bytes) {
            return quote(&text);
        }
    }
    bytes.to_string()
}
