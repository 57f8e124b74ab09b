// Formats with blocks of 32 values.
#pragma once
#include "formats.cuh"

/// f16 scale; 16 bytes whose low halves are values 0 to 15 and high halves 16 to 31, minus 8.
struct Q4_0 {
    static const int LEN = 32, BYTES = 18, RUNS = 1;
    static const bool HAS_MIN = false;
    static DEVICE void unpack(const u8* block, int, Run& r) {
        u32 w[4];
        words<2, 4>(block + 2, w);
        nibbles(w, r.q);
        for (int i = 0; i < 8; i++) r.q[i] = less(r.q[i], 8);
        scales(r, half_at(block), 0.0f);
    }
};

/// f16 scale; f16 addend; codes as in Q4_0, without the 8.
struct Q4_1 {
    static const int LEN = 32, BYTES = 20, RUNS = 1;
    static const bool HAS_MIN = true;
    static DEVICE void unpack(const u8* block, int, Run& r) {
        u32 w[4];
        words<4, 4>(block + 4, w);
        nibbles(w, r.q);
        scales(r, half_at(block), -half_at(block + 2));
    }
};

/// Adds a fifth bit to each of 32 4-bit codes.
DEVICE void fifth_bits(u32* q, u32 bits) {
    for (int i = 0; i < 8; i++) q[i] |= spread4(bits >> (4 * i)) << 4;
}

/// f16 scale; 32 fifth bits; 16 bytes as in Q4_0; minus 16.
struct Q5_0 {
    static const int LEN = 32, BYTES = 22, RUNS = 1;
    static const bool HAS_MIN = false;
    static DEVICE void unpack(const u8* block, int, Run& r) {
        u32 w[5];
        words<2, 5>(block + 2, w);
        nibbles(w + 1, r.q);
        fifth_bits(r.q, w[0]);
        for (int i = 0; i < 8; i++) r.q[i] = less(r.q[i], 16);
        scales(r, half_at(block), 0.0f);
    }
};

/// f16 scale; f16 addend; 32 fifth bits; 16 bytes as in Q4_0.
struct Q5_1 {
    static const int LEN = 32, BYTES = 24, RUNS = 1;
    static const bool HAS_MIN = true;
    static DEVICE void unpack(const u8* block, int, Run& r) {
        u32 w[5];
        words<4, 5>(block + 4, w);
        nibbles(w + 1, r.q);
        fifth_bits(r.q, w[0]);
        scales(r, half_at(block), -half_at(block + 2));
    }
};

/// f16 scale; 32 signed bytes.
struct Q8_0 {
    static const int LEN = 32, BYTES = 34, RUNS = 1;
    static const bool HAS_MIN = false;
    static DEVICE void unpack(const u8* block, int, Run& r) {
        words<2, 8>(block + 2, r.q);
        scales(r, half_at(block), 0.0f);
    }
};

/// f16 scale; 16 bytes as in Q4_0 whose codes are indices of 16 uneven levels.
struct IQ4_NL {
    static const int LEN = 32, BYTES = 18, RUNS = 1;
    static const bool HAS_MIN = false;
    static DEVICE void unpack(const u8* block, int, Run& r) {
        u32 w[4], levels[4];
        words<2, 4>(block + 2, w);
        iq4_levels(levels);
        look_up(w, levels, r.q);
        scales(r, half_at(block), 0.0f);
    }
};

/// A byte that is a power of two (exponent biased by 127); 16 bytes as in Q4_0 of 4-bit floats.
/// Codes are twice the float, and the scale is half of the power.
struct MXFP4 {
    static const int LEN = 32, BYTES = 17, RUNS = 1;
    static const bool HAS_MIN = false;
    static DEVICE void unpack(const u8* block, int, Run& r) {
        const u32 levels[4] = {0x03020100, 0x0c080604, 0xfdfeff00, 0xf4f8fafc};
        u32 w[4];
        words<1, 4>(block + 1, w);
        look_up(w, levels, r.q);
        const u32 e = block[0];
        scales(r, __int_as_float((int)(e < 2 ? 0x00200000u << e : (e - 1) << 23)), 0.0f);
    }
};
