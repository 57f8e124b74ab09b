// Products of quantised matrices with 8-bit activations, and plain decoding, for any format.
#pragma once
#include "matmul.cuh"

/// `out[job, row] = sum over c of w[row, c] * x[job / jobs_per_x, c]`, a warp a row.
///
/// The matrix of a job is `base`, or, where there is a table, `table[which[job]]`, and `table[job]` without `which`: a
/// layer's chosen experts are one launch. Where there is no matrix (a number outside the table, or a null in it) the
/// result is left as it is.
template <class F>
DEVICE void matvec(const u8* base, const u8* const* table, int n_table, const int* which, int n_rows, int n_cols,
                   const i8* q, const float* scale, const float* sums, int jobs_per_x, float* out) {
    const int lane = threadIdx.x % WARP;
    const int row = (int)(blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP);
    const int job = (int)blockIdx.y;
    if (row >= n_rows) return;
    const u8* w = base;
    if (table) {
        const int at = which ? which[job] : job;
        w = at < 0 || at >= n_table ? nullptr : table[at];
    }
    if (!w) return;
    const int n_runs = n_cols / 32;
    const i64 x = (i64)(job / jobs_per_x) * n_runs;
    w += (i64)row * (n_cols / F::LEN) * F::BYTES;
    float sum = 0.0f;
    for (int i = lane; i < n_runs; i += WARP) {
        Run r;
        F::unpack(w + (i64)(i / F::RUNS) * F::BYTES, i % F::RUNS, r);
        sum += run_product(r, q + 32 * (x + i), scale[x + i], sums + 2 * (x + i), F::HAS_MIN);
    }
    sum = warp_sum(sum);
    if (lane == 0) out[(i64)job * n_rows + row] = sum;
}

/// Decodes rows of `n_cols` values: those with numbers in `which`, or the first ones without. A thread takes 32 values.
template <class F>
DEVICE void dequantize(const u8* base, const int* which, int n_rows, int n_cols, float* out) {
    const int n_runs = n_cols / 32;
    const i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (i64)n_rows * n_runs) return;
    const i64 index = at / n_runs;
    const int i = (int)(at % n_runs);
    const i64 row = which ? which[index] : index;
    Run r;
    F::unpack(base + (row * (n_cols / F::LEN) + i / F::RUNS) * F::BYTES, i % F::RUNS, r);
    float* to = out + index * n_cols + 32 * i;
    for (int k = 0; k < 32; k++) {
        const float code = (float)(i8)(r.q[k / 4] >> (8 * (k % 4)));
        // Not fused, as the processor's decoding is not.
        to[k] = __fadd_rn(__fmul_rn(r.scale[k / 16], code), -r.min[k / 16]);
    }
}

/// The kernels of a format.
#define FORMAT_KERNELS(F)                                                                                              \
    KERNEL matvec_##F(const u8* base, const u8* const* table, int n_table, const int* which, int n_rows, int n_cols,   \
                      const i8* q, const float* scale, const float* sums, int jobs_per_x, float* out) {                \
        matvec<F>(base, table, n_table, which, n_rows, n_cols, q, scale, sums, jobs_per_x, out);                       \
    }                                                                                                                  \
    KERNEL matmul_##F(const u8* base, const u8* const* table, int n_table, const int* groups, int n_tokens, int n_rows,\
                      int n_cols, const i8* q, const float* scale, const float* sums, float* out) {                    \
        matmul<F>(base, table, n_table, groups, n_tokens, n_rows, n_cols, q, scale, sums, out);                        \
    }                                                                                                                  \
    KERNEL dequantize_##F(const u8* base, const int* which, int n_rows, int n_cols, float* out) {                      \
        dequantize<F>(base, which, n_rows, n_cols, out);                                                               \
    }
