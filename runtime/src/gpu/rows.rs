//! Rows of hidden states that are copied to GPUs and back.

use tier_plan_cuda::experts::workspace_bytes;
use tier_plan_formats::model::spec::ModelSpec;

/// Rows that a GPU takes until its results are fetched, unless one token has more experts: the
/// experts of a token are never split.
pub(super) const GPU_ROWS: usize = 512;

/// Returns the number of rows that GPUs have buffers for.
pub(crate) fn gpu_rows(spec: &ModelSpec) -> usize {
    spec.moe_layers()
        .map(|(_, moe)| moe.n_used)
        .max()
        .unwrap_or(0)
        .max(GPU_ROWS)
}

/// Returns the bytes of these buffers on a GPU with experts.
pub(crate) fn gpu_row_bytes(spec: &ModelSpec) -> u64 {
    let ffn = spec.moe_layers().map(|(_, moe)| moe.expert_ffn).max();
    workspace_bytes(gpu_rows(spec), gpu_row_values(spec), ffn.unwrap_or(0))
}

/// Returns the values of the widest row that experts read.
pub(crate) fn gpu_row_values(spec: &ModelSpec) -> usize {
    let widths = spec.moe_layers().map(|(_, moe)| moe.expert_width());
    widths.max().unwrap_or(0)
}

/// Host buffers for the input of experts on GPUs and for their results.
#[derive(Default)]
pub(crate) struct GpuRows {
    /// `[rows, width]`.
    pub(crate) sent: Vec<f32>,
    /// Weights of the experts that the rows go through, `[rows]`.
    pub(crate) weights: Vec<f32>,
    /// `[rows, width]`.
    pub(crate) fetched: Vec<f32>,
}

impl GpuRows {
    /// Allocates buffers for `rows` rows.
    pub(crate) fn new(rows: usize, width: usize) -> Self {
        let buffer = |width: usize| Vec::with_capacity(rows * width);
        Self {
            sent: buffer(width),
            weights: buffer(1),
            fetched: buffer(width),
        }
    }
}
