//! Bodies of strangers: each has one answer, and the server goes on.

use super::*;

#[test]
fn bad_bodies_are_named_and_the_server_goes_on() {
    let server = Served::start(&["--parallel", "1"]);
    let deep = "[".repeat(100_000);
    let long = format!("{{\"prompt\": \"{}\"}}", "word ".repeat(400_000));
    let cases: Vec<(&str, Vec<u8>, u16, &str)> = vec![
        ("/v1/completions", b"".to_vec(), 400, "the body"),
        ("/v1/completions", b"{".to_vec(), 400, "the body"),
        ("/v1/completions", b"[]".to_vec(), 400, "an array"),
        ("/v1/completions", b"\xff\xfe".to_vec(), 400, "the body"),
        ("/v1/completions", deep.into_bytes(), 400, "recursion"),
        ("/v1/completions", b"{\"prompt\":\"a\",\"prompt\":\"b\"}".to_vec(), 400, "twice"),
        ("/v1/completions", b"{}".to_vec(), 400, "prompt: missing"),
        ("/v1/completions", b"{\"prompt\":\"\"}".to_vec(), 400, "empty"),
        ("/v1/completions", b"{\"prompt\":[4000000000]}".to_vec(), 400, "prompt[0]: 4000000000"),
        ("/v1/completions", b"{\"prompt\":\"a\",\"n\":129}".to_vec(), 400, "n: 129"),
        ("/v1/completions", b"{\"prompt\":\"a\",\"n\":100}".to_vec(), 400, "n: 100"),
        ("/v1/completions", b"{\"prompt\":\"a\",\"max_tokens\":-1}".to_vec(), 400, "max_tokens: -1"),
        ("/v1/completions", b"{\"prompt\":\"a\",\"temperature\":1e999}".to_vec(), 400, "out of range"),
        ("/v1/completions", b"{\"prompt\":\"a\",\"echo\":true}".to_vec(), 400, "echo"),
        ("/v1/completions", b"{\"prompt\":\"a\",\"logit_bias\":{\"4000000000\":1}}".to_vec(), 400, "logit_bias"),
        ("/v1/completions", long.into_bytes(), 400, "prompt has"),
        ("/v1/chat/completions", b"{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"tools\":[{}]}".to_vec(), 400, "tools[0].type"),
        ("/v1/chat/completions", b"{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"response_format\":{\"type\":\"json_schema\"}}".to_vec(), 400, "response_format.json_schema: missing"),
        ("/v1/messages", b"{\"messages\":[{\"role\":\"user\",\"content\":\"a\"}]}".to_vec(), 400, "max_tokens"),
        ("/v1/messages", b"{\"max_tokens\":1,\"messages\":[{\"role\":\"user\",\"content\":\"a\"}],\"tools\":[{}]}".to_vec(), 400, "tools[0].name"),
        ("/v1/messages/count_tokens", b"{}".to_vec(), 400, "messages"),
        ("/tokenize", b"{}".to_vec(), 400, "content: missing"),
        ("/tokenize", b"{\"content\":7}".to_vec(), 400, "content: 7"),
        ("/detokenize", b"{\"tokens\":[-1]}".to_vec(), 400, "tokens[0]"),
        ("/apply-template", b"{\"messages\":[{}]}".to_vec(), 400, "messages[0].role"),
        ("/v1/completions", vec![b' '; (16 << 20) + 1], 413, "16777216"),
    ];
    for (path, body, status, words) in cases {
        let answer = server.ask("POST", path, &[], &body);
        let shown = String::from_utf8_lossy(&body[..body.len().min(80)]).into_owned();
        assert_eq!(answer.status, status, "{path} {shown}: {}", answer.text());
        let error = answer.json()["error"]["message"]
            .as_str()
            .unwrap()
            .to_string();
        assert!(
            error.contains(words),
            "{path} {shown}: {words:?} in {error}"
        );
        assert!(!error.chars().any(char::is_control), "{error:?}");
    }
    let param = server.post("/v1/completions", &json!({"prompt": "a", "top_p": 2}));
    assert_eq!(param.json()["error"]["param"], "top_p");
    // Harmless fields are no error.
    let mut body = completion(PROMPT, 3);
    body["user"] = "u".into();
    body["no_such_field"] = json!({"a": [1]});
    assert_eq!(
        server.post("/v1/completions", &body).ok()["choices"][0]["text"],
        alone(PROMPT, 3)
    );
}

#[test]
fn what_is_no_http_harms_nothing() {
    let server = Served::start(&[]);
    for bytes in [
        &b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc"[..],
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    ] {
        let answer = server.raw(bytes);
        assert!(!answer.contains(" 200 "), "{answer}");
    }
    let many: String = (0..300).map(|i| format!("X-{i}: a\r\n")).collect();
    let answer =
        server.raw(format!("GET /health HTTP/1.1\r\nHost: localhost\r\n{many}\r\n").as_bytes());
    assert!(!answer.contains(" 200 "), "{answer}");
    assert_eq!(server.get("/health").status, 200);
}

#[test]
fn a_client_that_leaves_while_it_sends_has_a_line() {
    let mut server = Served::start(&[]);
    let head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n";
    server.raw(format!("{head}{{\"prompt\"").as_bytes());
    let counted = "tier_plan_requests_total{path=\"/v1/completions\",status=\"499\"} 1";
    let start = Instant::now();
    while !server.get("/metrics").text().contains(counted) {
        assert!(start.elapsed() < Duration::from_secs(20), "{counted}");
        std::thread::sleep(Duration::from_millis(50));
    }
    let log = server.stop();
    assert!(log.contains("POST /v1/completions 499 in "), "{log}");
}

#[test]
fn an_answer_is_whole_where_the_body_is_not_read() {
    let server = Served::start(&["--api-key", "secret"]);
    let whole = server.get("/openapi.json").text();
    for (path, status) in [("/openapi.json", 200), ("/v1/completions", 401)] {
        for _ in 0..20 {
            let method = if status == 200 { "GET" } else { "POST" };
            let answer = server.ask(method, path, &[], &[b' '; 100_000]);
            assert_eq!(answer.status, status);
            match status {
                200 => assert!(answer.text() == whole, "cut"),
                _ => assert!(answer.json()["error"].is_object()),
            }
        }
    }
}
