#![no_main]

use libfuzzer_sys::fuzz_target;
use tier_plan_fuzz::library::shape;

fuzz_target!(|bytes: &[u8]| shape::check(bytes));
