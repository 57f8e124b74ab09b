// Mamba-2 between its products: a short convolution, the recurrence over a matrix per head, and the
// gated norm of the result.
//
// The tokens of a batch pass through a matrix one after the other inside one launch, so a batch
// gives the same bits as its tokens one by one. At position 0 the state is taken for zero, whatever
// its memory holds.
//
// A row of projections has the gates of all heads, the channels, and a step per head. Channels are
// the inputs of all heads, then `B` and then `C` of each group of heads.
#include "runs.cuh"

/// Lanes per row of a matrix.
#define MAMBA_SHARE 8
/// Rows of a matrix per block.
#define MAMBA_ROWS 16
/// Threads per block of the recurrence.
#define MAMBA_THREADS (MAMBA_ROWS * MAMBA_SHARE)
/// Tokens whose inputs, `B` and `C` a block loads at once.
#define MAMBA_TOKENS 16

/// Returns the input of a channel `at` tokens after the first that is kept: a kept one, or that of a
/// token at hand. `rows` are the channels of projections, `width` values apart.
DEVICE float mamba_seen(const float* rows, int width, int channels, int keep, const float* inputs, bool fresh, int at,
                        int channel) {
    if (at >= keep) return rows[(i64)(at - keep) * width + channel];
    return fresh ? 0.0f : inputs[(i64)at * channels + channel];
}

/// Convolves the channels of a token over their inputs and those of the last tokens: `convolved` is
/// `[tokens, channels]`. Also computes the decay and the step of each head to `rates`, `[tokens,
/// n_head, 2]`.
///
/// `inputs` is `[taps - 1, channels]`, the newest last, `weight` `[channels, taps]`, and `bias`,
/// which may be null, `[channels]`; inputs are `each` values apart by state. Grid: channels and heads by
/// threads, tokens.
KERNEL mamba_convolve(const float* projected, int inner, int channels, int n_head, int taps, const float* weight,
                      const float* bias, const float* inputs, int each, TEXT_RUNS, const float* dt_bias,
                      const float* decay, float* convolved, float* rates) {
    TAKE_TEXT_RUNS;
    const int at = (int)(blockIdx.x * blockDim.x + threadIdx.x), token = (int)blockIdx.y;
    const int width = inner + channels + n_head, head = at - channels, at_run = run_of(runs, token);
    if (at_run < 0) return;
    const float* rows = projected + inner;
    if (at < channels) {
        const TextRun run(runs, at_run);
        const float* of_run = rows + (i64)run.begin * width;
        const float* kept = inputs + (i64)run.state * each;
        float sum = bias ? bias[at] : 0.0f;
        for (int tap = 0; tap < taps; tap++) {
            const int seen = token - run.begin + tap;
            sum += weight[at * taps + tap] * mamba_seen(of_run, width, channels, taps - 1, kept, run.fresh, seen, at);
        }
        convolved[(i64)token * channels + at] = silu(sum);
    } else if (head < n_head) {
        // Steps follow the channels.
        const float x = rows[(i64)token * width + at] + dt_bias[head];
        const float step = softplus(x);
        float* rate = rates + 2 * ((i64)token * n_head + head);
        rate[0] = expf(step * decay[head]);
        rate[1] = step;
    }
}

/// Keeps the inputs that the next tokens' convolution needs; a thread per channel, over all blocks of a
/// run.
DEVICE void mamba_keep_inputs(const float* rows, int width, int channels, int n, int keep, bool fresh, float* inputs) {
    const int threads = (int)(gridDim.x * gridDim.y * blockDim.x);
    const int first = (int)((blockIdx.y * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x);
    for (int channel = first; channel < channels; channel += threads) {
        for (int i = 0; i < keep; i++) {
            // What it sees is not overwritten yet.
            inputs[(i64)i * channels + channel] = mamba_seen(rows, width, channels, keep, inputs, fresh, n + i, channel);
        }
    }
}

/// Advances some rows of a head's matrix by `n` tokens and reads them, `out` `[tokens, n_head, dim]`.
/// Eight lanes hold a row in registers from the first token to the last.
///
/// `matrices` is `[n_head, dim, state_dim]`. `WIDTH` is the smallest supported width that is at least
/// `state_dim`, a multiple of 4.
template <int WIDTH>
DEVICE void mamba_recur(const float* convolved, const float* rates, int n, int n_head, int dim, int n_group,
                        int state_dim, const float* skip, bool fresh, float* matrices, float* out) {
    constexpr int fours = WIDTH / 4, mine = fours / MAMBA_SHARE;
    __shared__ float4 writers[MAMBA_TOKENS][fours];
    __shared__ float4 readers[MAMBA_TOKENS][fours];
    __shared__ float values[MAMBA_TOKENS][MAMBA_ROWS];
    __shared__ float factors[MAMBA_TOKENS][2];
    const int thread = (int)threadIdx.x, share = thread % MAMBA_SHARE, own = thread / MAMBA_SHARE;
    const int head = (int)blockIdx.y, first_row = (int)blockIdx.x * MAMBA_ROWS, row = first_row + own;
    const int inner = n_head * dim, of_groups = n_group * state_dim, channels = inner + 2 * of_groups;
    const int own_group = inner + head / (n_head / n_group) * state_dim;
    const bool inside = row < dim;
    const float4 zero = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    const float by = skip[head];
    float4* stored = (float4*)(matrices + ((i64)head * dim + (inside ? row : 0)) * state_dim);
    float4 state[mine];
    for (int f = 0; f < mine; f++) {
        const int at = share + f * MAMBA_SHARE;
        state[f] = inside && !fresh && 4 * at < state_dim ? stored[at] : zero;
    }
    for (int first = 0; first < n; first += MAMBA_TOKENS) {
        const int here = n - first < MAMBA_TOKENS ? n - first : MAMBA_TOKENS;
        const float* rows = convolved + (i64)first * channels;
        __syncthreads();
        for (int i = thread; i < here * WIDTH; i += MAMBA_THREADS) {
            const int t = i / WIDTH, at = i % WIDTH;
            const float* from = rows + (i64)t * channels + own_group;
            const bool there = at < state_dim;
            ((float*)writers[t])[at] = there ? from[at] : 0.0f;
            ((float*)readers[t])[at] = there ? from[of_groups + at] : 0.0f;
        }
        for (int i = thread; i < here * MAMBA_ROWS; i += MAMBA_THREADS) {
            const int t = i / MAMBA_ROWS, at = first_row + i % MAMBA_ROWS;
            values[t][i % MAMBA_ROWS] = at < dim ? rows[(i64)t * channels + head * dim + at] : 0.0f;
        }
        for (int i = thread; i < 2 * here; i += MAMBA_THREADS) {
            factors[i / 2][i % 2] = rates[2 * ((i64)(first + i / 2) * n_head + head) + i % 2];
        }
        __syncthreads();
        for (int t = 0; t < here; t++) {
            const float decay = factors[t][0], value = values[t][own], change = factors[t][1] * value;
            float4 read = zero;
            for (int f = 0; f < mine; f++) {
                const float4 b = writers[t][share + f * MAMBA_SHARE], c = readers[t][share + f * MAMBA_SHARE];
                state[f].x = decay * state[f].x + b.x * change;
                state[f].y = decay * state[f].y + b.y * change;
                state[f].z = decay * state[f].z + b.z * change;
                state[f].w = decay * state[f].w + b.w * change;
                read.x += c.x * state[f].x;
                read.y += c.y * state[f].y;
                read.z += c.z * state[f].z;
                read.w += c.w * state[f].w;
            }
            float sum = read.x + read.y + (read.z + read.w);
            for (int step = MAMBA_SHARE / 2; step > 0; step /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
            if (inside && share == 0) out[((i64)(first + t) * n_head + head) * dim + row] = sum + by * value;
        }
    }
    for (int f = 0; f < mine; f++) {
        const int at = share + f * MAMBA_SHARE;
        if (inside && 4 * at < state_dim) stored[at] = state[f];
    }
}

/// Runs `mamba_recur` after `mamba_convolve`, and keeps the convolution's inputs, which no block
/// reads any more. States are `each` and `each_inputs` values apart. Grid: rows of a head by
/// `MAMBA_ROWS`, heads, runs.
#define MAMBA_RECUR(WIDTH)                                                                                             \
    KERNEL mamba_recur_##WIDTH(const float* convolved, const float* rates, int n_head, int dim, int n_group,           \
                               int state_dim, const float* skip, TEXT_RUNS, float* matrices, int each, float* out,     \
                               const float* projected, int keep, float* inputs, int each_inputs) {                     \
        TAKE_TEXT_RUNS;                                                                                                \
        const TextRun run(runs, (int)blockIdx.z);                                                                      \
        const int inner = n_head * dim, channels = inner + 2 * n_group * state_dim, width = inner + channels + n_head; \
        const i64 begin = run.begin;                                                                                   \
        mamba_recur<WIDTH>(convolved + begin * channels, rates + begin * 2 * n_head, run.n, n_head, dim, n_group,      \
                           state_dim, skip, run.fresh, matrices + (i64)run.state * each, out + begin * inner);         \
        mamba_keep_inputs(projected + begin * width + inner, width, channels, run.n, keep, run.fresh,                  \
                          inputs + (i64)run.state * each_inputs);                                                      \
    }

MAMBA_RECUR(32)
MAMBA_RECUR(64)
MAMBA_RECUR(128)
MAMBA_RECUR(256)

/// Computes `x = x * g / (1 + exp(-g))` of its gates, then `x / sqrt(mean(x^2) + eps) * norm` of each
/// group, and the quantized form if `q` is not null, with `group_width` a multiple of 32. `x` is
/// `[tokens, groups, group_width]`, `norm` `[groups, group_width]`. Gates begin the rows of
/// `projected`, which are `width` values apart. Grid: groups, tokens.
KERNEL mamba_gate(float* x, const float* projected, int width, int group_width, const float* norm, float eps, i8* q,
                  float* scale, float* sums) {
    __shared__ float room[WARP];
    const int of_group = (int)blockIdx.x * group_width;
    const i64 token = blockIdx.y, first = token * gridDim.x * group_width + of_group;
    const float* gates = projected + token * width + of_group;
    x += first;
    norm += of_group;
    float squares = 0.0f;
    for (int i = (int)threadIdx.x; i < group_width; i += (int)blockDim.x) {
        const float v = x[i] * silu(gates[i]);
        x[i] = v;
        squares += v * v;
    }
    const float factor = 1.0f / sqrtf(block_sum(squares, room) / (float)group_width + eps);
    // The lanes of a warp have consecutive values: a run.
    for (int i = (int)threadIdx.x; i < group_width; i += (int)blockDim.x) {
        const float v = x[i] * factor * norm[i];
        x[i] = v;
        if (q) quantize_run(v, (first + i) / 32, q, scale, sums);
    }
}
