//! Choices against the formulas in double precision.

use super::*;
use crate::layers::pages::mixed_pages;
use crate::layers::weights::WeightStorage;
use std::sync::Arc;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::gguf::testing::Writer;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::spec::{Linear, TensorId};
use tier_plan_formats::placement::TierIdx;
use tier_plan_kernels::quant::TensorType;
use tier_plan_kernels::threads::ThreadPool;
use tier_plan_kernels::{Activations, Kernels};
use tier_plan_testing::Random;

const HIDDEN: usize = 8;
const Q_RANK: usize = 6;
const N_HEAD: usize = 3;
const DIM: usize = 5;
const TOKENS: usize = 47;
const EPS: f32 = 0.01;
const SCALE: f32 = 0.25;

/// An indexer, and the values of its tensors in the order of [`shapes`].
struct Layer {
    weights: DenseWeights,
    spec: IndexerSpec,
    values: Vec<Vec<f32>>,
}

/// Names and shapes of tensors; the vectors come last.
fn shapes(block: usize) -> [(&'static str, Vec<usize>); 7] {
    [
        ("q", vec![Q_RANK, N_HEAD * DIM]),
        ("k", vec![HIDDEN, DIM]),
        ("proj", vec![HIDDEN, N_HEAD]),
        ("gate", vec![HIDDEN, DIM]),
        ("ape", vec![DIM, block]),
        ("norm", vec![DIM]),
        ("bias", vec![DIM]),
    ]
}

fn layer(selection: Selection) -> Layer {
    let shapes = shapes(selection.block);
    let mut writer = Writer::default();
    let mut values = Vec::new();
    for (seed, (name, dims)) in (1..).zip(&shapes) {
        let of: Vec<f32> = Random(seed).noise(dims.iter().product());
        let dims: Vec<u64> = dims.iter().map(|dim| *dim as u64).collect();
        let bytes: Vec<u8> = of.iter().flat_map(|v| v.to_le_bytes()).collect();
        writer = writer.tensor(name, TensorType::F32, &dims, bytes);
        values.push(of);
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), writer.finish()).unwrap();
    let gguf = Arc::new(Gguf::open(file.path()).unwrap());
    let id =
        |name: &str| -> TensorId { gguf.tensors().iter().position(|t| t.name == name).unwrap() };
    let linear = |name: &str| {
        let (_, dims) = shapes.iter().find(|(of, _)| *of == name).unwrap();
        Linear {
            weight: id(name),
            bias: None,
            n_out: dims[1],
            n_in: dims[0],
            first_row: 0,
        }
    };
    let spec = IndexerSpec {
        n_head: N_HEAD,
        key_dim: DIM,
        selection,
        scale: SCALE,
        rope: None,
        rope_first: 0,
        norm_eps: EPS,
        q: linear("q"),
        k: linear("k"),
        k_norm: id("norm"),
        k_norm_bias: id("bias"),
        head_weights: linear("proj"),
        pool: Some(KeyPool {
            gate: linear("gate"),
            ape: id("ape"),
        }),
    };
    let mut weights = DenseWeights::new(Arc::clone(&gguf));
    for (i, (name, _)) in shapes.iter().enumerate() {
        let storage = match i {
            0..4 => WeightStorage::Mapped,
            _ => WeightStorage::Vector(values[i].clone().into_boxed_slice()),
        };
        weights.hold(id(name), TierIdx::FIRST, storage);
    }
    Layer {
        weights,
        spec,
        values,
    }
}

/// Returns what the tokens choose in batches of the given sizes; nothing for those that attend to
/// all positions. Where `moved`, the text goes on in another recurrent state after every batch.
fn chosen(layer: &Layer, x: &[f32], low: &[f32], batches: &[usize], moved: bool) -> Vec<Vec<u32>> {
    let pool = ThreadPool::new(2);
    let c = CpuContext {
        pool: &pool,
        kernels: Kernels::best(),
    };
    let (spec, pages) = (&layer.spec, mixed_pages(TOKENS));
    let mut keys = RowStore::of_blocks(KvType::F32, TOKENS, DIM, spec.selection.block);
    let mut open = vec![RecurrentState::new(spec.state_values(), 0, 0); 2];
    let (mut scratch, mut chosen) = (PooledScratch::default(), Chosen::default());
    scratch.reserve(batches.iter().copied().max().unwrap(), spec);
    let (mut found, mut past, mut state) = (Vec::new(), 0, 0);
    for n in batches {
        let (mut acts, mut low_acts) = (Activations::default(), Activations::default());
        let of = |values: &[f32], width: usize| values[past * width..(past + n) * width].to_vec();
        acts.fill(c.kernels, *n, HIDDEN, &of(x, HIDDEN), false);
        low_acts.fill(c.kernels, *n, Q_RANK, &of(low, Q_RANK), false);
        let segment = Segment {
            rows: 0..*n,
            past,
            pages: &pages,
            state,
            checkpoints: if moved {
                vec![(*n, 1 - state)]
            } else {
                Vec::new()
            },
        };
        let tokens = choosing(&segment, spec.selection);
        let input = MixerInput {
            x: acts.view(),
            segments: &[segment],
            first_row: 0,
            rope: None,
            indexer_rope: None,
            norm_eps: 1.0,
        };
        let cache = PooledKeys {
            keys: &mut keys,
            open: &mut open,
        };
        let of = (spec, spec.pool.as_ref().unwrap());
        let input = (&input, low_acts.view());
        choose(
            c,
            &layer.weights,
            of,
            input,
            cache,
            &mut scratch,
            &mut chosen,
        );
        found.extend((0..tokens.start).map(|_| Vec::new()));
        found.extend(tokens.map(|token| chosen.of(token..token + 1).list(0).to_vec()));
        past += n;
        if moved {
            // The state that was left behind is another text's now.
            open[state as usize] = RecurrentState::new(spec.state_values(), 0, 0);
            state = 1 - state;
        }
    }
    found
}

fn product(matrix: &[f32], x: &[f32]) -> Vec<f64> {
    let dot = |row: &[f32]| -> f64 {
        let terms = row
            .iter()
            .zip(x)
            .map(|(a, b)| f64::from(*a) * f64::from(*b));
        terms.sum()
    };
    matrix.chunks_exact(x.len()).map(dot).collect()
}

/// Returns what the tokens choose by the formulas; nothing for those that attend to all positions.
fn expected(layer: &Layer, x: &[f32], low: &[f32]) -> Vec<Vec<u32>> {
    let [q, k, proj, gate, ape, norm, bias] = &layer.values[..] else {
        panic!("seven tensors");
    };
    let Selection {
        blocks,
        block,
        tail,
    } = layer.spec.selection;
    let rows: Vec<&[f32]> = x.chunks_exact(HIDDEN).collect();
    let normed = |x: &[f32]| -> Vec<f64> {
        let k = product(k, x);
        let mean = k.iter().sum::<f64>() / DIM as f64;
        let variance = k.iter().map(|v| (v - mean).powi(2)).sum::<f64>() / DIM as f64;
        let value = |i: usize| {
            (k[i] - mean) / (variance + f64::from(EPS)).sqrt() * f64::from(norm[i])
                + f64::from(bias[i])
        };
        (0..DIM).map(value).collect()
    };
    let key = |members: &[&[f32]]| -> Vec<f64> {
        let k: Vec<_> = members.iter().map(|x| normed(x)).collect();
        let score = |(at, x): (usize, &&[f32])| -> Vec<f64> {
            let ape = &ape[at * DIM..][..DIM];
            let gates = product(gate, x).into_iter().zip(ape);
            gates.map(|(g, a)| (g + f64::from(*a)).exp()).collect()
        };
        let weights: Vec<_> = members.iter().enumerate().map(score).collect();
        let value = |i: usize| {
            let sum: f64 = weights.iter().map(|w| w[i]).sum();
            k.iter()
                .zip(&weights)
                .map(|(k, w)| k[i] * w[i])
                .sum::<f64>()
                / sum
        };
        (0..DIM).map(value).collect()
    };
    let keys: Vec<_> = rows.chunks_exact(block).map(key).collect();
    let choice = |t: usize| -> Vec<u32> {
        let complete = (t + 1) / block;
        if complete <= blocks && (tail || block == 1) {
            return Vec::new();
        }
        let q = product(q, &low[t * Q_RANK..][..Q_RANK]);
        let w = product(proj, rows[t]);
        let rating = |key: &Vec<f64>| -> f64 {
            let dot = |head: usize| -> f64 {
                let q = &q[head * DIM..][..DIM];
                q.iter().zip(key).map(|(a, b)| a * b).sum()
            };
            (0..N_HEAD).map(|head| w[head] * dot(head).max(0.0)).sum()
        };
        let ratings: Vec<f64> = keys[..complete].iter().map(rating).collect();
        let mut best: Vec<usize> = (0..complete).collect();
        best.sort_by(|a, b| ratings[*b].total_cmp(&ratings[*a]));
        best.truncate(blocks);
        best.sort_unstable();
        let chosen = best.into_iter().flat_map(|b| b * block..(b + 1) * block);
        let tail = if tail { complete * block..t + 1 } else { 0..0 };
        chosen.chain(tail).map(|position| position as u32).collect()
    };
    (0..TOKENS).map(choice).collect()
}

#[test]
fn choices_are_those_of_the_formulas_however_a_text_is_cut() {
    let (x, low) = (
        Random(20).noise(TOKENS * HIDDEN),
        Random(21).noise(TOKENS * Q_RANK),
    );
    for (blocks, block, tail) in [
        (2, 4, true),
        (3, 3, true),
        (2, 3, false),
        (1, 1, true),
        (5, 1, false),
        (2, 11, true),
        (1, 20, false),
        (40, 2, false),
        (40, 2, true),
    ] {
        let selection = Selection {
            blocks,
            block,
            tail,
        };
        let layer = layer(selection);
        let expected = expected(&layer, &x, &low);
        let lists = expected.iter().filter(|list| !list.is_empty()).count();
        assert_eq!(lists > 0, blocks < 40 || !tail, "{selection:?}");
        for batches in [&[TOKENS][..], &[1; TOKENS], &[5, 13, 2, 27], &[46, 1]] {
            for moved in [false, true] {
                let found = chosen(&layer, &x, &low, batches, moved);
                assert_eq!(found, expected, "{selection:?} {batches:?} {moved}");
            }
        }
    }
}
