// Inputs that tokens have for every layer: a projection of their embedding, and their row of a table.
#include "base.cuh"

/// Makes the inputs of tokens: of each part of `dim` values,
/// `(norm(projected * of_projected) + row * of_row) / sqrt(2)`. `projected` and `rows` are `[tokens, layers, dim]`,
/// `weight` is `[dim]`. `out` is `[layers, capacity, dim]`, and the first token is its row `first`. Grid: layers,
/// tokens.
KERNEL token_inputs(const float* projected, const float* rows, const float* weight, int dim, float eps,
                    float of_projected, float of_row, int first, int capacity, float* out) {
    __shared__ float room[WARP];
    const i64 from = ((i64)blockIdx.y * gridDim.x + blockIdx.x) * dim;
    projected += from;
    rows += from;
    out += ((i64)blockIdx.x * capacity + first + blockIdx.y) * dim;
    float squares = 0.0f;
    for (int i = (int)threadIdx.x; i < dim; i += (int)blockDim.x) {
        const float v = projected[i] * of_projected;
        squares += v * v;
    }
    const float factor = 1.0f / sqrtf(block_sum(squares, room) / (float)dim + eps);
    for (int i = (int)threadIdx.x; i < dim; i += (int)blockDim.x) {
        const float v = projected[i] * of_projected * factor * weight[i];
        out[i] = (v + of_row * rows[i]) * 0.707106781186547524f;
    }
}
