//! All configurations of a layer at once, at given prices for bytes: a bound that none goes below, and the cheapest ones.
//!
//! Large layers have more configurations than can be listed: 384 experts over four tiers have thousands of millions. A
//! token's time is the longest of its paths, and a longest path is at least any weighted mean of the paths. With weights
//! that are fixed for each token, the layer's time comes apart into terms of one cut each, and one of the last cut and
//! the slots: its least value over *all* cuts and slots is found by adding up tables. That is a bound whatever the
//! weights. Where it isn't good enough, weights are moved towards the paths that are longest at its least point, and the
//! box of configurations is cut in two. What is best at such a point is also the next candidate to price exactly.

use super::columns::Config;
use super::room::{MAX_FAST, Room};
use super::table::Table;
use crate::cost::ExpertStage;
use crate::profile::LayerEvidence;
use std::collections::HashMap;
use std::time::Instant;
use tier_plan_runtime::formats::placement::TierIdx;

/// Times that the weights of a box are moved before it is cut in two.
const TRIES: u32 = 4;

/// Places that steps begin from.
const DESCENTS: usize = 4;

/// Width of the weights at first, as a share of a token's time.
const HEAT: f32 = 0.1;

/// Paths: the tiers, and the transfers.
const PATHS: usize = MAX_FAST + 2;

/// A box of configurations that have slots on one tier, or none.
struct Box {
    slot_tier: Option<TierIdx>,
    /// `[fast tiers]` then the slots: least and largest.
    low: [u16; MAX_FAST + 1],
    high: [u16; MAX_FAST + 1],
    /// Points tried in it, and the `[token, path]` mean of their path times; the parent's as long as there are none.
    points: Vec<Config>,
    mean: Vec<f32>,
    tried: u32,
    bound: f64,
    /// Where the weighted mean is least.
    point: Config,
}

/// The search of one layer at some prices.
pub struct Layer<'a> {
    table: &'a Table,
    room: &'a Room,
    /// `[paths]` seconds an expert, and fixed seconds if there is any.
    each: [f64; PATHS],
    fixed: [f64; PATHS],
    /// `[tiers]` seconds for the bytes of an expert.
    price: [f64; MAX_FAST + 1],
    expert_bytes: u64,
    known: HashMap<Config, f64>,
}

impl<'a> Layer<'a> {
    /// One for a layer's table.
    pub fn new(table: &'a Table, room: &'a Room, layer: &LayerEvidence, price: &[f64]) -> Self {
        let expert_bytes = layer.shape.expert_bytes;
        let stage = ExpertStage::new(&room.tiers, expert_bytes, layer.ahead);
        let (mut each, mut fixed, mut priced) = ([0.0; PATHS], [0.0; PATHS], [0.0; MAX_FAST + 1]);
        for path in 0..=room.tiers.len() {
            each[path] = stage.path_s(path, 2.0) - stage.path_s(path, 1.0);
            fixed[path] = stage.path_s(path, 1.0) - each[path];
        }
        priced.iter_mut().zip(price).for_each(|(to, p)| *to = p * expert_bytes as f64);
        Layer { table, room, each, fixed, price: priced, expert_bytes, known: HashMap::new() }
    }

    fn fast(&self) -> usize {
        self.room.home()
    }

    /// The slots that a last cut allows.
    fn slot_range(&self, last: u16) -> Option<(u16, u16)> {
        let pooled = (self.table.n_expert as u16).checked_sub(last).filter(|&p| p > 0)?;
        Some(((self.table.used as u16).min(pooled), pooled))
    }

    /// Calls `each` with every token's path times under a configuration.
    fn paths(&self, config: &Config, mut each: impl FnMut(usize, &[f64; PATHS])) {
        let (table, fast, n) = (self.table, self.fast(), self.room.tiers.len());
        let last = if fast == 0 { 0 } else { config.cuts[fast - 1] };
        // `[token]` misses among the pooled choices that were used before.
        let mut again = vec![0u16; table.tokens];
        if config.slots > 0 {
            for &(token, position) in table.row(last) {
                again[token as usize / 2] += u16::from(position >= config.slots);
            }
        }
        let choices = table.ranks.chunks_exact(table.used).zip(table.cold.chunks_exact(table.used));
        for (token, ((ranks, cold), again)) in choices.zip(again).enumerate() {
            let mut counts = [0u16; PATHS];
            let (mut tier, mut pooled, mut missed) = (0, 0u16, again);
            for (&rank, &cold) in ranks.iter().zip(cold) {
                while tier < fast && rank >= config.cuts[tier] {
                    tier += 1;
                }
                if tier < fast {
                    counts[tier] += 1;
                } else {
                    pooled += 1;
                    missed += u16::from(cold);
                }
            }
            if config.slots > 0 {
                counts[usize::from(config.slot_tier)] += pooled;
                counts[n] = missed;
            } else if self.room.in_place {
                counts[fast] = pooled;
            } else {
                counts[self.room.staging_tier] += pooled;
                counts[n] = pooled;
            }
            let mut times = [0.0; PATHS];
            for path in 0..=n {
                if counts[path] > 0 {
                    times[path] = self.fixed[path] + f64::from(counts[path]) * self.each[path];
                }
            }
            each(token, &times);
        }
    }

    /// Mean seconds of a configuration.
    pub fn seconds(&mut self, config: &Config) -> f64 {
        if let Some(&known) = self.known.get(config) {
            return known;
        }
        let mut sum = 0.0;
        self.paths(config, |_, times| sum += times.iter().copied().fold(0.0, f64::max));
        let seconds = sum / self.table.tokens as f64;
        self.known.insert(*config, seconds);
        seconds
    }

    fn priced_bytes(&self, config: &Config) -> f64 {
        let fast = self.fast();
        let last = if fast == 0 { 0 } else { config.cuts[fast - 1] };
        let pins: f64 = config.pins(fast).zip(&self.price).map(|(n, p)| f64::from(n) * p).sum();
        let slots =
            if config.slots > 0 { self.price[usize::from(config.slot_tier)] * f64::from(config.slots) } else { 0.0 };
        pins + slots + self.price[fast] * (self.table.n_expert as f64 - f64::from(last))
    }

    /// Seconds and priced bytes of a configuration.
    pub fn value(&mut self, config: &Config) -> f64 {
        self.seconds(config) + self.priced_bytes(config)
    }

    fn fits(&self, config: &Config) -> bool {
        let fast = self.fast();
        let last = if fast == 0 { 0 } else { config.cuts[fast - 1] };
        let pins = |tier: usize| {
            if tier < fast { config.cuts[tier] - if tier == 0 { 0 } else { config.cuts[tier - 1] } } else { 0 }
        };
        (0..=fast).all(|tier| {
            let slots = if config.slots > 0 && usize::from(config.slot_tier) == tier { config.slots } else { 0 };
            let home = if tier == fast { self.table.n_expert as u64 - u64::from(last) } else { 0 };
            (u64::from(pins(tier)) + u64::from(slots) + home) * self.expert_bytes <= self.room.left_bytes[tier]
        })
    }

    /// The cheapest configurations that steps from some known ones lead to, the best first, with their seconds.
    pub fn cheapest(&mut self, start: &[Config], deadline: Instant) -> Vec<(Config, f64)> {
        start.iter().for_each(|config| {
            self.value(config);
        });
        // Where the weighted means are least is another place to begin.
        let mut begin = start.to_vec();
        for mut this in self.boxes(start) {
            for _ in 0..2 {
                if Instant::now() >= deadline {
                    break;
                }
                self.tighten(&mut this);
                let (point, means) = (this.point, self.means(&this.point));
                this.mean.iter_mut().zip(&means).for_each(|(m, new)| *m += (new - *m) / 2.0);
                if self.fits(&point) && !begin.contains(&point) {
                    begin.push(point);
                }
            }
        }
        begin.iter().for_each(|config| {
            self.value(config);
        });
        begin.sort_by(|a, b| self.known_value(a).total_cmp(&self.known_value(b)));
        for config in begin.into_iter().take(DESCENTS) {
            self.descend(config, deadline);
        }
        let mut configs: Vec<(Config, f64)> =
            self.known.iter().map(|(c, s)| (*c, *s)).filter(|(c, _)| self.fits(c)).collect();
        configs.sort_by(|a, b| {
            let value = |x: &(Config, f64)| x.1 + self.priced_bytes(&x.0);
            value(a).total_cmp(&value(b)).then(a.0.cmp(&b.0))
        });
        configs
    }

    /// Seconds and priced bytes that no configuration goes below: searches from some known ones until that is within
    /// `close` (relative) of the best, or the deadline passes. Minus infinity if there was no time at all.
    pub fn bound(&mut self, start: &[Config], close: f64, deadline: Instant) -> f64 {
        let mut best: Option<(Config, f64)> = None;
        for config in start {
            let value = self.value(config);
            if best.is_none_or(|(_, least)| value < least) {
                best = Some((*config, value));
            }
        }
        let mut boxes = self.boxes(start);
        let mut closed = f64::INFINITY;
        while let Some(at) = (0..boxes.len()).min_by(|&a, &b| boxes[a].bound.total_cmp(&boxes[b].bound)) {
            let least = best.map_or(f64::INFINITY, |b| b.1);
            if boxes[at].bound >= least - close * least.abs() || Instant::now() >= deadline {
                break;
            }
            let mut this = boxes.swap_remove(at);
            self.tighten(&mut this);
            if this.bound == f64::INFINITY {
                continue;
            }
            let point = this.point;
            let value = self.value(&point);
            if self.fits(&point) && best.is_none_or(|(_, least)| value < least) {
                best = Some((point, value));
            }
            let least = best.map_or(f64::INFINITY, |b| b.1);
            if this.bound >= least - close * least.abs() {
                closed = closed.min(this.bound);
                continue;
            }
            if this.low == this.high {
                closed = closed.min(value);
                continue;
            }
            let means = self.means(&point);
            if this.points.contains(&point) {
                this.tried += 1;
            } else {
                this.points.push(point);
            }
            let share = if this.points.len() == 1 { 1.0 } else { 1.0 / this.points.len() as f32 };
            this.mean.iter_mut().zip(&means).for_each(|(m, new)| *m += (new - *m) * share);
            this.tried += 1;
            if this.tried > TRIES
                && let Some(halves) = self.split(&this)
            {
                boxes.extend(halves);
            } else {
                boxes.push(this);
            }
        }
        boxes.iter().map(|b| b.bound).fold(closed, f64::min)
    }

    /// Boxes that hold all configurations: one for each tier of slots, and one without.
    fn boxes(&self, start: &[Config]) -> Vec<Box> {
        let fast = self.fast();
        let most = self.table.n_expert as u16;
        let variants = self.room.slot_tiers().map(Some).chain([None]);
        variants
            .map(|slot_tier| {
                let (mut low, mut high) = ([0; MAX_FAST + 1], [0; MAX_FAST + 1]);
                high[..fast].fill(most);
                if slot_tier.is_some() {
                    (low[fast], high[fast]) = ((self.table.used as u16).min(most), most);
                    low[fast] = 1;
                }
                let at = start.iter().filter(|c| (c.slots > 0).then_some(usize::from(c.slot_tier)) == slot_tier);
                let at = at.min_by(|a, b| self.known_value(a).total_cmp(&self.known_value(b)));
                let begin = at.or(start.first()).copied().map(|mut c| {
                    match slot_tier {
                        Some(tier) => {
                            c.slot_tier = tier as u8;
                            let last = if fast == 0 { 0 } else { c.cuts[fast - 1] };
                            if let Some((least, pooled)) = self.slot_range(last) {
                                c.slots = c.slots.clamp(least, pooled);
                            }
                        }
                        None => (c.slots, c.slot_tier) = (0, self.room.staging_tier as u8),
                    }
                    c
                });
                let point =
                    begin.unwrap_or(Config { cuts: [0; MAX_FAST], slots: 0, slot_tier: self.room.staging_tier as u8 });
                Box {
                    slot_tier,
                    low,
                    high,
                    points: vec![point],
                    mean: self.means(&point),
                    tried: 1,
                    bound: f64::NEG_INFINITY,
                    point,
                }
            })
            .collect()
    }

    fn known_value(&self, config: &Config) -> f64 {
        self.known.get(config).map_or(f64::INFINITY, |s| s + self.priced_bytes(config))
    }

    fn means(&self, config: &Config) -> Vec<f32> {
        let n = self.room.tiers.len() + 1;
        let mut means = vec![0.0; self.table.tokens * n];
        self.paths(config, |token, times| {
            means[token * n..][..n].iter_mut().zip(times).for_each(|(m, t)| *m = *t as f32);
        });
        means
    }

    /// Finds the least weighted mean over a box.
    fn tighten(&self, this: &mut Box) {
        let (table, fast, n) = (self.table, self.fast(), self.room.tiers.len());
        let (n_expert, used) = (table.n_expert, table.used);
        let paths = n + 1;
        // Weights: the longest path's, spread over those that are nearly as long.
        let longest: Vec<f32> = this.mean.chunks_exact(paths).map(|m| m.iter().copied().fold(0.0, f32::max)).collect();
        let heat = (longest.iter().sum::<f32>() / longest.len().max(1) as f32 * HEAT / this.tried as f32).max(1e-12);
        // `[path][rank]` weighted seconds of the experts of each rank, if they are on this path.
        let mut on = vec![0.0f64; paths * n_expert];
        // `[token]` weight of the transfers.
        let mut moved = vec![0.0f64; table.tokens];
        let pools_on = match this.slot_tier {
            Some(tier) => tier,
            None if self.room.in_place => fast,
            None => self.room.staging_tier,
        };
        for (token, ranks) in table.ranks.chunks_exact(used).enumerate() {
            let mean = &this.mean[token * paths..][..paths];
            let mut weight = [0.0f64; PATHS];
            let mut sum = 0.0;
            for (w, &m) in weight.iter_mut().zip(mean) {
                *w = f64::from((m - longest[token]) / heat).exp();
                sum += *w;
            }
            for path in 0..n {
                let w = weight[path] / sum;
                let on = &mut on[path * n_expert..][..n_expert];
                // What starts a path is paid once a token: exactly so for the first tier's pins, whose first expert is the
                // token's most used one; else at least an expert's part of it.
                let whole = path == 0 && pools_on != 0;
                let part = if whole { 0.0 } else { self.fixed[path] / used as f64 };
                for &rank in ranks {
                    on[usize::from(rank)] += w * (self.each[path] + part);
                }
                if whole {
                    on[usize::from(ranks[0])] += w * self.fixed[path];
                }
            }
            moved[token] = weight[n] / sum;
        }
        let scale = 1.0 / table.tokens as f64;
        // `[tier][cut]` seconds and priced bytes of the experts before a cut, if they are on this tier.
        let before: Vec<Vec<f64>> = (0..n)
            .map(|path| {
                let mut sum = 0.0;
                let price = self.price[path];
                let steps = on[path * n_expert..][..n_expert].iter().map(|&s| {
                    sum += s * scale + price;
                    sum
                });
                std::iter::once(0.0).chain(steps).collect()
            })
            .collect();
        // The pooled ones compute on one tier, but their home copies are on the last.
        let pooled = |cut: usize| {
            let left = (n_expert - cut) as f64;
            let compute = before[pools_on][n_expert] - before[pools_on][cut] - self.price[pools_on] * left;
            compute + self.price[fast] * left
        };
        let (each, fixed) = (self.each[n] * scale, self.fixed[n] * scale);
        // Without slots every pooled choice is moved: `[cut]`.
        let mut all_moved = vec![0.0; n_expert + 1];
        if this.slot_tier.is_none() && !self.room.in_place {
            for (token, ranks) in table.ranks.chunks_exact(used).enumerate() {
                ranks.iter().for_each(|&r| all_moved[usize::from(r)] += moved[token] * each);
                all_moved[usize::from(ranks[used - 1])] += moved[token] * fixed;
            }
            for cut in (0..n_expert).rev() {
                all_moved[cut] += all_moved[cut + 1];
            }
        }
        // Best so far for each cut of the tier before, and which cut that was: `[tier][cut]`.
        let mut least = vec![0.0f64; n_expert + 1];
        let mut from: Vec<Vec<u16>> = Vec::with_capacity(fast);
        for tier in 0..fast.saturating_sub(1) {
            let (mut best, mut best_at) = (f64::INFINITY, 0u16);
            let mut trace = vec![0u16; n_expert + 1];
            for cut in 0..=n_expert {
                if (usize::from(this.low[tier])..=usize::from(this.high[tier])).contains(&cut) {
                    let value = least[cut] + before[tier][cut] - before[tier + 1][cut];
                    if value < best {
                        (best, best_at) = (value, cut as u16);
                    }
                }
                trace[cut] = best_at;
                least[cut] = best;
            }
            from.push(trace);
        }
        let mut bound = f64::INFINITY;
        let mut point = this.point;
        // With slots: `[2 token + deepest]` seconds of a miss, `[cut]` those of the choices that no slots can serve.
        let mut of_miss = Vec::new();
        let mut never = vec![0.0f64; n_expert + 1];
        if this.slot_tier.is_some() {
            of_miss.extend(moved.iter().flat_map(|w| [w * each, w * (each + fixed)]));
            let choices = table.ranks.chunks_exact(used).zip(table.cold.chunks_exact(used));
            for ((ranks, cold), weight) in choices.zip(&moved) {
                let mut deepest = None;
                for (&rank, _) in ranks.iter().zip(cold).filter(|(_, cold)| **cold) {
                    never[usize::from(rank)] += weight * each;
                    deepest = Some(rank);
                }
                if let Some(rank) = deepest {
                    never[usize::from(rank)] += weight * fixed;
                }
            }
            for cut in (0..n_expert).rev() {
                never[cut] += never[cut + 1];
            }
        }
        // Two sums for each position: additions to one would wait for each other.
        let mut sums = vec![[0.0f64; 2]; n_expert + 1];
        let lasts = if fast == 0 { 0..=0 } else { usize::from(this.low[fast - 1])..=usize::from(this.high[fast - 1]) };
        for last in lasts {
            let base = least[last] + if fast > 0 { before[fast - 1][last] } else { 0.0 } + pooled(last);
            if !base.is_finite() {
                continue;
            }
            let (value, slots) = match this.slot_tier {
                None => (base + all_moved[last], 0),
                Some(tier) => {
                    let Some((fewest, most)) = self.slot_range(last as u16) else { continue };
                    let (low, high) = (this.low[fast].max(fewest), this.high[fast].min(most));
                    if low > high {
                        continue;
                    }
                    let bottom = low - 1;
                    let sums = &mut sums[..=usize::from(high - bottom)];
                    sums.fill([0.0; 2]);
                    for (at, &(token, position)) in table.row(last as u16).iter().enumerate() {
                        let place = position.clamp(bottom, high) - bottom;
                        sums[usize::from(place)][at & 1] += of_miss[token as usize];
                    }
                    let (mut missed, mut best, mut best_at) = (never[last], f64::INFINITY, low);
                    for slots in (low..=high).rev() {
                        let [a, b] = sums[usize::from(slots - bottom)];
                        missed += a + b;
                        let value = missed + self.price[tier] * f64::from(slots);
                        if value < best {
                            (best, best_at) = (value, slots);
                        }
                    }
                    (base + best, best_at)
                }
            };
            if value < bound {
                bound = value;
                let slot_tier = this.slot_tier.unwrap_or(self.room.staging_tier) as u8;
                point = Config { cuts: [0; MAX_FAST], slots, slot_tier };
                let mut cut = last as u16;
                for tier in (0..fast).rev() {
                    if tier + 1 < fast {
                        cut = from[tier][usize::from(cut)];
                    }
                    point.cuts[tier] = cut;
                }
            }
        }
        if bound > this.bound || !bound.is_finite() {
            this.bound = bound;
        }
        this.point = point;
    }

    /// Two halves of a box, cut where the points tried differ most.
    fn split(&self, this: &Box) -> Option<[Box; 2]> {
        let (fast, n) = (self.fast(), self.room.tiers.len());
        let of = |c: &Config, at: usize| if at == fast { c.slots } else { c.cuts[at] };
        let slower = |at: usize| if at + 1 >= fast { self.each[n] } else { self.each[at + 1] };
        let range = |at: usize| {
            let least = this.points.iter().map(|c| of(c, at)).min().unwrap_or(this.low[at]);
            let most = this.points.iter().map(|c| of(c, at)).max().unwrap_or(this.high[at]);
            (least.max(this.low[at]), most.min(this.high[at]))
        };
        let spread = |at: usize| {
            let (least, most) = range(at);
            f64::from(most.saturating_sub(least)) * slower(at)
        };
        let wide = |at: usize| f64::from(this.high[at] - this.low[at]) * slower(at) * 1e-3;
        let weight = |at: usize| spread(at) + wide(at);
        let at = (0..=fast).max_by(|&a, &b| weight(a).total_cmp(&weight(b)))?;
        if this.high[at] == this.low[at] {
            return None;
        }
        let (least, most) = range(at);
        let (least, most) = if least < most { (least, most) } else { (this.low[at], this.high[at]) };
        let middle = least + (most - least) / 2;
        let half = |low: u16, high: u16| {
            let inside = |c: &&Config| (low..=high).contains(&of(c, at));
            let points: Vec<Config> = this.points.iter().filter(inside).copied().collect();
            let mut mean = this.mean.clone();
            if !points.is_empty() {
                mean.fill(0.0);
                let share = 1.0 / points.len() as f32;
                points.iter().for_each(|c| mean.iter_mut().zip(self.means(c)).for_each(|(m, t)| *m += t * share));
            }
            let tried = TRIES - 2;
            let (slot_tier, bound, point) = (this.slot_tier, this.bound, this.point);
            let mut new = Box { slot_tier, low: this.low, high: this.high, points, mean, tried, bound, point };
            (new.low[at], new.high[at]) = (low, high);
            new
        };
        Some([half(this.low[at], middle), half(middle + 1, this.high[at])])
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
        let most = self.table.n_expert as u16;
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
