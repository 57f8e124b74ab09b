//! The server, its log, and its metrics.

use super::connection::{Connection, Pace};
use crate::common::{demo_model, send, tier_plan};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Exit code after SIGTERM.
const TERMINATED: i32 = 143;

/// Longest time that a server without work may take to end.
const ENDING: Duration = Duration::from_secs(30);

/// Lines of faults that are kept.
const MAX_FAULTS: usize = 10;

/// A template with a place for tools, in the manner of Hermes, for models of all kinds.
const TEMPLATE: &str = r#"{% for tool in tools or [] %}{{ tool | tojson }}
{% endfor %}{% for m in messages %}{{ m.role }}: {{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>
{{ {"name": c.function.name, "arguments": c.function.arguments} | tojson }}
</tool_call>{% endfor %}

{% endfor %}assistant:"#;

/// What the log says.
#[derive(Debug, Default, Clone)]
pub struct Log {
    /// Lines by status.
    statuses: BTreeMap<u64, u64>,
    /// Texts of requests that were queued, and their tokens.
    pub texts: u64,
    pub tokens: u64,
    /// Texts, as the last line counts them.
    pub answered_texts: u64,
    pub abandoned_texts: u64,
    pub failed_texts: u64,
    /// Lines that are not as expected.
    pub faults: Vec<String>,
}

impl Log {
    /// Returns the number of requests that generate with this status.
    pub fn lines(&self, status: u64) -> u64 {
        self.statuses.get(&status).copied().unwrap_or(0)
    }

    /// Returns the log without one answered request of `n` texts of one token.
    pub fn without(mut self, n: u64) -> Self {
        *self.statuses.entry(200).or_default() -= 1;
        self.texts -= n;
        self.answered_texts -= n;
        self.tokens -= n;
        self
    }

    fn add(&mut self, line: &str) {
        let Ok(value) = serde_json::from_str::<Value>(line) else {
            self.last(line);
            return;
        };
        if value["method"] != "POST" {
            return;
        }
        let status = value["status"].as_u64().unwrap_or(0);
        *self.statuses.entry(status).or_default() += 1;
        self.texts += value["texts"].as_u64().unwrap_or(0);
        self.tokens += value["timings"]["predicted_n"].as_u64().unwrap_or(0);
        let is_whole = status != 200 || value["complete"] == true;
        if ![200, 429, 499].contains(&status) || !is_whole {
            self.fault(line);
        }
    }

    /// Reads the line of what was done in all.
    fn last(&mut self, line: &str) {
        let words: Vec<&str> = line.split(' ').collect();
        let [answered, "texts", "answered,", left, .., failed, "failed"] = words[..] else {
            return self.fault(line);
        };
        let parsed = [answered, left, failed].map(|word| word.parse().expect(line));
        [self.answered_texts, self.abandoned_texts, self.failed_texts] = parsed;
    }

    fn fault(&mut self, line: &str) {
        if self.faults.len() < MAX_FAULTS {
            self.faults.push(line.to_string());
        }
    }
}

/// Metrics by name and labels, without what all names begin with.
pub struct Metrics(BTreeMap<String, f64>);

impl Metrics {
    pub fn of(text: &str) -> Self {
        let lines = text
            .lines()
            .filter_map(|line| line.strip_prefix("tier_plan_"));
        let pairs = lines.filter_map(|line| line.rsplit_once(' '));
        Self(
            pairs
                .map(|(name, n)| (name.to_string(), n.parse().expect(text)))
                .collect(),
        )
    }

    pub fn get(&self, name: &str) -> f64 {
        *self
            .0
            .get(name)
            .unwrap_or_else(|| panic!("{name} in {:?}", self.0))
    }

    fn sum(&self, is_wanted: impl Fn(&str) -> bool) -> u64 {
        let posts = self.0.iter().filter(|(name, _)| {
            name.starts_with("requests_total{") && name.contains("path=\"/v1/")
        });
        posts
            .filter(|(name, _)| is_wanted(name))
            .map(|(_, n)| *n as u64)
            .sum()
    }

    /// Returns the number of requests that generate with this status.
    pub fn requests(&self, status: u16) -> u64 {
        self.sum(|name| name.contains(&format!("status=\"{status}\"")))
    }

    pub fn all_requests(&self) -> u64 {
        self.sum(|_| true)
    }
}

/// A server that runs.
pub struct Server {
    child: Child,
    pub port: u16,
    log: Arc<Mutex<Log>>,
    reading: Option<JoinHandle<()>>,
    _folder: tempfile::TempDir,
}

impl Server {
    /// Starts a server, and waits until it is ready.
    pub fn start(texts: u64, queue: u64, context: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let template = folder.path().join("template.jinja");
        std::fs::write(&template, TEMPLATE).unwrap();
        let mut command = match std::env::var_os("SOAK_PROGRAM") {
            Some(program) => Command::new(program),
            None => tier_plan(),
        };
        let model = std::env::var_os("SOAK_MODEL").map_or_else(demo_model, Into::into);
        let options = std::env::var("SOAK_OPTIONS").unwrap_or_default();
        command
            .arg("serve")
            .arg(model)
            .args(options.split_whitespace());
        command.args(["--port", "0", "--log-json", "--context", context]);
        command.args(["--parallel", &texts.to_string()]);
        command.args(["--max-queue", &queue.to_string()]);
        command.arg("--chat-template").arg(template);
        let mut child = command
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("SOAK_PROGRAM");
        let mut reader = BufReader::new(child.stderr.take().unwrap());
        let port = ready(&mut reader);
        let log = Arc::new(Mutex::new(Log::default()));
        let shared = Arc::clone(&log);
        // A log that is not read would hold the server up.
        let reading = std::thread::spawn(move || {
            for line in reader.lines() {
                shared.lock().unwrap().add(&line.expect("the log"));
            }
        });
        Self {
            child,
            port,
            log,
            reading: Some(reading),
            _folder: folder,
        }
    }

    /// Returns the body of a page.
    pub fn get(&self, path: &str) -> String {
        let mut connection = Connection::open(self.port);
        let answer = connection.exchange(path, "", Pace::default()).expect(path);
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
        answer.text()
    }

    /// Returns the memory of the server's own.
    pub fn resident_bytes(&self) -> u64 {
        super::super::setup::resident_bytes_of(&self.child.id().to_string())
    }

    /// Returns the requests so far by status.
    pub fn progress(&self) -> String {
        format!("requests by status {:?}", self.log.lock().unwrap().statuses)
    }

    /// Ends the server, which must end well, and returns what its log says.
    pub fn stop(mut self) -> Log {
        let start = Instant::now();
        send("-TERM", &self.child);
        let code = self.child.wait().unwrap().code();
        assert_eq!(code, Some(TERMINATED));
        assert!(start.elapsed() < ENDING, "{:?} to end", start.elapsed());
        if let Some(reading) = self.reading.take() {
            reading.join().unwrap();
        }
        self.log.lock().unwrap().clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Reads the log up to the line that says that the server is ready, and returns its port.
fn ready(reader: &mut impl BufRead) -> u16 {
    let mut begun = String::new();
    while !begun.contains(": ready") {
        let before = begun.len();
        reader.read_line(&mut begun).unwrap();
        assert!(begun.len() > before, "the server ended: {begun}");
    }
    let address = begun.rsplit("http://127.0.0.1:").next().unwrap();
    address.split(':').next().unwrap().parse().expect(address)
}
