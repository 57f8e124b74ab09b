//! Long slices that begin as zeros, on huge pages.

use super::arena::map_zeros;
use memmap2::MmapMut;
use std::alloc::{Layout, handle_alloc_error};
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};

/// A number, of which any bytes are a value.
///
/// # Safety
/// Any bytes are a value of the type, and a page is aligned for it.
pub(crate) unsafe trait Plain: Copy {}

// SAFETY: any bytes are a value.
unsafe impl Plain for u8 {}
// SAFETY: any bytes are a value.
unsafe impl Plain for f32 {}
// SAFETY: any bytes are a value.
unsafe impl Plain for half::f16 {}

/// A slice of zeros with a mapping of its own, on huge pages where the system offers them. Its
/// memory is used once it is written.
///
/// Long streams are read faster so: one page walk serves 2 MiB instead of 4 KiB.
pub(crate) struct Zeroed<T> {
    map: MmapMut,
    len: usize,
    values: PhantomData<T>,
}

impl<T: Plain> Zeroed<T> {
    /// Makes `len` zeros. Ends the process like a [`Vec`] where the system has no such memory.
    pub(crate) fn new(len: usize) -> Self {
        let layout =
            Layout::array::<T>(len).unwrap_or_else(|_| panic!("{len} values exceed memory"));
        let map = map_zeros(layout.size());
        Self {
            map: map.unwrap_or_else(|_| handle_alloc_error(layout)),
            len,
            values: PhantomData,
        }
    }
}

impl<T: Plain> Deref for Zeroed<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: the mapping begins at a page, holds `len` values, and any bytes are a value.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast(), self.len) }
    }
}

impl<T: Plain> DerefMut for Zeroed<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as for `deref`; the mapping is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.map.as_mut_ptr().cast(), self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_zeros_until_they_are_written() {
        assert!(Zeroed::<u8>::new(0).iter_mut().next().is_none());
        let halves = Zeroed::<half::f16>::new(5);
        assert_eq!(halves.as_ptr().addr() % 4096, 0);
        assert!(halves.iter().all(|v| *v == half::f16::ZERO));
        let mut values = Zeroed::<f32>::new(3 << 20);
        assert_eq!(values.len(), 3 << 20);
        assert!(values.iter().all(|v| *v == 0.0));
        values[5] = 1.5;
        *values.last_mut().unwrap() = 2.5;
        assert_eq!(values.iter().sum::<f32>(), 4.0);
    }
}
