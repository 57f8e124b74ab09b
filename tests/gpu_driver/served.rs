//! A server whose plan has experts on a GPU, and another plan while it answers.

use super::case::{Case, linked};
use crate::common::{demo_model, tier_plan};
use crate::serve::client::Served;
use crate::serve::plan::{settled, texts};
use serde_json::json;
use tier_plan_testing::is_nightly;

#[test]
fn experts_on_a_gpu_follow_what_texts_choose() {
    // The stand-in takes half a minute for as many tokens as a plan needs.
    if !is_nightly() {
        return;
    }
    // Little memory, so that experts are on the drive, too, and nothing that hides what they take.
    let machine = linked("3MiB", true).replace("64MiB", "8MiB");
    let machine = machine.replace("latency_us = 900", "latency_us = 9");
    let machine = machine.replace("prompt_gflops = 0.01", "prompt_gflops = 10");
    let off_gpu = ["--fix", "dram:attention"];
    let case = Case::on(demo_model(), &machine, "512", &off_gpu);
    let mut command = tier_plan();
    case.place.set_up(&mut command);
    let model = demo_model();
    let args = ["--plan", "plan.toml", "--profile-out", "use.profile"];
    let mut server = Served::by(command, &[&[model.to_str().unwrap()][..], &args].concat());
    let expected = texts(&server);
    assert_eq!(server.post("/plan", &json!({"apply": true})).status, 202);
    let found = settled(&server);
    assert_eq!(found["status"], "moved", "{found}");
    let (proposal, moved) = (&found["proposal"], &found["move"]);
    assert!(proposal["gain"].as_f64().unwrap() > 0.05, "{found}");
    assert!(moved["total_bytes"].as_u64().unwrap() > 0, "{found}");
    assert_eq!(moved["done_bytes"], moved["total_bytes"], "{found}");
    // Sums of other experts are rounded otherwise, which seldom makes another token.
    let again = texts(&server);
    let same = again.iter().zip(&expected).filter(|(a, b)| a == b).count();
    assert!(2 * same > expected.len(), "{again:?} {expected:?}");
    let log = server.stop();
    assert!(
        log.contains("pins and slots are where the new plan"),
        "{log}"
    );
    let report = case.place.report().unwrap();
    assert!(
        report.misuse.is_empty() && report.leaks.is_empty(),
        "{report:#?}"
    );
}
