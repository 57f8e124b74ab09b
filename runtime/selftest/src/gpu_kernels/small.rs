//! Element-wise operations, norms and the router.

use super::Check;
use crate::outcome::{Expected, Outcome};
use tier_plan_cuda::device::Buffer;
use tier_plan_cuda::ops::{AddNorm, Quants, RopeTurns, RouterLogits, RouterSpec, Strided};
use tier_plan_cuda::{CudaError, Ops};
use tier_plan_formats::model::spec::{
    Activation, ExpertLinear, GateFunction, GateUp, Gating, Groups, Linear, MoeSpec, RopeKind,
    RopeScaling, RopeSpec, RouterInput,
};
use tier_plan_kernels::Kernels;
use tier_plan_kernels::random::Random;
use tier_plan_runtime::layers::rope::RopeTable;
use tier_plan_runtime::layers::router::Router;

/// Relative tolerance of a value: exponentials and roots are computed differently.
const VALUE_TOLERANCE: f64 = 4e-6;

pub(super) fn checks() -> Vec<Check> {
    vec![
        Check::new("rms_norm", rms_norm),
        Check::new("rms_norm, copy_rows, with values between", strided),
        Check::new("scale_rows, gate", factors),
        Check::new("add_norm", add_norm),
        Check::new("rope", rope),
        Check::new("activate", activations),
        Check::new("add, add_bias", sums),
        Check::new("sigmoid_gate", sigmoid_gate),
        Check::new("route", route),
    ]
}

fn near(expected: &[f32], least: f32) -> impl Iterator<Item = Expected> + '_ {
    expected
        .iter()
        .map(move |v| Expected::relative(*v, VALUE_TOLERANCE, least))
}

fn rms_norm(ops: &Ops, random: &mut Random) -> Result<Outcome, CudaError> {
    let mut outcome = Outcome::default();
    for (rows, width) in [(1, 64), (3, 128), (2, 1000), (1, 2880)] {
        let (x, weight) = (random.activations(rows * width), random.floats(width));
        let (on_device, weights) = (
            Buffer::of_f32(ops.device(), &x)?,
            Buffer::of_f32(ops.device(), &weight)?,
        );
        let out = Buffer::new_f32(ops.device(), rows * width)?;
        for weight in [Some(&weight), None] {
            let w = weight.map(|_| weights.view());
            ops.rms_norm(on_device.view(), w, rows, width, 1e-6, out.view())?;
            let mut expected = vec![0.0; rows * width];
            for (x, to) in x.chunks_exact(width).zip(expected.chunks_exact_mut(width)) {
                Kernels::SCALAR.rms_norm(x, weight.map_or(&[], |w| w), 1e-6, to);
            }
            outcome.compare(&out.view().to_f32()?, near(&expected, 1e-3));
        }
        // In place.
        ops.rms_norm(on_device.view(), None, rows, width, 1e-6, on_device.view())?;
        outcome.compare_exact(&on_device.view().to_f32()?, &out.view().to_f32()?);
    }
    Ok(outcome)
}

fn strided(ops: &Ops, random: &mut Random) -> Result<Outcome, CudaError> {
    let mut outcome = Outcome::default();
    let (rows, width, from, to) = (5, 48, 70, 64);
    let (x, before, weight) = (
        random.floats(rows * from),
        random.floats(rows * to),
        random.floats(width),
    );
    let (on_device, out) = (
        Buffer::of_f32(ops.device(), &x)?,
        Buffer::of_f32(ops.device(), &before)?,
    );
    let weights = Buffer::of_f32(ops.device(), &weight)?;
    let (mut copied, mut normed) = (before.clone(), before);
    for row in 0..rows {
        let source = &x[row * from..][..width];
        copied[row * to..][..width].copy_from_slice(source);
        Kernels::SCALAR.rms_norm(source, &weight, 1e-6, &mut normed[row * to..][..width]);
    }
    let (x, out) = (
        Strided {
            at: on_device.view(),
            stride: from,
        },
        Strided {
            at: out.view(),
            stride: to,
        },
    );
    ops.copy_rows(x, rows, width, out)?;
    outcome.compare_exact(&out.at.to_f32()?, &copied);
    ops.rms_norm_of(x, Some(weights.view()), rows, width, 1e-6, out)?;
    outcome.compare(&out.at.to_f32()?, near(&normed, 1e-3));
    Ok(outcome)
}

fn factors(ops: &Ops, random: &mut Random) -> Result<Outcome, CudaError> {
    let (rows, width) = (7, 90);
    let (mut x, by) = (random.floats(rows * width), random.floats(rows));
    let gates: Vec<f32> = random
        .floats(rows * width)
        .iter()
        .map(|v| 30.0 * v)
        .collect();
    let on_device = Buffer::of_f32(ops.device(), &x)?;
    let (factors, gate) = (
        Buffer::of_f32(ops.device(), &by)?,
        Buffer::of_f32(ops.device(), &gates)?,
    );
    ops.scale_rows(on_device.view(), factors.view(), rows, width)?;
    x.chunks_exact_mut(width)
        .zip(&by)
        .for_each(|(row, by)| row.iter_mut().for_each(|v| *v *= by));
    let mut outcome = Outcome::default();
    outcome.compare_exact(&on_device.view().to_f32()?, &x);
    ops.scale(on_device.view(), 0.75, rows * width)?;
    x.iter_mut().for_each(|v| *v *= 0.75);
    outcome.compare_exact(&on_device.view().to_f32()?, &x);
    // A gate per value, and one per ten.
    for share in [1, 10] {
        for function in [GateFunction::Sigmoid, GateFunction::Softplus] {
            let on_device = Buffer::of_f32(ops.device(), &x)?;
            ops.gate(on_device.view(), gate.view(), share, function, rows * width)?;
            let factor = |gate: f32| match function {
                GateFunction::Sigmoid => 1.0 / (1.0 + (-gate).exp()),
                GateFunction::Softplus if gate > 20.0 => gate,
                GateFunction::Softplus => gate.exp().ln_1p(),
            };
            let gated = x.iter().enumerate();
            let gated: Vec<f32> = gated.map(|(i, v)| v * factor(gates[i / share])).collect();
            outcome.compare(&on_device.view().to_f32()?, near(&gated, 1e-30));
        }
    }
    Ok(outcome)
}

fn rope(ops: &Ops, random: &mut Random) -> Result<Outcome, CudaError> {
    let mut outcome = Outcome::default();
    let yarn = RopeScaling::Yarn {
        factor: 8.0,
        original_context: 4096.0,
        beta_fast: 32.0,
        beta_slow: 1.0,
        ext: 1.0,
    };
    for kind in [RopeKind::Adjacent, RopeKind::Halves] {
        for (dims, head_dim, scaling) in [
            (64, 64, RopeScaling::None),
            (32, 128, RopeScaling::Linear(4.0)),
            (128, 128, yarn),
        ] {
            let magnitude = if scaling == yarn { 1.2 } else { 1.0 };
            let spec = RopeSpec {
                kind,
                dims,
                base: 1e6,
                scaling,
                magnitude,
                freq_factors: None,
                long_factors: None,
                sections: None,
            };
            let mut table = RopeTable::new(&spec, None);
            let (tokens, heads) = (3, 5);
            table.prepare(std::iter::once(700..700 + tokens));
            let mut x = random.floats(tokens * heads * head_dim);
            let on_device = Buffer::of_f32(ops.device(), &x)?;
            let turns = Buffer::of_f32(ops.device(), &table.turns())?;
            let turns = RopeTurns {
                values: turns.view(),
                kind,
                half: dims / 2,
            };
            ops.rope(on_device.view(), &turns, tokens, heads, head_dim)?;
            for (t, row) in x.chunks_exact_mut(heads * head_dim).enumerate() {
                table.apply(row, head_dim, t);
            }
            outcome.compare(&on_device.view().to_f32()?, near(&x, 1.0));
        }
    }
    Ok(outcome)
}

fn activations(ops: &Ops, random: &mut Random) -> Result<Outcome, CudaError> {
    let mut outcome = Outcome::default();
    for activation in super::ACTIVATIONS {
        outcome.merge(activated(ops, random, activation)?);
    }
    Ok(outcome)
}

fn activated(ops: &Ops, random: &mut Random, activation: Activation) -> Result<Outcome, CudaError> {
    let mut gate: Vec<f32> = random.floats(1000).iter().map(|v| 30.0 * v).collect();
    let mut up: Vec<f32> = random.floats(1000).iter().map(|v| 10.0 * v).collect();
    // Above, below and near every bound, and where an exponential overflows.
    (gate[0], gate[1], gate[2], gate[3], up[4], up[5]) = (7.0, 7.1, -200.0, 0.0, -7.1, 7.1);
    let (g, u) = (
        Buffer::of_f32(ops.device(), &gate)?,
        Buffer::of_f32(ops.device(), &up)?,
    );
    ops.activate(activation, g.view(), u.view(), 1, 999, None)?;
    let last = gate.pop();
    match activation {
        Activation::Silu => Kernels::SCALAR.silu_mul(&mut gate, &up[..999]),
        Activation::ClampedSwiglu { alpha, limit } => {
            Kernels::SCALAR.clamped_swiglu(&mut gate, &up[..999], alpha, limit);
        }
        Activation::ClampedSilu { limit } => {
            gate.iter_mut().for_each(|gate| *gate = gate.min(limit));
            Kernels::SCALAR.limited_silu_mul(&mut gate, &up[..999], limit);
        }
        Activation::LimitedSilu { limit } => {
            Kernels::SCALAR.limited_silu_mul(&mut gate, &up[..999], limit);
        }
        Activation::Gelu => Kernels::SCALAR.gelu_mul(&mut gate, &up[..999]),
        Activation::Situ { beta, linear } => {
            Kernels::SCALAR.situ_mul(&mut gate, &up[..999], beta, linear);
        }
        Activation::SquaredRelu => {
            let square = |(gate, up): (&mut f32, &f32)| *gate = up.max(0.0).powi(2);
            gate.iter_mut().zip(&up[..999]).for_each(square);
        }
    }
    gate.extend(last);
    let mut outcome = Outcome::default();
    outcome.compare(&g.view().to_f32()?, near(&gate, 1e-30));
    // Fused quantization gives the same bits as quantizing afterwards.
    let (mut with, mut after) = (
        Quants::new(ops.device(), 960)?,
        Quants::new(ops.device(), 960)?,
    );
    ops.activate(activation, g.view(), u.view(), 3, 320, Some(&mut with))?;
    ops.quantize(g.view(), 3, 320, &mut after)?;
    outcome.merge(same_quants(&with, &after)?);
    Ok(outcome)
}

/// Compares the quantized results of two kernels.
pub(super) fn same_quants(a: &Quants, b: &Quants) -> Result<Outcome, CudaError> {
    let mut outcome = Outcome::default();
    for (a, b) in [
        (&a.codes, &b.codes),
        (&a.scales, &b.scales),
        (&a.sums, &b.sums),
    ] {
        outcome.compare_exact(&a.view().to_bytes()?, &b.view().to_bytes()?);
    }
    Ok(outcome)
}

fn add_norm(ops: &Ops, random: &mut Random) -> Result<Outcome, CudaError> {
    let mut outcome = Outcome::default();
    for (rows, width) in [(1, 64), (3, 96), (2, 1000), (1, 2880)] {
        let (mut x, more) = (
            random.activations(rows * width),
            random.floats(rows * width),
        );
        let weight = random.floats(width);
        for add in [false, true] {
            let (on_device, weights) = (
                Buffer::of_f32(ops.device(), &x)?,
                Buffer::of_f32(ops.device(), &weight)?,
            );
            let (out, added) = (
                Buffer::new_f32(ops.device(), rows * width)?,
                Buffer::of_f32(ops.device(), &more)?,
            );
            let values = (rows * width).next_multiple_of(32);
            let (mut with, mut after) = (
                Quants::new(ops.device(), values)?,
                Quants::new(ops.device(), values)?,
            );
            let quantized = width.is_multiple_of(32);
            let quants = quantized.then_some(&mut with);
            let norm = AddNorm {
                x: on_device.view(),
                residual: add.then_some(added.view()),
                weight: weights.view(),
                rows,
                width,
                eps: 1e-6,
            };
            ops.add_norm(&norm, out.view(), quants)?;
            if add {
                Kernels::SCALAR.add(&mut x, &more);
            }
            outcome.compare_exact(&on_device.view().to_f32()?, &x);
            let mut expected = vec![0.0; rows * width];
            for (x, to) in x.chunks_exact(width).zip(expected.chunks_exact_mut(width)) {
                Kernels::SCALAR.rms_norm(x, &weight, 1e-6, to);
            }
            outcome.compare(&out.view().to_f32()?, near(&expected, 1e-3));
            if quantized {
                ops.quantize(out.view(), rows, width, &mut after)?;
                outcome.merge(same_quants(&with, &after)?);
            }
        }
    }
    Ok(outcome)
}

fn sums(ops: &Ops, random: &mut Random) -> Result<Outcome, CudaError> {
    let (rows, width) = (5, 77);
    let (mut x, y) = (random.floats(rows * width), random.floats(rows * width));
    let biases = random.floats(3 * width);
    let (a, b) = (
        Buffer::of_f32(ops.device(), &x)?,
        Buffer::of_f32(ops.device(), &y)?,
    );
    ops.add(a.view(), b.view(), rows * width)?;
    ops.add_and_scale(a.view(), b.view(), -0.7, rows * width)?;
    for _ in 0..2 {
        Kernels::SCALAR.add(&mut x, &y);
    }
    x.iter_mut().for_each(|x| *x *= -0.7);
    let bias = Buffer::of_f32(ops.device(), &biases)?;
    let choices = [2, 0, -1, 3, 1];
    let which = Buffer::of_i32(ops.device(), &choices)?;
    ops.add_bias(a.view(), bias.view(), Some(which.view()), rows, width)?;
    ops.add_bias(a.view(), bias.view(), None, rows, width)?;
    for (row, choice) in x.chunks_exact_mut(width).zip(choices) {
        if let Some(bias) = usize::try_from(choice)
            .ok()
            .and_then(|c| biases.chunks_exact(width).nth(c))
        {
            Kernels::SCALAR.add(row, bias);
        }
        Kernels::SCALAR.add(row, &biases[..width]);
    }
    let mut outcome = Outcome::default();
    outcome.compare_exact(&a.view().to_f32()?, &x);
    Ok(outcome)
}

fn sigmoid_gate(ops: &Ops, random: &mut Random) -> Result<Outcome, CudaError> {
    let (rows, n, width) = (3, 300, 70);
    let (gate, x, mut out) = (
        random.floats(n),
        random.floats(rows * n),
        random.floats(rows * width),
    );
    let (g, on_device) = (
        Buffer::of_f32(ops.device(), &gate)?,
        Buffer::of_f32(ops.device(), &x)?,
    );
    let o = Buffer::of_f32(ops.device(), &out)?;
    ops.sigmoid_gate(g.view(), on_device.view(), rows, n, width, o.view())?;
    for (x, out) in x.chunks_exact(n).zip(out.chunks_exact_mut(width)) {
        let factor = 1.0 / (1.0 + (-Kernels::SCALAR.dot(&gate, x)).exp());
        out.iter_mut().for_each(|v| *v *= factor);
    }
    let mut outcome = Outcome::default();
    outcome.compare(&o.view().to_f32()?, near(&out, 1.0));
    Ok(outcome)
}

fn route(ops: &Ops, random: &mut Random) -> Result<Outcome, CudaError> {
    let mut outcome = Outcome::default();
    let plain = RouterSpec {
        n_expert: 128,
        n_used: 8,
        gating: Gating::Softmax,
        groups: None,
        normalize: true,
        scale: 1.0,
    };
    let cases = [
        plain,
        RouterSpec {
            n_expert: 60,
            n_used: 4,
            normalize: false,
            ..plain
        },
        RouterSpec {
            n_expert: 256,
            gating: Gating::Sigmoid,
            groups: Some(Groups { n: 8, kept: 4 }),
            scale: 2.5,
            ..plain
        },
        RouterSpec {
            n_expert: 384,
            gating: Gating::Sigmoid,
            scale: 2.827,
            ..plain
        },
        RouterSpec {
            n_expert: 32,
            n_used: 4,
            gating: Gating::SoftmaxChosen,
            normalize: false,
            ..plain
        },
        RouterSpec {
            n_expert: 32,
            n_used: 3,
            gating: Gating::SigmoidChosen,
            normalize: false,
            ..plain
        },
        RouterSpec {
            n_expert: 1024,
            n_used: 10,
            gating: Gating::SqrtSoftplus,
            ..plain
        },
        RouterSpec {
            n_expert: 3,
            n_used: 3,
            ..plain
        },
    ];
    for r in cases {
        let tokens = 4;
        let mut logits: Vec<f32> = random
            .floats(tokens * r.n_expert)
            .iter()
            .map(|v| 4.0 * v)
            .collect();
        // Equal logits go to the lower index; all logits of the last token are NaN.
        logits[1] = logits[0];
        let last = (tokens - 1) * r.n_expert;
        logits[last..].fill(f32::NAN);
        let (bias, factors) = (random.floats(r.n_expert), random.floats(r.n_expert));
        for bias in [None, Some(&bias)] {
            // Factors where there is a bias, too.
            let factors = bias.map(|_| &factors);
            let on_device = Buffer::of_f32(ops.device(), &logits)?;
            let biases = bias.map(|b| Buffer::of_f32(ops.device(), b)).transpose()?;
            let experts = Buffer::new_f32(ops.device(), tokens * r.n_used)?;
            let weights = Buffer::new_f32(ops.device(), tokens * r.n_used)?;
            let given = factors
                .map(|f| Buffer::of_f32(ops.device(), f))
                .transpose()?;
            let logits_there = RouterLogits {
                logits: on_device.view(),
                bias: biases.as_ref().map(Buffer::view),
                factors: given.as_ref().map(Buffer::view),
                by_token: None,
            };
            ops.route(&r, logits_there, tokens, experts.view(), weights.view())?;
            let (got, got_weights) = (experts.view().to_i32()?, weights.view().to_f32()?);
            for t in 0..tokens {
                let (mut chosen, mut expected) = (vec![0u16; r.n_used], vec![0.0; r.n_used]);
                let row = &logits[t * r.n_expert..][..r.n_expert];
                Router::default().route(
                    &spec(&r),
                    row,
                    bias.map(Vec::as_slice),
                    &mut chosen,
                    &mut expected,
                );
                if let Some(factors) = factors {
                    let of = chosen.iter().map(|expert| factors[usize::from(*expert)]);
                    expected.iter_mut().zip(of).for_each(|(w, f)| *w *= f);
                }
                let chosen: Vec<i32> = chosen.into_iter().map(i32::from).collect();
                let range = t * r.n_used..(t + 1) * r.n_used;
                outcome.compare_exact(&got[range.clone()], &chosen);
                outcome.compare(&got_weights[range], near(&expected, 1e-6));
            }
        }
    }
    Ok(outcome)
}

/// Makes the description of a layer for the CPU's router.
pub(super) fn spec(r: &RouterSpec) -> MoeSpec {
    let one = ExpertLinear {
        weight: 0,
        bias: None,
        n_out: 1,
        n_in: 1,
    };
    MoeSpec {
        router: Linear {
            weight: 0,
            bias: None,
            n_out: r.n_expert,
            n_in: 1,
            first_row: 0,
        },
        router_input: RouterInput::Normed,
        input_norm: None,
        output_norm: None,
        weigh_input: false,
        expert_scale: None,
        sum_scale: 1.0,
        selection_bias: None,
        gating: r.gating,
        n_expert: r.n_expert,
        n_used: r.n_used,
        groups: r.groups,
        normalize: r.normalize,
        scale: r.scale,
        expert_ffn: 1,
        activation: Activation::Silu,
        gate_up: GateUp::Split { gate: one, up: one },
        down: one,
        shared: None,
        by_token: None,
        latent: None,
    }
}
