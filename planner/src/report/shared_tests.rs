//! Reports of several models and machines, and the one page that is sent to others.

use super::tests::{VOIDS, check_markup, files};
use super::view::Overview;
use super::*;
use std::fs;
use tier_plan_runtime::units::show_bytes;

/// Records of two models, one of which ran on two machines.
pub(super) fn several() -> Report {
    let mut records: Vec<RunRecord> = Vec::new();
    for (host, factor, tiers) in [
        ("A small processor, 2 cores", 1.0, 2),
        ("A large one", 3.0, 3),
    ] {
        for plan in sample::report(6, 32, 4, tiers, 3, tiers == 2).plans {
            records.extend(plan.records.into_iter().map(|record| RunRecord {
                host: host.into(),
                decode_s: record.decode_s / factor,
                ..record
            }));
        }
    }
    let mut other = records[0].clone();
    let model = other.model.as_mut().expect("model");
    (model.name, model.hash) = ("another".into(), "9".repeat(32));
    records.push(other);
    from_records(records)
}

#[test]
fn several_models_and_machines_have_a_section_each() {
    let dir = tempfile::tempdir().expect("folder");
    let report = several();
    assert_eq!(report.title, "2 models on 2 machines");
    let index = write(&dir.path().join("r"), &report).expect("report");
    let html = fs::read_to_string(&index).expect("page");
    check_markup(&html, &VOIDS).unwrap_or_else(|e| panic!("{e}"));
    for heading in [
        "<h2 id=\"g1\">sample-moe on A small processor, 2 cores",
        "<h2 id=\"g2\">sample-moe on A large one",
        "<h2 id=\"g3\">another on A small processor, 2 cores",
    ] {
        assert!(html.contains(heading), "{heading}");
    }
    let names = files(index.parent().expect("folder"));
    for file in ["1-speed.svg", "2-speed.png", "3-speed.csv", "2-layers.svg"] {
        assert!(names.contains(file), "{file}: {names:?}");
        assert!(html.contains(file), "{file}");
    }
    let summary: serde_json::Value =
        serde_json::from_str(&summary_json(&report).expect("summary")).expect("JSON");
    let plans = summary["plans"].as_array().expect("plans");
    assert_eq!(plans.len(), 7);
    assert_eq!(plans[3]["host"], "A large one");
    // Speeds of the two machines are not averaged.
    let speed = |at: usize| plans[at]["decode_tok_s"].as_f64().expect("speed");
    assert!(speed(3) > 2.0 * speed(0), "{} {}", speed(3), speed(0));
    assert!(plans[0]["limited_by"].is_string(), "{:#}", plans[0]);
}

/// Files and addresses that a page would load or name: none but its own anchors.
fn outside(html: &str) -> Vec<&str> {
    let parts = ["src=\"", "href=\"", "url(", "@import"].map(|word| {
        let parts = html.split(word).skip(1);
        parts
            .filter(|part| !part.starts_with('#'))
            .map(|part| &part[..part.len().min(40)])
    });
    parts.into_iter().flatten().collect()
}

#[test]
fn a_shared_page_stands_alone() {
    let mut report = several();
    report.add_own_runs();
    let old = PastRun {
        plan: "of last week".into(),
        is_new: false,
        ..report.history[0].clone()
    };
    report.history.push(old);
    let html = shared_page(&report).expect("page");
    check_markup(&html, &VOIDS).unwrap_or_else(|e| panic!("{e}"));
    assert_eq!(outside(&html), Vec::<&str>::new());
    assert!(html.contains("http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'"));
    assert!(html.contains("<svg ") && html.contains("id=\"history\""));
    assert!(!html.contains("summary.json") && !html.contains("left out"));
    assert!(html.len() < html::MAX_SHARED_BYTES, "{}", html.len());
    assert_eq!(html.matches("<table class=\"sortable\">").count(), 4);
    // The list of schemes that SVG's namespace aside could reach the network.
    let without = html.replace("http://www.w3.org/2000/svg", "");
    assert!(!without.contains("http://") && !without.contains("https://"));
}

#[test]
fn a_shared_page_has_a_limit() {
    let one = sample::report(61, 384, 8, 4, 8, false);
    let mut report = Report::default();
    for i in 0..400 {
        for plan in &one.plans {
            let mut record = plan.records[0].clone();
            record.host = format!("machine {i} {}", "<&\"'>".repeat(200));
            record.layers.truncate(2);
            report.plans.push(PlanEntry {
                name: "&".repeat(300),
                placement: None,
                records: vec![record],
            });
        }
    }
    let html = shared_page(&report).expect("page");
    assert!(html.len() <= html::MAX_SHARED_BYTES, "{}", html.len());
    check_markup(&html, &VOIDS).unwrap_or_else(|e| panic!("{e}"));
    assert!(html.contains("are left out: this page has at most 4.00 MiB"));
}

/// Numbers are sorted as numbers: cells carry them, whatever their unit.
#[test]
fn cells_carry_their_numbers() {
    let report = sample::report(6, 32, 4, 3, 3, false);
    let html = shared_page(&report).expect("page");
    let overview = Overview::new(&report);
    for plan in &overview.plans {
        let bytes = plan.tiers[0].used_bytes();
        let cell = format!(" data-v=\"{bytes}\">{}<br>", show_bytes(bytes));
        assert!(html.contains(&cell), "{cell}");
        let ratio = plan.ratio().expect("ratio");
        assert!(html.contains(&format!("data-v=\"{ratio}\"")), "{ratio}");
    }
    assert!(html.contains("<th scope=\"col\" data-kind=\"number\">hit<br>rate</th>"));
}
