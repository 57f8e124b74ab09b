//! Asks a running `tier-plan serve`.

use crate::hint::{HintExt, hinted};
use crate::printable::printable;
use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;
use std::io::BufReader;
use std::time::Duration;

/// Most bytes of an answer.
const MAX_ANSWER_BYTES: u64 = 64 << 20;

/// Time for a connection, and for an answer.
const CONNECT_TIME: Duration = Duration::from_secs(5);
const ANSWER_TIME: Duration = Duration::from_secs(60);

/// What comes of asking for a stream.
pub enum Opened {
    /// The body, read as it comes.
    Stream(BufReader<ureq::BodyReader<'static>>),
    /// The server refuses.
    Refused {
        /// Its status.
        status: u16,
        /// What it says.
        error: anyhow::Error,
    },
}

/// A server, and the key that it wants.
pub struct Client {
    url: String,
    key: Option<String>,
    agent: ureq::Agent,
}

impl Client {
    /// Checks where a server is to be.
    ///
    /// # Errors
    /// When `url` is none of a server that this program speaks with.
    pub fn new(url: &str, key: Option<&str>) -> Result<Self> {
        let shown = || printable(url);
        ensure!(
            !url.starts_with("https://"),
            "--url: {}, expected one with http://, since this program speaks no TLS",
            shown()
        );
        let host = url.strip_prefix("http://").unwrap_or_default();
        let is_plain = url.bytes().all(|b| b.is_ascii_graphic()) && !url.contains(['?', '#', '@']);
        ensure!(
            !host.is_empty() && !host.starts_with('/') && is_plain,
            "--url: \"{}\", expected a server such as http://127.0.0.1:8080",
            shown()
        );
        let config = ureq::Agent::config_builder()
            .timeout_connect(Some(CONNECT_TIME))
            .timeout_global(Some(ANSWER_TIME))
            .http_status_as_error(false)
            .max_redirects(0)
            // A server on this machine is not behind a proxy.
            .proxy(None);
        Ok(Self {
            url: url
                .trim_end_matches('/')
                .trim_end_matches("/v1")
                .to_string(),
            key: key.map(ToString::to_string),
            agent: config.build().into(),
        })
    }

    /// Returns where the server is, without a path.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Returns the key.
    pub fn key(&self) -> Option<&str> {
        self.key.as_deref()
    }

    /// Gets what is at a path.
    ///
    /// # Errors
    /// When there is no server, or it refuses.
    pub fn get(&self, path: &str) -> Result<Value> {
        let mut request = self.agent.get(format!("{}{path}", self.url));
        if let Some(key) = &self.key {
            request = request.header("x-api-key", key);
        }
        self.answer(path, request.call())
    }

    /// Opens a stream of events. Where nothing comes for the time `quiet`, reading it fails.
    ///
    /// # Errors
    /// When there is no server.
    pub fn open(&self, path: &str, quiet: Duration) -> Result<Opened> {
        let mut request = self.agent.get(format!("{}{path}", self.url));
        if let Some(key) = &self.key {
            request = request.header("x-api-key", key);
        }
        let request = request.header("accept", "text/event-stream").config();
        let request = request
            .timeout_global(None)
            .timeout_recv_response(Some(ANSWER_TIME))
            .timeout_per_read(Some(quiet));
        let answer = request.build().call();
        match answer {
            Ok(answer) if answer.status().is_success() => {
                let reader = answer.into_body().into_reader();
                Ok(Opened::Stream(BufReader::new(reader)))
            }
            other => {
                let (status, value) = self.read(path, other)?;
                let error = self.refusal(path, status, value.as_ref());
                Ok(Opened::Refused { status, error })
            }
        }
    }

    /// Gets what is at a path, whatever the server answers: its status, and the body, null where that
    /// is not JSON.
    ///
    /// # Errors
    /// When there is no server.
    pub fn look(&self, path: &str) -> Result<(u16, Value)> {
        let request = self.agent.get(format!("{}{path}", self.url));
        let (status, value) = self.read(path, request.call())?;
        Ok((status, value.unwrap_or_default()))
    }

    /// Posts a body to a path.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub fn post(&self, path: &str, body: &Value) -> Result<Value> {
        let mut request = self.agent.post(format!("{}{path}", self.url));
        if let Some(key) = &self.key {
            request = request.header("x-api-key", key);
        }
        let request = request.header("content-type", "application/json");
        self.answer(path, request.send(body.to_string()))
    }

    /// Returns the status of an answer, and the body, if that is JSON.
    fn read(
        &self,
        path: &str,
        answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    ) -> Result<(u16, Option<Value>)> {
        let mut answer = answer
            .with_context(|| format!("no answer from a server at {}", printable(&self.url)))
            .hint("start one with `tier-plan serve MODEL`, or pass its --url")?;
        let body = answer.body_mut().with_config().limit(MAX_ANSWER_BYTES);
        let text = body
            .read_to_string()
            .with_context(|| format!("the answer of {}{path}", printable(&self.url)))?;
        let value = serde_json::from_str::<Value>(&text).ok();
        Ok((answer.status().as_u16(), value))
    }

    /// Returns the body of an answer, or what the server says is wrong.
    fn answer(
        &self,
        path: &str,
        answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>,
    ) -> Result<Value> {
        let (status, value) = self.read(path, answer)?;
        if (200..300).contains(&status) {
            return value.with_context(|| {
                let url = printable(&self.url);
                format!("{url}{path}: the answer is not JSON, so this is no server of tier-plan")
            });
        }
        Err(self.refusal(path, status, value.as_ref()))
    }

    /// Returns what the server says is wrong.
    fn refusal(&self, path: &str, status: u16, value: Option<&Value>) -> anyhow::Error {
        let said = value.and_then(|value| value["error"]["message"].as_str());
        let said = said.map_or_else(
            || format!("status {status}"),
            |said| printable(said).into_owned(),
        );
        match status {
            401 => hinted(
                anyhow!("the server wants a key: {said}"),
                "pass --api-key KEY, or set TIER_PLAN_API_KEY",
            ),
            404 | 405 => anyhow!(
                "{}{path}: {said}; is it an older server, or another program?",
                printable(&self.url)
            ),
            _ => anyhow!("the server refuses: {said}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_checked() {
        for url in [
            "http://127.0.0.1:8080",
            "http://[::1]:8080/",
            "http://box/v1",
            "http://box/v1/",
        ] {
            let client = Client::new(url, None).unwrap_or_else(|e| panic!("{url}: {e}"));
            assert!(
                !client.url().ends_with('/') && !client.url().ends_with("/v1"),
                "{url}"
            );
        }
        for url in [
            "",
            "127.0.0.1:8080",
            "http://",
            "http:///x",
            "https://box",
            "http://a b",
            "http://u@box",
            "ftp://box",
        ] {
            assert!(Client::new(url, None).is_err(), "{url}");
        }
    }

    #[test]
    fn no_server_is_an_error_with_advice() {
        // A port that was free a moment ago.
        let port = std::net::TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let client = Client::new(&format!("http://127.0.0.1:{port}"), None).unwrap();
        let error = client.get("/plan").unwrap_err();
        assert!(
            error
                .to_string()
                .contains("no answer from a server at http://127.0.0.1")
        );
        let hint = crate::hint::hint_for(&error).unwrap();
        assert!(hint.contains("tier-plan serve"), "{hint}");
    }
}
