//! The page at `/`, which needs no key, though everything that it asks for does.

use super::*;

#[test]
fn the_page_is_open_and_what_it_asks_for_is_not() {
    let server = Served::start(&["--api-key", "secret"]);
    let page = server.get("/");
    assert_eq!(page.status, 200, "{page:?}");
    assert_eq!(
        page.header("content-type"),
        Some("text/html; charset=utf-8")
    );
    let policy = page.header("content-security-policy").unwrap();
    assert!(policy.starts_with("default-src 'self';"), "{policy}");
    let tag = page.header("etag").unwrap().to_string();
    assert!(page.text().contains("page/main.js"));
    assert_eq!(server.get("/page/main.js").status, 200);
    let known = [("If-None-Match", tag.as_str())];
    let again = server.ask("GET", "/", &known, b"");
    assert_eq!((again.status, again.text().len()), (304, 0));
    for path in ["/props", "/tier-plan/live", "/metrics", "/page/none.js"] {
        assert_eq!(server.get(path).status, 401, "{path}");
    }
}

#[test]
fn a_stranger_s_name_does_not_get_the_page() {
    let server = Served::start(&[]);
    let evil = server.ask("GET", "/", &[("Host", "evil.example")], b"");
    assert_eq!(evil.status, 403, "{evil:?}");
    assert!(!evil.text().contains("<html"));
}
