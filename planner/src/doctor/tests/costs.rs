//! What is predicted of a model, and what depends on a machine file.

use super::{expect, find, process, quiet};
use crate::budget::{self, Fit};
use crate::bundled;
use crate::doctor::files::{Probed, machine_check_on};
use crate::doctor::forecast::{DriveRate, cost, cost_between};
use crate::doctor::model::{Given, Opened};
use crate::doctor::*;
use crate::opening::Opening;
use std::path::{Path, PathBuf};
use tier_plan_runtime::formats::machine;
use tier_plan_runtime::tiers::limits::Limit;

fn demo() -> Opened {
    let path = bundled::path("demo/demo.gguf").unwrap();
    opened(&path, None)
}

fn opened(path: &Path, to_fetch: Option<&ToFetch>) -> Opened {
    Opened::open(&Given { path, to_fetch }, Some(256)).unwrap()
}

fn rates(is_present: bool) -> Rates {
    Rates {
        memory_gbps: 10.0,
        drive: Some(DriveRate {
            gbps: 1.0,
            latency_us: 100.0,
        }),
        layer_us: 5.0,
        token_us: 20.0,
        from: "a test".into(),
        is_present,
    }
}

fn limit_of(bytes: u64) -> Limit {
    Limit {
        bytes,
        source: "cgroup limit",
        is_hard: true,
    }
}

/// The smallest limit in MiB under which some experts of the demo model stay in the file.
fn short(opened: &Opened) -> Limit {
    let fits = |limit: &Limit| {
        let decided = budget::decide(opened.model(), &Opening::default(), Some(limit));
        decided.is_ok_and(|decision| decision.chosen.fit() == Fit::Budget)
    };
    (1..1024)
        .map(|mib| limit_of(mib << 20))
        .find(fits)
        .expect("a limit between too little and enough")
}

#[test]
fn costs_are_predicted_where_a_model_is_given() {
    let opened = demo();
    let enough = Forecast::new(&opened, rates(false), Some(limit_of(8 << 30))).unwrap();
    let change = Change {
        memory_factor: 2.0,
        ..Change::default()
    };
    let speeds = cost("words", Some(&enough), &change).speeds.unwrap();
    assert!(speeds.mended_tok_s > 1.2 * speeds.now_tok_s, "{speeds:?}");
    assert!(
        speeds.mended_tok_s < 2.0 * speeds.now_tok_s,
        "fixed times stay: {speeds:?}"
    );
    let half = Change {
        processor_factor: 0.5,
        ..Change::default()
    };
    let speeds = cost_between("words", Some(&enough), &half, &Change::default())
        .speeds
        .unwrap();
    assert!(
        (speeds.mended_tok_s / speeds.now_tok_s - 2.0).abs() < 1e-9,
        "{speeds:?}"
    );
    assert_eq!(cost("words", None, &change).speeds, None);

    let tight = Forecast::new(&opened, rates(false), Some(short(&opened))).unwrap();
    let now = tight.tok_s(&Change::default()).unwrap();
    let all = Change {
        limit_bytes: Some(8 << 30),
        ..Change::default()
    };
    assert!(
        tight.tok_s(&all).unwrap() > now,
        "experts in memory are faster"
    );
    let drive = Change {
        drive_factor: 2.0,
        ..Change::default()
    };
    assert!(tight.tok_s(&drive).unwrap() > now, "a faster drive is");
    let unknown = Rates {
        drive: None,
        ..rates(false)
    };
    let unknown = Forecast::new(&opened, unknown, Some(short(&opened))).unwrap();
    assert_eq!(unknown.tok_s(&Change::default()), None);
    let too_small = Forecast::new(&opened, rates(false), Some(limit_of(1 << 20))).unwrap();
    assert_eq!(too_small.tok_s(&Change::default()), None);
}

#[test]
fn a_load_costs_what_it_takes_from_the_rates() {
    let (made, opened) = (quiet(), demo());
    made.write("proc/loadavg", "12.0 3 3 1/2 3\n");
    let cost = |is_present| {
        let limit = Some(limit_of(8 << 30));
        let forecast = Forecast::new(&opened, rates(is_present), limit).unwrap();
        let checks = busy::checks(&made.system(), &process(), Some(&forecast));
        let cost = find(&checks, "busy.load").cost.clone().unwrap();
        (cost, forecast.tok_s(&Change::default()))
    };
    let (of_file, tok_s) = cost(false);
    let speeds = of_file.speeds.unwrap();
    assert_eq!(Some(speeds.mended_tok_s), tok_s);
    assert!(
        (speeds.mended_tok_s / speeds.now_tok_s - 2.0).abs() < 1e-9,
        "{speeds:?}"
    );
    // Rates that were measured now are those of a busy machine: nothing is known of an idle one.
    let (present, _) = cost(true);
    assert_eq!(present.speeds, None);
    assert!(present.words.contains("measured meanwhile"), "{present}");
}

#[test]
fn a_model_is_checked_against_the_limit() {
    let opened = demo();
    let path = bundled::path("demo/demo.gguf").unwrap();
    let tight = short(&opened);
    let check = |limit: Option<&Limit>| {
        let forecast = Forecast::new(&opened, rates(false), limit.cloned()).unwrap();
        let given = Given {
            path: &path,
            to_fetch: None,
        };
        let opened = Ok(demo());
        model::checks(&given, &opened, &process(), limit, Ok(&forecast))
    };
    let found = check(Some(&limit_of(8 << 30)));
    expect(&found, "model.file", Status::Ok, &["demo.gguf: "]);
    expect(&found, "model.types", Status::Ok, &[" % (", "kernels"]);
    expect(
        &found,
        "model.fit",
        Status::Ok,
        &["fit 8.00 GiB (cgroup limit)"],
    );
    expect(
        &found,
        "model.speed",
        Status::Ok,
        &["predicted ", "middle of 256 tokens, from a test"],
    );
    let found = check(Some(&tight));
    expect(
        &found,
        "model.fit",
        Status::Warning,
        &[
            "% of the experts have slots",
            "predicted ",
            "instead of",
            "tier-plan profile",
        ],
    );
    assert!(
        find(&found, "model.fit").facts["slot_share"]
            .as_f64()
            .unwrap()
            < 1.0
    );
    let found = check(Some(&limit_of(1 << 20)));
    expect(
        &found,
        "model.fit",
        Status::Failure,
        &["needs at least", "smaller quantization"],
    );
    let found = check(None);
    expect(&found, "model.fit", Status::Ok, &["reports no limit"]);
}

#[test]
fn a_model_that_is_to_be_fetched_is_checked_where_it_would_be() {
    let path = bundled::path("demo/demo.gguf").unwrap();
    let to_fetch = ToFetch {
        name: "hf:me/m:Q8_0".to_string(),
        folder: "/srv/hub".into(),
        total_bytes: 3 << 30,
        missing_bytes: 2 << 30,
    };
    let with_room = |free_bytes| vec![model::fetch(&to_fetch, free_bytes)];
    let words = [
        "2.00 GiB of 3.00 GiB to fetch to /srv/hub",
        "8.00 GiB are free",
    ];
    expect(&with_room(Some(8 << 30)), "model.fetch", Status::Ok, &words);
    expect(&with_room(None), "model.fetch", Status::Ok, &["unknown"]);
    expect(
        &with_room(Some(2 << 30)),
        "model.fetch",
        Status::Failure,
        &["HF_HUB_CACHE"],
    );
    // The size is that of the model, and commands name it, and not the file with its header.
    let model = opened(&path, Some(&to_fetch));
    let tight = short(&model);
    let forecast = Forecast::new(&model, rates(false), Some(tight.clone())).unwrap();
    let given = Given {
        path: &path,
        to_fetch: Some(&to_fetch),
    };
    let opened = Ok(opened(&path, Some(&to_fetch)));
    let checks = model::checks(&given, &opened, &process(), Some(&tight), Ok(&forecast));
    expect(
        &checks,
        "model.file",
        Status::Ok,
        &["demo.gguf: ", "3.00 GiB"],
    );
    let fit = find(&checks, "model.fit").mend.clone().unwrap();
    assert!(
        fit.contains("tier-plan profile hf:me/m:Q8_0 -o model.profile && tier-plan run hf:me/m:Q8_0 --profile"),
        "{fit}"
    );
}

#[test]
#[cfg(unix)]
fn a_folder_that_is_to_be_made_is_on_the_drive_above_it() {
    let folder = tempfile::tempdir().unwrap();
    let real = folder.path().canonicalize().unwrap();
    std::os::unix::fs::symlink(&real, real.join("link")).unwrap();
    let future = |path: &str| drive::future(&real.join(path));
    assert_eq!(future("link/a/b"), real.join("a/b"));
    assert_eq!(future("link"), real);
    let drive = Drive::of(&System::of_this_machine(), &real.join("a/b"));
    assert!(drive.free_bytes().is_some());
    // A trial file may be made, and does not stay.
    std::fs::remove_file(real.join("link")).unwrap();
    assert_eq!(drive::existing(&real.join("a/b")), real);
    let direct = drive::try_direct(None, drive::existing(&real.join("a/b")));
    assert!(!matches!(direct, drive::Direct::Untried(_)), "{direct:?}");
    assert_eq!(std::fs::read_dir(&real).unwrap().count(), 0);
}

#[test]
fn a_machine_file_of_another_machine_or_of_more_memory_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path: PathBuf = folder.path().join("machine.toml");
    let demo =
        std::fs::read_to_string(bundled::path("machines/demo-emulated.toml").unwrap()).unwrap();
    std::fs::write(&path, demo).unwrap();
    let mut read = machine::read(&path).unwrap();
    for tier in &mut read.tiers {
        tier.emulated = false;
    }
    let probed = |description: &str| Probed::Read {
        path: path.clone(),
        machine: Box::new(machine::Machine {
            description: description.into(),
            ..read.clone()
        }),
    };
    let check = |description: &str, limit| {
        vec![machine_check_on(
            &probed(description),
            Some(&limit_of(limit)),
            "CPU X, 2 threads",
        )]
    };
    let id = "probe.machine_file";
    let here = "measured on 2026-11-22: CPU X, 2 threads";
    expect(&check(here, 1 << 50), id, Status::Ok, &[here]);
    expect(
        &check(here, 1 << 10),
        id,
        Status::Warning,
        &["may hold 1.00 KiB", "tier-plan probe -o"],
    );
    let other = "measured on 2026-11-22: CPU Y, 2 threads";
    expect(
        &check(other, 1 << 50),
        id,
        Status::Warning,
        &["of another machine: this is CPU X"],
    );
    expect(
        &check("an imagined one", 1 << 10),
        id,
        Status::Ok,
        &["an imagined one"],
    );
    let bad = Probed::Unusable {
        path,
        error: "version 99".into(),
    };
    expect(
        &[machine_check_on(&bad, None, "")],
        id,
        Status::Failure,
        &["version 99; mend: tier-plan probe"],
    );
}

#[test]
fn the_json_form_has_all_of_a_check() {
    let cost = Cost {
        words: "words".into(),
        speeds: Some(Speeds {
            now_tok_s: 1.0,
            mended_tok_s: 2.0,
        }),
    };
    let checks = vec![
        Check::ok("memory.swap", "none").fact("total_bytes", 0),
        Check::ok("memory.huge_pages", "never")
            .warning(cost)
            .mend("do"),
        Check::ok("gpu.devices", "old").failure("update"),
    ];
    let report = Report { checks };
    assert_eq!(report.summary(), "3 checks: 1 warning, 1 failure");
    let line = "warning  memory huge pages      never; cost: predicted 1.00 instead of 2.00 tok/s, as words; mend: do";
    assert_eq!(report.checks[1].line(), line);
    let json = report.as_json();
    assert_eq!(
        json["checks"][1],
        json!({
            "group": "memory", "check": "huge_pages", "status": "warning", "found": "never",
            "cost": {"words": "words", "now_tok_s": 1.0, "mended_tok_s": 2.0}, "mend": "do", "facts": {},
        })
    );
    assert_eq!(json["checks"][0]["facts"]["total_bytes"], 0);
    assert_eq!(
        (&json["ok"], &json["warnings"], &json["failures"]),
        (&json!(1), &json!(1), &json!(1))
    );
}
