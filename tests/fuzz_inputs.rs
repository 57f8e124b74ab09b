//! Templates, lines of batches, and bodies of requests that fuzzing found, through what the fuzz targets check.

#[path = "../runtime/fuzz/src/batch/mod.rs"]
mod batch;
#[path = "../runtime/fuzz/src/serve/mod.rs"]
mod serve;
#[path = "../runtime/fuzz/src/template/mod.rs"]
mod template;

#[test]
fn templates_of_the_fuzz_target_are_rendered_or_refused() {
    tier_plan_testing::replay("template", template::check);
}

#[test]
fn lines_of_the_fuzz_target_are_requests_or_refused() {
    tier_plan_testing::replay("batch", batch::check);
}

#[test]
fn bodies_of_the_fuzz_target_are_requests_or_refused() {
    tier_plan_testing::replay("serve", serve::check);
}
