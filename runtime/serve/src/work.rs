//! The thread that owns the engine: takes requests from the queue, and steps.

use crate::job::{Command, Failure, Job, JobEvent, What};
use crate::live::Recorder;
use crate::log;
use crate::plan::orders;
use crate::state::State;
use crate::traces::Traces;
use crate::truth::{Clock, Snapshot};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};
use tier_plan_runtime::batcher::{Batcher, Event, Step, TextOptions, TextStatus};
use tier_plan_runtime::schedule::{TextId, TextState};
use tier_plan_runtime::{Engine, RunError};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::Sender;

/// How often a thread without work looks whether the server should end.
const POLL: Duration = Duration::from_millis(50);

/// How often it goes on with moving pins and slots.
const POLL_MOVING: Duration = Duration::from_millis(1);

/// What a server has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Texts that ended by themselves.
    pub answered: u64,
    /// Texts whose reader was gone.
    pub abandoned: u64,
    /// Texts that could not go on.
    pub failed: u64,
}

/// A text at work or waiting.
struct Text {
    index: usize,
    events: Sender<JobEvent>,
    /// Whether its tokens are sent together.
    whole: bool,
    /// Tokens that are to be sent together.
    held: Vec<JobEvent>,
    clock: Clock,
    /// Of its request, whose last text gives the places back.
    places: std::sync::Arc<OwnedSemaphorePermit>,
}

/// The texts of all requests.
struct Worker<'s> {
    state: &'s Arc<State>,
    texts: HashMap<TextId, Text>,
    recorder: Recorder,
    traces: Option<&'s mut Traces>,
    summary: Summary,
}

/// Answers requests until the server is to end, and the texts at work are done.
pub(crate) fn work(
    state: &Arc<State>,
    batcher: &mut Batcher<'_>,
    inbox: &Receiver<Command>,
    traces: Option<&mut Traces>,
) -> Summary {
    let mut worker = Worker {
        state,
        texts: HashMap::new(),
        recorder: Recorder::default(),
        traces,
        summary: Summary::default(),
    };
    loop {
        worker.receive(batcher, inbox);
        if state.is_stopping() && (batcher.is_empty() || state.cancel.is_requested()) {
            break;
        }
        worker.leave_abandoned(batcher);
        worker.step(batcher);
    }
    worker.fail_all(batcher, &Failure::Stopping);
    state.live.end();
    // What came while the last step ended.
    while let Ok(command) = inbox.try_recv() {
        if let Command::Generate(job) = command {
            job.fail(&Failure::Stopping);
        }
    }
    worker.summary
}

impl Job {
    fn fail(&self, failure: &Failure) {
        for index in 0..self.n {
            let what = What::Failed(failure.clone());
            let _ = self.events.try_send(JobEvent { index, what });
        }
    }
}

impl Worker<'_> {
    /// Takes what is in the queue. Waits a moment if there is nothing to do.
    fn receive(&mut self, batcher: &mut Batcher<'_>, inbox: &Receiver<Command>) {
        if batcher.is_empty() {
            self.write_traces();
            batcher.engine().continue_rearranging();
            orders::watch(self.state, batcher.engine());
            let is_moving = batcher.engine().rearranging().is_some();
            match inbox.recv_timeout(if is_moving { POLL_MOVING } else { POLL }) {
                Ok(command) => self.take(batcher, command),
                Err(RecvTimeoutError::Timeout) => {}
                // The listener is gone: there is nothing to wait for.
                Err(RecvTimeoutError::Disconnected) => self.state.stop(),
            }
        }
        while let Ok(command) = inbox.try_recv() {
            self.take(batcher, command);
        }
    }

    /// Writes what was recorded, from time to time. A file that cannot be written now may be at the
    /// next time, or at the end.
    fn write_traces(&mut self) {
        if let Some(traces) = &mut self.traces
            && let Err(error) = traces.write_at_rest()
        {
            log::warn(self.state, &error.to_string());
        }
    }

    /// Forgets a text that has ended.
    fn end(&mut self, id: TextId) -> Option<Text> {
        if let Some(traces) = &mut self.traces {
            traces.end(id);
        }
        self.texts.remove(&id)
    }

    fn take(&mut self, batcher: &mut Batcher<'_>, command: Command) {
        match command {
            Command::Status(reply) => {
                let _ = reply.send(batcher.statuses());
            }
            Command::Generate(job) if self.state.is_stopping() => job.fail(&Failure::Stopping),
            Command::Generate(job) => self.begin(batcher, job),
            Command::Replan(order, reply) => {
                let traces = self.traces.as_deref();
                let _ = reply.send(orders::begin(self.state, batcher.engine(), traces, order));
            }
            Command::Planned(planned) => orders::take(self.state, batcher.engine(), planned),
        }
    }

    fn begin(&mut self, batcher: &mut Batcher<'_>, job: Job) {
        let options: &std::sync::Arc<TextOptions> = &job.options;
        let ids = match batcher.submit(options, job.n) {
            Ok(ids) => ids,
            Err(error) => {
                self.summary.failed += job.n as u64;
                job.fail(&Failure::TooLong(error.to_string()));
                return;
            }
        };
        let places = std::sync::Arc::new(job.places);
        for (index, id) in ids.into_iter().enumerate() {
            let text = Text {
                index,
                events: job.events.clone(),
                whole: job.whole,
                held: Vec::new(),
                clock: Clock {
                    received: job.received,
                    begun: None,
                    first: None,
                    before: Snapshot::default(),
                },
                places: std::sync::Arc::clone(&places),
            };
            self.texts.insert(id, text);
        }
    }

    /// Ends texts whose reader is gone.
    fn leave_abandoned(&mut self, batcher: &mut Batcher<'_>) {
        let gone = self
            .texts
            .iter()
            .filter(|(_, text)| text.events.is_closed());
        let gone: Vec<TextId> = gone.map(|(id, _)| *id).collect();
        for id in gone {
            batcher.cancel(id);
            self.end(id);
            self.summary.abandoned += 1;
            self.state.metrics.abandoned();
        }
    }

    /// Takes a step, and sends what came of it.
    fn step(&mut self, batcher: &mut Batcher<'_>) {
        let mut events = Vec::new();
        let mut came = |id, event| events.push((id, Instant::now(), event));
        let result = batcher.step(&mut came);
        if let Some(traces) = &mut self.traces
            && result.as_ref().is_ok_and(|step| !step.canceled)
        {
            traces.record(batcher.routing());
        }
        for (id, at, event) in events {
            self.send(batcher.engine(), at, id, event);
        }
        let step = result.unwrap_or_else(|error| {
            let failure = Failure::Engine(error.to_string());
            self.fail_running(batcher, &failure);
            Step::default()
        });
        self.state.metrics.step(&step);
        self.recorder.count(self.state, batcher, &step);
        orders::watch(self.state, batcher.engine());
        let counters = Snapshot::of(batcher.engine().counters());
        let pages = batcher.pages();
        let (running, waiting) = (batcher.n_running(), batcher.n_waiting());
        self.state
            .metrics
            .engine(&counters, pages, running, waiting);
    }

    fn send(&mut self, engine: &Engine, now: Instant, id: TextId, event: Event) {
        let Some(text) = self.texts.get_mut(&id) else {
            return;
        };
        let (what, ended) = match event {
            Event::Begun { cached } => {
                text.clock.begun = Some(now);
                (What::Begun { cached }, false)
            }
            Event::Drawn(drawn) => {
                if text.clock.first.is_none() {
                    text.clock.first = Some(now);
                    text.clock.before = Snapshot::of(engine.counters());
                }
                let ends = drawn.finish.is_some();
                let timings = ends.then(|| Box::new(text.clock.end(now, engine.counters())));
                self.summary.answered += u64::from(ends);
                (What::Drawn(drawn, timings), ends)
            }
            Event::Failed(error) => {
                self.summary.failed += 1;
                let failure = match error {
                    RunError::ContextFull { .. } | RunError::NoPages { .. } => {
                        Failure::TooLong(error.to_string())
                    }
                    RunError::Grammar(_) => Failure::Grammar(error.to_string()),
                    other => Failure::Engine(other.to_string()),
                };
                (What::Failed(failure), true)
            }
        };
        let index = text.index;
        let event = JobEvent { index, what };
        // The channel has room for all events; where the reader is gone, the text ends before the
        // next step.
        if ended {
            self.send_last(id, event);
        } else if text.whole && matches!(event.what, What::Drawn(..)) {
            // Each event would wake the thread of connections, which takes time from the computation.
            text.held.push(event);
        } else {
            let _ = text.events.try_send(event);
        }
    }

    /// Sends the last event of a text, after those that were held back.
    fn send_last(&mut self, id: TextId, event: JobEvent) {
        let Some(text) = self.end(id) else { return };
        // A client that has its answer may ask again at once, so its place is free by then.
        drop(text.places);
        for event in text.held.into_iter().chain([event]) {
            let _ = text.events.try_send(event);
        }
    }

    /// Fails the texts at work: the others may find the engine well again.
    fn fail_running(&mut self, batcher: &mut Batcher<'_>, failure: &Failure) {
        let is_at_work = |status: &TextStatus| {
            matches!(
                status.state,
                TextState::InPrompt { .. } | TextState::Running
            )
        };
        let statuses = batcher.statuses();
        let at_work = statuses.iter().filter(|status| is_at_work(status));
        let ids: Vec<TextId> = at_work.map(|status| status.id).collect();
        if ids.is_empty() {
            self.fail_all(batcher, failure);
        }
        for id in ids {
            self.fail(batcher, id, failure);
        }
    }

    fn fail_all(&mut self, batcher: &mut Batcher<'_>, failure: &Failure) {
        let ids: Vec<TextId> = self.texts.keys().copied().collect();
        for id in ids {
            self.fail(batcher, id, failure);
        }
    }

    fn fail(&mut self, batcher: &mut Batcher<'_>, id: TextId, failure: &Failure) {
        // After a failed pass, a recurrent state is worth nothing.
        batcher.discard(id);
        if let Some(index) = self.texts.get(&id).map(|text| text.index) {
            self.summary.failed += 1;
            let what = What::Failed(failure.clone());
            self.send_last(id, JobEvent { index, what });
        }
    }
}
