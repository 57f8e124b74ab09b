//! Kimi delta attention between its matrix products.

use super::delta::{ProjectedHeads, ResultGates, ResultHeads, THREADS, columns, of_width};
use super::{MAX_DELTA_HEAD, Quants, States, TextRuns, blocks, few, int};
use crate::device::{Arg, View};
use crate::{CudaError, Ops};
use tier_plan_formats::model::spec::{DecayGate, DeltaGate, KdaSpec};

/// Sizes and constants of a layer.
#[derive(Debug, Clone, Copy)]
pub struct KdaSizes {
    /// Heads, of queries, keys, and values alike.
    pub n_head: usize,
    /// Width of every head: a multiple of 4 up to [`MAX_DELTA_HEAD`].
    pub head_dim: usize,
    /// Tokens that the convolution spans, the current one included.
    pub conv_taps: usize,
    /// What makes decays of their inputs.
    pub decay_gate: DecayGate,
    /// Whether the steepness has the other sign, as a negative number.
    pub steepness_negated: bool,
    /// Epsilon in the length that queries and keys are divided by.
    pub length_eps: f32,
}

impl From<&KdaSpec> for KdaSizes {
    fn from(k: &KdaSpec) -> Self {
        Self {
            n_head: k.n_head,
            head_dim: k.head_dim,
            conv_taps: k.conv_taps,
            decay_gate: k.decay_gate,
            steepness_negated: k.steepness_negated,
            length_eps: k.length_eps,
        }
    }
}

impl KdaSizes {
    /// Returns the values of all heads, of queries, or keys, or values.
    pub fn width(&self) -> usize {
        self.n_head * self.head_dim
    }

    /// Returns the number of values of the convolution's state: its past inputs.
    pub fn conv_state(&self) -> usize {
        (self.conv_taps - 1) * 3 * self.width()
    }

    /// Returns the number of values of the state matrices.
    pub fn matrices(&self) -> usize {
        self.width() * self.head_dim
    }
}

/// A layer's tokens after its first matrix products, and its state.
#[derive(Clone, Copy)]
pub struct Kda<'a> {
    /// Sizes of the layer.
    pub sizes: KdaSizes,
    /// Tokens of all texts.
    pub tokens: usize,
    /// Queries, keys, and values, `[tokens, n_head * head_dim]` each.
    pub projected: [View<'a>; 3],
    /// Inputs of the decays, `[tokens, n_head * head_dim]`; the decays afterwards.
    pub decays: View<'a>,
    /// Inputs of the strengths, `[tokens, n_head]`.
    pub raw_strengths: View<'a>,
    /// `[tokens, n_head * head_dim]`; their sigmoid is the factor.
    pub gates: View<'a>,
    /// `[3 * n_head * head_dim, conv_taps]`, oldest tap first.
    pub conv: View<'a>,
    /// Added to the inputs of the decays, `[n_head * head_dim]`.
    pub decay_bias: View<'a>,
    /// `[n_head]`.
    pub steepness: View<'a>,
    /// `[head_dim]`.
    pub norm: View<'a>,
    /// Epsilon of the norm.
    pub eps: f32,
    /// `[conv_taps - 1, 3 * n_head * head_dim]` by state: the convolution's inputs of the last tokens,
    /// the newest last.
    pub inputs: States<'a>,
    /// `[n_head, head_dim, head_dim]` by state: the matrices, column by column.
    pub matrices: States<'a>,
    /// `[tokens, 3 * n_head, head_dim]`: workspace for queries, keys, and values.
    pub heads: View<'a>,
    /// `[tokens, n_head, 2]`: workspace for strengths.
    pub rates: View<'a>,
    /// `[tokens, n_head * head_dim]`: the normed and gated result.
    pub out: View<'a>,
}

impl<'a> Kda<'a> {
    /// Returns the projected heads.
    fn projected_heads(&self) -> ProjectedHeads<'a> {
        let [queries, keys, values] = self.projected;
        let dim = self.sizes.head_dim;
        ProjectedHeads {
            queries,
            keys,
            values,
            width: self.sizes.width(),
            key_step: dim,
            value_step: dim,
        }
    }

    /// Panics if a size is not supported, or a buffer is too short.
    fn check(&self) {
        let (s, n) = (self.sizes, self.tokens);
        let (heads, dim, width) = (s.n_head, s.head_dim, s.width());
        assert!(heads > 0 && s.conv_taps > 0, "{s:?}");
        assert!(
            dim > 0 && dim.is_multiple_of(4) && dim <= MAX_DELTA_HEAD,
            "{s:?}"
        );
        let rows = [self.decays, self.gates, self.out];
        let rows = self.projected.iter().chain(&rows);
        assert!(
            rows.into_iter().all(|rows| rows.words() >= n * width),
            "{n} tokens: {s:?}"
        );
        assert!(
            self.raw_strengths.words() >= n * heads && self.rates.words() >= 2 * n * heads,
            "{n} strengths: {s:?}"
        );
        assert!(self.heads.words() >= 3 * n * width, "{n} tokens: {s:?}");
        assert!(
            self.conv.words() >= 3 * width * s.conv_taps
                && self.decay_bias.words() >= width
                && self.steepness.words() >= heads
                && self.norm.words() >= dim,
            "{s:?}"
        );
    }
}

impl Ops {
    /// Advances texts' states by runs of tokens: `out = delta(conv(projected))`. At position 0 a state is
    /// taken for zero. The result does not depend on how tokens are split into calls, nor on other
    /// texts, to the bit.
    pub fn kda(&self, k: &Kda<'_>, runs: TextRuns<'_>) -> Result<(), CudaError> {
        let (s, n) = (k.sizes, k.tokens);
        k.check();
        let states = [(k.inputs, s.conv_state()), (k.matrices, s.matrices())];
        let (of_runs, [inputs, matrices]) = runs.after(n, states);
        if runs.count() == 0 {
            return Ok(());
        }
        let (n_head, dim) = (s.n_head, s.head_dim);
        let heads = k.projected_heads();
        let sign = if s.steepness_negated { -1.0 } else { 1.0 };
        let bound = match s.decay_gate {
            DecayGate::Softplus => 0.0,
            DecayGate::Bounded { bound } => bound,
        };
        let args = [
            &[
                heads.queries.arg(),
                heads.keys.arg(),
                heads.values.arg(),
                int(n_head),
                int(dim),
                int(s.conv_taps),
                k.conv.arg(),
            ][..],
            &inputs[..],
            &of_runs,
            &[
                k.raw_strengths.arg(),
                k.decay_bias.arg(),
                k.steepness.arg(),
                Arg::Float(sign),
                Arg::Float(bound),
                Arg::Float(s.length_eps),
                k.heads.arg(),
                k.rates.arg(),
                k.decays.arg(),
            ][..],
        ]
        .concat();
        let grid = [blocks(3 * n_head, 1), few(n), 1];
        self.launch("kda_convolve", grid, THREADS, &args)?;
        let args = [
            &[
                k.heads.aligned().arg(),
                k.rates.arg(),
                k.decays.aligned().arg(),
                int(n_head),
                int(dim),
            ][..],
            &of_runs[..],
            &matrices,
            &[
                k.out.arg(),
                heads.queries.arg(),
                heads.keys.arg(),
                heads.values.arg(),
                int(s.conv_taps - 1),
            ][..],
            &inputs,
        ]
        .concat();
        let kernels = [
            "kda_recur_32",
            "kda_recur_64",
            "kda_recur_128",
            "kda_recur_256",
        ];
        let recur = of_width(kernels, dim);
        self.launch(recur, columns(dim, n_head, runs), THREADS, &args)
    }

    /// Makes the result of what [`kda`](Self::kda) left: `out = norm(out) * sigmoid(gates)`, also
    /// quantized in `quants`.
    ///
    /// # Panics
    /// When it is quantized and the width of heads is not a multiple of 32.
    pub fn gate_kda(&self, k: &Kda<'_>, quants: Option<&mut Quants>) -> Result<(), CudaError> {
        k.check();
        let (s, dim) = (k.sizes, k.sizes.head_dim);
        let result = ResultHeads {
            values: k.out,
            tokens: k.tokens,
            heads: s.n_head,
            dim,
            norm: k.norm,
            eps: k.eps,
        };
        let gates = ResultGates {
            values: k.gates,
            width: s.width(),
            step: dim,
            group: 1,
            gate: DeltaGate::Sigmoid,
        };
        self.gate_heads(&result, &gates, quants)
    }
}
