// The small operations between products.
#include "rows.cuh"

/// Added to a small number and taken off again it rounds to the nearest whole number, ties to even.
#define ROUND 12582912.0f

/// 8-bit activations: `q` is `[n_runs, 32]`, `scale` `[n_runs]`, `sums` (scale times the sum of codes of each sixteen)
/// `[n_runs, 2]`. A warp a run; the same bits as on the processor.
KERNEL quantize(const float* x, int n_runs, i8* q, float* scale, float* sums) {
    const int run = (int)(blockIdx.x * (blockDim.x / WARP) + threadIdx.x / WARP), lane = threadIdx.x % WARP;
    if (run >= n_runs) return;
    const float v = x[32 * (i64)run + lane];
    // Compared as bits so that a NaN is the largest and ends up in the scale, where it is seen.
    int bits = __float_as_int(v) & 0x7fffffff;
    for (int step = WARP / 2; step > 0; step /= 2) {
        const int other = __shfl_xor_sync(ALL_LANES, bits, step);
        bits = other > bits ? other : bits;
    }
    const float largest = __int_as_float(bits);
    const bool tiny = largest < 1e-35f;
    const float s = tiny ? 0.0f : __fdiv_rn(largest, 127.0f), inverse = tiny ? 0.0f : __fdiv_rn(127.0f, largest);
    // Not fused: a tie must round as it does on the processor.
    const i8 code = (i8)(__float_as_int(__fadd_rn(__fmul_rn(v, inverse), ROUND)) - __float_as_int(ROUND));
    int sum = code;
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
    q[32 * (i64)run + lane] = code;
    if (lane % 16 == 0) sums[2 * (i64)run + lane / 16] = s * (float)sum;
    if (lane == 0) scale[run] = s;
}

/// `out = x / sqrt(mean(x^2) + eps) * weight`, a block a row of `width` values; a null `weight` stands for ones. Rows begin
/// `x_stride` and `out_stride` values apart. `out` may be `x`.
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

/// Rotates the pairs of every head of `[tokens, heads, head_dim]`; `turns` is `[tokens, half]` of cosine and sine. Pairs
/// are neighbours, or `half` values apart. Grid: heads, tokens.
KERNEL rope(float* x, const float* turns, int head_dim, int half, int neighbours) {
    float* head = x + ((i64)blockIdx.y * gridDim.x + blockIdx.x) * head_dim;
    const float* turn = turns + (i64)blockIdx.y * half * 2;
    for (int i = (int)threadIdx.x; i < half; i += (int)blockDim.x) {
        float* a = head + (neighbours ? 2 * i : i);
        float* b = neighbours ? a + 1 : a + half;
        const float cosine = turn[2 * i], sine = turn[2 * i + 1], from_a = *a, from_b = *b;
        *a = from_a * cosine - from_b * sine;
        *b = from_a * sine + from_b * cosine;
    }
}

/// Stores `[tokens, heads, width]` in a cache `[heads, context, width]` of 32-bit floats, from position `*past` on. Grid:
/// heads, tokens.
KERNEL store_f32(const float* x, int width, int context, const int* past, float* cache) {
    const float* from = x + ((i64)blockIdx.y * gridDim.x + blockIdx.x) * width;
    float* to = cache + ((i64)blockIdx.x * context + *past + blockIdx.y) * width;
    for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) to[i] = from[i];
}

/// The same as 16-bit floats.
KERNEL store_f16(const float* x, int width, int context, const int* past, u16* cache) {
    const float* from = x + ((i64)blockIdx.y * gridDim.x + blockIdx.x) * width;
    u16* to = cache + ((i64)blockIdx.x * context + *past + blockIdx.y) * width;
    for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) to[i] = narrow(from[i]);
}

/// The same in 8 bits: a warp a block of 32 values, whose scale is the least 16-bit float not below the largest magnitude
/// by 127.
KERNEL store_q8(const float* x, int width, int context, const int* past, u8* cache) {
    const float* from = x + ((i64)blockIdx.y * gridDim.x + blockIdx.x) * width;
    u8* row = cache + ((i64)blockIdx.x * context + *past + blockIdx.y) * RowsQ8::row_bytes(width);
    const int lane = threadIdx.x % WARP;
    for (int block = (int)(threadIdx.x / WARP); 32 * block < width; block += (int)(blockDim.x / WARP)) {
        const bool inside = 32 * block + lane < width;
        const float v = inside ? from[32 * block + lane] : 0.0f;
        int bits = __float_as_int(v) & 0x7fffffff;
        for (int step = WARP / 2; step > 0; step /= 2) {
            const int other = __shfl_xor_sync(ALL_LANES, bits, step);
            bits = other > bits ? other : bits;
        }
        const float exact = __fdiv_rn(__int_as_float(bits), 127.0f);
        u16 scale = narrow(exact);
        if (widen(scale) < exact) scale++;
        const float inverse = scale == 0 ? 0.0f : __fdiv_rn(1.0f, widen(scale));
        u8* to = row + 34 * block;
        if (inside) to[2 + lane] = (u8)(i8)__float2int_rn(__fmul_rn(v, inverse));
        if (lane == 0) *(u16*)to = scale;
    }
}

DEVICE i64 thread_number() {
    return (i64)blockIdx.x * blockDim.x + threadIdx.x;
}

/// `gate = gate / (1 + exp(-gate)) * up`.
KERNEL silu_mul(float* gate, const float* up, int n) {
    const i64 i = thread_number();
    if (i < n) gate[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

/// `gate = g / (1 + exp(-alpha * g)) * (u + 1)`: `g` is gate, at most `limit`, and `u` up, within `limit` of zero.
KERNEL clamped_swiglu(float* gate, const float* up, float alpha, float limit, int n) {
    const i64 i = thread_number();
    if (i >= n) return;
    // Compared rather than clamped: a NaN goes through.
    const float g = gate[i] > limit ? limit : gate[i];
    const float below = up[i] > limit ? limit : up[i];
    const float u = below < -limit ? -limit : below;
    gate[i] = g / (1.0f + expf(-alpha * g)) * (u + 1.0f);
}

/// `x = x / (1 + exp(-gate))`.
KERNEL gate(float* x, const float* gate, int n) {
    const i64 i = thread_number();
    if (i < n) x[i] = x[i] / (1.0f + expf(-gate[i]));
}

/// Copies rows of `width` values that begin `x_stride` and `out_stride` values apart; `n` values in all.
KERNEL copy_rows(const float* x, int x_stride, int width, i64 n, float* out, int out_stride) {
    const i64 i = thread_number();
    if (i < n) out[i / width * out_stride + i % width] = x[i / width * x_stride + i % width];
}

/// Multiplies each row of `width` values by its own factor; `n` values in all.
KERNEL scale_rows(float* x, const float* factors, int width, i64 n) {
    const i64 i = thread_number();
    if (i < n) x[i] *= factors[i / width];
}

/// `out[job, c] = sum over r of x[job, r] * w[job % heads, r, c]`: products with the transposed matrices of heads, which
/// are `[n_rows, n_cols]`. A thread a column. Grid: columns by threads, jobs.
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

/// `x += y`.
KERNEL add(float* x, const float* y, int n) {
    const i64 i = thread_number();
    if (i < n) x[i] += y[i];
}

/// Adds a bias to each row of `[rows, width]`: the first of `n_bias`, or that which `which[row]` numbers, if there is one.
KERNEL add_bias(float* x, const float* bias, int n_bias, const int* which, int width, int n) {
    const i64 i = thread_number();
    if (i >= n) return;
    const i64 row = which ? which[i / width] : 0;
    if (row >= 0 && row < n_bias) x[i] += bias[row * width + i % width];
}

/// `out[token] = onto[token] + sum over k of weight[token, k] * x[token, k]`, in the order of `k`; a null `onto` stands for
/// zeros. `x` is `[tokens, n_used, width]`, `n` is `tokens * width`.
KERNEL weighted_sum(const float* x, const float* weight, const float* onto, int n_used, int width, int n, float* out) {
    const i64 i = thread_number();
    if (i >= n) return;
    const i64 token = i / width, at = i % width;
    float sum = 0.0f;
    for (int k = 0; k < n_used; k++) sum += weight[token * n_used + k] * x[(token * n_used + k) * width + at];
    out[i] = onto ? onto[i] + sum : sum;
}

/// Multiplies each row of `out` `[rows, width]` by `1 / (1 + exp(-gate . x))`, `x` `[rows, n]`: the gate of a shared
/// expert. A block a row.
KERNEL sigmoid_gate(const float* gate, const float* x, int n, int width, float* out) {
    __shared__ float room[WARP];
    x += (i64)blockIdx.x * n;
    out += (i64)blockIdx.x * width;
    float dot = 0.0f;
    for (int i = (int)threadIdx.x; i < n; i += (int)blockDim.x) dot += gate[i] * x[i];
    const float factor = 1.0f / (1.0f + expf(-block_sum(dot, room)));
    for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) out[i] *= factor;
}

/// Reads `n` words again and again: what a device's memory gives. The sum is written so that no read is left out.
KERNEL read_all(const uint4* from, i64 n, u32* out) {
    u32 sum = 0;
    const i64 step = (i64)gridDim.x * blockDim.x;
    for (i64 i = thread_number(); i < n; i += step) {
        const uint4 v = from[i];
        sum += v.x ^ v.y ^ v.z ^ v.w;
    }
    out[thread_number()] = sum;
}

/// Nothing: what a launch costs.
KERNEL nothing() {}
