//! Softmax attention of single tokens to runs of cached rows, for layers where every token sees
//! rows of its own choice.
//!
//! A token passes over its rows alone, in their order. So its result has the same bits whatever
//! tokens are beside it and however many threads there are.

use super::cpu_context::CpuContext;
use std::cell::RefCell;
use tier_plan_kernels::{Kernels, RowBlock, StoredRows};

/// Heads that pass over rows together at most.
const MAX_HEADS: usize = if cfg!(test) { 3 } else { 16 };

/// Heads up to which rows are multiplied as they are stored; for more it pays to widen them first.
const MAX_HEADS_AS_STORED: usize = if cfg!(test) { 2 } else { 8 };

/// Values that are widened at a time, about: 16 KiB of floats.
const TILE_VALUES: usize = 4096;

thread_local! {
    static LOCAL: RefCell<Local> = RefCell::default();
}

/// Buffers of one thread.
#[derive(Default)]
struct Local {
    /// `[heads, key width]`.
    queries: Vec<f32>,
    /// `[heads, rows]`.
    scores: Vec<f32>,
    /// Rows widened to floats.
    tile: Vec<f32>,
}

/// Neighboring rows that a token attends to.
#[derive(Clone, Copy)]
pub(super) struct Run<'a> {
    pub keys: StoredRows<'a>,
    /// As many rows, in the same order; may be the keys.
    pub values: StoredRows<'a>,
}

/// The shape of the queries of [`attend_runs`].
#[derive(Debug, Clone, Copy)]
pub(super) struct RunShape {
    pub n_head_kv: usize,
    /// Query heads per KV head.
    pub group: usize,
    pub key_width: usize,
    /// Width of a row of values, all of which is mixed.
    pub value_width: usize,
}

impl RunShape {
    /// Returns the heads per job: a divisor of the group.
    fn block_heads(self) -> usize {
        let divides = |n: &usize| self.group.is_multiple_of(*n);
        let most = self.group.min(MAX_HEADS);
        (1..=most).rev().find(divides).unwrap_or(1)
    }
}

/// Computes the attention of all heads of some tokens into `out`, `[tokens, heads, value width]`.
///
/// `runs` lists the rows that a token sees in a KV head. `query` writes a query, `[key width]`, given
/// its head (of all) and its token; the factor on scores is in it. `sinks` are scores of heads,
/// `[heads]`, which take their share of the weights and have no value.
pub(super) fn attend_runs<'a>(
    c: CpuContext<'_>,
    shape: RunShape,
    runs: impl Fn(usize, usize, &mut Vec<Run<'a>>) + Sync,
    query: impl Fn(usize, usize, &mut [f32]) + Sync,
    sinks: Option<&[f32]>,
    out: &mut [f32],
) {
    let heads = shape.block_heads();
    let blocks = shape.group / heads;
    c.pool
        .for_each_slice(out, heads * shape.value_width, |item, out| {
            let (rest, block) = (item / blocks, item % blocks);
            let (token, kv_head) = (rest / shape.n_head_kv, rest % shape.n_head_kv);
            let first = kv_head * shape.group + block * heads;
            let mut found = Vec::new();
            runs(token, kv_head, &mut found);
            LOCAL.with_borrow_mut(|local| {
                local.queries.resize(heads * shape.key_width, 0.0);
                let queries = local.queries.chunks_exact_mut(shape.key_width);
                for (i, to) in queries.enumerate() {
                    query(first + i, token, to);
                }
                let sinks = sinks.map(|sinks| &sinks[first..first + heads]);
                attend_token(c.kernels, shape, &found, sinks, local, out);
            });
        });
}

/// Computes the attention of some heads of a token, `[heads, value width]`.
fn attend_token(
    kernels: Kernels,
    shape: RunShape,
    runs: &[Run<'_>],
    sinks: Option<&[f32]>,
    local: &mut Local,
    out: &mut [f32],
) {
    let (key_width, value_width) = (shape.key_width, shape.value_width);
    let Local {
        queries,
        scores,
        tile,
    } = local;
    let total: usize = runs.iter().map(|run| run.keys.count(key_width)).sum();
    let heads = out.len() / value_width;
    out.fill(0.0);
    if total == 0 {
        return;
    }
    scores.clear();
    scores.resize(heads * total, 0.0);
    let mut at = 0;
    for run in runs {
        for_each_tile(kernels, run.keys, key_width, heads, tile, |rows, n| {
            kernels.row_dots(
                queries,
                RowBlock::new(rows, key_width),
                &mut scores[at..],
                total,
            );
            at += n;
        });
    }
    let mut factors = [0.0; MAX_HEADS];
    for (head, (row, factor)) in scores.chunks_exact_mut(total).zip(&mut factors).enumerate() {
        let (largest, sum) = kernels.exp_minus_max(row);
        *factor = match sinks.map(|sinks| sinks[head]) {
            None => 1.0 / sum,
            Some(sink) => {
                let most = largest.max(sink);
                let share = (largest - most).exp();
                share / (share * sum + (sink - most).exp())
            }
        };
    }
    let mut at = 0;
    for run in runs {
        for_each_tile(kernels, run.values, value_width, heads, tile, |rows, n| {
            let weights = &scores[at..];
            kernels.add_weighted_rows(
                weights,
                total,
                RowBlock::new(rows, value_width),
                out,
                value_width,
            );
            at += n;
        });
    }
    for (out, factor) in out.chunks_exact_mut(value_width).zip(factors) {
        out.iter_mut().for_each(|v| *v *= factor);
    }
}

/// Calls `work` on parts of some rows, in order, with how many they are: as they are stored for few
/// heads, widened for many.
fn for_each_tile(
    kernels: Kernels,
    rows: StoredRows<'_>,
    width: usize,
    heads: usize,
    tile: &mut Vec<f32>,
    mut work: impl FnMut(StoredRows<'_>, usize),
) {
    let n = rows.count(width);
    if heads <= MAX_HEADS_AS_STORED || matches!(rows, StoredRows::F32(_)) {
        return work(rows, n);
    }
    let step = (TILE_VALUES / width).max(1);
    for first in (0..n).step_by(step) {
        let part = first..(first + step).min(n);
        let n = part.len();
        tile.resize(n * width, 0.0);
        kernels.widen_rows(rows.range(part, width), width, tile);
        work(StoredRows::F32(tile), n);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tier_plan_kernels::threads::ThreadPool;
    use tier_plan_testing::Random;

    /// Attention by the formula, in 64 bits: `rows` are keys and values at once.
    fn expected(query: &[f32], rows: &[&[f32]], sink: Option<f32>) -> Vec<f64> {
        let dot = |row: &&[f32]| -> f64 {
            let products = row.iter().zip(query).map(|(a, b)| f64::from(a * b));
            products.sum()
        };
        let weights: Vec<f64> = rows.iter().map(|row| dot(row).exp()).collect();
        let sum = weights.iter().sum::<f64>() + sink.map_or(0.0, |s| f64::from(s).exp());
        let column = |i: usize| {
            let terms = rows.iter().zip(&weights).map(|(r, w)| w * f64::from(r[i]));
            terms.sum::<f64>() / sum
        };
        (0..query.len()).map(column).collect()
    }

    #[test]
    fn every_token_attends_to_its_own_runs() {
        const WIDTH: usize = 8;
        let mut random = Random(3);
        let mut values = |n: usize| -> Vec<f32> {
            (0..n)
                .map(|_| random.below(200) as f32 / 100.0 - 1.0)
                .collect()
        };
        let (rows, queries) = (values(40 * WIDTH), values(3 * 4 * WIDTH));
        let row = |i: usize| &rows[i * WIDTH..][..WIDTH];
        let shape = RunShape {
            n_head_kv: 1,
            group: 4,
            key_width: WIDTH,
            value_width: WIDTH,
        };
        let seen = [
            vec![0..1, 1..2],
            vec![2..9, 30..40],
            vec![5..6, 7..8, 11..25],
        ];
        let sinks = [0.5, -1.0, 2.0, 0.0];
        for kernels in Kernels::available() {
            for sinks in [None, Some(&sinks[..])] {
                let run = |threads: usize| {
                    let pool = ThreadPool::new(threads);
                    let c = CpuContext {
                        pool: &pool,
                        kernels,
                    };
                    let mut out = vec![f32::NAN; 3 * 4 * WIDTH];
                    let all = StoredRows::F32(&rows);
                    let runs = |token: usize, _: usize, to: &mut Vec<_>| {
                        let ranges = seen[token].iter();
                        to.extend(ranges.map(|range| {
                            let rows = all.range(range.clone(), WIDTH);
                            Run {
                                keys: rows,
                                values: rows,
                            }
                        }));
                    };
                    let query = |head: usize, token: usize, to: &mut [f32]| {
                        to.copy_from_slice(&queries[(token * 4 + head) * WIDTH..][..WIDTH]);
                    };
                    attend_runs(c, shape, runs, query, sinks, &mut out);
                    out
                };
                let found = run(1);
                assert_eq!(found, run(3), "bits don't depend on threads");
                for (i, found) in found.chunks_exact(WIDTH).enumerate() {
                    let rows: Vec<&[f32]> =
                        seen[i / 4].iter().cloned().flatten().map(row).collect();
                    let query = &queries[i * WIDTH..][..WIDTH];
                    let expected = expected(query, &rows, sinks.map(|s| s[i % 4]));
                    for (found, expected) in found.iter().zip(expected) {
                        assert!((f64::from(*found) - expected).abs() < 1e-5);
                    }
                }
            }
        }
    }
}
