// Products of 16-bit floats on tensor cores, summed in 32 bits.
#pragma once
#include "base.cuh"

#ifndef TIER_PLAN_SHIM
/// Packs two floats as 16-bit floats, rounded to nearest, the first in the low half.
DEVICE u32 pack_halves(float first, float second) {
    u32 both;
#if __CUDA_ARCH__ >= 800
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
#else
    both = (u32)narrow(first) | (u32)narrow(second) << 16;
#endif
    return both;
}

/// Computes `c += a * b` of 16 x 16 and 16 x 8 values, two per word.
///
/// A lane has of rows `lane / 4` (`low`) and `lane / 4 + 8` (`high`) of `a` the columns `lane % 4 *
/// 2` and the next in the first word, and those 8 further on in the second; the same of column
/// `lane / 4` of `b`; and columns `lane % 4 * 2` and the next of its two rows of `c`.
DEVICE void multiply_halves(float* c, uint2 low, uint2 high, uint2 b) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(low.x), "r"(high.x), "r"(low.y), "r"(high.y), "r"(b.x), "r"(b.y));
#else
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(low.x), "r"(high.x), "r"(b.x));
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(low.y), "r"(high.y), "r"(b.y));
#endif
}
#endif

/// Clamps a value to the range of 16-bit floats, so that it doesn't become infinite.
DEVICE float within_half(float v) {
    return v > 65504.0f ? 65504.0f : v < -65504.0f ? -65504.0f : v;
}

/// Converts four values to 16-bit floats in their order.
DEVICE uint2 four_halves(float4 v) {
    uint2 halves;
    halves.x = pack_halves(within_half(v.x), within_half(v.y));
    halves.y = pack_halves(within_half(v.z), within_half(v.w));
    return halves;
}
