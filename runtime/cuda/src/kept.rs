//! Compiled kernels that are kept on disk, so that only the first start on a machine compiles.

use super::nvrtc::OPTIONS;
use super::source::{Module, headers};
use std::path::PathBuf;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// Where a compiled module is kept; `None` where the environment names no folder. The name changes with everything that
/// changes the code.
pub(super) fn path(module: &Module, capability: (i32, i32), driver: i32) -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let cache = set("XDG_CACHE_HOME").or_else(|| Some(set("HOME")?.join(".cache")))?;
    Some(cache.join("tier-plan").join("kernels").join(name(module, capability, driver)))
}

fn name(module: &Module, (major, minor): (i32, i32), driver: i32) -> String {
    let mut hash = Xxh3::new();
    for text in headers().iter().map(|(_, text)| text.as_str()).chain(OPTIONS).chain([module.text]) {
        hash.update(&(text.len() as u64).to_le_bytes());
        hash.update(text.as_bytes());
    }
    let stem = module.name.trim_end_matches(".cu");
    format!("{stem}-sm{major}{minor}-{driver}-{:032x}.bin", hash.digest128())
}

/// An image with its sum before it.
pub(super) fn seal(image: &[u8]) -> Vec<u8> {
    let mut bytes = xxh3_64(image).to_le_bytes().to_vec();
    bytes.extend_from_slice(image);
    bytes
}

/// The image, if it is whole.
pub(super) fn unseal(bytes: &[u8]) -> Option<Vec<u8>> {
    let (sum, image) = bytes.split_first_chunk()?;
    (!image.is_empty() && u64::from_le_bytes(*sum) == xxh3_64(image)).then(|| image.to_vec())
}

#[cfg(test)]
mod tests {
    use super::super::source::MODULES;
    use super::*;

    #[test]
    fn kept_kernels_must_be_whole() {
        let sealed = seal(b"machine code");
        assert_eq!(unseal(&sealed).as_deref(), Some(b"machine code".as_slice()));
        for cut in 0..sealed.len() {
            assert_eq!(unseal(&sealed[..cut]), None);
        }
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert_eq!(unseal(&changed), None);
        }
    }

    #[test]
    fn what_changes_the_code_changes_the_name() {
        let [a, b, ..] = &MODULES;
        let first = name(a, (8, 6), 12_040);
        assert_eq!(first, name(a, (8, 6), 12_040));
        let changed = Module { name: a.name, text: "other", kernels: a.kernels };
        for other in
            [name(b, (8, 6), 12_040), name(a, (8, 9), 12_040), name(a, (8, 6), 13_000), name(&changed, (8, 6), 12_040)]
        {
            assert_ne!(first, other);
        }
    }
}
