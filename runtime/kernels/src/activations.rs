//! Activation rows, quantised once and read by every matrix that multiplies them.

#[cfg(target_arch = "x86_64")]
use super::Isa;
use super::Kernels;
use crate::quant::block::GROUP;
use crate::threads::ThreadPool;
use std::ops::Range;

/// 256 activations in 8 bits, laid out so that one register of 64 bytes serves eight runs of 32 values.
///
/// The eights of values (four for each of eight runs) stand in the order: the first eight of every run, the second eight
/// of every run, and so on. Products of the four registers with weights in the same order then add up lane by lane, two
/// lanes a run, and one multiplication by scales serves 256 values.
#[derive(Debug, Clone)]
#[repr(C, align(64))]
pub(super) struct ActBlock {
    /// `value / scale` of its run, within -127 to 127.
    pub q: [i8; GROUP],
    /// The scale of each run twice: what multiplies the lanes of the products.
    pub scale: [f32; 16],
    /// `scale * sum of q` of each sixteen, in the order of the row.
    pub sums: [f32; 16],
}

impl ActBlock {
    const ZERO: ActBlock = ActBlock { q: [0; GROUP], scale: [0.0; 16], sums: [0.0; 16] };
}

/// Where the eight values from `8 * i` of the row stand, in eights.
#[inline(always)]
pub(super) const fn place(i: usize) -> usize {
    i % 4 * 8 + i / 4
}

/// Rows that a thread takes at a time.
const SHARE_ROWS: usize = 4;

/// Start of a buffer that threads write disjoint parts of.
struct Shared<T>(*mut T);

// SAFETY: used in `fill_shared` only, for disjoint parts.
unsafe impl<T: Send> Sync for Shared<T> {}

impl<T> Shared<T> {
    /// # Safety
    /// `offset` must be within the buffer or at its end.
    unsafe fn at(&self, offset: usize) -> *mut T {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(offset) }
    }
}

/// `[rows, cols]` activations: the values as they are and, if wanted, their 8-bit form.
#[derive(Debug, Clone, Default)]
pub struct Activations {
    rows: usize,
    cols: usize,
    /// `[rows, cols]`.
    values: Vec<f32>,
    /// `[rows, cols / 256 rounded up]`, zeros after the last column; empty unless quantised.
    blocks: Vec<ActBlock>,
    quantized: bool,
}

impl Activations {
    /// Room for `max_rows` rows of `max_cols` values; more are taken when they come, at the price of an allocation.
    pub fn new(max_rows: usize, max_cols: usize) -> Self {
        Self {
            values: Vec::with_capacity(max_rows * max_cols),
            blocks: Vec::with_capacity(max_rows * max_cols.div_ceil(GROUP)),
            ..Self::default()
        }
    }

    /// Takes `[rows, cols]` values over and, where `quantize`, computes their 8-bit form.
    ///
    /// # Panics
    /// When `x` is not `rows * cols` long, or `cols` is no multiple of 32 and `quantize` is set.
    pub fn fill(&mut self, k: Kernels, rows: usize, cols: usize, x: &[f32], quantize: bool) {
        self.reshape(rows, cols, x.len(), quantize);
        self.values.clear();
        self.values.extend_from_slice(x);
        if quantize && cols > 0 {
            let groups = cols.div_ceil(GROUP);
            for (row, blocks) in x.chunks_exact(cols).zip(self.blocks.chunks_exact_mut(groups)) {
                k.quantize_row(row, blocks);
            }
        }
    }

    /// [`fill`](Self::fill) with the rows shared out among a pool's threads; the same bits.
    ///
    /// # Panics
    /// As [`fill`](Self::fill).
    pub fn fill_shared(&mut self, pool: &ThreadPool, k: Kernels, rows: usize, cols: usize, x: &[f32], quantize: bool) {
        if rows < 2 * SHARE_ROWS || cols == 0 {
            return self.fill(k, rows, cols, x, quantize);
        }
        self.reshape(rows, cols, x.len(), quantize);
        let groups = if quantize { cols.div_ceil(GROUP) } else { 0 };
        self.values.resize(rows * cols, 0.0);
        let (values, blocks) = (Shared(self.values.as_mut_ptr()), Shared(self.blocks.as_mut_ptr()));
        pool.for_each_chunk(rows, SHARE_ROWS, |range| {
            for row in range {
                let x = &x[row * cols..][..cols];
                // SAFETY: `values` has `rows * cols` values and `blocks` at least `rows * groups` blocks; every row is
                // handed out once, and both are borrowed exclusively for the whole call.
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

    /// Forgets all rows.
    pub fn clear(&mut self) {
        self.rows = 0;
        self.values.clear();
        self.blocks.clear();
    }

    /// Adds the rows of others after its own: the 8-bit form if they have it, the values only where `values` says so.
    /// All that is added since the last [`clear`](Self::clear) must be of one width and kind.
    ///
    /// # Panics
    /// When it is not.
    pub fn append(&mut self, from: ActView<'_>, values: bool) {
        if self.rows == 0 {
            (self.cols, self.quantized) = (from.cols, from.is_quantized());
        }
        assert!((self.cols, self.quantized) == (from.cols, from.is_quantized()), "rows of different kinds");
        self.blocks.extend_from_slice(from.blocks);
        if values {
            self.values.extend_from_slice(from.values);
        }
        self.rows += from.rows;
    }

    /// Takes some rows of others over: the 8-bit form if they have it, the values only where `values` says so.
    ///
    /// # Panics
    /// When a row is not there.
    pub fn gather(&mut self, from: ActView<'_>, rows: impl Iterator<Item = usize>, values: bool) {
        self.clear();
        (self.cols, self.quantized) = (from.cols, from.is_quantized());
        for row in rows {
            self.append(from.rows_range(row..row + 1), values);
        }
    }

    /// Checks and sets the shape, and makes room for the blocks: those that stay keep what they held, and
    /// `quantize_row` writes all of every block.
    fn reshape(&mut self, rows: usize, cols: usize, len: usize, quantize: bool) {
        assert_eq!(Some(len), rows.checked_mul(cols), "{rows} activation rows of {cols} values");
        assert!(!quantize || cols.is_multiple_of(32), "{cols} activations a row are not a multiple of 32");
        (self.rows, self.cols, self.quantized) = (rows, cols, quantize);
        if quantize {
            self.blocks.resize(rows * cols.div_ceil(GROUP), ActBlock::ZERO);
        }
    }

    /// Rows held.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values in a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// The values, `[rows, cols]`.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// What a product reads.
    pub fn view(&self) -> ActView<'_> {
        let groups = if self.quantized { self.cols.div_ceil(GROUP) } else { 0 };
        ActView { rows: self.rows, cols: self.cols, values: &self.values, blocks: &self.blocks[..self.rows * groups] }
    }
}

/// Some rows of [`Activations`].
#[derive(Debug, Clone, Copy)]
pub struct ActView<'a> {
    rows: usize,
    cols: usize,
    /// Empty where only the 8-bit form was gathered.
    values: &'a [f32],
    /// Empty unless quantised.
    blocks: &'a [ActBlock],
}

impl<'a> ActView<'a> {
    /// Rows: tokens.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values in a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Whether the 8-bit form is there.
    pub fn is_quantized(&self) -> bool {
        self.blocks.len() == self.rows * self.cols.div_ceil(GROUP)
    }

    /// The view of some of the rows.
    ///
    /// # Panics
    /// When they are not all there.
    pub fn rows_range(self, rows: Range<usize>) -> ActView<'a> {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?} of {} activation rows", self.rows);
        let groups = if self.is_quantized() { self.cols.div_ceil(GROUP) } else { 0 };
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

    /// The values, `[rows, cols]`; empty where only the 8-bit form was gathered.
    pub fn values(&self) -> &'a [f32] {
        self.values
    }

    /// The 8-bit form of a row in the order of the row: codes, the scale of each 32, and scale times the sum of codes of
    /// each sixteen.
    pub fn plain_quants(&self, row: usize) -> (Vec<i8>, Vec<f32>, Vec<f32>) {
        let groups = self.cols.div_ceil(GROUP);
        let (mut codes, mut scales, mut sums) = (Vec::new(), Vec::new(), Vec::new());
        for block in &self.blocks[row * groups..(row + 1) * groups] {
            (0..GROUP / 8).for_each(|i| codes.extend_from_slice(&block.q[8 * place(i)..][..8]));
            scales.extend(block.scale.iter().step_by(2));
            sums.extend_from_slice(&block.sums);
        }
        (codes, scales, sums)
    }

    /// The blocks, `[rows, cols / 256 rounded up]`.
    pub(super) fn blocks(&self) -> &'a [ActBlock] {
        self.blocks
    }
}

impl Kernels {
    fn quantize_row(self, x: &[f32], out: &mut [ActBlock]) {
        match self.isa() {
            #[cfg(target_arch = "x86_64")]
            // SAFETY: this value proves that the processor has the instructions.
            Isa::Amx | Isa::Avx512 => unsafe { quantize_row_avx512(x, out) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            Isa::Avx2 => unsafe { quantize_row_avx2(x, out) },
            _ => quantize_row(x, out, quantize_run),
        }
    }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx2,fma,f16c")]
fn quantize_row_avx512(x: &[f32], out: &mut [ActBlock]) {
    quantize_row(x, out, |run, x, block| super::x86::avx512::quantize_run(run, x, block));
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
fn quantize_row_avx2(x: &[f32], out: &mut [ActBlock]) {
    quantize_row(x, out, quantize_run);
}

/// Writes all of every block, the values past the end of `x` as zeros. The same bits on every instruction set.
#[inline(always)]
fn quantize_row(x: &[f32], out: &mut [ActBlock], quantize_run: impl Fn(usize, &[f32; 32], &mut ActBlock)) {
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

/// The scale of a run and its inverse, from its largest magnitude: both zero for runs so small that the inverse would not
/// be finite.
#[inline(always)]
pub(super) fn run_scale(largest: f32) -> (f32, f32) {
    if largest < 1e-35 { (0.0, 0.0) } else { (largest / 127.0, 127.0 / largest) }
}

/// Writes what a block holds of one run.
#[inline(always)]
fn quantize_run(run: usize, x: &[f32; 32], block: &mut ActBlock) {
    /// Added to a small number and taken off again it rounds to the nearest whole number, ties to even.
    const ROUND: f32 = 12_582_912.0;
    // Compared as bits so that a NaN is the largest and ends up in the scale, where it is seen.
    let mut largest = 0;
    for v in x {
        largest = largest.max(v.to_bits() & 0x7fff_ffff);
    }
    let (scale, inverse) = run_scale(f32::from_bits(largest));
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
    }
    block.scale[2 * run..][..2].fill(scale);
}
