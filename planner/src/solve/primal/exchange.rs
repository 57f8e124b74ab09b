//! Exchange search: gives two or three members other columns at once, to use up what is left.
//!
//! With prices whose bound is `L`, a choice costs `L`, its columns' reduced costs, and the priced
//! worth of the bytes that it leaves unused. Both are small at a good choice, so few columns can be
//! part of a better one. The last of several members must use up nearly all that the others leave,
//! so its columns lie in a narrow window of priced bytes. That lets thousands of columns be tried
//! for each of two members.

use super::choice::{Choice, Master, PricedColumn};
use crate::profile::synthetic::Random;
use crate::solve::problem::capacity::MAX_ROWS;
use crate::solve::problem::columns::Item;
use std::collections::{HashMap, HashSet};
use std::time::Instant;

/// Columns per item that are candidates.
const MAX_CANDIDATES: usize = 8000;

/// Candidates of each of the first two of three members, taken evenly from those that survive.
const MAX_TRIPLE_CANDIDATES: usize = 200;

/// Candidates from which on a member takes part in triples, if there are enough such members.
const MIN_TRIPLE_CANDIDATES: usize = 8;

/// Least gain that counts, relative to the bound.
const MIN_RELATIVE_GAIN: f64 = 1e-10;

/// Relative gap at which the search ends at the latest.
const LEAST_TOLERANCE: f64 = 1e-6;

/// `[rows]` bytes, zero beyond the rows there are.
type RowBytes = [u64; MAX_ROWS];

/// A column in the form that the search reads.
#[derive(Debug, Clone, Copy)]
struct Candidate {
    /// Priced worth of its bytes, in seconds.
    bytes_s: f64,
    reduced_cost: f64,
    bytes: RowBytes,
    column: u32,
}

/// The candidate columns of one item.
#[derive(Debug, Clone)]
struct CandidateList {
    /// By rising priced bytes.
    by_bytes_s: Vec<Candidate>,
    /// By rising reduced cost: positions in `by_bytes_s`.
    by_reduced_cost: Vec<u32>,
}

/// The columns of all items that can be part of a choice within a gap of the bound.
#[derive(Debug)]
pub struct CandidateLists<'a> {
    master: Master<'a>,
    lists: Vec<CandidateList>,
    /// `[items]` least cost with priced bytes.
    least_s: Vec<f64>,
}

impl<'a> CandidateLists<'a> {
    /// Makes the lists of columns whose reduced cost is at most `limit`.
    ///
    /// `ranked` holds the reduced costs of all columns.
    pub fn new(master: &Master<'a>, ranked: &[Vec<PricedColumn>], limit: f64) -> Self {
        let n = master.n_rows();
        let price = &master.dual.price;
        let list_of = |(item, ranked): (&Item, &Vec<PricedColumn>)| {
            let kept = ranked
                .iter()
                .take(MAX_CANDIDATES)
                .take_while(|c| c.reduced_cost <= limit);
            let mut by_bytes_s: Vec<Candidate> = kept
                .map(
                    |&PricedColumn {
                         column,
                         reduced_cost,
                     }| {
                        let bytes = row_bytes(item, column, n);
                        let bytes_s = priced(&bytes, price);
                        Candidate {
                            bytes_s,
                            reduced_cost,
                            bytes,
                            column: column as u32,
                        }
                    },
                )
                .collect();
            by_bytes_s.sort_by(|a, b| {
                a.bytes_s
                    .total_cmp(&b.bytes_s)
                    .then(a.column.cmp(&b.column))
            });
            let mut by_reduced_cost: Vec<u32> = (0..by_bytes_s.len() as u32).collect();
            let cost = |at: u32| by_bytes_s[at as usize].reduced_cost;
            by_reduced_cost.sort_by(|&a, &b| cost(a).total_cmp(&cost(b)).then(a.cmp(&b)));
            CandidateList {
                by_bytes_s,
                by_reduced_cost,
            }
        };
        let least_of = |(item, ranked): (&Item, &Vec<PricedColumn>)| {
            let first = ranked.first().map_or(0, |c| c.column);
            let bytes = item
                .column_bytes(first, n)
                .iter()
                .zip(price)
                .map(|(&b, p)| b as f64 * p);
            item.cost_s.get(first).copied().unwrap_or(0.0) + bytes.sum::<f64>()
        };
        let least_s = master.items.iter().zip(ranked).map(least_of).collect();
        let lists = master.items.iter().zip(ranked).map(list_of).collect();
        CandidateLists {
            master: *master,
            lists,
            least_s,
        }
    }
}

fn row_bytes(item: &Item, column: usize, n_rows: usize) -> RowBytes {
    let mut bytes = [0; MAX_ROWS];
    bytes[..n_rows].copy_from_slice(item.column_bytes(column, n_rows));
    bytes
}

/// Returns the worth of bytes at some prices, in seconds.
fn priced(bytes: &RowBytes, price: &[f64]) -> f64 {
    bytes.iter().zip(price).map(|(&b, p)| b as f64 * p).sum()
}

/// A member with its column.
#[derive(Debug, Clone, Copy)]
struct Unit {
    item: usize,
    member: usize,
    current: Candidate,
}

/// What units would have if they gave up their columns.
struct Freed {
    bytes: RowBytes,
    /// Gap that they and the unused bytes make now, in seconds.
    gap_s: f64,
}

/// When a search for a choice ends.
#[derive(Debug, Clone, Copy)]
pub struct Ending {
    /// Relative gap that is good enough.
    pub tolerance: f64,
    /// Triples in a row without a gain.
    pub fruitless_triples: usize,
    /// Choices that are improved side by side.
    pub choices: usize,
    /// The time at the latest.
    pub deadline: Instant,
}

struct ExchangeSearch<'a> {
    lists: &'a CandidateLists<'a>,
    n_rows: usize,
    units: Vec<Unit>,
    /// Bytes of each row that the choice leaves unused.
    spare: RowBytes,
    min_gain_s: f64,
    max_gap_s: f64,
    ending: Ending,
}

/// Improves a choice until no pair, and no triple that was drawn, can be given better columns.
///
/// The order of trials depends on `seed` alone.
pub fn exchange(lists: &CandidateLists<'_>, choice: Choice, seed: u64, ending: Ending) -> Choice {
    let Master {
        items,
        capacity,
        dual,
    } = lists.master;
    let n_rows = lists.master.n_rows();
    let mut units = Vec::new();
    let mut spare = [0u64; MAX_ROWS];
    spare[..n_rows].copy_from_slice(&capacity.left_bytes);
    for (item, columns) in choice.columns.iter().enumerate() {
        for (member, &column) in columns.iter().enumerate() {
            let bytes = row_bytes(&items[item], column, n_rows);
            for (spare, bytes) in spare.iter_mut().zip(&bytes) {
                let Some(rest) = spare.checked_sub(*bytes) else {
                    return choice;
                };
                *spare = rest;
            }
            let bytes_s = priced(&bytes, &dual.price);
            let reduced_cost = items[item].cost_s[column] + bytes_s - lists.least_s[item];
            let current = Candidate {
                bytes_s,
                reduced_cost,
                bytes,
                column: column as u32,
            };
            units.push(Unit {
                item,
                member,
                current,
            });
        }
    }
    let min_gain_s = MIN_RELATIVE_GAIN * dual.bound_s.abs();
    let max_gap_s = ending.tolerance.max(LEAST_TOLERANCE) * dual.bound_s.abs();
    let mut search = ExchangeSearch {
        lists,
        n_rows,
        units,
        spare,
        min_gain_s,
        max_gap_s,
        ending,
    };
    search.run(&mut Random::new(seed));
    let mut columns = choice.columns.clone();
    for unit in &search.units {
        columns[unit.item][unit.member] = unit.current.column as usize;
    }
    match Choice::new(items, capacity, columns) {
        Some(better) if better.cost_s < choice.cost_s => better,
        _ => choice,
    }
}

impl<'a> ExchangeSearch<'a> {
    fn list(&self, unit: usize) -> &'a CandidateList {
        &self.lists.lists[self.units[unit].item]
    }

    fn price(&self) -> &'a [f64] {
        &self.lists.master.dual.price
    }

    /// Returns how far the choice is above the bound, in seconds.
    fn gap_s(&self) -> f64 {
        self.units
            .iter()
            .map(|u| u.current.reduced_cost)
            .sum::<f64>()
            + priced(&self.spare, self.price())
    }

    fn run(&mut self, random: &mut Random) {
        if self.units.len() < 2 {
            return;
        }
        self.exchange_pairs(random);
        let mut drawn = self.drawn();
        let mut fruitless = 0;
        while fruitless < self.ending.fruitless_triples
            && self.gap_s() > self.max_gap_s
            && Instant::now() < self.ending.deadline
        {
            if self.exchange_three(&drawn, random) {
                fruitless = 0;
                self.exchange_pairs(random);
                drawn = self.drawn();
            } else {
                fruitless += 1;
            }
        }
    }

    /// Returns the units that triples are drawn from: those with enough candidates, and no more than
    /// three with the same item and column, since others would only repeat their trials.
    fn drawn(&self) -> Vec<usize> {
        let n_candidates = |unit: usize| self.list(unit).by_bytes_s.len();
        let mut seen: HashMap<(usize, u32), u32> = HashMap::new();
        let is_new = |&unit: &usize| {
            let Unit { item, current, .. } = self.units[unit];
            let times = seen.entry((item, current.column)).or_default();
            *times += 1;
            *times <= 3
        };
        let distinct: Vec<usize> = (0..self.units.len()).filter(is_new).collect();
        let has_choice = |&&unit: &&usize| n_candidates(unit) >= MIN_TRIPLE_CANDIDATES;
        let drawn: Vec<usize> = distinct.iter().filter(has_choice).copied().collect();
        if drawn.len() < 3 { distinct } else { drawn }
    }

    /// Tries all pairs until none gains. Pairs of equal items and columns are tried once.
    fn exchange_pairs(&mut self, random: &mut Random) {
        let mut tried = HashSet::new();
        let mut order: Vec<usize> = (0..self.units.len()).collect();
        loop {
            (1..order.len()).for_each(|i| order.swap(i, random.below(i + 1)));
            let mut changed = false;
            for (at, &first) in order.iter().enumerate() {
                for &second in &order[at + 1..] {
                    let key =
                        |unit: usize| (self.units[unit].item, self.units[unit].current.column);
                    let pair = [key(first).min(key(second)), key(first).max(key(second))];
                    if !tried.insert(pair) {
                        continue;
                    }
                    if Instant::now() >= self.ending.deadline {
                        return;
                    }
                    if self.exchange_two(first, second) {
                        tried.clear();
                        changed = true;
                    }
                }
            }
            if !changed || self.gap_s() <= self.max_gap_s {
                return;
            }
        }
    }

    /// Returns what some units would have if they gave up their columns.
    fn freed(&self, units: &[usize]) -> Freed {
        let mut bytes = self.spare;
        let mut gap_s = priced(&self.spare, self.price());
        for &unit in units {
            let current = &self.units[unit].current;
            bytes
                .iter_mut()
                .zip(&current.bytes)
                .for_each(|(left, b)| *left += b);
            gap_s += current.reduced_cost;
        }
        Freed { bytes, gap_s }
    }

    /// Returns the best candidate of an item for what is left, and the gap that it makes.
    ///
    /// `left_s` is the priced worth of `left`. Only gaps below `best_s` are looked for.
    fn best_last(
        &self,
        item: usize,
        left: &RowBytes,
        left_s: f64,
        best_s: f64,
    ) -> Option<(f64, &'a Candidate)> {
        let list = &self.lists.lists[item].by_bytes_s;
        let from = list.partition_point(|c| c.bytes_s < left_s - best_s);
        let mut best: Option<(f64, &Candidate)> = None;
        for candidate in &list[from..] {
            // Beyond, bytes of some tier are too many. Rounding must not hide the candidate that
            // fits to the byte.
            if candidate.bytes_s > left_s + self.min_gain_s {
                break;
            }
            let gap_s = candidate.reduced_cost + (left_s - candidate.bytes_s);
            if gap_s < best.map_or(best_s, |b| b.0) && self.fits(candidate, left) {
                best = Some((gap_s, candidate));
            }
        }
        best
    }

    fn fits(&self, candidate: &Candidate, left: &RowBytes) -> bool {
        candidate.bytes[..self.n_rows]
            .iter()
            .zip(left)
            .all(|(b, left)| b <= left)
    }

    fn set(&mut self, unit: usize, to: Candidate) {
        let from = self.units[unit].current.bytes;
        for ((spare, from), to) in self.spare.iter_mut().zip(from).zip(to.bytes) {
            *spare = (*spare + from) - to;
        }
        self.units[unit].current = to;
    }

    /// Gives units columns whose bytes fit together: first all give up theirs.
    fn set_all(&mut self, changes: &[(usize, Candidate)]) {
        for &(unit, _) in changes {
            let nothing = Candidate {
                bytes_s: 0.0,
                reduced_cost: 0.0,
                bytes: [0; MAX_ROWS],
                column: 0,
            };
            self.set(unit, nothing);
        }
        changes.iter().for_each(|&(unit, to)| self.set(unit, to));
    }

    /// Gives two units the best columns together. Returns whether that gains.
    fn exchange_two(&mut self, a: usize, b: usize) -> bool {
        let Freed { bytes: left, gap_s } = self.freed(&[a, b]);
        let left_s = priced(&left, self.price());
        let mut best_s = gap_s - self.min_gain_s;
        let mut best = None;
        let (list_a, item_b) = (self.list(a), self.units[b].item);
        for &first in &list_a.by_reduced_cost {
            let first = &list_a.by_bytes_s[first as usize];
            if first.reduced_cost >= best_s {
                break;
            }
            if !self.fits(first, &left) {
                continue;
            }
            let rest = minus(&left, &first.bytes);
            let (rest_s, limit_s) = (left_s - first.bytes_s, best_s - first.reduced_cost);
            if let Some((last_s, second)) = self.best_last(item_b, &rest, rest_s, limit_s) {
                best_s = first.reduced_cost + last_s;
                best = Some((*first, *second));
            }
        }
        let Some((first, second)) = best else {
            return false;
        };
        self.set_all(&[(a, first), (b, second)]);
        true
    }

    /// Gives three units, drawn from some, better columns together. Returns whether that gains.
    fn exchange_three(&mut self, drawn: &[usize], random: &mut Random) -> bool {
        let [a, b, c] = [(); 3].map(|()| drawn[random.below(drawn.len())]);
        if a == b || b == c || a == c {
            return false;
        }
        let Freed { bytes: left, gap_s } = self.freed(&[a, b, c]);
        let left_s = priced(&left, self.price());
        let mut best_s = gap_s - self.min_gain_s;
        let mut best = None;
        let (list_a, list_b, item_c) = (self.list(a), self.list(b), self.units[c].item);
        let sampled_a = list_a.sample(best_s, random);
        let sampled_b = list_b.sample(best_s, random);
        for first in sampled_a {
            let first = &list_a.by_bytes_s[first as usize];
            if first.reduced_cost >= best_s {
                break;
            }
            if !self.fits(first, &left) {
                continue;
            }
            let after = minus(&left, &first.bytes);
            for &second in &sampled_b {
                let second = &list_b.by_bytes_s[second as usize];
                let pair_s = first.reduced_cost + second.reduced_cost;
                if pair_s >= best_s {
                    break;
                }
                if !self.fits(second, &after) {
                    continue;
                }
                let rest = minus(&after, &second.bytes);
                let rest_s = left_s - first.bytes_s - second.bytes_s;
                if let Some((last_s, third)) =
                    self.best_last(item_c, &rest, rest_s, best_s - pair_s)
                {
                    best_s = pair_s + last_s;
                    best = Some([*first, *second, *third]);
                }
            }
        }
        let Some([first, second, third]) = best else {
            return false;
        };
        self.set_all(&[(a, first), (b, second), (c, third)]);
        true
    }
}

impl CandidateList {
    /// Returns candidates with a reduced cost below a limit, evenly spaced from a random start.
    fn sample(&self, limit_s: f64, random: &mut Random) -> Vec<u32> {
        let cost = |at: u32| self.by_bytes_s[at as usize].reduced_cost;
        let surviving = self
            .by_reduced_cost
            .partition_point(|&at| cost(at) < limit_s);
        let step = surviving.div_ceil(MAX_TRIPLE_CANDIDATES).max(1);
        (random.below(step)..surviving)
            .step_by(step)
            .map(|at| self.by_reduced_cost[at])
            .collect()
    }
}

/// Returns what is left after some bytes, of which there are enough.
fn minus(left: &RowBytes, bytes: &RowBytes) -> RowBytes {
    let mut rest = *left;
    rest.iter_mut()
        .zip(bytes)
        .for_each(|(left, b)| *left = left.saturating_sub(*b));
    rest
}

#[cfg(test)]
pub(in crate::solve) mod tests {
    use super::*;
    use crate::solve::bound::lagrangian;
    use crate::solve::problem::capacity::Capacity;
    use crate::solve::problem::columns::Meaning;
    use proptest::prelude::*;
    use std::time::Duration;
    use tier_plan_runtime::formats::machine::{Accelerator, Tier, TierKind};
    use tier_plan_runtime::formats::placement::TierIdx;

    /// Returns tiers of these kinds, with so many bytes left.
    pub(in crate::solve) fn capacity(kinds: &[TierKind], left_bytes: Vec<u64>) -> Capacity {
        let tier = |at: usize| Tier {
            name: format!("t{at}"),
            kind: kinds[at],
            capacity_bytes: 1 << 40,
            read_gbps: 1.0,
            latency_us: 0.0,
            unit: None,
            accelerator: Accelerator::default(),
            emulated: false,
            source: String::new(),
        };
        Capacity {
            tiers: (0..left_bytes.len()).map(tier).collect(),
            budget_bytes: left_bytes.clone().into(),
            left_bytes,
            kv_tier: TierIdx::FIRST,
            kv_bytes: 0,
            caches: Vec::new(),
            staging_tier: TierIdx::FIRST,
            staging_experts: 0,
            staging_bytes: 0,
            cpu_only: Default::default(),
            together: Default::default(),
            together_on: None,
            in_place: false,
        }
    }

    fn item(members: usize, columns: &[(u16, u64, u64)]) -> Item {
        Item {
            meaning: Meaning::Dense {
                groups: (0..members).collect(),
                places: vec![TierIdx::FIRST.into(); columns.len()],
            },
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
            let capacity = capacity(&[TierKind::Dram, TierKind::Nvme], vec![left.0, left.1]);
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
                let dual = lagrangian::maximize(items, &capacity, None, far()).map_err(fail)?;
                let master = Master { items, capacity: &capacity, dual: &dual };
                let ranked = master.reduced_costs(f64::INFINITY);
                let lists = CandidateLists::new(&master, &ranked, f64::INFINITY);
                let choice = Choice::new(items, &capacity, columns);
                let choice = choice.ok_or_else(|| TestCaseError::fail("does not fit"))?;
                let better = exchange(&lists, choice.clone(), 1, Ending { tolerance: 0.0, fruitless_triples: 6000, choices: 1, deadline: far() });
                prop_assert!(better.cost_s <= choice.cost_s && better.cost_s >= dual.bound_s * (1.0 - 1e-9));
                prop_assert!(Choice::new(items, &capacity, better.columns.clone()).is_some());
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
