//! Loading registers of values from rows as they are stored.

use crate::rows::{BLOCK, q8_row_bytes};
use crate::x86::lanes::PartialLanes;

/// A format of stored rows.
pub(super) trait RowFormat {
    /// Returns the bytes per row of `width` values.
    fn row_bytes(width: usize) -> usize;

    /// Loads the values from column `at` on, a multiple of the register's lanes.
    ///
    /// # Safety
    /// The row has the values that `part` names; see [`PartialLanes`].
    unsafe fn load<L: PartialLanes>(row: *const u8, at: usize, part: L::Part) -> L;
}

/// Rows of 32-bit floats.
pub(super) struct F32;

/// Rows of 16-bit floats.
pub(super) struct F16;

/// Rows of signed bytes with a 16-bit float per 32 before them.
pub(super) struct Q8;

impl RowFormat for F32 {
    #[inline(always)]
    fn row_bytes(width: usize) -> usize {
        4 * width
    }

    #[inline(always)]
    unsafe fn load<L: PartialLanes>(row: *const u8, at: usize, part: L::Part) -> L {
        // SAFETY: the caller's row and processor.
        unsafe { L::load_part_f32(row.cast::<f32>().add(at), part) }
    }
}

impl RowFormat for F16 {
    #[inline(always)]
    fn row_bytes(width: usize) -> usize {
        2 * width
    }

    #[inline(always)]
    unsafe fn load<L: PartialLanes>(row: *const u8, at: usize, part: L::Part) -> L {
        // SAFETY: the caller's row and processor.
        unsafe { L::load_part_f16(row.cast::<i16>().add(at), part) }
    }
}

impl RowFormat for Q8 {
    #[inline(always)]
    fn row_bytes(width: usize) -> usize {
        q8_row_bytes(width)
    }

    #[inline(always)]
    unsafe fn load<L: PartialLanes>(row: *const u8, at: usize, part: L::Part) -> L {
        const { assert!(BLOCK.is_multiple_of(L::COUNT), "a register is of one block") };
        // SAFETY: the caller's row and processor; a block's scale is before its codes.
        unsafe {
            let block = row.add(at / BLOCK * (BLOCK + 2));
            let scale = block.cast::<i16>().read_unaligned();
            L::load_part_q8(block.add(2 + at % BLOCK).cast(), scale, part)
        }
    }
}
