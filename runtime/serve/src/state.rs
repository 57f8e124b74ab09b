//! What connections and the engine's thread share.

use crate::calls::forms::{self, Form};
use crate::grammar::Grammars;
use crate::job::Command;
use crate::live::Live;
use crate::metrics::Metrics;
use crate::plan::{Replan, Replanning};
use crate::prompts::{Chats, Prompts};
use crate::sampled::{Replay, Sampled};
use crate::truth::Promise;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tier_plan_runtime::Cancel;
use tier_plan_runtime::sampler::SamplerConfig;
use tier_plan_runtime::tokenizer::{TokenKind, Tokenizer};
use tokio::sync::Semaphore;

/// Bodies that are checked and tokenized at once.
const MAX_PREPARING: usize = 2;

/// Bodies that are received at once; with [`Limits::max_body_bytes`] this bounds their memory.
const MAX_READING: usize = 16;

/// Bounds of a server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Texts that may wait beside those at work.
    pub max_queue: usize,
    /// Bytes of a body.
    pub max_body_bytes: usize,
    /// Connections at once.
    pub max_connections: usize,
    /// Time for the headers of a request, and of an idle connection.
    pub header_time: Duration,
    /// Time for a body.
    pub body_time: Duration,
    /// Time that texts at work have to end after a signal.
    pub grace: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_queue: 64,
            max_body_bytes: 16 << 20,
            max_connections: 512,
            header_time: Duration::from_secs(30),
            body_time: Duration::from_secs(60),
            grace: Duration::from_secs(5),
        }
    }
}

/// Who may use a server.
#[derive(Clone, Default)]
pub struct Security {
    /// Key that requests must bring; required unless the address is this machine's alone.
    pub api_key: Option<String>,
    /// Origins of web pages that may use the server; `*` is all.
    pub cors: Vec<String>,
}

/// What a server is to do.
#[derive(Clone)]
pub struct Config {
    /// Name of the model in answers.
    pub model: String,
    /// Name of the model's file, without its folder.
    pub file: String,
    /// Bounds.
    pub limits: Limits,
    /// Who may use it.
    pub security: Security,
    /// Sampling options for what requests do not say.
    pub sampling: SamplerConfig,
    /// Most tokens per answer for requests that do not say; the inner `None` is as many as fit.
    pub max_tokens: Option<Option<usize>>,
    /// Whether the log has JSON lines.
    pub json_log: bool,
}

/// What a server needs of the model before its weights are read.
pub struct Setup {
    /// What to do.
    pub config: Config,
    /// The model's tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// The chat template, if there is one.
    pub chats: Option<Arc<dyn Chats + Send + Sync>>,
    /// Size of the model's vocabulary.
    pub n_vocab: usize,
    /// Tokens that a text may have.
    pub context: usize,
    /// Makes plans of what texts choose, where that is recorded.
    pub replan: Option<Arc<dyn Replan>>,
    /// Ends the engine's work.
    pub cancel: Cancel,
    /// Returns whether a signal asked for an end.
    pub should_stop: Box<dyn Fn() -> bool + Send + Sync>,
}

/// What is known once the weights are there.
#[derive(Debug)]
pub(crate) struct Loaded {
    /// Texts at once.
    pub max_texts: usize,
    /// Places of texts at work and waiting.
    pub places: usize,
    promise: Mutex<Arc<Promise>>,
}

impl Loaded {
    /// Returns what the present plan says of itself.
    pub fn promise(&self) -> Arc<Promise> {
        let promise = self.promise.lock();
        Arc::clone(&promise.unwrap_or_else(PoisonError::into_inner))
    }
}

/// See the module.
pub(crate) struct State {
    pub config: Config,
    pub tokenizer: Arc<Tokenizer>,
    pub chats: Option<Arc<dyn Chats + Send + Sync>>,
    pub grammars: Grammars,
    /// How the model calls tools, if that is known.
    pub form: Option<&'static Form>,
    /// Control tokens that must be seen to find calls.
    pub shown: Arc<[u32]>,
    /// Answers with calls, as the model wrote them.
    pub sampled: Sampled,
    pub n_vocab: usize,
    pub context: usize,
    pub cancel: Cancel,
    pub should_stop: Box<dyn Fn() -> bool + Send + Sync>,
    pub metrics: Metrics,
    pub live: Live,
    pub replan: Option<Arc<dyn Replan>>,
    pub replanning: Replanning,
    pub inbox: Sender<Command>,
    /// Places of texts, none before the model is ready.
    pub places: Arc<Semaphore>,
    pub preparing: Semaphore,
    pub reading: Semaphore,
    pub started: Instant,
    loaded: OnceLock<Loaded>,
    stopping: AtomicBool,
    /// Bytes that are loaded, and all of them.
    progress: [AtomicU64; 2],
    next_id: AtomicU64,
    run: u64,
}

/// Returns the control tokens that marks of calls are, in a vocabulary that has such.
fn shown(form: &Form, tokenizer: &Tokenizer) -> Arc<[u32]> {
    let marks: Vec<&str> = form.shown().collect();
    let is_mark = |id: &u32| {
        let is_control = tokenizer.kind(*id) == Some(TokenKind::Control);
        is_control
            && marks
                .iter()
                .any(|mark| mark.as_bytes() == tokenizer.piece(*id))
    };
    (0..tokenizer.n_vocab() as u32).filter(is_mark).collect()
}

impl State {
    pub fn new(setup: Setup, inbox: Sender<Command>) -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let form = setup
            .chats
            .as_ref()
            .and_then(|chats| forms::of_template(chats.source()));
        let run = since.map_or(0, |since| since.as_nanos() as u64) ^ u64::from(std::process::id());
        Self {
            grammars: Grammars::with_form(Arc::clone(&setup.tokenizer), form),
            form,
            shown: form.map_or(Arc::new([]), |form| shown(form, &setup.tokenizer)),
            sampled: Sampled::default(),
            config: setup.config,
            tokenizer: setup.tokenizer,
            chats: setup.chats,
            n_vocab: setup.n_vocab,
            context: setup.context,
            cancel: setup.cancel,
            should_stop: setup.should_stop,
            metrics: Metrics::new(),
            live: Live::new(),
            replan: setup.replan,
            replanning: Replanning::default(),
            inbox,
            places: Arc::new(Semaphore::new(0)),
            preparing: Semaphore::new(MAX_PREPARING),
            reading: Semaphore::new(MAX_READING),
            started: Instant::now(),
            loaded: OnceLock::new(),
            stopping: AtomicBool::new(false),
            progress: [AtomicU64::new(0), AtomicU64::new(0)],
            next_id: AtomicU64::new(0),
            run,
        }
    }

    /// Says that the model is loaded.
    pub fn ready(&self, max_texts: usize, pages: usize, promise: Promise) {
        let places = max_texts.saturating_add(self.config.limits.max_queue);
        let loaded = Loaded {
            max_texts,
            places: places.min(Semaphore::MAX_PERMITS),
            promise: Mutex::new(Arc::new(promise)),
        };
        self.metrics.ready(max_texts, pages, &loaded.promise());
        let places = loaded.places;
        if self.loaded.set(loaded).is_ok() {
            self.places.add_permits(places);
        }
    }

    /// Says what another plan says of itself.
    pub fn promise_anew(&self, promise: Promise) {
        let Some(loaded) = self.loaded.get() else {
            return;
        };
        self.metrics.promise(&promise);
        *loaded
            .promise
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Arc::new(promise);
    }

    pub fn loaded(&self) -> Option<&Loaded> {
        self.loaded.get()
    }

    pub fn set_progress(&self, done: u64, total: u64) {
        self.progress[0].store(done, Ordering::Relaxed);
        self.progress[1].store(total, Ordering::Relaxed);
    }

    /// Returns the share of the model that is loaded, 0 to 1.
    pub fn progress(&self) -> f64 {
        let [done, total] = [0, 1].map(|i| self.progress[i].load(Ordering::Relaxed));
        if total == 0 {
            0.0
        } else {
            (done as f64 / total as f64).min(1.0)
        }
    }

    pub fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
    }

    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Returns how requests become tokens.
    pub fn prompts(&self) -> Prompts<'_> {
        Prompts {
            tokenizer: &self.tokenizer,
            template: self.chats.as_deref().map(|chats| chats as &dyn Chats),
            n_vocab: self.n_vocab,
            context: self.context,
            max_tokens: self.config.max_tokens,
            path: "",
        }
    }

    /// Returns how answers of the model are put back into prompts, if it calls tools.
    pub fn replay(&self) -> Option<Replay<'_>> {
        Some(Replay {
            sampled: &self.sampled,
            form: self.form?,
            shown: &self.shown,
            tokenizer: &self.tokenizer,
        })
    }

    /// Returns the name of a new request, which no other run has.
    pub fn new_id(&self) -> String {
        let number = self.next_id.fetch_add(1, Ordering::Relaxed);
        // An odd factor is a bijection: no two requests of a run share a name.
        let mixed = (self.run.wrapping_add(number)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        format!("{mixed:016x}{number:08x}")
    }
}
