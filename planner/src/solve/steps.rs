//! Steps from one configuration of a layer to better ones, at given prices for bytes.

use super::columns::Config;
use super::room::{MAX_FAST, Room};
use crate::cost::{self, ExpertStage};
use std::collections::{BTreeSet, HashMap};
use std::time::Instant;

/// Something that knows the mean seconds of a layer's stage under any configuration.
pub trait Timed {
    /// Mean seconds.
    fn seconds(&self, config: &Config) -> f64;
}

/// A layer whose experts are all equally likely.
pub struct Drawn<'a> {
    stage: ExpertStage,
    room: &'a Room,
    n_expert: u32,
    used: u32,
}

impl<'a> Drawn<'a> {
    /// One for a layer of so many experts, of which a token uses some, and its stage.
    pub fn new(room: &'a Room, n_expert: u32, used: u32, stage: ExpertStage) -> Self {
        Drawn { stage, room, n_expert, used }
    }
}

impl Timed for Drawn<'_> {
    fn seconds(&self, config: &Config) -> f64 {
        let (home, n) = (self.room.home(), self.room.tiers.len());
        // Pinned by tier, resident in slots, neither.
        let mut groups: Vec<u32> = config.pins(home).map(u32::from).collect();
        let pooled = self.n_expert.saturating_sub(groups.iter().sum());
        let resident = u32::from(config.slots).min(pooled);
        groups.extend([resident, pooled - resident]);
        let mut mean = 0.0;
        cost::draw(&groups, self.used, |drawn, share| {
            let mut experts = [0u16; MAX_FAST + 2];
            experts.iter_mut().zip(&drawn[..home]).for_each(|(n, &d)| *n = d as u16);
            let (hits, missed) = (drawn[home] as u16, drawn[home + 1] as u16);
            if config.slots > 0 {
                experts[usize::from(config.slot_tier)] += hits + missed;
                experts[n] = missed;
            } else if self.room.in_place {
                experts[home] = missed;
            } else {
                experts[self.room.staging_tier] += missed;
                experts[n] = missed;
            }
            mean += share * self.stage.token_s(&experts[..=n], config.slot_tier.into());
        });
        mean
    }
}

/// The steps of one layer.
pub struct Steps<'a, T> {
    /// What times configurations.
    pub(super) timed: T,
    pub(super) room: &'a Room,
    n_expert: u16,
    used: u16,
    expert_bytes: u64,
    /// `[tiers]` seconds for the bytes of an expert.
    pub(super) price: [f64; MAX_FAST + 1],
    known: HashMap<Config, f64>,
}

impl<'a, T: Timed> Steps<'a, T> {
    /// Steps of a layer of so many experts, of which a token uses some, at some prices a byte.
    pub fn new(timed: T, room: &'a Room, [n_expert, used]: [u16; 2], expert_bytes: u64, price: &[f64]) -> Self {
        let mut priced = [0.0; MAX_FAST + 1];
        priced.iter_mut().zip(price).for_each(|(to, p)| *to = p * expert_bytes as f64);
        Steps { timed, room, n_expert, used, expert_bytes, price: priced, known: HashMap::new() }
    }

    fn fast(&self) -> usize {
        self.room.home()
    }

    /// The cheapest configurations that steps from the best `descents` of some lead to, the best first, with their seconds.
    pub fn cheapest(&mut self, mut begin: Vec<Config>, descents: usize, deadline: Instant) -> Vec<(Config, f64)> {
        begin.iter().for_each(|config| {
            self.value(config);
        });
        begin.sort_by(|a, b| self.known_value(a).total_cmp(&self.known_value(b)));
        for config in begin.into_iter().take(descents) {
            self.descend(config, deadline);
        }
        self.by_value()
    }

    /// The configurations around some, the best first, with their seconds.
    pub fn around(&mut self, these: &BTreeSet<Config>, deadline: Instant) -> Vec<(Config, f64)> {
        for config in these {
            for step in [1, 2, 3, 5, 8] {
                if Instant::now() >= deadline {
                    break;
                }
                self.neighbours(config, step).iter().for_each(|c| {
                    self.seconds(c);
                });
            }
        }
        self.by_value()
    }

    /// All configurations whose seconds were asked for, if they fit.
    fn by_value(&self) -> Vec<(Config, f64)> {
        let mut configs: Vec<(Config, f64)> =
            self.known.iter().map(|(c, s)| (*c, *s)).filter(|(c, _)| self.fits(c)).collect();
        configs.sort_by(|a, b| {
            let value = |x: &(Config, f64)| x.1 + self.priced_bytes(&x.0);
            value(a).total_cmp(&value(b)).then(a.0.cmp(&b.0))
        });
        configs
    }

    /// The slots that a last cut allows.
    pub(super) fn slot_range(&self, last: u16) -> Option<(u16, u16)> {
        let pooled = (self.n_expert).checked_sub(last).filter(|&p| p > 0)?;
        Some((self.used.min(pooled), pooled))
    }

    /// Mean seconds of a configuration.
    pub fn seconds(&mut self, config: &Config) -> f64 {
        if let Some(&known) = self.known.get(config) {
            return known;
        }
        let seconds = self.timed.seconds(config);
        self.known.insert(*config, seconds);
        seconds
    }

    /// Seconds that the bytes of a configuration are worth.
    pub(super) fn priced_bytes(&self, config: &Config) -> f64 {
        let fast = self.fast();
        let last = if fast == 0 { 0 } else { config.cuts[fast - 1] };
        let pins: f64 = config.pins(fast).zip(&self.price).map(|(n, p)| f64::from(n) * p).sum();
        let slots =
            if config.slots > 0 { self.price[usize::from(config.slot_tier)] * f64::from(config.slots) } else { 0.0 };
        pins + slots + self.price[fast] * (f64::from(self.n_expert) - f64::from(last))
    }

    /// Seconds and priced bytes of a configuration.
    pub fn value(&mut self, config: &Config) -> f64 {
        self.seconds(config) + self.priced_bytes(config)
    }

    /// Whether its bytes fit the tiers, with nothing beside them.
    pub(super) fn fits(&self, config: &Config) -> bool {
        let fast = self.fast();
        let last = if fast == 0 { 0 } else { config.cuts[fast - 1] };
        let pins = |tier: usize| {
            if tier < fast { config.cuts[tier] - if tier == 0 { 0 } else { config.cuts[tier - 1] } } else { 0 }
        };
        (0..=fast).all(|tier| {
            let slots = if config.slots > 0 && usize::from(config.slot_tier) == tier { config.slots } else { 0 };
            let home = if tier == fast { u64::from(self.n_expert) - u64::from(last) } else { 0 };
            (u64::from(pins(tier)) + u64::from(slots) + home) * self.expert_bytes <= self.room.left_bytes[tier]
        })
    }

    /// Seconds and priced bytes of a configuration whose seconds were asked for before; infinite if they were not.
    pub(super) fn known_value(&self, config: &Config) -> f64 {
        self.known.get(config).map_or(f64::INFINITY, |s| s + self.priced_bytes(config))
    }

    /// Goes to the best neighbour until there is none, with ever smaller steps.
    fn descend(&mut self, from: Config, deadline: Instant) {
        let (mut at, mut value) = (from, self.value(&from));
        let mut step = 16u16;
        while step > 0 && Instant::now() < deadline {
            let next =
                self.neighbours(&at, step).into_iter().map(|c| (self.value(&c), c)).min_by(|a, b| a.0.total_cmp(&b.0));
            match next.filter(|(v, _)| *v < value) {
                Some((v, c)) => (at, value) = (c, v),
                None => step /= 2,
            }
        }
        for step in [2, 3] {
            self.neighbours(&at, step).iter().for_each(|c| {
                self.seconds(c);
            });
        }
    }

    /// Configurations that move some experts from one place to another: pins of a tier, slots, or the rest.
    fn neighbours(&self, at: &Config, step: u16) -> Vec<Config> {
        let fast = self.fast();
        let most = self.n_expert;
        let mut found = Vec::new();
        // A move adds to all cuts from one tier up to another, and to the slots.
        for from in 0..fast {
            for to in from + 1..=fast {
                for up in [false, true] {
                    for slots in [0i32, 1, -1] {
                        let mut next = *at;
                        let sign = if up { 1 } else { -1 };
                        for cut in &mut next.cuts[from..to] {
                            *cut = (i32::from(*cut) + sign * i32::from(step)).clamp(0, i32::from(most)) as u16;
                        }
                        let moved = i32::from(next.slots) - slots * sign * i32::from(step);
                        if slots != 0 && (to != fast || at.slots == 0) {
                            continue;
                        }
                        next.slots = moved.clamp(0, i32::from(most)) as u16;
                        found.push(next);
                    }
                }
            }
        }
        if at.slots > 0 {
            for slots in [at.slots.saturating_sub(step), at.slots.saturating_add(step)] {
                found.push(Config { slots, ..*at });
            }
        }
        found.retain(|c| {
            let ordered = c.cuts[..fast].windows(2).all(|w| w[0] <= w[1]);
            let last = if fast == 0 { 0 } else { c.cuts[fast - 1] };
            let slots = match (at.slots > 0, self.slot_range(last)) {
                (true, Some((least, most))) => (least..=most).contains(&c.slots),
                (true, None) => false,
                (false, _) => c.slots == 0,
            };
            ordered && slots && c != at && self.fits(c)
        });
        found
    }
}
