//! Snapshots as they are drawn, in `tests/data/top`, and what is added up.

use super::lines;
use super::state::{Link, Scene, State, Sums};
use super::view::{self, Theme};
use crate::printable::is_control;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;
use ratatui::style::Color;
use serde_json::{Value, json};
use std::ffi::OsStr;
use std::path::PathBuf;
use std::time::Duration;

const GIB: u64 = 1 << 30;

/// A window of a quarter of a second in which two texts decode and one reads its prompt.
fn scene_json() -> Value {
    json!({
        "number": 7, "uptime_s": 3725.0, "window_s": 0.25, "model": "demo.gguf", "plan": "ilp",
        "steps": 5, "decode_tokens": 10, "prompt_tokens": 128, "predicted_tok_s": 24.0,
        "decode_tok_s": 40.0, "text_tok_s": 20.0, "decode_steps": 5, "prompt_tok_s": 512.0,
        "expert_hits": 90, "expert_misses": 10,
        "tiers": [
            { "name": "dram", "kind": "dram", "emulated": false, "read_gbps": 20.0,
              "capacity_bytes": 8 * GIB, "budget_bytes": 4 * GIB, "used_bytes": 3 * GIB,
              "read_bytes_per_s": 5e9, "accesses": 300, "hit_rate": 0.75 },
            { "name": "slow", "kind": "nvme", "emulated": false, "read_gbps": 2.5,
              "capacity_bytes": 100 * GIB, "budget_bytes": 100 * GIB, "used_bytes": 8 * GIB,
              "read_bytes_per_s": 1e9, "accesses": 100, "hit_rate": 0.25 },
        ],
        "layers": [], "pages": { "free": 192, "total": 256 },
        "queue": { "running": 3, "waiting": 1, "max_running": 4, "max_waiting": 64 },
        "requests": { "answered": 12, "refused": 2, "queue_full": 0, "abandoned": 1, "failed": 0 },
        "texts": [
            { "id": 4, "is_processing": true, "state": "generating", "n_prompt_tokens": 100,
              "n_prompt_done": null, "n_decoded": 37 },
            { "id": 5, "is_processing": true, "state": "generating", "n_prompt_tokens": 20,
              "n_prompt_done": null, "n_decoded": 5 },
            { "id": 6, "is_processing": true, "state": "prompt", "n_prompt_tokens": 2048,
              "n_prompt_done": 512, "n_decoded": 0 },
            { "id": 7, "is_processing": false, "state": "waiting", "n_prompt_tokens": 64,
              "n_prompt_done": null, "n_decoded": 0 },
        ],
    })
}

fn scene(value: &Value) -> Scene {
    Scene::read(value).unwrap()
}

/// A view that has seen eight seconds, at first slower ones.
fn seen(value: &Value) -> State {
    let mut state = State::new("http://127.0.0.1:8080");
    for window in 0..32u64 {
        let mut scene = scene(value);
        let share = (window / 4 + 1).min(8);
        scene.decode_tokens = scene.decode_tokens * share / 8;
        scene.prompt_tokens = if window < 16 { scene.prompt_tokens } else { 0 };
        scene.hits = scene.hits * (share + 8) / 16;
        if let Some(slow) = scene.tiers.last_mut() {
            slow.read_bytes_per_s *= (9 - share) as f64 / 8.0;
        }
        state.see(scene);
    }
    state
}

fn drawn(state: &State, width: u16, height: u16, theme: Theme) -> Buffer {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal
        .draw(|frame| view::draw(frame, state, theme))
        .unwrap();
    terminal.backend().buffer().clone()
}

fn text(state: &State, width: u16, height: u16) -> String {
    let buffer = drawn(state, width, height, Theme::of(None));
    let mut text = String::new();
    for y in 0..height {
        let row: String = (0..width).map(|x| buffer[(x, y)].symbol()).collect();
        text += row.trim_end();
        text.push('\n');
    }
    text
}

/// Compares what is drawn with `tests/data/top/NAME.txt`.
fn check(name: &str, state: &State, width: u16, height: u16) {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/data/top")
        .join(format!("{name}.txt"));
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    let drawn = text(state, width, height);
    assert_eq!(drawn, expected, "{} differs from:\n{drawn}", path.display());
}

#[test]
fn a_large_window_shows_everything() {
    check("100x30", &seen(&scene_json()), 100, 30);
}

#[test]
fn a_small_window_shows_the_most_needed() {
    check("60x20", &seen(&scene_json()), 60, 20);
    check("40x10", &seen(&scene_json()), 40, 10);
}

#[test]
fn texts_without_a_row_are_counted() {
    let mut value = scene_json();
    value["texts"] = Value::from(vec![value["texts"][0].clone(); 40]);
    check("many-60x20", &seen(&value), 60, 20);
}

#[test]
fn emulated_tiers_and_errors_are_named() {
    let mut value = scene_json();
    value["tiers"][1]["emulated"] = true.into();
    value["requests"]["failed"] = 3.into();
    check("emulated-100x30", &seen(&value), 100, 30);
    check("emulated-40x10", &seen(&value), 40, 10);
}

#[test]
fn a_missing_server_is_named_with_the_next_try() {
    let mut state = State::new("http://127.0.0.1:8080");
    check("connecting-60x20", &state, 60, 20);
    let why =
        "no answer from a server at http://127.0.0.1:8080: io: Connection refused (os error 111)";
    state.lose(why, Duration::from_millis(1500));
    check("no-server-60x20", &state, 60, 20);
    let mut state = seen(&scene_json());
    state.lose(why, Duration::from_secs(5));
    check("lost-100x30", &state, 100, 30);
}

#[test]
fn an_older_server_without_plan_rates_and_outcomes_is_shown() {
    let mut value = scene_json();
    for key in ["plan", "requests", "predicted_tok_s"] {
        value.as_object_mut().unwrap().remove(key);
    }
    value["tiers"][1]["read_gbps"] = Value::Null;
    check("older-100x30", &seen(&value), 100, 30);
}

#[test]
fn help_is_shown_in_the_least_window() {
    let mut state = seen(&scene_json());
    state.shows_help = true;
    check("help-40x10", &state, 40, 10);
}

/// A snapshot whose texts and numbers are as bad as JSON allows.
fn hostile() -> Value {
    let mut value = scene_json();
    let bad = "\u{1b}[2J\u{1b}]0;t\u{7}\u{9b}31m\r\n\u{202e}\u{2028}世界👋e\u{301}\u{0}";
    let long = format!("{bad}{}", "世".repeat(5000));
    for key in ["model", "plan"] {
        value[key] = long.clone().into();
    }
    for key in ["name", "kind"] {
        value["tiers"][0][key] = long.clone().into();
        value["tiers"][1][key] = bad.into();
    }
    value["texts"][0]["state"] = bad.into();
    value["texts"][2]["n_prompt_done"] = u64::MAX.into();
    value["window_s"] = 1e18.into();
    value["text_tok_s"] = 1e-308.into();
    value["uptime_s"] = 1e308.into();
    value["tiers"][1]["read_bytes_per_s"] = 1e18.into();
    for key in [
        "expert_hits",
        "expert_misses",
        "decode_tokens",
        "decode_steps",
    ] {
        value[key] = u64::MAX.into();
    }
    value["tiers"][0]["accesses"] = u64::MAX.into();
    value["tiers"][0]["used_bytes"] = u64::MAX.into();
    value["pages"]["free"] = u64::MAX.into();
    value
}

#[test]
fn hostile_texts_cannot_act_on_the_terminal() {
    let mut state = State::new("http://\u{1b}[31m");
    for _ in 0..3 {
        state.see(scene(&hostile()));
    }
    check("hostile-100x30", &state, 100, 30);
    state.lose("\u{1b}]52;c;AAAA\u{7}\u{202e}", Duration::MAX);
    for (width, height) in [(100, 30), (60, 20), (40, 10)] {
        let text = text(&state, width, height);
        assert!(
            !text.chars().any(|c| c != '\n' && is_control(c)),
            "{text:?}"
        );
        assert!(text.contains("\\u001b"), "escaped, not left out: {text}");
    }
    for line in [
        lines::words(&scene(&hostile()), &Sums::default()),
        lines::json(&scene(&hostile()), &Sums::default()).to_string(),
    ] {
        assert!(!line.chars().any(is_control), "{line:?}");
    }
}

#[test]
fn every_size_can_be_drawn() {
    let mut help = seen(&scene_json());
    help.shows_help = true;
    let mut bad = State::default();
    bad.see(scene(&hostile()));
    for state in [State::default(), seen(&scene_json()), help, bad] {
        for width in (0..130).step_by(9) {
            for height in [0, 1, 9, 10, 11, 14, 20, 33] {
                drawn(&state, width, height, Theme::of(None));
            }
        }
    }
    let small = text(&State::default(), 30, 8);
    assert!(small.starts_with("Window too small: 30 by 8"), "{small}");
}

#[test]
fn colors_show_on_any_background_and_can_be_off() {
    let mut state = seen(&scene_json());
    state.lose("gone", Duration::from_secs(1));
    let colors = |theme| -> Vec<Color> {
        let buffer = drawn(&state, 100, 30, theme);
        assert!(buffer.content().iter().all(|cell| cell.bg == Color::Reset));
        let mut colors: Vec<_> = buffer.content().iter().map(|cell| cell.fg).collect();
        colors.sort_by_key(ToString::to_string);
        colors.dedup();
        colors
    };
    let all = [Color::Magenta, Color::Red, Color::Reset];
    assert_eq!(colors(Theme::of(None)), all);
    assert_eq!(colors(Theme::of(Some(OsStr::new("")))), all);
    assert_eq!(colors(Theme::of(Some(OsStr::new("1")))), [Color::Reset]);
}

#[test]
fn windows_are_added_up() {
    let mut sums = Sums::default();
    assert_eq!((sums.hit_rate(), sums.text_tok_s()), (None, None));
    assert_eq!((sums.decode_tok_s(), sums.read_gbps(1)), (0.0, 0.0));
    let mut value = scene_json();
    sums.add(&scene(&value));
    // A window twice as long, in which nothing is decoded.
    value["window_s"] = 0.5.into();
    value["text_tok_s"] = Value::Null;
    for key in [
        "decode_tokens",
        "decode_steps",
        "expert_hits",
        "expert_misses",
    ] {
        value[key] = 0.into();
    }
    value["tiers"][1]["read_bytes_per_s"] = 0.0.into();
    sums.add(&scene(&value));
    assert!((sums.decode_tok_s() - 10.0 / 0.75).abs() < 1e-9);
    assert!((sums.text_tok_s().unwrap() - 20.0).abs() < 1e-9);
    assert_eq!(sums.hit_rate(), Some(0.9));
    assert!((sums.read_gbps(1) - 1.0 / 3.0).abs() < 1e-9);
    assert_eq!((sums.share(1), sums.share(2)), (Some(0.25), None));
}

#[test]
fn the_history_has_a_point_per_second_and_a_bound() {
    let mut state = State::default();
    for _ in 0..10 {
        state.see(scene(&scene_json()));
    }
    assert_eq!(state.points.len(), 2);
    assert_eq!(state.points[0].hit_rate, Some(0.9));
    assert!((state.now().seconds - 2.0).abs() < 1e-9);
    let mut slow = scene_json();
    slow["window_s"] = 12.5.into();
    state.see(scene(&slow));
    assert_eq!(state.points.len(), 2 + 13, "half a second was begun");
    slow["window_s"] = 1e18.into();
    for _ in 0..30 {
        state.see(scene(&slow));
    }
    assert_eq!(state.points.len(), 600);
}

#[test]
fn a_pause_keeps_what_is_shown_and_a_lost_connection_says_so() {
    let mut state = seen(&scene_json());
    state.is_paused = true;
    let before = (state.scene.clone(), state.points.clone());
    let mut other = scene_json();
    other["model"] = "another".into();
    state.see(scene(&other));
    assert_eq!((state.scene.clone(), state.points.clone()), before);
    state.lose("gone", Duration::from_secs(1));
    assert!(matches!(&state.link, Link::Lost { why, .. } if why == "gone"));
    assert_eq!(state.now(), Sums::default());
    state.is_paused = false;
    state.see(scene(&other));
    assert_eq!(state.link, Link::Live);
    assert_eq!(state.scene.unwrap().model, "another");
}

#[test]
fn what_is_no_snapshot_is_refused() {
    for value in [
        json!(null),
        json!([]),
        json!({}),
        json!({ "model": 3, "window_s": 1 }),
    ] {
        assert_eq!(Scene::read(&value), None, "{value}");
    }
    let least = scene(&json!({ "model": "m", "window_s": 0 }));
    assert!(least.tiers.is_empty() && least.plan.is_none() && least.requests.is_none());
    let mut many = scene_json();
    many["texts"] = Value::from(vec![many["texts"][0].clone(); 10_000]);
    many["tiers"] = Value::from(vec![many["tiers"][0].clone(); 10_000]);
    let many = scene(&many);
    assert_eq!((many.texts.len(), many.tiers.len()), (256, 16));
}

#[test]
fn lines_say_what_the_view_does() {
    let mut value = scene_json();
    value["tiers"][1]["emulated"] = true.into();
    let scene = scene(&value);
    let mut second = Sums::default();
    second.add(&scene);
    assert_eq!(
        lines::words(&scene, &second),
        "demo.gguf (plan ilp): decode 40.0 tok/s, 20.0 per text, predicted 24.0 · prompt 512 tok/s · hits 90.0% · \
         slow 1.00 of 2.50 GB/s · 3 of 4 texts, 1 waiting · KV 64 of 256 pages · 0 failed · emulated tiers"
    );
    let json = lines::json(&scene, &second);
    for (pointer, expected) in [
        ("/connected", json!(true)),
        ("/emulated", json!(true)),
        ("/hit_rate", json!(0.9)),
        ("/tiers/1/measured_gbps", json!(1.0)),
        ("/texts/2/n_prompt_done", json!(512)),
        ("/requests/answered", json!(12)),
        ("/pages/free", json!(192)),
    ] {
        assert_eq!(json.pointer(pointer), Some(&expected), "{pointer}");
    }
}
