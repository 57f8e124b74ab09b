//! Matmuls spread over the thread pool.

use super::{ActView, Kernels, OutMatrix, Weights};
use crate::bands::BAND_ROWS;
use crate::threads::ThreadPool;

/// Chunks of rows per thread, so that a thread that is held up does not hold up the others.
const CHUNKS_PER_THREAD: usize = 8;

/// Chunks per thread for batches: fewer, since each prepares the activations anew.
const BATCH_CHUNKS_PER_THREAD: usize = 3;

/// Fewest tokens of a batch.
const MIN_BATCH_TOKENS: usize = 16;

/// Fewest rows per chunk; chunks are multiples of it, and so whole bands.
const MIN_CHUNK_ROWS: usize = BAND_ROWS;

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

/// Runs all matmuls as one loop over the pool, so that threads wait for each other once.
pub fn matmul_all(pool: &ThreadPool, kernels: Kernels, jobs: &[MatJob<'_>]) {
    let bytes: usize = jobs
        .iter()
        .map(|job| job.w.n_rows() * job.w.row_bytes())
        .sum();
    let is_batch = jobs.iter().all(|job| job.x.rows() >= MIN_BATCH_TOKENS);
    let chunks = if is_batch {
        BATCH_CHUNKS_PER_THREAD
    } else {
        CHUNKS_PER_THREAD
    };
    let chunk_bytes = bytes / (pool.n_threads() * chunks) + 1;
    let chunk_rows = |job: &MatJob<'_>| {
        (chunk_bytes / job.w.row_bytes().max(1))
            .next_multiple_of(MIN_CHUNK_ROWS)
            .max(MIN_CHUNK_ROWS)
    };
    // By job: the chunks up to its last, and its rows per chunk.
    let mut total = 0;
    let ends = jobs.iter().map(|job| {
        let rows = chunk_rows(job);
        total += job.w.n_rows().div_ceil(rows);
        (total, rows)
    });
    let ends: Vec<(usize, usize)> = ends.collect();
    pool.for_each_chunk(total, 1, |range| {
        for chunk in range {
            let at = ends.partition_point(|(end, _)| *end <= chunk);
            let (job, before) = (&jobs[at], at.checked_sub(1).map_or(0, |at| ends[at].0));
            let first = (chunk - before) * ends[at].1;
            let last = (first + ends[at].1).min(job.w.n_rows());
            // SAFETY: every chunk index is handed out once, chunks of a job are disjoint rows,
            // and each job borrows its own result exclusively.
            unsafe { kernels.matmul(job.w, first..last, job.x, job.out) };
        }
    });
}
