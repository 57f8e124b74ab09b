//! Attention of many tokens at once, with 16-bit floats on tensor cores.

use super::attention::{Attend, AttentionBuffers};
use super::{Quants, blocks, few, int};
use crate::device::{Arg, View};
use crate::{CudaError, Ops};
use std::ops::Range;
use tier_plan_formats::model::kv::KvType;

/// Number of tokens from which on attention multiplies 16-bit floats.
pub const PROMPT_TOKENS: usize = 16;

/// Positions per split of the context; the kernel has the same constant.
const SPLIT: usize = 2048;

/// Columns of values per block; the kernel has the same constant.
const VALUE_COLUMNS: usize = 128;

/// A kernel for keys up to a certain width.
#[derive(Debug, Clone, Copy)]
pub(super) struct PromptKernel {
    name: &'static str,
    /// Warps per block, each with 16 rows. A row is a token with a head.
    warps: usize,
}

/// Returns the kernel for so many tokens of a text; `None` if they are too few or the keys are too
/// wide.
pub(super) fn prompt_kernel(a: &Attend<'_>, tokens: usize) -> Option<PromptKernel> {
    if tokens < PROMPT_TOKENS {
        return None;
    }
    let kernel = |warps, f32, f16, q8| {
        let name = match a.kv_type {
            KvType::F32 => f32,
            KvType::F16 => f16,
            KvType::Q8_0 => q8,
        };
        Some(PromptKernel { name, warps })
    };
    match a.key_width {
        0..=128 => kernel(
            4,
            "prompt_attend_f32",
            "prompt_attend_f16",
            "prompt_attend_q8",
        ),
        129..=256 => kernel(
            4,
            "prompt_attend_wide_f32",
            "prompt_attend_wide_f16",
            "prompt_attend_wide_q8",
        ),
        257..=576 => kernel(
            2,
            "prompt_attend_latent_f32",
            "prompt_attend_latent_f16",
            "prompt_attend_latent_q8",
        ),
        _ => None,
    }
}

impl Ops {
    /// Computes attention of consecutive tokens of one text. [`attend`](Self::attend) has checked
    /// the sizes.
    pub(super) fn attend_prompt(
        &self,
        kernel: PromptKernel,
        a: &Attend<'_>,
        run: Range<usize>,
        buffers: &AttentionBuffers,
        out: View<'_>,
        quants: Option<&Quants>,
    ) -> Result<(), CudaError> {
        let heads = a.n_head_kv * a.group;
        let mut first = run.start;
        while first < run.end {
            let pieces = |last: usize| a.pieces(SPLIT, &(first..last + 1));
            let (tokens, splits) = a.fitting(buffers, &(first..run.end), pieces);
            let queries = a
                .queries
                .floats(first * heads * a.key_width..(first + tokens) * heads * a.key_width);
            let to =
                out.floats(first * heads * a.value_width..(first + tokens) * heads * a.value_width);
            let [positions, begins, tables, page_bits] =
                a.positions.part(first..first + tokens).args();
            let args = [
                queries.aligned().arg(),
                a.keys.aligned().arg(),
                a.values.aligned().arg(),
                int(a.n_head_kv),
                int(a.group),
                int(a.key_width),
                int(a.value_row_width),
                int(a.value_width),
                Arg::Float(a.scale),
                a.cap_arg(),
                positions,
                begins,
                tables,
                page_bits,
                int(tokens),
                a.window_arg(),
                buffers.mixed.view().arg(),
                buffers.largest.view().arg(),
                buffers.sums.view().arg(),
            ];
            let rows = tokens * a.group;
            let grid = [
                blocks(rows, 16 * kernel.warps as u32),
                few(a.n_head_kv * a.value_width.div_ceil(VALUE_COLUMNS)),
                few(splits),
            ];
            self.launch(kernel.name, grid, 32 * kernel.warps as u32, &args)?;
            self.join(a, buffers, first..first + tokens, splits, to, quants)?;
            first += tokens;
        }
        Ok(())
    }
}
