//! One anonymous mapping per tier, cut into slices with one owner each.
//!
//! An arena has exactly the bytes that the plan gives the tier. Slices are packed without padding,
//! since every kernel reads unaligned.

use super::nodes::Pages;
use super::numa::NumaError;
use super::transit::HostMemory;
use memmap2::MmapMut;
use std::any::Any;
use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;
use thiserror::Error;

/// An arena could not be allocated, or is too small.
#[derive(Debug, Error)]
pub enum ArenaError {
    /// The system refused to map the memory.
    #[error("allocating {bytes} bytes of tier '{tier}' failed: {source}")]
    Map {
        /// Name of the tier.
        tier: String,
        /// Bytes that were requested.
        bytes: u64,
        /// Error of the system call.
        r#source: std::io::Error,
    },
    /// The pages could not be bound to the tier's NUMA node.
    #[error("binding tier '{tier}' to its NUMA node failed: {source}")]
    Node {
        /// Name of the tier.
        tier: String,
        /// Why; part of the message, so no source of its own.
        r#source: NumaError,
    },
    /// More bytes were taken than the plan reserves.
    #[error(
        "tier '{tier}' is full: {wanted} bytes wanted, {left} of {capacity} left; the plan does not fit this model"
    )]
    Full {
        /// Name of the tier.
        tier: String,
        /// Bytes that were requested.
        wanted: usize,
        /// Bytes that are left.
        left: usize,
        /// Bytes of the arena.
        capacity: usize,
    },
}

impl ArenaError {
    /// Returns the error of a system call that could not place a tier's pages.
    pub fn refused(tier: &str, pages: &Pages, source: std::io::Error) -> Self {
        ArenaError::Node {
            tier: tier.to_string(),
            r#source: NumaError::Refused {
                policy: pages.to_string(),
                source,
            },
        }
    }
}

/// Maps `bytes` zeros, on huge pages where the system offers them.
///
/// # Errors
/// When the system refuses the memory.
pub(super) fn map_zeros(bytes: usize) -> std::io::Result<MmapMut> {
    // The system refuses empty mappings, so an empty one has a byte that nobody uses.
    let map = MmapMut::map_anon(bytes.max(1))?;
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    Ok(map)
}

/// The anonymous mapping, which every slice keeps alive.
struct Mapping(#[allow(dead_code, reason = "held for its memory")] MmapMut);

/// Memory of one tier, handed out slice by slice and never taken back.
///
/// ```
/// use tier_plan_runtime::tiers::arena::Arena;
///
/// let mut arena = Arena::new("dram", 8192)?;
/// let mut slot = arena.take(4096)?;
/// slot.fill(7);
/// slot.truncate(100);
/// assert_eq!((slot.len(), slot.capacity()), (100, 4096));
/// assert!(arena.take(4097).is_err(), "4096 bytes are left");
/// # Ok::<(), tier_plan_runtime::tiers::arena::ArenaError>(())
/// ```
pub struct Arena {
    tier: String,
    mapping: Arc<Mapping>,
    base: *mut u8,
    used: usize,
    capacity: usize,
}

// SAFETY: `base` points into `mapping`, which is read and written only through slices, and those
// are disjoint.
unsafe impl Send for Arena {}

impl Arena {
    /// Allocates an arena of exactly `bytes`, zero-filled, on huge pages where the system offers
    /// them. Pages that have been written are locked in memory where the process's limit allows
    /// that.
    ///
    /// # Errors
    /// When the system refuses the memory.
    pub fn new(tier: &str, bytes: u64) -> Result<Self, ArenaError> {
        Self::on(tier, bytes, &Pages::Anywhere)
    }

    /// Allocates an arena like [`new`](Self::new), with its pages placed as `pages` says.
    ///
    /// # Errors
    /// When the system refuses the memory, or to place its pages.
    pub fn on(tier: &str, bytes: u64, pages: &Pages) -> Result<Self, ArenaError> {
        let map_error = |source| ArenaError::Map {
            tier: tier.to_string(),
            bytes,
            r#source,
        };
        let capacity = usize::try_from(bytes)
            .map_err(|_| map_error(std::io::ErrorKind::OutOfMemory.into()))?;
        let mut map = map_zeros(capacity).map_err(map_error)?;
        let base = map.as_mut_ptr();
        // SAFETY: the range is the mapping's own.
        unsafe { pages.bind(base, capacity) }
            .map_err(|source| ArenaError::refused(tier, pages, source))?;
        #[cfg(target_os = "linux")]
        // SAFETY: the range is the mapping's own. Most users may lock little memory: a refusal is
        // ignored, since the lock only keeps pages from being swapped out.
        unsafe {
            libc::mlock2(base.cast(), capacity, libc::MLOCK_ONFAULT as _);
        }
        Ok(Self {
            tier: tier.to_string(),
            mapping: Arc::new(Mapping(map)),
            base,
            used: 0,
            capacity,
        })
    }

    /// Returns the bytes of the arena.
    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Returns the address of the first byte.
    pub(crate) fn start(&self) -> *const u8 {
        self.base
    }

    /// Cuts an arena of which nothing is handed out into its first `bytes`, at most all of them, and
    /// the rest.
    pub(crate) fn split(self, bytes: u64) -> (Self, Self) {
        debug_assert_eq!(self.used, 0, "what was handed out has no place in either");
        let bytes = usize::try_from(bytes).map_or(self.capacity, |n| n.min(self.capacity));
        let part = |base, capacity| Self {
            tier: self.tier.clone(),
            mapping: Arc::clone(&self.mapping),
            base,
            used: 0,
            capacity,
        };
        // SAFETY: `bytes` is within the mapping.
        let rest = unsafe { self.base.add(bytes) };
        (part(self.base, bytes), part(rest, self.capacity - bytes))
    }

    /// Hands out the next `len` bytes.
    ///
    /// # Errors
    /// [`ArenaError::Full`] when fewer are left.
    pub fn take(&mut self, len: usize) -> Result<ArenaSlice, ArenaError> {
        let left = self.capacity - self.used;
        if len > left {
            return Err(ArenaError::Full {
                tier: self.tier.clone(),
                wanted: len,
                left,
                capacity: self.capacity,
            });
        }
        // SAFETY: `used + len` is within the mapping.
        let start = unsafe { self.base.add(self.used) };
        self.used += len;
        Ok(ArenaSlice {
            start,
            len,
            capacity: len,
            mapping: Arc::clone(&self.mapping),
        })
    }

    /// Returns the bytes that have been handed out.
    pub fn used(&self) -> usize {
        self.used
    }
}

/// A byte range of an arena with one owner; keeps the arena's memory alive.
///
/// It dereferences to its first `len` bytes, all of them unless it is [truncated](Self::truncate).
pub struct ArenaSlice {
    start: *mut u8,
    len: usize,
    capacity: usize,
    mapping: Arc<Mapping>,
}

impl ArenaSlice {
    /// Shortens the visible range to `len` bytes until it is [restored](Self::restored): a buffer
    /// for the largest expert also serves smaller ones.
    pub fn truncate(&mut self, len: usize) {
        self.len = len.min(self.capacity);
    }

    /// Returns the bytes of the whole range, truncated or not.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Returns the slice with all bytes visible again.
    #[must_use]
    pub fn restored(mut self) -> Self {
        self.len = self.capacity;
        self
    }

    /// Returns the address of the first byte.
    pub(crate) fn address(&self) -> usize {
        self.start as usize
    }

    /// Returns where bytes of this slice are in it.
    pub(crate) fn range_of(&self, bytes: &[u8]) -> Range<usize> {
        let first = bytes.as_ptr() as usize - self.address();
        debug_assert!(first + bytes.len() <= self.len);
        first..first + bytes.len()
    }

    /// Returns whether a slice is of the same arena.
    pub(super) fn is_of_same_arena(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.mapping, &other.mapping)
    }

    /// Returns what keeps the arena's memory mapped.
    pub(super) fn keep_alive(&self) -> Arc<dyn Any + Send + Sync> {
        Arc::clone(&self.mapping) as _
    }

    /// Returns the whole range as memory that is kept mapped.
    pub(crate) fn memory(&self) -> HostMemory {
        HostMemory {
            range: self.address()..self.address() + self.capacity,
            mapping: Arc::as_ptr(&self.mapping) as usize,
            keep: self.keep_alive(),
        }
    }

    /// Cuts the whole range into its first `len` bytes, at most all of them, and the rest.
    pub(crate) fn split(self, len: usize) -> (Self, Self) {
        let len = len.min(self.capacity);
        let part = |start, len| Self {
            start,
            len,
            capacity: len,
            mapping: Arc::clone(&self.mapping),
        };
        // SAFETY: `len` is within the range. `self` ends here, so that the parts are the only way to
        // its bytes.
        let rest = unsafe { self.start.add(len) };
        (part(self.start, len), part(rest, self.capacity - len))
    }

    /// Returns both ranges as one if `next` begins where this one ends, in the same arena.
    ///
    /// # Errors
    /// Gives both back otherwise.
    pub(crate) fn join(self, next: Self) -> Result<Self, (Self, Self)> {
        let is_next = self.address() + self.capacity == next.address();
        if !is_next || !self.is_of_same_arena(&next) {
            return Err((self, next));
        }
        let capacity = self.capacity + next.capacity;
        Ok(Self {
            start: self.start,
            len: capacity,
            capacity,
            mapping: self.mapping,
        })
    }
}

// SAFETY: a slice is the only way to its bytes, like a `Box<[u8]>`.
unsafe impl Send for ArenaSlice {}
// SAFETY: shared access to a slice only reads.
unsafe impl Sync for ArenaSlice {}

impl Deref for ArenaSlice {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the range lies in the mapping that `mapping` keeps alive, is initialized
        // (zero-filled), and belongs to this slice alone.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

impl DerefMut for ArenaSlice {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slices_are_disjoint_and_outlive_the_arena() {
        let mut arena = Arena::new("dram", 10).unwrap();
        let mut a = arena.take(4).unwrap();
        let mut b = arena.take(6).unwrap();
        assert!(matches!(
            arena.take(1),
            Err(ArenaError::Full { left: 0, .. })
        ));
        assert_eq!(arena.used(), 10);
        drop(arena);
        a.fill(1);
        b.fill(2);
        assert_eq!((&a[..], &b[..]), (&[1u8; 4][..], &[2u8; 6][..]));
    }

    #[test]
    fn a_slice_is_cut_and_put_together_again() {
        let mut arena = Arena::new("dram", 10).unwrap();
        let (a, b) = (arena.take(6).unwrap(), arena.take(4).unwrap());
        let (mut head, mut rest) = a.split(2);
        head.fill(1);
        rest.fill(2);
        let (rest, head) = rest.join(head).map(drop).unwrap_err();
        let whole = head.join(rest).ok().unwrap().join(b).ok().unwrap();
        assert_eq!(&whole[..], [1, 1, 2, 2, 2, 2, 0, 0, 0, 0]);
        let (all, nothing) = whole.split(11);
        assert_eq!((all.len(), nothing.len()), (10, 0));
        let other = Arena::new("dram", 10).unwrap().take(10).unwrap();
        assert!(all.join(other).is_err(), "another arena");
    }

    #[test]
    fn the_parts_of_an_arena_are_neighbors() {
        let (mut first, mut rest) = Arena::new("dram", 10).unwrap().split(4);
        assert!(first.take(5).is_err() && rest.take(7).is_err());
        let (first, rest) = (first.take(4).unwrap(), rest.take(6).unwrap());
        assert_eq!(first.join(rest).ok().map(|all| all.len()), Some(10));
        let (all, mut nothing) = Arena::new("dram", 10).unwrap().split(u64::MAX);
        assert_eq!((all.capacity, nothing.take(1).is_err()), (10, true));
    }

    #[test]
    fn an_empty_arena_is_fine() {
        let mut arena = Arena::new("vram", 0).unwrap();
        assert!(arena.take(0).unwrap().is_empty());
        assert!(arena.take(1).is_err());
    }
}
