// The indexes of block-sparse attention: ratings of blocks of positions by their best key, for each head of
// keys and values by itself, and keys of whole blocks. Neither depends on which tokens of a text came together,
// or on other texts.
#include "choice.cuh"
#include "place.cuh"

/// Heads of queries that pass over keys together.
#define HEADS 8
/// Threads per block.
#define THREADS 128
#define WARPS (THREADS / WARP)
/// Lanes per position.
#define SHARE 8

/// Computes `ratings[token, head, b] = max over p in block b of queries[token, head] . keys[p]` for
/// the positions up to each token's own, `stride` floats from one head to the next. The last `local`
/// blocks have infinite ratings. Tokens that see no more than `kept` blocks have none. Grid: blocks
/// of positions, perhaps more than some of the tokens see; groups of heads; tokens.
template <class Rows>
DEVICE void rate_best(const float* queries, const u8* keys, int n_head, int key_dim, const int* positions,
                      const int* begins, const int* tables, int page_bits, int block, int kept, int local, int stride,
                      float* ratings) {
    __shared__ float4 query_room[HEADS * MAX_KEY / 4];
    __shared__ float best[WARPS][HEADS];
    float* const query = (float*)query_room;
    const int token = (int)blockIdx.z, rated = (int)blockIdx.x, first_head = (int)blockIdx.y * HEADS;
    const int heads = n_head - first_head < HEADS ? n_head - first_head : HEADS;
    const int thread = (int)threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    const int visible = visible_blocks(positions[token], block, OPEN_RATED);
    if (visible <= kept || rated >= visible) return;
    const i64 first = (i64)token * n_head + first_head;
    ratings += first * stride + rated;
    if (rated >= visible - local) {
        if (thread < heads) ratings[(i64)thread * stride] = -minus_infinity();
        return;
    }
    for (int i = thread; i < heads * key_dim; i += THREADS) query[i] = queries[first * key_dim + i];
    __syncthreads();
    const Pages pages(tables, begins, token, page_bits);
    const i64 key_bytes = Rows::row_bytes(key_dim);
    const int start = rated * block, rest = positions[token] + 1 - start, n = rest < block ? rest : block;
    float most[HEADS];
    for (int h = 0; h < HEADS; h++) most[h] = minus_infinity();
    // Groups of eight lanes take positions in turn; all lanes of a warp make the same number of
    // rounds.
    for (int p0 = 0; p0 < n; p0 += THREADS / SHARE) {
        const int p = p0 + thread / SHARE;
        float dots[HEADS];
        for (int h = 0; h < HEADS; h++) dots[h] = 0.0f;
        if (p < n) {
            const u8* key = keys + pages.at(start + p) * key_bytes;
            for (int i = thread % SHARE * 4; i < key_dim; i += SHARE * 4) {
                const float4 k = Rows::four(key, i);
                for (int h = 0; h < HEADS; h++) {
                    if (h >= heads) continue;
                    const float4 q = *(const float4*)(query + h * key_dim + i);
                    dots[h] += k.x * q.x + k.y * q.y + k.z * q.z + k.w * q.w;
                }
            }
        }
        for (int h = 0; h < HEADS; h++) {
            for (int step = SHARE / 2; step > 0; step /= 2) dots[h] += __shfl_xor_sync(ALL_LANES, dots[h], step);
            if (p < n) most[h] = fmaxf(most[h], dots[h]);
        }
    }
    for (int h = 0; h < HEADS; h++) {
        const float of_warp = warp_max(most[h]);
        if (lane == 0) best[warp][h] = of_warp;
    }
    __syncthreads();
    if (thread >= heads) return;
    float rating = best[0][thread];
    for (int w = 1; w < WARPS; w++) rating = fmaxf(rating, best[w][thread]);
    ratings[(i64)thread * stride] = rating;
}

/// Makes the key of each block that ends with a token: the mean of its positions' rows as they are stored,
/// normalized, and rotated as at its first position. It takes the place of the last of these rows. Grid:
/// tokens.
template <class Store, class Rows>
DEVICE void mean_keys(u8* keys, int key_dim, int block, const float* norm, float eps, const float* frequencies,
                      float magnitude, int half, int neighbours, const int* positions, const int* begins,
                      const int* tables, int page_bits) {
    __shared__ float row[MAX_KEY];
    __shared__ float room[WARP];
    const int token = (int)blockIdx.x, last = positions[token], first = last + 1 - block;
    if ((last + 1) % block != 0) return;
    const Pages pages(tables, begins, token, page_bits);
    const i64 key_bytes = Rows::row_bytes(key_dim);
    for (int i = (int)threadIdx.x; i < key_dim; i += THREADS) {
        float sum = 0.0f;
#pragma unroll 4
        for (int p = first; p <= last; p++) sum += Rows::at(keys + pages.at(p) * key_bytes, i);
        row[i] = sum / (float)block;
    }
    // The barriers of the norm's sum are after all reads of the cache.
    norm_row(row, key_dim, norm, eps, room);
    __syncthreads();
    rotate_at(row, frequencies, magnitude, first, half, neighbours);
    __syncthreads();
    Store::row(row, key_dim, keys + pages.at(last) * key_bytes);
}

#define BLOCK_INDEX(NAME, STORE_ROWS, ROWS)                                                                            \
    KERNEL rate_best_##NAME(const float* queries, const u8* keys, int n_head, int key_dim, const int* positions,       \
                            const int* begins, const int* tables, int page_bits, int block, int kept, int local,       \
                            int stride, float* ratings) {                                                              \
        rate_best<ROWS>(queries, keys, n_head, key_dim, positions, begins, tables, page_bits, block, kept, local,      \
                        stride, ratings);                                                                              \
    }                                                                                                                  \
    KERNEL mean_keys_##NAME(u8* keys, int key_dim, int block, const float* norm, float eps, const float* frequencies,  \
                            float magnitude, int half, int neighbours, const int* positions, const int* begins,        \
                            const int* tables, int page_bits) {                                                        \
        mean_keys<STORE_ROWS, ROWS>(keys, key_dim, block, norm, eps, frequencies, magnitude, half, neighbours,         \
                                    positions, begins, tables, page_bits);                                             \
    }

BLOCK_INDEX(f32, StoreF32, RowsF32)
BLOCK_INDEX(f16, StoreF16, RowsF16)
BLOCK_INDEX(q8, StoreQ8, RowsQ8)
