//! Random clients of the server for as long as one likes: no error but a full queue, every text is
//! the one that its request has alone, nothing grows, and every count adds up.
//!
//! The clients ask for whole and for streamed answers at all endpoints, read at once or slowly, and
//! leave at any moment: while they send, while they wait, and while they read. They are more than
//! the queue has places for, and try again after the time that the server names. An hour of another
//! model:
//!
//! ```text
//! SOAK_MINUTES=60 SOAK_MODEL=model.gguf cargo test --release -p tier-plan-planner --test all soak::serve \
//!     -- --ignored --nocapture
//! ```
//!
//! `SOAK_PROGRAM` is another program than the one that was built with the test, and `SOAK_OPTIONS`
//! has further options of `tier-plan serve`. Without variables it is a minute of the bundled model.

mod answers;
mod client;
mod connection;
mod requests;
mod server;

use super::setup::minutes;
use client::{Client, Counts};
use connection::{Connection, Pace};
use requests::Asked;
use serde_json::{Value, json};
use server::{Log, Metrics, Server};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};
use tier_plan_runtime::units::show_bytes;
use tier_plan_testing::Random;

/// Clients at once, each with a connection.
const CONNECTIONS: u64 = 64;

/// Texts at work, and texts that may wait: less than there are clients.
const TEXTS: u64 = 16;
const QUEUE: u64 = 24;

/// Tokens of a text.
const CONTEXT: &str = "2048";

/// Distinct requests.
const REQUESTS: usize = 64;

/// Stack of a client.
const STACK_BYTES: usize = 256 << 10;

/// Memory that may come after the first tenth: what an allocator keeps in fragments, and huge pages
/// that the system makes of what lies beside memory in use.
const GROWTH: u64 = 24 << 20;

/// Longest wait for the last texts to end.
const PATIENCE: Duration = Duration::from_secs(60);

/// Requests, and what clients compare with.
struct Soak {
    port: u16,
    asked: Vec<Asked>,
    /// By request: the answer that it has alone.
    alone: Vec<Value>,
    end: Instant,
    /// Whether a client has found a fault.
    is_broken: AtomicBool,
}

impl Soak {
    fn is_over(&self) -> bool {
        Instant::now() >= self.end || self.is_broken.load(Ordering::Relaxed)
    }

    /// Has all clients ask until the time is over. Returns what they did.
    fn ask(&self) -> Counts {
        thread::scope(|scope| {
            let start = |i| {
                let builder = thread::Builder::new().stack_size(STACK_BYTES);
                let client = Client::new(self, Random(i));
                builder.spawn_scoped(scope, || client.run()).unwrap()
            };
            let clients: Vec<_> = (0..CONNECTIONS).map(start).collect();
            let counts = clients.into_iter().map(|client| client.join());
            let counts: Vec<Counts> = counts
                .map(|counts| counts.unwrap_or_else(|fault| std::panic::resume_unwind(fault)))
                .collect();
            counts.into_iter().fold(Counts::default(), Counts::and)
        })
    }
}

/// What the server's own memory was.
#[derive(Debug, Default, Clone, Copy)]
struct Memory {
    /// Most in the first tenth of the time, in bytes.
    settled: u64,
    most: u64,
}

/// Watches the server's memory until `is_over`.
fn watch(server: &Server, time: Duration, is_over: &AtomicBool) -> Memory {
    let (start, mut said) = (Instant::now(), Instant::now());
    let mut memory = Memory::default();
    while !is_over.load(Ordering::Relaxed) {
        let now = server.resident_bytes();
        if start.elapsed() < time / 10 {
            memory.settled = memory.settled.max(now);
        }
        memory.most = memory.most.max(now);
        if said.elapsed() > Duration::from_secs(60) {
            said = Instant::now();
            let seconds = start.elapsed().as_secs();
            println!("{seconds} s: {}, {}", server.progress(), show_bytes(now));
        }
        thread::sleep(Duration::from_millis(200));
    }
    memory
}

/// Returns the answers to all requests, one after the other, of a server with one text at a time.
fn alone(asked: &[Asked]) -> Vec<Value> {
    let server = Server::start(1, 1, CONTEXT);
    let mut connection = Connection::open(server.port);
    let answers = asked.iter().map(|asked| {
        let text = asked.text(false);
        let answer = connection.exchange(asked.kind.path(), &text, Pace::default());
        let answer = answer.unwrap_or_else(|error| panic!("{error}: {text}"));
        assert_eq!(answer.status, 200, "{}: {text}", answer.text());
        answers::of(asked.kind, &answer)
    });
    let answers = answers.collect();
    drop(connection);
    server.stop();
    answers
}

/// Waits until no text is left, and returns the last metrics.
fn settle(server: &Server) -> Metrics {
    let start = Instant::now();
    let mut before = String::new();
    loop {
        let text = server.get("/metrics");
        let metrics = Metrics::of(&text);
        let left = metrics.get("texts_running") + metrics.get("texts_waiting");
        // The question itself is counted, so that two answers are equal but for that.
        let counts: Vec<&str> = text.lines().filter(|l| !l.contains("/metrics")).collect();
        let now = counts.join("\n");
        if left == 0.0 && now == before {
            return metrics;
        }
        assert!(start.elapsed() < PATIENCE, "texts that do not end: {text}");
        before = now;
        thread::sleep(Duration::from_secs(1));
    }
}

/// Checks that the server counted what its clients did.
fn check(counts: &Counts, metrics: &Metrics, log: &Log) {
    let status = |n: u16| metrics.requests(n);
    let (answered, rejected, left) = (status(200), status(429), status(499));
    println!("server: {answered} answered, {rejected} rejected, {left} left");
    assert_eq!(log.faults, [""; 0], "lines of the log");
    assert_eq!(
        answered + rejected + left,
        metrics.all_requests(),
        "{counts:?}"
    );
    assert_eq!(metrics.get("rejected_total") as u64, rejected);
    // A client that leaves may have been answered, or be one of which the server never heard.
    assert!(answered >= counts.answered && answered + left <= counts.answered + counts.left);
    assert!(rejected >= counts.rejected);
    assert!(answered + rejected + left <= counts.sent, "{counts:?}");
    for (status, n) in [(200, answered), (429, rejected), (499, left)] {
        assert_eq!(log.lines(status), n, "lines of status {status}");
    }
    assert_eq!(log.texts, log.answered_texts + log.abandoned_texts);
    assert_eq!(log.failed_texts, 0);
    assert_eq!(
        metrics.get("abandoned_texts_total") as u64,
        log.abandoned_texts
    );
    let generated = metrics.get("generated_tokens_total") as u64;
    assert!(
        generated >= counts.tokens && generated <= log.tokens,
        "{generated} tokens"
    );
    assert_eq!(
        metrics.get("kv_pages_free"),
        metrics.get("kv_pages"),
        "a page is lost"
    );
}

#[test]
#[ignore = "a minute or more, see the module"]
fn random_clients_of_the_server_have_their_texts_and_leave_nothing_behind() {
    let asked = requests::all(REQUESTS);
    let alone = alone(&asked);
    let server = Server::start(TEXTS, QUEUE, CONTEXT);
    let time = Duration::from_secs_f64(60.0 * minutes());
    let soak = Soak {
        port: server.port,
        asked,
        alone,
        end: Instant::now() + time,
        is_broken: AtomicBool::new(false),
    };
    let is_over = AtomicBool::new(false);
    let (counts, memory) = thread::scope(|scope| {
        let watched = scope.spawn(|| watch(&server, time, &is_over));
        let asked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| soak.ask()));
        is_over.store(true, Ordering::Relaxed);
        let memory = watched.join().unwrap();
        let counts = asked.unwrap_or_else(|fault| std::panic::resume_unwind(fault));
        (counts, memory)
    });
    let metrics = settle(&server);
    let slots: Value = serde_json::from_str(&server.get("/slots")).unwrap();
    let is_idle = |slot: &Value| slot["is_processing"] == false;
    assert!(slots.as_array().unwrap().iter().all(is_idle), "{slots}");
    println!(
        "soak of the server: {counts:?}, {} after a tenth of the time, {} at most",
        show_bytes(memory.settled),
        show_bytes(memory.most)
    );
    // All places are free again: one more text than there are places is refused, as many are not.
    let all = json!({"prompt": "a", "max_tokens": 1, "temperature": 0, "n": TEXTS + QUEUE});
    let mut connection = Connection::open(server.port);
    let answer = connection.exchange("/v1/completions", &all.to_string(), Pace::default());
    assert_eq!(answer.unwrap().status, 200, "a place is lost");
    drop(connection);
    let log = server.stop();
    check(&counts, &metrics, &log.without(TEXTS + QUEUE));
    assert!(
        memory.most <= memory.settled + GROWTH,
        "{} became {}",
        show_bytes(memory.settled),
        show_bytes(memory.most)
    );
    if time >= Duration::from_secs(60) {
        let each = counts.each();
        assert!(each.iter().all(|n| *n > 0), "{counts:?}");
    }
}
