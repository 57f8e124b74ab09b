//! What goes into a pass, and what comes out of it.

use super::backend::Buffers;
use crate::layers::index::MoeLayer;
use std::ops::Range;

/// The tokens whose logits a pass computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitsMode {
    /// The last token only: `[1, n_vocab]`.
    Last,
    /// Every token: `[tokens, n_vocab]`.
    All,
}

/// What a pass is counted as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Tokens of a prompt. A lone token with nothing before it is a prompt too.
    Prompt,
    /// One token after others.
    Decode,
}

impl Phase {
    /// Returns what a call with `n_tokens` tokens after `n_past` others is.
    pub(crate) fn of_call(n_tokens: usize, n_past: usize) -> Self {
        if n_tokens == 1 && n_past > 0 {
            Self::Decode
        } else {
            Self::Prompt
        }
    }
}

/// The tokens of a call that go through the layers together.
#[derive(Debug, Clone)]
pub(crate) struct Batch<'a> {
    pub(crate) tokens: &'a [u32],
    /// Index in the call of the batch's first token.
    pub(crate) offset: usize,
    /// Tokens whose logits are computed; no logits where `None`.
    pub(crate) logits: Option<LogitsMode>,
    /// Whether the call has one token only. A token of a longer call is summed like all of them, so
    /// that no result depends on the size of a batch.
    pub(crate) single: bool,
    pub(crate) phase: Phase,
}

impl<'a> Batch<'a> {
    /// Splits a call into batches of up to `size` tokens.
    pub(crate) fn split(
        tokens: &'a [u32],
        size: usize,
        mode: LogitsMode,
        phase: Phase,
    ) -> impl Iterator<Item = Batch<'a>> {
        let last = tokens.len().div_ceil(size).saturating_sub(1);
        let single = tokens.len() == 1;
        tokens
            .chunks(size)
            .enumerate()
            .map(move |(i, tokens)| Batch {
                tokens,
                offset: i * size,
                logits: (i == last || mode == LogitsMode::All).then_some(mode),
                single,
                phase,
            })
    }

    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Returns the rows whose logits are computed.
    pub(crate) fn logit_rows(&self) -> Option<Range<usize>> {
        let n = self.len();
        self.logits.map(|mode| match mode {
            LogitsMode::All => 0..n,
            LogitsMode::Last => n - 1..n,
        })
    }

    /// Returns the rows of the batch in parts of up to `size`.
    pub(crate) fn micro_batches(&self, size: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let n = self.len();
        (0..n)
            .step_by(size)
            .map(move |first| first..n.min(first + size))
    }
}

/// The experts that the routers chose for the tokens of a call.
#[derive(Debug, Clone, Default)]
pub struct Routing {
    /// `[token, MoE layer, n_used]`, in the router's order.
    pub experts: Vec<u16>,
    /// `[token, MoE layer, n_used]`.
    pub weights: Vec<f32>,
}

/// What a call returns.
#[derive(Default)]
pub(crate) struct Output {
    /// `[1, n_vocab]` or `[tokens, n_vocab]`.
    pub(crate) logits: Vec<f32>,
    pub(crate) routing: Routing,
}

impl Output {
    /// Clears the logits, and makes room for the choices of a call's tokens.
    pub(crate) fn begin(&mut self, choices: usize) {
        self.logits.clear();
        self.routing.experts.clear();
        self.routing.experts.resize(choices, 0);
        self.routing.weights.clear();
        self.routing.weights.resize(choices, 0.0);
    }

    /// Keeps what a layer's router chose for a batch.
    pub(crate) fn record(
        &mut self,
        moe: MoeLayer<'_>,
        n_moe: usize,
        batch: &Batch<'_>,
        buffers: &Buffers,
    ) {
        let used = moe.spec.n_used;
        for t in 0..batch.len() {
            let (from, to) = (
                t * used,
                ((batch.offset + t) * n_moe + moe.index.get()) * used,
            );
            self.routing.experts[to..to + used]
                .copy_from_slice(&buffers.experts[from..from + used]);
            self.routing.weights[to..to + used]
                .copy_from_slice(&buffers.weights[from..from + used]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_batch_has_the_logits_of_the_last_token() {
        let tokens = [1, 2, 3, 4, 5];
        let batches: Vec<_> = Batch::split(&tokens, 2, LogitsMode::Last, Phase::Prompt).collect();
        assert_eq!(
            batches.iter().map(Batch::len).collect::<Vec<_>>(),
            [2, 2, 1]
        );
        assert_eq!(
            batches.iter().map(|b| b.offset).collect::<Vec<_>>(),
            [0, 2, 4]
        );
        assert_eq!(
            batches
                .iter()
                .map(|b| b.logits.is_some())
                .collect::<Vec<_>>(),
            [false, false, true]
        );
        assert!(batches.iter().all(|b| !b.single));
        assert!(
            Batch::split(&tokens, 2, LogitsMode::All, Phase::Prompt).all(|b| b.logits.is_some())
        );
        assert!(
            Batch::split(&[], 2, LogitsMode::All, Phase::Prompt)
                .next()
                .is_none()
        );
    }

    #[test]
    fn only_a_single_token_after_others_is_decoding() {
        assert_eq!(Phase::of_call(1, 0), Phase::Prompt);
        assert_eq!(Phase::of_call(2, 9), Phase::Prompt);
        assert_eq!(Phase::of_call(1, 9), Phase::Decode);
    }
}
