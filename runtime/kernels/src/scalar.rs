//! Scalar matmul kernels: what all others are tested against, and what runs where there are no
//! others.

use super::activations::{ActBlock, place};
use super::panel::{BlockDot, Panel, PanelFn, PanelFns, quantized_panel};
use crate::quant::block::{Codes, Format, Plain};
use crate::quant::{TensorType, dequantize_row, with_format};

/// Returns the kernels of a type, for 1, 2, ... tokens.
pub(super) fn panels(ty: TensorType) -> PanelFns {
    with_format!(ty, F => {
        const PANELS: &[PanelFn] = &[quantized::<F, 1>, quantized::<F, 2>, quantized::<F, 3>, quantized::<F, 4>];
        PANELS
    }, float => match ty {
        TensorType::F32 => &[float::<{ TensorType::F32 as u32 }>],
        TensorType::F16 => &[float::<{ TensorType::F16 as u32 }>],
        _ => &[float::<{ TensorType::BF16 as u32 }>],
    })
}

impl BlockDot for Plain {
    type Ops = Plain;
    type Acc = f32;

    #[inline(always)]
    unsafe fn zero() -> f32 {
        0.0
    }

    #[inline(always)]
    unsafe fn add_block<F: Format, const N: usize>(
        codes: &Codes,
        x: [&ActBlock; N],
        acc: &mut [f32; N],
    ) {
        for (x, sum) in x.into_iter().zip(acc) {
            for i in 0..16 {
                let mut product = 0;
                for eight in [2 * i, 2 * i + 1] {
                    let pairs = codes.q[8 * eight..][..8]
                        .iter()
                        .zip(&x.q[8 * place(eight)..][..8]);
                    product += pairs
                        .map(|(w, a)| i32::from(F::code(*w)) * i32::from(*a))
                        .sum::<i32>();
                }
                *sum += codes.scale[i] * x.scale[i] * product as f32;
                if F::HAS_MIN {
                    *sum -= codes.min[i] * x.sums[i];
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn sum(acc: f32) -> f32 {
        acc
    }
}

/// Computes a panel of a quantized format.
///
/// # Safety
/// As [`PanelFn`].
unsafe fn quantized<F: Format, const N: usize>(panel: &Panel<'_>) {
    // SAFETY: the caller's panel.
    unsafe { quantized_panel::<Plain, F, N>(panel) }
}

/// Computes a panel of float weights for one token.
///
/// # Safety
/// As [`PanelFn`].
unsafe fn float<const TYPE: u32>(panel: &Panel<'_>) {
    const CHUNK: usize = 64;
    let ty = TensorType::from_id(TYPE).unwrap_or(TensorType::F32);
    let mut values = [0.0f32; CHUNK];
    for (r, row) in panel.weights.chunks_exact(panel.row_bytes).enumerate() {
        let mut lanes = [0.0f32; 16];
        for (bytes, x) in row
            .chunks(CHUNK * ty.block_bytes())
            .zip(panel.x.values().chunks(CHUNK))
        {
            let values = &mut values[..x.len()];
            dequantize_row(ty, bytes, values);
            for (i, (w, x)) in values.iter().zip(x).enumerate() {
                lanes[i % 16] += w * x;
            }
        }
        // SAFETY: the caller's output holds this element.
        unsafe { panel.out.put(0, panel.first_row + r, lanes.iter().sum()) };
    }
}
