//! Any bytes as a file of packed experts: decoded, or refused with a message.

use std::path::Path;
use tier_plan_runtime::formats::pack;

/// Checks one input.
pub fn check(bytes: &[u8]) {
    match pack::decode(bytes, bytes.len() as u64, Path::new("fuzz.experts")) {
        Err(error) => assert!(!error.to_string().is_empty()),
        Ok(file) => {
            for (layer, packed) in file.index.layers.iter().enumerate() {
                for nth in 0..packed.experts.len() {
                    assert!(file.offset(layer, nth) + packed.expert_bytes() <= bytes.len() as u64);
                }
            }
        }
    }
}
