//! Label-setting search: dynamic programming over items with dominance and reduced-cost pruning.
//! Often closes gaps that generic branch and bound cannot.
//!
//! Items are taken one after the other; a label is a choice for the items so far. With prices whose
//! bound is `L`, a label whose columns have reduced costs of `r` together cannot lead to a choice
//! that costs less than `L + r`. So a label is dropped
//! - when `L + r` is no better than the incumbent,
//! - when another label costs no more and uses no more of any tier (dominance),
//! - when what the later items need at least no longer fits,
//! - and, to bound the work, when there are too many labels and its `r` is among the largest.
//!
//! Only the last kind can lose a better choice, and how much is known: every choice lost costs at
//! least `L` plus the least `r` so dropped. That is a proven bound too, most often a better one
//! than `L`.

use super::choice::{Choice, Master, PricedColumn};
use crate::solve::problem::capacity::MAX_ROWS;
use crate::solve::problem::columns::{Item, ParetoFront};
use std::time::Instant;

/// Labels made over all stages, approximately: a few seconds of work.
const TARGET_LABELS: usize = 40_000_000;

/// Labels made in one stage, at most.
const MAX_STAGE_LABELS: usize = 1_500_000;

/// Columns above which a stage counts as large when labels are shared out.
const LARGE_STAGE_COLUMNS: usize = 8;

/// Bins of the histogram of reduced costs that finds where to cut.
const HISTOGRAM_BINS: usize = 4096;

/// Labels between two looks at the clock.
const LABELS_PER_CLOCK_CHECK: usize = 1024;

/// What the search found.
#[derive(Debug, Clone, PartialEq)]
pub struct LabelSettingResult {
    /// A choice better than the incumbent, if there is one.
    pub choice: Option<Choice>,
    /// Least cost of any choice, in seconds.
    pub bound_s: f64,
}

#[derive(Debug, Clone, Copy)]
struct Label {
    reduced_cost: f64,
    cost_s: f64,
    /// `[scarce rows]` bytes.
    used: [u64; MAX_ROWS],
    parent: u32,
    column: u32,
}

/// A column of a stage's item.
struct StageColumn {
    column: u32,
    reduced_cost: f64,
    cost_s: f64,
    /// `[scarce rows]` bytes.
    bytes: [u64; MAX_ROWS],
}

/// Where a label came from.
#[derive(Clone, Copy)]
struct Step {
    parent: u32,
    column: u32,
}

/// The stages of the search: one per member, items with few columns first.
struct Stages<'a> {
    master: &'a Master<'a>,
    /// `[items]` columns that survive reduced-cost fixing.
    kept: Vec<Vec<PricedColumn>>,
    /// Rows that can run out.
    scarce: Vec<usize>,
    /// `[stages]` items.
    items: Vec<usize>,
    /// `[stages + 1]` bytes that the stages from there on need at least, by scarce row.
    need: Vec<[u64; MAX_ROWS]>,
    /// Labels that one stage may make.
    max_labels: usize,
}

/// Searches for a choice better than the incumbent.
///
/// Returns the Lagrangian bound if the deadline passes first.
pub fn solve(master: &Master<'_>, incumbent: &Choice, deadline: Instant) -> LabelSettingResult {
    let limit = (incumbent.cost_s - master.dual.bound_s).max(0.0);
    let nothing = LabelSettingResult {
        choice: None,
        bound_s: master.dual.bound_s,
    };
    let Some(stages) = Stages::new(master, limit) else {
        return nothing;
    };
    let mut labels = vec![Label {
        reduced_cost: 0.0,
        cost_s: 0.0,
        used: [0; MAX_ROWS],
        parent: 0,
        column: 0,
    }];
    let mut trail: Vec<Vec<Step>> = Vec::with_capacity(stages.items.len());
    // Least reduced cost of a label that was dropped to bound the work.
    let mut dropped = f64::INFINITY;
    for stage in 0..stages.items.len() {
        if Instant::now() >= deadline {
            return nothing;
        }
        let columns = stages.columns(stage);
        let cutoff = cutoff(&labels, &columns, limit, stages.max_labels);
        if cutoff < limit {
            dropped = dropped.min(cutoff);
        }
        let Some(next) = stages.extend(stage, &labels, &columns, cutoff, deadline) else {
            return nothing;
        };
        labels = undominated(next, stages.scarce.len());
        labels.sort_by(|a, b| a.reduced_cost.total_cmp(&b.reduced_cost));
        trail.push(
            labels
                .iter()
                .map(|l| Step {
                    parent: l.parent,
                    column: l.column,
                })
                .collect(),
        );
        if labels.is_empty() {
            break;
        }
    }
    let best = labels
        .iter()
        .enumerate()
        .min_by(|a, b| a.1.cost_s.total_cmp(&b.1.cost_s));
    let choice = best.and_then(|(label, _)| {
        let columns = stages.columns_of(label, &trail);
        Choice::new(master.items, master.capacity, columns).filter(|c| c.cost_s < incumbent.cost_s)
    });
    let least = choice.as_ref().map_or(incumbent.cost_s, |c| c.cost_s);
    LabelSettingResult {
        choice,
        bound_s: least.min(master.dual.bound_s + dropped),
    }
}

impl<'a> Stages<'a> {
    /// Returns `None` if an item has no column within the limit.
    fn new(master: &'a Master<'a>, limit: f64) -> Option<Self> {
        let (items, n) = (master.items, master.n_rows());
        let kept = master.reduced_costs(limit);
        if kept.iter().any(Vec::is_empty) {
            return None;
        }
        let largest = |item: &Item, row: usize| {
            (0..item.len())
                .map(|c| item.column_bytes(c, n)[row])
                .max()
                .unwrap_or(0)
        };
        let scarce: Vec<usize> = (0..n)
            .filter(|&row| {
                let most = |i: &Item| u128::from(largest(i, row)) * i.count() as u128;
                items.iter().map(most).sum::<u128>() > u128::from(master.capacity.left_bytes[row])
            })
            .collect();
        // With few columns first, the number of labels stays small for long.
        let mut order: Vec<usize> = (0..items.len()).collect();
        order.sort_by_key(|&i| kept[i].len());
        let stages: Vec<usize> = order
            .iter()
            .flat_map(|&i| std::iter::repeat_n(i, items[i].count()))
            .collect();
        let n_large = stages
            .iter()
            .filter(|&&i| kept[i].len() > LARGE_STAGE_COLUMNS)
            .count();
        let max_labels = (TARGET_LABELS / n_large.max(1)).min(MAX_STAGE_LABELS);
        let mut need = vec![[0u64; MAX_ROWS]; stages.len() + 1];
        for (stage, &item) in stages.iter().enumerate().rev() {
            need[stage] = need[stage + 1];
            for (row, &tier) in scarce.iter().enumerate() {
                let bytes = kept[item]
                    .iter()
                    .map(|c| items[item].column_bytes(c.column, n)[tier]);
                need[stage][row] = need[stage][row].saturating_add(bytes.min().unwrap_or(0));
            }
        }
        Some(Stages {
            master,
            kept,
            scarce,
            items: stages,
            need,
            max_labels,
        })
    }

    /// Returns a stage's columns, the least reduced cost first.
    fn columns(&self, stage: usize) -> Vec<StageColumn> {
        let item = self.items[stage];
        let of_item = &self.master.items[item];
        self.kept[item]
            .iter()
            .map(
                |&PricedColumn {
                     column,
                     reduced_cost,
                 }| {
                    let mut bytes = [0; MAX_ROWS];
                    let of_column = of_item.column_bytes(column, self.master.n_rows());
                    self.scarce
                        .iter()
                        .zip(&mut bytes)
                        .for_each(|(&tier, b)| *b = of_column[tier]);
                    StageColumn {
                        column: column as u32,
                        reduced_cost,
                        cost_s: of_item.cost_s[column],
                        bytes,
                    }
                },
            )
            .collect()
    }

    /// Makes all labels of a stage up to a reduced cost. Returns `None` once the deadline passes.
    fn extend(
        &self,
        stage: usize,
        labels: &[Label],
        columns: &[StageColumn],
        cutoff: f64,
        deadline: Instant,
    ) -> Option<Vec<Label>> {
        let left_bytes = &self.master.capacity.left_bytes;
        let mut next = Vec::new();
        for (parent, label) in labels.iter().enumerate() {
            if parent % LABELS_PER_CLOCK_CHECK == 0 && Instant::now() >= deadline {
                return None;
            }
            for column in columns {
                let reduced_cost = label.reduced_cost + column.reduced_cost;
                if reduced_cost > cutoff {
                    break;
                }
                let mut used = label.used;
                let fits = self.scarce.iter().enumerate().all(|(row, &tier)| {
                    used[row] = used[row].saturating_add(column.bytes[row]);
                    used[row].saturating_add(self.need[stage + 1][row]) <= left_bytes[tier]
                });
                if fits {
                    let cost_s = label.cost_s + column.cost_s;
                    let (parent, column) = (parent as u32, column.column);
                    next.push(Label {
                        reduced_cost,
                        cost_s,
                        used,
                        parent,
                        column,
                    });
                }
            }
        }
        Some(next)
    }

    /// Returns `[items][members]` columns of a label of the last stage.
    fn columns_of(&self, label: usize, trail: &[Vec<Step>]) -> Vec<Vec<usize>> {
        let mut columns = vec![Vec::new(); self.master.items.len()];
        let mut at = label;
        for (stage, &item) in trail.iter().zip(&self.items).rev() {
            let Step { parent, column } = stage[at];
            columns[item].push(column as usize);
            at = parent as usize;
        }
        columns
    }
}

/// Returns the reduced cost up to which labels can be made without exceeding `max_labels`.
///
/// That is `limit` if all can. Labels and columns come sorted by reduced cost.
fn cutoff(labels: &[Label], columns: &[StageColumn], limit: f64, max_labels: usize) -> f64 {
    if limit <= 0.0 || labels.len().saturating_mul(columns.len()) <= max_labels {
        return limit;
    }
    let mut histogram = vec![0usize; HISTOGRAM_BINS];
    let scale = HISTOGRAM_BINS as f64 / limit;
    for label in labels {
        for column in columns {
            let sum = label.reduced_cost + column.reduced_cost;
            if sum > limit {
                break;
            }
            histogram[((sum * scale) as usize).min(HISTOGRAM_BINS - 1)] += 1;
        }
    }
    let mut made = 0;
    for (bin, count) in histogram.into_iter().enumerate() {
        made += count;
        if made > max_labels {
            // The first bin is always kept, whatever it holds, so that the search goes on.
            return bin.max(1) as f64 / scale;
        }
    }
    limit
}

/// Drops dominated labels: another one is no worse in cost and in every scarce row.
///
/// With more than two scarce rows only labels of equal bytes are compared.
fn undominated(mut labels: Vec<Label>, n_scarce: usize) -> Vec<Label> {
    labels.sort_unstable_by(|a, b| a.used.cmp(&b.used).then(a.cost_s.total_cmp(&b.cost_s)));
    if n_scarce > 2 {
        labels.dedup_by(|later, earlier| later.used == earlier.used);
        return labels;
    }
    // Sorted by the first row, so a label can only be dominated by an earlier one.
    let mut front = ParetoFront::default();
    labels.retain(|label| front.insert(label.used[1], label.cost_s));
    labels
}
