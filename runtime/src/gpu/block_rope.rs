//! Rotation of what stands for a block of positions, as at the block's first one. That position may be before
//! the batch, so that no turns for it are on the device.

use super::matrix::GpuLoader;
use tier_plan_cuda::ops::Frequencies;
use tier_plan_cuda::{Buffer, CudaError};
use tier_plan_formats::model::spec::RopeSpec;

/// The rotation of a layer at any position.
pub(super) struct BlockRope {
    spec: RopeSpec,
    /// Radians per position, `[dims / 2]`.
    frequencies: Buffer,
    magnitude: f32,
}

impl BlockRope {
    /// Copies the frequencies of a rope table to the device.
    pub(super) fn new(
        loader: &GpuLoader<'_>,
        spec: &RopeSpec,
        table: usize,
    ) -> Result<Self, CudaError> {
        let table = &loader.ropes[table];
        Ok(Self {
            frequencies: Buffer::of_f32(loader.device, table.frequencies())?,
            magnitude: table.magnitude(),
            spec: spec.clone(),
        })
    }

    /// Returns the rotation of rows whose values rotate from `first` on.
    pub(super) fn from(&self, first: usize) -> Frequencies<'_> {
        Frequencies {
            values: self.frequencies.view(),
            magnitude: self.magnitude,
            kind: self.spec.kind,
            first,
            half: self.spec.dims / 2,
        }
    }
}
