//! The folder of a model below the user's state folder, and what it keeps between starts.
//!
//! Everything in it can be made again. So a file that is damaged is made anew, and a folder that
//! cannot be written costs time at the next start and nothing else.

use crate::folders;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use tier_plan_runtime::formats::{FormatError, SourceId, safely};

/// Most plans that are kept of one model.
const MAX_PLANS: usize = 16;

/// Longest part of a model's name in the name of its folder.
const MAX_NAME: usize = 48;

/// Digits of hashes in names.
pub(super) const DIGITS: usize = 12;

/// What is kept of one model.
#[derive(Debug, Clone)]
pub struct Place {
    folder: Option<PathBuf>,
    is_writable: bool,
}

impl Place {
    /// Returns the folder of a model, which may not exist.
    pub fn of(model: &SourceId) -> Self {
        Self::below(folders::auto(&folders::variable).as_deref(), model)
    }

    pub(super) fn below(all: Option<&Path>, model: &SourceId) -> Self {
        Self {
            folder: all.map(|all| all.join(folder_name(model))),
            is_writable: false,
        }
    }

    /// Makes the folder. Returns a note if nothing can be kept there.
    pub fn make(&mut self) -> Option<String> {
        let Some(folder) = &self.folder else {
            return Some(
                "note: neither XDG_STATE_HOME nor HOME has an absolute path, so nothing is kept for the next start"
                    .to_string(),
            );
        };
        match make_private(folder).and_then(|()| {
            safely::check_file(&folder.join("plan.toml")).map_err(std::io::Error::other)
        }) {
            Ok(()) => {
                self.is_writable = true;
                None
            }
            Err(error) => Some(format!(
                "note: {} cannot be written, so nothing is kept for the next start: {error}",
                folder.display()
            )),
        }
    }

    /// Returns the folder.
    pub fn folder(&self) -> Option<&Path> {
        self.folder.as_deref()
    }

    /// Whether files can be kept.
    pub fn is_writable(&self) -> bool {
        self.is_writable
    }

    /// Returns the path of a file.
    pub fn file(&self, name: &str) -> Option<PathBuf> {
        Some(self.folder.as_ref()?.join(name))
    }

    /// Returns the path of a file that is there.
    pub fn found(&self, name: &str) -> Option<PathBuf> {
        self.file(name).filter(|path| path.exists())
    }

    /// Writes a file if the folder can be written, and returns its path. A note says why it is not
    /// kept.
    pub fn keep(
        &self,
        name: &str,
        notes: &mut Vec<String>,
        write: impl FnOnce(&Path) -> Result<(), FormatError>,
    ) -> Option<PathBuf> {
        let path = self.file(name).filter(|_| self.is_writable)?;
        match write(&path) {
            Ok(()) => Some(path),
            Err(error) => {
                notes.push(format!("note: not kept for the next start: {error}"));
                None
            }
        }
    }

    /// Notes that a plan is used, so that others are removed before it.
    pub fn used(&self, plan: &Path) {
        let open = || File::options().write(true).open(plan);
        if self.is_writable
            && let Ok(file) = open()
        {
            // The plan is as good without it.
            let _ = file.set_modified(SystemTime::now());
        }
    }

    /// Removes the plans that were used longest ago, if there are many.
    pub fn tidy(&self) {
        let Some(folder) = self.folder.as_ref().filter(|_| self.is_writable) else {
            return;
        };
        let mut plans = plans(folder);
        plans.sort_by_key(|plan| std::cmp::Reverse(plan.used));
        for old in plans.iter().skip(MAX_PLANS) {
            // What remains is removed at another time.
            let _ = std::fs::remove_file(&old.path);
            let _ = std::fs::remove_file(old.path.with_extension("json"));
        }
    }
}

/// A plan in the folder.
pub(super) struct KeptPlan {
    pub path: PathBuf,
    used: Option<SystemTime>,
}

/// Returns the plans in a folder, in no order.
pub(super) fn plans(folder: &Path) -> Vec<KeptPlan> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let paths = entries.map(|entry| entry.path());
    let is_plan = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| name.starts_with("plan-") && name.ends_with(".toml"))
    };
    paths
        .filter(is_plan)
        .map(|path| KeptPlan {
            used: modified(&path),
            path,
        })
        .collect()
}

/// Returns when a file was written.
pub(super) fn modified(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).ok()?.modified().ok()
}

/// Returns how long ago a file was written; no time where the clock was set back since.
pub(super) fn age(path: &Path) -> Duration {
    modified(path).map_or(Duration::MAX, |then| then.elapsed().unwrap_or_default())
}

/// Makes a folder that only its owner can read: it says which experts were used.
fn make_private(folder: &Path) -> std::io::Result<()> {
    let mut builder = std::fs::DirBuilder::new();
    builder.recursive(true);
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.create(folder)
}

/// Returns a name for a model's folder that is safe in any file system.
fn folder_name(model: &SourceId) -> String {
    let safe = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
    let name: String = model
        .name
        .chars()
        .map(|c| if safe(c) { c } else { '-' })
        .take(MAX_NAME)
        .collect();
    let name = name.trim_matches('-');
    let hash: String = model
        .hash
        .chars()
        .filter(|c| safe(*c))
        .take(DIGITS)
        .collect();
    match name {
        "" => format!("model-{hash}"),
        name => format!("{name}-{hash}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(name: &str) -> SourceId {
        SourceId {
            name: name.into(),
            hash: "0123456789abcdef0123456789abcdef".into(),
        }
    }

    #[test]
    fn folders_have_safe_names() {
        let long = "x".repeat(1000);
        let names = [
            ("Qwen3 30B", "Qwen3-30B-0123456789ab"),
            ("../../etc", "etc-0123456789ab"),
            ("\u{1b}[31m", "31m-0123456789ab"),
            ("", "model-0123456789ab"),
        ];
        for (name, expected) in names {
            assert_eq!(folder_name(&id(name)), expected);
        }
        assert!(folder_name(&id(&long)).len() <= MAX_NAME + 1 + DIGITS);
    }

    #[test]
    fn a_place_keeps_few_plans() {
        let state = tempfile::tempdir().unwrap();
        let mut place = Place::below(Some(state.path()), &id("m"));
        assert!(!place.folder().unwrap().exists());
        assert_eq!(place.make(), None);
        let mut notes = Vec::new();
        let write = |path: &Path| safely::write(path, b"");
        for n in 0..MAX_PLANS + 5 {
            let name = format!("plan-{n}.toml");
            assert!(place.keep(&name, &mut notes, write).is_some());
        }
        place.keep("learned.profile", &mut notes, write);
        place.tidy();
        assert!(notes.is_empty() && place.found("learned.profile").is_some());
        assert_eq!(plans(place.folder().unwrap()).len(), MAX_PLANS);
    }

    #[test]
    fn plans_that_were_used_longest_ago_are_removed() {
        let state = tempfile::tempdir().unwrap();
        let mut place = Place::below(Some(state.path()), &id("m"));
        place.make();
        let write = |path: &Path| safely::write(path, b"");
        let name = |n: usize| format!("plan-{n:02}.toml");
        let hour = Duration::from_secs(3600);
        for n in 0..MAX_PLANS + 3 {
            let path = place.keep(&name(n), &mut Vec::new(), write).unwrap();
            let made = SystemTime::now() - hour * (100 - n as u32);
            let file = File::options().write(true).open(path).unwrap();
            file.set_modified(made).unwrap();
        }
        // The oldest two are in use.
        for n in [0, 1] {
            place.used(&place.file(&name(n)).unwrap());
        }
        place.tidy();
        let is_there = |n: &usize| place.found(&name(*n)).is_some();
        let removed: Vec<usize> = (0..MAX_PLANS + 3).filter(|n| !is_there(n)).collect();
        assert_eq!(removed, [2, 3, 4]);
    }

    #[test]
    fn without_a_folder_nothing_is_kept() {
        let mut nowhere = Place::below(None, &id("m"));
        assert!(nowhere.make().unwrap().contains("XDG_STATE_HOME"));
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "").unwrap();
        let mut blocked = Place::below(Some(&file), &id("m"));
        let note = blocked.make().unwrap();
        assert!(note.contains("cannot be written"), "{note}");
        let never = |_: &Path| panic!("written");
        for place in [nowhere, blocked] {
            assert_eq!(place.keep("x", &mut Vec::new(), never), None);
        }
    }
}
