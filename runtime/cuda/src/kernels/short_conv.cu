// The gated short convolution between its products: with the thirds `b`, `c`, `x` of a row of
// projections, each channel of `b * x` is convolved over the last tokens, and multiplied by `c`.
//
// A channel's sum runs over its taps in order, so a batch gives the same bits as its tokens one by
// one. At position 0 the inputs before are taken for zero, whatever their memory holds.
#include "runs.cuh"

/// Returns `b * x` of a channel.
DEVICE float conv_input(const float* projected, int channels, i64 token, int channel) {
    const float* row = projected + 3 * token * channels + channel;
    return row[0] * row[2 * channels];
}

/// Returns the input of a channel `at` tokens after the first that is kept: a kept one, or that of a
/// token at hand.
DEVICE float conv_seen(const float* projected, int channels, int keep, const float* inputs, bool fresh, int at,
                       int channel) {
    if (at >= keep) return conv_input(projected, channels, at - keep, channel);
    return fresh ? 0.0f : inputs[(i64)at * channels + channel];
}

/// Computes `out`, `[tokens, channels]`. `projected` is `[tokens, 3 * channels]`, `weight`
/// `[channels, taps]`, oldest tap first, and `inputs` `[taps - 1, channels]`, the newest last, for each
/// state. Grid: channels by threads, tokens.
KERNEL short_conv(const float* projected, int channels, int taps, const float* weight, const float* inputs, TEXT_RUNS,
                  float* out) {
    TAKE_TEXT_RUNS;
    const int channel = (int)(blockIdx.x * blockDim.x + threadIdx.x), token = (int)blockIdx.y, keep = taps - 1;
    const int at_run = run_of(runs, token);
    if (channel >= channels || at_run < 0) return;
    const TextRun run(runs, at_run);
    const float* rows = projected + 3 * (i64)run.begin * channels;
    const float* kept = inputs + (i64)run.state * keep * channels;
    float sum = 0.0f;
    for (int tap = 0; tap < taps; tap++) {
        const float seen = conv_seen(rows, channels, keep, kept, run.fresh, token - run.begin + tap, channel);
        sum += weight[channel * taps + tap] * seen;
    }
    out[(i64)token * channels + channel] = projected[(3 * (i64)token + 1) * channels + channel] * sum;
}

/// Keeps the inputs that the tokens after these need. Grid: channels by threads, runs.
KERNEL short_conv_keep(const float* projected, int channels, int keep, TEXT_RUNS, float* inputs) {
    TAKE_TEXT_RUNS;
    const int channel = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (channel >= channels) return;
    const TextRun run(runs, (int)blockIdx.y);
    const float* rows = projected + 3 * (i64)run.begin * channels;
    inputs += (i64)run.state * keep * channels;
    for (int i = 0; i < keep; i++) {
        // What it sees is not overwritten yet.
        inputs[(i64)i * channels + channel] = conv_seen(rows, channels, keep, inputs, run.fresh, run.n + i, channel);
    }
}
