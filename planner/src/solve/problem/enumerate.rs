//! Enumerates a layer's columns (pins per tier, slots) and prices each with the cost model.
//!
//! All columns of one last cut share one replay of the recorded tokens: the pooled experts are the
//! same, and so are their LRU stack distances. A token's experts on each path follow from its ranks
//! and the cuts. The time under every number of slots is then one pass over the stack distances: a
//! slot more turns the choices of that distance from misses into hits.

mod layer;

use super::capacity::{Capacity, MAX_FAST};
use super::columns::{Charge, Config, Item, Meaning};
use super::constraints::{Constraints, LayerConstraints};
use super::grid::{Axes, Grid};
use super::pool::PoolKey;
use super::reuse_table::ReuseTable;
use crate::cost::batch::{self, PassStage, Spread, Step, Use};
use crate::cost::{ExpertStage, outcomes, stage_mean_s};
use crate::profile::{Evidence, Judged, LayerEvidence};
use layer::LayerColumns;
use std::collections::BTreeMap;
use tier_plan_runtime::formats::placement::{LayerPlacement, PerTier, Pins, TierIdx};
use tier_plan_runtime::kernels::scoped::spawn_or_run;
use tier_plan_runtime::model::shape::ModelShape;

/// Items of layers above which pricing begins with groups of layers.
const MAX_GROUPS: usize = 8;

/// Rank of an expert that is fixed to a tier: this plus the tier, beyond every rank.
const FIXED_RANK: u16 = 1 << 15;

/// Experts of one token on each path: tiers, then transfers. Pooled experts are first counted on
/// the last tier.
type Paths = [u16; MAX_FAST + 2];

/// Enumerates the columns of layers.
pub struct ColumnEnumerator<'a> {
    pub(crate) evidence: &'a Evidence,
    pub(crate) capacity: &'a Capacity,
    /// Counts of pins and slots that are listed.
    pub grid: Grid,
    /// Rows that can run out.
    scarce: Vec<usize>,
    /// Whether columns off the grid can be priced: the grid is not full, and columns cost their
    /// seconds alone.
    pub prices_off_grid: bool,
    charge: &'a Charge,
    /// `[layers]`
    pub(crate) fixed: Vec<FixedExperts>,
}

/// What the user fixed of a layer, in the form that columns need.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct FixedExperts {
    /// Experts that columns may pin, the most used first, then those fixed to the last tier.
    free: Vec<u32>,
    /// `[n_expert]` rank among the free, or [`FIXED_RANK`] plus the tier.
    rank: Vec<u16>,
    /// Number of experts fixed to each tier.
    per_tier: PerTier<u16>,
    /// The largest last cut: experts of higher ranks stay on the last tier.
    max_cut: u16,
    pub(crate) constraints: LayerConstraints,
}

impl FixedExperts {
    fn new(layer: &LayerEvidence, constraints: LayerConstraints, home: TierIdx) -> Self {
        let fixed = |e: &u32| constraints.fixed.get(e).copied();
        let mut free: Vec<u32> = layer
            .order
            .iter()
            .copied()
            .filter(|e| fixed(e).is_none())
            .collect();
        let max_cut = free.len() as u16;
        free.extend(
            layer
                .order
                .iter()
                .copied()
                .filter(|e| fixed(e) == Some(home)),
        );
        let mut rank = vec![0u16; layer.order.len()];
        let mut per_tier = PerTier::from_fn(home.get() + 1, |_| 0u16);
        free.iter()
            .enumerate()
            .for_each(|(at, &e)| rank[e as usize] = at as u16);
        for (&expert, &tier) in constraints.fixed.iter().filter(|(_, t)| **t != home) {
            rank[expert as usize] = FIXED_RANK + tier.get() as u16;
            per_tier[tier] += 1;
        }
        FixedExperts {
            free,
            rank,
            per_tier,
            max_cut,
            constraints,
        }
    }

    /// Returns `[n_expert]` whether each expert is pinned where the first free ones are.
    fn pinned_up_to(&self, last_cut: u16) -> Vec<bool> {
        self.rank
            .iter()
            .map(|&r| r < last_cut || r >= FIXED_RANK)
            .collect()
    }
}

impl<'a> ColumnEnumerator<'a> {
    /// Makes the enumerator of a model's layers, with the finest grid that there is time for.
    pub fn new(
        shape: &ModelShape,
        evidence: &'a Evidence,
        capacity: &'a Capacity,
        charge: &'a Charge,
        constraints: &Constraints,
        seconds: f64,
    ) -> Self {
        let total = shape
            .weight_bytes()
            .saturating_add(capacity.moving_cache_bytes());
        let n_tiers = capacity.tiers.len();
        let time_row = n_tiers..capacity.left_bytes.len();
        let can_run_out = |&row: &usize| capacity.left_bytes[row] < total;
        let scarce = (0..n_tiers).filter(can_run_out).chain(time_row).collect();
        let mut grid = Grid::new(evidence, capacity, seconds);
        let of_layer = |layer: u32| {
            let mut of_layer = constraints.layer(layer);
            let cannot = |&t: &TierIdx| !capacity.runs_experts(layer, t);
            let tiers = TierIdx::first(capacity.fast()).filter(cannot);
            of_layer.forbidden.extend(tiers);
            of_layer
        };
        let mut layers = evidence.layers.iter();
        let is_free = layers.all(|l| of_layer(l.shape.layer).leaves_experts_free());
        let is_plain = charge.is_plain() && is_free;
        let can_step = |layer: &LayerEvidence| {
            matches!(layer.judged, Judged::Uniform) || ReuseTable::is_possible(layer)
        };
        let prices_off_grid = is_plain && !grid.is_full && evidence.layers.iter().all(can_step);
        if prices_off_grid {
            grid = Grid::coarse(evidence, capacity);
        }
        let home = capacity.home();
        let fixed = evidence
            .layers
            .iter()
            .map(|l| FixedExperts::new(l, of_layer(l.shape.layer), home))
            .collect();
        ColumnEnumerator {
            evidence,
            capacity,
            grid,
            scarce,
            prices_off_grid,
            charge,
            fixed,
        }
    }

    /// Returns the placement that a configuration stands for in the layer at position `at`.
    pub fn placement(&self, at: usize, config: &Config) -> LayerPlacement {
        let fixed = &self.fixed[at];
        let home = self.capacity.home();
        let mut placed = config.placement(
            self.evidence.layers[at].shape.layer,
            &fixed.free,
            self.capacity.fast(),
        );
        for (&expert, &tier) in fixed.constraints.fixed.iter().filter(|(_, t)| **t != home) {
            match placed.pinned.iter_mut().find(|pins| pins.tier == tier) {
                Some(pins) => pins.experts.push(expert),
                None => placed.pinned.push(Pins {
                    tier,
                    experts: vec![expert],
                }),
            }
        }
        placed
            .pinned
            .iter_mut()
            .for_each(|pins| pins.experts.sort_unstable());
        placed.pinned.sort_by_key(|pins| pins.tier);
        placed
    }

    /// Returns the configuration with as many pins on each tier as a placement, and its slots.
    ///
    /// `at` is the layer's position. Returns `None` if the placement misses a fixed expert.
    pub fn config_of(&self, at: usize, placed: &LayerPlacement) -> Option<Config> {
        let fixed = &self.fixed[at];
        let slot_tier = placed.slot_tier;
        let mut config = Config {
            cuts: [0; MAX_FAST],
            slots: placed.slots as u16,
            slot_tier,
        };
        let mut sum = 0;
        for tier in TierIdx::first(self.capacity.fast()) {
            let on_tier = placed.pinned.iter().filter(|pins| pins.tier == tier);
            let pins = on_tier.map(|pins| pins.experts.len()).sum::<usize>();
            sum += pins.checked_sub(usize::from(fixed.per_tier[tier]))?;
            config.cuts[tier.get()] = sum as u16;
        }
        (sum <= fixed.free.len()).then_some(config)
    }

    /// Returns the number of experts that columns may pin in the layer at position `at`.
    pub fn max_cut(&self, at: usize) -> u16 {
        self.fixed[at].max_cut
    }

    /// Returns what the priced columns of the layer at position `at` are known by.
    pub(crate) fn pool_key(&self, at: usize) -> PoolKey {
        let layer = &self.evidence.layers[at];
        let constraints = &self.fixed[at].constraints;
        let is_free = constraints.leaves_experts_free();
        let Some(class) = layer.class.filter(|_| is_free) else {
            return PoolKey::Layer(at);
        };
        // What the token chooses is read while the dense stage before runs.
        let prefetch = layer.prefetch;
        let ahead = prefetch.is_exact.then_some(prefetch.dense_bytes);
        PoolKey::Alike {
            class,
            n_expert: layer.shape.n_expert,
            n_used: layer.shape.n_used,
            expert_bytes: layer.shape.expert_bytes,
            ahead_bytes: ahead,
            forbidden: constraints.forbidden.clone(),
        }
    }

    /// Returns the layers that share their columns, by position.
    fn alike(&self) -> Vec<Vec<usize>> {
        let mut alike: Vec<Vec<usize>> = Vec::new();
        let mut places: BTreeMap<PoolKey, usize> = BTreeMap::new();
        for at in 0..self.evidence.layers.len() {
            let place = *places.entry(self.pool_key(at)).or_insert_with(|| {
                alike.push(Vec::new());
                alike.len() - 1
            });
            alike[place].push(at);
        }
        alike
    }

    /// Returns all layers' items without columns.
    pub(crate) fn empty_items(&self) -> Vec<Item> {
        self.alike().into_iter().map(Item::of_layers).collect()
    }

    /// Returns groups of layers of the same sizes as items without columns, and the group of each
    /// of [`empty_items`](Self::empty_items).
    ///
    /// A group is priced as the layer in its middle is, which comes first.
    pub(crate) fn groups(&self) -> (Vec<Item>, Vec<usize>) {
        let alike = self.alike();
        let mut by_size: BTreeMap<(u32, u32, u64, bool), Vec<usize>> = BTreeMap::new();
        for (at, layers) in alike.iter().enumerate() {
            let shape = &self.evidence.layers[layers[0]].shape;
            let key = (
                shape.n_expert,
                shape.n_used,
                shape.expert_bytes,
                shape.by_token,
            );
            by_size.entry(key).or_default().push(at);
        }
        let per_group = alike.len().div_ceil(MAX_GROUPS).max(1);
        let mut group_of = vec![0; alike.len()];
        let mut groups = Vec::new();
        for members in by_size.values().flat_map(|all| all.chunks(per_group)) {
            members.iter().for_each(|&at| group_of[at] = groups.len());
            let mut layers: Vec<usize> =
                members.iter().flat_map(|&at| &alike[at]).copied().collect();
            let middle = layers.len() / 2;
            layers[..=middle].rotate_right(1);
            groups.push(Item::of_layers(layers));
        }
        (groups, group_of)
    }

    /// Returns all layers' items with the columns on the grid, enumerated on all cores.
    pub fn items(&self) -> Vec<Item> {
        let mut items = self.empty_items();
        self.list(&mut items);
        items
    }

    /// Adds to items without columns those on the grid, enumerated on all cores.
    pub(crate) fn list(&self, items: &mut [Item]) {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
        let threads = threads.min(items.len().max(1));
        std::thread::scope(|scope| {
            let chunk = items.len().div_ceil(threads).max(1);
            for items in items.chunks_mut(chunk) {
                spawn_or_run(scope, move || {
                    for item in items {
                        let Some(&first) = item.layers().first() else {
                            continue;
                        };
                        let cuts = self.grid.axis(0, self.max_cut(first));
                        let axes = Axes {
                            last_cuts: cuts.clone(),
                            cuts,
                            slots: None,
                        };
                        self.extend(item, &axes);
                    }
                });
            }
        });
    }

    /// Adds the columns on the given axes that fit the tiers and are not dominated.
    pub fn extend(&self, item: &mut Item, axes: &Axes) {
        let Meaning::Experts { layers, .. } = &item.meaning else {
            return;
        };
        let layer = &self.evidence.layers[layers[0]];
        let fixed = &self.fixed[layers[0]];
        let before = item.len();
        let columns = LayerColumns {
            enumerator: self,
            layer,
            fixed,
            stage: self.stage(layer),
            axes,
        };
        match &layer.judged {
            _ if self.charge.step.is_some() => columns.batched(item),
            Judged::Recorded(trace) => columns.recorded(item, trace),
            Judged::Uniform => columns.uniform(item),
        }
        item.drop_dominated(before, self.capacity.left_bytes.len(), &self.scarce);
    }

    /// Adds one column, whatever the grid. Returns its position, or `None` if it does not fit.
    pub fn add(&self, item: &mut Item, config: Config) -> Option<usize> {
        let Meaning::Experts { layers, configs } = &item.meaning else {
            return None;
        };
        if let Some(column) = configs.iter().position(|c| *c == config) {
            return Some(column);
        }
        let at = layers[0];
        let (layer, fixed) = (&self.evidence.layers[at], &self.fixed[at]);
        let seconds = match &self.charge.step {
            Some(step) => self.touched(layer, fixed, step).seconds(&config),
            None => {
                let stage = self.stage(layer);
                let placed = self.placement(at, &config);
                let (tiers, staging) = (&self.capacity.tiers, self.capacity.staging_tier);
                let outcomes = outcomes(&placed, layer, tiers, staging);
                stage_mean_s(&stage, &outcomes, placed.brought_to(staging))
            }
        };
        self.push(item, layer, fixed, config, seconds)
            .then(|| item.len() - 1)
    }

    /// Returns a layer's expert stage for one token.
    pub(crate) fn stage(&self, layer: &LayerEvidence) -> ExpertStage {
        ExpertStage::new(
            &self.capacity.tiers,
            layer.shape.expert_bytes,
            layer.prefetch,
        )
    }

    /// Adds a column of known time. Returns whether it fits.
    pub(crate) fn push(
        &self,
        item: &mut Item,
        layer: &LayerEvidence,
        fixed: &FixedExperts,
        config: Config,
        seconds: f64,
    ) -> bool {
        let (fast, n) = (self.capacity.fast(), self.capacity.tiers.len());
        let expert_bytes = layer.shape.expert_bytes;
        let mut bytes = [0u64; MAX_FAST + 1];
        let mut pooled = u64::from(layer.shape.n_expert);
        let constraints = &fixed.constraints;
        for (tier, pins) in TierIdx::first(fast).zip(config.pins(fast)) {
            if pins > 0 && constraints.forbidden.contains(&tier) {
                return false;
            }
            let pins = u64::from(pins) + u64::from(fixed.per_tier[tier]);
            bytes[tier.get()] = pins * expert_bytes;
            pooled -= pins;
        }
        if !constraints.allows_slots(config.slot_tier, config.slots.into()) {
            return false;
        }
        if config.slots > 0 {
            bytes[config.slot_tier.get()] += u64::from(config.slots) * expert_bytes;
        }
        bytes[fast] += pooled * expert_bytes;
        let fits = config.last_cut(fast) <= fixed.max_cut
            && bytes[..n]
                .iter()
                .zip(&self.capacity.left_bytes)
                .all(|(b, left)| b <= left);
        if let (true, Meaning::Experts { configs, .. }) = (fits, &mut item.meaning) {
            configs.push(config);
            item.cost_s.push(self.charge.cost(seconds, &bytes[..n]));
            self.charge.push_rows(seconds, &bytes[..n], &mut item.bytes);
        }
        fits
    }

    /// Returns what a step is expected to use of a layer's experts.
    fn touched(&self, layer: &LayerEvidence, fixed: &FixedExperts, step: &Step) -> TouchedExperts {
        let touched = batch::touched(layer, step.pass_rows());
        let mut sum = Use::default();
        let sums = fixed.free.iter().map(|&e| {
            sum += touched[e as usize];
            sum
        });
        let up_to_rank = std::iter::once(Use::default()).chain(sums).collect();
        let mut on_tier = PerTier::from_fn(self.capacity.tiers.len(), |_| Use::default());
        let pinned = fixed
            .constraints
            .fixed
            .iter()
            .filter(|(_, t)| **t != self.capacity.home());
        pinned.for_each(|(&e, &t)| on_tier[t] += touched[e as usize]);
        let n_fixed: u32 = fixed.per_tier.iter().map(|&n| u32::from(n)).sum();
        let Capacity {
            tiers,
            staging_tier,
            ..
        } = self.capacity;
        TouchedExperts {
            stage: PassStage::new(step, tiers, &layer.shape, *staging_tier),
            passes_per_text: step.passes() / f64::from(step.texts),
            fast: self.capacity.fast(),
            up_to_rank,
            on_tier,
            n_free: f64::from(layer.shape.n_expert - n_fixed),
        }
    }
}

/// Expected use of a layer's experts by the passes of a step.
struct TouchedExperts {
    stage: PassStage,
    /// Passes of the step divided by its sequences.
    passes_per_text: f64,
    /// Tiers above the last one.
    fast: usize,
    /// `[free experts + 1]` use of the free experts before each rank.
    up_to_rank: Vec<Use>,
    /// Use of the experts fixed to each tier.
    on_tier: PerTier<Use>,
    /// Experts that are not fixed to a tier above the last one.
    n_free: f64,
}

impl TouchedExperts {
    /// Returns the seconds of the stage's passes under a column, divided by the step's sequences.
    fn seconds(&self, config: &Config) -> f64 {
        let up_to_rank = &self.up_to_rank;
        let mut pinned = self.on_tier.clone();
        let mut from = 0;
        for (tier, pinned) in pinned.iter_mut().enumerate().take(self.fast) {
            let to = usize::from(config.cuts[tier]);
            *pinned += up_to_rank[to] - up_to_rank[from];
            from = to;
        }
        let spread = Spread {
            pinned,
            pooled: up_to_rank[up_to_rank.len() - 1] - up_to_rank[from],
            n_pooled: self.n_free - from as f64,
            slots: config.slots.into(),
            slot_tier: config.slot_tier,
        };
        self.passes_per_text * self.stage.seconds(&spread)
    }
}
