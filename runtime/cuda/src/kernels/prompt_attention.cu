// Attention of many tokens over the KV cache, on tensor cores of 16-bit floats. Queries, keys,
// values and weights are rounded to 16 bits; products are summed in 32 bits.
//
// A block takes rows (a token with one of the heads of a group) and iterates over the positions
// that any of them attends to, a tile at a time, with a running maximum and sum per row. Tiles
// begin at fixed positions, and a tile that a row does not attend to leaves its sums unchanged to
// the bit. So a result does not depend on other tokens of the batch.
//
// Long contexts are also split at fixed positions; `join_chunks` combines the splits.
#include "halves.cuh"
#include "rows.cuh"

/// Positions per tile.
#define KEYS 32
/// Most positions per block, a multiple of `KEYS`.
#define SPLIT 2048
/// Columns of keys in shared memory at a time, and columns of values per block.
#define PART 128
/// 16-bit floats from one key to the next, so that a half warp's reads of 8 bytes hit different
/// banks.
#define KEY_STRIDE (PART + 16)
/// Words from four positions (two pairs, side by side per column) to the next four, so that reads
/// hit different banks.
#define VALUE_STRIDE (2 * PART + 8)

/// Returns four stored values from `i` on as 16-bit floats.
template <class Rows>
struct Halves {
    static DEVICE uint2 four(const u8* row, int i) { return four_halves(Rows::four(row, i)); }
};

template <>
struct Halves<RowsF16> {
    static DEVICE uint2 four(const u8* row, int i) { return *(const uint2*)(row + 2 * i); }
};

DEVICE int least(int a, int b) {
    return a < b ? a : b;
}

/// Loads columns `column0` to `column0 + PART` of the keys of a tile, zeros outside. Positions are
/// `stride` bytes apart in the cache.
template <class Rows, int WARPS>
DEVICE void load_keys(u16* to, const u8* keys, const Pages& pages, i64 stride, int p0, int end, int column0, int width,
                      int padded) {
    const int warp = (int)threadIdx.x / WARP, column = column0 + (int)threadIdx.x % WARP * 4;
    if (column >= padded) return;
#pragma unroll 4
    for (int p = warp; p < KEYS; p += WARPS) {
        uint2 four;
        four.x = four.y = 0;
        if (p0 + p < end && column < width) four = Halves<Rows>::four(keys + pages.at(p0 + p) * stride, column);
        *(uint2*)(to + p * KEY_STRIDE + column - column0) = four;
    }
}

/// Loads columns `column0` to `column0 + n` of the values of a tile, zeros outside: weights of 0
/// must not meet NaN, and columns are multiplied by eights. Positions 2 i, 2 i + 1, 2 i + 8 and 2 i + 9 of 16 are side by side per
/// column, as a lane multiplies them.
template <class Rows, int WARPS>
DEVICE void load_values(u32* to, const u8* values, const Pages& pages, i64 stride, int p0, int end, int column0, int n) {
    const int warp = (int)threadIdx.x / WARP, column = (int)threadIdx.x % WARP * 4;
    if (column >= (n + 7) / 8 * 8) return;
#pragma unroll 2
    for (int group = warp; group < KEYS / 4; group += WARPS) {
        const int first = p0 + group / 4 * 16 + group % 4 * 2;
        uint2 row[4];
        for (int i = 0; i < 4; i++) {
            const int p = first + i / 2 * 8 + i % 2;
            row[i].x = row[i].y = 0;
            if (p < end && column < n) row[i] = Halves<Rows>::four(values + pages.at(p) * stride, column0 + column);
        }
        uint4* out = (uint4*)(to + group * VALUE_STRIDE + 2 * column);
        out[0] = make_uint4(__byte_perm(row[0].x, row[1].x, 0x5410), __byte_perm(row[2].x, row[3].x, 0x5410),
                            __byte_perm(row[0].x, row[1].x, 0x7632), __byte_perm(row[2].x, row[3].x, 0x7632));
        out[1] = make_uint4(__byte_perm(row[0].y, row[1].y, 0x5410), __byte_perm(row[2].y, row[3].y, 0x5410),
                            __byte_perm(row[0].y, row[1].y, 0x7632), __byte_perm(row[2].y, row[3].y, 0x7632));
    }
}

/// Computes the shares of splits: `mixed` is `[tokens, heads, splits, value_width]`, `largest` and
/// `sums` `[tokens, heads, splits]`, as `attend` leaves them. The tokens follow each other in one
/// text. A block has 16 rows per warp, and keys are at most `MOST_WIDE` wide.
///
/// Grid: blocks of rows; heads of keys and values times parts of values; splits, from the first
/// that a token attends to.
template <class Rows, int WARPS, int MOST_WIDE>
DEVICE void prompt_attend(const float* queries, const u8* keys, const u8* values, int n_head_kv, int group,
                          int key_width, int value_row_width, int value_width, float scale, float cap,
                          const int* positions, const int* begins, const int* tables, int page_bits, int tokens,
                          int window, float* mixed, float* largest, float* sums) {
    constexpr int BLOCK_ROWS = 16 * WARPS, QUERY_STRIDE = MOST_WIDE + 16;
    // Wide queries leave too little shared memory for both.
    constexpr bool APART = MOST_WIDE <= PART;
    __shared__ uint4 query_room[BLOCK_ROWS * QUERY_STRIDE / 8];
    __shared__ uint4 key_room[KEYS * KEY_STRIDE / 8];
    __shared__ uint4 value_room[APART ? KEYS / 4 * VALUE_STRIDE / 4 : 1];
    u16* const query = (u16*)query_room;
    u16* const key = (u16*)key_room;
    u32* const value = APART ? (u32*)value_room : (u32*)key_room;
    const int thread = (int)threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    const int parts = (value_width + PART - 1) / PART;
    const int kv_head = (int)blockIdx.y / parts, first_value = (int)blockIdx.y % parts * PART;
    const int n_values = least(PART, value_width - first_value);
    const int n_head = n_head_kv * group, n_rows = tokens * group;
    // The last rows attend to the most positions, so they begin first.
    const int row0 = (int)(gridDim.x - 1 - blockIdx.x) * BLOCK_ROWS;
    const int last = least(row0 + BLOCK_ROWS, n_rows) - 1;
    const Pages pages(tables, begins, 0, page_bits);
    const int begin = positions[0];
    const int padded = (key_width + 15) / 16 * 16;
    for (int i = thread; i < BLOCK_ROWS * (padded / 4); i += WARP * WARPS) {
        const int r = i / (padded / 4), column = i % (padded / 4) * 4, row = row0 + r;
        float4 q = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (row < n_rows && column < key_width) {
            const i64 at = (i64)(row / group) * n_head + kv_head * group + row % group;
            q = *(const float4*)(queries + at * key_width + column);
        }
        *(uint2*)(query + r * QUERY_STRIDE + column) =
            four_halves(make_float4(scale * q.x, scale * q.y, scale * q.z, scale * q.w));
    }
    // Positions that the lane's two rows attend to: none if there is no row.
    const int rows[2] = {row0 + 16 * warp + lane / 4, row0 + 16 * warp + lane / 4 + 8};
    int from[2], to[2];
    for (int i = 0; i < 2; i++) {
        to[i] = rows[i] < n_rows ? begin + rows[i] / group : -1;
        from[i] = first_attended(to[i], window);
    }
    const int first_split = first_attended(begin, window) / SPLIT;
    const int split_start = (first_split + (int)blockIdx.z) * SPLIT;
    const int first_seen = first_attended(begin + row0 / group, window);
    const int start = first_seen > split_start ? first_seen / KEYS * KEYS : split_start;
    const int end = least(begin + last / group + 1, split_start + SPLIT);
    const i64 key_bytes = Rows::row_bytes(key_width), value_bytes = Rows::row_bytes(value_row_width);
    const i64 key_stride = n_head_kv * key_bytes, value_stride = n_head_kv * value_bytes;
    keys += kv_head * key_bytes;
    values += kv_head * value_bytes;
    float acc[PART / 8][4];
    float most[2], sum[2];
    for (int j = 0; j < PART / 8; j++) {
        for (int i = 0; i < 4; i++) acc[j][i] = 0.0f;
    }
    for (int i = 0; i < 2; i++) {
        most[i] = minus_infinity();
        sum[i] = 0.0f;
    }
    for (int p0 = start; p0 < end; p0 += KEYS) {
        float scores[KEYS / 8][4];
        for (int j = 0; j < KEYS / 8; j++) {
            for (int i = 0; i < 4; i++) scores[j][i] = 0.0f;
        }
        for (int column0 = 0; column0 < padded; column0 += PART) {
            __syncthreads();
            load_keys<Rows, WARPS>(key, keys, pages, key_stride, p0, end, column0, key_width, padded);
            if (APART) load_values<Rows, WARPS>(value, values, pages, value_stride, p0, end, first_value, n_values);
            __syncthreads();
            const int n = least(PART, padded - column0);
            const u16* q = query + (16 * warp + lane / 4) * QUERY_STRIDE + column0 + lane % 4 * 4;
            const u16* k = key + lane / 4 * KEY_STRIDE + lane % 4 * 4;
            // The order of columns within 16 is arbitrary, as long as both sides have the same.
#pragma unroll 2
            for (int c = 0; c < n; c += 16) {
                const uint2 low = *(const uint2*)(q + c), high = *(const uint2*)(q + 8 * QUERY_STRIDE + c);
                for (int j = 0; j < KEYS / 8; j++) {
                    multiply_halves(scores[j], low, high, *(const uint2*)(k + 8 * j * KEY_STRIDE + c));
                }
            }
        }
        float largest_here[2] = {most[0], most[1]};
        for (int j = 0; j < KEYS / 8; j++) {
            for (int i = 0; i < 4; i++) {
                const int p = p0 + 8 * j + lane % 4 * 2 + i % 2;
                scores[j][i] = p < from[i / 2] || p > to[i / 2] ? minus_infinity() : capped(scores[j][i], cap);
                largest_here[i / 2] = fmaxf(largest_here[i / 2], scores[j][i]);
            }
        }
        float shift[2];
        for (int i = 0; i < 2; i++) {
            float here = largest_here[i];
            here = fmaxf(here, __shfl_xor_sync(ALL_LANES, here, 1));
            here = fmaxf(here, __shfl_xor_sync(ALL_LANES, here, 2));
            // A row without any position so far has no maximum to shift by.
            shift[i] = here == minus_infinity() ? 0.0f : here;
            const float fade = expf(most[i] - shift[i]);
            most[i] = here;
            sum[i] *= fade;
            for (int j = 0; j < PART / 8; j++) {
                acc[j][2 * i] *= fade;
                acc[j][2 * i + 1] *= fade;
            }
        }
        u32 weights[KEYS / 8][2];
        for (int j = 0; j < KEYS / 8; j++) {
            for (int i = 0; i < 2; i++) {
                weights[j][i] = pack_halves(expf(scores[j][2 * i] - shift[i]), expf(scores[j][2 * i + 1] - shift[i]));
                // The sum is of the rounded weights, so that their total is 1.
                sum[i] += widen((u16)weights[j][i]) + widen((u16)(weights[j][i] >> 16));
            }
        }
        if (!APART) {
            __syncthreads();
            load_values<Rows, WARPS>(value, values, pages, value_stride, p0, end, first_value, n_values);
            __syncthreads();
        }
        for (int s = 0; s < KEYS / 16; s++) {
            uint2 low, high;
            low.x = weights[2 * s][0];
            low.y = weights[2 * s + 1][0];
            high.x = weights[2 * s][1];
            high.y = weights[2 * s + 1][1];
            const u32* v = value + (4 * s + lane % 4) * VALUE_STRIDE + lane / 4 * 2;
            for (int j = 0; j < PART / 8; j++) {
                if (8 * j < n_values) multiply_halves(acc[j], low, high, *(const uint2*)(v + 16 * j));
            }
        }
    }
    for (int i = 0; i < 2; i++) {
        sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 1);
        sum[i] += __shfl_xor_sync(ALL_LANES, sum[i], 2);
        if (rows[i] >= n_rows) continue;
        const i64 head = (i64)(rows[i] / group) * n_head + kv_head * group + rows[i] % group;
        const i64 at = head * gridDim.z + blockIdx.z;
        if (first_value == 0 && lane % 4 == 0) {
            largest[at] = most[i];
            sums[at] = sum[i];
        }
        float* out = mixed + at * value_width + first_value;
        for (int j = 0; j < PART / 8; j++) {
            const int column = 8 * j + lane % 4 * 2;
            if (column < n_values) out[column] = acc[j][2 * i];
            if (column + 1 < n_values) out[column + 1] = acc[j][2 * i + 1];
        }
    }
}

#define PROMPT_ATTEND(NAME, ROWS, WARPS, MOST_WIDE)                                                                     \
    KERNEL NAME(const float* queries, const u8* keys, const u8* values, int n_head_kv, int group, int key_width,        \
                int value_row_width, int value_width, float scale, float cap, const int* positions,                     \
                const int* begins, const int* tables, int page_bits, int tokens, int window, float* mixed,              \
                float* largest, float* sums) {                                                                          \
        prompt_attend<ROWS, WARPS, MOST_WIDE>(queries, keys, values, n_head_kv, group, key_width, value_row_width,      \
                                              value_width, scale, cap, positions, begins, tables, page_bits,            \
                                              tokens, window, mixed, largest, sums);                                    \
    }

PROMPT_ATTEND(prompt_attend_f32, RowsF32, 4, 128)
PROMPT_ATTEND(prompt_attend_f16, RowsF16, 4, 128)
PROMPT_ATTEND(prompt_attend_q8, RowsQ8, 4, 128)
PROMPT_ATTEND(prompt_attend_wide_f32, RowsF32, 4, 256)
PROMPT_ATTEND(prompt_attend_wide_f16, RowsF16, 4, 256)
PROMPT_ATTEND(prompt_attend_wide_q8, RowsQ8, 4, 256)
PROMPT_ATTEND(prompt_attend_latent_f32, RowsF32, 2, 576)
PROMPT_ATTEND(prompt_attend_latent_f16, RowsF16, 2, 576)
PROMPT_ATTEND(prompt_attend_latent_q8, RowsQ8, 2, 576)
