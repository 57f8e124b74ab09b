// Attention of DeepSeek V4: a window of near tokens, and one vector per block of tokens before.
//
// The vectors of the window, and the rows of blocks that are not complete, are the text's state: that
// of a position at its remainder. Kernels find what is before a batch there, and the batch's own rows
// beside it. The state is written last, so no row is copied to be read.
#include "attend.cuh"
#include "choice.cuh"
#include "place.cuh"

/// Normalizes and rotates queries (without weights) and the tokens' vectors, and rotates queries of
/// the index, all in place. What rotates begins at `first`, and at `index_first` of the index. Grid:
/// heads of queries, one block for the vector, heads of the index; tokens.
KERNEL place_compressed(float* queries, int n_head, int dim, float* vectors, const float* norm, float eps,
                        float* index_queries, int index_dim, const float* turns, int half, int neighbours, int first,
                        int index_first) {
    __shared__ float row[MAX_KEY];
    __shared__ float room[WARP];
    const int head = (int)blockIdx.x, token = (int)blockIdx.y, n_index = (int)gridDim.x - n_head - 1;
    if (head > n_head) {
        float* query = index_queries + ((i64)token * n_index + head - n_head - 1) * index_dim;
        rotate(query + index_first, turns, token, half, neighbours);
        return;
    }
    const bool is_query = head < n_head;
    float* at = is_query ? queries + ((i64)token * n_head + head) * dim : vectors + (i64)token * dim;
    float squares = 0.0f;
    for (int i = (int)threadIdx.x; i < dim; i += THREADS) {
        row[i] = at[i];
        squares += row[i] * row[i];
    }
    const float factor = 1.0f / sqrtf(block_sum(squares, room) / (float)dim + eps);
    for (int i = (int)threadIdx.x; i < dim; i += THREADS) row[i] *= is_query ? factor : factor * norm[i];
    __syncthreads();
    rotate(row + first, turns, token, half, neighbours);
    __syncthreads();
    for (int i = (int)threadIdx.x; i < dim; i += THREADS) at[i] = row[i];
}

/// Rows of a text's tokens that are pooled: those of the batch, `[tokens, width]`, and those before in
/// the state, `[slots, 2, width]` of values and gates.
struct Pooled {
    const float* values;
    const float* gates;
    const float* ape;
    const float* open;
    int ratio, slots, width, past;

    DEVICE float value(int position, int column) const {
        return position >= past ? values[(i64)(position - past) * width + column]
                                : open[(i64)(position % slots) * 2 * width + column];
    }
    DEVICE float gate(int position, int column) const {
        return position >= past ? gates[(i64)(position - past) * width + column] + ape[position % ratio * width + column]
                                : open[((i64)(position % slots) * 2 + 1) * width + column];
    }
};

/// Pools each block that the `n` tokens of a text complete, normalizes and rotates the vector as at the
/// block's first position, and stores it. With `overlap`, blocks reach back into the block before. A
/// thread has a column. Grid: blocks, perhaps more than are complete.
template <class Store>
DEVICE void pool_blocks(const float* values, const float* gates, const float* ape, const float* open, int ratio,
                        int overlap, int dim, const float* norm, float eps, const float* frequencies, float magnitude,
                        int half, int neighbours, int rope_first, int n, const int* positions, const int* begins,
                        const int* tables, int page_bits, u8* cache) {
    __shared__ float row[MAX_KEY];
    __shared__ float room[WARP];
    const int past = positions[0], block = past / ratio + (int)blockIdx.x, first = block * ratio, end = first + ratio;
    if (end > past + n) return;
    const int width = overlap ? 2 * dim : dim, begin = overlap && block > 0 ? first - ratio : first;
    const Pooled rows = {values, gates, ape, open, ratio, overlap ? 2 * ratio : ratio, width, past};
    float squares = 0.0f;
    for (int c = (int)threadIdx.x; c < dim; c += (int)blockDim.x) {
        float most = minus_infinity();
#pragma unroll 4
        for (int p = begin; p < end; p++) most = fmaxf(most, rows.gate(p, p < first ? c : width - dim + c));
        float pooled = 0.0f, sum = 0.0f;
#pragma unroll 4
        for (int p = begin; p < end; p++) {
            const int column = p < first ? c : width - dim + c;
            const float weight = expf(rows.gate(p, column) - most);
            pooled += weight * rows.value(p, column);
            sum += weight;
        }
        row[c] = pooled / sum;
        squares += row[c] * row[c];
    }
    const float factor = 1.0f / sqrtf(block_sum(squares, room) / (float)dim + eps);
    for (int c = (int)threadIdx.x; c < dim; c += (int)blockDim.x) row[c] *= factor * norm[c];
    __syncthreads();
    rotate_at(row + rope_first, frequencies, magnitude, first, half, neighbours);
    __syncthreads();
    const i64 at = Pages(tables, begins, 0, page_bits).of_block(block, ratio);
    Store::row(row, dim, cache + at * Store::row_bytes(dim));
}

/// Neighboring vectors of a text's window: those of the batch, and those before in the state.
struct Near {
    const float* vectors;
    const float* ring;
    /// Position of the first, tokens before the batch, and those of the window.
    int start, past, window;

    DEVICE const u8* address(const u8*, int p, int, int, i64 row_bytes) const {
        const int position = start + p;
        return position >= past ? (const u8*)vectors + (position - past) * row_bytes
                                : (const u8*)ring + position % window * row_bytes;
    }
    DEVICE int run_end(int p, int n) const {
        const int position = start + p, wrap = (position / window + 1) * window;
        const int end = position >= past ? start + n : wrap < past ? wrap : past;
        return end - start < n ? end - start : n;
    }
};

/// Attends to the window, in the first `near_chunks` chunks, and to vectors of blocks: those of each
/// token's list, `[tokens, kept]`, where it sees more than `kept`, and else all. `past` has the position
/// of the first of `vectors`. Without blocks, `ratio` is 0. Grid: chunks; blocks of heads; tokens of one
/// text.
template <class Rows>
DEVICE void attend_compressed(const float* queries, const float* vectors, const float* ring, const u8* far, int n_head,
                              int dim, float scale, const int* past, int window, int near_chunks, int ratio,
                              const int* chosen, int kept, const int* positions, const int* begins, const int* tables,
                              int page_bits, float* mixed, float* largest, float* sums, const float* sinks,
                              float* out) {
    __shared__ AttendRoom room;
    __shared__ int rows[CHUNK];
    const int token = (int)blockIdx.z, chunk = (int)blockIdx.x, position = positions[token];
    if (chunk < near_chunks) {
        const int start = first_attended(position, window) + chunk * CHUNK, rest = position + 1 - start;
        const int n = rest < 0 ? 0 : rest < CHUNK ? rest : CHUNK;
        const Near where = {vectors, ring, start, *past, window};
        attend<RowsF32>(room, queries, nullptr, nullptr, 1, n_head, dim, dim, dim, scale, 0.0f, where, n, mixed,
                        largest, sums, sinks, out, nullptr, nullptr, nullptr);
        return;
    }
    const int seen = visible_blocks(position, ratio, OPEN_SKIPPED), start = (chunk - near_chunks) * CHUNK;
    const bool has_list = chosen && seen > kept;
    const int rest = (has_list ? kept : seen) - start, n = rest < 0 ? 0 : rest < CHUNK ? rest : CHUNK;
    const Pages pages(tables, begins, token, page_bits);
    for (int p = (int)threadIdx.x; p < n; p += THREADS) {
        int block = start + p;
        if (has_list) {
            // Nothing beyond the token is read, whatever the list has.
            const int listed = chosen[(i64)token * kept + block];
            block = (u32)listed < (u32)seen ? listed : seen - 1;
        }
        rows[p] = (int)pages.of_block(block, ratio);
    }
    const Chosen where = {rows};
    attend<Rows>(room, queries, far, far, 1, n_head, dim, dim, dim, scale, 0.0f, where, n, mixed, largest, sums, sinks,
                 out, nullptr, nullptr, nullptr);
}

#define COMPRESSED(NAME, STORE_ROWS, ROWS)                                                                             \
    KERNEL pool_blocks_##NAME(const float* values, const float* gates, const float* ape, const float* open, int ratio, \
                              int overlap, int dim, const float* norm, float eps, const float* frequencies,            \
                              float magnitude, int half, int neighbours, int rope_first, int n, const int* positions,  \
                              const int* begins, const int* tables, int page_bits, u8* cache) {                        \
        pool_blocks<STORE_ROWS>(values, gates, ape, open, ratio, overlap, dim, norm, eps, frequencies, magnitude,      \
                                half, neighbours, rope_first, n, positions, begins, tables, page_bits, cache);         \
    }                                                                                                                  \
    KERNEL attend_compressed_##NAME(const float* queries, const float* vectors, const float* ring, const u8* far,      \
                                    int n_head, int dim, float scale, const int* past, int window, int near_chunks,    \
                                    int ratio, const int* chosen, int kept, const int* positions, const int* begins,   \
                                    const int* tables, int page_bits, float* mixed, float* largest, float* sums,       \
                                    const float* sinks, float* out) {                                                  \
        attend_compressed<ROWS>(queries, vectors, ring, far, n_head, dim, scale, past, window, near_chunks, ratio,     \
                                chosen, kept, positions, begins, tables, page_bits, mixed, largest, sums, sinks, out); \
    }

COMPRESSED(f32, StoreF32, RowsF32)
COMPRESSED(f16, StoreF16, RowsF16)
COMPRESSED(q8, StoreQ8, RowsQ8)

/// Writes a token's row of values or gates, of which column `c` counts, to the state. Returns whether
/// the column is one of them.
DEVICE bool keep_open(const float* values, const float* gates, const float* ape, float* open, int ratio, int slots,
                      int width, int token, int position, int back, int c) {
    if (c >= 2 * width) return false;
    if (back < slots) {
        float* to = open + (i64)(position % slots) * 2 * width;
        const i64 row = (i64)token * width;
        to[c] = c < width ? values[row + c] : gates[row + c - width] + ape[position % ratio * width + c - width];
    }
    return true;
}

/// Keeps what the tokens after these `n` of a text need: the window's vectors, and the rows of up to
/// two compressors, whose width is 0 where there are fewer. Grid: columns by threads, tokens from the
/// last one back.
KERNEL keep_compressed(const float* vectors, int dim, int window, float* ring, const float* values_a,
                       const float* gates_a, const float* ape_a, float* open_a, int ratio_a, int slots_a, int width_a,
                       const float* values_b, const float* gates_b, const float* ape_b, float* open_b, int ratio_b,
                       int slots_b, int width_b, int n, const int* positions) {
    const int back = (int)blockIdx.y, token = n - 1 - back, position = positions[token];
    int c = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (c < dim) {
        if (back < window) ring[(i64)(position % window) * dim + c] = vectors[(i64)token * dim + c];
        return;
    }
    c -= dim;
    if (keep_open(values_a, gates_a, ape_a, open_a, ratio_a, slots_a, width_a, token, position, back, c)) return;
    keep_open(values_b, gates_b, ape_b, open_b, ratio_b, slots_b, width_b, token, position, back, c - 2 * width_a);
}

/// Rotates the values of results from `first` on back by their tokens' angles: `x` is `[tokens, heads,
/// dim]`, and `out` alike, or `[groups, tokens, heads of a group, dim]` with a `group` of heads that is
/// not 0. Grid: heads, tokens.
KERNEL turn_back(const float* x, const float* turns, int half, int neighbours, int first, int dim, int group,
                 float* out) {
    const int head = (int)blockIdx.x, n_head = (int)gridDim.x, token = (int)blockIdx.y, tokens = (int)gridDim.y;
    const i64 from = (i64)token * n_head + head;
    const i64 to = group ? ((i64)(head / group) * tokens + token) * group + head % group : from;
    const int apart = neighbours ? 1 : half;
    x += from * dim;
    out += to * dim;
    for (int i = (int)threadIdx.x; i < dim; i += (int)blockDim.x) {
        const int at = i - first;
        float v = x[i];
        if (at >= 0 && at < 2 * half) {
            const int pair = neighbours ? at / 2 : at % half;
            const bool is_first = neighbours ? at % 2 == 0 : at < half;
            const float other = x[is_first ? i + apart : i - apart];
            const float* turn = turns + ((i64)token * half + pair) * 2;
            v = is_first ? v * turn[0] + other * turn[1] : v * turn[0] - other * turn[1];
        }
        out[i] = v;
    }
}

/// Moves `[groups, tokens, width]` to `[tokens, groups, width]`; `n` values. Grid: values by threads.
KERNEL ungroup(const float* x, int groups, int tokens, int width, i64 n, float* out) {
    const i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const i64 row = i / width;
    out[i] = x[((row % groups) * tokens + row / groups) * width + i % width];
}
