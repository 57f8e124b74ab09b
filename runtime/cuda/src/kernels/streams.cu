// Hyper-connections: what a block reads of several residual streams, and how its result is written
// back. A row of streams is `[n, width]`. Rows don't depend on each other.
#include "base.cuh"

/// Most streams.
#define MAX_STREAMS 64
/// Most streams that are mixed with each other.
#define MAX_MIXED 8

/// Sums a row's streams, each times its share, to a row of `out` under a norm, and quantized if `q`
/// is not null. `shares` is shared.
DEVICE void read_streams(const float* x, const float* shares, int n, int width, const float* norm, float eps,
                         float* out, i8* q, float* scale, float* sums) {
    __shared__ float room[WARP];
    const i64 first = (i64)blockIdx.x * width;
    out += first;
    float squares = 0.0f;
    for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) {
        float v = 0.0f;
        for (int j = 0; j < n; j++) v += shares[j] * x[(i64)j * width + i];
        out[i] = v;
        squares += v * v;
    }
    const float factor = 1.0f / sqrtf(block_sum(squares, room) / (float)width + eps);
    // The lanes of a warp have consecutive values: a run.
    for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) {
        const float v = out[i] * factor * norm[i];
        out[i] = v;
        if (q) quantize_run(v, (first + i) / 32, q, scale, sums);
    }
}

/// Makes a matrix `[source, destination]` of `n * n` logits nearly doubly stochastic, in place in
/// shared memory: a softmax of each row plus epsilon, then columns and rows in turns divided by
/// their sum plus epsilon. A thread has an element.
DEVICE void balance(float* mix, int n, int rounds, float epsilon) {
    const int thread = (int)threadIdx.x, row = thread / n * n, column = thread % n;
    const bool mine = thread < n * n;
    float v = 0.0f, sum = 0.0f;
    if (mine) {
        float largest = minus_infinity();
        for (int i = 0; i < n; i++) largest = fmaxf(largest, mix[row + i]);
        for (int i = 0; i < n; i++) sum += expf(mix[row + i] - largest);
        v = expf(mix[thread] - largest) / sum + epsilon;
    }
    for (int round = 0; round < rounds; round++) {
        for (int side = round == 0 ? 1 : 0; side < 2; side++) {
            __syncthreads();
            if (mine) mix[thread] = v;
            __syncthreads();
            if (mine) {
                sum = 0.0f;
                for (int i = 0; i < n; i++) sum += side == 0 ? mix[row + i] : mix[i * n + column];
                v /= sum + epsilon;
            }
        }
    }
    __syncthreads();
    if (mine) mix[thread] = v;
    __syncthreads();
}

/// Reads streams by the gates of each row, `[rows, n_gates]`: `n` for what is read, `n` for what the
/// result is multiplied by, and `n * n` for a matrix between streams, made by `rounds` if there are
/// any. `base` is `[n_gates]`, and `scale` has a value per kind. What is needed to write back goes
/// to `post`, `[rows, n]`, and `mix`, `[rows, n * n]`, unless `post` is null. Grid: rows.
KERNEL streams_read_gated(const float* x, const float* gates, int n_gates, int n, int width, const float* base,
                          const float* scale, float epsilon, float post_scale, float post_offset, int rounds,
                          const float* norm, float eps, float* out, i8* q, float* quant_scale, float* quant_sums,
                          float* post, float* mix) {
    __shared__ float shares[MAX_STREAMS];
    __shared__ float matrix[MAX_MIXED * MAX_MIXED];
    const int thread = (int)threadIdx.x;
    const i64 row = blockIdx.x;
    gates += row * n_gates;
    if (thread < n) shares[thread] = 1.0f / (1.0f + expf(-(gates[thread] * scale[0] + base[thread]))) + epsilon;
    if (post && thread < n) {
        const float gate = gates[n + thread] * scale[1] + base[n + thread];
        post[row * n + thread] = post_scale / (1.0f + expf(-gate)) + post_offset;
    }
    __syncthreads();
    read_streams(x + row * n * width, shares, n, width, norm, eps, out, q, quant_scale, quant_sums);
    if (post && rounds > 0) {
        const int first = 2 * n;
        if (thread < n * n) matrix[thread] = gates[first + thread] * scale[2] + base[first + thread];
        __syncthreads();
        balance(matrix, n, rounds, epsilon);
        if (thread < n * n) mix[row * n * n + thread] = matrix[thread];
    }
}

/// Reads the first stream and the `n_bank` after it, by a softmax of their products with `score`
/// under a norm without weights. Grid: rows.
KERNEL streams_read_bank(const float* x, const float* score, int n_bank, int n, int width, const float* norm,
                         float eps, float* out, i8* q, float* quant_scale, float* quant_sums) {
    __shared__ float room[WARP];
    __shared__ float shares[MAX_STREAMS];
    x += (i64)blockIdx.x * n * width;
    for (int j = 0; j <= n_bank; j++) {
        float squares = 0.0f, dot = 0.0f;
        for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) {
            const float v = x[(i64)j * width + i];
            squares += v * v;
            dot += v * score[i];
        }
        squares = block_sum(squares, room);
        dot = block_sum(dot, room);
        if (threadIdx.x == 0) shares[j] = dot / sqrtf(squares / (float)width + eps);
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        float largest = minus_infinity(), sum = 0.0f;
        for (int j = 0; j <= n_bank; j++) largest = fmaxf(largest, shares[j]);
        for (int j = 0; j <= n_bank; j++) {
            shares[j] = expf(shares[j] - largest);
            sum += shares[j];
        }
        for (int j = 0; j <= n_bank; j++) shares[j] /= sum;
    }
    __syncthreads();
    read_streams(x, shares, n_bank + 1, width, norm, eps, out, q, quant_scale, quant_sums);
}

/// Reads the mean of streams. Grid: rows.
KERNEL streams_read_mean(const float* x, int n, int width, const float* norm, float eps, float* out, i8* q,
                         float* quant_scale, float* quant_sums) {
    __shared__ float shares[MAX_STREAMS];
    if ((int)threadIdx.x < n) shares[threadIdx.x] = 1.0f / (float)n;
    __syncthreads();
    read_streams(x + (i64)blockIdx.x * n * width, shares, n, width, norm, eps, out, q, quant_scale, quant_sums);
}

/// Normalizes each stream by itself, `norm` is `[n, width]`. Grid: rows times streams.
KERNEL streams_norm(const float* x, const float* norm, int n, int width, float eps, float* out) {
    __shared__ float room[WARP];
    const i64 first = (i64)blockIdx.x * width;
    norm += (i64)(blockIdx.x % n) * width;
    float squares = 0.0f;
    for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) squares += x[first + i] * x[first + i];
    const float factor = 1.0f / sqrtf(block_sum(squares, room) / (float)width + eps);
    for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) out[first + i] = x[first + i] * factor * norm[i];
}

/// Computes `x = silu(x / n)` for `count` values.
KERNEL streams_squash(float* x, int n, int count) {
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= count) return;
    const float v = x[i] / (float)n;
    x[i] = v / (1.0f + expf(-v));
}

/// Reads normalized streams by a gate per value, both `[rows, n, width]`: the mean of the streams,
/// each times the sigmoid of its gate. Factors on the result go to `post`, `[rows, n]`, from what is
/// injected, unless `post` is null. Grid: rows.
KERNEL streams_read_low_rank(const float* x, const float* gates, const float* injected, int n, int width, float* out,
                             i8* q, float* scale, float* sums, float* post) {
    const i64 row = blockIdx.x, first = row * width;
    x += row * n * width;
    gates += row * n * width;
    const int thread = (int)threadIdx.x;
    if (post && thread < n) post[row * n + thread] = 2.0f / (1.0f + expf(-injected[row * n + thread] / (float)n));
    // The lanes of a warp have consecutive values: a run.
    for (int i = thread; i < width; i += (int)blockDim.x) {
        float v = 0.0f;
        for (int j = 0; j < n; j++) v += x[(i64)j * width + i] / (1.0f + expf(-gates[(i64)j * width + i]));
        v /= (float)n;
        out[first + i] = v;
        if (q) quantize_run(v, (first + i) / 32, q, scale, sums);
    }
}

/// Writes results, `[rows, width]`, back to streams: each gets `post` times the result, and stays as
/// it is or, if `mix` is not null, becomes the sum of all by the matrix. Grid: blocks of values;
/// rows.
KERNEL streams_write(float* x, const float* result, const float* post, const float* mix, int n, int width) {
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    const i64 row = blockIdx.y;
    if (i >= width) return;
    x += row * n * width + i;
    post += row * n;
    const float f = result[row * width + i];
    if (!mix) {
        for (int j = 0; j < n; j++) x[(i64)j * width] += post[j] * f;
        return;
    }
    mix += row * n * n;
    float old[MAX_MIXED];
#pragma unroll
    for (int j = 0; j < MAX_MIXED; j++) old[j] = j < n ? x[(i64)j * width] : 0.0f;
    for (int to = 0; to < n; to++) {
        float v = 0.0f;
#pragma unroll
        for (int from = 0; from < MAX_MIXED; from++) {
            if (from < n) v += mix[from * n + to] * old[from];
        }
        x[(i64)to * width] = v + post[to] * f;
    }
}

/// Adds results, `[rows, width]`, to the first stream; or, with a `slot` of at least 0, has the first
/// stream join the bank there and the result take its place. Grid: blocks of values; rows.
KERNEL streams_write_bank(float* x, const float* result, int slot, int n, int width) {
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= width) return;
    x += (i64)blockIdx.y * n * width + i;
    const float f = result[(i64)blockIdx.y * width + i];
    if (slot >= 0) {
        x[(i64)(slot + 1) * width] = x[0];
        x[0] = f;
    } else {
        x[0] += f;
    }
}

/// Makes all streams of rows the row of `from`, `[rows, width]`. Grid: blocks of values; rows.
KERNEL streams_spread(const float* from, float* x, int n, int width) {
    const int i = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (i >= width) return;
    const float v = from[(i64)blockIdx.y * width + i];
    x += (i64)blockIdx.y * n * width + i;
    for (int j = 0; j < n; j++) x[(i64)j * width] = v;
}
