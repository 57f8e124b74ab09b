//! One text as the scheduler sees it: counts of tokens and pages.

use super::{AGING, PAGE, Request, TextId};
use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

/// Place in the order of all texts: the least is first. The ages of texts grow alike, so the order
/// of two texts never changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Rank {
    /// Nanoseconds; arrival, less what the priority is worth.
    virtual_arrival: i128,
    /// Counts submissions.
    number: u64,
}

impl Rank {
    pub fn new(request: &Request, number: u64) -> Self {
        let nanos = |d: Duration| i128::try_from(d.as_nanos()).unwrap_or(i128::MAX / 2);
        Self {
            virtual_arrival: nanos(request.arrival)
                .saturating_sub(i128::from(request.priority) * nanos(AGING)),
            number,
        }
    }
}

/// A text that is not finished.
#[derive(Debug, Clone)]
pub(super) struct Text {
    pub id: TextId,
    /// Tokens of the prompt and generated ones.
    pub known: usize,
    /// Positions in the KV cache, fewer than `known`.
    pub done: usize,
    /// Positions that were shared when the text was admitted, or will be.
    pub cached: usize,
    /// Tokens that may still be generated, at least 1.
    pub left: usize,
    /// Most draft rows that the text has a use for.
    pub drafts: usize,
}

/// Texts in their order, first ones first.
pub(super) type Queue = BTreeMap<Rank, Text>;

impl Text {
    pub fn new(request: &Request) -> Self {
        Self {
            id: request.id,
            known: request.prompt,
            done: 0,
            cached: request.cached.min(request.prompt - 1),
            left: request.max_new,
            drafts: usize::MAX,
        }
    }

    /// Whether one row decodes the text, if it is admitted. That holds also for a prompt of which one
    /// token alone is left.
    pub fn is_running(&self) -> bool {
        self.done + 1 == self.known
    }

    /// Returns the positions that the text will have at most. The last token is never computed.
    pub fn most_positions(&self) -> usize {
        self.known.saturating_add(self.left - 1)
    }

    /// Returns the pages that `rows` more rows need.
    pub fn growth(&self, rows: usize) -> usize {
        pages(self.done.saturating_add(rows)) - pages(self.done) + self.copied()
    }

    /// Returns the most rows that `free` pages have room for.
    pub fn rows_within(&self, free: usize) -> usize {
        let Some(free) = free.checked_sub(self.copied()) else {
            return 0;
        };
        (pages(self.done) * PAGE - self.done).saturating_add(free.saturating_mul(PAGE))
    }

    /// Returns 1 where the first row changes a page that is shared in part, and so copies it.
    fn copied(&self) -> usize {
        usize::from(self.done == self.cached && !self.cached.is_multiple_of(PAGE))
    }

    /// Returns the pages that the text holds alone.
    pub fn own_pages(&self) -> Range<usize> {
        let shared = self.cached / PAGE;
        shared..pages(self.done).max(shared)
    }

    /// Returns the pages that the text is still to get: those of its known tokens, and one more if it
    /// can grow past them.
    pub fn reserve(&self) -> usize {
        let rest = self.growth(self.known - self.done);
        rest + usize::from(pages(self.most_positions()) > pages(self.known))
    }
}

/// Returns the pages of a number of positions.
pub(super) fn pages(positions: usize) -> usize {
    positions.div_ceil(PAGE)
}
