// The driver's functions that the program calls, with the checks of a strict driver. See state.h.
#include "table.h"
#include "work.h"
#include <algorithm>

State state;

namespace {

thread_local Context* current = nullptr;
/// Streams whose capture this thread began.
thread_local std::vector<Stream*> capturing;

/// What a call needs before it does anything.
enum Needs { NOTHING, INIT, CONTEXT };

/// The lock, and what speaks against the call.
struct Call {
    std::lock_guard<std::recursive_mutex> held;
    Status status;

    Call(const char* name, Needs needs) : held(state.lock), status(SUCCESS) {
        state.any = true;
        const u64 n = ++state.calls[name];
        if ((status = fault(name, n))) {
            if (stays(status) && current) current->device->failed = status;
            return;
        }
        if (needs == NOTHING) return;
        if (!state.ready) {
            wrong("%s before cuInit", name);
            status = NOT_INITIALIZED;
        } else if (needs == CONTEXT && (!current || !state.contexts.count(current))) {
            wrong("%s without a context on this thread", name);
            status = INVALID_CONTEXT;
        } else if (needs == CONTEXT) {
            status = current->device->failed;
        }
    }
};

#define CALL(needs)                   \
    const Call call(__func__, needs); \
    if (call.status) return call.status

/// What a thread that captures may not do: it spoils the capture.
#define NOT_IN_CAPTURE()                                           \
    if (!capturing.empty()) {                                      \
        for (Stream* s : capturing) s->capture->spoilt = true;     \
        wrong("%s while launches are recorded", __func__);         \
        return CAPTURE_UNSUPPORTED;                                \
    }

template <class T>
bool live(const std::set<T*>& all, T* one, const char* who) {
    if (one && all.count(one) && one->context == current) return true;
    wrong("%s: a handle that is none, or of another context", who);
    return false;
}

#define LIVE(all, one) \
    if (!live(state.all, one, __func__)) return INVALID_HANDLE

/// A copy, or memory, in a stream that captures: the real driver would make a part of the graph of it, which then refers
/// to memory of that moment. Nobody here wants that.
#define NOT_CAPTURED(stream)                                     \
    if ((stream)->capture) {                                     \
        (stream)->capture->spoilt = true;                        \
        wrong("%s in a recording of launches", __func__);        \
        return CAPTURE_UNSUPPORTED;                              \
    }

Device* device_of(int number) {
    return number >= 0 && number < (int)state.devices.size() ? &state.devices[(size_t)number] : nullptr;
}

void end_context(Context* context) {
    auto left = [&](const auto& all, const char* what) {
        long n = std::count_if(all.begin(), all.end(), [&](auto* one) { return one->context == context; });
        if (n && !context->device->failed) state.leaks.push_back(std::to_string(n) + " " + what);
    };
    for (Stream* s : state.streams) {
        if (s->context == context) advance(s, s->asked);
    }
    left(state.streams, "streams");
    left(state.events, "events");
    left(state.modules, "modules");
    left(state.graphs, "graphs");
    left(state.execs, "graphs that can be launched");
    u64 bytes = 0, locked = 0;
    for (auto& [at, a] : state.memory) bytes += a->device == context->device && !a->leaving ? a->len : 0;
    for (auto& [at, p] : state.pinned) locked += p->device == context->device ? p->len : 0;
    if (bytes && !context->device->failed) state.leaks.push_back(std::to_string(bytes) + " bytes of a device");
    if (locked && !context->device->failed) state.leaks.push_back(std::to_string(locked) + " bytes of pinned memory");
    Device& device = *context->device;
    device.primary = nullptr;
    device.pool = Pool{0, 0, 0, device.pool.threshold};
    state.contexts.erase(context);
}

void push(Stream* stream, const Launch& launch) {
    ask(stream, [device = stream->context->device, launch] { run_kernel(device, launch); });
}

}  // namespace

State::~State() {
    while (!watched.empty()) forget_oldest();
    for (Context* c : contexts) {
        if (!c->device->failed) leaks.push_back("a context of device " + std::to_string(c->device->number));
    }
    const char* path = getenv("STAND_IN_REPORT");
    FILE* to = path && any ? fopen(path, "w") : nullptr;
    if (!to) return;
    for (const std::string& text : misuse) fprintf(to, "misuse %s\n", text.c_str());
    for (const std::string& text : leaks) fprintf(to, "leak %s\n", text.c_str());
    for (auto& [name, n] : calls) fprintf(to, "call %s %llu\n", name.c_str(), n);
    for (auto& [name, n] : kernels) fprintf(to, "kernel %s %llu\n", name.c_str(), n);
    fclose(to);
}

extern "C" {

int cuDriverGetVersion(int* version) {
    CALL(NOTHING);
    *version = (int)setting("STAND_IN_VERSION", 12040);
    return SUCCESS;
}

int cuInit(unsigned flags) {
    CALL(NOTHING);
    if (flags) return INVALID_VALUE;
    const u64 n = setting("STAND_IN_DEVICES", 1);
    if (!n) return NO_DEVICE;
    if (!state.ready) {
        state.devices.resize(n);
        for (u64 i = 0; i < n; i++) state.devices[i].number = (int)i;
        state.ready = true;
    }
    return SUCCESS;
}

int cuGetErrorName(int status, const char** name) {
    static const std::map<int, const char*> NAMES = {
        {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},     {STUB_LIBRARY, "CUDA_ERROR_STUB_LIBRARY"},
        {LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED"},     {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"},
        {ECC_UNCORRECTABLE, "CUDA_ERROR_ECC_UNCORRECTABLE"}, {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE"},
        {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"}};
    const auto found = NAMES.find(status);
    *name = found == NAMES.end() ? "CUDA_ERROR_OF_THE_STAND_IN" : found->second;
    return SUCCESS;
}

int cuGetErrorString(int status, const char** text) {
    // Beyond what it knows, the real driver has no words.
    *text = status > 998 ? nullptr : "what the stand-in says";
    return status > 998 ? INVALID_VALUE : SUCCESS;
}

int cuDeviceGetCount(int* n) {
    CALL(INIT);
    *n = (int)state.devices.size();
    return SUCCESS;
}

int cuDeviceGet(int* device, int ordinal) {
    CALL(INIT);
    if (!device_of(ordinal)) return INVALID_DEVICE;
    *device = ordinal;
    return SUCCESS;
}

int cuDeviceGetName(char* name, int len, int device) {
    CALL(INIT);
    if (!device_of(device)) return INVALID_DEVICE;
    snprintf(name, (size_t)len, "Stand-in %d", device);
    return SUCCESS;
}

int cuDeviceTotalMem_v2(size_t* bytes, int device) {
    CALL(INIT);
    if (!device_of(device)) return INVALID_DEVICE;
    *bytes = total_bytes();
    return SUCCESS;
}

int cuDeviceGetAttribute(int* value, int attribute, int device) {
    CALL(INIT);
    if (!device_of(device)) return INVALID_DEVICE;
    const int capability = (int)setting("STAND_IN_CAPABILITY", 86);
    switch (attribute) {
        case 16: *value = 2; break;  // multiprocessors
        case 33: *value = 0x65 + device; break;  // bus
        case 34: *value = 0; break;  // place on it
        case 38: *value = 4096; break;  // second-level cache
        case 50: *value = 0; break;  // domain
        case 75: *value = capability / 10; break;
        case 76: *value = capability % 10; break;
        case 115: *value = (int)setting("STAND_IN_POOLS", 1); break;
        default: wrong("cuDeviceGetAttribute: %d, which the stand-in does not know", attribute); return INVALID_VALUE;
    }
    return SUCCESS;
}

int cuDevicePrimaryCtxRetain(Context** context, int device) {
    CALL(INIT);
    Device* d = device_of(device);
    if (!d) return INVALID_DEVICE;
    if (!d->retained++) state.contexts.insert(d->primary = new Context{d});
    *context = d->primary;
    return SUCCESS;
}

int cuDevicePrimaryCtxRelease_v2(int device) {
    CALL(INIT);
    Device* d = device_of(device);
    if (!d || !d->retained) return INVALID_CONTEXT;
    if (!--d->retained) end_context(d->primary);
    return SUCCESS;
}

int cuCtxGetCurrent(Context** context) {
    CALL(INIT);
    *context = current;
    return SUCCESS;
}

int cuCtxSetCurrent(Context* context) {
    CALL(INIT);
    if (context && !state.contexts.count(context)) {
        wrong("cuCtxSetCurrent: a context that is gone");
        return INVALID_CONTEXT;
    }
    current = context;
    return SUCCESS;
}

int cuMemGetInfo_v2(size_t* free, size_t* total) {
    CALL(CONTEXT);
    *free = free_bytes(*current->device);
    *total = total_bytes();
    return SUCCESS;
}

int cuDeviceGetDefaultMemPool(Pool** pool, int device) {
    CALL(INIT);
    Device* d = device_of(device);
    if (!d) return INVALID_DEVICE;
    *pool = &d->pool;
    return SUCCESS;
}

int cuMemPoolSetAttribute(Pool* pool, int attribute, void* value) {
    CALL(INIT);
    if (attribute != 4) return INVALID_VALUE;
    memcpy(&pool->threshold, value, sizeof pool->threshold);
    return SUCCESS;
}

int cuMemPoolTrimTo(Pool* pool, size_t keep) {
    CALL(INIT);
    NOT_IN_CAPTURE();
    pool->reserved = std::min(pool->reserved, std::max((u64)keep, pool->used));
    return SUCCESS;
}

int cuMemAlloc_v2(u64* at, size_t len) {
    CALL(CONTEXT);
    NOT_IN_CAPTURE();
    return make(current->device, nullptr, len, at);
}

int cuMemFree_v2(u64 at) {
    CALL(CONTEXT);
    NOT_IN_CAPTURE();
    Allocation* a = named(current->device, at, 0, __func__);
    if (!a || (u64)a->start != at) return INVALID_VALUE;
    // It waits for whatever the device does.
    for (Stream* s : state.streams) {
        if (s->context == current) advance(s, s->asked);
    }
    if (current->device->failed) return current->device->failed;
    if (a->pooled) {
        a->device->pool.asked -= a->len;
    } else {
        a->device->plain -= a->len;
    }
    let_go(a);
    return SUCCESS;
}

int cuMemAllocAsync(u64* at, size_t len, Stream* stream) {
    CALL(CONTEXT);
    LIVE(streams, stream);
    NOT_CAPTURED(stream);
    return make(current->device, stream, len, at);
}

int cuMemFreeAsync(u64 at, Stream* stream) {
    CALL(CONTEXT);
    LIVE(streams, stream);
    NOT_CAPTURED(stream);
    Allocation* a = named(current->device, at, 0, __func__);
    if (!a || (u64)a->start != at) return INVALID_VALUE;
    a->leaving = true;
    a->device->pool.asked -= a->len;
    ask(stream, [a] {
        must_be_there(a, "cuMemFreeAsync");
        let_go(a);
    });
    return SUCCESS;
}

int cuMemHostAlloc(void** at, size_t len, unsigned) {
    CALL(CONTEXT);
    NOT_IN_CAPTURE();
    char* start = (char*)aligned_alloc(256, (len + 255) / 256 * 256);
    if (!len || !start) return len ? OUT_OF_MEMORY : INVALID_VALUE;
    memset(start, NEW_BYTE, len);
    state.pinned[(u64)start] = new Pinned{current->device, start, len};
    *at = start;
    return SUCCESS;
}

int cuMemFreeHost(void* at) {
    CALL(CONTEXT);
    NOT_IN_CAPTURE();
    Pinned* p = pinned_of(at);
    if (!p || p->start != at) {
        wrong("cuMemFreeHost: what is not pinned");
        return INVALID_VALUE;
    }
    if (p->pending) wrong("cuMemFreeHost: a copy is still to come");
    state.pinned.erase((u64)at);
    free(at);
    delete p;
    return SUCCESS;
}

// Whether memory is mapped for writing, too.
static bool is_writable(u64 at) {
    FILE* maps = fopen("/proc/self/maps", "r");
    char line[512];
    bool found = false;
    while (maps && fgets(line, sizeof line, maps)) {
        u64 first, end;
        char read, write;
        if (sscanf(line, "%llx-%llx %c%c", &first, &end, &read, &write) == 4 && first <= at && at < end) {
            found = write == 'w';
        }
    }
    if (maps) fclose(maps);
    return found;
}

int cuMemHostRegister_v2(void* at, size_t len, unsigned flags) {
    CALL(CONTEXT);
    NOT_IN_CAPTURE();
    const unsigned read_only = 8;
    if (!len) return INVALID_VALUE;
    if (!(flags & read_only) && !is_writable((u64)at)) return INVALID_VALUE;
    if (pinned_bytes(at, len)) return ALREADY_REGISTERED;
    state.pinned[(u64)at] = new Pinned{current->device, (char*)at, len};
    return SUCCESS;
}

int cuMemHostUnregister(void* at) {
    CALL(CONTEXT);
    NOT_IN_CAPTURE();
    Pinned* p = pinned_of(at);
    if (!p || p->start != at) {
        wrong("cuMemHostUnregister: what is not registered");
        return INVALID_VALUE;
    }
    if (p->pending) wrong("cuMemHostUnregister: a copy is still to come");
    state.pinned.erase((u64)at);
    delete p;
    return SUCCESS;
}

int cuMemcpyHtoDAsync_v2(u64 to, const void* from, size_t len, Stream* stream) {
    CALL(CONTEXT);
    LIVE(streams, stream);
    NOT_CAPTURED(stream);
    Allocation* a = named(current->device, to, len, __func__);
    if (!a) return INVALID_VALUE;
    const size_t pinned = pinned_bytes(from, len);
    if (pinned && pinned < len) {
        wrong("cuMemcpyHtoDAsync: host memory that is locked in part");
        return INVALID_VALUE;
    }
    Pinned* p = pinned_of(from);
    if (p) p->pending++;
    // Also from pageable memory: its copies "might be" done with the bytes when they return, and then they might not.
    ask(stream, [=] {
        must_be_there(a, "cuMemcpyHtoDAsync");
        memcpy((void*)to, from, len);
        if (p) p->pending--;
    });
    return SUCCESS;
}

int cuMemcpyDtoHAsync_v2(void* to, u64 from, size_t len, Stream* stream) {
    CALL(CONTEXT);
    LIVE(streams, stream);
    NOT_CAPTURED(stream);
    Allocation* a = named(current->device, from, len, __func__);
    if (!a) return INVALID_VALUE;
    Pinned* p = pinned_of(to);
    if (p) p->pending++;
    ask(stream, [=] {
        must_be_there(a, "cuMemcpyDtoHAsync");
        memcpy(to, (const void*)from, len);
        if (p) p->pending--;
    });
    return SUCCESS;
}

int cuMemcpyDtoDAsync_v2(u64 to, u64 from, size_t len, Stream* stream) {
    CALL(CONTEXT);
    LIVE(streams, stream);
    NOT_CAPTURED(stream);
    Allocation* a = named(current->device, to, len, __func__);
    Allocation* b = named(current->device, from, len, __func__);
    if (!a || !b) return INVALID_VALUE;
    ask(stream, [=] {
        must_be_there(a, "cuMemcpyDtoDAsync");
        must_be_there(b, "cuMemcpyDtoDAsync");
        memcpy((void*)to, (const void*)from, len);
    });
    return SUCCESS;
}

int cuModuleLoadData(Module** module, const void* image) {
    CALL(CONTEXT);
    NOT_IN_CAPTURE();
    int arch = 0, compiler = 0;
    char kind[16], name[64];
    u64 sum = 0;
    if (sscanf((const char*)image, "STAND-IN %d %15[a-z]_%d %63s %llx", &compiler, kind, &arch, name, &sum) != 5) {
        wrong("cuModuleLoadData: what no compiler made");
        return INVALID_IMAGE;
    }
    const int capability = (int)setting("STAND_IN_CAPABILITY", 86), driver = (int)setting("STAND_IN_VERSION", 12040);
    const bool machine_code = !strcmp(kind, "sm");
    if (compiler > driver / 1000) return machine_code ? INVALID_IMAGE : UNSUPPORTED_PTX_VERSION;
    if (arch > capability || (machine_code && arch / 10 != capability / 10)) return NO_BINARY_FOR_GPU;
    for (const ModuleText& m : MODULE_TEXTS) {
        if (strcmp(m.name, name)) continue;
        if (m.sum != sum) {
            wrong("cuModuleLoadData: %s is made of other text", name);
            return INVALID_IMAGE;
        }
        state.modules.insert(*module = new Module{current, name});
        return SUCCESS;
    }
    wrong("cuModuleLoadData: there is no module %s", name);
    return INVALID_IMAGE;
}

int cuModuleGetFunction(Function** function, Module* module, const char* name) {
    CALL(CONTEXT);
    // With lazy loading this is where a kernel is loaded.
    NOT_IN_CAPTURE();
    LIVE(modules, module);
    for (const Kernel& k : KERNELS) {
        if (module->name != k.module || strcmp(k.name, name)) continue;
        state.functions.insert(*function = new Function{module, &k});
        return SUCCESS;
    }
    wrong("cuModuleGetFunction: no %s in %s", name, module->name.c_str());
    return NOT_FOUND;
}

int cuModuleUnload(Module* module) {
    CALL(CONTEXT);
    NOT_IN_CAPTURE();
    LIVE(modules, module);
    for (auto at = state.functions.begin(); at != state.functions.end();) {
        at = (*at)->module == module ? state.functions.erase(at) : std::next(at);
    }
    state.modules.erase(module);
    return SUCCESS;
}

int cuLaunchKernel(Function* function, unsigned x, unsigned y, unsigned z, unsigned tx, unsigned ty, unsigned tz,
                   unsigned shared, Stream* stream, void** params, void** extra) {
    CALL(CONTEXT);
    LIVE(streams, stream);
    if (!state.functions.count(function) || function->module->context != current) {
        wrong("cuLaunchKernel: no kernel, or one of another context");
        return INVALID_HANDLE;
    }
    const Kernel* kernel = function->kernel;
    const u64 threads = (u64)tx * ty * tz;
    if (!x || !y || !z || x > 0x7fffffff || y > 65535 || z > 65535 || !threads || threads > 1024 || shared || extra) {
        wrong("%s: a grid of %u x %u x %u of %llu threads", kernel->name, x, y, z, threads);
        return INVALID_VALUE;
    }
    if (threads % 32) wrong("%s: %llu threads are no whole warps", kernel->name, threads);
    Launch launch{kernel, {x, y, z, tx, ty, tz}, {}, {}};
    const char* kinds = kernel->kinds();
    for (size_t i = 0; kinds[i]; i++) {
        u64 value = 0;
        memcpy(&value, params[i], kinds[i] == 'p' || kinds[i] == 'l' ? 8 : 4);
        launch.values.push_back(value);
        if (kinds[i] != 'p' || !value) continue;
        if (Allocation* a = named(current->device, value, 0, kernel->name)) launch.memory.push_back(a);
    }
    if (!stream->capture) {
        push(stream, launch);
    } else if (stream->capture->thread != std::this_thread::get_id()) {
        wrong("%s: launched by another thread than the one that records", kernel->name);
        stream->capture->spoilt = true;
        return CAPTURE_WRONG_THREAD;
    } else {
        stream->capture->launches.push_back(launch);
    }
    return SUCCESS;
}

int cuStreamCreate(Stream** stream, unsigned flags) {
    CALL(CONTEXT);
    if (flags != 1) wrong("cuStreamCreate: a stream that waits for the legacy stream");
    const bool first = current->streams++ == 0;
    const bool at_once = state.order == (first ? "computing-first" : "copies-first");
    state.streams.insert(*stream = new Stream{current, at_once, {}});
    return SUCCESS;
}

int cuStreamDestroy_v2(Stream* stream) {
    CALL(CONTEXT);
    NOT_IN_CAPTURE();
    LIVE(streams, stream);
    // The real driver goes on until all is done. The handle is gone, but events may still name the stream.
    advance(stream, stream->asked);
    state.streams.erase(stream);
    return SUCCESS;
}

int cuStreamSynchronize(Stream* stream) {
    CALL(CONTEXT);
    LIVE(streams, stream);
    NOT_CAPTURED(stream);
    advance(stream, stream->asked);
    return current->device->failed;
}

int cuStreamWaitEvent(Stream* stream, Event* event, unsigned) {
    CALL(CONTEXT);
    LIVE(streams, stream);
    LIVE(events, event);
    NOT_CAPTURED(stream);
    // An event that was never recorded is nothing to wait for.
    if (!event->stream) return SUCCESS;
    ask(stream, [from = event->stream, at = event->at] { advance(from, at); });
    return SUCCESS;
}

int cuEventCreate(Event** event, unsigned) {
    CALL(CONTEXT);
    state.events.insert(*event = new Event{current});
    return SUCCESS;
}

int cuEventDestroy_v2(Event* event) {
    CALL(CONTEXT);
    LIVE(events, event);
    state.events.erase(event);
    delete event;
    return SUCCESS;
}

int cuEventRecord(Event* event, Stream* stream) {
    CALL(CONTEXT);
    LIVE(events, event);
    LIVE(streams, stream);
    NOT_CAPTURED(stream);
    ask(stream, [] {});
    event->stream = stream;
    event->at = stream->asked;
    event->queries = 0;
    return SUCCESS;
}

int cuEventQuery(Event* event) {
    CALL(CONTEXT);
    NOT_IN_CAPTURE();
    LIVE(events, event);
    if (!event->stream || event->stream->done >= event->at) return current->device->failed;
    // Who asks again and again must see an end of it.
    if (++event->queries < 3) return NOT_READY;
    advance(event->stream, event->at);
    return current->device->failed;
}

int cuEventSynchronize(Event* event) {
    CALL(CONTEXT);
    NOT_IN_CAPTURE();
    LIVE(events, event);
    if (event->stream) advance(event->stream, event->at);
    return current->device->failed;
}

int cuStreamBeginCapture_v2(Stream* stream, int mode) {
    CALL(CONTEXT);
    LIVE(streams, stream);
    if (stream->capture || mode != 1) {
        wrong("cuStreamBeginCapture: it is recording already, or not for its thread alone");
        return ILLEGAL_STATE;
    }
    stream->capture = new Capture{std::this_thread::get_id(), {}};
    capturing.push_back(stream);
    return SUCCESS;
}

int cuStreamEndCapture(Stream* stream, Graph** graph) {
    CALL(CONTEXT);
    LIVE(streams, stream);
    if (!stream->capture) {
        wrong("cuStreamEndCapture: it was not recording");
        return ILLEGAL_STATE;
    }
    const auto mine = std::find(capturing.begin(), capturing.end(), stream);
    if (mine == capturing.end()) {
        wrong("cuStreamEndCapture on another thread");
        return CAPTURE_WRONG_THREAD;
    }
    capturing.erase(mine);
    Capture* capture = stream->capture;
    stream->capture = nullptr;
    *graph = nullptr;
    const bool spoilt = capture->spoilt;
    if (!spoilt) state.graphs.insert(*graph = new Graph{current, std::move(capture->launches)});
    delete capture;
    return spoilt ? CAPTURE_INVALIDATED : SUCCESS;
}

int cuGraphInstantiateWithFlags(Exec** exec, Graph* graph, u64) {
    CALL(CONTEXT);
    LIVE(graphs, graph);
    state.execs.insert(*exec = new Exec{current, graph->launches});
    return SUCCESS;
}

int cuGraphDestroy(Graph* graph) {
    CALL(CONTEXT);
    LIVE(graphs, graph);
    state.graphs.erase(graph);
    delete graph;
    return SUCCESS;
}

int cuGraphExecDestroy(Exec* exec) {
    CALL(CONTEXT);
    LIVE(execs, exec);
    state.execs.erase(exec);
    delete exec;
    return SUCCESS;
}

int cuGraphLaunch(Exec* exec, Stream* stream) {
    CALL(CONTEXT);
    LIVE(execs, exec);
    LIVE(streams, stream);
    NOT_CAPTURED(stream);
    for (const Launch& launch : exec->launches) {
        for (const Allocation* a : launch.memory) {
            if (a->leaving) wrong("%s: recorded with memory that was given back", launch.kernel->name);
        }
        push(stream, launch);
    }
    return SUCCESS;
}

}
