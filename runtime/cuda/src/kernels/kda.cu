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
/// steepness[head]`. Grid: heads, tokens.
KERNEL kda_convolve(const float* queries, const float* keys, const float* values, int n_head, int dim, int taps,
                    const float* weight, const float* inputs, const int* past, const float* beta, const float* bias,
                    const float* steepness, float sign, float bound, float eps, float* heads, float* rates,
                    float* decays) {
    const DeltaInputs in = {queries, keys, values, n_head * dim, dim, dim, n_head, 1, dim};
    delta_convolve_head(in, taps, weight, inputs, *past == 0, eps, heads);
    const int head = (int)blockIdx.x - 2 * n_head;
    if (head < 0) return;
    const i64 at = (i64)blockIdx.y * n_head + head;
    const float a = sign * steepness[head];
    for (int i = (int)threadIdx.x; i < dim; i += (int)blockDim.x) {
        const float f = decays[at * dim + i] + bias[head * dim + i];
        decays[at * dim + i] = expf(bound < 0.0f ? bound / (1.0f + expf(-a * f)) : -a * softplus(f));
    }
    if (threadIdx.x == 0) rates[2 * at + 1] = 1.0f / (1.0f + expf(-beta[at]));
}

/// Runs `delta_recur` after `kda_convolve`, and keeps the convolution's inputs, which no block reads
/// any more. Grid: columns by `DELTA_COLUMNS`, heads.
#define KDA_RECUR(ROWS)                                                                                                \
    KERNEL kda_recur_##ROWS(const float* heads, const float* rates, const float* decays, int n, int n_head, int dim,   \
                            const int* past, float* matrices, float* out, const float* queries, const float* keys,     \
                            const float* values, int keep, float* inputs) {                                            \
        const bool fresh = *past == 0;                                                                                 \
        const DeltaInputs in = {queries, keys, values, n_head * dim, dim, dim, n_head, 1, dim};                        \
        delta_recur<ROWS, true>(heads, rates, decays, n, n_head, n_head, dim, 0, fresh, matrices, out);                \
        delta_keep_inputs(in, n, keep, fresh, inputs);                                                                 \
    }

KDA_RECUR(32)
KDA_RECUR(64)
KDA_RECUR(128)
KDA_RECUR(256)
