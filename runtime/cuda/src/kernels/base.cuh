// Types and steps that all kernels share. NVRTC on a user's machine may have no headers, so none
// are included. What a CPU has no instruction for is in shim.h, with which the GPU emulator
// compiles the same kernels as C++.
#pragma once

typedef signed char i8;
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#ifdef TIER_PLAN_SHIM
#include "shim.h"
#else

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__ void
#define TABLE static __device__ const

/// Returns the 16-bit float with these bits.
DEVICE float widen(u16 bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
}

/// Rounds to a 16-bit float, ties to even.
DEVICE u16 narrow(float value) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
}

#endif

/// Lanes per warp.
#define WARP 32
/// Mask of all lanes of a warp.
#define ALL_LANES 0xffffffffu
/// A word of four equal bytes.
#define BYTES4(byte) ((u32)(byte) * 0x01010101u)

DEVICE float minus_infinity() {
    return __int_as_float((int)0xff800000);
}

/// Returns `ln(1 + e^x)`.
DEVICE float softplus(float x) {
    return x > 20.0f ? x : log1pf(expf(x));
}

DEVICE float warp_sum(float v) {
    for (int step = WARP / 2; step > 0; step /= 2) v += __shfl_xor_sync(ALL_LANES, v, step);
    return v;
}

DEVICE float warp_max(float v) {
    for (int step = WARP / 2; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, step));
    return v;
}

/// Returns the sum over a block of whole warps to every thread. `room` is shared, a float per warp.
DEVICE float block_sum(float v, float* room) {
    v = warp_sum(v);
    __syncthreads();
    if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = v;
    __syncthreads();
    float sum = 0.0f;
    for (u32 i = 0; i < blockDim.x / WARP; i++) sum += room[i];
    return sum;
}

/// Returns the maximum over a block of whole warps to every thread. `room` is shared, a float per
/// warp.
DEVICE float block_max(float v, float* room) {
    v = warp_max(v);
    __syncthreads();
    if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = v;
    __syncthreads();
    float most = room[0];
    for (u32 i = 1; i < blockDim.x / WARP; i++) most = fmaxf(most, room[i]);
    return most;
}

/// Rounds a small number to the nearest integer, ties to even, when added and subtracted again.
#define ROUND 12582912.0f

/// Quantizes a run of 32 values, one per lane of a warp, to the same bits as on the CPU. `q` is
/// `[n_runs, 32]`, `scale` `[n_runs]`, and `sums` `[n_runs, 2]`: scale times the sum of codes of
/// each 16 values.
DEVICE void quantize_run(float v, i64 run, i8* q, float* scale, float* sums) {
    const int lane = threadIdx.x % WARP;
    // Compared as bits, so that a NaN is the largest and shows in the scale.
    int bits = __float_as_int(v) & 0x7fffffff;
    for (int step = WARP / 2; step > 0; step /= 2) {
        const int other = __shfl_xor_sync(ALL_LANES, bits, step);
        bits = other > bits ? other : bits;
    }
    const float largest = __int_as_float(bits);
    const bool tiny = largest < 1e-35f;
    const float s = tiny ? 0.0f : __fdiv_rn(largest, 127.0f), inverse = tiny ? 0.0f : __fdiv_rn(127.0f, largest);
    // Not fused: ties must round as on the CPU.
    const i8 code = (i8)(__float_as_int(__fadd_rn(__fmul_rn(v, inverse), ROUND)) - __float_as_int(ROUND));
    int sum = code;
    for (int step = 8; step > 0; step /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, step);
    q[32 * run + lane] = code;
    if (lane % 16 == 0) sums[2 * run + lane / 16] = s * (float)sum;
    if (lane == 0) scale[run] = s;
}

/// What stands between the first two products of a feed-forward block and its last, in the order of
/// `activation_args`.
enum { SILU, CLAMPED_SWIGLU, CLAMPED_SILU, LIMITED_SILU, GELU, SITU, SQUARED_RELU };

DEVICE float silu(float x) {
    return x / (1.0f + expf(-x));
}

/// Compared rather than clamped, so that NaN propagates.
DEVICE float at_most(float x, float limit) {
    return x > limit ? limit : x;
}

/// Returns `x` within `limit` of zero.
DEVICE float within(float x, float limit) {
    const float below = at_most(x, limit);
    return below < -limit ? -limit : below;
}

/// Returns the activation of `gate` and `up` with the parameters `a` and `b`. Its formulas are those
/// of `Activation` on the CPU. The squared ReLU ignores the gate.
DEVICE float activated(int activation, float a, float b, float gate, float up) {
    switch (activation) {
    case CLAMPED_SWIGLU: {
        const float g = at_most(gate, b);
        return g / (1.0f + expf(-a * g)) * (within(up, b) + 1.0f);
    }
    case CLAMPED_SILU: return silu(at_most(gate, a)) * within(up, a);
    case LIMITED_SILU: return at_most(silu(gate), a) * within(up, a);
    case GELU: {
        // As 1 + tanh(z) = 2 / (1 + e^(-2z)), these are twice the factors in the formula.
        const float z = gate * (1.595769f + 1.595769f * 0.044715f * gate * gate);
        return gate / (1.0f + expf(-z)) * up;
    }
    case SITU: {
        const float u = b > 0.0f ? b * tanhf(up / b) : up;
        return a * tanhf(gate / a) / (1.0f + expf(-gate)) * u;
    }
    case SQUARED_RELU: {
        // Compared rather than clamped, so that NaN propagates.
        const float positive = up < 0.0f ? 0.0f : up;
        return positive * positive;
    }
    default: return silu(gate) * up;
    }
}

DEVICE float half_at(const u8* p) {
    return widen(*(const u16*)p);
}

/// Reads `N` words. `UNIT` gives the alignment of the address: the bitwise or of all numbers that
/// it is a sum of multiples of. Below 4, the surrounding words are read and shifted: up to three
/// bytes on either side of the data are accessed, which the allocation has.
template <int UNIT, int N>
DEVICE void words(const u8* p, u32* out) {
    constexpr int align = UNIT & -UNIT;
    if constexpr (align >= 16 && N % 4 == 0) {
        for (int i = 0; i < N / 4; i++) {
            const uint4 four = ((const uint4*)p)[i];
            out[4 * i] = four.x;
            out[4 * i + 1] = four.y;
            out[4 * i + 2] = four.z;
            out[4 * i + 3] = four.w;
        }
    } else if constexpr (align >= 4) {
        for (int i = 0; i < N; i++) out[i] = ((const u32*)p)[i];
    } else {
        const u32 shift = (u32)((u64)p % 4) * 8;
        const u32* from = (const u32*)((u64)p & ~(u64)3);
        u32 low = from[0];
        for (int i = 0; i < N; i++) {
            const u32 high = i + 1 < N || shift != 0 ? from[i + 1] : 0;
            out[i] = __funnelshift_r(low, high, shift);
            low = high;
        }
    }
}

/// Subtracts a number of at most 128 from each of four bytes below 128.
DEVICE u32 less(u32 bytes, u32 number) {
    return ((bytes | BYTES4(0x80)) - BYTES4(number)) ^ BYTES4(0x80);
}

/// Spreads the lowest four bits to a byte each.
DEVICE u32 spread4(u32 bits) {
    return ((bits & 15) * 0x00204081u) & BYTES4(1);
}
