use super::*;
use axum::extract::Request;
use hyper::service::Service;
use hyper_util::service::TowerToHyperService;
use std::collections::HashSet;
use tokio::runtime::Builder;

/// Answers a request without a server.
fn ask(method: &str, path: &str, known: &[&str]) -> Response {
    let mut request = Request::builder().method(method).uri(path);
    for tag in known {
        request = request.header(header::IF_NONE_MATCH, *tag);
    }
    let request = request.body(Body::empty()).unwrap();
    let router: Router = routes();
    let service = TowerToHyperService::new(router);
    let runtime = Builder::new_current_thread().build().unwrap();
    runtime.block_on(service.call(request)).unwrap()
}

fn text(response: Response) -> String {
    let runtime = Builder::new_current_thread().build().unwrap();
    let bytes = runtime.block_on(axum::body::to_bytes(response.into_body(), usize::MAX));
    String::from_utf8(bytes.unwrap().to_vec()).unwrap()
}

fn header_of(response: &Response, name: HeaderName) -> String {
    let value = response.headers().get(&name);
    let value = value.unwrap_or_else(|| panic!("no header {name}"));
    value.to_str().unwrap().to_string()
}

#[test]
fn files_have_their_types_and_a_strict_policy() {
    for file in &FILES {
        let response = ask("GET", file.path, &[]);
        assert_eq!(response.status(), 200, "{}", file.path);
        let kind = header_of(&response, header::CONTENT_TYPE);
        let expected = match file.path.rsplit_once('.').map(|(_, end)| end) {
            None => "text/html; charset=utf-8",
            Some("css") => "text/css; charset=utf-8",
            Some("js") => "text/javascript; charset=utf-8",
            Some("svg") => "image/svg+xml",
            Some(end) => panic!("no type for .{end}"),
        };
        assert_eq!(kind, expected, "{}", file.path);
        assert_eq!(
            header_of(&response, header::X_CONTENT_TYPE_OPTIONS),
            "nosniff"
        );
        let policy = header_of(&response, header::CONTENT_SECURITY_POLICY);
        assert!(policy.starts_with("default-src 'self';"), "{policy}");
        for loose in ["unsafe", "http:", "https:", "data:", "*"] {
            assert!(!policy.contains(loose), "{loose} in {policy}");
        }
        assert_eq!(text(response), file.text);
    }
}

#[test]
fn a_file_that_a_browser_has_is_not_sent_again() {
    let mut tags = HashSet::new();
    for file in &FILES {
        let tag = header_of(&ask("GET", file.path, &[]), header::ETAG);
        let weak = format!("W/{tag}");
        let listed = format!("\"other\", {tag}");
        for known in [
            &[tag.as_str()][..],
            &[&weak],
            &[&listed],
            &["\"x\"", &tag],
            &["*"],
        ] {
            let response = ask("GET", file.path, known);
            assert_eq!(response.status(), 304, "{} {known:?}", file.path);
            assert_eq!(header_of(&response, header::ETAG), tag);
            header_of(&response, header::CONTENT_SECURITY_POLICY);
            assert_eq!(text(response), "");
        }
        for other in ["\"other\"", "", &tag[1..], "\"\""] {
            let response = ask("GET", file.path, &[other]);
            assert_eq!(response.status(), 200, "{} {other}", file.path);
        }
        tags.insert(tag);
    }
    assert_eq!(
        tags.len(),
        FILES.len(),
        "files that differ have tags that differ"
    );
}

#[test]
fn the_methods_are_get_and_head() {
    let response = ask("HEAD", "/", &[]);
    assert_eq!(response.status(), 200);
    header_of(&response, header::CONTENT_SECURITY_POLICY);
    assert_eq!(text(response), "");
    assert_eq!(ask("POST", "/", &[]).status(), 405);
    assert_eq!(ask("GET", "/page/", &[]).status(), 404);
}

#[test]
fn only_files_of_the_page_need_no_key() {
    assert!(has("/") && has("/page/main.js"));
    for path in [
        "",
        "/page",
        "/page/",
        "/page/mod.rs",
        "/page/../metrics",
        "/v1/models",
        "//",
    ] {
        assert!(!has(path), "{path}");
    }
}

/// Files that a text names in quotes after a word.
fn named<'t>(text: &'t str, before: &str) -> Vec<&'t str> {
    let parts = text.split(before).skip(1);
    parts.filter_map(|part| part.split('"').next()).collect()
}

#[test]
fn every_file_is_used_and_none_is_missing() {
    let mut used = HashSet::from([ROOT.to_string()]);
    for file in &FILES {
        for name in named(file.text, "from \"") {
            let name = name
                .strip_prefix("./")
                .expect("modules are beside each other");
            used.insert(format!("/page/{name}"));
        }
        if file.kind == HTML {
            for name in [named(file.text, "src=\""), named(file.text, "href=\"")].concat() {
                if !name.starts_with('#') {
                    used.insert(format!("/{name}"));
                }
            }
        }
    }
    let there: HashSet<String> = FILES.iter().map(|file| file.path.to_string()).collect();
    assert_eq!(used, there);
}

#[test]
fn text_never_becomes_markup() {
    for file in FILES.iter().filter(|file| file.kind == SCRIPT) {
        for sink in [
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "DOMParser",
            "eval(",
            "new Function",
        ] {
            assert!(!file.text.contains(sink), "{sink} in {}", file.path);
        }
    }
    let html = FILES[0].text;
    assert!(!html.contains("style=\"") && !html.contains("<style") && !html.contains(" on"));
    assert!(!html.contains("//"), "nothing comes from elsewhere");
}
