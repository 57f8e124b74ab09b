//! One anonymous mapping a tier, cut into pieces with one owner each.
//!
//! The arena has exactly the bytes that the plan gives the tier: pieces are packed without padding, since every
//! kernel reads unaligned.

use super::nodes::Pages;
use super::numa::NumaError;
use memmap2::MmapMut;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;
use thiserror::Error;

/// An arena could not be made or is too small.
#[derive(Debug, Error)]
pub enum ArenaError {
    /// The system has not got the memory.
    #[error("no memory for the {bytes} bytes of tier '{tier}': {source}")]
    Map {
        /// The tier.
        tier: String,
        /// Bytes asked for.
        bytes: u64,
        /// What the system said.
        r#source: std::io::Error,
    },
    /// Its pages can't be where its tier says.
    #[error("tier '{tier}' is the memory of a node: {source}")]
    Node {
        /// The tier.
        tier: String,
        /// Why; part of the message, so no source of its own.
        r#source: NumaError,
    },
    /// More was asked of it than the plan reserved.
    #[error(
        "tier '{tier}' is full: {wanted} bytes wanted, {left} of {capacity} left; the plan does not fit this model, solve again"
    )]
    Full {
        /// The tier.
        tier: String,
        /// Bytes asked for.
        wanted: usize,
        /// Bytes left.
        left: usize,
        /// Bytes in all.
        capacity: usize,
    },
}

impl ArenaError {
    /// The system does not put pages of a tier where they should be.
    pub fn refused(tier: &str, pages: &Pages, source: std::io::Error) -> Self {
        ArenaError::Node { tier: tier.to_string(), r#source: NumaError::Refused { policy: pages.to_string(), source } }
    }
}

struct Mapping(#[allow(dead_code, reason = "held for its memory")] MmapMut);

/// Memory of one tier, handed out piece by piece and never taken back.
pub struct Arena {
    tier: String,
    mapping: Arc<Mapping>,
    base: *mut u8,
    used: usize,
    capacity: usize,
}

// SAFETY: `base` points into `mapping`, which is never read or written except through pieces, and those are disjoint.
unsafe impl Send for Arena {}

impl Arena {
    /// An arena of exactly `bytes`, zero-filled, on huge pages where the system offers them; what has been written stays in
    /// memory where the process may lock so much.
    ///
    /// # Errors
    /// When the system has not got the memory.
    pub fn new(tier: &str, bytes: u64) -> Result<Self, ArenaError> {
        Self::on(tier, bytes, &Pages::Anywhere)
    }

    /// The same, with its pages where `pages` says.
    ///
    /// # Errors
    /// When the system has not got the memory, or refuses to have its pages there.
    pub fn on(tier: &str, bytes: u64, pages: &Pages) -> Result<Self, ArenaError> {
        let map_error = |source| ArenaError::Map { tier: tier.to_string(), bytes, r#source };
        let capacity = usize::try_from(bytes).map_err(|_| map_error(std::io::ErrorKind::OutOfMemory.into()))?;
        // An empty mapping is refused by the system; one byte that nobody gets stands in for it.
        let mut map = MmapMut::map_anon(capacity.max(1)).map_err(map_error)?;
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        let base = map.as_mut_ptr();
        // SAFETY: the range is the mapping's own.
        unsafe { pages.bind(base, capacity) }.map_err(|source| ArenaError::refused(tier, pages, source))?;
        #[cfg(target_os = "linux")]
        // SAFETY: the range is the mapping's own. Few users may lock much; without that, all works the same.
        unsafe {
            libc::mlock2(base.cast(), capacity, libc::MLOCK_ONFAULT as _);
        }
        Ok(Self { tier: tier.to_string(), mapping: Arc::new(Mapping(map)), base, used: 0, capacity })
    }

    /// The next `len` bytes.
    pub fn take(&mut self, len: usize) -> Result<Piece, ArenaError> {
        let left = self.capacity - self.used;
        if len > left {
            return Err(ArenaError::Full { tier: self.tier.clone(), wanted: len, left, capacity: self.capacity });
        }
        // SAFETY: `used + len` is within the mapping.
        let start = unsafe { self.base.add(self.used) };
        self.used += len;
        Ok(Piece { start, len, capacity: len, _mapping: Arc::clone(&self.mapping) })
    }

    /// Bytes handed out.
    pub fn used(&self) -> usize {
        self.used
    }
}

/// Bytes of an arena with one owner; keeps the arena's memory alive.
pub struct Piece {
    start: *mut u8,
    len: usize,
    capacity: usize,
    _mapping: Arc<Mapping>,
}

impl Piece {
    /// Shows only the first `len` bytes until [`restore`](Self::restore): a buffer for the largest expert also serves
    /// smaller ones.
    pub fn truncate(&mut self, len: usize) {
        self.len = len.min(self.capacity);
    }

    /// Bytes that it can show.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Shows all bytes again.
    pub fn restore(&mut self) {
        self.len = self.capacity;
    }
}

// SAFETY: a piece is the only way to its bytes, like a `Box<[u8]>`.
unsafe impl Send for Piece {}
// SAFETY: shared access to a piece only reads.
unsafe impl Sync for Piece {}

impl Deref for Piece {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the range lies in the mapping that `_mapping` keeps alive, is initialised (zero-filled), and belongs
        // to this piece alone.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

impl DerefMut for Piece {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_disjoint_and_outlive_the_arena() {
        let mut arena = Arena::new("dram", 10).unwrap();
        let mut a = arena.take(4).unwrap();
        let mut b = arena.take(6).unwrap();
        assert!(matches!(arena.take(1), Err(ArenaError::Full { left: 0, .. })));
        assert_eq!(arena.used(), 10);
        drop(arena);
        a.fill(1);
        b.fill(2);
        assert_eq!((&a[..], &b[..]), (&[1u8; 4][..], &[2u8; 6][..]));
    }

    #[test]
    fn an_empty_arena_is_fine() {
        let mut arena = Arena::new("vram", 0).unwrap();
        assert!(arena.take(0).unwrap().is_empty());
        assert!(arena.take(1).is_err());
    }
}
