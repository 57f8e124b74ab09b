//! Free memory of a tier: what its buffers have given back, and from which others are cut.

use super::arena::ArenaSlice;

/// Free ranges of a tier's arenas, by address. Neighbors are one range.
#[derive(Default)]
pub(crate) struct Holes {
    ranges: Vec<ArenaSlice>,
}

impl Holes {
    /// Gives a range back.
    pub(crate) fn put(&mut self, range: ArenaSlice) {
        if range.capacity() == 0 {
            return;
        }
        let at = self
            .ranges
            .partition_point(|other| other.address() < range.address());
        self.ranges.insert(at, range.restored());
        self.join(at);
        if let Some(before) = at.checked_sub(1) {
            self.join(before);
        }
    }

    /// Joins a range and the one after it if they are neighbors.
    fn join(&mut self, at: usize) {
        if at + 1 >= self.ranges.len() {
            return;
        }
        let next = self.ranges.remove(at + 1);
        match self.ranges.remove(at).join(next) {
            Ok(joined) => self.ranges.insert(at, joined),
            Err((range, next)) => {
                self.ranges.insert(at, next);
                self.ranges.insert(at, range);
            }
        }
    }

    /// Cuts `len` bytes from the smallest range with room for them, at an address that is a multiple
    /// of `align`.
    pub(crate) fn take(&mut self, len: usize, align: usize) -> Option<ArenaSlice> {
        let room = |range: &ArenaSlice| {
            let skipped = skipped(range.address(), align);
            range.capacity().checked_sub(skipped + len)
        };
        let fitting = (0..self.ranges.len()).filter(|&at| room(&self.ranges[at]).is_some());
        let at = fitting.min_by_key(|&at| self.ranges[at].capacity())?;
        let range = self.ranges.remove(at);
        let skipped = skipped(range.address(), align);
        let (before, range) = range.split(skipped);
        let (taken, after) = range.split(len);
        self.put(before);
        self.put(after);
        Some(taken)
    }

    /// Returns the free bytes.
    #[cfg(test)]
    pub(crate) fn bytes(&self) -> usize {
        self.ranges.iter().map(ArenaSlice::capacity).sum()
    }

    /// Returns the range that ends at an address, if one does.
    pub(crate) fn take_before(&mut self, address: usize) -> Option<ArenaSlice> {
        let ends_there = |range: &ArenaSlice| range.address() + range.capacity() == address;
        let at = self.ranges.iter().position(ends_there)?;
        Some(self.ranges.remove(at))
    }
}

/// Returns the bytes from an address to the next multiple of `align`.
pub(crate) fn skipped(address: usize, align: usize) -> usize {
    address.next_multiple_of(align.max(1)) - address
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tiers::arena::Arena;
    use proptest::prelude::*;

    #[test]
    fn neighbors_are_one_range() {
        let mut arena = Arena::new("dram", 30).unwrap();
        let mut parts: Vec<_> = (0..3).map(|_| arena.take(10).unwrap()).collect();
        let mut holes = Holes::default();
        holes.put(parts.remove(2));
        holes.put(parts.remove(0));
        assert!(holes.take(11, 1).is_none(), "no range has so much");
        holes.put(parts.remove(0));
        assert_eq!(holes.take(30, 1).map(|all| all.capacity()), Some(30));
        assert_eq!(holes.bytes(), 0);
    }

    proptest! {
        /// Whatever is taken and given back, no byte is lost or given out twice, and all of it is one
        /// range in the end.
        #[test]
        fn no_byte_is_lost(actions in proptest::collection::vec((any::<bool>(), 1usize..40, 0usize..8), 1..60)) {
            let mut arena = Arena::new("dram", 256).unwrap();
            let (mut holes, mut held) = (Holes::default(), Vec::<ArenaSlice>::new());
            holes.put(arena.take(256).unwrap());
            for (i, (take, len, which)) in actions.iter().enumerate() {
                if *take {
                    if let Some(mut taken) = holes.take(*len, 1 << (which % 4)) {
                        prop_assert_eq!(taken.address() % (1 << (which % 4)), 0);
                        taken.fill(i as u8);
                        taken.truncate(len / 2);
                        held.push(taken);
                    }
                } else if !held.is_empty() {
                    let gone = held.swap_remove(which % held.len());
                    holes.put(gone);
                }
                prop_assert_eq!(holes.bytes() + held.iter().map(ArenaSlice::capacity).sum::<usize>(), 256);
                for slice in held.iter().filter(|slice| !slice.is_empty()) {
                    prop_assert!(slice.iter().all(|byte| *byte == slice[0]));
                }
            }
            held.into_iter().for_each(|slice| holes.put(slice));
            prop_assert_eq!(holes.take(256, 1).map(|all| all.capacity()), Some(256));
        }
    }
}
