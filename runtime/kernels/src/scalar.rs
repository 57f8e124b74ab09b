//! The plain products: what every other kernel is tested against, and what runs where there is no other.

use super::activations::place;
use super::matmul::{Panel, PanelFn, PanelFns};
use crate::quant::block::{Codes, Format, GROUP, Plain};
use crate::quant::{TensorType, dequantize_row, with_format};

/// The kernels of a type.
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

/// # Safety
/// As [`PanelFn`].
unsafe fn quantized<F: Format, const N: usize>(panel: &Panel<'_>) {
    let groups = panel.x.cols().div_ceil(GROUP);
    let group_bytes = GROUP / F::TYPE.block_len() * F::TYPE.block_bytes();
    let mut codes = Codes::ZERO;
    for (r, row) in panel.weights.chunks_exact(panel.row_bytes).enumerate() {
        let mut sums = [0.0f32; N];
        for (g, bytes) in row.chunks(group_bytes).enumerate() {
            F::unpack_group::<Plain>(bytes, &mut codes);
            for (n, sum) in sums.iter_mut().enumerate() {
                let x = &panel.x.blocks()[n * groups + g];
                for i in 0..16 {
                    let mut product = 0;
                    for eight in [2 * i, 2 * i + 1] {
                        let pairs = codes.q[8 * eight..][..8].iter().zip(&x.q[8 * place(eight)..][..8]);
                        product += pairs.map(|(w, a)| i32::from(F::code(*w)) * i32::from(*a)).sum::<i32>();
                    }
                    *sum += codes.scale[i] * x.scale[i] * product as f32;
                    if F::HAS_MIN {
                        *sum -= codes.min[i] * x.sums[i];
                    }
                }
            }
        }
        for (n, sum) in sums.into_iter().enumerate() {
            // SAFETY: the caller's output holds this element.
            unsafe { panel.out.put(n, panel.first_row + r, sum) };
        }
    }
}

/// # Safety
/// As [`PanelFn`].
unsafe fn float<const TYPE: u32>(panel: &Panel<'_>) {
    const CHUNK: usize = 64;
    let ty = TensorType::from_id(TYPE).unwrap_or(TensorType::F32);
    let mut values = [0.0f32; CHUNK];
    for (r, row) in panel.weights.chunks_exact(panel.row_bytes).enumerate() {
        let mut lanes = [0.0f32; 16];
        for (bytes, x) in row.chunks(CHUNK * ty.block_bytes()).zip(panel.x.values().chunks(CHUNK)) {
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
