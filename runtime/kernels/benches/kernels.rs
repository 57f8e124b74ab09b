//! Speed of every matmul kernel: weight bytes per second from memory and from the cache, and
//! multiply-adds per second for batches.
//!
//! `cargo bench -p tier-plan-kernels --bench kernels -- stream/Q4_K`

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use memmap2::MmapMut;
use std::hint::black_box;
use std::time::Duration;
use tier_plan_kernels::quant::TensorType;
use tier_plan_kernels::{
    Activations, BAND_ROWS, Kernels, OutMatrix, RowBlock, RowOrder, StoredRows, Weights,
    needs_quants, q8_row_bytes,
};

const COLS: usize = 2048;

/// Returns weights of at most `bytes` bytes, on huge pages as an engine keeps them, and their
/// number of rows. Scales are ordinary (0x2c2c is 0.07 as a 16-bit float), codes vary.
fn weights(ty: TensorType, bytes: usize) -> (MmapMut, usize) {
    let row = ty
        .row_bytes(COLS as u64)
        .expect("2048 columns are whole blocks") as usize;
    let rows = (bytes / row).next_multiple_of(BAND_ROWS);
    let mut out = MmapMut::map_anon(rows * row).expect("memory");
    #[cfg(target_os = "linux")]
    let _ = out.advise(memmap2::Advice::HugePage);
    let mut state = 1u32;
    out.fill_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    });
    for block in out.chunks_exact_mut(ty.block_bytes()) {
        block[..2].fill(0x2c);
        let end = block.len() - 2;
        block[end..].fill(0x2c);
    }
    (out, rows)
}

/// Every type, the common ones first.
const TYPES: [TensorType; TensorType::ALL.len()] = {
    use TensorType::*;
    [
        Q4_K, Q6_K, Q8_0, Q5_K, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K, Q3_K, IQ4_NL, IQ4_XS, MXFP4, F32,
        F16, BF16, IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S, IQ1_S, IQ1_M, Q1_0, Q2_0, TQ1_0, TQ2_0,
        NVFP4,
    ]
};

/// Times a matmul of every type.
fn matmul(c: &mut Criterion, group: &str, bytes: usize, tokens: usize, isas: &[Kernels]) {
    let mut group = c.benchmark_group(group);
    group
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(400));
    let x: Vec<f32> = (0..tokens * COLS)
        .map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0)
        .collect();
    for ty in TYPES {
        let (bytes, rows) = weights(ty, bytes);
        let w = Weights::new(ty, &bytes, rows, COLS).expect("whole rows");
        let mut out = vec![0.0; tokens * rows];
        // The same bytes serve as bands: what they stand for does not matter here.
        let bands = w.in_order(RowOrder::Interleaved);
        let orders = [
            (ty.name().to_string(), Some(w)),
            (format!("{ty}-bands"), bands),
        ];
        let orders = orders.into_iter().filter_map(|(name, w)| Some((name, w?)));
        for ((name, w), k) in orders.flat_map(|order| isas.iter().map(move |k| (order.clone(), k)))
        {
            if w.order() == RowOrder::Interleaved && k.fastest_order(ty, rows) != w.order() {
                continue;
            }
            let mut acts = Activations::new(tokens, COLS);
            acts.fill(*k, tokens, COLS, &x, needs_quants(ty));
            group.throughput(if tokens == 1 {
                Throughput::Bytes(bytes.len() as u64)
            } else {
                Throughput::Elements((tokens * rows * COLS) as u64)
            });
            group.bench_function(BenchmarkId::new(&name, k.isa()), |b| {
                // SAFETY: one thread.
                b.iter(|| unsafe {
                    k.matmul(
                        black_box(w),
                        0..rows,
                        acts.view(),
                        OutMatrix::new(&mut out, rows),
                    )
                });
            });
        }
    }
}

fn matmuls(c: &mut Criterion) {
    let all = Kernels::available();
    let fast = &all[1.min(all.len() - 1)..];
    // Larger than most last-level caches; where one is larger still, this measures that cache.
    matmul(c, "stream", 768 << 20, 1, &all[all.len() - 1..]);
    matmul(c, "cached", 256 << 10, 1, &all);
    matmul(c, "batch4", 256 << 10, 4, fast);
    matmul(c, "batch8", 256 << 10, 8, fast);
    matmul(c, "batch32", 256 << 10, 32, fast);
    matmul(c, "batch64", 256 << 10, 64, fast);
}

fn operations(c: &mut Criterion) {
    let mut group = c.benchmark_group("operations");
    group
        .sample_size(20)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(300));
    let x: Vec<f32> = (0..COLS)
        .map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0)
        .collect();
    let half: Vec<half::f16> = x.iter().map(|v| half::f16::from_f32(*v)).collect();
    let mut y = x.clone();
    group.throughput(Throughput::Elements(COLS as u64));
    for k in Kernels::available() {
        let mut acts = Activations::new(1, COLS);
        group.bench_function(BenchmarkId::new("quantize", k.isa()), |b| {
            b.iter(|| acts.fill(k, 1, COLS, black_box(&x), true));
        });
        group.bench_function(BenchmarkId::new("rms_norm", k.isa()), |b| {
            b.iter(|| k.rms_norm(black_box(&x), &x, 1e-5, &mut y));
        });
        group.bench_function(BenchmarkId::new("silu_mul", k.isa()), |b| {
            b.iter(|| k.silu_mul(black_box(&mut y), &x))
        });
        let mut narrow = half.clone();
        group.bench_function(BenchmarkId::new("to_f16", k.isa()), |b| {
            b.iter(|| k.to_f16(black_box(&x), &mut narrow))
        });
        group.bench_function(BenchmarkId::new("from_f16", k.isa()), |b| {
            b.iter(|| k.from_f16(black_box(&half), &mut y))
        });
        let mut bytes = vec![0; q8_row_bytes(COLS)];
        group.bench_function(BenchmarkId::new("to_q8", k.isa()), |b| {
            b.iter(|| k.to_q8(black_box(&x), &mut bytes))
        });
        group.bench_function(BenchmarkId::new("from_q8", k.isa()), |b| {
            b.iter(|| k.from_q8(black_box(&bytes), COLS, &mut y));
        });
    }
}

/// Times what attention computes over a chunk of rows of 128 values in the cache.
fn attention(c: &mut Criterion) {
    const WIDTH: usize = 128;
    const ROWS: usize = 64;
    let mut group = c.benchmark_group("attention");
    group
        .sample_size(20)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_millis(300));
    let values: Vec<f32> = (0..ROWS * WIDTH)
        .map(|i| ((i * 37) % 101) as f32 / 50.0 - 1.0)
        .collect();
    let half: Vec<half::f16> = values.iter().map(|v| half::f16::from_f32(*v)).collect();
    let mut bytes = Vec::new();
    for row in values.chunks_exact(WIDTH) {
        let mut q8 = vec![0; q8_row_bytes(WIDTH)];
        Kernels::SCALAR.to_q8(row, &mut q8);
        bytes.extend(q8);
    }
    for k in &Kernels::available()[1..] {
        for queries in [1, 4, 8, 32] {
            let (mut scores, mut out) = (vec![0.0; queries * ROWS], vec![0.0; queries * WIDTH]);
            let x: Vec<f32> = (0..queries)
                .flat_map(|_| &values[..WIDTH])
                .copied()
                .collect();
            group.throughput(Throughput::Elements((queries * ROWS * WIDTH) as u64));
            for (name, rows) in [
                ("f16", StoredRows::F16(&half)),
                ("q8", StoredRows::Q8(&bytes)),
                ("f32", StoredRows::F32(&values)),
            ] {
                let id = |what: &str| BenchmarkId::new(format!("{what}-{name}-{queries}"), k.isa());
                group.bench_function(id("dots"), |b| {
                    b.iter(|| {
                        k.row_dots(black_box(&x), RowBlock::new(rows, WIDTH), &mut scores, ROWS)
                    });
                });
                group.bench_function(id("mix"), |b| {
                    b.iter(|| {
                        k.add_weighted_rows(
                            black_box(&scores),
                            ROWS,
                            RowBlock::new(rows, WIDTH),
                            &mut out,
                            WIDTH,
                        )
                    });
                });
            }
        }
    }
}

criterion_group!(benches, matmuls, operations, attention);
criterion_main!(benches);
