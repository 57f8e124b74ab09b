//! The drive that models are read from: its file system, direct I/O, and queue.

use super::forecast::cost;
use super::system::chosen;
use super::{Change, Check, Forecast, Process, System};
use anyhow::{Context, Result};
use std::fs;
use std::path::{Path, PathBuf};
use tier_plan_runtime::formats::safely::Temporary;
use tier_plan_runtime::tiers::file::{FileTier, ReadMode};
use tier_plan_runtime::tiers::limits::{FileSystemSpace, file_system_space};
use tier_plan_runtime::tiers::mounts::{self, Mount};
use tier_plan_runtime::tiers::source::ALIGN;
use tier_plan_runtime::units::show_bytes;

/// Most files of a folder that are looked at for one to try direct I/O with.
const MAX_TRIALS: usize = 64;

/// Rates of the page cache and of direct I/O on one drive, in 10⁹ bytes per second.
const BUFFERED_GBPS: f64 = 1.02;
const DIRECT_GBPS: f64 = 1.77;

/// What they rest on.
const BUFFERED: &str = "on another machine reads through the page cache gave 1.02 GB/s where direct I/O gave 1.77, and decode ran at 8.9 \
                        instead of 14.3 tok/s (8.45 GiB model under 4 GiB, docs/performance.md)";

/// File systems that are behind a network or another system.
const REMOTE: [&str; 12] = [
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "9p",
    "virtiofs",
    "ceph",
    "glusterfs",
    "lustre",
    "fuse.sshfs",
    "fuseblk",
    "drvfs",
];

/// Beginnings of names of virtual drives, whose host does not tell what they are.
const VIRTUAL: [&str; 2] = ["vd", "xvd"];

/// Whether direct I/O works.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Direct {
    /// A read with direct I/O succeeded.
    Works,
    /// The file system refused one.
    Refused,
    /// There was no file to try.
    Untried(String),
}

/// What the system says of the drive of a folder.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Drive {
    /// Folder, as it is shown.
    folder: String,
    /// Name of the file system: `ext4`.
    file_system: Option<String>,
    /// Name of the block device: `nvme0n1`.
    device: Option<String>,
    /// Product name of the device.
    product: Option<String>,
    space: Option<FileSystemSpace>,
    rotational: Option<bool>,
    scheduler: Option<String>,
    read_ahead_kib: Option<u64>,
}

impl Drive {
    /// Asks about the drive of an absolute folder.
    pub fn of(system: &System, folder: &Path) -> Self {
        let mut drive = Self::listed(system, folder);
        // A folder that is to be made will be on the drive of the one above it.
        drive.space = folder.ancestors().find_map(file_system_space);
        drive
    }

    /// Returns the bytes that may still be written, where the system reports them.
    pub(super) fn free_bytes(&self) -> Option<u64> {
        self.space.map(|space| space.free_bytes)
    }

    /// Returns what the files of a system say of the drive of an absolute folder.
    pub fn listed(system: &System, folder: &Path) -> Self {
        let mounts = mounts::parse(&system.bytes("proc/self/mountinfo").unwrap_or_default());
        let shown = folder.display().to_string();
        let Some(mount) = mounts::of_path(&mounts, folder) else {
            return Self {
                folder: shown,
                ..Self::default()
            };
        };
        let block = block(system, mount);
        let queue = |file: &str| {
            let block = block.as_ref()?;
            // A partition has the queue of its disk.
            let own = system.text(&format!("{block}/queue/{file}"));
            own.or_else(|| system.text(&format!("{block}/../queue/{file}")))
        };
        let product = block.as_ref().and_then(|block| {
            let own = system.text(&format!("{block}/device/model"));
            own.or_else(|| system.text(&format!("{block}/../device/model")))
        });
        let name = |block: &String| {
            let real = system.path(block).canonicalize().ok()?;
            let of = if real.join("partition").exists() {
                real.parent()?
            } else {
                &real
            };
            Some(of.file_name()?.to_str()?.to_string())
        };
        Self {
            folder: shown,
            device: block.as_ref().and_then(name),
            product,
            space: None,
            rotational: queue("rotational").map(|text| text == "1"),
            scheduler: queue("scheduler"),
            read_ahead_kib: queue("read_ahead_kb").and_then(|text| text.parse().ok()),
            file_system: Some(mount.file_system.clone()),
        }
    }

    /// Returns a drive of which only the name is known, and that it says that it rotates.
    #[cfg(test)]
    pub(super) fn rotating(device: &str) -> Self {
        Self {
            device: Some(device.into()),
            rotational: Some(true),
            ..Self::default()
        }
    }

    /// Checks the drive.
    pub fn checks(
        &self,
        process: &Process,
        direct: Direct,
        forecast: Option<&Forecast<'_>>,
    ) -> Vec<Check> {
        vec![
            self.file_system(),
            self.direct_io(process, direct, forecast),
            self.rotational(),
            self.scheduler(),
            self.read_ahead(),
        ]
    }

    fn file_system(&self) -> Check {
        let id = "drive.file_system";
        let Some(name) = &self.file_system else {
            return Check::ok(
                id,
                format!("{}: unknown: the system lists no mounts", self.folder),
            );
        };
        let device = match (&self.device, &self.product) {
            (Some(device), Some(product)) => format!(" on {device} ({product})"),
            (Some(device), None) => format!(" on {device}"),
            (None, _) => String::new(),
        };
        let space = self.space.map_or(String::new(), |space| {
            let (free, total) = (show_bytes(space.free_bytes), show_bytes(space.total_bytes));
            format!(", {free} free of {total}")
        });
        let check = Check::ok(id, format!("{}: {name}{device}{space}", self.folder))
            .fact("folder", self.folder.as_str())
            .fact("file_system", name.as_str())
            .fact("device", self.device.clone())
            .fact("product", self.product.clone())
            .fact("free_bytes", self.space.map(|s| s.free_bytes))
            .fact("total_bytes", self.space.map(|s| s.total_bytes));
        if REMOTE.contains(&name.as_str()) {
            return check
                .warning(format!(
                    "every missed expert comes over {name}; `tier-plan doctor --measure` gives its rate"
                ))
                .mend("cp MODEL FOLDER, with a folder on a drive of this machine");
        }
        if name == "tmpfs" || name == "ramfs" {
            return check
                .warning(format!(
                    "files on {name} take main memory, and a loaded model has a second copy"
                ))
                .mend("cp MODEL FOLDER, with a folder on a drive");
        }
        check
    }

    fn direct_io(
        &self,
        process: &Process,
        direct: Direct,
        forecast: Option<&Forecast<'_>>,
    ) -> Check {
        let id = "drive.direct_io";
        let io = process.io.as_deref();
        let found = match &direct {
            Direct::Works => "works (O_DIRECT, tried)".to_string(),
            Direct::Refused => "refused by the file system".to_string(),
            Direct::Untried(why) => format!("not tried: {why}"),
        };
        let works = match direct {
            Direct::Works => Some(true),
            Direct::Refused => Some(false),
            Direct::Untried(_) => None,
        };
        let check = Check::ok(id, found)
            .fact("works", works)
            .fact("variable", io);
        let direct_instead = Change {
            drive_factor: DIRECT_GBPS / BUFFERED_GBPS,
            ..Change::default()
        };
        match io {
            Some("direct") | None => {}
            Some("buffered") if works != Some(true) => {}
            Some("buffered") => {
                let words = format!("TIER_PLAN_IO=buffered asks for the page cache: {BUFFERED}");
                return check
                    .warning(cost(words, forecast, &direct_instead))
                    .mend("unset TIER_PLAN_IO");
            }
            Some(other) => {
                let found = format!("TIER_PLAN_IO={other}, expected direct or buffered");
                return Check { found, ..check }.failure("unset TIER_PLAN_IO");
            }
        }
        match works {
            Some(false) => check
                .warning(cost(BUFFERED, forecast, &direct_instead))
                .mend("cp MODEL FOLDER, with a folder on ext4, XFS, or Btrfs"),
            _ => check,
        }
    }

    fn rotational(&self) -> Check {
        let id = "drive.rotational";
        let Some(rotational) = self.rotational else {
            return Check::ok(id, "unknown: no block device is known for the folder");
        };
        let found = if rotational { "a rotating disk" } else { "no" };
        let check = Check::ok(id, found).fact("rotational", rotational);
        if !rotational {
            return check;
        }
        let is_virtual = |name: &String| VIRTUAL.iter().any(|prefix| name.starts_with(prefix));
        if self.device.as_ref().is_some_and(is_virtual) {
            return Check {
                found: "unknown: queue/rotational is 1, which drives of virtual machines say of themselves"
                    .to_string(),
                ..check
            };
        }
        check
            .warning(
                "queue/rotational is 1: if that is true, the heads move before each missed expert is read, about 10 ms; \
                 `tier-plan doctor --measure` gives the rate",
            )
            .mend("cp MODEL FOLDER, with a folder on an SSD; or `tier-plan pack MODEL`, which makes one read of three")
    }

    fn scheduler(&self) -> Check {
        let id = "drive.scheduler";
        let Some(text) = &self.scheduler else {
            return Check::ok(id, "unknown: no block device is known for the folder");
        };
        // A device without a choice has one word without brackets.
        let used = chosen(text).unwrap_or(text);
        let check = Check::ok(id, used).fact("scheduler", used);
        if used != "bfq" || self.rotational == Some(true) {
            return check;
        }
        let device = self.device.as_deref().unwrap_or("DEVICE");
        check
            .warning(
                "queue/scheduler is bfq, which lets a drive idle to wait for one reader, and models are read by 16 threads",
            )
            .mend(format!("echo none | sudo tee /sys/block/{device}/queue/scheduler"))
    }

    /// No setting is wrong: reads are direct, or ask the system for no read-ahead.
    fn read_ahead(&self) -> Check {
        let id = "drive.read_ahead";
        match self.read_ahead_kib {
            None => Check::ok(id, "unknown: no block device is known for the folder"),
            Some(kib) => Check::ok(id, format!("{kib} KiB, used for mapped files only"))
                .fact("bytes", kib.saturating_mul(1024)),
        }
    }
}

/// Returns the folder of a mount's block device below the root, if it has one.
fn block(system: &System, mount: &Mount) -> Option<String> {
    let by_number = mount.device.map(|device| format!("sys/dev/block/{device}"));
    if let Some(by_number) = by_number.filter(|path| system.has(path)) {
        return Some(by_number);
    }
    // Btrfs and others have numbers of their own; a mapper's name is a link.
    let source = mount.source.to_str()?;
    let device = source.strip_prefix("/dev/")?;
    let real = system.path(source).canonicalize().ok();
    let real = real.as_deref().and_then(Path::file_name);
    let name = real.and_then(|name| name.to_str()).unwrap_or(device);
    let by_name = format!("sys/class/block/{name}");
    system.has(&by_name).then_some(by_name)
}

/// Returns the absolute folder of a model, or the current one.
pub(super) fn folder(model: Option<&Path>) -> PathBuf {
    let here = PathBuf::from(".");
    let of_model = |model: &Path| {
        let model = model.canonicalize().ok()?;
        if model.is_dir() {
            return Some(model);
        }
        Some(model.parent()?.to_path_buf())
    };
    let folder = model.and_then(of_model).unwrap_or(here);
    folder.canonicalize().unwrap_or(folder)
}

/// Returns the absolute path of a folder of which the last parts may not exist.
pub(super) fn future(folder: &Path) -> PathBuf {
    let folder = std::path::absolute(folder).unwrap_or_else(|_| folder.to_path_buf());
    let there = folder.ancestors().find_map(|above| {
        let real = above.canonicalize().ok()?;
        let below = folder.strip_prefix(above).ok()?;
        Some(if below.as_os_str().is_empty() {
            real
        } else {
            real.join(below)
        })
    });
    there.unwrap_or(folder)
}

/// Returns the nearest folder that exists at or above one.
pub(super) fn existing(folder: &Path) -> &Path {
    let mut above = folder.ancestors();
    above.find(|above| above.is_dir()).unwrap_or(folder)
}

/// Tries direct I/O with the model, or else with a file of the folder, or a new one.
pub(super) fn try_direct(model: Option<&Path>, folder: &Path) -> Direct {
    let mut made = None;
    let there = model
        .filter(|model| model.is_file())
        .map(Path::to_path_buf)
        .or_else(|| some_file(folder));
    let path = match there {
        Some(path) => path,
        None => match trial(folder) {
            Ok(file) => made.insert(file).path().to_path_buf(),
            Err(error) => return Direct::Untried(format!("no file to read there, and {error:#}")),
        },
    };
    match FileTier::open(&[path], ReadMode::Direct) {
        Ok(files) if files.is_direct() => Direct::Works,
        Ok(_) => Direct::Refused,
        Err(error) => Direct::Untried(error.to_string()),
    }
}

/// Returns a file of a folder that can be read and has a page or more.
fn some_file(folder: &Path) -> Option<PathBuf> {
    let entries = fs::read_dir(folder).ok()?.take(MAX_TRIALS).flatten();
    entries.map(|entry| entry.path()).find(|path| {
        let large = fs::symlink_metadata(path)
            .is_ok_and(|found| found.is_file() && found.len() >= ALIGN as u64);
        large && fs::File::open(path).is_ok()
    })
}

/// Writes a page into a file that disappears when it is dropped.
fn trial(folder: &Path) -> Result<Temporary> {
    use std::io::Write;
    let file = Temporary::create(folder).context("none can be made")?;
    file.file()
        .write_all(&[0; ALIGN])
        .context("writing one failed")?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn direct_io_is_tried_without_leaving_anything() {
        let folder = tempfile::tempdir().unwrap();
        let found = try_direct(None, folder.path());
        assert!(
            matches!(found, Direct::Works | Direct::Refused),
            "{found:?}"
        );
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        // The file of the folder is as good.
        fs::write(folder.path().join("a"), vec![1; 2 * ALIGN]).unwrap();
        assert_eq!(try_direct(None, folder.path()), found);
        let missing = try_direct(None, &folder.path().join("missing"));
        assert!(matches!(missing, Direct::Untried(_)), "{missing:?}");
    }
}
