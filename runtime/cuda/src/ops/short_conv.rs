//! The gated short convolution between its matrix products.

use super::{States, THREADS, TextRuns, blocks, few, int};
use crate::device::View;
use crate::{CudaError, Ops};

/// A layer's tokens after its first matrix product, and its states.
#[derive(Clone, Copy)]
pub struct ShortConv<'a> {
    /// Tokens of all texts.
    pub tokens: usize,
    /// Channels.
    pub channels: usize,
    /// Tokens that the convolution spans, the current one included.
    pub taps: usize,
    /// `[tokens, 3 * channels]`.
    pub projected: View<'a>,
    /// `[channels, taps]`, oldest tap first.
    pub weight: View<'a>,
    /// `[taps - 1, channels]` by state: the convolution's inputs of the last tokens, the newest last.
    pub inputs: States<'a>,
    /// `[tokens, channels]`.
    pub out: View<'a>,
}

impl Ops {
    /// Convolves runs of tokens, and advances their texts' states. At position 0 a state is taken for
    /// zero. The result does not depend on how tokens are split into calls, nor on other texts, to the
    /// bit.
    pub fn short_conv(&self, c: &ShortConv<'_>, runs: TextRuns<'_>) -> Result<(), CudaError> {
        let (n, channels, keep) = (c.tokens, c.channels, c.taps.saturating_sub(1));
        assert!(
            c.projected.words() >= 3 * n * channels && c.out.words() >= n * channels,
            "{n} tokens of {channels} channels"
        );
        assert!(
            c.taps > 0 && c.weight.words() >= channels * c.taps,
            "{} taps of {channels} channels",
            c.taps
        );
        let (of_runs, [[inputs, _]]) = runs.after(n, [(c.inputs, keep * channels)]);
        if runs.count() == 0 {
            return Ok(());
        }
        let projected = c.projected.arg();
        let args = [
            &[
                projected,
                int(channels),
                int(c.taps),
                c.weight.arg(),
                inputs,
            ][..],
            &of_runs,
            &[c.out.arg()],
        ]
        .concat();
        let over_channels = blocks(channels, THREADS);
        self.launch("short_conv", [over_channels, few(n), 1], THREADS, &args)?;
        let args = [
            &[projected, int(channels), int(keep)][..],
            &of_runs,
            &[inputs],
        ]
        .concat();
        let grid = [over_channels, few(runs.count()), 1];
        self.launch("short_conv_keep", grid, THREADS, &args)
    }
}
