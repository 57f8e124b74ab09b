#![no_main]

use libfuzzer_sys::fuzz_target;
use tier_plan_fuzz::library::record;

fuzz_target!(|bytes: &[u8]| record::check(bytes));
