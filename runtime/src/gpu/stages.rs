//! The parts of a layer on a GPU, and handles to run the mixer, the embedding, and the head.

use super::buffers::logit_rows;
use super::ffn::LayerFfn;
use super::matrix::{GpuLoader, Matrix, product};
use super::mixer::{Mixer, MixerBatch};
use super::ngram::Ngram;
use super::projections::Projections;
use super::streams::BlockInput;
use super::workspace::{BlockEnd, Output, Purpose, Residual, Workspace};
use crate::layers::device_cache::DeviceCache;
use crate::layers::mixer::Segment;
use crate::layers::places::{LayerPlaces, Place};
use crate::layers::rope::{LayerRopes, RopeTable};
use std::ops::Range;
use tier_plan_cuda::CudaError;
use tier_plan_formats::model::spec::{LayerSpec, Mixer as MixerSpec};
use tier_plan_formats::placement::TierIdx;

/// The parts of one layer.
pub(super) struct Layer {
    /// Whether all of its parts but routed experts are here.
    pub(super) is_whole: bool,
    pub(super) mixer: Option<LayerMixer>,
    /// The matrices of attention whose KV cache is in main memory.
    pub(super) projections: Option<Projections>,
    pub(super) ffn: Option<LayerFfn>,
}

/// A mixer with its norm, and what is before it.
pub(super) struct LayerMixer {
    ngram: Option<Ngram>,
    input: BlockInput,
    pub(super) mixer: Mixer,
    end: BlockEnd,
}

pub(super) struct Head {
    pub(super) input: BlockInput,
    pub(super) matrix: Matrix,
    /// What is added to logits on the host, `[n_vocab]`.
    pub(super) bias: Option<Vec<f32>>,
}

impl Layer {
    /// Makes the parts of a layer that are placed on `tier`. `ropes` are the layer's rope tables,
    /// and `cache` is what its mixer keeps, if that is on a GPU.
    pub(super) fn new(
        loader: &GpuLoader<'_>,
        (index, layer): (usize, &LayerSpec),
        places: LayerPlaces,
        tier: TierIdx,
        ropes: LayerRopes,
        cache: Option<&DeviceCache>,
    ) -> Result<Self, CudaError> {
        let here = |place: Place| place == Some(tier);
        let has_mixer = layer.has_mixer() && here(places.mixer);
        let mixer = cache.filter(|_| has_mixer).map(|cache| {
            let connection = layer.residual.connections.map(|c| c.mixer);
            let ngram = layer.residual.ngram.as_ref();
            let ngram = ngram.map(|block| Ngram::new(loader, block, cache.clone()));
            Ok(LayerMixer {
                ngram: ngram.transpose()?,
                input: BlockInput::new(loader, connection.as_ref(), layer.mixer_norm)?,
                end: BlockEnd {
                    norm: loader.opt_vector(layer.residual.mixer_norm)?,
                    scale: layer.residual.mixer_scale,
                },
                mixer: Mixer::new(loader, &layer.mixer, ropes, cache.clone())?,
            })
        });
        let mixer = mixer.transpose()?;
        let projections = match &layer.mixer {
            MixerSpec::Gqa(a) if places.host_kv && here(places.mixer) => {
                Some(Projections::new(loader, layer, a)?)
            }
            _ => None,
        };
        let has_shared = layer.moe().is_some_and(|moe| moe.shared.is_some());
        let has_blocks = here(places.ffn) && (here(places.shared) || !has_shared);
        Ok(Self {
            is_whole: here(places.mixer) && has_blocks,
            mixer,
            projections,
            ffn: LayerFfn::new(loader, (index, layer), places, tier)?,
        })
    }
}

impl LayerMixer {
    /// Computes to `buffers.out` what the mixer adds to rows, which are the segments' one after the
    /// other. Launches only, where no checkpoint follows a row: the positions are prepared.
    pub(super) fn run(
        &self,
        work: &mut Workspace,
        rows: Range<usize>,
        segments: &[Segment<'_>],
        mut residual: Residual,
    ) -> Result<(), CudaError> {
        let (n, first_row) = (rows.len(), rows.start);
        if let Some(ngram) = &self.ngram {
            work.complete(rows.clone(), residual)?;
            residual = Residual::None;
            ngram.add(work, rows.clone(), segments)?;
        }
        let output = Output::quantized_if(self.mixer.takes_quants());
        self.input
            .read(work, rows, residual, output, Purpose::Block)?;
        let batch = MixerBatch {
            n,
            first_row,
            eps: work.eps,
            segments,
        };
        self.mixer.run(&work.ops, &mut work.buffers, batch)?;
        work.finish(&self.end, n)
    }
}

impl Head {
    /// Computes the logits of rows to `buffers.logits`.
    pub(super) fn run(
        &self,
        work: &mut Workspace,
        rows: Range<usize>,
        residual: Residual,
    ) -> Result<(), CudaError> {
        let n = rows.len();
        let output = Output::quantized_if(self.matrix.takes_quants());
        self.input
            .read(work, rows, residual, output, Purpose::Prediction)?;
        let buffers = &work.buffers;
        product(
            &work.ops,
            &self.matrix,
            n,
            buffers.answer.view(),
            &buffers.quants,
            buffers.logits.view(),
        )
    }
}

/// The embedding on a GPU.
pub(crate) struct EmbeddingPart<'a> {
    pub(super) table: &'a Matrix,
    pub(super) work: &'a mut Workspace,
}

impl EmbeddingPart<'_> {
    /// Sets the hidden state of a batch to the embeddings of its tokens.
    pub(crate) fn embed(self, tokens: &[u32]) -> Result<(), CudaError> {
        let Self { table, work } = self;
        for (i, part) in tokens.chunks(work.rows).enumerate() {
            work.put_ids(part)?;
            work.embed(table, i * work.rows..i * work.rows + part.len())?;
        }
        Ok(())
    }
}

/// A layer's mixer on a GPU.
pub(crate) struct MixerPart<'a> {
    pub(super) mixer: &'a LayerMixer,
    pub(super) work: &'a mut Workspace,
}

impl MixerPart<'_> {
    /// Adds the mixer's result to rows of the batch, which are the segments' one after the other.
    pub(crate) fn run(
        self,
        rows: Range<usize>,
        segments: &[Segment<'_>],
        ropes: &mut [RopeTable],
    ) -> Result<(), CudaError> {
        let Self { mixer, work } = self;
        work.prepare(segments, ropes)?;
        mixer.run(work, rows.clone(), segments, Residual::None)?;
        work.add_out(rows)
    }
}

/// The head on a GPU.
pub(crate) struct HeadPart<'a> {
    pub(super) head: &'a Head,
    pub(super) work: &'a mut Workspace,
}

impl HeadPart<'_> {
    /// Computes the logits of rows, `[rows, n_vocab]`.
    pub(crate) fn run(self, rows: Range<usize>, logits: &mut [f32]) -> Result<(), CudaError> {
        let Self { head, work } = self;
        let (n_vocab, mut first) = (head.matrix.n_out, rows.start);
        for part in logits.chunks_mut(logit_rows(n_vocab, work.rows) * n_vocab) {
            let n = part.len() / n_vocab;
            head.run(work, first..first + n, Residual::None)?;
            work.buffers.logits.view().read_f32(part)?;
            first += n;
        }
        Ok(())
    }
}
