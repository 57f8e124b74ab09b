//! Reports as files: complete, well-formed, never overwriting, and legible.

use super::view::Overview;
use super::*;
use std::collections::HashSet;
use std::fs;
use tier_plan_runtime::formats::placement::{PerTier, Pins, TierIdx};
use tier_plan_runtime::formats::record::{LayerRecord, TierRecord};

/// Opening and closing tags match, attributes are quoted, and no bare `&` or `<` is left: enough of
/// XML to be sure.
pub(super) fn check_markup(text: &str, voids: &[&str]) -> Result<(), String> {
    let mut stack: Vec<String> = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find('<') {
        check_entities(&rest[..at])?;
        rest = &rest[at..];
        if rest.starts_with("<!DOCTYPE") {
            rest = &rest[rest.find('>').ok_or("open doctype")? + 1..];
            continue;
        }
        let end = rest
            .find('>')
            .ok_or_else(|| format!("unclosed tag at {:.60}", rest))?;
        let tag = &rest[1..end];
        rest = &rest[end + 1..];
        if tag.contains('<') || !tag.matches('"').count().is_multiple_of(2) {
            return Err(format!("bad tag <{tag}>"));
        }
        check_entities(tag)?;
        let name: String = tag
            .trim_start_matches('/')
            .chars()
            .take_while(|c| c.is_ascii_alphanumeric())
            .collect();
        if name.is_empty() {
            return Err(format!("no tag name in <{tag}>"));
        }
        if tag.starts_with('/') {
            let open = stack
                .pop()
                .ok_or_else(|| format!("</{name}> closes nothing"))?;
            if open != name {
                return Err(format!("</{name}> closes <{open}>"));
            }
        } else if !tag.ends_with('/') && !voids.contains(&name.as_str()) {
            if name == "style" || name == "script" {
                let close = format!("</{name}>");
                rest = &rest[rest.find(&close).ok_or("open style or script")?..];
            }
            stack.push(name);
        }
    }
    check_entities(rest)?;
    if stack.is_empty() {
        Ok(())
    } else {
        Err(format!("left open: {stack:?}"))
    }
}

fn check_entities(text: &str) -> Result<(), String> {
    if let Some(c) = text.chars().find(|c| c.is_control() && !c.is_whitespace()) {
        return Err(format!("control character {c:?}"));
    }
    for (at, _) in text.match_indices('&') {
        let entity = &text[at..];
        let ok = ["&amp;", "&lt;", "&gt;", "&quot;", "&apos;", "&#39;"]
            .iter()
            .any(|e| entity.starts_with(e));
        if !ok {
            return Err(format!("bare & at {entity:.20}"));
        }
    }
    Ok(())
}

fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, b| {
        (0..8).fold(crc ^ u32::from(*b), |c, _| {
            if c & 1 == 1 {
                (c >> 1) ^ 0xEDB8_8320
            } else {
                c >> 1
            }
        })
    })
}

/// Walks a PNG's chunks, checks each sum, and returns width and height.
fn png_size(bytes: &[u8]) -> (u32, u32) {
    assert_eq!(&bytes[..8], b"\x89PNG\r\n\x1a\n");
    let be = |at: usize| u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"));
    let (mut at, mut kinds) = (8, Vec::new());
    while at < bytes.len() {
        let length = be(at) as usize;
        assert_eq!(
            crc(&bytes[at + 4..at + 8 + length]),
            be(at + 8 + length),
            "chunk at {at}"
        );
        kinds.push(bytes[at + 4..at + 8].to_vec());
        at += 12 + length;
    }
    assert_eq!(kinds.first().map(Vec::as_slice), Some(&b"IHDR"[..]));
    assert_eq!(kinds.last().map(Vec::as_slice), Some(&b"IEND"[..]));
    assert!(kinds.iter().any(|k| k == b"IDAT"));
    (be(16), be(20))
}

pub(super) fn files(dir: &Path) -> HashSet<String> {
    let names = fs::read_dir(dir)
        .expect("report folder")
        .map(|e| e.expect("entry").file_name());
    names.map(|n| n.to_string_lossy().into_owned()).collect()
}

pub(super) const VOIDS: [&str; 2] = ["meta", "br"];

fn check_folder(index: &Path, report: &Report) -> HashSet<String> {
    let dir = index.parent().expect("index.html lies in a folder");
    let html = fs::read_to_string(index).expect("index.html");
    check_markup(&html, &VOIDS).unwrap_or_else(|e| panic!("index.html: {e}"));
    let names = files(dir);
    let overview = Overview::new(report);
    for chart in chart::all(&overview) {
        let faults = scene::faults(&chart.scene);
        assert!(faults.is_empty(), "{}: {faults:#?}", chart.file);
        let svg = fs::read_to_string(dir.join(format!("{}.svg", chart.file))).expect("svg");
        check_markup(&svg, &[]).unwrap_or_else(|e| panic!("{}.svg: {e}", chart.file));
        assert!(svg.starts_with("<svg ") && svg.contains("prefers-color-scheme: dark"));
        assert!(html.contains(&format!("id=\"{}\"", chart.file)));
        let png = fs::read(dir.join(format!("{}.png", chart.file))).expect("png");
        let expected = (
            (chart.scene.width * 2.0).ceil() as u32,
            (chart.scene.height * 2.0).ceil() as u32,
        );
        assert_eq!(png_size(&png), expected, "{}.png", chart.file);
        let csv = fs::read_to_string(dir.join(format!("{}.csv", chart.file))).expect("csv");
        assert_eq!(csv, chart.data.to_csv());
        assert!(
            chart
                .data
                .rows
                .iter()
                .all(|r| r.len() == chart.data.head.len()),
            "{}.csv",
            chart.file
        );
    }
    names
}

#[test]
fn a_report_is_a_folder_of_whole_files() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let report = sample::report(6, 32, 4, 3, 5, true);
    let index = write(&dir.path().join("new/one"), &report).expect("report");
    assert_eq!(index, dir.path().join("new/one/index.html"));
    let names = check_folder(&index, &report);
    let mut expected: HashSet<String> = ["index.html", "summary.json", "records"]
        .map(String::from)
        .into();
    for stem in ["speed", "bytes", "experts", "parts", "layers", "hits"] {
        expected.extend(["svg", "png", "csv"].map(|end| format!("{stem}.{end}")));
    }
    assert_eq!(names, expected);
    assert_eq!(
        files(&dir.path().join("new")),
        HashSet::from(["one".to_string()]),
        "nothing else is left behind"
    );

    let folder = index.parent().expect("folder");
    let lines = |name: &str| {
        fs::read_to_string(folder.join(name))
            .expect(name)
            .lines()
            .count()
            - 1
    };
    assert_eq!(lines("speed.csv"), 5);
    assert_eq!(lines("bytes.csv"), 5 * 3);
    assert_eq!(lines("experts.csv"), 2 * 6 * 32);
    assert_eq!(lines("layers.csv"), 5 * 6);
    assert_eq!(lines("hits.csv"), 6 * 17);
}

#[test]
fn the_numbers_are_those_of_the_records() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let report = sample::report(6, 32, 4, 3, 4, false);
    let index = write(&dir.path().join("r"), &report).expect("report");
    let folder = index.parent().expect("folder");
    let summary: serde_json::Value =
        serde_json::from_slice(&fs::read(folder.join("summary.json")).expect("summary"))
            .expect("JSON");
    let plans = summary["plans"].as_array().expect("plans");
    assert_eq!(plans.len(), 4);
    let ilp = &plans[0];
    assert_eq!(ilp["plan"], "ilp");
    assert_eq!(ilp["status"], "optimal");
    assert_eq!(ilp["gap"], 0.0004);
    let entry = &report.plans[0];
    let tokens: u64 = entry.records.iter().map(|r| r.decode_tokens).sum();
    let seconds: f64 = entry.records.iter().map(|r| r.decode_s).sum();
    let measured = tokens as f64 / seconds;
    assert!((ilp["decode_tok_s"].as_f64().expect("rate") - measured).abs() < 1e-9);
    let predicted = entry.records[0]
        .predicted
        .as_ref()
        .expect("prediction")
        .decode_tok_s;
    assert_eq!(ilp["predicted_decode_tok_s"].as_f64(), Some(predicted));
    let error = ilp["prediction_error"].as_f64().expect("error");
    assert!((error - (measured / predicted - 1.0)).abs() < 1e-12);
    let tiers = &entry.placement.as_ref().expect("plan").tiers;
    assert_eq!(
        ilp["tiers"][1]["budget_bytes"],
        tiers[TierIdx::new(1)].budget_bytes
    );
    assert_eq!(
        ilp["tiers"][1]["pinned_bytes"],
        tiers[TierIdx::new(1)].bytes.pinned
    );
    assert_eq!(
        ilp["tiers"][1]["used_bytes"],
        tiers[TierIdx::new(1)].used_bytes()
    );
    let speed = fs::read_to_string(folder.join("speed.csv")).expect("speed.csv");
    let row: Vec<&str> = speed.lines().nth(1).expect("a row").split(',').collect();
    assert_eq!(row[0], "ilp");
    assert!((row[2].parse::<f64>().expect("number") - measured).abs() < 1e-9);
    // Every expert's share in the CSV, summed, is the experts a token uses, in every layer and for
    // both plans.
    let experts = fs::read_to_string(folder.join("experts.csv")).expect("experts.csv");
    let total: f64 = experts
        .lines()
        .skip(1)
        .map(|l| {
            l.split(',')
                .nth(3)
                .expect("share")
                .parse::<f64>()
                .expect("f64")
        })
        .sum();
    assert!((total - 2.0 * 6.0 * 4.0).abs() < 1e-6, "{total}");
}

#[test]
fn nothing_is_overwritten() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let report = sample::report(2, 8, 2, 2, 1, false);
    let target = dir.path().join("day");
    fs::create_dir(&target).expect("folder");
    fs::write(target.join("mine.txt"), "keep").expect("file");
    fs::write(dir.path().join("day-2"), "a file in the way").expect("file");
    let index = write(&target, &report).expect("report");
    assert_eq!(index, dir.path().join("day-3/index.html"));
    assert_eq!(
        write(&target, &report).expect("report"),
        dir.path().join("day-4/index.html")
    );
    assert_eq!(files(&target), HashSet::from(["mine.txt".to_string()]));
    assert_eq!(
        fs::read_to_string(dir.path().join("day-2")).expect("file"),
        "a file in the way"
    );
    assert!(write(Path::new("/"), &report).is_err());
    let error = write(&dir.path().join("day-2/inside"), &report).expect_err("a file is no folder");
    assert!(format!("{error:#}").contains("day-2"), "{error:#}");
}

#[test]
fn names_cannot_break_the_page() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let mut report = sample::report(2, 8, 2, 3, 3, true);
    let evil = "</style><script>alert(\"1\")</script>&'\u{0}\u{1b}";
    report.title = evil.into();
    report.host = evil.into();
    report.notes.push(evil.into());
    for plan in &mut report.plans {
        plan.name = format!("{evil}{}", plan.name);
        for record in &mut plan.records {
            record.isa = evil.into();
            record.host = evil.into();
            record.plan_status = evil.into();
            record.model.as_mut().expect("model").name = evil.into();
        }
        for tier in &mut plan.placement.as_mut().expect("plan").tiers {
            tier.tier.name = format!("{}{evil}", tier.tier.name);
            tier.tier.source = evil.into();
        }
    }
    report.curves.iter_mut().for_each(|c| c.label = evil.into());
    report.profile.as_mut().expect("profile").made = evil.into();
    let index = write(&dir.path().join("r"), &report).expect("report");
    check_folder(&index, &report);
    let html = fs::read_to_string(&index).expect("page");
    assert_eq!(html.matches("<script").count(), 1, "only the page's own");
    let json = fs::read(index.with_file_name("summary.json")).expect("summary");
    let summary: serde_json::Value = serde_json::from_slice(&json).expect("JSON");
    assert_eq!(summary["title"], evil);
}

#[test]
fn thin_reports_are_still_reports() {
    let dir = tempfile::tempdir().expect("temporary folder");
    let full = sample::report(6, 32, 4, 3, 1, false);
    let bare = |edit: &dyn Fn(&mut Report)| {
        let mut report = full.clone();
        edit(&mut report);
        report
    };
    let nan = |r: &mut Report| {
        for record in &mut r.plans[0].records {
            record.decode_s = f64::NAN;
            record.predicted.as_mut().expect("prediction").decode_tok_s = f64::INFINITY;
            record.layers.iter_mut().for_each(|l| l.expert_s = f64::NAN);
            record
                .tiers
                .iter_mut()
                .for_each(|t| t.busy_s = f64::INFINITY);
        }
        r.curves[0].hit_rate[3] = f64::NAN;
        r.curves[1].slots.clear();
        r.curves[2].hit_rate.pop();
    };
    let huge = |r: &mut Report| {
        for tier in &mut r.plans[0].placement.as_mut().expect("plan").tiers {
            tier.budget_bytes = u64::MAX;
            tier.bytes.dense = u64::MAX / 2;
        }
        let layer = &mut r.plans[0].placement.as_mut().expect("plan").layers[0];
        layer.slot_tier = TierIdx::new(99);
        layer.pinned = vec![Pins {
            tier: TierIdx::new(77),
            experts: vec![1, 2],
        }];
        layer.slots = u32::MAX;
    };
    let odd_profile = |r: &mut Report| {
        let profile = r.profile.as_mut().expect("profile");
        profile.prompts[0].experts.truncate(7);
        profile.prompts[1].experts.fill(u16::MAX);
        profile.layers = vec![900, 901, 902, 903, 904, 905];
    };
    let cases: Vec<(&str, Report)> = vec![
        ("nothing", Report::default()),
        ("one plan", full.clone()),
        ("no profile", bare(&|r| r.profile = None)),
        ("no plan file", bare(&|r| r.plans[0].placement = None)),
        ("only predicted", bare(&|r| r.plans[0].records.clear())),
        (
            "no prediction",
            bare(&|r| {
                r.plans[0].placement = None;
                r.plans[0]
                    .records
                    .iter_mut()
                    .for_each(|x| x.predicted = None);
            }),
        ),
        (
            "zero tokens",
            bare(&|r| {
                r.plans[0].records.iter_mut().for_each(|x| {
                    x.decode_tokens = 0;
                    x.decode_s = 0.0;
                })
            }),
        ),
        (
            "nothing at all of one plan",
            bare(&|r| {
                r.plans[0] = PlanEntry {
                    name: String::new(),
                    ..PlanEntry::default()
                }
            }),
        ),
        (
            "empty records",
            bare(&|r| r.plans[0].records = vec![RunRecord::default()]),
        ),
        ("not a number", bare(&nan)),
        ("huge", bare(&huge)),
        ("odd profile", bare(&odd_profile)),
        (
            "empty profile",
            bare(&|r| {
                let profile = r.profile.as_mut().expect("profile");
                profile.layers.clear();
                profile.n_expert = 0;
                profile.prompts.clear();
            }),
        ),
        (
            "no tiers",
            bare(&|r| r.plans[0].placement.as_mut().expect("plan").tiers = PerTier::default()),
        ),
    ];
    for (name, report) in cases {
        let index = write(&dir.path().join(name.replace(' ', "-")), &report)
            .unwrap_or_else(|e| panic!("{name}: {e:#}"));
        check_folder(&index, &report);
        let html = fs::read_to_string(&index).expect("page");
        assert!(!html.contains("NaN") && !html.contains("inf "), "{name}");
    }
}

#[test]
fn charts_stay_legible_at_every_size() {
    for (layers, experts, used) in [
        (6, 32, 4),
        (1, 8, 2),
        (48, 128, 8),
        (61, 384, 8),
        (94, 2500, 10),
    ] {
        for tiers in 2..=4 {
            for plans in [1, 4, 8] {
                if layers > 48 && plans != 8 {
                    continue;
                }
                let report = sample::report(layers, experts, used, tiers, plans, tiers == 3);
                for chart in chart::all(&Overview::new(&report)) {
                    let faults = scene::faults(&chart.scene);
                    let case = format!(
                        "{} at {layers}×{experts}, {tiers} tiers, {plans} plans",
                        chart.file
                    );
                    assert!(faults.is_empty(), "{case}: {faults:#?}");
                    assert!(
                        chart.scene.height < 2600.0,
                        "{case}: {} high",
                        chart.scene.height
                    );
                }
            }
        }
    }
}

#[test]
fn emulated_numbers_say_so() {
    let emulated = sample::report(6, 32, 4, 3, 3, true);
    let overview = Overview::new(&emulated);
    assert!(overview.headline()[0].contains("measured on emulated tiers"));
    for chart in chart::all(&overview) {
        let words = chart
            .scene
            .items
            .iter()
            .any(|i| matches!(i, scene::Item::Text(t) if t.text.contains("emulated")));
        assert!(
            words || ["experts", "hits"].contains(&chart.file),
            "{}",
            chart.file
        );
    }
    let mut mixed = sample::report(6, 32, 4, 2, 3, false);
    mixed.plans[1] = sample::report(6, 32, 4, 2, 3, true).plans.remove(1);
    let overview = Overview::new(&mixed);
    assert_eq!(overview.label(&overview.plans[1]), "frequency-first†");
    assert_eq!(overview.label(&overview.plans[0]), "ilp");
    assert!(!overview.headline()[0].contains("emulated"));
    let real = sample::report(6, 32, 4, 2, 3, false);
    for chart in chart::all(&Overview::new(&real)) {
        let words = chart
            .scene
            .items
            .iter()
            .any(|i| matches!(i, scene::Item::Text(t) if t.text.contains("emulated")));
        assert!(!words, "{}", chart.file);
    }
}

#[test]
fn the_headline_tells_the_truth() {
    let mut report = sample::report(6, 32, 4, 3, 5, false);
    let said = |report: &Report| Overview::new(report).headline().join(" ");
    let words = said(&report);
    assert!(words.starts_with("ilp is the fastest plan"), "{words}");
    assert!(
        words.contains("frequency-first, the best baseline under the same budgets"),
        "{words}"
    );
    report.plans[1].placement.as_mut().expect("plan").tiers[TierIdx::FIRST].budget_bytes += 1;
    assert!(
        said(&report).contains("part of the difference may be bytes"),
        "{}",
        said(&report)
    );
    report.plans[1].placement = None;
    assert!(
        said(&report).contains("their budgets are not known, but they put"),
        "{}",
        said(&report)
    );
    // A baseline that wins is called one.
    for record in &mut report.plans[3].records {
        record.decode_s /= 100.0;
    }
    let words = said(&report);
    assert!(
        words.starts_with("lru-only is the fastest plan")
            && words.contains("The winner is a baseline"),
        "{words}"
    );
    // What is only predicted is never ahead of what is measured.
    report.plans[3].records.clear();
    report.plans[3]
        .placement
        .as_mut()
        .expect("plan")
        .predicted
        .decode_tok_s = 1e6;
    assert!(
        said(&report).starts_with("ilp is the fastest plan"),
        "{}",
        said(&report)
    );
}

#[test]
fn records_alone_make_a_report() {
    let full = sample::report(6, 32, 4, 3, 3, false);
    let records: Vec<RunRecord> = full.plans.iter().flat_map(|p| p.records.clone()).collect();
    let report = from_records(records.clone());
    assert_eq!(
        report
            .plans
            .iter()
            .map(|p| p.name.as_str())
            .collect::<Vec<_>>(),
        ["ilp", "frequency-first", "uniform"]
    );
    assert!(report.plans.iter().all(|p| p.records.len() == 3));
    assert_eq!(report.title, "Plans for sample-moe");
    assert!(report.notes.is_empty(), "{:?}", report.notes);
    let overview = Overview::new(&report);
    let stems: Vec<&str> = chart::all(&overview).iter().map(|c| c.file).collect();
    assert_eq!(stems, ["speed", "bytes", "parts", "layers"]);
    assert_eq!(
        overview.plans[0].tiers[0].used_bytes(),
        records[0].tiers[0].planned_bytes
    );
    assert_eq!(overview.same_output(), Some(true));
    assert_eq!(headline(&report), overview.headline());
    let mut mixed = records;
    mixed[0].host = "another".into();
    mixed[4].output = vec![9];
    mixed[0].model.as_mut().expect("model").hash = "f".repeat(32);
    let report = from_records(mixed);
    assert_eq!(report.title, "2 models on 2 machines");
    assert!(report.notes.is_empty(), "{:?}", report.notes);
    assert_eq!(Overview::new(&report).same_output(), Some(false));
    assert!(
        summary_json(&report)
            .expect("JSON")
            .contains("\"same_output\": false")
    );
    assert!(from_records(Vec::new()).plans.is_empty());
}

#[test]
fn runs_are_averaged_by_their_tokens() {
    let run = |tokens: u64, seconds: f64, expert_s: f64| RunRecord {
        plan: "p".into(),
        decode_tokens: tokens,
        decode_s: seconds,
        tiers: vec![TierRecord {
            name: "dram".into(),
            read_bytes: 100 * tokens,
            busy_s: 1.0,
            ..TierRecord::default()
        }],
        layers: vec![LayerRecord {
            layer: 3,
            expert_s,
            misses: 1,
            slot_hits: 2,
            streamed: 1,
            ..LayerRecord::default()
        }],
        ..RunRecord::default()
    };
    let report = from_records(vec![run(10, 1.0, 0.1), run(30, 2.0, 0.2)]);
    let overview = Overview::new(&report);
    let plan = &overview.plans[0];
    let rate = plan.decode.expect("a rate");
    assert!((rate.tok_s - 40.0 / 3.0).abs() < 1e-12);
    assert_eq!((rate.min, rate.max, rate.runs), (10.0, 15.0, 2));
    assert!((plan.layers[0].expert_s - 0.175).abs() < 1e-12);
    assert_eq!((plan.layers[0].misses, plan.layers[0].slot_hits), (2, 4));
    assert_eq!(plan.layers[0].streamed, 2);
    let charts = chart::all(&overview);
    let layers = charts.iter().find(|chart| chart.file == "layers");
    let csv = layers.expect("a chart of layers").data.to_csv();
    assert!(
        csv.lines()
            .all(|line| line.ends_with(",streamed") || line.ends_with(",2")),
        "{csv}"
    );
    assert_eq!(plan.tiers[0].read_bytes, Some(100.0));
    assert_eq!(plan.tiers[0].busy_s, Some(0.05));
    assert!((plan.hit_rate.expect("hits") - 4.0 / 6.0).abs() < 1e-12);
}

/// Reports of several sizes draw every chart; `REPORT_PICTURES=/tmp/x` keeps them to be looked at.
#[test]
fn every_size_draws_every_chart() {
    let temporary = tempfile::tempdir().expect("folder");
    let dir =
        std::env::var_os("REPORT_PICTURES").map_or(temporary.path().to_path_buf(), PathBuf::from);
    let records = sample::report(6, 32, 4, 2, 4, true)
        .plans
        .iter()
        .flat_map(|p| p.records.clone())
        .collect();
    let reports = [
        ("small", sample::report(6, 32, 4, 3, 5, true), 6),
        ("large", sample::report(61, 384, 8, 4, 8, false), 6),
        ("two", sample::report(48, 128, 8, 2, 4, false), 6),
        ("records", from_records(records), 4),
        ("several", super::shared_tests::several(), 12),
    ];
    for (name, report, charts) in reports {
        let page = write(&dir.join(name), &report).expect("report");
        let files = std::fs::read_dir(page.parent().expect("parent")).expect("listing");
        let pngs = files
            .filter(|f| {
                f.as_ref()
                    .is_ok_and(|f| f.path().extension().is_some_and(|e| e == "png"))
            })
            .count();
        assert!(pngs >= charts, "{name}: {pngs} charts");
    }
}
