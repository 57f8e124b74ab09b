//! The engine: a loaded model and its state, and the pass that takes tokens through the layers.

pub mod generate;
#[cfg(test)]
mod gpu_delta_tests;
#[cfg(test)]
mod gpu_slot_tests;
#[cfg(test)]
mod gpu_split_tests;
#[cfg(test)]
mod gpu_tests;
pub mod measure;
#[cfg(test)]
mod node_tests;
#[cfg(test)]
mod prompt_gpu_tests;
mod resident;
#[cfg(test)]
mod rewritten_mla_tests;
#[cfg(test)]
mod rewritten_tests;
mod scratch;
mod stages;
mod warm;

use crate::error::LoadError;
use crate::error::RunError;
use crate::experts::counters::Counters;
use crate::experts::store::{ExpertStore, Step};
use crate::gpu::devices::GiveDevice;
use crate::gpu::rows::{GpuRows, gpu_rows};
use crate::gpu::{Gpus, full_gpu_tier};
use crate::layers::compute::Compute;
use crate::layers::mixer::{CacheReads, MixerState};
use crate::layers::places::{LayerPlaces, Places};
use crate::layers::rope::{RopeTable, rope_tables};
use crate::layers::weights::DenseWeights;
use crate::load::{Loaded, load};
use crate::moe::offload::{StreamSetup, Streams};
use crate::moe::routing::Choices;
use crate::moe::{moe_batch, moe_token};
use crate::options::{LoadOptions, Progress, batches};
use crate::tiers::arena::ArenaError;
use crate::tiers::nodes::Pages;
use crate::tiers::pace::{Pacer, StageBytes, settle};
use scratch::Scratch;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::model::describe;
use tier_plan_formats::model::shape::{ModelShape, shape_of};
use tier_plan_formats::model::spec::{Ffn, LayerSpec, ModelSpec, MoeSpec};
use tier_plan_formats::placement::{Placement, TierIdx};
use tier_plan_kernels::threads::{ThreadPool, physical_cores};
use tier_plan_kernels::{Kernels, needs_quants};

/// Which logits a pass should compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wanted {
    /// Of the last token only.
    Last,
    /// Of every token.
    All,
}

/// The experts that the tokens of a pass chose.
#[derive(Debug, Clone, Default)]
pub struct Routing {
    /// `[token, moe layer, used]`, the router's order.
    pub experts: Vec<u16>,
    /// Same shape.
    pub weights: Vec<f32>,
}

/// A loaded model with its context.
pub struct Engine {
    gguf: Arc<Gguf>,
    pub(crate) spec: ModelSpec,
    shape: ModelShape,
    plan: Placement,
    pub(crate) weights: DenseWeights,
    pub(crate) experts: ExpertStore,
    pub(crate) gpus: Gpus,
    /// The tier whose GPU has all of the model, if one has.
    resident: Option<usize>,
    resident_bytes: Vec<u64>,
    padding_bytes: Vec<u64>,
    pub(crate) embedding_tier: usize,
    pub(crate) head_tier: usize,
    /// By layer, by tier.
    pub(crate) dense_bytes: Vec<StageBytes>,
    /// By layer: what its keys, values and state are charged as.
    caches: Vec<CacheReads>,
    /// By layer: their tier.
    cache_tiers: Vec<TierIdx>,
    pacer: Option<Pacer>,
    pub(crate) pool: ThreadPool,
    pub(crate) kernels: Kernels,
    batch: usize,
    pub(crate) micro_batch: usize,
    pub(crate) n_past: usize,
    context: usize,
    pub(crate) states: Vec<MixerState>,
    pub(crate) ropes: Vec<RopeTable>,
    /// By layer: whether any matrix of the mixer takes quantised activations.
    pub(crate) mixer_quants: Vec<bool>,
    /// By layer: whether its experts take activations as they are, too.
    pub(crate) expert_floats: Vec<bool>,
    /// By layer, index into `ropes`.
    pub(crate) layer_rope: Vec<Option<usize>>,
    pub(crate) scratch: Scratch,
    pub(crate) logits: Vec<f32>,
    pub(crate) routing: Routing,
    pub(crate) counters: Counters,
    pub(crate) scores_guesses: bool,
    broken: bool,
}

impl Engine {
    /// Loads a model as `plan` says.
    ///
    /// # Errors
    /// When the plan is for another model, contradicts itself or does not fit; when memory or the file fail.
    pub fn load(
        gguf: Arc<Gguf>,
        plan: &Placement,
        options: &LoadOptions,
        progress: Progress<'_>,
    ) -> Result<Self, LoadError> {
        Self::load_on(gguf, plan, options, None, progress)
    }

    /// [`load`](Self::load) with devices that stand for the GPUs of the plan: `give` is asked for each by its number.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_on(
        gguf: Arc<Gguf>,
        plan: &Placement,
        options: &LoadOptions,
        give: Option<GiveDevice<'_>>,
        progress: Progress<'_>,
    ) -> Result<Self, LoadError> {
        let kernels = Kernels::from_env()?;
        let spec = describe(&gguf)?;
        let shape = shape_of(&gguf, &spec);
        let loaded = load(&gguf, &spec, &shape, plan, options, give, progress)?;
        let Loaded {
            weights,
            experts,
            devices,
            mut resident_bytes,
            padding_bytes,
            embedding_tier,
            head_tier,
            dense_bytes,
        } = loaded;
        let context = plan.context as usize;
        let (batch, micro_batch) = batches(options, context);
        let places = Places::new(plan, spec.layers.len());
        let state = |(layer, at): (&LayerSpec, &LayerPlaces)| match at.mixer {
            Some(_) => MixerState::on_gpu(&layer.mixer, plan.kv_type, context),
            None => MixerState::new(&layer.mixer, plan.kv_type, context),
        };
        let states: Vec<MixerState> = spec.layers.iter().zip(&places.layers).map(state).collect();
        let cache_tiers = plan.cache_tiers(spec.layers.len());
        for (state, tier) in states.iter().zip(&cache_tiers) {
            let of = &plan.tiers[*tier].tier;
            let pages = Pages::of_tier(of);
            state.move_to(&pages).map_err(|source| ArenaError::refused(&of.name, &pages, source))?;
            resident_bytes[*tier] += state.bytes();
        }
        let (ropes, layer_rope) = rope_tables(&spec, &weights);
        let resident = full_gpu_tier(plan, &shape, &places);
        let gpus = Gpus::new(&spec, plan, options, &weights, &devices, places, &layer_rope)?;
        let tiers: Vec<_> = plan.tiers.iter().map(|t| t.tier.clone()).collect();
        let threads = options.threads.unwrap_or_else(physical_cores);
        let n_moe = spec.moe_layers().count();
        let needs = |layer: &LayerSpec| {
            let matrices = layer.mixer.tensors().matrices;
            matrices.iter().any(|id| needs_quants(weights.ty(*id))) && spec.hidden.is_multiple_of(32)
        };
        let pool = ThreadPool::new(threads);
        let streams = Streams::new(&StreamSetup {
            spec: &spec,
            shape: &shape,
            plan,
            options,
            devices: &devices,
            places: &gpus.places,
            batch,
            rows: micro_batch,
            pool: &pool,
        })?;
        let floats = |layer: &LayerSpec| match &layer.ffn {
            // A GPU quantises them itself.
            Ffn::Moe(_) if experts.n_gpus() > 0 || streams.any() => true,
            Ffn::Moe(moe) => moe.expert_linears().any(|l| !needs_quants(gguf.tensors()[l.weight].ty)),
            Ffn::Dense(_) => false,
        };
        let mut scratch = Scratch::new(&spec, batch, micro_batch, tiers.len());
        if experts.n_gpus() > 0 {
            scratch.ffn.gpu = GpuRows::new(gpu_rows(&spec), spec.hidden);
        }
        let expert_floats = spec.layers.iter().map(floats).collect();
        scratch.ffn.streams = streams;
        Ok(Self {
            mixer_quants: spec.layers.iter().map(needs).collect(),
            expert_floats,
            scratch,
            kernels,
            pool,
            pacer: Pacer::new(&tiers, plan.layer_overhead_us, plan.token_overhead_us),
            counters: Counters::new(tiers.len(), n_moe),
            dense_bytes: dense_bytes.into_iter().map(StageBytes::from).collect(),
            caches: spec.layers.iter().map(|layer| CacheReads::new(&layer.mixer, plan.kv_type)).collect(),
            cache_tiers,
            plan: plan.clone(),
            logits: Vec::new(),
            routing: Routing::default(),
            n_past: 0,
            context,
            scores_guesses: false,
            broken: false,
            gguf,
            spec,
            shape,
            weights,
            experts,
            gpus,
            resident,
            resident_bytes,
            padding_bytes,
            embedding_tier,
            head_tier,
            batch,
            micro_batch,
            states,
            ropes,
            layer_rope,
        })
    }

    /// The network.
    pub fn spec(&self) -> &ModelSpec {
        &self.spec
    }

    /// The sizes of the network.
    pub fn shape(&self) -> &ModelShape {
        &self.shape
    }

    /// The plan it was loaded from.
    pub fn plan(&self) -> &Placement {
        &self.plan
    }

    /// Bytes counted in each tier after loading: dense groups, pinned experts, slots, staging, key and value cache,
    /// and the home copies of pooled experts on the last tier.
    pub fn resident_bytes(&self) -> &[u64] {
        &self.resident_bytes
    }

    /// Bytes by tier that slots and staging take beyond the plan, within its budget, so that a block device is read
    /// straight into them.
    pub fn padding_bytes(&self) -> &[u64] {
        &self.padding_bytes
    }

    /// Experts of main memory that passed through a GPU for prompts, once for each batch that they did.
    pub fn experts_passed(&self) -> u64 {
        self.scratch.ffn.streams.n_streamed()
    }

    /// What was counted since the engine was loaded or [`reset_counters`](Self::reset_counters).
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Starts counting afresh.
    pub fn reset_counters(&mut self) {
        self.counters = Counters::new(self.plan.tiers.len(), self.counters.layers.len());
    }

    /// Guesses what a decoded token's next layer needs even where nothing is read ahead, so that the counters tell how
    /// good guesses are.
    pub fn score_guesses(&mut self) {
        self.scores_guesses = true;
    }

    /// Threads that compute.
    pub fn n_threads(&self) -> usize {
        self.pool.n_threads()
    }

    /// The kernels in use.
    pub fn kernels(&self) -> Kernels {
        self.kernels
    }

    /// Tokens in the context.
    pub fn n_past(&self) -> usize {
        self.n_past
    }

    /// Tokens that the context may hold.
    pub fn context(&self) -> usize {
        self.context
    }

    /// Tokens of a prompt that go through a layer together.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Lets the context hold fewer tokens than planned; its memory stays as planned.
    pub fn limit_context(&mut self, context: u32) {
        self.context = self.context.min(context as usize);
    }

    /// Forgets all tokens but the first `n`; with fewer than that in the context, nothing.
    ///
    /// # Errors
    /// When a layer keeps one recurrent state of all past tokens, and `n` is neither 0 nor all of them; nothing is
    /// forgotten then.
    pub fn truncate(&mut self, n: usize) -> Result<(), RunError> {
        if n >= self.n_past {
            return Ok(());
        }
        if n > 0 && !self.states.iter().all(MixerState::can_rewind) {
            return Err(RunError::CannotRewind { n_past: self.n_past, wanted: n });
        }
        if n == 0 {
            self.clear();
        }
        self.n_past = n;
        Ok(())
    }

    /// Forgets all tokens.
    pub fn clear(&mut self) {
        self.states.iter_mut().for_each(MixerState::reset);
        self.n_past = 0;
        self.broken = false;
    }

    /// What the tokens of the last [`forward`](Self::forward) chose.
    pub fn routing(&self) -> &Routing {
        &self.routing
    }

    /// Takes tokens through the network and returns logits, `[1, n_vocab]` or `[tokens, n_vocab]`.
    ///
    /// # Errors
    /// When the context is full, a token is out of range, or the slow tier fails. After the last the context is as before
    /// the call; but in a network with recurrent states, which can't go back, only [`clear`](Self::clear) helps then.
    pub fn forward(&mut self, tokens: &[u32], wanted: Wanted) -> Result<&[f32], RunError> {
        if self.broken {
            return Err(RunError::Broken);
        }
        let after = self.n_past + tokens.len();
        if after > self.context {
            return Err(RunError::ContextFull { wanted: after, context: self.context });
        }
        if let Some(token) = tokens.iter().find(|t| **t as usize >= self.spec.n_vocab) {
            return Err(RunError::Token { token: *token, n_vocab: self.spec.n_vocab });
        }
        self.logits.clear();
        let n_moe = self.counters.layers.len();
        let used: usize = self.spec.moe_layers().next().map_or(0, |(_, m)| m.n_used);
        self.routing.experts.clear();
        self.routing.experts.resize(tokens.len() * n_moe * used, 0);
        self.routing.weights.clear();
        self.routing.weights.resize(tokens.len() * n_moe * used, 0.0);
        // A lone token with nothing before it is a prompt; the last token of a long prompt is no decoding either.
        let alone = tokens.len() == 1;
        let decoding = alone && self.n_past > 0;
        // A file that was cut short must not be looked at where it is mapped.
        self.experts.check_files()?;
        let start = Instant::now();
        let before = self.n_past;
        let n_batches = tokens.len().div_ceil(self.batch);
        for (i, batch) in tokens.chunks(self.batch).enumerate() {
            let last = i + 1 == n_batches;
            let wanted = (last || wanted == Wanted::All).then_some(wanted);
            let result = self.pass(batch, i * self.batch, wanted, alone, decoding);
            // What was read from a file that changed is worth nothing, however well the reads went.
            if let Err(error) = result.and_then(|()| Ok(self.experts.check_files()?)) {
                self.broken = !self.states.iter().all(MixerState::can_rewind);
                self.n_past = before;
                return Err(error);
            }
        }
        let elapsed = start.elapsed();
        self.counters.ahead += self.experts.take_ahead_count();
        if decoding {
            self.counters.decode_tokens += 1;
            self.counters.decode += elapsed;
        } else {
            self.counters.prompt_tokens += tokens.len() as u64;
            self.counters.prompt += elapsed;
        }
        Ok(&self.logits)
    }

    /// One batch through all layers; `offset` is its first token's place in the whole call, `alone` whether that has no
    /// other, and `decoding` whether it counts as a decode step.
    ///
    /// A token of a call that has more is added up like all of them, so that no result depends on the size of a batch.
    fn pass(
        &mut self,
        tokens: &[u32],
        offset: usize,
        wanted: Option<Wanted>,
        alone: bool,
        decoding: bool,
    ) -> Result<(), RunError> {
        if let (true, Some(tier), false) = (alone, self.resident, self.scores_guesses) {
            return self.resident_pass(tier, tokens[0], decoding);
        }
        let n = tokens.len();
        let mut place = self.embed(tokens)?;
        let mut outside = StageBytes::new(self.plan.tiers.len());
        outside.add(self.embedding_tier, (n * self.embedding_row_bytes()) as u64);
        let mut moe_at = 0;
        for index in 0..self.spec.layers.len() {
            let layer_start = Instant::now();
            self.scratch.expert_acts.clear();
            let mut after = place;
            for first in (0..n).step_by(self.micro_batch) {
                let start = Instant::now();
                let rows = first..n.min(first + self.micro_batch);
                after = self.dense_stage(index, rows.clone(), place)?;
                if let Some(pacer) = &self.pacer {
                    let cache = self.caches[index].bytes((self.n_past + rows.end) as u64, rows.len() as u64);
                    settle(start, pacer.dense(&self.dense_bytes[index], self.cache_tiers[index], cache));
                }
            }
            place = after;
            let experts_start = Instant::now();
            if decoding {
                self.charge_dense(index, experts_start - layer_start);
                self.score_guess(moe_at, index);
            } else {
                self.counters.prompt_stages[0] += experts_start - layer_start;
            }
            self.look_ahead(index, moe_at, n, !alone, place)?;
            let Ffn::Moe(moe) = &self.spec.layers[index].ffn else { continue };
            let used = moe.n_used;
            let n_moe = self.counters.layers.len();
            self.scratch.computed.clear();
            let step = run_experts(
                Compute { pool: &self.pool, kernels: self.kernels },
                &mut self.experts,
                moe_at,
                moe,
                if alone { None } else { Some(n) },
                &mut self.scratch,
            )?;
            self.add_experts(n, place)?;
            let to = self.plan.layers[moe_at].brought_to(self.plan.staging_tier);
            let paths = self.pacer.as_ref().map(|p| p.expert_paths(&self.scratch.computed, step.read_bytes, to));
            if let Some(longest) = paths.as_ref().and_then(|p| p.iter().max()) {
                settle(experts_start, *longest);
            }
            for t in 0..n {
                let to = ((offset + t) * n_moe + moe_at) * used;
                self.routing.experts[to..to + used].copy_from_slice(&self.scratch.experts[t * used..(t + 1) * used]);
                self.routing.weights[to..to + used].copy_from_slice(&self.scratch.weights[t * used..(t + 1) * used]);
            }
            if !decoding {
                self.counters.prompt_missed_bytes += step.read_bytes;
                self.counters.prompt_stages[1] += experts_start.elapsed();
            } else {
                self.count_experts(
                    moe_at,
                    &step,
                    paths.as_deref(),
                    experts_start - layer_start,
                    experts_start.elapsed(),
                );
            }
            moe_at += 1;
        }
        self.n_past += n;
        let head_start = Instant::now();
        if let Some(wanted) = wanted {
            self.head(n, wanted, place)?;
            outside.add(self.head_tier, self.head_bytes());
            if let Some(pacer) = &self.pacer {
                settle(head_start, pacer.outside(&outside));
            }
        }
        if decoding {
            self.counters.charge(&outside, head_start.elapsed());
        }
        Ok(())
    }

    /// Counts a decoded token's dense stage: its weights, and its time by tier. On emulated tiers that is shared out by what
    /// is declared, for keys and values too.
    fn charge_dense(&mut self, index: usize, time: Duration) {
        let bytes = &self.dense_bytes[index];
        let Some(pacer) = &self.pacer else { return self.counters.charge(bytes, time) };
        let cache = self.caches[index].bytes(self.n_past as u64 + 1, 1);
        self.counters.count(bytes);
        self.counters.charge_paths(&pacer.dense_by_tier(bytes, self.cache_tiers[index], cache), time);
    }

    fn count_experts(
        &mut self,
        at: usize,
        step: &Step,
        paths: Option<&[Duration]>,
        dense: Duration,
        experts: Duration,
    ) {
        let slow = self.plan.tiers.len() - 1;
        let layer = &mut self.counters.layers[at];
        layer.pinned_hits += step.pinned_hits;
        layer.slot_hits += step.slot_hits;
        layer.misses += step.misses;
        layer.dense += dense;
        layer.experts += experts;
        layer.missed_bytes += step.read_bytes;
        // An emulated device's reads are part of the declared time.
        if paths.is_none() {
            layer.reading += step.reading();
            layer.waited += step.waited;
        }
        self.counters.read_bytes[slow] += step.read_bytes;
        if let Some(paths) = paths {
            self.counters.count(&self.scratch.computed);
            self.counters.charge_paths(paths, experts);
        } else {
            let waited = step.waited.min(experts);
            self.counters.busy[slow] += waited;
            self.counters.charge(&self.scratch.computed, experts - waited);
        }
    }

    pub(crate) fn embedding_row_bytes(&self) -> usize {
        self.gguf.tensors()[self.spec.embedding].n_bytes as usize / self.spec.n_vocab
    }

    pub(crate) fn head_bytes(&self) -> u64 {
        self.shape
            .dense
            .iter()
            .filter(|d| d.kind == tier_plan_formats::model::shape::DenseKind::Head)
            .map(|d| d.token_bytes)
            .sum()
    }
}

/// The routed experts of a token alone, or of a batch of so many.
fn run_experts(
    c: Compute<'_>,
    store: &mut ExpertStore,
    at: usize,
    moe: &MoeSpec,
    batch: Option<usize>,
    s: &mut Scratch,
) -> Result<Step, RunError> {
    let hidden = moe.router.n_in;
    let n = batch.unwrap_or(1);
    let choices =
        Choices { experts: &s.experts[..n * moe.n_used], weights: &s.weights[..n * moe.n_used], n_used: moe.n_used };
    let out = &mut s.out[..n * hidden];
    let x = s.expert_acts.view();
    match batch {
        None => moe_token(c, store, at, moe, x, &choices, &mut s.ffn, out, &mut s.computed),
        Some(_) => moe_batch(c, store, at, moe, x, &choices, &mut s.ffn, out, &mut s.computed),
    }
}
