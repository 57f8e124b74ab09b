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
    /// order of the file then: see [`row_order`](Self::row_order).
    ///
    /// # Panics
    /// If a tensor has no bands: a type without, or a number of rows per matrix that is no multiple
    /// of [`BAND_ROWS`].
    pub fn interleave(&mut self, kernels: Kernels, tensors: &[usize], threads: usize) {
        if !self.is_copied() {
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::{Path, PathBuf};
    use tier_plan_kernels::Weights;

    fn data() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/quant/Q8_0.gguf")
    }

    /// Returns the ids of a model's matrices that can be interleaved.
    fn matrices(gguf: &Gguf) -> Vec<usize> {
        let fits = |t: &TensorInfo| Weights::has_bands(t.ty, rows_per_matrix(t));
        let all = gguf.tensors().iter().enumerate();
        all.filter(|(_, t)| fits(t)).map(|(id, _)| id).collect()
    }

    fn copied(path: &Path) -> Gguf {
        let mut gguf = Gguf::open(path).unwrap();
        gguf.copy_to_memory(2, &mut |_, _| {}).unwrap();
        gguf
    }

    #[test]
    fn every_matrix_of_a_stack_is_interleaved_by_itself() {
        let path = data();
        let mapped = Gguf::open(&path).unwrap();
        let mut gguf = copied(&path);
        let ids = matrices(&gguf);
        assert!(ids.iter().any(|id| gguf.tensors()[*id].dims.len() == 3));
        gguf.interleave(Kernels::SCALAR, &ids, 3);
        for (id, tensor) in mapped.tensors().iter().enumerate() {
            let interleaved = gguf.row_order(id) == RowOrder::Interleaved;
            assert_eq!(interleaved, ids.contains(&id), "{}", tensor.name);
            let mut expected = mapped.bytes(tensor).to_vec();
            if interleaved {
                let matrix_bytes = expected.len() / places(tensor).count();
                let row_bytes = matrix_bytes / rows_per_matrix(tensor);
                for matrix in expected.chunks_exact_mut(matrix_bytes) {
                    Kernels::SCALAR.interleave(tensor.ty, row_bytes, matrix);
                }
            }
            assert!(
                gguf.bytes(&gguf.tensors()[id]) == expected,
                "{}",
                tensor.name
            );
        }
        // Done once, and only in memory.
        let before = gguf.bytes(&gguf.tensors()[ids[0]]).to_vec();
        gguf.interleave(Kernels::SCALAR, &ids, 1);
        assert!(gguf.bytes(&gguf.tensors()[ids[0]]) == before);
        let mut mapped = mapped;
        mapped.interleave(Kernels::SCALAR, &ids, 1);
        assert_eq!(mapped.row_order(ids[0]), RowOrder::Sequential);
    }
}
