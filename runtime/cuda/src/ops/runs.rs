//! Tokens of a batch that pass through recurrent states: runs of consecutive tokens of one text each, and the
//! states of texts.

use super::{TextTokens, int};
use crate::device::{Arg, View};
use std::ops::Range;

/// Runs of tokens that are taken after their states at once: at most one of each text.
///
/// Kernels read all about them from the device, so that recorded launches serve for as many other texts.
#[derive(Clone, Copy)]
pub struct TextRuns<'a> {
    /// Positions of the batch's tokens in their texts.
    pub(super) positions: View<'a>,
    /// The run of each token, counted over all rounds.
    pub(super) of_tokens: View<'a>,
    /// First token, tokens, and state of each run, from the first of these on.
    pub(super) table: View<'a>,
    /// The first of these runs, counted over all rounds.
    pub(super) first: usize,
    pub(super) count: usize,
    /// Tokens of the longest of them.
    pub(super) longest: usize,
    /// The largest number of a text's state.
    pub(super) last_state: u32,
}

impl TextRuns<'_> {
    /// Returns how many there are.
    pub fn count(self) -> usize {
        self.count
    }

    /// Returns the tokens of the longest of them.
    pub(super) fn longest(self) -> usize {
        self.longest
    }

    /// Returns the arguments of kernels, `TEXT_RUNS` in `runs.cuh`, and those of the states that the runs
    /// are taken after: where they are, and the values of one.
    ///
    /// # Panics
    /// When these are not runs of a batch of so many tokens, or the states are of another size, or too few.
    pub(super) fn after<const N: usize>(
        self,
        tokens: usize,
        states: [(States<'_>, usize); N],
    ) -> ([Arg; 5], [[Arg; 2]; N]) {
        assert_eq!(self.positions.words(), tokens, "tokens of the batch");
        let args = [
            self.table.arg(),
            self.of_tokens.arg(),
            int(self.first),
            int(self.count),
            self.positions.arg(),
        ];
        let n = self.last_state as usize + 1;
        let states = states.map(|(states, values)| {
            assert!(
                states.each == values && states.all.words() >= n * values,
                "{n} states of {} values, expected {values}",
                states.each
            );
            [states.all.aligned().arg(), int(states.each)]
        });
        (args, states)
    }
}

/// What a layer keeps of texts: states of equal size, one after the other.
#[derive(Clone, Copy)]
pub struct States<'a> {
    /// All states.
    pub all: View<'a>,
    /// Values of a state.
    pub each: usize,
}

/// A run: tokens of the batch, and the state of their text.
type Run = (Range<usize>, u32);

/// Cuts texts where checkpoints follow. The first round has the first run of each text, and so on. A run
/// without tokens is left out.
pub(super) fn rounds<'a>(texts: impl Iterator<Item = TextTokens<'a>>) -> Vec<Vec<Run>> {
    let (mut rounds, mut first) = (Vec::new(), 0);
    for text in texts {
        let (mut start, end) = (first, first + text.tokens);
        let ends = text.checkpoints.iter().map(|(end, _)| *end);
        for (round, next) in ends.chain([end]).enumerate() {
            if rounds.len() <= round {
                rounds.push(Vec::new());
            }
            assert!((start..=end).contains(&next), "a checkpoint after {next}");
            if next > start {
                rounds[round].push((start..next, text.state));
            }
            start = next;
        }
        first = end;
    }
    rounds
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_where_checkpoints_follow() {
        let text = |tokens, state, checkpoints| TextTokens {
            past: 9,
            tokens,
            pages: &[],
            state,
            checkpoints,
        };
        let texts = [
            text(5, 1, &[(2, 7), (5, 8)]),
            text(1, 4, &[]),
            text(3, 0, &[(6, 9)]),
        ];
        let rounds = rounds(texts.into_iter());
        let expected: [&[Run]; 3] = [&[(0..2, 1), (5..6, 4)], &[(2..5, 1), (6..9, 0)], &[]];
        assert_eq!(rounds, expected);
    }
}
