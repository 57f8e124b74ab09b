// Products of float matrices with float activations, and conversion to 32 bits.
#include "products.cuh"

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

/// A float format as a matrix type: a piece is four values if rows are multiples of four, otherwise
/// one.
template <class F>
struct Values {
    typedef Floats Acts;
    typedef typename F::Bits Bits;
    struct alignas(4 * sizeof(Bits)) Four {
        Bits v[4];
    };
    static DEVICE i64 row_bytes(int n_cols) { return (i64)n_cols * (i64)sizeof(Bits); }
    static DEVICE int pieces(int n_cols) { return n_cols % 4 == 0 ? n_cols / 4 : n_cols; }
    static DEVICE void add(const u8* row, int i, int n_cols, Floats x, float& sum) {
        if (n_cols % 4 == 0) {
            const Four four = ((const Four*)row)[i];
            const float4 with = ((const float4*)x.x)[i];
            sum += F::value(four.v[0]) * with.x + F::value(four.v[1]) * with.y;
            sum += F::value(four.v[2]) * with.z + F::value(four.v[3]) * with.w;
        } else {
            sum += F::value(((const Bits*)row)[i]) * ((const float*)x.x)[i];
        }
    }
};

/// Returns `N` values of a row from `column` on, zeros after its end. `quads` says whether rows are
/// aligned to four values.
template <class F, int N>
DEVICE void take(const typename F::Bits* row, int column, int n_cols, bool quads, float* out) {
    typedef typename F::Bits Bits;
    struct alignas(4 * sizeof(Bits)) Four {
        Bits v[4];
    };
    for (int i = 0; i < N; i += 4) {
        if (quads && column + i < n_cols) {
            const Four four = *(const Four*)(row + column + i);
            for (int k = 0; k < 4; k++) out[i + k] = F::value(four.v[k]);
        } else {
            for (int k = 0; k < 4; k++) {
                out[i + k] = column + i + k < n_cols ? F::value(row[column + i + k]) : 0.0f;
            }
        }
    }
}

/// Multiplies with many tokens; `groups` and the grid are those of the quantized formats.
/// Activations and arithmetic are 32-bit floats, so that a router's choices are those of a single
/// token's product. A block of 128 threads has a tile of 64 rows and 32 tokens, a thread four by
/// four of it.
template <class F>
DEVICE void product_of_many(const u8* base, const u8* const* table, int n_table, const int* groups, int n_tokens,
                            int n_rows, int n_cols, const float* x, float* out) {
    constexpr int ROWS = 64, TOKENS = 32, COLS = 32;
    // Columns first. A row has one word more, so that four words are aligned to 16 bytes.
    __shared__ float4 weight_room[COLS * (ROWS + 4) / 4];
    __shared__ float4 act_room[COLS * (TOKENS + 4) / 4];
    float* const weights = (float*)weight_room;
    float* const acts = (float*)act_room;
    const u8* start = base;
    int first_token = 0;
    if (groups) {
        const int at = groups[3 * blockIdx.z];
        start = at < 0 || at >= n_table ? nullptr : table[at];
        first_token = groups[3 * blockIdx.z + 1];
        n_tokens = groups[3 * blockIdx.z + 2];
    }
    const int token0 = (int)blockIdx.y * TOKENS, row0 = (int)blockIdx.x * ROWS;
    if (!start || token0 >= n_tokens) return;
    typedef typename F::Bits Bits;
    const bool quads = n_cols % 4 == 0;
    const int thread = (int)threadIdx.x;
    // What a thread loads: half of a row's columns, a quarter of a token's.
    const int row = row0 + thread % ROWS, row_column = thread / ROWS * (COLS / 2);
    const int token = token0 + thread % TOKENS, token_column = thread / TOKENS * (COLS / 4);
    const Bits* w = (const Bits*)start + (i64)(row < n_rows ? row : 0) * n_cols;
    const float* with = x + (i64)(first_token + (token < n_tokens ? token : 0)) * n_cols;
    // What a thread multiplies.
    const int four_rows = thread % (ROWS / 4) * 4, four_tokens = thread / (ROWS / 4) * 4;
    float acc[4][4];
    for (int t = 0; t < 4; t++) {
        for (int r = 0; r < 4; r++) acc[t][r] = 0.0f;
    }
    for (int column0 = 0; column0 < n_cols; column0 += COLS) {
        float own_weights[COLS / 2], own_acts[COLS / 4];
        take<F, COLS / 2>(w, column0 + row_column, n_cols, quads, own_weights);
        take<F32, COLS / 4>(with, column0 + token_column, n_cols, quads, own_acts);
        __syncthreads();
        for (int i = 0; i < COLS / 2; i++) weights[(row_column + i) * (ROWS + 4) + thread % ROWS] = own_weights[i];
        for (int i = 0; i < COLS / 4; i++) acts[(token_column + i) * (TOKENS + 4) + thread % TOKENS] = own_acts[i];
        __syncthreads();
#pragma unroll 8
        for (int c = 0; c < COLS; c++) {
            const float4 a = *(const float4*)(weights + c * (ROWS + 4) + four_rows);
            const float4 b = *(const float4*)(acts + c * (TOKENS + 4) + four_tokens);
            const float tokens[4] = {b.x, b.y, b.z, b.w};
            for (int t = 0; t < 4; t++) {
                acc[t][0] += a.x * tokens[t];
                acc[t][1] += a.y * tokens[t];
                acc[t][2] += a.z * tokens[t];
                acc[t][3] += a.w * tokens[t];
            }
        }
    }
    for (int t = 0; t < 4; t++) {
        for (int r = 0; r < 4; r++) {
            const int to_row = row0 + four_rows + r, to_token = token0 + four_tokens + t;
            if (to_row < n_rows && to_token < n_tokens) out[(i64)(first_token + to_token) * n_rows + to_row] = acc[t][r];
        }
    }
}

/// Converts rows like the dequantization of the quantized formats; a thread per value.
template <class F>
DEVICE void widen_rows(const u8* base, const int* which, int n_rows, int n_cols, float* out) {
    const i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= (i64)n_rows * n_cols) return;
    const i64 index = at / n_cols;
    const i64 row = which ? which[index] : index;
    out[at] = F::value(((const typename F::Bits*)base)[row * n_cols + at % n_cols]);
}

#define FLOAT_KERNELS(F)                                                                                               \
    PRODUCT_KERNELS(F, Values<F>)                                                                                      \
    KERNEL matmul_##F(const u8* base, const u8* const* table, int n_table, const int* groups, int n_tokens, int n_rows,\
                      int n_cols, const float* x, float* out) {                                                        \
        product_of_many<F>(base, table, n_table, groups, n_tokens, n_rows, n_cols, x, out);                            \
    }                                                                                                                  \
    KERNEL dequantize_##F(const u8* base, const int* which, int n_rows, int n_cols, float* out) {                      \
        widen_rows<F>(base, which, n_rows, n_cols, out);                                                               \
    }

FLOAT_KERNELS(F32)
FLOAT_KERNELS(F16)
FLOAT_KERNELS(BF16)

MATVECS_KERNEL(float, Values<F32>, Values<F16>, Values<BF16>)
