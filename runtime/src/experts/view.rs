//! Borrowed views of one expert's matrices: in a slot, in staging, in an arena, or in the mapped
//! file.

use crate::layers::cpu_context::add_bias;
use tier_plan_cuda::experts::{ExpertBytes, ExpertKind};
use tier_plan_formats::model::spec::MoeSpec;
use tier_plan_kernels::Weights;
use tier_plan_kernels::quant::{TensorType, dequantize_row};

/// The matrices of one expert.
#[derive(Clone, Copy)]
pub(crate) struct ExpertView<'a> {
    /// `[expert_ffn, hidden]`; `up` once more in an expert without a gate.
    pub gate: ViewLinear<'a>,
    /// Whether there is a gate.
    pub is_gated: bool,
    /// `[expert_ffn, hidden]`.
    pub up: ViewLinear<'a>,
    /// `[hidden, expert_ffn]`.
    pub down: ViewLinear<'a>,
}

/// A matrix of one expert with its bias, if it has one.
#[derive(Clone, Copy)]
pub(crate) struct ViewLinear<'a> {
    pub weights: Weights<'a>,
    pub bias: Option<Bias<'a>>,
}

impl<'a> ExpertView<'a> {
    /// Returns the bytes that a GPU takes, with the expert's [biases](Self::biases).
    pub(crate) fn bytes(&self, biases: Option<&'a [Vec<f32>; 3]>) -> ExpertBytes<'a> {
        let [gate, up, down] = [self.gate, self.up, self.down].map(|l| l.weights.bytes());
        ExpertBytes {
            gate: self.is_gated.then_some(gate),
            up,
            down,
            biases: biases.map(|biases| biases.each_ref().map(Vec::as_slice)),
        }
    }

    /// Returns the dequantized biases of gate, up, and down, with zeros for a matrix without one,
    /// or `None` if no matrix has one.
    pub(crate) fn biases(&self) -> Option<[Vec<f32>; 3]> {
        let linears = [self.gate, self.up, self.down];
        linears.iter().any(|l| l.bias.is_some()).then(|| {
            linears.map(|l| {
                let mut values = vec![0.0; l.weights.n_rows()];
                if let Some(bias) = l.bias {
                    dequantize_row(bias.ty, bias.bytes, &mut values);
                }
                values
            })
        })
    }

    /// Returns the expert's sizes and tensor types.
    pub(crate) fn kind(&self, moe: &MoeSpec) -> ExpertKind {
        ExpertKind {
            n_expert: moe.n_expert,
            hidden: self.up.weights.n_cols(),
            ffn: self.up.weights.n_rows(),
            gate: self.is_gated.then(|| self.gate.weights.ty()),
            up: self.up.weights.ty(),
            down: self.down.weights.ty(),
            activation: moe.activation,
            weigh_input: moe.weigh_input,
        }
    }
}

impl<'a> ViewLinear<'a> {
    /// Adds the bias, if there is one, to every row of results. `decoded` is scratch for the bias.
    pub(crate) fn add_bias(&self, rows: &mut [f32], decoded: &mut Vec<f32>) {
        if let Some(bias) = self.bias {
            decoded.resize(self.weights.n_rows(), 0.0);
            dequantize_row(bias.ty, bias.bytes, decoded);
            add_bias(rows, Some(decoded));
        }
    }

    /// Returns `n` rows of the matrix from `first` on, with their biases.
    pub(super) fn rows(&self, first: usize, n: usize) -> ViewLinear<'a> {
        let weights = self.weights.rows(first..first + n);
        ViewLinear {
            weights: weights
                .unwrap_or_else(|| unreachable!("gate and up are the halves of the fused matrix")),
            bias: self.bias.map(|bias| {
                // Biases have an unblocked type, so a block is one value.
                let size = bias.ty.block_bytes();
                Bias {
                    bytes: &bias.bytes[first * size..(first + n) * size],
                    ..bias
                }
            }),
        }
    }
}

/// A bias as it lies in the expert's bytes: not aligned, not dequantized.
#[derive(Clone, Copy)]
pub(crate) struct Bias<'a> {
    pub(super) ty: TensorType,
    pub(super) bytes: &'a [u8],
}
