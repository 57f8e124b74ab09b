//! Any bytes as a model shape: decoded with sizes that add up, or refused with a message.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::path::Path;
use tier_plan_formats::shape::{self, Mix};

fuzz_target!(|bytes: &[u8]| {
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
});
