// What all block formats share: codes of at most 8 bits, a scale and a minimum per 16 of them, and
// `value = scale * code - min`. A format unpacks one run of 32 values, which products and
// dequantization start from.
#pragma once
#include "base.cuh"

/// 32 unpacked values.
struct Run {
    /// Signed codes in the order of the row, four per word.
    u32 q[8];
    /// Scale of each half.
    float scale[2];
    /// Subtracted from each half; zero in formats without minimums.
    float min[2];
};

/// Sets the same scale and minimum for both halves.
DEVICE void scales(Run& r, float scale, float min) {
    r.scale[0] = r.scale[1] = scale;
    r.min[0] = r.min[1] = min;
}

/// Unpacks the 32 4-bit numbers of four words, low halves first.
DEVICE void nibbles(const u32* w, u32* q) {
    for (int i = 0; i < 4; i++) {
        q[i] = w[i] & BYTES4(15);
        q[i + 4] = w[i] >> 4 & BYTES4(15);
    }
}

/// Looks up four 4-bit numbers, the lowest 16 bits, in a table of 16 bytes.
DEVICE u32 look_up4(u32 numbers, const u32* levels) {
    const u32 below = __byte_perm(levels[0], levels[1], numbers & 0x7777);
    const u32 above = __byte_perm(levels[2], levels[3], numbers & 0x7777);
    return __byte_perm(below, above, 0x3210 | (numbers & 0x8888) >> 1);
}

/// Looks up the 32 4-bit numbers of four words, low halves first, in a table of 16 bytes.
DEVICE void look_up(const u32* w, const u32* levels, u32* q) {
    for (int i = 0; i < 4; i++) {
        // Alternating low and high halves of bytes.
        const u32 first = look_up4(w[i] & 0xffff, levels), second = look_up4(w[i] >> 16, levels);
        q[i] = __byte_perm(first, second, 0x6420);
        q[i + 4] = __byte_perm(first, second, 0x7531);
    }
}

/// The levels of IQ4_NL and IQ4_XS, from -127 to 113.
DEVICE void iq4_levels(u32* levels) {
    levels[0] = 0xbfad9881;
    levels[1] = 0xf6eaddcf;
    levels[2] = 0x26190d01;
    levels[3] = 0x71594535;
}

/// Returns the sum of 32 products. `q`, `scale` and `sums` are the run's activations.
DEVICE float run_product(const Run& r, const i8* q, float scale, const float* sums, bool has_min) {
    const int4* x = (const int4*)q;
    const int4 first = x[0], second = x[1];
    int a = __dp4a((int)r.q[0], first.x, 0);
    int b = __dp4a((int)r.q[4], second.x, 0);
    a = __dp4a((int)r.q[1], first.y, a);
    b = __dp4a((int)r.q[5], second.y, b);
    a = __dp4a((int)r.q[2], first.z, a);
    b = __dp4a((int)r.q[6], second.z, b);
    a = __dp4a((int)r.q[3], first.w, a);
    b = __dp4a((int)r.q[7], second.w, b);
    float product = scale * (r.scale[0] * (float)a + r.scale[1] * (float)b);
    if (has_min) product -= r.min[0] * sums[0] + r.min[1] * sums[1];
    return product;
}
