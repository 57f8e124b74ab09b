//! A client that asks, reads, and leaves at random.

use super::connection::{Answer, Connection, Pace, request};
use super::{Soak, answers};
use std::sync::atomic::Ordering;
use std::thread;
use std::time::Duration;
use tier_plan_testing::Random;

/// What clients did.
#[derive(Debug, Default, Clone, Copy)]
pub struct Counts {
    /// Requests, with those that were sent again and those that were broken off.
    pub sent: u64,
    /// Whole texts, or streams, that were what they should be.
    pub answered: u64,
    /// Of those: streams, and answers that were read slowly.
    pub streamed: u64,
    pub slow: u64,
    /// Answers that the queue is full.
    pub rejected: u64,
    /// Requests that the client left: all, and those that it left while it sent, waited, or read.
    pub left: u64,
    pub left_sending: u64,
    pub left_waiting: u64,
    pub left_reading: u64,
    /// Tokens of answers.
    pub tokens: u64,
}

impl Counts {
    pub fn and(self, other: Self) -> Self {
        Self {
            sent: self.sent + other.sent,
            answered: self.answered + other.answered,
            streamed: self.streamed + other.streamed,
            slow: self.slow + other.slow,
            rejected: self.rejected + other.rejected,
            left: self.left + other.left,
            left_sending: self.left_sending + other.left_sending,
            left_waiting: self.left_waiting + other.left_waiting,
            left_reading: self.left_reading + other.left_reading,
            tokens: self.tokens + other.tokens,
        }
    }

    /// Returns all that should happen in a minute.
    pub fn each(&self) -> [u64; 8] {
        [
            self.answered,
            self.streamed,
            self.slow,
            self.rejected,
            self.left_sending,
            self.left_waiting,
            self.left_reading,
            self.tokens,
        ]
    }
}

/// When a client leaves.
#[derive(Debug, Clone, Copy)]
enum Leave {
    Never,
    /// After a share of the request, in thousandths.
    Sending(u64),
    Waiting(Duration),
    Reading(usize),
}

/// A client with its connection.
pub struct Client<'s> {
    soak: &'s Soak,
    draw: Random,
    connection: Option<Connection>,
    counts: Counts,
}

impl Drop for Client<'_> {
    /// Ends all clients if this one found a fault.
    fn drop(&mut self) {
        if thread::panicking() {
            self.soak.is_broken.store(true, Ordering::Relaxed);
        }
    }
}

impl<'s> Client<'s> {
    pub fn new(soak: &'s Soak, draw: Random) -> Self {
        Self {
            soak,
            draw,
            connection: None,
            counts: Counts::default(),
        }
    }

    /// Asks until the time is over.
    pub fn run(mut self) -> Counts {
        while !self.soak.is_over() {
            self.ask();
        }
        self.counts
    }

    /// Asks once, and again while the queue is full.
    fn ask(&mut self) {
        let index = self.draw.below(self.soak.asked.len() as u64) as usize;
        let asked = &self.soak.asked[index];
        let is_streamed = self.draw.below(2) == 0;
        let is_slow = self.draw.below(8) == 0;
        let leave = match self.draw.below(12) {
            0 => Leave::Sending(self.draw.below(1001)),
            1 => Leave::Waiting(Duration::from_millis(self.draw.below(1000))),
            2 => Leave::Reading(1 + self.draw.below(4000) as usize),
            _ => Leave::Never,
        };
        let bytes = request(asked.kind.path(), &asked.text(is_streamed));
        loop {
            let Some(answer) = self.exchange(bytes.as_bytes(), is_slow, leave) else {
                self.connection = None;
                self.counts.left += 1;
                return;
            };
            if answer.status == 429 {
                self.counts.rejected += 1;
                let seconds = answer.retry_after.expect("Retry-After");
                assert!((1..=60).contains(&seconds), "Retry-After: {seconds}");
                if !self.wait(Duration::from_secs(seconds)) {
                    return;
                }
                continue;
            }
            assert_eq!(answer.status, 200, "{}: {asked:?}", answer.text());
            assert_eq!(answer.is_stream, is_streamed, "{asked:?}");
            let texts = answers::of(asked.kind, &answer);
            assert_eq!(
                texts, self.soak.alone[index],
                "{asked:?}, streamed: {is_streamed}"
            );
            self.counts.answered += 1;
            self.counts.streamed += u64::from(is_streamed);
            self.counts.slow += u64::from(is_slow);
            self.counts.tokens += texts["tokens"].as_u64().unwrap();
            return;
        }
    }

    /// Waits, but not longer than the soak lasts. Returns whether it goes on.
    fn wait(&self, mut left: Duration) -> bool {
        while !left.is_zero() && !self.soak.is_over() {
            let part = left.min(Duration::from_millis(100));
            thread::sleep(part);
            left -= part;
        }
        !self.soak.is_over()
    }

    /// Sends a request. Returns the answer, if the client does not leave before.
    fn exchange(&mut self, bytes: &[u8], is_slow: bool, leave: Leave) -> Option<Answer> {
        self.counts.sent += 1;
        // Some clients begin a connection per request.
        let kept = self.connection.take().filter(|c| c.is_open());
        let kept = kept.filter(|_| self.draw.below(4) > 0);
        let mut connection = kept.unwrap_or_else(|| Connection::open(self.soak.port));
        let n = match leave {
            Leave::Sending(share) => bytes.len() * share as usize / 1000,
            _ => bytes.len(),
        };
        connection.send(&bytes[..n]).expect("a request is taken");
        let mut pace = Pace {
            is_slow,
            leave_after: None,
        };
        match leave {
            Leave::Never => {}
            Leave::Sending(_) => {
                self.counts.left_sending += 1;
                return None;
            }
            Leave::Waiting(time) => {
                thread::sleep(time);
                self.counts.left_waiting += 1;
                return None;
            }
            Leave::Reading(n) => pace.leave_after = Some(n),
        }
        match connection.answer(pace) {
            Ok(answer) => {
                self.connection = Some(connection);
                Some(answer)
            }
            Err(error) => {
                assert!(pace.leave_after.is_some(), "{error}");
                self.counts.left_reading += 1;
                None
            }
        }
    }
}
