//! The delta net against the formulas written out in 64-bit floats, and against itself token by
//! token.

use super::*;
use crate::gpu::mixer_alone;
use crate::layers::mixer::Segment;
use crate::layers::weights::WeightStorage;
use std::io::Write;
use std::sync::Arc;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::gguf::testing::Writer;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::spec::{DeltaGate, KeySharing, Linear, Mixer, TensorId};
use tier_plan_formats::placement::TierIdx;
use tier_plan_kernels::Kernels;
use tier_plan_kernels::quant::TensorType;
use tier_plan_kernels::threads::ThreadPool;

const HIDDEN: usize = 32;
const EPS: f32 = 1e-6;

/// Numbers from -1 to 1.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    fn take(&mut self, n: usize, size: f32) -> Vec<f32> {
        (0..n).map(|_| size * self.next()).collect()
    }
}

#[derive(Clone, Copy, Debug)]
struct Size {
    n_key: usize,
    n_value: usize,
    dim: usize,
    taps: usize,
    sharing: KeySharing,
}

/// The parameters, with every matrix by itself.
struct Plain {
    qkv: Vec<f32>,
    gate: Vec<f32>,
    beta: Vec<f32>,
    alpha: Vec<f32>,
    conv: Vec<f32>,
    bias: Vec<f32>,
    decay: Vec<f32>,
    norm: Vec<f32>,
    out: Vec<f32>,
}

impl Plain {
    fn new(size: Size) -> Self {
        let mut r = Numbers(7);
        let (values, channels) = (
            size.n_value * size.dim,
            (2 * size.n_key + size.n_value) * size.dim,
        );
        Self {
            qkv: r.take(channels * HIDDEN, 0.4),
            gate: r.take(values * HIDDEN, 0.4),
            beta: r.take(size.n_value * HIDDEN, 0.4),
            alpha: r.take(size.n_value * HIDDEN, 0.4),
            conv: r.take(channels * size.taps, 0.8),
            bias: r.take(size.n_value, 1.0),
            decay: (0..size.n_value).map(|_| -0.6 + 0.5 * r.next()).collect(),
            norm: (0..size.dim).map(|_| 1.0 + 0.3 * r.next()).collect(),
            out: r.take(values * HIDDEN, 0.4),
        }
    }

    fn row(matrix: &[f32], row: usize) -> &[f32] {
        &matrix[row * HIDDEN..][..HIDDEN]
    }

    /// Query, key, values and gates of one key head after another, as the fused matrix has them.
    fn input_by_key_head(&self, size: Size) -> Vec<f32> {
        let Size {
            n_key,
            n_value,
            dim,
            ..
        } = size;
        let group = n_value / n_key;
        let mut fused = Vec::new();
        for key in 0..n_key {
            let values = (key * group..(key + 1) * group).collect::<Vec<_>>();
            let mut head = |matrix: &[f32], head: usize| {
                (0..dim).for_each(|i| fused.extend_from_slice(Self::row(matrix, head * dim + i)));
            };
            head(&self.qkv, key);
            head(&self.qkv, n_key + key);
            values.iter().for_each(|v| head(&self.qkv, 2 * n_key + v));
            values.iter().for_each(|v| head(&self.gate, *v));
        }
        fused
    }

    fn rates_by_key_head(&self, size: Size) -> Vec<f32> {
        let group = size.n_value / size.n_key;
        let mut fused = Vec::new();
        for key in 0..size.n_key {
            for matrix in [&self.beta, &self.alpha] {
                (key * group..(key + 1) * group)
                    .for_each(|v| fused.extend_from_slice(Self::row(matrix, v)));
            }
        }
        fused
    }

    /// The layer's result for a row of tokens from the beginning, straight from the formulas.
    fn reference(&self, size: Size, x: &[f32]) -> Vec<f32> {
        let Size {
            n_key,
            n_value,
            dim,
            taps,
            sharing,
        } = size;
        let dot = |a: &[f32], b: &[f32]| {
            a.iter()
                .zip(b)
                .map(|(a, b)| f64::from(*a) * f64::from(*b))
                .sum::<f64>()
        };
        let silu = |v: f64| v / (1.0 + (-v).exp());
        let tokens: Vec<&[f32]> = x.chunks_exact(HIDDEN).collect();
        let mut states = vec![vec![vec![0.0f64; dim]; dim]; n_value];
        let mut results = Vec::new();
        for t in 0..tokens.len() {
            let conv = |channel: usize| {
                let sum: f64 = (0..taps)
                    .filter(|j| t + j + 1 >= taps)
                    .map(|j| {
                        let input = dot(Self::row(&self.qkv, channel), tokens[t + j + 1 - taps]);
                        f64::from(self.conv[channel * taps + j]) * input
                    })
                    .sum();
                silu(sum)
            };
            let head = |index: usize| (0..dim).map(|i| conv(index * dim + i)).collect::<Vec<_>>();
            let unit = |head: Vec<f64>| {
                let length = (head.iter().map(|v| v * v).sum::<f64>() + f64::from(EPS)).sqrt();
                head.into_iter().map(|v| v / length).collect::<Vec<_>>()
            };
            let mut mixed = Vec::new();
            for (value_head, state) in states.iter_mut().enumerate() {
                let key_head = match sharing {
                    KeySharing::Grouped => value_head * n_key / n_value,
                    KeySharing::Cyclic => value_head % n_key,
                };
                let (q, k) = (unit(head(key_head)), unit(head(n_key + key_head)));
                let v = head(2 * n_key + value_head);
                let alpha = dot(Self::row(&self.alpha, value_head), tokens[t])
                    + f64::from(self.bias[value_head]);
                let decay = (f64::from(self.decay[value_head]) * (1.0 + alpha.exp()).ln()).exp();
                let beta = 1.0 / (1.0 + (-dot(Self::row(&self.beta, value_head), tokens[t])).exp());
                let mut read = Vec::new();
                for j in 0..dim {
                    let seen: f64 = (0..dim).map(|i| k[i] * decay * state[i][j]).sum();
                    let change = beta * (v[j] - seen);
                    for i in 0..dim {
                        state[i][j] = decay * state[i][j] + k[i] * change;
                    }
                    read.push(
                        (0..dim).map(|i| q[i] * state[i][j]).sum::<f64>() / (dim as f64).sqrt(),
                    );
                }
                let mean = read.iter().map(|v| v * v).sum::<f64>() / dim as f64;
                for (i, v) in read.iter().enumerate() {
                    let gate = dot(Self::row(&self.gate, value_head * dim + i), tokens[t]);
                    mixed.push(
                        v / (mean + f64::from(EPS)).sqrt() * f64::from(self.norm[i]) * silu(gate),
                    );
                }
            }
            for row in self.out.chunks_exact(mixed.len()) {
                results.push(
                    row.iter()
                        .zip(&mixed)
                        .map(|(w, m)| f64::from(*w) * m)
                        .sum::<f64>() as f32,
                );
            }
        }
        results
    }
}

/// A layer that can run.
struct Layer {
    spec: DeltaSpec,
    weights: DenseWeights,
}

impl Layer {
    fn new(size: Size, plain: &Plain, fused: bool) -> Self {
        let Size {
            n_key,
            n_value,
            dim,
            taps,
            sharing,
        } = size;
        let mut writer = Writer::default();
        let mut ids = 0..;
        let mut add = |dims: &[usize], values: &[f32]| -> TensorId {
            let id = ids.next().unwrap_or_default();
            let dims: Vec<u64> = dims.iter().map(|d| *d as u64).collect();
            let data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            writer =
                std::mem::take(&mut writer).tensor(&format!("t{id}"), TensorType::F32, &dims, data);
            id
        };
        let mut linear = |n_in: usize, values: &[f32]| {
            let n_out = values.len() / n_in;
            Linear {
                weight: add(&[n_in, n_out], values),
                bias: None,
                n_out,
                n_in,
                first_row: 0,
            }
        };
        let (input, rates) = if fused {
            (
                DeltaInput::ByKeyHead(linear(HIDDEN, &plain.input_by_key_head(size))),
                DeltaRates::ByKeyHead(linear(HIDDEN, &plain.rates_by_key_head(size))),
            )
        } else {
            (
                DeltaInput::Split {
                    qkv: linear(HIDDEN, &plain.qkv),
                    gate: linear(HIDDEN, &plain.gate),
                },
                DeltaRates::Split {
                    beta: linear(HIDDEN, &plain.beta),
                    alpha: linear(HIDDEN, &plain.alpha),
                },
            )
        };
        let out = linear(n_value * dim, &plain.out);
        let vectors = [&plain.conv, &plain.bias, &plain.decay, &plain.norm];
        let [conv, dt_bias, decay, norm] = vectors.map(|values| add(&[values.len()], values));
        let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
        file.write_all(&writer.finish())
            .expect("room for a small file");
        let gguf = Arc::new(Gguf::open(file.path()).expect("the file just written"));
        let mut weights = DenseWeights::new(gguf);
        for id in 0..conv {
            weights.hold(id, TierIdx::FIRST, WeightStorage::Mapped);
        }
        for (id, values) in [conv, dt_bias, decay, norm].into_iter().zip(vectors) {
            weights.hold(
                id,
                TierIdx::FIRST,
                WeightStorage::Vector(values.clone().into()),
            );
        }
        let heads = (n_key, n_value, dim, taps);
        let (n_key_head, n_value_head, head_dim, conv_taps) = heads;
        let spec = DeltaSpec {
            n_key_head,
            n_value_head,
            head_dim,
            conv_taps,
            sharing,
            input,
            rates,
            conv,
            dt_bias,
            decay,
            norm,
            gate: DeltaGate::Silu,
            out,
        };
        Self { spec, weights }
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
        let largest = batches.iter().copied().max().unwrap_or(1);
        let mut scratch = DeltaScratch::default();
        scratch.reserve(largest, &self.spec);
        let mut acts = Activations::new(largest, HIDDEN);
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
            run(
                c,
                &self.weights,
                &self.spec,
                &input,
                std::slice::from_mut(state),
                &mut scratch,
                &mut out[range],
            );
            first += n;
        }
        assert_eq!(first * HIDDEN, x.len());
        out
    }
}

const SIZES: [Size; 5] = [
    Size {
        n_key: 2,
        n_value: 4,
        dim: 16,
        taps: 4,
        sharing: KeySharing::Grouped,
    },
    Size {
        n_key: 2,
        n_value: 6,
        dim: 16,
        taps: 4,
        sharing: KeySharing::Cyclic,
    },
    Size {
        n_key: 1,
        n_value: 2,
        dim: 64,
        taps: 3,
        sharing: KeySharing::Grouped,
    },
    Size {
        n_key: 3,
        n_value: 3,
        dim: 5,
        taps: 1,
        sharing: KeySharing::Cyclic,
    },
    Size {
        n_key: 2,
        n_value: 4,
        dim: 40,
        taps: 7,
        sharing: KeySharing::Cyclic,
    },
];

#[test]
fn a_layer_is_its_formulas() {
    for size in SIZES {
        let plain = Plain::new(size);
        let x = Numbers(3).take(11 * HIDDEN, 1.0);
        let expected = plain.reference(size, &x);
        let fused: &[bool] = if size.sharing == KeySharing::Grouped {
            &[false, true]
        } else {
            &[false]
        };
        for fused in fused {
            let layer = Layer::new(size, &plain, *fused);
            let found = layer.run(&mut new_state(&layer.spec, 0), &x, &[11], 2);
            let worst = found
                .iter()
                .zip(&expected)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            let largest = expected.iter().map(|v| v.abs()).fold(0.0, f32::max);
            assert!(
                worst < 2e-5 * largest,
                "{size:?}, fused {fused}: {worst} of {largest}"
            );
        }
    }
}

#[test]
fn a_gpu_computes_the_same_layer() {
    for size in SIZES.into_iter().filter(|size| size.dim.is_multiple_of(4)) {
        let plain = Plain::new(size);
        let x = Numbers(3).take(11 * HIDDEN, 1.0);
        let expected = plain.reference(size, &x);
        let fused: &[bool] = if size.sharing == KeySharing::Grouped {
            &[false, true]
        } else {
            &[false]
        };
        for fused in fused {
            let run = |batches: &[usize]| {
                let Layer { spec, weights } = Layer::new(size, &plain, *fused);
                let norm = spec.norm;
                mixer_alone(
                    &Mixer::Delta(spec),
                    norm,
                    EPS,
                    weights,
                    KvType::F16,
                    (&x, HIDDEN),
                    batches,
                )
            };
            let found = run(&[5, 2, 4]);
            let worst = found
                .iter()
                .zip(&expected)
                .map(|(a, b)| (a - b).abs())
                .fold(0.0, f32::max);
            let largest = expected.iter().map(|v| v.abs()).fold(0.0, f32::max);
            assert!(
                worst > 0.0 && worst < 2e-5 * largest,
                "{size:?}, fused {fused}: {worst} of {largest}"
            );
            // Up to seven tokens are multiplied one by one, and nothing else depends on their
            // number.
            assert_eq!(run(&[1; 11]), found, "{size:?}, fused {fused}");
        }
    }
}

#[test]
fn a_batch_gives_the_bits_of_its_tokens_one_by_one() {
    for size in SIZES {
        let layer = Layer::new(size, &Plain::new(size), size.sharing == KeySharing::Grouped);
        let x = Numbers(5).take(9 * HIDDEN, 1.0);
        let mut state = new_state(&layer.spec, 0);
        let together = layer.run(&mut state, &x, &[9], 3);
        for batches in [&[1; 9][..], &[2, 7], &[5, 1, 1, 2]] {
            let mut apart = new_state(&layer.spec, 0);
            assert_eq!(
                layer.run(&mut apart, &x, batches, 1),
                together,
                "{size:?} {batches:?}"
            );
            assert_eq!(
                (&apart.inputs, &apart.matrices),
                (&state.inputs, &state.matrices),
                "{size:?} {batches:?}"
            );
        }
    }
}

#[test]
fn a_reset_state_knows_nothing_and_its_size_is_the_specs() {
    let layer = Layer::new(SIZES[0], &Plain::new(SIZES[0]), false);
    let x = Numbers(5).take(4 * HIDDEN, 1.0);
    let mut state = new_state(&layer.spec, 0);
    assert_eq!(state.bytes(), 4 * layer.spec.state_values() as u64);
    let first = layer.run(&mut state, &x, &[4], 2);
    assert_ne!(layer.run(&mut state, &x, &[4], 2), first);
    state.reset();
    assert_eq!(layer.run(&mut state, &x, &[4], 2), first);
}

#[test]
fn softplus_is_smooth_at_both_ends() {
    for x in [-90.0f32, -20.0, -1.0, 0.0, 3.0, 19.9, 20.1, 200.0] {
        let exact = if x > 40.0 {
            f64::from(x)
        } else {
            f64::from(x).exp().ln_1p()
        };
        assert!(
            (f64::from(softplus(x)) - exact).abs() <= exact * 1e-6,
            "{x}"
        );
    }
}
