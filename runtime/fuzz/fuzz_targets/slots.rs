#![no_main]

use libfuzzer_sys::fuzz_target;
use tier_plan_fuzz::library::slots;

fuzz_target!(|bytes: &[u8]| slots::check(bytes));
