//! Lightning indexers: keys in the cache, ratings of positions, and the positions that tokens
//! choose.

use super::choice::{Choice, OpenBlock};
use super::{MAX_KEY, Positions, RopeTurns, States, TextRuns, blocks, few, int, null_or};
use crate::device::{Arg, View};
use crate::{CudaError, Ops};
use std::ops::Range;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::spec::RopeKind;

/// Positions per block that rates; the kernel has the same constant.
const RATED: usize = 64;

/// Threads per block that places a row, and that rates; the kernels have the same constant.
const INDEX_THREADS: u32 = 128;

/// Threads per block that chooses; the kernel has the same constant.
const CHOOSE_THREADS: u32 = 512;

/// New keys of an indexer, and the queries that rotate beside them.
#[derive(Clone, Copy)]
pub struct IndexRows<'a> {
    /// `[tokens, n_head, key_dim]`, rotated in place; `None` where no token chooses.
    pub queries: Option<View<'a>>,
    /// Number of query heads.
    pub n_head: usize,
    /// `[tokens, key_dim]`.
    pub new_keys: View<'a>,
    /// Values of a query or key.
    pub key_dim: usize,
    /// Weights of the layer norm of keys, `[key_dim]`.
    pub norm: View<'a>,
    /// Added after that norm, `[key_dim]`.
    pub norm_bias: View<'a>,
    /// Epsilon of the norm.
    pub eps: f32,
    /// Rotation of queries and keys, if the indexer has any.
    pub turns: Option<RopeTurns<'a>>,
    /// First value of a query or key that rotates.
    pub rope_first: usize,
    /// The tokens.
    pub positions: Positions<'a>,
    /// Storage type of the cache.
    pub kv_type: KvType,
    /// `[positions of the cache, key_dim]`.
    pub keys: View<'a>,
}

/// New keys of an indexer that rates blocks by one key each.
#[derive(Clone, Copy)]
pub struct PooledRows<'a> {
    /// `[tokens, key_dim]`.
    pub new_keys: View<'a>,
    /// What weighs the values of keys, `[tokens, key_dim]`.
    pub gates: View<'a>,
    /// Values of a key.
    pub key_dim: usize,
    /// Weights of the layer norm of keys, `[key_dim]`.
    pub norm: View<'a>,
    /// Added after that norm, `[key_dim]`.
    pub norm_bias: View<'a>,
    /// Epsilon of the norm.
    pub eps: f32,
    /// Added to the gates of a block's positions, `[block, key_dim]`.
    pub ape: View<'a>,
    /// Positions per block.
    pub block: usize,
    /// The tokens of all texts.
    pub positions: Positions<'a>,
    /// Keys and gates of a block that is not complete, `[block, 2, key_dim]` by state.
    pub open: States<'a>,
    /// Storage type of the cache.
    pub kv_type: KvType,
    /// `[blocks of the cache, key_dim]`: a row for each block that may end in a page.
    pub keys: View<'a>,
}

/// Where the key of a block of positions is in the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockKeys {
    /// In a row of its own, `[blocks of the cache, key_dim]`: a row for each block that may end in a page.
    OfBlocks,
    /// In the row of the block's last position, `[positions of the cache, key_dim]`.
    InLast,
}

/// What tokens choose positions by, whose keys are stored already.
#[derive(Clone, Copy)]
pub struct IndexQueries<'a> {
    /// `[tokens, n_head, key_dim]`.
    pub queries: View<'a>,
    /// Number of query heads.
    pub n_head: usize,
    /// Values of a query or key.
    pub key_dim: usize,
    /// `[tokens, n_head]`; `None` where all are 1.
    pub head_weights: Option<View<'a>>,
    /// Factor on the ratings.
    pub scale: f32,
    /// The tokens.
    pub positions: Positions<'a>,
    /// Storage type of the cache.
    pub kv_type: KvType,
    /// Rows of `key_dim` values.
    pub keys: View<'a>,
    /// Which rows these are.
    pub key_rows: BlockKeys,
    /// What a token chooses.
    pub choice: Choice,
}

impl IndexQueries<'_> {
    /// Panics if a size is not supported, or a buffer is too short.
    fn check(&self, chosen: View<'_>) {
        let (tokens, dim) = (self.positions.tokens(), self.key_dim);
        let row = self.kv_type.row_bytes(dim as u64) as usize;
        self.choice.check();
        assert!(
            dim.is_multiple_of(4) && self.choice.open != OpenBlock::Rated,
            "keys of {dim}"
        );
        let rows = match self.key_rows {
            BlockKeys::OfBlocks => self.positions.rows_of_blocks(self.choice.block),
            BlockKeys::InLast => self.positions.capacity(),
        };
        assert!(self.keys.len() >= rows * row, "cached keys");
        assert!(
            self.queries.words() >= tokens * self.n_head * dim,
            "queries"
        );
        let weights = self.head_weights;
        assert!(
            weights.is_none_or(|weights| weights.words() >= tokens * self.n_head),
            "weights of heads"
        );
        assert!(
            chosen.words() >= tokens * self.choice.kept,
            "room for choices"
        );
    }
}

impl Ops {
    /// Normalizes, rotates, and stores the keys of new tokens, and rotates their queries; one
    /// launch.
    ///
    /// # Panics
    /// When a key is wider than [`MAX_KEY`], or not a multiple of 4.
    pub fn place_index(&self, i: &IndexRows<'_>) -> Result<(), CudaError> {
        let (tokens, dim) = (i.positions.tokens(), i.key_dim);
        let row = i.kv_type.row_bytes(dim as u64) as usize;
        assert!(dim.is_multiple_of(4) && dim <= MAX_KEY, "keys of {dim}");
        assert!(i.new_keys.words() >= tokens * dim, "{tokens} x {dim} keys");
        assert!(
            i.norm.words() >= dim && i.norm_bias.words() >= dim,
            "a norm of {dim}"
        );
        assert!(
            i.keys.len() >= i.positions.capacity() * row,
            "a cache of {} positions",
            i.positions.capacity()
        );
        let half = i.turns.map_or(0, |turns| turns.half);
        let turns_fit = |turns: RopeTurns<'_>| turns.values.words() >= 2 * tokens * half;
        assert!(
            i.rope_first + 2 * half <= dim && i.turns.is_none_or(turns_fit),
            "{tokens} x {half} turns"
        );
        // Queries that don't rotate stay as they are.
        let queries = i.queries.filter(|_| i.turns.is_some());
        let n_head = if queries.is_some() { i.n_head } else { 0 };
        assert!(
            queries.is_none_or(|q| q.words() >= tokens * n_head * dim),
            "queries"
        );
        let kernel = match i.kv_type {
            KvType::F32 => "place_index_f32",
            KvType::F16 => "place_index_f16",
            KvType::Q8_0 => "place_index_q8",
        };
        let kind = i.turns.map(|turns| turns.kind);
        let [positions, begins, tables, page_bits] = i.positions.args();
        let args = [
            null_or(queries),
            i.new_keys.arg(),
            i.norm.arg(),
            i.norm_bias.arg(),
            Arg::Float(i.eps),
            null_or(i.turns.map(|turns| turns.values)),
            int(half),
            Arg::Int(i32::from(kind == Some(RopeKind::Adjacent))),
            int(i.rope_first),
            int(dim),
            positions,
            begins,
            tables,
            page_bits,
            i.keys.arg(),
        ];
        let grid = [blocks(n_head + 1, 1), few(tokens), 1];
        self.launch(kernel, grid, INDEX_THREADS, &args)
    }

    /// Stores the keys of the blocks that runs of tokens complete, and remembers those of the open ones;
    /// one launch. A key does not depend on which of its tokens came together.
    ///
    /// # Panics
    /// When a key is wider than [`MAX_KEY`], or not a multiple of 4.
    pub fn pool_index(&self, p: &PooledRows<'_>, runs: TextRuns<'_>) -> Result<(), CudaError> {
        let (n, dim, block) = (p.positions.tokens(), p.key_dim, p.block);
        let row = p.kv_type.row_bytes(dim as u64) as usize;
        assert!(dim.is_multiple_of(4) && dim <= MAX_KEY, "keys of {dim}");
        assert!(block > 0, "empty blocks");
        assert!(
            p.new_keys.words() >= n * dim && p.gates.words() >= n * dim,
            "{n} x {dim} keys"
        );
        assert!(
            p.norm.words() >= dim && p.norm_bias.words() >= dim && p.ape.words() >= block * dim,
            "a norm of {dim}"
        );
        assert!(
            p.keys.len() >= p.positions.rows_of_blocks(block) * row,
            "a cache of {} positions",
            p.positions.capacity()
        );
        let (of_runs, [[open, _]]) = runs.after(n, [(p.open, 2 * block * dim)]);
        if runs.count() == 0 {
            return Ok(());
        }
        let kernel = match p.kv_type {
            KvType::F32 => "pool_index_f32",
            KvType::F16 => "pool_index_f16",
            KvType::Q8_0 => "pool_index_q8",
        };
        let [_, begins, tables, page_bits] = p.positions.args();
        let args = [
            &[
                p.new_keys.arg(),
                p.gates.arg(),
                p.norm.arg(),
                p.norm_bias.arg(),
                Arg::Float(p.eps),
                p.ape.arg(),
                int(dim),
                int(block),
            ][..],
            &of_runs,
            &[begins, tables, page_bits, open, p.keys.arg()],
        ]
        .concat();
        // Wherever the texts are, so that recorded launches serve for other positions.
        let completed = runs.longest().div_ceil(block);
        let grid = [blocks(completed, 1), few(runs.count()), 1];
        self.launch(kernel, grid, INDEX_THREADS, &args)
    }

    /// Chooses the positions or blocks with the best ratings for each token that sees more than so
    /// many, of equal ratings the earlier: `chosen` is `[tokens, kept]`, in ascending order. The lists of
    /// other tokens stay as they are.
    ///
    /// # Panics
    /// When `ratings` has no room for one token's.
    pub fn choose_positions(
        &self,
        i: &IndexQueries<'_>,
        ratings: View<'_>,
        chosen: View<'_>,
    ) -> Result<(), CudaError> {
        i.check(chosen);
        let (n, kept) = (i.positions.tokens(), i.choice.kept);
        let mut first = 0;
        while first < n {
            let words = ratings.words();
            let (tokens, width) = i.positions.rated_at_once(i.choice, first, 1, words);
            first = tokens.end;
            let to = chosen.floats(tokens.start * kept..tokens.end * kept);
            let positions = i.positions.part(tokens.clone());
            self.rate(i, tokens, width, ratings)?;
            choose(self, positions, i.choice, 1, (ratings, width), to)?;
        }
        Ok(())
    }

    /// Rates the positions up to each of some tokens, `[tokens, width]`. The sizes are checked.
    fn rate(
        &self,
        i: &IndexQueries<'_>,
        tokens: Range<usize>,
        width: usize,
        ratings: View<'_>,
    ) -> Result<(), CudaError> {
        let values = i.n_head * i.key_dim;
        let queries = i.queries.floats(tokens.start * values..tokens.end * values);
        let of_heads = tokens.start * i.n_head..tokens.end * i.n_head;
        let weights = i.head_weights.map(|weights| weights.floats(of_heads));
        let kernel = match i.kv_type {
            KvType::F32 => "rate_f32",
            KvType::F16 => "rate_f16",
            KvType::Q8_0 => "rate_q8",
        };
        let n = tokens.len();
        let [positions, begins, tables, page_bits] = i.positions.part(tokens).args();
        let args = [
            queries.aligned().arg(),
            null_or(weights),
            Arg::Float(i.scale),
            i.keys.aligned().arg(),
            int(i.n_head),
            int(i.key_dim),
            positions,
            begins,
            tables,
            page_bits,
            int(i.choice.block),
            Arg::Int(i32::from(i.key_rows == BlockKeys::InLast)),
            int(i.choice.kept),
            int(width),
            ratings.arg(),
        ];
        let grid = [blocks(width, RATED as u32), few(n), 1];
        self.launch(kernel, grid, INDEX_THREADS, &args)
    }
}

/// Lists the blocks with the best of `lists` times `width` ratings per token. The sizes are checked.
pub(super) fn choose(
    ops: &Ops,
    positions: Positions<'_>,
    choice: Choice,
    lists: usize,
    (ratings, width): (View<'_>, usize),
    chosen: View<'_>,
) -> Result<(), CudaError> {
    let [block, open, kept] = choice.args();
    let args = [
        ratings.arg(),
        int(width),
        positions.at().arg(),
        block,
        open,
        kept,
        chosen.arg(),
    ];
    let grid = [blocks(positions.tokens(), 1), few(lists), 1];
    ops.launch("choose_blocks", grid, CHOOSE_THREADS, &args)
}
