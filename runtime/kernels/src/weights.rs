//! Operands of a matmul: a weight matrix laid out as in the file, and an output that threads share.

use crate::bands::{self, BAND_ROWS, RowOrder};
use crate::quant::TensorType;
use std::marker::PhantomData;
use std::ops::Range;

/// Whether a matmul with weights of this type reads the 8-bit activations; types without blocks
/// read the floats.
#[inline]
pub fn needs_quants(ty: TensorType) -> bool {
    ty.block_len() > 1
}

/// A `[n_rows, n_cols]` weight matrix, its rows packed as in the file or [interleaved](RowOrder).
///
/// ```
/// use tier_plan_kernels::Weights;
/// use tier_plan_kernels::quant::TensorType;
///
/// let bytes = [0; 2 * 144];
/// let w = Weights::new(TensorType::Q4_K, &bytes, 2, 256).expect("two rows of one block");
/// assert_eq!((w.row_bytes(), w.row(1).map(<[u8]>::len)), (144, Some(144)));
/// assert!(Weights::new(TensorType::Q4_K, &bytes, 3, 256).is_none());
/// ```
#[derive(Debug, Clone, Copy)]
pub struct Weights<'a> {
    ty: TensorType,
    bytes: &'a [u8],
    n_rows: usize,
    n_cols: usize,
    row_bytes: usize,
    order: RowOrder,
    scale: f32,
}

impl<'a> Weights<'a> {
    /// Returns the matrix over `bytes`, or `None` where the type has no kernels, `n_cols` is not a
    /// multiple of the block length, or `bytes` is not exactly `n_rows` rows.
    #[inline]
    pub fn new(ty: TensorType, bytes: &'a [u8], n_rows: usize, n_cols: usize) -> Option<Self> {
        let row_bytes = usize::try_from(ty.row_bytes(n_cols as u64)?).ok()?;
        let fits = row_bytes.checked_mul(n_rows)? == bytes.len();
        (fits && ty.has_kernels()).then_some(Self {
            ty,
            bytes,
            n_rows,
            n_cols,
            row_bytes,
            order: RowOrder::Sequential,
            scale: 1.0,
        })
    }

    /// Whether a matrix of `n_rows` rows can be interleaved.
    #[inline]
    pub fn has_bands(ty: TensorType, n_rows: usize) -> bool {
        bands::layout(ty).is_some() && n_rows.is_multiple_of(BAND_ROWS)
    }

    /// Returns the matrix with its rows in this order, or `None` if its bytes can't be.
    #[inline]
    pub fn in_order(self, order: RowOrder) -> Option<Self> {
        let fits = order == RowOrder::Sequential || Self::has_bands(self.ty, self.n_rows);
        fits.then_some(Self { order, ..self })
    }

    /// Returns the order of the rows.
    #[inline]
    pub fn order(&self) -> RowOrder {
        self.order
    }

    /// Returns the matrix with a factor on all of its products.
    ///
    /// ```
    /// use tier_plan_kernels::quant::TensorType;
    /// use tier_plan_kernels::{Activations, Kernels, OutMatrix, Weights};
    ///
    /// let bytes = [2.0f32, 3.0].map(f32::to_le_bytes).concat();
    /// let w = Weights::new(TensorType::F32, &bytes, 2, 1).expect("two rows").scaled(0.5);
    /// let (k, mut x, mut out) = (Kernels::best(), Activations::new(1, 1), [0.0; 2]);
    /// x.fill(k, 1, 1, &[8.0], false);
    /// // SAFETY: no other thread knows `out`.
    /// unsafe { k.matmul(w, 0..2, x.view(), OutMatrix::new(&mut out, 2)) };
    /// assert_eq!(out, [8.0, 12.0]);
    /// ```
    #[inline]
    pub fn scaled(self, scale: f32) -> Self {
        Self { scale, ..self }
    }

    /// Returns the factor on all products.
    #[inline]
    pub fn scale(&self) -> f32 {
        self.scale
    }

    /// Returns the element type.
    #[inline]
    pub fn ty(&self) -> TensorType {
        self.ty
    }

    /// Returns the number of rows: the outputs of a matvec.
    #[inline]
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Returns the number of columns: the inputs of a matvec.
    #[inline]
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Returns the bytes per row.
    #[inline]
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// Returns the bytes of all rows.
    #[inline]
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Returns the bytes of a row, or `None` past the end and where rows are interleaved.
    #[inline]
    pub fn row(&self, row: usize) -> Option<&'a [u8]> {
        (row < self.n_rows && self.order == RowOrder::Sequential)
            .then(|| &self.bytes[row * self.row_bytes..][..self.row_bytes])
    }

    /// Returns the bytes of a row in the order of the file, in `scratch` where rows are interleaved;
    /// `None` past the end.
    pub fn row_in<'s>(&self, row: usize, scratch: &'s mut Vec<u8>) -> Option<&'s [u8]>
    where
        'a: 's,
    {
        let layout = match self.order {
            RowOrder::Sequential => return self.row(row),
            RowOrder::Interleaved => bands::layout(self.ty)?,
        };
        let band_bytes = BAND_ROWS * self.row_bytes;
        let band = self
            .bytes
            .get(row / BAND_ROWS * band_bytes..)?
            .get(..band_bytes)?;
        scratch.resize(self.row_bytes, 0);
        layout.row(self.row_bytes, band, row % BAND_ROWS, scratch);
        Some(scratch)
    }

    /// Returns the matrix of a range of rows, or `None` where the range is out of bounds or, of
    /// interleaved rows, not whole bands.
    #[inline]
    pub fn rows(&self, rows: Range<usize>) -> Option<Weights<'a>> {
        let is_cut =
            |at: usize| self.order == RowOrder::Interleaved && !at.is_multiple_of(BAND_ROWS);
        if rows.start > rows.end || rows.end > self.n_rows || is_cut(rows.start) || is_cut(rows.end)
        {
            return None;
        }
        let bytes = &self.bytes[rows.start * self.row_bytes..rows.end * self.row_bytes];
        Some(Weights {
            bytes,
            n_rows: rows.len(),
            ..*self
        })
    }
}

/// A `[n_tokens, stride]` matrix of `f32` that several threads may write at once, each its own
/// columns.
#[derive(Debug, Clone, Copy)]
pub struct OutMatrix<'a> {
    base: *mut f32,
    len: usize,
    stride: usize,
    borrowed: PhantomData<&'a mut [f32]>,
}

// SAFETY: all writes go through `put`, whose callers promise that no element is written by two
// threads at once.
unsafe impl Send for OutMatrix<'_> {}
// SAFETY: writes go through `put` alone, whose callers promise disjoint elements; there is no way
// to read through an `OutMatrix`.
unsafe impl Sync for OutMatrix<'_> {}

impl<'a> OutMatrix<'a> {
    /// Returns the matrix over `out`, with `stride` columns per token.
    #[inline]
    pub fn new(out: &'a mut [f32], stride: usize) -> Self {
        Self {
            base: out.as_mut_ptr(),
            len: out.len(),
            stride,
            borrowed: PhantomData,
        }
    }

    /// Returns the columns per token.
    #[inline]
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// Returns the matrix without its first `tokens` rows; empty when there are no more.
    #[inline]
    pub fn skip_tokens(self, tokens: usize) -> Self {
        let skipped = tokens.saturating_mul(self.stride).min(self.len);
        Self {
            // SAFETY: `skipped` is at most the length.
            base: unsafe { self.base.add(skipped) },
            len: self.len - skipped,
            ..self
        }
    }

    /// Whether the first `columns` columns of `tokens` rows are inside.
    pub(super) fn holds(&self, tokens: usize, columns: usize) -> bool {
        let last = tokens.checked_sub(1).map_or(Some(0), |t| {
            t.checked_mul(self.stride)?.checked_add(columns)
        });
        tokens == 0 || columns <= self.stride && last.is_some_and(|end| end <= self.len)
    }

    /// Returns the address of an element.
    ///
    /// # Safety
    /// `holds(token + 1, column + 1)`.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(super) unsafe fn at(self, token: usize, column: usize) -> *mut f32 {
        // SAFETY: the caller keeps the element inside.
        unsafe { self.base.add(token * self.stride + column) }
    }

    /// Multiplies the elements of some columns of a token.
    ///
    /// # Safety
    /// `holds(token + 1, columns.end)`, the elements were written before, and no other thread
    /// touches them at the same time.
    pub(super) unsafe fn multiply(self, token: usize, columns: Range<usize>, factor: f32) {
        // SAFETY: the caller keeps the elements inside and to itself.
        let values = unsafe {
            let first = self.base.add(token * self.stride + columns.start);
            std::slice::from_raw_parts_mut(first, columns.len())
        };
        values.iter_mut().for_each(|value| *value *= factor);
    }

    /// Writes one element.
    ///
    /// # Safety
    /// `holds(token + 1, column + 1)`, and no other thread touches this element at the same time.
    #[inline(always)]
    pub(super) unsafe fn put(self, token: usize, column: usize, value: f32) {
        // SAFETY: the caller keeps the element inside and to itself.
        unsafe { *self.base.add(token * self.stride + column) = value };
    }
}
