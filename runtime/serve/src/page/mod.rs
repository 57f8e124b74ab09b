//! The page at `/`: a conversation with the model, and a view of what the machine does.
//!
//! All of it is in the program. The files are served as they are in this folder, so that there is
//! nothing to build. They hold no secret, so they need no key; the page asks for the key and sends it
//! with each request. The policy of its content leaves a script that gets into the page nothing to
//! do: it runs no inline script, loads nothing from elsewhere, and takes no markup from text.

use axum::Router;
use axum::body::Body;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use std::hash::{DefaultHasher, Hasher};

/// Path of the page.
const ROOT: &str = "/";

/// What the page may do: run and load the server's own files, and nothing else.
const POLICY: &str = "default-src 'self'; script-src 'self'; style-src 'self'; img-src 'self'; \
                      connect-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; \
                      frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'";

/// A file of the page.
struct File {
    path: &'static str,
    kind: &'static str,
    text: &'static str,
}

/// Colors and fonts as a style sheet, which reports have too.
pub const TOKENS: &str = include_str!("tokens.css");

const HTML: &str = "text/html; charset=utf-8";
const CSS: &str = "text/css; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const PICTURE: &str = "image/svg+xml";

macro_rules! file {
    ($name:literal, $kind:expr) => {
        File {
            path: concat!("/page/", $name),
            kind: $kind,
            text: include_str!($name),
        }
    };
}

/// Every file. The page itself is at the root.
static FILES: [File; 26] = [
    File {
        path: ROOT,
        kind: HTML,
        text: include_str!("index.html"),
    },
    File {
        path: "/page/tokens.css",
        kind: CSS,
        text: TOKENS,
    },
    file!("page.css", CSS),
    file!("machine.css", CSS),
    file!("icon.svg", PICTURE),
    file!("theme.js", SCRIPT),
    file!("main.js", SCRIPT),
    file!("api.js", SCRIPT),
    file!("chart.js", SCRIPT),
    file!("chat.js", SCRIPT),
    file!("colors.js", SCRIPT),
    file!("conversations.js", SCRIPT),
    file!("dom.js", SCRIPT),
    file!("format.js", SCRIPT),
    file!("heatmap.js", SCRIPT),
    file!("inline.js", SCRIPT),
    file!("machine.js", SCRIPT),
    file!("markdown.js", SCRIPT),
    file!("message.js", SCRIPT),
    file!("panels.js", SCRIPT),
    file!("plan.js", SCRIPT),
    file!("settings.js", SCRIPT),
    file!("store.js", SCRIPT),
    file!("tree.js", SCRIPT),
    file!("truth.js", SCRIPT),
    file!("welcome.js", SCRIPT),
];

/// Whether a path is a file of the page, which needs no key.
pub(crate) fn has(path: &str) -> bool {
    FILES.iter().any(|file| file.path == path)
}

/// Returns the routes of this module.
pub(crate) fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    FILES.iter().fold(Router::new(), |router, file| {
        let tag = file.tag();
        let answer = move |headers: HeaderMap| async move { file.answer(&headers, &tag) };
        router.route(file.path, get(answer))
    })
}

impl File {
    /// Returns the file's entity tag, which differs where the text does.
    fn tag(&self) -> HeaderValue {
        let mut hasher = DefaultHasher::new();
        hasher.write(self.text.as_bytes());
        let tag = format!("\"{:016x}\"", hasher.finish());
        HeaderValue::try_from(tag).unwrap_or(HeaderValue::from_static("\"\""))
    }

    /// Answers a request: the file, or that the browser has it.
    fn answer(&self, headers: &HeaderMap, tag: &HeaderValue) -> Response {
        let mut response = if is_known(headers, tag) {
            StatusCode::NOT_MODIFIED.into_response()
        } else {
            let kind = [(header::CONTENT_TYPE, self.kind)];
            (kind, Body::from(self.text)).into_response()
        };
        let headers = response.headers_mut();
        for (name, value) in PROTECTION {
            headers.insert(name, HeaderValue::from_static(value));
        }
        headers.insert(header::ETAG, tag.clone());
        response
    }
}

/// Headers of every file. Browsers ask each time whether a file has changed: its name stays when the
/// program is another one.
const PROTECTION: [(HeaderName, &str); 6] = [
    (header::CONTENT_SECURITY_POLICY, POLICY),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "no-referrer"),
    (header::CACHE_CONTROL, "no-cache"),
    (
        HeaderName::from_static("cross-origin-opener-policy"),
        "same-origin",
    ),
    (
        HeaderName::from_static("cross-origin-resource-policy"),
        "same-origin",
    ),
];

/// Whether a browser has the file with this tag.
fn is_known(headers: &HeaderMap, tag: &HeaderValue) -> bool {
    let Ok(tag) = tag.to_str() else {
        return false;
    };
    let lists = headers.get_all(header::IF_NONE_MATCH).iter();
    let mut tags = lists
        .filter_map(|list| list.to_str().ok())
        .flat_map(|list| list.split(','))
        .map(|one| one.trim());
    tags.any(|one| one == "*" || one.strip_prefix("W/").unwrap_or(one) == tag)
}

#[cfg(test)]
mod tests;
