#![no_main]

use libfuzzer_sys::fuzz_target;
use tier_plan_fuzz::library::gguf;

fuzz_target!(|bytes: &[u8]| gguf::check(bytes));
