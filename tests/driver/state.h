// What the stand-in driver knows: devices, handles, memory, and what was done wrong. It stands where a GPU's driver would
// and is written from that one's documentation: it does everything as late as that allows, and refuses what that refuses.
// Device memory is memory of this process, so a device's address is one of the host's.
//
// It is told by the environment:
//   STAND_IN_DEVICES=2          GPUs that there are
//   STAND_IN_MEMORY=1073741824  bytes of each
//   STAND_IN_CAPABILITY=86      of each; 86 is 8.6
//   STAND_IN_VERSION=12040      of the driver
//   STAND_IN_POOLS=0            no memory pools
//   STAND_IN_ORDER=late         all streams do their work when it is waited for; or `copies-first`, `computing-first`: all
//                               streams but the first, or the first, do it at once
//   STAND_IN_FAULT=NAME:N:E,... the N-th call of a function fails with that status; `kernel` is a kernel that runs
//   STAND_IN_REPORT=PATH        where misuse, leaks and counts are written when the process ends
#pragma once
#include <algorithm>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

typedef unsigned long long u64;
typedef unsigned int u32;

enum Status : int {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    STUB_LIBRARY = 34,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    ECC_UNCORRECTABLE = 214,
    UNSUPPORTED_PTX_VERSION = 222,
    INVALID_HANDLE = 400,
    ILLEGAL_STATE = 401,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    ALREADY_REGISTERED = 712,
    LAUNCH_FAILED = 719,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_WRONG_THREAD = 908,
};

/// A kernel as it was compiled for the processor.
struct Kernel {
    const char* module;
    const char* name;
    int (*run)(void**, const unsigned*);
    const char* (*kinds)();
};

/// What a module's texts must have been.
struct ModuleText {
    const char* name;
    u64 sum;
};

struct Context;

/// Memory that comes and goes in a stream's order: bytes that are in use as calls have it, those that really are, and those
/// that the pool keeps from everyone else.
struct Pool {
    u64 asked = 0, used = 0, reserved = 0, threshold = 0;
};

struct Device {
    int number = 0;
    Context* primary = nullptr;
    int retained = 0;
    u64 plain = 0;
    Pool pool;
    Status failed = SUCCESS;
};

struct Context {
    Device* device;
    int streams = 0;
};

struct Stream;

struct Allocation {
    Device* device;
    char* start;
    size_t len;
    bool pooled;
    Stream* stream;
    /// It is there; it will be gone, and is gone, in the order of the stream.
    bool made = false, leaving = false, gone = false;
};

struct Pinned {
    Device* device;
    char* start;
    size_t len;
    int pending = 0;
};

/// A kernel with its grid and what its arguments were when it was asked for.
struct Launch {
    const Kernel* kernel;
    unsigned dims[6];
    std::vector<u64> values;
    std::vector<Allocation*> memory;
};

struct Capture {
    std::thread::id thread;
    std::vector<Launch> launches;
    bool spoilt = false;
};

struct Stream {
    Context* context;
    bool at_once = false;
    std::deque<std::function<void()>> work;
    u64 asked = 0, done = 0;
    Capture* capture = nullptr;
};

struct Event {
    Context* context;
    Stream* stream = nullptr;
    u64 at = 0;
    int queries = 0;
};

struct Module {
    Context* context;
    std::string name;
};

struct Function {
    Module* module;
    const Kernel* kernel;
};

struct Graph {
    Context* context;
    std::vector<Launch> launches;
};

struct Exec {
    Context* context;
    std::vector<Launch> launches;
};

struct Fault {
    std::string name;
    u64 at;
    Status status;
};

/// Bytes around an allocation that must stay as they are, and what they are.
constexpr size_t GUARD = 256;
constexpr int GUARD_BYTE = 0xa5;
/// What nobody wrote, and what was given back: floats that are no numbers.
constexpr int NEW_BYTE = 0xff, GONE_BYTE = 0xfe;
/// Bytes that were given back and are still watched.
constexpr size_t WATCHED = 64u << 20;
/// What a context takes of a device.
constexpr u64 CONTEXT_BYTES = 16u << 20;

inline u64 setting(const char* name, u64 otherwise) {
    const char* value = getenv(name);
    return value && *value ? strtoull(value, nullptr, 10) : otherwise;
}

struct State {
    std::recursive_mutex lock;
    bool ready = false, any = false;
    std::vector<Device> devices;
    std::map<u64, Allocation*> memory;
    std::deque<Allocation*> watched;
    size_t watched_bytes = 0;
    std::map<u64, Pinned*> pinned;
    std::set<Context*> contexts;
    std::set<Stream*> streams;
    std::set<Event*> events;
    std::set<Module*> modules;
    std::set<Function*> functions;
    std::set<Graph*> graphs;
    std::set<Exec*> execs;
    std::map<std::string, u64> calls, kernels;
    std::vector<std::string> misuse, leaks;
    std::vector<Fault> faults;
    std::string order;

    State() {
        const char* spec = getenv("STAND_IN_FAULT");
        std::string text = spec ? spec : "", part;
        for (size_t at = 0; at < text.size();) {
            const size_t end = std::min(text.find(',', at), text.size());
            part = text.substr(at, end - at);
            const size_t first = part.find(':'), second = part.find(':', first + 1);
            faults.push_back({part.substr(0, first), strtoull(part.c_str() + first + 1, nullptr, 10),
                              (Status)atoi(part.c_str() + second + 1)});
            at = end + 1;
        }
        const char* named = getenv("STAND_IN_ORDER");
        order = named ? named : "late";
    }

    ~State();
};

extern State state;

inline void wrong(const char* format, ...) {
    char text[400];
    va_list rest;
    va_start(rest, format);
    vsnprintf(text, sizeof text, format, rest);
    va_end(rest);
    // Once each: what is wrong in a loop would fill the report.
    for (const std::string& known : state.misuse) {
        if (known == text) return;
    }
    state.misuse.push_back(text);
}

/// Whether a failure stays: the driver gives it to all calls that follow.
inline bool stays(Status status) { return status == ECC_UNCORRECTABLE || (status >= 700 && status < 720); }

/// The status that a call or a kernel was told to fail with, the `n`-th of its name.
inline Status fault(const std::string& name, u64 n) {
    for (const Fault& f : state.faults) {
        if (f.name == name && f.at == n) return f.status;
    }
    return SUCCESS;
}
