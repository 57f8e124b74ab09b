//! How many blocks of neighboring positions tokens choose, and for which tokens they are chosen.

use super::{CHUNK, Positions, int};
use crate::device::Arg;
use std::ops::Range;
use tier_plan_formats::model::spec::{BlockIndex, BlockScore, CompressedIndex, Selection};

/// What is attended to of a text's last positions, which are not a complete block. The kernels have
/// the same numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenBlock {
    /// Nothing.
    Skipped = 0,
    /// All of them, beside the chosen blocks.
    Added = 1,
    /// All of them if they are chosen, as a block like the others.
    Rated = 2,
}

/// What a token chooses of its text: blocks of positions, counted from the beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    /// Blocks that a token chooses, at least 1.
    pub kept: usize,
    /// Positions per block, at least 1.
    pub block: usize,
    /// What is attended to of the last positions.
    pub open: OpenBlock,
}

impl Choice {
    /// Returns the positions that a token attends to at most.
    pub fn most(self) -> usize {
        let added = match self.open {
            OpenBlock::Added => self.block - 1,
            OpenBlock::Skipped | OpenBlock::Rated => 0,
        };
        self.kept.saturating_mul(self.block).saturating_add(added)
    }

    /// Returns how many of a text's first tokens see no more blocks than they choose, and so have no
    /// list.
    pub fn n_unlisted(self) -> usize {
        let rest = match self.open {
            OpenBlock::Skipped | OpenBlock::Added => self.block - 1,
            OpenBlock::Rated => 0,
        };
        self.kept.saturating_mul(self.block).saturating_add(rest)
    }

    /// Returns how many of a text's first tokens attend to all positions up to their own.
    pub fn n_dense(self) -> usize {
        match self.open {
            OpenBlock::Skipped if self.block > 1 => 0,
            _ => self.n_unlisted(),
        }
    }

    /// Returns whether a token of a text of up to `context` positions may have a list.
    pub fn may_list(self, context: usize) -> bool {
        context.next_multiple_of(CHUNK) > self.n_unlisted()
    }

    /// Returns whether a token of a text of up to `context` positions may not attend to all of them.
    pub fn may_leave_out(self, context: usize) -> bool {
        context.next_multiple_of(CHUNK) > self.n_dense()
    }

    /// Returns the words of a token's ratings in a list, for up to `context` positions.
    pub fn rating_words(self, context: usize) -> usize {
        context.next_multiple_of(CHUNK).div_ceil(self.block)
    }

    /// Returns the ratings at any position of the chunk of the context that a position is in.
    pub(super) fn rated_at(self, position: usize) -> usize {
        self.rating_words(position + 1)
    }

    /// Returns the arguments of kernels: positions per block, what is done with the open block, and
    /// the blocks that are chosen.
    pub(super) fn args(self) -> [Arg; 3] {
        [int(self.block), Arg::Int(self.open as i32), int(self.kept)]
    }

    /// Panics if a size is not supported.
    pub(super) fn check(self) {
        let largest = 1 << 30;
        assert!(
            self.kept > 0 && (1..=largest).contains(&self.block),
            "{} blocks of {}",
            self.kept,
            self.block
        );
    }
}

impl From<Selection> for Choice {
    fn from(selection: Selection) -> Self {
        Self {
            kept: selection.blocks,
            block: selection.block,
            open: if selection.tail {
                OpenBlock::Added
            } else {
                OpenBlock::Skipped
            },
        }
    }
}

impl From<&BlockIndex> for Choice {
    fn from(index: &BlockIndex) -> Self {
        Self {
            kept: index.kept,
            block: index.block,
            open: match index.score {
                BlockScore::Mean => OpenBlock::Added,
                BlockScore::Best { .. } => OpenBlock::Rated,
            },
        }
    }
}

/// Blocks stand for their vectors here, so that positions of an open one have none.
impl From<&CompressedIndex> for Choice {
    fn from(index: &CompressedIndex) -> Self {
        Self {
            kept: index.kept,
            block: index.compressor.ratio,
            open: OpenBlock::Skipped,
        }
    }
}

/// Neighboring tokens of a batch that choose what they attend to, or that attend to all positions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reached {
    /// Tokens of the batch.
    pub tokens: Range<usize>,
    /// Whether they choose. Some of them may see so few positions that they attend to all.
    pub chooses: bool,
}

impl Positions<'_> {
    /// Splits the tokens by whether they may leave out some of the positions that they see.
    ///
    /// With one token each of all texts, all are alike, and what they are depends on the chunks of
    /// the context that they are in. So recorded launches serve for every position in the chunks.
    pub fn by_reach(self, choice: Choice) -> Vec<Reached> {
        let position = |token: usize| self.of(token);
        if self.are_alone() {
            let chooses = (0..self.tokens()).any(|t| choice.may_leave_out(position(t) + 1));
            let tokens = 0..self.tokens();
            return vec![Reached { tokens, chooses }];
        }
        let n_dense = choice.n_dense();
        let mut parts: Vec<Reached> = Vec::new();
        for run in self.runs() {
            let n_dense = n_dense.saturating_sub(position(run.start)).min(run.len());
            let middle = run.start + n_dense;
            for (tokens, chooses) in [(run.start..middle, false), (middle..run.end, true)] {
                match parts.last_mut() {
                    _ if tokens.is_empty() => {}
                    Some(last) if last.chooses == chooses => last.tokens.end = tokens.end,
                    _ => parts.push(Reached { tokens, chooses }),
                }
            }
        }
        parts
    }

    /// Returns whether one of the tokens may see more blocks than it chooses, and so needs a list. As
    /// with [`by_reach`](Self::by_reach), the answer for one token each of all texts serves for every
    /// position in their chunks of the context.
    pub fn may_list(self, choice: Choice) -> bool {
        if self.are_alone() {
            return (0..self.tokens()).any(|token| choice.may_list(self.of(token) + 1));
        }
        let mut runs = self.runs();
        runs.any(|run| self.of(run.end - 1) + 1 > choice.n_unlisted())
    }

    /// Returns whether there is no more than one token of each text.
    fn are_alone(self) -> bool {
        self.runs().all(|run| run.len() == 1)
    }

    /// Returns the first tokens from `first` on whose ratings in `lists` lists fit `words` words at
    /// once, and how many ratings of a list are apart.
    ///
    /// # Panics
    /// When those of one token don't fit.
    pub(super) fn rated_at_once(
        self,
        choice: Choice,
        first: usize,
        lists: usize,
        words: usize,
    ) -> (Range<usize>, usize) {
        let (mut end, mut width) = (first, 0);
        while end < self.tokens() {
            let wanted = width.max(choice.rated_at(self.of(end)));
            if wanted * lists * (end + 1 - first) > words {
                break;
            }
            (end, width) = (end + 1, wanted);
        }
        assert!(end > first, "{words} ratings of a token");
        (first..end, width)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{BatchPositions, CacheSize, TextTokens};
    use super::*;
    use crate::device::Device;
    use crate::shim;
    use std::sync::Arc;

    #[test]
    fn tokens_are_split_where_they_begin_to_choose() {
        let device: Arc<dyn Device> = shim::shared();
        let size = CacheSize {
            positions: 2048,
            page: 1024,
        };
        let mut batch = BatchPositions::new(&device, 64, size).unwrap();
        let mut split = |texts: &[(usize, usize)], choice: Choice| {
            let texts = texts.iter().map(|&(past, tokens)| TextTokens {
                past,
                tokens,
                pages: &[0],
                state: 0,
                checkpoints: &[],
            });
            batch.set(texts).unwrap();
            let parts = batch.all().by_reach(choice).into_iter();
            parts.map(|p| (p.tokens, p.chooses)).collect::<Vec<_>>()
        };
        let of = |most: usize| Choice::from(Selection::of_positions(most));
        // The first token with an 11th position chooses among them.
        assert_eq!(split(&[(7, 5)], of(10)), [(0..3, false), (3..5, true)]);
        assert_eq!(split(&[(12, 2), (30, 3)], of(10)), [(0..5, true)]);
        let mixed = [(0..2, true), (2..4, false), (4..6, true)];
        assert_eq!(split(&[(12, 2), (8, 4)], of(10)), mixed);
        // Alone, tokens are as others in their chunks.
        assert_eq!(split(&[(3, 1), (255, 1)], of(256)), [(0..2, false)]);
        assert_eq!(split(&[(3, 1), (256, 1)], of(256)), [(0..2, true)]);
        assert_eq!(split(&[(3, 1)], of(255)), [(0..1, true)]);
        assert!(of(255).may_leave_out(1) && !of(256).may_leave_out(256));
        // Positions that are no complete block are left out anywhere.
        let skipping = Choice {
            kept: 100,
            block: 4,
            open: OpenBlock::Skipped,
        };
        assert_eq!(split(&[(0, 5)], skipping), [(0..5, true)]);
    }

    #[test]
    fn tokens_need_lists_where_they_see_more_than_they_choose() {
        let device: Arc<dyn Device> = shim::shared();
        let size = CacheSize {
            positions: 2048,
            page: 1024,
        };
        let mut batch = BatchPositions::new(&device, 64, size).unwrap();
        let mut may_list = |texts: &[(usize, usize)], kept: usize, open: OpenBlock| {
            let texts = texts.iter().map(|&(past, tokens)| TextTokens {
                past,
                tokens,
                pages: &[0],
                state: 0,
                checkpoints: &[],
            });
            batch.set(texts).unwrap();
            let block = 4;
            batch.all().may_list(Choice { kept, block, open })
        };
        // Three complete blocks end at 12 positions, and a fourth at 16.
        for (seen, expected) in [
            (12, [false; 3]),
            (13, [false, false, true]),
            (15, [false, false, true]),
            (16, [true; 3]),
        ] {
            let open = [OpenBlock::Skipped, OpenBlock::Added, OpenBlock::Rated];
            for texts in [[(seen - 3, 3), (0, 2)], [(0, 2), (seen - 3, 3)]] {
                assert_eq!(open.map(|open| may_list(&texts, 3, open)), expected);
            }
        }
        // Alone, tokens are as others in their chunks.
        assert!(may_list(&[(3, 1), (0, 1)], 63, OpenBlock::Skipped));
        assert!(!may_list(&[(255, 1)], 64, OpenBlock::Skipped));
        assert!(may_list(&[(256, 1)], 64, OpenBlock::Skipped));
    }

    #[test]
    fn a_choice_bounds_what_is_seen_and_rated() {
        let of = |open| Choice {
            kept: 3,
            block: 4,
            open,
        };
        let most = [OpenBlock::Skipped, OpenBlock::Added, OpenBlock::Rated].map(|o| of(o).most());
        assert_eq!(most, [12, 15, 12]);
        let choice = of(OpenBlock::Rated);
        assert_eq!([choice.rated_at(0), choice.rated_at(256)], [64, 128]);
        assert_eq!(
            Choice {
                block: 300,
                ..choice
            }
            .rating_words(300),
            2
        );
    }
}
