// What makes a kernel plain C++: a block's threads are fibers that change places where they wait for one another. Only
// tests compile this. Blocks run one after the other, so shared memory is static, and so is all else: what is loaded runs
// one kernel at a time, and who wants more loads copies. With TIER_PLAN_SANITIZER, sanitizer.h sees every access to memory.
#pragma once
#include <cmath>
#if defined(__clang__) && !defined(__x86_64__)
#include <csetjmp>
#endif
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

#define KERNEL static void
#define TABLE static const
#define __shared__ static

#ifdef TIER_PLAN_SANITIZER
/// Static variables that are not the shared memory of a kernel.
#define SHIM_STATE __attribute__((section("shim_state")))
#define UNCHECKED __attribute__((no_sanitize("thread"), no_sanitize("alignment"), noinline))
/// Inlined always: the compiler does not have calls checked that take a structure by value from memory.
#define DEVICE inline __attribute__((always_inline))
#else
#define SHIM_STATE
#define UNCHECKED
#define DEVICE inline
#endif

struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct Dim { u32 x = 0, y = 0, z = 0; };

SHIM_STATE static Dim threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

// A place in the code to jump back to. The compiler's own kind saves three registers, where the C library's saves all of
// them, in disguise. It must be jumped to from another function than the one that made it.
#if defined(__clang__) && !defined(__x86_64__)
struct Place { jmp_buf registers; };
#define SHIM_PLACE(place) _setjmp((place).registers)
#define SHIM_JUMP(place) _longjmp((place).registers, 1)
#else
struct Place { void* registers[5]; };
#define SHIM_PLACE(place) __builtin_setjmp((place).registers)
#define SHIM_JUMP(place) __builtin_longjmp((place).registers, 1)
#endif

constexpr u32 MAX_THREADS = 1024, LANES = 32;
/// Bytes of a thread's stack. Stacks begin at different lines of a cache.
constexpr size_t STACK = (128 << 10) + 17 * 64;

/// A thread of a block. Its stack lives on from block to block: it begins by way of a context and changes places by
/// jumps, which, unlike contexts, need no system call.
struct Fiber {
    Place place;
    Dim index;
    bool begun;
    /// Which of two rooms its next exchange with its warp uses: who reads one late has done so before it is used again.
    u8 turn;
    /// Where it waits for its warp, and for which lanes.
    struct { const char* file; u32 line, lanes; bool orders_memory; } rendezvous;
};

/// Threads that wait for their warp, or for their block, and those that can go on, a bit each. The others are done.
struct Warp {
    u32 ready, at_warp, at_block;
};

SHIM_STATE static u32 running, threads, warps;
SHIM_STATE static void (*entry)(void**);
SHIM_STATE static void** arguments;
SHIM_STATE static char* stacks;
SHIM_STATE static Place scheduler;
SHIM_STATE static Warp states[MAX_THREADS / LANES];
SHIM_STATE static Fiber fibers[MAX_THREADS];
SHIM_STATE static u64 slots[2][MAX_THREADS];
SHIM_STATE static u32 fragments[2][MAX_THREADS][6];

}  // namespace shim

#ifdef TIER_PLAN_SANITIZER
#include "sanitizer.h"
#endif

namespace shim {

// What the sanitizer must know.

UNCHECKED static void launch_begins() {
#ifdef TIER_PLAN_SANITIZER
    sanitizer::begin_launch((u64)stacks, MAX_THREADS * STACK);
#endif
}

UNCHECKED static void block_begins() {
#ifdef TIER_PLAN_SANITIZER
    sanitizer::begin_block();
#endif
}

UNCHECKED static void block_meets() {
#ifdef TIER_PLAN_SANITIZER
    sanitizer::block_barrier();
#endif
}

UNCHECKED static void warp_meets([[maybe_unused]] u32 w) {
#ifdef TIER_PLAN_SANITIZER
    sanitizer::check_rendezvous(w, states[w].at_warp);
#endif
}

[[noreturn]] UNCHECKED static void begin();

/// Lets a fiber go on, or begin.
[[noreturn]] UNCHECKED static void enter(u32 i) {
    Fiber& fiber = fibers[i];
    running = i;
    threadIdx = fiber.index;
    if (fiber.begun) SHIM_JUMP(fiber.place);
    fiber.begun = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + i * STACK;
    context.uc_stack.ss_size = STACK;
    context.uc_link = nullptr;
    makecontext(&context, begin, 0);
    setcontext(&context);
    abort();
}

/// Frees the block if all its threads wait for one another, those that are done aside.
UNCHECKED static bool release_block() {
    bool any = false;
    for (u32 w = 0; w < warps; w++) {
        if (states[w].at_warp) return false;
        any = any || states[w].at_block;
    }
    for (u32 w = 0; w < warps; w++) {
        states[w].ready = states[w].at_block;
        states[w].at_block = 0;
    }
    if (any) block_meets();
    return any;
}

/// Lets the next fiber go on: of this warp while there is one, then of those after it. When all are done, or wait for
/// ones that never come, the block is at its end.
[[noreturn]] UNCHECKED __attribute__((noinline)) static void next(u32 w) {
    do {
        for (; w < warps; w++) {
            Warp& warp = states[w];
            if (!warp.ready && !warp.at_block && warp.at_warp) {
                warp_meets(w);
                warp.ready = warp.at_warp;
                warp.at_warp = 0;
            }
            if (warp.ready) enter(w * LANES + (u32)__builtin_ctz(warp.ready));
        }
        w = 0;
    } while (release_block());
    SHIM_JUMP(scheduler);
}

enum For { WARP_MATES, BLOCK_MATES, NOTHING };

/// Waits for the other threads, or with nothing to wait for is done.
UNCHECKED __attribute__((noinline)) static void wait(For whom) {
    const u32 self = running, bit = 1u << self % LANES;
    Warp& warp = states[self / LANES];
    warp.ready &= ~bit;
    if (whom == WARP_MATES) warp.at_warp |= bit;
    if (whom == BLOCK_MATES) warp.at_block |= bit;
    if (SHIM_PLACE(fibers[self].place) == 0) next(self / LANES);
}

[[noreturn]] UNCHECKED static void begin() {
    for (;;) {
        entry(arguments);
        wait(NOTHING);
    }
}

/// Runs one block; false when its threads wait for ones that never come.
UNCHECKED __attribute__((noinline)) static bool block() {
    block_begins();
    for (u32 w = 0; w < warps; w++) {
        const u32 lanes = threads - w * LANES;
        states[w] = {lanes < LANES ? (1u << lanes) - 1 : ~0u, 0, 0};
    }
    if (SHIM_PLACE(scheduler) == 0) next(0);
    bool done = true;
    for (u32 i = 0; i < threads; i++) {
        const Warp& warp = states[i / LANES];
        if (!((warp.at_warp | warp.at_block) >> i % LANES & 1)) continue;
        // It would go on where it waits.
        fibers[i].begun = false;
        done = false;
    }
    return done;
}

/// 0, or 1: too many threads, 2: no memory, 3: threads wait for ones that never come.
UNCHECKED static int launch(void (*kernel)(void**), void** args, const u32* dims) {
    gridDim = {dims[0], dims[1], dims[2]};
    blockDim = {dims[3], dims[4], dims[5]};
    const u64 n = (u64)blockDim.x * blockDim.y * blockDim.z;
    if (n == 0 || n > MAX_THREADS) return 1;
    if (!stacks) {
        void* room = mmap(nullptr, MAX_THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (room == MAP_FAILED) return 2;
        stacks = (char*)room;
    }
    threads = (u32)n;
    warps = (threads + LANES - 1) / LANES;
    for (u32 i = 0; i < threads; i++) {
        fibers[i].index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
        fibers[i].turn = 0;
    }
    launch_begins();
    entry = kernel;
    arguments = args;
    for (u32 z = 0; z < gridDim.z; z++) {
        for (u32 y = 0; y < gridDim.y; y++) {
            for (u32 x = 0; x < gridDim.x; x++) {
                blockIdx = {x, y, z};
                if (!block()) return 3;
            }
        }
    }
    return 0;
}

/// Which of its two rooms a warp exchanges values in next.
inline u32 turn() { return fibers[running].turn ^= 1; }

/// Waits for these lanes of the warp, at a place in the code that they all come to.
inline void wait_for_warp([[maybe_unused]] u32 lanes, [[maybe_unused]] const char* file, [[maybe_unused]] u32 line,
                          [[maybe_unused]] bool orders_memory) {
#ifdef TIER_PLAN_SANITIZER
    fibers[running].rendezvous = {file, line, lanes, orders_memory};
#endif
    wait(WARP_MATES);
}

template <class A>
UNCHECKED A argument(void** args, size_t i) { return *(A*)args[i]; }

template <class... A, size_t... I>
inline void spread(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
    kernel(argument<A>(args, I)...);
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

/// The place of a call, as default arguments.
#define PLACE const char *file = __builtin_FILE(), u32 line = __builtin_LINE()

inline void __syncthreads() { shim::wait(shim::BLOCK_MATES); }
inline void __syncwarp(u32 lanes = 0xffffffffu, PLACE) { shim::wait_for_warp(lanes, file, line, true); }

template <class T>
inline T __shfl_sync(u32 lanes, T v, int lane, PLACE) {
    const u32 self = shim::running;
    u64* slots = shim::slots[shim::turn()];
    memcpy(&slots[self], &v, sizeof v);
    shim::wait_for_warp(lanes, file, line, false);
    T other;
    memcpy(&other, &slots[self / 32 * 32 + (u32)lane % 32], sizeof other);
    return other;
}

template <class T>
inline T __shfl_xor_sync(u32 lanes, T v, int step, PLACE) {
    return __shfl_sync(lanes, v, (int)(shim::running % 32) ^ step, file, line);
}

/// Returns the lanes of the warp whose value is not 0; all lanes take part.
inline u32 __ballot_sync(u32 lanes, int v, PLACE) {
    const u32 self = shim::running;
    u64* slots = shim::slots[shim::turn()];
    slots[self] = v != 0;
    shim::wait_for_warp(lanes, file, line, false);
    u32 set = 0;
    for (u32 i = 0; i < 32; i++) set |= (u32)slots[self / 32 * 32 + i] << i;
    return set;
}

/// Threads change places only where they wait.
UNCHECKED static int atomicAdd(int* to, int v) {
#ifdef TIER_PLAN_SANITIZER
    sanitizer::check(to, sizeof *to, sanitizer::ATOMIC, __builtin_return_address(0));
#endif
    const int before = *to;
    *to += v;
    return before;
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
DEVICE void multiply_tiles(int* c, u32 low, u32 high, u32 b, PLACE) {
    auto& fragments = shim::fragments[shim::turn()];
    const u32 self = shim::running, first = self / 32 * 32, lane = self % 32;
    const u32 own[] = {low, high, b};
    memcpy(fragments[self], own, sizeof own);
    shim::wait_for_warp(0xffffffffu, file, line, false);
    for (u32 i = 0; i < 4; i++) {
        const u32 row = lane / 4, column = lane % 4 * 2 + i % 2;
        for (u32 k = 0; k < 16; k++) {
            const u32 a = fragments[first + row * 4 + k / 4][i / 2], with = fragments[first + column * 4 + k / 4][2];
            c[i] += (int)(i8)(a >> (k % 4 * 8)) * (int)(i8)(with >> (k % 4 * 8));
        }
    }
}

inline u32 pack_halves(float first, float second) { return (u32)narrow(first) | (u32)narrow(second) << 16; }

/// `c += a * b` of 16 x 16 and 16 x 8 16-bit floats, spread over a warp as a tensor core has them.
DEVICE void multiply_halves(float* c, uint2 low, uint2 high, uint2 b, PLACE) {
    auto& fragments = shim::fragments[shim::turn()];
    const u32 self = shim::running, first = self / 32 * 32, lane = self % 32;
    const u32 own[] = {low.x, low.y, high.x, high.y, b.x, b.y};
    memcpy(fragments[self], own, sizeof own);
    shim::wait_for_warp(0xffffffffu, file, line, false);
    for (u32 i = 0; i < 4; i++) {
        const u32 row = lane / 4, column = lane % 4 * 2 + i % 2;
        for (u32 k = 0; k < 16; k++) {
            const u32 a = fragments[first + row * 4 + k % 8 / 2][i / 2 * 2 + k / 8];
            const u32 with = fragments[first + column * 4 + k % 8 / 2][4 + k / 8];
            c[i] += widen((u16)(a >> (k % 2 * 16))) * widen((u16)(with >> (k % 2 * 16)));
        }
    }
}
