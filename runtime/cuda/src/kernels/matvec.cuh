// Products of quantized matrices with 8-bit activations, and dequantization, for any block format.
#pragma once
#include "matmul.cuh"
#include "products.cuh"

/// A block format as a matrix type: a piece is a run.
template <class F>
struct Blocks {
    typedef Codes Acts;
    static DEVICE i64 row_bytes(int n_cols) { return (i64)(n_cols / F::LEN) * F::BYTES; }
    static DEVICE int pieces(int n_cols) { return n_cols / 32; }
    static DEVICE void add(const u8* row, int i, int, Codes x, float& sum) {
        Run r;
        F::unpack(row + (i64)(i / F::RUNS) * F::BYTES, i % F::RUNS, r);
        sum += run_product(r, (const i8*)x.q + 32 * i, x.scale[i], x.sums + 2 * i, F::HAS_MIN);
    }
};

/// Dequantizes rows of `n_cols` values: those whose indices are in `which`, or the first ones if it
/// is null. A thread takes 32 values.
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
        // Not fused, as on the CPU.
        to[k] = __fadd_rn(__fmul_rn(r.scale[k / 16], code), -r.min[k / 16]);
    }
}

/// Defines the kernels of a format.
#define FORMAT_KERNELS(F)                                                                                              \
    PRODUCT_KERNELS(F, Blocks<F>)                                                                                      \
    KERNEL matmul_##F(const u8* base, const u8* const* table, int n_table, const int* groups, int n_tokens, int n_rows,\
                      int n_cols, const i8* q, const float* scale, const float* sums, float* out) {                    \
        matmul<F>(base, table, n_table, groups, n_tokens, n_rows, n_cols, q, scale, sums, out);                        \
    }                                                                                                                  \
    KERNEL dequantize_##F(const u8* base, const int* which, int n_rows, int n_cols, float* out) {                      \
        dequantize<F>(base, which, n_rows, n_cols, out);                                                               \
    }
