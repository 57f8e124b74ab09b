// Attention of tokens to chosen blocks of positions. Chunks of a list begin at fixed places in it, so
// a result does not depend on other tokens of the batch.
#include "attend.cuh"
#include "choice.cuh"

/// Attends to the chosen blocks of each token, `[tokens, lists, kept]`: all heads to those of one
/// list, or those of a head of keys and values to its own. A token that sees no more than `kept`
/// blocks attends to all of them, and has no list.
template <class Rows>
DEVICE void attend_chosen(const float* queries, const u8* keys, const u8* values, int n_head_kv, int group,
                          int key_width, int value_row_width, int value_width, float scale, const int* positions,
                          const int* begins, const int* tables, int page_bits, const int* chosen, int lists, int block,
                          int open, int kept, float* mixed, float* largest, float* sums, const float* sinks,
                          float* out) {
    __shared__ int rows[CHUNK];
    __shared__ AttendRoom room;
    const int token = (int)blockIdx.z, start = (int)blockIdx.x * CHUNK;
    const int list = lists == 1 ? 0 : (int)blockIdx.y / ((group + HEADS - 1) / HEADS);
    chosen += ((i64)token * lists + list) * kept;
    const int seen = positions[token] + 1, visible = visible_blocks(seen - 1, block, open);
    const bool listed = visible > kept;
    const int blocks = listed ? kept : visible;
    // Nothing beyond the token is read, whatever the list has.
    const int last = listed && (u32)chosen[kept - 1] < (u32)visible ? chosen[kept - 1] : visible - 1;
    const int beyond = (last + 1) * block - seen;
    const int of_blocks = blocks * block - (beyond > 0 ? beyond : 0);
    const int rest = of_blocks + (open == OPEN_ADDED ? seen % block : 0) - start;
    const int n = rest < 0 ? 0 : rest < CHUNK ? rest : CHUNK;
    const Pages pages(tables, begins, token, page_bits);
    for (int p = (int)threadIdx.x; p < n; p += THREADS) {
        const int number = start + p, in_list = number / block;
        int position = number;
        if (number >= of_blocks) {
            position = seen / block * block + number - of_blocks;
        } else if (listed) {
            const int which = chosen[in_list];
            position = ((u32)which < (u32)visible ? which : last) * block + number % block;
        }
        rows[p] = (int)pages.at(position < seen ? position : seen - 1);
    }
    const Chosen where = {rows};
    attend<Rows>(room, queries, keys, values, n_head_kv, group, key_width, value_row_width, value_width, scale, 0.0f,
                 where, n, mixed, largest, sums, sinks, out, nullptr, nullptr, nullptr);
}

#define ATTEND_CHOSEN(NAME, ROWS)                                                                                      \
    KERNEL NAME(const float* queries, const u8* keys, const u8* values, int n_head_kv, int group, int key_width,       \
                int value_row_width, int value_width, float scale, const int* positions, const int* begins,            \
                const int* tables, int page_bits, const int* chosen, int lists, int block, int open, int kept,         \
                float* mixed, float* largest, float* sums, const float* sinks, float* out) {                           \
        attend_chosen<ROWS>(queries, keys, values, n_head_kv, group, key_width, value_row_width, value_width, scale,   \
                            positions, begins, tables, page_bits, chosen, lists, block, open, kept, mixed, largest,    \
                            sums, sinks, out);                                                                         \
    }

ATTEND_CHOSEN(attend_chosen_f32, RowsF32)
ATTEND_CHOSEN(attend_chosen_f16, RowsF16)
ATTEND_CHOSEN(attend_chosen_q8, RowsQ8)
