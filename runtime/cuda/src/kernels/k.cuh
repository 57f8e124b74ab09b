// The K formats: blocks of 256 values with scales that are themselves quantized.
#pragma once
#include "formats.cuh"

/// 4-bit scale and minimum per 16 values; 64 bytes of 2-bit codes; two f16 factors on scales and
/// minimums.
struct Q2_K {
    static const int LEN = 256, BYTES = 84, RUNS = 8;
    static const bool HAS_MIN = true;
    static DEVICE void unpack(const u8* block, int run, Run& r) {
        u32 w[8];
        words<4, 8>(block + 16 + 32 * (run / 4), w);
        for (int i = 0; i < 8; i++) r.q[i] = w[i] >> (2 * (run % 4)) & BYTES4(3);
        const float d = half_at(block + 80), dmin = half_at(block + 82);
        for (int i = 0; i < 2; i++) {
            const u32 s = block[2 * run + i];
            r.scale[i] = d * (float)(s & 15);
            r.min[i] = dmin * (float)(s >> 4);
        }
    }
};

/// 32 bytes of third bits; 64 bytes of 2-bit codes; 16 6-bit scales, minus 32, in 12 bytes; f16
/// scale. Codes minus 4.
struct Q3_K {
    static const int LEN = 256, BYTES = 110, RUNS = 8;
    static const bool HAS_MIN = false;
    static DEVICE void unpack(const u8* block, int run, Run& r) {
        u32 low[8], third[8];
        words<2, 8>(block, third);
        words<2, 8>(block + 32 + 32 * (run / 4), low);
        for (int i = 0; i < 8; i++) {
            const u32 code = (low[i] >> (2 * (run % 4)) & BYTES4(3)) | (third[i] >> run & BYTES4(1)) << 2;
            r.q[i] = less(code, 4);
        }
        const float d = half_at(block + 108);
        for (int i = 0; i < 2; i++) {
            const int at = 2 * run + i;
            const u32 four = block[96 + at % 8] >> (4 * (at / 8)) & 15;
            const u32 two = block[104 + at % 4] >> (2 * (at / 4)) & 3;
            r.scale[i] = d * ((float)(four | two << 4) - 32.0f);
            r.min[i] = 0.0f;
        }
    }
};

/// Unpacks scale and minimum of a run from the header of Q4_K and Q5_K: two f16 factors, then 12
/// bytes of 6-bit numbers.
DEVICE void k_scales(const u8* block, int run, Run& r) {
    const u8* s = block + 4;
    u32 scale, min;
    if (run < 4) {
        scale = s[run] & 63;
        min = s[4 + run] & 63;
    } else {
        scale = (s[4 + run] & 15) | (u32)(s[run - 4] >> 6) << 4;
        min = (u32)(s[4 + run] >> 4) | (u32)(s[run] >> 6) << 4;
    }
    scales(r, half_at(block) * (float)scale, half_at(block + 2) * (float)min);
}

/// Scales and minimums; 128 bytes: the low halves of each 32 are one run of codes, the high halves
/// the next.
struct Q4_K {
    static const int LEN = 256, BYTES = 144, RUNS = 8;
    static const bool HAS_MIN = true;
    static DEVICE void unpack(const u8* block, int run, Run& r) {
        u32 w[8];
        words<16, 8>(block + 16 + 32 * (run / 2), w);
        for (int i = 0; i < 8; i++) r.q[i] = w[i] >> (4 * (run % 2)) & BYTES4(15);
        k_scales(block, run, r);
    }
};

/// As Q4_K, with 32 bytes of fifth bits before the codes.
struct Q5_K {
    static const int LEN = 256, BYTES = 176, RUNS = 8;
    static const bool HAS_MIN = true;
    static DEVICE void unpack(const u8* block, int run, Run& r) {
        u32 low[8], fifth[8];
        words<16, 8>(block + 16, fifth);
        words<16, 8>(block + 48 + 32 * (run / 2), low);
        for (int i = 0; i < 8; i++) {
            r.q[i] = (low[i] >> (4 * (run % 2)) & BYTES4(15)) | (fifth[i] >> run & BYTES4(1)) << 4;
        }
        k_scales(block, run, r);
    }
};

/// 128 bytes of low 4 bits; 64 of high 2 bits; 16 signed 8-bit scales; f16 scale. Codes minus 32.
struct Q6_K {
    static const int LEN = 256, BYTES = 210, RUNS = 8;
    static const bool HAS_MIN = false;
    static DEVICE void unpack(const u8* block, int run, Run& r) {
        const int half = run / 4, of = run % 4;
        u32 low[8], high[8];
        words<2, 8>(block + 64 * half + 32 * (of % 2), low);
        words<2, 8>(block + 128 + 32 * half, high);
        for (int i = 0; i < 8; i++) {
            const u32 code = (low[i] >> (4 * (of / 2)) & BYTES4(15)) | (high[i] >> (2 * of) & BYTES4(3)) << 4;
            r.q[i] = less(code, 32);
        }
        const float d = half_at(block + 208);
        for (int i = 0; i < 2; i++) {
            r.scale[i] = d * (float)(i8)block[192 + 2 * run + i];
            r.min[i] = 0.0f;
        }
    }
};

/// f16 scale; eight 6-bit scales, minus 32 (2 high bits each in a u16, 4 low bits each in 4 bytes);
/// 16 bytes per 32 values as in IQ4_NL.
struct IQ4_XS {
    static const int LEN = 256, BYTES = 136, RUNS = 8;
    static const bool HAS_MIN = false;
    static DEVICE void unpack(const u8* block, int run, Run& r) {
        u32 w[4], levels[4];
        words<8, 4>(block + 8 + 16 * run, w);
        iq4_levels(levels);
        look_up(w, levels, r.q);
        const u32 low = block[4 + run / 2] >> (4 * (run % 2)) & 15;
        const u32 high = *(const u16*)(block + 2) >> (2 * run) & 3;
        scales(r, half_at(block) * (float)((int)(low | high << 4) - 32), 0.0f);
    }
};
