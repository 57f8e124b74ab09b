//! Cache of compiled kernels on disk, so that only the first start on a machine compiles.

use super::Version;
use super::nvrtc::OPTIONS;
use super::source::{Module, headers};
use std::path::PathBuf;
use tier_plan_formats::folders::{self, Environment};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// Returns the folder of compiled kernels; `None` if the environment names no cache folder.
pub fn folder(env: Environment<'_>) -> Option<PathBuf> {
    Some(folders::cache(env)?.join("tier-plan/kernels"))
}

/// Returns the cache file of a compiled module; `None` if the environment names no cache folder.
/// The name changes with everything that changes the machine code.
pub(super) fn path(module: &Module, capability: Version, driver: i32) -> Option<PathBuf> {
    let folder = folder(&|name| std::env::var_os(name))?;
    Some(folder.join(file_name(module, capability, driver)))
}

fn file_name(module: &Module, capability: Version, driver: i32) -> String {
    let mut hash = Xxh3::new();
    for text in headers()
        .iter()
        .map(|(_, text)| text.as_str())
        .chain(OPTIONS)
        .chain([module.text])
    {
        hash.update(&(text.len() as u64).to_le_bytes());
        hash.update(text.as_bytes());
    }
    let stem = module.name.trim_end_matches(".cu");
    let Version { major, minor } = capability;
    format!(
        "{stem}-sm{major}{minor}-{driver}-{:032x}.bin",
        hash.digest128()
    )
}

/// Prepends a checksum to an image.
pub(super) fn seal(image: &[u8]) -> Vec<u8> {
    let mut bytes = xxh3_64(image).to_le_bytes().to_vec();
    bytes.extend_from_slice(image);
    bytes
}

/// Returns the image of a cache file; `None` if the checksum does not match.
pub(super) fn unseal(bytes: &[u8]) -> Option<Vec<u8>> {
    let (sum, image) = bytes.split_first_chunk()?;
    (!image.is_empty() && u64::from_le_bytes(*sum) == xxh3_64(image)).then(|| image.to_vec())
}

#[cfg(test)]
mod tests {
    use super::super::source::MODULES;
    use super::*;

    #[test]
    fn damaged_cache_files_are_rejected() {
        let sealed = seal(b"machine code");
        assert_eq!(unseal(&sealed).as_deref(), Some(b"machine code".as_slice()));
        for len in 0..sealed.len() {
            assert_eq!(unseal(&sealed[..len]), None);
        }
        for i in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[i] ^= 1;
            assert_eq!(unseal(&changed), None);
        }
    }

    #[test]
    fn the_file_name_depends_on_text_capability_and_driver() {
        let [a, b, ..] = &MODULES;
        let capability = |major, minor| Version { major, minor };
        let first = file_name(a, capability(8, 6), 12_040);
        assert_eq!(first, file_name(a, capability(8, 6), 12_040));
        let changed = Module {
            name: a.name,
            text: "other",
            kernels: a.kernels,
        };
        for other in [
            file_name(b, capability(8, 6), 12_040),
            file_name(a, capability(8, 9), 12_040),
            file_name(a, capability(8, 6), 13_000),
            file_name(&changed, capability(8, 6), 12_040),
        ] {
            assert_ne!(first, other);
        }
    }
}
