//! Mamba-2 between its matrix products.

use super::{Quants, States, THREADS, TextRuns, blocks, few, int, null_or};
use crate::device::{Arg, View};
use crate::{CudaError, Ops};
use tier_plan_formats::model::spec::MambaSpec;

/// Widest `B` and `C`; the kernels have the same constant. Widths are multiples of 4.
pub use tier_plan_formats::model::gpu::MAX_MAMBA_STATE;

/// Rows of a state matrix per block; the kernels have the same constant.
const ROWS: usize = 16;

/// Threads per block of the recurrence; the kernels have the same constant.
const RECUR_THREADS: u32 = 128;

/// Sizes of a layer.
#[derive(Debug, Clone, Copy)]
pub struct MambaSizes {
    /// Heads.
    pub n_head: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Groups of neighboring heads that share `B` and `C`; divides `n_head`.
    pub n_group: usize,
    /// Width of `B` and `C`: a multiple of 4 up to [`MAX_MAMBA_STATE`].
    pub state_dim: usize,
    /// Tokens that the convolution spans, the current one included.
    pub conv_taps: usize,
}

impl From<&MambaSpec> for MambaSizes {
    fn from(m: &MambaSpec) -> Self {
        let &MambaSpec {
            n_head,
            head_dim,
            n_group,
            state_dim,
            conv_taps,
            ..
        } = m;
        Self {
            n_head,
            head_dim,
            n_group,
            state_dim,
            conv_taps,
        }
    }
}

impl MambaSizes {
    /// Returns the width of all heads together.
    pub fn inner(&self) -> usize {
        self.n_head * self.head_dim
    }

    /// Returns the number of channels that are convolved.
    pub fn channels(&self) -> usize {
        self.inner() + 2 * self.n_group * self.state_dim
    }

    /// Returns the number of values in a row of projections.
    pub fn projected(&self) -> usize {
        self.inner() + self.channels() + self.n_head
    }

    /// Returns the number of values of the convolution's state: its past inputs.
    pub fn conv_state(&self) -> usize {
        (self.conv_taps - 1) * self.channels()
    }

    /// Returns the number of values of the state matrices.
    pub fn matrices(&self) -> usize {
        self.inner() * self.state_dim
    }

    /// Returns the width of the heads of a group.
    pub fn group_width(&self) -> usize {
        self.inner() / self.n_group
    }
}

/// A layer's tokens after its first matrix product, and its state.
#[derive(Clone, Copy)]
pub struct Mamba<'a> {
    /// Sizes of the layer.
    pub sizes: MambaSizes,
    /// Tokens of all texts.
    pub tokens: usize,
    /// `[tokens, inner + channels + n_head]`: gates, channels, and steps.
    pub projected: View<'a>,
    /// `[channels, conv_taps]`, oldest tap first.
    pub conv: View<'a>,
    /// `[channels]`.
    pub conv_bias: Option<View<'a>>,
    /// `[n_head]`, added to the steps.
    pub dt_bias: View<'a>,
    /// `[n_head]`, the factor in the exponent of the decay.
    pub decay: View<'a>,
    /// `[n_head]`, the factor of what passes the state by.
    pub skip: View<'a>,
    /// `[n_group, group_width]`.
    pub norm: View<'a>,
    /// Epsilon of the norm.
    pub eps: f32,
    /// `[conv_taps - 1, channels]` by state: the convolution's inputs of the last tokens, the newest last.
    pub inputs: States<'a>,
    /// `[n_head, head_dim, state_dim]` by state.
    pub matrices: States<'a>,
    /// `[tokens, channels]`: workspace for what is convolved.
    pub convolved: View<'a>,
    /// `[tokens, n_head, 2]`: workspace for decays and steps.
    pub rates: View<'a>,
    /// `[tokens, inner]`: the gated and normed result.
    pub out: View<'a>,
}

impl Mamba<'_> {
    /// Panics if a size is not supported, or a buffer is too short.
    fn check(&self) {
        let (s, n) = (self.sizes, self.tokens);
        let (n_head, channels, inner) = (s.n_head, s.channels(), s.inner());
        assert!(
            s.head_dim > 0 && s.conv_taps > 0 && s.n_group > 0 && n_head > 0,
            "{s:?}"
        );
        assert!(n_head.is_multiple_of(s.n_group), "{s:?}");
        assert!(
            s.state_dim > 0 && s.state_dim.is_multiple_of(4) && s.state_dim <= MAX_MAMBA_STATE,
            "{s:?}"
        );
        assert!(
            self.projected.words() >= n * s.projected(),
            "{n} inputs: {s:?}"
        );
        assert!(
            self.conv.words() >= channels * s.conv_taps
                && self.conv_bias.is_none_or(|bias| bias.words() >= channels),
            "the convolution: {s:?}"
        );
        let per_head = [self.dt_bias, self.decay, self.skip];
        assert!(
            per_head.iter().all(|values| values.words() >= n_head),
            "values per head: {s:?}"
        );
        assert!(self.norm.words() >= inner, "the norm: {s:?}");
        assert!(
            self.convolved.words() >= n * channels && self.rates.words() >= 2 * n * n_head,
            "{n} tokens: {s:?}"
        );
        assert!(self.out.words() >= n * inner, "{n} tokens: {s:?}");
    }
}

impl Ops {
    /// Advances texts' states by runs of tokens: `out = mamba(conv(channels))`. At position 0 a state is
    /// taken for zero. The result does not depend on how tokens are split into calls, nor on other
    /// texts, to the bit.
    pub fn mamba(&self, m: &Mamba<'_>, runs: TextRuns<'_>) -> Result<(), CudaError> {
        let (s, n) = (m.sizes, m.tokens);
        m.check();
        let states = [(m.inputs, s.conv_state()), (m.matrices, s.matrices())];
        let (of_runs, [inputs, matrices]) = runs.after(n, states);
        if runs.count() == 0 {
            return Ok(());
        }
        let channels = s.channels();
        let args = [
            &[
                m.projected.arg(),
                int(s.inner()),
                int(channels),
                int(s.n_head),
                int(s.conv_taps),
                m.conv.arg(),
                null_or(m.conv_bias),
            ][..],
            &inputs[..],
            &of_runs,
            &[
                m.dt_bias.arg(),
                m.decay.arg(),
                m.convolved.arg(),
                m.rates.arg(),
            ][..],
        ]
        .concat();
        self.launch(
            "mamba_convolve",
            [blocks(channels + s.n_head, THREADS), few(n), 1],
            THREADS,
            &args,
        )?;
        let args = [
            &[
                m.convolved.arg(),
                m.rates.arg(),
                int(s.n_head),
                int(s.head_dim),
                int(s.n_group),
                int(s.state_dim),
                m.skip.arg(),
            ][..],
            &of_runs[..],
            &matrices,
            &[m.out.arg(), m.projected.arg(), int(s.conv_taps - 1)][..],
            &inputs,
        ]
        .concat();
        let recur = match s.state_dim {
            0..=32 => "mamba_recur_32",
            33..=64 => "mamba_recur_64",
            65..=128 => "mamba_recur_128",
            _ => "mamba_recur_256",
        };
        let grid = [
            blocks(s.head_dim.div_ceil(ROWS), 1),
            few(s.n_head),
            few(runs.count()),
        ];
        self.launch(recur, grid, RECUR_THREADS, &args)
    }

    /// Makes the result of what [`mamba`](Self::mamba) left: `out = norm(out * silu(gates))`, also
    /// quantized in `quants`.
    ///
    /// # Panics
    /// When it is quantized and the width of a group is not a multiple of 32.
    pub fn gate_mamba(&self, m: &Mamba<'_>, quants: Option<&mut Quants>) -> Result<(), CudaError> {
        m.check();
        let (s, n, width) = (m.sizes, m.tokens, m.sizes.group_width());
        assert!(
            quants.is_none() || width.is_multiple_of(32),
            "groups of {width} in 8 bits"
        );
        if n == 0 {
            return Ok(());
        }
        let [q, scale, sums] = Quants::fill_or_null(quants, n, s.inner());
        let args = [
            m.out.arg(),
            m.projected.arg(),
            int(s.projected()),
            int(width),
            m.norm.arg(),
            Arg::Float(m.eps),
            q,
            scale,
            sums,
        ];
        let grid = [blocks(s.n_group, 1), few(n), 1];
        self.launch("mamba_gate", grid, THREADS, &args)
    }
}
