//! The mounts of a process, as `/proc/self/mountinfo` lists them.
//!
//! Paths are bytes there, with spaces, tabs, line ends, and backslashes as octal escapes (`\040`).

use std::fmt;
use std::path::{Path, PathBuf};

/// Numbers of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct DeviceNumbers {
    pub major: u32,
    pub minor: u32,
}

impl fmt::Display for DeviceNumbers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// A mounted file system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// Device of its files; `None` where the line has something else.
    pub device: Option<DeviceNumbers>,
    /// Folder of the file system that the mount shows; not `/` in some containers.
    pub root: PathBuf,
    /// Where it is mounted.
    pub point: PathBuf,
    /// Name of the file system: `ext4`.
    pub file_system: String,
    /// What is mounted, as the file system sees it: `/dev/nvme0n1p2`.
    pub source: PathBuf,
    /// Options of the file system, separated by commas.
    pub options: String,
}

impl Mount {
    /// Parses a line; `None` where fields are missing.
    fn parse(line: &[u8]) -> Option<Self> {
        let mut fields = line.split(|byte| *byte == b' ');
        let device = fields.nth(2)?;
        let (root, point) = (fields.next()?, fields.next()?);
        // Behind the mount's own options, any number of others ends with a dash.
        fields.next()?;
        fields.find(|field| *field == b"-")?;
        let (file_system, source) = (fields.next()?, fields.next()?);
        if point.is_empty() || file_system.is_empty() {
            return None;
        }
        Some(Self {
            device: numbers(device),
            root: path(root),
            point: path(point),
            file_system: text(file_system),
            source: path(source),
            options: fields.next().map(text).unwrap_or_default(),
        })
    }
}

/// Returns the mounts of a list, in its order: a later one covers an earlier one of the same place.
/// Damaged lines are left out.
pub fn parse(list: &[u8]) -> Vec<Mount> {
    let lines = list.split(|byte| *byte == b'\n');
    lines.filter_map(Mount::parse).collect()
}

/// Returns the mount that an absolute path without links lies on.
pub fn of_path<'m>(mounts: &'m [Mount], path: &Path) -> Option<&'m Mount> {
    mounts
        .iter()
        .filter(|mount| path.starts_with(&mount.point))
        .max_by_key(|mount| mount.point.components().count())
}

fn numbers(field: &[u8]) -> Option<DeviceNumbers> {
    let (major, minor) = std::str::from_utf8(field).ok()?.split_once(':')?;
    let number = |digits: &str| {
        let is_number = digits.bytes().all(|b| b.is_ascii_digit());
        digits.parse().ok().filter(|_| is_number)
    };
    Some(DeviceNumbers {
        major: number(major)?,
        minor: number(minor)?,
    })
}

fn text(field: &[u8]) -> String {
    String::from_utf8_lossy(&unescaped(field)).into_owned()
}

#[cfg(unix)]
fn path(field: &[u8]) -> PathBuf {
    use std::os::unix::ffi::OsStringExt;
    std::ffi::OsString::from_vec(unescaped(field)).into()
}

#[cfg(not(unix))]
fn path(field: &[u8]) -> PathBuf {
    text(field).into()
}

/// Puts the bytes of octal escapes in their places. A backslash without three octal digits of a byte
/// stays.
fn unescaped(field: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        match (first, after) {
            (
                b'\\',
                [
                    a @ b'0'..=b'3',
                    b @ b'0'..=b'7',
                    c @ b'0'..=b'7',
                    after @ ..,
                ],
            ) => {
                bytes.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
                rest = after;
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    bytes
}

#[cfg(all(test, unix))]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::ffi::OsStrExt;

    #[test]
    fn lines_are_parsed() {
        let list = b"36 35 98:0 /mnt1 /mnt/my\\040disk rw,noatime master:1 - ext3 /dev/root rw,errors=continue\n\
                     30 20 0:26 / /sys/fs/cgroup rw shared:9 propagate_from:2 - cgroup2 cgroup2 rw,memory\n\
                     31 20 0:27 / /x ro - tmpfs  rw\n";
        let mounts = parse(list);
        let [disk, cgroup, nameless] = &mounts[..] else {
            panic!("{mounts:?}");
        };
        let device = DeviceNumbers {
            major: 98,
            minor: 0,
        };
        assert_eq!(disk.device, Some(device));
        assert_eq!(disk.root, Path::new("/mnt1"));
        assert_eq!(disk.point, Path::new("/mnt/my disk"));
        assert_eq!(
            (disk.file_system.as_str(), &disk.source),
            ("ext3", &"/dev/root".into())
        );
        assert_eq!(cgroup.options, "rw,memory");
        // Some file systems have no source, and the field is empty.
        assert_eq!(
            (nameless.file_system.as_str(), &nameless.source),
            ("tmpfs", &"".into())
        );
    }

    #[test]
    fn odd_lines_are_left_out_or_read_as_far_as_they_go() {
        for odd in [
            "",
            "36 35",
            "36 35 98:0 / /x rw",
            "36 35 98:0 / /x rw - ext3",
            "36 35 98:0 / /x - ext3 /dev/x rw",
            " - ",
            "1 2 3 4 - ",
            "1 2 0:1 /  rw - ext3 /dev/x rw",
            "1 2 0:1 / /x rw -  /dev/x rw",
        ] {
            assert_eq!(parse(odd.as_bytes()), [], "{odd:?}");
        }
        for numbers in [
            "98",
            "98:",
            ":0",
            "-1:0",
            "+1:0",
            "4294967296:0",
            "../..:0",
            "1:2:3",
        ] {
            let line = format!("1 2 {numbers} / /x rw - ext4 /dev/x");
            let mounts = parse(line.as_bytes());
            assert_eq!((mounts.len(), mounts[0].device), (1, None), "{numbers}");
        }
    }

    #[test]
    fn octal_escapes_are_bytes() {
        for (field, bytes) in [
            ("a\\040b\\011c\\012d\\134e", &b"a b\tc\nd\\e"[..]),
            // What an escaped backslash is followed by is no escape.
            ("\\134040", b"\\040"),
            ("\\377\\303\\251", b"\xff\xc3\xa9"),
            ("\\400\\08x\\04", b"\\400\\08x\\04"),
            ("\\", b"\\"),
            ("\\\\040", b"\\ "),
        ] {
            assert_eq!(unescaped(field.as_bytes()), bytes, "{field}");
        }
        // A path that is no UTF-8 makes no other line unreadable.
        let list = b"1 0 8:1 / /a\xff rw - ext4 /dev/a rw\n2 0 8:2 / /b rw - xfs /dev/b rw\n";
        let mounts = parse(list);
        assert_eq!(mounts[0].point.as_os_str().as_bytes(), b"/a\xff");
        assert_eq!(mounts[1].file_system, "xfs");
    }

    #[test]
    fn the_last_and_deepest_mount_has_a_path() {
        let list = b"1 0 8:1 / / rw - ext4 a rw\n2 1 8:2 / /srv rw - xfs b rw\n3 1 8:3 / /srv rw - btrfs c rw\n";
        let mounts = parse(list);
        let of = |path: &str| {
            of_path(&mounts, Path::new(path))
                .unwrap()
                .file_system
                .as_str()
        };
        assert_eq!(
            (of("/srv/models"), of("/srvx"), of("/")),
            ("btrfs", "ext4", "ext4")
        );
        assert_eq!(of_path(&mounts[1..], Path::new("/x")), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(list in proptest::collection::vec(any::<u8>(), 0..200)) {
            parse(&list);
        }

        #[test]
        fn lines_of_any_fields_are_survived(list in "([0-9/ :\\\\-]{0,20}( - )?[a-z\\\\0-9 ]{0,20}\n){0,4}") {
            for mount in parse(list.as_bytes()) {
                prop_assert!(!mount.point.as_os_str().is_empty());
            }
        }

        #[test]
        fn escaped_paths_come_back(path in proptest::collection::vec(1u8..=255, 1..40)) {
            let escaped: Vec<u8> = path.iter().flat_map(|byte| match byte {
                b' ' | b'\t' | b'\n' | b'\\' => format!("\\{byte:03o}").into_bytes(),
                other => vec![*other],
            }).collect();
            let list = [b"1 0 8:1 / ", &escaped[..], b" rw - ext4 /dev/a rw\n"].concat();
            let mounts = parse(&list);
            prop_assert_eq!(mounts[0].point.as_os_str().as_bytes(), &path[..]);
        }
    }
}
