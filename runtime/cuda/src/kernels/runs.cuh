// Tokens of a batch that pass through recurrent states: runs of consecutive tokens of one text each.
#pragma once
#include "base.cuh"

/// Runs of a batch that are taken together, at most one of each text.
struct TextRuns {
    /// First token, tokens, and state of each run.
    const int* table;
    /// The run of each token of the batch, counted in the whole table.
    const int* of_token;
    /// The first of these runs in the whole table, and how many they are.
    int first, n;
    /// Positions of the batch's tokens in their texts.
    const int* positions;
};

/// A run of tokens.
struct TextRun {
    int begin, n, state;
    /// Whether the text begins with it: there is no state before.
    bool fresh;

    DEVICE TextRun(const TextRuns& runs, int at)
        : begin(runs.table[3 * at]), n(runs.table[3 * at + 1]), state(runs.table[3 * at + 2]),
          fresh(runs.positions[begin] == 0) {}
};

/// Returns the number of a token's run, or -1 where that is not taken.
DEVICE int run_of(const TextRuns& runs, int token) {
    const int at = runs.of_token[token] - runs.first;
    return at >= 0 && at < runs.n ? at : -1;
}

/// The arguments of kernels, and the struct of them.
#define TEXT_RUNS const int *run_table, const int *run_of_token, int first_run, int n_runs, const int *run_positions
#define TAKE_TEXT_RUNS const TextRuns runs = {run_table, run_of_token, first_run, n_runs, run_positions}
