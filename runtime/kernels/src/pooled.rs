//! Matmuls spread over the thread pool.

use super::{ActView, Kernels, OutMatrix, Weights};
use crate::bands::BAND_ROWS;
use crate::threads::ThreadPool;
use std::ops::Range;

/// Chunks per thread for batches: few, since each prepares the activations anew.
const BATCH_CHUNKS_PER_THREAD: usize = 3;

/// Fewest tokens of a batch.
const MIN_BATCH_TOKENS: usize = 16;

/// Fewest rows per chunk; chunks are multiples of it, and so whole bands.
const MIN_CHUNK_ROWS: usize = BAND_ROWS;

/// Part of the bytes that are left, per thread, that the next chunk takes.
const SHARE_OF_REST: f64 = 1.0 / 3.0;

/// Fewest bytes per chunk, about: each begins without anything prefetched.
const MIN_CHUNK_BYTES: usize = 64 << 10;

/// One matmul: `out[t, r] = sum over c of w[r, c] * x[t, c]`.
pub struct MatJob<'a> {
    w: Weights<'a>,
    x: ActView<'a>,
    out: OutMatrix<'a>,
}

impl<'a> MatJob<'a> {
    /// Returns the matmul of `w` with the tokens of `x`, into `out` of shape `[x.rows, w.n_rows]`.
    ///
    /// # Panics
    /// When the sizes don't fit.
    pub fn new(w: Weights<'a>, x: ActView<'a>, out: &'a mut [f32]) -> Self {
        assert_eq!(
            w.n_cols(),
            x.cols(),
            "columns of the matrix and of the activations"
        );
        assert_eq!(out.len(), x.rows() * w.n_rows(), "size of the result");
        let stride = w.n_rows();
        Self {
            w,
            x,
            out: OutMatrix::new(out, stride),
        }
    }
}

/// Some rows of a job.
struct Chunk {
    job: usize,
    rows: Range<usize>,
}

/// Cuts the jobs into chunks. Those of a batch are equal; else they become smaller to the end, so
/// that threads end together and yet read long runs of memory.
fn chunks(jobs: &[MatJob<'_>], n_threads: usize) -> Vec<Chunk> {
    let row_bytes = |job: &MatJob<'_>| job.w.row_bytes().max(1);
    let mut left: usize = jobs.iter().map(|job| job.w.n_rows() * row_bytes(job)).sum();
    let is_batch = jobs.iter().all(|job| job.x.rows() >= MIN_BATCH_TOKENS);
    let equal = left / (n_threads * BATCH_CHUNKS_PER_THREAD) + 1;
    let mut chunks = Vec::with_capacity(jobs.len() + 32);
    for (index, job) in jobs.iter().enumerate() {
        let mut first = 0;
        while first < job.w.n_rows() {
            let bytes = if is_batch {
                equal
            } else {
                let share = left as f64 * SHARE_OF_REST / n_threads as f64;
                (share as usize).max(MIN_CHUNK_BYTES)
            };
            let rows = (bytes / row_bytes(job)).next_multiple_of(MIN_CHUNK_ROWS);
            let rows = first..(first + rows.max(MIN_CHUNK_ROWS)).min(job.w.n_rows());
            first = rows.end;
            left -= rows.len() * row_bytes(job);
            chunks.push(Chunk { job: index, rows });
        }
    }
    chunks
}

/// Runs all matmuls as one loop over the pool, so that threads wait for each other once.
pub fn matmul_all(pool: &ThreadPool, kernels: Kernels, jobs: &[MatJob<'_>]) {
    let chunks = chunks(jobs, pool.n_threads());
    pool.for_each_chunk(chunks.len(), 1, |range| {
        for Chunk { job, rows } in &chunks[range] {
            let job = &jobs[*job];
            // SAFETY: every chunk is handed out once, chunks of a job are disjoint rows, and each
            // job borrows its own result exclusively.
            unsafe { kernels.matmul(job.w, rows.clone(), job.x, job.out) };
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Activations;
    use crate::quant::TensorType;

    #[test]
    fn chunks_cover_every_row_once_and_shrink_to_the_end() {
        let rows = [1024, 40, 0, 2048];
        for batch in [1, 16] {
            let bytes = rows.map(|n| vec![0; n * TensorType::Q8_0.block_bytes() * 32]);
            let mut acts = Activations::new(batch, 1024);
            acts.fill(Kernels::SCALAR, batch, 1024, &vec![0.0; batch * 1024], true);
            let mut outs = rows.map(|n| vec![0.0; batch * n]);
            let jobs: Vec<_> = bytes
                .iter()
                .zip(rows)
                .zip(&mut outs)
                .map(|((bytes, n), out)| {
                    let w = Weights::new(TensorType::Q8_0, bytes, n, 1024).unwrap();
                    MatJob::new(w, acts.view(), out)
                })
                .collect();
            let chunks = chunks(&jobs, 2);
            for (job, n) in rows.into_iter().enumerate() {
                let mut next = 0;
                for chunk in chunks.iter().filter(|chunk| chunk.job == job) {
                    assert!(chunk.rows.start == next && chunk.rows.start % BAND_ROWS == 0);
                    next = chunk.rows.end;
                }
                assert_eq!(next, n, "job {job}");
            }
            let of_last: Vec<usize> = chunks
                .iter()
                .filter(|chunk| chunk.job == 3)
                .map(|chunk| chunk.rows.len())
                .collect();
            assert_eq!(of_last[0] > 2 * of_last[of_last.len() - 1], batch == 1);
        }
    }
}
