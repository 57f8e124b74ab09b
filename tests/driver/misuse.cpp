// Does one thing that a driver does not allow, or that shows what it does late; what the stand-in says of it is compared
// by the test. The last line printed is what the case found.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

typedef unsigned long long u64;
extern "C" {
int cuInit(unsigned);
int cuDevicePrimaryCtxRetain(void**, int);
int cuDevicePrimaryCtxRelease_v2(int);
int cuCtxSetCurrent(void*);
int cuStreamCreate(void**, unsigned);
int cuStreamDestroy_v2(void*);
int cuStreamSynchronize(void*);
int cuStreamWaitEvent(void*, void*, unsigned);
int cuStreamBeginCapture_v2(void*, int);
int cuStreamEndCapture(void*, void**);
int cuMemAllocAsync(u64*, size_t, void*);
int cuMemFreeAsync(u64, void*);
int cuMemHostAlloc(void**, size_t, unsigned);
int cuMemFreeHost(void*);
int cuMemHostRegister_v2(void*, size_t, unsigned);
int cuMemHostUnregister(void*);
int cuMemcpyHtoDAsync_v2(u64, const void*, size_t, void*);
int cuMemcpyDtoHAsync_v2(void*, u64, size_t, void*);
int cuEventCreate(void**, unsigned);
int cuEventDestroy_v2(void*);
int cuEventRecord(void*, void*);
int cuEventQuery(void*);
int cuEventSynchronize(void*);
}

int main(int, char** args) {
    const std::string what = args[1];
    void *context, *stream, *other, *event, *pinned, *graph;
    u64 at;
    char bytes[64], back[64];
    memset(bytes, 7, sizeof bytes);
    memset(back, 1, sizeof back);
    if (what == "no start") return printf("%d\n", cuDevicePrimaryCtxRetain(&context, 0)), 0;
    cuInit(0);
    cuDevicePrimaryCtxRetain(&context, 0);
    if (what == "no context") return printf("%d\n", cuStreamCreate(&stream, 1)), 0;
    cuCtxSetCurrent(context);
    cuStreamCreate(&stream, 1);
    cuStreamCreate(&other, 1);
    cuEventCreate(&event, 2);
    cuMemHostAlloc(&pinned, 64, 0);
    cuMemAllocAsync(&at, 64, stream);
    int found = 0;
    if (what == "well") {
        cuMemcpyHtoDAsync_v2(at, bytes, 64, stream);
        cuMemcpyDtoHAsync_v2(back, at, 64, stream);
        cuStreamSynchronize(stream);
        found = back[63];
    } else if (what == "not waited") {
        cuMemcpyHtoDAsync_v2(at, bytes, 64, stream);
        cuMemcpyDtoHAsync_v2(back, at, 64, stream);
        found = back[63];
    } else if (what == "taken late") {
        cuMemcpyHtoDAsync_v2(at, bytes, 64, stream);
        memset(bytes, 9, sizeof bytes);
        cuMemcpyDtoHAsync_v2(back, at, 64, stream);
        cuStreamSynchronize(stream);
        found = back[63];
    } else if (what == "another stream") {
        cuStreamSynchronize(stream);
        memset(pinned, 5, 64);
        cuMemcpyHtoDAsync_v2(at, pinned, 64, other);
        cuMemcpyDtoHAsync_v2(back, at, 64, stream);
        cuStreamSynchronize(stream);
        found = back[63] == 5;
    } else if (what == "after an event") {
        cuStreamSynchronize(stream);
        memset(pinned, 5, 64);
        cuStreamWaitEvent(stream, event, 0);
        cuMemcpyHtoDAsync_v2(at, pinned, 64, other);
        cuEventRecord(event, other);
        cuStreamWaitEvent(stream, event, 0);
        cuMemcpyDtoHAsync_v2(back, at, 64, stream);
        const int first = cuEventQuery(event);
        cuStreamSynchronize(stream);
        found = first == 600 && cuEventQuery(event) == 0 ? back[63] : 0;
    } else if (what == "too early") {
        cuMemcpyHtoDAsync_v2(at, pinned, 64, other);
        cuStreamSynchronize(other);
    } else if (what == "beyond") {
        found = cuMemcpyHtoDAsync_v2(at + 1, bytes, 64, stream);
    } else if (what == "written beyond") {
        cuStreamSynchronize(stream);
        memset((char*)at, 0, 65);
    } else if (what == "given back") {
        cuMemFreeAsync(at, stream);
        found = cuMemcpyHtoDAsync_v2(at, bytes, 64, stream);
        cuMemAllocAsync(&at, 64, stream);
    } else if (what == "written after") {
        const u64 gone = at;
        cuMemFreeAsync(at, stream);
        cuMemAllocAsync(&at, 64, stream);
        cuStreamSynchronize(stream);
        *(char*)gone = 0;
    } else if (what == "recorded") {
        cuStreamBeginCapture_v2(stream, 1);
        found = cuStreamSynchronize(stream);
        found = found == 900 ? cuStreamEndCapture(stream, &graph) : 0;
    } else if (what == "pinned recorded") {
        cuStreamBeginCapture_v2(stream, 1);
        void* more;
        found = cuMemHostAlloc(&more, 64, 0);
        found = found == 900 ? cuStreamEndCapture(stream, &graph) : 0;
    } else if (what == "pinned too soon") {
        cuMemcpyHtoDAsync_v2(at, pinned, 64, stream);
        cuMemFreeHost(pinned);
        cuMemHostAlloc(&pinned, 64, 0);
    } else if (what == "locked in part") {
        static char pages[3 * 4096];
        char* page = pages + 4096 - (u64)pages % 4096;
        cuMemHostRegister_v2(page, 4096, 0);
        found = cuMemcpyHtoDAsync_v2(at, page + 4096 - 32, 64, stream);
        cuMemHostUnregister(page);
    } else if (what == "legacy") {
        found = cuMemcpyHtoDAsync_v2(at, bytes, 64, nullptr);
    }
    if (what != "leak") {
        cuMemFreeAsync(at, stream);
        cuStreamSynchronize(stream);
        cuMemFreeHost(pinned);
        cuEventDestroy_v2(event);
        cuStreamDestroy_v2(other);
        cuStreamDestroy_v2(stream);
    }
    cuDevicePrimaryCtxRelease_v2(0);
    printf("%d\n", found);
    return 0;
}
