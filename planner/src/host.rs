//! Description of this machine, for records. It names no host and no user.

use tier_plan_runtime::formats::record::System;
use tier_plan_runtime::units::show_bytes;

/// Returns processor name, threads and memory on one line, as far as the system reports them.
pub fn describe() -> String {
    words(&system())
}

/// Returns this machine's processor, threads, and memory, as far as the system reports them.
pub fn system() -> System {
    let processor = std::fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|text| field(&text, "model name"));
    let memory = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| field(&text, "MemTotal"));
    let kib = memory.and_then(|m| m.split_whitespace().next()?.parse::<u64>().ok());
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    System {
        processor: processor.or_else(|| Some(std::env::consts::ARCH.to_string())),
        processors: u32::try_from(threads).ok(),
        memory_bytes: kib.map(|kib| kib.saturating_mul(1024)),
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

fn field(text: &str, name: &str) -> Option<String> {
    let line = text.lines().find(|l| l.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_string())
}
