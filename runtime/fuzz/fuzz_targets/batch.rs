#![no_main]

use libfuzzer_sys::fuzz_target;
use tier_plan_fuzz::batch;

fuzz_target!(|bytes: &[u8]| batch::check(bytes));
