//! The matrices a product reads and writes: weights as they lie in the file, and an output shared by threads.

use crate::quant::TensorType;
use std::marker::PhantomData;
use std::ops::Range;

/// Whether products with weights of this type read the 8-bit activations; F32, F16 and BF16 read the floats.
pub fn needs_quants(ty: TensorType) -> bool {
    !matches!(ty, TensorType::F32 | TensorType::F16 | TensorType::BF16)
}

/// A `[n_rows, n_cols]` weight matrix, its rows one after another as in the file.
#[derive(Debug, Clone, Copy)]
pub struct Weights<'a> {
    ty: TensorType,
    bytes: &'a [u8],
    n_rows: usize,
    n_cols: usize,
    row_bytes: usize,
}

impl<'a> Weights<'a> {
    /// A matrix over `bytes`, or `None` where `n_cols` is no whole number of blocks or `bytes` is not exactly `n_rows`
    /// rows.
    pub fn new(ty: TensorType, bytes: &'a [u8], n_rows: usize, n_cols: usize) -> Option<Self> {
        let row_bytes = usize::try_from(ty.row_bytes(n_cols as u64)?).ok()?;
        (row_bytes.checked_mul(n_rows)? == bytes.len()).then_some(Self { ty, bytes, n_rows, n_cols, row_bytes })
    }

    /// The type of every value.
    pub fn ty(&self) -> TensorType {
        self.ty
    }

    /// Rows: the length of the product.
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Columns: the length of the activation.
    pub fn n_cols(&self) -> usize {
        self.n_cols
    }

    /// Bytes of a row.
    pub fn row_bytes(&self) -> usize {
        self.row_bytes
    }

    /// All rows.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// One row, or `None` past the end.
    pub fn row(&self, row: usize) -> Option<&'a [u8]> {
        (row < self.n_rows).then(|| &self.bytes[row * self.row_bytes..][..self.row_bytes])
    }

    /// The matrix of some of the rows, or `None` where they are not all there.
    pub fn rows(&self, rows: Range<usize>) -> Option<Weights<'a>> {
        if rows.start > rows.end || rows.end > self.n_rows {
            return None;
        }
        let bytes = &self.bytes[rows.start * self.row_bytes..rows.end * self.row_bytes];
        Some(Weights { bytes, n_rows: rows.len(), ..*self })
    }
}

/// A `[n_tokens, stride]` matrix of `f32` that several threads may write at once, each at columns of its own.
#[derive(Debug, Clone, Copy)]
pub struct OutMatrix<'a> {
    base: *mut f32,
    len: usize,
    stride: usize,
    borrowed: PhantomData<&'a mut [f32]>,
}

// SAFETY: all writes go through `put`, whose callers promise that no element is written by two threads at once.
unsafe impl Send for OutMatrix<'_> {}
// SAFETY: as above; there is no way to read through an `OutMatrix`.
unsafe impl Sync for OutMatrix<'_> {}

impl<'a> OutMatrix<'a> {
    /// A matrix over `out`, `stride` columns a token.
    pub fn new(out: &'a mut [f32], stride: usize) -> Self {
        Self { base: out.as_mut_ptr(), len: out.len(), stride, borrowed: PhantomData }
    }

    /// Columns of a token's row.
    pub fn stride(&self) -> usize {
        self.stride
    }

    /// The matrix without its first `tokens` rows; empty when there are no more.
    pub fn skip_tokens(self, tokens: usize) -> Self {
        let skipped = tokens.saturating_mul(self.stride).min(self.len);
        // SAFETY: `skipped` is at most the length.
        Self { base: unsafe { self.base.add(skipped) }, len: self.len - skipped, ..self }
    }

    /// Whether columns below `columns` of `tokens` rows are all inside.
    pub(super) fn holds(&self, tokens: usize, columns: usize) -> bool {
        let last = tokens.checked_sub(1).map_or(Some(0), |t| t.checked_mul(self.stride)?.checked_add(columns));
        tokens == 0 || columns <= self.stride && last.is_some_and(|end| end <= self.len)
    }

    /// Where an element is.
    ///
    /// # Safety
    /// `holds(token + 1, column + 1)`.
    #[cfg(target_arch = "x86_64")]
    #[inline(always)]
    pub(super) unsafe fn at(self, token: usize, column: usize) -> *mut f32 {
        // SAFETY: the caller keeps the element inside.
        unsafe { self.base.add(token * self.stride + column) }
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
