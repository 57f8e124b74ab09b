//! Element-wise operations, norms and the router.

use super::{Quants, THREADS, blocks, int, null_or};
use crate::device::{Arg, View};
use crate::{CudaError, Ops};
use tier_plan_formats::model::spec::{Activation, GateFunction, Gating, Groups, MoeSpec};

/// Most experts of a layer; the router kernel has the same constant.
pub use tier_plan_formats::model::gpu::MAX_EXPERTS;

/// Most groups of experts; the router kernel has the same constant.
pub use tier_plan_formats::model::gpu::MAX_GROUPS;

/// Rows of floats at a constant distance.
#[derive(Clone, Copy)]
pub struct Strided<'a> {
    /// Memory from the first row on.
    pub at: View<'a>,
    /// Values from the beginning of one row to the next.
    pub stride: usize,
}

impl Strided<'_> {
    fn check(&self, rows: usize, width: usize) {
        let last = rows.saturating_sub(1) * self.stride;
        assert!(
            width <= self.stride && self.at.words() >= last + width,
            "{rows} rows of {width} in {}",
            self.stride
        );
    }
}

/// A norm of rows after a residual is added to them.
#[derive(Clone, Copy)]
pub struct AddNorm<'a> {
    /// `[rows, width]`, to which the residual is added.
    pub x: View<'a>,
    /// `[rows, width]`.
    pub residual: Option<View<'a>>,
    /// `[width]`.
    pub weight: View<'a>,
    /// Rows of `x`.
    pub rows: usize,
    /// Values of a row.
    pub width: usize,
    /// Epsilon of the norm.
    pub eps: f32,
}

/// Parameters of a layer's router.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RouterSpec {
    /// Experts of the layer.
    pub n_expert: usize,
    /// Experts per token.
    pub n_used: usize,
    /// Function from logits to scores.
    pub gating: Gating,
    /// Groups of experts, if the layer has any.
    pub groups: Option<Groups>,
    /// Whether the chosen weights are divided by their sum.
    pub normalize: bool,
    /// Factor on the weights.
    pub scale: f32,
}

/// Experts that tokens choose by themselves.
#[derive(Clone, Copy)]
pub struct ChosenByToken<'a> {
    /// `[n_ids, n_used]` 32-bit indices of experts.
    pub table: View<'a>,
    /// `[tokens]` rows of the table.
    pub ids: View<'a>,
}

/// What a router made of tokens, and what it has for each expert.
#[derive(Clone, Copy)]
pub struct RouterLogits<'a> {
    /// `[tokens, n_expert]`.
    pub logits: View<'a>,
    /// Added for the choice only, `[n_expert]`.
    pub bias: Option<View<'a>>,
    /// Factors on weights, `[n_expert]`.
    pub factors: Option<View<'a>>,
    /// The choice, where the logits only give its weights.
    pub by_token: Option<ChosenByToken<'a>>,
}

impl From<&MoeSpec> for RouterSpec {
    fn from(moe: &MoeSpec) -> Self {
        let &MoeSpec {
            n_expert,
            n_used,
            gating,
            groups,
            normalize,
            scale,
            ..
        } = moe;
        Self {
            n_expert,
            n_used,
            gating,
            groups,
            normalize,
            scale,
        }
    }
}

impl Ops {
    /// Computes `out = x / sqrt(mean(x^2) + eps) * weight` for each of `rows` rows of `width`
    /// values; `out` may be `x`.
    pub fn rms_norm(
        &self,
        x: View<'_>,
        weight: Option<View<'_>>,
        rows: usize,
        width: usize,
        eps: f32,
        out: View<'_>,
    ) -> Result<(), CudaError> {
        self.rms_norm_of(
            Strided {
                at: x,
                stride: width,
            },
            weight,
            rows,
            width,
            eps,
            Strided {
                at: out,
                stride: width,
            },
        )
    }

    /// Computes [`rms_norm`](Self::rms_norm) of strided rows. The values between them stay as they
    /// are.
    pub fn rms_norm_of(
        &self,
        x: Strided<'_>,
        weight: Option<View<'_>>,
        rows: usize,
        width: usize,
        eps: f32,
        out: Strided<'_>,
    ) -> Result<(), CudaError> {
        x.check(rows, width);
        out.check(rows, width);
        assert!(weight.is_none_or(|w| w.words() >= width), "{width} weights");
        let args = [
            x.at.arg(),
            int(x.stride),
            null_or(weight),
            int(width),
            Arg::Float(eps),
            out.at.arg(),
            int(out.stride),
        ];
        self.launch("rms_norm", [blocks(rows, 1), 1, 1], THREADS, &args)
    }

    /// Computes `x += residual`, and the [norm](Self::rms_norm) of the sum to `out` and, quantized,
    /// to `quants`; one launch.
    ///
    /// # Panics
    /// When `width` is not a multiple of 32 where it is quantized.
    pub fn add_norm(
        &self,
        norm: &AddNorm<'_>,
        out: View<'_>,
        quants: Option<&mut Quants>,
    ) -> Result<(), CudaError> {
        let &AddNorm {
            x,
            residual,
            weight,
            rows,
            width,
            eps,
        } = norm;
        let n = rows * width;
        assert!(
            x.words() >= n && out.words() >= n && weight.words() >= width,
            "{rows} rows of {width}"
        );
        assert!(
            residual.is_none_or(|residual| residual.words() >= n),
            "{rows} rows of {width} to add"
        );
        let [q, scale, sums] = Quants::fill_or_null(quants, rows, width);
        let (residual, eps) = (null_or(residual), Arg::Float(eps));
        let args = [
            x.arg(),
            residual,
            weight.arg(),
            int(width),
            eps,
            out.arg(),
            q,
            scale,
            sums,
        ];
        self.launch("add_norm", [blocks(rows, 1), 1, 1], THREADS, &args)
    }

    /// Copies `rows` rows of `width` values.
    pub fn copy_rows(
        &self,
        x: Strided<'_>,
        rows: usize,
        width: usize,
        out: Strided<'_>,
    ) -> Result<(), CudaError> {
        x.check(rows, width);
        out.check(rows, width);
        let n = rows * width;
        let args = [
            x.at.arg(),
            int(x.stride),
            int(width),
            Arg::Long(n as i64),
            out.at.arg(),
            int(out.stride),
        ];
        self.launch("copy_rows", [blocks(n, THREADS), 1, 1], THREADS, &args)
    }

    /// Multiplies each of `rows` rows of `width` values by its factor, `factors` `[rows]`.
    pub fn scale_rows(
        &self,
        x: View<'_>,
        factors: View<'_>,
        rows: usize,
        width: usize,
    ) -> Result<(), CudaError> {
        assert!(
            x.words() >= rows * width && factors.words() >= rows,
            "{rows} rows of {width}"
        );
        let n = rows * width;
        let args = [x.arg(), factors.arg(), int(width), Arg::Long(n as i64)];
        self.launch("scale_rows", [blocks(n, THREADS), 1, 1], THREADS, &args)
    }

    /// Multiplies `n` values by what a function makes of their gates, one gate per `share` values in
    /// turn.
    pub fn gate(
        &self,
        x: View<'_>,
        gate: View<'_>,
        share: usize,
        function: GateFunction,
        n: usize,
    ) -> Result<(), CudaError> {
        assert!(
            share > 0 && x.words() >= n && gate.words() >= n.div_ceil(share),
            "{n} values, one gate per {share}"
        );
        let softplus = i32::from(function == GateFunction::Softplus);
        let args = [
            x.arg(),
            gate.arg(),
            int(share),
            Arg::Int(softplus),
            Arg::Long(n as i64),
        ];
        self.launch("gate", [blocks(n, THREADS), 1, 1], THREADS, &args)
    }

    /// Multiplies `n` values by a factor.
    pub fn scale(&self, x: View<'_>, factor: f32, n: usize) -> Result<(), CudaError> {
        assert!(x.words() >= n, "{n} values");
        let args = [x.arg(), Arg::Float(factor), Arg::Long(n as i64)];
        self.launch("scale", [blocks(n, THREADS), 1, 1], THREADS, &args)
    }

    /// Chooses experts for each token: `experts` and `weights` are `[tokens, n_used]`, largest
    /// score first, or in the order of the table.
    ///
    /// # Panics
    /// When there are more than [`MAX_EXPERTS`] experts or [`MAX_GROUPS`] groups.
    pub fn route(
        &self,
        r: &RouterSpec,
        logits: RouterLogits<'_>,
        tokens: usize,
        experts: View<'_>,
        weights: View<'_>,
    ) -> Result<(), CudaError> {
        let Groups {
            n: n_group,
            kept: n_kept,
        } = r.groups.unwrap_or(Groups { n: 0, kept: 0 });
        assert!(
            r.n_used <= r.n_expert && r.n_expert <= MAX_EXPERTS && n_group <= MAX_GROUPS,
            "{r:?}"
        );
        assert!(n_group == 0 || r.n_expert.is_multiple_of(n_group), "{r:?}");
        let RouterLogits {
            logits,
            bias,
            factors,
            by_token,
        } = logits;
        let mut by_expert = bias.iter().chain(&factors);
        assert!(
            logits.words() >= tokens * r.n_expert
                && by_expert.all(|values| values.words() >= r.n_expert),
            "logits"
        );
        assert!(
            experts.words() >= tokens * r.n_used && weights.words() >= tokens * r.n_used,
            "room for choices"
        );
        // Rows of the table that are there.
        let n_ids = by_token.map_or(0, |by| by.table.words() / r.n_used.max(1));
        assert!(
            by_token.is_none_or(|by| n_ids > 0 && by.ids.words() >= tokens),
            "{tokens} choices by token among {n_ids}"
        );
        let gating = match r.gating {
            Gating::Softmax => 0,
            Gating::Sigmoid => 1,
            Gating::SqrtSoftplus => 2,
            Gating::SoftmaxChosen => 3,
            Gating::SigmoidChosen => 4,
        };
        let args = [
            logits.arg(),
            null_or(bias),
            null_or(factors),
            int(r.n_expert),
            int(r.n_used),
            Arg::Int(gating),
            int(n_group),
            int(n_kept),
            Arg::Int(i32::from(r.normalize)),
            Arg::Float(r.scale),
            null_or(by_token.map(|by| by.table)),
            null_or(by_token.map(|by| by.ids)),
            int(n_ids),
            experts.arg(),
            weights.arg(),
        ];
        self.launch("route", [blocks(tokens, 1), 1, 1], 128, &args)
    }

    /// Combines the products with gate and up of `rows` rows of `width` values, in place in `gate`
    /// and quantized in `quants`. Without a gate, both are the products with up.
    pub fn activate(
        &self,
        activation: Activation,
        gate: View<'_>,
        up: View<'_>,
        rows: usize,
        width: usize,
        quants: Option<&mut Quants>,
    ) -> Result<(), CudaError> {
        let n = rows * width;
        assert!(gate.words() >= n && up.words() >= n, "{n} values");
        let grid = [blocks(n, THREADS), 1, 1];
        let [q, scale, sums] = Quants::fill_or_null(quants, rows, width);
        let [activation, first, second] = Self::activation_args(activation);
        let (gate, up) = (gate.arg(), up.arg());
        let args = [gate, up, activation, first, second, int(n), q, scale, sums];
        self.launch("activate", grid, THREADS, &args)
    }

    /// Returns an activation's number in `base.cuh`, and its parameters.
    pub(super) fn activation_args(activation: Activation) -> [Arg; 3] {
        let (number, first, second) = match activation {
            Activation::Silu => (0, 0.0, 0.0),
            Activation::ClampedSwiglu { alpha, limit } => (1, alpha, limit),
            Activation::ClampedSilu { limit } => (2, limit, 0.0),
            Activation::LimitedSilu { limit } => (3, limit, 0.0),
            Activation::Gelu => (4, 0.0, 0.0),
            Activation::Situ { beta, linear } => (5, beta, linear),
            Activation::SquaredRelu => (6, 0.0, 0.0),
        };
        [Arg::Int(number), Arg::Float(first), Arg::Float(second)]
    }

    /// Computes `x += y` for `n` values.
    pub fn add(&self, x: View<'_>, y: View<'_>, n: usize) -> Result<(), CudaError> {
        self.add_and_scale(x, y, 1.0, n)
    }

    /// Computes `x = (x + y) * factor` for `n` values.
    pub fn add_and_scale(
        &self,
        x: View<'_>,
        y: View<'_>,
        factor: f32,
        n: usize,
    ) -> Result<(), CudaError> {
        assert!(x.words() >= n && y.words() >= n, "{n} values");
        let args = [x.arg(), y.arg(), Arg::Float(factor), int(n)];
        self.launch("add", [blocks(n, THREADS), 1, 1], THREADS, &args)
    }

    /// Adds a bias of `[n_bias, width]` to each of `rows` rows of `width` values: the first one, or
    /// the one whose index is in `which`, `[rows]`. An index outside of the biases adds nothing.
    pub fn add_bias(
        &self,
        x: View<'_>,
        bias: View<'_>,
        which: Option<View<'_>>,
        rows: usize,
        width: usize,
    ) -> Result<(), CudaError> {
        assert!(
            x.words() >= rows * width && bias.words() >= width,
            "{rows} rows of {width}"
        );
        assert!(which.is_none_or(|w| w.words() >= rows), "{rows} choices");
        let n = rows * width;
        let n_bias = bias.words() / width.max(1);
        let args = [
            x.arg(),
            bias.arg(),
            int(n_bias),
            null_or(which),
            int(width),
            int(n),
        ];
        self.launch("add_bias", [blocks(n, THREADS), 1, 1], THREADS, &args)
    }

    /// Multiplies each row of `out`, `[rows, width]`, by the sigmoid of the dot product of `gate`,
    /// `[n]`, and its row of `x`, `[rows, n]`.
    pub fn sigmoid_gate(
        &self,
        gate: View<'_>,
        x: View<'_>,
        rows: usize,
        n: usize,
        width: usize,
        out: View<'_>,
    ) -> Result<(), CudaError> {
        assert!(
            gate.words() >= n && x.words() >= rows * n && out.words() >= rows * width,
            "{rows} x {n}, {width}"
        );
        let args = [gate.arg(), x.arg(), int(n), int(width), out.arg()];
        self.launch("sigmoid_gate", [blocks(rows, 1), 1, 1], THREADS, &args)
    }
}
