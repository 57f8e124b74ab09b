//! Memory limits of this process: the system's available memory, and the limits of its cgroups.
//!
//! All figures are for the whole process: memory that it already holds counts as available to it.

use super::meminfo::bytes_of;
use super::mounts::{self, Mount};
use std::fs;
use std::path::{Path, PathBuf};

/// An upper bound on this process's memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limit {
    /// Bytes that the process may hold in all.
    pub bytes: u64,
    /// Human-readable source of the limit: `free memory` or `cgroup limit`.
    pub source: &'static str,
    /// Whether the system ends a process that holds more, as in a cgroup. Free memory can be
    /// exceeded where there is swap, or where others give some back.
    pub is_hard: bool,
}

/// Space of a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct FileSystemSpace {
    pub total_bytes: u64,
    /// Bytes that unprivileged processes may still write.
    pub free_bytes: u64,
}

/// Returns the tightest limit of this process, or `None` where the system reports none.
///
/// ```
/// use tier_plan_runtime::tiers::limits::memory_limit;
///
/// if let Some(limit) = memory_limit() {
///     println!("{} bytes: {}", limit.bytes, limit.source);
/// }
/// ```
pub fn memory_limit() -> Option<Limit> {
    memory_limit_below(Path::new("/"))
}

/// Returns the tightest memory limit of this process's cgroups, whatever of it is in use; `None` without
/// one.
pub fn cgroup_limit() -> Option<u64> {
    let root = Path::new("/");
    let cgroups = memory_cgroups_below(root);
    let limits = cgroups.iter().flat_map(|cgroup| {
        let mount = root.join(cgroup.mount.strip_prefix("/").unwrap_or(&cgroup.mount));
        let folders = cgroup.path.ancestors().map(move |path| mount.join(path));
        folders.filter_map(|folder| limit_in(&folder, cgroup.version))
    });
    limits.min()
}

/// Returns the bytes that this process may still take, or `None` where the system reports no limit.
pub fn memory_left() -> Option<u64> {
    let limit = memory_limit()?;
    Some(
        limit
            .bytes
            .saturating_sub(anonymous_bytes(&read(Path::new("/proc/self/status")))),
    )
}

/// Returns the space of the file system that a path is on, where the system reports it.
#[cfg(unix)]
pub fn file_system_space(path: &Path) -> Option<FileSystemSpace> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).ok()?;
    let mut stat = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the path ends in a zero byte, and the call has filled `stat` if it returns 0.
    let stat = unsafe {
        (libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) == 0).then(|| stat.assume_init())?
    };
    // The widths of these fields differ between systems.
    #[allow(clippy::unnecessary_cast, clippy::useless_conversion)]
    let bytes = |blocks: libc::fsblkcnt_t| (blocks as u64).checked_mul(stat.f_frsize as u64);
    Some(FileSystemSpace {
        total_bytes: bytes(stat.f_blocks)?,
        free_bytes: bytes(stat.f_bavail)?,
    })
}

/// Returns `None`: only Unix systems report the space.
#[cfg(not(unix))]
pub fn file_system_space(_: &Path) -> Option<FileSystemSpace> {
    None
}

/// Returns the tightest limit like [`memory_limit`], with `/proc` and the cgroup mounts below `root`.
pub fn memory_limit_below(root: &Path) -> Option<Limit> {
    let process_bytes = anonymous_bytes(&read(&root.join("proc/self/status")));
    let free = available_bytes(&read(&root.join("proc/meminfo")))
        .map(|bytes| bytes.saturating_add(process_bytes));
    let free = free.map(|bytes| Limit {
        bytes,
        source: "free memory",
        is_hard: false,
    });
    let cgroups = memory_cgroups_below(root);
    let cgroup = cgroups
        .iter()
        .filter_map(|cgroup| cgroup_bytes(root, cgroup, process_bytes))
        .min();
    let cgroup = cgroup.map(|bytes| Limit {
        bytes,
        source: "cgroup limit",
        is_hard: true,
    });
    free.into_iter()
        .chain(cgroup)
        .min_by_key(|limit| limit.bytes)
}

/// Reads a file; an unreadable one counts as empty. Names of processes and mounts may be no UTF-8.
fn read(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}

fn available_bytes(meminfo: &str) -> Option<u64> {
    bytes_of(meminfo, "MemAvailable")
}

/// Returns the anonymous memory of this process, which the system cannot drop.
fn anonymous_bytes(status: &str) -> u64 {
    bytes_of(status, "RssAnon").unwrap_or(0)
}

/// A cgroup that accounts memory. Its ancestors up to the mount limit the process too.
struct Cgroup {
    /// Where the hierarchy is mounted.
    mount: PathBuf,
    /// Path of the cgroup below the mount.
    path: PathBuf,
    /// Version of the hierarchy: 1 or 2.
    version: u8,
}

/// Returns the cgroups with a memory controller of this process, with `/proc` below `root`.
fn memory_cgroups_below(root: &Path) -> Vec<Cgroup> {
    let mounts = fs::read(root.join("proc/self/mountinfo")).unwrap_or_default();
    memory_cgroups(
        &read(&root.join("proc/self/cgroup")),
        &mounts::parse(&mounts),
    )
}

/// Returns the cgroups with a memory controller, from the text of `/proc/self/cgroup` and the mounts.
fn memory_cgroups(cgroup: &str, mounts: &[Mount]) -> Vec<Cgroup> {
    let mut cgroups = Vec::new();
    for line in cgroup.lines() {
        // `4:memory:/path` of version 1, `0::/path` of version 2.
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) =
            (fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let version = match controllers {
            "" => 2,
            some if some.split(',').any(|c| c == "memory") => 1,
            _ => continue,
        };
        let mount = mounts.iter().find(|mount| has_memory(mount, version));
        let Some(Mount { root, point, .. }) = mount else {
            continue;
        };
        // In a container the mount may show only the part of the hierarchy that begins at `root`.
        let path = Path::new(path);
        let path = path
            .strip_prefix(root)
            .or_else(|_| path.strip_prefix("/"))
            .unwrap_or(path);
        cgroups.push(Cgroup {
            mount: point.clone(),
            path: path.to_path_buf(),
            version,
        });
    }
    cgroups
}

/// Whether a mount shows the memory controller of that cgroup version.
fn has_memory(mount: &Mount, version: u8) -> bool {
    match version {
        2 => mount.file_system == "cgroup2",
        _ => {
            mount.file_system == "cgroup"
                && mount.options.split(',').any(|option| option == "memory")
        }
    }
}

/// Returns the bytes that the tightest cgroup, from this one up to its mount, leaves to the
/// process.
fn cgroup_bytes(root: &Path, cgroup: &Cgroup, process_bytes: u64) -> Option<u64> {
    let mount = root.join(cgroup.mount.strip_prefix("/").unwrap_or(&cgroup.mount));
    let left = |path: &Path| left_in(&mount.join(path), cgroup.version, process_bytes);
    cgroup.path.ancestors().filter_map(left).min()
}

/// Returns the limit of the cgroup in `folder`, less what others hold and the system cannot drop;
/// `None` without a limit.
fn left_in(folder: &Path, version: u8, process_bytes: u64) -> Option<u64> {
    let number = |file: &str| number_in(folder, file);
    let limit = limit_in(folder, version)?;
    let stat = read(&folder.join("memory.stat"));
    let sum = |names: &[&str]| -> u64 {
        let values = names.iter().filter_map(|name| stat_value(&stat, name));
        values.fold(0, u64::saturating_add)
    };
    let (usage, held, droppable) = match version {
        2 => (
            number("memory.current"),
            sum(&[
                "anon",
                "shmem",
                "slab_unreclaimable",
                "kernel_stack",
                "pagetables",
            ]),
            sum(&["active_file", "inactive_file", "slab_reclaimable"]),
        ),
        _ => (
            number("memory.usage_in_bytes"),
            sum(&["total_rss", "total_shmem"]),
            sum(&["total_active_file", "total_inactive_file"]),
        ),
    };
    // What is neither listed nor a file's page, such as locked pages, cannot be dropped either.
    let held = held.max(usage.unwrap_or(0).saturating_sub(droppable));
    Some(limit.saturating_sub(held.saturating_sub(process_bytes)))
}

/// Returns the limit of the cgroup in `folder`; `None` without one.
fn limit_in(folder: &Path, version: u8) -> Option<u64> {
    // Above `memory.high` a process is slowed down as it would be without memory.
    let limits: &[&str] = match version {
        2 => &["memory.max", "memory.high"],
        _ => &["memory.limit_in_bytes"],
    };
    // No limit is `max` in version 2, and a number larger than any memory in version 1.
    let limits = limits.iter().filter_map(|file| number_in(folder, file));
    limits.filter(|bytes| *bytes < 1 << 60).min()
}

/// Returns the number in a file of a folder.
fn number_in(folder: &Path, file: &str) -> Option<u64> {
    read(&folder.join(file)).trim().parse().ok()
}

/// Returns the value of the line `name 123`.
fn stat_value(stat: &str, name: &str) -> Option<u64> {
    stat.lines().find_map(|line| {
        line.strip_prefix(name)?
            .strip_prefix(' ')?
            .trim()
            .parse()
            .ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tiers::system;

    const MEMINFO: (&str, &str) = (
        "proc/meminfo",
        "MemTotal: 24000 kB\nMemAvailable:    1000 kB\n",
    );
    const STATUS: (&str, &str) = ("proc/self/status", "Name: x\nRssAnon:\t     24 kB\n");

    fn limit(files: &[(&str, &str)]) -> Option<(u64, bool)> {
        memory_limit_below(system(files).path())
            .map(|limit| (limit.bytes, limit.source.contains("cgroup")))
    }

    #[test]
    fn without_cgroups_free_memory_counts() {
        assert_eq!(limit(&[MEMINFO, STATUS]), Some((1024 * 1024, false)));
        assert_eq!(limit(&[STATUS]), None);
        assert_eq!(limit(&[("proc/meminfo", "MemAvailable: many kB\n")]), None);
    }

    #[test]
    fn the_tightest_cgroup_counts_less_what_others_hold() {
        let one = [
            MEMINFO,
            STATUS,
            ("proc/self/cgroup", "5:cpu,memory:/a/b\n1:cpu:/x\n0::/\n"),
            (
                "proc/self/mountinfo",
                "30 20 0:26 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n",
            ),
            (
                "sys/fs/cgroup/memory/memory.limit_in_bytes",
                "9223372036854771712\n",
            ),
            ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "500000\n"),
            (
                "sys/fs/cgroup/memory/a/memory.stat",
                "rss 1\ntotal_rss 124576\n",
            ),
            ("sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", "450000\n"),
            (
                "sys/fs/cgroup/memory/a/b/memory.stat",
                "rss 24576\ntotal_rss 24576\n",
            ),
        ];
        assert_eq!(limit(&one), Some((400_000, true)));
        let two = [
            MEMINFO,
            STATUS,
            ("proc/self/cgroup", "0::/a\n"),
            (
                "proc/self/mountinfo",
                "30 20 0:26 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n",
            ),
            ("sys/fs/cgroup/a/memory.max", "300000\n"),
            ("sys/fs/cgroup/a/memory.stat", "anon 34576\nfile 99999\n"),
        ];
        assert_eq!(limit(&two), Some((290_000, true)));
        let mut high = two.to_vec();
        high.push(("sys/fs/cgroup/a/memory.high", "200000\n"));
        assert_eq!(limit(&high), Some((190_000, true)));
        let none = [
            MEMINFO,
            STATUS,
            two[2],
            two[3],
            ("sys/fs/cgroup/a/memory.max", "max\n"),
        ];
        assert_eq!(limit(&none), Some((1024 * 1024, false)));
    }

    #[test]
    fn memory_that_cannot_be_dropped_is_in_use() {
        let v2 = [
            MEMINFO,
            STATUS,
            ("proc/self/cgroup", "0::/a\n"),
            (
                "proc/self/mountinfo",
                "30 20 0:26 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n",
            ),
            ("sys/fs/cgroup/a/memory.max", "900000\n"),
            (
                "sys/fs/cgroup/a/memory.stat",
                "anon 24576\nfile 500000\nshmem 300000\nshmem_thp 7\ninactive_file 200000\n",
            ),
        ];
        // A file on tmpfs is no cache.
        assert_eq!(limit(&v2), Some((600_000, true)));
        let mut locked = v2.to_vec();
        locked.push(("sys/fs/cgroup/a/memory.current", "724576\n"));
        assert_eq!(limit(&locked), Some((400_000, true)));
        let v1 = [
            MEMINFO,
            STATUS,
            ("proc/self/cgroup", "5:memory:/a\n"),
            (
                "proc/self/mountinfo",
                "30 20 0:26 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n",
            ),
            ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "900000\n"),
            (
                "sys/fs/cgroup/memory/a/memory.stat",
                "shmem 1\ntotal_rss 24576\ntotal_shmem 300000\ntotal_inactive_file 200000\n",
            ),
        ];
        assert_eq!(limit(&v1), Some((600_000, true)));
        let mut locked = v1.to_vec();
        locked.push(("sys/fs/cgroup/memory/a/memory.usage_in_bytes", "724576\n"));
        assert_eq!(limit(&locked), Some((400_000, true)));
    }

    #[test]
    fn a_container_sees_its_own_part_of_the_hierarchy() {
        let files = [
            MEMINFO,
            ("proc/self/cgroup", "4:memory:/docker/abc/inner\n"),
            (
                "proc/self/mountinfo",
                "30 20 0:26 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,memory\n31 20 0:27 / /x rw - ext4 a b\n",
            ),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "700000"),
            ("sys/fs/cgroup/memory/inner/memory.limit_in_bytes", "600000"),
        ];
        assert_eq!(limit(&files), Some((600_000, true)));
    }

    #[test]
    fn escaped_mount_points_are_found() {
        let files = [
            MEMINFO,
            ("proc/self/cgroup", "0::/my group\n"),
            (
                "proc/self/mountinfo",
                "damaged\n30 20 0:26 / /sys/my\\040cgroups rw - cgroup2 cgroup2 rw\n",
            ),
            ("sys/my cgroups/my group/memory.max", "300000\n"),
        ];
        assert_eq!(limit(&files), Some((300_000, true)));
    }

    #[test]
    #[cfg(unix)]
    fn a_file_system_has_a_size() {
        let folder = tempfile::tempdir().unwrap();
        let space = file_system_space(folder.path()).unwrap();
        assert!(
            space.total_bytes > 0 && space.free_bytes <= space.total_bytes,
            "{space:?}"
        );
        assert_eq!(file_system_space(&folder.path().join("missing")), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_machine_has_a_limit() {
        assert!(memory_limit().is_some_and(|limit| limit.bytes > 1 << 20));
    }
}
