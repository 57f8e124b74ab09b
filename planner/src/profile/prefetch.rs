//! Evidence about prefetching: how good a layer's predictor is, and how much time it has.

use tier_plan_runtime::model::shape::{ExpertShape, ModelShape};

/// Evidence about prefetching one layer's experts.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Prefetch {
    /// Share of the predicted experts that the layer did choose; 0 where it is unknown.
    pub accuracy: f64,
    /// Bytes that the dense stage before the experts reads.
    pub dense_bytes: u64,
    /// Whether the token alone chooses the experts: all of them are read from when the dense stage
    /// begins.
    pub is_exact: bool,
}

impl Prefetch {
    /// Returns the evidence about a layer whose router's predictions have an accuracy, 0 where it is
    /// unknown.
    pub fn new(shape: &ModelShape, layer: &ExpertShape, accuracy: f64) -> Self {
        let accuracy = if layer.by_token { 1.0 } else { accuracy };
        Prefetch {
            accuracy,
            dense_bytes: if accuracy > 0.0 {
                shape.dense_bytes_of(layer.layer)
            } else {
                0
            },
            is_exact: layer.by_token,
        }
    }
}
