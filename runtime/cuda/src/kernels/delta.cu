// The gated delta net between its products.
#include "delta.cuh"

/// Convolves heads with `delta_convolve_head`, and computes the decay and strength of each value
/// head to `rates`, `[tokens, n_value, 2]`.
///
/// `beta` and `alpha` are `[tokens, n_value]`; with `rates_by_key_head` rows are twice as long and
/// grouped by key head. Inputs of past tokens are `each` values apart by state. Grid: heads, tokens.
KERNEL delta_convolve(const float* queries, const float* keys, const float* values, int width, int key_step,
                      int value_step, int n_key, int n_value, int dim, int taps, const float* weight,
                      const float* inputs, int each, TEXT_RUNS, const float* beta, const float* alpha,
                      int rates_by_key_head, const float* bias, const float* decay, float eps, float* heads,
                      float* rates) {
    TAKE_TEXT_RUNS;
    const i64 token = blockIdx.y;
    const int at_run = run_of(runs, (int)token);
    if (at_run < 0) return;
    const TextRun run(runs, at_run);
    const DeltaInputs all = {queries, keys, values, width, key_step, value_step, n_key, n_value / n_key, dim};
    const DeltaInputs in = all.from(run.begin);
    delta_convolve_head(in, (int)token - run.begin, taps, weight, inputs + (i64)run.state * each, run.fresh, eps,
                        heads + (i64)run.begin * in.heads() * dim);
    const int value = (int)blockIdx.x - 2 * n_key;
    if (value >= 0 && threadIdx.x == 0) {
        const i64 at = rates_by_key_head ? 2 * (token * n_value) + value + value / in.group * in.group
                                         : token * n_value + value;
        float* rate = rates + 2 * (token * n_value + value);
        rate[0] = expf(decay[value] * softplus(alpha[at] + bias[value]));
        rate[1] = 1.0f / (1.0f + expf(-beta[at]));
    }
}

/// Runs `delta_recur` after `delta_convolve`, and keeps the convolution's inputs, which no block
/// reads any more. States are `each` and `each_inputs` values apart. Grid: columns by
/// `DELTA_COLUMNS`, value heads, runs.
#define DELTA_RECUR(ROWS)                                                                                              \
    KERNEL delta_recur_##ROWS(const float* heads, const float* rates, int n_key, int n_value, int dim, int in_turn,    \
                              TEXT_RUNS, float* matrices, int each, float* out, const float* queries,                  \
                              const float* keys, const float* values, int width, int key_step, int value_step,         \
                              int keep, float* inputs, int each_inputs) {                                              \
        TAKE_TEXT_RUNS;                                                                                                \
        const TextRun run(runs, (int)blockIdx.z);                                                                      \
        const i64 begin = run.begin;                                                                                   \
        const DeltaInputs all = {queries, keys, values, width, key_step, value_step, n_key, n_value / n_key, dim};     \
        delta_recur<ROWS, false>(heads + begin * all.heads() * dim, rates + begin * 2 * n_value, nullptr, run.n,       \
                                 n_key, n_value, dim, in_turn, run.fresh, matrices + (i64)run.state * each,            \
                                 out + begin * n_value * dim);                                                         \
        delta_keep_inputs(all.from(run.begin), run.n, keep, run.fresh, inputs + (i64)run.state * each_inputs);         \
    }

DELTA_RECUR(32)
DELTA_RECUR(64)
DELTA_RECUR(128)
DELTA_RECUR(256)

/// Computes `x = x / sqrt(mean(x^2) + eps) * norm` times the SiLU of its gate, or with `sigmoid`
/// the sigmoid of it, and the quantized form if `q` is not null, with `dim` a multiple of 32. `x`
/// is `[tokens, n_value, dim]`. Gates are in rows of `width`, those of a key head's `group` value
/// heads `step` after those of the last one. Grid: value heads, tokens.
KERNEL delta_gate(float* x, const float* gates, int width, int step, int group, int dim, int sigmoid,
                  const float* norm, float eps, i8* q, float* scale, float* sums) {
    __shared__ float room[WARP];
    const int head = (int)blockIdx.x, n_value = (int)gridDim.x;
    const i64 token = blockIdx.y, first = (token * n_value + head) * dim;
    const float* gate = gates + token * width + head / group * step + head % group * dim;
    x += first;
    float squares = 0.0f;
    for (int i = (int)threadIdx.x; i < dim; i += (int)blockDim.x) squares += x[i] * x[i];
    const float factor = 1.0f / sqrtf(block_sum(squares, room) / (float)dim + eps);
    // The lanes of a warp have consecutive values: a run.
    for (int i = (int)threadIdx.x; i < dim; i += (int)blockDim.x) {
        const float open = (sigmoid ? 1.0f : gate[i]) / (1.0f + expf(-gate[i]));
        const float v = open * (x[i] * factor * norm[i]);
        x[i] = v;
        if (q) quantize_run(v, (first + i) / 32, q, scale, sums);
    }
}
