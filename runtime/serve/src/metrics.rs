//! Metrics in Prometheus' text form.

use crate::outcomes::Outcomes;
use crate::truth::{Promise, Snapshot, Timings};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tier_plan_runtime::batcher::Step;
use tier_plan_runtime::schedule::Pages;

type Labels = Vec<(String, String)>;
type Seconds = Gauge<f64, AtomicU64>;

/// Weight of the last request in the mean time of requests.
const LATEST: f64 = 0.2;

/// What the server counts.
pub(crate) struct Metrics {
    registry: Mutex<Registry>,
    outcomes: Arc<Outcomes>,
    abandoned: Counter,
    prompt_tokens: Counter,
    cached_tokens: Counter,
    generated_tokens: Counter,
    queue: Histogram,
    first_token: Histogram,
    per_token: Histogram,
    steps: Counter,
    step_seconds: Histogram,
    preempted: Counter,
    running: Gauge,
    waiting: Gauge,
    max_texts: Gauge,
    pages: Gauge,
    pages_free: Gauge,
    expert_accesses: Family<Labels, Gauge<u64, AtomicU64>>,
    read_bytes: Family<Labels, Gauge<u64, AtomicU64>>,
    predicted: Seconds,
    emulated: Gauge,
    tiers: Mutex<Vec<String>>,
    /// Mean seconds of a request.
    mean_s: Mutex<Option<f64>>,
}

fn seconds(start: f64, n: u16) -> Histogram {
    Histogram::new(exponential_buckets(start, 2.0, n))
}

pub(crate) fn locked<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Metrics {
    pub fn new() -> Self {
        let metrics = Self {
            registry: Mutex::new(Registry::with_prefix("tier_plan")),
            outcomes: Arc::default(),
            abandoned: Counter::default(),
            prompt_tokens: Counter::default(),
            cached_tokens: Counter::default(),
            generated_tokens: Counter::default(),
            queue: seconds(0.001, 18),
            first_token: seconds(0.001, 18),
            per_token: seconds(0.001, 14),
            steps: Counter::default(),
            step_seconds: seconds(0.001, 14),
            preempted: Counter::default(),
            running: Gauge::default(),
            waiting: Gauge::default(),
            max_texts: Gauge::default(),
            pages: Gauge::default(),
            pages_free: Gauge::default(),
            expert_accesses: Family::default(),
            read_bytes: Family::default(),
            predicted: Gauge::default(),
            emulated: Gauge::default(),
            tiers: Mutex::default(),
            mean_s: Mutex::default(),
        };
        metrics.register_requests();
        metrics.register_engine();
        metrics
    }

    fn register_requests(&self) {
        let mut r = locked(&self.registry);
        r.register_collector(Box::new(self.outcomes.clone()));
        let abandoned = self.abandoned.clone();
        r.register("abandoned_texts", "Texts whose client left", abandoned);
        let tokens = self.prompt_tokens.clone();
        r.register("prompt_tokens", "Tokens of prompts", tokens);
        let tokens = self.cached_tokens.clone();
        r.register(
            "cached_tokens",
            "Tokens of prompts that were not computed, since the KV cache had them",
            tokens,
        );
        let tokens = self.generated_tokens.clone();
        r.register("generated_tokens", "Tokens generated", tokens);
        for (name, help, histogram) in [
            ("queue", "Time from a request to its admission", &self.queue),
            (
                "first_token",
                "Time from a request to its first token",
                &self.first_token,
            ),
            (
                "token",
                "Mean time of a text between two tokens",
                &self.per_token,
            ),
            ("step", "Time of a step", &self.step_seconds),
        ] {
            r.register_with_unit(name, help, Unit::Seconds, histogram.clone());
        }
    }

    fn register_engine(&self) {
        let mut r = locked(&self.registry);
        r.register("steps", "Steps of the engine", self.steps.clone());
        let preempted = self.preempted.clone();
        r.register(
            "preempted_texts",
            "How often a text gave up its pages",
            preempted,
        );
        for (name, help, gauge) in [
            ("texts_running", "Texts at work", &self.running),
            ("texts_waiting", "Texts that wait", &self.waiting),
            ("texts_max", "Texts at once at most", &self.max_texts),
            ("kv_pages", "Pages of the KV cache", &self.pages),
            (
                "kv_pages_free",
                "Pages that no text uses; kept texts may be in them",
                &self.pages_free,
            ),
        ] {
            r.register(name, help, gauge.clone());
        }
        r.register(
            "expert_accesses",
            "Accesses to experts while decoding since the start, by result",
            self.expert_accesses.clone(),
        );
        r.register_with_unit(
            "read",
            "Weights read while decoding since the start, by tier",
            Unit::Bytes,
            self.read_bytes.clone(),
        );
        r.register(
            "predicted_tokens_per_second",
            "What the plan predicts for a text alone; 0 where it does not",
            self.predicted.clone(),
        );
        r.register(
            "emulated",
            "Whether a tier is emulated, so that measured speeds are not those of a machine",
            self.emulated.clone(),
        );
    }

    /// Returns the metrics as text.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = encode(&mut text, &locked(&self.registry));
        text
    }

    pub fn ready(&self, max_texts: usize, pages: usize, promise: &Promise) {
        self.max_texts.set(max_texts as i64);
        self.pages.set(pages as i64);
        self.pages_free.set(pages as i64);
        self.promise(promise);
    }

    /// Says what the plan says of itself.
    pub fn promise(&self, promise: &Promise) {
        self.predicted.set(promise.decode_tok_s.unwrap_or(0.0));
        self.emulated.set(promise.emulated.into());
        locked(&self.tiers).clone_from(&promise.tiers);
    }

    pub fn answered(&self, path: &'static str, status: u16) {
        self.outcomes.count(path, status);
    }

    /// Returns how requests ended.
    pub fn outcomes(&self) -> &Outcomes {
        &self.outcomes
    }

    pub fn abandoned(&self) {
        self.abandoned.inc();
    }

    pub fn prompt(&self, tokens: usize, cached: usize) {
        self.prompt_tokens.inc_by(tokens as u64);
        self.cached_tokens.inc_by(cached as u64);
    }

    pub fn text_ended(&self, timings: &Timings, new: usize) {
        self.generated_tokens.inc_by(new as u64);
        self.queue.observe(timings.queue.as_secs_f64());
        let first = timings.queue + timings.prompt;
        self.first_token.observe(first.as_secs_f64());
        if let Some(rate) = timings.decode_tok_s(new) {
            self.per_token.observe(1.0 / rate);
        }
        let took = (timings.prompt + timings.decode).as_secs_f64();
        let mut mean = locked(&self.mean_s);
        *mean = Some(mean.map_or(took, |mean| mean + LATEST * (took - mean)));
    }

    /// Returns the seconds after which a place in the queue may be free.
    pub fn retry_after(&self, max_texts: usize) -> u64 {
        let mean = locked(&self.mean_s).unwrap_or(1.0);
        let seconds = (mean / max_texts.max(1) as f64).ceil();
        seconds.clamp(1.0, 60.0) as u64
    }

    pub fn step(&self, step: &Step) {
        if step.took > Duration::ZERO {
            self.steps.inc();
            self.step_seconds.observe(step.took.as_secs_f64());
        }
        self.preempted.inc_by(step.preempted as u64);
    }

    pub fn engine(&self, counts: &Snapshot, pages: Pages, running: usize, waiting: usize) {
        self.running.set(running as i64);
        self.waiting.set(waiting as i64);
        self.pages_free.set(pages.free as i64);
        for (result, n) in [("hit", counts.hits()), ("miss", counts.misses())] {
            let labels = vec![("result".to_string(), result.to_string())];
            self.expert_accesses.get_or_create(&labels).set(n);
        }
        for (tier, bytes) in locked(&self.tiers).iter().zip(counts.read_bytes()) {
            let labels = vec![("tier".to_string(), tier.clone())];
            self.read_bytes.get_or_create(&labels).set(*bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_has_every_count() {
        let metrics = Metrics::new();
        let promise = Promise {
            tiers: vec!["a \"b\"\n".into()],
            decode_tok_s: Some(12.5),
            emulated: true,
        };
        metrics.ready(4, 9, &promise);
        assert!(!metrics.text().contains("tier_plan_requests"));
        metrics.answered("/v1/models", 200);
        metrics.answered("/v1/completions", 429);
        metrics.prompt(10, 4);
        metrics.text_ended(&Timings::default(), 3);
        let text = metrics.text();
        for line in [
            "# HELP tier_plan_requests Requests answered, by path and status.",
            "# TYPE tier_plan_requests counter",
            "tier_plan_requests_total{path=\"/v1/models\",status=\"200\"} 1",
            "tier_plan_requests_total{path=\"/v1/completions\",status=\"429\"} 1",
            "tier_plan_rejected_total 1",
            "tier_plan_cached_tokens_total 4",
            "tier_plan_generated_tokens_total 3",
            "tier_plan_texts_max 4",
            "tier_plan_predicted_tokens_per_second 12.5",
            "tier_plan_emulated 1",
            "# EOF",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }

    #[test]
    fn a_full_queue_asks_for_patience_within_bounds() {
        let metrics = Metrics::new();
        assert_eq!(metrics.retry_after(1), 1);
        let long = Timings {
            decode: Duration::from_secs(1000),
            ..Timings::default()
        };
        metrics.text_ended(&long, 2);
        assert_eq!((metrics.retry_after(1), metrics.retry_after(100)), (60, 10));
    }
}
