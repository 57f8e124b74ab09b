#![no_main]

use libfuzzer_sys::fuzz_target;
use tier_plan_fuzz::library::profile;

fuzz_target!(|bytes: &[u8]| profile::check(bytes));
