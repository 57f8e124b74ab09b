//! Routers that weigh experts which tokens have chosen.

use super::Check;
use super::small::spec;
use crate::outcome::{Expected, Outcome};
use tier_plan_cuda::device::Buffer;
use tier_plan_cuda::ops::{ChosenByToken, RouterLogits, RouterSpec};
use tier_plan_cuda::{CudaError, Ops};
use tier_plan_formats::model::spec::Gating;
use tier_plan_kernels::random::Random;
use tier_plan_runtime::layers::router::Router;

/// Relative tolerance of a weight: exponentials and roots are computed differently.
const TOLERANCE: f64 = 4e-6;

pub(super) fn checks() -> Vec<Check> {
    vec![Check::new("route, experts chosen by tokens", route)]
}

fn route(ops: &Ops, random: &mut Random) -> Result<Outcome, CudaError> {
    let mut outcome = Outcome::default();
    let plain = RouterSpec {
        n_expert: 256,
        n_used: 6,
        gating: Gating::SqrtSoftplus,
        groups: None,
        normalize: true,
        scale: 1.5,
    };
    let cases = [
        plain,
        RouterSpec {
            n_expert: 200,
            n_used: 150,
            gating: Gating::Softmax,
            ..plain
        },
        RouterSpec {
            n_expert: 6,
            n_used: 2,
            gating: Gating::SoftmaxChosen,
            normalize: false,
            ..plain
        },
    ];
    let (n_ids, ids) = (50, [49, 0, 7, 7]);
    for r in cases {
        let tokens = ids.len();
        // Different experts of each token, in no order.
        let mut table = Vec::new();
        for _ in 0..n_ids {
            let first = random.next_u64() as usize % r.n_expert;
            table.extend((0..r.n_used).map(|k| ((first + r.n_expert - k) % r.n_expert) as i32));
        }
        let (logits, factors) = (
            random.floats(tokens * r.n_expert),
            random.floats(r.n_expert),
        );
        let on_device = Buffer::of_f32(ops.device(), &logits)?;
        let of_experts = Buffer::of_f32(ops.device(), &factors)?;
        let (choices, rows) = (
            Buffer::of_i32(ops.device(), &table)?,
            Buffer::of_i32(ops.device(), &ids)?,
        );
        let experts = Buffer::new_f32(ops.device(), tokens * r.n_used)?;
        let weights = Buffer::new_f32(ops.device(), tokens * r.n_used)?;
        let logits_there = RouterLogits {
            logits: on_device.view(),
            bias: None,
            factors: Some(of_experts.view()),
            by_token: Some(ChosenByToken {
                table: choices.view(),
                ids: rows.view(),
            }),
        };
        ops.route(&r, logits_there, tokens, experts.view(), weights.view())?;
        let (got, got_weights) = (experts.view().to_i32()?, weights.view().to_f32()?);
        for (t, id) in ids.into_iter().enumerate() {
            let chosen = &table[id as usize * r.n_used..][..r.n_used];
            let as_chosen: Vec<u16> = chosen.iter().map(|e| *e as u16).collect();
            let row = &logits[t * r.n_expert..][..r.n_expert];
            let mut expected = vec![0.0; r.n_used];
            Router::default().weigh_chosen(&spec(&r), row, &as_chosen, &mut expected);
            let of = chosen.iter().map(|e| factors[*e as usize]);
            expected.iter_mut().zip(of).for_each(|(w, f)| *w *= f);
            let range = t * r.n_used..(t + 1) * r.n_used;
            outcome.compare_exact(&got[range.clone()], chosen);
            let near = |v: &f32| Expected::relative(*v, TOLERANCE, 1e-6);
            outcome.compare(&got_weights[range], expected.iter().map(near));
        }
    }
    Ok(outcome)
}
