//! The gated delta net between its matrix products.

use super::{Quants, States, TextRuns, blocks, few, int};
use crate::device::{Arg, View};
use crate::{CudaError, Ops};
use tier_plan_formats::model::spec::{DeltaGate, DeltaInput, DeltaRates, DeltaSpec, KeySharing};

/// Widest head; the kernels have the same constant. Widths are multiples of 4.
pub use tier_plan_formats::model::gpu::MAX_DELTA_HEAD;

/// Columns of a state matrix per block; the kernels have the same constant.
const COLUMNS: usize = 16;

/// Threads per block; the kernels have the same constant.
pub(super) const THREADS: u32 = 128;

/// Sizes and layout of a layer.
#[derive(Debug, Clone, Copy)]
pub struct DeltaSizes {
    /// Query heads, and as many key heads.
    pub n_key_head: usize,
    /// Value heads; a multiple of `n_key_head`.
    pub n_value_head: usize,
    /// Width of every head: a multiple of 4 up to [`MAX_DELTA_HEAD`].
    pub head_dim: usize,
    /// Tokens that the convolution spans, the current one included.
    pub conv_taps: usize,
    /// Assignment of value heads to key heads.
    pub sharing: KeySharing,
    /// Whether projections are grouped by key head, with the gates among them. Otherwise they are
    /// query heads, key heads, value heads.
    pub by_key_head: bool,
    /// Whether strengths and decays are grouped by key head. Otherwise all strengths come first.
    pub rates_by_key_head: bool,
    /// Factor that a gate becomes.
    pub gate: DeltaGate,
}

impl From<&DeltaSpec> for DeltaSizes {
    fn from(d: &DeltaSpec) -> Self {
        let &DeltaSpec {
            n_key_head,
            n_value_head,
            head_dim,
            conv_taps,
            sharing,
            gate,
            ..
        } = d;
        let by_key_head = matches!(d.input, DeltaInput::ByKeyHead(_));
        let rates_by_key_head = matches!(d.rates, DeltaRates::ByKeyHead(_));
        Self {
            n_key_head,
            n_value_head,
            head_dim,
            conv_taps,
            sharing,
            by_key_head,
            rates_by_key_head,
            gate,
        }
    }
}

impl DeltaSizes {
    /// Returns the number of query, key and value heads.
    fn heads(&self) -> usize {
        2 * self.n_key_head + self.n_value_head
    }

    /// Returns the number of values of the convolution's state: its past inputs.
    pub fn conv_state(&self) -> usize {
        (self.conv_taps - 1) * self.heads() * self.head_dim
    }

    /// Returns the number of values of the state matrices.
    pub fn matrices(&self) -> usize {
        self.n_value_head * self.head_dim * self.head_dim
    }

    /// Returns the number of values in a row of projections.
    fn projected(&self) -> usize {
        let gates = if self.by_key_head {
            self.n_value_head
        } else {
            0
        };
        (self.heads() + gates) * self.head_dim
    }
}

/// Where the heads of projections lie: rows of `width` values, in which key heads are `key_step`
/// values apart, and the value heads of a key head begin `value_step` after those of the last one.
pub(super) struct ProjectedHeads<'a> {
    pub(super) queries: View<'a>,
    pub(super) keys: View<'a>,
    pub(super) values: View<'a>,
    pub(super) width: usize,
    pub(super) key_step: usize,
    pub(super) value_step: usize,
}

/// The gates of a result, in rows of `width` values: those of `group` value heads lie one after the
/// other, `step` values after those of the last group.
pub(super) struct ResultGates<'a> {
    pub(super) values: View<'a>,
    pub(super) width: usize,
    pub(super) step: usize,
    pub(super) group: usize,
    pub(super) gate: DeltaGate,
}

/// The heads of a result, `[tokens, heads, dim]`.
pub(super) struct ResultHeads<'a> {
    pub(super) values: View<'a>,
    pub(super) tokens: usize,
    pub(super) heads: usize,
    pub(super) dim: usize,
    /// `[dim]`.
    pub(super) norm: View<'a>,
    pub(super) eps: f32,
}

/// A layer's tokens after its first matrix products, and its states.
#[derive(Clone, Copy)]
pub struct Delta<'a> {
    /// Tokens of all texts.
    pub tokens: usize,
    /// Sizes of the layer.
    pub sizes: DeltaSizes,
    /// `[tokens, channels]`, with the gates of all value heads if grouped by key head.
    pub projected: View<'a>,
    /// `[tokens, n_value_head * head_dim]`, unless grouped by key head.
    pub gates: View<'a>,
    /// Strengths, `[tokens, n_value_head]`; or strengths and decays, `[tokens, 2 * n_value_head]`
    /// grouped by key head.
    pub raw_strengths: View<'a>,
    /// Decays, `[tokens, n_value_head]`, unless grouped by key head.
    pub raw_decays: View<'a>,
    /// `[channels, conv_taps]`, oldest tap first.
    pub conv: View<'a>,
    /// `[n_value_head]`, added to the decay's input.
    pub dt_bias: View<'a>,
    /// `[n_value_head]`, the factor in the exponent of the decay.
    pub decay: View<'a>,
    /// `[head_dim]`.
    pub norm: View<'a>,
    /// Epsilon of all norms.
    pub eps: f32,
    /// `[conv_taps - 1, channels]` by state: the convolution's inputs of the last tokens, the newest last.
    pub inputs: States<'a>,
    /// `[n_value_head, head_dim, head_dim]` by state: the matrices, column by column.
    pub matrices: States<'a>,
    /// `[tokens, heads, head_dim]`: workspace for queries, keys and values.
    pub heads: View<'a>,
    /// `[tokens, n_value_head, 2]`: workspace for decays and strengths.
    pub rates: View<'a>,
    /// `[tokens, n_value_head * head_dim]`: the normed and gated result.
    pub out: View<'a>,
}

impl<'a> Delta<'a> {
    /// Returns the projected heads.
    fn projected_heads(&self) -> ProjectedHeads<'a> {
        let s = self.sizes;
        let (n_key, dim) = (s.n_key_head, s.head_dim);
        let group = s.n_value_head / n_key;
        let from = |head: usize| self.projected.floats(head * dim..self.projected.words());
        let (key, value, key_step, value_step) = if s.by_key_head {
            (1, 2, 2 + 2 * group, 2 + 2 * group)
        } else {
            (n_key, 2 * n_key, 1, group)
        };
        ProjectedHeads {
            queries: self.projected,
            keys: from(key),
            values: from(value),
            width: s.projected(),
            key_step: key_step * dim,
            value_step: value_step * dim,
        }
    }

    /// Returns the gates of the result.
    fn result_gates(&self) -> ResultGates<'a> {
        let s = self.sizes;
        let (dim, group) = (s.head_dim, s.n_value_head / s.n_key_head);
        let (values, width, step) = if s.by_key_head {
            let first = (2 + group) * dim;
            let gates = self.projected.floats(first..self.projected.words());
            (gates, s.projected(), (2 + 2 * group) * dim)
        } else {
            (self.gates, s.n_value_head * dim, group * dim)
        };
        ResultGates {
            values,
            width,
            step,
            group,
            gate: s.gate,
        }
    }

    /// Panics if a size is not supported, or a buffer is too short.
    fn check(&self) {
        let (s, n) = (self.sizes, self.tokens);
        let (n_key, n_value, dim, taps) = (s.n_key_head, s.n_value_head, s.head_dim, s.conv_taps);
        let (channels, values) = (s.heads() * dim, n_value * dim);
        assert!(
            n_key > 0 && taps > 0 && n_value > 0 && n_value.is_multiple_of(n_key),
            "{s:?}"
        );
        assert!(
            dim > 0 && dim.is_multiple_of(4) && dim <= MAX_DELTA_HEAD,
            "{s:?}"
        );
        assert!(
            s.sharing == KeySharing::Grouped || !(s.by_key_head || s.rates_by_key_head),
            "{s:?}"
        );
        assert!(
            self.projected.words() >= n * s.projected(),
            "{n} inputs: {s:?}"
        );
        let rates = if s.rates_by_key_head {
            self.raw_strengths.words() / 2
        } else {
            self.raw_strengths.words().min(self.raw_decays.words())
        };
        assert!(rates >= n * n_value, "{n} inputs: {s:?}");
        assert!(
            s.by_key_head || self.gates.words() >= n * values,
            "{n} gates: {s:?}"
        );
        assert!(
            self.conv.words() >= channels * taps && self.norm.words() >= dim,
            "{s:?}"
        );
        assert!(
            self.dt_bias.words() >= n_value && self.decay.words() >= n_value,
            "{s:?}"
        );
        assert!(
            self.heads.words() >= n * channels && self.rates.words() >= 2 * n * n_value,
            "{n} tokens: {s:?}"
        );
        assert!(self.out.words() >= n * values, "{n} tokens: {s:?}");
    }
}

impl Ops {
    /// Advances texts' states by runs of tokens: `out = delta(conv(projected))`. At position 0 a state is
    /// taken for zero. The result does not depend on how tokens are split into calls, nor on other
    /// texts, to the bit.
    pub fn delta(&self, d: &Delta<'_>, runs: TextRuns<'_>) -> Result<(), CudaError> {
        let (s, n) = (d.sizes, d.tokens);
        d.check();
        let states = [(d.inputs, s.conv_state()), (d.matrices, s.matrices())];
        let (of_runs, [inputs, matrices]) = runs.after(n, states);
        if runs.count() == 0 {
            return Ok(());
        }
        let (n_key, n_value, dim, taps) = (s.n_key_head, s.n_value_head, s.head_dim, s.conv_taps);
        let heads = d.projected_heads();
        // Decays follow the strengths of a key head, or are apart.
        let alpha = if s.rates_by_key_head {
            d.raw_strengths
                .floats(n_value / n_key..d.raw_strengths.words())
        } else {
            d.raw_decays
        };
        let args = [
            &[
                heads.queries.arg(),
                heads.keys.arg(),
                heads.values.arg(),
                int(heads.width),
                int(heads.key_step),
                int(heads.value_step),
                int(n_key),
                int(n_value),
                int(dim),
                int(taps),
                d.conv.arg(),
            ][..],
            &inputs[..],
            &of_runs,
            &[
                d.raw_strengths.arg(),
                alpha.arg(),
                Arg::Int(i32::from(s.rates_by_key_head)),
                d.dt_bias.arg(),
                d.decay.arg(),
                Arg::Float(d.eps),
                d.heads.arg(),
                d.rates.arg(),
            ][..],
        ]
        .concat();
        let grid = [blocks(s.heads(), 1), few(n), 1];
        self.launch("delta_convolve", grid, THREADS, &args)?;
        let args = [
            &[
                d.heads.aligned().arg(),
                d.rates.arg(),
                int(n_key),
                int(n_value),
                int(dim),
                Arg::Int(i32::from(s.sharing == KeySharing::Cyclic)),
            ][..],
            &of_runs[..],
            &matrices,
            &[
                d.out.arg(),
                heads.queries.arg(),
                heads.keys.arg(),
                heads.values.arg(),
                int(heads.width),
                int(heads.key_step),
                int(heads.value_step),
                int(taps - 1),
            ][..],
            &inputs,
        ]
        .concat();
        let kernels = [
            "delta_recur_32",
            "delta_recur_64",
            "delta_recur_128",
            "delta_recur_256",
        ];
        let grid = columns(dim, n_value, runs);
        self.launch(of_width(kernels, dim), grid, THREADS, &args)
    }

    /// Makes the result of what [`delta`](Self::delta) left: `out = norm(out) * act(gates)`, also
    /// quantized in `quants`.
    ///
    /// # Panics
    /// When it is quantized and the width of heads is not a multiple of 32.
    pub fn gate_delta(&self, d: &Delta<'_>, quants: Option<&mut Quants>) -> Result<(), CudaError> {
        d.check();
        let result = ResultHeads {
            values: d.out,
            tokens: d.tokens,
            heads: d.sizes.n_value_head,
            dim: d.sizes.head_dim,
            norm: d.norm,
            eps: d.eps,
        };
        self.gate_heads(&result, &d.result_gates(), quants)
    }

    /// Normalizes and gates a result, also quantized in `quants`.
    pub(super) fn gate_heads(
        &self,
        of: &ResultHeads<'_>,
        gates: &ResultGates<'_>,
        quants: Option<&mut Quants>,
    ) -> Result<(), CudaError> {
        let &ResultHeads {
            tokens, heads, dim, ..
        } = of;
        assert!(
            quants.is_none() || dim.is_multiple_of(32),
            "heads of {dim} in 8 bits"
        );
        if tokens == 0 {
            return Ok(());
        }
        let [q, scale, sums] = Quants::fill_or_null(quants, tokens, heads * dim);
        let args = [
            of.values.arg(),
            gates.values.arg(),
            int(gates.width),
            int(gates.step),
            int(gates.group),
            int(dim),
            Arg::Int(i32::from(gates.gate == DeltaGate::Sigmoid)),
            of.norm.arg(),
            Arg::Float(of.eps),
            q,
            scale,
            sums,
        ];
        let grid = [blocks(heads, 1), few(tokens), 1];
        self.launch("delta_gate", grid, THREADS, &args)
    }
}

/// Returns the kernel for heads of `dim` values: those for up to 32, 64, 128, and 256.
pub(super) fn of_width(kernels: [&'static str; 4], dim: usize) -> &'static str {
    match dim {
        0..=32 => kernels[0],
        33..=64 => kernels[1],
        65..=128 => kernels[2],
        _ => kernels[3],
    }
}

/// Returns the blocks of the recurrence: columns of matrices, heads, and runs.
pub(super) fn columns(dim: usize, heads: usize, runs: TextRuns<'_>) -> [u32; 3] {
    [
        blocks(dim.div_ceil(COLUMNS), 1),
        few(heads),
        few(runs.count()),
    ]
}
