//! The tensors of a network that is known by its shape, in the groups that are placed together.

use super::mix::{Mix, Place, Role};
use super::{Architecture, Attention, Experts, Norms, Table};
use crate::model::shape::DenseKind;

/// A tensor: `copies` matrices of `n_out` rows of `n_in` values.
#[derive(Debug, Clone, Copy)]
pub(super) struct Weight {
    role: Role,
    pub(super) n_in: u64,
    pub(super) n_out: u64,
    pub(super) copies: u64,
}

impl Weight {
    fn matrix(role: Role, n_in: u32, n_out: u32) -> Self {
        Weight {
            role,
            n_in: n_in.into(),
            n_out: n_out.into(),
            copies: 1,
        }
    }

    fn vector(len: u32) -> Self {
        Weight::matrix(Role::Parameters, len, 1)
    }

    pub(super) fn parameters(&self) -> u64 {
        self.n_in * self.n_out * self.copies
    }

    pub(super) fn bytes(&self, mix: Mix, place: &Place) -> u64 {
        let ty = mix.tensor_type(self.role, place, self.n_in);
        // The type fits the row: that is what the mix sees to.
        ty.row_bytes(self.n_in)
            .unwrap_or(self.n_in * size_of::<f32>() as u64)
            * self.n_out
            * self.copies
    }
}

/// Returns a row of a table.
pub(super) fn table_row(table: &Table) -> Weight {
    Weight::matrix(Role::Embedding, table.width, 1)
}

/// Tensors that are placed together: one dense group, or the routed experts of a layer.
pub(super) struct Group {
    /// `None` for routed experts.
    pub(super) kind: Option<DenseKind>,
    pub(super) layer: Option<u32>,
    pub(super) weights: Vec<Weight>,
}

impl Architecture {
    /// Returns every group once, in the order of [`crate::model::spec::ModelSpec::dense_groups`].
    pub(super) fn groups(&self) -> Vec<Group> {
        let hidden = self.hidden;
        let mut groups = Vec::new();
        let mut add = |kind, layer, weights| {
            groups.push(Group {
                kind,
                layer,
                weights,
            })
        };
        if !self.tied {
            let weights = vec![Weight::matrix(Role::Embedding, hidden, self.vocab)];
            add(Some(DenseKind::Embedding), None, weights);
        }
        for layer in 0..self.layers {
            add(
                Some(DenseKind::Attention),
                Some(layer),
                self.attention_weights(layer),
            );
            match self.experts_of(layer) {
                Some(experts) => {
                    let mut router = vec![Weight::vector(hidden)];
                    // Routers are never quantized.
                    router.push(Weight::matrix(Role::Parameters, hidden, experts.count));
                    let biases = [experts.router_bias, experts.selection_bias];
                    router.extend(
                        biases
                            .iter()
                            .filter(|b| **b)
                            .map(|_| Weight::vector(experts.count)),
                    );
                    if experts.hidden != hidden {
                        router.push(Weight::matrix(Role::Other, hidden, experts.hidden));
                        router.push(Weight::matrix(Role::Other, experts.hidden, hidden));
                    }
                    add(Some(DenseKind::Router), Some(layer), router);
                    if experts.shared_ffn > 0 {
                        let mut weights = gated(hidden, experts.shared_ffn, 1, false);
                        ungate(&mut weights, experts);
                        add(Some(DenseKind::SharedExpert), Some(layer), weights);
                    }
                    let mut weights =
                        gated(experts.hidden, experts.ffn, experts.count, experts.bias);
                    ungate(&mut weights, experts);
                    add(None, Some(layer), weights);
                }
                // A layer of its mixer alone.
                None if self.experts.is_some() && layer >= self.leading_dense => {}
                None => {
                    let mut weights = gated(hidden, self.dense_ffn, 1, false);
                    weights.push(Weight::vector(hidden));
                    add(Some(DenseKind::DenseFfn), Some(layer), weights);
                }
            }
        }
        let head = vec![
            Weight::vector(hidden),
            Weight::matrix(Role::Output, hidden, self.vocab),
        ];
        add(Some(DenseKind::Head), None, head);
        groups
    }

    /// Returns the tensors of a layer's attention with the norm before it.
    fn attention_weights(&self, layer: u32) -> Vec<Weight> {
        let hidden = self.hidden;
        let mut weights = vec![Weight::vector(hidden)];
        match *self.attention_of(layer) {
            // As rows of the hidden state's width.
            Attention::Given { parameters, .. } => weights.push(Weight {
                n_out: parameters.div_ceil(hidden.into()),
                ..Weight::matrix(Role::Other, hidden, 0)
            }),
            Attention::Gqa {
                heads,
                kv_heads,
                head,
                value,
                keys_are_values,
                bias,
                output_bias,
                norms,
                sinks,
                ..
            } => {
                let (q, kv, v) = (heads * head, kv_heads * head, kv_heads * value);
                weights.push(Weight::matrix(Role::Query, hidden, q));
                weights.push(Weight::matrix(Role::Key, hidden, kv));
                if !keys_are_values {
                    weights.push(Weight::matrix(Role::Value, hidden, v));
                }
                weights.push(Weight::matrix(Role::AttentionOutput, heads * value, hidden));
                if bias {
                    weights.extend([q, kv, v].map(Weight::vector));
                }
                if output_bias {
                    weights.push(Weight::vector(hidden));
                }
                match norms {
                    Norms::None => {}
                    Norms::Head => weights.extend([head, head].map(Weight::vector)),
                    Norms::Full => weights.extend([q, kv].map(Weight::vector)),
                }
                if sinks {
                    weights.push(Weight::vector(heads));
                }
            }
            Attention::Mla {
                heads,
                q_rank,
                kv_rank,
                nope,
                rope,
                value,
            } => {
                let q = heads * (nope + rope);
                if q_rank > 0 {
                    weights.push(Weight::matrix(Role::Other, hidden, q_rank));
                    weights.push(Weight::vector(q_rank));
                    weights.push(Weight::matrix(Role::Other, q_rank, q));
                } else {
                    weights.push(Weight::matrix(Role::Query, hidden, q));
                }
                weights.push(Weight::matrix(Role::Other, hidden, kv_rank + rope));
                weights.push(Weight::vector(kv_rank));
                // Keys' and values' projections are stacked by head.
                let stacked = |n_in: u32, n_out: u32| Weight {
                    copies: heads.into(),
                    ..Weight::matrix(Role::Other, n_in, n_out)
                };
                weights.push(stacked(nope, kv_rank));
                weights.push(stacked(kv_rank, value));
                weights.push(Weight::matrix(Role::AttentionOutput, heads * value, hidden));
            }
        }
        weights
    }
}

/// Takes the gate away from blocks that have none.
fn ungate(weights: &mut Vec<Weight>, experts: &Experts) {
    if !experts.gated {
        weights.remove(0);
    }
}

/// Returns gate, up, and down of a feed-forward block, or of `copies` stacked ones.
fn gated(hidden: u32, ffn: u32, copies: u32, bias: bool) -> Vec<Weight> {
    let one = |role, n_in: u32, n_out: u32| Weight {
        copies: copies.into(),
        ..Weight::matrix(role, n_in, n_out)
    };
    let (gate, up, down) = if copies > 1 {
        (Role::ExpertGate, Role::ExpertUp, Role::ExpertDown)
    } else {
        (Role::FfnGate, Role::FfnUp, Role::FfnDown)
    };
    let mut weights = vec![
        one(gate, hidden, ffn),
        one(up, hidden, ffn),
        one(down, ffn, hidden),
    ];
    if bias {
        weights.extend([ffn, ffn, hidden].map(|len| one(Role::Parameters, len, 1)));
    }
    weights
}
