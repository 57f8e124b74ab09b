//! The parts of a layer on a GPU, and handles to run them.

use super::buffers::logit_rows;
use super::matrix::{FfnMatrices, GpuLoader, Matrix, product};
use super::mixer::{Mixer, MixerBatch};
use super::router::Router;
use super::streams::{BlockInput, WriteBack};
use super::workspace::{BlockEnd, Output, Purpose, Residual, Workspace};
use crate::layers::device_cache::DeviceCache;
use crate::layers::mixer::Segment;
use crate::layers::places::{LayerPlaces, Place};
use crate::layers::rope::{LayerRopes, RopeTable};
use std::ops::Range;
use tier_plan_cuda::{Buffer, CudaError};
use tier_plan_formats::model::spec::{Ffn as FfnSpec, LayerSpec, RouterInput, TensorId};
use tier_plan_formats::placement::TierIdx;

/// The parts of one layer.
pub(super) struct Layer {
    /// Whether all of its parts but routed experts are here.
    pub(super) is_whole: bool,
    pub(super) mixer: Option<LayerMixer>,
    pub(super) ffn: Option<LayerFfn>,
}

/// A mixer with its norm.
pub(super) struct LayerMixer {
    input: BlockInput,
    pub(super) mixer: Mixer,
    end: BlockEnd,
}

/// The feed-forward parts of a layer: at least one of them is here.
pub(super) struct LayerFfn {
    input: BlockInput,
    /// How results are written back.
    back: WriteBack,
    /// The form of normalized rows that the parts take.
    output: Output,
    pub(super) router: Option<Router>,
    /// The shared expert or the dense block.
    pub(super) block: Option<FfnBlock>,
    /// Norm of the routed experts' rows, where they read others than their router.
    experts_norm: Option<Buffer>,
    /// What is done to the sum of the routed experts before the shared one is added, and to both,
    /// where experts are added up apart from the hidden state.
    experts_end: Option<ExpertsEnd>,
    /// What follows the dense block, or all experts together.
    end: Option<BlockEnd>,
    /// Factor on the hidden state after the layer.
    output_scale: f32,
    /// The same on the host, for experts' results that meet there.
    pub(super) host_end: Option<HostEnd>,
}

/// What is done on the host to the sum of all experts, the shared one included.
pub(crate) struct HostEnd {
    /// Norm of the routed experts' sum, `[hidden]`.
    pub(crate) experts_norm: Option<Vec<f32>>,
    /// Factor on the sum of all experts.
    pub(crate) sum_scale: f32,
    /// Norm of that, `[hidden]`.
    pub(crate) norm: Option<Vec<f32>>,
    pub(crate) scale: f32,
}

/// What is done to sums of experts on the device.
struct ExpertsEnd {
    /// Norm of the routed experts' sum, `[hidden]`.
    norm: Option<Buffer>,
    /// Factor on the sum of all experts.
    sum_scale: f32,
}

pub(super) struct FfnBlock {
    matrices: FfnMatrices,
    /// Vector that gates a shared expert, `[hidden]`.
    gate: Option<Buffer>,
    /// Norm of a shared expert's result, `[hidden]`.
    norm: Option<Buffer>,
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
        layer: &LayerSpec,
        places: LayerPlaces,
        tier: TierIdx,
        ropes: LayerRopes,
        cache: Option<&DeviceCache>,
    ) -> Result<Self, CudaError> {
        let here = |place: Place| place == Some(tier);
        let (router, block) = match &layer.ffn {
            FfnSpec::Dense(ffn) if here(places.ffn) => (
                None,
                Some(FfnBlock {
                    matrices: FfnMatrices::new(loader, ffn)?,
                    gate: None,
                    norm: None,
                }),
            ),
            FfnSpec::Dense(_) | FfnSpec::None => (None, None),
            FfnSpec::Moe(moe) => {
                let shared = moe.shared.as_ref().filter(|_| here(places.shared));
                let shared = shared.map(|s| {
                    let matrices = FfnMatrices::new(loader, &s.ffn)?;
                    Ok(FfnBlock {
                        matrices,
                        gate: loader.opt_vector(s.gate)?,
                        norm: loader.opt_vector(s.norm)?,
                    })
                });
                let router = here(places.ffn).then(|| Router::new(loader, moe));
                (router.transpose()?, shared.transpose()?)
            }
        };
        let has_mixer = layer.has_mixer() && here(places.mixer);
        let mixer = cache.filter(|_| has_mixer).map(|cache| {
            let connection = layer.residual.connections.map(|c| c.mixer);
            Ok(LayerMixer {
                input: BlockInput::new(loader, connection.as_ref(), layer.mixer_norm)?,
                end: BlockEnd {
                    norm: loader.opt_vector(layer.residual.mixer_norm)?,
                    scale: layer.residual.mixer_scale,
                },
                mixer: Mixer::new(loader, &layer.mixer, ropes, cache.clone())?,
            })
        });
        let mixer = mixer.transpose()?;
        let has_shared = layer.moe().is_some_and(|moe| moe.shared.is_some());
        let has_blocks = here(places.ffn) && (here(places.shared) || !has_shared);
        let has_ffn = router.is_some() || block.is_some();
        let ffn = has_ffn.then(|| {
            let connection = layer.residual.connections.map(|c| c.ffn);
            // A shared expert away from its router gets rows that are read.
            let read_here = connection.as_ref().filter(|_| here(places.ffn));
            let takes_quants = router.as_ref().is_some_and(Router::takes_quants)
                || block.as_ref().is_some_and(|b| b.matrices.takes_quants());
            let residual = &layer.residual;
            let end = (!residual.ffn_is_plain()).then(|| {
                Ok(BlockEnd {
                    norm: loader.opt_vector(residual.ffn_norm)?,
                    scale: residual.ffn_scale,
                })
            });
            let scale = loader.weights.opt_vector(residual.output_scale);
            Ok(LayerFfn {
                input: BlockInput::new(loader, read_here, layer.ffn_norm)?,
                back: WriteBack::of(connection.as_ref()),
                output: Output::quantized_if(takes_quants),
                router,
                block,
                experts_norm: experts_norm(loader, layer)?,
                experts_end: ExpertsEnd::new(loader, layer)?,
                end: end.transpose()?,
                output_scale: scale.map_or(1.0, |scale| scale[0]),
                host_end: HostEnd::new(loader, layer),
            })
        });
        Ok(Self {
            is_whole: here(places.mixer) && has_blocks,
            mixer,
            ffn: ffn.transpose()?,
        })
    }
}

/// Loads the norm of the routed experts' rows, where they read others than their router.
fn experts_norm(loader: &GpuLoader<'_>, layer: &LayerSpec) -> Result<Option<Buffer>, CudaError> {
    let norm = layer.moe().and_then(|moe| {
        let apart = moe.input_norm.is_some() || moe.router_input != RouterInput::Normed;
        apart.then(|| moe.input_norm.unwrap_or(layer.ffn_norm))
    });
    loader.opt_vector(norm)
}

impl ExpertsEnd {
    fn new(loader: &GpuLoader<'_>, layer: &LayerSpec) -> Result<Option<Self>, CudaError> {
        let moe = layer.moe().filter(|_| layer.sums_experts_apart());
        let end = moe.map(|moe| {
            Ok(Self {
                norm: loader.opt_vector(moe.output_norm)?,
                sum_scale: moe.sum_scale,
            })
        });
        end.transpose()
    }
}

impl HostEnd {
    fn new(loader: &GpuLoader<'_>, layer: &LayerSpec) -> Option<Self> {
        let moe = layer.moe().filter(|_| layer.sums_experts_apart())?;
        let vector = |id: Option<TensorId>| id.map(|id| loader.weights.vector(id).to_vec());
        Some(Self {
            experts_norm: vector(moe.output_norm),
            sum_scale: moe.sum_scale,
            norm: vector(layer.residual.ffn_norm),
            scale: layer.residual.ffn_scale,
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
        residual: Residual,
    ) -> Result<(), CudaError> {
        let (n, first_row) = (rows.len(), rows.start);
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

impl LayerFfn {
    /// Normalizes rows for this layer's parts here, and for other consumers that take `output`.
    pub(super) fn norm(
        &self,
        work: &mut Workspace,
        rows: Range<usize>,
        residual: Residual,
        output: Output,
    ) -> Result<(), CudaError> {
        self.read(work, rows, residual, output, Purpose::Block)
    }

    fn read(
        &self,
        work: &mut Workspace,
        rows: Range<usize>,
        residual: Residual,
        output: Output,
        purpose: Purpose,
    ) -> Result<(), CudaError> {
        let output = if self.output == Output::Quantized {
            Output::Quantized
        } else {
            output
        };
        self.input.read(work, rows, residual, output, purpose)
    }

    /// Normalizes rows for the router, and for other consumers that take `output` where they read
    /// the same rows.
    pub(super) fn norm_for_router(
        &self,
        work: &mut Workspace,
        router: &Router,
        rows: Range<usize>,
        residual: Residual,
        (output, purpose): (Output, Purpose),
    ) -> Result<(), CudaError> {
        match &router.norm {
            Some(norm) => {
                let output = Output::quantized_if(router.takes_quants());
                work.norm(norm, rows, residual, output)
            }
            None => self.read(work, rows, residual, output, purpose),
        }
    }

    /// Takes rows that were normalized elsewhere, `[rows, hidden]`.
    fn take_normalized(&self, work: &mut Workspace, rows: &[f32]) -> Result<(), CudaError> {
        let (buffers, n) = (&mut work.buffers, rows.len() / work.hidden);
        let answer = buffers.answer.view();
        answer.write_f32(rows)?;
        if self.output == Output::Quantized {
            let quants = &mut buffers.quants;
            work.ops.quantize(answer, n, work.hidden, quants)?;
        }
        Ok(())
    }

    /// Has sums of experts written back as this layer's blocks write.
    pub(super) fn prepare_sums(&self, work: &mut Workspace) {
        work.back = self.back;
    }

    /// Normalizes rows for the routed experts, where these read others than their router.
    pub(super) fn norm_for_experts(
        &self,
        work: &mut Workspace,
        rows: Range<usize>,
        output: Output,
    ) -> Result<(), CudaError> {
        let norm = self.experts_norm.as_ref();
        norm.map_or(Ok(()), |norm| work.norm(norm, rows, Residual::None, output))
    }

    /// Whether a shared expert reads the rows that the routed ones read.
    pub(super) fn shares_rows(&self) -> bool {
        self.experts_norm.is_none()
    }

    /// Does to `n` rows of `buffers.out` what follows the dense block, or all experts together.
    pub(super) fn finish(&self, work: &Workspace, n: usize) -> Result<(), CudaError> {
        if let Some(end) = self.experts_end.as_ref().filter(|end| end.sum_scale != 1.0) {
            let out = work.buffers.out.view();
            work.ops.scale(out, end.sum_scale, n * work.hidden)?;
        }
        self.end.as_ref().map_or(Ok(()), |end| work.finish(end, n))
    }

    /// Returns whether all experts are added up before they are added to the hidden state.
    pub(super) fn sums_apart(&self) -> bool {
        self.experts_end.is_some()
    }

    /// Returns the norm of the routed experts' sum.
    pub(super) fn sum_norm(&self) -> Option<&Buffer> {
        self.experts_end.as_ref()?.norm.as_ref()
    }

    /// Adds a block's result in `buffers.out`, which is `residual` to rows, where a factor on the
    /// hidden state follows. Returns what is left to add.
    pub(super) fn end_layer(
        &self,
        work: &Workspace,
        rows: Range<usize>,
        residual: Residual,
    ) -> Result<Residual, CudaError> {
        if self.output_scale == 1.0 {
            return Ok(residual);
        }
        let (n, state) = (rows.len() * work.hidden, work.state(rows));
        let ops = &work.ops;
        match residual {
            Residual::Pending => {
                ops.add_and_scale(state, work.buffers.out.view(), self.output_scale, n)?
            }
            Residual::None => ops.scale(state, self.output_scale, n)?,
        }
        Ok(Residual::None)
    }
}

impl FfnBlock {
    /// Computes to `buffers.out` what the block adds to `n` rows that are normalized in
    /// `buffers.answer`.
    pub(super) fn run(&self, work: &mut Workspace, n: usize) -> Result<(), CudaError> {
        let (ops, buffers, hidden) = (&work.ops, &mut work.buffers, work.hidden);
        self.matrices.run(ops, buffers, n)?;
        let out = buffers.out.view();
        if let Some(gate) = &self.gate {
            let x = buffers.answer.view();
            ops.sigmoid_gate(gate.view(), x, n, hidden, hidden, out)?;
        }
        let norm = self.norm.as_ref().map(Buffer::view);
        norm.map_or(Ok(()), |norm| {
            ops.rms_norm(out, Some(norm), n, hidden, work.eps, out)
        })
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

/// The state of rows that a feed-forward block takes.
#[derive(Debug, Clone, Copy)]
pub(crate) enum FfnInput<'a> {
    /// They were normalized elsewhere, `[rows, hidden]`.
    Given(&'a [f32]),
    /// The layer's router has normalized the rows on this GPU.
    Normalized,
    /// The rows are still to be normalized.
    Raw,
}

/// A layer's shared expert or dense block on a GPU.
pub(crate) struct FfnPart<'a> {
    pub(super) ffn: &'a LayerFfn,
    pub(super) block: &'a FfnBlock,
    pub(super) work: &'a mut Workspace,
}

impl<'a> FfnPart<'a> {
    /// Adds a dense block's result to rows.
    pub(crate) fn run(self, rows: Range<usize>) -> Result<(), CudaError> {
        let (ffn, work) = self.compute(rows.clone(), FfnInput::Raw)?;
        ffn.finish(work, rows.len())?;
        match ffn.end_layer(work, rows.clone(), Residual::Pending)? {
            Residual::Pending => work.add_out(rows),
            Residual::None => Ok(()),
        }
    }

    /// Adds a shared expert's result to rows.
    pub(crate) fn run_shared(
        self,
        rows: Range<usize>,
        input: FfnInput<'_>,
    ) -> Result<(), CudaError> {
        let (_, work) = self.compute(rows.clone(), input)?;
        work.add_out(rows)
    }

    /// Copies a shared expert's results for rows to the host, `[rows, hidden]`: there they meet those
    /// of the routed experts.
    pub(crate) fn take_shared(
        self,
        rows: Range<usize>,
        input: FfnInput<'_>,
        out: &mut [f32],
    ) -> Result<(), CudaError> {
        let (_, work) = self.compute(rows, input)?;
        work.buffers.out.view().read_f32(out)
    }

    fn compute(
        self,
        rows: Range<usize>,
        input: FfnInput<'_>,
    ) -> Result<(&'a LayerFfn, &'a mut Workspace), CudaError> {
        let Self { ffn, block, work } = self;
        let n = rows.len();
        match input {
            FfnInput::Normalized => {}
            FfnInput::Given(normed) => ffn.take_normalized(work, normed)?,
            FfnInput::Raw => ffn.norm(work, rows, Residual::None, Output::F32)?,
        }
        block.run(work, n)?;
        Ok((ffn, work))
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
