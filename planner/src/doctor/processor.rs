//! The processor: its model, the kernels that it runs, AMX, and its clock.

use super::system::field;
use super::{Check, Process, System};
use serde_json::Value;
use tier_plan_runtime::kernels::Isa;

const CPU: &str = "sys/devices/system/cpu";

/// Flag of a kernel that has AMX, and that of its 8-bit tiles.
const AMX_FLAGS: [&str; 2] = ["amx_tile", "amx_int8"];

/// Part of the highest clock below which a limit counts.
const MIN_CLOCK: f64 = 0.95;

pub(super) fn checks(system: &System, process: &Process) -> Vec<Check> {
    let cpuinfo = system.text("proc/cpuinfo").unwrap_or_default();
    vec![
        model(&cpuinfo, process),
        kernels(process),
        amx(&cpuinfo, process),
        clock(system),
    ]
}

fn model(cpuinfo: &str, process: &Process) -> Check {
    let name = field(cpuinfo, "model name").unwrap_or(std::env::consts::ARCH);
    let sockets = sockets(cpuinfo);
    let of = match sockets {
        Some(n) if n > 1 => format!(" in {n} sockets"),
        _ => String::new(),
    };
    let (cores, processors) = (process.cores, process.processors);
    Check::ok(
        "processor.model",
        format!("{name}: {cores} cores, {processors} hardware threads for this process{of}"),
    )
    .fact("model", name)
    .fact("cores", cores)
    .fact("hardware_threads", processors)
    .fact("sockets", sockets)
}

fn sockets(cpuinfo: &str) -> Option<usize> {
    let ids = cpuinfo.lines().filter_map(|line| {
        let (name, id) = line.split_once(':')?;
        (name.trim() == "physical id").then(|| id.trim())
    });
    let ids: std::collections::BTreeSet<&str> = ids.collect();
    (!ids.is_empty()).then_some(ids.len())
}

fn kernels(process: &Process) -> Check {
    let names: Vec<&str> = process.available.iter().map(|isa| isa.name()).collect();
    let available = names.join(", ");
    let facts = |check: Check| {
        let used = process.used.as_ref().ok().map(|isa| isa.name());
        check
            .fact("available", Value::from(names.clone()))
            .fact("used", used)
    };
    let used = match &process.used {
        Ok(used) => *used,
        Err(why) => {
            return facts(
                Check::ok("processor.kernels", why.as_str()).failure("unset TIER_PLAN_ISA"),
            );
        }
    };
    let found = Check::ok(
        "processor.kernels",
        format!("{used} in use, of {available} that run here"),
    );
    let best = process
        .available
        .iter()
        .max()
        .copied()
        .unwrap_or(Isa::Scalar);
    let check = if used == Isa::Scalar && best == Isa::Scalar {
        found.warning(
            "plain kernels only, as neither AVX2 (with FMA and F16C) nor NEON (with dotprod) is in the processor's \
             list of features",
        )
    } else if used < best {
        found
            .warning(format!(
                "TIER_PLAN_ISA={used} keeps the kernels of {best} unused"
            ))
            .mend("unset TIER_PLAN_ISA")
    } else {
        found
    };
    facts(check)
}

fn amx(cpuinfo: &str, process: &Process) -> Check {
    let flags = field(cpuinfo, "flags").unwrap_or_default();
    let has = AMX_FLAGS
        .iter()
        .all(|flag| flags.split_whitespace().any(|f| f == *flag));
    let permitted = process.available.contains(&Isa::Amx);
    let facts = |check: Check| check.fact("processor", has).fact("permitted", permitted);
    facts(match (permitted, has) {
        (true, _) => Check::ok("processor.amx", "permitted"),
        (false, false) => Check::ok("processor.amx", "none"),
        (false, true) => Check::ok(
            "processor.amx",
            "the processor has amx_tile and amx_int8, but the system does not permit tiles",
        )
        .warning(
            "prompts of 64 tokens: 265 · 10⁹ products per second with tiles, 180 without (Q4_K from the cache, \
             docs/performance.md)",
        )
        .mend("use Linux 5.16 or newer, and let the container's seccomp profile permit arch_prctl"),
    })
}

/// The clock as the first processor reports it; all of a machine are governed alike.
fn clock(system: &System) -> Check {
    let id = "processor.governor";
    let read = |name: &str| system.text(&format!("{CPU}/cpu0/cpufreq/{name}"));
    let khz = |name: &str| read(name).and_then(|khz| khz.parse::<u64>().ok());
    let Some(governor) = read("scaling_governor") else {
        return Check::ok(
            id,
            "unknown: the system reports no clock (common in virtual machines)",
        );
    };
    let driver = read("scaling_driver").unwrap_or_default();
    let preference = read("energy_performance_preference");
    let (least, most, highest) = (
        khz("scaling_min_freq"),
        khz("scaling_max_freq"),
        khz("cpuinfo_max_freq"),
    );
    let ghz = |khz: u64| format!("{:.1} GHz", khz as f64 / 1e6);
    let mut found = format!("{governor} ({driver})");
    if let Some(most) = most {
        found.push_str(&format!(", up to {}", ghz(most)));
    }
    let check = Check::ok(id, found)
        .fact("governor", governor.as_str())
        .fact("driver", driver.as_str())
        .fact("preference", preference.clone())
        .fact("min_khz", least)
        .fact("max_khz", most)
        .fact("hardware_max_khz", highest);
    // These drivers choose the clock by load under `powersave`, as `schedutil` does elsewhere.
    let follows_load = driver.starts_with("intel_pstate") || driver.starts_with("amd-pstate-epp");
    let set = "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor";
    if governor == "powersave" && !follows_load {
        let stays = least.zip(highest).map_or(
            "powersave keeps the clock at its lowest".to_string(),
            |(least, highest)| {
                format!(
                    "powersave keeps the clock at {} of {} (scaling_min_freq), and prompts take their time from it",
                    ghz(least),
                    ghz(highest)
                )
            },
        );
        return check.warning(stays).mend(set);
    }
    if preference.as_deref() == Some("power") {
        return check
            .warning("energy_performance_preference is power: the clock rises late and not to its highest")
            .mend(
                "echo performance | sudo tee \
                 /sys/devices/system/cpu/cpu*/cpufreq/energy_performance_preference",
            );
    }
    match most.zip(highest) {
        Some((most, highest)) if (most as f64) < MIN_CLOCK * highest as f64 => check
            .warning(format!(
                "scaling_max_freq keeps the clock at {} of {}, and prompts take their time from it",
                ghz(most),
                ghz(highest)
            ))
            .mend(format!(
                "echo {highest} | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_max_freq"
            )),
        _ => check,
    }
}
