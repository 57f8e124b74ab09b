//! What a plan may use: the tiers, what must lie on them whatever the plan, and what is left to choose about.

use super::Inputs;
use super::infeasible::mends;
use super::wishes::Wishes;
use crate::cost::{home_in_place, middle};
use anyhow::{Result, bail, ensure};
use tier_plan_runtime::formats::machine::{Tier, TierKind};
use tier_plan_runtime::formats::placement::{TierIdx, attention_s};
use tier_plan_runtime::model::shape::{DenseKind, DenseShape, ModelShape};
use tier_plan_runtime::units::show_bytes;

/// Tiers above the last one, at most.
pub const MAX_FAST: usize = 7;

/// What a plan can run out of, at most: the bytes of each tier, and a token's time.
pub const MAX_ROWS: usize = MAX_FAST + 2;

/// Units of time in a second where it can run out, as bytes do.
pub const TICKS: f64 = 1e12;

/// Experts in flight beyond those of one token that staging has room for.
const STAGING_SPARE: u32 = 2;

/// Pages that the slices of an expert can touch beyond their own bytes: two for each of three.
const PAGES_BYTES: u64 = 6 * 4096;

/// The fixed part of every plan, and the bytes left.
#[derive(Debug, Clone, PartialEq)]
pub struct Room {
    /// Fastest first; the last one is the home of what is not pinned.
    pub tiers: Vec<Tier>,
    /// `[tiers]` bytes a plan may use.
    pub budget_bytes: Vec<u64>,
    /// `[tiers]` bytes left for dense groups, pins, slots and home copies; then, if there is a target, the time left for
    /// them in units of [`TICKS`].
    pub left_bytes: Vec<u64>,
    /// Where the key and value cache is, but for layers whose attention is on a real GPU.
    pub kv_tier: TierIdx,
    /// Bytes of it that are there whatever the plan: those of layers that no real GPU may have.
    pub kv_bytes: u64,
    /// What each layer remembers, `[n_layer]`.
    pub caches: Vec<LayerCache>,
    /// Where staging is.
    pub staging_tier: TierIdx,
    /// Experts it holds.
    pub staging_experts: u32,
    /// Its bytes.
    pub staging_bytes: u64,
    /// What lies on the last tier computes in place, so nothing is staged.
    pub in_place: bool,
}

/// A layer's keys and values, or its recurrent state.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct LayerCache {
    /// Bytes.
    pub bytes: u64,
    /// `[tiers]` seconds of a decoded token where each has them.
    pub seconds: Vec<f64>,
    /// Real GPUs that may have the layer's attention, and with it these.
    pub gpus: Vec<TierIdx>,
}

impl Room {
    /// The last tier.
    pub fn home(&self) -> TierIdx {
        self.tiers.len() - 1
    }

    /// What the bytes left of all tiers come to at some prices, in seconds.
    pub fn priced_left(&self, price: &[f64]) -> f64 {
        price.iter().zip(&self.left_bytes).map(|(p, &left)| p * left as f64).sum()
    }

    /// Tiers that compute.
    pub fn computing_tiers(&self) -> impl Iterator<Item = TierIdx> + '_ {
        (0..self.tiers.len()).filter(|&t| self.tiers[t].kind != TierKind::Nvme)
    }

    /// Tiers that can hold a dense group: what they hold computes there, and a token reads so little of the embedding
    /// that it may stay in the file. Attention on a real GPU has its keys and values there, and other attention never has.
    pub fn dense_tiers(&self, group: &DenseShape) -> impl Iterator<Item = TierIdx> + '_ {
        let in_file = group.kind == DenseKind::Embedding;
        let of_layer =
            (group.kind == DenseKind::Attention).then(|| group.layer.and_then(|l| self.caches.get(l as usize)));
        let beside = move |t: TierIdx| match of_layer {
            None => true,
            Some(cache) if self.tiers[t].is_gpu() => cache.is_some_and(|c| c.gpus.contains(&t)),
            Some(_) => !self.tiers[self.kv_tier].is_gpu(),
        };
        (0..self.tiers.len()).filter(move |&t| (in_file || self.tiers[t].kind != TierKind::Nvme) && beside(t))
    }

    /// What a dense group on a tier brings with it that is not set aside: the layer's cache, and where that is.
    pub fn brings(&self, group: &DenseShape, tier: TierIdx) -> Option<(&LayerCache, TierIdx)> {
        let layer = group.layer.filter(|_| group.kind == DenseKind::Attention)?;
        let cache = self.caches.get(layer as usize).filter(|c| !c.gpus.is_empty())?;
        Some((cache, if self.tiers[tier].is_gpu() { tier } else { self.kv_tier }))
    }

    /// `[tiers]` bytes that a dense group takes where it is on a tier, with what it brings.
    pub fn taken(&self, group: &DenseShape, tier: TierIdx) -> Vec<u64> {
        let mut bytes = vec![0; self.tiers.len()];
        bytes[tier] = group.bytes;
        if let Some((cache, at)) = self.brings(group, tier) {
            bytes[at] = bytes[at].saturating_add(cache.bytes);
        }
        bytes
    }

    /// Bytes of the cache that go where attention goes.
    pub fn brought_bytes(&self) -> u64 {
        let brought = self.caches.iter().filter(|c| !c.gpus.is_empty());
        brought.fold(0, |sum, cache| sum.saturating_add(cache.bytes))
    }

    /// Seconds of a decoded token's attention to what is set aside.
    pub fn kv_s(&self) -> f64 {
        self.caches.iter().filter(|c| c.gpus.is_empty()).map(|c| c.seconds[self.kv_tier]).sum()
    }

    /// Tiers that can hold slots. A cache in VRAM in front of DRAM would be fed over a link whose rate the machine file
    /// does not have.
    pub fn slot_tiers(&self) -> std::ops::Range<TierIdx> {
        let fed = !matches!(self.tiers[self.home()].kind, TierKind::Dram | TierKind::Vram);
        0..if fed { self.home() } else { 0 }
    }

    /// Sets aside what every plan needs.
    ///
    /// The key and value cache and the staging buffers go to DRAM (without one, to the fastest host tier), where
    /// bytes are cheapest; the cache goes elsewhere only if it does not fit there.
    ///
    /// # Errors
    /// When the machine file makes no sense for planning, or the budgets cannot hold the dense groups, the cache, the
    /// staging buffers and a home for every expert.
    pub fn new(inputs: &Inputs<'_>) -> Result<Self> {
        Ok(Self::all(inputs, &Wishes::default())?.swap_remove(0))
    }

    /// One room for each tier that can have the key and value cache of the layers that have it on no real GPU, the likeliest
    /// first.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn all(inputs: &Inputs<'_>, wishes: &Wishes) -> Result<Vec<Self>> {
        let mut before = Self::before_the_cache(inputs)?;
        before.add_caches(inputs, wishes)?;
        let mut rooms = Vec::new();
        let mut first_error = None;
        for tier in before.cache_tiers(inputs, wishes)? {
            let mut room = before.clone();
            room.kv_tier = tier;
            room.left_bytes[tier] -= room.kv_bytes;
            match room.check_attention(inputs, wishes).and_then(|()| room.check_sums(inputs)) {
                Ok(()) => {
                    room.leave_for_pages(inputs.shape);
                    rooms.push(room);
                }
                Err(error) => {
                    first_error.get_or_insert(error);
                }
            }
        }
        match first_error {
            Some(error) if rooms.is_empty() => Err(error),
            _ => Ok(rooms),
        }
    }

    /// Everything but where the cache is.
    fn before_the_cache(inputs: &Inputs<'_>) -> Result<Self> {
        let (machine, shape) = (inputs.machine, inputs.shape);
        let tiers = machine.computing_tiers();
        ensure!(
            !tiers.is_empty() && tiers.len() <= MAX_FAST + 1,
            "machine '{}' has {} tiers; plans are made for 1 to {}: merge those of like speed",
            machine.name,
            tiers.len(),
            MAX_FAST + 1
        );
        ensure!(
            inputs.budgets.len() == tiers.len(),
            "{} budgets for the {} tiers of machine '{}'; give one a tier",
            inputs.budgets.len(),
            tiers.len(),
            machine.name
        );
        let home = tiers.len() - 1;
        for (at, (tier, &budget)) in tiers.iter().zip(&inputs.budgets).enumerate() {
            ensure!(
                tier.read_gbps.is_finite() && tier.read_gbps > 0.0,
                "tier '{}' has a rate of {} GB/s; write a positive one",
                tier.name,
                tier.read_gbps
            );
            ensure!(
                tier.latency_us.is_finite() && tier.latency_us >= 0.0,
                "tier '{}' has a latency of {} µs; write 0 or more",
                tier.name,
                tier.latency_us
            );
            ensure!(
                budget <= tier.capacity_bytes,
                "the budget of tier '{}' is {}, but it holds {}; lower the budget to that",
                tier.name,
                show_bytes(budget),
                show_bytes(tier.capacity_bytes)
            );
            ensure!(
                at == home || tier.kind != TierKind::Nvme,
                "tier '{}' is a block device above the last tier; nothing computes there, so list it last",
                tier.name
            );
        }
        let in_place = home_in_place(&tiers);
        ensure!(
            home > 0 || in_place,
            "machine '{}' has only tier '{}', where nothing computes; add a DRAM tier above it",
            machine.name,
            tiers[home].name
        );

        let staging_tier = if in_place && home == 0 {
            home
        } else {
            let find = |wanted: &dyn Fn(TierKind) -> bool| tiers.iter().position(|t| wanted(t.kind));
            find(&|k| k == TierKind::Dram)
                .or_else(|| find(&|k| matches!(k, TierKind::Cxl | TierKind::Pmem)).filter(|&t| t < home))
                .unwrap_or(0)
        };
        let largest = shape.experts.iter().map(|e| e.expert_bytes).max().unwrap_or(0);
        let used = shape.experts.iter().map(|e| (e.n_used + STAGING_SPARE).min(e.n_expert)).max().unwrap_or(0);
        let staging_experts = if in_place { 0 } else { used };
        let mut room = Room {
            left_bytes: inputs.budgets.clone(),
            budget_bytes: inputs.budgets.clone(),
            kv_tier: staging_tier,
            kv_bytes: 0,
            caches: Vec::new(),
            staging_tier,
            staging_experts,
            staging_bytes: u64::from(staging_experts).saturating_mul(largest),
            in_place,
            tiers,
        };
        room.set_staging_aside(inputs)?;
        Ok(room)
    }

    /// Where experts are read from a real drive, keeps the part of each budget free that lets slots and staging have
    /// room for whole pages: without it every read is copied. Not where all experts fit above the drive, or their
    /// slices are so small that pages would take a large part.
    fn leave_for_pages(&mut self, shape: &ModelShape) {
        let home = self.home();
        let real = self.tiers[home].kind == TierKind::Nvme && !self.tiers[home].emulated;
        let all = u128::from(shape.weight_bytes());
        let above: u128 = self.left_bytes[..home].iter().map(|&left| u128::from(left)).sum();
        if !real || above >= all {
            return;
        }
        let dense = shape.dense.iter().map(|d| d.bytes).sum::<u64>().saturating_add(self.brought_bytes());
        let part = page_share(shape);
        for tier in 0..home {
            let staging = if tier == self.staging_tier { self.staging_bytes } else { 0 };
            let padding = ((self.left_bytes[tier].saturating_sub(dense) + staging) as f64 * part) as u64;
            self.left_bytes[tier] -= padding.min(self.left_bytes[tier].saturating_sub(dense));
        }
    }

    fn set_staging_aside(&mut self, inputs: &Inputs<'_>) -> Result<()> {
        let staging = self.staging_tier;
        let left = self.left_bytes[staging];
        let Some(after) = left.checked_sub(self.staging_bytes) else {
            bail!(
                "tier '{}' has a budget of {}, but buffers for {} experts in flight alone need {}; {}",
                self.tiers[staging].name,
                show_bytes(left),
                self.staging_experts,
                show_bytes(self.staging_bytes),
                mends(inputs, staging, self.staging_bytes - left)
            );
        };
        self.left_bytes[staging] = after;
        Ok(())
    }

    /// What each layer remembers, and which real GPUs may have it: those that have room for the layer's attention too, and
    /// kernels for it. What none may have is set aside.
    fn add_caches(&mut self, inputs: &Inputs<'_>, wishes: &Wishes) -> Result<()> {
        let Inputs { shape, machine, context, kv_type, .. } = *inputs;
        let (rates, at) = (machine.prompt_gflops(), middle(context).into());
        let mut attention = vec![None; shape.caches.len()];
        for group in shape.dense.iter().filter(|d| d.kind == DenseKind::Attention) {
            if let Some(of) = group.layer.and_then(|layer| attention.get_mut(layer as usize)) {
                *of = Some(group);
            }
        }
        for (cache, group) in shape.caches.iter().zip(attention) {
            let seconds = |(t, tier): (TierIdx, &Tier)| {
                attention_s(cache, kv_type, tier, rates.get(t).copied().unwrap_or(0.0), at)
            };
            let bytes = cache.context_bytes(kv_type, context);
            let may = |t: &TierIdx| {
                let fits = |g: &DenseShape| g.bytes.saturating_add(bytes) <= self.left_bytes[*t];
                self.tiers[*t].is_gpu() && group.is_some_and(|g| fits(g) && wishes.allows_attention(g.layer, *t))
            };
            let gpus: Vec<TierIdx> = (0..self.tiers.len()).filter(may).collect();
            if gpus.is_empty() {
                self.kv_bytes = self.kv_bytes.saturating_add(bytes);
            }
            let seconds = self.tiers.iter().enumerate().map(seconds).collect();
            self.caches.push(LayerCache { bytes, seconds, gpus });
        }
        // By hand all of it may be on one GPU, which is no question of layers then.
        let of = |d: &&DenseShape| d.kind == DenseKind::Attention;
        if let Some(gpu) = wishes.fixed_cache().filter(|&t| self.tiers[t].is_gpu()) {
            let bytes = shape.dense.iter().filter(of).map(|d| d.bytes).fold(0, u64::saturating_add);
            let needed = bytes.saturating_add(kv_type.context_bytes(shape, context));
            let left = self.left_bytes[gpu];
            ensure!(
                needed <= left,
                "--fix puts the key and value cache on '{}', a GPU's memory, and with it the attention of all layers: {}, but \
                 {} are left there; fix the attention of fewer layers instead (--fix {0}:attention:LAYERS), or {}",
                self.tiers[gpu].name,
                show_bytes(needed),
                show_bytes(left),
                mends(inputs, gpu, needed.saturating_sub(left))
            );
        }
        Ok(())
    }

    /// Where the cache of layers that have it on no real GPU can be. A token reads about half of the planned context: less
    /// of a byte than of dense weights, more than of most experts. So first comes the fastest tier that has room for both.
    /// Where no such tier is left, a real GPU stands for it: then GPUs have all attention.
    fn cache_tiers(&self, inputs: &Inputs<'_>, wishes: &Wishes) -> Result<Vec<TierIdx>> {
        let staging = self.staging_tier;
        let fits = |t: &TierIdx| self.left_bytes[*t] >= self.kv_bytes;
        let dense = inputs.shape.dense.iter().filter(|d| d.kind != DenseKind::Embedding).map(|d| d.bytes);
        let all = dense.fold(self.kv_bytes, u64::saturating_add);
        let may = |t: &TierIdx| !self.tiers[*t].is_gpu() && wishes.allows_cache(*t);
        let beside_dense = self.computing_tiers().filter(may).find(|&t| self.left_bytes[t] >= all);
        let anywhere = self.computing_tiers().filter(may).filter(fits);
        let mut found: Vec<TierIdx> = Vec::new();
        for tier in beside_dense.into_iter().chain(Some(staging).filter(may).filter(fits)).chain(anywhere) {
            if !found.contains(&tier) {
                found.push(tier);
            }
        }
        if found.is_empty() && !self.computing_tiers().any(|t| may(&t)) {
            let all_on_gpus = !self.caches.is_empty() && self.caches.iter().all(|c| !c.gpus.is_empty());
            found.extend(self.caches.first().filter(|_| all_on_gpus).and_then(|c| c.gpus.first()));
        }
        if found.is_empty() {
            let after = self.left_bytes[staging];
            let no_gpu = self.caches.iter().position(|c| c.gpus.is_empty());
            if let (Some(layer), true, false) = (no_gpu, wishes.of_cache(), self.computing_tiers().any(|t| may(&t))) {
                bail!(
                    "--fix and --forbid leave no tier for the keys and values of layer {layer}: no GPU that may have them can \
                     have its attention too, and no other memory may have them; take one of them back"
                );
            }
            ensure!(
                !wishes.of_cache(),
                "no tier that --fix and --forbid leave for the key and value cache has room for its {}; take some of it \
                 back, or shorten the context",
                show_bytes(self.kv_bytes)
            );
            ensure!(
                !self.tiers[staging].is_gpu(),
                "the GPUs have no room for the attention of every layer of '{}' with its keys and values, and there is no \
                 other memory for those; add a DRAM tier to machine '{}', or {}",
                inputs.shape.id.name,
                inputs.machine.name,
                mends(inputs, staging, self.kv_bytes)
            );
            bail!(
                "tier '{}' has {} left of its budget of {}, but the key and value cache of {} tokens of context needs \
                 {} as {}; {}",
                self.tiers[staging].name,
                show_bytes(after),
                show_bytes(self.budget_bytes[staging]),
                inputs.context,
                show_bytes(self.kv_bytes),
                inputs.kv_type,
                mends(inputs, staging, self.kv_bytes.saturating_sub(after))
            );
        }
        Ok(found)
    }

    /// Says which layer's attention has no tier, and why.
    fn check_attention(&self, inputs: &Inputs<'_>, wishes: &Wishes) -> Result<()> {
        let of = |d: &&DenseShape| d.kind == DenseKind::Attention;
        for group in inputs.shape.dense.iter().filter(of) {
            let allowed = |&t: &TierIdx| wishes.allows(group.kind, group.layer, t);
            if self.dense_tiers(group).any(|t| allowed(&t)) {
                continue;
            }
            let layer = group.layer.unwrap_or_default();
            let cache = inputs.shape.caches.get(layer as usize);
            let Some(gpu) = self.computing_tiers().filter(|&t| self.tiers[t].is_gpu()).find(allowed) else {
                bail!("--fix and --forbid leave no tier for the attention of layer {layer}; take one of them back");
            };
            let name = &self.tiers[gpu].name;
            ensure!(
                wishes.allows_cache(gpu),
                "the attention of layer {layer} can only be on '{name}' by --fix and --forbid, and with it the layer's keys \
                 and values, which they want elsewhere; take one of them back"
            );
            let bytes = cache.map_or(0, |c| c.context_bytes(inputs.kv_type, inputs.context));
            let needed = bytes.saturating_add(group.bytes);
            bail!(
                "the attention of layer {layer} can only be on '{name}', but with the layer's keys and values it takes {} of the \
                 {} left there; fix or forbid less, or {}",
                show_bytes(needed),
                show_bytes(self.left_bytes[gpu]),
                mends(inputs, gpu, needed.saturating_sub(self.left_bytes[gpu]))
            );
        }
        Ok(())
    }

    fn check_sums(&self, inputs: &Inputs<'_>) -> Result<()> {
        let shape = inputs.shape;
        let dense: u128 = shape.dense.iter().map(|d| u128::from(d.bytes)).sum();
        let experts: u128 = shape.experts.iter().map(|e| u128::from(e.expert_bytes) * u128::from(e.n_expert)).sum();
        let left =
            |tiers: &mut dyn Iterator<Item = TierIdx>| -> u128 { tiers.map(|t| u128::from(self.left_bytes[t])).sum() };
        let names = |tiers: &mut dyn Iterator<Item = TierIdx>| -> String {
            tiers.map(|t| format!("'{}'", self.tiers[t].name)).collect::<Vec<_>>().join(" and ")
        };
        let small = |bytes: u128| u64::try_from(bytes).unwrap_or(u64::MAX);
        let show = |bytes: u128| show_bytes(small(bytes));
        let in_file = |kind| kind == DenseKind::Embedding && !self.in_place;
        let brought = u128::from(self.brought_bytes());
        let computing: u128 = shape.dense.iter().filter(|d| !in_file(d.kind)).map(|d| u128::from(d.bytes)).sum();
        let computing = computing + brought;
        let have = left(&mut self.computing_tiers());
        let (with, beside) =
            if brought > 0 { (", with keys and values,", "") } else { ("", "the key and value cache and ") };
        ensure!(
            computing <= have,
            "the dense tensors of '{}'{with} need {}, but {} have {} left for them beside {beside}the staging buffers; {}",
            shape.id.name,
            show(computing),
            names(&mut self.computing_tiers()),
            show(have),
            mends(inputs, self.staging_tier, small(computing.saturating_sub(have)))
        );
        let have = left(&mut (0..self.tiers.len()));
        let all = dense + experts + brought;
        ensure!(
            all <= have,
            "the weights of '{}'{with} are {}, but all tiers together have {} left for them; {}",
            shape.id.name,
            show(all),
            show(have),
            mends(inputs, self.home(), small(all.saturating_sub(have)))
        );
        Ok(())
    }
}

/// The part of a budget for experts that slots take for whole pages: half a percent to three.
pub fn page_share(shape: &ModelShape) -> f64 {
    let least = shape.experts.iter().map(|e| e.expert_bytes).min().unwrap_or(u64::MAX).max(1);
    let padding = PAGES_BYTES as f64 / least as f64;
    (padding / (1.0 + padding)).clamp(0.005, 0.03)
}
