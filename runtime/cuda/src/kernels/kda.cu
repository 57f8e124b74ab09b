// Kimi delta attention between its products: a gated delta net whose state decays by itself in each
// channel of a key. All heads have keys of their own. The norm and the gate of the result are
// `delta_gate`.
#include "delta.cuh"

/// Convolves heads with `delta_convolve_head`. Makes decays of their inputs, `decays` `[tokens,
/// n_head, dim]`, in place, and strengths of `beta`, `[tokens, n_head]`, to `rates`, `[tokens,
/// n_head, 2]`, whose first values stay as they are.
///
/// With a negative `bound` a decay is `exp(bound / (1 + e^(-a f)))`, otherwise `exp(-a ln(1 +
/// e^f))`, where `f` is the input with its `bias` `[n_head, dim]`, and `a` is `sign *
/// steepness[head]`. Inputs of past tokens are `each` values apart by state. Grid: heads, tokens.
KERNEL kda_convolve(const float* queries, const float* keys, const float* values, int n_head, int dim, int taps,
                    const float* weight, const float* inputs, int each, TEXT_RUNS, const float* beta, const float* bias,
                    const float* steepness, float sign, float bound, float eps, float* heads, float* rates,
                    float* decays) {
    TAKE_TEXT_RUNS;
    const int token = (int)blockIdx.y, at_run = run_of(runs, token);
    if (at_run < 0) return;
    const TextRun run(runs, at_run);
    const DeltaInputs all = {queries, keys, values, n_head * dim, dim, dim, n_head, 1, dim};
    delta_convolve_head(all.from(run.begin), token - run.begin, taps, weight, inputs + (i64)run.state * each,
                        run.fresh, eps, heads + (i64)run.begin * all.heads() * dim);
    const int head = (int)blockIdx.x - 2 * n_head;
    if (head < 0) return;
    const i64 at = (i64)token * n_head + head;
    const float a = sign * steepness[head];
    for (int i = (int)threadIdx.x; i < dim; i += (int)blockDim.x) {
        const float f = decays[at * dim + i] + bias[head * dim + i];
        decays[at * dim + i] = expf(bound < 0.0f ? bound / (1.0f + expf(-a * f)) : -a * softplus(f));
    }
    if (threadIdx.x == 0) rates[2 * at + 1] = 1.0f / (1.0f + expf(-beta[at]));
}

/// Runs `delta_recur` after `kda_convolve`, and keeps the convolution's inputs, which no block reads
/// any more. States are `each` and `each_inputs` values apart. Grid: columns by `DELTA_COLUMNS`, heads,
/// runs.
#define KDA_RECUR(ROWS)                                                                                                \
    KERNEL kda_recur_##ROWS(const float* heads, const float* rates, const float* decays, int n_head, int dim,          \
                            TEXT_RUNS, float* matrices, int each, float* out, const float* queries,                    \
                            const float* keys, const float* values, int keep, float* inputs, int each_inputs) {        \
        TAKE_TEXT_RUNS;                                                                                                \
        const TextRun run(runs, (int)blockIdx.z);                                                                      \
        const i64 rows = (i64)run.begin * n_head;                                                                      \
        const DeltaInputs all = {queries, keys, values, n_head * dim, dim, dim, n_head, 1, dim};                       \
        delta_recur<ROWS, true>(heads + 3 * rows * dim, rates + 2 * rows, decays + rows * dim, run.n, n_head, n_head,  \
                                dim, 0, run.fresh, matrices + (i64)run.state * each, out + rows * dim);                \
        delta_keep_inputs(all.from(run.begin), run.n, keep, run.fresh, inputs + (i64)run.state * each_inputs);         \
    }

KDA_RECUR(32)
KDA_RECUR(64)
KDA_RECUR(128)
KDA_RECUR(256)
