//! Lightning indexers: keys in the cache, ratings of positions, and the positions that tokens
//! choose.

use super::{CHUNK, MAX_KEY, Positions, RopeTurns, blocks, few, int, null_or};
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

/// Neighboring tokens of a batch that choose what they attend to, or that attend to all positions.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reached {
    /// Tokens of the batch.
    pub tokens: Range<usize>,
    /// Whether they choose. Some of them may see so few positions that they attend to all.
    pub chooses: bool,
}

impl Positions<'_> {
    /// Splits the tokens by whether they may see more than `most` positions, from which those that
    /// they attend to are chosen.
    ///
    /// With one token each of all texts, all are alike, and what they are depends on the chunks of
    /// the context that they are in. So recorded launches serve for every position in the chunks.
    pub fn by_reach(self, most: usize) -> Vec<Reached> {
        let position = |token: usize| self.of(token);
        if self.runs().all(|run| run.len() == 1) {
            let chooses = (0..self.tokens()).any(|token| chunk_end(position(token)) > most);
            let tokens = 0..self.tokens();
            return vec![Reached { tokens, chooses }];
        }
        let mut parts: Vec<Reached> = Vec::new();
        for run in self.runs() {
            let n_dense = most.saturating_sub(position(run.start)).min(run.len());
            let middle = run.start + n_dense;
            for (tokens, chooses) in [(run.start..middle, false), (middle..run.end, true)] {
                match parts.last_mut() {
                    _ if tokens.is_empty() => {}
                    Some(last) if last.chooses == chooses => last.tokens.end = tokens.end,
                    _ => parts.push(Reached { tokens, chooses }),
                }
            }
        }
        parts
    }
}

/// Returns the end of the chunk of the context that a position is in.
fn chunk_end(position: usize) -> usize {
    (position / CHUNK + 1) * CHUNK
}

/// Returns whether a token of a text of up to `context` positions may choose `most` of them.
pub fn may_choose(context: usize, most: usize) -> bool {
    context.next_multiple_of(CHUNK) > most
}

/// Returns the words of the ratings of `tokens` tokens that see up to `context` positions.
pub fn rating_words(tokens: usize, context: usize) -> usize {
    tokens.saturating_mul(context.next_multiple_of(CHUNK))
}

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

/// What tokens choose positions by, whose keys are stored already.
#[derive(Clone, Copy)]
pub struct IndexQueries<'a> {
    /// `[tokens, n_head, key_dim]`.
    pub queries: View<'a>,
    /// Number of query heads.
    pub n_head: usize,
    /// Values of a query or key.
    pub key_dim: usize,
    /// `[tokens, n_head]`.
    pub head_weights: View<'a>,
    /// Factor on the ratings.
    pub scale: f32,
    /// The tokens.
    pub positions: Positions<'a>,
    /// Storage type of the cache.
    pub kv_type: KvType,
    /// `[positions of the cache, key_dim]`.
    pub keys: View<'a>,
    /// Positions that a token chooses.
    pub most: usize,
}

impl IndexQueries<'_> {
    /// Panics if a size is not supported, or a buffer is too short.
    fn check(&self, chosen: View<'_>) {
        let (tokens, dim) = (self.positions.tokens(), self.key_dim);
        let row = self.kv_type.row_bytes(dim as u64) as usize;
        assert!(
            dim.is_multiple_of(4) && self.most > 0,
            "{} of keys of {dim}",
            self.most
        );
        assert!(
            self.keys.len() >= self.positions.capacity() * row,
            "cached keys"
        );
        assert!(
            self.queries.words() >= tokens * self.n_head * dim,
            "queries"
        );
        assert!(
            self.head_weights.words() >= tokens * self.n_head,
            "weights of heads"
        );
        assert!(chosen.words() >= tokens * self.most, "room for choices");
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

    /// Chooses the positions with the best ratings for each token that sees more than so many, of
    /// equal ratings the earlier: `chosen` is `[tokens, most]`, in ascending order. The lists of
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
        let (n, most) = (i.positions.tokens(), i.most);
        let mut first = 0;
        while first < n {
            let (mut tokens, mut width) = (0, 0);
            for token in first..n {
                let wanted = width.max(chunk_end(i.positions.of(token)));
                if wanted * (tokens + 1) > ratings.words() {
                    break;
                }
                (tokens, width) = (tokens + 1, wanted);
            }
            assert!(tokens > 0, "{} ratings of a token", ratings.words());
            let part = first..first + tokens;
            self.rate(i, part.clone(), width, ratings)?;
            let positions = i.positions.part(part).at();
            let to = chosen.floats(first * most..(first + tokens) * most);
            let args = [
                ratings.arg(),
                int(width),
                positions.arg(),
                int(most),
                to.arg(),
            ];
            let grid = [blocks(tokens, 1), 1, 1];
            self.launch("choose_positions", grid, CHOOSE_THREADS, &args)?;
            first += tokens;
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
        let weights = i
            .head_weights
            .floats(tokens.start * i.n_head..tokens.end * i.n_head);
        let kernel = match i.kv_type {
            KvType::F32 => "rate_f32",
            KvType::F16 => "rate_f16",
            KvType::Q8_0 => "rate_q8",
        };
        let n = tokens.len();
        let [positions, begins, tables, page_bits] = i.positions.part(tokens).args();
        let args = [
            queries.aligned().arg(),
            weights.arg(),
            Arg::Float(i.scale),
            i.keys.aligned().arg(),
            int(i.n_head),
            int(i.key_dim),
            positions,
            begins,
            tables,
            page_bits,
            int(i.most),
            int(width),
            ratings.arg(),
        ];
        let grid = [blocks(width, RATED as u32), few(n), 1];
        self.launch(kernel, grid, INDEX_THREADS, &args)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{BatchPositions, CacheSize, TextTokens};
    use super::*;
    use crate::device::Device;
    use crate::shim;
    use std::sync::Arc;

    #[test]
    fn tokens_are_split_where_they_begin_to_choose() {
        let device: Arc<dyn Device> = shim::shared();
        let size = CacheSize {
            positions: 2048,
            page: 1024,
        };
        let mut batch = BatchPositions::new(&device, 64, size).unwrap();
        let mut split = |texts: &[(usize, usize)], most: usize| {
            let texts = texts.iter().map(|&(past, tokens)| TextTokens {
                past,
                tokens,
                pages: &[0],
            });
            batch.set(texts).unwrap();
            let parts = batch.all().by_reach(most).into_iter();
            parts.map(|p| (p.tokens, p.chooses)).collect::<Vec<_>>()
        };
        // The first token with an 11th position chooses among them.
        assert_eq!(split(&[(7, 5)], 10), [(0..3, false), (3..5, true)]);
        assert_eq!(split(&[(12, 2), (30, 3)], 10), [(0..5, true)]);
        let mixed = [(0..2, true), (2..4, false), (4..6, true)];
        assert_eq!(split(&[(12, 2), (8, 4)], 10), mixed);
        // Alone, tokens are as others in their chunks.
        assert_eq!(split(&[(3, 1), (255, 1)], 256), [(0..2, false)]);
        assert_eq!(split(&[(3, 1), (256, 1)], 256), [(0..2, true)]);
        assert_eq!(split(&[(3, 1)], 255), [(0..1, true)]);
        assert!(may_choose(1, 255) && !may_choose(256, 256));
    }
}
