#![no_main]

use libfuzzer_sys::fuzz_target;
use tier_plan_fuzz::library::kept;

fuzz_target!(|bytes: &[u8]| kept::check(bytes));
