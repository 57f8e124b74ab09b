//! What the engine is doing, for pages that show it: a snapshot, or several per second as a stream.
//!
//! The engine's thread counts for [windows](WINDOW) of steps, and only while someone watches. Where
//! an expert was is taken at the start of a window: an expert that was read within it came from the
//! last tier, though it may be in a slot now.

mod decoding;
mod scene;

use crate::error::{ApiError, json_response};
use crate::sse;
use crate::state::State;
use crate::truth::Snapshot;
use axum::body::Bytes;
use axum::extract::State as Shared;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use decoding::Decoding;
use scene::{Accesses, Chosen, LayerScene, Scene, TierScene};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tier_plan_runtime::Engine;
use tier_plan_runtime::batcher::{Batcher, Step};
use tier_plan_runtime::formats::placement::{LayerPlacement, PlanTier};
use tier_plan_runtime::model::spec::MoeSpec;
use tokio::sync::mpsc::{Sender, channel};
use tokio::sync::watch;

/// Path of the snapshot and of the stream.
pub(crate) const PATH: &str = "/tier-plan/live";

/// Time that is counted together: four snapshots per second.
const WINDOW: Duration = Duration::from_millis(250);

/// Longest wait of a request for a snapshot. Steps of a model on a slow drive take seconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// Time without a snapshot after which a stream has a sign of life.
const PING: Duration = Duration::from_secs(10);

/// What watchers see.
#[derive(Debug, Clone)]
enum Latest {
    /// No window has been counted.
    None,
    Scene(Arc<Scene>),
    /// The engine has ended.
    End,
}

/// Where the engine's thread leaves what watchers see.
#[derive(Debug)]
pub(crate) struct Live {
    watchers: AtomicUsize,
    latest: watch::Sender<Latest>,
}

impl Live {
    pub fn new() -> Self {
        Self {
            watchers: AtomicUsize::new(0),
            latest: watch::Sender::new(Latest::None),
        }
    }

    fn is_watched(&self) -> bool {
        self.watchers.load(Ordering::Relaxed) > 0
    }

    /// Ends all streams.
    pub fn end(&self) {
        self.latest.send_replace(Latest::End);
    }
}

/// One who watches, as long as it is there.
struct Watcher {
    state: Arc<State>,
    latest: watch::Receiver<Latest>,
}

impl Watcher {
    fn new(state: &Arc<State>) -> Self {
        state.live.watchers.fetch_add(1, Ordering::Relaxed);
        Self {
            state: Arc::clone(state),
            latest: state.live.latest.subscribe(),
        }
    }

    /// Waits for the next scene; `None` is the end of the server.
    async fn next(&mut self) -> Option<Arc<Scene>> {
        loop {
            self.latest.changed().await.ok()?;
            match &*self.latest.borrow_and_update() {
                Latest::None => {}
                Latest::Scene(scene) => return Some(Arc::clone(scene)),
                Latest::End => return None,
            }
        }
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.state.live.watchers.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What has been counted since the start of a window.
struct Window {
    start: Instant,
    before: Snapshot,
    accesses: Vec<Accesses>,
    /// By layer and expert: its tier at the start, and how often it was chosen.
    tiers: Vec<Vec<usize>>,
    chosen: Vec<Vec<u32>>,
    steps: usize,
    prompt_tokens: usize,
    decode_tokens: usize,
    decoding: Decoding,
}

/// The counting of the engine's thread.
#[derive(Default)]
pub(crate) struct Recorder {
    window: Option<Window>,
    n_scenes: u64,
}

impl Recorder {
    /// Counts a step, if someone watches, and shows what was counted once per [`WINDOW`]. A step
    /// that took no time is none: the engine has nothing to do.
    pub fn count(&mut self, state: &State, batcher: &mut Batcher<'_>, step: &Step) {
        if !state.live.is_watched() {
            self.window = None;
            return;
        }
        let Some(window) = &mut self.window else {
            self.window = Some(Window::begin(batcher.engine()));
            return;
        };
        if step.took > Duration::ZERO && !step.canceled {
            window.count(batcher.engine(), step);
        }
        if window.start.elapsed() < WINDOW {
            return;
        }
        self.n_scenes += 1;
        let scene = window.scene(self.n_scenes, batcher);
        self.window = Some(Window::begin(batcher.engine()));
        let latest = Latest::Scene(Arc::new(scene));
        state.live.latest.send_replace(latest);
    }
}

impl Window {
    fn begin(engine: &Engine) -> Self {
        let tiers = places(engine);
        Self {
            start: Instant::now(),
            before: Snapshot::of(engine.counters()),
            accesses: accesses(engine),
            chosen: tiers.iter().map(|layer| vec![0; layer.len()]).collect(),
            tiers,
            steps: 0,
            prompt_tokens: 0,
            decode_tokens: 0,
            decoding: Decoding::default(),
        }
    }

    fn count(&mut self, engine: &Engine, step: &Step) {
        self.steps += 1;
        self.prompt_tokens += step.prompt_rows;
        self.decode_tokens += step.decode_rows;
        if step.decode_rows > 0 {
            self.decoding.count(step.took, Instant::now());
        }
        let n_used: Vec<usize> = engine.spec().moe_layers().map(|(_, m)| m.n_used).collect();
        let per_token: usize = n_used.iter().sum();
        for mut token in engine.routing().experts.chunks_exact(per_token.max(1)) {
            for (layer, n_used) in self.chosen.iter_mut().zip(&n_used) {
                let (here, rest) = token.split_at((*n_used).min(token.len()));
                token = rest;
                for expert in here {
                    if let Some(n) = layer.get_mut(usize::from(*expert)) {
                        *n += 1;
                    }
                }
            }
        }
    }

    fn scene(&self, number: u64, batcher: &mut Batcher<'_>) -> Scene {
        let texts = batcher.statuses();
        let (running, waiting) = (batcher.n_running(), batcher.n_waiting());
        let (pages, max_texts) = (batcher.pages(), batcher.max_texts());
        let engine = batcher.engine();
        Scene {
            number,
            plan: engine.plan().name.clone(),
            window: self.start.elapsed(),
            steps: self.steps,
            prompt_tokens: self.prompt_tokens,
            decode_tokens: self.decode_tokens,
            decoding: self.decoding,
            tiers: self.tiers(engine),
            layers: self.layers(engine),
            pages,
            max_texts,
            running,
            waiting,
            texts,
        }
    }

    fn tiers(&self, engine: &Engine) -> Vec<TierScene> {
        let read = Snapshot::of(engine.counters()).since(&self.before);
        let plan = engine.plan();
        let last = plan.tiers.len().saturating_sub(1);
        let resident: Vec<u64> = engine.resident_bytes().iter().copied().collect();
        let scene = |(i, planned): (usize, &PlanTier)| TierScene {
            name: planned.tier.name.clone(),
            kind: planned.tier.kind.to_string(),
            emulated: planned.tier.emulated,
            read_gbps: planned
                .tier
                .has_known_rate()
                .then_some(planned.tier.read_gbps),
            capacity_bytes: planned.tier.capacity_bytes,
            budget_bytes: planned.budget_bytes,
            used_bytes: resident.get(i).copied().unwrap_or(0),
            read_bytes: read.read_bytes().get(i).copied().unwrap_or(0)
                + if i == last { read.prompt_bytes() } else { 0 },
        };
        plan.tiers.iter().enumerate().map(scene).collect()
    }

    fn layers(&self, engine: &Engine) -> Vec<LayerScene> {
        let now = accesses(engine);
        let specs = engine.spec().moe_layers().enumerate();
        specs
            .map(|(i, (layer, moe))| {
                let (now, before) = (at(&now, i), at(&self.accesses, i));
                let counts = self.chosen.get(i).into_iter().flatten();
                let tiers = self.tiers.get(i).into_iter().flatten();
                let chosen = counts.zip(tiers).enumerate();
                LayerScene {
                    layer,
                    n_expert: moe.n_expert,
                    n_used: moe.n_used,
                    accesses: Accesses {
                        pinned: now.pinned.saturating_sub(before.pinned),
                        slots: now.slots.saturating_sub(before.slots),
                        misses: now.misses.saturating_sub(before.misses),
                    },
                    chosen: chosen
                        .filter(|(_, (n, _))| **n > 0)
                        .map(|(expert, (n, tier))| Chosen {
                            expert,
                            n: *n,
                            tier: *tier,
                        })
                        .collect(),
                }
            })
            .collect()
    }
}

fn at(accesses: &[Accesses], i: usize) -> Accesses {
    accesses.get(i).copied().unwrap_or_default()
}

/// Returns the accesses of each layer since the start.
fn accesses(engine: &Engine) -> Vec<Accesses> {
    let layers = engine.counters().layers.iter();
    layers
        .map(|layer| Accesses {
            pinned: layer.pinned_hits,
            slots: layer.slot_hits,
            misses: layer.misses,
        })
        .collect()
}

/// Returns the tier of every expert by layer: where it is pinned, or has a slot, else the last.
fn places(engine: &Engine) -> Vec<Vec<usize>> {
    let plan = engine.plan();
    let last = plan.tiers.len().saturating_sub(1);
    let in_slots = engine.slot_contents();
    let specs = engine.spec().moe_layers();
    let place = |(placed, (_, moe)): (&LayerPlacement, (usize, &MoeSpec))| {
        let mut tiers = vec![last; moe.n_expert];
        let mut put = |experts: &[u32], tier: usize| {
            for expert in experts {
                if let Some(place) = tiers.get_mut(*expert as usize) {
                    *place = tier;
                }
            }
        };
        let slots = in_slots.iter().find(|slots| slots.layer == placed.layer);
        put(slots.map_or(&[], |s| &s.experts), placed.slot_tier.get());
        for pins in &placed.pinned {
            put(&pins.experts, pins.tier.get());
        }
        tiers
    };
    plan.layers.iter().zip(specs).map(place).collect()
}

/// Answers with the next snapshot, or with a stream of them to who asks for events.
pub(crate) async fn live(
    Shared(state): Shared<Arc<State>>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    if state.is_stopping() {
        return Err(ApiError::stopping());
    }
    if state.loaded().is_none() {
        return Err(ApiError::loading(state.progress()));
    }
    let mut watcher = Watcher::new(&state);
    let accepts = headers
        .get(header::ACCEPT)
        .and_then(|value| value.to_str().ok());
    if accepts.is_some_and(|accepts| accepts.contains("text/event-stream")) {
        let (sender, receiver) = channel(1);
        tokio::spawn(pump(watcher, sender));
        return Ok(sse::stream(receiver));
    }
    match tokio::time::timeout(PATIENCE, watcher.next()).await {
        Ok(Some(scene)) => Ok(json_response(StatusCode::OK, &scene.json(&state))),
        Ok(None) => Err(ApiError::stopping()),
        Err(_) => Err(ApiError::slow_step()),
    }
}

/// Sends scenes until the reader or the server is gone. What a slow reader misses is left out.
async fn pump(mut watcher: Watcher, out: Sender<Bytes>) {
    loop {
        let came = tokio::select! {
            () = out.closed() => return,
            came = tokio::time::timeout(PING, watcher.next()) => came,
        };
        let text = match came {
            Err(_) => ": waiting\n\n".to_string(),
            Ok(None) => return,
            Ok(Some(scene)) => sse::data(&scene.json(&watcher.state)),
        };
        if out.send(text.into()).await.is_err() {
            return;
        }
    }
}
