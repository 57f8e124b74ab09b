//! Rows of hidden states on their way to a GPU and back.

use tier_plan_cuda::experts::workspace_bytes;
use tier_plan_formats::model::spec::ModelSpec;

/// Rows that a GPU takes at most until its results are fetched; a token's experts are always together.
const ROWS: usize = 512;

/// Rows that GPUs have room for.
pub(crate) fn gpu_rows(spec: &ModelSpec) -> usize {
    spec.moe_layers().map(|(_, moe)| moe.n_used).max().unwrap_or(0).max(ROWS)
}

/// Bytes that a GPU with experts has for such rows.
pub(crate) fn gpu_room_bytes(spec: &ModelSpec) -> u64 {
    let ffn = spec.moe_layers().map(|(_, moe)| moe.expert_ffn).max().unwrap_or(0);
    workspace_bytes(gpu_rows(spec), spec.hidden, ffn)
}

/// Buffers for what goes to a GPU and comes back, as large as the most that does at once.
#[derive(Default)]
pub(crate) struct GpuRows {
    /// `[rows, hidden]`.
    pub(crate) sent: Vec<f32>,
    /// `[rows, hidden]`.
    pub(crate) fetched: Vec<f32>,
}

impl GpuRows {
    /// For so many rows.
    pub(crate) fn new(rows: usize, hidden: usize) -> Self {
        let room = || Vec::with_capacity(rows * hidden);
        Self { sent: room(), fetched: room() }
    }
}
