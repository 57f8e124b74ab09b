#![no_main]

use libfuzzer_sys::fuzz_target;
use tier_plan_fuzz::library::model;

fuzz_target!(|bytes: &[u8]| model::check(bytes));
