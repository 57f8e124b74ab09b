//! Settings and devices that cost speed: each has its warning.

use super::{LIMITS, expect, find, meminfo, none, process, quiet};
use crate::doctor::drive::Direct;
use crate::doctor::gpu::Device;
use crate::doctor::*;
use tier_plan_runtime::cuda::Version;
use tier_plan_runtime::kernels::Isa;

#[test]
fn settings_of_memory_have_their_cost_and_mend() {
    let made = quiet();
    let warned = |id: &str, words: &[&str]| {
        expect(&made.checks(&process()), id, Status::Warning, words);
    };
    made.write(
        "sys/kernel/mm/transparent_hugepage/enabled",
        "always madvise [never]\n",
    );
    warned(
        "memory.huge_pages",
        &[
            "never; cost: on another machine decode ran at 22.2 tok/s on 4 KiB pages",
            "echo madvise | sudo tee",
        ],
    );
    std::fs::remove_dir_all(made.root.path().join("sys/kernel/mm/transparent_hugepage")).unwrap();
    warned(
        "memory.huge_pages",
        &["no transparent huge pages", "CONFIG_TRANSPARENT_HUGEPAGE"],
    );
    made.write(
        "sys/kernel/mm/transparent_hugepage/defrag",
        "always defer defer+madvise madvise [never]\n",
    );
    warned(
        "memory.defrag",
        &["huge pages only where whole ones happen to be free"],
    );
    made.write(
        "sys/kernel/mm/hugepages/hugepages-1048576kB/nr_hugepages",
        "4\n",
    );
    made.write(
        "sys/kernel/mm/hugepages/hugepages-1048576kB/free_hugepages",
        "3\n",
    );
    warned(
        "memory.hugetlbfs",
        &[
            "4.00 GiB reserved, 3.00 GiB of them free",
            "vm.nr_hugepages=0",
        ],
    );
    made.write("proc/meminfo", &meminfo(64, 2));
    warned(
        "memory.swap",
        &[
            "2.00 GiB in use of 8.00 GiB",
            "pieces of 4 KiB",
            "swapoff -a",
        ],
    );
    made.write(
        "proc/swaps",
        "Filename Type Size Used Priority\n/dev/zram0 partition 1 1 1\n",
    );
    warned("memory.swap", &["unpacked from zram"]);
    made.write(
        "proc/self/limits",
        &LIMITS.replace("memory         unlimited ", "memory         8388608   "),
    );
    warned(
        "memory.locked",
        &[
            "RLIMIT_MEMLOCK 8.00 MiB",
            "swapped out",
            "ulimit -l unlimited",
        ],
    );
    // Without swap a small limit costs nothing.
    made.write(
        "proc/meminfo",
        "MemTotal: 9 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n",
    );
    expect(
        &made.checks(&process()),
        "memory.locked",
        Status::Ok,
        &["8.00 MiB"],
    );
    expect(
        &made.checks(&process()),
        "memory.swap",
        Status::Ok,
        &["none"],
    );
}

#[test]
fn clocks_and_kernels_that_are_held_back_are_named() {
    let made = quiet();
    let governor = "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor";
    let warned = |process: &Process, id: &str, words: &[&str]| {
        expect(&made.checks(process), id, Status::Warning, words);
    };
    made.write(governor, "powersave\n");
    warned(
        &process(),
        "processor.governor",
        &["at 0.8 GHz of 3.5 GHz", "echo performance"],
    );
    // These drivers raise the clock under `powersave`.
    made.write(
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_driver",
        "intel_pstate\n",
    );
    expect(
        &made.checks(&process()),
        "processor.governor",
        Status::Ok,
        &["powersave"],
    );
    let preference = "sys/devices/system/cpu/cpu0/cpufreq/energy_performance_preference";
    made.write(preference, "power\n");
    warned(
        &process(),
        "processor.governor",
        &["energy_performance_preference is power"],
    );
    made.write(preference, "balance_performance\n");
    made.write(
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq",
        "1800000\n",
    );
    warned(
        &process(),
        "processor.governor",
        &["1.8 GHz of 3.5 GHz", "echo 3500000"],
    );

    made.write("proc/cpuinfo", "flags\t: amx_tile amx_int8 avx512f\n");
    warned(
        &process(),
        "processor.amx",
        &["does not permit tiles", "265", "arch_prctl"],
    );
    let amx = Process {
        available: vec![Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Amx],
        ..process()
    };
    expect(
        &made.checks(&amx),
        "processor.amx",
        Status::Ok,
        &["permitted"],
    );
    warned(
        &amx,
        "processor.kernels",
        &["TIER_PLAN_ISA=avx512", "unset TIER_PLAN_ISA"],
    );
    let wrong = Process {
        used: Err("TIER_PLAN_ISA: unknown".into()),
        ..process()
    };
    expect(
        &made.checks(&wrong),
        "processor.kernels",
        Status::Failure,
        &["TIER_PLAN_ISA: unknown; mend: unset TIER_PLAN_ISA"],
    );
    let plain = Process {
        available: vec![Isa::Scalar],
        used: Ok(Isa::Scalar),
        ..process()
    };
    warned(&plain, "processor.kernels", &["plain kernels only"]);
}

#[test]
fn drives_are_found_through_partitions_and_mappers() {
    let made = quiet();
    let folder = Path::new("/srv/models");
    made.write(
        "proc/self/mountinfo",
        "1 0 259:2 / / rw - ext4 /dev/nvme0n1p2 rw\n2 1 0:40 /@srv /srv rw - btrfs /dev/mapper/data rw\n\
         3 1 8:17 / /mnt/old\\040disk rw - xfs /dev/sdb1 rw\n4 1 0:60 / /net rw - nfs4 host:/x rw\n",
    );
    made.write("dev/dm-3", "");
    made.write(
        "sys/class/block/dm-3/queue/scheduler",
        "mq-deadline [bfq] none\n",
    );
    made.write("sys/class/block/dm-3/queue/rotational", "0\n");
    made.write("sys/devices/pci/sdb/queue/rotational", "1\n");
    made.write("sys/devices/pci/sdb/queue/read_ahead_kb", "4096\n");
    made.write("sys/devices/pci/sdb/device/model", "OLD DISK  \n");
    made.write("sys/devices/pci/sdb/sdb1/partition", "1\n");
    #[cfg(unix)]
    {
        use std::os::unix::fs::symlink;
        std::fs::create_dir_all(made.root.path().join("dev/mapper")).unwrap();
        symlink("../dm-3", made.root.path().join("dev/mapper/data")).unwrap();
        let link = made.root.path().join("sys/dev/block/8:17");
        symlink("../../devices/pci/sdb/sdb1", link).unwrap();
        let checks = |folder: &Path, direct| {
            Drive::listed(&made.system(), folder).checks(&process(), direct, None)
        };
        let found = checks(folder, Direct::Works);
        expect(&found, "drive.file_system", Status::Ok, &["btrfs on dm-3"]);
        expect(
            &found,
            "drive.scheduler",
            Status::Warning,
            &[
                "bfq",
                "echo none | sudo tee /sys/block/dm-3/queue/scheduler",
            ],
        );
        let found = checks(Path::new("/mnt/old disk/m"), Direct::Refused);
        expect(
            &found,
            "drive.file_system",
            Status::Ok,
            &["xfs on sdb (OLD DISK)"],
        );
        expect(
            &found,
            "drive.rotational",
            Status::Warning,
            &["rotating disk", "--measure"],
        );
        expect(&found, "drive.read_ahead", Status::Ok, &["4096 KiB"]);
        expect(
            &found,
            "drive.direct_io",
            Status::Warning,
            &["1.02 GB/s where direct I/O gave 1.77"],
        );
        let rotating = Drive::rotating("vda");
        let virtual_drive = rotating.checks(&process(), Direct::Works, None);
        expect(
            &virtual_drive,
            "drive.rotational",
            Status::Ok,
            &["unknown", "virtual machines"],
        );
        let found = checks(Path::new("/net/m"), Direct::Untried("no file".into()));
        expect(&found, "drive.file_system", Status::Warning, &["over nfs4"]);
        expect(
            &found,
            "drive.direct_io",
            Status::Ok,
            &["not tried: no file"],
        );
    }
    let io = |io: &str, direct| {
        let process = Process {
            io: Some(io.into()),
            ..process()
        };
        Drive::listed(&made.system(), folder).checks(&process, direct, None)
    };
    let found = io("buffered", Direct::Works);
    expect(
        &found,
        "drive.direct_io",
        Status::Warning,
        &["unset TIER_PLAN_IO"],
    );
    let found = io("dircet", Direct::Works);
    expect(
        &found,
        "drive.direct_io",
        Status::Failure,
        &["TIER_PLAN_IO=dircet, expected direct"],
    );
}

#[test]
fn gpus_that_do_not_serve_are_explained() {
    let made = quiet();
    let gpu = |driver| Device {
        ordinal: 0,
        name: "Example\u{1b} GPU".into(),
        capability: Version { major: 9, minor: 0 },
        total_bytes: 24 << 30,
        free_bytes: Some(23 << 30),
        driver,
    };
    let cuda = |major, minor| Version { major, minor };
    let gpus = |found, missing, compiler| Gpus {
        found,
        missing,
        compiler,
    };
    let check = |gpus: &Gpus| gpu::checks(&made.system(), gpus);
    let good = check(&gpus(vec![gpu(cuda(12, 4))], vec![], Ok(cuda(12, 4))));
    expect(
        &good,
        "gpu.devices",
        Status::Ok,
        &["capability 9.0, 23.0 GiB free of 24.0 GiB", "CUDA 12.4"],
    );
    expect(&good, "gpu.compiler", Status::Ok, &["NVRTC 12.4"]);
    assert!(!find(&good, "gpu.devices").found.contains('\u{1b}'));
    let newer = check(&gpus(vec![gpu(cuda(12, 4))], vec![], Ok(cuda(13, 0))));
    expect(
        &newer,
        "gpu.compiler",
        Status::Warning,
        &["has CUDA 12.4", "nvidia-cuda-nvrtc-cu12"],
    );
    let lacking = check(&gpus(
        vec![gpu(cuda(12, 4))],
        vec![],
        Err("NVRTC was not found".into()),
    ));
    expect(
        &lacking,
        "gpu.compiler",
        Status::Failure,
        &["NVRTC was not found", "pip install"],
    );
    let old = Missing::Unusable("the driver is old".into());
    let old = check(&gpus(vec![], vec![old], Ok(cuda(12, 4))));
    expect(
        &old,
        "gpu.devices",
        Status::Failure,
        &["the driver is old", "nvidia-smi"],
    );

    made.write("sys/bus/pci/devices/0000:01:00.0/vendor", "0x10de\n");
    made.write("sys/bus/pci/devices/0000:01:00.0/class", "0x030000\n");
    made.write("sys/bus/pci/devices/0000:02:00.0/vendor", "0x10de\n");
    made.write("sys/bus/pci/devices/0000:02:00.0/class", "0x040300\n");
    expect(
        &check(&none()),
        "gpu.devices",
        Status::Warning,
        &["1 of NVIDIA on the bus, but no driver"],
    );
    let hidden = gpus(vec![], vec![Missing::NoDevice], Err(String::new()));
    expect(
        &check(&hidden),
        "gpu.devices",
        Status::Warning,
        &["CUDA_VISIBLE_DEVICES"],
    );
}

#[test]
fn a_busy_machine_and_few_files_are_told() {
    let made = quiet();
    made.write("proc/loadavg", "12.0 3 3 1/2 3\n");
    made.write(
        "proc/pressure/memory",
        "some avg10=7.00 avg60=0 avg300=0 total=1\n",
    );
    made.write(
        "proc/self/limits",
        &LIMITS.replace("files            1048576", "files            256    "),
    );
    let checks = made.checks(&process());
    expect(
        &checks,
        "busy.load",
        Status::Warning,
        &["12 threads ran", "4 threads get about 50 %"],
    );
    expect(
        &checks,
        "busy.pressure",
        Status::Warning,
        &["waited for memory in 7.0 %"],
    );
    expect(
        &checks,
        "limits.open_files",
        Status::Warning,
        &["RLIMIT_NOFILE 256", "ulimit -n 4096"],
    );
    made.write(
        "proc/self/limits",
        &LIMITS.replace("files            1048576", "files            16     "),
    );
    expect(
        &made.checks(&process()),
        "limits.open_files",
        Status::Failure,
        &["ulimit -n 4096"],
    );
}
