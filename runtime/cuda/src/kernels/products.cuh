// Products of matrices with a few rows of activations, for any matrix type: single, several at
// once, gate and up with the activation, and down with the weighted sum over a token's experts. A
// warp has a row of a matrix, and its lanes take the row's pieces in turn.
//
// A matrix type is a struct with the activations that it takes (`Acts`), bytes per row, pieces per
// row, and `add`, which adds the products of a piece.
#pragma once
#include "base.cuh"

/// 8-bit activations as `quantize_run` writes them, `[_, n_cols]`.
struct Codes {
    const u8* q;
    const float* scale;
    const float* sums;
    DEVICE Codes row(i64 row, int n_cols) const {
        const i64 run = row * (n_cols / 32);
        return {q + 32 * run, scale + run, sums + 2 * run};
    }
};

/// Float activations, `[_, n_cols]`, and two unused pointers.
struct Floats {
    const u8* x;
    const float* no_scale;
    const float* no_sums;
    DEVICE Floats row(i64 row, int n_cols) const { return {x + 4 * row * n_cols, nullptr, nullptr}; }
};

/// Matrices of jobs: `base`, or with a table `table[which[job]]`, or `table[job]` without `which`.
struct Matrices {
    const u8* base;
    const u8* const* table;
    int n_table;
    const int* which;
    /// Returns a job's matrix, and its index in `at`; null if the index is outside of the table, or
    /// the matrix missing.
    DEVICE const u8* of(i64 job, i64& at) const {
        at = 0;
        if (!table) return base;
        at = which ? which[job] : job;
        return at < 0 || at >= n_table ? nullptr : table[at];
    }
};

/// Returns a lane's share of the product of a row.
template <class W>
DEVICE float share_of_row(const u8* w, i64 row, int n_cols, typename W::Acts x, int lane) {
    w += row * W::row_bytes(n_cols);
    float sum = 0.0f;
    for (int i = lane; i < W::pieces(n_cols); i += WARP) W::add(w, i, n_cols, x, sum);
    return sum;
}

/// Computes `out[job, row] = sum over c of w[row, c] * x[job / jobs_per_x, c] + bias[row]`: one
/// launch for a layer's chosen experts. `bias`, a row per matrix, may be null. A result without a
/// matrix is left as it is. Grid: rows by warps, jobs.
template <class W>
DEVICE void matvec(Matrices matrices, const float* bias, int n_rows, int n_cols, typename W::Acts x, int jobs_per_x,
                   float* out) {
    const int lane = threadIdx.x % WARP;
    const int row = (int)(blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP);
    const int job = (int)blockIdx.y;
    if (row >= n_rows) return;
    i64 at;
    const u8* w = matrices.of(job, at);
    if (!w) return;
    const float sum = warp_sum(share_of_row<W>(w, row, n_cols, x.row(job / jobs_per_x, n_cols), lane));
    if (lane == 0) out[(i64)job * n_rows + row] = bias ? sum + bias[at * n_rows + row] : sum;
}

/// Returns a lane's share of the product of a row, whose matrix type is given by its index in
/// `Types`.
template <class W, class... Others>
DEVICE float share_by_type(int type, const u8* w, i64 row, int n_cols, typename W::Acts x, int lane) {
    if constexpr (sizeof...(Others) > 0) {
        if (type > 0) return share_by_type<Others...>(type - 1, w, row, n_cols, x, lane);
    }
    return share_of_row<W>(w, row, n_cols, x, lane);
}

/// One of several matrices that are multiplied with the same activations.
struct Part {
    const u8* w;
    /// Index of its type among those of the kernel.
    int type;
    int n_rows;
    /// `[n_rows]`, or null.
    const float* bias;
    /// `[tokens, n_rows]`.
    float* out;
};

/// Multiplies up to three matrices; missing ones have no rows. A block has rows of one matrix, so
/// its warps have one type. Grid: rows by warps, where each matrix begins with a new block; tokens.
template <class W, class... Others>
DEVICE void matvecs(Part part, Part second, Part third, int n_cols, typename W::Acts x) {
    const int lane = threadIdx.x % WARP, warps = (int)(blockDim.x / WARP);
    const i64 token = blockIdx.y;
    int block = (int)blockIdx.x;
    int blocks = (part.n_rows + warps - 1) / warps;
    if (block >= blocks) {
        block -= blocks;
        part = second;
        blocks = (part.n_rows + warps - 1) / warps;
        if (block >= blocks) {
            block -= blocks;
            part = third;
        }
    }
    const int row = block * warps + (int)(threadIdx.x / WARP);
    if (row >= part.n_rows) return;
    const float share = share_by_type<W, Others...>(part.type, part.w, row, n_cols, x.row(token, n_cols), lane);
    const float sum = warp_sum(share);
    if (lane == 0) part.out[token * part.n_rows + row] = part.bias ? sum + part.bias[row] : sum;
}

/// Rows per block of `gated`: a run of its results.
#define GATED_ROWS 32

/// Computes the products of each job with gate and up, times the job's factor, and their activation
/// by `activated`. Without gates, which have neither `base` nor `table`, there is no product with one.
/// The result is `[jobs, n_rows]`: quantized if `q` is not null, with `n_rows` a multiple of 32,
/// otherwise in `out`. Factors may be null. Biases and missing matrices are as with `matvec`.
/// Grid: runs of 32 rows, jobs.
template <class W>
DEVICE void gated(Matrices gate, Matrices up, const float* gate_bias, const float* up_bias, const float* factors,
                  int n_rows, int n_cols, typename W::Acts x, int jobs_per_x, int activation, float a, float b,
                  float* out, i8* q, float* scale, float* sums) {
    __shared__ float gates[GATED_ROWS];
    __shared__ float ups[GATED_ROWS];
    const int lane = threadIdx.x % WARP, warp = (int)(threadIdx.x / WARP);
    const int first = (int)blockIdx.x * GATED_ROWS;
    const i64 job = blockIdx.y;
    const bool has_gate = gate.base || gate.table;
    i64 gate_at, up_at;
    const u8 *g = gate.of(job, gate_at), *u = up.of(job, up_at);
    if ((has_gate && !g) || !u) return;
    x = x.row(job / jobs_per_x, n_cols);
    const i64 row_bytes = W::row_bytes(n_cols);
    const float factor = factors ? factors[job] : 1.0f;
    for (int r = warp; r < GATED_ROWS && first + r < n_rows; r += (int)(blockDim.x / WARP)) {
        const i64 row = first + r;
        float of_gate = 0.0f, of_up = 0.0f;
        if (has_gate) {
            const u8 *gate_row = g + row * row_bytes, *up_row = u + row * row_bytes;
            for (int i = lane; i < W::pieces(n_cols); i += WARP) {
                W::add(gate_row, i, n_cols, x, of_gate);
                W::add(up_row, i, n_cols, x, of_up);
            }
            of_gate = warp_sum(of_gate) * factor;
        } else {
            of_up = share_of_row<W>(u, row, n_cols, x, lane);
        }
        of_up = warp_sum(of_up) * factor;
        if (lane == 0) {
            gates[r] = has_gate && gate_bias ? of_gate + gate_bias[gate_at * n_rows + row] : of_gate;
            ups[r] = up_bias ? of_up + up_bias[up_at * n_rows + row] : of_up;
        }
    }
    __syncthreads();
    if (warp > 0) return;
    const bool inside = first + lane < n_rows;
    const float of_gate = inside ? gates[lane] : 0.0f, of_up = inside ? ups[lane] : 0.0f;
    const float v = activated(activation, a, b, of_gate, of_up);
    const i64 to = job * n_rows + first + lane;
    if (q) {
        quantize_run(v, to / 32, q, scale, sums);
    } else if (inside) {
        out[to] = v;
    }
}

/// Computes `out[token, row] = onto[token, row] + sum over k of weights[token, k] * (w[k][row] .
/// x[token, k] + bias)`: down of the experts that a token chose. `onto` and `bias` may be null, and
/// `weights`, which stands for ones; missing matrices add nothing.
///
/// A warp has a row of all of them. Its lanes take their pieces in turn as of one long row, so that
/// no lane idles where an expert has few pieces. Grid: rows by warps, tokens.
template <class W>
DEVICE void chosen_sum(Matrices matrices, const float* bias, const float* weights, int n_used, int n_rows, int n_cols,
                       typename W::Acts x, const float* onto, float* out) {
    // At once as many experts as a warp has lanes.
    __shared__ const u8* starts[WARP];
    __shared__ float factors[WARP];
    const int lane = threadIdx.x % WARP, pieces = W::pieces(n_cols);
    const i64 row = (i64)blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP, token = blockIdx.y;
    const i64 row_at = row * W::row_bytes(n_cols);
    float sum = 0.0f;
    for (int first = 0; first < n_used; first += WARP) {
        const int n = n_used - first < WARP ? n_used - first : WARP;
        const i64 first_job = token * n_used + first;
        i64 at = 0;
        const u8* own = lane < n ? matrices.of(first_job + lane, at) : nullptr;
        const float factor = lane >= n ? 0.0f : weights ? weights[first_job + lane] : 1.0f;
        __syncthreads();
        if (threadIdx.x < WARP) {
            starts[lane] = own;
            factors[lane] = factor;
        }
        __syncthreads();
        if (row >= n_rows) continue;
        for (int i = lane; i < n * pieces; i += WARP) {
            const int k = i / pieces;
            const u8* w = starts[k];
            if (!w) continue;
            float part = 0.0f;
            W::add(w + row_at, i - k * pieces, n_cols, x.row(first_job + k, n_cols), part);
            sum += factors[k] * part;
        }
        if (bias && own) sum += factor * bias[at * n_rows + row];
    }
    if (row >= n_rows) return;
    sum = warp_sum(sum);
    const i64 to = token * n_rows + row;
    if (lane == 0) out[to] = onto ? onto[to] + sum : sum;
}

/// Defines the kernels of a matrix type; activations are always three pointers.
#define PRODUCT_KERNELS(NAME, TYPE)                                                                                    \
    KERNEL matvec_##NAME(const u8* base, const u8* const* table, int n_table, const int* which, const float* bias,     \
                         int n_rows, int n_cols, const u8* x, const float* scale, const float* sums, int jobs_per_x,   \
                         float* out) {                                                                                 \
        matvec<TYPE>({base, table, n_table, which}, bias, n_rows, n_cols, {x, scale, sums}, jobs_per_x, out);          \
    }                                                                                                                  \
    KERNEL gated_##NAME(const u8* gate, const u8* const* gates, const u8* up, const u8* const* ups, int n_table,       \
                        const int* which, const float* gate_bias, const float* up_bias, const float* factors,          \
                        int n_rows, int n_cols, const u8* x, const float* scale, const float* sums, int jobs_per_x,    \
                        int activation, float a, float b, float* out, i8* to_q, float* to_scale, float* to_sums) {     \
        gated<TYPE>({gate, gates, n_table, which}, {up, ups, n_table, which}, gate_bias, up_bias, factors, n_rows,     \
                    n_cols, {x, scale, sums}, jobs_per_x, activation, a, b, out, to_q, to_scale, to_sums);             \
    }                                                                                                                  \
    KERNEL chosen_sum_##NAME(const u8* const* table, int n_table, const int* which, const float* bias,                 \
                             const float* weights, int n_used, int n_rows, int n_cols, const u8* x,                    \
                             const float* scale, const float* sums, const float* onto, float* out) {                   \
        chosen_sum<TYPE>({nullptr, table, n_table, which}, bias, weights, n_used, n_rows, n_cols, {x, scale, sums},    \
                         onto, out);                                                                                   \
    }

/// Defines the kernel of all types of a module, in the order of the program's indices.
#define MATVECS_KERNEL(NAME, ...)                                                                                      \
    KERNEL matvecs_##NAME(const u8* w0, int type0, int rows0, const float* bias0, float* out0, const u8* w1,           \
                          int type1, int rows1, const float* bias1, float* out1, const u8* w2, int type2, int rows2,   \
                          const float* bias2, float* out2, int n_cols, const u8* x, const float* scale,                \
                          const float* sums) {                                                                         \
        matvecs<__VA_ARGS__>({w0, type0, rows0, bias0, out0}, {w1, type1, rows1, bias1, out1},                         \
                             {w2, type2, rows2, bias2, out2}, n_cols, {x, scale, sums});                               \
    }
