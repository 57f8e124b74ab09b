// The gated delta net between its products: a short convolution, the recurrence over a matrix per
// value head, and the gated norm of the result.
//
// The tokens of a batch pass through a matrix one after the other inside one launch, so a batch
// gives the same bits as its tokens one by one. At position 0 the state is taken for zero, whatever
// its memory holds.
#include "base.cuh"

/// Lanes per column of a matrix.
#define DELTA_SHARE 8
/// Columns per block.
#define DELTA_COLUMNS 16
/// Threads per block.
#define DELTA_THREADS (DELTA_COLUMNS * DELTA_SHARE)
/// Tokens whose queries, keys and values a block loads at once.
#define DELTA_TOKENS 16

/// Returns where a head's values begin in a row of projections: query heads, key heads, value
/// heads. With `by_key_head`, each key head has its query, its key, the values and then the gates
/// of its `group` value heads.
DEVICE int delta_column(int head, int by_key_head, int n_key, int group, int dim) {
    if (!by_key_head) return head * dim;
    const int each = (2 + 2 * group) * dim;
    if (head < n_key) return head * each;
    if (head < 2 * n_key) return (head - n_key) * each + dim;
    const int value = head - 2 * n_key;
    return value / group * each + (2 + value % group) * dim;
}

/// Convolves a head of a token over its inputs and those of the last tokens, and normalizes queries
/// and keys to length 1, queries also divided by the root of the width: `heads` is `[tokens, 2 *
/// n_key + n_value, dim]`. Also computes the decay and strength of each value head to `rates`,
/// `[tokens, n_value, 2]`.
///
/// `projected` has rows of `width`, `inputs` is `[taps - 1, channels]`, the newest last, and
/// `weight` `[channels, taps]`. `beta` and `alpha` are `[tokens, n_value]`; with
/// `rates_by_key_head` rows are twice as long and grouped by key head. Grid: heads, tokens.
KERNEL delta_convolve(const float* projected, int width, int by_key_head, int n_key, int n_value, int dim, int taps,
                      const float* weight, const float* inputs, const int* past, const float* beta, const float* alpha,
                      int rates_by_key_head, const float* bias, const float* decay, float eps, float* heads,
                      float* rates) {
    __shared__ float room[WARP];
    const int head = (int)blockIdx.x, token = (int)blockIdx.y, n_heads = (int)gridDim.x, group = n_value / n_key;
    const int column = delta_column(head, by_key_head, n_key, group, dim), keep = taps - 1;
    const bool fresh = *past == 0;
    float* out = heads + ((i64)token * n_heads + head) * dim;
    float squares = 0.0f;
    for (int i = (int)threadIdx.x; i < dim; i += (int)blockDim.x) {
        const int channel = head * dim + i;
        float sum = 0.0f;
        for (int tap = 0; tap < taps; tap++) {
            const int at = token + tap;
            float seen;
            if (at >= keep) {
                seen = projected[(i64)(at - keep) * width + column + i];
            } else {
                seen = fresh ? 0.0f : inputs[(i64)at * n_heads * dim + channel];
            }
            sum += weight[channel * taps + tap] * seen;
        }
        const float v = sum / (1.0f + expf(-sum));
        out[i] = v;
        squares += v * v;
    }
    if (head < 2 * n_key) {
        const float scale = head < n_key ? 1.0f / sqrtf((float)dim) : 1.0f;
        const float factor = scale / sqrtf(fmaxf(block_sum(squares, room) + eps, 1.17549435e-38f));
        for (int i = (int)threadIdx.x; i < dim; i += (int)blockDim.x) out[i] *= factor;
    } else if (threadIdx.x == 0) {
        const int value = head - 2 * n_key;
        const i64 at = rates_by_key_head ? 2 * ((i64)token * n_value) + value + value / group * group
                                         : (i64)token * n_value + value;
        const float x = alpha[at] + bias[value];
        const float soft = x > 20.0f ? x : log1pf(expf(x));
        float* rate = rates + 2 * ((i64)token * n_value + value);
        rate[0] = expf(decay[value] * soft);
        rate[1] = 1.0f / (1.0f + expf(-beta[at]));
    }
}

/// Keeps the inputs that the next tokens' convolution needs; a thread per channel, over the whole
/// grid.
DEVICE void delta_keep_inputs(const float* projected, int width, int by_key_head, int n, int n_key, int n_value, int dim,
                              int keep, bool fresh, float* inputs) {
    const int channels = (2 * n_key + n_value) * dim, threads = (int)(gridDim.x * gridDim.y * blockDim.x);
    const int first = (int)((blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x);
    for (int channel = first; channel < channels; channel += threads) {
        const int column = delta_column(channel / dim, by_key_head, n_key, n_value / n_key, dim) + channel % dim;
        for (int i = 0; i < keep; i++) {
            // Inputs that are not overwritten yet.
            const int at = n + i;
            float v;
            if (at >= keep) {
                v = projected[(i64)(at - keep) * width + column];
            } else {
                v = fresh ? 0.0f : inputs[(i64)at * channels + channel];
            }
            inputs[(i64)i * channels + channel] = v;
        }
    }
}

DEVICE float delta_sum(float4 v) {
    float sum = v.x + v.y + (v.z + v.w);
    for (int step = DELTA_SHARE / 2; step > 0; step /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
    return sum;
}

/// Advances some columns of a value head's matrix by `n` tokens and reads them, `out` `[tokens,
/// n_value, dim]`. Eight lanes hold a column in registers from the first token to the last.
///
/// `matrices` is `[n_value, dim, dim]`, column by column. `ROWS` is the smallest supported width
/// that is at least `dim`, a multiple of 4.
template <int ROWS>
DEVICE void delta_recur(const float* heads, const float* rates, int n, int n_key, int n_value, int dim, int in_turn,
                        bool fresh, float* matrices, float* out) {
    constexpr int fours = ROWS / 4, mine = fours / DELTA_SHARE;
    __shared__ float4 keys[DELTA_TOKENS][fours];
    __shared__ float4 queries[DELTA_TOKENS][fours];
    __shared__ float values[DELTA_TOKENS][DELTA_COLUMNS];
    __shared__ float factors[DELTA_TOKENS][2];
    const int thread = (int)threadIdx.x, share = thread % DELTA_SHARE;
    const int head = (int)blockIdx.y, first_column = (int)blockIdx.x * DELTA_COLUMNS;
    const int column = first_column + thread / DELTA_SHARE, n_heads = 2 * n_key + n_value;
    const int key_head = in_turn ? head % n_key : head / (n_value / n_key);
    const bool inside = column < dim;
    const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float4* stored = (float4*)(matrices + ((i64)head * dim + (inside ? column : 0)) * dim);
    float4 state[mine];
    for (int f = 0; f < mine; f++) {
        const int at = share + f * DELTA_SHARE;
        state[f] = inside && !fresh && 4 * at < dim ? stored[at] : zero;
    }
    for (int first = 0; first < n; first += DELTA_TOKENS) {
        const int here = n - first < DELTA_TOKENS ? n - first : DELTA_TOKENS;
        const float* rows = heads + (i64)first * n_heads * dim;
        __syncthreads();
        for (int i = thread; i < here * fours; i += DELTA_THREADS) {
            const int at = i % fours;
            const float* row = rows + (i64)(i / fours) * n_heads * dim;
            const bool there = 4 * at < dim;
            queries[i / fours][at] = there ? ((const float4*)(row + key_head * dim))[at] : zero;
            keys[i / fours][at] = there ? ((const float4*)(row + (n_key + key_head) * dim))[at] : zero;
        }
        for (int i = thread; i < here * DELTA_COLUMNS; i += DELTA_THREADS) {
            const int c = i % DELTA_COLUMNS;
            const float* row = rows + ((i64)(i / DELTA_COLUMNS) * n_heads + 2 * n_key + head) * dim;
            values[i / DELTA_COLUMNS][c] = first_column + c < dim ? row[first_column + c] : 0.0f;
        }
        for (int i = thread; i < 2 * here; i += DELTA_THREADS) {
            factors[i / 2][i % 2] = rates[2 * ((i64)(first + i / 2) * n_value + head) + i % 2];
        }
        __syncthreads();
        for (int t = 0; t < here; t++) {
            const float decay = factors[t][0], beta = factors[t][1];
            float4 seen = zero;
            for (int f = 0; f < mine; f++) {
                const float4 k = keys[t][share + f * DELTA_SHARE];
                seen.x += k.x * state[f].x;
                seen.y += k.y * state[f].y;
                seen.z += k.z * state[f].z;
                seen.w += k.w * state[f].w;
            }
            const float change = beta * (values[t][thread / DELTA_SHARE] - decay * delta_sum(seen));
            float4 read = zero;
            for (int f = 0; f < mine; f++) {
                const float4 k = keys[t][share + f * DELTA_SHARE], q = queries[t][share + f * DELTA_SHARE];
                state[f].x = decay * state[f].x + k.x * change;
                state[f].y = decay * state[f].y + k.y * change;
                state[f].z = decay * state[f].z + k.z * change;
                state[f].w = decay * state[f].w + k.w * change;
                read.x += q.x * state[f].x;
                read.y += q.y * state[f].y;
                read.z += q.z * state[f].z;
                read.w += q.w * state[f].w;
            }
            const float sum = delta_sum(read);
            if (inside && share == 0) out[((i64)(first + t) * n_value + head) * dim + column] = sum;
        }
    }
    for (int f = 0; f < mine; f++) {
        const int at = share + f * DELTA_SHARE;
        if (inside && 4 * at < dim) stored[at] = state[f];
    }
}

/// Runs `delta_recur` after `delta_convolve`, and keeps the convolution's inputs, which no block
/// reads any more. Grid: columns by `DELTA_COLUMNS`, value heads.
#define DELTA_RECUR(ROWS)                                                                                              \
    KERNEL delta_recur_##ROWS(const float* heads, const float* rates, int n, int n_key, int n_value, int dim,          \
                              int in_turn, const int* past, float* matrices, float* out, const float* projected,       \
                              int width, int by_key_head, int keep, float* inputs) {                                   \
        const bool fresh = *past == 0;                                                                                 \
        delta_recur<ROWS>(heads, rates, n, n_key, n_value, dim, in_turn, fresh, matrices, out);                        \
        delta_keep_inputs(projected, width, by_key_head, n, n_key, n_value, dim, keep, fresh, inputs);                 \
    }

DELTA_RECUR(32)
DELTA_RECUR(64)
DELTA_RECUR(128)
DELTA_RECUR(256)

/// Computes `x = x / sqrt(mean(x^2) + eps) * norm`, times `g / (1 + exp(-g))` of its gate, and the
/// quantized form if `q` is not null, with `dim` a multiple of 32. `x` is `[tokens, n_value, dim]`.
/// Gates are in rows of `width`, with `by_key_head` at `delta_column`. Grid: value heads, tokens.
KERNEL delta_gate(float* x, const float* gates, int width, int by_key_head, int n_key, int dim, const float* norm,
                  float eps, i8* q, float* scale, float* sums) {
    __shared__ float room[WARP];
    const int head = (int)blockIdx.x, n_value = (int)gridDim.x, group = n_value / n_key;
    const i64 token = blockIdx.y, first = (token * n_value + head) * dim;
    const int column = by_key_head ? head / group * (2 + 2 * group) * dim + (2 + group + head % group) * dim : head * dim;
    const float* gate = gates + token * width + column;
    x += first;
    float squares = 0.0f;
    for (int i = (int)threadIdx.x; i < dim; i += (int)blockDim.x) squares += x[i] * x[i];
    const float factor = 1.0f / sqrtf(block_sum(squares, room) / (float)dim + eps);
    // The lanes of a warp have consecutive values: a run.
    for (int i = (int)threadIdx.x; i < dim; i += (int)blockDim.x) {
        const float v = gate[i] / (1.0f + expf(-gate[i])) * (x[i] * factor * norm[i]);
        x[i] = v;
        if (q) quantize_run(v, (first + i) / 32, q, scale, sums);
    }
}
