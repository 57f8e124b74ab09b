//! The rate of the drive, where it is to be measured.

use super::drive::folder;
use super::{Check, Options};
use crate::interrupt::Interrupted;
use crate::probe::disk::{Disk, DiskRate};
use anyhow::Result;
use std::path::Path;
use std::time::Duration;
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::describe;
use tier_plan_runtime::units::show_bytes;

/// Time that the drive is read for.
const READ_TIME: Duration = Duration::from_secs(3);

/// Rate of the drive, or why it was not measured.
pub(super) type Rate = Result<DiskRate, String>;

/// Measures the drive where that was asked for: with the experts of a model, or a file of 1 GiB.
///
/// # Errors
/// When Ctrl-C came.
pub(super) fn measured(options: &Options<'_>) -> Result<Option<Rate>> {
    if !options.measure {
        return Ok(None);
    }
    let measure = || -> Result<DiskRate> {
        let mut disk = open(options.model)?;
        disk.choose_io(READ_TIME / 2)?;
        disk.measure(READ_TIME)
    };
    match measure() {
        Ok(rate) => Ok(Some(Ok(rate))),
        Err(error) if error.is::<Interrupted>() => Err(error),
        Err(error) => Ok(Some(Err(format!("{error:#}")))),
    }
}

fn open(model: Option<&Path>) -> Result<Disk> {
    let opened = model.and_then(|model| {
        let gguf = Gguf::open(model).ok()?;
        let spec = describe(&gguf).ok()?;
        Some((gguf, spec))
    });
    match opened {
        Some((gguf, spec)) if spec.moe_layers().next().is_some() => Disk::of_model(&gguf, &spec),
        _ => {
            let folder = folder(model);
            Disk::check_folder(&folder)?;
            Disk::of_folder(&folder)
        }
    }
}

pub(super) fn check(rate: Option<&Rate>) -> Check {
    let id = "drive.rate";
    match rate {
        None => Check::ok(
            id,
            "not measured; --measure reads the drive for some seconds",
        ),
        Some(Err(why)) => Check::ok(id, format!("not measured: {why}")),
        Some(Ok(rate)) => {
            let (gbps, us) = (rate.gbps.value, rate.latency_us.value);
            Check::ok(
                id,
                format!(
                    "{gbps:.2} GB/s in pieces of {}, {us:.0} µs for one page",
                    show_bytes(rate.piece_bytes)
                ),
            )
            .fact("gbps", gbps)
            .fact("spread", rate.gbps.spread)
            .fact("latency_us", us)
            .fact("direct", rate.direct)
        }
    }
}
