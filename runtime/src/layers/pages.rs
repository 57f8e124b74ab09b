//! Pages of the KV cache, and recurrent states: which are free, and how many users each has.
//!
//! A page holds [`PAGE`] consecutive positions of one text, in every layer that attends to all
//! positions; layers with a window may have pages of their own. A text lists its pages in the order
//! of its positions. Texts with a common beginning share pages; a
//! shared page is copied before a text adds tokens to it.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Positions per page. Few in tests, so that short texts have several pages.
pub const PAGE: usize = if cfg!(test) {
    8
} else {
    tier_plan_formats::model::kv::PAGE as usize
};

/// Index of a page in the cache of every layer.
pub(crate) type PageIdx = u32;

/// Index of a recurrent state in every layer that has some.
pub(crate) type StateIdx = u32;

/// Returns the pages that `tokens` positions take.
pub fn pages_for(tokens: usize) -> usize {
    tokens.div_ceil(PAGE)
}

/// Returns pages for a lone text in a cache of `positions` positions, not in ascending order.
#[cfg(test)]
pub(crate) fn mixed_pages(positions: usize) -> Vec<PageIdx> {
    let full = (positions / PAGE) as PageIdx;
    let rest = (full as usize * PAGE < positions).then_some(full);
    (0..full).rev().chain(rest).collect()
}

/// Things that are all alike, each with any number of users.
#[derive(Debug)]
pub(crate) struct Pool {
    users: Vec<u32>,
    /// The lowest is taken first, so that few texts touch little memory.
    free: BinaryHeap<Reverse<u32>>,
}

impl Pool {
    /// Makes `n` things without users.
    pub(crate) fn new(n: usize) -> Self {
        Self {
            users: vec![0; n],
            free: (0..n as u32).map(Reverse).collect(),
        }
    }

    /// Returns how many there are.
    pub(crate) fn total(&self) -> usize {
        self.users.len()
    }

    /// Returns how many have no user.
    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    /// Takes the lowest one without users, if there is one; it has one user then.
    pub(crate) fn take(&mut self) -> Option<u32> {
        let Reverse(index) = self.free.pop()?;
        self.users[index as usize] = 1;
        Some(index)
    }

    /// Adds a user to one that has some.
    pub(crate) fn share(&mut self, index: u32) {
        debug_assert!(self.users[index as usize] > 0, "what is free is not shared");
        self.users[index as usize] += 1;
    }

    /// Returns whether one has several users.
    pub(crate) fn is_shared(&self, index: u32) -> bool {
        self.users[index as usize] > 1
    }

    /// Returns how many users one has.
    pub(crate) fn users(&self, index: u32) -> u32 {
        self.users[index as usize]
    }

    /// Takes a user from one, which is free after the last.
    pub(crate) fn release(&mut self, index: u32) {
        let users = &mut self.users[index as usize];
        debug_assert!(*users > 0, "released once per user");
        *users -= 1;
        if *users == 0 {
            self.free.push(Reverse(index));
        }
    }
}

/// The pages of an engine's KV cache.
#[derive(Debug)]
pub(crate) struct PagePool {
    pool: Pool,
    /// Positions of the last page; the others have [`PAGE`].
    last_len: usize,
}

impl PagePool {
    /// Makes the pages of a cache for this many positions.
    pub(crate) fn new(positions: usize) -> Self {
        let n = pages_for(positions);
        Self {
            pool: Pool::new(n),
            last_len: positions - n.saturating_sub(1) * PAGE,
        }
    }

    /// Returns how many pages there are.
    pub(crate) fn total(&self) -> usize {
        self.pool.total()
    }

    /// Returns how many pages have no user.
    pub(crate) fn free(&self) -> usize {
        self.pool.free()
    }

    /// Takes a page for `len` positions at most, if one is free.
    pub(crate) fn take(&mut self, len: usize) -> Option<PageIdx> {
        let last = self.total() as PageIdx - 1;
        let Reverse(page) = *self.pool.free.peek()?;
        if page == last && len > self.last_len {
            return None;
        }
        self.pool.take()
    }

    /// Adds a user to a page that is in use.
    pub(crate) fn share(&mut self, page: PageIdx) {
        self.pool.share(page);
    }

    /// Returns how many users a page has.
    pub(crate) fn users(&self, page: PageIdx) -> u32 {
        self.pool.users(page)
    }

    /// Returns whether a page has several users.
    pub(crate) fn is_shared(&self, page: PageIdx) -> bool {
        self.pool.is_shared(page)
    }

    /// Takes a user from a page, which is free after the last one.
    pub(crate) fn release(&mut self, page: PageIdx) {
        self.pool.release(page);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_free_again_after_their_last_user() {
        let mut pool = PagePool::new(3 * PAGE);
        let taken: Vec<_> = std::iter::from_fn(|| pool.take(PAGE)).collect();
        assert_eq!(taken, [0, 1, 2]);
        pool.share(1);
        pool.release(1);
        assert_eq!((pool.free(), pool.is_shared(1)), (0, false));
        pool.release(1);
        pool.release(0);
        assert_eq!(pool.free(), 2);
        assert_eq!(pool.take(PAGE), Some(0));
    }

    #[test]
    fn a_short_last_page_is_only_given_to_the_end_of_a_context() {
        let mut pool = PagePool::new(PAGE + 3);
        assert_eq!(pool.total(), 2);
        assert_eq!(pool.take(PAGE), Some(0));
        assert_eq!(pool.take(PAGE), None);
        assert_eq!(pool.take(3), Some(1));
        assert_eq!(pool.take(1), None);
    }
}
