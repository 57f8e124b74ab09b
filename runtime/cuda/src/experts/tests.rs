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

/// Computes an expert's weighted result for `x` on the CPU.
fn plain(
    kind: &ExpertKind,
    Expert { bytes, biases }: &Expert,
    (x, weight): (&[f32], f32),
    biased: bool,
) -> Vec<f32> {
    let factor = if kind.weigh_input { weight } else { 1.0 };
    let first = |ty: TensorType, i: usize| {
        let mut values = product(ty, &bytes[i], &biases[i], x, false);
        for (value, bias) in values.iter_mut().zip(&biases[i]) {
            *value = *value * factor + if biased { *bias } else { 0.0 };
        }
        values
    };
    let up = first(kind.up, 1);
    let mut gate = kind.gate.map_or_else(|| up.clone(), |ty| first(ty, 0));
    match kind.activation {
        Activation::SquaredRelu => gate = up.iter().map(|v| v.max(0.0).powi(2)).collect(),
        Activation::Silu => Kernels::SCALAR.silu_mul(&mut gate, &up),
        Activation::ClampedSwiglu { alpha, limit } => {
            Kernels::SCALAR.clamped_swiglu(&mut gate, &up, alpha, limit)
        }
        Activation::Situ { beta, linear } => Kernels::SCALAR.situ_mul(&mut gate, &up, beta, linear),
        other => unreachable!("no case has {other:?}"),
    }
    let mut result = product(kind.down, &bytes[2], &biases[2], &gate, biased);
    if !kind.weigh_input {
        result.iter_mut().for_each(|v| *v *= weight);
    }
    result
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

/// Makes experts of a kind.
fn random_experts(random: &mut Random, kind: &ExpertKind) -> Vec<Expert> {
    let types = [kind.gate.unwrap_or(kind.up), kind.up, kind.down];
    let expert = |_| Expert {
        bytes: types.map(|ty| random.weights(ty, HIDDEN * FFN)),
        biases: [FFN, FFN, HIDDEN].map(|n| random.floats(n)),
    };
    (0..N_EXPERT).map(expert).collect()
}

impl Expert {
    fn on_device(&self, kind: &ExpertKind, biased: bool) -> ExpertBytes<'_> {
        let [gate, up, down] = self.bytes.each_ref().map(Vec::as_slice);
        let biases = self.biases.each_ref().map(Vec::as_slice);
        ExpertBytes {
            gate: kind.gate.map(|_| gate),
            up,
            down,
            biases: biased.then_some(biases),
        }
    }
}

/// Compares a token's experts: fetched, with many rows each, and added to a state on the device.
fn compare(kind: ExpertKind, biased: bool) {
    let device: Arc<dyn Device> = shim::shared();
    let mut random = Random::new(&format!("{:?} {} {}", kind.gate, kind.up, kind.down));
    let experts = random_experts(&mut random, &kind);
    let mut here = PinnedExperts::new(Arc::clone(&device), 1).unwrap();
    let pinned = experts.iter().map(|expert| expert.on_device(&kind, biased));
    let pinned: Vec<_> = pinned.enumerate().collect();
    here.add_layer(0, kind, &pinned, 0, biased).unwrap();
    here.reserve(12).unwrap();
    let x = random.activations(HIDDEN);
    let chosen = [3usize, 0, 2];
    let weights = [[0.5, -0.25, 0.125], [2.0, 0.75, -0.5]];
    // What is fetched is not weighted yet, unless the weights are on what experts read.
    let fetched = |expert: usize, x: &[f32], weight: f32| {
        let weight = if kind.weigh_input { weight } else { 1.0 };
        plain(&kind, &experts[expert], (x, weight), biased)
    };
    let request = RequestedExperts {
        places: &chosen.map(Place::Pinned),
        weights: &weights[0],
    };
    here.ask(0, Some(&x), request).unwrap();
    let mut got = vec![0.0; 3 * HIDDEN];
    here.fetch(&mut got).unwrap();
    let results = chosen.iter().zip(weights[0]);
    let expected: Vec<Vec<f32>> = results.map(|(e, by)| fetched(*e, &x, by)).collect();
    near(&got, &expected.concat());
    // Enough rows for products of many.
    let rows: Vec<f32> = (0..12).flat_map(|_| random.activations(HIDDEN)).collect();
    let places: Vec<usize> = [[1; 9].as_slice(), &[2; 3]].concat();
    let by: Vec<f32> = (0..12).map(|i| 1.5 - 0.25 * i as f32).collect();
    let request = RequestedExperts {
        places: &places.iter().map(|e| Place::Pinned(*e)).collect::<Vec<_>>(),
        weights: &by,
    };
    here.ask(0, Some(&rows), request).unwrap();
    let mut got = vec![0.0; 12 * HIDDEN];
    here.fetch(&mut got).unwrap();
    let rows = rows.chunks_exact(HIDDEN).zip(places.iter().zip(by));
    let expected: Vec<Vec<f32>> = rows.map(|(x, (e, by))| fetched(*e, x, by)).collect();
    near(&got, &expected.concat());
    // The weighted results of two tokens, added to their states on the device.
    let second: Vec<f32> = x.iter().map(|v| 0.5 - v).collect();
    let both = [&x[..], &second[..]].concat();
    let input = Buffer::of_f32(&device, &both).unwrap();
    let used = [chosen, [chosen[2], chosen[0], chosen[1]]];
    let which: Vec<i32> = used.as_flattened().iter().map(|e| *e as i32).collect();
    let which = Buffer::of_i32(&device, &which).unwrap();
    let by = Buffer::of_f32(&device, weights.as_flattened()).unwrap();
    let mut state = random.floats(2 * HIDDEN);
    let on_device = Buffer::of_f32(&device, &state).unwrap();
    let mut quants = Quants::new(&device, 2 * HIDDEN).unwrap();
    let takes_quants = needs_quants(kind.up) || kind.gate.is_some_and(needs_quants);
    assert_eq!(here.takes_quants(0), takes_quants);
    if takes_quants {
        let ops = Ops::new(Arc::clone(&device));
        ops.quantize(input.view(), 2, HIDDEN, &mut quants).unwrap();
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
            let result = plain(&kind, &experts[*expert], (x, by), biased);
            Kernels::SCALAR.add(state, &result);
        }
    }
    near(&on_device.view().to_f32().unwrap(), &state);
}

fn kind(types: [TensorType; 3], activation: Activation) -> ExpertKind {
    let [gate, up, down] = types;
    ExpertKind {
        n_expert: N_EXPERT,
        hidden: HIDDEN,
        ffn: FFN,
        gate: Some(gate),
        up,
        down,
        activation,
        weigh_input: false,
    }
}

#[test]
fn experts_of_mixed_formats_match_the_cpu() {
    use TensorType::{F16, F32, Q4_0, Q5_0, Q8_0};
    compare(kind([Q4_0, Q4_0, Q8_0], Activation::Silu), false);
    compare(kind([Q8_0, Q8_0, F16], CLAMPED), true);
    compare(kind([F32, F32, Q4_0], Activation::Silu), true);
    // Gate and up of different formats.
    compare(kind([Q4_0, Q5_0, Q4_0], CLAMPED), true);
    let situ = Activation::Situ {
        beta: 4.0,
        linear: 25.0,
    };
    compare(kind([F16, Q8_0, F32], situ), false);
}

#[test]
fn experts_without_a_gate_match_the_cpu() {
    use TensorType::{F16, F32, Q4_0, Q8_0};
    for (types, biased) in [([F32, F16, Q4_0], false), ([F32, Q4_0, Q8_0], true)] {
        let gated = kind(types, Activation::SquaredRelu);
        compare(
            ExpertKind {
                gate: None,
                ..gated
            },
            biased,
        );
        compare(gated, biased);
    }
}

#[test]
fn weights_on_what_experts_read_match_the_cpu() {
    use TensorType::{F16, Q4_0, Q5_0, Q8_0};
    for (types, biased) in [
        ([F16, F16, Q8_0], false),
        ([Q4_0, Q4_0, Q4_0], true),
        ([Q4_0, Q5_0, F16], true),
    ] {
        compare(
            ExpertKind {
                weigh_input: true,
                ..kind(types, Activation::Silu)
            },
            biased,
        );
    }
}

/// Whatever was exchanged before, pinned experts are computed with their own matrices and biases.
#[test]
fn pins_become_those_of_other_experts() {
    let device: Arc<dyn Device> = shim::shared();
    let gated = kind(
        [TensorType::Q4_0, TensorType::Q8_0, TensorType::F16],
        CLAMPED,
    );
    let plain_kind = ExpertKind {
        gate: None,
        ..kind([TensorType::Q4_0; 3], Activation::SquaredRelu)
    };
    for (kind, biased) in [(gated, true), (plain_kind, false)] {
        let mut random = Random::new("exchanged");
        let experts = random_experts(&mut random, &kind);
        let mut here = PinnedExperts::new(Arc::clone(&device), 1).unwrap();
        let bytes = |expert: usize| experts[expert].on_device(&kind, biased);
        let mut pinned = vec![3, 0];
        let pins: Vec<_> = pinned.iter().map(|e| (*e, bytes(*e))).collect();
        here.add_layer(0, kind, &pins, 1, biased).unwrap();
        here.reserve(2).unwrap();
        let held = here.bytes();
        for _ in 0..12 {
            let (at, comes) = (random.below(2), random.below(4));
            if pinned.contains(&comes) {
                continue;
            }
            let leaves = std::mem::replace(&mut pinned[at], comes);
            here.unpin(0, leaves).unwrap();
            assert_eq!(here.n_free_pins(0), 1);
            here.pin(0, comes, &bytes(comes)).unwrap();
            assert_eq!(here.n_free_pins(0), 0);
            assert!(here.has(0, comes) && !here.has(0, leaves));
            for expert in &pinned {
                let [gate, up, down] = &experts[*expert].bytes;
                let gate = kind.gate.map_or(&[][..], |_| gate);
                let found = here.bytes_in(0, Place::Pinned(*expert)).unwrap();
                assert!(found == [gate, up, down].concat());
            }
            let x = random.activations(HIDDEN);
            let request = RequestedExperts {
                places: &[pinned[0], pinned[1]].map(Place::Pinned),
                weights: &[1.0; 2],
            };
            here.ask(0, Some(&x), request).unwrap();
            let mut got = vec![0.0; 2 * HIDDEN];
            here.fetch(&mut got).unwrap();
            let result = |e: &usize| plain(&kind, &experts[*e], (&x, 1.0), biased);
            near(&got, &pinned.iter().flat_map(result).collect::<Vec<_>>());
        }
        assert_eq!(here.bytes(), held);
    }
}

#[test]
#[should_panic(expected = "no memory for one more pin")]
fn a_layer_has_no_more_pins_than_it_began_with() {
    let kind = kind([TensorType::F32; 3], Activation::Silu);
    let experts = random_experts(&mut Random::new("no pin"), &kind);
    let bytes = |expert: usize| experts[expert].on_device(&kind, false);
    let mut here = PinnedExperts::new(shim::shared(), 1).unwrap();
    here.add_layer(0, kind, &[(0, bytes(0))], 0, false).unwrap();
    here.unpin(0, 2).unwrap();
    let _ = here.pin(0, 3, &bytes(3));
}

#[test]
#[should_panic(expected = "the gate of an expert")]
fn an_expert_without_its_gate_is_refused() {
    let device: Arc<dyn Device> = shim::shared();
    let kind = kind([TensorType::F32; 3], Activation::Silu);
    let experts = random_experts(&mut Random::new("no gate"), &kind);
    let mut expert = experts[0].on_device(&kind, false);
    expert.gate = None;
    let mut here = PinnedExperts::new(device, 1).unwrap();
    let _ = here.add_layer(0, kind, &[(0, expert)], 0, false);
}
