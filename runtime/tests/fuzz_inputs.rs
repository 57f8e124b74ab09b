//! Inputs that fuzzing found, through what the fuzz targets check.

#[path = "../fuzz/src/library/mod.rs"]
mod library;

#[test]
fn inputs_of_the_fuzz_targets_are_refused_or_right() {
    for (target, check) in library::TARGETS {
        tier_plan_testing::replay(target, check);
    }
}
