//! Versions, container and virtual machine, and the limit of open files.

use super::system::field;
use super::{Check, Process, System};

/// Open files below which a command may fail: the parts of a split model, drives, and libraries.
const MIN_FILES: u64 = 64;

/// Open files below which `serve` may refuse connections.
const FEW_FILES: u64 = 1024;

/// Words in the path of a process's cgroup, with the container that they show.
const CGROUPS: [(&str, &str); 5] = [
    ("docker", "Docker"),
    ("kubepods", "Kubernetes"),
    ("libpod", "Podman"),
    ("containerd", "containerd"),
    ("lxc", "LXC"),
];

pub(super) fn checks(system: &System, process: &Process) -> Vec<Check> {
    vec![
        open_files(system),
        program(),
        os(system, process),
        virtualized(system),
    ]
}

/// A limit of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bound(Option<u64>);

impl Bound {
    /// Returns the number; `None` for no limit.
    pub(super) fn value(self) -> Option<u64> {
        self.0
    }
}

/// Returns the soft limit of a line of `/proc/self/limits`.
pub(super) fn soft_limit(limits: &str, name: &str) -> Option<Bound> {
    let line = limits.lines().find_map(|line| line.strip_prefix(name))?;
    match line.split_whitespace().next()? {
        "unlimited" => Some(Bound(None)),
        number => Some(Bound(Some(number.parse().ok()?))),
    }
}

fn open_files(system: &System) -> Check {
    let id = "limits.open_files";
    let limits = system.text("proc/self/limits").unwrap_or_default();
    let Some(soft) = soft_limit(&limits, "Max open files") else {
        return Check::ok(id, "unknown: the system does not report RLIMIT_NOFILE");
    };
    let bound = soft.value();
    let shown = bound.map_or("unlimited".to_string(), |n| n.to_string());
    let check = Check::ok(id, format!("RLIMIT_NOFILE {shown}")).fact("limit", bound);
    match bound {
        Some(n) if n < MIN_FILES => check.failure("ulimit -n 4096"),
        Some(n) if n < FEW_FILES => check
            .warning(format!(
                "`serve` refuses connections when {n} files and connections are open"
            ))
            .mend("ulimit -n 4096"),
        _ => check,
    }
}

fn program() -> Check {
    let version = env!("CARGO_PKG_VERSION");
    let rustc = option_env!("TIER_PLAN_RUSTC").filter(|rustc| !rustc.is_empty());
    let profile = if cfg!(debug_assertions) {
        ", a debug build"
    } else {
        ""
    };
    let (arch, os) = (std::env::consts::ARCH, std::env::consts::OS);
    let by = rustc.map_or(String::new(), |rustc| format!(" by {rustc}"));
    let check = Check::ok(
        "versions.program",
        format!("tier-plan {version} for {arch} {os}, built{by}{profile}"),
    )
    .fact("version", version)
    .fact("rustc", rustc)
    .fact("arch", arch)
    .fact("os", os)
    .fact("debug", cfg!(debug_assertions));
    if !cfg!(debug_assertions) {
        return check;
    }
    check
        .warning("opt-level 1 and checks of every index and sum: only tests are meant to run so")
        .mend("cargo install --path planner")
}

fn os(system: &System, process: &Process) -> Check {
    let kernel = system.text("proc/sys/kernel/osrelease");
    let os = system.text("etc/os-release").and_then(|text| {
        let name = text
            .lines()
            .find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
        Some(name.trim_matches('"').to_string())
    });
    let unknown = || std::env::consts::OS.to_string();
    let mut found = os.clone().unwrap_or_else(unknown);
    if let Some(kernel) = &kernel {
        found.push_str(&format!(", kernel {kernel}"));
    }
    if let Some(glibc) = &process.glibc {
        found.push_str(&format!(", glibc {glibc}"));
    }
    Check::ok("versions.system", found)
        .fact("os", os)
        .fact("kernel", kernel)
        .fact("glibc", process.glibc.clone())
}

fn virtualized(system: &System) -> Check {
    let (container, machine) = (container(system), machine(system));
    let found = match (&container, &machine) {
        (None, None) => "neither container nor virtual machine".to_string(),
        (Some(container), None) => format!("container ({container})"),
        (None, Some(machine)) => format!("virtual machine ({machine})"),
        (Some(container), Some(machine)) => {
            format!("container ({container}) in a virtual machine ({machine})")
        }
    };
    Check::ok("versions.virtual", found)
        .fact("container", container)
        .fact("virtual_machine", machine)
}

fn container(system: &System) -> Option<String> {
    if system.has(".dockerenv") {
        return Some("Docker".into());
    }
    if system.has("run/.containerenv") {
        return Some("Podman".into());
    }
    if let Some(name) = system
        .text("run/systemd/container")
        .filter(|name| !name.is_empty())
    {
        return Some(name);
    }
    let cgroup = system.text("proc/self/cgroup")?;
    let found = CGROUPS.iter().find(|(word, _)| cgroup.contains(word));
    found.map(|(_, name)| name.to_string())
}

fn machine(system: &System) -> Option<String> {
    let kernel = system.text("proc/sys/kernel/osrelease").unwrap_or_default();
    if kernel.to_lowercase().contains("microsoft") {
        return Some("WSL".into());
    }
    if let Some(kind) = system
        .text("sys/hypervisor/type")
        .filter(|kind| !kind.is_empty())
    {
        return Some(kind);
    }
    let cpuinfo = system.text("proc/cpuinfo")?;
    let flags = field(&cpuinfo, "flags")?;
    if !flags.split_whitespace().any(|flag| flag == "hypervisor") {
        return None;
    }
    let vendor = system.text("sys/class/dmi/id/sys_vendor");
    Some(
        vendor
            .filter(|vendor| !vendor.is_empty())
            .unwrap_or("unknown".into()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_parsed() {
        let text = "Limit                     Soft Limit           Hard Limit           Units     \n\
                    Max open files            1024                 1048576              files     \n\
                    Max locked memory         unlimited            unlimited            bytes     \n";
        assert_eq!(soft_limit(text, "Max open files"), Some(Bound(Some(1024))));
        assert_eq!(soft_limit(text, "Max locked memory"), Some(Bound(None)));
        assert_eq!(soft_limit(text, "Max nice"), None);
        assert_eq!(soft_limit("Max open files", "Max open files"), None);
        assert_eq!(soft_limit("Max open files x y", "Max open files"), None);
    }
}
