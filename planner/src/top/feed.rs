//! A connection to the server: a thread that reads snapshots as they come.

use super::state::Scene;
use crate::client::{Client, Opened};
use anyhow::{Context, Error, Result, bail, ensure};
use serde_json::Value;
use std::io::{BufRead, Read};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

/// Path of the stream.
const PATH: &str = "/tier-plan/live";

/// Most bytes of a line of the stream. A snapshot of a large model has some 400 KB.
const MAX_LINE_BYTES: u64 = 16 << 20;

/// Longest time without a sign of life, which the server gives every 10 seconds.
const QUIET: Duration = Duration::from_secs(25);

/// Snapshots that may wait to be shown.
const MAX_WAITING: usize = 16;

/// Times until the next tries after a connection was lost; the last one is that of all others.
const RETRIES: [Duration; 4] = [
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(5),
];

/// What the thread says.
#[derive(Debug)]
enum News {
    Scene(Box<Scene>),
    /// The connection is lost, for a reason that may go away.
    Lost(Error),
    /// The server refuses, and will do so again.
    Refused(Error),
}

/// What a look at the connection brings.
#[derive(Debug)]
pub enum Seen {
    /// A snapshot.
    Scene(Box<Scene>),
    /// The connection is lost; the next try is after this time.
    Lost {
        /// Why.
        why: Error,
        /// Time until the next try.
        retry_in: Duration,
    },
    /// The time until the next try.
    Waiting(Duration),
}

/// A connection that is made again when it is lost.
pub struct Feed {
    client: Arc<Client>,
    news: Option<Receiver<News>>,
    n_lost: usize,
    retry_at: Instant,
}

impl Feed {
    /// Creates a connection, which the first look makes.
    pub fn new(client: Client) -> Self {
        Self {
            client: Arc::new(client),
            news: None,
            n_lost: 0,
            retry_at: Instant::now(),
        }
    }

    /// Returns what has come, without waiting; `None` if nothing has.
    ///
    /// # Errors
    /// When the server refuses, and would refuse again; when the system allows no thread.
    pub fn look(&mut self) -> Result<Option<Seen>> {
        self.wait(Duration::ZERO)
    }

    /// Waits up to `time` for news, and returns them.
    ///
    /// # Errors
    /// As [`look`](Self::look).
    pub fn wait(&mut self, time: Duration) -> Result<Option<Seen>> {
        let Some(news) = &self.news else {
            let wait = self.retry_at.saturating_duration_since(Instant::now());
            if wait.is_zero() {
                self.news = Some(start(&self.client)?);
                return Ok(None);
            }
            std::thread::sleep(wait.min(time));
            return Ok(Some(Seen::Waiting(wait)));
        };
        match news.recv_timeout(time) {
            Ok(news) => self.take(news).map(Some),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => bail!("the thread of the connection has ended"),
        }
    }

    fn take(&mut self, news: News) -> Result<Seen> {
        match news {
            News::Scene(scene) => {
                self.n_lost = 0;
                Ok(Seen::Scene(scene))
            }
            News::Refused(error) => Err(error),
            News::Lost(why) => {
                self.news = None;
                let retry_in = retry_after(self.n_lost);
                self.n_lost += 1;
                self.retry_at = Instant::now() + retry_in;
                Ok(Seen::Lost { why, retry_in })
            }
        }
    }
}

/// Returns the time until the next try, after this many that failed in a row.
fn retry_after(n_lost: usize) -> Duration {
    RETRIES[n_lost.min(RETRIES.len() - 1)]
}

/// Starts a thread that connects once. It ends with the connection, or once its news go nowhere.
fn start(client: &Arc<Client>) -> Result<Receiver<News>> {
    let (sender, receiver) = sync_channel(MAX_WAITING);
    let client = Arc::clone(client);
    let run = move || {
        let last = match connect(&client, &sender) {
            Ok(last) => last,
            Err(error) => News::Lost(error),
        };
        // The receiver has gone where the program ends.
        let _ = sender.send(last);
    };
    let thread = std::thread::Builder::new().name("live".into());
    thread
        .spawn(run)
        .context("starting the thread of a connection")?;
    Ok(receiver)
}

fn connect(client: &Client, news: &SyncSender<News>) -> Result<News> {
    let mut stream = match client.open(PATH, QUIET)? {
        Opened::Stream(stream) => stream,
        // The model is loading, or the server is busy or ending.
        Opened::Refused { status, error } if status >= 500 => return Ok(News::Lost(error)),
        Opened::Refused { error, .. } => return Ok(News::Refused(error)),
    };
    while let Some(value) = next_event(&mut stream)? {
        let scene = Scene::read(&value).context("the server sent something else than snapshots")?;
        if news.send(News::Scene(Box::new(scene))).is_err() {
            break;
        }
    }
    bail!("the server has ended the connection")
}

/// Reads the next event; `None` is the end of the stream.
fn next_event(stream: &mut impl BufRead) -> Result<Option<Value>> {
    loop {
        let mut line = Vec::new();
        let mut bounded = stream.by_ref().take(MAX_LINE_BYTES);
        bounded
            .read_until(b'\n', &mut line)
            .context("reading snapshots")?;
        if line.is_empty() {
            return Ok(None);
        }
        ensure!(
            line.ends_with(b"\n") || (line.len() as u64) < MAX_LINE_BYTES,
            "a snapshot: more than {MAX_LINE_BYTES} bytes"
        );
        // Other lines are signs of life, or end an event.
        if let Some(data) = line.strip_prefix(b"data: ") {
            return serde_json::from_slice(data)
                .map(Some)
                .context("a snapshot that is no JSON");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn events_are_read_and_signs_of_life_passed_over() {
        let mut stream = &b": waiting\n\ndata: {\"a\": 1}\n\n: waiting\n\ndata: [2]\n\n"[..];
        assert_eq!(next_event(&mut stream).unwrap(), Some(json!({ "a": 1 })));
        assert_eq!(next_event(&mut stream).unwrap(), Some(json!([2])));
        assert_eq!(next_event(&mut stream).unwrap(), None);
        assert!(next_event(&mut &b"data: {\n"[..]).is_err());
    }

    #[test]
    fn a_line_without_an_end_is_bounded() {
        let mut endless = std::io::BufReader::new(std::io::repeat(b'x'));
        let error = next_event(&mut endless).unwrap_err();
        assert!(error.to_string().contains("more than"), "{error}");
    }

    #[test]
    fn the_wait_between_tries_grows_to_a_bound() {
        let waits: Vec<_> = (0..6).map(retry_after).collect();
        assert!(waits.is_sorted(), "{waits:?}");
        assert_eq!((waits[4], waits[5]), (waits[3], RETRIES[3]));
        assert_eq!(retry_after(usize::MAX), RETRIES[3]);
    }
}
