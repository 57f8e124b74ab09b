//! The gated delta net between its products.

use super::{Quants, blocks, few, int};
use crate::device::{Arg, View};
use crate::{CudaError, Ops};
use tier_plan_formats::model::spec::{DeltaInput, DeltaRates, DeltaSpec, KeySharing};

/// The widest head, as the kernels have it; widths are multiples of 4.
pub const MAX_DELTA_HEAD: usize = 256;

/// Columns of a matrix that a block takes, as the kernels have it.
const COLUMNS: usize = 16;

/// Threads of a block, as the kernels have it.
const THREADS: u32 = 128;

/// What a layer's kernels must know of it.
#[derive(Debug, Clone, Copy)]
pub struct DeltaSizes {
    /// Query heads, and as many key heads.
    pub n_key_head: usize,
    /// Value heads; a multiple of `n_key_head`.
    pub n_value_head: usize,
    /// Width of every head: a multiple of 4 up to [`MAX_DELTA_HEAD`].
    pub head_dim: usize,
    /// Tokens that the convolution sees, its own included.
    pub conv_taps: usize,
    /// Which value heads a key head serves.
    pub sharing: KeySharing,
    /// Projections go by key head and have the gates among them; otherwise they are query heads, key heads, value heads.
    pub by_key_head: bool,
    /// Strengths and decays go by key head; otherwise they are apart.
    pub rates_by_key_head: bool,
}

impl From<&DeltaSpec> for DeltaSizes {
    fn from(d: &DeltaSpec) -> Self {
        let &DeltaSpec { n_key_head, n_value_head, head_dim, conv_taps, sharing, .. } = d;
        let by_key_head = matches!(d.input, DeltaInput::ByKeyHead(_));
        let rates_by_key_head = matches!(d.rates, DeltaRates::ByKeyHead(_));
        Self { n_key_head, n_value_head, head_dim, conv_taps, sharing, by_key_head, rates_by_key_head }
    }
}

impl DeltaSizes {
    /// Heads of all kinds.
    fn heads(&self) -> usize {
        2 * self.n_key_head + self.n_value_head
    }

    /// Values of the convolution's kept inputs.
    pub fn kept(&self) -> usize {
        (self.conv_taps - 1) * self.heads() * self.head_dim
    }

    /// Values of the matrices.
    pub fn matrices(&self) -> usize {
        self.n_value_head * self.head_dim * self.head_dim
    }

    /// Values in a row of projections.
    fn projected(&self) -> usize {
        let gates = if self.by_key_head { self.n_value_head } else { 0 };
        (self.heads() + gates) * self.head_dim
    }
}

/// A layer's tokens after its first products.
#[derive(Clone, Copy)]
pub struct Delta<'a> {
    /// The layer.
    pub sizes: DeltaSizes,
    /// Tokens.
    pub tokens: usize,
    /// `[tokens, channels]`, with the gates of all value heads besides where they go by key head.
    pub projected: View<'a>,
    /// `[tokens, n_value_head * head_dim]`, where gates are apart.
    pub gates: View<'a>,
    /// Strengths and then decays, `[tokens, n_value_head]` each; or `[tokens, 2 * n_value_head]` by key head.
    pub raw_rates: View<'a>,
    /// `[channels, conv_taps]`, oldest tap first.
    pub conv: View<'a>,
    /// Added to the decay's input, `[n_value_head]`.
    pub dt_bias: View<'a>,
    /// Factor in the exponent of the decay, `[n_value_head]`.
    pub decay: View<'a>,
    /// `[head_dim]`.
    pub norm: View<'a>,
    /// Epsilon of all norms.
    pub eps: f32,
    /// Tokens before these, a word: at 0 nothing is remembered.
    pub past: View<'a>,
    /// Inputs of the convolution of the last tokens, `[conv_taps - 1, channels]`, the newest last.
    pub inputs: View<'a>,
    /// `[n_value_head, head_dim, head_dim]`, the values of a column together.
    pub matrices: View<'a>,
    /// Room for queries, keys and values, `[tokens, heads, head_dim]`.
    pub heads: View<'a>,
    /// Room for decays and strengths, `[tokens, n_value_head, 2]`.
    pub rates: View<'a>,
    /// What is read, normed and gated, `[tokens, n_value_head * head_dim]`.
    pub out: View<'a>,
}

impl Ops {
    /// Takes a layer's state through tokens: `out = norm(delta(conv(projected))) * silu(gates)`, and its 8-bit form, where
    /// heads are multiples of 32 wide. The number of tokens changes no bit.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a size does not fit.
    pub fn delta(&self, d: &Delta<'_>, quants: Option<&mut Quants>) -> Result<(), CudaError> {
        let &Delta { sizes: s, tokens: n, .. } = d;
        let (n_key, n_value, dim, taps) = (s.n_key_head, s.n_value_head, s.head_dim, s.conv_taps);
        assert!(n_key > 0 && taps > 0 && n_value > 0 && n_value.is_multiple_of(n_key), "{s:?}");
        assert!(dim > 0 && dim.is_multiple_of(4) && dim <= MAX_DELTA_HEAD, "{s:?}");
        assert!(s.sharing == KeySharing::Grouped || !(s.by_key_head || s.rates_by_key_head), "{s:?}");
        let (channels, values) = (s.heads() * dim, n_value * dim);
        assert!(
            d.projected.words() >= n * s.projected() && d.raw_rates.words() >= 2 * n * n_value,
            "{n} inputs: {s:?}"
        );
        assert!(s.by_key_head || d.gates.words() >= n * values, "{n} gates: {s:?}");
        assert!(d.conv.words() >= channels * taps && d.norm.words() >= dim, "{s:?}");
        assert!(d.dt_bias.words() >= n_value && d.decay.words() >= n_value && d.past.words() >= 1, "{s:?}");
        assert!(d.inputs.words() >= s.kept() && d.matrices.words() >= s.matrices(), "room for the state: {s:?}");
        assert!(d.heads.words() >= n * channels && d.rates.words() >= 2 * n * n_value, "room for {n}: {s:?}");
        assert!(d.out.words() >= n * values, "room for {n}: {s:?}");
        if n == 0 {
            return Ok(());
        }
        let (past, by_key_head) = (d.past.arg(), Arg::Int(i32::from(s.by_key_head)));
        // Decays follow their strengths, of all tokens or of a key head.
        let alpha = if s.rates_by_key_head { n_value / n_key } else { n * n_value };
        let alpha = d.raw_rates.floats(alpha..d.raw_rates.words());
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
            d.raw_rates.arg(),
            alpha.arg(),
            Arg::Int(i32::from(s.rates_by_key_head)),
            d.dt_bias.arg(),
            d.decay.arg(),
            Arg::Float(d.eps),
            d.heads.arg(),
            d.rates.arg(),
        ];
        self.launch("delta_convolve", [blocks(s.heads(), 1), few(n), 1], THREADS, &args)?;
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
        self.launch(recur, [blocks(dim.div_ceil(COLUMNS), 1), few(n_value), 1], THREADS, &args)?;
        let (gates, width) = if s.by_key_head { (d.projected, s.projected()) } else { (d.gates, values) };
        assert!(quants.is_none() || dim.is_multiple_of(32), "heads of {dim} in 8 bits");
        let [q, scale, sums] = Quants::fill_or_null(quants.map(|quants| (quants, n, values)));
        let (norm, eps) = (d.norm.arg(), Arg::Float(d.eps));
        let args = [d.out.arg(), gates.arg(), int(width), by_key_head, int(n_key), int(dim), norm, eps, q, scale, sums];
        self.launch("delta_gate", [blocks(n_value, 1), few(n), 1], THREADS, &args)
    }
}
