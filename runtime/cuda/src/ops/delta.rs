//! The gated delta net between its matrix products.

use super::{Positions, Quants, blocks, few, int};
use crate::device::{Arg, View};
use crate::{CudaError, Ops};
use tier_plan_formats::model::spec::{DeltaInput, DeltaRates, DeltaSpec, KeySharing};

/// Widest head; the kernels have the same constant. Widths are multiples of 4.
pub use tier_plan_formats::model::gpu::MAX_DELTA_HEAD;

/// Columns of a state matrix per block; the kernels have the same constant.
const COLUMNS: usize = 16;

/// Threads per block; the kernels have the same constant.
const THREADS: u32 = 128;

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
}

impl From<&DeltaSpec> for DeltaSizes {
    fn from(d: &DeltaSpec) -> Self {
        let &DeltaSpec {
            n_key_head,
            n_value_head,
            head_dim,
            conv_taps,
            sharing,
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

/// A layer's tokens after its first matrix products, and its state.
#[derive(Clone, Copy)]
pub struct Delta<'a> {
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
    /// The tokens, of one text. At position 0 the state is taken for zero.
    pub positions: Positions<'a>,
    /// `[conv_taps - 1, channels]`: the convolution's inputs of the last tokens, the newest last.
    pub inputs: View<'a>,
    /// `[n_value_head, head_dim, head_dim]`: the state, column by column.
    pub matrices: View<'a>,
    /// `[tokens, heads, head_dim]`: workspace for queries, keys and values.
    pub heads: View<'a>,
    /// `[tokens, n_value_head, 2]`: workspace for decays and strengths.
    pub rates: View<'a>,
    /// `[tokens, n_value_head * head_dim]`: the normed and gated result.
    pub out: View<'a>,
}

impl Delta<'_> {
    /// Panics if a size is not supported, or a buffer is too short.
    fn check(&self) {
        let (s, n) = (self.sizes, self.positions.tokens());
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
        assert!(self.positions.runs().count() <= 1, "several texts");
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
            self.inputs.words() >= s.conv_state() && self.matrices.words() >= s.matrices(),
            "the state: {s:?}"
        );
        assert!(
            self.heads.words() >= n * channels && self.rates.words() >= 2 * n * n_value,
            "{n} tokens: {s:?}"
        );
        assert!(self.out.words() >= n * values, "{n} tokens: {s:?}");
    }
}

impl Ops {
    /// Advances a layer's state by tokens: `out = norm(delta(conv(projected))) * silu(gates)`, also
    /// quantized in `quants`. The result does not depend on how tokens are split into calls, to the
    /// bit.
    ///
    /// # Panics
    /// When it is quantized and the width of heads is not a multiple of 32.
    pub fn delta(&self, d: &Delta<'_>, quants: Option<&mut Quants>) -> Result<(), CudaError> {
        let (s, n) = (d.sizes, d.positions.tokens());
        let (n_key, n_value, dim, taps) = (s.n_key_head, s.n_value_head, s.head_dim, s.conv_taps);
        d.check();
        let values = n_value * dim;
        if n == 0 {
            return Ok(());
        }
        let (past, by_key_head) = (d.positions.at().arg(), Arg::Int(i32::from(s.by_key_head)));
        // Decays follow the strengths of a key head, or are apart.
        let alpha = if s.rates_by_key_head {
            d.raw_strengths
                .floats(n_value / n_key..d.raw_strengths.words())
        } else {
            d.raw_decays
        };
        let args = [
            d.projected.arg(),
            int(s.projected()),
            by_key_head,
            int(n_key),
            int(n_value),
            int(dim),
            int(taps),
            d.conv.arg(),
            d.inputs.arg(),
            past,
            d.raw_strengths.arg(),
            alpha.arg(),
            Arg::Int(i32::from(s.rates_by_key_head)),
            d.dt_bias.arg(),
            d.decay.arg(),
            Arg::Float(d.eps),
            d.heads.arg(),
            d.rates.arg(),
        ];
        self.launch(
            "delta_convolve",
            [blocks(s.heads(), 1), few(n), 1],
            THREADS,
            &args,
        )?;
        let args = [
            d.heads.aligned().arg(),
            d.rates.arg(),
            int(n),
            int(n_key),
            int(n_value),
            int(dim),
            Arg::Int(i32::from(s.sharing == KeySharing::Cyclic)),
            past,
            d.matrices.aligned().arg(),
            d.out.arg(),
            d.projected.arg(),
            int(s.projected()),
            by_key_head,
            int(taps - 1),
            d.inputs.arg(),
        ];
        let recur = match dim {
            0..=32 => "delta_recur_32",
            33..=64 => "delta_recur_64",
            65..=128 => "delta_recur_128",
            _ => "delta_recur_256",
        };
        self.launch(
            recur,
            [blocks(dim.div_ceil(COLUMNS), 1), few(n_value), 1],
            THREADS,
            &args,
        )?;
        let (gates, width) = if s.by_key_head {
            (d.projected, s.projected())
        } else {
            (d.gates, values)
        };
        assert!(
            quants.is_none() || dim.is_multiple_of(32),
            "heads of {dim} in 8 bits"
        );
        let [q, scale, sums] = Quants::fill_or_null(quants, n, values);
        let (norm, eps) = (d.norm.arg(), Arg::Float(d.eps));
        let args = [
            d.out.arg(),
            gates.arg(),
            int(width),
            by_key_head,
            int(n_key),
            int(dim),
            norm,
            eps,
            q,
            scale,
            sums,
        ];
        self.launch(
            "delta_gate",
            [blocks(n_value, 1), few(n), 1],
            THREADS,
            &args,
        )
    }
}
