//! Attention of DeepSeek V4: vectors of near tokens, which are the text's state, and one vector per
//! block of tokens before.

use super::attention::{AttentionBuffers, CHUNK, HEADS};
use super::choice::{Choice, OpenBlock};
use super::{MAX_KEY, Positions, RopeTurns, THREADS, blocks, few, int, null_or};
use crate::device::{Arg, View};
use crate::{CudaError, Ops};
use std::ops::Range;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::spec::RopeKind;

/// Threads per block that places rows; the kernel has the same constant.
const PLACE_THREADS: u32 = 128;

/// Queries and vectors of new tokens.
#[derive(Clone, Copy)]
pub struct CompressedRows<'a> {
    /// `[tokens, n_head, key_dim]`, normalized without weights and rotated.
    pub queries: View<'a>,
    /// Number of query heads.
    pub n_head: usize,
    /// Values of a query or vector.
    pub key_dim: usize,
    /// `[tokens, key_dim]`, normalized and rotated.
    pub vectors: View<'a>,
    /// Weights of the vectors' norm, `[key_dim]`.
    pub norm: View<'a>,
    /// Epsilon of the norms.
    pub eps: f32,
    /// Queries of an index, rotated.
    pub index: Option<IndexHeads<'a>>,
    /// Rotation of the last values of each.
    pub turns: RopeTurns<'a>,
    /// Number of tokens.
    pub tokens: usize,
}

/// Queries of an index.
#[derive(Clone, Copy)]
pub struct IndexHeads<'a> {
    /// `[tokens, n_head, key_dim]`.
    pub queries: View<'a>,
    /// Number of heads.
    pub n_head: usize,
    /// Values of a query.
    pub key_dim: usize,
}

/// Vectors of blocks that tokens attend to.
#[derive(Clone, Copy)]
pub struct FarRows<'a> {
    /// `[blocks of the cache, key_dim]`.
    pub rows: View<'a>,
    /// Storage type of the cache.
    pub kv_type: KvType,
    /// Tokens per block.
    pub ratio: usize,
    /// What a token attends to, if not all.
    pub choice: Option<Choice>,
    /// `[tokens, kept]` blocks, where a token of the batch may see more than it chooses.
    pub lists: Option<View<'a>>,
}

/// Attention of a text's tokens, whose blocks are stored already, and whose vectors are not.
#[derive(Clone, Copy)]
pub struct AttendCompressed<'a> {
    /// `[tokens, n_head, key_dim]`.
    pub queries: View<'a>,
    /// Number of query heads.
    pub n_head: usize,
    /// Values of a query or vector, which is key and value.
    pub key_dim: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// `[tokens, key_dim]`.
    pub vectors: View<'a>,
    /// Most vectors of tokens that a token attends to.
    pub window: usize,
    /// The state, `[window, key_dim]`: vectors of tokens before, each at its position's remainder.
    pub ring: View<'a>,
    /// Vectors of blocks, if the layer has any.
    pub far: Option<FarRows<'a>>,
    /// `[n_head]`: a score per head beside those of the vectors.
    pub sinks: View<'a>,
    /// The tokens, of one text.
    pub positions: Positions<'a>,
}

/// Results of heads that are rotated back.
#[derive(Clone, Copy)]
pub struct TurnBack<'a> {
    /// `[tokens, heads, dim]`.
    pub x: View<'a>,
    /// Number of heads.
    pub heads: usize,
    /// Values of a head.
    pub dim: usize,
    /// The tokens' own rotation, of the last values.
    pub turns: RopeTurns<'a>,
    /// Number of tokens.
    pub tokens: usize,
    /// Heads per group where groups become the outermost dimension, `[groups, tokens, heads, dim]`.
    pub group: Option<usize>,
}

/// Returns the chunks of vectors that a token attends to which sees `seen` positions: those of its
/// window, and those of blocks.
pub fn compressed_chunks(
    window: usize,
    ratio: Option<usize>,
    choice: Option<Choice>,
    seen: usize,
) -> usize {
    let blocks = ratio.map_or(0, |ratio| seen / ratio);
    let kept = choice.map_or(blocks, |choice| choice.kept);
    window.div_ceil(CHUNK) + blocks.min(kept).div_ceil(CHUNK)
}

impl AttendCompressed<'_> {
    /// Panics if a size is not supported, or a buffer is too short.
    fn check(&self, out: View<'_>) {
        let (tokens, dim) = (self.positions.tokens(), self.key_dim);
        assert!(self.positions.runs().count() <= 1, "one text");
        assert!(
            dim.is_multiple_of(4) && dim <= MAX_KEY && self.window > 0,
            "a window of {} vectors of {dim}",
            self.window
        );
        let values = tokens * self.n_head * dim;
        assert!(self.queries.words() >= values, "queries");
        assert!(out.words() >= values, "results of attention");
        assert!(
            self.vectors.words() >= tokens * dim && self.ring.words() >= self.window * dim,
            "vectors"
        );
        assert!(self.sinks.words() >= self.n_head, "a sink per head");
        let Some(far) = &self.far else { return };
        assert!(far.ratio > 0, "blocks");
        let row = far.kv_type.row_bytes(dim as u64) as usize;
        assert!(
            far.rows.len() >= self.positions.rows_of_blocks(far.ratio) * row,
            "cached vectors"
        );
        if let Some(choice) = far.choice {
            choice.check();
            let whole = choice.block == far.ratio && choice.open == OpenBlock::Skipped;
            assert!(whole, "{choice:?} of blocks of {}", far.ratio);
        }
        let kept = far.choice.map_or(0, |choice| choice.kept);
        assert!(
            far.lists
                .is_none_or(|lists| kept > 0 && lists.words() >= tokens * kept),
            "{tokens} lists"
        );
    }

    /// Returns the chunks of a token. One token alone has the most at any position of its chunk of the
    /// context, so that recorded launches serve for all of them.
    fn chunks(&self, token: usize) -> usize {
        let position = self.positions.of(token);
        let seen = match self.positions.tokens() {
            1 => (position + 1).next_multiple_of(CHUNK),
            _ => position + 1,
        };
        let ratio = self.far.map(|far| far.ratio);
        let choice = self.far.and_then(|far| far.choice);
        compressed_chunks(self.window, ratio, choice, seen)
    }

    /// Panics where a token may see more blocks than it attends to, and has no list.
    fn check_lists(&self) {
        let Some(FarRows {
            choice: Some(choice),
            lists: None,
            ..
        }) = self.far
        else {
            return;
        };
        let last = self.positions.tokens().checked_sub(1);
        let seen = last.map_or(0, |last| self.positions.of(last) + 1);
        assert!(
            seen <= choice.n_unlisted(),
            "{seen} positions without a list, {choice:?}"
        );
    }
}

impl Ops {
    /// Normalizes and rotates queries and vectors, and rotates the queries of an index; one launch.
    pub fn place_compressed(&self, r: &CompressedRows<'_>) -> Result<(), CudaError> {
        let (dim, tokens, half) = (r.key_dim, r.tokens, r.turns.half);
        let index = r
            .index
            .map_or((0, 2 * half), |index| (index.n_head, index.key_dim));
        let (n_index, index_dim) = index;
        assert!(
            dim <= MAX_KEY && 2 * half <= dim && 2 * half <= index_dim,
            "{half} turns of {dim}, {index_dim}"
        );
        assert!(r.queries.words() >= tokens * r.n_head * dim, "queries");
        assert!(
            r.vectors.words() >= tokens * dim && r.norm.words() >= dim,
            "{tokens} vectors of {dim}"
        );
        assert!(
            r.index
                .is_none_or(|i| i.queries.words() >= tokens * n_index * index_dim),
            "queries of an index"
        );
        assert!(
            r.turns.values.words() >= 2 * tokens * half,
            "{tokens} x {half} turns"
        );
        let args = [
            r.queries.arg(),
            int(r.n_head),
            int(dim),
            r.vectors.arg(),
            r.norm.arg(),
            Arg::Float(r.eps),
            null_or(r.index.map(|index| index.queries)),
            int(index_dim),
            r.turns.values.arg(),
            int(half),
            adjacent(r.turns.kind),
            int(dim - 2 * half),
            int(index_dim - 2 * half),
        ];
        let grid = [blocks(r.n_head + 1 + n_index, 1), few(tokens), 1];
        self.launch("place_compressed", grid, PLACE_THREADS, &args)
    }

    /// Computes attention of a text's tokens; `out` is `[tokens, n_head, key_dim]`.
    ///
    /// # Panics
    /// When a token sees more blocks than it attends to, and there are no lists.
    pub fn attend_compressed(
        &self,
        a: &AttendCompressed<'_>,
        buffers: &AttentionBuffers,
        out: View<'_>,
    ) -> Result<(), CudaError> {
        a.check(out);
        a.check_lists();
        let (tokens, room) = (a.positions.tokens(), buffers.query_chunks(a.key_dim));
        let mut first = 0;
        while first < tokens {
            let (mut n, mut chunks) = (0, 0);
            for token in first..tokens {
                let wanted = chunks.max(a.chunks(token));
                if wanted * (n + 1) * a.n_head > room {
                    break;
                }
                (n, chunks) = (n + 1, wanted);
            }
            assert!(n > 0, "too small buffers for attention to {chunks} chunks");
            self.attend_near_and_far(a, first..first + n, chunks, (buffers, out))?;
            first += n;
        }
        Ok(())
    }

    /// Computes attention of some of the tokens, with up to so many chunks. The sizes are checked.
    fn attend_near_and_far(
        &self,
        a: &AttendCompressed<'_>,
        tokens: Range<usize>,
        chunks: usize,
        (buffers, out): (&AttentionBuffers, View<'_>),
    ) -> Result<(), CudaError> {
        let (n, each) = (tokens.len(), a.n_head * a.key_dim);
        let of_tokens =
            |view: View<'_>, each: usize| view.floats(tokens.start * each..tokens.end * each).arg();
        let kernel = match a.far.map_or(KvType::F32, |far| far.kv_type) {
            KvType::F32 => "attend_compressed_f32",
            KvType::F16 => "attend_compressed_f16",
            KvType::Q8_0 => "attend_compressed_q8",
        };
        let lists = a.far.and_then(|far| far.lists);
        let kept = a.far.and_then(|far| far.choice);
        let kept = kept.map_or(0, |choice| choice.kept);
        // The kernel writes the final result where there is only one chunk.
        let whole = (chunks == 1).then(|| of_tokens(out, each));
        let partial = [&buffers.mixed, &buffers.largest, &buffers.sums].map(|b| b.view().arg());
        let [mixed, largest, sums] = partial;
        let [positions, begins, tables, page_bits] = a.positions.part(tokens.clone()).args();
        let args = [
            of_tokens(a.queries, each),
            a.vectors.aligned().arg(),
            a.ring.aligned().arg(),
            null_or(a.far.map(|far| far.rows.aligned())),
            int(a.n_head),
            int(a.key_dim),
            Arg::Float(a.scale),
            a.positions.at().arg(),
            int(a.window),
            int(a.window.div_ceil(CHUNK)),
            int(a.far.map_or(0, |far| far.ratio)),
            lists.map_or(Arg::Pointer(0), |lists| of_tokens(lists, kept)),
            int(kept),
            positions,
            begins,
            tables,
            page_bits,
            mixed,
            largest,
            sums,
            a.sinks.arg(),
            whole.unwrap_or(Arg::Pointer(0)),
        ];
        let grid = [blocks(chunks, 1), few(a.n_head.div_ceil(HEADS)), few(n)];
        self.launch(kernel, grid, 128, &args)?;
        if whole.is_some() {
            return Ok(());
        }
        let null = Arg::Pointer(0);
        let args = [
            mixed,
            largest,
            sums,
            int(chunks),
            int(a.key_dim),
            a.sinks.arg(),
            of_tokens(out, each),
            null,
            null,
            null,
        ];
        let grid = [blocks(a.n_head, 1), few(n), 1];
        self.launch("join_chunks", grid, 128, &args)
    }

    /// Rotates the last values of results back, to `out`, which is not `x`.
    pub fn turn_back(&self, t: &TurnBack<'_>, out: View<'_>) -> Result<(), CudaError> {
        let (n, half) = (t.tokens * t.heads * t.dim, t.turns.half);
        assert!(
            t.x.words() >= n && out.words() >= n && 2 * half <= t.dim,
            "{} x {} x {}",
            t.tokens,
            t.heads,
            t.dim
        );
        assert!(
            t.turns.values.words() >= 2 * t.tokens * half,
            "{} x {half} turns",
            t.tokens
        );
        let group = t.group.unwrap_or(0);
        assert!(
            group == 0 || t.heads.is_multiple_of(group),
            "groups of {group}"
        );
        let args = [
            t.x.arg(),
            t.turns.values.arg(),
            int(half),
            adjacent(t.turns.kind),
            int(t.dim - 2 * half),
            int(t.dim),
            int(group),
            out.arg(),
        ];
        let grid = [blocks(t.heads, 1), few(t.tokens), 1];
        self.launch("turn_back", grid, 128, &args)
    }

    /// Moves `[groups, tokens, width]` to `[tokens, groups, width]`.
    pub fn ungroup(
        &self,
        x: View<'_>,
        groups: usize,
        tokens: usize,
        width: usize,
        out: View<'_>,
    ) -> Result<(), CudaError> {
        let n = groups * tokens * width;
        assert!(
            x.words() >= n && out.words() >= n,
            "{groups} x {tokens} x {width}"
        );
        let args = [
            x.arg(),
            int(groups),
            int(tokens),
            int(width),
            Arg::Long(n as i64),
            out.arg(),
        ];
        self.launch("ungroup", [blocks(n, THREADS), 1, 1], THREADS, &args)
    }
}

/// Returns the kind of a rotation as the kernels take it.
pub(super) fn adjacent(kind: RopeKind) -> Arg {
    Arg::Int(i32::from(kind == RopeKind::Adjacent))
}
