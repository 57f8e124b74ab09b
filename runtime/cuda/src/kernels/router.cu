// The router: from logits to the chosen experts and their weights, a block per token.
#include "base.cuh"

/// Most experts per layer; the program has the same constant.
#define MAX_EXPERTS 1024
#define MAX_GROUPS 128
#define THREADS 128
/// Smallest sum that chosen weights are divided by.
#define MIN_SUM 6.1035156e-5f

/// Functions from logits to scores, as numbered by the program.
#define SOFTMAX 0
#define SIGMOID 1
#define SQRT_SOFTPLUS 2
#define SOFTMAX_CHOSEN 3
#define SIGMOID_CHOSEN 4

/// Returns a score for comparisons: NaN is the smallest.
DEVICE float key_of(float score) {
    return score != score ? minus_infinity() : score;
}

/// Whether a candidate goes before another: the larger score, then the lower index.
DEVICE bool before(float a, int at_a, float b, int at_b) {
    return a > b || (a == b && at_a < at_b);
}

/// Keeps the best `n_kept` groups, and excludes the experts of the others. A group's score is the
/// sum of its two best experts.
DEVICE void keep_best_groups(float* scores, int n_expert, int n_group, int n_kept, float* best) {
    const int size = n_expert / n_group;
    for (int g = (int)threadIdx.x; g < n_group; g += THREADS) {
        float first = minus_infinity(), second = minus_infinity();
        for (int i = g * size; i < (g + 1) * size; i++) {
            if (scores[i] > first) {
                second = first;
                first = scores[i];
            } else if (scores[i] > second) {
                second = scores[i];
            }
        }
        best[g] = first + second;
    }
    __syncthreads();
    for (int g = (int)threadIdx.x; g < n_group; g += THREADS) {
        int rank = 0;
        for (int other = 0; other < n_group; other++) rank += before(best[other], other, best[g], g) ? 1 : 0;
        if (rank >= n_kept) {
            for (int i = g * size; i < (g + 1) * size; i++) scores[i] = minus_infinity();
        }
    }
    __syncthreads();
}

/// Chooses `n_used` of `n_expert` experts per token, largest score first. `bias`, which may be
/// null, is added for the choice only. Weights are multiplied by `factor`, and by that of their expert
/// in `factors`, which may be null. `n_group` of 0 or 1 means no groups. If `table`, `[n_ids, n_used]`,
/// is not null, a token's experts are those of its row there, that of number `ids[token]`. Grid:
/// tokens.
KERNEL route(const float* logits, const float* bias, const float* factors, int n_expert, int n_used, int gating,
             int n_group, int n_kept, int normalize, float factor, const int* table, const int* ids, int n_ids,
             int* experts, float* weights) {
    __shared__ float probs[MAX_EXPERTS];
    __shared__ float scores[MAX_EXPERTS];
    __shared__ float best[MAX_GROUPS];
    __shared__ float room[WARP];
    __shared__ int places[WARP];
    __shared__ bool taken[MAX_EXPERTS];
    const int thread = (int)threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    logits += (i64)blockIdx.x * n_expert;
    experts += (i64)blockIdx.x * n_used;
    weights += (i64)blockIdx.x * n_used;
    float most = minus_infinity();
    for (int i = thread; i < n_expert; i += THREADS) most = fmaxf(most, logits[i]);
    most = block_max(most, room);
    float sum = 0.0f;
    for (int i = thread; i < n_expert; i += THREADS) {
        const float l = logits[i];
        float p = l;
        if (gating == SOFTMAX) p = expf(l - most);
        if (gating == SIGMOID) p = 1.0f / (1.0f + expf(-l));
        if (gating == SQRT_SOFTPLUS) p = sqrtf(softplus(l));
        probs[i] = p;
        sum += p;
    }
    sum = block_sum(sum, room);
    for (int i = thread; i < n_expert; i += THREADS) {
        if (gating == SOFTMAX) probs[i] /= sum;
        scores[i] = bias ? probs[i] + bias[i] : probs[i];
        taken[i] = false;
    }
    __syncthreads();
    if (table) {
        // Nothing outside of the table and the layer's experts is read, whatever the ids are.
        const int id = ids[blockIdx.x];
        table += (i64)((u32)id < (u32)n_ids ? id : 0) * n_used;
        for (int k = thread; k < n_used; k += THREADS) {
            const int at = (u32)table[k] < (u32)n_expert ? table[k] : 0;
            experts[k] = at;
            weights[k] = probs[at];
        }
        __syncthreads();
    } else if (n_group > 1) {
        keep_best_groups(scores, n_expert, n_group, n_kept, best);
    }
    for (int k = table ? n_used : 0; k < n_used; k++) {
        float score = minus_infinity();
        int at = n_expert;
        for (int i = thread; i < n_expert; i += THREADS) {
            const float s = key_of(scores[i]);
            if (!taken[i] && before(s, i, score, at)) {
                score = s;
                at = i;
            }
        }
        for (int step = WARP / 2; step > 0; step /= 2) {
            const float other = __shfl_xor_sync(ALL_LANES, score, step);
            const int other_at = __shfl_xor_sync(ALL_LANES, at, step);
            if (before(other, other_at, score, at)) {
                score = other;
                at = other_at;
            }
        }
        if (lane == 0) {
            room[warp] = score;
            places[warp] = at;
        }
        __syncthreads();
        if (thread == 0) {
            for (int w = 1; w < THREADS / WARP; w++) {
                if (before(room[w], places[w], score, at)) {
                    score = room[w];
                    at = places[w];
                }
            }
            experts[k] = at;
            weights[k] = probs[at];
            taken[at] = true;
        }
        __syncthreads();
    }
    // Summed in order by one thread, as on the CPU.
    if (thread == 0) {
        if (gating == SOFTMAX_CHOSEN) {
            float largest = minus_infinity(), total = 0.0f;
            for (int k = 0; k < n_used; k++) largest = fmaxf(largest, weights[k]);
            for (int k = 0; k < n_used; k++) {
                weights[k] = expf(weights[k] - largest);
                total += weights[k];
            }
            for (int k = 0; k < n_used; k++) weights[k] /= total;
        }
        if (gating == SIGMOID_CHOSEN) {
            for (int k = 0; k < n_used; k++) weights[k] = 1.0f / (1.0f + expf(-weights[k]));
        }
        if (normalize) {
            float total = 0.0f;
            for (int k = 0; k < n_used; k++) total += weights[k];
            total = fmaxf(total, MIN_SUM);
            for (int k = 0; k < n_used; k++) weights[k] /= total;
        }
        for (int k = 0; k < n_used; k++) weights[k] *= factor;
        if (factors) {
            for (int k = 0; k < n_used; k++) weights[k] *= factors[experts[k]];
        }
    }
}
