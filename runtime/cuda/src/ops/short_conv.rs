//! The gated short convolution between its matrix products.

use super::{Positions, THREADS, blocks, few, int};
use crate::device::View;
use crate::{CudaError, Ops};

/// A layer's tokens after its first matrix product, and its state.
#[derive(Clone, Copy)]
pub struct ShortConv<'a> {
    /// Channels.
    pub channels: usize,
    /// Tokens that the convolution spans, the current one included.
    pub taps: usize,
    /// `[tokens, 3 * channels]`.
    pub projected: View<'a>,
    /// `[channels, taps]`, oldest tap first.
    pub weight: View<'a>,
    /// The tokens, of one text. At position 0 the state is taken for zero.
    pub positions: Positions<'a>,
    /// `[taps - 1, channels]`: the convolution's inputs of the last tokens, the newest last.
    pub inputs: View<'a>,
    /// `[tokens, channels]`.
    pub out: View<'a>,
}

impl Ops {
    /// Convolves tokens, and advances the state. The result does not depend on how tokens are split
    /// into calls, to the bit.
    pub fn short_conv(&self, c: &ShortConv<'_>) -> Result<(), CudaError> {
        let (n, channels, keep) = (c.positions.tokens(), c.channels, c.taps.saturating_sub(1));
        assert!(c.taps > 0 && c.positions.runs().count() <= 1, "one text");
        assert!(
            c.projected.words() >= 3 * n * channels && c.out.words() >= n * channels,
            "{n} tokens of {channels} channels"
        );
        assert!(
            c.weight.words() >= channels * c.taps && c.inputs.words() >= keep * channels,
            "{} taps of {channels} channels",
            c.taps
        );
        if n == 0 {
            return Ok(());
        }
        let (projected, past) = (c.projected.arg(), c.positions.at().arg());
        let args = [
            projected,
            int(channels),
            int(c.taps),
            c.weight.arg(),
            c.inputs.arg(),
            past,
            c.out.arg(),
        ];
        let over_channels = blocks(channels, THREADS);
        self.launch("short_conv", [over_channels, few(n), 1], THREADS, &args)?;
        let args = [
            projected,
            int(channels),
            int(n),
            int(keep),
            past,
            c.inputs.arg(),
        ];
        self.launch("short_conv_keep", [over_channels, 1, 1], THREADS, &args)
    }
}
