// Rows of a batch for experts that are streamed to a device: gathering the rows that chose an
// expert, and adding its results. Grid: blocks of columns, rows.
#include "base.cuh"

/// Computes `out[row] = x[which[row]]`, rows of `width`.
KERNEL gather_rows(const float* x, const int* which, int width, float* out) {
    const int column = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (column < width) out[(i64)blockIdx.y * width + column] = x[(i64)which[blockIdx.y] * width + column];
}

/// Computes `to[which[row]] += weights[row] * x[row]`, rows of `width`. Null weights stand for ones.
/// No index may occur twice.
KERNEL add_rows(const float* x, const int* which, const float* weights, int width, float* to) {
    const int column = (int)(blockIdx.x * blockDim.x + threadIdx.x);
    if (column >= width) return;
    const float v = x[(i64)blockIdx.y * width + column];
    to[(i64)which[blockIdx.y] * width + column] += weights ? weights[blockIdx.y] * v : v;
}

/// Sets `n` values to zero.
KERNEL clear(float* x, i64 n) {
    const i64 at = (i64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at < n) x[at] = 0.0f;
}
