//! Routers on a GPU, and the matrices to the space of latent experts and back.

use super::ffn::LayerFfn;
use super::latent::Latent;
use super::matrix::{GpuLoader, Matrix, product};
use super::workspace::{Output, Purpose, Residual, Workspace};
use std::ops::Range;
use tier_plan_cuda::ops::{ChosenByToken, RouterLogits, RouterSpec};
use tier_plan_cuda::{Buffer, CudaError, View};
use tier_plan_formats::model::spec::{MoeSpec, RouterInput, TensorId};

/// A router, and what belongs to its group.
pub(super) struct Router {
    matrix: Matrix,
    /// Norm of its rows, where it reads others than the layer's blocks.
    pub(super) norm: Option<Buffer>,
    selection_bias: Option<Buffer>,
    /// Factors on experts' weights.
    expert_scale: Option<Buffer>,
    /// `[n_vocab, n_used]` experts, where tokens alone choose them.
    by_token: Option<Buffer>,
    pub(super) spec: RouterSpec,
    /// The space of the experts, if that is another than the hidden state's.
    pub(super) latent: Option<Latent>,
}

impl Router {
    pub(super) fn new(loader: &GpuLoader<'_>, moe: &MoeSpec) -> Result<Self, CudaError> {
        let latent = moe.latent.as_ref();
        let norm = match moe.router_input {
            RouterInput::Normed => None,
            RouterInput::Own(id) => {
                let weights = loader.weights.vector(id);
                let factor = 1.0 / (weights.len() as f32).sqrt();
                let weights: Vec<f32> = weights.iter().map(|w| factor * w).collect();
                Some(Buffer::of_f32(loader.device, &weights)?)
            }
        };
        Ok(Self {
            matrix: loader.linear(&moe.router)?,
            norm,
            selection_bias: loader.opt_vector(moe.selection_bias)?,
            expert_scale: loader.opt_vector(moe.expert_scale)?,
            by_token: moe.by_token.map(|id| table(loader, id)).transpose()?,
            spec: RouterSpec::from(moe),
            latent: latent.map(|l| Latent::new(loader, l)).transpose()?,
        })
    }

    /// Whether tokens alone choose the experts.
    pub(super) fn chooses_by_token(&self) -> bool {
        self.by_token.is_some()
    }

    /// Whether any matrix that reads normalized rows takes quantized ones.
    pub(super) fn takes_quants(&self) -> bool {
        self.matrix.takes_quants() || self.latent.as_ref().is_some_and(Latent::takes_quants)
    }

    /// Chooses experts for `n` rows that are normalized in `buffers.answer`, and whose tokens are in
    /// `buffers.ids` where these choose.
    pub(super) fn choose(
        &self,
        work: &Workspace,
        n: usize,
        to: ChoiceViews<'_>,
    ) -> Result<(), CudaError> {
        let (ops, buffers) = (&work.ops, &work.buffers);
        let logits = buffers.router_logits.view();
        product(
            ops,
            &self.matrix,
            n,
            buffers.answer.view(),
            &buffers.quants,
            logits,
        )?;
        let logits = RouterLogits {
            logits,
            bias: self.selection_bias.as_ref().map(Buffer::view),
            factors: self.expert_scale.as_ref().map(Buffer::view),
            by_token: self.by_token.as_ref().map(|table| ChosenByToken {
                table: table.view(),
                ids: buffers.ids.view(),
            }),
        };
        ops.route(&self.spec, logits, n, to.experts, to.weights)
    }

    /// Returns where in `buffers.answer` latent experts' rows are, after `n` normalized rows and
    /// their choices.
    pub(super) fn latent_values(&self, work: &Workspace, n: usize) -> Range<usize> {
        let start = (n * (work.hidden + 2 * self.spec.n_used)).next_multiple_of(ROW_ALIGNMENT);
        start..start + n * self.latent.as_ref().map_or(0, Latent::width)
    }
}

/// Loads a table of experts by token.
fn table(loader: &GpuLoader<'_>, id: TensorId) -> Result<Buffer, CudaError> {
    let experts = loader.weights.vector(id).iter();
    let experts: Vec<i32> = experts.map(|e| *e as i32).collect();
    Buffer::of_i32(loader.device, &experts)
}

/// Values that the address of a matrix's input is a multiple of.
pub(super) const ROW_ALIGNMENT: usize = 4;

/// Where a router's choices go on the device.
#[derive(Clone, Copy)]
pub(super) struct ChoiceViews<'a> {
    /// `[rows, n_used]`.
    pub(super) experts: View<'a>,
    /// `[rows, n_used]`.
    pub(super) weights: View<'a>,
}

impl<'a> ChoiceViews<'a> {
    /// Takes the first `2 * n` words of a view, for `n` choices.
    pub(super) fn of(view: View<'a>, n: usize) -> Self {
        Self {
            experts: view.floats(0..n),
            weights: view.floats(n..2 * n),
        }
    }
}

/// What experts elsewhere read.
pub(crate) struct RoutedRows<'a> {
    /// `[rows, hidden]`: normalized rows.
    pub(crate) normed: &'a [f32],
    /// `[rows, latent]`: what latent experts read; empty in layers without them.
    pub(crate) latent: &'a [f32],
}

/// A layer's router on a GPU.
pub(crate) struct RouterPart<'a> {
    pub(super) layer: usize,
    pub(super) ffn: &'a LayerFfn,
    pub(super) router: &'a Router,
    pub(super) work: &'a mut Workspace,
}

impl<'a> RouterPart<'a> {
    /// Chooses experts for rows, `[rows, n_used]`, with their weights. `tokens` are those of the rows.
    /// Returns what the experts take.
    pub(crate) fn route(
        mut self,
        rows: Range<usize>,
        tokens: &[u32],
        experts: &mut [u16],
        weights: &mut [f32],
    ) -> Result<RoutedRows<'a>, CudaError> {
        let n = rows.len();
        if self.router.chooses_by_token() {
            self.work.put_ids(tokens)?;
        }
        let (n_normed, n_choices) = self.choose(rows.clone(), Purpose::Block)?;
        let Self {
            layer,
            ffn,
            router,
            work,
        } = self;
        let latent = router.latent_values(work, n);
        let mut n_values = n_normed + 2 * n_choices;
        if let Some(space) = &router.latent {
            space.enter(work, n, latent.clone())?;
            n_values = latent.end;
        }
        ffn.norm_for_experts(work, rows, Output::F32)?;
        work.answer.resize(n_values, 0.0);
        work.buffers.answer.view().read_f32(&mut work.answer)?;
        let choices = &work.answer[n_normed..n_normed + 2 * n_choices];
        let (indices, chosen_weights) = choices.split_at(n_choices);
        work.decode_experts(layer, router.spec.n_expert, indices, experts)?;
        weights.copy_from_slice(chosen_weights);
        Ok(RoutedRows {
            normed: &work.answer[..n_normed],
            latent: work.answer.get(latent).unwrap_or_default(),
        })
    }

    /// Predicts the experts that the router will choose from the present state of rows,
    /// `[rows, n_used]`. It is not asked where tokens alone choose.
    pub(crate) fn predict(
        mut self,
        rows: Range<usize>,
        experts: &mut Vec<u16>,
    ) -> Result<(), CudaError> {
        let (n_normed, n_choices) = self.choose(rows, Purpose::Prediction)?;
        let Self {
            layer,
            router,
            work,
            ..
        } = self;
        work.answer.resize(n_choices, 0.0);
        work.buffers
            .answer
            .view()
            .floats(n_normed..n_normed + n_choices)
            .read_f32(&mut work.answer)?;
        experts.resize(n_choices, 0);
        work.decode_experts(layer, router.spec.n_expert, &work.answer, experts)
    }

    /// Normalizes rows and chooses experts. Returns the number of normalized values in
    /// `buffers.answer`, and of the choices after them.
    fn choose(
        &mut self,
        rows: Range<usize>,
        purpose: Purpose,
    ) -> Result<(usize, usize), CudaError> {
        let n = rows.len();
        let form = (Output::F32, purpose);
        self.ffn
            .norm_for_router(self.work, self.router, rows, Residual::None, form)?;
        let (n_normed, n_choices) = (n * self.work.hidden, n * self.router.spec.n_used);
        let choices = self
            .work
            .buffers
            .answer
            .view()
            .floats(n_normed..n_normed + 2 * n_choices);
        self.router
            .choose(self.work, n, ChoiceViews::of(choices, n_choices))?;
        Ok((n_normed, n_choices))
    }

    /// Takes sums of latent experts, `[rows, latent]`, to the hidden state's width, `[rows, hidden]`.
    pub(crate) fn leave_latent(self, sums: &[f32], out: &mut [f32]) -> Result<(), CudaError> {
        let Self { router, work, .. } = self;
        let Some(latent) = &router.latent else {
            return Ok(());
        };
        let (rows, hidden, width) = (work.rows, work.hidden, latent.width());
        let parts = sums.chunks(rows * width).zip(out.chunks_mut(rows * hidden));
        for (sums, out) in parts {
            latent.leave_from(work, sums)?;
            work.buffers.out.view().read_f32(out)?;
        }
        Ok(())
    }

    /// Adds what sums of latent experts, `[rows, latent]`, make to the first rows of the hidden state.
    pub(crate) fn add_latent(self, sums: &[f32]) -> Result<(), CudaError> {
        let Self { router, work, .. } = self;
        let Some(latent) = &router.latent else {
            return Ok(());
        };
        let (rows, width) = (work.rows, latent.width());
        for (i, sums) in sums.chunks(rows * width).enumerate() {
            latent.leave_from(work, sums)?;
            work.add_out(i * rows..i * rows + sums.len() / width)?;
        }
        Ok(())
    }
}
