// Element-wise operations, norms, and storing in the KV cache.
#include "place.cuh"

/// Quantizes activations, a warp per run.
KERNEL quantize(const float* x, int n_runs, i8* q, float* scale, float* sums) {
    const int run = (int)(blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP), lane = threadIdx.x % WARP;
    if (run < n_runs) quantize_run(x[32 * (i64)run + lane], run, q, scale, sums);
}

/// Computes `x += add`, then `out = x / sqrt(mean(x^2) + eps) * weight` and its quantized form.
/// `add` and `q` may be null. A block per row of `width` values, with `q` a multiple of 32.
KERNEL add_norm(float* x, const float* add, const float* weight, int width, float eps, float* out, i8* q, float* scale,
                float* sums) {
    __shared__ float room[WARP];
    const i64 first = (i64)blockIdx.x * width;
    x += first;
    out += first;
    float squares = 0.0f;
    for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) {
        float v = x[i];
        if (add) {
            v += add[first + i];
            x[i] = v;
        }
        squares += v * v;
    }
    const float factor = 1.0f / sqrtf(block_sum(squares, room) / (float)width + eps);
    // The lanes of a warp have consecutive values: a run.
    for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) {
        const float v = x[i] * factor * weight[i];
        out[i] = v;
        if (q) quantize_run(v, (first + i) / 32, q, scale, sums);
    }
}

/// Computes `out = x / sqrt(mean(x^2) + eps) * weight`, a block per row of `width` values. A null
/// `weight` stands for ones. Rows begin `x_stride` and `out_stride` values apart. `out` may be `x`.
KERNEL rms_norm(const float* x, int x_stride, const float* weight, int width, float eps, float* out, int out_stride) {
    __shared__ float room[WARP];
    x += (i64)blockIdx.x * x_stride;
    out += (i64)blockIdx.x * out_stride;
    float squares = 0.0f;
    for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) squares += x[i] * x[i];
    const float factor = 1.0f / sqrtf(block_sum(squares, room) / (float)width + eps);
    for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) {
        out[i] = weight ? x[i] * factor * weight[i] : x[i] * factor;
    }
}

/// Rotates the pairs of every head of `[tokens, heads, head_dim]`; `turns` is `[tokens, half]` of
/// cosine and sine. The values of a pair are adjacent, or `half` values apart. Grid: heads, tokens.
KERNEL rope(float* x, const float* turns, int head_dim, int half, int neighbours) {
    rotate(x + ((i64)blockIdx.y * gridDim.x + blockIdx.x) * head_dim, turns, (int)blockIdx.y, half, neighbours);
}

/// Stores `[tokens, heads, width]` in a cache at the tokens' positions. Grid: heads, tokens.
template <class Store>
DEVICE void store(const float* x, int width, const int* positions, const int* begins, const int* tables, int page_bits,
                  u8* cache) {
    const int head = (int)blockIdx.x, heads = (int)gridDim.x, token = (int)blockIdx.y;
    const float* from = x + ((i64)token * heads + head) * width;
    Store::row(from, width, stored_row<Store>(cache, head, heads, width, positions, begins, tables, page_bits, token));
}

/// Normalizes heads, rotates those of queries and keys, the queries in place, and stores keys and
/// values at the tokens' positions. Norms and `turns` may be null; those of queries and keys are
/// `norms_last` after the rotation. Grid: heads of queries, of keys and of values; tokens.
template <class Store>
DEVICE void place_heads(float* q, const float* k, const float* v, const float* q_norm, const float* k_norm,
                        const float* v_norm, int norms_last, float eps, const float* turns, int half, int neighbours,
                        int n_head, int n_head_kv, int key_width, int value_width, const int* positions,
                        const int* begins, const int* tables, int page_bits, u8* keys, u8* values) {
    __shared__ float row[MAX_KEY];
    __shared__ float room[WARP];
    const int head = (int)blockIdx.x, token = (int)blockIdx.y;
    const bool is_query = head < n_head, is_value = head >= n_head + n_head_kv;
    const int at = is_query ? head : is_value ? head - n_head - n_head_kv : head - n_head;
    const int width = is_value ? value_width : key_width;
    float* query = q + ((i64)token * n_head + at) * width;
    const float* from = is_query ? query : (is_value ? v : k) + ((i64)token * n_head_kv + at) * width;
    const float* norm = is_query ? q_norm : is_value ? v_norm : k_norm;
    const bool last = norms_last && !is_value;
    for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) row[i] = from[i];
    // A thread has the same values throughout, so there is no barrier in between.
    if (norm && !last) norm_row(row, width, norm, eps, room);
    __syncthreads();
    if (turns && !is_value) {
        rotate(row, turns, token, half, neighbours);
        __syncthreads();
    }
    if (norm && last) {
        norm_row(row, width, norm, eps, room);
        __syncthreads();
    }
    if (is_query) {
        for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) query[i] = row[i];
        return;
    }
    u8* cache = is_value ? values : keys;
    Store::row(row, width,
               stored_row<Store>(cache, at, n_head_kv, width, positions, begins, tables, page_bits, token));
}

#define STORE(NAME, STORE_ROWS)                                                                                        \
    KERNEL store_##NAME(const float* x, int width, const int* positions, const int* begins, const int* tables,         \
                        int page_bits, u8* cache) {                                                                    \
        store<STORE_ROWS>(x, width, positions, begins, tables, page_bits, cache);                                      \
    }                                                                                                                  \
    KERNEL place_heads_##NAME(float* q, const float* k, const float* v, const float* q_norm, const float* k_norm,      \
                              const float* v_norm, int norms_last, float eps, const float* turns, int half,            \
                              int neighbours, int n_head, int n_head_kv, int key_width, int value_width,               \
                              const int* positions, const int* begins, const int* tables, int page_bits, u8* keys,     \
                              u8* values) {                                                                            \
        place_heads<STORE_ROWS>(q, k, v, q_norm, k_norm, v_norm, norms_last, eps, turns, half, neighbours, n_head,     \
                                n_head_kv, key_width, value_width, positions, begins, tables, page_bits, keys,         \
                                values);                                                                               \
    }

STORE(f32, StoreF32)
STORE(f16, StoreF16)
STORE(q8, StoreQ8)

DEVICE i64 thread_number() {
    return (i64)blockIdx.x * blockDim.x + threadIdx.x;
}

/// Computes `gate = activated(gate, up)`, and its quantized form if `q` is not null, with `n` a
/// multiple of 32.
KERNEL activate(float* gate, const float* up, int activation, float a, float b, int n, i8* q, float* scale, float* sums) {
    const i64 i = thread_number();
    if (i >= n) return;
    const float v = activated(activation, a, b, gate[i], up[i]);
    gate[i] = v;
    if (q) quantize_run(v, i / 32, q, scale, sums);
}

/// Multiplies values by their gates, one gate per `share` values in turn: by `1 / (1 + exp(-gate))`,
/// or, with `by_softplus`, by `log(1 + exp(gate))`.
KERNEL gate(float* x, const float* gate, int share, int by_softplus, i64 n) {
    const i64 i = thread_number();
    if (i >= n) return;
    const float g = gate[i / share];
    if (by_softplus) {
        x[i] *= softplus(g);
    } else {
        x[i] = x[i] / (1.0f + expf(-g));
    }
}

/// Multiplies `n` values by a factor.
KERNEL scale(float* x, float factor, i64 n) {
    const i64 i = thread_number();
    if (i < n) x[i] *= factor;
}

/// Copies rows of `width` values that begin `x_stride` and `out_stride` values apart; `n` values in
/// total.
KERNEL copy_rows(const float* x, int x_stride, int width, i64 n, float* out, int out_stride) {
    const i64 i = thread_number();
    if (i < n) out[i / width * out_stride + i % width] = x[i / width * x_stride + i % width];
}

/// Multiplies each row of `width` values by its factor; `n` values in total.
KERNEL scale_rows(float* x, const float* factors, int width, i64 n) {
    const i64 i = thread_number();
    if (i < n) x[i] *= factors[i / width];
}

/// Computes `out[job, c] = sum over r of x[job, r] * w[job % heads, r, c]`: products with the
/// transposed matrices of heads, `[n_rows, n_cols]` each. A thread per column. Grid: columns by
/// threads, jobs.
KERNEL matvec_transposed(const float* w, int heads, int n_rows, int n_cols, const float* x, float* out) {
    const int c = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    const i64 job = blockIdx.y;
    if (c >= n_cols) return;
    w += job % heads * n_rows * n_cols + c;
    x += job * n_rows;
    float sum = 0.0f;
    for (int r = 0; r < n_rows; r++) sum += x[r] * w[(i64)r * n_cols];
    out[job * n_cols + c] = sum;
}

/// Computes `x = (x + y) * factor` for `n` values.
KERNEL add(float* x, const float* y, float factor, int n) {
    const i64 i = thread_number();
    if (i < n) x[i] = factor * (x[i] + y[i]);
}

/// Adds a bias to each row of `[rows, width]`: the first of `n_bias`, or the one with index
/// `which[row]`, if there is one.
KERNEL add_bias(float* x, const float* bias, int n_bias, const int* which, int width, int n) {
    const i64 i = thread_number();
    if (i >= n) return;
    const i64 row = which ? which[i / width] : 0;
    if (row >= 0 && row < n_bias) x[i] += bias[row * width + i % width];
}

/// Multiplies each row of `out` `[rows, width]` by `1 / (1 + exp(-gate . x))`, `x` `[rows, n]`: the
/// gate of a shared expert. A block per row.
KERNEL sigmoid_gate(const float* gate, const float* x, int n, int width, float* out) {
    __shared__ float room[WARP];
    x += (i64)blockIdx.x * n;
    out += (i64)blockIdx.x * width;
    float dot = 0.0f;
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) dot += gate[i] * x[i];
    const float factor = 1.0f / (1.0f + expf(-block_sum(dot, room)));
    for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) out[i] *= factor;
}

/// Reads `n` words with all threads, to measure bandwidth. The sum is written so that no read is
/// optimized away.
KERNEL read_all(const uint4* from, i64 n, u32* out) {
    u32 sum = 0;
    const i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = thread_number(); i < n; i += step) {
        const uint4 v = from[i];
        sum += v.x ^ v.y ^ v.z ^ v.w;
    }
    out[thread_number()] = sum;
}

/// Does nothing, to measure the time of a launch.
KERNEL nothing() {}
