//! Identity of the file or model that a file was made from.

/// The source of a file: a readable name and a hash.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SourceId {
    /// A readable name: `general.name` of a model, or a file stem.
    pub name: String,
    /// 32 hexadecimal digits of XXH3-128 over the content (for a model: over its header and its
    /// length).
    pub hash: String,
}

impl SourceId {
    /// Identifies content by its bytes.
    pub fn of_bytes(name: &str, bytes: &[u8]) -> SourceId {
        SourceId {
            name: name.into(),
            hash: format!("{:032x}", xxhash_rust::xxh3::xxh3_128(bytes)),
        }
    }
}

/// The name and the start of the hash, for messages.
impl std::fmt::Display for SourceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let short: String = self.hash.chars().take(12).collect();
        write!(f, "'{}' ({short})", self.name)
    }
}
