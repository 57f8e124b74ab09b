#![no_main]

use libfuzzer_sys::fuzz_target;
use tier_plan_fuzz::library::machine;

fuzz_target!(|bytes: &[u8]| machine::check(bytes));
