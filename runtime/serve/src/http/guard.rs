//! Who may use the server, and the log of every request.
//!
//! A page of a stranger in a browser on this machine can send requests to this machine's servers. It
//! cannot send them without an `Origin`, and a name of its own that it lets point here (DNS rebinding)
//! shows in `Host`. So a server without a key takes only the names of this machine as `Host`, and any
//! server takes only origins that it was told of.

use super::{key, routes};
use crate::ask::{CLIENT_LEFT, HasLog, QUEUED};
use crate::error::{ApiError, Logged, Protocol};
use crate::log::Entry;
use crate::openapi;
use crate::page;
use crate::state::State;
use axum::body::Body;
use axum::extract::{Request, State as Shared};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// Headers that web pages may send.
const ALLOWED_HEADERS: &str =
    "authorization, content-type, x-api-key, anthropic-version, anthropic-beta";

/// Paths that need no key.
const OPEN_PATHS: [&str; 3] = ["/health", "/v1/health", openapi::PATH];

/// A request that has no answer yet.
struct Pending {
    state: Arc<State>,
    method: Method,
    path: String,
    start: Instant,
    /// Whether its line is that of its texts.
    is_queued: Arc<AtomicBool>,
    is_answered: bool,
}

impl Pending {
    /// Counts the request, and writes its line.
    fn write(&self, status: u16, error: Option<&str>) {
        self.state
            .metrics
            .answered(routes::label(&self.path), status);
        Entry {
            method: self.method.as_str(),
            path: &self.path,
            status,
            took: self.start.elapsed(),
            error,
            texts: None,
        }
        .write(&self.state);
    }
}

impl Drop for Pending {
    /// Writes the line of a request whose client left before it was queued.
    fn drop(&mut self) {
        if !self.is_answered && !self.is_queued.load(Ordering::Relaxed) {
            self.write(CLIENT_LEFT, None);
        }
    }
}

/// Lets a request pass if it may, and writes its line.
pub(crate) async fn guard(
    Shared(state): Shared<Arc<State>>,
    request: Request,
    next: Next,
) -> Response {
    let mut pending = Pending {
        state: Arc::clone(&state),
        method: request.method().clone(),
        path: request.uri().path().to_string(),
        start: Instant::now(),
        is_queued: Arc::default(),
        is_answered: false,
    };
    let origin = request.headers().get(header::ORIGIN).cloned();
    let mut response = match check(&state, &request) {
        Err(error) if pending.path.starts_with("/v1/messages") => {
            error.of(Protocol::Anthropic).into_response()
        }
        Err(error) => error.into_response(),
        Ok(()) if pending.method == Method::OPTIONS => preflight(),
        Ok(()) => {
            let is_queued = Arc::clone(&pending.is_queued);
            QUEUED.scope(is_queued, next.run(request)).await
        }
    };
    pending.is_answered = true;
    if let Some(origin) = origin.filter(|origin| is_told(&state, origin)) {
        let headers = response.headers_mut();
        headers.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        headers.insert(header::VARY, HeaderValue::from_static("Origin"));
    }
    if response.extensions().get::<HasLog>().is_none() {
        let error = response.extensions().get::<Logged>();
        let error = error.map(|Logged(message)| message.as_str());
        pending.write(response.status().as_u16(), error);
    }
    response
}

fn preflight() -> Response {
    let headers = [
        (header::ACCESS_CONTROL_ALLOW_METHODS, "GET, POST"),
        (header::ACCESS_CONTROL_ALLOW_HEADERS, ALLOWED_HEADERS),
        (header::ACCESS_CONTROL_MAX_AGE, "600"),
    ];
    (StatusCode::NO_CONTENT, headers, Body::empty()).into_response()
}

fn check(state: &State, request: &Request) -> Result<(), ApiError> {
    let security = &state.config.security;
    let headers = request.headers();
    if security.api_key.is_none() && !host(request).is_some_and(is_this_machine) {
        return Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "host_not_allowed",
            "the Host header does not name this machine, expected localhost or its address; a server for other \
             names needs --api-key",
        ));
    }
    if let Some(origin) = headers.get(header::ORIGIN)
        && !is_told(state, origin)
        && !is_own(origin, host(request))
    {
        return Err(ApiError::new(
            StatusCode::FORBIDDEN,
            "origin_not_allowed",
            "the Origin header names a page that may not use this server; --cors ORIGIN allows it",
        ));
    }
    let path = request.uri().path();
    let is_open =
        OPEN_PATHS.contains(&path) || page::has(path) || request.method() == Method::OPTIONS;
    match &security.api_key {
        Some(expected) if !is_open && !has_key(headers, expected) => Err(ApiError::new(
            StatusCode::UNAUTHORIZED,
            "invalid_api_key",
            "the API key is missing or wrong, expected it as `Authorization: Bearer KEY` or `x-api-key: KEY`",
        )),
        _ => Ok(()),
    }
}

/// Returns the name that a request was sent to.
fn host(request: &Request) -> Option<&str> {
    let mut all = request.headers().get_all(header::HOST).iter();
    let one = all.next()?.to_str().ok()?;
    all.next().is_none().then_some(one)
}

/// Whether the value of a `Host` header is an address, or this machine's own name for itself: no
/// stranger can let those point here.
fn is_this_machine(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => {
            let Some((address, port)) = rest.split_once(']') else {
                return false;
            };
            let is_address = address.parse::<IpAddr>().is_ok();
            return is_address && (port.is_empty() || is_port(port.strip_prefix(':')));
        }
        None => match host.split_once(':') {
            Some((name, port)) if is_port(Some(port)) => name,
            Some(_) => return false,
            None => host,
        },
    };
    let name = name.strip_suffix('.').unwrap_or(name).to_ascii_lowercase();
    name == "localhost" || name.ends_with(".localhost") || name.parse::<IpAddr>().is_ok()
}

fn is_port(port: Option<&str>) -> bool {
    port.is_some_and(|port| port.parse::<u16>().is_ok() && port.bytes().all(|b| b.is_ascii_digit()))
}

/// Whether an origin is the server's own: a page of this server, by the name in `Host`.
fn is_own(origin: &HeaderValue, host: Option<&str>) -> bool {
    let origin = origin
        .to_str()
        .ok()
        .and_then(|origin| origin.split_once("://"));
    origin.is_some_and(|(scheme, name)| {
        matches!(scheme, "http" | "https") && !name.is_empty() && host == Some(name)
    })
}

/// Whether pages of an origin may use the server, since an option names it.
fn is_told(state: &State, origin: &HeaderValue) -> bool {
    let known = &state.config.security.cors;
    known
        .iter()
        .any(|known| known == "*" || known.as_bytes() == origin.as_bytes())
}

fn has_key(headers: &HeaderMap, expected: &str) -> bool {
    let bearer = headers.get(header::AUTHORIZATION).and_then(|value| {
        let (scheme, key) = value.to_str().ok()?.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then_some(key.trim())
    });
    let own = headers.get("x-api-key").and_then(|key| key.to_str().ok());
    [bearer, own]
        .into_iter()
        .flatten()
        .any(|key| key::is_equal(key.as_bytes(), expected.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_machine_pass_without_a_key() {
        for host in [
            "localhost",
            "LOCALHOST:8080",
            "app.localhost:1",
            "127.0.0.1:8080",
            "[::1]:8080",
            "[::1]",
            "192.168.1.7",
            "localhost.:80",
        ] {
            assert!(is_this_machine(host), "{host}");
        }
        for host in [
            "",
            "example.com",
            "localhost.example.com",
            "127.0.0.1.example.com",
            "evil-localhost",
            "localhost:",
            "localhost:99999",
            "localhost:+80",
            "[::1",
            "[::1]x",
            "a@localhost",
            "127.0.0.1:80:80",
        ] {
            assert!(!is_this_machine(host), "{host}");
        }
    }

    #[test]
    fn the_own_origin_is_the_name_in_host() {
        let own = |origin: &'static str, host| is_own(&HeaderValue::from_static(origin), host);
        assert!(own("http://localhost:8080", Some("localhost:8080")));
        assert!(own("https://models.example", Some("models.example")));
        for (origin, host) in [
            ("http://localhost:8081", Some("localhost:8080")),
            ("http://evil.example", Some("localhost:8080")),
            ("null", Some("null")),
            ("http://", Some("")),
            ("file://localhost", Some("localhost")),
            ("http://localhost", None),
        ] {
            assert!(!own(origin, host), "{origin} {host:?}");
        }
    }

    #[test]
    fn a_key_comes_in_either_header() {
        let with = |name: &'static str, value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(name, HeaderValue::from_static(value));
            has_key(&headers, "secret")
        };
        assert!(with("authorization", "Bearer secret"));
        assert!(with("authorization", "bearer  secret"));
        assert!(with("x-api-key", "secret"));
        for value in [
            "secret",
            "Basic secret",
            "Bearer secre",
            "Bearer secret1",
            "Bearer ",
        ] {
            assert!(!with("authorization", value), "{value}");
        }
        assert!(!with("x-api-key", "") && !with("x-other", "secret"));
    }
}
