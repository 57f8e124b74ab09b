#![no_main]

use libfuzzer_sys::fuzz_target;
use tier_plan_fuzz::library::prompt;

fuzz_target!(|bytes: &[u8]| prompt::check(bytes));
