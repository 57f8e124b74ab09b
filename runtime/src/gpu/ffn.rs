//! The feed-forward parts of a layer on a GPU: the dense block or the shared expert, and what is done
//! around routed experts.

use super::inputs::EndInput;
use super::matrix::{FfnMatrices, GpuLoader};
use super::router::Router;
use super::streams::{BlockInput, WriteBack};
use super::workspace::{BlockEnd, Output, Purpose, Residual, Workspace};
use crate::layers::places::{LayerPlaces, Place};
use std::ops::Range;
use tier_plan_cuda::{Buffer, CudaError};
use tier_plan_formats::model::spec::{Ffn, LayerSpec, RouterInput, SharedSpec, TensorId};
use tier_plan_formats::placement::TierIdx;

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
    /// What the tokens' own inputs add after all blocks.
    input_of_tokens: Option<EndInput>,
    /// Factor on the hidden state after the layer.
    output_scale: f32,
    /// What is done to experts' results that meet on the host.
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

impl LayerFfn {
    /// Loads the feed-forward parts of a layer that are placed on `tier`, if there are any.
    pub(super) fn new(
        loader: &GpuLoader<'_>,
        (index, layer): (usize, &LayerSpec),
        places: LayerPlaces,
        tier: TierIdx,
    ) -> Result<Option<Self>, CudaError> {
        let here = |place: Place| place == Some(tier);
        let (router, block) = match &layer.ffn {
            Ffn::Dense(ffn) if here(places.ffn) => {
                let matrices = FfnMatrices::new(loader, ffn)?;
                (None, Some(FfnBlock::dense(matrices)))
            }
            Ffn::Dense(_) | Ffn::None => (None, None),
            Ffn::Moe(moe) => {
                let shared = moe.shared.as_ref().filter(|_| here(places.shared));
                let shared = shared.map(|shared| FfnBlock::shared(loader, shared));
                let router = here(places.ffn).then(|| Router::new(loader, moe));
                (router.transpose()?, shared.transpose()?)
            }
        };
        if router.is_none() && block.is_none() {
            return Ok(None);
        }
        let connection = layer.residual.connections.map(|c| c.ffn);
        // A shared expert away from its router gets rows that are read.
        let read_here = connection.as_ref().filter(|_| here(places.ffn));
        let takes_quants = router.as_ref().is_some_and(Router::takes_quants)
            || block.as_ref().is_some_and(|b| b.matrices.takes_quants());
        let residual = &layer.residual;
        let end = (!residual.ffn_is_plain()).then(|| {
            Ok::<_, CudaError>(BlockEnd {
                norm: loader.opt_vector(residual.ffn_norm)?,
                scale: residual.ffn_scale,
            })
        });
        let scale = loader.weights.opt_vector(residual.output_scale);
        Ok(Some(Self {
            input: BlockInput::new(loader, read_here, layer.ffn_norm)?,
            back: WriteBack::of(connection.as_ref()),
            output: Output::quantized_if(takes_quants),
            router,
            block,
            experts_norm: experts_norm(loader, layer)?,
            experts_end: ExpertsEnd::new(loader, layer)?,
            end: end.transpose()?,
            input_of_tokens: residual
                .layer_input
                .as_ref()
                .map(|input| EndInput::new(loader, input, index))
                .transpose()?,
            output_scale: scale.map_or(1.0, |scale| scale[0]),
            host_end: HostEnd::new(loader, layer),
        }))
    }

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

    /// Adds a block's result in `buffers.out`, which is `residual` to rows, where tokens' inputs or a
    /// factor on the hidden state follow, and does these. Returns what is left to add.
    pub(super) fn end_layer(
        &self,
        work: &mut Workspace,
        rows: Range<usize>,
        mut residual: Residual,
    ) -> Result<Residual, CudaError> {
        if let Some(input) = &self.input_of_tokens {
            work.complete(rows.clone(), residual)?;
            input.run(work, rows.clone())?;
            residual = Residual::Pending;
        }
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
    fn dense(matrices: FfnMatrices) -> Self {
        Self {
            matrices,
            gate: None,
            norm: None,
        }
    }

    fn shared(loader: &GpuLoader<'_>, shared: &SharedSpec) -> Result<Self, CudaError> {
        Ok(Self {
            matrices: FfnMatrices::new(loader, &shared.ffn)?,
            gate: loader.opt_vector(shared.gate)?,
            norm: loader.opt_vector(shared.norm)?,
        })
    }

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
