// Attention of tokens to chosen positions, one list per token. Chunks of a list begin at fixed
// places in it, so a result does not depend on other tokens of the batch.
#include "attend.cuh"

/// Chosen positions of a text.
struct Chosen {
    /// Rows of the chunk's positions in the cache.
    const int* rows;

    DEVICE i64 row(int p) const { return rows[p]; }
    DEVICE int run_end(int p, int) const { return p + 1; }
};

/// Attends to the chosen positions of each token, `[tokens, most]`. A token that sees no more than
/// `most` positions attends to all of them, and has no list.
template <class Rows>
DEVICE void attend_chosen(const float* queries, const u8* keys, const u8* values, int n_head_kv, int group,
                          int key_width, int value_row_width, int value_width, float scale, const int* positions,
                          const int* begins, const int* tables, int page_bits, const int* chosen, int most,
                          float* mixed, float* largest, float* sums, const float* sinks, float* out) {
    __shared__ int rows[CHUNK];
    const int token = (int)blockIdx.z, start = (int)blockIdx.x * CHUNK;
    const int seen = positions[token] + 1;
    const int listed = seen < most ? seen : most, rest = listed - start;
    const int n = rest < 0 ? 0 : rest < CHUNK ? rest : CHUNK;
    const Pages pages(tables, begins, token, page_bits);
    for (int p = (int)threadIdx.x; p < n; p += THREADS) {
        int position = start + p;
        if (seen > most) {
            // Nothing beyond the token is read, whatever the list has.
            const int listed_one = chosen[(i64)token * most + position];
            position = (u32)listed_one < (u32)seen ? listed_one : seen - 1;
        }
        rows[p] = (int)pages.at(position);
    }
    const Chosen where = {rows};
    attend<Rows>(queries, keys, values, n_head_kv, group, key_width, value_row_width, value_width, scale, 0.0f, where,
                 n, mixed, largest, sums, sinks, out, nullptr, nullptr, nullptr);
}

#define ATTEND_CHOSEN(NAME, ROWS)                                                                                       \
    KERNEL NAME(const float* queries, const u8* keys, const u8* values, int n_head_kv, int group, int key_width,        \
                int value_row_width, int value_width, float scale, const int* positions, const int* begins,             \
                const int* tables, int page_bits, const int* chosen, int most, float* mixed, float* largest,            \
                float* sums, const float* sinks, float* out) {                                                          \
        attend_chosen<ROWS>(queries, keys, values, n_head_kv, group, key_width, value_row_width, value_width, scale,    \
                            positions, begins, tables, page_bits, chosen, most, mixed, largest, sums, sinks, out);      \
    }

ATTEND_CHOSEN(attend_chosen_f32, RowsF32)
ATTEND_CHOSEN(attend_chosen_f16, RowsF16)
ATTEND_CHOSEN(attend_chosen_q8, RowsQ8)
