//! Machines that are described by files: dual-socket servers, containers, and systems without `/proc`.

mod costs;
mod settings;

use super::drive::Direct;
use super::gpu::{Gpus, Missing};
use super::*;
use tempfile::TempDir;
use tier_plan_runtime::kernels::Isa;
use tier_plan_runtime::tiers::limits::Limit;

/// A folder of files that stands for `/`.
struct Made {
    root: TempDir,
}

impl Made {
    fn new(files: &[(&str, &str)]) -> Self {
        let made = Self {
            root: tempfile::tempdir().unwrap(),
        };
        files.iter().for_each(|(path, text)| made.write(path, text));
        made
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.root.path().join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn system(&self) -> System {
        System::below(self.root.path())
    }

    fn limit(&self) -> Option<Limit> {
        memory_limit_below(self.root.path())
    }

    /// All checks that need nothing but files and `process`.
    fn checks(&self, process: &Process) -> Vec<Check> {
        let system = self.system();
        let mut checks = processor::checks(&system, process);
        checks.extend(memory::checks(&system, self.limit().as_ref(), None));
        checks.extend(numa::checks(&system));
        let drive = Drive::listed(&system, Path::new("/srv/models"));
        checks.extend(drive.checks(process, Direct::Works, None));
        checks.extend(gpu::checks(&system, &none()));
        checks.extend(versions::checks(&system, process));
        checks.extend(busy::checks(&system, process, None));
        checks
    }
}

fn process() -> Process {
    Process {
        available: vec![Isa::Scalar, Isa::Avx2, Isa::Avx512],
        used: Ok(Isa::Avx512),
        cores: 4,
        processors: 8,
        glibc: Some("2.36".into()),
        io: None,
    }
}

fn none() -> Gpus {
    Gpus {
        found: Vec::new(),
        missing: vec![Missing::NoDriver],
        compiler: Err("not found".into()),
    }
}

fn find<'c>(checks: &'c [Check], id: &str) -> &'c Check {
    checks
        .iter()
        .find(|check| check.id == id)
        .unwrap_or_else(|| panic!("{id}"))
}

/// The check of this name must have this status and all words in its line.
fn expect(checks: &[Check], id: &str, status: Status, words: &[&str]) {
    let check = find(checks, id);
    let line = check.line();
    assert_eq!(check.status, status, "{line}");
    for word in words {
        assert!(line.contains(word), "{word:?} in {line}");
    }
}

const GIB_KIB: u64 = 1 << 20;

fn meminfo(total_gib: u64, swap_used_gib: u64) -> String {
    let (total, swap) = (total_gib * GIB_KIB, 8 * GIB_KIB);
    format!(
        "MemTotal: {total} kB\nMemAvailable: {} kB\nSwapTotal: {swap} kB\nSwapFree: {} kB\n",
        total / 2,
        swap - swap_used_gib * GIB_KIB
    )
}

const LIMITS: &str = "Limit                     Soft Limit           Hard Limit           Units     \n\
                      Max open files            1048576              1048576              files     \n\
                      Max locked memory         unlimited            unlimited            bytes     \n";

/// A quiet machine with one socket, on which nothing is amiss.
fn quiet() -> Made {
    Made::new(&[
        (
            "proc/cpuinfo",
            "processor\t: 0\nmodel name\t: Example 9000\nphysical id\t: 0\nflags\t\t: fpu avx2 avx512f\n",
        ),
        ("proc/meminfo", &meminfo(64, 0)),
        ("proc/self/limits", LIMITS),
        ("proc/self/status", "RssAnon: 1024 kB\n"),
        (
            "proc/self/mountinfo",
            "1 0 259:2 / / rw - ext4 /dev/nvme0n1p2 rw\n2 1 0:30 / /proc rw - proc proc rw\n",
        ),
        ("proc/loadavg", "0.20 0.10 0.05 1/200 4000\n"),
        (
            "proc/pressure/cpu",
            "some avg10=0.50 avg60=0.00 avg300=0.00 total=1\n",
        ),
        (
            "proc/pressure/memory",
            "some avg10=0.00 avg60=0.00 avg300=0.00 total=1\n",
        ),
        (
            "proc/pressure/io",
            "some avg10=0.00 avg60=0.00 avg300=0.00 total=1\n",
        ),
        ("proc/sys/kernel/osrelease", "6.12.1\n"),
        ("proc/sys/kernel/numa_balancing", "0\n"),
        (
            "etc/os-release",
            "NAME=x\nPRETTY_NAME=\"Example Linux 13\"\n",
        ),
        (
            "sys/kernel/mm/transparent_hugepage/enabled",
            "always [madvise] never\n",
        ),
        (
            "sys/kernel/mm/transparent_hugepage/defrag",
            "always defer defer+madvise [madvise] never\n",
        ),
        (
            "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages",
            "0\n",
        ),
        (
            "sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages",
            "0\n",
        ),
        ("sys/devices/system/node/online", "0\n"),
        ("sys/devices/system/node/node0/cpulist", "0-7\n"),
        (
            "sys/devices/system/node/node0/meminfo",
            "Node 0 MemTotal: 67108864 kB\nNode 0 MemFree: 33554432 kB\n",
        ),
        (
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor",
            "performance\n",
        ),
        (
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_driver",
            "acpi-cpufreq\n",
        ),
        (
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_min_freq",
            "800000\n",
        ),
        (
            "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq",
            "3500000\n",
        ),
        (
            "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq",
            "3500000\n",
        ),
        ("sys/dev/block/259:2/queue/rotational", "0\n"),
        (
            "sys/dev/block/259:2/queue/scheduler",
            "[none] mq-deadline\n",
        ),
        ("sys/dev/block/259:2/queue/read_ahead_kb", "128\n"),
        ("sys/dev/block/259:2/device/model", "Example SSD\n"),
    ])
}

#[test]
fn a_quiet_machine_has_nothing_amiss() {
    let checks = quiet().checks(&process());
    for check in &checks {
        assert_eq!(
            check.status == Status::Ok,
            check.cost.is_none(),
            "{}",
            check.line()
        );
        // A debug build says so of itself.
        let expected = check.id == "versions.program" && cfg!(debug_assertions);
        assert_eq!(
            check.status == Status::Warning,
            expected,
            "{}",
            check.line()
        );
    }
    let ok = |id, words: &[&str]| expect(&checks, id, Status::Ok, words);
    ok(
        "processor.model",
        &["Example 9000: 4 cores, 8 hardware threads"],
    );
    ok(
        "processor.kernels",
        &["avx512 in use, of scalar, avx2, avx512"],
    );
    ok("processor.amx", &["none"]);
    ok(
        "processor.governor",
        &["performance (acpi-cpufreq), up to 3.5 GHz"],
    );
    ok(
        "memory.capacity",
        &["64.0 GiB in all, 32.0 GiB available", "(free memory)"],
    );
    ok("memory.huge_pages", &["madvise"]);
    ok("numa.nodes", &["one node with 8 hardware threads"]);
    ok(
        "drive.file_system",
        &["/srv/models: ext4 on 259:2 (Example SSD)"],
    );
    ok("drive.scheduler", &["none"]);
    ok("gpu.devices", &["none"]);
    ok(
        "versions.system",
        &["Example Linux 13, kernel 6.12.1, glibc 2.36"],
    );
    ok("versions.virtual", &["neither"]);
    ok(
        "busy.pressure",
        &["cpu 0.5 %, memory 0.0 %, io 0.0 % of the last 10 s"],
    );
}

#[test]
fn a_dual_socket_machine_is_told_of_its_nodes() {
    let made = quiet();
    made.write(
        "proc/cpuinfo",
        "model name: X\nphysical id: 0\nflags: avx2\n\nmodel name: X\nphysical id: 1\nflags: avx2\n",
    );
    made.write("proc/sys/kernel/numa_balancing", "1\n");
    made.write("sys/devices/system/node/online", "0-1\n");
    made.write("sys/devices/system/node/node0/cpulist", "0-3\n");
    made.write("sys/devices/system/node/node0/distance", "10 21\n");
    made.write("sys/devices/system/node/node1/cpulist", "4-7\n");
    made.write(
        "sys/devices/system/node/node1/meminfo",
        "Node 1 MemTotal: 33554432 kB\nNode 1 MemFree: 16777216 kB\n",
    );
    let checks = made.checks(&process());
    expect(&checks, "processor.model", Status::Ok, &["in 2 sockets"]);
    expect(
        &checks,
        "numa.nodes",
        Status::Warning,
        &[
            "node 1 with 4 hardware threads and 16.0 GiB free of 32.0 GiB",
            "distance 21, of the own 10",
            "--numa shard",
        ],
    );
    expect(
        &checks,
        "numa.balancing",
        Status::Warning,
        &[
            "kernel.numa_balancing is 1",
            "sudo sysctl kernel.numa_balancing=0",
        ],
    );
    // Memory without processors is behind a link: nothing to interleave.
    made.write("sys/devices/system/node/node1/cpulist", "\n");
    expect(
        &made.checks(&process()),
        "numa.nodes",
        Status::Ok,
        &["node 1 with 0"],
    );
}

/// A container whose cgroup has 4 of 64 GiB.
fn container() -> Made {
    let made = quiet();
    made.write(".dockerenv", "");
    made.write("proc/self/cgroup", "0::/\n");
    made.write(
        "proc/self/mountinfo",
        "1 0 0:50 / / rw - overlay overlay rw\n3 1 0:26 / /sys/fs/cgroup ro - cgroup2 cgroup rw\n",
    );
    made.write("sys/fs/cgroup/memory.max", &format!("{}\n", 4u64 << 30));
    made.write("sys/fs/cgroup/memory.stat", "anon 1048576\n");
    made
}

#[test]
fn a_container_is_told_of_its_limit() {
    let checks = container().checks(&process());
    expect(
        &checks,
        "memory.capacity",
        Status::Warning,
        &[
            "may hold 4.00 GiB (cgroup limit)",
            "leaves 4.00 GiB of 64.0 GiB",
            "docker run --memory",
        ],
    );
    expect(
        &checks,
        "versions.virtual",
        Status::Ok,
        &["container (Docker)"],
    );
    expect(&checks, "drive.file_system", Status::Ok, &["overlay"]);
    expect(&checks, "drive.rotational", Status::Ok, &["unknown"]);
    let facts = &find(&checks, "memory.capacity").facts;
    assert_eq!(facts["limit_bytes"], 4u64 << 30);
    assert_eq!(facts["limited_by"], "cgroup limit");
}

#[test]
fn a_system_without_proc_and_sys_is_unknown_and_nothing_fails() {
    for process in [
        Process {
            glibc: None,
            ..process()
        },
        Process {
            available: vec![Isa::Scalar, Isa::Neon],
            used: Ok(Isa::Neon),
            ..process()
        },
    ] {
        let checks = Made::new(&[]).checks(&process);
        for check in checks.iter().filter(|check| check.id != "versions.program") {
            assert_eq!(check.status, Status::Ok, "{}", check.line());
        }
        for id in [
            "processor.governor",
            "memory.swap",
            "memory.huge_pages",
            "memory.defrag",
            "memory.locked",
            "numa.nodes",
            "drive.file_system",
            "drive.scheduler",
            "limits.open_files",
            "busy.load",
            "busy.pressure",
        ] {
            expect(&checks, id, Status::Ok, &["unknown"]);
        }
    }
}
