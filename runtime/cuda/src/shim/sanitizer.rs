//! Kernels that check every access to memory, as CUDA's Compute Sanitizer does on a GPU
//! (`sanitizer.h`).

use libloading::Library;
use std::ffi::{CStr, c_char};
use std::path::Path;
use std::process::Command;

/// Options that have the compiler call a function at every access. It must not make one access of
/// several: a kernel's own are to be checked.
pub(super) const OPTIONS: [&str; 6] = [
    "-DTIER_PLAN_SANITIZER",
    "-fsanitize=thread",
    "-fsanitize=alignment",
    "-fno-tree-vectorize",
    "-fno-tree-slp-vectorize",
    // Findings name lines.
    "-g1",
];

/// The start and end of an allocation.
type Range = [u64; 2];
type SetAllocations = unsafe extern "C" fn(*const Range, u64);
type Finding = unsafe extern "C" fn() -> *const c_char;

/// Whether the environment has `TIER_PLAN_SANITIZER=1`.
pub(super) fn is_wanted() -> bool {
    std::env::var_os("TIER_PLAN_SANITIZER").is_some_and(|value| value == "1")
}

/// Tells kernels what is allocated: addresses and sizes.
///
/// # Safety
/// What is returned must live through the next launch.
pub(super) unsafe fn set_allocations(
    library: &Library,
    allocations: impl Iterator<Item = (u64, usize)>,
) -> Vec<Range> {
    let mut ranges: Vec<Range> = allocations
        // Words are read whole, and an allocation of a GPU ends at one.
        .map(|(at, len)| [at, (at + len as u64).next_multiple_of(4)])
        .collect();
    ranges.sort_unstable();
    // SAFETY: the function has this type; the caller keeps the list.
    unsafe {
        let set = library
            .get::<SetAllocations>(b"sanitizer_allocations")
            .unwrap();
        set(ranges.as_ptr(), ranges.len() as u64);
    }
    ranges
}

/// Returns what was found in the last launch of a library that lies at `path`.
pub(super) fn finding(library: &Library, path: &Path) -> Option<String> {
    // SAFETY: the function has this type, and its text lives until the next launch.
    let text = unsafe {
        let finding = library.get::<Finding>(b"sanitizer_finding").unwrap();
        CStr::from_ptr(finding()).to_string_lossy().into_owned()
    };
    if text.is_empty() {
        return None;
    }
    Some(match text.rsplit_once(" at 0x") {
        Some((what, offset)) => format!("{what} at {}", line(path, offset)),
        None => text,
    })
}

/// Names the line that an offset in a library belongs to, and those that it is inlined in, where
/// the system has the tool for it.
fn line(path: &Path, offset: &str) -> String {
    let done = Command::new("addr2line")
        .args(["-i", "-p", "-s", "-e"])
        .arg(path)
        .arg(offset)
        .output();
    let text = match done {
        Ok(done) if done.status.success() => String::from_utf8_lossy(&done.stdout).into_owned(),
        _ => return format!("0x{offset} of {}", path.display()),
    };
    let places = text
        .lines()
        .map(|line| line.trim().trim_start_matches("(inlined by) "))
        .filter(|place| !place.starts_with("shim.h") && !place.starts_with("all.cpp"));
    places.collect::<Vec<_>>().join(", in ")
}
