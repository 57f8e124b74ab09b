//! What a file was made from.

/// What a file was made from: a name for people and a hash for programs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct SourceId {
    /// The name as people know it: `general.name`, a file stem.
    pub name: String,
    /// 32 hexadecimal digits of XXH3-128 over the content (for a model: over its header and its length).
    pub hash: String,
}

impl SourceId {
    /// Identifies content by its bytes.
    pub fn of_bytes(name: &str, bytes: &[u8]) -> SourceId {
        SourceId { name: name.into(), hash: format!("{:032x}", xxhash_rust::xxh3::xxh3_128(bytes)) }
    }
}

/// The name and the start of the hash, for messages.
impl std::fmt::Display for SourceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let short: String = self.hash.chars().take(12).collect();
        write!(f, "'{}' ({short})", self.name)
    }
}
