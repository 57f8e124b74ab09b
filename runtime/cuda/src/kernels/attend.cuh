// The share of some heads in a chunk of positions of the KV cache, for one token: neighbors, or
// positions that were chosen. A query's chunks are combined in their order by `join_chunks`.
#pragma once
#include "rows.cuh"

/// Positions per chunk.
#define CHUNK 256
/// Query heads per block, all of one head of keys and values.
#define HEADS 8
/// Threads per block.
#define THREADS 128
/// Lanes per position while scores are computed.
#define SHARE 8

/// Shared memory of a block.
struct AttendRoom {
    float query[HEADS][MAX_KEY];
    float scores[HEADS][CHUNK];
    // If there is only one chunk: its weight beside the sink, and the sum of both.
    float share[HEADS];
    float total[HEADS];
};

/// Chosen rows of a cache.
struct Chosen {
    /// Those of the chunk's positions.
    const int* rows;

    DEVICE const u8* address(const u8* cache, int p, int n_head_kv, int kv_head, i64 row_bytes) const {
        return cache + ((i64)rows[p] * n_head_kv + kv_head) * row_bytes;
    }
    DEVICE int run_end(int p, int) const { return p + 1; }
};

/// Computes the share of the block's chunk, `n` rows whose addresses `where` finds: `mixed` is `[tokens, heads,
/// chunks, value_width]`, `largest` and `sums` `[tokens, heads, chunks]`.
///
/// If there is only one chunk, `out` may be given, and gets what `join_chunks` would compute with
/// its arguments. Grid: chunks, perhaps more than some of the tokens have; heads of keys and values
/// times blocks of heads; tokens.
template <class Rows, class Where>
DEVICE void attend(AttendRoom& room, const float* queries, const u8* keys, const u8* values, int n_head_kv, int group,
                   int key_width, int value_row_width, int value_width, float scale, float cap, Where where, int n,
                   float* mixed, float* largest, float* sums, const float* sinks, float* out, i8* q, float* quant_scale,
                   float* quant_sums) {
    float(*const query)[MAX_KEY] = room.query;
    float(*const scores)[CHUNK] = room.scores;
    float *const share = room.share, *const total = room.total;
    const int head_blocks = (group + HEADS - 1) / HEADS;
    const int kv_head = (int)blockIdx.y / head_blocks, first_head = (int)blockIdx.y % head_blocks * HEADS;
    const int heads = group - first_head < HEADS ? group - first_head : HEADS;
    const int token = (int)blockIdx.z, chunk = (int)blockIdx.x, chunks = (int)gridDim.x;
    const int n_head = n_head_kv * group;
    const i64 first_query = (i64)token * n_head + kv_head * group + first_head;
    const int thread = (int)threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    for (int i = thread; i < heads * key_width; i += THREADS) {
        query[i / key_width][i % key_width] = scale * queries[first_query * key_width + i];
    }
    __syncthreads();
    const i64 key_bytes = Rows::row_bytes(key_width), value_bytes = Rows::row_bytes(value_row_width);
    // Groups of eight lanes take positions in turn; all lanes of a warp make the same number of
    // rounds.
    for (int p0 = 0; p0 < n; p0 += THREADS / SHARE) {
        const int p = p0 + thread / SHARE;
        float dots[HEADS];
        for (int h = 0; h < HEADS; h++) dots[h] = 0.0f;
        if (p < n) {
            const u8* key = where.address(keys, p, n_head_kv, kv_head, key_bytes);
            for (int i = thread % SHARE * 4; i < key_width; i += SHARE * 4) {
                const float4 k = Rows::four(key, i);
                for (int h = 0; h < HEADS; h++) {
                    if (h >= heads) continue;
                    const float* q = query[h] + i;
                    dots[h] += k.x * q[0] + k.y * q[1] + k.z * q[2] + k.w * q[3];
                }
            }
        }
        for (int h = 0; h < HEADS; h++) {
            for (int step = SHARE / 2; step > 0; step /= 2) dots[h] += __shfl_xor_sync(ALL_LANES, dots[h], step);
            if (p < n && h < heads && thread % SHARE == 0) scores[h][p] = capped(dots[h], cap);
        }
    }
    __syncthreads();
    for (int h = warp; h < heads; h += THREADS / WARP) {
        float most = minus_infinity();
        for (int p = lane; p < n; p += WARP) most = fmaxf(most, scores[h][p]);
        most = warp_max(most);
        float sum = 0.0f;
        for (int p = lane; p < n; p += WARP) {
            const float e = expf(scores[h][p] - most);
            scores[h][p] = e;
            sum += e;
        }
        sum = warp_sum(sum);
        if (lane == 0 && !out) {
            largest[(first_query + h) * chunks + chunk] = most;
            sums[(first_query + h) * chunks + chunk] = sum;
        }
        if (lane == 0 && out) {
            const float sink = sinks ? sinks[kv_head * group + first_head + h] : minus_infinity();
            const float top = fmaxf(sink, most);
            share[h] = expf(most - top);
            // Rounded, as `join_chunks` has it: not fused with the sink.
            total[h] = __fmul_rn(share[h], sum);
            if (sinks) total[h] += expf(sink - top);
        }
    }
    __syncthreads();
    for (int c = thread; c < value_width; c += THREADS) {
        float acc[HEADS];
        for (int h = 0; h < HEADS; h++) acc[h] = 0.0f;
        for (int p = 0; p < n;) {
            const int run_end = where.run_end(p, n);
            const u8* value = where.address(values, p, n_head_kv, kv_head, value_bytes);
            for (; p < run_end; p++, value += n_head_kv * value_bytes) {
                const float v = Rows::at(value, c);
                for (int h = 0; h < HEADS; h++) {
                    if (h < heads) acc[h] += scores[h][p] * v;
                }
            }
        }
        for (int h = 0; h < HEADS; h++) {
            if (h >= heads) continue;
            if (!out) {
                mixed[((first_query + h) * chunks + chunk) * value_width + c] = acc[h];
                continue;
            }
            const i64 to = (first_query + h) * value_width + c;
            // What attends to nothing gathers nothing.
            const float v = n > 0 ? share[h] * acc[h] / total[h] : 0.0f;
            out[to] = v;
            if (q) quantize_run(v, to / 32, q, quant_scale, quant_sums);
        }
    }
}
