//! One expert's matrices, wherever its bytes are.

use crate::layers::cpu_context::add_bias;
use tier_plan_cuda::experts::ExpertKind;
use tier_plan_formats::model::spec::MoeSpec;
use tier_plan_kernels::Weights;
use tier_plan_kernels::quant::{TensorType, dequantize_row};

/// The matrices of one expert, wherever they are.
#[derive(Clone, Copy)]
pub(crate) struct ExpertView<'a> {
    /// `[expert_ffn, hidden]`.
    pub gate: ViewLinear<'a>,
    /// `[expert_ffn, hidden]`.
    pub up: ViewLinear<'a>,
    /// `[hidden, expert_ffn]`.
    pub down: ViewLinear<'a>,
}

/// A matrix of one expert with its bias.
#[derive(Clone, Copy)]
pub(crate) struct ViewLinear<'a> {
    pub weights: Weights<'a>,
    pub bias: Option<Bias<'a>>,
}

impl ExpertView<'_> {
    /// The biases of gate, up and down, decoded; a matrix without one has zeros, and without any there are none.
    pub(crate) fn biases(&self) -> Option<[Vec<f32>; 3]> {
        let all = [self.gate, self.up, self.down];
        all.iter().any(|l| l.bias.is_some()).then(|| {
            all.map(|l| {
                let mut values = vec![0.0; l.weights.n_rows()];
                if let Some(bias) = l.bias {
                    dequantize_row(bias.ty, bias.bytes, &mut values);
                }
                values
            })
        })
    }

    /// Its sizes and types.
    pub(crate) fn kind(&self, moe: &MoeSpec) -> ExpertKind {
        ExpertKind {
            n_expert: moe.n_expert,
            hidden: self.gate.weights.n_cols(),
            ffn: self.gate.weights.n_rows(),
            gate: self.gate.weights.ty(),
            up: self.up.weights.ty(),
            down: self.down.weights.ty(),
            activation: moe.activation,
        }
    }
}

impl<'a> ViewLinear<'a> {
    /// Adds the bias, if there is one, to every row of results; `decoded` is scratch.
    pub(crate) fn add_bias(&self, rows: &mut [f32], decoded: &mut Vec<f32>) {
        if let Some(bias) = self.bias {
            decoded.resize(self.weights.n_rows(), 0.0);
            dequantize_row(bias.ty, bias.bytes, decoded);
            add_bias(rows, Some(decoded));
        }
    }

    /// `n` of the rows, the first one `first`.
    pub(super) fn rows(&self, first: usize, n: usize) -> ViewLinear<'a> {
        let weights = self.weights.rows(first..first + n);
        ViewLinear {
            weights: weights.unwrap_or_else(|| unreachable!("gate and up are the halves of what is fused")),
            bias: self.bias.map(|bias| {
                // A bias is of a type whose values stand one by one.
                let size = bias.ty.block_bytes();
                Bias { bytes: &bias.bytes[first * size..(first + n) * size], ..bias }
            }),
        }
    }
}

/// A bias as it lies in an expert's bytes, which may be anywhere: not aligned, not decoded.
#[derive(Clone, Copy)]
pub(crate) struct Bias<'a> {
    pub(super) ty: TensorType,
    pub(super) bytes: &'a [u8],
}
