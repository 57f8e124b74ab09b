//! Kimi delta attention between its matrix products.

use super::Check;
use super::delta::{Convolution, TOKENS, near, sigmoid_mul, softplus};
use super::small::same_quants;
use super::texts::{Text, of_first};
use crate::outcome::Outcome;
use tier_plan_cuda::device::Buffer;
use tier_plan_cuda::ops::{Kda, KdaSizes, Quants, States};
use tier_plan_cuda::{CudaError, Ops};
use tier_plan_formats::model::spec::DecayGate;
use tier_plan_kernels::random::Random;
use tier_plan_kernels::{ChannelDeltaStep, Kernels};

const EPS: f32 = 1e-6;

pub(super) fn checks() -> Vec<Check> {
    let plain = KdaSizes {
        n_head: 2,
        head_dim: 128,
        conv_taps: 4,
        decay_gate: DecayGate::Softplus,
        steepness_negated: true,
        length_eps: 1e-5,
    };
    let bounded = KdaSizes {
        decay_gate: DecayGate::Bounded { bound: -5.0 },
        steepness_negated: false,
        ..plain
    };
    let cases = [
        plain,
        bounded,
        KdaSizes {
            n_head: 3,
            head_dim: 16,
            ..plain
        },
        KdaSizes {
            head_dim: 36,
            conv_taps: 1,
            ..bounded
        },
        KdaSizes {
            n_head: 1,
            head_dim: 256,
            conv_taps: 16,
            ..plain
        },
    ];
    let named = cases.map(|sizes| {
        let how = match sizes.decay_gate {
            DecayGate::Softplus => "",
            DecayGate::Bounded { .. } => ", bounded decays",
        };
        let name = format!(
            "Kimi delta attention, {} heads of {}, {} taps{how}",
            sizes.n_head, sizes.head_dim, sizes.conv_taps
        );
        Check::new(name, move |ops, random| kda(ops, random, sizes))
    });
    named.into()
}

/// A layer's parameters, and the results of its first products for [`TOKENS`] tokens.
struct Layer {
    sizes: KdaSizes,
    /// Queries, keys, and values, `[tokens, width]` each.
    projected: [Vec<f32>; 3],
    /// `[tokens, width]`.
    decays: Vec<f32>,
    /// `[tokens, n_head]`.
    strengths: Vec<f32>,
    /// `[tokens, width]`.
    gates: Vec<f32>,
    conv: Vec<f32>,
    bias: Vec<f32>,
    steepness: Vec<f32>,
    norm: Vec<f32>,
}

/// Results of the layer, and its state after them.
#[derive(Default)]
struct Results {
    heads: Vec<f32>,
    decays: Vec<f32>,
    out: Vec<f32>,
    inputs: Vec<f32>,
    matrices: Vec<f32>,
}

impl Results {
    fn all(&self) -> [&[f32]; 5] {
        [
            &self.heads,
            &self.decays,
            &self.out,
            &self.inputs,
            &self.matrices,
        ]
    }
}

impl Layer {
    fn new(random: &mut Random, sizes: KdaSizes) -> Self {
        let width = sizes.width();
        let mut times = |n: usize, factor: f32| -> Vec<f32> {
            random.floats(n).iter().map(|v| factor * v).collect()
        };
        let sign = if sizes.steepness_negated { -1.0 } else { 1.0 };
        let steepness = times(sizes.n_head, 0.3)
            .iter()
            .map(|v| 0.05 + v.abs())
            .collect::<Vec<_>>();
        let mut decays = times(TOKENS * width, 2.0);
        // Where an exponential overflows, and where nothing decays.
        (decays[0], decays[width]) = (2000.0, -2000.0);
        Self {
            sizes,
            projected: [(); 3].map(|()| times(TOKENS * width, 1.0)),
            decays,
            strengths: times(TOKENS * sizes.n_head, 4.0),
            gates: times(TOKENS * width, 8.0),
            conv: times(3 * width * sizes.conv_taps, 1.0),
            bias: times(width, 1.0),
            steepness: steepness.iter().map(|a| sign * a).collect(),
            norm: times(sizes.head_dim, 1.0),
        }
    }

    /// Returns the decay of an input in a channel.
    fn decay(&self, input: f32, channel: usize) -> f32 {
        let a = self.steepness[channel / self.sizes.head_dim].abs();
        let f = input + self.bias[channel];
        let log = match self.sizes.decay_gate {
            DecayGate::Softplus => -a * softplus(f),
            DecayGate::Bounded { bound } => bound / (1.0 + (-a * f).exp()),
        };
        log.exp()
    }

    /// Computes the layer with the CPU's scalar kernels, a token at a time.
    fn plain(&self) -> Results {
        let (k, s) = (Kernels::SCALAR, self.sizes);
        let (n_head, dim, width) = (s.n_head, s.head_dim, s.width());
        let convolved = Convolution {
            n_query: n_head,
            n_heads: 3 * n_head,
            dim,
            taps: s.conv_taps,
            eps: s.length_eps,
        };
        let row = |t: usize| self.projected.each_ref().map(|p| &p[t * width..][..width]);
        let projected: Vec<f32> = (0..TOKENS).flat_map(|t| row(t).concat()).collect();
        let (heads, inputs) = convolved.plain(&projected, &self.conv);
        let decays = self.decays.iter().enumerate();
        let decays: Vec<f32> = decays.map(|(i, f)| self.decay(*f, i % width)).collect();
        // Columns are independent states; on the device they are rows.
        let mut matrices = vec![0.0; width * dim];
        let mut out = vec![0.0; TOKENS * width];
        for (at, out) in out.chunks_exact_mut(dim).enumerate() {
            let (t, head) = (at / n_head, at % n_head);
            let of_kind = |kind: usize| &heads[((3 * t + kind) * n_head + head) * dim..][..dim];
            let mut read = vec![0.0; dim];
            let columns = matrices[head * dim * dim..][..dim * dim].chunks_exact_mut(dim);
            let values = of_kind(2).iter().zip(read.chunks_exact_mut(1));
            for (column, (value, read)) in columns.zip(values) {
                let step = ChannelDeltaStep {
                    query: of_kind(0),
                    key: of_kind(1),
                    value: std::slice::from_ref(value),
                    decay: &decays[at * dim..][..dim],
                    beta: 1.0 / (1.0 + (-self.strengths[at]).exp()),
                };
                k.channel_delta_step(column, &step, read);
            }
            let mut normed = vec![0.0; dim];
            k.rms_norm(&read, &self.norm, EPS, &mut normed);
            sigmoid_mul(&self.gates[at * dim..][..dim], &normed, out);
        }
        Results {
            heads,
            decays,
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
        let width = s.width();
        let given = |values: &[f32]| Buffer::of_f32(ops.device(), values);
        let buffer = |values: usize| Buffer::new_f32(ops.device(), values);
        // The first token must ignore the state's memory.
        let unset = |n: usize| given(&vec![f32::NAN; n]);
        let (inputs, matrices) = (unset(texts * s.conv_state())?, unset(texts * s.matrices())?);
        let (conv, bias) = (given(&self.conv)?, given(&self.bias)?);
        let (steepness, norm) = (given(&self.steepness)?, given(&self.norm)?);
        let (mut results, mut outcome) = (Results::default(), Outcome::default());
        let mut past = 0;
        for &n in batches {
            let alike = |values: &[f32]| given(&values.repeat(texts));
            let rows = |all: &[f32]| alike(&all[past * width..][..n * width]);
            let [queries, keys, values] = self.projected.each_ref().map(|all| rows(all));
            let (queries, keys, values) = (queries?, keys?, values?);
            let (decays, gates) = (rows(&self.decays)?, rows(&self.gates)?);
            let strengths = alike(&self.strengths[past * s.n_head..][..n * s.n_head])?;
            let text = Text::alike(ops, past, n, texts as u32)?;
            let n = texts * n;
            let (heads, rates) = (buffer(3 * n * width)?, buffer(2 * n * s.n_head)?);
            let out = buffer(n * width)?;
            let quantizes = s.head_dim.is_multiple_of(32);
            let quants = || Quants::new(ops.device(), (n * width).next_multiple_of(32));
            let (mut fused, mut after) = (quants()?, quants()?);
            let kda = Kda {
                tokens: n,
                sizes: s,
                projected: [queries.view(), keys.view(), values.view()],
                decays: decays.view(),
                raw_strengths: strengths.view(),
                gates: gates.view(),
                conv: conv.view(),
                decay_bias: bias.view(),
                steepness: steepness.view(),
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
            ops.kda(&kda, text.runs())?;
            ops.gate_kda(&kda, quantizes.then_some(&mut fused))?;
            if quantizes {
                ops.quantize(out.view(), n, width, &mut after)?;
                outcome.merge(same_quants(&fused, &after)?);
            }
            for (of_all, buffer) in [
                (&mut results.heads, &heads),
                (&mut results.decays, &decays),
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
}

fn kda(ops: &Ops, random: &mut Random, sizes: KdaSizes) -> Result<Outcome, CudaError> {
    let layer = Layer::new(random, sizes);
    let expected = layer.plain();
    let (results, mut outcome) = layer.on_device(ops, &[TOKENS], 1)?;
    for (found, expected) in results.all().into_iter().zip(expected.all()) {
        outcome.compare(found, near(expected));
    }
    outcome.compare_exact(&results.inputs, &expected.inputs);
    // How tokens are split into batches changes no bit, and neither do other texts.
    for (batches, texts) in [(&[1; TOKENS][..], 3), (&[2, 17, 1, 1], 1)] {
        let (apart, quantized) = layer.on_device(ops, batches, texts)?;
        outcome.merge(quantized);
        for (apart, whole) in apart.all().into_iter().zip(results.all()) {
            outcome.compare_exact(apart, whole);
        }
    }
    Ok(outcome)
}
