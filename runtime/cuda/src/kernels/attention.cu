// Attention over the KV cache. Each block computes the share of some heads in a chunk of 256
// positions for one token; a second kernel combines a query's chunks in their order. Chunks begin
// at fixed positions, and every token reads the pages of its own text, so a result does not
// depend on other tokens of the batch.
#include "attend.cuh"

/// Consecutive positions of a text.
struct Consecutive {
    Pages pages;
    int start;

    /// Returns where the row of number `p` is.
    DEVICE const u8* address(const u8* cache, int p, int n_head_kv, int kv_head, i64 row_bytes) const {
        return cache + (pages.at(start + p) * n_head_kv + kv_head) * row_bytes;
    }

    /// Returns the first of `n` numbers whose row does not follow those from `p` on.
    DEVICE int run_end(int p, int n) const {
        const int rest = pages.page_end(start + p) - start;
        return rest < n ? rest : n;
    }
};

/// Attends to the positions from `first_attended` up to the token's own. Chunks count from the first
/// that the token attends to.
template <class Rows>
DEVICE void attend_all(const float* queries, const u8* keys, const u8* values, int n_head_kv, int group, int key_width,
                       int value_row_width, int value_width, float scale, float cap, const int* positions,
                       const int* begins, const int* tables, int page_bits, int window, float* mixed, float* largest,
                       float* sums, const float* sinks, float* out, i8* q, float* quant_scale, float* quant_sums) {
    const int token = (int)blockIdx.z;
    const int end_seen = positions[token] + 1;
    const int begin_seen = first_attended(end_seen - 1, window);
    const int chunk_start = (begin_seen / CHUNK + (int)blockIdx.x) * CHUNK;
    const int start = begin_seen > chunk_start ? begin_seen : chunk_start;
    const int end = end_seen < chunk_start + CHUNK ? end_seen : chunk_start + CHUNK;
    const Consecutive where = {Pages(tables, begins, token, page_bits), start};
    __shared__ AttendRoom room;
    attend<Rows>(room, queries, keys, values, n_head_kv, group, key_width, value_row_width, value_width, scale, cap,
                 where, end > start ? end - start : 0, mixed, largest, sums, sinks, out, q, quant_scale, quant_sums);
}

#define ATTEND(NAME, ROWS)                                                                                              \
    KERNEL NAME(const float* queries, const u8* keys, const u8* values, int n_head_kv, int group, int key_width,        \
                int value_row_width, int value_width, float scale, float cap, const int* positions,                     \
                const int* begins, const int* tables, int page_bits, int window, float* mixed, float* largest,          \
                float* sums, const float* sinks, float* out, i8* q, float* quant_scale, float* quant_sums) {            \
        attend_all<ROWS>(queries, keys, values, n_head_kv, group, key_width, value_row_width, value_width, scale,       \
                         cap, positions, begins, tables, page_bits, window, mixed, largest, sums, sinks, out, q,        \
                         quant_scale, quant_sums);                                                                      \
    }

ATTEND(attend_f32, RowsF32)
ATTEND(attend_f16, RowsF16)
ATTEND(attend_q8, RowsQ8)

/// Combines the chunks of a query; `out` is `[tokens, heads, value_width]`. `sinks`, one per head,
/// may be null: scores that take their share of the weights but have no position. If `q` is not
/// null it gets the quantized form of `out`, and widths are multiples of 32. Grid: heads, tokens.
KERNEL join_chunks(const float* mixed, const float* largest, const float* sums, int chunks, int value_width,
                   const float* sinks, float* out, i8* q, float* scale, float* quant_sums) {
    const i64 query = (i64)blockIdx.y * gridDim.x + blockIdx.x;
    float most = sinks ? sinks[blockIdx.x] : minus_infinity();
    for (int c = 0; c < chunks; c++) {
        if (sums[query * chunks + c] != 0.0f) most = fmaxf(most, largest[query * chunks + c]);
    }
    float sum = 0.0f;
    for (int c = 0; c < chunks; c++) {
        const float share = sums[query * chunks + c];
        if (share != 0.0f) sum += expf(largest[query * chunks + c] - most) * share;
    }
    if (sinks) sum += expf(sinks[blockIdx.x] - most);
    for (int i = (int)threadIdx.x; i < value_width; i += (int)blockDim.x) {
        float acc = 0.0f;
        for (int c = 0; c < chunks; c++) {
            if (sums[query * chunks + c] == 0.0f) continue;
            acc += expf(largest[query * chunks + c] - most) * mixed[(query * chunks + c) * value_width + i];
        }
        // What attends to nothing gathers nothing.
        const float v = sum == 0.0f ? 0.0f : acc / sum;
        out[query * value_width + i] = v;
        if (q) quantize_run(v, (query * value_width + i) / 32, q, scale, quant_sums);
    }
}
