// What the n-grams that end with a token add to its streams: gates by products of keys and streams, and a
// causal convolution of the gated values over the last tokens.
//
// A channel's sum runs over its taps in order, so a batch gives the same bits as its tokens one by one. At
// position 0 the inputs before are taken for zero, whatever their memory holds.
#include "runs.cuh"

/// Smallest magnitude under the root of a gate.
#define MIN_SCORE 1e-6f

/// Gates the values of each stream, `gated[row, stream] = gate * values[row]`, by the product of its key and
/// the stream, both under a norm. Leaves the convolution's inputs in place of the keys: gated values under a
/// norm. Norms are `[n, width]`. Grid: rows times streams.
KERNEL ngram_gate(float* keys, const float* x, const float* values, const float* key_norm, const float* query_norm,
                  const float* conv_norm, int n, int width, float eps, float* gated) {
    __shared__ float room[WARP];
    const i64 first = (i64)blockIdx.x * width, of_stream = (i64)(blockIdx.x % n) * width;
    keys += first;
    x += first;
    gated += first;
    values += (i64)(blockIdx.x / n) * width;
    float of_keys = 0.0f, of_streams = 0.0f, dot = 0.0f;
    for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) {
        of_keys += keys[i] * keys[i];
        of_streams += x[i] * x[i];
        dot += keys[i] * key_norm[of_stream + i] * (x[i] * query_norm[of_stream + i]);
    }
    const float key_factor = 1.0f / sqrtf(block_sum(of_keys, room) / (float)width + eps);
    const float factor = 1.0f / sqrtf(block_sum(of_streams, room) / (float)width + eps);
    const float score = block_sum(dot, room) * key_factor * factor / sqrtf((float)width);
    const float root = sqrtf(fmaxf(fabsf(score), MIN_SCORE));
    const float gate = 1.0f / (1.0f + expf(score == 0.0f ? 0.0f : score < 0.0f ? root : -root));
    float squares = 0.0f;
    for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) {
        const float v = gate * values[i];
        gated[i] = v;
        squares += v * v;
    }
    const float of_gated = 1.0f / sqrtf(block_sum(squares, room) / (float)width + eps);
    for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) {
        keys[i] = gated[i] * of_gated * conv_norm[of_stream + i];
    }
}

/// Returns the input of a channel `at` tokens after the first that is kept: a kept one, or that of a token at
/// hand.
DEVICE float ngram_seen(const float* inputs, int channels, int keep, const float* kept, bool fresh, int at,
                        int channel) {
    if (at >= keep) return inputs[(i64)(at - keep) * channels + channel];
    return fresh ? 0.0f : kept[(i64)at * channels + channel];
}

/// Adds gated values and their convolution to `x`, all `[tokens, channels]`. `weight` is `[channels, taps]`,
/// oldest tap first, taps are `dilation` tokens apart, and `kept` is `[(taps - 1) * dilation, channels]`, the
/// newest last, for each state. Grid: channels by threads, tokens.
KERNEL ngram_convolve(const float* inputs, const float* gated, int channels, int taps, int dilation,
                      const float* weight, const float* kept, TEXT_RUNS, float* x) {
    TAKE_TEXT_RUNS;
    const int channel = (int)(blockIdx.x * blockDim.x + threadIdx.x), token = (int)blockIdx.y;
    const int at_run = run_of(runs, token);
    if (channel >= channels || at_run < 0) return;
    const TextRun run(runs, at_run);
    const int keep = (taps - 1) * dilation, first = token - run.begin;
    const float* rows = inputs + (i64)run.begin * channels;
    kept += (i64)run.state * keep * channels;
    const i64 at = (i64)token * channels + channel;
    float sum = 0.0f;
    for (int tap = 0; tap < taps; tap++) {
        const float seen = ngram_seen(rows, channels, keep, kept, run.fresh, first + tap * dilation, channel);
        sum += weight[(i64)channel * taps + tap] * seen;
    }
    x[at] += gated[at] + sum / (1.0f + expf(-sum));
}

/// Keeps the inputs that the tokens after these need. Grid: channels by threads, runs.
KERNEL ngram_keep(const float* inputs, int channels, int keep, TEXT_RUNS, float* kept) {
    TAKE_TEXT_RUNS;
    const int channel = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (channel >= channels) return;
    const TextRun run(runs, (int)blockIdx.y);
    const float* rows = inputs + (i64)run.begin * channels;
    kept += (i64)run.state * keep * channels;
    for (int i = 0; i < keep; i++) {
        // What it sees is not overwritten yet.
        kept[(i64)i * channels + channel] = ngram_seen(rows, channels, keep, kept, run.fresh, run.n + i, channel);
    }
}
