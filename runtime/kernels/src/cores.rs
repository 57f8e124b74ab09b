//! Counts the processor cores that this process may use.

use std::collections::BTreeSet;
use std::path::Path;

/// Returns the number of physical cores that this process may use: two hardware threads of a core
/// count once. Affinity masks, cpusets and CPU quotas are respected.
pub fn physical_cores() -> usize {
    let allowed = std::thread::available_parallelism().map_or(1, |n| n.get());
    cores_below(Path::new("/")).map_or(allowed, |cores| cores.min(allowed))
}

/// Returns the cores that have a hardware thread in this thread's affinity mask, with `/proc` and
/// `/sys` below `root`; `None` where the system does not tell.
fn cores_below(root: &Path) -> Option<usize> {
    let status = std::fs::read_to_string(root.join("proc/thread-self/status")).ok()?;
    let mask = status
        .lines()
        .find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let mut cores = BTreeSet::new();
    for cpu in parse_list(mask)? {
        let siblings = root.join(format!(
            "sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"
        ));
        let siblings = std::fs::read_to_string(siblings).ok()?;
        cores.insert(*parse_list(&siblings)?.first()?);
    }
    (!cores.is_empty()).then_some(cores.len())
}

/// Pins this thread, and those it starts later, to these processors.
///
/// # Errors
/// When the system refuses, or has no such call.
pub fn pin_thread_to_cpus(processors: &[u32]) -> std::io::Result<()> {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: a `cpu_set_t` is plain bits, all zero when empty.
        let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        for processor in processors.iter().filter(|p| **p < libc::CPU_SETSIZE as u32) {
            // SAFETY: the processor is below `CPU_SETSIZE`.
            unsafe { libc::CPU_SET(*processor as usize, &mut set) };
        }
        // SAFETY: the system reads the set, whose size in bytes is given.
        let rc = unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) };
        if rc == 0 {
            Ok(())
        } else {
            Err(std::io::Error::last_os_error())
        }
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = processors;
        Err(std::io::ErrorKind::Unsupported.into())
    }
}

/// Most processors in a list: Linux's own limit is 8192.
const MAX_CPUS: usize = 1 << 16;

/// Parses a list such as `0-3,8`; `None` if it is none.
fn parse_list(list: &str) -> Option<Vec<usize>> {
    let mut cpus = Vec::new();
    for part in list.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (usize, usize) = (first.parse().ok()?, last.parse().ok()?);
        if last >= MAX_CPUS || last < first {
            return None;
        }
        cpus.extend(first..=last);
    }
    Some(cpus)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cores of a machine with 4 cores, whose hardware threads are `n` and `n + 4`, under a mask.
    fn cores(mask: &str) -> Option<usize> {
        let root = tempfile::tempdir().unwrap();
        let write = |path: String, text: String| {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write(
            "proc/thread-self/status".to_string(),
            format!("Name:\tx\nCpus_allowed:\tff\nCpus_allowed_list:\t{mask}\n"),
        );
        for cpu in 0..8 {
            write(
                format!("sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list"),
                format!("{},{}\n", cpu % 4, cpu % 4 + 4),
            );
        }
        cores_below(root.path())
    }

    #[test]
    fn a_core_counts_once_if_any_of_its_threads_is_allowed() {
        assert_eq!(cores("0-7"), Some(4));
        assert_eq!(cores("0-3"), Some(4));
        assert_eq!(cores("0,4"), Some(1));
        assert_eq!(cores("1-2,5"), Some(2));
        assert_eq!(cores("6"), Some(1));
        for unknown in ["", "x", "3-1", "0-99999999999", "9"] {
            assert_eq!(cores(unknown), None, "{unknown}");
        }
    }

    #[test]
    fn this_process_may_use_a_core() {
        assert!(physical_cores() >= 1);
    }
}
