#![no_main]

use libfuzzer_sys::fuzz_target;
use tier_plan_fuzz::library::placement;

fuzz_target!(|bytes: &[u8]| placement::check(bytes));
