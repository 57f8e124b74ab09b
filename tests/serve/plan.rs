//! Another plan while texts are answered, made of what they chose.

use super::*;
use crate::common::stderr;

const PROMPTS: [&str; 5] = [
    PROMPT,
    "Once upon a time there was",
    "fn main() {",
    "And God said, Let there be",
    "The quick brown",
];

/// Returns the texts that follow the prompts, one after the other.
pub fn texts(server: &Served) -> Vec<Value> {
    let ask = |prompt: &&str| {
        let answer = server.post("/v1/completions", &completion(prompt, 80)).ok();
        answer["choices"][0]["text"].clone()
    };
    PROMPTS.iter().map(ask).collect()
}

/// Makes a plan over emulated tiers without a profile, so that there is something to gain, and returns
/// its path.
fn planned(path: &str) -> String {
    let model = demo_model();
    let model = model.to_str().unwrap();
    let args = [
        "solve",
        model,
        "--machine",
        "demo-emulated",
        "--output",
        path,
    ];
    let solved = run_in(std::path::Path::new("."), &args);
    assert!(solved.status.success(), "{}", stderr(&solved));
    path.to_string()
}

/// Waits until a plan is made, and pins and slots have moved.
pub fn settled(server: &Served) -> Value {
    let until = Instant::now() + Duration::from_secs(120);
    loop {
        let found = server.get("/plan").ok();
        if !["planning", "moving"].contains(&found["status"].as_str().unwrap()) {
            return found;
        }
        assert!(Instant::now() < until, "{found}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_plan_of_what_texts_chose_is_moved_to_while_they_are_answered() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let (plan, uses) = (planned(&path("placement.toml")), path("use.profile"));
    let mut server = Served::start(&["--plan", &plan, "--profile-out", &uses]);
    assert_eq!(server.get("/plan").ok()["status"], "idle");
    let early = server.post("/plan", &json!({}));
    assert_eq!(early.status, 409, "nothing is recorded yet");
    assert_eq!(server.post("/plan", &json!({"aply": true})).status, 400);
    let expected = texts(&server);
    let predicted = || {
        server.get("/props").ok()["predicted_tok_s"]
            .as_f64()
            .unwrap()
    };
    let before = predicted();

    // It is only said what it would bring.
    assert_eq!(
        server.post("/plan", &json!({"time_limit_s": 2})).status,
        202
    );
    let found = settled(&server);
    assert_eq!(found["status"], "ready", "{found}");
    let proposal = &found["proposal"];
    assert!(proposal["gain"].as_f64().unwrap() > 0.05, "{found}");
    let speed = |when: &str| {
        proposal["predicted"][when]["decode_tok_s"]
            .as_f64()
            .unwrap()
    };
    assert!(speed("then") > speed("now"), "{found}");
    assert_eq!(proposal["predicted"]["then"]["emulated"], true);
    let placement = proposal["placement"].as_str().unwrap();
    std::fs::write(path("new.toml"), placement).unwrap();
    let explained = run_in(folder.path(), &["diff", &plan, &path("new.toml")]);
    assert!(explained.status.success(), "{}", stderr(&explained));
    assert_eq!(predicted(), before);

    // A gain that is too small moves nothing.
    assert_eq!(
        server
            .post("/plan", &json!({"apply": true, "min_gain": 9}))
            .status,
        202
    );
    assert_eq!(settled(&server)["status"], "ready");

    assert_eq!(server.post("/plan", &json!({"apply": true})).status, 202);
    let again = server.post("/plan", &json!({}));
    assert_eq!(again.status, 409, "one at a time");
    assert_eq!(texts(&server), expected, "while pins and slots move");
    let found = settled(&server);
    assert_eq!(found["status"], "moved", "{found}");
    let moved = &found["move"];
    assert_eq!(moved["done_bytes"], moved["total_bytes"], "{found}");
    assert_eq!(
        (&moved["failed_pins"], &moved["left_pins"]),
        (&json!(0), &json!(0))
    );
    assert_eq!(texts(&server), expected, "after they have moved");
    assert!(predicted() > before);
    let gauge = format!("tier_plan_predicted_tokens_per_second {}", predicted());
    assert!(server.get("/metrics").text().contains(&gauge), "{gauge}");
    let log = server.stop();
    assert!(
        log.contains("predicted for emulated tiers: pins and slots move"),
        "{log}"
    );
}

#[test]
fn the_command_asks_the_server() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_string();
    let (plan, uses) = (planned(&path("placement.toml")), path("use.profile"));
    let key = ["--api-key", "secret"];
    let options = ["--plan", &plan, "--profile-out", &uses];
    let server = Served::start(&[&options[..], &key[..]].concat());
    let url = format!("http://127.0.0.1:{}", server.port);
    let replan = |more: &[&str]| {
        let args = [&["replan", "--url", &url, "--time-limit", "2"][..], more].concat();
        run_in(folder.path(), &args)
    };
    let refused = replan(&[]);
    assert!(
        stderr(&refused).contains("wants a key"),
        "{}",
        stderr(&refused)
    );
    let refused = replan(&key);
    assert!(stderr(&refused).contains("256"), "{}", stderr(&refused));

    let with_key = [("x-api-key", "secret")];
    let body = completion(PROMPT, 160).to_string();
    for _ in 0..3 {
        let answer = server.ask("POST", "/v1/completions", &with_key, body.as_bytes());
        assert_eq!(answer.status, 200);
    }
    let said = replan(&[&key[..], &["--output", "new.toml"]].concat());
    let words = String::from_utf8_lossy(&said.stdout).into_owned();
    assert!(said.status.success(), "{}", stderr(&said));
    for word in [
        "3 texts",
        "emulated tiers",
        "present",
        "pass --apply",
        "wrote new.toml",
    ] {
        assert!(words.contains(word), "{word} in {words}");
    }
    let explained = run_in(folder.path(), &["diff", &plan, "new.toml"]);
    assert!(explained.status.success(), "{}", stderr(&explained));

    let moved = replan(&[&key[..], &["--apply", "--json"]].concat());
    let moved = json(moved);
    assert_eq!(moved["status"], "moved", "{moved}");
    assert!(moved["proposal"]["gain"].as_f64().unwrap() > 0.01);
}

#[test]
fn without_a_record_or_memory_to_move_in_no_plan_is_made() {
    let mut server = Served::start(&[]);
    let refused = server.post("/plan", &json!({}));
    assert_eq!(refused.status, 409);
    assert!(
        refused.text().contains("--profile-out"),
        "{}",
        refused.text()
    );
    server.stop();

    let folder = tempfile::tempdir().unwrap();
    let uses = folder.path().join("use.profile");
    let server = Served::start(&["--profile-out", uses.to_str().unwrap()]);
    let refused = server.post("/plan", &json!({}));
    assert_eq!(refused.status, 409);
    assert!(
        refused.text().contains("nothing can move"),
        "{}",
        refused.text()
    );
}
