//! One-line description of this machine, for records.

/// Returns processor name, threads and memory, as far as the system reports them.
pub fn describe() -> String {
    let cpu = std::fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|text| field(&text, "model name"));
    let memory = std::fs::read_to_string("/proc/meminfo")
        .ok()
        .and_then(|text| field(&text, "MemTotal"));
    let kib = memory.and_then(|m| {
        m.split_whitespace()
            .next()
            .and_then(|n| n.parse::<u64>().ok())
    });
    let cpu = cpu.unwrap_or_else(|| std::env::consts::ARCH.to_string());
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    match kib {
        Some(kib) => format!(
            "{cpu}, {threads} threads, {}",
            tier_plan_runtime::units::show_bytes(kib * 1024)
        ),
        None => format!("{cpu}, {threads} threads"),
    }
}

fn field(text: &str, name: &str) -> Option<String> {
    let line = text.lines().find(|l| l.starts_with(name))?;
    Some(line.split_once(':')?.1.trim().to_string())
}
