//! What the n-grams that end with tokens add to the streams of a layer, on a GPU. The arithmetic is that of
//! `layers/ngram.rs`. The table stays with the CPU, which sends its rows.

use super::Gpu;
use super::buffers::GpuBuffers;
use super::matrix::{GpuLoader, Matrix, of_rows, products};
use super::mixer::in_rounds;
use super::workspace::Workspace;
use crate::layers::device_cache::DeviceCache;
use crate::layers::mixer::Segment;
use std::ops::Range;
use tier_plan_cuda::ops::{NgramConv, NgramGate};
use tier_plan_cuda::{Buffer, CudaError};
use tier_plan_formats::model::spec::NgramBlock;

/// The n-gram block of a layer with its state.
pub(super) struct Ngram {
    spec: NgramBlock,
    key: Matrix,
    value: Matrix,
    key_norm: Buffer,
    query_norm: Buffer,
    conv_norm: Buffer,
    conv: Buffer,
    /// The convolution's inputs of texts and checkpoints.
    states: DeviceCache,
}

impl Ngram {
    pub(super) fn new(
        loader: &GpuLoader<'_>,
        block: &NgramBlock,
        states: DeviceCache,
    ) -> Result<Self, CudaError> {
        Ok(Self {
            key: loader.linear(&block.key)?,
            value: loader.linear(&block.value)?,
            key_norm: loader.vector(block.key_norm)?,
            query_norm: loader.vector(block.query_norm)?,
            conv_norm: loader.vector(block.conv_norm)?,
            conv: loader.vector(block.conv)?,
            states,
            spec: *block,
        })
    }

    /// Adds to rows of the hidden state, which are the segments' one after the other, what their n-grams in
    /// `buffers.ngrams` make. Rows that a checkpoint follows end a launch.
    pub(super) fn add(
        &self,
        work: &mut Workspace,
        rows: Range<usize>,
        segments: &[Segment<'_>],
    ) -> Result<(), CudaError> {
        let (n, hidden, streams) = (rows.len(), work.hidden, work.streams);
        let Some(kept) = self.states.ngram_states() else {
            return Err(work.missing("what n-grams keep of texts"));
        };
        let Workspace {
            ops, buffers, eps, ..
        } = work;
        let GpuBuffers {
            x,
            out,
            ngrams,
            quants,
            positions,
            streams: wide,
            ..
        } = buffers;
        let (keys, gated, values) = (wide.wide.view(), wide.value_gates.view(), out.view());
        let channels = self.spec.channels();
        let x = of_rows(x.view(), &rows, channels);
        if [&self.key, &self.value]
            .into_iter()
            .any(Matrix::takes_quants)
        {
            ops.quantize(ngrams.view(), n, hidden, quants)?;
        }
        let readers = [(&self.key, keys), (&self.value, values)];
        products(ops, &readers, n, ngrams.view(), quants)?;
        ops.gate_ngrams(&NgramGate {
            tokens: n,
            streams,
            width: hidden,
            keys,
            values,
            x,
            key_norm: self.key_norm.view(),
            query_norm: self.query_norm.view(),
            conv_norm: self.conv_norm.view(),
            eps: *eps,
            gated,
        })?;
        let conv = NgramConv {
            tokens: n,
            channels,
            taps: self.spec.taps,
            dilation: self.spec.dilation,
            inputs: keys,
            gated,
            weight: self.conv.view(),
            kept,
            x,
        };
        let copy = |from, to| self.states.copy_ngram_state(from, to);
        in_rounds(
            positions,
            segments,
            |runs| ops.convolve_ngrams(&conv, runs),
            copy,
        )
    }
}

impl Gpu {
    /// Takes the rows of the table that the next rows' n-grams name, `[rows, hidden]`.
    pub(crate) fn put_ngrams(&self, values: &[f32]) -> Result<(), CudaError> {
        self.work.buffers.ngrams.view().write_f32(values)
    }
}
