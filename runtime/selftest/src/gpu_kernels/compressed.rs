//! Attention to a window and to vectors of blocks: rows of tokens, choices, and attention.

use super::Check;
use super::index::rotated;
use super::kv_rows::{stored, widened};
use crate::outcome::{Expected, Outcome};
use tier_plan_cuda::device::Buffer;
use tier_plan_cuda::ops::{
    AttendCompressed, AttentionBuffers, BatchPositions, BlockKeys, CacheSize, Choice,
    CompressedRows, FarRows, IndexHeads, IndexQueries, OpenBlock, RopeTurns, TextTokens, TurnBack,
    compressed_chunks,
};
use tier_plan_cuda::{CudaError, Ops};
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::spec::RopeKind;
use tier_plan_kernels::random::Random;

/// Positions per page: few, so that blocks end in other pages than they begin in.
const PAGE: usize = 8;

/// Epsilon of norms.
pub(super) const EPS: f32 = 1e-5;

pub(super) fn checks() -> Vec<Check> {
    let mut checks = vec![
        Check::new("place_compressed", place),
        Check::new("turn_back, ungroup", turn_back),
    ];
    for kv_type in KvType::ALL {
        checks.push(Check::new(
            format!("rate, choose_blocks among complete ones, {kv_type}"),
            move |ops, random| choose(ops, random, kv_type),
        ));
        checks.push(Check::new(
            format!("attend_compressed, {kv_type}"),
            move |ops, random| attend(ops, random, kv_type),
        ));
    }
    checks
}

/// A text whose pages are in descending order, and come one after the other.
pub(super) struct Pages {
    pub(super) batch: BatchPositions,
    pages: Vec<u32>,
}

impl Pages {
    pub(super) fn new(ops: &Ops, positions: usize) -> Result<Self, CudaError> {
        let n = positions.div_ceil(PAGE);
        let size = CacheSize {
            positions: n * PAGE,
            page: PAGE,
        };
        let words = BatchPositions::words(positions, 1, n * PAGE, PAGE);
        Ok(Self {
            batch: BatchPositions::new(ops.device(), words, size)?,
            pages: (0..n as u32).rev().collect(),
        })
    }

    pub(super) fn set(&mut self, past: usize, tokens: usize) -> Result<(), CudaError> {
        let text = TextTokens {
            state: 0,
            checkpoints: &[],
            past,
            tokens,
            pages: &self.pages,
        };
        self.batch.set(std::iter::once(text)).map(drop)
    }

    /// Returns the rows of blocks in the cache.
    pub(super) fn rows(&self, ratio: usize) -> usize {
        self.pages.len() * PAGE.div_ceil(ratio)
    }

    /// Returns where the row of a block is: in the page where it ends.
    pub(super) fn at(&self, block: usize, ratio: usize) -> usize {
        let page = ((block + 1) * ratio - 1) / PAGE;
        self.pages[page] as usize * PAGE.div_ceil(ratio) + block - page * PAGE / ratio
    }
}

/// Divides a row by the root of its mean square, and multiplies it by weights.
pub(super) fn normed(row: &[f64], weight: impl Fn(usize) -> f64) -> Vec<f64> {
    let squares: f64 = row.iter().map(|v| v * v).sum();
    let factor = 1.0 / (squares / row.len() as f64 + f64::from(EPS)).sqrt();
    let weighted = row.iter().enumerate().map(|(i, v)| v * factor * weight(i));
    weighted.collect()
}

pub(super) fn doubles(row: &[f32]) -> Vec<f64> {
    row.iter().map(|v| f64::from(*v)).collect()
}

pub(super) fn within(allowed: f64) -> impl Fn(f64) -> Expected {
    move |value| Expected { value, allowed }
}

fn place(ops: &Ops, random: &mut Random) -> Result<Outcome, CudaError> {
    let (mut outcome, device) = (Outcome::default(), ops.device());
    let (tokens, n_head, n_index) = (3, 5, 2);
    for (dim, index_dim, half, kind) in [
        (512, 128, 32, RopeKind::Adjacent),
        (36, 20, 8, RopeKind::Halves),
        (16, 0, 4, RopeKind::Adjacent),
    ] {
        let (q, kv) = (
            random.floats(tokens * n_head * dim),
            random.floats(tokens * dim),
        );
        let (index, norm) = (
            random.floats(tokens * n_index * index_dim),
            random.floats(dim),
        );
        let turns = random.floats(2 * tokens * half);
        let [queries, vectors, weights, on_device] =
            [&q, &kv, &norm, &turns].map(|v| Buffer::of_f32(device, v));
        let (queries, vectors, weights) = (queries?, vectors?, weights?);
        let (on_device, index_queries) = (on_device?, Buffer::of_f32(device, &index)?);
        ops.place_compressed(&CompressedRows {
            queries: queries.view(),
            n_head,
            key_dim: dim,
            vectors: vectors.view(),
            norm: weights.view(),
            eps: EPS,
            index: (index_dim > 0).then_some(IndexHeads {
                queries: index_queries.view(),
                n_head: n_index,
                key_dim: index_dim,
            }),
            turns: RopeTurns {
                values: on_device.view(),
                kind,
                half,
            },
            tokens,
        })?;
        let turns_of = |token: usize| &turns[2 * token * half..2 * (token + 1) * half];
        let turned = |mut row: Vec<f64>, token: usize| {
            let first = row.len() - 2 * half;
            rotated(&mut row, first, turns_of(token), kind);
            row
        };
        let got = queries.view().to_f32()?;
        for (at, (got, row)) in got.chunks(dim).zip(q.chunks(dim)).enumerate() {
            let expected = turned(normed(&doubles(row), |_| 1.0), at / n_head);
            outcome.compare(got, expected.into_iter().map(within(1e-5)));
        }
        let got = vectors.view().to_f32()?;
        for (at, (got, row)) in got.chunks(dim).zip(kv.chunks(dim)).enumerate() {
            let expected = turned(normed(&doubles(row), |i| f64::from(norm[i])), at);
            outcome.compare(got, expected.into_iter().map(within(1e-5)));
        }
        let got = index_queries.view().to_f32()?;
        let rows = got
            .chunks(index_dim.max(1))
            .zip(index.chunks(index_dim.max(1)));
        for (at, (got, row)) in rows.enumerate() {
            let expected = turned(doubles(row), at / n_index);
            outcome.compare(got, expected.into_iter().map(within(1e-5)));
        }
    }
    Ok(outcome)
}

fn turn_back(ops: &Ops, random: &mut Random) -> Result<Outcome, CudaError> {
    let (mut outcome, device) = (Outcome::default(), ops.device());
    let (tokens, heads) = (3, 6);
    for (dim, half, kind, group) in [
        (64, 8, RopeKind::Adjacent, None),
        (65, 8, RopeKind::Adjacent, Some(2)),
        (20, 10, RopeKind::Halves, Some(3)),
    ] {
        let (x, turns) = (
            random.floats(tokens * heads * dim),
            random.floats(2 * tokens * half),
        );
        let (on_device, turns_there) =
            (Buffer::of_f32(device, &x)?, Buffer::of_f32(device, &turns)?);
        let out = Buffer::new_f32(device, x.len())?;
        let turned = TurnBack {
            x: on_device.view(),
            heads,
            dim,
            turns: RopeTurns {
                values: turns_there.view(),
                kind,
                half,
            },
            tokens,
            group,
        };
        ops.turn_back(&turned, out.view())?;
        let back = Buffer::new_f32(device, x.len())?;
        let each = group.unwrap_or(heads);
        match group {
            Some(_) => ops.ungroup(out.view(), heads / each, tokens, each * dim, back.view())?,
            None => back.view().copy_from(out.view())?,
        }
        let got = back.view().to_f32()?;
        for (at, (got, row)) in got.chunks(dim).zip(x.chunks(dim)).enumerate() {
            let token = at / heads;
            let turns = &turns[2 * token * half..2 * (token + 1) * half];
            let signed = turns.chunks(2).flat_map(|turn| [turn[0], -turn[1]]);
            let mut expected = doubles(row);
            let signed: Vec<f32> = signed.collect();
            rotated(&mut expected, dim - 2 * half, &signed, kind);
            outcome.compare(got, expected.into_iter().map(within(1e-6)));
        }
        // Groups are the outermost dimension before.
        let first = (0..each * dim).map(|i| got[i]);
        let first: Vec<f32> = first.collect();
        outcome.compare_exact(&out.view().to_f32()?[..each * dim], &first);
    }
    Ok(outcome)
}

/// Stores random rows for the complete blocks of a text. Returns the cache, and what it holds.
fn blocks(
    ops: &Ops,
    random: &mut Random,
    (text, ratio, n): (&Pages, usize, usize),
    kv_type: KvType,
    dim: usize,
) -> Result<(Buffer, Vec<Vec<f32>>), CudaError> {
    let mut rows = vec![stored(kv_type, &vec![f32::NAN; dim]); text.rows(ratio)];
    let mut held = Vec::new();
    for block in 0..n {
        let bytes = stored(kv_type, &random.floats(dim));
        held.push(widened(kv_type, &bytes, dim));
        rows[text.at(block, ratio)] = bytes;
    }
    Ok((Buffer::of_bytes(ops.device(), &rows.concat())?, held))
}

/// A choice among complete blocks.
fn skipping(kept: usize, block: usize) -> Choice {
    Choice {
        kept,
        block,
        open: OpenBlock::Skipped,
    }
}

fn choose(ops: &Ops, random: &mut Random, kv_type: KvType) -> Result<Outcome, CudaError> {
    let (mut outcome, device) = (Outcome::default(), ops.device());
    for (ratio, past, tokens, most, n_head, dim) in [
        (4, 70, 7, 10, 3, 64),
        (4, 30, 12, 9, 8, 36),
        (3, 300, 1, 50, 2, 16),
        (20, 200, 30, 4, 1, 8),
    ] {
        let mut text = Pages::new(ops, past + tokens)?;
        text.set(past, tokens)?;
        let n = (past + tokens) / ratio;
        let (cache, keys) = blocks(ops, random, (&text, ratio, n), kv_type, dim)?;
        let (q, weights) = (
            random.floats(tokens * n_head * dim),
            random.floats(tokens * n_head),
        );
        let (queries, head_weights) = (
            Buffer::of_f32(device, &q)?,
            Buffer::of_f32(device, &weights)?,
        );
        let choice = skipping(most, ratio);
        let words = tokens * choice.rating_words(past + tokens);
        let ratings = Buffer::new_f32(device, words)?;
        let lists = Buffer::of_i32(device, &vec![-7; tokens * most])?;
        let of_tokens = IndexQueries {
            queries: queries.view(),
            n_head,
            key_dim: dim,
            head_weights: Some(head_weights.view()),
            scale: 0.5,
            positions: text.batch.all(),
            kv_type,
            keys: cache.view(),
            key_rows: BlockKeys::OfBlocks,
            choice,
        };
        ops.choose_positions(&of_tokens, ratings.view(), lists.view())?;
        let got = lists.view().to_i32()?;
        for t in 0..tokens {
            let seen = (past + t + 1) / ratio;
            let list = &got[t * most..][..most];
            if seen <= most {
                outcome.compare_exact(list, &vec![-7; most]);
                continue;
            }
            let rating = |block: usize| -> f64 {
                let heads = (0..n_head).map(|h| {
                    let query = &q[(t * n_head + h) * dim..][..dim];
                    let products = query.iter().zip(&keys[block]);
                    let dot: f64 = products.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    f64::from(weights[t * n_head + h]) * dot.max(0.0)
                });
                heads.sum()
            };
            let mut order: Vec<usize> = (0..seen).collect();
            order.sort_by(|a, b| rating(*b).total_cmp(&rating(*a)));
            let mut best: Vec<i32> = order[..most].iter().map(|b| *b as i32).collect();
            best.sort_unstable();
            outcome.compare_exact(list, &best);
        }
    }
    Ok(outcome)
}

/// Sizes of an attention.
#[derive(Clone, Copy)]
struct Case {
    n_head: usize,
    dim: usize,
    window: usize,
    ratio: Option<usize>,
    most: Option<usize>,
    past: usize,
    tokens: usize,
}

fn attend(ops: &Ops, random: &mut Random, kv_type: KvType) -> Result<Outcome, CudaError> {
    let plain = Case {
        n_head: 10,
        dim: 64,
        window: 6,
        ratio: Some(4),
        most: Some(5),
        past: 37,
        tokens: 9,
    };
    let cases = [
        plain,
        Case { tokens: 1, ..plain },
        // From the beginning, where blocks and lists are missing at first.
        Case {
            past: 0,
            tokens: 31,
            ..plain
        },
        // All blocks, in several chunks, with a window of several chunks.
        Case {
            most: None,
            ratio: Some(2),
            window: 300,
            past: 700,
            tokens: 3,
            ..plain
        },
        // A list of several chunks.
        Case {
            most: Some(300),
            ratio: Some(2),
            past: 700,
            tokens: 2,
            ..plain
        },
        Case {
            most: None,
            ratio: Some(20),
            past: 18,
            tokens: 24,
            ..plain
        },
        // The window alone, in one chunk and in several.
        Case {
            ratio: None,
            most: None,
            dim: 512,
            ..plain
        },
        Case {
            ratio: None,
            most: None,
            window: 280,
            past: 290,
            ..plain
        },
    ];
    let mut outcome = Outcome::default();
    for case in cases {
        outcome.merge(attend_case(ops, random, kv_type, case)?);
    }
    Ok(outcome)
}

fn attend_case(
    ops: &Ops,
    random: &mut Random,
    kv_type: KvType,
    case: Case,
) -> Result<Outcome, CudaError> {
    let Case {
        n_head,
        dim,
        window,
        ratio,
        most,
        past,
        tokens,
    } = case;
    let (device, scale, mut outcome) = (ops.device(), 0.5, Outcome::default());
    let mut text = Pages::new(ops, past + tokens)?;
    text.set(past, tokens)?;
    let q = random.floats(tokens * n_head * dim);
    let (vectors, sinks) = (random.floats((past + tokens) * dim), random.floats(n_head));
    let mut ring = vec![f32::NAN; window * dim];
    for p in past.saturating_sub(window)..past {
        ring[p % window * dim..][..dim].copy_from_slice(&vectors[p * dim..][..dim]);
    }
    let of = (
        &text,
        ratio.unwrap_or(1),
        ratio.map_or(0, |ratio| (past + tokens) / ratio),
    );
    let (cache, far) = blocks(ops, random, of, kv_type, dim)?;
    // Blocks all over the text.
    let seen = |t: usize| ratio.map_or(0, |ratio| (past + t + 1) / ratio);
    let list = |t: usize| -> Vec<usize> {
        match most.filter(|most| seen(t) > *most) {
            Some(most) => (0..most).map(|i| i * seen(t) / most).collect(),
            None => (0..seen(t)).collect(),
        }
    };
    let n_listed = most.unwrap_or(0);
    let lists: Vec<i32> = (0..tokens)
        .flat_map(|t| {
            let own = list(t).into_iter().map(|block| block as i32);
            own.chain(std::iter::repeat(-1)).take(n_listed)
        })
        .collect();
    let chosen = Buffer::of_i32(device, if lists.is_empty() { &[0] } else { &lists })?;
    let [queries, new, ring, sinks_there] =
        [&q[..], &vectors[past * dim..], &ring, &sinks].map(|v| Buffer::of_f32(device, v));
    let (queries, new, ring, sinks_there) = (queries?, new?, ring?, sinks_there?);
    // Room for a few tokens at a time.
    let choice = most.zip(ratio).map(|(most, ratio)| skipping(most, ratio));
    let chunks = compressed_chunks(window, ratio, choice, (past + tokens).next_multiple_of(256));
    let buffers = AttentionBuffers::new(device, 4 * chunks * n_head * dim, dim)?;
    let out = Buffer::new_f32(device, tokens * n_head * dim)?;
    let attention = AttendCompressed {
        queries: queries.view(),
        n_head,
        key_dim: dim,
        scale,
        vectors: new.view(),
        window,
        ring: ring.view(),
        far: ratio.map(|ratio| FarRows {
            rows: cache.view(),
            kv_type,
            ratio,
            choice,
            lists: choice.map(|_| chosen.view()),
        }),
        sinks: sinks_there.view(),
        positions: text.batch.all(),
    };
    ops.attend_compressed(&attention, &buffers, out.view())?;
    let got = out.view().to_f32()?;
    for t in 0..tokens {
        let end = past + t + 1;
        let near = (end.saturating_sub(window)..end).map(|p| &vectors[p * dim..][..dim]);
        let all = near.chain(list(t).into_iter().map(|block| &far[block][..]));
        let all: Vec<Vec<f64>> = all.map(doubles).collect();
        for (h, sink) in sinks.iter().enumerate() {
            let at = (t * n_head + h) * dim..(t * n_head + h + 1) * dim;
            let mixed = attended(&doubles(&q[at.clone()]), &all, scale, *sink);
            outcome.compare(&got[at], mixed.into_iter().map(within(2e-5)));
        }
    }
    Ok(outcome)
}

/// Returns the attention of a query to rows that are keys and values.
fn attended(query: &[f64], rows: &[Vec<f64>], scale: f32, sink: f32) -> Vec<f64> {
    let dot = |row: &Vec<f64>| row.iter().zip(query).map(|(a, b)| a * b).sum::<f64>();
    let weight = |row: &Vec<f64>| (f64::from(scale) * dot(row)).exp();
    let weights: Vec<f64> = rows.iter().map(weight).collect();
    let sum = weights.iter().sum::<f64>() + f64::from(sink).exp();
    let mixed = |c: usize| {
        let rows = rows.iter().zip(&weights);
        rows.map(|(row, weight)| weight * row[c]).sum::<f64>() / sum
    };
    (0..query.len()).map(mixed).collect()
}
