//! Experts of several mixes of formats on the GPU emulator, against the plain products of the CPU.

use super::*;
use crate::shim;
use tier_plan_kernels::needs_quants;
use tier_plan_kernels::random::Random;
use tier_plan_kernels::reference::matvec;
use tier_plan_kernels::{Activations, Kernels, Weights};

const HIDDEN: usize = 64;
const FFN: usize = 96;
const N_EXPERT: usize = 4;
const CLAMPED: Activation = Activation::ClampedSwiglu {
    alpha: 1.702,
    limit: 7.0,
};

/// Gate, up and down.
struct Expert {
    bytes: [Vec<u8>; 3],
    biases: [Vec<f32>; 3],
}

fn product(ty: TensorType, bytes: &[u8], bias: &[f32], x: &[f32], biased: bool) -> Vec<f32> {
    let mut acts = Activations::new(1, x.len());
    acts.fill(Kernels::SCALAR, 1, x.len(), x, needs_quants(ty));
    let w = Weights::new(ty, bytes, bias.len(), x.len()).unwrap();
    let add = |((v, _), bias): ((f64, f64), &f32)| v as f32 + if biased { *bias } else { 0.0 };
    matvec(w, &acts, 0).into_iter().zip(bias).map(add).collect()
}

/// Computes an expert's result for `x` on the CPU.
fn plain(
    kind: &ExpertKind,
    Expert { bytes, biases }: &Expert,
    x: &[f32],
    biased: bool,
) -> Vec<f32> {
    let mut gate = product(kind.gate, &bytes[0], &biases[0], x, biased);
    let up = product(kind.up, &bytes[1], &biases[1], x, biased);
    match kind.activation {
        Activation::Silu => Kernels::SCALAR.silu_mul(&mut gate, &up),
        Activation::ClampedSwiglu { alpha, limit } => {
            Kernels::SCALAR.clamped_swiglu(&mut gate, &up, alpha, limit)
        }
        Activation::Situ { beta, linear } => Kernels::SCALAR.situ_mul(&mut gate, &up, beta, linear),
        other => unreachable!("no case has {other:?}"),
    }
    product(kind.down, &bytes[2], &biases[2], &gate, biased)
}

fn near(got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len());
    let squared_error: f64 = got
        .iter()
        .zip(expected)
        .map(|(a, b)| f64::from(a - b).powi(2))
        .sum();
    let squared_norm: f64 = expected.iter().map(|v| f64::from(*v).powi(2)).sum();
    // 8-bit codes may round to the other side.
    assert!(
        squared_error < 1e-5 * squared_norm,
        "{squared_error:e} of {squared_norm:e}"
    );
}

/// Compares a token's experts: fetched, and added to a state on the device.
fn compare(
    gate: TensorType,
    up: TensorType,
    down: TensorType,
    activation: Activation,
    biased: bool,
) {
    let device: Arc<dyn Device> = shim::shared();
    let mut random = Random::new(&format!("{gate} {up} {down}"));
    let kind = ExpertKind {
        n_expert: N_EXPERT,
        hidden: HIDDEN,
        ffn: FFN,
        gate,
        up,
        down,
        activation,
    };
    let experts: Vec<Expert> = (0..N_EXPERT)
        .map(|_| {
            let bytes = [gate, up, down].map(|ty| random.weights(ty, HIDDEN * FFN));
            Expert {
                bytes,
                biases: [FFN, FFN, HIDDEN].map(|n| random.floats(n)),
            }
        })
        .collect();
    let mut here = PinnedExperts::new(Arc::clone(&device), 1).unwrap();
    let pinned: Vec<_> = experts
        .iter()
        .map(
            |Expert {
                 bytes: [gate, up, down],
                 biases: [a, b, c],
             }| {
                let biases = biased.then_some([&a[..], &b[..], &c[..]]);
                ExpertBytes {
                    gate,
                    up,
                    down,
                    biases,
                }
            },
        )
        .enumerate()
        .collect();
    here.add_layer(0, kind, &pinned, 0, biased).unwrap();
    here.reserve(6).unwrap();
    let x = random.activations(HIDDEN);
    let chosen = [3usize, 0, 2];
    here.ask(0, Some(&x), &chosen.map(Place::Pinned)).unwrap();
    let mut got = vec![0.0; 3 * HIDDEN];
    here.fetch(&mut got).unwrap();
    let expected: Vec<Vec<f32>> = chosen
        .iter()
        .map(|e| plain(&kind, &experts[*e], &x, biased))
        .collect();
    near(&got, &expected.concat());
    // The weighted results of two tokens, added to their states on the device.
    let second: Vec<f32> = x.iter().map(|v| 0.5 - v).collect();
    let both = [&x[..], &second[..]].concat();
    let input = Buffer::of_f32(&device, &both).unwrap();
    let weights = [[0.5, -0.25, 0.125], [2.0, 0.75, -0.5]];
    let used = [chosen, [chosen[2], chosen[0], chosen[1]]];
    let which = Buffer::of_i32(
        &device,
        &used
            .as_flattened()
            .iter()
            .map(|e| *e as i32)
            .collect::<Vec<_>>(),
    )
    .unwrap();
    let by = Buffer::of_f32(&device, weights.as_flattened()).unwrap();
    let mut state = random.floats(2 * HIDDEN);
    let on_device = Buffer::of_f32(&device, &state).unwrap();
    let mut quants = Quants::new(&device, 2 * HIDDEN).unwrap();
    assert_eq!(here.takes_quants(0), needs_quants(gate) || needs_quants(up));
    if here.takes_quants(0) {
        Ops::new(Arc::clone(&device))
            .quantize(input.view(), 2, HIDDEN, &mut quants)
            .unwrap();
    }
    let chosen = ChosenExperts {
        input: input.view(),
        quants: &quants,
        which: which.view(),
        weights: by.view(),
        tokens: 2,
        n_used: 3,
    };
    let on_top = Some(on_device.view());
    here.sum_chosen(0, &chosen, on_top, on_device.view())
        .unwrap();
    for (token, state) in state.chunks_exact_mut(HIDDEN).enumerate() {
        let x = &both[token * HIDDEN..][..HIDDEN];
        for (expert, by) in used[token].iter().zip(weights[token]) {
            let result = plain(&kind, &experts[*expert], x, biased);
            Kernels::SCALAR.axpy(by, &result, state);
        }
    }
    near(&on_device.view().to_f32().unwrap(), &state);
}

#[test]
fn experts_of_mixed_formats_match_the_cpu() {
    use TensorType::{F16, F32, Q4_0, Q5_0, Q8_0};
    compare(Q4_0, Q4_0, Q8_0, Activation::Silu, false);
    compare(Q8_0, Q8_0, F16, CLAMPED, true);
    compare(F32, F32, Q4_0, Activation::Silu, true);
    // Gate and up of different formats.
    compare(Q4_0, Q5_0, Q4_0, CLAMPED, true);
    let situ = Activation::Situ {
        beta: 4.0,
        linear: 25.0,
    };
    compare(F16, Q8_0, F32, situ, false);
}
