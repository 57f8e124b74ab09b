#![no_main]

use libfuzzer_sys::fuzz_target;
use tier_plan_fuzz::serve;

fuzz_target!(|bytes: &[u8]| serve::check(bytes));
