//! What all parts on a GPU share: the hidden state, the buffers, and what depends on positions.

use super::Most;
use super::buffers::{BufferSizes, GpuBuffers};
use super::matrix::{Matrix, of_rows};
use super::streams::WriteBack;
use crate::layers::mixer::Segment;
use crate::layers::pages::PAGE;
use crate::layers::rope::RopeTable;
use std::ops::Range;
use std::sync::Arc;
use tier_plan_cuda::ops::{AddNorm, CacheSize, TextTokens};
use tier_plan_cuda::{Buffer, CudaError, Device, Ops, View};
use tier_plan_formats::model::spec::{Mixer, ModelSpec, Temperature};

/// The workspace of one GPU.
pub(super) struct Workspace {
    pub(super) ops: Ops,
    pub(super) buffers: GpuBuffers,
    pub(super) hidden: usize,
    /// Streams of the hidden state; 1 where it has no more.
    pub(super) streams: usize,
    /// How the result of the last block that has read the hidden state is written back.
    pub(super) back: WriteBack,
    pub(super) eps: f32,
    /// Factor on embeddings.
    embedding_scale: f32,
    /// Most rows that a part takes at once.
    pub(super) rows: usize,
    /// Most tokens of a batch.
    pub(super) batch: usize,
    temperature: Option<Temperature>,
    /// Whether what depends on positions is on the device.
    is_prepared: bool,
    /// What was last copied from `buffers.answer`, or from `buffers.raw`.
    pub(super) answer: Vec<f32>,
}

/// What a norm adds to the state before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Residual {
    /// Nothing: the state is complete.
    None,
    /// The result of the last part, in `buffers.out`.
    Pending,
}

/// What rows are read for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Purpose {
    /// A block whose result is written back.
    Block,
    /// Anything else.
    Prediction,
}

/// The form of normalized rows that the next products take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Output {
    /// Floats in `buffers.answer`.
    F32,
    /// Floats in `buffers.answer`, and their quantized form in `buffers.quants`.
    Quantized,
}

impl Output {
    /// Selects the quantized form if any of the consumers takes it.
    pub(super) fn quantized_if(takes_quants: bool) -> Self {
        if takes_quants {
            Output::Quantized
        } else {
            Output::F32
        }
    }
}

impl Workspace {
    /// Allocates the buffers.
    pub(super) fn new(
        device: &Arc<dyn Device>,
        spec: &ModelSpec,
        sizes: &BufferSizes,
        most: Most,
    ) -> Result<Self, CudaError> {
        let cache = CacheSize {
            positions: most.positions,
            page: PAGE,
        };
        Ok(Self {
            buffers: GpuBuffers::new(device, sizes, cache)?,
            ops: Ops::new(Arc::clone(device)),
            hidden: spec.hidden,
            streams: spec.streams.map_or(1, |streams| streams.n),
            back: WriteBack::default(),
            eps: spec.norm_eps,
            embedding_scale: spec.embedding_scale,
            rows: most.rows,
            batch: most.batch,
            temperature: temperature(spec),
            is_prepared: false,
            answer: Vec::new(),
        })
    }

    /// Makes the error of a part that is not on this GPU.
    pub(super) fn missing(&self, part: &str) -> CudaError {
        CudaError::NotThere {
            device: self.ops.device().name().into(),
            part: part.into(),
        }
    }

    /// Returns rows of the hidden state, `[rows, streams * hidden]`.
    pub(super) fn state(&self, rows: Range<usize>) -> View<'_> {
        of_rows(self.buffers.x.view(), &rows, self.streams * self.hidden)
    }

    /// Copies the tokens of rows to `buffers.ids`.
    pub(super) fn put_ids(&self, tokens: &[u32]) -> Result<(), CudaError> {
        let ids: Vec<u8> = tokens.iter().flat_map(|id| id.to_ne_bytes()).collect();
        self.buffers.ids.view().write(&ids)
    }

    /// Adds host values to the first rows of the hidden state, `[n, hidden]`.
    pub(super) fn add_to_state(&self, values: &[f32]) -> Result<(), CudaError> {
        for (i, part) in values.chunks(self.rows * self.hidden).enumerate() {
            let first = i * self.rows;
            self.buffers.out.view().write_f32(part)?;
            self.add_out(first..first + part.len() / self.hidden)?;
        }
        Ok(())
    }

    /// Sets rows of the hidden state to the embeddings of the tokens in `buffers.ids`.
    pub(super) fn embed(&self, table: &Matrix, rows: Range<usize>) -> Result<(), CudaError> {
        let (n, hidden, ids) = (rows.len(), self.hidden, self.buffers.ids.view());
        let spreads = self.streams > 1;
        let to = if spreads {
            self.buffers.out.view()
        } else {
            self.state(rows.clone())
        };
        let ops = &self.ops;
        ops.dequantize_chosen(table.ty, table.view(), hidden, ids, n, to)?;
        if self.embedding_scale != 1.0 {
            ops.scale(to, self.embedding_scale, n * hidden)?;
        }
        if spreads { self.spread(rows) } else { Ok(()) }
    }

    /// Does to `n` rows of `buffers.out`, a block's result, what follows the block.
    pub(super) fn finish(&self, end: &BlockEnd, n: usize) -> Result<(), CudaError> {
        let (out, hidden) = (self.buffers.out.view(), self.hidden);
        if let Some(norm) = &end.norm {
            let weight = Some(norm.view());
            self.ops.rms_norm(out, weight, n, hidden, self.eps, out)?;
        }
        match end.scale {
            1.0 => Ok(()),
            scale => self.ops.scale(out, scale, n * hidden),
        }
    }

    /// Copies what depends on positions to the device, unless it is there from the layer before.
    pub(super) fn prepare(
        &mut self,
        segments: &[Segment<'_>],
        ropes: &mut [RopeTable],
    ) -> Result<(), CudaError> {
        let texts = segments.iter().map(|segment| TextTokens {
            past: segment.past,
            tokens: segment.rows.len(),
            pages: segment.pages,
            state: segment.state,
            checkpoints: &segment.checkpoints,
        });
        let is_new = self.buffers.positions.set(texts)?;
        if self.is_prepared && !is_new {
            return Ok(());
        }
        self.is_prepared = false;
        let positions = segments.iter().map(Segment::range);
        for (rope, turns) in ropes.iter_mut().zip(&self.buffers.turns) {
            rope.prepare(positions.clone());
            turns.view().write_f32(&rope.turns())?;
        }
        if let Some(temperature) = &self.temperature {
            let positions = positions.flatten();
            let factors: Vec<f32> = positions.map(|position| temperature.at(position)).collect();
            self.buffers.factors.view().write_f32(&factors)?;
        }
        self.is_prepared = true;
        Ok(())
    }

    /// Adds the residual to rows of the hidden state, and normalizes them to `buffers.answer`.
    pub(super) fn norm(
        &mut self,
        weight: &Buffer,
        rows: Range<usize>,
        residual: Residual,
        output: Output,
    ) -> Result<(), CudaError> {
        let Self {
            ops,
            buffers,
            hidden,
            eps,
            ..
        } = self;
        let (hidden, eps) = (*hidden, *eps);
        let norm = AddNorm {
            x: buffers
                .x
                .view()
                .floats(rows.start * hidden..rows.end * hidden),
            residual: (residual == Residual::Pending).then(|| buffers.out.view()),
            weight: weight.view(),
            rows: rows.len(),
            width: hidden,
            eps,
        };
        let quants = (output == Output::Quantized).then_some(&mut buffers.quants);
        ops.add_norm(&norm, buffers.answer.view(), quants)
    }

    /// Decodes indices of experts, which are copied from the device as the bits of floats.
    ///
    /// # Errors
    /// When an index is not below `n_expert`: a failing device may answer anything.
    pub(super) fn decode_experts(
        &self,
        layer: usize,
        n_expert: usize,
        bits: &[f32],
        experts: &mut [u16],
    ) -> Result<(), CudaError> {
        for (bits, expert) in bits.iter().zip(experts) {
            let index = bits.to_bits();
            *expert = u16::try_from(index)
                .ok()
                .filter(|e| usize::from(*e) < n_expert)
                .ok_or_else(|| {
                    let (device, what) = (
                        self.ops.device().name().into(),
                        format!("choosing experts of layer {layer}"),
                    );
                    CudaError::Call {
                        device,
                        what,
                        why: format!("it chose number {index} of {n_expert}"),
                    }
                })?;
        }
        Ok(())
    }
}

/// What is done to a block's result before it is added to the hidden state.
pub(super) struct BlockEnd {
    /// `[hidden]`.
    pub(super) norm: Option<Buffer>,
    pub(super) scale: f32,
}

/// Returns how scores grow with the position. All layers of a model share it, as it comes from the
/// model's metadata.
fn temperature(spec: &ModelSpec) -> Option<Temperature> {
    spec.layers.iter().find_map(|layer| match &layer.mixer {
        Mixer::Mla(a) => a.temperature,
        Mixer::Gqa(a) => a.temperature,
        _ => None,
    })
}
