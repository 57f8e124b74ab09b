// What makes a kernel plain C++: a block's threads are fibers that change places where they wait for one another. Only
// tests compile this. Blocks run one after the other, so shared memory is static; nothing else may run meanwhile.
#pragma once
#include <cmath>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <tuple>
#include <type_traits>
#include <ucontext.h>
#include <utility>
#include <vector>

#define DEVICE inline
#define KERNEL static void
#define TABLE static const
#define __shared__ static

struct uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Dim { u32 x = 0, y = 0, z = 0; };
static Dim threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

enum State { READY, AT_WARP, AT_BLOCK, DONE };

/// A thread of a block. Its stack lives on from block to block: it begins by way of a context and changes places by
/// jumps, which, unlike contexts, need no system call.
struct Fiber {
    jmp_buf place;
    State state = READY;
    bool begun = false;
};

constexpr size_t STACK = 128 << 10;
constexpr u32 MAX_THREADS = 1024;

static Fiber fibers[MAX_THREADS];
static char* stacks = nullptr;
static jmp_buf scheduler;
static u32 running = 0;
static u64 slots[MAX_THREADS];
static void (*entry)(void**) = nullptr;
static void** arguments = nullptr;

__attribute__((noinline)) inline void wait(State state) {
    const u32 self = running;
    fibers[self].state = state;
    if (_setjmp(fibers[self].place) == 0) _longjmp(scheduler, 1);
}

inline void begin() {
    for (;;) {
        entry(arguments);
        wait(DONE);
    }
}

/// Lets a fiber run until it waits or is done.
__attribute__((noinline)) inline void resume(u32 i) {
    running = i;
    if (_setjmp(scheduler) != 0) return;
    if (fibers[i].begun) _longjmp(fibers[i].place, 1);
    fibers[i].begun = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + i * STACK;
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, begin, 0);
    setcontext(&context);
}

/// Frees those that wait for one another and are all there. A warp waits for its own threads, a block for all.
inline bool release(u32 n) {
    bool any = false, all = true;
    for (u32 first = 0; first < n; first += 32) {
        bool whole = true, some = false;
        for (u32 i = first; i < first + 32 && i < n; i++) {
            if (fibers[i].state == DONE) continue;
            whole = whole && fibers[i].state == AT_WARP;
            some = some || fibers[i].state == AT_WARP;
            all = all && fibers[i].state == AT_BLOCK;
        }
        if (!whole || !some) continue;
        for (u32 i = first; i < first + 32 && i < n; i++) {
            if (fibers[i].state == AT_WARP) fibers[i].state = READY;
        }
        any = true;
    }
    if (any || !all) return any;
    for (u32 i = 0; i < n; i++) {
        if (fibers[i].state == AT_BLOCK) {
            fibers[i].state = READY;
            any = true;
        }
    }
    return any;
}

/// Runs one block; false when its threads wait for ones that never come.
inline bool block(u32 n) {
    for (u32 i = 0; i < n; i++) fibers[i].state = READY;
    do {
        for (u32 i = 0; i < n; i++) {
            if (fibers[i].state != READY) continue;
            threadIdx = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
            resume(i);
        }
    } while (release(n));
    bool done = true;
    for (u32 i = 0; i < n; i++) {
        if (fibers[i].state == DONE) continue;
        // It would go on where it waits.
        fibers[i].begun = false;
        done = false;
    }
    return done;
}

/// 0, or 1: too many threads, 2: no memory, 3: threads wait for ones that never come.
inline int launch(void (*kernel)(void**), void** args, const u32* dims) {
    gridDim = {dims[0], dims[1], dims[2]};
    blockDim = {dims[3], dims[4], dims[5]};
    const u64 n = (u64)blockDim.x * blockDim.y * blockDim.z;
    if (n == 0 || n > MAX_THREADS) return 1;
    if (!stacks) {
        void* room = mmap(nullptr, MAX_THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (room == MAP_FAILED) return 2;
        stacks = (char*)room;
    }
    entry = kernel;
    arguments = args;
    for (u32 z = 0; z < gridDim.z; z++) {
        for (u32 y = 0; y < gridDim.y; y++) {
            for (u32 x = 0; x < gridDim.x; x++) {
                blockIdx = {x, y, z};
                if (!block((u32)n)) return 3;
            }
        }
    }
    return 0;
}

template <class... A, size_t... I>
inline void spread(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    kernel(*(A*)args[I]...);
}

template <class... A>
inline void call(void (*kernel)(A...), void** args) {
    spread(kernel, args, std::index_sequence_for<A...>{});
}

/// The type of an argument in a letter; there are no others.
template <class T>
constexpr char kind() {
    static_assert(std::is_pointer<T>::value || std::is_same<T, int>::value || std::is_same<T, long long>::value ||
                      std::is_same<T, float>::value,
                  "a kernel's argument is a pointer, an int, a long long or a float");
    return std::is_pointer<T>::value ? 'p' : std::is_same<T, float>::value ? 'f' : sizeof(T) == 8 ? 'l' : 'i';
}

/// The types of a kernel's arguments.
template <class... A>
inline const char* kinds(void (*)(A...)) {
    static const char all[] = {kind<A>()..., 0};
    return all;
}

}  // namespace shim

inline void __syncthreads() { shim::wait(shim::AT_BLOCK); }
inline void __syncwarp(u32 = 0xffffffffu) { shim::wait(shim::AT_WARP); }

template <class T>
inline T __shfl_sync(u32, T v, int lane) {
    const u32 self = shim::running;
    memcpy(&shim::slots[self], &v, sizeof v);
    shim::wait(shim::AT_WARP);
    T other;
    memcpy(&other, &shim::slots[self / 32 * 32 + (u32)lane % 32], sizeof other);
    shim::wait(shim::AT_WARP);
    return other;
}

template <class T>
inline T __shfl_xor_sync(u32 mask, T v, int step) {
    return __shfl_sync(mask, v, (int)(shim::running % 32) ^ step);
}

inline int __float_as_int(float v) { int i; memcpy(&i, &v, 4); return i; }
inline float __int_as_float(int i) { float v; memcpy(&v, &i, 4); return v; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline int __float2int_rn(float v) { return (int)std::nearbyint(v); }
inline int __popc(int v) { return __builtin_popcount((u32)v); }
inline u32 __funnelshift_r(u32 low, u32 high, u32 shift) { return (u32)(((u64)high << 32 | low) >> (shift & 31)); }

inline int __dp4a(int a, int b, int c) {
    for (int i = 0; i < 32; i += 8) c += (int)(i8)(a >> i) * (int)(i8)(b >> i);
    return c;
}

inline u32 __byte_perm(u32 a, u32 b, u32 select) {
    const u64 bytes = (u64)b << 32 | a;
    u32 out = 0;
    for (int i = 0; i < 4; i++) {
        const u32 one = select >> (4 * i) & 15;
        const u32 byte = (u32)(bytes >> (8 * (one & 7))) & 255;
        out |= (one & 8 ? (byte & 128 ? 255u : 0u) : byte) << (8 * i);
    }
    return out;
}

inline float widen(u16 bits) {
    const u32 sign = (u32)(bits & 0x8000) << 16, exponent = bits >> 10 & 31, mantissa = bits & 1023;
    if (exponent == 31) return __int_as_float((int)(sign | 0x7f800000 | mantissa << 13));
    if (exponent == 0) return (sign ? -1.0f : 1.0f) * (float)mantissa * 0x1p-24f;
    return __int_as_float((int)(sign | (exponent + 112) << 23 | mantissa << 13));
}

inline u16 narrow(float v) {
    const u32 bits = (u32)__float_as_int(v), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) return (u16)(sign | 0x7e00);
    if (magnitude >= 0x477ff000) return (u16)(sign | 0x7c00);
    if (magnitude < 0x38800000) {
        // A multiple of 2^-24: adding half a unit's place rounds, ties to even.
        return (u16)(sign | (u32)std::nearbyint(std::fabs(v) * 0x1p24f));
    }
    const u32 even = magnitude >> 13 & 1;
    return (u16)(sign | ((magnitude + 0xfff + even - 0x38000000) >> 13));
}

/// `c += a * b` of 16 x 16 and 16 x 8 bytes, spread over a warp as a tensor core has them.
inline void multiply_tiles(int* c, u32 low, u32 high, u32 b) {
    static u32 fragments[shim::MAX_THREADS][3];
    const u32 self = shim::running, first = self / 32 * 32, lane = self % 32;
    fragments[self][0] = low;
    fragments[self][1] = high;
    fragments[self][2] = b;
    shim::wait(shim::AT_WARP);
    for (u32 i = 0; i < 4; i++) {
        const u32 row = lane / 4, column = lane % 4 * 2 + i % 2;
        for (u32 k = 0; k < 16; k++) {
            const u32 a = fragments[first + row * 4 + k / 4][i / 2], with = fragments[first + column * 4 + k / 4][2];
            c[i] += (int)(i8)(a >> (k % 4 * 8)) * (int)(i8)(with >> (k % 4 * 8));
        }
    }
    shim::wait(shim::AT_WARP);
}

inline u32 pack_halves(float first, float second) { return (u32)narrow(first) | (u32)narrow(second) << 16; }

/// `c += a * b` of 16 x 16 and 16 x 8 16-bit floats, spread over a warp as a tensor core has them.
inline void multiply_halves(float* c, uint2 low, uint2 high, uint2 b) {
    static uint2 fragments[shim::MAX_THREADS][3];
    const u32 self = shim::running, first = self / 32 * 32, lane = self % 32;
    fragments[self][0] = low;
    fragments[self][1] = high;
    fragments[self][2] = b;
    shim::wait(shim::AT_WARP);
    for (u32 i = 0; i < 4; i++) {
        const u32 row = lane / 4, column = lane % 4 * 2 + i % 2;
        for (u32 k = 0; k < 16; k++) {
            const uint2 a = fragments[first + row * 4 + k % 8 / 2][i / 2], with = fragments[first + column * 4 + k % 8 / 2][2];
            const u32 words[2] = {k < 8 ? a.x : a.y, k < 8 ? with.x : with.y};
            c[i] += widen((u16)(words[0] >> (k % 2 * 16))) * widen((u16)(words[1] >> (k % 2 * 16)));
        }
    }
    shim::wait(shim::AT_WARP);
}
