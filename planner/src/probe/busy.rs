//! Whether the machine was busy with other work while it was measured.

use crate::conditions::describe_processors;
use std::fs;
use std::path::Path;
use tier_plan_runtime::formats::record::Processors;

/// Part of the processors that other programs may use before the machine counts as busy.
const MAX_OTHERS: f64 = 0.1;

/// Load per processor, before anything is measured, above which the machine counts as busy.
pub(crate) const MAX_LOAD: f64 = 0.5;

/// Drift of a figure, from one fifth of the time to another, above which it gets a warning.
const MAX_DRIFT: f64 = 0.15;

/// What may say that the machine was busy.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Signs {
    /// Who had the processors while the machine was measured.
    pub(super) processors: Processors,
    /// Threads that ran or wanted to, on average over the minute before.
    pub(super) load: Option<f64>,
    /// Drift of the rate of main memory.
    pub(super) memory_drift: f64,
    /// Drift of the rate of the drive.
    pub(super) drive_drift: f64,
}

impl Signs {
    /// Says that the machine was busy if it was: what else ran, how much rates varied, and what to do.
    pub(super) fn doubt(&self) -> Option<String> {
        let Processors { others, count, .. } = self.processors;
        let count = count.unwrap_or_else(cores);
        // A minute's load may be of a program that has ended, the profile that was made just before,
        // say. So it counts where nothing tells who had the processors since.
        let has_load = self.load.is_some_and(|load| load > MAX_LOAD * count);
        let is_loaded = has_load && others.is_none();
        let has_others = others.is_some_and(|others| others > MAX_OTHERS * count);
        let is_kept_waiting = crate::conditions::is_busy(&self.processors);
        if !(is_loaded || has_others || is_kept_waiting) {
            return None;
        }
        let mut parts = Vec::new();
        if let Some(load) = self.load.filter(|_| has_load) {
            parts.push(format!("a load of {load} on {count:.0} processors before"));
        }
        parts.push(describe_processors(&self.processors));
        if let Some(pressure) = self.processors.pressure.filter(|part| *part >= 0.05) {
            parts.push(format!(
                "some thread waited for a processor {:.0} % of the time",
                pressure * 100.0
            ));
        }
        let vary = |what: &str, drift: f64| {
            (drift > MAX_DRIFT).then(|| format!("{what} varied by {:.0} %", drift * 100.0))
        };
        parts.extend(vary("the rate of main memory", self.memory_drift));
        parts.extend(vary("the rate of the drive", self.drive_drift));
        parts.retain(|part| !part.is_empty());
        Some(format!("the machine is busy: {}", parts.join(", ")))
    }
}

fn cores() -> f64 {
    std::thread::available_parallelism().map_or(1.0, |n| n.get() as f64)
}

/// Returns the load of the last minute.
pub(super) fn load() -> Option<f64> {
    parse_load(&fs::read_to_string(Path::new("/proc/loadavg")).ok()?)
}

/// Parses `/proc/loadavg`: returns the load of the last minute.
pub(crate) fn parse_load(text: &str) -> Option<f64> {
    let load: f64 = text.split_whitespace().next()?.parse().ok()?;
    Some(load).filter(|load| load.is_finite() && *load >= 0.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quiet() -> Signs {
        Signs {
            processors: Processors {
                share: Some(0.99),
                others: Some(0.1),
                count: Some(2.0),
                stolen: Some(0.0),
                pressure: Some(0.3),
                preempted_per_s: Some(4.0),
            },
            load: Some(0.3),
            memory_drift: 0.02,
            // A drive of its own may vary on a quiet machine; that has a warning of its own.
            drive_drift: 0.4,
        }
    }

    #[test]
    fn a_quiet_machine_gives_no_doubt() {
        assert_eq!(quiet().doubt(), None);
        assert_eq!(Signs::default().doubt(), None);
    }

    #[test]
    fn what_else_ran_is_named() {
        let signs = Signs {
            processors: Processors {
                share: Some(0.61),
                others: Some(1.3),
                stolen: Some(0.04),
                pressure: Some(0.72),
                ..quiet().processors
            },
            load: Some(5.82),
            memory_drift: 0.31,
            ..quiet()
        };
        assert_eq!(
            signs.doubt().unwrap(),
            "the machine is busy: a load of 5.82 on 2 processors before, its threads got 61 % of the processors' time, other \
             programs used 1.3 of 2 processors, a hypervisor took 4 %, some thread waited for a processor 72 % of the \
             time, the rate of main memory varied by 31 %, the rate of the drive varied by 40 %"
        );
    }

    #[test]
    fn each_sign_is_enough() {
        let mut waited = quiet();
        waited.processors.share = Some(0.8);
        assert!(waited.doubt().unwrap().contains("80 %"));
        let mut shared = quiet();
        shared.processors.others = Some(0.5);
        assert!(shared.doubt().unwrap().contains("0.5 of 2"));
        // A system that counts nothing but the load.
        let unknown = Signs {
            load: Some(1e6),
            ..Signs::default()
        };
        assert!(unknown.doubt().unwrap().contains("a load of 1000000"));
    }

    #[test]
    fn what_ran_before_is_not_held_against_the_machine() {
        let loaded = Signs {
            load: Some(1.9),
            ..quiet()
        };
        assert_eq!(loaded.doubt(), None);
    }

    #[test]
    fn odd_loads_are_none() {
        assert_eq!(parse_load("5.82 3.57 3.08 8/123 4611"), Some(5.82));
        for text in ["", " ", "x", "-1 2 3", "nan", "inf", "1,5"] {
            assert_eq!(parse_load(text), None, "{text:?}");
        }
    }
}
