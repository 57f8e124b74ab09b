//! Whether the machine is busy with other work.

use super::forecast::cost_between;
use super::{Change, Check, Forecast, Process, System};
use crate::probe::busy::{MAX_LOAD, parse_load};

/// Part of ten seconds in which tasks waited, above which it counts.
const MAX_CPU_PRESSURE: f64 = 0.2;
const MAX_MEMORY_PRESSURE: f64 = 0.01;
const MAX_IO_PRESSURE: f64 = 0.1;

pub(super) fn checks(
    system: &System,
    process: &Process,
    forecast: Option<&Forecast<'_>>,
) -> Vec<Check> {
    vec![load(system, process, forecast), pressure(system)]
}

fn load(system: &System, process: &Process, forecast: Option<&Forecast<'_>>) -> Check {
    let id = "busy.load";
    let Some(load) = system
        .text("proc/loadavg")
        .and_then(|text| parse_load(&text))
    else {
        return Check::ok(id, "unknown: the system reports no load");
    };
    let processors = process.processors.max(1) as f64;
    let check = Check::ok(id, format!("{load} on {processors:.0} hardware threads"))
        .fact("load", load)
        .fact("hardware_threads", process.processors);
    if load <= MAX_LOAD * processors {
        return check;
    }
    // As many threads as want to run share the processors evenly with those that compute.
    let threads = process.cores.max(1) as f64;
    let share = (processors / (threads + load)).min(1.0);
    let factor = |processor_factor| Change {
        processor_factor,
        ..Change::default()
    };
    let words = format!(
        "{load} threads ran or wanted to in the last minute, so {threads:.0} threads get about {:.0} % of the time that \
         they ask for",
        share * 100.0
    );
    let cost = match forecast {
        // The rates were measured beside the others: how fast it would be without is unknown.
        Some(forecast) if forecast.is_present() => {
            format!("{words}; predictions rest on rates measured meanwhile").into()
        }
        _ if share < 1.0 => cost_between(words, forecast, &factor(share), &factor(1.0)),
        _ => words.into(),
    };
    check
        .warning(cost)
        .mend("top, and end or wait for what runs beside")
}

/// Returns the part of the last ten seconds in which some task waited.
fn waited(text: &str) -> Option<f64> {
    let line = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let percent = line
        .split_whitespace()
        .find_map(|field| field.strip_prefix("avg10="))?;
    let part = percent.parse::<f64>().ok()? / 100.0;
    (0.0..=1.0).contains(&part).then_some(part)
}

fn pressure(system: &System) -> Check {
    let id = "busy.pressure";
    let kinds = [
        ("cpu", "a processor", MAX_CPU_PRESSURE),
        ("memory", "memory", MAX_MEMORY_PRESSURE),
        ("io", "a drive", MAX_IO_PRESSURE),
    ];
    let (mut shown, mut high) = (Vec::new(), Vec::new());
    let mut check = Check::ok(id, "unknown: the system has no /proc/pressure");
    for (kind, what, most) in kinds {
        let part = system
            .text(&format!("proc/pressure/{kind}"))
            .and_then(|text| waited(&text));
        check = check.fact(kind, part);
        let Some(part) = part else { continue };
        shown.push(format!("{kind} {:.1} %", part * 100.0));
        if part > most {
            high.push(format!("for {what} in {:.1} %", part * 100.0));
        }
    }
    if shown.is_empty() {
        return check;
    }
    let check = Check {
        found: format!("{} of the last 10 s", shown.join(", ")),
        ..check
    };
    if high.is_empty() {
        return check;
    }
    check
        .warning(format!(
            "some task waited {} of the last 10 s, and a model would wait as well",
            high.join(", ")
        ))
        .mend("top, and end or wait for what runs beside")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressures_are_parts() {
        let text = "some avg10=4.21 avg60=9.49 avg300=6.31 total=28306513\nfull avg10=0.00 total=0";
        assert_eq!(waited(text), Some(0.0421));
        for odd in [
            "",
            "full avg10=1.0",
            "some avg10=x",
            "some avg10=nan",
            "some avg10=101",
            "some total=1",
        ] {
            assert_eq!(waited(odd), None, "{odd:?}");
        }
    }
}
