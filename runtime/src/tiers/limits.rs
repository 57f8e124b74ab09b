//! How much memory this process may have: what the system has left, and what its control groups allow.
//!
//! All figures are for the whole process: what it holds already counts as available to it.

use std::fs;
use std::path::{Path, PathBuf};

/// Memory that this process may have, in bytes, and who says so.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limit {
    /// Bytes.
    pub bytes: u64,
    /// In words, for a person: `the memory that is free`, `the control group's limit`.
    pub of: &'static str,
}

/// The tightest limit of this process, or `None` where the system tells of none.
pub fn memory_limit() -> Option<Limit> {
    limit_below(Path::new("/"))
}

/// Bytes of the file system that a path is on, all of it and what is free, where the system tells.
#[cfg(unix)]
pub fn file_system_bytes(path: &Path) -> Option<(u64, u64)> {
    use std::os::unix::ffi::OsStrExt;
    let path = std::ffi::CString::new(path.as_os_str().as_bytes()).ok()?;
    let mut stat = std::mem::MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the path ends in a zero byte, and the system fills `stat` if it says that it succeeded.
    let stat = unsafe { (libc::statvfs(path.as_ptr(), stat.as_mut_ptr()) == 0).then(|| stat.assume_init())? };
    // Widths differ between systems.
    #[allow(clippy::unnecessary_cast, clippy::useless_conversion)]
    let bytes = |blocks: libc::fsblkcnt_t| (blocks as u64).checked_mul(stat.f_frsize as u64);
    Some((bytes(stat.f_blocks)?, bytes(stat.f_bavail)?))
}

/// See above.
#[cfg(not(unix))]
pub fn file_system_bytes(_: &Path) -> Option<(u64, u64)> {
    None
}

fn limit_below(root: &Path) -> Option<Limit> {
    let own = own_bytes(&read(&root.join("proc/self/status")));
    let free = available_bytes(&read(&root.join("proc/meminfo"))).map(|bytes| bytes.saturating_add(own));
    let free = free.map(|bytes| Limit { bytes, of: "the memory that is free" });
    let groups = group_folders(&read(&root.join("proc/self/cgroup")), &read(&root.join("proc/self/mountinfo")));
    let group = groups.iter().filter_map(|folder| group_bytes(root, folder, own)).min();
    let group = group.map(|bytes| Limit { bytes, of: "the control group's limit" });
    free.into_iter().chain(group).min_by_key(|limit| limit.bytes)
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// The value of a line `name: 123 kB`, in bytes.
fn kilobytes(text: &str, name: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

fn available_bytes(meminfo: &str) -> Option<u64> {
    kilobytes(meminfo, "MemAvailable")
}

/// Memory of this process that cannot be dropped.
fn own_bytes(status: &str) -> u64 {
    kilobytes(status, "RssAnon").unwrap_or(0)
}

/// A control group's folder and all above it that its mount shows.
struct Folders {
    /// Where the hierarchy is mounted.
    mount: PathBuf,
    /// The group, within the mount.
    group: PathBuf,
    version: u8,
}

/// The groups that limit the memory of the process whose `cgroup` and `mountinfo` these are.
fn group_folders(cgroup: &str, mountinfo: &str) -> Vec<Folders> {
    let mut found = Vec::new();
    for line in cgroup.lines() {
        // `4:memory:/path` of version 1, `0::/path` of version 2.
        let mut fields = line.splitn(3, ':');
        let (Some(_), Some(controllers), Some(path)) = (fields.next(), fields.next(), fields.next()) else { continue };
        let version = match controllers {
            "" => 2,
            some if some.split(',').any(|c| c == "memory") => 1,
            _ => continue,
        };
        let Some((mounted, mount)) = mountinfo.lines().find_map(|line| mount_of(line, version)) else { continue };
        // In a container the mount may show only the part of the hierarchy that begins at `mounted`.
        let path = Path::new(path);
        let group = path.strip_prefix(&mounted).or_else(|_| path.strip_prefix("/")).unwrap_or(path);
        found.push(Folders { mount, group: group.to_path_buf(), version });
    }
    found
}

/// The root within the hierarchy and the place of a mount line, if it is of the memory controller of that version.
fn mount_of(line: &str, version: u8) -> Option<(PathBuf, PathBuf)> {
    let (before, after) = line.split_once(" - ")?;
    let mut before = before.split(' ').skip(3);
    let (root, place) = (before.next()?, before.next()?);
    let mut after = after.split(' ');
    let (kind, options) = (after.next()?, after.nth(1).unwrap_or(""));
    let is_it = match version {
        2 => kind == "cgroup2",
        _ => kind == "cgroup" && options.split(',').any(|option| option == "memory"),
    };
    is_it.then(|| (PathBuf::from(root), PathBuf::from(place)))
}

/// What the tightest group from the folder up to the mount leaves to this process, whose own memory is `own` bytes.
fn group_bytes(root: &Path, folders: &Folders, own: u64) -> Option<u64> {
    let mount = root.join(folders.mount.strip_prefix("/").unwrap_or(&folders.mount));
    folders.group.ancestors().filter_map(|group| left_in(&mount.join(group), folders.version, own)).min()
}

fn left_in(folder: &Path, version: u8, own: u64) -> Option<u64> {
    let (limit, used) = match version {
        2 => ("memory.max", "anon"),
        _ => ("memory.limit_in_bytes", "total_rss"),
    };
    // Version 2 says `max` for none, version 1 a number larger than any memory.
    let limit: u64 = read(&folder.join(limit)).trim().parse().ok().filter(|bytes| *bytes < 1 << 60)?;
    let stat = read(&folder.join("memory.stat"));
    let used: Option<u64> =
        stat.lines().find_map(|line| line.strip_prefix(used)?.strip_prefix(' ')?.trim().parse().ok());
    Some(limit.saturating_sub(used.unwrap_or(0).saturating_sub(own)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tiers::system;

    const MEMINFO: (&str, &str) = ("proc/meminfo", "MemTotal: 24000 kB\nMemAvailable:    1000 kB\n");
    const STATUS: (&str, &str) = ("proc/self/status", "Name: x\nRssAnon:\t     24 kB\n");

    fn limit(files: &[(&str, &str)]) -> Option<(u64, bool)> {
        limit_below(system(files).path()).map(|limit| (limit.bytes, limit.of.contains("group")))
    }

    #[test]
    fn without_groups_what_is_free_counts() {
        assert_eq!(limit(&[MEMINFO, STATUS]), Some((1024 * 1024, false)));
        assert_eq!(limit(&[STATUS]), None);
        assert_eq!(limit(&[("proc/meminfo", "MemAvailable: many kB\n")]), None);
    }

    #[test]
    fn the_tightest_group_counts_less_what_others_hold() {
        let one = [
            MEMINFO,
            STATUS,
            ("proc/self/cgroup", "5:cpu,memory:/a/b\n1:cpu:/x\n0::/\n"),
            ("proc/self/mountinfo", "30 20 0:26 / /sys/fs/cgroup/memory rw shared:9 - cgroup cgroup rw,memory\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712\n"),
            ("sys/fs/cgroup/memory/a/memory.limit_in_bytes", "500000\n"),
            ("sys/fs/cgroup/memory/a/memory.stat", "rss 1\ntotal_rss 124576\n"),
            ("sys/fs/cgroup/memory/a/b/memory.limit_in_bytes", "450000\n"),
            ("sys/fs/cgroup/memory/a/b/memory.stat", "rss 24576\ntotal_rss 24576\n"),
        ];
        assert_eq!(limit(&one), Some((400_000, true)));
        let two = [
            MEMINFO,
            STATUS,
            ("proc/self/cgroup", "0::/a\n"),
            ("proc/self/mountinfo", "30 20 0:26 / /sys/fs/cgroup rw shared:9 - cgroup2 cgroup2 rw\n"),
            ("sys/fs/cgroup/a/memory.max", "300000\n"),
            ("sys/fs/cgroup/a/memory.stat", "anon 34576\nfile 99999\n"),
        ];
        assert_eq!(limit(&two), Some((290_000, true)));
        let none = [MEMINFO, STATUS, two[2], two[3], ("sys/fs/cgroup/a/memory.max", "max\n")];
        assert_eq!(limit(&none), Some((1024 * 1024, false)));
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
    #[cfg(unix)]
    fn a_file_system_has_a_size() {
        let folder = tempfile::tempdir().unwrap();
        let (all, free) = file_system_bytes(folder.path()).unwrap();
        assert!(all > 0 && free <= all, "{free} of {all}");
        assert_eq!(file_system_bytes(&folder.path().join("missing")), None);
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn this_machine_has_a_limit() {
        assert!(memory_limit().is_some_and(|limit| limit.bytes > 1 << 20));
    }
}
