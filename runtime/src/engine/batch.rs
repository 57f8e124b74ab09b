//! What goes into a pass, and what comes out of it.

use super::backend::Buffers;
use super::sequences::{SequenceId, Sequences};
use crate::error::RunError;
use crate::layers::index::{MoeIdx, MoeLayer};
use crate::layers::mixer::Segment;
use crate::layers::pages::{PageIdx, StateIdx};
use std::ops::Range;
use tier_plan_formats::model::spec::ModelSpec;

/// The tokens whose logits a pass computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogitsMode {
    /// The last token only: `[1, n_vocab]`.
    Last,
    /// Every token: `[tokens, n_vocab]`.
    All,
}

/// Tokens that a step adds to one text.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// The text.
    pub sequence: SequenceId,
    /// Its next tokens: one while it is decoded, any number of a prompt.
    pub tokens: &'a [u32],
    /// The tokens whose logits are wanted; none where `None`.
    pub logits: Option<LogitsMode>,
}

/// What a pass is counted as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Tokens of prompts, perhaps beside decoded ones. A lone token with nothing before it is a
    /// prompt too.
    Prompt,
    /// One token each of some texts, after others.
    Decode,
}

impl Phase {
    /// Returns what a step with these numbers of tokens after past ones is.
    pub(crate) fn of_step(mut tokens_past: impl Iterator<Item = (usize, usize)>) -> Self {
        if tokens_past.all(|(tokens, past)| tokens == 1 && past > 0) {
            Self::Decode
        } else {
            Self::Prompt
        }
    }
}

/// Neighboring rows of a batch that are consecutive tokens of one text.
#[derive(Debug, Clone)]
pub(crate) struct Span {
    pub(crate) sequence: SequenceId,
    pub(crate) rows: Range<usize>,
    /// Tokens of the text before these.
    pub(crate) past: usize,
    /// The last tokens before these, as many as n-grams reach back.
    before: Vec<u32>,
    /// The pages of the text, by kind of layers.
    pages: Vec<Vec<PageIdx>>,
    state: StateIdx,
    /// Rows that checkpoints follow, with the recurrent states that those go to.
    checkpoints: Vec<(usize, StateIdx)>,
}

impl Span {
    /// Returns the last tokens before these, as many as n-grams reach back.
    pub(crate) fn before(&self) -> &[u32] {
        &self.before
    }

    /// Returns the checkpoints of some of the rows, counted from `first`.
    fn checkpoints_in(&self, part: &Range<usize>, first: usize) -> Vec<(usize, StateIdx)> {
        let here = |(end, _): &&(usize, StateIdx)| part.start < *end && *end <= part.end;
        let counted = |(end, state): &(usize, StateIdx)| (end - first, *state);
        self.checkpoints.iter().filter(here).map(counted).collect()
    }
}

/// The tokens of a step that go through the layers together.
#[derive(Debug, Clone)]
pub(crate) struct Batch {
    pub(crate) tokens: Vec<u32>,
    /// Index in the step of the batch's first token.
    pub(crate) offset: usize,
    pub(crate) spans: Vec<Span>,
    /// Rows whose logits are computed, ascending.
    pub(crate) logits: Vec<usize>,
    /// Whether the step has one token only.
    pub(crate) single: bool,
    pub(crate) phase: Phase,
}

/// A part of a step: the number of an entry, and which of its tokens.
pub(crate) type Cut = (usize, Range<usize>);

/// Splits a step into batches of up to `size` tokens.
pub(crate) fn split(rows: &[Rows<'_>], size: usize) -> Vec<Vec<Cut>> {
    let (mut batches, mut batch, mut left) = (Vec::new(), Vec::new(), size);
    for (entry, rows) in rows.iter().enumerate() {
        let mut start = 0;
        while start < rows.tokens.len() {
            let end = rows.tokens.len().min(start + left);
            batch.push((entry, start..end));
            left -= end - start;
            start = end;
            if left == 0 {
                batches.push(std::mem::take(&mut batch));
                left = size;
            }
        }
    }
    if !batch.is_empty() {
        batches.push(batch);
    }
    batches
}

impl Batch {
    /// Makes a batch of parts of a step; `offset` tokens went before.
    ///
    /// # Errors
    /// When a text is unknown.
    pub(crate) fn new(
        rows: &[Rows<'_>],
        cuts: &[Cut],
        offset: usize,
        phase: Phase,
        sequences: &Sequences,
    ) -> Result<Self, RunError> {
        let mut batch = Self {
            tokens: Vec::new(),
            offset,
            spans: Vec::with_capacity(cuts.len()),
            logits: Vec::new(),
            single: matches!(rows, [only] if only.tokens.len() == 1),
            phase,
        };
        for (entry, part) in cuts {
            let (entry, first) = (&rows[*entry], batch.tokens.len());
            let sequence = sequences.get(entry.sequence)?;
            batch.tokens.extend(&entry.tokens[part.clone()]);
            let rows = first..batch.tokens.len();
            match entry.logits {
                Some(LogitsMode::All) => batch.logits.extend(rows.clone()),
                Some(LogitsMode::Last) if part.end == entry.tokens.len() => {
                    batch.logits.push(rows.end - 1);
                }
                _ => {}
            }
            let past = sequence.n_past();
            let in_rows = |(at, state): &(usize, StateIdx)| {
                let end = (rows.start + at).checked_sub(past)?;
                (rows.start < end && end <= rows.end).then_some((end, *state))
            };
            let checkpoints = sequence.coming_checkpoints().iter().filter_map(in_rows);
            batch.spans.push(Span {
                sequence: entry.sequence,
                checkpoints: checkpoints.collect(),
                rows,
                past,
                before: sequence.last_tokens(sequences.history()).to_vec(),
                pages: sequence.pages().map(<[PageIdx]>::to_vec).collect(),
                state: sequence.state(),
            });
        }
        Ok(batch)
    }

    pub(crate) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Returns the rows of the batch in parts of up to `size`.
    pub(crate) fn micro_batches(&self, size: usize) -> impl Iterator<Item = Range<usize>> + use<> {
        let n = self.len();
        (0..n)
            .step_by(size)
            .map(move |first| first..n.min(first + size))
    }

    /// Returns some rows by text, counted from the first of them, for layers of a kind.
    pub(crate) fn segments(
        &self,
        rows: &Range<usize>,
        kind: usize,
    ) -> impl Iterator<Item = Segment<'_>> {
        let rows = rows.clone();
        self.spans.iter().filter_map(move |span| {
            let part = span.rows.start.max(rows.start)..span.rows.end.min(rows.end);
            (!part.is_empty()).then(|| Segment {
                rows: part.start - rows.start..part.end - rows.start,
                past: span.past + part.start - span.rows.start,
                pages: &span.pages[kind],
                state: span.state,
                checkpoints: span.checkpoints_in(&part, rows.start),
            })
        })
    }
}

/// The experts that the routers chose for the tokens of a step.
#[derive(Debug, Clone, Default)]
pub struct Routing {
    /// `[token, MoE layer, n_used]`, in the router's order; `n_used` may differ between layers.
    pub experts: Vec<u16>,
    /// `[token, MoE layer, n_used]`.
    pub weights: Vec<f32>,
}

/// Where the experts of each layer are among those of a token.
pub(crate) struct Choices {
    /// By MoE layer: its first one.
    first: Vec<usize>,
    /// Experts of all layers.
    pub(crate) per_token: usize,
}

impl Choices {
    pub(crate) fn new(spec: &ModelSpec) -> Self {
        let mut per_token = 0;
        let first = spec.moe_layers().map(|(_, moe)| {
            per_token += moe.n_used;
            per_token - moe.n_used
        });
        Self {
            first: first.collect(),
            per_token,
        }
    }

    /// Returns where the `n_used` experts of a layer are among those of a token.
    pub(crate) fn of_layer(&self, layer: MoeIdx, n_used: usize) -> Range<usize> {
        let first = self.first[layer.get()];
        first..first + n_used
    }
}

/// What a step returns.
#[derive(Default)]
pub(crate) struct Output {
    /// `[wanted rows, n_vocab]`.
    pub(crate) logits: Vec<f32>,
    pub(crate) routing: Routing,
}

impl Output {
    /// Clears the logits, and makes room for the choices of a step's tokens.
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
        choices: &Choices,
        batch: &Batch,
        buffers: &Buffers,
    ) {
        let used = moe.spec.n_used;
        let first = choices.of_layer(moe.index, used).start;
        for t in 0..batch.len() {
            let from = t * used;
            let to = (batch.offset + t) * choices.per_token + first;
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
    fn a_step_is_split_into_full_batches_in_order() {
        let (tokens, id) = ([7; 5], SequenceId::for_tests());
        let rows = |n: usize| Rows {
            sequence: id,
            tokens: &tokens[..n],
            logits: None,
        };
        assert_eq!(
            split(&[rows(5)], 2),
            [vec![(0, 0..2)], vec![(0, 2..4)], vec![(0, 4..5)]]
        );
        assert_eq!(
            split(&[rows(1), rows(0), rows(4), rows(1)], 3),
            [vec![(0, 0..1), (2, 0..2)], vec![(2, 2..4), (3, 0..1)]]
        );
        assert!(split(&[rows(0)], 2).is_empty());
    }

    #[test]
    fn only_single_tokens_after_others_are_decoding() {
        let phase = |pieces: &[(usize, usize)]| Phase::of_step(pieces.iter().copied());
        assert_eq!(phase(&[(1, 0)]), Phase::Prompt);
        assert_eq!(phase(&[(2, 9)]), Phase::Prompt);
        assert_eq!(phase(&[(1, 9), (1, 2)]), Phase::Decode);
        assert_eq!(phase(&[(1, 9), (5, 2)]), Phase::Prompt);
    }
}
