//! Evidence about prefetching: how good a layer's predictor is, and how much time it has.

/// Evidence about prefetching one layer's experts.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Prefetch {
    /// Share of the predicted experts that the layer did choose; 0 where it is unknown.
    pub accuracy: f64,
    /// Bytes that the dense stage before the experts reads.
    pub dense_bytes: u64,
}
