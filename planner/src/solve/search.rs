//! Good integer choices without a tree: greedy starts and exchanges that spend the last bytes.

use super::columns::Item;
use super::dual::{Dual, cheapest};
use super::room::Room;
use std::time::Instant;

/// A column for every member of every item.
#[derive(Debug, Clone, PartialEq)]
pub struct Choice {
    /// `[items][members]` columns.
    pub columns: Vec<Vec<usize>>,
    /// Their cost together, in seconds.
    pub cost_s: f64,
}

/// Columns a pair of items is tried with.
const SHORT: usize = 48;

/// The least relative gain that counts.
const GAIN: f64 = 1e-13;

impl Choice {
    /// Makes a choice, if its bytes fit.
    pub fn new(items: &[Item], room: &Room, columns: Vec<Vec<usize>>) -> Option<Self> {
        let used = used_bytes(items, room, &columns);
        let fits = used.iter().zip(&room.left_bytes).all(|(&used, &left)| used <= u128::from(left));
        let cost_s = items.iter().zip(&columns).flat_map(|(item, c)| c.iter().map(|&c| item.cost_s[c])).sum();
        fits.then_some(Choice { columns, cost_s })
    }
}

fn used_bytes(items: &[Item], room: &Room, columns: &[Vec<usize>]) -> Vec<u128> {
    let n = room.left_bytes.len();
    let mut used = vec![0u128; n];
    for (item, columns) in items.iter().zip(columns) {
        for &column in columns {
            used.iter_mut().zip(item.column_bytes(column, n)).for_each(|(u, &b)| *u += u128::from(b));
        }
    }
    used
}

/// Choices by price: every item's cheapest columns, at prices raised until they fit.
pub fn greedy(items: &[Item], room: &Room, dual: &Dual) -> Vec<Choice> {
    let mut found = Vec::new();
    for factor in [1.0, 1.001, 1.01, 1.03, 1.1, 1.3, 2.0, 5.0, 30.0, 1e3] {
        let price: Vec<f64> = dual.price.iter().map(|p| p * factor).collect();
        let columns: Option<Vec<Vec<usize>>> =
            items.iter().map(|i| cheapest(i, &price).map(|(c, _)| vec![c; i.count()])).collect();
        found.extend(columns.and_then(|columns| Choice::new(items, room, columns)));
        if found.len() == 2 {
            break;
        }
    }
    found
}

/// How much a byte beside the even share counts, as a part of its price, in turn.
const EVEN: [f64; 4] = [0.01, 0.05, 0.2, 0.6];

/// Columns of an item that are looked at for an even share, once one is found that fits.
const LOOKED_AT: usize = 4000;

/// Choices that use up every tier: item by item, a column near the cheapest whose bytes are near the item's share of what
/// is left. Where many columns are nearly as cheap, this finds those that go together. `all` is what [`ranked`] says of all
/// columns; `fixed` (`[items]`, or empty) has columns of members that are not asked.
pub fn even(items: &[Item], room: &Room, dual: &Dual, all: &[Vec<(usize, f64)>], fixed: &[Vec<usize>]) -> Vec<Choice> {
    let n = room.left_bytes.len();
    let fixed = |item: usize| fixed.get(item).map_or(&[][..], Vec::as_slice);
    let open = |item: usize| items[item].count().saturating_sub(fixed(item).len());
    let least: Vec<Vec<u64>> = items
        .iter()
        .map(|i| (0..n).map(|t| (0..i.len()).map(|c| i.column_bytes(c, n)[t]).min().unwrap_or(0)).collect())
        .collect();
    let cheap = |item: usize| {
        all[item].first().map_or(0.0, |&(c, _)| {
            items[item].column_bytes(c, n).iter().zip(&dual.price).map(|(&b, p)| b as f64 * p).sum::<f64>()
        })
    };
    // Items with the least to choose from first; the others make up for them.
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by_key(|&i| (items[i].len(), i));
    let mut found = Vec::new();
    'weights: for weight in EVEN {
        let mut columns: Vec<Vec<usize>> = (0..items.len()).map(|i| fixed(i).to_vec()).collect();
        let mut left: Vec<f64> = room.left_bytes.iter().map(|&b| b as f64).collect();
        for (item, columns) in items.iter().zip(&columns) {
            for &column in columns {
                left.iter_mut().zip(item.column_bytes(column, n)).for_each(|(l, &b)| *l -= b as f64);
            }
        }
        let mut need: Vec<f64> =
            (0..n).map(|t| least.iter().enumerate().map(|(i, l)| open(i) as f64 * l[t] as f64).sum()).collect();
        let mut rest: f64 = (0..items.len()).map(|i| open(i) as f64 * cheap(i)).sum();
        for &at in &order {
            let item = &items[at];
            for _ in 0..open(at) {
                let share = if rest > 0.0 { (cheap(at) / rest).min(1.0) } else { 1.0 };
                (0..n).for_each(|t| need[t] -= least[at][t] as f64);
                let mut best: Option<(usize, f64)> = None;
                for (place, &(column, above)) in all[at].iter().enumerate() {
                    if best.is_some_and(|(_, score)| above >= score || place >= LOOKED_AT) {
                        break;
                    }
                    let bytes = item.column_bytes(column, n);
                    if (0..n).any(|t| bytes[t] as f64 > left[t] - need[t]) {
                        continue;
                    }
                    let beside = |t: usize| dual.price[t] * (bytes[t] as f64 - left[t] * share).abs();
                    let score = above + weight * (0..n).map(beside).sum::<f64>();
                    if best.is_none_or(|(_, least)| score < least) {
                        best = Some((column, score));
                    }
                }
                let Some((column, _)) = best else { continue 'weights };
                (0..n).for_each(|t| left[t] -= item.column_bytes(column, n)[t] as f64);
                rest -= cheap(at);
                columns[at].push(column);
            }
        }
        found.extend(Choice::new(items, room, columns));
    }
    found.sort_by(|a, b| a.cost_s.total_cmp(&b.cost_s));
    found
}

/// The cheapest columns of an item at some prices, each of other bytes than those before it: by a 64th of the largest
/// column of some tier.
pub fn apart(item: &Item, price: &[f64], most: usize) -> Vec<usize> {
    let n = price.len();
    let value =
        |c: usize| item.cost_s[c] + item.column_bytes(c, n).iter().zip(price).map(|(&b, p)| b as f64 * p).sum::<f64>();
    let values: Vec<f64> = (0..item.len()).map(value).collect();
    let largest = item.bytes.iter().copied().max().unwrap_or(0);
    let mut order: Vec<usize> = (0..item.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    let mut found: Vec<usize> = Vec::new();
    for column in order {
        if found.len() == most {
            break;
        }
        let far = |&other: &usize| {
            let pairs = item.column_bytes(column, n).iter().zip(item.column_bytes(other, n));
            pairs.into_iter().any(|(a, b)| a.abs_diff(*b) > largest / 64)
        };
        if found.iter().all(far) {
            found.push(column);
        }
    }
    found
}

/// By item, its columns by rising priced cost, with how far each is above the cheapest.
pub fn ranked(items: &[Item], room: &Room, dual: &Dual, most: f64) -> Vec<Vec<(usize, f64)>> {
    let n = room.left_bytes.len();
    items
        .iter()
        .map(|item| {
            let least = cheapest(item, &dual.price).map_or(0.0, |(_, value)| value);
            let above = |c: usize| {
                let bytes = item.column_bytes(c, n);
                item.cost_s[c] + bytes.iter().zip(&dual.price).map(|(&b, p)| b as f64 * p).sum::<f64>() - least
            };
            let mut ranked: Vec<(usize, f64)> =
                (0..item.len()).map(|c| (c, above(c))).filter(|&(_, above)| above <= most).collect();
            ranked.sort_by(|a, b| a.1.total_cmp(&b.1).then(a.0.cmp(&b.0)));
            ranked
        })
        .collect()
}

struct Search<'a> {
    items: &'a [Item],
    n: usize,
    /// `[members of all items]` item and position in it.
    units: Vec<(usize, usize)>,
    choice: Choice,
    /// `[tiers]` bytes not used.
    spare: Vec<i128>,
}

impl Search<'_> {
    fn current(&self, unit: usize) -> usize {
        let (item, member) = self.units[unit];
        self.choice.columns[item][member]
    }

    /// Seconds gained by giving a unit another column.
    fn gain(&self, unit: usize, column: usize) -> f64 {
        let item = &self.items[self.units[unit].0];
        item.cost_s[self.current(unit)] - item.cost_s[column]
    }

    /// Bytes it then takes more of a tier.
    fn more(&self, unit: usize, column: usize, tier: usize) -> i128 {
        let item = &self.items[self.units[unit].0];
        let at = |c: usize| i128::from(item.bytes[c * self.n + tier]);
        at(column) - at(self.current(unit))
    }

    fn fits(&self, unit: usize, column: usize) -> bool {
        (0..self.n).all(|t| self.more(unit, column, t) <= self.spare[t])
    }

    fn set(&mut self, unit: usize, column: usize) {
        self.choice.cost_s -= self.gain(unit, column);
        for tier in 0..self.n {
            self.spare[tier] -= self.more(unit, column, tier);
        }
        let (item, member) = self.units[unit];
        self.choice.columns[item][member] = column;
    }

    /// The best change of one unit among the columns that `of` gives for its item.
    fn best_single(&self, of: &dyn Fn(usize) -> Vec<usize>) -> Option<(usize, usize)> {
        let mut best: Option<(usize, usize, f64)> = None;
        let mut last_item = usize::MAX;
        let mut columns = Vec::new();
        for unit in 0..self.units.len() {
            let item = self.units[unit].0;
            if item != last_item {
                (columns, last_item) = (of(item), item);
            }
            for &column in &columns {
                let gain = self.gain(unit, column);
                if gain > best.map_or(GAIN * self.choice.cost_s, |b| b.2) && self.fits(unit, column) {
                    best = Some((unit, column, gain));
                }
            }
        }
        best.map(|(unit, column, _)| (unit, column))
    }

    /// A change of two units that gains together and fits together, the first found for each first unit's best.
    fn pair(&mut self, short: &[Vec<usize>], deadline: Instant) -> bool {
        let mut changed = false;
        for a in 0..self.units.len() {
            if Instant::now() >= deadline {
                return false;
            }
            let mut best: Option<(usize, usize, usize, f64)> = None;
            for &to_a in &short[self.units[a].0] {
                let gain_a = self.gain(a, to_a);
                if gain_a <= 0.0 {
                    continue;
                }
                let left: Vec<i128> = (0..self.n).map(|t| self.spare[t] - self.more(a, to_a, t)).collect();
                for b in (0..self.units.len()).filter(|&b| b != a) {
                    for &to_b in &short[self.units[b].0] {
                        let gain = gain_a + self.gain(b, to_b);
                        if gain > best.map_or(GAIN * self.choice.cost_s, |b| b.3)
                            && (0..self.n).all(|t| self.more(b, to_b, t) <= left[t])
                        {
                            best = Some((to_a, b, to_b, gain));
                        }
                    }
                }
            }
            if let Some((to_a, b, to_b, _)) = best {
                self.set(a, to_a);
                self.set(b, to_b);
                changed = true;
            }
        }
        changed
    }
}

/// By item, the few columns that the prices favour, of all that [`ranked`] has.
pub fn shortlist(all: &[Vec<(usize, f64)>]) -> Vec<Vec<usize>> {
    all.iter().map(|columns| columns.iter().take(SHORT).map(|&(c, _)| c).collect()).collect()
}

/// Improves a choice by single changes and pairs of changes, with the columns of a shortlist, until neither helps or
/// the deadline passes.
pub fn improve(items: &[Item], room: &Room, short: &[Vec<usize>], choice: Choice, deadline: Instant) -> Choice {
    let used = used_bytes(items, room, &choice.columns);
    let units = items.iter().enumerate().flat_map(|(i, item)| (0..item.count()).map(move |m| (i, m))).collect();
    let spare = used.iter().zip(&room.left_bytes).map(|(&u, &left)| i128::from(left) - u as i128).collect();
    let mut search = Search { items, n: room.left_bytes.len(), units, choice, spare };
    loop {
        while let Some((unit, column)) = search.best_single(&|item| short[item].clone()) {
            search.set(unit, column);
            if Instant::now() >= deadline {
                break;
            }
        }
        if let Some((unit, column)) = search.best_single(&|item| (0..items[item].len()).collect()) {
            search.set(unit, column);
        } else if !search.pair(short, deadline) {
            break;
        }
        if Instant::now() >= deadline {
            break;
        }
    }
    // Summed afresh: the running sum has rounding of its own.
    let columns = search.choice.columns.clone();
    Choice::new(items, room, columns).unwrap_or(search.choice)
}
