// Rows of the KV cache as stored: 32-bit floats, 16-bit floats, or 8 bits with a scale per 32
// values (the last block of a row may be shorter). Widths are multiples of 4.
#pragma once
#include "base.cuh"

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
