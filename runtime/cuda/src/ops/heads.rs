//! Norms and rotation of heads, and storing them in the KV cache.

use super::{MAX_KEY, Positions, blocks, few, int, null_or};
use crate::device::{Arg, View};
use crate::{CudaError, Ops};
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::spec::RopeKind;

/// Weights of the norms of each head.
#[derive(Clone, Copy, Default)]
pub struct HeadNorms<'a> {
    /// `[key_width]`, if queries are normalized.
    pub queries: Option<View<'a>>,
    /// `[key_width]`, if keys are normalized.
    pub keys: Option<View<'a>>,
    /// `[value_width]`, if values are normalized.
    pub values: Option<View<'a>>,
    /// Whether the norms of queries and keys follow the rotation.
    pub after_rope: bool,
    /// Epsilon of all norms.
    pub eps: f32,
}

/// Rotary position embedding of tokens.
#[derive(Clone, Copy)]
pub struct RopeTurns<'a> {
    /// `[tokens, half]` of cosine and sine, computed on the CPU, so that context scaling needs no
    /// kernel.
    pub values: View<'a>,
    /// Which values are rotated together.
    pub kind: RopeKind,
    /// Rotated pairs per head.
    pub half: usize,
}

/// A layer's keys or values in the KV cache.
#[derive(Clone, Copy)]
pub struct CacheRows<'a> {
    /// Storage type of the cache.
    pub kv_type: KvType,
    /// `[positions of the cache, heads, width]`.
    pub at: View<'a>,
    /// Heads of keys or values.
    pub heads: usize,
    /// Values of a row.
    pub width: usize,
}

/// Heads of new tokens, and the cache that they are stored in.
#[derive(Clone, Copy)]
pub struct Heads<'a> {
    /// `[tokens, n_head, key_width]`.
    pub queries: View<'a>,
    /// `[tokens, n_head_kv, key_width]`.
    pub new_keys: View<'a>,
    /// `[tokens, n_head_kv, value_width]`.
    pub new_values: View<'a>,
    /// Norms of heads.
    pub norms: HeadNorms<'a>,
    /// Rotation of queries and keys, if the layer has any.
    pub turns: Option<RopeTurns<'a>>,
    /// Number of query heads.
    pub n_head: usize,
    /// Heads of keys and values.
    pub n_head_kv: usize,
    /// Values of a query or key.
    pub key_width: usize,
    /// Values of a value; 0 where only keys are stored.
    pub value_width: usize,
    /// Storage type of the cache.
    pub kv_type: KvType,
    /// The tokens.
    pub positions: Positions<'a>,
    /// `[positions of the cache, n_head_kv, key_width]`.
    pub keys: View<'a>,
    /// `[positions of the cache, n_head_kv, value_width]`.
    pub values: View<'a>,
}

impl Ops {
    /// Rotates the first `2 * half` values of every head of `[tokens, heads, head_dim]`.
    pub fn rope(
        &self,
        x: View<'_>,
        turns: &RopeTurns<'_>,
        tokens: usize,
        heads: usize,
        head_dim: usize,
    ) -> Result<(), CudaError> {
        let &RopeTurns { values, kind, half } = turns;
        assert!(
            2 * half <= head_dim && x.words() >= tokens * heads * head_dim,
            "{tokens} x {heads} x {head_dim}"
        );
        assert!(
            values.words() >= 2 * tokens * half,
            "{tokens} x {half} turns"
        );
        let adjacent = i32::from(kind == RopeKind::Adjacent);
        let args = [
            x.arg(),
            values.arg(),
            int(head_dim),
            int(half),
            Arg::Int(adjacent),
        ];
        self.launch("rope", [blocks(heads, 1), few(tokens), 1], 64, &args)
    }

    /// Stores `[tokens, heads, width]` in the KV cache at the tokens' positions.
    ///
    /// # Panics
    /// When `width` is not a multiple of 4.
    pub fn store(
        &self,
        x: View<'_>,
        positions: Positions<'_>,
        cache: &CacheRows<'_>,
    ) -> Result<(), CudaError> {
        let &CacheRows {
            kv_type,
            at,
            heads,
            width,
        } = cache;
        let tokens = positions.tokens();
        let bytes = heads * positions.capacity() * kv_type.row_bytes(width as u64) as usize;
        assert!(
            width.is_multiple_of(4) && x.words() >= tokens * heads * width,
            "{tokens} x {heads} x {width}"
        );
        assert!(
            at.len() >= bytes,
            "a cache of {} positions",
            positions.capacity()
        );
        let kernel = match kv_type {
            KvType::F32 => "store_f32",
            KvType::F16 => "store_f16",
            KvType::Q8_0 => "store_q8",
        };
        let [at_positions, begins, tables, page_bits] = positions.args();
        let args = [
            x.arg(),
            int(width),
            at_positions,
            begins,
            tables,
            page_bits,
            at.arg(),
        ];
        self.launch(kernel, [blocks(heads, 1), few(tokens), 1], 128, &args)
    }

    /// Normalizes and rotates the heads of queries and keys, the queries in place, and stores keys
    /// and values; one launch.
    ///
    /// # Panics
    /// When a head is wider than [`MAX_KEY`].
    pub fn place_heads(&self, h: &Heads<'_>) -> Result<(), CudaError> {
        let n = h.positions.tokens();
        let cache = |width: usize| {
            h.positions.capacity() * h.n_head_kv * h.kv_type.row_bytes(width as u64) as usize
        };
        assert!(
            h.key_width <= MAX_KEY && h.value_width <= MAX_KEY,
            "heads of {}, {}",
            h.key_width,
            h.value_width
        );
        assert!(h.queries.words() >= n * h.n_head * h.key_width, "queries");
        assert!(h.new_keys.words() >= n * h.n_head_kv * h.key_width, "keys");
        assert!(
            h.new_values.words() >= n * h.n_head_kv * h.value_width,
            "values"
        );
        assert!(
            h.keys.len() >= cache(h.key_width) && h.values.len() >= cache(h.value_width),
            "cached rows"
        );
        let norms = [
            (h.norms.queries, h.key_width),
            (h.norms.keys, h.key_width),
            (h.norms.values, h.value_width),
        ];
        let fits = |(norm, width): (Option<View<'_>>, usize)| {
            norm.is_none_or(|norm| norm.words() >= width)
        };
        assert!(norms.into_iter().all(fits), "norms");
        let half = h.turns.map_or(0, |turns| turns.half);
        let fits =
            |turns: RopeTurns<'_>| 2 * half <= h.key_width && turns.values.words() >= 2 * n * half;
        assert!(h.turns.is_none_or(fits), "{n} x {half} turns");
        let kernel = match h.kv_type {
            KvType::F32 => "place_heads_f32",
            KvType::F16 => "place_heads_f16",
            KvType::Q8_0 => "place_heads_q8",
        };
        let of_keys = h.n_head_kv;
        let of_values = if h.value_width > 0 { h.n_head_kv } else { 0 };
        let [positions, begins, tables, page_bits] = h.positions.args();
        let args = [
            h.queries.arg(),
            h.new_keys.arg(),
            h.new_values.arg(),
            null_or(h.norms.queries),
            null_or(h.norms.keys),
            null_or(h.norms.values),
            Arg::Int(i32::from(h.norms.after_rope)),
            Arg::Float(h.norms.eps),
            null_or(h.turns.map(|turns| turns.values)),
            int(half),
            Arg::Int(i32::from(
                h.turns
                    .is_some_and(|turns| turns.kind == RopeKind::Adjacent),
            )),
            int(h.n_head),
            int(h.n_head_kv),
            int(h.key_width),
            int(h.value_width),
            positions,
            begins,
            tables,
            page_bits,
            h.keys.arg(),
            h.values.arg(),
        ];
        self.launch(
            kernel,
            [blocks(h.n_head + of_keys + of_values, 1), few(n), 1],
            128,
            &args,
        )
    }
}
