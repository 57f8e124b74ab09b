//! Makes a choice better by giving two or three members other columns at once, chosen so that they use up what is left.
//!
//! With prices whose bound is `L`, a choice costs `L` and, on top, how far its columns are above their items' cheapest and
//! the priced worth of the bytes that it leaves unused. Both are small at a good choice, so few columns come into question
//! for a better one; and since the last of several members must use up nearly all that the others leave, its columns lie
//! in a narrow window of priced bytes. So thousands of columns can be looked at for each of two members.

use super::columns::Item;
use super::dual::Dual;
use super::room::{MAX_ROWS, Room};
use super::search::Choice;
use crate::profile::synthetic::Random;
use std::collections::HashSet;
use std::time::Instant;

/// Columns of an item that are looked at.
const LOOKED_AT: usize = 8000;

/// Columns of the first two of three members, taken evenly from those in question.
const OF_THREE: usize = 200;

/// Columns from which on triples are made of an item's members, if there are enough of them.
const MANY: usize = 8;

/// Triples in a row that bring nothing before it ends.
const FRUITLESS: usize = 6000;

/// The least gain that counts, relative to the bound.
const GAIN: f64 = 1e-10;

/// How far above the bound (relative) nothing is looked for any more.
const CLOSE: f64 = 1e-6;

/// A column in the form that the search needs.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    priced: f64,
    above: f64,
    bytes: [u64; MAX_ROWS],
    column: u32,
}

/// The columns of an item that come into question.
#[derive(Debug, Clone)]
struct List {
    /// By rising priced bytes.
    by_price: Vec<Candidate>,
    /// By rising `above`: positions in the other.
    by_above: Vec<u32>,
}

/// The columns of all items that can be part of a choice that costs no more than `most` above the bound.
#[derive(Debug)]
pub struct Lists<'a> {
    items: &'a [Item],
    room: &'a Room,
    dual: &'a Dual,
    lists: Vec<List>,
    /// `[items]` least cost with priced bytes.
    least: Vec<f64>,
}

impl<'a> Lists<'a> {
    /// The lists; `ranked` is what [`super::search::ranked`] says of all columns.
    pub fn new(items: &'a [Item], room: &'a Room, dual: &'a Dual, ranked: &[Vec<(usize, f64)>], most: f64) -> Self {
        let n = room.left_bytes.len();
        let of_item = |(item, ranked): (&Item, &Vec<(usize, f64)>)| {
            let taken = ranked.iter().take(LOOKED_AT).take_while(|(_, above)| *above <= most);
            let mut by_price: Vec<Candidate> = taken
                .map(|&(column, above)| {
                    let mut bytes = [0; MAX_ROWS];
                    bytes[..n].copy_from_slice(item.column_bytes(column, n));
                    Candidate { priced: priced(&bytes, &dual.price), above, bytes, column: column as u32 }
                })
                .collect();
            by_price.sort_by(|a, b| a.priced.total_cmp(&b.priced).then(a.column.cmp(&b.column)));
            let mut by_above: Vec<u32> = (0..by_price.len() as u32).collect();
            by_above
                .sort_by(|&a, &b| by_price[a as usize].above.total_cmp(&by_price[b as usize].above).then(a.cmp(&b)));
            List { by_price, by_above }
        };
        let least = items.iter().zip(ranked).map(|(item, ranked)| {
            let first = ranked.first().map_or(0, |&(c, _)| c);
            let bytes = item.column_bytes(first, n).iter().zip(&dual.price).map(|(&b, p)| b as f64 * p);
            item.cost_s.get(first).copied().unwrap_or(0.0) + bytes.sum::<f64>()
        });
        let least = least.collect();
        Lists { items, room, dual, lists: items.iter().zip(ranked).map(of_item).collect(), least }
    }
}

fn priced(bytes: &[u64; MAX_ROWS], price: &[f64]) -> f64 {
    bytes.iter().zip(price).map(|(&b, p)| b as f64 * p).sum()
}

/// A member with its column.
#[derive(Debug, Clone, Copy)]
struct Unit {
    item: usize,
    member: usize,
    at: Candidate,
}

struct Polish<'a> {
    lists: &'a Lists<'a>,
    n: usize,
    units: Vec<Unit>,
    /// `[rows]` bytes not used.
    spare: [u64; MAX_ROWS],
    gain: f64,
    deadline: Instant,
}

/// Improves a choice until no two members and, as far as chance has tried them, no three can be given better columns, or
/// the deadline passes. The same `seed` tries in the same order.
pub fn polish(lists: &Lists<'_>, choice: Choice, seed: u64, deadline: Instant) -> Choice {
    let (items, room, dual) = (lists.items, lists.room, lists.dual);
    let n = room.left_bytes.len();
    let mut units = Vec::new();
    let mut spare = [0u64; MAX_ROWS];
    spare[..n].copy_from_slice(&room.left_bytes);
    for (item, columns) in choice.columns.iter().enumerate() {
        for (member, &column) in columns.iter().enumerate() {
            let mut bytes = [0; MAX_ROWS];
            bytes[..n].copy_from_slice(items[item].column_bytes(column, n));
            for (spare, bytes) in spare.iter_mut().zip(&bytes) {
                let Some(rest) = spare.checked_sub(*bytes) else { return choice };
                *spare = rest;
            }
            let priced = priced(&bytes, &dual.price);
            let above = items[item].cost_s[column] + priced - lists.least[item];
            units.push(Unit { item, member, at: Candidate { priced, above, bytes, column: column as u32 } });
        }
    }
    let gain = GAIN * dual.bound_s.abs();
    let mut polish = Polish { lists, n, units, spare, gain, deadline };
    polish.search(&mut Random::new(seed));
    let mut columns = choice.columns.clone();
    polish.units.iter().for_each(|unit| columns[unit.item][unit.member] = unit.at.column as usize);
    match Choice::new(items, room, columns) {
        Some(better) if better.cost_s < choice.cost_s => better,
        _ => choice,
    }
}

impl Polish<'_> {
    /// How far the choice is above the bound.
    fn above(&self) -> f64 {
        self.units.iter().map(|u| u.at.above).sum::<f64>() + priced(&self.spare, &self.lists.dual.price)
    }

    fn search(&mut self, random: &mut Random) {
        if self.units.len() < 2 {
            return;
        }
        let close = CLOSE * self.lists.dual.bound_s.abs();
        self.pairs(random);
        let columns = |u: usize| self.lists.lists[self.units[u].item].by_price.len();
        let mut of: Vec<usize> = (0..self.units.len()).filter(|&u| columns(u) >= MANY).collect();
        if of.len() < 3 {
            of = (0..self.units.len()).collect();
        }
        let mut fruitless = 0;
        while fruitless < FRUITLESS && self.above() > close && Instant::now() < self.deadline {
            if self.three(&of, random) {
                fruitless = 0;
                self.pairs(random);
            } else {
                fruitless += 1;
            }
        }
    }

    /// Tries all pairs until none brings anything. Pairs of the same items and columns are alike.
    fn pairs(&mut self, random: &mut Random) {
        let close = CLOSE * self.lists.dual.bound_s.abs();
        let mut tried = HashSet::new();
        let mut order: Vec<usize> = (0..self.units.len()).collect();
        loop {
            (1..order.len()).for_each(|i| order.swap(i, random.below(i + 1)));
            let mut changed = false;
            for (at, &a) in order.iter().enumerate() {
                for &b in &order[at + 1..] {
                    let key = |u: usize| (self.units[u].item, self.units[u].at.column);
                    if !tried.insert((key(a).min(key(b)), key(a).max(key(b)))) {
                        continue;
                    }
                    if Instant::now() >= self.deadline {
                        return;
                    }
                    if self.pair(a, b) {
                        tried.clear();
                        changed = true;
                    }
                }
            }
            if !changed || self.above() <= close {
                return;
            }
        }
    }

    /// What may be used, and its priced worth with what the units are above now, if some units gave up their columns.
    fn free(&self, units: &[usize]) -> ([u64; MAX_ROWS], f64) {
        let mut left = self.spare;
        let mut above = priced(&self.spare, &self.lists.dual.price);
        for &unit in units {
            let at = &self.units[unit].at;
            left.iter_mut().zip(&at.bytes).for_each(|(l, b)| *l += b);
            above += at.above;
        }
        (left, above)
    }

    /// The best column of a unit for what is left, if it is better than `best` above the bound.
    fn last(&self, item: usize, left: &[u64; MAX_ROWS], worth: f64, best: f64) -> Option<(f64, &Candidate)> {
        let list = &self.lists.lists[item].by_price;
        let from = list.partition_point(|c| c.priced < worth - best);
        let mut found: Option<(f64, &Candidate)> = None;
        for candidate in &list[from..] {
            // Beyond, bytes of some tier are too many; rounding must not hide the one that fits to the byte.
            if candidate.priced > worth + self.gain {
                break;
            }
            let above = candidate.above + (worth - candidate.priced);
            if above < found.map_or(best, |f| f.0) && self.fits(candidate, left) {
                found = Some((above, candidate));
            }
        }
        found
    }

    fn fits(&self, candidate: &Candidate, left: &[u64; MAX_ROWS]) -> bool {
        candidate.bytes[..self.n].iter().zip(left).all(|(b, l)| b <= l)
    }

    fn set(&mut self, unit: usize, to: Candidate) {
        let from = self.units[unit].at.bytes;
        for ((spare, from), to) in self.spare.iter_mut().zip(from).zip(to.bytes) {
            *spare = (*spare + from) - to;
        }
        self.units[unit].at = to;
    }

    /// Puts units where the bytes of all their columns together fit: first all give up theirs.
    fn set_all(&mut self, to: &[(usize, Candidate)]) {
        for &(unit, _) in to {
            let nothing = Candidate { priced: 0.0, above: 0.0, bytes: [0; MAX_ROWS], column: 0 };
            self.set(unit, nothing);
        }
        to.iter().for_each(|&(unit, to)| self.set(unit, to));
    }

    /// Gives two units better columns, if there are any.
    fn pair(&mut self, a: usize, b: usize) -> bool {
        let (left, now) = self.free(&[a, b]);
        let worth = priced(&left, &self.lists.dual.price);
        let mut best = now - self.gain;
        let mut found = None;
        let (of_a, item_b) = (&self.lists.lists[self.units[a].item], self.units[b].item);
        for &first in &of_a.by_above {
            let first = &of_a.by_price[first as usize];
            if first.above >= best {
                break;
            }
            if !self.fits(first, &left) {
                continue;
            }
            let rest = minus(&left, &first.bytes);
            if let Some((above, second)) = self.last(item_b, &rest, worth - first.priced, best - first.above) {
                best = first.above + above;
                found = Some((*first, *second));
            }
        }
        let Some((first, second)) = found else { return false };
        self.set_all(&[(a, first), (b, second)]);
        true
    }

    /// Gives three of some units, taken by chance, better columns if there are any.
    fn three(&mut self, of: &[usize], random: &mut Random) -> bool {
        let [a, b, c] = [(); 3].map(|()| of[random.below(of.len())]);
        if a == b || b == c || a == c {
            return false;
        }
        let (left, now) = self.free(&[a, b, c]);
        let worth = priced(&left, &self.lists.dual.price);
        let mut best = now - self.gain;
        let mut found = None;
        let lists = self.lists;
        let (of_a, of_b) = (&lists.lists[self.units[a].item], &lists.lists[self.units[b].item]);
        let item_c = self.units[c].item;
        let mut some = |list: &'_ List| {
            let cheap = list.by_above.partition_point(|&at| list.by_price[at as usize].above < best);
            let step = cheap.div_ceil(OF_THREE).max(1);
            (random.below(step)..cheap).step_by(step).map(|at| list.by_above[at]).collect::<Vec<u32>>()
        };
        let (some_a, some_b) = (some(of_a), some(of_b));
        for first in some_a {
            let first = &of_a.by_price[first as usize];
            if first.above >= best {
                break;
            }
            if !self.fits(first, &left) {
                continue;
            }
            let after = minus(&left, &first.bytes);
            for &second in &some_b {
                let second = &of_b.by_price[second as usize];
                let above = first.above + second.above;
                if above >= best {
                    break;
                }
                if !self.fits(second, &after) {
                    continue;
                }
                let rest = minus(&after, &second.bytes);
                let worth = worth - first.priced - second.priced;
                if let Some((last, third)) = self.last(item_c, &rest, worth, best - above) {
                    best = above + last;
                    found = Some((*first, *second, *third));
                }
            }
        }
        let Some((first, second, third)) = found else { return false };
        self.set_all(&[(a, first), (b, second), (c, third)]);
        true
    }
}

/// What is left after some bytes, of which there are enough.
fn minus(left: &[u64; MAX_ROWS], bytes: &[u64; MAX_ROWS]) -> [u64; MAX_ROWS] {
    let mut rest = *left;
    rest.iter_mut().zip(bytes).for_each(|(l, b)| *l = l.saturating_sub(*b));
    rest
}

#[cfg(test)]
mod tests {
    use super::super::columns::Meaning;
    use super::super::{dual, search};
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;
    use tier_plan_runtime::formats::machine::{Accelerator, Tier, TierKind};

    fn room(left_bytes: Vec<u64>) -> Room {
        let tier = |at: usize| Tier {
            name: format!("t{at}"),
            kind: if at == 0 { TierKind::Dram } else { TierKind::Nvme },
            capacity_bytes: 1 << 40,
            read_gbps: 1.0,
            latency_us: 0.0,
            unit: None,
            accelerator: Accelerator::default(),
            emulated: false,
            source: String::new(),
        };
        Room {
            tiers: (0..left_bytes.len()).map(tier).collect(),
            budget_bytes: left_bytes.clone(),
            left_bytes,
            kv_tier: 0,
            kv_bytes: 0,
            caches: Vec::new(),
            staging_tier: 0,
            staging_experts: 0,
            staging_bytes: 0,
            in_place: false,
        }
    }

    fn item(members: usize, columns: &[(u16, u64, u64)]) -> Item {
        Item {
            meaning: Meaning::Dense((0..members).collect(), vec![0; columns.len()]),
            cost_s: columns.iter().map(|c| f64::from(c.0) * 1e-3).collect(),
            bytes: columns.iter().flat_map(|c| [c.1, c.2]).collect(),
        }
    }

    proptest! {
        #[test]
        fn two_members_come_to_the_optimum_and_more_never_get_worse(
            a in proptest::collection::vec((1u16..500, 0u64..40, 0u64..40), 2..30),
            b in proptest::collection::vec((1u16..500, 0u64..40, 0u64..40), 2..30),
            left in (30u64..70, 30u64..70),
            alike in any::<bool>(),
        ) {
            let far = || Instant::now() + Duration::from_secs(60);
            let fail = |e: anyhow::Error| TestCaseError::fail(e.to_string());
            let room = room(vec![left.0, left.1]);
            let two = if alike { vec![item(2, &a)] } else { vec![item(1, &a), item(1, &b)] };
            let other = if alike { &a } else { &b };
            let mut fits = Vec::new();
            for (i, x) in a.iter().enumerate() {
                for (j, y) in other.iter().enumerate() {
                    if x.1 + y.1 <= left.0 && x.2 + y.2 <= left.1 {
                        fits.push((x.0 + y.0, if alike { vec![vec![i, j]] } else { vec![vec![i], vec![j]] }));
                    }
                }
            }
            let polished = |items: &[Item], columns: Vec<Vec<usize>>| {
                let dual = dual::maximise(items, &room, None, far()).map_err(fail)?;
                let ranked = search::ranked(items, &room, &dual, f64::INFINITY);
                let lists = Lists::new(items, &room, &dual, &ranked, f64::INFINITY);
                let choice = Choice::new(items, &room, columns);
                let choice = choice.ok_or_else(|| TestCaseError::fail("does not fit"))?;
                let better = polish(&lists, choice.clone(), 1, far());
                prop_assert!(better.cost_s <= choice.cost_s && better.cost_s >= dual.bound_s * (1.0 - 1e-9));
                prop_assert!(Choice::new(items, &room, better.columns.clone()).is_some());
                Ok(better.cost_s)
            };
            if let (Some(worst), Some(least)) = (fits.iter().max(), fits.iter().map(|f| f.0).min()) {
                let found = polished(&two, worst.1.clone())?;
                let least = f64::from(least) * 1e-3;
                prop_assert!((found - least).abs() <= 2e-6 * least, "{found} {least}");
            }
            let none = (600, 0, 0);
            let many = vec![item(3, &[&a[..], &[none]].concat()), item(2, &[&b[..], &[none]].concat())];
            polished(&many, vec![vec![a.len(); 3], vec![b.len(); 2]])?;
        }
    }
}
