//! Activation rows: quantized to 8 bits once, then read by every matrix that multiplies them.
//!
//! # Layout
//!
//! A *run* is 32 consecutive values, which share a scale; an *eight* is 8 of them, a quarter of a
//! run. A block ([`ActBlock`]) is 8 runs. Its codes are not stored in the order of the row: first
//! come the first eights of all runs, then all second eights, and so on. So register `k` of 64
//! bytes holds eight `k` of every run:
//!
//! ```text
//!              run 0      run 1      ...   run 7
//! register 0   0..8       32..40           224..232      <- values of the row
//! register 1   8..16      40..48           232..240
//! register 2   16..24     48..56           240..248
//! register 3   24..32     56..64           248..256
//! lanes (i32)  0   1      2   3            14  15
//! ```
//!
//! Weights are unpacked to the same order. A dot product of bytes adds four neighbors into a 32-bit
//! lane, so the products of a run end up in two lanes, register upon register, and no lane ever
//! holds values of two runs. A single multiplication with `scale`, which has every run's scale
//! twice, then serves 256 values.
//!
//! `sums` is for formats with minimums: `sum of (scale * code - min) * x` is
//! `scale * dot - min * sum of x`. It is kept per 16 values, since some formats have a minimum per
//! 16 and, for what takes a run at a time, per run. `offsets` are for codes that are stored with an
//! offset: `offset * (negated sum of q)` takes it off, in whole numbers. The most common offsets are
//! multiplied in already: 128 of a run ([`RUN_OFFSET_BITS`]), 32 of 16 values ([`OFFSET_BITS`]).

use super::Kernels;
use crate::quant::block::GROUP;
use crate::threads::{SharedPtr, ThreadPool};
use std::ops::Range;

/// Binary logarithm of the offset that [`ActBlock::run_offsets`] are for.
pub(super) const RUN_OFFSET_BITS: usize = 7;

/// Binary logarithm of the offset that [`ActBlock::offsets`] are for.
pub(super) const OFFSET_BITS: usize = 5;

/// 256 activations in 8 bits, in the order that the module describes.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct ActBlock {
    /// Codes, `round(value / scale)` within -127 to 127.
    pub q: [i8; GROUP],
    /// Scale of each run, twice: what multiplies the lanes of the dot products.
    pub scale: [f32; 16],
    /// `scale * sum of q` of each 16 values, in the order of the row.
    pub sums: [f32; 16],
    /// `scale * sum of q` of each run.
    pub run_sums: [f32; 8],
    /// 128 times the negated sum of `q` of each run.
    pub run_offsets: [i32; 8],
    /// 32 times the negated sum of `q` of each 16 values.
    pub offsets: [i32; 16],
    /// Nothing. Without it a block would be 512 bytes, and the same block of neighboring tokens 4 KiB
    /// apart where rows have 2048 values: all in the same sets of the first-level cache, which has
    /// as many ways as a kernel has tokens.
    spare: [u64; 8],
}

impl ActBlock {
    const ZERO: ActBlock = ActBlock {
        q: [0; GROUP],
        scale: [0.0; 16],
        sums: [0.0; 16],
        run_sums: [0.0; 8],
        run_offsets: [0; 8],
        offsets: [0; 16],
        spare: [0; 8],
    };
}

/// Returns where the eight values from `8 * i` of the row are stored, in eights.
#[inline(always)]
pub(super) const fn place(i: usize) -> usize {
    i % 4 * 8 + i / 4
}

/// Rows per chunk of a thread.
const CHUNK_ROWS: usize = 4;

/// `[rows, cols]` activations: the values as they are and, where a matmul needs it, their 8-bit
/// form.
#[derive(Debug, Clone, Default)]
pub struct Activations {
    rows: usize,
    cols: usize,
    /// Values, `[rows, cols]`; empty where only the 8-bit form was gathered.
    values: Vec<f32>,
    /// 8-bit form, `[rows, cols / 256 rounded up]`, zeros after the last column; empty unless
    /// quantized.
    blocks: Vec<ActBlock>,
    quantized: bool,
}

impl Activations {
    /// Returns no rows, with capacity for `max_rows` rows of `max_cols` values. More rows are taken
    /// too, at the price of an allocation.
    pub fn new(max_rows: usize, max_cols: usize) -> Self {
        Self {
            values: Vec::with_capacity(max_rows * max_cols),
            blocks: Vec::with_capacity(max_rows * max_cols.div_ceil(GROUP)),
            ..Self::default()
        }
    }

    /// Copies `[rows, cols]` values and, where `quantize`, computes their 8-bit form.
    ///
    /// # Panics
    /// When `x` is not `rows * cols` long, or `quantize` is set and `cols` is not a multiple of 32.
    pub fn fill(&mut self, k: Kernels, rows: usize, cols: usize, x: &[f32], quantize: bool) {
        self.reshape(rows, cols, x.len(), quantize);
        self.values.clear();
        self.values.extend_from_slice(x);
        if quantize && cols > 0 {
            let groups = cols.div_ceil(GROUP);
            for (row, blocks) in x
                .chunks_exact(cols)
                .zip(self.blocks.chunks_exact_mut(groups))
            {
                k.quantize_row(row, blocks);
            }
        }
    }

    /// Does what [`fill`](Self::fill) does, with the same bits, on the threads of a pool.
    ///
    /// # Panics
    /// As [`fill`](Self::fill).
    pub fn fill_shared(
        &mut self,
        pool: &ThreadPool,
        k: Kernels,
        rows: usize,
        cols: usize,
        x: &[f32],
        quantize: bool,
    ) {
        if rows < 2 * CHUNK_ROWS || cols == 0 {
            return self.fill(k, rows, cols, x, quantize);
        }
        self.reshape(rows, cols, x.len(), quantize);
        let groups = if quantize { cols.div_ceil(GROUP) } else { 0 };
        self.values.resize(rows * cols, 0.0);
        let (values, blocks) = (
            SharedPtr(self.values.as_mut_ptr()),
            SharedPtr(self.blocks.as_mut_ptr()),
        );
        pool.for_each_chunk(rows, CHUNK_ROWS, |range| {
            for row in range {
                let x = &x[row * cols..][..cols];
                // SAFETY: `values` has `rows * cols` values and `blocks` at least `rows * groups`
                // blocks; every row is handed out once, and both are borrowed exclusively for the
                // whole call.
                let (values, blocks) = unsafe {
                    (
                        std::slice::from_raw_parts_mut(values.at(row * cols), cols),
                        std::slice::from_raw_parts_mut(blocks.at(row * groups), groups),
                    )
                };
                values.copy_from_slice(x);
                if quantize {
                    k.quantize_row(x, blocks);
                }
            }
        });
    }

    /// Removes all rows; the memory stays.
    pub fn clear(&mut self) {
        self.rows = 0;
        self.values.clear();
        self.blocks.clear();
    }

    /// Appends rows: their 8-bit form if they have it, their values where `values`. All rows since
    /// the last [`clear`](Self::clear) must have one width and kind.
    ///
    /// # Panics
    /// When the width or kind differs.
    pub fn append(&mut self, from: ActView<'_>, values: bool) {
        if self.rows == 0 {
            (self.cols, self.quantized) = (from.cols, from.is_quantized());
        }
        assert!(
            (self.cols, self.quantized) == (from.cols, from.is_quantized()),
            "rows of different kinds"
        );
        self.blocks.extend_from_slice(from.blocks);
        if values {
            self.values.extend_from_slice(from.values);
        }
        self.rows += from.rows;
    }

    /// Replaces all rows by some of `from`, on the threads of a pool: their 8-bit form if they have it,
    /// their values where `values`.
    ///
    /// # Panics
    /// When a row is out of bounds.
    pub fn gather_shared(
        &mut self,
        pool: &ThreadPool,
        from: ActView<'_>,
        rows: &[usize],
        values: bool,
    ) {
        (self.rows, self.cols, self.quantized) = (rows.len(), from.cols, from.is_quantized());
        let of_row = |all: usize| all / from.rows.max(1);
        let (n_values, n_blocks) = (of_row(from.values.len()), of_row(from.blocks.len()));
        let n_values = if values { n_values } else { 0 };
        self.values.resize(rows.len() * n_values, 0.0);
        self.blocks.resize(rows.len() * n_blocks, ActBlock::ZERO);
        let (to_values, to_blocks) = (
            SharedPtr(self.values.as_mut_ptr()),
            SharedPtr(self.blocks.as_mut_ptr()),
        );
        pool.for_each_chunk(rows.len(), CHUNK_ROWS, |range| {
            for to in range {
                let row = rows[to];
                let row_values = &from.values[row * n_values..][..n_values];
                let row_blocks = &from.blocks[row * n_blocks..][..n_blocks];
                // SAFETY: there is room for each row's values and blocks; every row is handed out
                // once, and both are borrowed exclusively for the whole call.
                unsafe {
                    std::slice::from_raw_parts_mut(to_values.at(to * n_values), n_values)
                        .copy_from_slice(row_values);
                    std::slice::from_raw_parts_mut(to_blocks.at(to * n_blocks), n_blocks)
                        .copy_from_slice(row_blocks);
                }
            }
        });
    }

    /// Checks and sets the shape, and resizes the blocks. Blocks that stay keep their old content:
    /// `quantize_row` writes all of every block.
    fn reshape(&mut self, rows: usize, cols: usize, len: usize, quantize: bool) {
        assert_eq!(
            Some(len),
            rows.checked_mul(cols),
            "{rows} activation rows of {cols} values"
        );
        assert!(
            !quantize || cols.is_multiple_of(32),
            "{cols} activations a row are not a multiple of 32"
        );
        (self.rows, self.cols, self.quantized) = (rows, cols, quantize);
        if quantize {
            self.blocks
                .resize(rows * cols.div_ceil(GROUP), ActBlock::ZERO);
        }
    }

    /// Returns the number of rows (tokens).
    #[inline]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Returns the values per row.
    #[inline]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Returns the values, `[rows, cols]`.
    #[inline]
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Returns all rows, as a matmul reads them.
    #[inline]
    pub fn view(&self) -> ActView<'_> {
        let groups = if self.quantized {
            self.cols.div_ceil(GROUP)
        } else {
            0
        };
        ActView {
            rows: self.rows,
            cols: self.cols,
            values: &self.values,
            blocks: &self.blocks[..self.rows * groups],
        }
    }
}

/// A range of rows of [`Activations`].
#[derive(Debug, Clone, Copy)]
pub struct ActView<'a> {
    rows: usize,
    cols: usize,
    /// Empty where only the 8-bit form was gathered.
    values: &'a [f32],
    /// 8-bit form; empty unless quantized.
    blocks: &'a [ActBlock],
}

impl<'a> ActView<'a> {
    /// Returns the number of rows (tokens).
    #[inline]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Returns the values per row.
    #[inline]
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Whether the 8-bit form is present.
    #[inline]
    pub fn is_quantized(&self) -> bool {
        self.blocks.len() == self.rows * self.cols.div_ceil(GROUP)
    }

    /// Returns the view of a range of the rows.
    ///
    /// # Panics
    /// When the range is out of bounds.
    #[inline]
    pub fn rows_range(self, rows: Range<usize>) -> ActView<'a> {
        assert!(
            rows.start <= rows.end && rows.end <= self.rows,
            "rows {rows:?} of {} activation rows",
            self.rows
        );
        let groups = if self.is_quantized() {
            self.cols.div_ceil(GROUP)
        } else {
            0
        };
        ActView {
            rows: rows.len(),
            cols: self.cols,
            values: if self.values.is_empty() {
                self.values
            } else {
                &self.values[rows.start * self.cols..rows.end * self.cols]
            },
            blocks: &self.blocks[rows.start * groups..rows.end * groups],
        }
    }

    /// Returns the values, `[rows, cols]`; empty where only the 8-bit form was gathered.
    #[inline]
    pub fn values(&self) -> &'a [f32] {
        self.values
    }

    /// Returns the 8-bit form of a row, in the order of the row.
    pub fn q8_row(&self, row: usize) -> Q8Row {
        let groups = self.cols.div_ceil(GROUP);
        let mut out = Q8Row::default();
        for block in &self.blocks[row * groups..(row + 1) * groups] {
            (0..GROUP / 8).for_each(|i| out.codes.extend_from_slice(&block.q[8 * place(i)..][..8]));
            out.scales.extend(block.scale.iter().step_by(2));
            out.sums.extend_from_slice(&block.sums);
        }
        out
    }

    /// Returns the 8-bit form, `[rows, cols / 256 rounded up]`.
    pub(super) fn blocks(&self) -> &'a [ActBlock] {
        self.blocks
    }
}

/// The 8-bit form of one row, padded with zeros to a multiple of 256 values.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Q8Row {
    /// One per value, -127 to 127.
    pub codes: Vec<i8>,
    /// One per 32 values.
    pub scales: Vec<f32>,
    /// Scale times the sum of the codes, one per 16 values.
    pub sums: Vec<f32>,
}

impl Kernels {
    /// Quantizes a row to as many blocks as it needs.
    fn quantize_row(self, x: &[f32], out: &mut [ActBlock]) {
        match self.isa() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the `Kernels` value proves that the processor has the instructions.
            crate::Isa::Amx | crate::Isa::Avx512 => unsafe { quantize_row_avx512(x, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the `Kernels` value proves that the processor has the instructions.
            crate::Isa::Avx2 => unsafe { quantize_row_avx2(x, out) },
            _ => quantize_row(x, out, quantize_run),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn quantize_row_avx512(x: &[f32], out: &mut [ActBlock]) {
    quantize_row(x, out, |run, x, block| {
        super::x86::avx512::quantize_run(run, x, block)
    });
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn quantize_row_avx2(x: &[f32], out: &mut [ActBlock]) {
    quantize_row(x, out, quantize_run);
}

/// Writes all of every block, the values past the end of `x` as zeros. Every instruction set gives
/// the same bits.
#[inline(always)]
fn quantize_row(
    x: &[f32],
    out: &mut [ActBlock],
    quantize_run: impl Fn(usize, &[f32; 32], &mut ActBlock),
) {
    for (x, block) in x.chunks(GROUP).zip(out) {
        let mut padded = [0.0; GROUP];
        let x = if x.len() == GROUP {
            x
        } else {
            padded[..x.len()].copy_from_slice(x);
            &padded
        };
        for (run, x) in x.as_chunks().0.iter().enumerate() {
            quantize_run(run, x, block);
        }
    }
}

/// Returns the scale of a run and its inverse, from its largest magnitude. Both are zero for runs
/// so small that the inverse would be infinite.
#[inline(always)]
pub(super) fn run_scale(largest: f32) -> (f32, f32) {
    if largest < 1e-35 {
        (0.0, 0.0)
    } else {
        (largest / 127.0, 127.0 / largest)
    }
}

/// Quantizes one run of a block.
#[inline(always)]
fn quantize_run(run: usize, x: &[f32; 32], block: &mut ActBlock) {
    /// 1.5 * 2^23: added to a small number and subtracted again, it rounds to the nearest integer,
    /// ties to even.
    const ROUND: f32 = 12_582_912.0;
    // Compared as bits so that a NaN is the largest and ends up in the scale, where it is seen.
    let mut largest = 0;
    for v in x {
        largest = largest.max(v.to_bits() & 0x7fff_ffff);
    }
    let (scale, inverse) = run_scale(f32::from_bits(largest));
    let mut both = 0;
    for half in 0..2 {
        let mut sum = 0;
        for eight in 2 * half..2 * half + 2 {
            let x = &x[8 * eight..][..8];
            let q = &mut block.q[8 * place(4 * run + eight)..][..8];
            for (q, x) in q.iter_mut().zip(x) {
                let bits = (x * inverse + ROUND).to_bits() as i32;
                *q = bits.wrapping_sub(ROUND.to_bits() as i32) as i8;
                sum += i32::from(*q);
            }
        }
        block.sums[2 * run + half] = scale * sum as f32;
        block.offsets[2 * run + half] = -(sum << OFFSET_BITS);
        both += sum;
    }
    block.run_sums[run] = scale * both as f32;
    block.run_offsets[run] = -(both << RUN_OFFSET_BITS);
    block.scale[2 * run..][..2].fill(scale);
}
