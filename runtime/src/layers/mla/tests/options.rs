//! Options of latent attention that few models have, on a GPU as on the processor.

use super::*;

/// Returns a layer with options and plain queries, whose low-rank tensors serve as vectors, and rows
/// of the matrix to latents as that of gates.
fn with_options(window: Option<usize>, n_gate: usize, function: GateFunction) -> Layer {
    let mut layer = layer(Case {
        low_rank_queries: false,
        ..PLAIN
    });
    let with_norm = super::layer(PLAIN).spec.q_down.unwrap();
    let (sinks, shared_norm) = (with_norm.norm, with_norm.down.weight);
    let hold = |weights: &mut DenseWeights, id, values: Vec<f32>| {
        let vector = WeightStorage::Vector(values.into_boxed_slice());
        weights.hold(id, TierIdx::FIRST, vector);
    };
    hold(&mut layer.weights, sinks, noise(31, N_HEAD));
    hold(&mut layer.weights, shared_norm, noise(32, ROPE));
    let spec = &mut layer.spec;
    (spec.sinks, spec.shared_norm) = (Some(sinks), Some(shared_norm));
    spec.reach = window.map_or(Reach::All, Reach::Window);
    spec.gate = Some(OutputGate::Separate {
        linear: Linear {
            n_out: n_gate,
            first_row: 2,
            ..spec.kv_down
        },
        function,
    });
    layer
}

#[test]
fn a_gpu_has_sinks_gates_windows_and_norms_of_shared_keys() {
    let x = noise(33, 11 * HIDDEN);
    for (window, n_gate, function) in [
        (None, N_HEAD, GateFunction::Sigmoid),
        (None, N_HEAD * VALUE, GateFunction::Softplus),
        (Some(3), N_HEAD * VALUE, GateFunction::Sigmoid),
        (Some(1), N_HEAD, GateFunction::Softplus),
    ] {
        let layer = with_options(window, n_gate, function);
        let want = absorbed(&layer, KvType::F32, &x, &[11]);
        let want: Vec<f64> = want.iter().map(|v| f64::from(*v)).collect();
        let Layer { weights, spec, .. } = with_options(window, n_gate, function);
        let (norm, mixer) = (spec.kv_norm, Mixer::Mla(spec));
        let (x, batches) = ((&x[..], HIDDEN), [6, 4, 1]);
        let got = mixer_alone(&mixer, norm, EPS, weights, KvType::F32, x, &batches);
        let off = error(&got, &want);
        assert!(off < 1e-10, "{window:?}, {n_gate} {function:?}: {off:e}");
    }
}
