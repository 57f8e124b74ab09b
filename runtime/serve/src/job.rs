//! A request on its way through the engine, and what comes back of it.

use crate::error::ApiError;
use crate::plan::Order;
use crate::plan::orders::Planned;
use crate::truth::Timings;
use std::sync::Arc;
use std::time::Instant;
use tier_plan_runtime::batcher::{Drawn, TextOptions, TextStatus};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::Sender;
use tokio::sync::oneshot;

/// What the engine's thread is asked for.
pub(crate) enum Command {
    /// To generate texts.
    Generate(Job),
    /// To tell what it is doing.
    Status(oneshot::Sender<Vec<TextStatus>>),
    /// To have another plan made.
    Replan(Order, oneshot::Sender<Result<(), ApiError>>),
    /// To take a plan that was made.
    Planned(Planned),
}

/// Texts that are wanted.
pub(crate) struct Job {
    pub options: Arc<TextOptions>,
    /// Number of texts.
    pub n: usize,
    /// Whether nothing is sent before the end, so that tokens can come together.
    pub whole: bool,
    /// Has room for every event of the texts.
    pub events: Sender<JobEvent>,
    pub received: Instant,
    /// Its places in the queue, given back when its last text ends.
    pub places: OwnedSemaphorePermit,
}

/// Events that a request of `n` texts of up to `max_new` tokens can have.
pub(crate) fn most_events(n: usize, max_new: usize) -> usize {
    // Beside its tokens, a text begins and may fail.
    n.saturating_mul(max_new.saturating_add(2)).min(1 << 24)
}

/// What happened to a text of a request.
#[derive(Debug)]
pub(crate) struct JobEvent {
    /// Number of the text among those of the request.
    pub index: usize,
    pub what: What,
}

/// See [`JobEvent`].
#[derive(Debug)]
pub(crate) enum What {
    /// It was admitted, with tokens that were not computed.
    Begun { cached: usize },
    /// A token was drawn; the last one of a text comes with its times.
    Drawn(Drawn, Option<Box<Timings>>),
    /// It cannot go on.
    Failed(Failure),
}

/// Why a text cannot go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Failure {
    /// The cache could not hold it, even if it were empty.
    TooLong(String),
    /// Its grammar does not let it go on.
    Grammar(String),
    /// The server is ending.
    Stopping,
    /// The engine failed.
    Engine(String),
}
