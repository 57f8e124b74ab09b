//! What compressed attention needs of the buffers.

use super::{BufferSizes, MAX_ATTEND_VALUES};
use tier_plan_cuda::ops::{AttentionBuffers, CHUNK, Choice, compressed_chunks};
use tier_plan_formats::model::spec::{CompressedIndex, CompressedSpec};

impl BufferSizes {
    /// Grows to a layer's buffers. Returns the values of attention's workspace, and their width.
    pub(super) fn compressed(&mut self, a: &CompressedSpec, context: usize) -> (usize, usize) {
        let (rows, rank) = (self.rows, a.q_down.down.n_out);
        let open: usize = a.compressors().map(|c| 2 * c.kv.n_out).sum();
        self.low = self.low.max(rows * rank);
        self.q = self.q.max(rows * a.q.n_out);
        self.k = self.k.max(rows * a.kv.n_out);
        self.raw = self.raw.max(rows * open);
        // Results of heads, and then those of groups of them.
        self.latents = self.latents.max(rows * a.q.n_out.max(a.o.n_in));
        self.mixed = self.mixed.max(rows * a.o.n_in);
        self.inner = self.inner.max(rank).max(a.q.n_out).max(a.o.n_in);
        let index = a.far.and_then(|far| far.index);
        let choice = index.as_ref().map(Choice::from);
        if let Some((index, choice)) = index.as_ref().zip(choice) {
            self.blocks(index, choice, context);
        }
        let ratio = a.far.map(|far| far.compressor.ratio);
        let seen = context.next_multiple_of(CHUNK);
        let reached = CHUNK.saturating_mul(compressed_chunks(a.window, ratio, choice, seen));
        let values = |tokens| AttentionBuffers::values(tokens, a.n_head, reached, a.key_dim);
        let most = values(rows).min(values(1).max(MAX_ATTEND_VALUES));
        (most, a.key_dim)
    }

    /// Grows to what an index needs that chooses among complete blocks.
    fn blocks(&mut self, index: &CompressedIndex, choice: Choice, context: usize) {
        let rows = self.rows;
        if choice.may_list(context) {
            self.rate(choice.rating_words(context));
            self.v = self.v.max(rows * index.q.n_out);
            self.index_weights = self.index_weights.max(rows * index.n_head);
            self.chosen = self.chosen.max(rows.saturating_mul(choice.kept));
        }
    }
}
