// Products of float matrices with activations as they are, and widening.
#include "base.cuh"

struct F32 {
    typedef float Bits;
    static DEVICE float value(float v) { return v; }
};

struct F16 {
    typedef u16 Bits;
    static DEVICE float value(u16 v) { return widen(v); }
};

struct BF16 {
    typedef u16 Bits;
    static DEVICE float value(u16 v) { return __int_as_float((int)((u32)v << 16)); }
};

/// As the product of the quantised formats, with 32-bit activations `[_, n_cols]`.
template <class F>
DEVICE void product(const u8* base, const u8* const* table, int n_table, const int* which, int n_rows, int n_cols,
                    const float* x, int jobs_per_x, float* out) {
    typedef typename F::Bits Bits;
    const int lane = threadIdx.x % WARP;
    const int row = (int)(blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP);
    const int job = (int)blockIdx.y;
    if (row >= n_rows) return;
    const u8* start = base;
    if (table) {
        const int at = which ? which[job] : job;
        start = at < 0 || at >= n_table ? nullptr : table[at];
    }
    if (!start) return;
    const Bits* w = (const Bits*)start + (i64)row * n_cols;
    x += (i64)(job / jobs_per_x) * n_cols;
    float sum = 0.0f;
    if (n_cols % 4 == 0) {
        struct alignas(4 * sizeof(Bits)) Four {
            Bits v[4];
        };
        for (int i = 4 * lane; i < n_cols; i += 4 * WARP) {
            const Four four = *(const Four*)(w + i);
            const float4 with = *(const float4*)(x + i);
            sum += F::value(four.v[0]) * with.x + F::value(four.v[1]) * with.y;
            sum += F::value(four.v[2]) * with.z + F::value(four.v[3]) * with.w;
        }
    } else {
        for (int i = lane; i < n_cols; i += WARP) sum += F::value(w[i]) * x[i];
    }
    sum = warp_sum(sum);
    if (lane == 0) out[(i64)job * n_rows + row] = sum;
}

/// As the decoding of the quantised formats; a thread takes a value.
template <class F>
DEVICE void widen_rows(const u8* base, const int* which, int n_rows, int n_cols, float* out) {
    const i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (i64)n_rows * n_cols) return;
    const i64 index = at / n_cols;
    const i64 row = which ? which[index] : index;
    out[at] = F::value(((const typename F::Bits*)base)[row * n_cols + at % n_cols]);
}

#define FLOAT_KERNELS(F)                                                                                               \
    KERNEL matvec_##F(const u8* base, const u8* const* table, int n_table, const int* which, int n_rows, int n_cols,   \
                      const float* x, int jobs_per_x, float* out) {                                                    \
        product<F>(base, table, n_table, which, n_rows, n_cols, x, jobs_per_x, out);                                   \
    }                                                                                                                  \
    KERNEL dequantize_##F(const u8* base, const int* which, int n_rows, int n_cols, float* out) {                      \
        widen_rows<F>(base, which, n_rows, n_cols, out);                                                               \
    }

FLOAT_KERNELS(F32)
FLOAT_KERNELS(F16)
FLOAT_KERNELS(BF16)
