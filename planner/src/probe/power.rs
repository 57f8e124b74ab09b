//! Reads what the machine's parts may draw: power limits, and energy counters where this user may
//! read them.
//!
//! CPUs report through RAPL, which Linux shows under `/sys/class/powercap` for Intel and AMD. It
//! counts the package, on some machines the memory, and nothing else.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Folder in which Linux shows RAPL.
pub const ROOT: &str = "/sys/class/powercap";

/// One part of the machine, and the power it may draw or drew.
#[derive(Debug, Clone, PartialEq)]
pub struct Part {
    /// `package-0`, or a GPU's name.
    pub name: String,
    /// Watts, if known.
    pub watts: Option<f64>,
    /// Human-readable source, or why there is none.
    pub how: String,
}

/// Power of the whole machine for the machine file.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Power {
    /// Watts of all parts, if all are known.
    pub watts: Option<f64>,
    /// Human-readable source, or why there is none.
    pub how: String,
}

impl Power {
    /// Adds up all parts; `watts` is `None` if any part is unknown.
    pub fn of(processors: &[Part], gpus: &[Part]) -> Self {
        let parts = || processors.iter().chain(gpus);
        let unknown: Vec<String> = parts()
            .filter(|p| p.watts.is_none())
            .map(|p| p.name.clone() + ": " + &p.how)
            .collect();
        if processors.is_empty() {
            let how = format!("{ROOT} tells of no processor's power");
            return Power { watts: None, how };
        }
        if !unknown.is_empty() {
            return Power {
                watts: None,
                how: unknown.join("; "),
            };
        }
        let each =
            parts().map(|p| format!("{} {:.0} W, {}", p.name, p.watts.unwrap_or(0.0), p.how));
        let how = format!(
            "{}; the rest of the machine is not counted",
            each.collect::<Vec<_>>().join("; ")
        );
        // Rounded to a tenth, as the source is.
        let watts = parts().filter_map(|p| p.watts).sum::<f64>();
        Power {
            watts: Some((watts * 10.0).round() / 10.0).filter(|watts| *watts > 0.0),
            how,
        }
    }
}

/// One CPU package and the folders that count its energy.
#[derive(Debug)]
struct Package {
    name: String,
    folder: PathBuf,
    /// The package's own counter, and its memory's where that is separate.
    counters: Vec<Counter>,
}

/// A counter of microjoules that wraps around at a range.
#[derive(Debug)]
struct Counter {
    folder: PathBuf,
    before: Option<u64>,
}

/// Measures what CPUs draw since the meter was started.
#[derive(Debug)]
pub struct Meter {
    packages: Vec<Package>,
    start: Instant,
}

impl Meter {
    /// Starts a meter on this machine.
    pub fn start() -> Self {
        Self::start_below(Path::new(ROOT))
    }

    fn start_below(root: &Path) -> Self {
        let mut packages: Vec<Package> = Vec::new();
        let entries = fs::read_dir(root).into_iter().flatten().flatten();
        let mut folders: Vec<(String, PathBuf)> = entries
            .map(|e| (e.file_name().to_string_lossy().into_owned(), e.path()))
            .collect();
        folders.sort();
        for (zone, folder) in &folders {
            let Some(numbers) = zone.strip_prefix("intel-rapl:") else {
                continue;
            };
            let name = word(&folder.join("name")).unwrap_or_default();
            // `intel-rapl:0` is a package or the whole platform; `intel-rapl:0:2` is a part of a
            // package.
            match numbers.split_once(':') {
                None if name.starts_with("package") => {
                    let counters = vec![Counter::start(folder)];
                    packages.push(Package {
                        name,
                        folder: folder.clone(),
                        counters,
                    });
                }
                Some((package, _)) if name == "dram" => {
                    let of = root.join(format!("intel-rapl:{package}"));
                    if let Some(package) = packages.iter_mut().find(|p| p.folder == of) {
                        package.counters.push(Counter::start(folder));
                    }
                }
                _ => {}
            }
        }
        Self {
            packages,
            start: Instant::now(),
        }
    }

    /// Returns the mean power of each package since the start, or its limit where no counter is
    /// readable.
    pub fn parts(&self) -> Vec<Part> {
        let seconds = self.start.elapsed().as_secs_f64();
        self.packages
            .iter()
            .map(|package| package.part(seconds))
            .collect()
    }
}

impl Package {
    fn part(&self, seconds: f64) -> Part {
        let name = self.name.clone();
        let joules: Option<f64> = self.counters.iter().map(Counter::joules).sum();
        if let Some(joules) = joules.filter(|j| *j > 0.0 && seconds > 0.0) {
            let with = if self.counters.len() > 1 {
                " with its memory"
            } else {
                ""
            };
            return Part {
                name,
                watts: Some(joules / seconds),
                how: format!("measured{with} while all cores computed"),
            };
        }
        match self.limit() {
            Some((watts, from)) => Part {
                name,
                watts: Some(watts),
                how: format!("limit read from {}", from.display()),
            },
            None => Part {
                name,
                watts: None,
                how: format!("{} says no limit that may be read", self.folder.display()),
            },
        }
    }

    /// Returns the limit for sustained loads in watts, and the file that it came from.
    fn limit(&self) -> Option<(f64, PathBuf)> {
        // Constraints are identified by name; without names the first one counts.
        let long = (0..8).find(|n| {
            word(&self.folder.join(format!("constraint_{n}_name")))
                .is_some_and(|name| name == "long_term")
        });
        let path = self
            .folder
            .join(format!("constraint_{}_power_limit_uw", long.unwrap_or(0)));
        let microwatts = number(&path).filter(|uw| *uw > 0)?;
        Some((microwatts as f64 / 1e6, path))
    }
}

impl Counter {
    fn start(folder: &Path) -> Self {
        Counter {
            before: number(&folder.join("energy_uj")),
            folder: folder.to_path_buf(),
        }
    }

    fn joules(&self) -> Option<f64> {
        let (before, now) = (self.before?, number(&self.folder.join("energy_uj"))?);
        let used = match now.checked_sub(before) {
            Some(used) => used,
            // The counter wrapped around; during one measurement that happens at most once.
            None => now.checked_add(
                number(&self.folder.join("max_energy_range_uj"))?.checked_sub(before)?,
            )?,
        };
        Some(used as f64 / 1e6)
    }
}

fn word(path: &Path) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_string())
}

fn number(path: &Path) -> Option<u64> {
    word(path)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn system(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    const LIMITS: [(&str, &str); 12] = [
        ("intel-rapl/enabled", "1\n"),
        ("intel-rapl:0/name", "package-0\n"),
        ("intel-rapl:0/constraint_0_name", "short_term\n"),
        ("intel-rapl:0/constraint_0_power_limit_uw", "253000000\n"),
        ("intel-rapl:0/constraint_1_name", "long_term\n"),
        ("intel-rapl:0/constraint_1_power_limit_uw", "125000000\n"),
        ("intel-rapl:0:0/name", "core\n"),
        ("intel-rapl:0:1/name", "dram\n"),
        ("intel-rapl:1/name", "psys\n"),
        ("intel-rapl:1/constraint_0_power_limit_uw", "999000000\n"),
        ("intel-rapl:2/name", "package-1\n"),
        ("intel-rapl:2/constraint_0_power_limit_uw", "100500000\n"),
    ];

    #[test]
    fn limits_of_packages_add_up() {
        let root = system(&LIMITS);
        let parts = Meter::start_below(root.path()).parts();
        let found: Vec<_> = parts.iter().map(|p| (p.name.as_str(), p.watts)).collect();
        assert_eq!(
            found,
            [("package-0", Some(125.0)), ("package-1", Some(100.5))]
        );
        assert!(
            parts[0]
                .how
                .ends_with("intel-rapl:0/constraint_1_power_limit_uw"),
            "{}",
            parts[0].how
        );
        let gpu = Part {
            name: "a GPU".into(),
            watts: Some(350.0),
            how: "limit read from the driver".into(),
        };
        let power = Power::of(&parts, &[gpu]);
        assert_eq!(power.watts, Some(575.5));
        assert!(
            power
                .how
                .contains("a GPU 350 W, limit read from the driver; the rest"),
            "{}",
            power.how
        );
    }

    #[test]
    fn energy_is_counted_across_the_end_of_its_range() {
        let root = system(&LIMITS);
        let write = |file: &str, text: &str| fs::write(root.path().join(file), text).unwrap();
        write("intel-rapl:0/energy_uj", "900000000");
        write("intel-rapl:0/max_energy_range_uj", "1000000000");
        write("intel-rapl:0:1/energy_uj", "5000000");
        let meter = Meter::start_below(root.path());
        write("intel-rapl:0/energy_uj", "40000000");
        write("intel-rapl:0:1/energy_uj", "25000000");
        let part = meter.packages[0].part(2.0);
        // 140 J of the package and 20 of its memory, in 2 s.
        assert_eq!(part.watts, Some(80.0));
        assert_eq!(
            part.how,
            "measured with its memory while all cores computed"
        );
        assert_eq!(
            meter.packages[1].part(2.0).watts,
            Some(100.5),
            "a package without a counter has its limit"
        );
    }

    #[test]
    fn nothing_is_said_where_a_part_is_unknown() {
        assert_eq!(
            Power::of(&Meter::start_below(Path::new("/nowhere")).parts(), &[]).watts,
            None
        );
        let root = system(&[
            ("intel-rapl:0/name", "package-0\n"),
            ("intel-rapl:0/constraint_0_power_limit_uw", "x\n"),
        ]);
        let parts = Meter::start_below(root.path()).parts();
        let power = Power::of(&parts, &[]);
        assert!(
            power.watts.is_none() && power.how.contains("says no limit that may be read"),
            "{power:?}"
        );
        let known = [Part {
            name: "package-0".into(),
            watts: Some(65.0),
            how: "limit".into(),
        }];
        let gpu = [Part {
            name: "a GPU".into(),
            watts: None,
            how: "no NVML".into(),
        }];
        assert_eq!(
            Power::of(&known, &gpu),
            Power {
                watts: None,
                how: "a GPU: no NVML".into()
            }
        );
        assert_eq!(Power::of(&known, &[]).watts, Some(65.0));
    }
}
