// Formats whose codes are indices of grid points. The program writes the grids to a header, from
// the tables of its CPU kernels.
#pragma once
#include "formats.cuh"
#include "grids.cuh"

/// Returns a byte mask for each of the lowest four bits, 0xff for a negative value.
DEVICE u32 sign_mask(u32 bits) {
    return spread4(bits) * 0xff;
}

/// Negates the bytes (each 1 to 127) whose sign bit is set. No byte carries into the next: a
/// complemented one is at most 0xfe.
DEVICE u32 with_signs(u32 bytes, u32 bits) {
    const u32 mask = sign_mask(bits);
    return (bytes ^ mask) + (mask & BYTES4(1));
}

/// Returns the eight sign bits of seven stored ones: the eighth makes the number of minus signs
/// even.
DEVICE u32 even_signs(u32 bits) {
    const u32 seven = bits & 0x7f;
    return seven | (u32)(__popc((int)seven) & 1) << 7;
}

/// Unpacks eight values: magnitudes of a grid point with signs.
DEVICE void eight(u32* q, u64 grid, u32 signs) {
    q[0] = with_signs((u32)grid, signs);
    q[1] = with_signs((u32)(grid >> 32), signs >> 4);
}

/// f16 scale; per 32 values four grid indices (a byte each) and 32 bits: four times seven signs, a
/// 4-bit scale.
struct IQ2_XXS {
    static const int LEN = 256, BYTES = 66, RUNS = 8;
    static const bool HAS_MIN = false;
    static DEVICE void unpack(const u8* block, int run, Run& r) {
        u32 w[2];
        words<2, 2>(block + 2 + 8 * run, w);
        for (int k = 0; k < 4; k++) eight(r.q + 2 * k, IQ2_XXS_GRID[w[0] >> (8 * k) & 255], even_signs(w[1] >> (7 * k)));
        scales(r, half_at(block) * (0.5f + (float)(w[1] >> 28)) * 0.25f, 0.0f);
    }
};

/// Unpacks the two scales of a run from a byte.
DEVICE void iq2_scales(Run& r, float d, u32 byte) {
    r.scale[0] = d * (0.5f + (float)(byte & 15)) * 0.25f;
    r.scale[1] = d * (0.5f + (float)(byte >> 4)) * 0.25f;
    r.min[0] = r.min[1] = 0.0f;
}

/// f16 scale; a u16 per 8 values (9-bit grid index, seven signs); a 4-bit scale per 16 values.
struct IQ2_XS {
    static const int LEN = 256, BYTES = 74, RUNS = 8;
    static const bool HAS_MIN = false;
    static DEVICE void unpack(const u8* block, int run, Run& r) {
        for (int k = 0; k < 4; k++) {
            const u32 word = *(const u16*)(block + 2 + 8 * run + 2 * k);
            eight(r.q + 2 * k, IQ2_XS_GRID[word & 511], even_signs(word >> 9));
        }
        iq2_scales(r, half_at(block), block[66 + run]);
    }
};

/// f16 scale; a byte of grid index per 8 values; 32 bytes of signs; 8 bytes with two more grid bits
/// per 8 values; a 4-bit scale per 16 values.
struct IQ2_S {
    static const int LEN = 256, BYTES = 82, RUNS = 8;
    static const bool HAS_MIN = false;
    static DEVICE void unpack(const u8* block, int run, Run& r) {
        u32 low, signs;
        words<2, 1>(block + 2 + 4 * run, &low);
        words<2, 1>(block + 34 + 4 * run, &signs);
        const u32 high = block[66 + run];
        for (int k = 0; k < 4; k++) {
            const u32 number = (low >> (8 * k) & 255) | (high >> (2 * k) & 3) << 8;
            eight(r.q + 2 * k, IQ2_S_GRID[number], signs >> (8 * k) & 255);
        }
        iq2_scales(r, half_at(block), block[74 + run]);
    }
};

/// f16 scale; a byte of grid index per 4 values; per 32 values 32 bits: four times seven signs, a
/// scale.
struct IQ3_XXS {
    static const int LEN = 256, BYTES = 98, RUNS = 8;
    static const bool HAS_MIN = false;
    static DEVICE void unpack(const u8* block, int run, Run& r) {
        u32 w[2], bits;
        words<2, 2>(block + 2 + 8 * run, w);
        words<2, 1>(block + 66 + 4 * run, &bits);
        for (int k = 0; k < 8; k++) {
            const u32 signs = even_signs(bits >> (7 * (k / 2)));
            r.q[k] = with_signs(IQ3_XXS_GRID[w[k / 4] >> (8 * (k % 4)) & 255], signs >> (4 * (k % 2)));
        }
        scales(r, half_at(block) * (0.5f + (float)(bits >> 28)) * 0.5f, 0.0f);
    }
};

/// f16 scale; a byte of grid index per 4 values; 8 bytes of ninth grid bits; 32 bytes of signs; a
/// 4-bit scale per 32 values.
struct IQ3_S {
    static const int LEN = 256, BYTES = 110, RUNS = 8;
    static const bool HAS_MIN = false;
    static DEVICE void unpack(const u8* block, int run, Run& r) {
        u32 w[2], signs;
        words<2, 2>(block + 2 + 8 * run, w);
        words<2, 1>(block + 74 + 4 * run, &signs);
        const u32 ninth = block[66 + run];
        for (int k = 0; k < 8; k++) {
            const u32 number = (w[k / 4] >> (8 * (k % 4)) & 255) | (ninth >> k & 1) << 8;
            r.q[k] = with_signs(IQ3_S_GRID[number], signs >> (4 * k));
        }
        const u32 s = block[106 + run / 2] >> (4 * (run % 2)) & 15;
        scales(r, half_at(block) * (float)(1 + 2 * s), 0.0f);
    }
};

/// Adds one, or minus one, to each of eight signed bytes that are -8, 0 or 8. With flipped sign
/// bits they are 0x78, 0x80 or 0x88, so no byte carries into the next.
DEVICE void with_offset(u32* q, u64 grid, bool negative) {
    const u32 step = negative ? 0u - BYTES4(1) : BYTES4(1);
    q[0] = (((u32)grid ^ BYTES4(0x80)) + step) ^ BYTES4(0x80);
    q[1] = (((u32)(grid >> 32) ^ BYTES4(0x80)) + step) ^ BYTES4(0x80);
}

/// f16 scale; a byte of grid index per 8 values; a u16 per 32 values: four times three more grid
/// bits, a 3-bit scale, and the sign of an offset of an eighth. Codes are in eighths.
struct IQ1_S {
    static const int LEN = 256, BYTES = 50, RUNS = 8;
    static const bool HAS_MIN = false;
    static DEVICE void unpack(const u8* block, int run, Run& r) {
        const u32 word = *(const u16*)(block + 34 + 2 * run);
        for (int k = 0; k < 4; k++) {
            const u32 number = block[2 + 4 * run + k] | (word >> (3 * k) & 7) << 8;
            with_offset(r.q + 2 * k, IQ1_GRID[number], (word & 0x8000) != 0);
        }
        scales(r, half_at(block) * (float)(2 * (word >> 12 & 7) + 1) * 0.125f, 0.0f);
    }
};

/// A byte of grid index per 8 values; 4 bits per 8 values (three more grid bits and the sign of an
/// offset); four u16 with 16 3-bit scales, and an f16 scale in the remaining four bits of each.
struct IQ1_M {
    static const int LEN = 256, BYTES = 56, RUNS = 8;
    static const bool HAS_MIN = false;
    static DEVICE void unpack(const u8* block, int run, Run& r) {
        for (int k = 0; k < 4; k++) {
            const u32 bits = block[32 + 2 * run + k / 2] >> (4 * (k % 2));
            with_offset(r.q + 2 * k, IQ1_GRID[block[4 * run + k] | (bits & 7) << 8], (bits & 8) != 0);
        }
        const u16* w = (const u16*)(block + 48);
        const float d = widen((u16)(w[0] >> 12 | w[1] >> 12 << 4 | w[2] >> 12 << 8 | w[3] >> 12 << 12));
        for (int i = 0; i < 2; i++) {
            const int at = 2 * run + i;
            r.scale[i] = d * (float)(2 * (w[at / 4] >> (3 * (at % 4)) & 7) + 1) * 0.125f;
            r.min[i] = 0.0f;
        }
    }
};
