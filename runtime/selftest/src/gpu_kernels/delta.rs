//! The gated delta net between its matrix products.

use super::Check;
use super::small::same_quants;
use super::texts::{Text, of_first};
use crate::outcome::{Expected, Outcome};
use tier_plan_cuda::device::Buffer;
use tier_plan_cuda::ops::{Delta, DeltaSizes, Quants, States};
use tier_plan_cuda::{CudaError, Ops};
use tier_plan_formats::model::spec::{DeltaGate, KeySharing};
use tier_plan_kernels::random::Random;
use tier_plan_kernels::{DeltaStep, Kernels};

/// Tolerance of a value, relative to itself or to the root mean square of all values: exponentials
/// are computed differently, and sums have another order.
const VALUE_TOLERANCE: f64 = 2e-5;

const EPS: f32 = 1e-6;

/// More tokens than a block loads at once.
pub(super) const TOKENS: usize = 21;

pub(super) fn checks() -> Vec<Check> {
    let plain = DeltaSizes {
        n_key_head: 2,
        n_value_head: 4,
        head_dim: 128,
        conv_taps: 4,
        sharing: KeySharing::Cyclic,
        by_key_head: false,
        rates_by_key_head: false,
        gate: DeltaGate::Silu,
    };
    let grouped = DeltaSizes {
        sharing: KeySharing::Grouped,
        rates_by_key_head: true,
        ..plain
    };
    let cases = [
        plain,
        grouped,
        DeltaSizes {
            by_key_head: true,
            ..grouped
        },
        DeltaSizes {
            n_value_head: 6,
            head_dim: 16,
            by_key_head: true,
            ..grouped
        },
        DeltaSizes {
            n_key_head: 3,
            n_value_head: 3,
            head_dim: 20,
            conv_taps: 1,
            ..plain
        },
        DeltaSizes {
            head_dim: 64,
            conv_taps: 7,
            ..grouped
        },
        DeltaSizes {
            head_dim: 36,
            conv_taps: 16,
            n_value_head: 2,
            gate: DeltaGate::Sigmoid,
            ..plain
        },
        DeltaSizes {
            n_key_head: 1,
            n_value_head: 1,
            head_dim: 256,
            ..plain
        },
    ];
    let named = cases.map(|sizes| {
        let DeltaSizes {
            n_key_head: keys,
            n_value_head: values,
            head_dim,
            conv_taps: taps,
            ..
        } = sizes;
        let how = match (sizes.by_key_head, sizes.rates_by_key_head) {
            (true, _) => ", by key head",
            (false, true) => ", rates by key head",
            (false, false) => "",
        };
        let gate = match sizes.gate {
            DeltaGate::Silu => "",
            DeltaGate::Sigmoid => ", sigmoid gates",
        };
        let name =
            format!("delta, {keys} and {values} heads of {head_dim}, {taps} taps{how}{gate}");
        Check::new(name, move |ops, random| delta(ops, random, sizes))
    });
    named.into()
}

/// A layer's parameters, and the results of its first products for [`TOKENS`] tokens.
struct Layer {
    sizes: DeltaSizes,
    /// `[tokens, heads, head_dim]`: input of the convolution.
    heads: Vec<f32>,
    /// `[tokens, n_value_head, head_dim]`.
    gates: Vec<f32>,
    /// `[tokens, n_value_head]`.
    beta: Vec<f32>,
    alpha: Vec<f32>,
    conv: Vec<f32>,
    bias: Vec<f32>,
    decay: Vec<f32>,
    norm: Vec<f32>,
}

/// Results of the layer, and its state after them.
struct Results {
    heads: Vec<f32>,
    rates: Vec<f32>,
    out: Vec<f32>,
    inputs: Vec<f32>,
    matrices: Vec<f32>,
}

impl Layer {
    fn new(random: &mut Random, sizes: DeltaSizes) -> Self {
        let (n_value, dim) = (sizes.n_value_head, sizes.head_dim);
        let channels = (2 * sizes.n_key_head + n_value) * dim;
        let mut alpha = random.floats(TOKENS * n_value);
        // Where an exponential overflows, and where nothing decays.
        (alpha[0], alpha[n_value]) = (200.0, -200.0);
        Self {
            sizes,
            heads: random.floats(TOKENS * channels),
            gates: random
                .floats(TOKENS * n_value * dim)
                .iter()
                .map(|v| 8.0 * v)
                .collect(),
            beta: random
                .floats(TOKENS * n_value)
                .iter()
                .map(|v| 4.0 * v)
                .collect(),
            alpha,
            conv: random.floats(channels * sizes.conv_taps),
            bias: random.floats(n_value),
            decay: random
                .floats(n_value)
                .iter()
                .map(|v| -0.05 - 0.3 * v.abs())
                .collect(),
            norm: random.floats(dim),
        }
    }

    fn key_head(&self, value_head: usize) -> usize {
        let s = self.sizes;
        match s.sharing {
            KeySharing::Grouped => value_head / (s.n_value_head / s.n_key_head),
            KeySharing::Cyclic => value_head % s.n_key_head,
        }
    }

    /// Computes the layer with the CPU's scalar kernels, a token at a time.
    fn plain(&self) -> Results {
        let k = Kernels::SCALAR;
        let &DeltaSizes {
            n_key_head: n_key,
            n_value_head: n_value,
            head_dim: dim,
            conv_taps: taps,
            ..
        } = &self.sizes;
        let channels = (2 * n_key + n_value) * dim;
        let convolved = Convolution {
            n_query: n_key,
            n_heads: 2 * n_key + n_value,
            dim,
            taps,
            eps: EPS,
        };
        let (heads, inputs) = convolved.plain(&self.heads, &self.conv);
        let rates = self
            .alpha
            .iter()
            .zip(&self.beta)
            .enumerate()
            .flat_map(|(i, (alpha, beta))| {
                let soft = softplus(alpha + self.bias[i % n_value]);
                [
                    (self.decay[i % n_value] * soft).exp(),
                    1.0 / (1.0 + (-beta).exp()),
                ]
            });
        let rates: Vec<f32> = rates.collect();
        // Columns are independent states; on the device they are rows.
        let mut matrices = vec![0.0; n_value * dim * dim];
        let mut out = vec![0.0; TOKENS * n_value * dim];
        for (t, (row, out)) in heads
            .chunks_exact(channels)
            .zip(out.chunks_exact_mut(n_value * dim))
            .enumerate()
        {
            let head = |at: usize| &row[at * dim..][..dim];
            for (value_head, out) in out.chunks_exact_mut(dim).enumerate() {
                let (query, key) = (
                    head(self.key_head(value_head)),
                    head(n_key + self.key_head(value_head)),
                );
                let mut read = vec![0.0; dim];
                let columns = matrices[value_head * dim * dim..][..dim * dim].chunks_exact_mut(dim);
                for ((column, value), read) in columns
                    .zip(head(2 * n_key + value_head))
                    .zip(read.chunks_exact_mut(1))
                {
                    let [decay, beta] = [0, 1].map(|i| rates[2 * (t * n_value + value_head) + i]);
                    let value = std::slice::from_ref(value);
                    k.delta_step(
                        column,
                        &DeltaStep {
                            query,
                            key,
                            value,
                            decay,
                            beta,
                        },
                        read,
                    );
                }
                let mut normed = vec![0.0; dim];
                k.rms_norm(&read, &self.norm, EPS, &mut normed);
                let gates = &self.gates[(t * n_value + value_head) * dim..][..dim];
                match self.sizes.gate {
                    DeltaGate::Silu => {
                        out.copy_from_slice(gates);
                        k.silu_mul(out, &normed);
                    }
                    DeltaGate::Sigmoid => sigmoid_mul(gates, &normed, out),
                }
            }
        }
        Results {
            heads,
            rates,
            out,
            inputs,
            matrices,
        }
    }

    /// Computes the layer on a device in batches, for some texts that are alike. Also compares the fused
    /// quantization, and the texts.
    fn on_device(
        &self,
        ops: &Ops,
        batches: &[usize],
        texts: usize,
    ) -> Result<(Results, Outcome), CudaError> {
        let s = self.sizes;
        let (n_value, dim) = (s.n_value_head, s.head_dim);
        let (values, channels) = (n_value * dim, (2 * s.n_key_head + n_value) * dim);
        let given = |values: &[f32]| Buffer::of_f32(ops.device(), values);
        let buffer = |values: usize| Buffer::new_f32(ops.device(), values);
        // The first token must ignore the state's memory.
        let (inputs, matrices) = (
            given(&vec![f32::NAN; texts * s.conv_state()])?,
            given(&vec![f32::NAN; texts * s.matrices()])?,
        );
        let (conv, dt_bias, decay) = (given(&self.conv)?, given(&self.bias)?, given(&self.decay)?);
        let norm = given(&self.norm)?;
        let mut results = Results {
            heads: vec![],
            rates: vec![],
            out: vec![],
            inputs: vec![],
            matrices: vec![],
        };
        let (mut past, mut outcome) = (0, Outcome::default());
        for &n in batches {
            let alike = |values: &[f32]| given(&values.repeat(texts));
            let projected = alike(&self.projected(past, n))?;
            let [strengths, decays] = self.raw_rates(past, n);
            let (strengths, decays) = (alike(&strengths)?, alike(&decays)?);
            let gates = alike(&self.gates[past * values..][..n * values])?;
            let text = Text::alike(ops, past, n, texts as u32)?;
            let n = texts * n;
            let (heads, rates, out) = (
                buffer(n * channels)?,
                buffer(2 * n * n_value)?,
                buffer(n * values)?,
            );
            let quantizes = dim.is_multiple_of(32);
            let mut quants = Quants::new(ops.device(), (n * values).next_multiple_of(32))?;
            let mut after = Quants::new(ops.device(), (n * values).next_multiple_of(32))?;
            let delta = Delta {
                tokens: n,
                sizes: s,
                projected: projected.view(),
                gates: gates.view(),
                raw_strengths: strengths.view(),
                raw_decays: decays.view(),
                conv: conv.view(),
                dt_bias: dt_bias.view(),
                decay: decay.view(),
                norm: norm.view(),
                eps: EPS,
                inputs: States {
                    all: inputs.view(),
                    each: s.conv_state(),
                },
                matrices: States {
                    all: matrices.view(),
                    each: s.matrices(),
                },
                heads: heads.view(),
                rates: rates.view(),
                out: out.view(),
            };
            ops.delta(&delta, text.runs())?;
            ops.gate_delta(&delta, quantizes.then_some(&mut quants))?;
            if quantizes {
                ops.quantize(out.view(), n, values, &mut after)?;
                outcome.merge(same_quants(&quants, &after)?);
            }
            for (of_all, buffer) in [
                (&mut results.heads, &heads),
                (&mut results.rates, &rates),
                (&mut results.out, &out),
            ] {
                of_all.extend(of_first(&mut outcome, buffer, texts)?);
            }
            past += n / texts;
        }
        results.inputs = of_first(&mut outcome, &inputs, texts)?;
        results.matrices = of_first(&mut outcome, &matrices, texts)?;
        Ok((results, outcome))
    }

    /// Returns the results of the first product for some tokens.
    fn projected(&self, first: usize, n: usize) -> Vec<f32> {
        let s = self.sizes;
        let (n_key, n_value, dim) = (s.n_key_head, s.n_value_head, s.head_dim);
        let channels = (2 * n_key + n_value) * dim;
        let rows = &self.heads[first * channels..][..n * channels];
        if !s.by_key_head {
            return rows.to_vec();
        }
        let (group, mut projected) = (n_value / n_key, Vec::new());
        for (row, gates) in rows
            .chunks_exact(channels)
            .zip(self.gates[first * n_value * dim..].chunks(n_value * dim))
        {
            for key_head in 0..n_key {
                let heads_at = |first: usize, heads: usize| &row[first * dim..][..heads * dim];
                projected.extend_from_slice(heads_at(key_head, 1));
                projected.extend_from_slice(heads_at(n_key + key_head, 1));
                projected.extend_from_slice(heads_at(2 * n_key + key_head * group, group));
                projected.extend_from_slice(&gates[key_head * group * dim..][..group * dim]);
            }
        }
        projected
    }

    /// Returns the results of the products for rates for some tokens: strengths and decays, or both
    /// by key head.
    fn raw_rates(&self, first: usize, n: usize) -> [Vec<f32>; 2] {
        let s = self.sizes;
        let range = first * s.n_value_head..(first + n) * s.n_value_head;
        let (beta, alpha) = (&self.beta[range.clone()], &self.alpha[range]);
        if !s.rates_by_key_head {
            return [beta.to_vec(), alpha.to_vec()];
        }
        let group = s.n_value_head / s.n_key_head;
        let by_key_head = beta
            .chunks_exact(group)
            .zip(alpha.chunks_exact(group))
            .flat_map(|(b, a)| [b, a].concat());
        [by_key_head.collect(), Vec::new()]
    }
}

/// A convolution of heads: `n_query` of queries, as many of keys, then those of values.
pub(super) struct Convolution {
    pub(super) n_query: usize,
    pub(super) n_heads: usize,
    pub(super) dim: usize,
    pub(super) taps: usize,
    pub(super) eps: f32,
}

impl Convolution {
    /// Convolves `[tokens, heads, dim]` with the CPU's scalar kernels. Returns the normalized heads,
    /// and the inputs that the next tokens need.
    pub(super) fn plain(&self, heads: &[f32], weight: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (k, dim) = (Kernels::SCALAR, self.dim);
        let channels = self.n_heads * dim;
        let before = vec![0.0; (self.taps - 1) * channels];
        let rows: Vec<&[f32]> = before
            .chunks_exact(channels)
            .chain(heads.chunks_exact(channels))
            .collect();
        let mut out = vec![0.0; heads.len()];
        for (t, to) in out.chunks_exact_mut(channels).enumerate() {
            k.conv_silu(&rows[t..t + self.taps], weight, to);
            let normed = to.chunks_exact_mut(dim).take(2 * self.n_query);
            for (head, to) in normed.enumerate() {
                let scale = if head < self.n_query {
                    1.0 / (dim as f32).sqrt()
                } else {
                    1.0
                };
                let factor = scale / (k.dot(to, to) + self.eps).sqrt();
                to.iter_mut().for_each(|v| *v *= factor);
            }
        }
        let n = heads.len() / channels;
        (out, rows[n..].concat())
    }
}

pub(super) fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

/// Computes `out = sigmoid(gates) * x`.
pub(super) fn sigmoid_mul(gates: &[f32], x: &[f32], out: &mut [f32]) {
    for ((out, gate), x) in out.iter_mut().zip(gates).zip(x) {
        *out = x / (1.0 + (-gate).exp());
    }
}

fn delta(ops: &Ops, random: &mut Random, sizes: DeltaSizes) -> Result<Outcome, CudaError> {
    let layer = Layer::new(random, sizes);
    let expected = layer.plain();
    let (results, mut outcome) = layer.on_device(ops, &[TOKENS], 1)?;
    outcome.compare(&results.heads, near(&expected.heads));
    outcome.compare(&results.rates, near(&expected.rates));
    outcome.compare(&results.out, near(&expected.out));
    outcome.compare(&results.matrices, near(&expected.matrices));
    outcome.compare_exact(&results.inputs, &expected.inputs);
    // How tokens are split into batches changes no bit, and neither do other texts.
    for (batches, texts) in [(&[1; TOKENS][..], 3), (&[2, 17, 1, 1], 1)] {
        let (apart, quantized) = layer.on_device(ops, batches, texts)?;
        outcome.merge(quantized);
        let pairs = [
            (&apart.heads, &results.heads),
            (&apart.rates, &results.rates),
            (&apart.out, &results.out),
            (&apart.inputs, &results.inputs),
            (&apart.matrices, &results.matrices),
        ];
        pairs
            .into_iter()
            .for_each(|(apart, whole)| outcome.compare_exact(apart, whole));
    }
    Ok(outcome)
}

pub(super) fn near(expected: &[f32]) -> impl Iterator<Item = Expected> + '_ {
    let squares: f64 = expected.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
    let size = (squares / expected.len().max(1) as f64).sqrt();
    expected
        .iter()
        .map(move |v| Expected::within(*v, VALUE_TOLERANCE * f64::from(v.abs()).max(size)))
}
