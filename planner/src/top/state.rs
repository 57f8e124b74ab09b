//! What is shown: the server's snapshots read, and added up over time. Pure: no clock, no connection.

use crate::printable::printable;
use serde_json::Value;
use std::collections::VecDeque;
use std::time::Duration;

/// Most tiers and texts of a snapshot that are kept. What a server sends is not trusted.
const MAX_TIERS: usize = 16;
const MAX_TEXTS: usize = 256;

/// Largest number that is taken for one.
const MAX_NUMBER: f64 = 1e18;

/// Seconds that rates "now" are averaged over.
const NOW_S: f64 = 2.0;

/// Most windows that those seconds are made of.
const MAX_RECENT: usize = 64;

/// Seconds of history that are kept, one point each.
const MAX_POINTS: usize = 600;

/// Longest time that one window fills in the history.
const MAX_POINTS_PER_WINDOW: usize = 60;

/// A tier in a snapshot.
#[derive(Debug, Clone, PartialEq)]
pub struct Tier {
    /// Its name, printable.
    pub name: String,
    /// Its kind of memory, printable.
    pub kind: String,
    /// Whether its rates are declared, not a machine's.
    pub emulated: bool,
    /// Rate that it has by the machine file, in 10⁹ bytes per second, if that is known.
    pub read_gbps: Option<f64>,
    /// The largest of capacity, budget, and use, in bytes.
    pub size_bytes: u64,
    /// Bytes that the model has there.
    pub used_bytes: u64,
    /// Bytes of weights read per second in the window.
    pub read_bytes_per_s: f64,
    /// Chosen experts that were there in the window.
    pub accesses: u64,
}

/// What a text is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Not begun.
    Waiting,
    /// Its prompt is computed.
    Prompt,
    /// It is generated.
    Generating,
    /// It gave up its pages, and begins again later.
    Preempted,
    /// What another version of the server knows.
    Other,
}

impl Stage {
    /// Returns its name.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Waiting => "waiting",
            Stage::Prompt => "prompt",
            Stage::Generating => "generating",
            Stage::Preempted => "preempted",
            Stage::Other => "other",
        }
    }
}

/// A text in a snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Text {
    /// Its number.
    pub id: u64,
    /// What it is doing.
    pub stage: Stage,
    /// Tokens of its prompt.
    pub n_prompt: u64,
    /// Of these, computed.
    pub n_done: u64,
    /// Tokens generated.
    pub n_decoded: u64,
}

/// How requests ended since the server started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Requests {
    /// Answered.
    pub answered: u64,
    /// Refused: the request was wrong, or lacked the key.
    pub refused: u64,
    /// Refused since the queue was full.
    pub queue_full: u64,
    /// Left by their client.
    pub abandoned: u64,
    /// Failed in the server.
    pub failed: u64,
}

/// A snapshot of the server: one window of time.
#[derive(Debug, Clone, PartialEq)]
pub struct Scene {
    /// The model's name, printable.
    pub model: String,
    /// The plan's name, printable; none from an older server.
    pub plan: Option<String>,
    /// Seconds since the server started.
    pub uptime_s: f64,
    /// Seconds that the counts are of.
    pub window_s: f64,
    /// Tokens generated, and of prompts.
    pub decode_tokens: u64,
    /// Tokens of prompts computed.
    pub prompt_tokens: u64,
    /// Steps that decoded.
    pub decode_steps: u64,
    /// Tokens per second of one text, while steps decode.
    pub text_tok_s: Option<f64>,
    /// What the plan predicts for a text alone.
    pub predicted_tok_s: Option<f64>,
    /// Accesses to experts of decoded tokens that found them in memory.
    pub hits: u64,
    /// Accesses that did not.
    pub misses: u64,
    /// The tiers, fastest first.
    pub tiers: Vec<Tier>,
    /// Free pages of the KV cache.
    pub pages_free: u64,
    /// All pages of the KV cache.
    pub pages_total: u64,
    /// Texts at work.
    pub running: u64,
    /// The most at once.
    pub max_running: u64,
    /// Texts that wait.
    pub waiting: u64,
    /// The most that may wait.
    pub max_waiting: u64,
    /// Texts at work and waiting, the first [`MAX_TEXTS`] of them.
    pub texts: Vec<Text>,
    /// How requests ended; none from an older server.
    pub requests: Option<Requests>,
}

/// Returns a count; 0 for what is none.
fn count(value: &Value) -> u64 {
    value.as_u64().unwrap_or(0)
}

/// Returns a number that is not negative, and small enough that sums and products stay finite.
fn number(value: &Value) -> Option<f64> {
    value.as_f64().filter(|n| (0.0..=MAX_NUMBER).contains(n))
}

fn name(value: &Value) -> String {
    printable(value.as_str().unwrap_or_default()).into_owned()
}

fn list(value: &Value, most: usize) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten().take(most)
}

impl Tier {
    fn read(value: &Value) -> Self {
        let bytes = |key: &str| count(&value[key]);
        let used_bytes = bytes("used_bytes");
        Self {
            name: name(&value["name"]),
            kind: name(&value["kind"]),
            emulated: value["emulated"] == true,
            read_gbps: number(&value["read_gbps"]).filter(|rate| *rate > 0.0),
            size_bytes: used_bytes
                .max(bytes("capacity_bytes"))
                .max(bytes("budget_bytes")),
            used_bytes,
            read_bytes_per_s: number(&value["read_bytes_per_s"]).unwrap_or(0.0),
            accesses: bytes("accesses"),
        }
    }
}

impl Text {
    fn read(value: &Value) -> Self {
        let stage = match value["state"].as_str() {
            Some("waiting") => Stage::Waiting,
            Some("prompt") => Stage::Prompt,
            Some("generating") => Stage::Generating,
            Some("preempted") => Stage::Preempted,
            _ => Stage::Other,
        };
        let n_prompt = count(&value["n_prompt_tokens"]);
        let n_done = match stage {
            Stage::Generating => n_prompt,
            _ => count(&value["n_prompt_done"]).min(n_prompt),
        };
        Self {
            id: count(&value["id"]),
            stage,
            n_prompt,
            n_done,
            n_decoded: count(&value["n_decoded"]),
        }
    }
}

impl Scene {
    /// Reads a snapshot; `None` if it is none.
    pub fn read(value: &Value) -> Option<Self> {
        let (pages, queue) = (&value["pages"], &value["queue"]);
        let requests = |all: &Value| Requests {
            answered: count(&all["answered"]),
            refused: count(&all["refused"]),
            queue_full: count(&all["queue_full"]),
            abandoned: count(&all["abandoned"]),
            failed: count(&all["failed"]),
        };
        Some(Self {
            model: value["model"].is_string().then(|| name(&value["model"]))?,
            plan: value["plan"].is_string().then(|| name(&value["plan"])),
            uptime_s: number(&value["uptime_s"]).unwrap_or(0.0),
            window_s: number(&value["window_s"])?,
            decode_tokens: count(&value["decode_tokens"]),
            prompt_tokens: count(&value["prompt_tokens"]),
            decode_steps: count(&value["decode_steps"]),
            text_tok_s: number(&value["text_tok_s"]).filter(|rate| *rate > 0.0),
            predicted_tok_s: number(&value["predicted_tok_s"]).filter(|rate| *rate > 0.0),
            hits: count(&value["expert_hits"]),
            misses: count(&value["expert_misses"]),
            tiers: list(&value["tiers"], MAX_TIERS).map(Tier::read).collect(),
            pages_free: count(&pages["free"]),
            pages_total: count(&pages["total"]),
            running: count(&queue["running"]),
            max_running: count(&queue["max_running"]),
            waiting: count(&queue["waiting"]),
            max_waiting: count(&queue["max_waiting"]),
            texts: list(&value["texts"], MAX_TEXTS).map(Text::read).collect(),
            requests: value["requests"]
                .is_object()
                .then(|| requests(&value["requests"])),
        })
    }

    /// Whether a tier is emulated.
    pub fn is_emulated(&self) -> bool {
        self.tiers.iter().any(|tier| tier.emulated)
    }

    /// Returns pages of the KV cache in use.
    pub fn pages_used(&self) -> u64 {
        self.pages_total.saturating_sub(self.pages_free)
    }
}

/// Counts of a tier over some windows.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
struct TierSums {
    read_bytes: f64,
    accesses: u64,
}

/// Counts over some windows.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Sums {
    /// Seconds of these windows.
    pub seconds: f64,
    decode_tokens: u64,
    prompt_tokens: u64,
    decode_steps: u64,
    /// Seconds in which texts were decoded.
    decoding_s: f64,
    hits: u64,
    misses: u64,
    tiers: Vec<TierSums>,
}

impl Sums {
    /// Adds a window.
    pub fn add(&mut self, scene: &Scene) {
        self.seconds += scene.window_s;
        let sum = |a: &mut u64, b: u64| *a = a.saturating_add(b);
        sum(&mut self.decode_tokens, scene.decode_tokens);
        sum(&mut self.prompt_tokens, scene.prompt_tokens);
        if let Some(rate) = scene.text_tok_s {
            sum(&mut self.decode_steps, scene.decode_steps);
            self.decoding_s += scene.decode_steps as f64 / rate;
        }
        sum(&mut self.hits, scene.hits);
        sum(&mut self.misses, scene.misses);
        self.tiers.resize(scene.tiers.len(), TierSums::default());
        for (sums, tier) in self.tiers.iter_mut().zip(&scene.tiers) {
            sums.read_bytes += tier.read_bytes_per_s * scene.window_s;
            sum(&mut sums.accesses, tier.accesses);
        }
    }

    fn per_second(&self, n: f64) -> f64 {
        if self.seconds > 0.0 {
            n / self.seconds
        } else {
            0.0
        }
    }

    /// Returns generated tokens per second of all texts.
    pub fn decode_tok_s(&self) -> f64 {
        self.per_second(self.decode_tokens as f64)
    }

    /// Returns tokens of prompts per second.
    pub fn prompt_tok_s(&self) -> f64 {
        self.per_second(self.prompt_tokens as f64)
    }

    /// Returns tokens per second of one text, if any was decoded.
    pub fn text_tok_s(&self) -> Option<f64> {
        (self.decoding_s > 0.0).then(|| self.decode_steps as f64 / self.decoding_s)
    }

    /// Returns the share of accesses to experts that found them in memory, if there were any.
    pub fn hit_rate(&self) -> Option<f64> {
        share(self.hits, self.hits.saturating_add(self.misses))
    }

    /// Returns how fast weights were read from a tier, in 10⁹ bytes per second.
    pub fn read_gbps(&self, tier: usize) -> f64 {
        let bytes = self.tiers.get(tier).map_or(0.0, |sums| sums.read_bytes);
        self.per_second(bytes) / 1e9
    }

    /// Returns the share of chosen experts that were in a tier, if any was chosen.
    pub fn share(&self, tier: usize) -> Option<f64> {
        let all = self.tiers.iter().map(|sums| sums.accesses);
        let all = all.fold(0, u64::saturating_add);
        self.tiers
            .get(tier)
            .and_then(|sums| share(sums.accesses, all))
    }

    fn point(&self) -> Point {
        Point {
            decode_tok_s: self.decode_tok_s(),
            prompt_tok_s: self.prompt_tok_s(),
            hit_rate: self.hit_rate(),
            read_gbps: self.read_gbps(self.tiers.len().saturating_sub(1)),
        }
    }
}

fn share(part: u64, all: u64) -> Option<f64> {
    (all > 0).then(|| part as f64 / all as f64)
}

/// A second of the history.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// Generated tokens per second of all texts.
    pub decode_tok_s: f64,
    /// Tokens of prompts per second.
    pub prompt_tok_s: f64,
    /// Share of accesses to experts that found them in memory.
    pub hit_rate: Option<f64>,
    /// Reads from the last tier, in 10⁹ bytes per second.
    pub read_gbps: f64,
}

/// Whether snapshots come.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Link {
    /// None has come yet.
    #[default]
    Connecting,
    /// They come.
    Live,
    /// None comes any more.
    Lost {
        /// Why, printable and on one line.
        why: String,
        /// Time until the next try.
        retry_in: Duration,
    },
}

/// All that the view shows.
#[derive(Debug, Clone, Default)]
pub struct State {
    /// Where the server is.
    pub url: String,
    /// Whether snapshots come.
    pub link: Link,
    /// The latest snapshot.
    pub scene: Option<Scene>,
    /// Points of the history, the latest last.
    pub points: VecDeque<Point>,
    /// Counts since the first snapshot.
    pub all: Sums,
    /// Whether snapshots are left out.
    pub is_paused: bool,
    /// Whether help is shown instead.
    pub shows_help: bool,
    recent: VecDeque<Scene>,
    second: Sums,
}

impl State {
    /// Creates a view of a server at an address.
    pub fn new(url: &str) -> Self {
        Self {
            url: printable(url).into_owned(),
            ..Self::default()
        }
    }

    /// Takes a snapshot in, unless the view is paused.
    pub fn see(&mut self, scene: Scene) {
        self.link = Link::Live;
        if self.is_paused {
            return;
        }
        self.all.add(&scene);
        self.second.add(&scene);
        if self.second.seconds >= 1.0 {
            let second = std::mem::take(&mut self.second);
            let n = (second.seconds as usize).min(MAX_POINTS_PER_WINDOW);
            self.points.extend(std::iter::repeat_n(second.point(), n));
            let too_many = self.points.len().saturating_sub(MAX_POINTS);
            self.points.drain(..too_many);
        }
        self.recent.push_back(scene.clone());
        let mut seconds: f64 = self.recent.iter().map(|scene| scene.window_s).sum();
        while self.recent.len() > 1 && (seconds > NOW_S || self.recent.len() > MAX_RECENT) {
            seconds -= self.recent.pop_front().map_or(0.0, |scene| scene.window_s);
        }
        self.scene = Some(scene);
    }

    /// Returns the counts of the last [`NOW_S`] seconds.
    pub fn now(&self) -> Sums {
        let mut sums = Sums::default();
        self.recent.iter().for_each(|scene| sums.add(scene));
        sums
    }

    /// Says that no snapshots come any more. What was shown stays, but no rate is of now.
    pub fn lose(&mut self, why: &str, retry_in: Duration) {
        let why = printable(why).into_owned();
        self.link = Link::Lost { why, retry_in };
        self.recent.clear();
        self.second = Sums::default();
    }
}
