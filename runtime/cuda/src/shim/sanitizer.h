// Finds what CUDA's Compute Sanitizer finds on a GPU: races, addresses outside of allocations or not aligned, shared memory
// that is read before it is written, and lanes that a warp waits for in vain. The compiler has every access call these
// functions (-fsanitize=thread, without its library), and every address that is not aligned to its type
// (-fsanitize=alignment).
//
// Two accesses of one byte, one of them a write, race unless one thread makes both, or
//   - two warps of a block do, with __syncthreads() between them;
//   - two lanes of a warp do, with that or __syncwarp() between them. A shuffle orders no memory.
// Blocks of a launch are never ordered. Atomic operations do not race among themselves.
#pragma once
#include <dlfcn.h>

// Where the library is, and in it the variables that are 0 at first, which the shared memory of kernels is among.
extern "C" __attribute__((visibility("hidden"))) char __ehdr_start[], __bss_start[], _end[];

namespace sanitizer {

constexpr u16 SEVERAL = 0xffff;

/// The last accesses of a byte. A time is the number of an interval between two barriers, of the block or of the warp.
/// Each interval has its own number, later ones larger ones, and 0 is before them all.
struct Byte {
    u32 written_block, written_warp;
    /// The first read since the launch began, or the block for shared memory, and the last one.
    u32 first_read, read_block, read_warp;
    u16 writer, reader;
    u16 reading_warp;
    bool atomic;
};

constexpr u64 PAGE = 4096;
struct Page { Byte bytes[PAGE]; };

struct Range { u64 start, end; };

SHIM_STATE static u32 times, launch_began, block_began, block_now, warp_now[32];
/// When accesses of this launch were last forgotten, for want of room.
SHIM_STATE static u32 forgot;
SHIM_STATE static const Range* allocations;
SHIM_STATE static u64 n_allocations, stacks_start, stacks_end;
SHIM_STATE static Range allocation;
SHIM_STATE static u64 page_number;
SHIM_STATE static Page* page;
SHIM_STATE static char finding[512];

/// A hash table of the pages that were accessed, with linear probing; at most half of it is used.
constexpr u64 ENTRIES = 1 << 15;
struct Entry { u64 number; Page* page; };
SHIM_STATE static Entry* entries;
SHIM_STATE static u64 n_pages;
/// Most pages that are kept from launch to launch.
constexpr u64 KEPT_PAGES = 256;

UNCHECKED static void forget_pages() {
    for (u64 i = 0; entries && i < ENTRIES; i++) {
        free(entries[i].page);
        entries[i] = {};
    }
    n_pages = 0;
    page = nullptr;
}

UNCHECKED static Page* page_of(u64 number) {
    if (!entries) entries = (Entry*)calloc(ENTRIES, sizeof(Entry));
    // A launch that accesses 64 MiB and more is checked in parts.
    if (n_pages > ENTRIES / 2) {
        forget_pages();
        forgot = block_now;
    }
    u64 i = number % ENTRIES;
    while (entries[i].page && entries[i].number != number) i = (i + 1) % ENTRIES;
    if (!entries[i].page) {
        entries[i] = {number, (Page*)calloc(1, sizeof(Page))};
        n_pages++;
    }
    if (!entries[i].page) abort();
    return entries[i].page;
}

/// Keeps the first finding of a launch: what is wrong, by which thread, and where in the library.
UNCHECKED static void found(const char* what, u64 at, size_t n, u32 other, const void* caller) {
    if (finding[0]) return;
    Dl_info info = {};
    dladdr(caller, &info);
    char with[64] = "";
    if (other != ~0u) {
        if (other == SEVERAL) {
            snprintf(with, sizeof with, ", with several threads");
        } else {
            snprintf(with, sizeof with, ", with thread %u", other);
        }
    }
    const bool shared = at >= (u64)__bss_start && at < (u64)_end;
    snprintf(finding, sizeof finding, "%s: %zu bytes of %s memory, thread %u of block (%u, %u, %u)%s, at %#zx", what, n,
             shared ? "shared" : "global", shim::running, blockIdx.x, blockIdx.y, blockIdx.z, with,
             (size_t)caller - 1 - (size_t)info.dli_fbase);
}

UNCHECKED static void block_barrier() {
    block_now = ++times;
    for (u32& now : warp_now) now = block_now;
}

UNCHECKED static void begin_block() {
    block_barrier();
    block_began = block_now;
}

UNCHECKED static void begin_launch(u64 stacks, u64 bytes) {
    stacks_start = stacks;
    stacks_end = stacks + bytes;
    finding[0] = 0;
    // Long before numbers run out, all is forgotten.
    const bool runs_out = times > 1u << 31;
    if (n_pages > KEPT_PAGES || runs_out) forget_pages();
    if (runs_out) times = 0;
    forgot = 0;
    launch_began = times + 1;
    allocation = {0, 0};
}

/// Finds the allocation of an address.
UNCHECKED static bool is_allocated(u64 at, size_t n) {
    if (at >= allocation.start && at + n <= allocation.end) return true;
    u64 low = 0, high = n_allocations;
    while (low < high) {
        const u64 middle = (low + high) / 2;
        if (allocations[middle].start <= at) low = middle + 1;
        else high = middle;
    }
    if (low == 0) return false;
    allocation = allocations[low - 1];
    return at + n <= allocation.end;
}

UNCHECKED static Byte* bytes_of(u64 at) {
    if (!page || at / PAGE != page_number) {
        page_number = at / PAGE;
        page = page_of(page_number);
    }
    return &page->bytes[at % PAGE];
}

enum Access { READ, WRITE, ATOMIC };

/// Whether the last write of a byte is ordered before an access of this thread. Accesses before `since` were another
/// launch's, or in the shared memory of another block.
UNCHECKED static bool follows_write(const Byte& b, u32 since, Access access) {
    if (b.written_block < since) return true;
    if (access == ATOMIC && b.atomic) return true;
    if (b.written_block < block_began) return false;
    if (b.written_block != block_now) return true;
    if (b.atomic || b.writer / 32 != shim::running / 32) return false;
    return b.writer == shim::running || b.written_warp != warp_now[shim::running / 32];
}

/// Whether all reads of a byte are ordered before a write of this thread.
UNCHECKED static bool follows_reads(const Byte& b, u32 since) {
    if (b.first_read < since) return true;
    if (b.first_read < block_began) return false;
    if (b.read_block != block_now) return true;
    if (b.reading_warp != shim::running / 32) return false;
    return b.reader == shim::running || b.read_warp != warp_now[shim::running / 32];
}

UNCHECKED static void note_read(Byte& b, u32 since) {
    const u32 self = shim::running, now = warp_now[self / 32];
    if (b.first_read < since) b.first_read = block_now;
    if (b.read_block != block_now) {
        b.read_block = block_now;
        b.reading_warp = (u16)(self / 32);
    } else if (b.reading_warp != self / 32) {
        b.reading_warp = SEVERAL;
        return;
    } else if (b.read_warp == now) {
        if (b.reader != self) b.reader = SEVERAL;
        return;
    }
    b.read_warp = now;
    b.reader = (u16)self;
}

UNCHECKED static void note_write(Byte& b, Access access) {
    b.written_block = block_now;
    b.written_warp = warp_now[shim::running / 32];
    b.writer = (u16)shim::running;
    b.atomic = access == ATOMIC;
}

/// Checks an access and remembers it.
UNCHECKED static void check(const void* address, size_t n, Access access, const void* caller) {
    const u64 at = (u64)address;
    if (at >= stacks_start && at < stacks_end) return;
    const bool shared = at >= (u64)__bss_start && at < (u64)_end;
    const u32 since = shared ? block_began : launch_began;
    // Tables of constants and the emulator's own variables are the library's.
    if (!shared && at >= (u64)__ehdr_start && at < (u64)_end) return;
    if (!shared && !is_allocated(at, n)) {
        found("outside every allocation", at, n, ~0u, caller);
        return;
    }
    for (u64 i = at; i < at + n; i++) {
        Byte& b = *bytes_of(i);
        if (!follows_write(b, since, access)) {
            found(access == READ ? "read races with a write" : "write races with a write", i, n, b.writer, caller);
        }
        if (access == READ) {
            if (shared && b.written_block < block_began && forgot < block_began) {
                found("read of what the block has not written", i, n, ~0u, caller);
            }
            note_read(b, since);
        } else {
            if (!follows_reads(b, since)) found("write races with a read", i, n, b.reader, caller);
            note_write(b, access);
        }
    }
}

/// Checks the lanes of a warp that have met: each must have waited for just these, at one place in the code.
UNCHECKED static void check_rendezvous(u32 warp, u32 lanes) {
    const u32 first_thread = warp * shim::LANES + (u32)__builtin_ctz(lanes);
    const auto& first = shim::fibers[first_thread].rendezvous;
    for (u32 rest = lanes; rest; rest &= rest - 1) {
        const auto& one = shim::fibers[warp * shim::LANES + (u32)__builtin_ctz(rest)].rendezvous;
        if (finding[0] || (one.lanes == lanes && one.line == first.line && one.file == first.file)) continue;
        snprintf(finding, sizeof finding,
                 "warp %u of block (%u, %u, %u): lanes %08x meet, of which one waits for %08x at %s:%u and one for %08x at %s:%u",
                 warp, blockIdx.x, blockIdx.y, blockIdx.z, lanes, first.lanes, first.file, first.line, one.lanes,
                 one.file, one.line);
    }
    if (first.orders_memory) warp_now[warp] = ++times;
}

/// What the compiler passes with an address that is not aligned.
struct SourcePlace { const char* file; u32 line, column; };
struct Mismatch { SourcePlace place; const void* type; unsigned char log_alignment, kind; };

}  // namespace sanitizer

#define CALLER __builtin_return_address(0)
#define CHECKED_SIZE(n) \
    UNCHECKED void __tsan_read##n(void* at) { sanitizer::check(at, n, sanitizer::READ, CALLER); } \
    UNCHECKED void __tsan_write##n(void* at) { sanitizer::check(at, n, sanitizer::WRITE, CALLER); } \
    UNCHECKED void __tsan_unaligned_read##n(void* at) { sanitizer::check(at, n, sanitizer::READ, CALLER); } \
    UNCHECKED void __tsan_unaligned_write##n(void* at) { sanitizer::check(at, n, sanitizer::WRITE, CALLER); }

extern "C" {
CHECKED_SIZE(1)
CHECKED_SIZE(2)
CHECKED_SIZE(4)
CHECKED_SIZE(8)
CHECKED_SIZE(16)
UNCHECKED void __tsan_read_range(void* at, size_t n) { sanitizer::check(at, n, sanitizer::READ, CALLER); }
UNCHECKED void __tsan_write_range(void* at, size_t n) { sanitizer::check(at, n, sanitizer::WRITE, CALLER); }
UNCHECKED void __tsan_func_entry(void*) {}
UNCHECKED void __tsan_func_exit() {}
UNCHECKED void __tsan_init() {}

UNCHECKED void __ubsan_handle_type_mismatch_v1(sanitizer::Mismatch* what, size_t at) {
    if (sanitizer::finding[0]) return;
    snprintf(sanitizer::finding, sizeof sanitizer::finding, "an address that is not a multiple of %u: %#zx, %s:%u",
             1u << what->log_alignment, at, what->place.file, what->place.line);
}
UNCHECKED void __ubsan_handle_type_mismatch_v1_abort(sanitizer::Mismatch* what, size_t at) {
    __ubsan_handle_type_mismatch_v1(what, at);
}

/// Sets where memory is allocated, in ascending order, for launches to come.
UNCHECKED __attribute__((visibility("default"))) void sanitizer_allocations(const sanitizer::Range* all, unsigned long long n) {
    sanitizer::allocations = all;
    sanitizer::n_allocations = n;
}

/// Returns what was found in the last launch, or an empty text.
UNCHECKED __attribute__((visibility("default"))) const char* sanitizer_finding() { return sanitizer::finding; }
}
