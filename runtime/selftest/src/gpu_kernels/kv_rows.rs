//! Rows of the KV cache: storing them, alone and with what comes before.

use super::Check;
use super::texts::Text;
use crate::outcome::{Expected, Outcome};
use half::f16;
use tier_plan_cuda::device::Buffer;
use tier_plan_cuda::ops::{CacheRows, HeadNorms, Heads, RopeTurns};
use tier_plan_cuda::{CudaError, Ops, View};
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::spec::RopeKind;
use tier_plan_kernels::random::Random;
use tier_plan_kernels::{Kernels, StoredRows, q8_row_bytes};

pub(super) fn checks() -> Vec<Check> {
    let of_type = |kv_type: KvType| {
        [
            Check::new(format!("store, {kv_type}"), move |ops, random| {
                store(ops, random, kv_type)
            }),
            Check::new(format!("place_heads, {kv_type}"), move |ops, random| {
                place(ops, random, kv_type)
            }),
        ]
    };
    KvType::ALL.into_iter().flat_map(of_type).collect()
}

/// Stores a row as the CPU does.
pub(super) fn stored(kv_type: KvType, row: &[f32]) -> Vec<u8> {
    match kv_type {
        KvType::F32 => row.iter().flat_map(|v| v.to_le_bytes()).collect(),
        KvType::F16 => {
            let mut halves = vec![f16::ZERO; row.len()];
            Kernels::SCALAR.to_f16(row, &mut halves);
            halves.iter().flat_map(|v| v.to_le_bytes()).collect()
        }
        KvType::Q8_0 => {
            let mut bytes = vec![0; q8_row_bytes(row.len())];
            Kernels::SCALAR.to_q8(row, &mut bytes);
            bytes
        }
    }
}

/// Returns the values of a stored row.
pub(super) fn widened(kv_type: KvType, bytes: &[u8], width: usize) -> Vec<f32> {
    let mut out = vec![0.0; width];
    match kv_type {
        KvType::F32 => {
            let values = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b));
            out.iter_mut().zip(values).for_each(|(to, v)| *to = v);
        }
        KvType::F16 => {
            let halves: Vec<f16> = bytes
                .as_chunks()
                .0
                .iter()
                .map(|b| f16::from_le_bytes(*b))
                .collect();
            Kernels::SCALAR.from_f16(&halves, &mut out);
        }
        KvType::Q8_0 => Kernels::SCALAR.widen_rows(StoredRows::Q8(bytes), width, &mut out),
    }
    out
}

fn store(ops: &Ops, random: &mut Random, kv_type: KvType) -> Result<Outcome, CudaError> {
    let mut outcome = Outcome::default();
    for width in [4, 32, 40, 128, 576] {
        let (tokens, heads, past) = (2, 3, 7);
        let text = Text::new(ops, past, tokens)?;
        let mut x: Vec<f32> = random.activations(tokens * heads * width);
        // A tie between two 16-bit floats, one below the smallest, zeros, and one too large for 16
        // bits.
        (x[0], x[1], x[2], x[3]) = (1.0 + 1.0 / 2048.0, 3e-8, 1e-6, -1e-5);
        x[width..width + 4].fill(0.0);
        x[2 * width] = 70_000.0;
        let row_bytes = kv_type.row_bytes(width as u64) as usize;
        let before = vec![0x5a; heads * text.capacity() * row_bytes];
        let cache = Buffer::of_bytes(ops.device(), &before)?;
        let rows = Buffer::of_f32(ops.device(), &x)?;
        ops.store(
            rows.view(),
            text.positions(),
            &CacheRows {
                kv_type,
                at: cache.view(),
                heads,
                width,
            },
        )?;
        let mut expected = before;
        for (at, row) in x.chunks_exact(width).enumerate() {
            let (t, head) = (at / heads, at % heads);
            expected[(text.at(past + t) * heads + head) * row_bytes..][..row_bytes]
                .copy_from_slice(&stored(kv_type, row));
        }
        outcome.compare_exact(&cache.view().to_bytes()?, &expected);
    }
    Ok(outcome)
}

/// Compares the fused kernel with single kernels, which have checks of their own.
fn place(ops: &Ops, random: &mut Random, kv_type: KvType) -> Result<Outcome, CudaError> {
    let mut outcome = Outcome::default();
    let (tokens, n_head, n_head_kv, past, half) = (3, 4, 2, 6, 12);
    let text = Text::new(ops, past, tokens)?;
    for (key_width, value_width, kind) in [(64, 64, RopeKind::Halves), (40, 24, RopeKind::Adjacent)]
    {
        // Whether heads are normalized, and after the rotation.
        for (normed, after_rope, turned) in [
            (true, false, true),
            (true, true, true),
            (false, false, true),
            (false, false, false),
        ] {
            let device = ops.device();
            let (q, k) = (
                random.floats(tokens * n_head * key_width),
                random.floats(tokens * n_head_kv * key_width),
            );
            let v = random.floats(tokens * n_head_kv * value_width);
            let norms = [
                Buffer::of_f32(device, &random.floats(key_width))?,
                Buffer::of_f32(device, &random.floats(key_width))?,
                Buffer::of_f32(device, &random.floats(value_width))?,
            ];
            let turns = Buffer::of_f32(device, &random.floats(2 * tokens * half))?;
            let rows = |width: usize| {
                let row_bytes = kv_type.row_bytes(width as u64) as usize;
                vec![0x5a; text.capacity() * n_head_kv * row_bytes]
            };
            let mut results = Vec::new();
            for fused in [true, false] {
                let (q, k, v) = (
                    Buffer::of_f32(device, &q)?,
                    Buffer::of_f32(device, &k)?,
                    Buffer::of_f32(device, &v)?,
                );
                let keys = Buffer::of_bytes(device, &rows(key_width))?;
                let values = Buffer::of_bytes(device, &rows(value_width))?;
                let heads = Heads {
                    queries: q.view(),
                    new_keys: k.view(),
                    new_values: v.view(),
                    norms: HeadNorms {
                        queries: normed.then_some(norms[0].view()),
                        keys: normed.then_some(norms[1].view()),
                        values: normed.then_some(norms[2].view()),
                        after_rope,
                        eps: 1e-6,
                    },
                    turns: turned.then_some(RopeTurns {
                        values: turns.view(),
                        kind,
                        half,
                    }),
                    n_head,
                    n_head_kv,
                    key_width,
                    value_width,
                    kv_type,
                    positions: text.positions(),
                    keys: keys.view(),
                    values: values.view(),
                };
                if fused {
                    ops.place_heads(&heads)?
                } else {
                    place_by_single_kernels(ops, &heads)?
                }
                results.push([
                    q.view().to_bytes()?,
                    keys.view().to_bytes()?,
                    values.view().to_bytes()?,
                ]);
            }
            let floats = |bytes: &[u8]| widened(KvType::F32, bytes, bytes.len() / 4);
            let (got, expected) = (floats(&results[0][0]), floats(&results[1][0]));
            outcome.compare(&got, expected.iter().map(|v| Expected::within(*v, 1e-5)));
            // The last bit may decide how a value is rounded where it is stored.
            let allowed = match kv_type {
                KvType::F32 => 1e-5,
                KvType::F16 => 4e-3,
                KvType::Q8_0 => 4e-2,
            };
            for (at, width) in [(1, key_width), (2, value_width)] {
                let bytes = kv_type.row_bytes(width as u64) as usize;
                let rows = results[0][at]
                    .chunks_exact(bytes)
                    .zip(results[1][at].chunks_exact(bytes));
                let written: Vec<usize> = (past..past + tokens).map(|p| text.at(p)).collect();
                for (row, (got, expected)) in rows.enumerate() {
                    if written.contains(&(row / n_head_kv)) {
                        let expected = widened(kv_type, expected, width);
                        outcome.compare(
                            &widened(kv_type, got, width),
                            expected.iter().map(|v| Expected::within(*v, allowed)),
                        );
                    } else {
                        outcome.compare_exact(got, expected);
                    }
                }
            }
        }
    }
    Ok(outcome)
}

/// Normalizes, rotates and stores heads with one kernel per step.
fn place_by_single_kernels(ops: &Ops, h: &Heads<'_>) -> Result<(), CudaError> {
    let tokens = h.positions.tokens();
    let HeadNorms {
        queries,
        keys,
        values,
        after_rope,
        eps,
    } = h.norms;
    // Rows are so narrow that the order of sums is that of the fused kernel.
    let normalize = |x: View<'_>, norm: Option<View<'_>>, heads: usize, width: usize| match norm {
        Some(norm) => ops.rms_norm(x, Some(norm), tokens * heads, width, eps, x),
        None => Ok(()),
    };
    for (x, norm, heads) in [
        (h.queries, queries, h.n_head),
        (h.new_keys, keys, h.n_head_kv),
    ] {
        normalize(x, norm.filter(|_| !after_rope), heads, h.key_width)?;
        if let Some(turns) = &h.turns {
            ops.rope(x, turns, tokens, heads, h.key_width)?;
        }
        normalize(x, norm.filter(|_| after_rope), heads, h.key_width)?;
    }
    normalize(h.new_values, values, h.n_head_kv, h.value_width)?;
    let (kv_type, heads) = (h.kv_type, h.n_head_kv);
    for (x, at, width) in [
        (h.new_keys, h.keys, h.key_width),
        (h.new_values, h.values, h.value_width),
    ] {
        ops.store(
            x,
            h.positions,
            &CacheRows {
                kv_type,
                at,
                heads,
                width,
            },
        )?;
    }
    Ok(())
}
