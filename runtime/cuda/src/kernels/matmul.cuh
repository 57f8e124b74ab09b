// Products of quantized matrices with many tokens, on tensor cores of 8-bit integers.
//
// Codes, scales and the exact integer sums of 16 products are those of a single token's product, so
// that results differ from a single token's only by the order of the float sums.
#pragma once
#include "formats.cuh"

/// Rows, tokens and columns per step of a block of four warps.
#define TILE_ROWS 64
#define TILE_TOKENS 32
#define TILE_COLS 64
/// Bytes from one row of codes to the next in shared memory: 20 words, so that a warp's reads hit
/// different banks.
#define CODE_STRIDE 80

#ifndef TIER_PLAN_SHIM
/// Computes `c += a * b` of 16 x 16 and 16 x 8 bytes.
///
/// A lane has four bytes of rows `lane / 4` (`low`) and `lane / 4 + 8` (`high`) of `a` from column
/// `lane % 4 * 4` on, the same of column `lane / 4` of `b`, and columns `lane % 4 * 2` and the next
/// of its two rows of `c`.
DEVICE void multiply_tiles(int* c, u32 low, u32 high, u32 b) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(low), "r"(high), "r"(b));
#else
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+r"(c[0]), "+r"(c[1])
        : "r"(low), "r"(b));
    asm("mma.sync.aligned.m8n8k16.row.col.s32.s8.s8.s32 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+r"(c[2]), "+r"(c[3])
        : "r"(high), "r"(b));
#endif
}
#endif

/// Computes `out[token, row] = sum over c of w[row, c] * x[token, c]`.
///
/// Without `groups` the matrix is `base`, and there are `n_tokens`. A group is three numbers: the
/// index of a matrix in the table, its first token, and its number of tokens. Grid: tiles of rows,
/// tiles of tokens (of the largest group), groups.
template <class F>
DEVICE void matmul(const u8* base, const u8* const* table, int n_table, const int* groups, int n_tokens, int n_rows,
                   int n_cols, const i8* q, const float* scale, const float* sums, float* out) {
    __shared__ uint4 code_room[TILE_ROWS * CODE_STRIDE / 16];
    __shared__ uint4 act_room[TILE_TOKENS * CODE_STRIDE / 16];
    u8* const codes = (u8*)code_room;
    u8* const acts = (u8*)act_room;
    // Per half of a run.
    __shared__ float code_scale[TILE_ROWS][4];
    __shared__ float code_min[TILE_ROWS][4];
    __shared__ float act_scale[TILE_TOKENS][2];
    __shared__ float act_sum[TILE_TOKENS][4];
    const u8* w = base;
    int first_token = 0;
    if (groups) {
        const int at = groups[3 * blockIdx.z];
        w = at < 0 || at >= n_table ? nullptr : table[at];
        first_token = groups[3 * blockIdx.z + 1];
        n_tokens = groups[3 * blockIdx.z + 2];
    }
    const int token0 = (int)blockIdx.y * TILE_TOKENS, row0 = (int)blockIdx.x * TILE_ROWS;
    if (!w || token0 >= n_tokens) return;
    const int thread = (int)threadIdx.x, warp = thread / WARP, lane = thread % WARP;
    const int n_runs = n_cols / 32;
    const i64 row_bytes = (i64)(n_cols / F::LEN) * F::BYTES;
    float acc[TILE_TOKENS / 8][4];
    for (int j = 0; j < TILE_TOKENS / 8; j++) {
        for (int i = 0; i < 4; i++) acc[j][i] = 0.0f;
    }
    for (int run0 = 0; run0 < n_runs; run0 += 2) {
        __syncthreads();
        {
            // A thread unpacks one run of one row.
            const int r = thread / 2, part = thread % 2, run = run0 + part;
            Run taken;
            if (row0 + r < n_rows && run < n_runs) {
                F::unpack(w + (row0 + r) * row_bytes + (i64)(run / F::RUNS) * F::BYTES, run % F::RUNS, taken);
            } else {
                for (int i = 0; i < 8; i++) taken.q[i] = 0;
                scales(taken, 0.0f, 0.0f);
            }
            uint4* to = (uint4*)(codes + r * CODE_STRIDE + 32 * part);
            to[0] = make_uint4(taken.q[0], taken.q[1], taken.q[2], taken.q[3]);
            to[1] = make_uint4(taken.q[4], taken.q[5], taken.q[6], taken.q[7]);
            for (int i = 0; i < 2; i++) {
                code_scale[r][2 * part + i] = taken.scale[i];
                code_min[r][2 * part + i] = taken.min[i];
            }
        }
        {
            // 16 activations per thread.
            const int t = thread / 4, part = thread % 4, run = run0 + part / 2;
            const bool inside = token0 + t < n_tokens && run < n_runs;
            const i64 at = (i64)(first_token + token0 + t) * n_runs + run;
            uint4 sixteen = make_uint4(0, 0, 0, 0);
            if (inside) sixteen = *(const uint4*)(q + 32 * at + 16 * (part % 2));
            *(uint4*)(acts + t * CODE_STRIDE + 16 * part) = sixteen;
            act_sum[t][part] = inside ? sums[2 * at + part % 2] : 0.0f;
            if (part % 2 == 0) act_scale[t][part / 2] = inside ? scale[at] : 0.0f;
        }
        __syncthreads();
        const int low = 16 * warp + lane / 4, high = low + 8;
        for (int half = 0; half < 4; half++) {
            const u32 at = 16 * half + lane % 4 * 4;
            const u32 a = *(const u32*)(codes + low * CODE_STRIDE + at), b = *(const u32*)(codes + high * CODE_STRIDE + at);
            const float scale_low = code_scale[low][half], scale_high = code_scale[high][half];
            for (int j = 0; j < TILE_TOKENS / 8; j++) {
                const u32 x = *(const u32*)(acts + (8 * j + lane / 4) * CODE_STRIDE + at);
                int c[4] = {0, 0, 0, 0};
                multiply_tiles(c, a, b, x);
                const int t = 8 * j + lane % 4 * 2;
                const float x0 = act_scale[t][half / 2], x1 = act_scale[t + 1][half / 2];
                acc[j][0] += scale_low * x0 * (float)c[0];
                acc[j][1] += scale_low * x1 * (float)c[1];
                acc[j][2] += scale_high * x0 * (float)c[2];
                acc[j][3] += scale_high * x1 * (float)c[3];
                if (F::HAS_MIN) {
                    const float s0 = act_sum[t][half], s1 = act_sum[t + 1][half];
                    acc[j][0] -= code_min[low][half] * s0;
                    acc[j][1] -= code_min[low][half] * s1;
                    acc[j][2] -= code_min[high][half] * s0;
                    acc[j][3] -= code_min[high][half] * s1;
                }
            }
        }
    }
    for (int j = 0; j < TILE_TOKENS / 8; j++) {
        for (int i = 0; i < 4; i++) {
            const int row = row0 + 16 * warp + lane / 4 + i / 2 * 8, token = token0 + 8 * j + lane % 4 * 2 + i % 2;
            if (row < n_rows && token < n_tokens) out[(i64)(first_token + token) * n_rows + row] = acc[j][i];
        }
    }
}
