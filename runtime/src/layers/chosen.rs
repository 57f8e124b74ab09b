//! The positions that indexers choose for the tokens of a batch.

use std::ops::Range;
use tier_plan_formats::model::spec::Selection;

/// The positions that an indexer chose for the rows of a batch. Layers without an indexer of their
/// own read what the last one before them chose.
#[derive(Default)]
pub(super) struct Chosen {
    /// By row of the batch: where its list lies. Those of rows that attend to all positions mean
    /// nothing.
    lists: Vec<Range<usize>>,
    /// The lists, each ascending.
    positions: Vec<u32>,
}

/// Rows of a batch whose lists are moved between processors, `[rows, kept]` blocks.
#[derive(Clone, Copy)]
pub(crate) struct ChosenRows<'a> {
    /// Row of the batch that the first list is of.
    pub(crate) first_row: usize,
    /// Positions that each row sees. Where they have no more blocks than a list, the row chooses all,
    /// and its list means nothing.
    pub(crate) seen: &'a [usize],
    /// What a row chooses.
    pub(crate) selection: Selection,
}

impl ChosenRows<'_> {
    /// Returns the blocks of a list.
    pub(crate) fn kept(&self) -> usize {
        self.selection.blocks
    }

    /// Returns whether each row's list means something, by what the row sees.
    pub(crate) fn is_listed(&self, seen: usize) -> bool {
        self.selection.visible(seen) > self.kept()
    }
}

/// Lists of positions, one per token.
#[derive(Clone, Copy)]
pub(super) struct Lists<'a> {
    lists: &'a [Range<usize>],
    positions: &'a [u32],
}

impl Chosen {
    /// Forgets the lists of an earlier layer or batch.
    pub(super) fn clear(&mut self) {
        self.lists.clear();
        self.positions.clear();
    }

    /// Returns the lists of some rows of the batch.
    pub(super) fn of(&self, rows: Range<usize>) -> Lists<'_> {
        Lists {
            lists: &self.lists[rows],
            positions: &self.positions,
        }
    }

    /// Adds lists of `len` positions for some rows of the batch. Returns them, `[rows, len]`.
    pub(super) fn add(&mut self, rows: Range<usize>, len: usize) -> &mut [u32] {
        if self.lists.len() < rows.end {
            self.lists.resize(rows.end, 0..0);
        }
        let first = self.positions.len();
        self.positions.resize(first + rows.len() * len, 0);
        for (i, list) in self.lists[rows].iter_mut().enumerate() {
            *list = first + i * len..first + (i + 1) * len;
        }
        &mut self.positions[first..]
    }

    /// Returns the positions in all lists.
    #[cfg(test)]
    pub(super) fn n_positions(&self) -> usize {
        self.positions.len()
    }

    /// Returns the lists of some rows, `[rows, kept]` blocks.
    pub(super) fn to_rows(&self, rows: ChosenRows<'_>) -> Vec<u32> {
        let (kept, block) = (rows.kept(), rows.selection.block);
        let mut blocks = vec![0; rows.seen.len() * kept];
        let lists = self.lists.iter().skip(rows.first_row).zip(rows.seen);
        for ((list, seen), to) in lists.zip(blocks.chunks_exact_mut(kept)) {
            if rows.is_listed(*seen) {
                // The positions of a block are neighbors.
                let first = self.positions[list.clone()].iter().step_by(block);
                let list = to.iter_mut().zip(first);
                list.for_each(|(to, position)| *to = position / block as u32);
            }
        }
        blocks
    }

    /// Takes the lists of some rows, `[rows, kept]` blocks, after those of the rows before them.
    pub(super) fn take_rows(&mut self, rows: ChosenRows<'_>, blocks: &[u32]) {
        let Selection { block, tail, .. } = rows.selection;
        let lists = rows.seen.iter().zip(blocks.chunks_exact(rows.kept()));
        for (row, (seen, list)) in lists.enumerate() {
            let (visible, block, seen_by) =
                (rows.selection.visible(*seen), block as u32, *seen as u32);
            let of_block = |b: u32| b * block..(b + 1) * block;
            let complete = visible as u32 * block;
            let added = complete..if tail { seen_by } else { complete };
            let row = rows.first_row + row;
            if rows.is_listed(*seen) {
                let chosen = list.iter().copied().flat_map(of_block);
                self.add_one(row, chosen.chain(added));
            } else {
                self.add_one(row, 0..added.end);
            }
        }
    }

    /// Adds the list of a row of the batch.
    pub(super) fn add_one(&mut self, row: usize, positions: impl Iterator<Item = u32>) {
        if self.lists.len() <= row {
            self.lists.resize(row + 1, 0..0);
        }
        let first = self.positions.len();
        self.positions.extend(positions);
        self.lists[row] = first..self.positions.len();
    }
}

impl<'a> Lists<'a> {
    /// Returns how many lists there are.
    pub(super) fn len(&self) -> usize {
        self.lists.len()
    }

    /// Returns the positions of a token.
    pub(super) fn list(&self, token: usize) -> &'a [u32] {
        &self.positions[self.lists[token].clone()]
    }

    /// Returns the positions of the token that has most.
    pub(super) fn longest(&self) -> usize {
        self.lists.iter().map(Range::len).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_keep_the_lists_that_were_added_for_them() {
        let mut chosen = Chosen::default();
        chosen
            .add(1..3, 2)
            .iter_mut()
            .zip(10..)
            .for_each(|(to, p)| *to = p);
        chosen.add_one(4, [3, 5, 8].into_iter());
        chosen.add_one(3, std::iter::empty());
        let lists = chosen.of(2..5);
        assert_eq!((lists.len(), lists.longest()), (3, 3));
        assert_eq!(lists.list(0), [12, 13]);
        assert!(lists.list(1).is_empty());
        assert_eq!(lists.list(2), [3, 5, 8]);
        chosen.clear();
        chosen.add(0..1, 1);
        assert_eq!(chosen.of(0..1).list(0), [0]);
    }

    #[test]
    fn rows_come_to_another_processor_in_parts() {
        // The first row attends to all positions, so its list may be anything.
        let (first, second) = ([0, 0, 1, 2, 0, 2], [2, 3]);
        let part = |first_row, seen| ChosenRows {
            first_row,
            seen,
            selection: Selection {
                blocks: 2,
                block: 1,
                tail: false,
            },
        };
        let (first_rows, second_rows) = (part(0, &[2, 3, 4][..]), part(3, &[5][..]));
        let mut chosen = Chosen::default();
        chosen.add_one(5, [7].into_iter());
        chosen.clear();
        chosen.take_rows(first_rows, &first);
        chosen.take_rows(second_rows, &second);
        assert_eq!(chosen.of(1..4).list(2), second);
        assert_eq!(chosen.to_rows(first_rows), first);
        assert_eq!(chosen.to_rows(second_rows), second);
        // Rows without a list have zeros.
        assert_eq!(chosen.to_rows(part(4, &[6, 7][..])), [0; 4]);
    }

    #[test]
    fn lists_are_moved_as_blocks() {
        for tail in [true, false] {
            let rows = ChosenRows {
                first_row: 0,
                seen: &[3, 8, 10, 13],
                selection: Selection {
                    blocks: 2,
                    block: 3,
                    tail,
                },
            };
            // All of two blocks, then two of three and two of four.
            let lists: [&[u32]; 4] = [
                &[0, 1, 2],
                &[0, 1, 2, 3, 4, 5, 6, 7],
                &[0, 1, 2, 6, 7, 8, 9],
                &[3, 4, 5, 9, 10, 11, 12],
            ];
            let complete = [3, 6, 6, 6].map(|n| if tail { usize::MAX } else { n });
            let expected = lists
                .iter()
                .zip(complete)
                .map(|(list, n)| &list[..n.min(list.len())]);
            let mut chosen = Chosen::default();
            for (row, list) in expected.clone().enumerate() {
                chosen.add_one(row, list.iter().copied());
            }
            let blocks = chosen.to_rows(rows);
            assert_eq!(blocks, [0, 0, 0, 0, 0, 2, 1, 3]);
            let mut taken = Chosen::default();
            taken.take_rows(rows, &blocks);
            for (row, list) in expected.enumerate() {
                assert_eq!(taken.of(row..row + 1).list(0), list, "{row}");
            }
        }
    }
}
