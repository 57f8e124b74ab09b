//! Matrix products spread over the thread pool.

use super::{ActView, Kernels, OutMatrix, Weights};
use crate::threads::ThreadPool;

/// Pieces of work a thread gets per product, so that a thread that is held up does not hold up the others.
const SHARES: usize = 8;

/// The same for batches, whose pieces are larger, and whose activations are prepared anew for each.
const BATCH_SHARES: usize = 3;

/// Tokens that make a batch.
const BATCH_TOKENS: usize = 16;

/// Fewest rows worth handing to a thread on their own; pieces are multiples of it.
const MIN_ROWS: usize = 8;

/// The same for batches: the rows that one pass of the widest kernel takes.
const BATCH_ROWS: usize = 16;

/// One product: `out[t, r] = Σ_c w[r, c] · x[t, c]`.
pub struct MatJob<'a> {
    w: Weights<'a>,
    x: ActView<'a>,
    out: OutMatrix<'a>,
}

impl<'a> MatJob<'a> {
    /// `out` is `[x.rows, w.n_rows]`.
    ///
    /// # Panics
    /// When the sizes don't fit.
    pub fn new(w: Weights<'a>, x: ActView<'a>, out: &'a mut [f32]) -> Self {
        assert_eq!(w.n_cols(), x.cols(), "columns of the matrix and of the activations");
        assert_eq!(out.len(), x.rows() * w.n_rows(), "size of the result");
        let stride = w.n_rows();
        Self { w, x, out: OutMatrix::new(out, stride) }
    }
}

/// Runs all products in one go.
pub fn matmul_all(pool: &ThreadPool, kernels: Kernels, jobs: &[MatJob<'_>]) {
    let bytes: usize = jobs.iter().map(|j| j.w.n_rows() * j.w.row_bytes()).sum();
    let batch = jobs.iter().all(|j| j.x.rows() >= BATCH_TOKENS);
    let (shares, min_rows) = if batch { (BATCH_SHARES, BATCH_ROWS) } else { (SHARES, MIN_ROWS) };
    let share = bytes / (pool.n_threads() * shares) + 1;
    let chunk_rows = |job: &MatJob<'_>| (share / job.w.row_bytes().max(1)).next_multiple_of(min_rows).max(min_rows);
    let n_chunks = |job: &MatJob<'_>| job.w.n_rows().div_ceil(chunk_rows(job));
    let total: usize = jobs.iter().map(n_chunks).sum();
    pool.for_each_chunk(total, 1, |range| {
        for mut chunk in range {
            for job in jobs {
                let n = n_chunks(job);
                if chunk >= n {
                    chunk -= n;
                    continue;
                }
                let rows = chunk_rows(job);
                let first = chunk * rows;
                let last = (first + rows).min(job.w.n_rows());
                // SAFETY: every chunk index is handed out once, chunks of a job are disjoint rows, and each job
                // borrows its own result exclusively.
                unsafe { kernels.matmul(job.w, first..last, job.x, job.out) };
                break;
            }
        }
    });
}
