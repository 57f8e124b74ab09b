//! Description of this machine, for records. It names no host and no user.

use crate::doctor;
use tier_plan_runtime::formats::record::System;
use tier_plan_runtime::units::show_bytes;

/// Returns processor name, threads and memory on one line, as far as the system reports them.
pub fn describe() -> String {
    words(&system())
}

/// Returns this machine's processor, threads, and memory, as far as the system reports them.
pub fn system() -> System {
    system_of(&doctor::System::of_this_machine())
}

fn system_of(files: &doctor::System) -> System {
    let processor = files.processor_name();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    System {
        processor: processor.or_else(|| Some(std::env::consts::ARCH.to_string())),
        processors: u32::try_from(threads).ok(),
        memory_bytes: files.meminfo_bytes("MemTotal"),
    }
}

/// Describes a machine on one line.
pub fn words(system: &System) -> String {
    let processor = system.processor.clone();
    let threads = system.processors.map(|n| format!("{n} threads"));
    let memory = system.memory_bytes.map(show_bytes);
    let parts = [processor, threads, memory];
    parts.into_iter().flatten().collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_system_does_not_report_is_left_out() {
        let root = tempfile::tempdir().unwrap();
        let proc = root.path().join("proc");
        std::fs::create_dir(&proc).unwrap();
        let described = || words(&system_of(&doctor::System::below(root.path())));
        assert!(described().starts_with(std::env::consts::ARCH));
        std::fs::write(proc.join("cpuinfo"), "processor: 0\nmodel name\t: A: B\n").unwrap();
        std::fs::write(proc.join("meminfo"), "MemTotal: 1048576 kB\n").unwrap();
        let text = described();
        assert!(
            text.starts_with("A: B, ") && text.ends_with(", 1.00 GiB"),
            "{text}"
        );
        let huge = format!("MemTotal: {} kB\n", u64::MAX);
        std::fs::write(proc.join("meminfo"), huge).unwrap();
        assert!(described().ends_with(" threads"));
    }
}
