//! Interleaving the rows of matrices that were copied to memory.

use super::tensor::SlicePlace;
use super::{Gguf, TensorInfo};
use std::ops::Range;
use std::sync::Mutex;
use tier_plan_kernels::quant::TensorType;
use tier_plan_kernels::{BAND_ROWS, Kernels, RowOrder};

/// Bytes that a thread interleaves at a time, about.
const PIECE_BYTES: usize = 4 << 20;

/// A matrix in the memory of a part.
struct Matrix {
    bytes: Range<usize>,
    ty: TensorType,
    row_bytes: usize,
}

impl Gguf {
    /// Returns the order of a tensor's rows in [`bytes`](Self::bytes).
    ///
    /// # Panics
    /// If there is no such tensor.
    pub fn row_order(&self, tensor: usize) -> RowOrder {
        self.row_orders[tensor]
    }

    /// Interleaves the rows of tensors, by index, in the copy that
    /// [`copy_to_memory`](Self::copy_to_memory) made, on `threads` threads; a stack of matrices
    /// matrix by matrix. Does nothing where nothing was copied. The tensors are no longer in the
    /// order of the file then: see [`row_order`](Self::row_order). Also does nothing where tensors
    /// of the file overlap, since each has an order of its own.
    ///
    /// # Panics
    /// If a tensor has no bands: a type without, or a number of rows per matrix that is no multiple
    /// of [`BAND_ROWS`].
    pub fn interleave(&mut self, kernels: Kernels, tensors: &[usize], threads: usize) {
        if !self.is_copied() || self.has_overlaps() {
            return;
        }
        let mut by_part: Vec<Vec<Matrix>> = self.parts.iter().map(|_| Vec::new()).collect();
        for id in tensors {
            if self.row_orders[*id] == RowOrder::Interleaved {
                continue;
            }
            self.row_orders[*id] = RowOrder::Interleaved;
            let tensor = &self.tensors[*id];
            for place in places(tensor) {
                let start = place.offset as usize;
                by_part[place.part].push(Matrix {
                    bytes: start..start + place.n_bytes as usize,
                    ty: tensor.ty,
                    row_bytes: place.n_bytes as usize / rows_per_matrix(tensor),
                });
            }
        }
        for (part, mut matrices) in self.parts.iter_mut().zip(by_part) {
            let Some(copied) = &mut part.copied else {
                continue;
            };
            matrices.sort_unstable_by_key(|m| m.bytes.start);
            interleave(kernels, copied.bytes_mut(), &matrices, threads);
        }
    }

    /// Whether two tensors share bytes of a file.
    fn has_overlaps(&self) -> bool {
        let mut all: Vec<SlicePlace> = self.tensors.iter().flat_map(places).collect();
        all.sort_unstable_by_key(|place| (place.part, place.offset));
        all.windows(2).any(|pair| {
            pair[0].part == pair[1].part && pair[0].offset + pair[0].n_bytes > pair[1].offset
        })
    }
}

/// Returns the rows of each matrix of a stack, at least 1.
fn rows_per_matrix(tensor: &TensorInfo) -> usize {
    tensor.dims.get(1).map_or(1, |rows| (*rows as usize).max(1))
}

/// Returns where the matrices of a tensor lie.
fn places(tensor: &TensorInfo) -> impl Iterator<Item = SlicePlace> {
    let n = (tensor.rows() as usize / rows_per_matrix(tensor)).max(1);
    (0..n).map(move |i| tensor.slice(i, n))
}

/// Interleaves matrices that lie one after another in `memory`.
fn interleave(kernels: Kernels, memory: &mut [u8], matrices: &[Matrix], threads: usize) {
    let (mut pieces, mut rest, mut at) = (Vec::new(), memory, 0);
    for matrix in matrices {
        let (_, from) = rest.split_at_mut(matrix.bytes.start - at);
        let (bytes, after) = from.split_at_mut(matrix.bytes.len());
        (rest, at) = (after, matrix.bytes.end);
        let band_bytes = (matrix.row_bytes * BAND_ROWS).max(1);
        let piece_bytes = PIECE_BYTES.next_multiple_of(band_bytes);
        pieces.extend(bytes.chunks_mut(piece_bytes).map(|piece| (matrix, piece)));
    }
    let pieces = Mutex::new(pieces.into_iter());
    let next = || pieces.lock().unwrap_or_else(|e| e.into_inner()).next();
    let work = || {
        while let Some((matrix, piece)) = next() {
            kernels.interleave(matrix.ty, matrix.row_bytes, piece);
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.max(1) {
            // Fewer threads are slower; this one does what is left.
            let _ = std::thread::Builder::new().spawn_scoped(scope, work);
        }
        work();
    });
}
