#![no_main]

use libfuzzer_sys::fuzz_target;
use tier_plan_fuzz::library::pack;

fuzz_target!(|bytes: &[u8]| pack::check(bytes));
