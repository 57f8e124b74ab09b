//! Buffers of several residual streams on a GPU, and weights that come to another processor.

use super::matrix::of_rows;
use super::streams::WriteBack;
use super::{Gpu, Most};
use crate::layers::places::{Place, Places};
use crate::layers::streams::BackRows;
use std::ops::Range;
use std::sync::Arc;
use tier_plan_cuda::ops::StreamWeights;
use tier_plan_cuda::{Buffer, CudaError, Device};
use tier_plan_formats::model::spec::{Connection, ModelSpec};
use tier_plan_formats::placement::TierIdx;

/// Buffers of several streams, empty for one.
pub(super) struct StreamBuffers {
    /// `[rows, streams * hidden]`: normalized streams, or keys of n-grams.
    pub(super) wide: Buffer,
    /// `[rows, gates]`.
    pub(super) gates: Buffer,
    /// `[rows, rank]`.
    pub(super) low: Buffer,
    /// `[rows, streams * hidden]`: gates of all values, or gated values of n-grams.
    pub(super) value_gates: Buffer,
    /// `[batch, streams]`: factors on results.
    pub(super) post: Buffer,
    /// `[batch, streams, streams]`: what streams give to each other.
    mix: Buffer,
}

/// Sizes of the buffers of several streams.
#[derive(Debug, Clone, Default)]
pub(super) struct StreamSizes {
    wide: usize,
    gates: usize,
    low: usize,
    value_gates: usize,
    post: usize,
    mix: usize,
}

impl StreamSizes {
    /// Computes the sizes for the parts on the GPU of a tier.
    pub(super) fn new(spec: &ModelSpec, places: &Places, tier: TierIdx, most: Most) -> Self {
        let mut sizes = Self::default();
        let Some(streams) = &spec.streams else {
            return sizes;
        };
        let here = |place: Place| place == Some(tier);
        for (layer, at) in spec.layers.iter().zip(&places.layers) {
            if here(at.mixer) && layer.residual.ngram.is_some() {
                sizes.wide = most.rows * spec.residual_width();
                sizes.value_gates = sizes.wide;
            }
            let Some(connections) = &layer.residual.connections else {
                continue;
            };
            if here(at.mixer) {
                sizes.read(&connections.mixer, spec, most.rows);
                sizes.write(&connections.mixer, streams.n, most.batch);
            }
            if here(at.ffn) {
                sizes.read(&connections.ffn, spec, most.rows);
            }
            if here(at.ffn) || here(at.shared) {
                sizes.write(&connections.ffn, streams.n, most.batch);
            }
        }
        if here(places.head)
            && let Some(end) = streams.end.connection()
        {
            sizes.read(&end, spec, most.rows);
        }
        sizes
    }

    /// Grows to what reading so many rows takes.
    fn read(&mut self, connection: &Connection, spec: &ModelSpec, rows: usize) {
        let (n_gates, rank) = match connection {
            Connection::Gated(gated) => (gated.gates.n_out, 0),
            Connection::LowRank(low) => (spec.streams.map_or(0, |s| s.n), low.down.n_out),
            Connection::Bank(_) => return,
        };
        self.wide = rows * spec.residual_width();
        self.gates = self.gates.max(rows * n_gates);
        self.low = self.low.max(rows * rank);
        if rank > 0 {
            self.value_gates = self.wide;
        }
    }

    /// Grows to what writing results of a batch back takes.
    fn write(&mut self, connection: &Connection, n: usize, batch: usize) {
        if let WriteBack::Weights { mixes } = WriteBack::of(Some(connection)) {
            self.post = batch * n;
            if mixes {
                self.mix = batch * n * n;
            }
        }
    }

    /// Returns the most values that are quantized at once.
    pub(super) fn quantized(&self) -> usize {
        self.wide.max(self.low)
    }

    /// Returns the values of all buffers.
    pub(super) fn all(&self) -> [usize; 6] {
        [
            self.wide,
            self.gates,
            self.low,
            self.value_gates,
            self.post,
            self.mix,
        ]
    }
}

impl StreamBuffers {
    pub(super) fn new(device: &Arc<dyn Device>, s: &StreamSizes) -> Result<Self, CudaError> {
        let floats = |values: usize| Buffer::new_f32(device, values);
        Ok(Self {
            wide: floats(s.wide)?,
            gates: floats(s.gates)?,
            low: floats(s.low)?,
            value_gates: floats(s.value_gates)?,
            post: floats(s.post)?,
            mix: floats(s.mix)?,
        })
    }

    /// Returns the weights for writing results of some rows of the batch back.
    pub(super) fn weights(&self, rows: &Range<usize>, n: usize, mixes: bool) -> StreamWeights<'_> {
        StreamWeights {
            post: of_rows(self.post.view(), rows, n),
            mix: mixes.then(|| of_rows(self.mix.view(), rows, n * n)),
        }
    }
}

impl Gpu {
    /// Returns the weights that a layer's router has left for writing results of some rows of the
    /// batch back.
    pub(crate) fn stream_weights(&self, rows: Range<usize>) -> Result<BackRows, CudaError> {
        let (n, buffers) = (self.work.streams, &self.work.buffers.streams);
        let mut back = BackRows::default();
        if let WriteBack::Weights { mixes } = self.work.back {
            let weights = buffers.weights(&rows, n, mixes);
            back.post = weights.post.to_f32()?;
            back.mix = weights.mix.map(|mix| mix.to_f32()).transpose()?;
        }
        Ok(back)
    }

    /// Takes weights for writing results of some rows of the batch back from elsewhere.
    pub(crate) fn put_stream_weights(
        &self,
        rows: Range<usize>,
        back: &BackRows,
    ) -> Result<(), CudaError> {
        let (n, buffers) = (self.work.streams, &self.work.buffers.streams);
        if back.post.is_empty() {
            return Ok(());
        }
        let weights = buffers.weights(&rows, n, back.mix.is_some());
        weights.post.write_f32(&back.post)?;
        let mix = weights.mix.zip(back.mix.as_ref());
        mix.map_or(Ok(()), |(to, mix)| to.write_f32(mix))
    }
}
