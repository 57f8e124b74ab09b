//! Mamba-2 between its matrix products.

use super::Check;
use super::small::same_quants;
use super::texts::{Text, of_first};
use crate::outcome::{Expected, Outcome};
use tier_plan_cuda::device::Buffer;
use tier_plan_cuda::ops::{Mamba, MambaSizes, Quants, States};
use tier_plan_cuda::{CudaError, Ops};
use tier_plan_kernels::Kernels;
use tier_plan_kernels::random::Random;

/// Tolerance of a value, relative to itself or to the root mean square of all values: exponentials
/// are computed differently, and sums have another order.
const VALUE_TOLERANCE: f64 = 2e-5;

const EPS: f32 = 1e-5;

/// More tokens than a block loads at once.
const TOKENS: usize = 21;

pub(super) fn checks() -> Vec<Check> {
    let sizes = |n_head, head_dim, n_group, state_dim, conv_taps| MambaSizes {
        n_head,
        head_dim,
        n_group,
        state_dim,
        conv_taps,
    };
    let cases = [
        (sizes(4, 64, 2, 128, 4), true),
        (sizes(6, 20, 3, 16, 4), false),
        // Neither rows nor channels are multiples of what a block takes.
        (sizes(3, 5, 1, 36, 3), true),
        (sizes(2, 33, 2, 256, 1), true),
        (sizes(5, 16, 1, 100, 7), false),
    ];
    let named = cases.map(|(sizes, with_bias)| {
        let MambaSizes {
            n_head,
            head_dim,
            n_group,
            state_dim,
            conv_taps: taps,
        } = sizes;
        let name = format!(
            "mamba, {n_head} heads of {head_dim} in {n_group} groups, states of {state_dim}, {taps} taps"
        );
        Check::new(name, move |ops, random| {
            mamba(ops, &Layer::new(random, sizes, with_bias))
        })
    });
    named.into()
}

/// A layer's parameters, and the results of its first product for [`TOKENS`] tokens.
struct Layer {
    sizes: MambaSizes,
    /// `[tokens, gates, channels, steps]`.
    projected: Vec<f32>,
    conv: Vec<f32>,
    conv_bias: Option<Vec<f32>>,
    dt_bias: Vec<f32>,
    decay: Vec<f32>,
    skip: Vec<f32>,
    norm: Vec<f32>,
}

/// Results of the layer, and its state after them.
#[derive(Default)]
struct Results {
    convolved: Vec<f32>,
    rates: Vec<f32>,
    out: Vec<f32>,
    inputs: Vec<f32>,
    matrices: Vec<f32>,
}

impl Layer {
    fn new(random: &mut Random, sizes: MambaSizes, with_bias: bool) -> Self {
        let (n_head, channels, width) = (sizes.n_head, sizes.channels(), sizes.projected());
        let mut projected = random.floats(TOKENS * width);
        // Where an exponential overflows, and where nothing decays.
        (projected[width - 1], projected[2 * width - 1]) = (200.0, -200.0);
        let decay = random.floats(n_head);
        Self {
            sizes,
            projected,
            conv: random.floats(channels * sizes.conv_taps),
            conv_bias: with_bias.then(|| random.floats(channels)),
            dt_bias: random.floats(n_head),
            decay: decay.iter().map(|v| -0.05 - 0.3 * v.abs()).collect(),
            skip: random.floats(n_head),
            norm: random.floats(sizes.inner()),
        }
    }

    /// Returns the channels of a token's projections.
    fn channels(&self, row: usize) -> &[f32] {
        let s = &self.sizes;
        &self.projected[row * s.projected() + s.inner()..][..s.channels()]
    }

    /// Computes the layer with the CPU's scalar kernels, a token at a time.
    fn plain(&self) -> Results {
        let s = self.sizes;
        let (n_head, channels, taps) = (s.n_head, s.channels(), s.conv_taps);
        let silu = |x: f32| x / (1.0 + (-x).exp());
        let softplus = |x: f32| if x > 20.0 { x } else { x.exp().ln_1p() };
        let before = vec![0.0; channels];
        let rows: Vec<&[f32]> = std::iter::repeat_n(&before[..], taps - 1)
            .chain((0..TOKENS).map(|t| self.channels(t)))
            .collect();
        let mut results = Results {
            inputs: rows[TOKENS..].concat(),
            matrices: vec![0.0; s.matrices()],
            ..Results::default()
        };
        for (t, row) in self.projected.chunks_exact(s.projected()).enumerate() {
            let convolved = (0..channels).map(|c| {
                let seen = rows[t..t + taps].iter().zip(&self.conv[c * taps..]);
                let bias = self.conv_bias.as_ref().map_or(0.0, |bias| bias[c]);
                silu(seen.fold(bias, |sum, (row, weight)| sum + weight * row[c]))
            });
            let convolved: Vec<f32> = convolved.collect();
            let steps = row[s.inner() + channels..].iter().zip(&self.dt_bias);
            let steps = steps.map(|(x, bias)| softplus(x + bias));
            let rates = steps.zip(&self.decay);
            let rates = rates.flat_map(|(step, decay)| [(step * decay).exp(), step]);
            results.rates.extend(rates);
            let rates = &results.rates[2 * t * n_head..];
            let mut read = self.read(&convolved, rates, &mut results.matrices);
            self.gate(row, &mut read);
            results.out.extend(read);
            results.convolved.extend(convolved);
        }
        results
    }

    /// Takes the matrices past a token, and returns what is read of them, `[n_head, head_dim]`.
    fn read(&self, convolved: &[f32], rates: &[f32], matrices: &mut [f32]) -> Vec<f32> {
        let (s, k) = (self.sizes, Kernels::SCALAR);
        let (x, of_groups) = convolved.split_at(s.inner());
        let (b, c) = of_groups.split_at(s.n_group * s.state_dim);
        let rows = matrices.chunks_exact_mut(s.state_dim).zip(x);
        let read = rows.enumerate().map(|(i, (row, x))| {
            let head = i / s.head_dim;
            let group = head / (s.n_head / s.n_group) * s.state_dim;
            let [b, c] = [b, c].map(|all| &all[group..][..s.state_dim]);
            k.axpby(rates[2 * head], row, rates[2 * head + 1] * x, b);
            k.dot(row, c) + self.skip[head] * x
        });
        read.collect()
    }

    /// Multiplies what was read by the silu of its gates, and normalizes each group.
    fn gate(&self, row: &[f32], read: &mut [f32]) {
        let (width, k) = (self.sizes.group_width(), Kernels::SCALAR);
        let mut gated = row[..read.len()].to_vec();
        k.silu_mul(&mut gated, read);
        let groups = read.chunks_exact_mut(width).zip(gated.chunks_exact(width));
        for ((out, gated), norm) in groups.zip(self.norm.chunks_exact(width)) {
            k.rms_norm(gated, norm, EPS, out);
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
        let given = |values: &[f32]| Buffer::of_f32(ops.device(), values);
        let buffer = |values: usize| Buffer::new_f32(ops.device(), values);
        // The first token must ignore the state's memory.
        let inputs = given(&vec![f32::NAN; texts * s.conv_state()])?;
        let matrices = given(&vec![f32::NAN; texts * s.matrices()])?;
        let (conv, norm) = (given(&self.conv)?, given(&self.norm)?);
        let conv_bias = self.conv_bias.as_deref().map(given).transpose()?;
        let (dt_bias, decay) = (given(&self.dt_bias)?, given(&self.decay)?);
        let skip = given(&self.skip)?;
        let (mut results, mut outcome) = (Results::default(), Outcome::default());
        let mut past = 0;
        for &n in batches {
            let rows = past * s.projected()..(past + n) * s.projected();
            let projected = given(&self.projected[rows].repeat(texts))?;
            let text = Text::alike(ops, past, n, texts as u32)?;
            let n = texts * n;
            let (convolved, rates) = (buffer(n * s.channels())?, buffer(2 * n * s.n_head)?);
            let out = buffer(n * s.inner())?;
            let quantizes = s.group_width().is_multiple_of(32);
            let room = (n * s.inner()).next_multiple_of(32);
            let mut quants = Quants::new(ops.device(), room)?;
            let mut after = Quants::new(ops.device(), room)?;
            let mamba = Mamba {
                tokens: n,
                sizes: s,
                projected: projected.view(),
                conv: conv.view(),
                conv_bias: conv_bias.as_ref().map(Buffer::view),
                dt_bias: dt_bias.view(),
                decay: decay.view(),
                skip: skip.view(),
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
                convolved: convolved.view(),
                rates: rates.view(),
                out: out.view(),
            };
            ops.mamba(&mamba, text.runs())?;
            ops.gate_mamba(&mamba, quantizes.then_some(&mut quants))?;
            if quantizes {
                ops.quantize(out.view(), n, s.inner(), &mut after)?;
                outcome.merge(same_quants(&quants, &after)?);
            }
            for (of_all, buffer) in [
                (&mut results.convolved, &convolved),
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
}

fn mamba(ops: &Ops, layer: &Layer) -> Result<Outcome, CudaError> {
    let expected = layer.plain();
    let (results, mut outcome) = layer.on_device(ops, &[TOKENS], 1)?;
    outcome.compare(&results.convolved, near(&expected.convolved));
    outcome.compare(&results.rates, near(&expected.rates));
    outcome.compare(&results.out, near(&expected.out));
    outcome.compare(&results.matrices, near(&expected.matrices));
    outcome.compare_exact(&results.inputs, &expected.inputs);
    // How tokens are split into batches changes no bit, and neither do other texts.
    for (batches, texts) in [(&[1; TOKENS][..], 3), (&[2, 17, 1, 1], 1)] {
        let (apart, quantized) = layer.on_device(ops, batches, texts)?;
        outcome.merge(quantized);
        let pairs = [
            (&apart.convolved, &results.convolved),
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

fn near(expected: &[f32]) -> impl Iterator<Item = Expected> + '_ {
    let squares: f64 = expected.iter().map(|v| f64::from(*v) * f64::from(*v)).sum();
    let size = (squares / expected.len().max(1) as f64).sqrt();
    expected
        .iter()
        .map(move |v| Expected::within(*v, VALUE_TOLERANCE * f64::from(v.abs()).max(size)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::Arc;
    use tier_plan_cuda::device::View;
    use tier_plan_cuda::{Device, shim};

    const SIZES: MambaSizes = MambaSizes {
        n_head: 2,
        head_dim: 3,
        n_group: 1,
        state_dim: 4,
        conv_taps: 2,
    };

    /// Runs a layer on two tokens after it was changed. Every buffer is as long as it has to be.
    fn run(change: impl Fn(&mut Mamba<'_>)) -> bool {
        let device: Arc<dyn Device> = shim::shared();
        let (ops, n) = (Ops::new(Arc::clone(&device)), 2);
        let (channels, inner, n_head) = (SIZES.channels(), SIZES.inner(), SIZES.n_head);
        let zeros = |n: usize| Buffer::of_f32(&device, &vec![0.0; n]).unwrap();
        let [projected, conv, conv_bias] =
            [n * SIZES.projected(), 2 * channels, channels].map(zeros);
        let [dt_bias, decay, skip] = [n_head; 3].map(zeros);
        let [norm, out] = [inner, n * inner].map(zeros);
        let [inputs, matrices] = [channels, inner * SIZES.state_dim].map(zeros);
        let [convolved, rates] = [n * channels, 2 * n * n_head].map(zeros);
        let text = Text::new(&ops, 0, n).unwrap();
        let mut mamba = Mamba {
            tokens: n,
            sizes: SIZES,
            projected: projected.view(),
            conv: conv.view(),
            conv_bias: Some(conv_bias.view()),
            dt_bias: dt_bias.view(),
            decay: decay.view(),
            skip: skip.view(),
            norm: norm.view(),
            eps: EPS,
            inputs: States {
                all: inputs.view(),
                each: SIZES.conv_state(),
            },
            matrices: States {
                all: matrices.view(),
                each: SIZES.matrices(),
            },
            convolved: convolved.view(),
            rates: rates.view(),
            out: out.view(),
        };
        change(&mut mamba);
        let ran = AssertUnwindSafe(|| {
            ops.mamba(&mamba, text.runs()).unwrap();
            ops.gate_mamba(&mamba, None).unwrap();
        });
        catch_unwind(ran).is_ok()
    }

    #[test]
    fn buffers_that_are_too_short_and_sizes_without_a_kernel_are_refused() {
        assert!(run(|_| {}));
        let shorten = |view: &mut View<'_>| *view = view.floats(0..view.words() - 1);
        assert!(!run(|m| shorten(&mut m.projected)));
        assert!(!run(|m| shorten(&mut m.conv)));
        assert!(!run(|m| m.conv_bias.iter_mut().for_each(shorten)));
        assert!(!run(|m| shorten(&mut m.dt_bias)));
        assert!(!run(|m| shorten(&mut m.decay)));
        assert!(!run(|m| shorten(&mut m.skip)));
        assert!(!run(|m| shorten(&mut m.norm)));
        assert!(!run(|m| shorten(&mut m.inputs.all)));
        assert!(!run(|m| shorten(&mut m.matrices.all)));
        assert!(!run(|m| shorten(&mut m.convolved)));
        assert!(!run(|m| shorten(&mut m.rates)));
        assert!(!run(|m| shorten(&mut m.out)));
        assert!(!run(|m| m.inputs.each += 1));
        assert!(!run(|m| m.matrices.each -= 1));
        assert!(!run(|m| m.tokens = 1));
        assert!(!run(|m| m.sizes.state_dim = 3));
        assert!(!run(|m| m.sizes.state_dim = 260));
        assert!(!run(|m| m.sizes.n_group = 3));
        assert!(!run(|m| m.sizes.n_group = 0));
        assert!(!run(|m| m.sizes.conv_taps = 0));
    }
}
