//! Indexers that rate blocks by one key each: keys that are pooled, and ratings of blocks.

use super::Check;
use super::index::{best, normed};
use super::kv_rows::{stored, widened};
use super::texts::Text;
use crate::outcome::{Expected, Outcome};
use tier_plan_cuda::device::Buffer;
use tier_plan_cuda::ops::{BlockKeys, Choice, IndexQueries, OpenBlock, PooledRows, States};
use tier_plan_cuda::{CudaError, Ops};
use tier_plan_formats::model::kv::KvType;
use tier_plan_kernels::random::Random;

pub(super) fn checks() -> Vec<Check> {
    let mut checks = Vec::new();
    for kv_type in KvType::ALL {
        checks.push(Check::new(
            format!("pool_index, {kv_type}"),
            move |ops, random| pool(ops, random, kv_type),
        ));
        checks.push(Check::new(
            format!("rate, choose_blocks, blocks, {kv_type}"),
            move |ops, random| choose(ops, random, kv_type),
        ));
    }
    checks
}

/// Returns the row of a block in the cache of a text.
fn row_of(text: &Text, at: usize, block: usize) -> usize {
    let page = text.page();
    let (last, page_rows) = ((at + 1) * block - 1, page.div_ceil(block));
    text.at(last) / page * page_rows + at - last / page * page / block
}

/// Returns the rows of the cache of a text.
fn rows(text: &Text, block: usize) -> usize {
    text.capacity() / text.page() * text.page().div_ceil(block)
}

/// Makes keys of a text that comes in parts, and compares them with the formula.
fn pool(ops: &Ops, random: &mut Random, kv_type: KvType) -> Result<Outcome, CudaError> {
    let mut outcome = Outcome::default();
    let (device, eps) = (ops.device(), 1e-5);
    // Blocks within pages, across them, and larger than them; ends of the parts.
    for (dim, block, ends) in [
        (64, 4, &[1, 2, 6, 20, 21, 22, 23, 24][..]),
        (36, 3, &[7, 8, 31]),
        (132, 11, &[40, 41, 45]),
        (8, 1, &[1, 9]),
    ] {
        let n = ends[ends.len() - 1];
        let (keys, gates) = (random.floats(n * dim), random.floats(n * dim));
        let (norm, bias) = (random.floats(dim), random.floats(dim));
        let ape = random.floats(block * dim);
        let whole = Text::new(ops, 0, n)?;
        let row_bytes = kv_type.row_bytes(dim as u64) as usize;
        let before = vec![0x5a; rows(&whole, block) * row_bytes];
        let cache = Buffer::of_bytes(device, &before)?;
        // What is not kept is not read.
        let open = Buffer::of_f32(device, &vec![f32::NAN; 2 * block * dim])?;
        let [weights, biases, added] = [&norm, &bias, &ape].map(|v| Buffer::of_f32(device, v));
        let (weights, biases, added) = (weights?, biases?, added?);
        let mut first = 0;
        for &end in ends {
            let text = Text::within(ops, first, end - first, n)?;
            let values = first * dim..end * dim;
            let new_keys = Buffer::of_f32(device, &keys[values.clone()])?;
            let new_gates = Buffer::of_f32(device, &gates[values])?;
            let rows = PooledRows {
                new_keys: new_keys.view(),
                gates: new_gates.view(),
                key_dim: dim,
                norm: weights.view(),
                norm_bias: biases.view(),
                eps: eps as f32,
                ape: added.view(),
                block,
                positions: text.positions(),
                open: States {
                    all: open.view(),
                    each: 2 * block * dim,
                },
                kv_type,
                keys: cache.view(),
            };
            ops.pool_index(&rows, text.runs())?;
            first = end;
        }
        // Stored values are near the formula's, and nothing else is written.
        let allowed = match kv_type {
            KvType::F32 => 2e-5,
            KvType::F16 => 4e-3,
            KvType::Q8_0 => 5e-2,
        };
        let mut rest = cache.view().to_bytes()?;
        for b in 0..n / block {
            let normed: Vec<Vec<f64>> = (b * block..(b + 1) * block)
                .map(|at| normed(&keys[at * dim..][..dim], &norm, &bias, eps))
                .collect();
            let value = |i: usize| {
                let weight =
                    |p: usize| f64::from(gates[(b * block + p) * dim + i] + ape[p * dim + i]).exp();
                let sum: f64 = (0..block).map(weight).sum();
                let terms = normed.iter().enumerate();
                terms.map(|(p, key)| weight(p) / sum * key[i]).sum()
            };
            let at = row_of(&whole, b, block) * row_bytes;
            let got = widened(kv_type, &rest[at..at + row_bytes], dim);
            let near = |value| Expected { value, allowed };
            outcome.compare(&got, (0..dim).map(value).map(near));
            rest[at..at + row_bytes].fill(0x5a);
        }
        outcome.compare_exact(&rest, &before);
    }
    Ok(outcome)
}

/// Compares ratings of blocks with the formula, and choices with those by the ratings.
fn choose(ops: &Ops, random: &mut Random, kv_type: KvType) -> Result<Outcome, CudaError> {
    let mut outcome = Outcome::default();
    let (device, scale, n_head, dim, kept) = (ops.device(), 0.25, 5, 40, 4);
    for (block, past, tokens) in [(4, 70, 3), (3, 9, 7), (11, 400, 2)] {
        let text = Text::new(ops, past, tokens)?;
        let n_rows = rows(&text, block);
        let mut cached = vec![stored(kv_type, &vec![f32::NAN; dim]); n_rows];
        for b in 0..(past + tokens) / block {
            cached[row_of(&text, b, block)] = stored(kv_type, &random.floats(dim));
        }
        let queries = random.floats(tokens * n_head * dim);
        let weights = random.floats(tokens * n_head);
        let keys = Buffer::of_bytes(device, &cached.concat())?;
        let [on_device, head_weights] = [&queries, &weights].map(|v| Buffer::of_f32(device, v));
        let (on_device, head_weights) = (on_device?, head_weights?);
        let choice = Choice {
            kept,
            block,
            open: OpenBlock::Added,
        };
        let width = choice.rating_words(past + tokens);
        let ratings = Buffer::new_f32(device, tokens * width)?;
        let lists = Buffer::of_i32(device, &vec![-7; tokens * kept])?;
        let of_tokens = IndexQueries {
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
        ops.choose_positions(&of_tokens, ratings.view(), lists.view())?;
        let (rated, got) = (ratings.view().to_f32()?, lists.view().to_i32()?);
        for (t, list) in got.chunks_exact(kept).enumerate() {
            let visible = (past + t + 1) / block;
            if visible <= kept {
                outcome.compare_exact(list, &[-7; 4]);
                continue;
            }
            let rated = &rated[t * width..][..visible];
            let rating = |b: usize| {
                let key = widened(kv_type, &cached[row_of(&text, b, block)], dim);
                let of_head = |h: usize| {
                    let query = queries[(t * n_head + h) * dim..][..dim].iter();
                    let dot: f64 = query.zip(&key).map(|(q, k)| f64::from(q * k)).sum();
                    f64::from(weights[t * n_head + h]) * dot.max(0.0)
                };
                f64::from(scale) * (0..n_head).map(of_head).sum::<f64>()
            };
            let near = |value| Expected {
                value,
                allowed: 1e-4,
            };
            outcome.compare(rated, (0..visible).map(rating).map(near));
            outcome.compare_exact(list, &best(rated, kept));
        }
    }
    Ok(outcome)
}
