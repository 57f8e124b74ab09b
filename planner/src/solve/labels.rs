//! The integer choice by partial choices: what the tree search of a general solver cannot prove here, this often can.
//!
//! Items are taken one after the other; a label is a choice for the items so far. With prices whose bound is `L`, a
//! label whose columns are together `above` their items' cheapest cannot lead to a choice that costs less than
//! `L + above`. So labels are dropped
//! - when `L + above` is no better than a known choice,
//! - when another label costs no more and uses no more of any tier,
//! - when what the later items need at least no longer fits,
//! - and, to bound the work, the ones with the largest `above` when there are too many.
//!
//! Only the last kind can lose something, and how much is known: every choice lost costs at least `L` plus the least
//! `above` so dropped. That is a proven bound too, most often a better one than `L`.

use super::columns::{Item, Stairs};
use super::dual::Dual;
use super::room::{MAX_ROWS, Room};
use super::search::{Choice, ranked};
use std::time::Instant;

/// Labels made over all stages, about: a few seconds of work.
const WORK: usize = 40_000_000;

/// Labels made in one stage, at most.
const MAX_STAGE: usize = 1_500_000;

/// Classes that `above` is counted in to find where to cut.
const CLASSES: usize = 4096;

/// What labels found.
#[derive(Debug, Clone, PartialEq)]
pub struct Found {
    /// A choice better than the known one, if there is.
    pub choice: Option<Choice>,
    /// No choice of any columns costs less, in seconds.
    pub bound_s: f64,
}

#[derive(Debug, Clone, Copy)]
struct Label {
    above: f64,
    cost_s: f64,
    /// By scarce tier.
    used: [u64; MAX_ROWS],
    parent: u32,
    column: u32,
}

/// Searches for a choice better than a known one; stops at the deadline with whatever is proven by then.
pub fn solve(items: &[Item], room: &Room, dual: &Dual, known: &Choice, deadline: Instant) -> Found {
    let n = room.left_bytes.len();
    let limit = (known.cost_s - dual.bound_s).max(0.0);
    let nothing = Found { choice: None, bound_s: dual.bound_s };
    let kept = ranked(items, room, dual, limit);
    if kept.iter().any(Vec::is_empty) {
        return nothing;
    }
    let most = |item: &Item, tier: usize| (0..item.len()).map(|c| item.column_bytes(c, n)[tier]).max().unwrap_or(0);
    let scarce: Vec<usize> = (0..n)
        .filter(|&t| {
            let all: u128 = items.iter().map(|i| u128::from(most(i, t)) * i.count() as u128).sum();
            all > u128::from(room.left_bytes[t])
        })
        .collect();

    // Few columns first: the number of labels stays small for long.
    let mut order: Vec<usize> = (0..items.len()).collect();
    order.sort_by_key(|&i| kept[i].len());
    let stages: Vec<usize> = order.iter().flat_map(|&i| std::iter::repeat_n(i, items[i].count())).collect();
    let stage_labels = (WORK / stages.iter().filter(|&&i| kept[i].len() > 8).count().max(1)).min(MAX_STAGE);
    // `[stages + 1]` bytes that the stages from there on need at least, by scarce tier.
    let mut need = vec![[0u64; MAX_ROWS]; stages.len() + 1];
    for (at, &item) in stages.iter().enumerate().rev() {
        need[at] = need[at + 1];
        for (row, &tier) in scarce.iter().enumerate() {
            let least = kept[item].iter().map(|&(c, _)| items[item].column_bytes(c, n)[tier]).min().unwrap_or(0);
            need[at][row] = need[at][row].saturating_add(least);
        }
    }

    let mut labels = vec![Label { above: 0.0, cost_s: 0.0, used: [0; MAX_ROWS], parent: 0, column: 0 }];
    let mut trail: Vec<Vec<(u32, u32)>> = Vec::with_capacity(stages.len());
    let mut dropped = f64::INFINITY;
    for (at, &item) in stages.iter().enumerate() {
        if Instant::now() >= deadline {
            return nothing;
        }
        let columns: Vec<(u32, f64, f64, [u64; MAX_ROWS])> = kept[item]
            .iter()
            .map(|&(c, above)| {
                let mut bytes = [0; MAX_ROWS];
                let of_column = items[item].column_bytes(c, n);
                scarce.iter().zip(&mut bytes).for_each(|(&tier, b)| *b = of_column[tier]);
                (c as u32, above, items[item].cost_s[c], bytes)
            })
            .collect();
        let cut = cut(&labels, &columns, limit, stage_labels);
        if cut < limit {
            dropped = dropped.min(cut);
        }
        let mut next = Vec::new();
        for (parent, label) in labels.iter().enumerate() {
            if parent % 1024 == 0 && Instant::now() >= deadline {
                return nothing;
            }
            for (column, above, cost_s, bytes) in &columns {
                let above = label.above + above;
                if above > cut {
                    break;
                }
                let mut used = label.used;
                let fits = scarce.iter().enumerate().all(|(row, &tier)| {
                    used[row] = used[row].saturating_add(bytes[row]);
                    used[row].saturating_add(need[at + 1][row]) <= room.left_bytes[tier]
                });
                if fits {
                    let cost_s = label.cost_s + cost_s;
                    next.push(Label { above, cost_s, used, parent: parent as u32, column: *column });
                }
            }
        }
        labels = undominated(next, scarce.len());
        labels.sort_by(|a, b| a.above.total_cmp(&b.above));
        trail.push(labels.iter().map(|l| (l.parent, l.column)).collect());
        if labels.is_empty() {
            break;
        }
    }

    let best = labels.iter().enumerate().min_by(|a, b| a.1.cost_s.total_cmp(&b.1.cost_s));
    let choice = best.and_then(|(at, _)| {
        let mut columns = vec![Vec::new(); items.len()];
        let mut at = at;
        for (stage, &item) in trail.iter().zip(&stages).rev() {
            let (parent, column) = stage[at];
            columns[item].push(column as usize);
            at = parent as usize;
        }
        Choice::new(items, room, columns).filter(|c| c.cost_s < known.cost_s)
    });
    let least = choice.as_ref().map_or(known.cost_s, |c| c.cost_s);
    Found { choice, bound_s: least.min(dual.bound_s + dropped) }
}

/// The largest sum of `above` up to which labels can be made without making more than `most`; `limit` if all can.
/// Labels and columns are sorted by it.
fn cut(labels: &[Label], columns: &[(u32, f64, f64, [u64; MAX_ROWS])], limit: f64, most: usize) -> f64 {
    if limit <= 0.0 || labels.len().saturating_mul(columns.len()) <= most {
        return limit;
    }
    let mut classes = vec![0usize; CLASSES];
    let scale = CLASSES as f64 / limit;
    for label in labels {
        for (_, above, _, _) in columns {
            let sum = label.above + above;
            if sum > limit {
                break;
            }
            classes[((sum * scale) as usize).min(CLASSES - 1)] += 1;
        }
    }
    let mut made = 0;
    for (class, count) in classes.into_iter().enumerate() {
        made += count;
        if made > most {
            // The first class is always kept, whatever it holds: something must go on.
            return class.max(1) as f64 / scale;
        }
    }
    limit
}

/// Drops labels that another one is no worse than in cost and every scarce tier. With more than two scarce tiers only
/// those with equal bytes are compared.
fn undominated(mut labels: Vec<Label>, scarce: usize) -> Vec<Label> {
    labels.sort_unstable_by(|a, b| a.used.cmp(&b.used).then(a.cost_s.total_cmp(&b.cost_s)));
    if scarce > 2 {
        labels.dedup_by(|later, earlier| later.used == earlier.used);
        return labels;
    }
    // Sorted by the first tier, so a label can only be dominated by an earlier one.
    let mut stairs = Stairs::default();
    labels.retain(|label| stairs.insert(label.used[1], label.cost_s));
    labels
}
