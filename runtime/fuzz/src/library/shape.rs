//! Any bytes as a model shape: decoded with sizes that add up, or refused with a message.

use std::path::Path;
use tier_plan_runtime::formats::shape::{self, Mix};

/// Checks one input.
pub fn check(bytes: &[u8]) {
    match shape::decode(bytes, Path::new("fuzz.shape")) {
        Ok(of) => {
            let parameters = of.parameters();
            assert!(parameters.active <= parameters.total);
            for mix in Mix::ALL {
                assert!(of.model_shape(mix).token_bytes() <= of.model_shape(mix).weight_bytes());
            }
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}
