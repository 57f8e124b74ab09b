//! Local descent: steps from one configuration of a layer to cheaper ones, at given prices.
//!
//! A step moves some experts between the pins of a tier, the slots, and the rest. Step lengths
//! halve from 16 to 1 wherever no step gains.

use crate::cost::{self, ExpertStage};
use crate::solve::problem::capacity::{Capacity, MAX_FAST};
use crate::solve::problem::columns::Config;
use crate::solve::problem::pool::Priced;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;
use tier_plan_runtime::formats::placement::TierIdx;
use tier_plan_runtime::model::shape::ExpertShape;

/// Experts that the first steps of a descent move.
const FIRST_STEP_EXPERTS: u16 = 16;

/// Step lengths that are priced around where a descent ends.
const STEPS_AROUND_MINIMUM: [u16; 2] = [2, 3];

/// Step lengths that are priced around the columns of a choice.
const STEPS_AROUND_CHOICE: [u16; 5] = [1, 2, 3, 5, 8];

/// Times that the surroundings of the cheapest configurations are priced.
const MAX_SCANS: usize = 4;

/// Step lengths that are priced then where experts are used alike.
pub(super) const SMOOTH_STEPS: [u16; 8] = [1, 2, 3, 5, 8, 13, 21, 34];

/// Step lengths that are priced then where tokens were recorded.
pub(super) const ROUGH_STEPS: [u16; 20] = [
    1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20,
];

/// Mean time of a layer's expert stage under any configuration.
pub trait StageTime {
    /// Returns the mean seconds per token.
    fn seconds(&self, config: &Config) -> f64;
}

/// A configuration with the mean seconds of its stage.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TimedConfig {
    /// What is pinned, and the slots.
    pub config: Config,
    /// Mean seconds per token.
    pub seconds: f64,
}

/// Smallest and largest number of slots.
#[derive(Debug, Clone, Copy)]
pub(super) struct SlotRange {
    pub(super) least: u16,
    pub(super) most: u16,
}

/// A layer whose experts are all equally likely.
pub struct UniformStage<'a> {
    stage: ExpertStage,
    capacity: &'a Capacity,
    n_expert: u32,
    n_used: u32,
}

impl<'a> UniformStage<'a> {
    /// Makes the stage of a layer of this shape.
    pub fn new(capacity: &'a Capacity, shape: ExpertShape, stage: ExpertStage) -> Self {
        UniformStage {
            stage,
            capacity,
            n_expert: shape.n_expert,
            n_used: shape.n_used,
        }
    }
}

impl StageTime for UniformStage<'_> {
    fn seconds(&self, config: &Config) -> f64 {
        let (home, n) = (self.capacity.fast(), self.capacity.tiers.len());
        // Groups of alike experts: pinned by tier, resident in slots, neither.
        let mut groups: Vec<u32> = config.pins(home).map(u32::from).collect();
        let pooled = self.n_expert.saturating_sub(groups.iter().sum());
        let resident = u32::from(config.slots).min(pooled);
        groups.extend([resident, pooled - resident]);
        let mut mean = 0.0;
        cost::draw(&groups, self.n_used, |drawn, share| {
            let mut experts = [0u16; MAX_FAST + 2];
            experts
                .iter_mut()
                .zip(&drawn[..home])
                .for_each(|(n, &d)| *n = d as u16);
            let (hits, missed) = (drawn[home] as u16, drawn[home + 1] as u16);
            if config.slots > 0 {
                experts[config.slot_tier.get()] += hits + missed;
                experts[n] = missed;
            } else if self.capacity.in_place {
                experts[home] = missed;
            } else {
                experts[self.capacity.staging_tier.get()] += missed;
                experts[n] = missed;
            }
            mean += share * self.stage.token_s(&experts[..=n], config.slot_tier);
        });
        mean
    }
}

/// The descent of one layer, with the configurations that it has priced.
pub struct LocalDescent<'a, T> {
    pub(super) timed: T,
    pub(super) capacity: &'a Capacity,
    n_expert: u16,
    n_used: u16,
    expert_bytes: u64,
    /// `[tiers]` worth of an expert's bytes, in seconds.
    pub(super) expert_price_s: [f64; MAX_FAST + 1],
    /// `[tiers]` whether the layer's experts may be there.
    is_allowed: [bool; MAX_FAST + 1],
    /// Configurations that were priced, fitting or not.
    pub(super) known: Priced,
}

impl<'a, T: StageTime> LocalDescent<'a, T> {
    /// Makes the descent of a layer of this shape at some prices, in seconds per byte.
    pub fn new(timed: T, capacity: &'a Capacity, shape: ExpertShape, price: &[f64]) -> Self {
        let expert_bytes = shape.expert_bytes;
        let mut expert_price_s = [0.0; MAX_FAST + 1];
        expert_price_s
            .iter_mut()
            .zip(price)
            .for_each(|(to, p)| *to = p * expert_bytes as f64);
        LocalDescent {
            timed,
            capacity,
            n_expert: shape.n_expert as u16,
            n_used: shape.n_used as u16,
            expert_bytes,
            expert_price_s,
            is_allowed: [true; MAX_FAST + 1],
            known: Priced::new(),
        }
    }

    /// Keeps the layer's experts from some tiers.
    #[must_use]
    pub fn forbidding(mut self, tiers: &BTreeSet<TierIdx>) -> Self {
        tiers.iter().for_each(|t| self.is_allowed[t.get()] = false);
        self
    }

    /// Takes configurations as priced.
    #[must_use]
    pub fn knowing(mut self, known: Priced) -> Self {
        self.known = known;
        self
    }

    /// Returns all configurations that were priced.
    pub fn into_known(self) -> Priced {
        self.known
    }

    /// Descends from the best of some configurations, and returns all that were priced.
    ///
    /// `descents` limits the starting points. The cheapest configuration comes first.
    pub fn cheapest(
        &mut self,
        mut start: Vec<Config>,
        descents: usize,
        deadline: Instant,
    ) -> Vec<TimedConfig> {
        start.iter().for_each(|config| {
            self.value(config);
        });
        start.sort_by(|a, b| self.known_value(a).total_cmp(&self.known_value(b)));
        for config in start.into_iter().take(descents) {
            self.descend(config, deadline);
        }
        self.by_value()
    }

    /// Prices the configurations around some, and returns all that were priced, cheapest first.
    pub fn around(&mut self, centers: &BTreeSet<Config>, deadline: Instant) -> Vec<TimedConfig> {
        for config in centers {
            for step in STEPS_AROUND_CHOICE {
                if Instant::now() >= deadline {
                    break;
                }
                self.neighbors(config, step).iter().for_each(|c| {
                    self.seconds(c);
                });
            }
        }
        self.by_value()
    }

    /// Prices steps around the cheapest configuration per tier of slots, and moves on while that
    /// finds a cheaper one.
    ///
    /// The longest of several paths bends wherever another one becomes the longest, and means over
    /// a finite number of tokens are rough. So descents end in places that are nearly the best.
    pub(super) fn scan(&mut self, steps: &[u16], deadline: Instant) {
        let mut scanned: BTreeSet<Config> = BTreeSet::new();
        for _ in 0..MAX_SCANS {
            let mut cheapest: BTreeMap<Option<TierIdx>, TimedConfig> = BTreeMap::new();
            for timed in self.by_value() {
                let slot_tier = (timed.config.slots > 0).then_some(timed.config.slot_tier);
                cheapest.entry(slot_tier).or_insert(timed);
            }
            let centers: Vec<Config> = cheapest
                .into_values()
                .map(|timed| timed.config)
                .filter(|config| scanned.insert(*config))
                .collect();
            if centers.is_empty() || Instant::now() >= deadline {
                return;
            }
            for center in centers {
                for &step in steps {
                    self.neighbors(&center, step).iter().for_each(|c| {
                        self.seconds(c);
                    });
                }
            }
        }
    }

    /// Returns the priced configurations that fit, the cheapest first.
    pub(super) fn by_value(&self) -> Vec<TimedConfig> {
        let known = self.known.iter().map(|(config, seconds)| TimedConfig {
            config: *config,
            seconds: *seconds,
        });
        let mut configs: Vec<TimedConfig> =
            known.filter(|timed| self.fits(&timed.config)).collect();
        configs.sort_by(|a, b| {
            let value = |timed: &TimedConfig| timed.seconds + self.priced_bytes(&timed.config);
            value(a).total_cmp(&value(b)).then(a.config.cmp(&b.config))
        });
        configs
    }

    /// Returns the slots that a last cut allows, if any expert is pooled.
    pub(super) fn slot_range(&self, last_cut: u16) -> Option<SlotRange> {
        let pooled = (self.n_expert).checked_sub(last_cut).filter(|&p| p > 0)?;
        Some(SlotRange {
            least: self.n_used.min(pooled),
            most: pooled,
        })
    }

    /// Returns the mean seconds of a configuration.
    pub fn seconds(&mut self, config: &Config) -> f64 {
        if let Some(&known) = self.known.get(config) {
            return known;
        }
        let seconds = self.timed.seconds(config);
        self.known.insert(*config, seconds);
        seconds
    }

    /// Returns the worth of a configuration's bytes, in seconds.
    pub(super) fn priced_bytes(&self, config: &Config) -> f64 {
        let fast = self.capacity.fast();
        let last_cut = config.last_cut(fast);
        let price = &self.expert_price_s;
        let pins: f64 = config
            .pins(fast)
            .zip(price)
            .map(|(n, p)| f64::from(n) * p)
            .sum();
        let slots = if config.slots > 0 {
            price[config.slot_tier.get()] * f64::from(config.slots)
        } else {
            0.0
        };
        pins + slots + price[fast] * (f64::from(self.n_expert) - f64::from(last_cut))
    }

    /// Returns the seconds and priced bytes of a configuration.
    pub fn value(&mut self, config: &Config) -> f64 {
        self.seconds(config) + self.priced_bytes(config)
    }

    /// Whether a configuration's tiers are allowed and its bytes fit them, with nothing beside.
    pub(super) fn fits(&self, config: &Config) -> bool {
        let fast = self.capacity.fast();
        let last_cut = config.last_cut(fast);
        let pins = |tier: usize| if tier < fast { config.pins_on(tier) } else { 0 };
        (0..=fast).all(|tier| {
            let has_slots = config.slots > 0 && config.slot_tier.get() == tier;
            let slots = if has_slots { config.slots } else { 0 };
            let home = if tier == fast {
                u64::from(self.n_expert) - u64::from(last_cut)
            } else {
                0
            };
            let placed = u64::from(pins(tier)) + u64::from(slots);
            (placed == 0 || self.is_allowed[tier])
                && (placed + home) * self.expert_bytes <= self.capacity.left_bytes[tier]
        })
    }

    /// Returns the value of a configuration that was priced before; infinite if it was not.
    pub(super) fn known_value(&self, config: &Config) -> f64 {
        self.known
            .get(config)
            .map_or(f64::INFINITY, |s| s + self.priced_bytes(config))
    }

    /// Moves to the best neighbor until there is none, with ever smaller steps.
    fn descend(&mut self, from: Config, deadline: Instant) {
        let (mut current, mut value) = (from, self.value(&from));
        let mut step = FIRST_STEP_EXPERTS;
        while step > 0 && Instant::now() < deadline {
            let neighbors = self.neighbors(&current, step).into_iter();
            let best = neighbors
                .map(|c| (self.value(&c), c))
                .min_by(|a, b| a.0.total_cmp(&b.0));
            match best.filter(|(v, _)| *v < value) {
                Some((v, c)) => (current, value) = (c, v),
                None => step /= 2,
            }
        }
        for step in STEPS_AROUND_MINIMUM {
            self.neighbors(&current, step).iter().for_each(|c| {
                self.seconds(c);
            });
        }
    }

    /// Returns the configurations that move `step` experts between pins, slots, and the rest.
    fn neighbors(&self, center: &Config, step: u16) -> Vec<Config> {
        let fast = self.capacity.fast();
        let most = self.n_expert;
        let mut neighbors = Vec::new();
        // A move adds to all cuts from one tier up to another, and to the slots.
        for from in 0..fast {
            for to in from + 1..=fast {
                for up in [false, true] {
                    for slots in [0i32, 1, -1] {
                        let mut next = *center;
                        let sign = if up { 1 } else { -1 };
                        for cut in &mut next.cuts[from..to] {
                            let moved = i32::from(*cut) + sign * i32::from(step);
                            *cut = moved.clamp(0, i32::from(most)) as u16;
                        }
                        let moved = i32::from(next.slots) - slots * sign * i32::from(step);
                        if slots != 0 && (to != fast || center.slots == 0) {
                            continue;
                        }
                        next.slots = moved.clamp(0, i32::from(most)) as u16;
                        neighbors.push(next);
                    }
                }
            }
        }
        if center.slots > 0 {
            for slots in [
                center.slots.saturating_sub(step),
                center.slots.saturating_add(step),
            ] {
                neighbors.push(Config { slots, ..*center });
            }
        }
        neighbors.retain(|c| {
            let is_ordered = c.cuts[..fast].windows(2).all(|w| w[0] <= w[1]);
            let slots_fit = match (center.slots > 0, self.slot_range(c.last_cut(fast))) {
                (true, Some(SlotRange { least, most })) => (least..=most).contains(&c.slots),
                (true, None) => false,
                (false, _) => c.slots == 0,
            };
            is_ordered && slots_fit && c != center && self.fits(c)
        });
        neighbors
    }
}
