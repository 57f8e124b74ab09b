//! Measures main memory with the expert stage of a decoded token, over more bytes than any cache
//! holds.

use super::measured::{Measured, Repeats};
use anyhow::{Context, Result};
use std::time::{Duration, Instant};
use tier_plan_runtime::formats::machine::FEW_ROWS;
use tier_plan_runtime::kernels::pooled::{MatJob, matmul_all};
use tier_plan_runtime::kernels::{Activations, Kernels, Weights, needs_quants};
use tier_plan_runtime::quant::TensorType;
use tier_plan_runtime::threads::ThreadPool;
use tier_plan_runtime::tiers::arena::{Arena, ArenaSlice};
use tier_plan_runtime::tiers::nodes::Pages;

/// Width of the hidden state, in values.
const HIDDEN: usize = 2048;

/// Inner width of an expert: a common one, neither the smallest nor the largest in use.
const WIDTH: usize = 768;

/// Experts per token.
const EXPERTS: usize = 8;

/// Values per expert: gate, up, and down.
const VALUES: usize = 3 * HIDDEN * WIDTH;

/// Fewest timed passes over the memory per figure, after one warm-up pass, and the time after which
/// there are no more.
const PASSES: Repeats = Repeats {
    least: 5,
    time: Duration::from_millis(1500),
};

/// The same for prompt work.
const BATCH_PASSES: Repeats = Repeats {
    least: 3,
    time: Duration::from_millis(800),
};

/// Prompt tokens multiplied together: the micro-batch of a dense stage.
const BATCH_TOKENS: usize = 512;

/// The most experts of one timed pass of prompt work, and about how long it takes.
const BATCH_EXPERTS: usize = 48;
const BATCH_TIME: Duration = Duration::from_millis(150);

/// Rows of [`Memory::few_gflops`].
const FEW: usize = FEW_ROWS as usize;

/// Memory is taken in multiples of this many bytes.
pub const STAGE: u64 = 1 << 20;

/// Memory on huge pages whose bytes are valid weights in every format.
pub struct Memory {
    kernels: Kernels,
    bytes: ArenaSlice,
    x: Activations,
    inner: Activations,
    gate: Vec<f32>,
    up: Vec<f32>,
    out: Vec<f32>,
}

impl Memory {
    /// Takes `bytes` of memory anywhere.
    ///
    /// # Errors
    /// When the system refuses the memory.
    pub fn new(kernels: Kernels, bytes: u64) -> Result<Self> {
        Self::on(kernels, bytes, &Pages::Anywhere)
    }

    /// Takes `bytes` of memory where `pages` says.
    ///
    /// # Errors
    /// When the system refuses the memory or its location.
    pub fn on(kernels: Kernels, bytes: u64, pages: &Pages) -> Result<Self> {
        let len = usize::try_from(bytes).context("more memory than can be addressed")?;
        let mut piece = Arena::on("memory to be measured", bytes, pages)?.take(len)?;
        fill(&mut piece);
        let mut x = Activations::new(FEW, HIDDEN);
        let value = |i: usize| (i % HIDDEN % 17) as f32 * 0.01 - 0.08;
        let values: Vec<f32> = (0..FEW * HIDDEN).map(value).collect();
        x.fill(kernels, FEW, HIDDEN, &values, true);
        Ok(Self {
            kernels,
            bytes: piece,
            x,
            inner: Activations::new(EXPERTS * FEW, WIDTH),
            gate: vec![0.0; EXPERTS * FEW * WIDTH],
            up: vec![0.0; EXPERTS * FEW * WIDTH],
            out: vec![0.0; EXPERTS * FEW * HIDDEN],
        })
    }

    /// Returns the rate of matvecs over all threads, in 10⁹ bytes of weights per second.
    pub fn matvec_gbps(&mut self, pool: &ThreadPool, ty: TensorType) -> Measured {
        self.pass_gbps(pool, ty);
        PASSES.measure(|| self.pass_gbps(pool, ty))
    }

    /// Returns the matvec rate of one pass over the memory, in 10⁹ bytes per second.
    pub fn pass_gbps(&mut self, pool: &ThreadPool, ty: TensorType) -> f64 {
        self.stages_gbps(pool, ty, 1, (usize::MAX, 1))
    }

    /// Returns the rate of matmuls of [`FEW_ROWS`] tokens over all threads with weights from memory,
    /// in 10⁹ floating-point operations per second.
    pub fn few_gflops(&mut self, pool: &ThreadPool, ty: TensorType) -> Measured {
        let operations = (2 * FEW * VALUES) as f64 / expert_bytes(ty).max(1) as f64;
        self.stages_gbps(pool, ty, FEW, (usize::MAX, 1));
        BATCH_PASSES.measure(|| operations * self.stages_gbps(pool, ty, FEW, (usize::MAX, 1)))
    }

    /// Returns the matvec rate from the caches, by repeating the first stages that fit `bytes`, in
    /// 10⁹ bytes per second.
    pub fn cached_gbps(&mut self, pool: &ThreadPool, ty: TensorType, bytes: usize) -> f64 {
        let stages = (bytes / (EXPERTS * expert_bytes(ty)).max(1)).max(1);
        self.stages_gbps(pool, ty, 1, (stages, 1));
        self.stages_gbps(pool, ty, 1, (stages, 200))
    }

    /// Returns the rate of at most `most` expert stages of some tokens, all of them `times` times, in
    /// 10⁹ bytes of weights per second. Every token has the same experts.
    fn stages_gbps(
        &mut self,
        pool: &ThreadPool,
        ty: TensorType,
        tokens: usize,
        (most, times): (usize, usize),
    ) -> f64 {
        let stage_bytes = EXPERTS * expert_bytes(ty);
        let memory: &[u8] = &self.bytes;
        let stages = (memory.len() / stage_bytes.max(1)).min(most);
        let start = Instant::now();
        for stage in memory
            .chunks_exact(stage_bytes.max(1))
            .take(stages)
            .cycle()
            .take(stages * times)
        {
            let experts = stage.chunks_exact(expert_bytes(ty));
            let matrices: Vec<[Weights<'_>; 3]> = experts
                .filter_map(|expert| matrices(self.kernels, ty, expert))
                .collect();
            let x = self.x.view().rows_range(0..tokens);
            let mut jobs = Vec::with_capacity(2 * EXPERTS);
            let rows = self
                .gate
                .chunks_exact_mut(tokens * WIDTH)
                .zip(self.up.chunks_exact_mut(tokens * WIDTH));
            for ([gate, up, _], (gate_out, up_out)) in matrices.iter().zip(rows) {
                jobs.push(MatJob::new(*gate, x, gate_out));
                jobs.push(MatJob::new(*up, x, up_out));
            }
            matmul_all(pool, self.kernels, &jobs);
            drop(jobs);
            let n = EXPERTS * tokens;
            let gate = &mut self.gate[..n * WIDTH];
            self.kernels.silu_mul(gate, &self.up[..n * WIDTH]);
            if tokens == 1 {
                self.inner
                    .fill(self.kernels, n, WIDTH, gate, needs_quants(ty));
            } else {
                self.inner
                    .fill_shared(pool, self.kernels, n, WIDTH, gate, needs_quants(ty));
            }
            let inner = self.inner.view();
            let down = matrices
                .iter()
                .zip(self.out.chunks_exact_mut(tokens * HIDDEN))
                .enumerate();
            let jobs: Vec<MatJob<'_>> = down
                .map(|(i, ([_, _, down], out))| {
                    let rows = tokens * i..tokens * (i + 1);
                    MatJob::new(*down, inner.rows_range(rows), out)
                })
                .collect();
            matmul_all(pool, self.kernels, &jobs);
        }
        let seconds = start.elapsed().as_secs_f64().max(1e-9);
        (stages * times * stage_bytes) as f64 / seconds / 1e9
    }

    /// Returns the rate of prompt matmuls, expert by expert as the engine runs them, in 10⁹
    /// floating-point operations per second.
    pub fn batch_gflops(&mut self, pool: &ThreadPool, ty: TensorType) -> Measured {
        let values: Vec<f32> = (0..BATCH_TOKENS * HIDDEN)
            .map(|i| (i % 23) as f32 * 0.01 - 0.11)
            .collect();
        let mut x = Activations::new(BATCH_TOKENS, HIDDEN);
        x.fill_shared(pool, self.kernels, BATCH_TOKENS, HIDDEN, &values, true);
        let mut inner = Activations::new(BATCH_TOKENS, WIDTH);
        let (mut gate, mut up) = (
            vec![0.0; BATCH_TOKENS * WIDTH],
            vec![0.0; BATCH_TOKENS * WIDTH],
        );
        let mut out = vec![0.0; BATCH_TOKENS * HIDDEN];
        let memory: &[u8] = &self.bytes;
        let mut pass = |most: usize| {
            let start = Instant::now();
            let mut done = 0;
            let experts = memory
                .chunks_exact(expert_bytes(ty).max(1))
                .filter_map(|expert| matrices(self.kernels, ty, expert));
            for [w_gate, w_up, w_down] in experts.take(most) {
                let jobs = [
                    MatJob::new(w_gate, x.view(), &mut gate),
                    MatJob::new(w_up, x.view(), &mut up),
                ];
                matmul_all(pool, self.kernels, &jobs);
                self.kernels.silu_mul(&mut gate, &up);
                inner.fill_shared(
                    pool,
                    self.kernels,
                    BATCH_TOKENS,
                    WIDTH,
                    &gate,
                    needs_quants(ty),
                );
                matmul_all(
                    pool,
                    self.kernels,
                    &[MatJob::new(w_down, inner.view(), &mut out)],
                );
                done += 1;
                if start.elapsed() > BATCH_TIME {
                    break;
                }
            }
            std::hint::black_box(&out);
            let operations = 2.0 * (VALUES * BATCH_TOKENS * done) as f64;
            operations / start.elapsed().as_secs_f64().max(1e-9) / 1e9
        };
        pass(2);
        BATCH_PASSES.measure(|| pass(BATCH_EXPERTS))
    }

    /// Returns the time for all threads to enter an empty parallel loop, in microseconds.
    pub fn entry_us(&self, pool: &ThreadPool) -> f64 {
        const ENTRIES: usize = 20_000;
        let start = Instant::now();
        for _ in 0..ENTRIES {
            pool.for_each_chunk(pool.n_threads(), 1, |range| {
                std::hint::black_box(range);
            });
        }
        start.elapsed().as_secs_f64() * 1e6 / ENTRIES as f64
    }
}

/// Returns the bytes of one expert in a format.
fn expert_bytes(ty: TensorType) -> usize {
    ty.row_bytes(VALUES as u64)
        .map_or(0, |bytes| bytes as usize)
}

/// Splits an expert into gate, up, and down, with their rows in the order that an engine keeps. Any
/// bytes are valid in either order.
fn matrices(kernels: Kernels, ty: TensorType, expert: &[u8]) -> Option<[Weights<'_>; 3]> {
    let (gate, rest) = expert.split_at_checked(expert.len() / 3)?;
    let (up, down) = rest.split_at_checked(rest.len() / 2)?;
    let matrix = |bytes, n_rows, n_cols| {
        let order = kernels.fastest_order(ty, n_rows);
        Weights::new(ty, bytes, n_rows, n_cols)?.in_order(order)
    };
    Some([
        matrix(gate, WIDTH, HIDDEN)?,
        matrix(up, WIDTH, HIDDEN)?,
        matrix(down, HIDDEN, WIDTH)?,
    ])
}

/// Fills memory with pseudorandom bytes, so that formats with tables use all of them. Every second
/// byte is the high byte of a small float: no real weight is infinite or denormal.
fn fill(bytes: &mut [u8]) {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    for eight in bytes.chunks_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        for (i, byte) in eight.iter_mut().enumerate() {
            *byte = if i % 2 == 1 {
                0x3d
            } else {
                (state >> (8 * i)) as u8
            };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_is_multiplied() {
        let pool = ThreadPool::new(2);
        let bytes = TensorType::ALL
            .iter()
            .map(|ty| EXPERTS * expert_bytes(*ty))
            .max()
            .unwrap();
        let mut memory = Memory::new(Kernels::best(), bytes as u64).unwrap();
        for ty in TensorType::ALL {
            for tokens in [1, FEW] {
                memory.out.fill(7.0);
                let gbps = memory.stages_gbps(&pool, ty, tokens, (usize::MAX, 1));
                assert!(gbps.is_finite() && gbps > 0.0, "{ty}: {gbps}");
                let (written, rest) = memory.out.split_at(tokens * EXPERTS * HIDDEN);
                assert!(
                    written.iter().all(|v| *v != 7.0) && rest.iter().all(|v| *v == 7.0),
                    "{ty}: all results are written"
                );
            }
        }
        for ty in [TensorType::Q4_K, TensorType::F32] {
            for rate in [memory.batch_gflops(&pool, ty), memory.few_gflops(&pool, ty)] {
                assert!(rate.value.is_finite() && rate.value > 0.0, "{ty}: {rate:?}");
            }
        }
        assert!(memory.entry_us(&pool) > 0.0);
    }
}
