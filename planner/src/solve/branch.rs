//! Branching on how many layers have their experts on GPUs and the slowest tier alone.
//!
//! Such a layer leaves nothing to the CPU, so its time falls at once by much, for bytes that are a
//! quarter of a GPU's or more. The prices want a fractional number of them, which makes up most of
//! the gap between the bound and any choice. So the bound is found apart for fewer such layers than
//! the incumbent has, for as many, and for more: the least of the three holds for all choices, and
//! prices of each lead to choices of that number. A number is a row beside the bytes: each column
//! takes one or none of it.

use super::bound::lagrangian;
use super::optimize::find_incumbent;
use super::primal::choice::{Choice, Master};
use super::primal::exchange::Ending;
use super::problem::capacity::{Capacity, MAX_ROWS};
use super::problem::columns::Item;
use anyhow::Result;
use std::time::{Duration, Instant};

/// Rows that branching adds: such columns, and others.
const ADDED_ROWS: usize = 2;

/// What a column takes of its row. One more is always left, since rows of which nothing is left have
/// no price.
const ONE: u64 = 1 << 20;

/// The best choice of the branches, and the least cost of any.
pub(super) struct Branched {
    pub(super) choice: Choice,
    pub(super) bound_s: f64,
}

/// Raises the bound of a master problem, and improves the choice, by branching.
///
/// Returns the choice as it is with the master's bound where the machine has no tier that could
/// make a difference.
///
/// # Errors
/// Fails if prices are not finite.
pub(super) fn branch(master: &Master<'_>, incumbent: Choice, ending: Ending) -> Result<Branched> {
    let mut best = Branched {
        choice: incumbent,
        bound_s: master.dual.bound_s,
    };
    let Some(counted) = Counted::new(master) else {
        return Ok(best);
    };
    let has = counted.number(&best.choice);
    let most = counted.members;
    // The number that the incumbent has comes last: by then the incumbent is better, if at all.
    let branches = [
        has.checked_sub(1).map(|most| 0..=most),
        (has < most).then_some(has + 1..=most),
        Some(has..=has),
    ];
    let branches: Vec<_> = branches.into_iter().flatten().collect();
    let mut bound_s = f64::INFINITY;
    for (at, numbers) in branches.iter().enumerate() {
        let now = Instant::now();
        let left = ending.deadline.saturating_duration_since(now);
        if left.is_zero() {
            return Ok(best);
        }
        let capacity = counted.capacity(master.capacity, *numbers.start(), *numbers.end());
        let start = [&master.dual.price[..], &[0.0; ADDED_ROWS]].concat();
        let dual = lagrangian::maximize(&counted.items, &capacity, Some(&start), ending.deadline)?;
        bound_s = bound_s.min(dual.bound_s);
        let gap_s = best.choice.cost_s - dual.bound_s;
        if gap_s <= ending.tolerance * best.choice.cost_s {
            continue;
        }
        let branch = Master {
            items: &counted.items,
            capacity: &capacity,
            dual: &dual,
        };
        let known = Choice::new(&counted.items, &capacity, best.choice.columns.clone());
        let part: Duration = left / (branches.len() - at) as u32;
        let ending = Ending {
            deadline: now + part,
            ..ending
        };
        let found = find_incumbent(&branch, known.into_iter().collect(), ending);
        if let Some(found) = found.filter(|found| found.cost_s < best.choice.cost_s) {
            best.choice = found;
        }
    }
    best.bound_s = best.bound_s.max(bound_s);
    Ok(best)
}

/// Items whose columns say whether they leave a layer's experts to GPUs and the slowest tier.
struct Counted {
    items: Vec<Item>,
    /// Members of items with experts.
    members: usize,
    n_rows: usize,
}

impl Counted {
    /// Adds the rows. Returns `None` where no column, or every column, would be counted.
    fn new(master: &Master<'_>) -> Option<Self> {
        let (tiers, n) = (&master.capacity.tiers, master.n_rows());
        let last = tiers.len() - 1;
        let by_cpu: Vec<usize> = tiers
            .iter()
            .take(last)
            .enumerate()
            .filter(|(_, tier)| !tier.is_gpu())
            .map(|(t, _)| t)
            .collect();
        if by_cpu.is_empty() || by_cpu.len() == last || n + ADDED_ROWS > MAX_ROWS {
            return None;
        }
        let counts = |bytes: &[u64]| by_cpu.iter().all(|&t| bytes[t] == 0);
        let mut members = 0;
        let items = master.items.iter().map(|item| {
            let has_experts = !item.layers().is_empty();
            members += item.layers().len();
            let rows = item.bytes.chunks_exact(n).flat_map(|bytes| {
                let counted = has_experts && counts(bytes);
                let added = [counted, has_experts && !counted].map(|takes| u64::from(takes) * ONE);
                bytes.iter().copied().chain(added)
            });
            Item {
                meaning: item.meaning.clone(),
                cost_s: item.cost_s.clone(),
                bytes: rows.collect(),
            }
        });
        let items: Vec<Item> = items.collect();
        Some(Self {
            items,
            members,
            n_rows: n + ADDED_ROWS,
        })
    }

    /// Returns how many layers of a choice are counted.
    fn number(&self, choice: &Choice) -> usize {
        let columns = self.items.iter().zip(&choice.columns);
        columns
            .flat_map(|(item, columns)| columns.iter().map(move |&c| (item, c)))
            .filter(|(item, c)| item.column_bytes(*c, self.n_rows)[self.n_rows - ADDED_ROWS] > 0)
            .count()
    }

    /// Returns what is left where at least `least` and at most `most` layers are counted.
    fn capacity(&self, of: &Capacity, least: usize, most: usize) -> Capacity {
        let mut capacity = of.clone();
        let left = [most, self.members - least].map(|n| n as u64 * ONE + 1);
        capacity.left_bytes.extend(left);
        capacity
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::solve::primal::exchange::tests::capacity;
    use crate::solve::problem::columns::{Config, Meaning};
    use proptest::prelude::*;
    use tier_plan_runtime::formats::machine::TierKind;
    use tier_plan_runtime::formats::placement::TierIdx;

    /// Seconds, and bytes on a GPU and in main memory.
    type Column = (u16, u64, u64);

    fn item(layers: std::ops::Range<usize>, columns: &[Column]) -> Item {
        let config = Config {
            cuts: Default::default(),
            slots: 0,
            slot_tier: TierIdx::FIRST,
        };
        Item {
            meaning: Meaning::Experts {
                layers: layers.collect(),
                configs: vec![config; columns.len()],
            },
            cost_s: columns.iter().map(|c| f64::from(c.0) * 1e-3).collect(),
            bytes: columns.iter().flat_map(|c| [c.1, c.2, 0]).collect(),
        }
    }

    /// Returns the least cost of two members of the first item and one of the second.
    fn least(a: &[Column], b: &[Column], left: [u64; 2]) -> Option<f64> {
        let of_three = a
            .iter()
            .flat_map(|x| a.iter().flat_map(move |y| b.iter().map(move |z| [x, y, z])));
        of_three
            .filter(|c| {
                c.iter().map(|c| c.1).sum::<u64>() <= left[0]
                    && c.iter().map(|c| c.2).sum::<u64>() <= left[1]
            })
            .map(|c| c.iter().map(|c| f64::from(c.0) * 1e-3).sum())
            .min_by(f64::total_cmp)
    }

    fn columns() -> impl Strategy<Value = Vec<Column>> {
        let counted = (1u16..100, 20u64..40, Just(0));
        let other = (100u16..500, 0u64..10, 1u64..40);
        proptest::collection::vec(prop_oneof![counted, other], 2..12)
    }

    proptest! {
        #[test]
        fn bounds_rise_and_hold(a in columns(), b in columns(), left in (30u64..90, 30u64..90)) {
            let fail = |e: anyhow::Error| TestCaseError::fail(e.to_string());
            // What fits whatever else is chosen.
            let none = [(600, 0, 0)];
            let (a, b) = ([&a[..], &none].concat(), [&b[..], &none].concat());
            let items = vec![item(0..2, &a), item(2..3, &b)];
            let kinds = [TierKind::Vram, TierKind::Dram, TierKind::Nvme];
            let capacity = capacity(&kinds, vec![left.0, left.1, 1 << 20]);
            let deadline = Instant::now() + Duration::from_secs(60);
            let dual = lagrangian::maximize(&items, &capacity, None, deadline).map_err(fail)?;
            let master = Master { items: &items, capacity: &capacity, dual: &dual };
            let last = vec![vec![a.len() - 1; 2], vec![b.len() - 1]];
            let incumbent = Choice::new(&items, &capacity, last);
            let incumbent = incumbent.ok_or_else(|| TestCaseError::fail("does not fit"))?;
            let ending = Ending { tolerance: 0.0, fruitless_triples: 1000, choices: 1, deadline };
            let found = branch(&master, incumbent.clone(), ending).map_err(fail)?;
            let least = least(&a, &b, [left.0, left.1]);
            let least = least.ok_or_else(|| TestCaseError::fail("nothing fits"))?;
            let near = 1e-9 * least;
            prop_assert!(found.bound_s >= dual.bound_s);
            prop_assert!(found.bound_s <= least + near, "{} {least}", found.bound_s);
            prop_assert!(found.choice.cost_s <= incumbent.cost_s);
            prop_assert!(found.choice.cost_s >= least - near);
            prop_assert!(Choice::new(&items, &capacity, found.choice.columns).is_some());
        }
    }

    #[test]
    fn one_large_column_of_two_that_the_prices_want() {
        // Each layer takes 60 of a GPU's 100 bytes and no time, or main memory and 10 ms.
        let columns = [(0, 60, 0), (10, 0, 5)];
        let items = vec![item(0..2, &columns)];
        let kinds = [TierKind::Vram, TierKind::Dram, TierKind::Nvme];
        let capacity = capacity(&kinds, vec![100, 100, 100]);
        let deadline = Instant::now() + Duration::from_secs(60);
        let dual = lagrangian::maximize(&items, &capacity, None, deadline).unwrap();
        assert!(dual.bound_s < 0.0034, "two thirds of a layer for nothing");
        let master = Master {
            items: &items,
            capacity: &capacity,
            dual: &dual,
        };
        let incumbent = Choice::new(&items, &capacity, vec![vec![0, 1]]).unwrap();
        let ending = Ending {
            tolerance: 0.0,
            fruitless_triples: 10,
            choices: 1,
            deadline,
        };
        let found = branch(&master, incumbent, ending).unwrap();
        assert!((found.bound_s - 0.010).abs() < 1e-6, "{}", found.bound_s);
        // Without a GPU there is nothing to branch on.
        let plain = crate::solve::primal::exchange::tests::capacity(
            &[TierKind::Dram, TierKind::Dram, TierKind::Nvme],
            vec![100, 100, 100],
        );
        let master = Master {
            capacity: &plain,
            ..master
        };
        assert!(Counted::new(&master).is_none());
    }
}
