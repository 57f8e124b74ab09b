// Formats of one or two bits per value, and NVFP4. Blocks have 64, 128 or 256 values.
#pragma once
#include "formats.cuh"

/// f16 scale; 16 bytes of bits. A bit stands for minus or plus the scale.
struct Q1_0 {
    static const int LEN = 128, BYTES = 18, RUNS = 4;
    static const bool HAS_MIN = false;
    static DEVICE void unpack(const u8* block, int run, Run& r) {
        u32 bits;
        words<2, 1>(block + 2 + 4 * run, &bits);
        for (int i = 0; i < 8; i++) r.q[i] = less(spread4(bits >> (4 * i)) << 1, 1);
        scales(r, half_at(block), 0.0f);
    }
};

/// f16 scale; 16 bytes of four neighboring codes each, minus 1.
struct Q2_0 {
    static const int LEN = 64, BYTES = 18, RUNS = 2;
    static const bool HAS_MIN = false;
    static DEVICE void unpack(const u8* block, int run, Run& r) {
        u32 w[2];
        words<2, 2>(block + 2 + 8 * run, w);
        for (int i = 0; i < 8; i++) {
            const u32 byte = w[i / 4] >> (8 * (i % 4)) & 255;
            r.q[i] = less((byte | byte << 6 | byte << 12 | byte << 18) & BYTES4(3), 1);
        }
        scales(r, half_at(block), 0.0f);
    }
};

/// 64 bytes of 2-bit codes as in Q2_K, minus 1; f16 scale.
struct TQ2_0 {
    static const int LEN = 256, BYTES = 66, RUNS = 8;
    static const bool HAS_MIN = false;
    static DEVICE void unpack(const u8* block, int run, Run& r) {
        u32 w[8];
        words<2, 8>(block + 32 * (run / 4), w);
        for (int i = 0; i < 8; i++) r.q[i] = less(w[i] >> (2 * (run % 4)) & BYTES4(3), 1);
        scales(r, half_at(block + 64), 0.0f);
    }
};

/// Returns the first base-3 digit of each byte times `power`, minus 1.
DEVICE u32 digits(u32 bytes, u32 power) {
    // Every other byte at a time, with room for the products; bits above the byte are dropped.
    const u32 even = (bytes & 0x00ff00ff) * power & 0x00ff00ff;
    const u32 odd = (bytes >> 8 & 0x00ff00ff) * power & 0x00ff00ff;
    return less((even * 3 >> 8 & 0x00ff00ff) | (odd * 3 & 0xff00ff00), 1);
}

/// 48 + 4 bytes of base-3 digits as fractions of 256; f16 scale. Digits 0 to 4 of the first 32
/// bytes, then those of the next 16, then digits 0 to 3 of the last 4.
struct TQ1_0 {
    static const int LEN = 256, BYTES = 54, RUNS = 8;
    static const bool HAS_MIN = false;
    static DEVICE void unpack(const u8* block, int run, Run& r) {
        if (run < 5) {
            u32 w[8];
            words<2, 8>(block, w);
            u32 power = 1;
            for (int i = 0; i < run; i++) power *= 3;
            for (int i = 0; i < 8; i++) r.q[i] = digits(w[i], power);
        } else {
            u32 w[5];
            words<2, 5>(block + 32, w);
            const u32 power = run == 5 ? 1 : run == 6 ? 9 : 81;
            for (int i = 0; i < 4; i++) r.q[i] = digits(w[i], power);
            u32 last = 1;
            for (int i = 0; i < 4; i++) {
                r.q[4 + i] = run < 7 ? digits(w[i], 3 * power) : digits(w[4], last);
                last *= 3;
            }
        }
        scales(r, half_at(block + 52), 0.0f);
    }
};

/// Four scales that are 8-bit floats (E4M3 without sign); per 16 values 8 bytes of 4-bit floats,
/// whose low halves are values 0 to 7 and high halves 8 to 15. Codes are twice the float, and
/// scales are halved.
struct NVFP4 {
    static const int LEN = 64, BYTES = 36, RUNS = 2;
    static const bool HAS_MIN = false;
    static DEVICE void unpack(const u8* block, int run, Run& r) {
        const u32 levels[4] = {0x03020100, 0x0c080604, 0xfdfeff00, 0xf4f8fafc};
        u32 w[4];
        words<4, 4>(block + 4 + 16 * run, w);
        for (int i = 0; i < 4; i++) {
            // Alternating low and high halves of bytes.
            const u32 first = look_up4(w[i] & 0xffff, levels), second = look_up4(w[i] >> 16, levels);
            const int to = i / 2 * 4 + i % 2;
            r.q[to] = __byte_perm(first, second, 0x6420);
            r.q[to + 2] = __byte_perm(first, second, 0x7531);
        }
        for (int i = 0; i < 2; i++) {
            const u32 bits = block[2 * run + i];
            // As a 16-bit float the number is 2^8 too small.
            r.scale[i] = bits == 0x7f ? 0.0f : widen((u16)((bits & 0x7f) << 7)) * 128.0f;
            r.min[i] = 0.0f;
        }
    }
};
