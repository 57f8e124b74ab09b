//! What the n-grams that end with tokens add to several residual streams, after the products of their rows.

use super::{States, THREADS, TextRuns, blocks, few, int};
use crate::device::{Arg, View};
use crate::{CudaError, Ops};

/// Keys and values of tokens' n-grams, and the streams that they are added to.
#[derive(Clone, Copy)]
pub struct NgramGate<'a> {
    /// Tokens.
    pub tokens: usize,
    /// Streams per token.
    pub streams: usize,
    /// Values per stream.
    pub width: usize,
    /// `[tokens, streams, width]`; afterwards the convolution's inputs.
    pub keys: View<'a>,
    /// `[tokens, width]`.
    pub values: View<'a>,
    /// `[tokens, streams, width]`.
    pub x: View<'a>,
    /// Weights of the keys' norm, `[streams, width]`.
    pub key_norm: View<'a>,
    /// Weights of the streams' norm, `[streams, width]`.
    pub query_norm: View<'a>,
    /// Weights of the norm of the convolution's inputs, `[streams, width]`.
    pub conv_norm: View<'a>,
    /// Epsilon of the norms.
    pub eps: f32,
    /// `[tokens, streams, width]`: gated values.
    pub gated: View<'a>,
}

/// Gated values of tokens, and what their texts keep of those before.
#[derive(Clone, Copy)]
pub struct NgramConv<'a> {
    /// Tokens of all texts.
    pub tokens: usize,
    /// Values of all streams.
    pub channels: usize,
    /// Taps of the convolution, the current token's included.
    pub taps: usize,
    /// Tokens from one tap to the next.
    pub dilation: usize,
    /// `[tokens, channels]`.
    pub inputs: View<'a>,
    /// `[tokens, channels]`: what is added beside the convolution.
    pub gated: View<'a>,
    /// `[channels, taps]`, oldest tap first.
    pub weight: View<'a>,
    /// `[(taps - 1) * dilation, channels]` by state: inputs of the last tokens, the newest last.
    pub kept: States<'a>,
    /// `[tokens, channels]`: the streams.
    pub x: View<'a>,
}

impl Ops {
    /// Gates the values of each stream by the product of its key and the stream.
    pub fn gate_ngrams(&self, g: &NgramGate<'_>) -> Result<(), CudaError> {
        let (rows, of_row) = (g.tokens * g.streams, g.streams * g.width);
        let wide = [g.keys, g.x, g.gated];
        assert!(
            wide.iter().all(|view| view.words() >= rows * g.width)
                && g.values.words() >= g.tokens * g.width,
            "{} tokens of {} streams of {}",
            g.tokens,
            g.streams,
            g.width
        );
        let norms = [g.key_norm, g.query_norm, g.conv_norm];
        assert!(
            norms.iter().all(|norm| norm.words() >= of_row),
            "norms of {of_row}"
        );
        let args = [
            g.keys.arg(),
            g.x.arg(),
            g.values.arg(),
            g.key_norm.arg(),
            g.query_norm.arg(),
            g.conv_norm.arg(),
            int(g.streams),
            int(g.width),
            Arg::Float(g.eps),
            g.gated.arg(),
        ];
        self.launch("ngram_gate", [blocks(rows, 1), 1, 1], THREADS, &args)
    }

    /// Adds gated values of runs of tokens and their convolution to the streams, and advances their texts'
    /// states. At position 0 a state is taken for zero. The result does not depend on how tokens are split
    /// into calls, nor on other texts, to the bit.
    pub fn convolve_ngrams(&self, c: &NgramConv<'_>, runs: TextRuns<'_>) -> Result<(), CudaError> {
        let (n, channels) = (c.tokens, c.channels);
        let keep = c.taps.saturating_sub(1) * c.dilation;
        assert!(
            [c.inputs, c.gated, c.x]
                .iter()
                .all(|view| view.words() >= n * channels),
            "{n} tokens of {channels} channels"
        );
        assert!(
            c.taps > 0 && c.weight.words() >= channels * c.taps,
            "{} taps of {channels} channels",
            c.taps
        );
        let (of_runs, [[kept, _]]) = runs.after(n, [(c.kept, keep * channels)]);
        if runs.count() == 0 {
            return Ok(());
        }
        let inputs = c.inputs.arg();
        let args = [
            &[
                inputs,
                c.gated.arg(),
                int(channels),
                int(c.taps),
                int(c.dilation),
                c.weight.arg(),
                kept,
            ][..],
            &of_runs,
            &[c.x.arg()],
        ]
        .concat();
        let over_channels = blocks(channels, THREADS);
        self.launch("ngram_convolve", [over_channels, few(n), 1], THREADS, &args)?;
        let args = [&[inputs, int(channels), int(keep)][..], &of_runs, &[kept]].concat();
        let grid = [over_channels, few(runs.count()), 1];
        self.launch("ngram_keep", grid, THREADS, &args)
    }
}
