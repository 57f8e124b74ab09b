#![no_main]

use libfuzzer_sys::fuzz_target;
use tier_plan_fuzz::library::sums;

fuzz_target!(|bytes: &[u8]| sums::check(bytes));
