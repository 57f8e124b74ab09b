//! Files and texts that the library reads.

pub mod gguf;
pub mod kept;
pub mod machine;
pub mod model;
pub mod pack;
pub mod placement;
pub mod profile;
pub mod prompt;
pub mod record;
pub mod shape;
pub mod slots;
pub mod sums;

/// Checks one input, and panics if something is wrong.
pub type Check = fn(&[u8]);

/// Every target with its name.
pub const TARGETS: &[(&str, Check)] = &[
    ("gguf", gguf::check),
    ("kept", kept::check),
    ("machine", machine::check),
    ("model", model::check),
    ("pack", pack::check),
    ("placement", placement::check),
    ("profile", profile::check),
    ("prompt", prompt::check),
    ("record", record::check),
    ("shape", shape::check),
    ("slots", slots::check),
    ("sums", sums::check),
];
