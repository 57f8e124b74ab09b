//! One expert's matrices, wherever its bytes are.

use crate::exec::moe::add_bias;
use crate::kernels::Weights;
use crate::quant::{TensorType, dequantize_row};

/// The matrices of one expert, wherever they are.
#[derive(Clone, Copy)]
pub(in crate::exec) struct ExpertView<'a> {
    /// `[expert_ffn, hidden]`.
    pub gate: ViewLinear<'a>,
    /// `[expert_ffn, hidden]`.
    pub up: ViewLinear<'a>,
    /// `[hidden, expert_ffn]`.
    pub down: ViewLinear<'a>,
}

/// A matrix of one expert with its bias.
#[derive(Clone, Copy)]
pub(in crate::exec) struct ViewLinear<'a> {
    pub weights: Weights<'a>,
    pub bias: Option<Bias<'a>>,
}

impl<'a> ViewLinear<'a> {
    /// Adds the bias, if there is one, to every row of results; `decoded` is scratch.
    pub(in crate::exec) fn add_bias(&self, rows: &mut [f32], decoded: &mut Vec<f32>) {
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
pub(in crate::exec) struct Bias<'a> {
    pub(super) ty: TensorType,
    pub(super) bytes: &'a [u8],
}
