// Lightning indexers: new keys in the cache, ratings of positions or of blocks of them, and the
// choice of the best. A rating does not depend on other tokens of the batch, so neither does a
// choice.
#include "choice.cuh"
#include "place.cuh"
#include "runs.cuh"

/// Threads per block that places a row, and that rates.
#define INDEX_THREADS 128

/// Positions, heads, and columns of a tile of ratings.
#define RATED 64
#define RATED_HEADS 32
#define RATED_COLUMNS 32
/// Floats from one row of a tile to the next, so that reads of four hit different banks.
#define RATED_STRIDE (RATED_COLUMNS + 4)
/// Heads that a thread has, and positions, `RATED / 4` apart.
#define SIDE 4

/// Threads per block that chooses.
#define CHOOSE_THREADS 512
#define CHOOSE_WARPS (CHOOSE_THREADS / WARP)
/// Bins per pass, four per thread.
#define BINS (4 * CHOOSE_THREADS)
/// Ratings that a thread reads at once: there may be one block, and only reads that are under way
/// together use the memory's rate.
#define AHEAD 16

/// Computes the layer norm of a key to `row`. A thread has the same values throughout.
DEVICE void norm_key(const float* key, const float* norm, const float* norm_bias, float eps, int key_dim, float* row,
                     float* room) {
    float sum = 0.0f;
    for (int i = (int)threadIdx.x; i < key_dim; i += INDEX_THREADS) {
        row[i] = key[i];
        sum += row[i];
    }
    const float mean = block_sum(sum, room) / (float)key_dim;
    float squares = 0.0f;
    for (int i = (int)threadIdx.x; i < key_dim; i += INDEX_THREADS) {
        row[i] -= mean;
        squares += row[i] * row[i];
    }
    const float factor = 1.0f / sqrtf(block_sum(squares, room) / (float)key_dim + eps);
    for (int i = (int)threadIdx.x; i < key_dim; i += INDEX_THREADS) row[i] = row[i] * factor * norm[i] + norm_bias[i];
}

/// Rotates the values of queries from `rope_first` on, in place; normalizes keys (layer norm),
/// rotates them alike, and stores them. `turns` may be null. Grid: heads of queries, and one block
/// for the key; tokens.
template <class Store>
DEVICE void place_index(float* queries, const float* keys, const float* norm, const float* norm_bias, float eps,
                        const float* turns, int half, int neighbours, int rope_first, int key_dim,
                        const int* positions, const int* begins, const int* tables, int page_bits, u8* cache) {
    __shared__ float row[MAX_KEY];
    __shared__ float room[WARP];
    const int head = (int)blockIdx.x, n_head = (int)gridDim.x - 1, token = (int)blockIdx.y;
    if (head < n_head) {
        rotate(queries + ((i64)token * n_head + head) * key_dim + rope_first, turns, token, half, neighbours);
        return;
    }
    norm_key(keys + (i64)token * key_dim, norm, norm_bias, eps, key_dim, row, room);
    __syncthreads();
    if (turns) {
        rotate(row + rope_first, turns, token, half, neighbours);
        __syncthreads();
    }
    Store::row(row, key_dim, stored_row<Store>(cache, 0, 1, key_dim, positions, begins, tables, page_bits, token));
}

/// Returns value `i` of the gate of a block's member `p`, which is a token at hand, or one before.
DEVICE float pool_gate(const float* open, const float* gates, const float* ape, int key_dim, i64 token, int p, int i) {
    return token < 0 ? open[(2 * p + 1) * key_dim + i] : gates[token * key_dim + i] + ape[p * key_dim + i];
}

/// Makes one key of each block that the tokens of a run complete, and stores it: with `g` the gates
/// plus `ape`, `[block, key_dim]`, the sum of softmax(g) times the keys after their layer norm, where
/// the softmax is over the block's tokens for each value by itself. Keys and gates of a block that is
/// not complete are in `open`, `[block, 2, key_dim]` for each state. Grid: as many as blocks may be
/// completed, runs.
template <class Store>
DEVICE void pool_index(const float* keys, const float* gates, const float* norm, const float* norm_bias, float eps,
                       const float* ape, int key_dim, int block, const TextRuns& runs, const int* begins,
                       const int* tables, int page_bits, float* open, u8* cache) {
    __shared__ float row[MAX_KEY];
    __shared__ float largest[MAX_KEY];
    __shared__ float pooled[MAX_KEY];
    __shared__ float total[MAX_KEY];
    __shared__ float room[WARP];
    // Until the block's key is stored, a thread has the same values throughout.
    const TextRun run(runs, (int)blockIdx.y);
    const int first = runs.positions[run.begin], end = first + run.n, thread = (int)threadIdx.x;
    keys += (i64)run.begin * key_dim;
    gates += (i64)run.begin * key_dim;
    open += (i64)run.state * 2 * block * key_dim;
    const int at = first / block + (int)blockIdx.x, begin = at * block;
    if (begin + block <= end) {
        for (int i = thread; i < key_dim; i += INDEX_THREADS) {
            float most = minus_infinity();
            for (int p = 0; p < block; p++) {
                const i64 token = begin + p - first;
                const float g = pool_gate(open, gates, ape, key_dim, token, p, i);
                most = fmaxf(most, g);
            }
            largest[i] = most;
            pooled[i] = total[i] = 0.0f;
        }
        for (int p = 0; p < block; p++) {
            const i64 token = begin + p - first;
            if (token >= 0) norm_key(keys + token * key_dim, norm, norm_bias, eps, key_dim, row, room);
            for (int i = thread; i < key_dim; i += INDEX_THREADS) {
                const float g = pool_gate(open, gates, ape, key_dim, token, p, i);
                const float weight = expf(g - largest[i]);
                pooled[i] += weight * (token < 0 ? open[2 * p * key_dim + i] : row[i]);
                total[i] += weight;
            }
        }
        for (int i = thread; i < key_dim; i += INDEX_THREADS) pooled[i] /= total[i];
        __syncthreads();
        const i64 stored = Pages(tables, begins, run.begin, page_bits).of_block(at, block);
        Store::row(pooled, key_dim, cache + stored * Store::row_bytes(key_dim));
    }
    if (blockIdx.x != 0) return;
    // What this block read of the open one before is not needed any more.
    const int begin_open = end / block * block;
    for (int position = begin_open > first ? begin_open : first; position < end; position++) {
        const i64 token = position - first;
        const int p = position - begin_open;
        norm_key(keys + token * key_dim, norm, norm_bias, eps, key_dim, row, room);
        for (int i = thread; i < key_dim; i += INDEX_THREADS) {
            open[2 * p * key_dim + i] = row[i];
            open[(2 * p + 1) * key_dim + i] = pool_gate(open, gates, ape, key_dim, token, p, i);
        }
    }
}

/// Computes `ratings[token, p] = sum over h of scale * weights[token, h] * max(0, queries[token, h]
/// . keys[p])` for the positions up to each token's own, or for complete blocks of them with one key
/// each, `stride` floats from one token to the next. The key of a block is in a row of its own, or `in_last`
/// in the row of its last position. Without `weights`, all are 1. Tokens that see no more than `kept` have no
/// ratings. Grid: tiles of positions or blocks, perhaps more than some of the tokens see; tokens.
template <class Rows>
DEVICE void rate(const float* queries, const float* weights, float scale, const u8* keys, int n_head, int key_dim,
                 const int* positions, const int* begins, const int* tables, int page_bits, int block, int in_last,
                 int kept, int stride, float* ratings) {
    __shared__ float4 key_room[RATED * RATED_STRIDE / 4];
    __shared__ float4 query_room[RATED_HEADS * RATED_STRIDE / 4];
    __shared__ float sums[RATED_HEADS / SIDE][RATED];
    __shared__ int rows[RATED];
    float* const key = (float*)key_room;
    float* const query = (float*)query_room;
    const int token = (int)blockIdx.y, start = (int)blockIdx.x * RATED;
    const int seen = visible_blocks(positions[token], block, OPEN_SKIPPED);
    if (seen <= kept || start >= seen) return;
    const int n = seen - start < RATED ? seen - start : RATED;
    const int thread = (int)threadIdx.x, own_position = thread % (RATED / SIDE), own_heads = thread / (RATED / SIDE);
    const Pages pages(tables, begins, token, page_bits);
    const i64 key_bytes = Rows::row_bytes(key_dim);
    if (thread < n) {
        const int at = start + thread;
        rows[thread] = (int)(in_last ? pages.at((at + 1) * block - 1) : pages.of_block(at, block));
    }
    queries += (i64)token * n_head * key_dim;
    if (weights) weights += (i64)token * n_head;
    float own[SIDE];
    for (int p = 0; p < SIDE; p++) own[p] = 0.0f;
    for (int head0 = 0; head0 < n_head; head0 += RATED_HEADS) {
        float dots[SIDE][SIDE];
        for (int h = 0; h < SIDE; h++) {
            for (int p = 0; p < SIDE; p++) dots[h][p] = 0.0f;
        }
        for (int column0 = 0; column0 < key_dim; column0 += RATED_COLUMNS) {
            const float4 zeros = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            const int c = thread % (RATED_COLUMNS / 4) * 4, column = column0 + c;
            __syncthreads();
            for (int p = thread / (RATED_COLUMNS / 4); p < RATED; p += INDEX_THREADS / (RATED_COLUMNS / 4)) {
                const bool inside = p < n && column < key_dim;
                const float4 v = inside ? Rows::four(keys + rows[p] * key_bytes, column) : zeros;
                *(float4*)(key + p * RATED_STRIDE + c) = v;
            }
            for (int h = thread / (RATED_COLUMNS / 4); h < RATED_HEADS; h += INDEX_THREADS / (RATED_COLUMNS / 4)) {
                const bool inside = head0 + h < n_head && column < key_dim;
                const float4 v = inside ? *(const float4*)(queries + (i64)(head0 + h) * key_dim + column) : zeros;
                *(float4*)(query + h * RATED_STRIDE + c) = v;
            }
            __syncthreads();
#pragma unroll 2
            for (int i = 0; i < RATED_COLUMNS; i += 4) {
                float4 q[SIDE];
                for (int h = 0; h < SIDE; h++) q[h] = *(const float4*)(query + (own_heads * SIDE + h) * RATED_STRIDE + i);
                for (int p = 0; p < SIDE; p++) {
                    const float4 k = *(const float4*)(key + (own_position + p * (RATED / SIDE)) * RATED_STRIDE + i);
                    for (int h = 0; h < SIDE; h++) {
                        dots[h][p] += q[h].x * k.x + q[h].y * k.y + q[h].z * k.z + q[h].w * k.w;
                    }
                }
            }
        }
        for (int h = 0; h < SIDE; h++) {
            const int head = head0 + own_heads * SIDE + h;
            if (head >= n_head) continue;
            const float weight = weights ? scale * weights[head] : scale;
            for (int p = 0; p < SIDE; p++) own[p] += weight * fmaxf(dots[h][p], 0.0f);
        }
    }
    for (int p = 0; p < SIDE; p++) sums[own_heads][own_position + p * (RATED / SIDE)] = own[p];
    __syncthreads();
    if (thread >= n) return;
    float sum = 0.0f;
    for (int h = 0; h < RATED_HEADS / SIDE; h++) sum += sums[h][thread];
    ratings[(i64)token * stride + start + thread] = sum;
}

#define INDEX(NAME, STORE_ROWS, ROWS)                                                                                  \
    KERNEL place_index_##NAME(float* queries, const float* keys, const float* norm, const float* norm_bias, float eps, \
                              const float* turns, int half, int neighbours, int rope_first, int key_dim,               \
                              const int* positions, const int* begins, const int* tables, int page_bits, u8* cache) {  \
        place_index<STORE_ROWS>(queries, keys, norm, norm_bias, eps, turns, half, neighbours, rope_first, key_dim,     \
                                positions, begins, tables, page_bits, cache);                                          \
    }                                                                                                                  \
    KERNEL rate_##NAME(const float* queries, const float* weights, float scale, const u8* keys, int n_head,            \
                       int key_dim, const int* positions, const int* begins, const int* tables, int page_bits,         \
                       int block, int in_last, int kept, int stride, float* ratings) {                                 \
        rate<ROWS>(queries, weights, scale, keys, n_head, key_dim, positions, begins, tables, page_bits, block,        \
                   in_last, kept, stride, ratings);                                                                    \
    }                                                                                                                  \
    KERNEL pool_index_##NAME(const float* keys, const float* gates, const float* norm, const float* norm_bias,         \
                             float eps, const float* ape, int key_dim, int block, TEXT_RUNS, const int* begins,        \
                             const int* tables, int page_bits, float* open, u8* cache) {                               \
        TAKE_TEXT_RUNS;                                                                                                \
        pool_index<STORE_ROWS>(keys, gates, norm, norm_bias, eps, ape, key_dim, block, runs, begins, tables,           \
                               page_bits, open, cache);                                                                \
    }

INDEX(f32, StoreF32, RowsF32)
INDEX(f16, StoreF16, RowsF16)
INDEX(q8, StoreQ8, RowsQ8)

/// Returns a number that is larger for larger ratings. NaN is the smallest, and zero has one sign.
DEVICE u32 rank_of(float rating) {
    if (rating != rating) return 0;
    const u32 bits = (u32)__float_as_int(rating + 0.0f);
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

/// Reads `AHEAD` ratings, `step` apart. Those from `end` on have any rank.
DEVICE void ranks_of(const float* ratings, int first, int step, int end, u32* ranks) {
    float read[AHEAD];
#pragma unroll
    for (int j = 0; j < AHEAD; j++) read[j] = first + j * step < end ? ratings[first + j * step] : 0.0f;
#pragma unroll
    for (int j = 0; j < AHEAD; j++) ranks[j] = rank_of(read[j]);
}

/// Returns the sum of the lanes up to each.
DEVICE int sum_of_lanes(int v) {
    const int lane = threadIdx.x % WARP;
    for (int step = 1; step < WARP; step *= 2) {
        const int other = __shfl_sync(ALL_LANES, v, (lane - step) & (WARP - 1));
        if (lane >= step) v += other;
    }
    return v;
}

/// Returns the sum of what the warps before this one have; `room` is shared, an int per warp.
DEVICE int sum_of_warps_before(int of_warp, int* room) {
    const int warp = (int)threadIdx.x / WARP;
    __syncthreads();
    if (threadIdx.x % WARP == 0) room[warp] = of_warp;
    __syncthreads();
    int before = 0;
    for (int w = 0; w < warp; w++) before += room[w];
    return before;
}

/// Finds the bin with the one of number `*rest` when counted from the last bin, and reduces `*rest`
/// to its number within that bin. Both get the bin and the rest from shared memory.
DEVICE int find_bin(const int* bins, int* rest, int* room, int* found) {
    const int last = BINS - 1 - 4 * (int)threadIdx.x;
    int own = 0;
    for (int i = 0; i < 4; i++) own += bins[last - i];
    const int up_to = sum_of_lanes(own);
    const int of_warp = __shfl_sync(ALL_LANES, up_to, WARP - 1);
    int before = sum_of_warps_before(of_warp, room) + up_to - own;
    if (before < *rest && *rest <= before + own) {
        int bin = last;
        while (before + bins[bin] < *rest) before += bins[bin--];
        found[0] = bin;
        found[1] = *rest - before;
    }
    __syncthreads();
    *rest = found[1];
    return found[0];
}

/// Chooses the `kept` blocks with the largest ratings for each token that sees more, of equal ones
/// the earlier, and lists them in ascending order. A token has several lists if it has several rows
/// of ratings, `stride` floats each: `chosen` is `[tokens, lists, kept]`. Grid: tokens, lists.
KERNEL choose_blocks(const float* ratings, int stride, const int* positions, int block, int open, int kept,
                     int* chosen) {
    __shared__ int bins[BINS];
    __shared__ int room[CHOOSE_WARPS];
    __shared__ int found[2];
    const int token = (int)blockIdx.x, thread = (int)threadIdx.x, lane = thread % WARP, warp = thread / WARP;
    const int seen = visible_blocks(positions[token], block, open);
    if (seen <= kept) return;
    const i64 list = (i64)token * gridDim.y + blockIdx.y;
    ratings += list * stride;
    chosen += list * kept;
    // The rank of the last that is chosen, from its first bits to its last, and its number among
    // those of equal bits.
    u32 last = 0, known = 0;
    int rest = kept;
    for (int pass = 0; pass < 3; pass++) {
        const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;
        const u32 digits = pass == 2 ? BINS / 2 - 1 : BINS - 1;
        for (int i = thread; i < BINS; i += CHOOSE_THREADS) bins[i] = 0;
        __syncthreads();
        for (int i = thread; i < seen; i += AHEAD * CHOOSE_THREADS) {
            u32 ranks[AHEAD];
            ranks_of(ratings, i, CHOOSE_THREADS, seen, ranks);
#pragma unroll
            for (int j = 0; j < AHEAD; j++) {
                const bool counts = i + j * CHOOSE_THREADS < seen && (ranks[j] & known) == last;
                if (counts) atomicAdd(&bins[ranks[j] >> shift & digits], 1);
            }
        }
        __syncthreads();
        last |= (u32)find_bin(bins, &rest, room, found) << shift;
        known |= digits << shift;
        __syncthreads();
    }
    // Each warp has a row of neighboring blocks.
    const int each = (seen + CHOOSE_THREADS - 1) / CHOOSE_THREADS * WARP, first = warp * each;
    const int end = first + each < seen ? first + each : seen;
    int above = 0, equal = 0;
    for (int i = first + lane; i < end; i += AHEAD * WARP) {
        u32 ranks[AHEAD];
        ranks_of(ratings, i, WARP, end, ranks);
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            const bool inside = i + j * WARP < end;
            above += inside && ranks[j] > last ? 1 : 0;
            equal += inside && ranks[j] == last ? 1 : 0;
        }
    }
    above = __shfl_sync(ALL_LANES, sum_of_lanes(above), WARP - 1);
    equal = __shfl_sync(ALL_LANES, sum_of_lanes(equal), WARP - 1);
    above = sum_of_warps_before(above, room);
    equal = sum_of_warps_before(equal, room);
    const u32 lower = (1u << lane) - 1;
    for (int i0 = first; i0 < end; i0 += AHEAD * WARP) {
        u32 ranks[AHEAD];
        ranks_of(ratings, i0 + lane, WARP, end, ranks);
#pragma unroll
        for (int j = 0; j < AHEAD; j++) {
            // All lanes of a warp end alike.
            if (i0 + j * WARP >= end) continue;
            const int i = i0 + j * WARP + lane;
            const bool is_above = i < end && ranks[j] > last, is_equal = i < end && ranks[j] == last;
            const u32 above_here = __ballot_sync(ALL_LANES, is_above);
            const u32 equal_here = __ballot_sync(ALL_LANES, is_equal);
            const int before = above + __popc((int)(above_here & lower));
            const int ties = equal + __popc((int)(equal_here & lower));
            if (is_above || (is_equal && ties < rest)) chosen[before + (ties < rest ? ties : rest)] = i;
            above += __popc((int)above_here);
            equal += __popc((int)equal_here);
        }
    }
}
