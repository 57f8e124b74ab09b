//! Finds the files that come with the program: demo model, machine, calibration prompts and golden
//! values.
//!
//! In a clone of the source they are used where they lie. Everywhere else the files of `profiles/`
//! are compiled in. They are written to the user's cache when a command first wants them, since
//! models are mapped and read from files.

use crate::folders::{self, Environment};
use crate::hint::HintExt;
use anyhow::{Context, Result, anyhow};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use tier_plan_runtime::formats::safely;

/// Folder of the source that this program was built from. Released builds don't look there, since
/// on another machine the folder might be anyone's.
const BUILD_TREE: Option<&str> = if option_env!("TIER_PLAN_RELEASE").is_some() {
    None
} else {
    Some(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
};

/// Returns the path of a file or folder under `profiles/`: in the current folder or one above, in
/// the build tree, or in the user's cache, where it is written first.
///
/// # Errors
/// When the build has no such file, or the cache cannot be written.
pub fn path(relative: &str) -> Result<PathBuf> {
    if let Some(found) = find(&Path::new("profiles").join(relative)) {
        return Ok(found);
    }
    unpack(relative, &cache_folder(&folders::variable)?)
}

/// Returns the folder of small models with golden logits of another engine.
///
/// # Errors
/// When there is none.
pub fn golden() -> Result<PathBuf> {
    find(Path::new("tests/data")).filter(|folder| folder.join("arch").is_dir()).context(
        "tests/data, small models with golden logits, was not found in this folder or above it; run tier-plan from a clone of \
         its source, or give --golden FOLDER",
    )
}

fn find(relative: &Path) -> Option<PathBuf> {
    let here = std::env::current_dir().unwrap_or_default();
    let built = BUILD_TREE.map(PathBuf::from);
    let candidates = here.ancestors().map(Path::to_path_buf).chain(built);
    candidates
        .map(|root| root.join(relative))
        .find(|p| p.exists())
}

/// Returns the folder of this version's files in the user's cache.
fn cache_folder(env: Environment<'_>) -> Result<PathBuf> {
    folders::bundled(env)
        .map(|folder| folder.join(env!("CARGO_PKG_VERSION")))
        .context("no folder for the files that come with tier-plan: neither XDG_CACHE_HOME nor HOME has an absolute path")
        .hint("set XDG_CACHE_HOME to a folder that can be written")
}

/// Writes the bundled files at or below `relative` into a folder, except those that are there, and
/// returns where they are.
fn unpack(relative: &str, folder: &Path) -> Result<PathBuf> {
    let files = tier_plan_profiles::files(relative);
    if files.is_empty() {
        return Err(anyhow!(
            "profiles/{relative} was not found in this folder or above it, and this build of tier-plan does not contain it"
        ))
        .hint("install a release (docs/INSTALL.md), or run tier-plan from a clone of its source");
    }
    for file in files {
        let path = folder.join(&file.path);
        if holds(&path, file.bytes) {
            continue;
        }
        let parent = path.parent().unwrap_or(folder);
        std::fs::create_dir_all(parent)
            .with_context(|| format!("making the folder {}", parent.display()))
            .hint("set XDG_CACHE_HOME to a folder that can be written")?;
        safely::write(&path, file.bytes)
            .hint("set XDG_CACHE_HOME to a folder that can be written")?;
    }
    Ok(folder.join(relative))
}

/// Returns whether a file exists and has exactly these bytes.
fn holds(path: &Path, bytes: &[u8]) -> bool {
    let Ok(mut file) = File::open(path) else {
        return false;
    };
    let is_as_long = |file: &File| {
        file.metadata()
            .is_ok_and(|m| m.is_file() && m.len() == bytes.len() as u64)
    };
    if !is_as_long(&file) {
        return false;
    }
    let mut buffer = vec![0; 64 << 10];
    let mut rest = bytes;
    loop {
        match file.read(&mut buffer) {
            Ok(0) => return rest.is_empty(),
            Ok(read) => match rest.strip_prefix(&buffer[..read]) {
                Some(after) => rest = after,
                None => return false,
            },
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(_) => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use std::ffi::OsString;

    fn folder_with(variables: &[(&str, &str)]) -> Result<PathBuf> {
        let variables: HashMap<_, _> = variables.iter().copied().collect();
        cache_folder(&|name| variables.get(name).map(OsString::from))
    }

    #[cfg(unix)]
    #[test]
    fn the_cache_is_where_the_user_has_caches() {
        let version = concat!("tier-plan/bundled/", env!("CARGO_PKG_VERSION"));
        let both = [("XDG_CACHE_HOME", "/c"), ("HOME", "/home/u")];
        assert_eq!(folder_with(&both).unwrap(), Path::new("/c").join(version));
        let relative = [("XDG_CACHE_HOME", "c"), ("HOME", "/home/u")];
        let expected = Path::new("/home/u/.cache").join(version);
        assert_eq!(folder_with(&relative).unwrap(), expected);
        assert_eq!(folder_with(&[("HOME", "/home/u")]).unwrap(), expected);
        for none in [&[][..], &[("HOME", ""), ("XDG_CACHE_HOME", "")]] {
            let error = folder_with(none).unwrap_err();
            assert!(error.to_string().contains("XDG_CACHE_HOME"), "{error}");
        }
    }

    #[test]
    fn files_are_written_once_and_damaged_ones_again() {
        let cache = tempfile::tempdir().unwrap();
        let machine = "machines/demo-emulated.toml";
        let path = unpack(machine, cache.path()).unwrap();
        let written = std::fs::read(&path).unwrap();
        assert_eq!(written, tier_plan_profiles::files(machine)[0].bytes);
        let modified = || path.metadata().unwrap().modified().unwrap();
        let first = modified();
        unpack(machine, cache.path()).unwrap();
        assert_eq!(modified(), first);
        let mut other = written.clone();
        *other.last_mut().unwrap() ^= 1;
        for damaged in [&other[..], &written[1..], &[]] {
            std::fs::write(&path, damaged).unwrap();
            unpack(machine, cache.path()).unwrap();
            assert_eq!(std::fs::read(&path).unwrap(), written);
        }
    }

    #[test]
    fn a_folder_is_written_whole_and_can_be_read_as_prompts() {
        let cache = tempfile::tempdir().unwrap();
        let folder = unpack("prompts", cache.path()).unwrap();
        let prompts = crate::profile::prompts::read(&folder).unwrap();
        let expected = crate::profile::prompts::read(Path::new("../profiles/prompts")).unwrap();
        assert_eq!(format!("{prompts:?}"), format!("{expected:?}"));
        assert!(!cache.path().join("machines").exists());
    }

    #[test]
    fn the_demo_model_is_a_model_where_it_was_written() {
        let cache = tempfile::tempdir().unwrap();
        let path = unpack("demo/demo.gguf", cache.path()).unwrap();
        let written = tier_plan_runtime::gguf::Gguf::open(&path).unwrap();
        let source = Path::new("../profiles/demo/demo.gguf");
        let source = tier_plan_runtime::gguf::Gguf::open(source).unwrap();
        assert_eq!(written.id(), source.id());
    }

    #[test]
    fn what_a_build_lacks_and_a_cache_that_cannot_be_written_are_errors_with_a_hint() {
        let cache = tempfile::tempdir().unwrap();
        let hint = |error: &anyhow::Error| crate::hint::hint_for(error).unwrap_or_default();
        let error = unpack("demo/other.gguf", cache.path()).unwrap_err();
        assert!(
            error.to_string().contains("profiles/demo/other.gguf"),
            "{error}"
        );
        assert!(hint(&error).contains("clone"), "{}", hint(&error));
        let file = cache.path().join("file");
        std::fs::write(&file, "").unwrap();
        let error = unpack("machines/demo-emulated.toml", &file).unwrap_err();
        assert!(hint(&error).contains("XDG_CACHE_HOME"), "{error:#}");
    }
}
