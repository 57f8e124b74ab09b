//! A client of the hub: listings, byte ranges, redirects, and retries.
//!
//! Redirects are followed here, since the token must not go to another host. Answers may be
//! anything, so lengths are bounded and texts are made printable.

use super::cache::{Settings, is_commit, is_hex};
use super::choose::{Digest, Listed};
use super::name::is_inner_path;
use super::url::{escaped, origin, redirected, shown};
use crate::hint::HintExt;
use crate::printable::printable;
use anyhow::{Context, Error, Result, anyhow, bail, ensure};
use serde_json::Value;
use std::fmt;
use std::io::Read;
use std::time::Duration;
use ureq::http::{HeaderMap, Response};

/// Most bytes of a listing.
const MAX_LISTING_BYTES: u64 = 64 << 20;

/// Most redirects of one request.
const MAX_REDIRECTS: usize = 10;

/// Tries of one request before it fails.
pub const MAX_TRIES: u32 = 6;

/// Longest time that a server may ask to wait for.
const MAX_WAIT: Duration = Duration::from_secs(120);

/// Names of this machine in addresses.
const LOOPBACK: [&str; 3] = ["127.0.0.1", "localhost", "[::1]"];

const CONNECT_TIME: Duration = Duration::from_secs(20);
const ANSWER_TIME: Duration = Duration::from_secs(60);

/// Time without a byte after which a connection counts as lost.
const STALL_TIME: Duration = Duration::from_secs(45);

/// The files of a repository at a commit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listing {
    /// Hash of the commit.
    pub commit: String,
    /// Its files.
    pub files: Vec<Listed>,
}

/// A failure that another try may mend: no connection, or a busy server.
#[derive(Debug)]
pub struct Unreachable(pub(super) String);

impl fmt::Display for Unreachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Unreachable {}

/// A server of models.
pub struct Client {
    endpoint: String,
    token: Option<String>,
    agent: ureq::Agent,
    /// Wait after the first failed try; doubled after each further one.
    pub(super) first_wait: Duration,
}

/// An answer with the bytes asked for, or with all.
pub struct Ranged {
    /// Position of the first byte that comes.
    pub start: u64,
    /// Length of the whole file, if the server says so.
    pub total: Option<u64>,
    /// The bytes.
    pub body: Box<dyn Read>,
}

/// What one request found.
enum Answer {
    Found(Box<Response<ureq::Body>>),
    /// To be asked again, after a time if the server names one.
    Again(String, Option<Duration>),
}

impl Client {
    /// Checks where the server is to be.
    ///
    /// # Errors
    /// When the address or the token cannot be sent in a request.
    pub fn new(settings: &Settings) -> Result<Self> {
        let endpoint = &settings.endpoint;
        let shown = || printable(endpoint);
        let host = origin(endpoint).and_then(|origin| origin.split_once("://"));
        let is_plain =
            endpoint.bytes().all(|b| b.is_ascii_graphic()) && !endpoint.contains(['?', '#']);
        let Some((_, host)) = host.filter(|_| is_plain) else {
            bail!(
                "HF_ENDPOINT: \"{}\", expected an address such as https://example.com",
                shown()
            );
        };
        let fits = |token: &String| token.bytes().all(|b| b.is_ascii_graphic());
        ensure!(
            settings.token.as_ref().is_none_or(fits),
            "HF_TOKEN: a token with other characters, expected visible ASCII without spaces"
        );
        let mut config = ureq::Agent::config_builder()
            .user_agent(concat!("tier-plan/", env!("CARGO_PKG_VERSION")))
            // The lengths that count are those of the file itself.
            .accept_encoding("identity")
            .timeout_connect(Some(CONNECT_TIME))
            .timeout_recv_response(Some(ANSWER_TIME))
            .timeout_per_read(Some(STALL_TIME))
            .http_status_as_error(false)
            .max_redirects(0);
        if LOOPBACK.iter().any(|name| {
            let port = host.strip_prefix(name);
            port.is_some_and(|port| port.is_empty() || port.starts_with(':'))
        }) {
            // A server on this machine is not behind a proxy.
            config = config.proxy(None);
        }
        Ok(Self {
            endpoint: endpoint.clone(),
            token: settings.token.clone(),
            agent: config.build().into(),
            first_wait: Duration::from_secs(1),
        })
    }

    /// Returns the address of a file at a commit.
    pub fn address(&self, repo: &str, commit: &str, path: &str) -> String {
        format!(
            "{}/{repo}/resolve/{commit}/{}",
            self.endpoint,
            escaped(path, true)
        )
    }

    /// Returns what a repository has at a revision.
    ///
    /// # Errors
    /// When there is no answer or no such repository, or the answer is not a listing.
    pub fn listing(&self, repo: &str, revision: &str, tries: u32) -> Result<Listing> {
        let revision = escaped(revision, false);
        let url = format!(
            "{}/api/models/{repo}/revision/{revision}?blobs=true",
            self.endpoint
        );
        let mut response = self.get(&url, None, tries)?;
        let body = response.body_mut().with_config().limit(MAX_LISTING_BYTES);
        let text = body
            .read_to_string()
            .with_context(|| format!("the listing of {repo}"))?;
        let value: Value = serde_json::from_str(&text)
            .with_context(|| format!("the listing of {repo} is not JSON"))?;
        listing(&value).with_context(|| {
            format!(
                "the listing of {repo} has no commit and files, so {} is no hub of models",
                self.endpoint
            )
        })
    }

    /// Gets bytes of a file from `start` on, up to `end` where one is given. The server may send
    /// all of them instead.
    ///
    /// # Errors
    /// When there is no answer after some tries, or the server refuses.
    pub fn range(&self, url: &str, start: u64, end: Option<u64>) -> Result<Option<Ranged>> {
        let last = end.map_or(String::new(), |end| end.saturating_sub(1).to_string());
        let response = self.get(url, Some(&format!("bytes={start}-{last}")), MAX_TRIES)?;
        let status = response.status().as_u16();
        let headers = response.headers();
        let (start, total) = match status {
            206 => {
                let range = text(headers, "content-range").and_then(content_range);
                let (start, total) = range.with_context(|| {
                    format!(
                        "{}: part of a file without Content-Range, expected one",
                        shown(url)
                    )
                })?;
                (start, total)
            }
            416 => return Ok(None),
            _ => (
                0,
                text(headers, "content-length").and_then(|n| n.parse().ok()),
            ),
        };
        Ok(Some(Ranged {
            start,
            total,
            body: Box::new(response.into_body().into_reader()),
        }))
    }

    /// Waits before another try: as long as asked, or longer after each.
    pub fn wait(&self, failures: u32, asked: Option<Duration>) {
        let doubled = self.first_wait * 2u32.pow(failures.saturating_sub(1).min(5));
        std::thread::sleep(asked.unwrap_or(doubled));
    }

    /// Gets an address, with tries as long as the server is busy or cannot be reached.
    fn get(&self, url: &str, range: Option<&str>, tries: u32) -> Result<Response<ureq::Body>> {
        let mut failures = 0;
        loop {
            match self.once(url, range)? {
                Answer::Found(response) => return Ok(*response),
                Answer::Again(why, wait) => {
                    failures += 1;
                    if failures >= tries || wait.is_some_and(|wait| wait > MAX_WAIT) {
                        let asks = wait.map_or(String::new(), |wait| {
                            format!(", and asks to wait for {} s", wait.as_secs())
                        });
                        let times = if failures == 1 { "try" } else { "tries" };
                        let why = format!("{}: {why}{asks}, after {failures} {times}", shown(url));
                        return Err(Unreachable(why).into());
                    }
                    self.wait(failures, wait);
                }
            }
        }
    }

    /// Makes one request and follows its redirects.
    fn once(&self, url: &str, range: Option<&str>) -> Result<Answer> {
        let mut at = url.to_string();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.agent.get(&at);
            if let Some(range) = range {
                request = request.header("range", range);
            }
            let is_ours = origin(&at).is_some_and(|o| Some(o) == origin(&self.endpoint));
            if let Some(token) = self.token.as_ref().filter(|_| is_ours) {
                request = request.header("authorization", format!("Bearer {token}"));
            }
            let response = match request.call() {
                Ok(response) => response,
                Err(ureq::Error::BadUri(_) | ureq::Error::Http(_)) => {
                    bail!("{}: not an address that can be asked", shown(&at))
                }
                Err(error) => {
                    return Ok(Answer::Again(
                        printable(&error.to_string()).into_owned(),
                        None,
                    ));
                }
            };
            let status = response.status().as_u16();
            match status {
                200 | 206 | 416 => return Ok(Answer::Found(Box::new(response))),
                301 | 302 | 303 | 307 | 308 => {
                    let location = text(response.headers(), "location").with_context(|| {
                        format!("{}: a redirect without an address", shown(&at))
                    })?;
                    at = redirected(&at, location)?;
                }
                408 | 425 | 429 | 500..=599 => {
                    let after = text(response.headers(), "retry-after");
                    let wait = after
                        .and_then(|s| s.trim().parse().ok())
                        .map(Duration::from_secs);
                    return Ok(Answer::Again(format!("status {status}"), wait));
                }
                _ => return Err(self.refusal(url, status, response.headers(), is_ours)),
            }
        }
        bail!("{}: more than {MAX_REDIRECTS} redirects", shown(url))
    }

    /// Returns the error of a status that another try does not change.
    fn refusal(&self, url: &str, status: u16, headers: &HeaderMap, is_ours: bool) -> Error {
        let said = text(headers, "x-error-message").map(printable);
        let said = said.map_or(String::new(), |said| format!(": {said}"));
        let error = anyhow!("{}: status {status}{said}", shown(url));
        let hint = match status {
            401 | 403 if !is_ours => "the address may have expired; run the same command again",
            401 | 403 if self.token.is_none() => {
                "check the name; for a private or gated model set HF_TOKEN to a token, and accept the license on the \
                 model's page"
            }
            401 | 403 => {
                "check the name, accept the license on the model's page, and see whether the token in HF_TOKEN may read it"
            }
            404 => "check the names of repository, file, and revision",
            _ => "see whether HF_ENDPOINT is the address of a hub of models",
        };
        match Err::<(), _>(error).hint(hint) {
            Err(error) => error,
            Ok(()) => anyhow!("status {status}"),
        }
    }
}

fn text<'h>(headers: &'h HeaderMap, name: &str) -> Option<&'h str> {
    headers.get(name)?.to_str().ok()
}

/// Returns first position and total of `bytes 5-9/10`.
fn content_range(value: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = value.trim().strip_prefix("bytes ")?.split_once('/')?;
    let (start, _) = range.split_once('-')?;
    let total = match total.trim() {
        "*" => None,
        total => Some(total.parse().ok()?),
    };
    Some((start.trim().parse().ok()?, total))
}

/// Reads a listing; files whose paths lead elsewhere are left out.
fn listing(value: &Value) -> Option<Listing> {
    let commit = value["sha"].as_str().filter(|sha| is_commit(sha))?;
    let file = |entry: &Value| {
        let path = entry["rfilename"]
            .as_str()
            .filter(|path| is_inner_path(path))?;
        let hex = |value: &Value, len| {
            let text = value
                .as_str()
                .filter(|hex: &&str| hex.len() == len && is_hex(hex));
            text.map(str::to_string)
        };
        let lfs = &entry["lfs"];
        let sha256 = hex(&lfs["sha256"], 64).or_else(|| hex(&lfs["oid"], 64));
        Some(Listed {
            path: path.to_string(),
            bytes: entry["size"].as_u64().or_else(|| lfs["size"].as_u64())?,
            digest: match sha256 {
                Some(hex) => Some(Digest::Sha256(hex)),
                None => hex(&entry["blobId"], 40).map(Digest::Git),
            },
        })
    };
    Some(Listing {
        commit: commit.to_string(),
        files: value["siblings"]
            .as_array()?
            .iter()
            .filter_map(file)
            .collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn ranges_are_read_strictly() {
        assert_eq!(content_range("bytes 5-9/10"), Some((5, Some(10))));
        assert_eq!(content_range("bytes 5-9/*"), Some((5, None)));
        for bad in [
            "",
            "bytes",
            "bytes */10",
            "5-9/10",
            "bytes 5-9",
            "bytes a-9/10",
            "bytes 5-9/x",
        ] {
            assert_eq!(content_range(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_listing_keeps_only_files_that_stay_inside() {
        let sha = "ab".repeat(32);
        let value = json!({
            "sha": "0".repeat(40),
            "siblings": [
                {"rfilename": "a/m.gguf", "size": 5, "blobId": "c".repeat(40), "lfs": {"sha256": sha, "size": 5}},
                {"rfilename": "README.md", "size": 2, "blobId": "c".repeat(40)},
                {"rfilename": "odd.gguf", "size": 2, "lfs": {"sha256": "../../x"}},
                {"rfilename": "../../.bashrc", "size": 1},
                {"rfilename": "/etc/passwd", "size": 1},
                {"rfilename": "a\\b.gguf", "size": 1},
                {"rfilename": "no-size.gguf"},
                {"rfilename": 5, "size": 1},
                7
            ],
        });
        let found = listing(&value).unwrap();
        let paths: Vec<&str> = found.files.iter().map(|f| f.path.as_str()).collect();
        assert_eq!(paths, ["a/m.gguf", "README.md", "odd.gguf"]);
        assert_eq!(found.files[0].digest, Some(Digest::Sha256(sha)));
        assert_eq!(found.files[1].digest, Some(Digest::Git("c".repeat(40))));
        assert_eq!(found.files[2].digest, None);
        for bad in [
            json!(null),
            json!({"sha": "x", "siblings": []}),
            json!({"sha": "0".repeat(40)}),
        ] {
            assert_eq!(listing(&bad), None);
        }
    }
}
