//! Templates that fuzzing found, through what the fuzz target checks.

#[path = "../runtime/fuzz/src/template/mod.rs"]
mod template;

#[test]
fn templates_of_the_fuzz_target_are_rendered_or_refused() {
    tier_plan_testing::replay("template", template::check);
}
