//! `tier-plan serve`: answers are those that each request has alone, no body and no client harms it,
//! and it ends soon.

mod agents;
mod bodies;
pub mod client;
mod llama;
mod metrics;
mod openapi;
mod page;
pub mod plan;
mod profile;
mod responses;
mod streams;
pub mod tools;
mod top;

use crate::common::{demo_model, json, piped, run_in, send, tier_plan};
use client::{Answer, Served};
use serde_json::{Value, json};
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const PROMPT: &str = "In the beginning";

/// A prompt of several pages of the cache.
fn long() -> String {
    "And the earth was without form, and void; and darkness was upon the face of the deep. "
        .repeat(8)
}

/// The text that `run` continues a prompt with.
fn alone(prompt: &str, n: usize) -> Value {
    let (folder, model, n) = (tempfile::tempdir().unwrap(), demo_model(), n.to_string());
    let args = [
        "run",
        model.to_str().unwrap(),
        "-p",
        prompt,
        "-n",
        &n,
        "--json",
    ];
    json(run_in(folder.path(), &args))["text"].clone()
}

fn completion(prompt: &str, n: usize) -> Value {
    json!({"prompt": prompt, "max_tokens": n, "temperature": 0})
}

#[test]
fn greedy_answers_are_those_of_single_runs_in_any_company() {
    let server = Served::start(&["--parallel", "3"]);
    let prompts = [
        PROMPT.to_string(),
        long(),
        "a".to_string(),
        long() + "And God",
        long(),
    ];
    let expected: Vec<Value> = prompts.iter().map(|prompt| alone(prompt, 24)).collect();
    let texts: Vec<Value> = std::thread::scope(|scope| {
        let ask = |prompt: &String| {
            let (server, body) = (&server, completion(prompt, 24));
            scope.spawn(move || {
                server.post("/v1/completions", &body).ok()["choices"][0]["text"].clone()
            })
        };
        let asked: Vec<_> = prompts.iter().map(ask).collect();
        asked
            .into_iter()
            .map(|asked| asked.join().unwrap())
            .collect()
    });
    assert_eq!(texts, expected);
}

#[test]
fn a_second_request_begins_with_what_is_kept_of_the_first() {
    let server = Served::start(&["--parallel", "1"]);
    let ask = || server.post("/v1/completions", &completion(&long(), 8)).ok();
    let (first, second) = (ask(), ask());
    let cached = |answer: &Value| {
        answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            .as_u64()
            .unwrap()
    };
    assert_eq!(cached(&first), 0);
    assert!(cached(&second) >= 64, "{second}");
    assert_eq!(second["timings"]["cache_n"], cached(&second));
    assert_eq!(first["choices"][0]["text"], second["choices"][0]["text"]);
    let usage = &second["usage"];
    assert_eq!(usage["completion_tokens"], 8);
    assert_eq!(
        usage["total_tokens"].as_u64(),
        usage["prompt_tokens"].as_u64().map(|n| n + 8)
    );
    let metrics = server.get("/metrics").text();
    for name in [
        "tier_plan_cached_tokens_total",
        "tier_plan_generated_tokens_total 16",
    ] {
        assert!(metrics.contains(name), "{name} in {metrics}");
    }
}

#[test]
fn several_answers_have_seeds_of_their_own() {
    let server = Served::start(&["--parallel", "4"]);
    let body = json!({"prompt": PROMPT, "max_tokens": 12, "temperature": 0.9, "seed": 7, "n": 3});
    let texts = |answer: Value| -> Vec<Value> {
        let choices = answer["choices"].as_array().unwrap();
        choices
            .iter()
            .map(|choice| choice["text"].clone())
            .collect()
    };
    let first = texts(server.post("/v1/completions", &body).ok());
    assert_eq!(first.len(), 3);
    assert!(first[0] != first[1] && first[1] != first[2]);
    assert_eq!(texts(server.post("/v1/completions", &body).ok()), first);
    let drawn = json!({"prompt": PROMPT, "max_tokens": 12, "temperature": 0.9});
    let draw = || texts(server.post("/v1/completions", &drawn).ok());
    assert_ne!(draw(), draw(), "a request without a seed draws anew");
}

#[test]
fn a_client_that_leaves_frees_its_place() {
    let server = Served::start(&["--parallel", "1", "--max-queue", "0"]);
    let body = json!({"prompt": long(), "max_tokens": 2000, "temperature": 0, "stream": true, "ignore_eos": true});
    let mut stream = server.open("/v1/completions", &body);
    stream.read_until("data: ");
    let full = server.post("/v1/completions", &completion("a", 1));
    assert_eq!(full.status, 429, "{full:?}");
    assert!(full.header("retry-after").unwrap().parse::<u64>().unwrap() >= 1);
    assert_eq!(full.json()["error"]["code"], "queue_full");
    drop(stream);
    let start = Instant::now();
    loop {
        let answer = server.post("/v1/completions", &completion("a", 1));
        if answer.status == 200 {
            break;
        }
        assert_eq!(answer.status, 429, "{answer:?}");
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "the place was not freed"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
    assert!(
        server
            .get("/metrics")
            .text()
            .contains("tier_plan_abandoned_texts_total 1")
    );
}

#[test]
fn an_answer_has_given_its_place_back() {
    let server = Served::start(&["--parallel", "1", "--max-queue", "0"]);
    for _ in 0..50 {
        server.post("/v1/completions", &completion("a", 1)).ok();
    }
}

#[test]
fn a_key_is_asked_for() {
    let server = Served::start(&["--api-key", "secret"]);
    let with = |headers: &[(&str, &str)]| server.ask("GET", "/v1/models", headers, b"");
    let refused = with(&[]);
    assert_eq!(refused.status, 401);
    assert_eq!(refused.json()["error"]["type"], "authentication_error");
    assert_eq!(with(&[("Authorization", "Bearer secre")]).status, 401);
    assert_eq!(with(&[("Authorization", "Bearer secret")]).status, 200);
    assert_eq!(with(&[("x-api-key", "secret")]).status, 200);
    // With a key, the server may have any name.
    let named = [("x-api-key", "secret"), ("Host", "models.example.com")];
    assert_eq!(with(&named).status, 200);
    assert_eq!(server.ask("GET", "/health", &[], b"").status, 200);
    let anthropic = server.ask("POST", "/v1/messages", &[], b"{}");
    assert_eq!(
        (anthropic.status, &anthropic.json()["type"]),
        (401, &json!("error"))
    );
}

#[test]
fn pages_of_strangers_are_refused() {
    let server = Served::start(&["--cors", "https://good.example"]);
    let with = |headers: &[(&str, &str)]| server.ask("GET", "/v1/models", headers, b"");
    assert_eq!(with(&[("Host", "rebound.example")]).status, 403);
    assert_eq!(with(&[("Host", "localhost:1")]).status, 200);
    let evil = with(&[("Origin", "https://evil.example")]);
    assert_eq!(
        (evil.status, evil.header("access-control-allow-origin")),
        (403, None)
    );
    let good = with(&[("Origin", "https://good.example")]);
    assert_eq!(good.status, 200);
    assert_eq!(
        good.header("access-control-allow-origin"),
        Some("https://good.example")
    );
    let preflight = [
        ("Origin", "https://good.example"),
        ("Access-Control-Request-Method", "POST"),
    ];
    assert_eq!(
        server
            .ask("OPTIONS", "/v1/messages", &preflight, b"")
            .status,
        204
    );
    let own = format!("http://localhost:{}", server.port);
    let host = format!("localhost:{}", server.port);
    assert_eq!(with(&[("Origin", &own), ("Host", &host)]).status, 200);
    assert_eq!(
        server
            .ask("OPTIONS", "/v1/messages", &[("Origin", "null")], b"")
            .status,
        403
    );
}

#[test]
fn an_open_address_without_a_key_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let model = demo_model();
    let args = ["serve", model.to_str().unwrap(), "--host", "0.0.0.0"];
    crate::common::refused(folder.path(), &args, &["--host: 0.0.0.0", "--api-key"]);
}

#[cfg(unix)]
#[test]
fn a_signal_ends_it_soon_and_texts_at_work_have_an_end() {
    let mut server = Served::start(&["--parallel", "1"]);
    let body = json!({"prompt": PROMPT, "max_tokens": 4000, "temperature": 0, "stream": true, "ignore_eos": true});
    let mut stream = server.open("/v1/completions", &body);
    stream.read_until("data: ");
    let start = Instant::now();
    send("-TERM", &server.child);
    let code = server.child.wait().unwrap().code();
    assert_eq!(code, Some(143));
    assert!(
        start.elapsed() < Duration::from_secs(15),
        "{:?}",
        start.elapsed()
    );
    let rest = stream.rest();
    assert!(
        rest.contains("[DONE]") || rest.contains("shutting_down"),
        "{rest}"
    );
    // Without work it ends at once.
    let mut idle = Served::start(&[]);
    let start = Instant::now();
    send("-INT", &idle.child);
    assert_eq!(idle.child.wait().unwrap().code(), Some(130));
    assert!(
        start.elapsed() < Duration::from_secs(5),
        "{:?}",
        start.elapsed()
    );
}

#[test]
fn the_log_has_a_line_per_request_and_no_control_characters() {
    let mut server = Served::start(&["--log-json"]);
    server.post("/v1/completions", &completion(PROMPT, 3)).ok();
    assert_eq!(server.get("/%1b[2J\u{9b}x").status, 404);
    server.ask("GET", "/x\u{202e}y", &[], b"");
    let log = server.stop();
    let lines: Vec<Value> = log
        .lines()
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect();
    let of = |path: &str| lines.iter().find(|line| line["path"] == path);
    let line = of("/v1/completions").expect(&log);
    assert_eq!(
        (&line["status"], &line["timings"]["predicted_n"]),
        (&json!(200), &json!(3))
    );
    assert!(!log.chars().any(|c| c.is_control() && c != '\n'), "{log:?}");
    assert!(!log.contains('\u{202e}'), "{log:?}");
}

#[test]
fn other_endpoints_tell_of_the_model() {
    let server = Served::start(&["--alias", "demo-model"]);
    let models = server.get("/v1/models").ok();
    assert_eq!(models["data"][0]["id"], "demo-model");
    assert_eq!(server.get("/v1/models/demo-model").ok()["object"], "model");
    assert_eq!(server.get("/v1/models/other").status, 404);
    assert_eq!(server.get("/health").ok()["status"], "ok");
    let props = server.get("/props").ok();
    assert_eq!(props["model_alias"], "demo-model");
    assert_eq!(
        props["emulated"], false,
        "without a plan nothing is emulated"
    );
    assert_eq!(props["model_path"], "demo.gguf");
    let slots = server.get("/slots").ok();
    let slots = slots.as_array().unwrap();
    assert_eq!(props["total_slots"], slots.len());
    assert!(
        slots
            .iter()
            .all(|slot| slot["state"] == "idle" && slot["n_ctx"] == props["n_ctx"])
    );
    let tokens = server.post("/tokenize", &json!({"content": PROMPT})).ok();
    let text = server.post("/detokenize", &tokens).ok();
    assert_eq!(text["content"].as_str().unwrap().trim_start(), PROMPT);
    let pieces = json!({"content": PROMPT, "with_pieces": true});
    let pieces = server.post("/tokenize", &pieces).ok();
    assert_eq!(pieces["tokens"][0]["id"], tokens["tokens"][0]);
    assert_eq!(server.get("/nowhere").status, 404);
    assert_eq!(server.get("/v1/completions").status, 405);
    let past = server.post("/detokenize", &json!({"tokens": [4_000_000_000u32]}));
    assert_eq!(past.status, 400);
}

#[test]
fn what_the_engine_does_can_be_watched() {
    let server = Served::start(&["--parallel", "2"]);
    let idle = server.get("/tier-plan/live").ok();
    assert_eq!(
        (&idle["steps"], &idle["queue"]["running"]),
        (&json!(0), &json!(0))
    );
    assert_eq!(idle["plan"], "all-in-dram");
    assert_eq!(
        idle["tiers"][0]["read_gbps"],
        Value::Null,
        "not measured: {idle}"
    );
    assert_eq!(server.get("/nowhere").status, 404);
    server.post("/v1/completions", &completion(PROMPT, 2)).ok();
    let then = server.get("/tier-plan/live").ok();
    let ended = |live: &Value, how: &str| live["requests"][how].as_u64().unwrap();
    // The first look itself was answered, too.
    assert_eq!(ended(&then, "answered"), ended(&idle, "answered") + 2);
    assert_eq!(ended(&then, "refused"), ended(&idle, "refused") + 1);
    assert_eq!(ended(&then, "failed"), 0);
    let is_done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        // A text ends within a window or two, so others follow it.
        scope.spawn(|| {
            while !is_done.load(Ordering::Relaxed) {
                server
                    .post("/v1/completions", &completion(&long(), 500))
                    .ok();
            }
        });
        let mut scenes = server.open_with("/tier-plan/live", &[("Accept", "text/event-stream")]);
        let watched = std::panic::catch_unwind(AssertUnwindSafe(|| watch(&mut scenes)));
        is_done.store(true, Ordering::Relaxed);
        watched.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
}

/// Checks two scenes in which a text decodes.
fn watch(scenes: &mut client::Stream) {
    let mut last = 0;
    let mut n_checked = 0;
    for _ in 0..100 {
        let scene = scenes.event();
        let number = scene["number"].as_u64().unwrap();
        assert!(number > last, "{scene}");
        last = number;
        if scene["queue"]["running"] != 1 || scene["decode_tokens"] == 0 {
            continue;
        }
        assert!(scene["decode_tok_s"].as_f64().unwrap() > 0.0, "{scene}");
        assert_eq!(scene["texts"].as_array().unwrap().len(), 1, "{scene}");
        let count = |name: &str| scene[name].as_u64().unwrap();
        let n_tokens = count("decode_tokens") + count("prompt_tokens");
        let layers = scene["layers"].as_array().unwrap();
        assert!(!layers.is_empty());
        let tiers = scene["tiers"].as_array().unwrap();
        let n_of = |tier: &Value| tier["accesses"].as_u64().unwrap();
        for layer in layers {
            let n_expert = layer["n_expert"].as_u64().unwrap();
            for expert in layer["experts"].as_array().unwrap() {
                assert!(expert[0].as_u64().unwrap() < n_expert && expert[1].as_u64().unwrap() > 0);
                assert!((expert[2].as_u64().unwrap() as usize) < tiers.len());
            }
            let n = |of: &Value| of[1].as_u64().unwrap();
            let chosen: u64 = layer["experts"].as_array().unwrap().iter().map(n).sum();
            assert_eq!(chosen, n_tokens * layer["n_used"].as_u64().unwrap());
        }
        let all: u64 = tiers.iter().map(n_of).sum();
        let hits =
            scene["expert_hits"].as_u64().unwrap() + scene["expert_misses"].as_u64().unwrap();
        if count("prompt_tokens") == 0 {
            assert_eq!(all, hits, "{scene}");
        }
        assert!(tiers[0]["used_bytes"].as_u64().unwrap() > 0);
        n_checked += 1;
        if n_checked == 2 {
            return;
        }
    }
    panic!("{n_checked} scenes of a text at work");
}

#[test]
fn a_loading_server_says_so() {
    // The port is taken before the model is read, and a second server finds it taken.
    let server = Served::start(&[]);
    let (folder, model) = (tempfile::tempdir().unwrap(), demo_model());
    let port = server.port.to_string();
    let args = ["serve", model.to_str().unwrap(), "--port", &port];
    crate::common::refused(folder.path(), &args, &["listening on 127.0.0.1", "--port"]);
}
