//! Kimi delta attention against its formulas written out in 64-bit floats, and against itself token
//! by token.

use super::*;
use crate::layers::mixer::Segment;
use crate::layers::weights::WeightStorage;
use std::sync::Arc;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::gguf::testing::Writer;
use tier_plan_formats::model::spec::{Linear, TensorId};
use tier_plan_formats::placement::TierIdx;
use tier_plan_kernels::Kernels;
use tier_plan_kernels::quant::TensorType;
use tier_plan_kernels::threads::ThreadPool;
use tier_plan_testing::{Random, nmse};

const HIDDEN: usize = 20;
const EPS: f32 = 1e-3;
const LENGTH_EPS: f32 = 2e-2;

#[derive(Clone, Copy, Debug)]
struct Case {
    n_head: usize,
    dim: usize,
    taps: usize,
    low_rank: bool,
    gate: DecayGate,
    negated: bool,
}

const CASES: [Case; 4] = [
    Case {
        n_head: 3,
        dim: 16,
        taps: 4,
        low_rank: true,
        gate: DecayGate::Softplus,
        negated: true,
    },
    Case {
        n_head: 2,
        dim: 16,
        taps: 4,
        low_rank: false,
        gate: DecayGate::Bounded { bound: -4.0 },
        negated: false,
    },
    Case {
        n_head: 1,
        dim: 37,
        taps: 1,
        low_rank: false,
        gate: DecayGate::Softplus,
        negated: false,
    },
    Case {
        n_head: 2,
        dim: 5,
        taps: 3,
        low_rank: true,
        gate: DecayGate::Bounded { bound: -0.5 },
        negated: true,
    },
];

/// A layer that can run, and its tensors' values.
struct Layer {
    spec: KdaSpec,
    weights: DenseWeights,
    values: Vec<Vec<f32>>,
}

impl Layer {
    fn new(case: Case) -> Self {
        let Case {
            n_head, dim, taps, ..
        } = case;
        let (mut random, width) = (Random(5), n_head * dim);
        let mut values: Vec<Vec<f32>> = Vec::new();
        let mut matrices = Vec::new();
        let mut linear = |n_in: usize, n_out: usize| {
            let noise = random.noise(n_in * n_out);
            values.push(noise.iter().map(|x| 0.5 * x).collect());
            matrices.push([n_in, n_out]);
            Linear {
                weight: values.len() - 1,
                bias: None,
                n_out,
                n_in,
                first_row: 0,
            }
        };
        let qkv = [(); 3].map(|()| linear(HIDDEN, width));
        let mut projection = || match case.low_rank {
            true => Projection {
                first: linear(HIDDEN, dim),
                second: Some(linear(dim, width)),
            },
            false => Projection {
                first: linear(HIDDEN, width),
                second: None,
            },
        };
        let (decay, gate) = (projection(), projection());
        let (beta, out) = (linear(HIDDEN, n_head), linear(width, HIDDEN));
        let mut random = Random(6);
        let mut vector = |len: usize, middle: f32, size: f32| -> TensorId {
            let noise = random.noise(len);
            values.push(noise.iter().map(|x| middle + size * x).collect());
            values.len() - 1
        };
        let conv = [(); 3].map(|()| vector(width * taps, 0.0, 0.8));
        let decay_bias = vector(width, 0.0, 1.0);
        let sign = if case.negated { -1.0 } else { 1.0 };
        let steepness = vector(n_head, sign * 0.8, 0.4);
        let norm = vector(dim, 1.0, 0.3);
        let spec = KdaSpec {
            n_head,
            head_dim: dim,
            conv_taps: taps,
            qkv,
            conv,
            length_eps: LENGTH_EPS,
            decay,
            decay_bias,
            decay_gate: case.gate,
            steepness,
            steepness_negated: case.negated,
            beta,
            gate,
            norm,
            out,
        };
        let weights = hold(&matrices, &values);
        Self {
            spec,
            weights,
            values,
        }
    }

    /// Runs batches one after another; `x` is `[tokens, HIDDEN]`.
    fn run(
        &self,
        state: &mut RecurrentState,
        x: &[f32],
        batches: &[usize],
        threads: usize,
    ) -> Vec<f32> {
        let pool = ThreadPool::new(threads);
        let c = CpuContext {
            pool: &pool,
            kernels: Kernels::best(),
        };
        let mut scratch = KdaScratch::default();
        scratch.reserve(batches.iter().copied().max().unwrap(), &self.spec);
        let mut acts = Activations::default();
        let mut out = vec![f32::NAN; x.len()];
        let mut first = 0;
        for n in batches {
            let range = first * HIDDEN..(first + n) * HIDDEN;
            acts.fill(c.kernels, *n, HIDDEN, &x[range.clone()], false);
            let input = MixerInput {
                x: acts.view(),
                segments: &[Segment {
                    rows: 0..*n,
                    past: first,
                    pages: &[],
                    state: 0,
                    checkpoints: Vec::new(),
                }],
                first_row: 0,
                rope: None,
                indexer_rope: None,
                norm_eps: EPS,
            };
            let states = std::slice::from_mut(state);
            let (scratch, out) = (&mut scratch, &mut out[range]);
            run(c, &self.weights, &self.spec, &input, states, scratch, out);
            first += n;
        }
        assert_eq!(first * HIDDEN, x.len());
        out
    }

    fn product(&self, linear: &Linear, x: &[f64]) -> Vec<f64> {
        let rows = self.values[linear.weight].chunks_exact(linear.n_in);
        rows.map(|row| row.iter().zip(x).map(|(w, x)| f64::from(*w) * x).sum())
            .collect()
    }

    fn project(&self, projection: &Projection, x: &[f64]) -> Vec<f64> {
        let first = self.product(&projection.first, x);
        match &projection.second {
            Some(second) => self.product(second, &first),
            None => first,
        }
    }

    fn value(&self, id: TensorId, at: usize) -> f64 {
        f64::from(self.values[id][at])
    }

    /// Convolved queries, keys or values of a token, `[n_head * dim]`.
    fn convolved(&self, kind: usize, tokens: &[Vec<f64>], t: usize) -> Vec<f64> {
        let taps = self.spec.conv_taps;
        let inputs: Vec<_> = (0..taps)
            .filter_map(|j| Some((j, (t + j + 1).checked_sub(taps)?)))
            .map(|(j, at)| (j, self.product(&self.spec.qkv[kind], &tokens[at])))
            .collect();
        let channel = |channel: usize| {
            let weight = |j: usize| self.value(self.spec.conv[kind], channel * taps + j);
            let sum: f64 = inputs.iter().map(|(j, x)| weight(*j) * x[channel]).sum();
            sum / (1.0 + (-sum).exp())
        };
        (0..self.spec.width()).map(channel).collect()
    }

    /// The layer's result for a text, straight from the formulas.
    fn reference(&self, case: Case, x: &[f32]) -> Vec<f64> {
        let Case { n_head, dim, .. } = case;
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let tokens: Vec<Vec<f64>> = x
            .chunks_exact(HIDDEN)
            .map(|x| x.iter().map(|x| f64::from(*x)).collect())
            .collect();
        let mut states = vec![vec![vec![0.0f64; dim]; dim]; n_head];
        let mut results = Vec::new();
        for (t, x) in tokens.iter().enumerate() {
            let [q, k, v] = [0, 1, 2].map(|kind| self.convolved(kind, &tokens, t));
            let (f, z) = (
                self.project(&self.spec.decay, x),
                self.project(&self.spec.gate, x),
            );
            let beta = self.product(&self.spec.beta, x);
            let mut mixed = Vec::new();
            for (head, state) in states.iter_mut().enumerate() {
                let of = |row: &[f64]| row[head * dim..][..dim].to_vec();
                let unit = |row: Vec<f64>| {
                    let squares: f64 = row.iter().map(|x| x * x).sum();
                    let length = (squares + f64::from(LENGTH_EPS)).sqrt();
                    row.into_iter().map(|x| x / length).collect::<Vec<_>>()
                };
                let (q, k, v) = (unit(of(&q)), unit(of(&k)), of(&v));
                let a = self.value(self.spec.steepness, head).abs();
                for i in 0..dim {
                    let f = f[head * dim + i] + self.value(self.spec.decay_bias, head * dim + i);
                    let log = match case.gate {
                        DecayGate::Softplus => -a * f.exp().ln_1p(),
                        DecayGate::Bounded { bound } => f64::from(bound) * sigmoid(a * f),
                    };
                    state[i].iter_mut().for_each(|s| *s *= log.exp());
                }
                let mut read = vec![0.0; dim];
                for (j, read) in read.iter_mut().enumerate() {
                    let seen: f64 = (0..dim).map(|i| k[i] * state[i][j]).sum();
                    let change = sigmoid(beta[head]) * (v[j] - seen);
                    (0..dim).for_each(|i| state[i][j] += k[i] * change);
                    let sum: f64 = (0..dim).map(|i| q[i] * state[i][j]).sum();
                    *read = sum / (dim as f64).sqrt();
                }
                let mean = read.iter().map(|v| v * v).sum::<f64>() / dim as f64;
                let root = (mean + f64::from(EPS)).sqrt();
                mixed.extend(read.iter().enumerate().map(|(i, v)| {
                    v / root * self.value(self.spec.norm, i) * sigmoid(z[head * dim + i])
                }));
            }
            results.extend(self.product(&self.spec.out, &mixed));
        }
        results
    }
}

/// Returns matrices of the given shapes and, after them, vectors, as a loaded model has them.
fn hold(matrices: &[[usize; 2]], values: &[Vec<f32>]) -> DenseWeights {
    let mut writer = Writer::default();
    for (id, values) in values.iter().enumerate() {
        let dims = matrices.get(id).map_or(vec![values.len()], |d| d.to_vec());
        let dims: Vec<u64> = dims.iter().map(|d| *d as u64).collect();
        let data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        writer = writer.tensor(&format!("t{id}"), TensorType::F32, &dims, data);
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer.gguf");
    std::fs::write(&path, writer.finish()).unwrap();
    let mut weights = DenseWeights::new(Arc::new(Gguf::open(&path).unwrap()));
    for (id, values) in values.iter().enumerate() {
        let storage = match id < matrices.len() {
            true => WeightStorage::Mapped,
            false => WeightStorage::Vector(values.clone().into()),
        };
        weights.hold(id, TierIdx::FIRST, storage);
    }
    weights
}

#[test]
fn a_layer_is_the_formulas() {
    let x = Random(8).noise(9 * HIDDEN);
    for case in CASES {
        let layer = Layer::new(case);
        let mut state = new_state(&layer.spec, 0);
        let found = layer.run(&mut state, &x, &[5, 1, 3], 2);
        let off = nmse(&found, &layer.reference(case, &x));
        assert!(off < 1e-11, "{case:?}: {off:e}");
    }
}

#[test]
fn batches_and_threads_do_not_change_a_bit() {
    let x = Random(9).noise(11 * HIDDEN);
    for case in CASES {
        let layer = Layer::new(case);
        let mut state = new_state(&layer.spec, 0);
        let whole = layer.run(&mut state, &x, &[11], 1);
        for (batches, threads) in [(&[1; 11][..], 1), (&[2, 7, 2], 3)] {
            let mut other = new_state(&layer.spec, 0);
            let parts = layer.run(&mut other, &x, batches, threads);
            assert_eq!(parts, whole, "{case:?}");
            assert_eq!(other.inputs, state.inputs, "{case:?}");
            assert_eq!(other.matrices, state.matrices, "{case:?}");
        }
    }
}

#[test]
fn the_state_has_the_bytes_that_are_planned() {
    for case in CASES {
        let spec = Layer::new(case).spec;
        let expected = 4 * spec.state_values() as u64;
        assert_eq!(new_state(&spec, 0).bytes(), expected, "{case:?}");
    }
}
