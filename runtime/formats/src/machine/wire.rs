//! The text of versions 1 to 7 of a machine file, as it is read.

use super::{Accelerator, Calibration, DriveIo, Extras, Link, Machine, Tier, TierKind};
use crate::copies::{ExpertCopy, WireCopy};
use crate::kind::toml_words;
use crate::source_id::SourceId;
use crate::units::parse_bytes;
use serde::Deserialize;
use serde::de::{self, Deserializer, Visitor};
use std::fmt;

/// Reads the machine that a text says, without its identity; its numbers are still to be checked.
pub(super) fn decode(text: &str) -> Result<Machine, String> {
    let mut wire: WireMachine = toml::from_str(text).map_err(|e| toml_words(text, &e))?;
    if wire.version < 2
        && (wire.calibration.is_some() || wire.tier.iter().any(|t| t.prompt_gflops.is_some()))
    {
        let what = "prompt_gflops and calibration are keys of version 2; write `version = 2`, or leave them out";
        return Err(what.into());
    }
    if wire.version < 3
        && (wire.watts_source.is_some() || wire.tier.iter().any(|t| t.link.is_some()))
    {
        let what =
            "watts_source and link are keys of version 3; write `version = 3`, or leave them out";
        return Err(what.into());
    }
    if wire.version < 5 && wire.tier.iter().any(|t| t.spread.is_some()) {
        let what = "spread is a key of version 5; write `version = 5`, or leave it out";
        return Err(what.into());
    }
    for tier in &wire.tier {
        check_unit(
            &tier.name,
            tier.kind.into(),
            tier.node,
            tier.device,
            (wire.version, 3),
        )?;
        tier.accelerator().check_version((wire.version, 4))?;
    }
    if wire.version < 5 && wire.tier.iter().any(|t| t.io.is_some()) {
        return Err("io is a key of version 5; write `version = 5`, or leave it out".into());
    }
    if wire.version < 6 && wire.tier.iter().any(|t| !t.copies.is_empty()) {
        return Err("copies is a key of version 6; write `version = 6`, or leave it out".into());
    }
    if wire.version < 7 && wire.tier.iter().any(|t| t.few_gflops.is_some()) {
        return Err(
            "few_gflops is a key of version 7; write `version = 7`, or leave it out".into(),
        );
    }
    let io = wire
        .tier
        .iter()
        .filter_map(|t| Some((t.name.clone(), DriveIo::from(t.io?))))
        .collect();
    let copies = wire.tier.iter_mut().map(|t| {
        let copies = std::mem::take(&mut t.copies);
        let copies: Vec<ExpertCopy> = copies.into_iter().map(ExpertCopy::from).collect();
        (t.name.clone(), copies)
    });
    let copies = copies.filter(|(_, copies)| !copies.is_empty()).collect();
    let links = wire
        .tier
        .iter()
        .filter_map(|t| Some((t.name.clone(), Link::from(t.link?))));
    let prices = wire
        .tier
        .iter()
        .filter_map(|t| Some((t.name.clone(), t.usd_per_gb?)));
    let products = wire
        .tier
        .iter()
        .filter_map(|t| Some((t.name.clone(), t.prompt_gflops?)));
    let few = wire
        .tier
        .iter()
        .filter_map(|t| Some((t.name.clone(), t.few_gflops?)));
    let spread = wire
        .tier
        .iter()
        .filter_map(|t| Some((t.name.clone(), t.spread?)));
    Ok(Machine {
        id: SourceId {
            name: wire.name.clone(),
            hash: String::new(),
        },
        extras: Extras {
            efficiency: wire.efficiency.unwrap_or(1.0),
            load_gbps: wire.load_gbps,
            price_usd: wire.price_usd,
            watts: wire.watts,
            watts_source: wire.watts_source,
            io,
            copies,
            usd_per_gb: prices.collect(),
            prompt_gflops: products.collect(),
            few_gflops: few.collect(),
            spread: spread.collect(),
            links: links.collect(),
            calibration: wire.calibration.map(Calibration::from),
        },
        name: wire.name,
        description: wire.description,
        tiers: wire.tier.into_iter().map(WireTier::into_tier).collect(),
        layer_overhead_us: wire.layer_overhead_us,
        token_overhead_us: wire.token_overhead_us,
    })
}

/// Fails if `node` or `device` doesn't go with the kind of tier, or is newer than the file's
/// version: `from` introduced them.
pub(crate) fn check_unit(
    tier: &str,
    kind: TierKind,
    node: Option<u32>,
    device: Option<u32>,
    (version, from): (u64, u64),
) -> Result<(), String> {
    let (key, other) = if kind == TierKind::Vram {
        ("device", node)
    } else {
        ("node", device)
    };
    if other.is_some() {
        return Err(format!(
            "tier '{tier}' is of kind \"{kind}\": which one it is says `{key}`, the number of {}",
            if kind == TierKind::Vram {
                "the GPU"
            } else {
                "the NUMA node"
            }
        ));
    }
    if (node.is_some() || device.is_some()) && version < from {
        return Err(format!(
            "{key} is a key of version {from}; write `version = {from}`, or leave it out"
        ));
    }
    Ok(())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WireMachine {
    #[serde(rename = "format")]
    _format: String,
    version: u64,
    name: String,
    #[serde(default)]
    description: String,
    layer_overhead_us: f64,
    token_overhead_us: f64,
    efficiency: Option<f64>,
    load_gbps: Option<f64>,
    price_usd: Option<f64>,
    watts: Option<f64>,
    watts_source: Option<String>,
    calibration: Option<WireCalibration>,
    tier: Vec<WireTier>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WireCalibration {
    when: String,
    records: u32,
    error_before: f64,
    error_after: f64,
}

#[derive(Deserialize, Clone, Copy)]
#[serde(deny_unknown_fields)]
struct WireLink {
    to_gbps: f64,
    to_pageable_gbps: f64,
    from_gbps: f64,
    from_pageable_gbps: f64,
    contended_gbps: f64,
    dram_contended_gbps: f64,
}

impl From<WireLink> for Link {
    fn from(wire: WireLink) -> Link {
        Link {
            to_gbps: wire.to_gbps,
            to_pageable_gbps: wire.to_pageable_gbps,
            from_gbps: wire.from_gbps,
            from_pageable_gbps: wire.from_pageable_gbps,
            contended_gbps: wire.contended_gbps,
            dram_contended_gbps: wire.dram_contended_gbps,
        }
    }
}

impl From<WireCalibration> for Calibration {
    fn from(wire: WireCalibration) -> Calibration {
        let WireCalibration {
            when,
            records,
            error_before,
            error_after,
        } = wire;
        Calibration {
            when,
            records,
            error_before,
            error_after,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WireTier {
    name: String,
    kind: WireKind,
    #[serde(deserialize_with = "capacity")]
    capacity: u64,
    read_gbps: f64,
    latency_us: f64,
    #[serde(default)]
    emulated: bool,
    usd_per_gb: Option<f64>,
    prompt_gflops: Option<f64>,
    few_gflops: Option<f64>,
    spread: Option<f64>,
    node: Option<u32>,
    device: Option<u32>,
    link_gbps: Option<f64>,
    layer_us: Option<f64>,
    resident_layer_us: Option<f64>,
    io: Option<WireIo>,
    #[serde(default)]
    copies: Vec<WireCopy>,
    link: Option<WireLink>,
    source: String,
}

impl WireTier {
    fn accelerator(&self) -> Accelerator {
        let &WireTier {
            link_gbps,
            layer_us,
            resident_layer_us,
            ..
        } = self;
        Accelerator {
            link_gbps,
            layer_us,
            resident_layer_us,
        }
    }

    fn into_tier(self) -> Tier {
        Tier {
            accelerator: self.accelerator(),
            name: self.name,
            kind: self.kind.into(),
            capacity_bytes: self.capacity,
            read_gbps: self.read_gbps,
            latency_us: self.latency_us,
            emulated: self.emulated,
            unit: self.node.or(self.device),
            source: self.source,
        }
    }
}

/// [`TierKind`] as files spell it.
#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
pub(crate) enum WireKind {
    Vram,
    Dram,
    Pmem,
    Cxl,
    Nvme,
}

impl From<WireKind> for TierKind {
    fn from(kind: WireKind) -> TierKind {
        match kind {
            WireKind::Vram => TierKind::Vram,
            WireKind::Dram => TierKind::Dram,
            WireKind::Pmem => TierKind::Pmem,
            WireKind::Cxl => TierKind::Cxl,
            WireKind::Nvme => TierKind::Nvme,
        }
    }
}

/// [`DriveIo`] as files spell it.
#[derive(Deserialize, Clone, Copy)]
#[serde(rename_all = "lowercase")]
pub(crate) enum WireIo {
    Direct,
    Buffered,
}

impl From<WireIo> for DriveIo {
    fn from(io: WireIo) -> DriveIo {
        match io {
            WireIo::Direct => DriveIo::Direct,
            WireIo::Buffered => DriveIo::Buffered,
        }
    }
}

/// Accepts a number of bytes or a size in words.
fn capacity<'de, D: Deserializer<'de>>(from: D) -> Result<u64, D::Error> {
    struct Size;
    impl Visitor<'_> for Size {
        type Value = u64;
        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a number of bytes or a size like \"24GiB\"")
        }
        fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<u64, E> {
            Ok(bytes)
        }
        fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<u64, E> {
            u64::try_from(bytes).map_err(|_| E::invalid_value(de::Unexpected::Signed(bytes), &self))
        }
        fn visit_str<E: de::Error>(self, text: &str) -> Result<u64, E> {
            parse_bytes(text).map_err(E::custom)
        }
    }
    from.deserialize_any(Size)
}
