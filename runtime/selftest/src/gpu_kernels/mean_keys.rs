//! Indexes of block-sparse attention that rate blocks by one key each, which is in the row of the block's last
//! position.

use super::Check;
use super::compressed::{EPS, doubles, normed, within};
use super::index::{best, rotated};
use super::kv_rows::{stored, widened};
use super::texts::Text;
use crate::outcome::{Expected, Outcome};
use tier_plan_cuda::device::Buffer;
use tier_plan_cuda::ops::{
    BlockKeys, CacheRows, Choice, Frequencies, IndexQueries, MeanKeys, OpenBlock,
};
use tier_plan_cuda::{CudaError, Ops};
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::spec::RopeKind;
use tier_plan_kernels::random::Random;

pub(super) fn checks() -> Vec<Check> {
    let mut checks = Vec::new();
    for kv_type in KvType::ALL {
        checks.push(Check::new(
            format!("mean_keys, {kv_type}"),
            move |ops, random| pool(ops, random, kv_type),
        ));
        checks.push(Check::new(
            format!("rate, choose_blocks, keys in last rows, {kv_type}"),
            move |ops, random| choose(ops, random, kv_type),
        ));
    }
    checks
}

/// Sizes of an index, and the ends of the parts that a text comes in.
#[derive(Clone, Copy)]
struct Case {
    dim: usize,
    block: usize,
    /// Pairs that rotate, if any do.
    turns: Option<(usize, RopeKind)>,
    ends: &'static [usize],
}

/// Makes keys of a text that comes in parts, and compares them with the formula.
fn pool(ops: &Ops, random: &mut Random, kv_type: KvType) -> Result<Outcome, CudaError> {
    let mut outcome = Outcome::default();
    // Blocks within pages, across them, and larger than them.
    let cases = [
        Case {
            dim: 64,
            block: 4,
            turns: Some((8, RopeKind::Halves)),
            ends: &[1, 2, 6, 20, 21, 22, 23, 24],
        },
        Case {
            dim: 36,
            block: 3,
            turns: Some((18, RopeKind::Adjacent)),
            ends: &[7, 8, 31],
        },
        Case {
            dim: 132,
            block: 11,
            turns: None,
            ends: &[40, 41, 45],
        },
        Case {
            dim: 8,
            block: 1,
            turns: None,
            ends: &[1, 9],
        },
    ];
    for case in cases {
        outcome.merge(pool_case(ops, random, kv_type, case)?);
    }
    Ok(outcome)
}

fn pool_case(
    ops: &Ops,
    random: &mut Random,
    kv_type: KvType,
    case: Case,
) -> Result<Outcome, CudaError> {
    let Case {
        dim,
        block,
        turns,
        ends,
    } = case;
    let (device, n, magnitude) = (ops.device(), ends[ends.len() - 1], 1.5);
    let (keys, norm) = (random.floats(n * dim), random.floats(dim));
    let half = turns.map_or(0, |(half, _)| half);
    let frequencies: Vec<f32> = (0..half).map(|i| 0.5f32.powi(i as i32)).collect();
    let whole = Text::new(ops, 0, n)?;
    let row_bytes = kv_type.row_bytes(dim as u64) as usize;
    let before = vec![0x5a; whole.capacity() * row_bytes];
    let cache = Buffer::of_bytes(device, &before)?;
    let weights = Buffer::of_f32(device, &norm)?;
    let on_device = Buffer::of_f32(device, if half > 0 { &frequencies } else { &[0.0] })?;
    let mut first = 0;
    for &end in ends {
        let text = Text::within(ops, first, end - first, n)?;
        let rows = Buffer::of_f32(device, &keys[first * dim..end * dim])?;
        let to = CacheRows {
            kv_type,
            at: cache.view(),
            heads: 1,
            width: dim,
        };
        ops.store(rows.view(), text.positions(), &to)?;
        ops.mean_keys(&MeanKeys {
            keys: cache.view(),
            key_dim: dim,
            block,
            norm: weights.view(),
            eps: EPS,
            frequencies: turns.map(|(half, kind)| Frequencies {
                values: on_device.view(),
                magnitude,
                kind,
                first: 0,
                half,
            }),
            positions: text.positions(),
            kv_type,
        })?;
        first = end;
    }
    let allowed = match kv_type {
        KvType::F32 => 2e-5,
        KvType::F16 => 1e-2,
        KvType::Q8_0 => 1e-1,
    };
    let (mut outcome, mut rest) = (Outcome::default(), cache.view().to_bytes()?);
    let of_position = |position: usize| stored(kv_type, &keys[position * dim..][..dim]);
    for position in 0..n {
        let row = whole.at(position) * row_bytes..(whole.at(position) + 1) * row_bytes;
        let got = &rest[row.clone()];
        if (position + 1).is_multiple_of(block) {
            // The mean of the rows as they are stored.
            let first = position + 1 - block;
            let rows = first..=position;
            let rows: Vec<Vec<f32>> = rows
                .map(|position| widened(kv_type, &of_position(position), dim))
                .collect();
            let mean = |i: usize| rows.iter().map(|row| f64::from(row[i])).sum::<f64>();
            let mean: Vec<f64> = (0..dim).map(|i| mean(i) / block as f64).collect();
            let mut key = normed(&mean, |i| f64::from(norm[i]));
            let turns_at = frequencies.iter().flat_map(|f| {
                let angle = first as f32 * f;
                [magnitude * angle.cos(), magnitude * angle.sin()]
            });
            let turns_at: Vec<f32> = turns_at.collect();
            if let Some((_, kind)) = turns {
                rotated(&mut key, 0, &turns_at, kind);
            }
            outcome.compare(
                &widened(kv_type, got, dim),
                key.into_iter().map(within(allowed)),
            );
        } else {
            outcome.compare_exact(got, &of_position(position));
        }
        rest[row].fill(0x5a);
    }
    outcome.compare_exact(&rest, &before);
    Ok(outcome)
}

/// Compares ratings of blocks with the formula, and choices with those by the ratings.
fn choose(ops: &Ops, random: &mut Random, kv_type: KvType) -> Result<Outcome, CudaError> {
    let mut outcome = Outcome::default();
    let (device, scale, n_head, dim, kept) = (ops.device(), 0.25, 6, 24, 4);
    for (block, past, tokens) in [(4, 70, 3), (3, 9, 7), (11, 400, 2)] {
        let text = Text::new(ops, past, tokens)?;
        // Rows of other positions are not numbers.
        let mut cached = vec![stored(kv_type, &vec![f32::NAN; dim]); text.capacity()];
        for b in 0..(past + tokens) / block {
            cached[text.at((b + 1) * block - 1)] = stored(kv_type, &random.floats(dim));
        }
        let queries = random.floats(tokens * n_head * dim);
        let keys = Buffer::of_bytes(device, &cached.concat())?;
        let on_device = Buffer::of_f32(device, &queries)?;
        let choice = Choice {
            kept,
            block,
            open: OpenBlock::Added,
        };
        let width = choice.rating_words(past + tokens);
        let ratings = Buffer::new_f32(device, tokens * width)?;
        let untouched = vec![-7; tokens * kept];
        let lists = Buffer::of_i32(device, &untouched)?;
        let by = IndexQueries {
            queries: on_device.view(),
            n_head,
            key_dim: dim,
            head_weights: None,
            scale,
            positions: text.positions(),
            kv_type,
            keys: keys.view(),
            key_rows: BlockKeys::InLast,
            choice,
        };
        ops.choose_positions(&by, ratings.view(), lists.view())?;
        let (rated, got) = (ratings.view().to_f32()?, lists.view().to_i32()?);
        for (token, list) in got.chunks_exact(kept).enumerate() {
            let visible = (past + token + 1) / block;
            if visible <= kept {
                outcome.compare_exact(list, &untouched[..kept]);
                continue;
            }
            let of_block = |b: usize| {
                let key = widened(kv_type, &cached[text.at((b + 1) * block - 1)], dim);
                let key = doubles(&key);
                let heads = queries[token * n_head * dim..][..n_head * dim].chunks_exact(dim);
                let dots = heads.map(|q| {
                    let products = q.iter().zip(&key).map(|(q, k)| f64::from(*q) * k);
                    products.sum::<f64>().max(0.0)
                });
                Expected {
                    value: f64::from(scale) * dots.sum::<f64>(),
                    allowed: 1e-4,
                }
            };
            let rated = &rated[token * width..][..visible];
            outcome.compare(rated, (0..visible).map(of_block));
            outcome.compare_exact(list, &best(rated, kept));
        }
    }
    Ok(outcome)
}
