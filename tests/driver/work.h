// Work in the order of streams: what a stream was asked for waits in it until somebody waits for that.
#pragma once
#include "state.h"


/// Does what a stream was asked for, up to a point.
inline void advance(Stream* stream, u64 until) {
    while (stream->done < until) {
        const std::function<void()> one = std::move(stream->work.front());
        stream->work.pop_front();
        // A device that failed does nothing more.
        if (!stream->context->device->failed) one();
        stream->done++;
    }
}

inline void ask(Stream* stream, std::function<void()> work) {
    stream->work.push_back(std::move(work));
    stream->asked++;
    if (stream->at_once) advance(stream, stream->asked);
}

/// The allocation that an address is in, or ends at.
inline Allocation* allocation_of(u64 at) {
    auto next = state.memory.upper_bound(at);
    if (next == state.memory.begin()) return nullptr;
    Allocation* a = std::prev(next)->second;
    return at <= (u64)a->start + a->len ? a : nullptr;
}

inline Pinned* pinned_of(const void* at) {
    auto next = state.pinned.upper_bound((u64)at);
    if (next == state.pinned.begin()) return nullptr;
    Pinned* p = std::prev(next)->second;
    return (u64)at < (u64)p->start + p->len ? p : nullptr;
}

/// How many of these bytes are locked.
inline size_t pinned_bytes(const void* at, size_t len) {
    size_t bytes = 0;
    const u64 end = (u64)at + len;
    for (auto& [start, p] : state.pinned) {
        const u64 from = std::max(start, (u64)at), to = std::min(start + p->len, end);
        bytes += from < to ? to - from : 0;
    }
    return bytes;
}

/// The memory that a call names, if it is all one allocation of the device that nobody has given back.
inline Allocation* named(Device* device, u64 at, size_t len, const char* who) {
    Allocation* a = allocation_of(at);
    if (!a || at + len > (u64)a->start + a->len) {
        wrong("%s: %zu bytes that are not inside one allocation", who, len);
    } else if (a->device != device) {
        wrong("%s: memory of another device", who);
    } else if (a->leaving) {
        wrong("%s: memory that was given back before", who);
    } else {
        return a;
    }
    return nullptr;
}

/// When work begins, its memory must be there in the order of streams.
inline void must_be_there(const Allocation* a, const char* who) {
    if (!a->made) wrong("%s: memory that its stream has not come to yet", who);
    if (a->gone) wrong("%s: memory that is gone already", who);
}

inline bool all_are(const char* bytes, size_t n, int byte) {
    for (size_t i = 0; i < n; i++) {
        if ((unsigned char)bytes[i] != byte) return false;
    }
    return true;
}

/// Ends watching the oldest of what was given back.
inline void forget_oldest() {
    Allocation* a = state.watched.front();
    state.watched.pop_front();
    state.watched_bytes -= a->len;
    if (!all_are(a->start, a->len, GONE_BYTE)) wrong("%zu bytes were written to after they were given back", a->len);
    state.memory.erase((u64)a->start);
    free(a->start - GUARD);
    delete a;
}

/// The memory goes, and is watched for a while.
inline void let_go(Allocation* a) {
    if (!all_are(a->start - GUARD, GUARD, GUARD_BYTE) || !all_are(a->start + a->len, GUARD, GUARD_BYTE)) {
        wrong("something wrote beyond a buffer of %zu bytes", a->len);
    }
    memset(a->start, GONE_BYTE, a->len);
    a->leaving = a->gone = true;
    if (a->pooled) a->device->pool.used -= a->len;
    state.watched.push_back(a);
    state.watched_bytes += a->len;
    while (state.watched_bytes > WATCHED) forget_oldest();
}

inline void run_kernel(Device* device, const Launch& launch) {
    const char* name = launch.kernel->name;
    const u64 n = ++state.kernels["*"];
    state.kernels[name]++;
    if (Status failed = fault("kernel", n)) {
        device->failed = failed;
        return;
    }
    for (const Allocation* a : launch.memory) must_be_there(a, name);
    std::vector<u64> values = launch.values;
    std::vector<void*> addresses;
    for (u64& value : values) addresses.push_back(&value);
    if (launch.kernel->run(addresses.data(), launch.dims)) {
        wrong("%s: its threads wait for others that never come", name);
        device->failed = LAUNCH_FAILED;
    }
}

inline u64 total_bytes() { return setting("STAND_IN_MEMORY", 1u << 30); }

/// A device's memory that nobody has and no pool keeps.
inline u64 free_bytes(const Device& d) {
    const u64 taken = d.plain + d.pool.reserved + (d.primary ? CONTEXT_BYTES : 0);
    return taken < total_bytes() ? total_bytes() - taken : 0;
}

/// Makes an allocation, in the order of a stream if there is one.
inline Status make(Device* device, Stream* stream, size_t len, u64* at) {
    Pool& pool = device->pool;
    if (len == 0) return INVALID_VALUE;
    if (len > free_bytes(*device) + (stream ? pool.reserved - pool.asked : 0)) return OUT_OF_MEMORY;
    char* whole = (char*)aligned_alloc(256, (len + 2 * GUARD + 255) / 256 * 256);
    if (!whole) return OUT_OF_MEMORY;
    memset(whole, GUARD_BYTE, len + 2 * GUARD);
    Allocation* a = new Allocation{device, whole + GUARD, len, stream != nullptr, stream};
    memset(a->start, NEW_BYTE, len);
    state.memory[(u64)a->start] = a;
    *at = (u64)a->start;
    if (!stream) {
        a->made = true;
        device->plain += len;
        return SUCCESS;
    }
    pool.asked += len;
    pool.used += len;
    pool.reserved = std::max(pool.reserved, pool.asked);
    ask(stream, [a] { a->made = true; });
    return SUCCESS;
}
