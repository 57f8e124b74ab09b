// What gated delta nets share between their products: a short convolution, the recurrence over a
// matrix per value head, and the norm of the result.
//
// The tokens of a batch pass through a matrix one after the other inside one launch, so a batch
// gives the same bits as its tokens one by one. At position 0 the state is taken for zero, whatever
// its memory holds.
#pragma once
#include "runs.cuh"

/// Lanes per column of a matrix.
#define DELTA_SHARE 8
/// Columns per block.
#define DELTA_COLUMNS 16
/// Threads per block.
#define DELTA_THREADS (DELTA_COLUMNS * DELTA_SHARE)
/// Tokens whose queries, keys and values a block loads at once.
#define DELTA_TOKENS 16

/// Where the heads of projections lie: rows of `width` values, in which key heads are `key_step`
/// apart, and the `group` value heads of a key head begin `value_step` after those of the last one.
struct DeltaInputs {
    const float* queries;
    const float* keys;
    const float* values;
    int width, key_step, value_step, n_key, group, dim;

    /// Returns a head of the first token: of the query heads, the key heads, then the value heads.
    DEVICE const float* head(int head) const {
        if (head < n_key) return queries + head * key_step;
        if (head < 2 * n_key) return keys + (head - n_key) * key_step;
        const int value = head - 2 * n_key;
        return values + value / group * value_step + value % group * dim;
    }

    DEVICE int heads() const { return (2 + group) * n_key; }

    /// Returns the inputs from a token on.
    DEVICE DeltaInputs from(int token) const {
        const i64 skipped = (i64)token * width;
        return {queries + skipped, keys + skipped, values + skipped, width, key_step, value_step, n_key, group, dim};
    }
};

/// Convolves the head `blockIdx.x` of a token over its inputs and those of the last tokens, and
/// normalizes queries and keys to length 1, queries also divided by the root of the width: `out` is
/// `[tokens, heads, dim]`. All tokens are those of a run.
///
/// `past_inputs` is `[taps - 1, channels]`, the newest last, and `weight` `[channels, taps]`.
DEVICE void delta_convolve_head(const DeltaInputs& in, int token, int taps, const float* weight,
                                const float* past_inputs, bool fresh, float eps, float* out) {
    __shared__ float room[WARP];
    const int head = (int)blockIdx.x, n_heads = in.heads(), dim = in.dim, keep = taps - 1;
    const float* row = in.head(head);
    out += ((i64)token * n_heads + head) * dim;
    float squares = 0.0f;
    for (int i = (int)threadIdx.x; i < dim; i += (int)blockDim.x) {
        const int channel = head * dim + i;
        float sum = 0.0f;
        for (int tap = 0; tap < taps; tap++) {
            const int at = token + tap;
            float seen;
            if (at >= keep) {
                seen = row[(i64)(at - keep) * in.width + i];
            } else {
                seen = fresh ? 0.0f : past_inputs[(i64)at * n_heads * dim + channel];
            }
            sum += weight[channel * taps + tap] * seen;
        }
        const float v = sum / (1.0f + expf(-sum));
        out[i] = v;
        squares += v * v;
    }
    if (head < 2 * in.n_key) {
        const float scale = head < in.n_key ? 1.0f / sqrtf((float)dim) : 1.0f;
        const float factor = scale / sqrtf(fmaxf(block_sum(squares, room) + eps, 1.17549435e-38f));
        for (int i = (int)threadIdx.x; i < dim; i += (int)blockDim.x) out[i] *= factor;
    }
}

/// Keeps the inputs that the next tokens' convolution needs after `n` tokens; a thread per channel,
/// over all blocks of a run.
DEVICE void delta_keep_inputs(const DeltaInputs& in, int n, int keep, bool fresh, float* inputs) {
    const int channels = in.heads() * in.dim, threads = (int)(gridDim.x * gridDim.y * blockDim.x);
    const int first = (int)((blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x);
    for (int channel = first; channel < channels; channel += threads) {
        const float* column = in.head(channel / in.dim) + channel % in.dim;
        for (int i = 0; i < keep; i++) {
            // Inputs that are not overwritten yet.
            const int at = n + i;
            float v;
            if (at >= keep) {
                v = column[(i64)(at - keep) * in.width];
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

DEVICE float4 times(float4 a, float4 b) {
    return make_float4(a.x * b.x, a.y * b.y, a.z * b.z, a.w * b.w);
}

/// Advances some columns of a value head's matrix by `n` tokens and reads them, `out` `[tokens,
/// n_value, dim]`. Eight lanes hold a column in registers from the first token to the last.
///
/// `heads` is `[tokens, 2 * n_key + n_value, dim]`, and `rates` has two values per token and value
/// head: decay and strength. If `BY_CHANNEL`, each channel of a key decays by itself, by `decays`,
/// `[tokens, n_value, dim]`, and the first of the two is not read. `matrices` is `[n_value, dim,
/// dim]`, column by column. `ROWS` is the smallest supported width that is at least `dim`, a
/// multiple of 4.
template <int ROWS, bool BY_CHANNEL>
DEVICE void delta_recur(const float* heads, const float* rates, const float* decays, int n, int n_key, int n_value,
                        int dim, int in_turn, bool fresh, float* matrices, float* out) {
    constexpr int fours = ROWS / 4, mine = fours / DELTA_SHARE;
    // Rows of decays take a third of what a block may have.
    constexpr int tokens = BY_CHANNEL && ROWS > 128 ? DELTA_TOKENS / 2 : DELTA_TOKENS;
    __shared__ float4 keys[tokens][fours];
    __shared__ float4 queries[tokens][fours];
    __shared__ float4 channel_decays[BY_CHANNEL ? tokens : 1][BY_CHANNEL ? fours : 1];
    __shared__ float values[tokens][DELTA_COLUMNS];
    __shared__ float factors[tokens][2];
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
    for (int first = 0; first < n; first += tokens) {
        const int here = n - first < tokens ? n - first : tokens;
        const float* rows = heads + (i64)first * n_heads * dim;
        __syncthreads();
        for (int i = thread; i < here * fours; i += DELTA_THREADS) {
            const int t = i / fours, at = i % fours;
            const float* row = rows + (i64)t * n_heads * dim;
            const bool there = 4 * at < dim;
            queries[t][at] = there ? ((const float4*)(row + key_head * dim))[at] : zero;
            keys[t][at] = there ? ((const float4*)(row + (n_key + key_head) * dim))[at] : zero;
            if (BY_CHANNEL) {
                const float4* decay = (const float4*)(decays + ((i64)(first + t) * n_value + head) * dim);
                channel_decays[BY_CHANNEL ? t : 0][BY_CHANNEL ? at : 0] = there ? decay[at] : zero;
            }
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
            const float decay = BY_CHANNEL ? 1.0f : factors[t][0], beta = factors[t][1];
            float4 seen = zero;
            for (int f = 0; f < mine; f++) {
                const int at = share + f * DELTA_SHARE;
                if (BY_CHANNEL) state[f] = times(state[f], channel_decays[BY_CHANNEL ? t : 0][BY_CHANNEL ? at : 0]);
                const float4 k = keys[t][at];
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
