//! Mamba-2 against its formulas written out in 64-bit floats, and against itself token by token.

use super::*;
use crate::gpu::mixer_alone;
use crate::layers::mixer::Segment;
use crate::layers::weights::WeightStorage;
use std::sync::Arc;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::gguf::testing::Writer;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::spec::{Linear, Mixer};
use tier_plan_formats::placement::TierIdx;
use tier_plan_kernels::Kernels;
use tier_plan_kernels::quant::TensorType;
use tier_plan_kernels::threads::ThreadPool;
use tier_plan_testing::{Random, nmse};

const HIDDEN: usize = 12;
const EPS: f32 = 1e-2;

#[derive(Clone, Copy, Debug)]
struct Case {
    n_head: usize,
    dim: usize,
    n_group: usize,
    state_dim: usize,
    taps: usize,
    bias: bool,
}

const CASES: [Case; 4] = [
    Case {
        n_head: 4,
        dim: 6,
        n_group: 2,
        state_dim: 8,
        taps: 4,
        bias: true,
    },
    Case {
        n_head: 3,
        dim: 5,
        n_group: 1,
        state_dim: 3,
        taps: 2,
        bias: false,
    },
    Case {
        n_head: 2,
        dim: 1,
        n_group: 2,
        state_dim: 5,
        taps: 1,
        bias: true,
    },
    Case {
        n_head: 6,
        dim: 20,
        n_group: 3,
        state_dim: 36,
        taps: 3,
        bias: true,
    },
];

/// A layer that can run, and its tensors' values.
struct Layer {
    spec: MambaSpec,
    weights: DenseWeights,
    values: Vec<Vec<f32>>,
}

impl Layer {
    fn new(case: Case) -> Self {
        let inner = case.n_head * case.dim;
        let channels = inner + 2 * case.n_group * case.state_dim;
        let linear = |weight, n_in, n_out| Linear {
            weight,
            bias: None,
            n_out,
            n_in,
            first_row: 0,
        };
        let spec = MambaSpec {
            n_head: case.n_head,
            head_dim: case.dim,
            n_group: case.n_group,
            state_dim: case.state_dim,
            conv_taps: case.taps,
            input: linear(0, HIDDEN, inner + channels + case.n_head),
            out: linear(1, inner, HIDDEN),
            conv: 2,
            conv_bias: case.bias.then_some(3),
            dt_bias: 4,
            decay: 5,
            skip: 6,
            norm: 7,
        };
        let mut random = Random(11);
        let mut around = |len: usize, middle: f32, size: f32| -> Vec<f32> {
            let noise = random.noise(len);
            noise.iter().map(|x| middle + size * x).collect()
        };
        let values = vec![
            around(spec.input.n_out * HIDDEN, 0.0, 0.6),
            around(inner * HIDDEN, 0.0, 0.6),
            around(channels * case.taps, 0.0, 0.9),
            around(channels, 0.0, 0.5),
            around(case.n_head, 0.0, 1.0),
            around(case.n_head, -1.0, 0.7),
            around(case.n_head, 0.5, 1.0),
            around(inner, 1.0, 0.3),
        ];
        let weights = hold(&spec, &values);
        Self {
            spec,
            weights,
            values,
        }
    }

    /// Runs batches one after another; `x` is `[tokens, HIDDEN]`. The states of `checkpoints`, by the
    /// number of tokens, go to the others after the first.
    fn run(
        &self,
        states: &mut [RecurrentState],
        x: &[f32],
        batches: &[usize],
        (threads, checkpoint): (usize, Option<usize>),
    ) -> Vec<f32> {
        let pool = ThreadPool::new(threads);
        let c = CpuContext {
            pool: &pool,
            kernels: Kernels::best(),
        };
        let mut scratch = MambaScratch::default();
        scratch.reserve(batches.iter().copied().max().unwrap(), &self.spec);
        let mut acts = Activations::default();
        let mut out = vec![f32::NAN; x.len()];
        let mut first = 0;
        for n in batches {
            let range = first * HIDDEN..(first + n) * HIDDEN;
            acts.fill(c.kernels, *n, HIDDEN, &x[range.clone()], false);
            let here = checkpoint.filter(|at| (first + 1..=first + n).contains(at));
            let input = MixerInput {
                x: acts.view(),
                segments: &[Segment {
                    rows: 0..*n,
                    past: first,
                    pages: &[],
                    state: 0,
                    checkpoints: here.map(|at| (at - first, 1)).into_iter().collect(),
                }],
                first_row: 0,
                rope: None,
                indexer_rope: None,
                norm_eps: EPS,
            };
            let out = &mut out[range];
            run(
                c,
                &self.weights,
                &self.spec,
                &input,
                states,
                &mut scratch,
                out,
            );
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

    fn value(&self, id: usize, at: usize) -> f64 {
        f64::from(self.values[id][at])
    }

    /// The layer's result for a text, straight from the formulas.
    fn reference(&self, case: Case, x: &[f32]) -> Vec<f64> {
        let silu = |x: f64| x / (1.0 + (-x).exp());
        let (inner, spec) = (self.spec.inner(), &self.spec);
        let projected: Vec<Vec<f64>> = x
            .chunks_exact(HIDDEN)
            .map(|x| {
                let x: Vec<f64> = x.iter().map(|x| f64::from(*x)).collect();
                self.product(&spec.input, &x)
            })
            .collect();
        let mut states = vec![vec![vec![0.0; case.state_dim]; case.dim]; case.n_head];
        let mut results = Vec::new();
        for (t, row) in projected.iter().enumerate() {
            let channel = |c: usize| {
                let bias = if case.bias { self.value(3, c) } else { 0.0 };
                let taps = (0..case.taps).filter_map(|k| {
                    let at = (t + k + 1).checked_sub(case.taps)?;
                    Some(self.value(2, c * case.taps + k) * projected[at][inner + c])
                });
                silu(bias + taps.sum::<f64>())
            };
            let mixed_in: Vec<f64> = (0..spec.channels()).map(channel).collect();
            let mut y = vec![0.0; inner];
            for (head, state) in states.iter_mut().enumerate() {
                let raw = row[row.len() - case.n_head + head] + self.value(4, head);
                let dt = raw.exp().ln_1p();
                let group = head / (case.n_head / case.n_group);
                let b = &mixed_in[inner + group * case.state_dim..][..case.state_dim];
                let second = inner + case.n_group * case.state_dim;
                let reader = &mixed_in[second + group * case.state_dim..][..case.state_dim];
                for (i, state) in state.iter_mut().enumerate() {
                    let x = mixed_in[head * case.dim + i];
                    for (state, b) in state.iter_mut().zip(b) {
                        *state = *state * (dt * self.value(5, head)).exp() + dt * x * b;
                    }
                    let read: f64 = state.iter().zip(reader).map(|(s, c)| s * c).sum();
                    y[head * case.dim + i] = read + self.value(6, head) * x;
                }
            }
            y.iter_mut().zip(row).for_each(|(y, z)| *y *= silu(*z));
            let width = inner / case.n_group;
            for (group, y) in y.chunks_exact_mut(width).enumerate() {
                let mean = y.iter().map(|v| v * v).sum::<f64>() / width as f64;
                let root = (mean + f64::from(EPS)).sqrt();
                for (i, v) in y.iter_mut().enumerate() {
                    *v *= self.value(7, group * width + i) / root;
                }
            }
            results.extend(self.product(&spec.out, &y));
        }
        results
    }
}

/// Returns the two matrices and, after them, the vectors, as a loaded model has them.
fn hold(spec: &MambaSpec, values: &[Vec<f32>]) -> DenseWeights {
    let mut writer = Writer::default();
    for (id, values) in values.iter().enumerate() {
        let dims = match id {
            0 => vec![spec.input.n_in as u64, spec.input.n_out as u64],
            1 => vec![spec.out.n_in as u64, spec.out.n_out as u64],
            _ => vec![values.len() as u64],
        };
        let data = values.iter().flat_map(|v| v.to_le_bytes()).collect();
        writer = writer.tensor(&format!("t{id}"), TensorType::F32, &dims, data);
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("layer.gguf");
    std::fs::write(&path, writer.finish()).unwrap();
    let mut weights = DenseWeights::new(Arc::new(Gguf::open(&path).unwrap()));
    for (id, values) in values.iter().enumerate() {
        let storage = match id {
            0 | 1 => WeightStorage::Mapped,
            _ => WeightStorage::Vector(values.clone().into()),
        };
        weights.hold(id, TierIdx::FIRST, storage);
    }
    weights
}

fn new_states(spec: &MambaSpec) -> Vec<RecurrentState> {
    (0..2).map(|_| new_state(spec, 0)).collect()
}

#[test]
fn a_layer_is_the_formulas() {
    let x = Random(8).noise(9 * HIDDEN);
    for case in CASES {
        let layer = Layer::new(case);
        let mut states = new_states(&layer.spec);
        let found = layer.run(&mut states, &x, &[5, 1, 3], (2, None));
        let off = nmse(&found, &layer.reference(case, &x));
        assert!(off < 1e-11, "{case:?}: {off:e}");
        let planned = 4 * layer.spec.state_values() as u64;
        assert_eq!(states[0].bytes(), planned, "{case:?}");
    }
}

#[test]
fn batches_threads_and_checkpoints_do_not_change_a_bit() {
    let x = Random(9).noise(11 * HIDDEN);
    for case in CASES {
        let layer = Layer::new(case);
        let mut states = new_states(&layer.spec);
        let whole = layer.run(&mut states, &x, &[11], (1, None));
        for (batches, threads) in [(&[1; 11][..], 1), (&[2, 7, 2], 3)] {
            let mut other = new_states(&layer.spec);
            let parts = layer.run(&mut other, &x, batches, (threads, Some(6)));
            assert_eq!(parts, whole, "{case:?}");
            assert!(other[0] == states[0], "{case:?}");
            // The checkpoint goes on as the text did.
            let mut later = vec![other[1].clone(), new_state(&layer.spec, 0)];
            let rest = layer.run(&mut later, &x[6 * HIDDEN..], &[5], (1, None));
            assert_eq!(rest, whole[6 * HIDDEN..], "{case:?}");
        }
    }
}

#[test]
fn a_gpu_computes_the_same_layer() {
    let x = Random(10).noise(11 * HIDDEN);
    for case in CASES.into_iter().filter(|case| case.state_dim % 4 == 0) {
        let run = |batches: &[usize]| {
            let Layer { spec, weights, .. } = Layer::new(case);
            let (norm, mixer) = (spec.norm, Mixer::Mamba(spec));
            mixer_alone(
                &mixer,
                norm,
                EPS,
                weights,
                KvType::F16,
                (&x, HIDDEN),
                batches,
            )
        };
        let found = run(&[5, 2, 4]);
        let off = nmse(&found, &Layer::new(case).reference(case, &x));
        assert!(off > 0.0 && off < 1e-11, "{case:?}: {off:e}");
        // Up to seven tokens are multiplied one by one, and nothing else depends on their number.
        assert_eq!(run(&[1; 11]), found, "{case:?}");
    }
}
