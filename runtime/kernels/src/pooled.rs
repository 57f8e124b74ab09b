//! Matmuls spread over the thread pool.

use super::{ActView, Kernels, OutMatrix, Weights};
use crate::bands::BAND_ROWS;
use crate::shards::{STRIPE_BYTES, node_of_address};
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

impl Chunk {
    /// Returns the bytes of the rows.
    fn bytes(&self, jobs: &[MatJob<'_>]) -> usize {
        self.rows.len() * jobs[self.job].row_bytes()
    }
}

impl MatJob<'_> {
    /// Returns the bytes per row, at least 1.
    fn row_bytes(&self) -> usize {
        self.w.row_bytes().max(1)
    }

    /// Returns the bytes of all rows.
    fn bytes(&self) -> usize {
        self.w.n_rows() * self.row_bytes()
    }
}

/// How the bytes of a loop are cut: equal for a batch, else smaller to the end, so that threads end
/// together and yet read long runs of memory.
struct Cut {
    /// Bytes that are left.
    left: usize,
    n_threads: usize,
    /// Bytes per chunk of a batch.
    equal: Option<usize>,
}

impl Cut {
    fn new(jobs: &[MatJob<'_>], bytes: usize, n_threads: usize) -> Self {
        let is_batch = jobs.iter().all(|job| job.x.rows() >= MIN_BATCH_TOKENS);
        Self {
            left: bytes,
            n_threads,
            equal: is_batch.then_some(bytes / (n_threads * BATCH_CHUNKS_PER_THREAD) + 1),
        }
    }

    /// Cuts some rows of a job into chunks.
    fn rows(&mut self, jobs: &[MatJob<'_>], piece: Chunk, chunks: &mut Vec<Chunk>) {
        let row_bytes = jobs[piece.job].row_bytes();
        let mut first = piece.rows.start;
        while first < piece.rows.end {
            let bytes = self.equal.unwrap_or_else(|| {
                let share = self.left as f64 * SHARE_OF_REST / self.n_threads as f64;
                (share as usize).max(MIN_CHUNK_BYTES)
            });
            let n_rows = (bytes / row_bytes)
                .next_multiple_of(MIN_CHUNK_ROWS)
                .max(MIN_CHUNK_ROWS);
            let rows = first..(first + n_rows).min(piece.rows.end);
            first = rows.end;
            self.left -= rows.len() * row_bytes;
            chunks.push(Chunk {
                job: piece.job,
                rows,
            });
        }
    }
}

/// Cuts the jobs into chunks.
fn chunks(jobs: &[MatJob<'_>], n_threads: usize) -> Vec<Chunk> {
    let mut cut = Cut::new(jobs, jobs.iter().map(MatJob::bytes).sum(), n_threads);
    let mut chunks = Vec::with_capacity(jobs.len() + 32);
    for (job, of) in jobs.iter().enumerate() {
        let rows = 0..of.w.n_rows();
        cut.rows(jobs, Chunk { job, rows }, &mut chunks);
    }
    chunks
}

/// Cuts the jobs into chunks by the NUMA node that holds their rows. A band across the end of a
/// stripe goes with the stripe that has most of it.
fn chunks_by_node(jobs: &[MatJob<'_>], threads: &[usize]) -> Vec<Vec<Chunk>> {
    let mut pieces: Vec<Vec<Chunk>> = threads.iter().map(|_| Vec::new()).collect();
    for (job, of) in jobs.iter().enumerate() {
        let (start, row_bytes) = (of.w.bytes().as_ptr().addr(), of.row_bytes());
        let band = MIN_CHUNK_ROWS * row_bytes;
        let mut first = 0;
        while first < of.w.n_rows() {
            let address = start + first * row_bytes;
            let in_stripe = STRIPE_BYTES - address % STRIPE_BYTES;
            let bands = ((in_stripe + band / 2) / band).max(1);
            let rows = first..(first + bands * MIN_CHUNK_ROWS).min(of.w.n_rows());
            let middle = address + rows.len() * row_bytes / 2;
            first = rows.end;
            pieces[node_of_address(middle, threads.len())].push(Chunk { job, rows });
        }
    }
    let cut = |(pieces, n_threads): (Vec<Chunk>, &usize)| {
        let bytes = pieces.iter().map(|piece| piece.bytes(jobs)).sum();
        let mut cut = Cut::new(jobs, bytes, (*n_threads).max(1));
        let mut chunks = Vec::with_capacity(pieces.len() + 16);
        for piece in pieces {
            cut.rows(jobs, piece, &mut chunks);
        }
        chunks
    };
    pieces.into_iter().zip(threads).map(cut).collect()
}

/// Runs all matmuls as one loop over the pool, so that threads wait for each other once.
pub fn matmul_all(pool: &ThreadPool, kernels: Kernels, jobs: &[MatJob<'_>]) {
    let run = |Chunk { job, rows }: &Chunk| {
        let job = &jobs[*job];
        // SAFETY: every chunk is handed out once, chunks of a job are disjoint rows, and each job
        // borrows its own result exclusively.
        unsafe { kernels.matmul(job.w, rows.clone(), job.x, job.out) };
    };
    if pool.n_nodes() > 1 {
        let chunks = chunks_by_node(jobs, &pool.nodes);
        return pool.for_each_by_node(&chunks, |chunk| chunk.bytes(jobs), run);
    }
    let chunks = chunks(jobs, pool.n_threads());
    pool.for_each_chunk(chunks.len(), 1, |range| chunks[range].iter().for_each(run));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Activations;
    use crate::quant::TensorType;
    use crate::shards::NodeThreads;

    /// Calls `check` with matmuls of Q8_0 matrices of so many rows, 1024 columns, and `batch` tokens.
    fn with_jobs(rows: &[usize], batch: usize, check: impl FnOnce(&[MatJob<'_>])) {
        let bytes: Vec<_> = rows
            .iter()
            .map(|n| vec![0; n * TensorType::Q8_0.block_bytes() * 32])
            .collect();
        let mut acts = Activations::new(batch, 1024);
        acts.fill(Kernels::SCALAR, batch, 1024, &vec![0.0; batch * 1024], true);
        let mut outs: Vec<_> = rows.iter().map(|n| vec![0.0; batch * n]).collect();
        let jobs: Vec<_> = bytes
            .iter()
            .zip(rows)
            .zip(&mut outs)
            .map(|((bytes, n), out)| {
                let w = Weights::new(TensorType::Q8_0, bytes, *n, 1024).unwrap();
                MatJob::new(w, acts.view(), out)
            })
            .collect();
        check(&jobs);
    }

    /// Checks that chunks in the order of their rows cover every row of every job once, in bands.
    fn assert_covered(chunks: &[&Chunk], rows: &[usize]) {
        for (job, n) in rows.iter().enumerate() {
            let mut next = 0;
            for chunk in chunks.iter().filter(|chunk| chunk.job == job) {
                assert!(chunk.rows.start == next && chunk.rows.start % BAND_ROWS == 0);
                next = chunk.rows.end;
            }
            assert_eq!(next, *n, "job {job}");
        }
    }

    #[test]
    fn chunks_by_node_cover_every_row_once_and_lie_where_they_are_read() {
        let rows = [5000, 40, 0, 2048];
        for (batch, threads) in [(1, &[1, 1][..]), (16, &[2, 1, 3])] {
            with_jobs(&rows, batch, |jobs| {
                let by_node = chunks_by_node(jobs, threads);
                let mut all: Vec<&Chunk> = by_node.iter().flatten().collect();
                all.sort_by_key(|chunk| (chunk.job, chunk.rows.start));
                assert_covered(&all, &rows);
                // Of every byte, whether it lies on the node whose threads read it.
                let (mut own, mut bytes) = (0, 0);
                for (node, chunks) in by_node.iter().enumerate() {
                    for chunk in chunks {
                        let job = &jobs[chunk.job];
                        let start = job.w.bytes().as_ptr().addr();
                        let rows = chunk.rows.clone();
                        for row in rows {
                            let address = start + row * job.row_bytes();
                            own += usize::from(node_of_address(address, threads.len()) == node);
                            bytes += 1;
                        }
                    }
                }
                assert!(own * 100 >= bytes * 98, "{own} of {bytes} rows");
            });
        }
    }

    #[test]
    fn nodes_do_not_change_a_bit() {
        let mut random = crate::random::Random::new("nodes");
        let (rows, cols) = (700, 256);
        let weights = random.floats(rows * cols);
        let bytes: Vec<u8> = weights.iter().flat_map(|w| w.to_le_bytes()).collect();
        for batch in [1, 17] {
            let x = random.activations(batch * cols);
            let kernels = Kernels::best();
            let mut acts = Activations::new(batch, cols);
            acts.fill(kernels, batch, cols, &x, false);
            let product = |pool: &ThreadPool| {
                let mut out = vec![0.0; batch * rows];
                let w = Weights::new(TensorType::F32, &bytes, rows, cols).unwrap();
                matmul_all(pool, kernels, &[MatJob::new(w, acts.view(), &mut out)]);
                out.into_iter().map(f32::to_bits).collect::<Vec<_>>()
            };
            let node = |threads| NodeThreads {
                threads,
                processors: Vec::new(),
            };
            let nodes = ThreadPool::on_nodes(&[node(1), node(2)]);
            assert!(product(&ThreadPool::new(1)) == product(&nodes));
            assert_eq!(nodes.node_reads().bytes, bytes.len() as u64);
        }
    }

    #[test]
    fn chunks_cover_every_row_once_and_shrink_to_the_end() {
        let rows = [1024, 40, 0, 2048];
        for batch in [1, 16] {
            with_jobs(&rows, batch, |jobs| {
                let chunks = chunks(jobs, 2);
                assert_covered(&chunks.iter().collect::<Vec<_>>(), &rows);
                let of_last: Vec<usize> = chunks
                    .iter()
                    .filter(|chunk| chunk.job == 3)
                    .map(|chunk| chunk.rows.len())
                    .collect();
                assert_eq!(of_last[0] > 2 * of_last[of_last.len() - 1], batch == 1);
            });
        }
    }
}
