//! What the emulated GPU finds.

use super::{Shim, shared};
use crate::device::{Arg, Buffer, Device, Grid};
use std::sync::Arc;

/// Kernels of `[blocks, threads]`, and what the sanitizer says of each: nothing where it is right.
const KERNELS: [(&str, [u32; 2], &str); 18] = [
    ("warps_in_order", [2, 64], ""),
    ("lanes_in_order", [2, 32], ""),
    ("counted", [2, 64], ""),
    ("own_values", [2, 64], ""),
    ("last_word", [1, 32], ""),
    (
        "warps",
        [1, 64],
        "read races with a write: 4 bytes of shared memory, thread 32 of block (0, 0, 0), with thread 0",
    ),
    (
        "lanes",
        [1, 32],
        "read races with a write: 4 bytes of shared memory, thread 1 of block (0, 0, 0), with thread 0",
    ),
    ("by_value", [1, 32], "read races with a write"),
    ("after_shuffle", [1, 32], "read races with a write"),
    (
        "written_late",
        [1, 64],
        "write races with a read: 4 bytes of shared memory, thread 63 of block (0, 0, 0), with several threads",
    ),
    (
        "blocks",
        [2, 1],
        "write races with a write: 4 bytes of global memory, thread 0 of block (1, 0, 0)",
    ),
    (
        "read_by_blocks",
        [2, 1],
        "write races with a read: 4 bytes of global memory, thread 0 of block (1, 0, 0)",
    ),
    ("counted_and_read", [1, 64], "read races with a write"),
    (
        "never_written",
        [1, 32],
        "read of what the block has not written: 4 bytes of shared memory",
    ),
    (
        "of_another_block",
        [2, 32],
        "read of what the block has not written",
    ),
    (
        "beyond",
        [1, 32],
        "outside every allocation: 4 bytes of global memory, thread 31",
    ),
    ("misaligned", [1, 1], "not a multiple of 16"),
    ("half_a_warp", [1, 32], "lanes 0000ffff meet"),
];

/// One mistake each, in the last thirteen. `values` is `[66]` and `out` `[64]`.
const TEXT: &str = r#"
#include "base.cuh"

KERNEL warps_in_order(const float* values, float* out) {
    __shared__ float room[64];
    room[threadIdx.x] = values[threadIdx.x];
    __syncthreads();
    const float other = room[63 - threadIdx.x];
    __syncthreads();
    room[threadIdx.x] = other;
    if (blockIdx.x == 0) out[threadIdx.x] = room[threadIdx.x];
}

KERNEL lanes_in_order(const float* values, float* out) {
    __shared__ float room[32];
    room[threadIdx.x] = values[threadIdx.x];
    __syncwarp();
    out[32 * blockIdx.x + threadIdx.x] = room[31 - threadIdx.x] + warp_sum(1.0f);
}

KERNEL counted(const float*, float* out) {
    __shared__ int count;
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    atomicAdd(&count, 1);
    __syncthreads();
    if (blockIdx.x == 0) out[threadIdx.x] = (float)count;
}

KERNEL own_values(const float* values, float* out) {
    float own[4];
    for (u32 i = 0; i < 4; i++) own[(i + threadIdx.x) % 4] = values[i];
    if (threadIdx.x < 32) out[32 * blockIdx.x + threadIdx.x] = own[threadIdx.x % 4];
}

KERNEL last_word(const float* values, float* out) {
    u32 two[2];
    words<1, 2>((const u8*)(values + 64), two);
    out[threadIdx.x] = (float)two[1];
}

KERNEL warps(const float*, float* out) {
    __shared__ float room[64];
    room[threadIdx.x] = 1.0f;
    __syncwarp();
    out[threadIdx.x] = room[threadIdx.x % 32];
}

KERNEL lanes(const float*, float* out) {
    __shared__ float room[32];
    room[threadIdx.x] = 1.0f;
    out[threadIdx.x] = room[threadIdx.x & ~1u];
}

DEVICE float total(uint2 pair) {
    float sum = 0.0f;
    for (u32 i = 0; i < pair.x; i++) sum += (float)pair.y;
    return sum;
}

KERNEL by_value(const float*, float* out) {
    __shared__ uint2 room[32];
    room[threadIdx.x].x = room[threadIdx.x].y = threadIdx.x;
    out[threadIdx.x] = total(*(const uint2*)(room + (threadIdx.x & ~1u)));
}

KERNEL after_shuffle(const float*, float* out) {
    __shared__ float room[32];
    room[threadIdx.x] = 1.0f;
    const float sum = warp_sum(1.0f);
    out[threadIdx.x] = sum + room[threadIdx.x & ~1u];
}

KERNEL written_late(const float* values, float* out) {
    __shared__ float room[64];
    room[threadIdx.x] = values[threadIdx.x];
    __syncthreads();
    const float other = room[63];
    room[threadIdx.x] = other + 1.0f;
    out[threadIdx.x] = other;
}

KERNEL blocks(const float*, float* out) {
    out[7] = (float)blockIdx.x;
}

KERNEL read_by_blocks(const float*, float* out) {
    if (blockIdx.x == 0) out[1] = out[0];
    else out[0] = 1.0f;
}

KERNEL counted_and_read(const float*, float* out) {
    __shared__ int count;
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
    atomicAdd(&count, 1);
    out[threadIdx.x] = (float)count;
}

KERNEL never_written(const float*, float* out) {
    __shared__ float room[32];
    if (out[0] == 1.0f) room[threadIdx.x] = 1.0f;
    out[threadIdx.x] = room[threadIdx.x];
}

KERNEL of_another_block(const float*, float* out) {
    __shared__ float room[32];
    if (blockIdx.x == 0) room[threadIdx.x] = 1.0f;
    out[32 * blockIdx.x + threadIdx.x] = room[threadIdx.x];
}

KERNEL beyond(const float* values, float* out) {
    out[threadIdx.x] = values[threadIdx.x + 35];
}

KERNEL misaligned(const float* values, float* out) {
    const uint4 four = *(const uint4*)(values + 1);
    out[0] = (float)(four.x + four.y + four.z + four.w);
}

KERNEL half_a_warp(const float* values, float* out) {
    if (threadIdx.x >= 16) return;
    out[threadIdx.x] = warp_sum(values[threadIdx.x]);
}
"#;

#[test]
fn the_sanitizer_finds_each_mistake_and_nothing_else() {
    let names: &'static [&'static str] = Vec::leak(KERNELS.map(|(name, ..)| name).to_vec());
    let device: Arc<dyn Device> = Arc::new(Shim::compile(&[("misuse.cu", TEXT, names)], true));
    let values = Buffer::of_f32(&device, &[1.5; 66]).unwrap();
    for (name, [blocks, threads], expected) in KERNELS {
        let out = Buffer::of_f32(&device, &[0.0; 64]).unwrap();
        let args: [Arg; 2] = [values.view().arg(), out.view().arg()];
        let grid = Grid {
            blocks: [blocks, 1, 1],
            threads,
        };
        // SAFETY: the sanitizer stops no access, and buffers have room around them.
        let result = unsafe { device.launch(name, grid, &args) };
        let found = result.err().map(|e| e.to_string()).unwrap_or_default();
        assert_eq!(found.is_empty(), expected.is_empty(), "{name}: '{found}'");
        assert!(found.contains(expected), "{name}: {found}");
    }
}

#[test]
fn a_write_beyond_a_buffer_is_found() {
    let device: Arc<dyn Device> = shared();
    let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let buffer = Buffer::new(&device, 8).unwrap();
        // SAFETY: one byte too many, which is still inside the guard.
        unsafe { device.write(buffer.view().address(), &[1; 9]) }.unwrap();
    }));
    assert!(found.is_err());
}

#[test]
fn arguments_of_other_kinds_are_refused() {
    let shim = shared();
    let x: Arc<dyn Device> = shared();
    let buffer = Buffer::of_f32(&x, &[1.0; 4]).unwrap();
    let one = Grid {
        blocks: [1, 1, 1],
        threads: 32,
    };
    let launch = |args: &[Arg]| {
        // SAFETY: with the right kinds four values of a buffer of four are cleared, with others
        // nothing is done.
        unsafe { shim.launch("clear", one, args) }
    };
    for args in [
        &[buffer.view().arg(), Arg::Int(4)][..],
        &[buffer.view().arg()],
        &[Arg::Long(0), Arg::Long(4)],
    ] {
        let error = launch(args).unwrap_err().to_string();
        assert!(
            error.contains("clear") && error.contains("of the kinds pl"),
            "{error}"
        );
        assert_eq!(buffer.view().to_f32().unwrap(), [1.0; 4]);
    }
    launch(&[buffer.view().arg(), Arg::Long(4)]).unwrap();
    assert_eq!(buffer.view().to_f32().unwrap(), [0.0; 4]);
}
