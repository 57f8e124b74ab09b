//! The indexes of block-sparse attention: the choice of blocks of positions by their best key, for each head
//! of keys and values by itself, and keys of whole blocks.

use super::choice::Choice;
use super::compressed::adjacent;
use super::index::choose;
use super::{Frequencies, MAX_KEY, Positions, blocks, few, int, null_or};
use crate::device::{Arg, View};
use crate::{CudaError, Ops};
use std::ops::Range;
use tier_plan_formats::model::kv::KvType;

/// Query heads that pass over keys together; the kernel has the same constant.
const HEADS: usize = 8;

/// Threads per block; the kernels have the same constant.
const INDEX_THREADS: u32 = 128;

/// Keys of positions that are stored already, and what makes one key of those of a block.
#[derive(Clone, Copy)]
pub struct MeanKeys<'a> {
    /// `[positions of the cache, key_dim]`.
    pub keys: View<'a>,
    /// Values of a key.
    pub key_dim: usize,
    /// Positions per block, at least 1.
    pub block: usize,
    /// Weights of the norm of a block's key, `[key_dim]`.
    pub norm: View<'a>,
    /// Epsilon of the norm.
    pub eps: f32,
    /// Rotation of a block's key, as at its first position. It rotates the first values.
    pub frequencies: Option<Frequencies<'a>>,
    /// The tokens, whose keys are the last ones.
    pub positions: Positions<'a>,
    /// Storage type of the cache.
    pub kv_type: KvType,
}

/// What tokens choose blocks by, whose keys are stored already.
#[derive(Clone, Copy)]
pub struct BlockQueries<'a> {
    /// `[tokens, n_head, key_dim]`.
    pub queries: View<'a>,
    /// Number of query heads, each of which chooses by itself.
    pub n_head: usize,
    /// Values of a query or key.
    pub key_dim: usize,
    /// The tokens.
    pub positions: Positions<'a>,
    /// Storage type of the cache.
    pub kv_type: KvType,
    /// `[positions of the cache, key_dim]`.
    pub keys: View<'a>,
    /// What a token chooses.
    pub choice: Choice,
    /// Last blocks, the token's own among them, that are always chosen.
    pub local: usize,
}

impl BlockQueries<'_> {
    /// Panics if a size is not supported, or a buffer is too short.
    fn check(&self, chosen: View<'_>) {
        let (tokens, dim) = (self.positions.tokens(), self.key_dim);
        let row = self.kv_type.row_bytes(dim as u64) as usize;
        self.choice.check();
        assert!(dim.is_multiple_of(4) && dim <= MAX_KEY, "keys of {dim}");
        assert!(
            self.keys.len() >= self.positions.capacity() * row,
            "cached keys"
        );
        assert!(
            self.queries.words() >= tokens * self.n_head * dim,
            "queries"
        );
        assert!(
            chosen.words() >= tokens * self.n_head * self.choice.kept,
            "room for choices"
        );
    }
}

impl Ops {
    /// Chooses the blocks with the best keys for each token that sees more than so many, of equal
    /// ratings the earlier, after the last `local` ones: `chosen` is `[tokens, n_head, kept]`, in
    /// ascending order. The lists of other tokens stay as they are.
    ///
    /// # Panics
    /// When `ratings` has no room for one token's.
    pub fn choose_blocks(
        &self,
        b: &BlockQueries<'_>,
        ratings: View<'_>,
        chosen: View<'_>,
    ) -> Result<(), CudaError> {
        b.check(chosen);
        let (n, per_token, words) = (
            b.positions.tokens(),
            b.n_head * b.choice.kept,
            ratings.words(),
        );
        let mut first = 0;
        while first < n {
            let at_once = b.positions.rated_at_once(b.choice, first, b.n_head, words);
            let (tokens, width) = at_once;
            first = tokens.end;
            let lists = chosen.floats(tokens.start * per_token..tokens.end * per_token);
            let positions = b.positions.part(tokens.clone());
            self.rate_best(b, tokens, width, ratings)?;
            let rated = (ratings, width);
            choose(self, positions, b.choice, b.n_head, rated, lists)?;
        }
        Ok(())
    }

    /// Rates the blocks up to each of some tokens, `[tokens, n_head, width]`. The sizes are checked.
    fn rate_best(
        &self,
        b: &BlockQueries<'_>,
        tokens: Range<usize>,
        width: usize,
        ratings: View<'_>,
    ) -> Result<(), CudaError> {
        let (n, values) = (tokens.len(), b.n_head * b.key_dim);
        let queries = b.queries.floats(tokens.start * values..tokens.end * values);
        let kernel = match b.kv_type {
            KvType::F32 => "rate_best_f32",
            KvType::F16 => "rate_best_f16",
            KvType::Q8_0 => "rate_best_q8",
        };
        let [positions, begins, tables, page_bits] = b.positions.part(tokens).args();
        let args = [
            queries.arg(),
            b.keys.aligned().arg(),
            int(b.n_head),
            int(b.key_dim),
            positions,
            begins,
            tables,
            page_bits,
            int(b.choice.block),
            int(b.choice.kept),
            int(b.local),
            int(width),
            ratings.arg(),
        ];
        let grid = [blocks(width, 1), few(b.n_head.div_ceil(HEADS)), few(n)];
        self.launch(kernel, grid, INDEX_THREADS, &args)
    }

    /// Makes the keys of the blocks that end with a token: the mean of the keys of their positions, under a
    /// norm, and rotated. Each takes the place of its last position's key.
    ///
    /// # Panics
    /// When a key is wider than [`MAX_KEY`], or not a multiple of 4.
    pub fn mean_keys(&self, m: &MeanKeys<'_>) -> Result<(), CudaError> {
        let (dim, turns) = (m.key_dim, m.frequencies);
        let row = m.kv_type.row_bytes(dim as u64) as usize;
        assert!(dim.is_multiple_of(4) && dim <= MAX_KEY, "keys of {dim}");
        assert!(
            m.block > 0 && m.norm.words() >= dim,
            "a norm of {dim}, blocks of {}",
            m.block
        );
        let fits = |turns: Frequencies<'_>| {
            turns.first == 0 && 2 * turns.half <= dim && turns.values.words() >= turns.half
        };
        assert!(turns.is_none_or(fits), "turns of {dim} values");
        assert!(m.keys.len() >= m.positions.capacity() * row, "cached keys");
        let kernel = match m.kv_type {
            KvType::F32 => "mean_keys_f32",
            KvType::F16 => "mean_keys_f16",
            KvType::Q8_0 => "mean_keys_q8",
        };
        let [positions, begins, tables, page_bits] = m.positions.args();
        let args = [
            m.keys.aligned().arg(),
            int(dim),
            int(m.block),
            m.norm.arg(),
            Arg::Float(m.eps),
            null_or(turns.map(|turns| turns.values)),
            Arg::Float(turns.map_or(1.0, |turns| turns.magnitude)),
            int(turns.map_or(0, |turns| turns.half)),
            turns.map_or(Arg::Int(0), |turns| adjacent(turns.kind)),
            positions,
            begins,
            tables,
            page_bits,
        ];
        let grid = [blocks(m.positions.tokens(), 1), 1, 1];
        self.launch(kernel, grid, INDEX_THREADS, &args)
    }
}
