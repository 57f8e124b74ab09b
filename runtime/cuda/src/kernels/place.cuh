// What is done to new rows before they are in the KV cache: norms, rotation, and storing in each type.
#pragma once
#include "rows.cuh"

/// Normalizes a row in place.
DEVICE void norm_row(float* row, int width, const float* norm, float eps, float* room) {
    float squares = 0.0f;
    for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) squares += row[i] * row[i];
    const float factor = 1.0f / sqrtf(block_sum(squares, room) / (float)width + eps);
    for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) row[i] = row[i] * factor * norm[i];
}

/// Rotates the pairs of a token's row with all threads of a block; `turns` is `[tokens, half]` of
/// cosine and sine. The values of a pair are adjacent, or `half` values apart.
DEVICE void rotate(float* row, const float* turns, int token, int half, int neighbours) {
    const float* turn = turns + (i64)token * half * 2;
    for (int i = (int)threadIdx.x; i < half; i += (int)blockDim.x) {
        float* a = row + (neighbours ? 2 * i : i);
        float* b = neighbours ? a + 1 : a + half;
        const float cosine = turn[2 * i], sine = turn[2 * i + 1], from_a = *a, from_b = *b;
        *a = from_a * cosine - from_b * sine;
        *b = from_a * sine + from_b * cosine;
    }
}

/// Rotates the pairs of a row as at a position, with all threads of a block. `frequencies` are radians per
/// position.
DEVICE void rotate_at(float* row, const float* frequencies, float magnitude, int position, int half, int neighbours) {
    for (int i = (int)threadIdx.x; i < half; i += (int)blockDim.x) {
        float* a = row + (neighbours ? 2 * i : i);
        float* b = neighbours ? a + 1 : a + half;
        const float angle = (float)position * frequencies[i], from_a = *a, from_b = *b;
        const float cosine = magnitude * cosf(angle), sine = magnitude * sinf(angle);
        *a = from_a * cosine - from_b * sine;
        *b = from_a * sine + from_b * cosine;
    }
}

struct StoreF32 {
    static DEVICE i64 row_bytes(int width) { return RowsF32::row_bytes(width); }
    static DEVICE void row(const float* from, int width, u8* to) {
        for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) ((float*)to)[i] = from[i];
    }
};

struct StoreF16 {
    static DEVICE i64 row_bytes(int width) { return RowsF16::row_bytes(width); }
    static DEVICE void row(const float* from, int width, u8* to) {
        for (int i = (int)threadIdx.x; i < width; i += (int)blockDim.x) ((u16*)to)[i] = narrow(from[i]);
    }
};

/// Stores blocks of 32 values, a warp each. A block's scale is the smallest 16-bit float not below
/// its largest magnitude / 127.
struct StoreQ8 {
    static DEVICE i64 row_bytes(int width) { return RowsQ8::row_bytes(width); }
    static DEVICE void row(const float* from, int width, u8* row) {
        const int lane = threadIdx.x % WARP;
        for (int block = (int)(threadIdx.x / WARP); 32 * block < width; block += (int)(blockDim.x / WARP)) {
            const bool inside = 32 * block + lane < width;
            const float v = inside ? from[32 * block + lane] : 0.0f;
            int bits = __float_as_int(v) & 0x7fffffff;
            for (int step = WARP / 2; step > 0; step /= 2) {
                const int other = __shfl_xor_sync(ALL_LANES, bits, step);
                bits = other > bits ? other : bits;
            }
            const float exact = __fdiv_rn(__int_as_float(bits), 127.0f);
            u16 scale = narrow(exact);
            if (widen(scale) < exact) scale++;
            const float inverse = scale == 0 ? 0.0f : __fdiv_rn(1.0f, widen(scale));
            u8* to = row + 34 * block;
            if (inside) to[2 + lane] = (u8)(i8)__float2int_rn(__fmul_rn(v, inverse));
            if (lane == 0) *(u16*)to = scale;
        }
    }
};

/// Returns the bytes of a token's row of a head in a cache.
template <class Store>
DEVICE u8* stored_row(u8* cache, int head, int heads, int width, const int* positions, const int* begins,
                      const int* tables, int page_bits, int token) {
    const i64 at = Pages(tables, begins, token, page_bits).at(positions[token]);
    return cache + (at * heads + head) * Store::row_bytes(width);
}
