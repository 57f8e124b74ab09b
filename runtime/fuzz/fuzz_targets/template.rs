#![no_main]

use libfuzzer_sys::fuzz_target;
use tier_plan_fuzz::template;

fuzz_target!(|bytes: &[u8]| template::check(bytes));
