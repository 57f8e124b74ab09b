//! Attention over the KV cache.

use super::Check;
use super::kv_rows::{stored, widened};
use super::small::same_quants;
use super::texts::{Text, parts_of_a_prompt, several_texts};
use crate::outcome::{Expected, Outcome};
use tier_plan_cuda::device::Buffer;
use tier_plan_cuda::ops::{Attend, AttentionBuffers, PROMPT_TOKENS, Quants};
use tier_plan_cuda::{CudaError, Ops};
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::spec::WindowKind;
use tier_plan_kernels::random::Random;

/// Tolerance of a result: values are at most 1.
const MIXED_TOLERANCE: f64 = 1e-5;

/// Relative rounding error of 16-bit floats.
const F16_EPSILON: f64 = 1.0 / 2048.0;

/// Largest allowed NMSE of a prompt's results. Rounding to 16-bit floats is off by 2e-4 of a value
/// on average, squared 4e-8. Scores here are 1.3 on average, so they are off by 7e-8, twice where
/// keys are rounded as well as queries, and the weights with them. Weights and values are rounded
/// by 4e-8 each.
///
/// That is 2.2e-7 on average over many values. Single queries and few positions deviate from the
/// average.
const PROMPT_NMSE: f64 = 1e-6;

pub(super) fn checks() -> Vec<Check> {
    let mut checks = Vec::new();
    for kv_type in KvType::ALL {
        checks.push(Check::new(
            format!("attend, {kv_type}"),
            move |ops, random| attend(ops, random, kv_type),
        ));
        checks.push(Check::new(
            format!("attend, a prompt, {kv_type}"),
            move |ops, random| prompt(ops, random, kv_type),
        ));
        checks.push(Check::new(
            format!("attend, several texts, {kv_type}"),
            move |ops, random| several_texts(ops, random, kv_type),
        ));
        let alone = move |ops: &Ops, random: &mut Random| parts_of_a_prompt(ops, random, kv_type);
        checks.push(Check::new(
            format!("attend, parts of a prompt, {kv_type}"),
            alone,
        ));
    }
    checks
}

/// Sizes of an attention.
#[derive(Clone, Copy)]
struct Case {
    n_head_kv: usize,
    group: usize,
    key_width: usize,
    /// Whether values are the beginning of the keys (latent attention).
    latent: bool,
    value_width: usize,
    tokens: usize,
    past: usize,
    window: Option<usize>,
    window_kind: WindowKind,
    softcap: Option<f32>,
    sinks: bool,
}

fn attend(ops: &Ops, random: &mut Random, kv_type: KvType) -> Result<Outcome, CudaError> {
    let gqa = Case {
        n_head_kv: 2,
        group: 4,
        key_width: 64,
        latent: false,
        value_width: 64,
        tokens: 1,
        past: 0,
        window: None,
        window_kind: WindowKind::Sliding,
        softcap: None,
        sinks: false,
    };
    let cases = [
        gqa,
        Case { past: 300, ..gqa },
        Case {
            tokens: 3,
            past: 255,
            group: 1,
            ..gqa
        },
        Case {
            tokens: 5,
            past: 60,
            window: Some(20),
            sinks: true,
            ..gqa
        },
        Case {
            tokens: 2,
            past: 600,
            window: Some(128),
            ..gqa
        },
        Case {
            tokens: 3,
            past: 510,
            window: Some(300),
            window_kind: WindowKind::Chunked,
            softcap: Some(0.7),
            ..gqa
        },
        Case {
            n_head_kv: 1,
            group: 11,
            key_width: 96,
            latent: true,
            value_width: 80,
            tokens: 2,
            past: 270,
            ..gqa
        },
        Case {
            key_width: 40,
            value_width: 24,
            group: 3,
            past: 33,
            sinks: true,
            ..gqa
        },
    ];
    let mut outcome = Outcome::default();
    for case in cases {
        outcome.merge(compare_case(ops, random, kv_type, case)?);
    }
    Ok(outcome)
}

/// Compares enough tokens for the kernels of prompts.
fn prompt(ops: &Ops, random: &mut Random, kv_type: KvType) -> Result<Outcome, CudaError> {
    let gqa = Case {
        n_head_kv: 2,
        group: 4,
        key_width: 64,
        latent: false,
        value_width: 64,
        tokens: 16,
        past: 0,
        window: None,
        window_kind: WindowKind::Sliding,
        softcap: None,
        sinks: false,
    };
    let cases = [
        gqa,
        Case {
            group: 1,
            tokens: 33,
            past: 31,
            ..gqa
        },
        Case {
            n_head_kv: 1,
            key_width: 128,
            value_width: 128,
            tokens: 37,
            past: 45,
            ..gqa
        },
        Case {
            group: 8,
            past: 70,
            window: Some(20),
            sinks: true,
            ..gqa
        },
        Case {
            group: 8,
            tokens: 50,
            window: Some(7),
            ..gqa
        },
        Case {
            tokens: 40,
            past: 20,
            window: Some(25),
            window_kind: WindowKind::Chunked,
            softcap: Some(1.5),
            ..gqa
        },
        Case {
            key_width: 40,
            value_width: 24,
            group: 3,
            tokens: 21,
            past: 33,
            sinks: true,
            ..gqa
        },
        Case {
            n_head_kv: 1,
            key_width: 192,
            value_width: 128,
            past: 50,
            ..gqa
        },
        Case {
            group: 2,
            key_width: 256,
            value_width: 256,
            tokens: 20,
            past: 20,
            sinks: true,
            ..gqa
        },
        Case {
            n_head_kv: 1,
            group: 3,
            key_width: 576,
            latent: true,
            value_width: 512,
            tokens: 18,
            past: 40,
            ..gqa
        },
        Case {
            n_head_kv: 1,
            group: 2,
            key_width: 332,
            latent: true,
            value_width: 300,
            window: Some(9),
            ..gqa
        },
        // Wider than these kernels support.
        Case {
            n_head_kv: 1,
            group: 1,
            key_width: 640,
            value_width: 4,
            past: 3,
            ..gqa
        },
        // A context of two splits, and one whose first split no token attends to.
        Case {
            n_head_kv: 1,
            group: 1,
            key_width: 32,
            value_width: 32,
            past: 2040,
            tokens: 17,
            ..gqa
        },
        Case {
            n_head_kv: 1,
            group: 2,
            key_width: 16,
            value_width: 20,
            past: 2070,
            window: Some(30),
            sinks: true,
            ..gqa
        },
    ];
    let mut outcome = Outcome::default();
    for case in cases {
        outcome.merge(compare_case(ops, random, kv_type, case)?);
    }
    Ok(outcome)
}

fn compare_case(
    ops: &Ops,
    random: &mut Random,
    kv_type: KvType,
    case: Case,
) -> Result<Outcome, CudaError> {
    let Case {
        n_head_kv,
        group,
        key_width,
        latent,
        value_width,
        tokens,
        past,
        window,
        window_kind,
        softcap,
        sinks,
    } = case;
    let heads = n_head_kv * group;
    // The tokens are the last of a batch.
    let before = past.min(2);
    let text = Text::new(ops, past - before, before + tokens)?;
    let mut rows_of = |width: usize| -> (Vec<u8>, Vec<Vec<f32>>) {
        let mut rows: Vec<Vec<u8>> = (0..text.capacity() * n_head_kv)
            .map(|_| stored(kv_type, &random.floats(width)))
            .collect();
        // Positions without a token may hold NaN.
        for position in past + tokens..text.capacity() {
            let of_heads = &mut rows[text.at(position) * n_head_kv..][..n_head_kv];
            of_heads.iter_mut().for_each(|row| row.fill(0xff));
        }
        (
            rows.concat(),
            rows.iter()
                .map(|row| widened(kv_type, row, width))
                .collect(),
        )
    };
    let (key_bytes, keys) = rows_of(key_width);
    let value_row_width = if latent { key_width } else { value_width };
    let (value_bytes, values) = if latent {
        (key_bytes.clone(), keys.clone())
    } else {
        rows_of(value_width)
    };
    let queries: Vec<f32> = random
        .floats(tokens * heads * key_width)
        .iter()
        .map(|v| 4.0 * v)
        .collect();
    let sink_values = random.floats(heads);
    let scale = 1.0 / (key_width as f32).sqrt();
    let key_buffer = Buffer::of_bytes(ops.device(), &key_bytes)?;
    let value_buffer = Buffer::of_bytes(ops.device(), &value_bytes)?;
    let query_buffer = Buffer::of_f32(ops.device(), &queries)?;
    let sink_buffer = Buffer::of_f32(ops.device(), &sink_values)?;
    let out = Buffer::new_f32(ops.device(), tokens * heads * value_width)?;
    // For two tokens at once, so that more tokens take several launches.
    let values_needed = AttentionBuffers::values(tokens.min(2), heads, past + tokens, value_width);
    let buffers = AttentionBuffers::new(ops.device(), values_needed, value_width)?;
    let attention = Attend {
        queries: query_buffer.view(),
        keys: key_buffer.view(),
        values: if latent {
            key_buffer.view()
        } else {
            value_buffer.view()
        },
        kv_type,
        n_head_kv,
        group,
        key_width,
        value_row_width,
        value_width,
        scale,
        softcap,
        positions: text.positions().part(before..before + tokens),
        window,
        window_kind,
        sinks: sinks.then_some(sink_buffer.view()),
    };
    let n = tokens * heads * value_width;
    let mut quants = Quants::new(ops.device(), n.next_multiple_of(32))?;
    let quantized = value_width.is_multiple_of(32);
    ops.attend(
        &attention,
        &buffers,
        out.view(),
        quantized.then_some(&mut quants),
    )?;
    let got = out.view().to_f32()?;
    // Only the kernels of prompts multiply 16-bit floats.
    let halves = tokens >= PROMPT_TOKENS && key_width <= 576;
    let (mut squared_error, mut squared_norm) = (0.0, 0.0);
    let mut outcome = Outcome::default();
    if quantized {
        let mut after = Quants::new(ops.device(), n)?;
        ops.quantize(out.view(), tokens, heads * value_width, &mut after)?;
        outcome.merge(same_quants(&quants, &after)?);
    }
    for (at, got) in got.chunks_exact(value_width).enumerate() {
        let (t, head) = (at / heads, at % heads);
        let query = &queries[at * key_width..][..key_width];
        let end = past + t + 1;
        let first = window.map_or(0, |w| match window_kind {
            WindowKind::Sliding => end.saturating_sub(w),
            WindowKind::Chunked => (end - 1) / w * w,
        });
        let seen = first..end;
        let rows = seen.map(|p| text.at(p) * n_head_kv + head / group);
        let of_text = |of: &[Vec<f32>]| rows.clone().map(|row| of[row].clone()).collect();
        let (seen_keys, seen_values): (Vec<Vec<f32>>, Vec<_>) = (of_text(&keys), of_text(&values));
        let scores = Scores {
            scale: f64::from(scale),
            cap: softcap.map(f64::from),
            sink: sinks.then(|| f64::from(sink_values[head])),
        };
        let mut expected = plain_attention(&scores, query, &seen_keys, &seen_values);
        expected.truncate(value_width);
        let allowed = if halves {
            F16_EPSILON * in_halves(kv_type, f64::from(scale), query, &seen_keys)
        } else {
            0.0
        };
        squared_error += got
            .iter()
            .zip(&expected)
            .map(|(got, e)| (f64::from(*got) - e).powi(2))
            .sum::<f64>();
        squared_norm += expected.iter().map(|e| e * e).sum::<f64>();
        outcome.compare(
            got,
            expected.into_iter().map(|value| Expected {
                value,
                allowed: MIXED_TOLERANCE + allowed,
            }),
        );
    }
    if halves {
        outcome.compare(
            &[(squared_error / squared_norm) as f32],
            [Expected {
                value: 0.0,
                allowed: PROMPT_NMSE,
            }],
        );
    }
    Ok(outcome)
}

/// How scores are made of products.
pub(super) struct Scores {
    pub(super) scale: f64,
    pub(super) cap: Option<f64>,
    pub(super) sink: Option<f64>,
}

/// Computes attention of one query in 64-bit floats.
pub(super) fn plain_attention(
    of: &Scores,
    query: &[f32],
    keys: &[Vec<f32>],
    values: &[Vec<f32>],
) -> Vec<f64> {
    let score = |key: &Vec<f32>| -> f64 {
        let products = query
            .iter()
            .zip(key)
            .map(|(q, k)| f64::from(*q) * f64::from(*k));
        let score = of.scale * products.sum::<f64>();
        of.cap.map_or(score, |cap| cap * (score / cap).tanh())
    };
    let scores: Vec<f64> = keys.iter().map(score).collect();
    let most = scores
        .iter()
        .copied()
        .chain(of.sink)
        .fold(f64::NEG_INFINITY, f64::max);
    let total: f64 = scores
        .iter()
        .copied()
        .chain(of.sink)
        .map(|s| (s - most).exp())
        .sum();
    let mut mixed = vec![0.0f64; values.first().map_or(0, Vec::len)];
    for (score, value) in scores.iter().zip(values) {
        let weight = (score - most).exp() / total;
        mixed
            .iter_mut()
            .zip(value)
            .for_each(|(sum, v)| *sum += weight * f64::from(*v));
    }
    mixed
}

/// Returns the largest error of 16-bit floats, in units of [`F16_EPSILON`] of the largest value.
///
/// Each score is off by a share of the magnitudes in it, which changes weights and their sum.
/// Weights, their sum, and values that are not stored as F16 are off by their own rounding.
fn in_halves(kv_type: KvType, scale: f64, query: &[f32], keys: &[Vec<f32>]) -> f64 {
    let magnitude = |key: &Vec<f32>| -> f64 {
        query
            .iter()
            .zip(key)
            .map(|(q, k)| f64::from((q * k).abs()))
            .sum()
    };
    let most = scale * keys.iter().map(magnitude).fold(0.0, f64::max);
    let rounded = if kv_type == KvType::F16 { 1.0 } else { 2.0 };
    (2.0 * rounded * most * F16_EPSILON).exp_m1() / F16_EPSILON + 1.0 + rounded
}
