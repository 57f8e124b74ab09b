//! Main memory: how much there is and what limits it, swap, huge pages, and locked pages.

use super::{Change, Check, Forecast, System};
use crate::doctor::forecast::cost;
use tier_plan_runtime::tiers::limits::Limit;
use tier_plan_runtime::units::show_bytes;

const THP: &str = "sys/kernel/mm/transparent_hugepage";

/// Decode on 4 KiB pages, as a part of that on huge pages: 22.1 and 22.3 of 26.2 and 27.1 tok/s.
const SMALL_PAGES: f64 = 0.83;

/// Part of the memory below which a cgroup's limit gets a warning.
const MIN_CGROUP: f64 = 0.9;

/// Swap in use from which on it counts.
const MIN_SWAP_BYTES: u64 = 64 << 20;

/// What a figure about pages rests on.
const PAGES: &str = "on another machine decode ran at 22.2 tok/s on 4 KiB pages and at 26.7 on huge pages (8.45 GiB model, docs/performance.md)";

pub(super) fn checks(
    system: &System,
    limit: Option<&Limit>,
    forecast: Option<&Forecast<'_>>,
) -> Vec<Check> {
    let swap = swap_bytes(system);
    vec![
        capacity(system, limit, forecast),
        swap_check(system, swap),
        huge_pages(system, forecast),
        defrag(system),
        hugetlbfs(system),
        locked(system, swap, limit),
    ]
}

fn capacity(system: &System, limit: Option<&Limit>, forecast: Option<&Forecast<'_>>) -> Check {
    let id = "memory.capacity";
    let total = system.meminfo_bytes("MemTotal");
    let free = system.meminfo_bytes("MemAvailable");
    let facts = |check: Check| {
        check
            .fact("total_bytes", total)
            .fact("available_bytes", free)
            .fact("limit_bytes", limit.map(|l| l.bytes))
            .fact("limited_by", limit.map(|l| l.source))
    };
    let shown = |bytes: Option<u64>| bytes.map_or("unknown".to_string(), show_bytes);
    let Some(limit) = limit else {
        let found = format!("{} in all; the system reports no limit", shown(total));
        return facts(Check::ok(id, found));
    };
    let found = format!(
        "{} in all, {} available; this process may hold {} ({})",
        shown(total),
        shown(free),
        show_bytes(limit.bytes),
        limit.source
    );
    let check = facts(Check::ok(id, found));
    let Some(total) = total.filter(|_| limit.is_hard) else {
        return check;
    };
    if limit.bytes as f64 >= MIN_CGROUP * total as f64 {
        return check;
    }
    let raised = Change {
        limit_bytes: free.or(Some(total)),
        ..Change::default()
    };
    let words = format!(
        "the cgroup leaves {} of {}, and experts that don't fit are read from the drive",
        show_bytes(limit.bytes),
        show_bytes(total)
    );
    check
        .warning(cost(words, forecast, &raised))
        .mend("raise the limit: `docker run --memory SIZE`, or `systemctl set-property UNIT MemoryMax=SIZE`")
}

/// Bytes of swap, and those in use.
#[derive(Debug, Clone, Copy)]
struct Swap {
    total_bytes: u64,
    used_bytes: u64,
}

fn swap_bytes(system: &System) -> Option<Swap> {
    let total_bytes = system.meminfo_bytes("SwapTotal")?;
    let free_bytes = system.meminfo_bytes("SwapFree")?;
    Some(Swap {
        total_bytes,
        used_bytes: total_bytes.saturating_sub(free_bytes),
    })
}

fn swap_check(system: &System, swap: Option<Swap>) -> Check {
    let id = "memory.swap";
    let Some(swap) = swap else {
        return Check::ok(id, "unknown: the system does not report it");
    };
    let swaps = system.text("proc/swaps").unwrap_or_default();
    let on_zram = swaps
        .lines()
        .skip(1)
        .any(|line| line.starts_with("/dev/zram"));
    let found = match swap.total_bytes {
        0 => "none".to_string(),
        total => format!(
            "{} in use of {}",
            show_bytes(swap.used_bytes),
            show_bytes(total)
        ),
    };
    let check = Check::ok(id, found)
        .fact("total_bytes", swap.total_bytes)
        .fact("used_bytes", swap.used_bytes)
        .fact("zram", on_zram);
    if swap.used_bytes < MIN_SWAP_BYTES {
        return check;
    }
    let from = if on_zram {
        "unpacked from zram"
    } else {
        "read from the drive in pieces of 4 KiB"
    };
    check
        .warning(format!(
            "memory was short: {} were swapped out, and each page that is needed again is {from}",
            show_bytes(swap.used_bytes)
        ))
        .mend("sudo swapoff -a && sudo swapon -a")
}

fn huge_pages(system: &System, forecast: Option<&Forecast<'_>>) -> Check {
    let id = "memory.huge_pages";
    let Some(setting) = system.choice(&format!("{THP}/enabled")) else {
        let check = Check::ok(id, "the system has no transparent huge pages");
        // Other systems have no such setting to miss.
        return if system.has("proc/meminfo") {
            check
                .warning(cost(PAGES, forecast, &small_pages()))
                .mend("boot a kernel with CONFIG_TRANSPARENT_HUGEPAGE")
        } else {
            Check::ok(id, "unknown: not a Linux system")
        };
    };
    let check = Check::ok(id, setting.as_str()).fact("setting", setting.as_str());
    match setting.as_str() {
        "always" | "madvise" => check,
        _ => check
            .warning(cost(PAGES, forecast, &small_pages()))
            .mend("echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"),
    }
}

/// Returns what mends a setting that denies huge pages; `None` where it does not.
pub(super) fn huge_pages_mend(system: &System) -> Option<String> {
    huge_pages(system, None).mend
}

/// What huge pages would change: the rates of now are those of 4 KiB pages.
fn small_pages() -> Change {
    Change {
        memory_factor: 1.0 / SMALL_PAGES,
        ..Change::default()
    }
}

fn defrag(system: &System) -> Check {
    let id = "memory.defrag";
    let Some(setting) = system.choice(&format!("{THP}/defrag")) else {
        return Check::ok(id, "unknown: the system does not report it");
    };
    let check = Check::ok(id, setting.as_str()).fact("setting", setting.as_str());
    match setting.as_str() {
        "always" | "madvise" | "defer+madvise" => check,
        // The rates of now may be those of either kind of page, so no speed is predicted.
        _ => check
            .warning(format!(
                "huge pages only where whole ones happen to be free; {PAGES}"
            ))
            .mend("echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/defrag"),
    }
}

fn hugetlbfs(system: &System) -> Check {
    let id = "memory.hugetlbfs";
    let folder = "sys/kernel/mm/hugepages";
    let (mut reserved, mut free) = (0u64, 0u64);
    for name in system.names(folder) {
        let kib = name
            .strip_prefix("hugepages-")
            .and_then(|name| name.strip_suffix("kB")?.parse::<u64>().ok());
        let bytes = kib.and_then(|kib| kib.checked_mul(1024)).unwrap_or(0);
        let pages = |file: &str| {
            system
                .number(&format!("{folder}/{name}/{file}"))
                .unwrap_or(0)
        };
        reserved = reserved.saturating_add(bytes.saturating_mul(pages("nr_hugepages")));
        free = free.saturating_add(bytes.saturating_mul(pages("free_hugepages")));
    }
    let found = match reserved {
        0 => "none reserved".to_string(),
        bytes => format!(
            "{} reserved, {} of them free",
            show_bytes(bytes),
            show_bytes(free)
        ),
    };
    let check = Check::ok(id, found)
        .fact("reserved_bytes", reserved)
        .fact("free_bytes", free);
    if free == 0 {
        return check;
    }
    check
        .warning(format!(
            "{} of memory that models can't use: tier-plan takes transparent huge pages",
            show_bytes(free)
        ))
        .mend("sudo sysctl vm.nr_hugepages=0")
}

fn locked(system: &System, swap: Option<Swap>, limit: Option<&Limit>) -> Check {
    let id = "memory.locked";
    let limits = system.text("proc/self/limits").unwrap_or_default();
    let Some(soft) = super::versions::soft_limit(&limits, "Max locked memory") else {
        return Check::ok(id, "unknown: the system does not report RLIMIT_MEMLOCK");
    };
    let bytes = soft.value();
    let shown = bytes.map_or("unlimited".to_string(), show_bytes);
    let has_swap = swap.is_some_and(|swap| swap.total_bytes > 0);
    let check = Check::ok(id, format!("RLIMIT_MEMLOCK {shown}")).fact("limit_bytes", bytes);
    let wanted = limit.map_or(u64::MAX, |limit| limit.bytes);
    if !has_swap || bytes.is_none_or(|bytes| bytes >= wanted) {
        return check;
    }
    check
        .warning(format!(
            "slots and pins beyond {shown} may be swapped out, as there is swap of {}",
            show_bytes(swap.map_or(0, |swap| swap.total_bytes))
        ))
        .mend("ulimit -l unlimited")
}
