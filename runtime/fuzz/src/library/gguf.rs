//! Any bytes as a GGUF file: refused with a message, or a header whose tensors all lie inside the
//! bytes.

use std::path::Path;
use tier_plan_runtime::gguf::Header;

/// Checks one input.
pub fn check(bytes: &[u8]) {
    match Header::decode(bytes, Path::new("fuzz.gguf")) {
        Ok(header) => {
            for (_, value) in &header.metadata {
                let _ = (
                    value.describe(),
                    value.as_f32(),
                    value.as_array().map(|a| (a.integers::<u32>(), a.floats())),
                );
            }
            for tensor in &header.tensors {
                let range = tensor.offset as usize..(tensor.offset + tensor.n_bytes) as usize;
                assert!(bytes.get(range).is_some());
                assert_eq!(
                    tensor
                        .ty
                        .row_bytes(tensor.cols())
                        .map(|row| row * tensor.rows()),
                    Some(tensor.n_bytes)
                );
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
