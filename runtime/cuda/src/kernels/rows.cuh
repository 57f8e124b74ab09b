// Rows of the KV cache as stored: 32-bit floats, 16-bit floats, or 8 bits with a scale per 32
// values (the last block of a row may be shorter). Widths are multiples of 4. A cache is
// `[positions of all pages, heads, width]`.
#pragma once
#include "base.cuh"

/// Widest key: a latent of 512 and a rotated part of 64 are 576.
#define MAX_KEY 640

/// The pages of a text, each of `1 << bits` positions, in the order of the text.
struct Pages {
    const int* table;
    int bits;

    /// Takes the pages of a token's text. `tables` are those of all texts, one after the other;
    /// `begins` has each token's place in them.
    DEVICE Pages(const int* tables, const int* begins, int token, int bits) : table(tables + begins[token]), bits(bits) {}

    /// Returns where a position of the text is in the cache.
    DEVICE i64 at(int position) const {
        return ((i64)table[position >> bits] << bits) + (position & ((1 << bits) - 1));
    }

    /// Returns where the row of a block of positions is in a cache with one row per block. It is in the
    /// page where the block ends, and a page has a row for each block that may end in it.
    DEVICE i64 of_block(int at, int block) const {
        const int page = ((at + 1) * block - 1) >> bits;
        return (i64)table[page] * (((1 << bits) + block - 1) / block) + at - (page << bits) / block;
    }

    /// Returns the first position after the page of `position`.
    DEVICE int page_end(int position) const { return ((position >> bits) + 1) << bits; }
};

/// Returns the first position that the token at `position` attends to: with a positive `window`
/// that many up to its own, with a negative one those from the last multiple of `-window` on, and
/// with 0 all.
DEVICE int first_attended(int position, int window) {
    if (window > 0) return position < window ? 0 : position + 1 - window;
    return window < 0 ? position / -window * -window : 0;
}

/// Caps a score smoothly at `cap`, unless that is 0.
DEVICE float capped(float score, float cap) {
    return cap == 0.0f ? score : cap * tanhf(score / cap);
}

struct RowsF32 {
    static DEVICE i64 row_bytes(int width) { return 4 * (i64)width; }
    static DEVICE float at(const u8* row, int i) { return ((const float*)row)[i]; }
    /// Returns four values from `i` on, a multiple of 4.
    static DEVICE float4 four(const u8* row, int i) { return *(const float4*)(row + 4 * i); }
};

struct RowsF16 {
    static DEVICE i64 row_bytes(int width) { return 2 * (i64)width; }
    static DEVICE float at(const u8* row, int i) { return widen(((const u16*)row)[i]); }
    static DEVICE float4 four(const u8* row, int i) {
        const uint2 w = *(const uint2*)(row + 2 * i);
        return make_float4(widen((u16)w.x), widen((u16)(w.x >> 16)), widen((u16)w.y), widen((u16)(w.y >> 16)));
    }
};

struct RowsQ8 {
    static DEVICE i64 row_bytes(int width) { return (i64)width + 2 * ((width + 31) / 32); }
    static DEVICE float at(const u8* row, int i) {
        const u8* block = row + 34 * (i / 32);
        return half_at(block) * (float)(i8)block[2 + i % 32];
    }
    static DEVICE float4 four(const u8* row, int i) {
        const u8* block = row + 34 * (i / 32);
        const u16* codes = (const u16*)(block + 2 + i % 32);
        const float scale = half_at(block);
        const u32 a = codes[0], b = codes[1];
        return make_float4(scale * (float)(i8)a, scale * (float)(i8)(a >> 8), scale * (float)(i8)b,
                           scale * (float)(i8)(b >> 8));
    }
};
