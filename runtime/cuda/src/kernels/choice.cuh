// What tokens choose of their texts: blocks of neighboring positions, counted from the beginning.
#pragma once
#include "base.cuh"

/// What is attended to of the last positions, which are not a complete block: nothing, all of them
/// beside what is chosen, or all of them if they are chosen like a complete block.
#define OPEN_SKIPPED 0
#define OPEN_ADDED 1
#define OPEN_RATED 2

/// Returns how many blocks the token at `position` chooses among.
DEVICE int visible_blocks(int position, int block, int open) {
    return (position + (open == OPEN_RATED ? block : 1)) / block;
}
