//! Lightning indexers: keys in the cache, ratings, choices, and attention to what was chosen.

use super::Check;
use super::attention::{Scores, plain_attention};
use super::kv_rows::{stored, widened};
use super::texts::Text;
use crate::outcome::{Expected, Outcome};
use tier_plan_cuda::device::Buffer;
use tier_plan_cuda::ops::{
    Attend, AttentionBuffers, BlockKeys, Choice, ChosenBlocks, IndexQueries, IndexRows, RopeTurns,
};
use tier_plan_cuda::{CudaError, Ops};
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::spec::{RopeKind, Selection, WindowKind};
use tier_plan_kernels::random::Random;

pub(super) fn checks() -> Vec<Check> {
    let mut checks = Vec::new();
    for kv_type in KvType::ALL {
        checks.push(Check::new(
            format!("place_index, {kv_type}"),
            move |ops, random| place(ops, random, kv_type),
        ));
        checks.push(Check::new(
            format!("rate, choose_blocks, {kv_type}"),
            move |ops, random| choose(ops, random, kv_type),
        ));
        checks.push(Check::new(
            format!("attend_chosen, {kv_type}"),
            move |ops, random| attend(ops, random, kv_type),
        ));
    }
    checks
}

/// Rotates a row from a value on; `turns` is `[half]` of cosine and sine.
pub(super) fn rotated(row: &mut [f64], first: usize, turns: &[f32], kind: RopeKind) {
    let half = turns.len() / 2;
    for (i, turn) in turns.chunks_exact(2).enumerate() {
        let (a, b) = match kind {
            RopeKind::Adjacent => (first + 2 * i, first + 2 * i + 1),
            RopeKind::Halves => (first + i, first + i + half),
        };
        let (cosine, sine) = (f64::from(turn[0]), f64::from(turn[1]));
        (row[a], row[b]) = (
            row[a] * cosine - row[b] * sine,
            row[a] * sine + row[b] * cosine,
        );
    }
}

/// Returns a key after the layer norm, in 64-bit floats.
pub(super) fn normed(key: &[f32], norm: &[f32], bias: &[f32], eps: f64) -> Vec<f64> {
    let n = key.len() as f64;
    let mean = key.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
    let off = || key.iter().map(|v| f64::from(*v) - mean);
    let variance = off().map(|v| v * v).sum::<f64>() / n;
    let factor = 1.0 / (variance + eps).sqrt();
    let weights = norm.iter().zip(bias);
    off()
        .zip(weights)
        .map(|(v, (w, b))| v * factor * f64::from(*w) + f64::from(*b))
        .collect()
}

fn place(ops: &Ops, random: &mut Random, kv_type: KvType) -> Result<Outcome, CudaError> {
    let mut outcome = Outcome::default();
    let (tokens, past, n_head, eps) = (3, 6, 5, 1e-5);
    let text = Text::new(ops, past, tokens)?;
    let device = ops.device();
    // (width, first value that rotates, pairs, queries)
    for (dim, first, half, kind, asks) in [
        (128, 0, 32, RopeKind::Halves, true),
        (64, 40, 12, RopeKind::Adjacent, true),
        (40, 8, 16, RopeKind::Halves, false),
        (12, 0, 0, RopeKind::Adjacent, true),
    ] {
        let (q, k) = (
            random.floats(tokens * n_head * dim),
            random.floats(tokens * dim),
        );
        let (norm, bias) = (random.floats(dim), random.floats(dim));
        let turns = random.floats(2 * tokens * half);
        let row_bytes = kv_type.row_bytes(dim as u64) as usize;
        let before = vec![0x5a; text.capacity() * row_bytes];
        let [queries, keys, weights, biases] =
            [&q, &k, &norm, &bias].map(|values| Buffer::of_f32(device, values));
        let (queries, keys) = (queries?, keys?);
        let (weights, biases) = (weights?, biases?);
        let on_device = Buffer::of_f32(device, &turns)?;
        let cache = Buffer::of_bytes(device, &before)?;
        ops.place_index(&IndexRows {
            queries: asks.then_some(queries.view()),
            n_head,
            new_keys: keys.view(),
            key_dim: dim,
            norm: weights.view(),
            norm_bias: biases.view(),
            eps: eps as f32,
            turns: (half > 0).then_some(RopeTurns {
                values: on_device.view(),
                kind,
                half,
            }),
            rope_first: first,
            positions: text.positions(),
            kv_type,
            keys: cache.view(),
        })?;
        let turns_of = |token: usize| &turns[2 * token * half..2 * (token + 1) * half];
        let got = queries.view().to_f32()?;
        for (at, (got, row)) in got.chunks_exact(dim).zip(q.chunks_exact(dim)).enumerate() {
            let mut expected: Vec<f64> = row.iter().map(|v| f64::from(*v)).collect();
            if asks {
                rotated(&mut expected, first, turns_of(at / n_head), kind);
            }
            let within = |value| Expected {
                value,
                allowed: 1e-6,
            };
            outcome.compare(got, expected.into_iter().map(within));
        }
        // Stored values are near the formula's, and nothing else is written.
        let allowed = match kv_type {
            KvType::F32 => 2e-5,
            KvType::F16 => 4e-3,
            KvType::Q8_0 => 5e-2,
        };
        let mut rest = cache.view().to_bytes()?;
        for (token, key) in k.chunks_exact(dim).enumerate() {
            let mut expected = normed(key, &norm, &bias, eps);
            rotated(&mut expected, first, turns_of(token), kind);
            let at = text.at(past + token) * row_bytes..(text.at(past + token) + 1) * row_bytes;
            let got = widened(kv_type, &rest[at.clone()], dim);
            let near = |value| Expected { value, allowed };
            outcome.compare(&got, expected.into_iter().map(near));
            rest[at].fill(0x5a);
        }
        outcome.compare_exact(&rest, &before);
    }
    Ok(outcome)
}

/// Sizes of a choice.
#[derive(Clone, Copy)]
struct Case {
    n_head: usize,
    dim: usize,
    tokens: usize,
    past: usize,
    most: usize,
    /// Different keys; the others repeat them, so that ratings are equal.
    different: usize,
}

fn choose(ops: &Ops, random: &mut Random, kv_type: KvType) -> Result<Outcome, CudaError> {
    let plain = Case {
        n_head: 8,
        dim: 64,
        tokens: 3,
        past: 70,
        most: 10,
        different: usize::MAX,
    };
    let cases = [
        plain,
        // Several groups of heads and columns, none of them full.
        Case {
            n_head: 37,
            dim: 84,
            past: 130,
            ..plain
        },
        // Ties that the last choice is among.
        Case {
            different: 7,
            most: 33,
            ..plain
        },
        Case {
            different: 1,
            n_head: 1,
            tokens: 1,
            most: 5,
            ..plain
        },
        // The first tokens attend to all positions.
        Case {
            past: 8,
            tokens: 5,
            ..plain
        },
        // More positions than threads, and a choice of nearly all.
        Case {
            n_head: 2,
            dim: 16,
            past: 1200,
            tokens: 2,
            most: 600,
            different: 400,
        },
        Case {
            n_head: 2,
            dim: 16,
            past: 560,
            tokens: 1,
            most: 560,
            ..plain
        },
    ];
    let mut outcome = Outcome::default();
    for case in cases {
        outcome.merge(choose_case(ops, random, kv_type, case)?);
    }
    Ok(outcome)
}

fn choose_case(
    ops: &Ops,
    random: &mut Random,
    kv_type: KvType,
    case: Case,
) -> Result<Outcome, CudaError> {
    let Case {
        n_head,
        dim,
        tokens,
        past,
        most,
        different,
    } = case;
    let (device, scale) = (ops.device(), 0.25);
    let choice = Choice::from(Selection::of_positions(most));
    let text = Text::new(ops, past, tokens)?;
    let mut rows: Vec<Vec<u8>> = vec![stored(kv_type, &vec![f32::NAN; dim]); text.capacity()];
    for position in 0..past + tokens {
        rows[text.at(position)] = if position < different {
            stored(kv_type, &random.floats(dim))
        } else {
            rows[text.at(position % different)].clone()
        };
    }
    let queries = random.floats(tokens * n_head * dim);
    let mut weights = random.floats(tokens * n_head);
    if tokens == 3 {
        // All ratings of the last token are zero, some of them perhaps below it.
        weights[2 * n_head..].fill(-0.0);
    }
    let keys = Buffer::of_bytes(device, &rows.concat())?;
    let [on_device, head_weights] = [&queries, &weights].map(|v| Buffer::of_f32(device, v));
    let (on_device, head_weights) = (on_device?, head_weights?);
    let i = IndexQueries {
        queries: on_device.view(),
        n_head,
        key_dim: dim,
        head_weights: Some(head_weights.view()),
        scale,
        positions: text.positions(),
        kv_type,
        keys: keys.view(),
        key_rows: BlockKeys::OfBlocks,
        choice,
    };
    let each = choice.rating_words(past + tokens);
    let words = tokens * each;
    let ratings = Buffer::new_f32(device, words)?;
    let lists = Buffer::of_i32(device, &vec![-7; tokens * most])?;
    ops.choose_positions(&i, ratings.view(), lists.view())?;
    let (rated, got) = (ratings.view().to_f32()?, lists.view().to_i32()?);
    let mut outcome = Outcome::default();
    for t in 0..tokens {
        let (seen, list) = (past + t + 1, &got[t * most..][..most]);
        if seen <= most {
            outcome.compare_exact(list, &vec![-7; most]);
            continue;
        }
        let rated = &rated[t * each..][..seen];
        let expected = (0..seen).map(|position| {
            let key = widened(kv_type, &rows[text.at(position)], dim);
            let of_head = |h: usize| {
                let query = queries[(t * n_head + h) * dim..][..dim].iter();
                let dot: f64 = query.zip(&key).map(|(q, k)| f64::from(q * k)).sum();
                f64::from(weights[t * n_head + h]) * dot.max(0.0)
            };
            f64::from(scale) * (0..n_head).map(of_head).sum::<f64>()
        });
        let allowed = 1e-5 * (n_head * dim) as f64 / 16.0;
        outcome.compare(rated, expected.map(|value| Expected { value, allowed }));
        outcome.compare_exact(list, &best(rated, most));
    }
    // A few tokens at a time choose the same.
    let fewer = Buffer::new_f32(device, each)?;
    let again = Buffer::of_i32(device, &vec![-7; tokens * most])?;
    ops.choose_positions(&i, fewer.view(), again.view())?;
    outcome.compare_exact(&again.view().to_i32()?, &got);
    Ok(outcome)
}

/// Returns the positions of the `n` largest ratings, of equal ones the earlier, in ascending order.
pub(super) fn best(ratings: &[f32], n: usize) -> Vec<i32> {
    let mut order: Vec<usize> = (0..ratings.len()).collect();
    order.sort_by(|a, b| (ratings[*b] + 0.0).total_cmp(&(ratings[*a] + 0.0)));
    let mut best: Vec<i32> = order[..n].iter().map(|at| *at as i32).collect();
    best.sort_unstable();
    best
}

/// Compares attention to chosen positions with the formula. Tokens that see few attend to all.
fn attend(ops: &Ops, random: &mut Random, kv_type: KvType) -> Result<Outcome, CudaError> {
    let mut outcome = Outcome::default();
    let device = ops.device();
    // (heads, key, value, tokens, past, most, sinks)
    for (heads, key_width, value_width, tokens, past, most, sinks) in [
        (4, 64, 48, 3, 70, 10, false),
        (11, 96, 80, 2, 8, 9, true),
        (3, 40, 24, 1, 700, 600, true),
        (2, 36, 32, 18, 250, 258, false),
    ] {
        let text = Text::new(ops, past, tokens)?;
        let mut rows: Vec<Vec<u8>> =
            vec![vec![0xff; kv_type.row_bytes(key_width as u64) as usize]; text.capacity()];
        for position in 0..past + tokens {
            rows[text.at(position)] = stored(kv_type, &random.floats(key_width));
        }
        let (mut lists, mut expected_lists) = (Vec::new(), Vec::new());
        for t in 0..tokens {
            let seen = past + t + 1;
            if seen <= most {
                // What is not read may be anything.
                lists.extend(vec![i32::MIN; most]);
                expected_lists.push((0..seen).collect::<Vec<_>>());
                continue;
            }
            let list = best(&random.floats(seen), most);
            expected_lists.push(list.iter().map(|p| *p as usize).collect());
            lists.extend(list);
        }
        let queries: Vec<f32> = random.floats(tokens * heads * key_width);
        let sink_values = random.floats(heads);
        let cache = Buffer::of_bytes(device, &rows.concat())?;
        let [on_device, sink_buffer] = [&queries, &sink_values].map(|v| Buffer::of_f32(device, v));
        let (on_device, sink_buffer) = (on_device?, sink_buffer?);
        let lists = Buffer::of_i32(device, &lists)?;
        let out = Buffer::new_f32(device, tokens * heads * value_width)?;
        // For two tokens at once, so that more tokens take several launches.
        let values = AttentionBuffers::values(tokens.min(2), heads, past + tokens, value_width);
        let buffers = AttentionBuffers::new(device, values, value_width)?;
        let scale = 2.0 / (key_width as f32).sqrt();
        let attention = Attend {
            queries: on_device.view(),
            keys: cache.view(),
            values: cache.view(),
            kv_type,
            n_head_kv: 1,
            group: heads,
            key_width,
            value_row_width: key_width,
            value_width,
            scale,
            softcap: None,
            positions: text.positions(),
            window: None,
            window_kind: WindowKind::Sliding,
            sinks: sinks.then_some(sink_buffer.view()),
        };
        let chosen = ChosenBlocks {
            lists: lists.view(),
            per_token: 1,
            choice: Choice::from(Selection::of_positions(most)),
        };
        ops.attend_chosen(&attention, chosen, &buffers, out.view())?;
        for (at, got) in out.view().to_f32()?.chunks_exact(value_width).enumerate() {
            let (t, head) = (at / heads, at % heads);
            let row = |position: &usize| widened(kv_type, &rows[text.at(*position)], key_width);
            let attended: Vec<Vec<f32>> = expected_lists[t].iter().map(row).collect();
            let query = &queries[at * key_width..][..key_width];
            let scores = Scores {
                scale: f64::from(scale),
                cap: None,
                sink: sinks.then(|| f64::from(sink_values[head])),
            };
            let expected = plain_attention(&scores, query, &attended, &attended);
            let near = |value| Expected {
                value,
                allowed: 1e-5,
            };
            outcome.compare(got, expected.into_iter().take(value_width).map(near));
        }
    }
    Ok(outcome)
}
