//! The router: from logits to the chosen experts and their weights.

use tier_plan_formats::model::spec::{Gating, Groups, MoeSpec};

/// Lower bound of the sum that chosen weights are divided by.
const MIN_SUM: f32 = 6.103_515_6e-5;

/// Chooses experts, one token at a time; holds the buffers for that.
#[derive(Default)]
pub struct Router {
    probs: Vec<f32>,
    scores: Vec<f32>,
    groups: Vec<(f32, usize)>,
}

impl Router {
    /// Chooses experts for one token: `experts` and `weights` have `n_used` entries, largest score
    /// first.
    ///
    /// `bias` is added for the choice only. Equal scores go to the lower index.
    pub fn route(
        &mut self,
        moe: &MoeSpec,
        logits: &[f32],
        bias: Option<&[f32]>,
        experts: &mut [u16],
        weights: &mut [f32],
    ) {
        self.rate(moe, logits);
        self.scores.clear();
        self.scores.extend_from_slice(&self.probs);
        if let Some(bias) = bias {
            self.scores.iter_mut().zip(bias).for_each(|(s, b)| *s += b);
        }
        if let Some(groups) = moe.groups {
            self.keep_best_groups(groups);
        }
        top(&self.scores, experts);
        self.weigh(moe, experts, weights);
    }

    /// Writes the weights that the router gives to experts which something else has chosen.
    pub fn weigh_chosen(
        &mut self,
        moe: &MoeSpec,
        logits: &[f32],
        experts: &[u16],
        weights: &mut [f32],
    ) {
        self.rate(moe, logits);
        self.weigh(moe, experts, weights);
    }

    /// Turns logits into probabilities, except where the choice comes first.
    fn rate(&mut self, moe: &MoeSpec, logits: &[f32]) {
        self.probs.clear();
        match moe.gating {
            Gating::Softmax => {
                let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                self.probs.extend(logits.iter().map(|l| (l - max).exp()));
                let sum: f32 = self.probs.iter().sum();
                self.probs.iter_mut().for_each(|p| *p /= sum);
            }
            Gating::Sigmoid => self
                .probs
                .extend(logits.iter().map(|l| 1.0 / (1.0 + (-l).exp()))),
            Gating::SqrtSoftplus => self
                .probs
                .extend(logits.iter().map(|l| softplus(*l).sqrt())),
            Gating::SoftmaxChosen | Gating::SigmoidChosen => {
                self.probs.extend_from_slice(logits);
            }
        }
    }

    fn weigh(&self, moe: &MoeSpec, experts: &[u16], weights: &mut [f32]) {
        for (weight, expert) in weights.iter_mut().zip(experts.iter()) {
            *weight = self.probs[usize::from(*expert)];
        }
        if moe.gating == Gating::SoftmaxChosen {
            let max = weights.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            weights.iter_mut().for_each(|w| *w = (*w - max).exp());
            let sum: f32 = weights.iter().sum();
            weights.iter_mut().for_each(|w| *w /= sum);
        }
        if moe.gating == Gating::SigmoidChosen {
            weights
                .iter_mut()
                .for_each(|w| *w = 1.0 / (1.0 + (-*w).exp()));
        }
        if moe.normalize {
            let sum = weights.iter().sum::<f32>().max(MIN_SUM);
            weights.iter_mut().for_each(|w| *w /= sum);
        }
        if moe.scale != 1.0 {
            weights.iter_mut().for_each(|w| *w *= moe.scale);
        }
    }

    /// Rules out the experts of all but the best groups. A group's score is the sum of its two best
    /// experts.
    fn keep_best_groups(&mut self, groups: Groups) {
        let size = self.scores.len() / groups.n;
        self.groups.clear();
        for (index, group) in self.scores.chunks_exact(size).enumerate() {
            let (mut first, mut second) = (f32::NEG_INFINITY, f32::NEG_INFINITY);
            for &score in group {
                if score > first {
                    (first, second) = (score, first);
                } else if score > second {
                    second = score;
                }
            }
            self.groups.push((first + second, index));
        }
        self.groups
            .sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
        for &(_, index) in &self.groups[groups.kept..] {
            self.scores[index * size..(index + 1) * size].fill(f32::NEG_INFINITY);
        }
    }
}

/// Returns `ln(1 + e^x)` without overflow.
fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

/// Writes the indices of the largest scores in descending order; NaN counts as smallest.
fn top(scores: &[f32], chosen: &mut [u16]) {
    let key = |i: u16| {
        let score = scores[usize::from(i)];
        if score.is_nan() {
            f32::NEG_INFINITY
        } else {
            score
        }
    };
    let mut n = 0;
    for i in 0..scores.len() as u16 {
        let score = key(i);
        if n == chosen.len() && score <= key(chosen[n - 1]) {
            continue;
        }
        if n < chosen.len() {
            n += 1;
        }
        let mut at = n - 1;
        while at > 0 && key(chosen[at - 1]) < score {
            chosen[at] = chosen[at - 1];
            at -= 1;
        }
        chosen[at] = i;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tier_plan_formats::model::spec::{Activation, ExpertLinear, GateUp, Linear, RouterInput};

    fn moe(n_expert: usize, n_used: usize) -> MoeSpec {
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
                n_out: n_expert,
                n_in: 1,
                first_row: 0,
            },
            router_input: RouterInput::Normed,
            input_norm: None,
            output_norm: None,
            weigh_input: false,
            expert_scale: None,
            sum_scale: 1.0,
            by_token: None,
            latent: None,
            selection_bias: None,
            gating: Gating::Softmax,
            n_expert,
            n_used,
            groups: None,
            normalize: true,
            scale: 1.0,
            expert_ffn: 1,
            activation: Activation::Silu,
            gate_up: GateUp::Split { gate: one, up: one },
            down: one,
            shared: None,
        }
    }

    fn route(moe: &MoeSpec, logits: &[f32], bias: Option<&[f32]>) -> (Vec<u16>, Vec<f32>) {
        let (mut e, mut w) = (vec![0; moe.n_used], vec![0.0; moe.n_used]);
        Router::default().route(moe, logits, bias, &mut e, &mut w);
        (e, w)
    }

    #[test]
    fn softmax_weights_of_the_chosen_sum_to_one() {
        let (experts, weights) = route(&moe(4, 2), &[0.0, 2.0, 1.0, 2.0], None);
        assert_eq!(experts, [1, 3]);
        assert!((weights[0] - 0.5).abs() < 1e-6 && (weights[1] - 0.5).abs() < 1e-6);
    }

    #[test]
    fn the_bias_changes_the_choice_but_not_the_weights() {
        let spec = MoeSpec {
            gating: Gating::Sigmoid,
            normalize: false,
            scale: 2.0,
            ..moe(3, 1)
        };
        let (experts, weights) = route(&spec, &[3.0, 0.0, 0.0], Some(&[0.0, 0.0, 1.0]));
        assert_eq!(experts, [2]);
        assert!((weights[0] - 1.0).abs() < 1e-6);
    }

    #[test]
    fn experts_outside_the_best_groups_are_not_chosen() {
        // Group 0 has the single best expert, group 1 the best pair.
        let spec = MoeSpec {
            groups: Some(Groups { n: 2, kept: 1 }),
            gating: Gating::Sigmoid,
            ..moe(4, 2)
        };
        let (experts, _) = route(&spec, &[2.0, -9.0, 1.0, 1.5], None);
        assert_eq!(experts, [3, 2]);
    }

    #[test]
    fn softmax_over_the_chosen_sums_to_one_and_follows_the_logits() {
        let spec = MoeSpec {
            gating: Gating::SoftmaxChosen,
            normalize: false,
            ..moe(4, 2)
        };
        let (experts, weights) = route(&spec, &[1.0, 3.0, -2.0, 2.0], None);
        assert_eq!(experts, [1, 3]);
        assert!((weights[0] + weights[1] - 1.0).abs() < 1e-6);
        assert!((weights[0] / weights[1] - 1f32.exp()).abs() < 1e-5);
    }

    #[test]
    fn the_sigmoid_of_a_chosen_logit_is_the_weight() {
        let spec = MoeSpec {
            gating: Gating::SigmoidChosen,
            normalize: false,
            ..moe(4, 2)
        };
        // The sigmoids of the first two are equal in 32 bits, the logits are not.
        let (experts, weights) = route(&spec, &[40.0, 50.0, 0.5, -1.0], None);
        assert_eq!((experts, weights), (vec![1, 0], vec![1.0, 1.0]));
        let (experts, weights) = route(&spec, &[0.0, -1.0, -2.0, -3.0], None);
        assert_eq!((experts, weights[0]), (vec![0, 1], 0.5));
        assert!((weights[1] - 1.0 / (1.0 + 1f32.exp())).abs() < 1e-6);
    }

    #[test]
    fn the_root_of_the_softplus_is_the_weight() {
        let spec = MoeSpec {
            gating: Gating::SqrtSoftplus,
            normalize: false,
            ..moe(3, 3)
        };
        let (experts, weights) = route(&spec, &[0.0, 100.0, -1.0], None);
        assert_eq!(experts, [1, 0, 2]);
        let expected = [10.0, 2f32.ln().sqrt(), (-1f32).exp().ln_1p().sqrt()];
        assert!(
            weights
                .iter()
                .zip(expected)
                .all(|(w, e)| (w - e).abs() < 1e-6),
            "{weights:?}"
        );
    }

    #[test]
    fn nan_logits_do_not_panic() {
        let (experts, _) = route(&moe(3, 3), &[f32::NAN; 3], None);
        assert_eq!(experts, [0, 1, 2]);
    }
}
