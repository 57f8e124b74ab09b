//! Rotation of heads, the KV cache, and attention over it.

use super::prompt_attention::prompt_kernel;
use super::{Quants, blocks, few, int, null_or};
use crate::device::{Arg, Buffer, Device, View};
use crate::{CudaError, Ops};
use std::ops::Range;
use std::sync::Arc;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::spec::RopeKind;

/// Positions per chunk of the context; the kernel has the same constant.
pub const CHUNK: usize = 256;

/// Query heads per attention block; the kernel has the same constant.
const HEADS: usize = 8;

/// Widest key; the kernel has the same constant.
pub use tier_plan_formats::model::gpu::MAX_KEY;

/// Positions of consecutive tokens. Kernels read the first one from a word on the device, so that
/// recorded launches serve for other positions.
#[derive(Clone, Copy)]
pub struct Positions<'a> {
    /// Tokens before the first one.
    pub past: usize,
    /// `past` as a 32-bit integer on the device.
    pub on_device: View<'a>,
}

impl Positions<'_> {
    pub(super) fn word(self) -> Arg {
        self.on_device.floats(0..1).arg()
    }
}

/// Weights of the norms of each head.
#[derive(Clone, Copy)]
pub struct HeadNorms<'a> {
    /// `[key_width]`.
    pub queries: View<'a>,
    /// `[key_width]`.
    pub keys: View<'a>,
    /// Epsilon of both norms.
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
    /// `[heads, context, width]`.
    pub at: View<'a>,
    /// Heads of keys or values.
    pub heads: usize,
    /// Positions of the cache.
    pub context: usize,
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
    /// Norms of queries and keys, if the layer has any.
    pub norms: Option<HeadNorms<'a>>,
    /// Rotation of queries and keys, if the layer has any.
    pub turns: Option<RopeTurns<'a>>,
    /// Number of new tokens.
    pub tokens: usize,
    /// Number of query heads.
    pub n_head: usize,
    /// Heads of keys and values.
    pub n_head_kv: usize,
    /// Values of a query or key.
    pub key_width: usize,
    /// Values of a value.
    pub value_width: usize,
    /// Storage type of the cache.
    pub kv_type: KvType,
    /// Positions of the cache.
    pub context: usize,
    /// Positions of the tokens.
    pub positions: Positions<'a>,
    /// `[n_head_kv, context, key_width]`.
    pub keys: View<'a>,
    /// `[n_head_kv, context, value_width]`.
    pub values: View<'a>,
}

/// Workspace of attention: results of each chunk of the context.
pub struct AttentionBuffers {
    pub(super) mixed: Buffer,
    pub(super) largest: Buffer,
    pub(super) sums: Buffer,
}

impl AttentionBuffers {
    /// Returns the number of values that `tokens` tokens need which attend to `positions`
    /// positions.
    pub fn values(tokens: usize, heads: usize, positions: usize, value_width: usize) -> usize {
        tokens
            .saturating_mul(heads)
            .saturating_mul(positions.div_ceil(CHUNK))
            .saturating_mul(value_width)
    }

    /// Returns the bytes of the three buffers for `values` values, at least `least_width` per query
    /// and chunk.
    pub fn bytes(values: usize, least_width: usize) -> [usize; 3] {
        let each = (values / least_width.max(1)).saturating_mul(4);
        [values.saturating_mul(4), each, each]
    }

    /// Allocates buffers for `values` values, at least `least_width` per query and chunk.
    pub fn new(
        device: &Arc<dyn Device>,
        values: usize,
        least_width: usize,
    ) -> Result<Self, CudaError> {
        let [mixed, largest, sums] = Self::bytes(values, least_width);
        Ok(Self {
            mixed: Buffer::new(device, mixed)?,
            largest: Buffer::new(device, largest)?,
            sums: Buffer::new(device, sums)?,
        })
    }

    /// Returns the number of pairs of query and chunk that fit.
    pub(super) fn query_chunks(&self, value_width: usize) -> usize {
        (self.mixed.view().words() / value_width.max(1)).min(self.largest.view().words())
    }
}

/// Attention of tokens to the KV cache, in which they are stored already.
#[derive(Clone, Copy)]
pub struct Attend<'a> {
    /// `[tokens, n_head_kv * group, key_width]`.
    pub queries: View<'a>,
    /// `[n_head_kv, context, key_width]`.
    pub keys: View<'a>,
    /// `[n_head_kv, context, value_row_width]`; may be the keys.
    pub values: View<'a>,
    /// Storage type of both.
    pub kv_type: KvType,
    /// Positions of the cache.
    pub context: usize,
    /// Heads of keys and values.
    pub n_head_kv: usize,
    /// Query heads per head of keys.
    pub group: usize,
    /// Values of a key.
    pub key_width: usize,
    /// Values of a row of `values`.
    pub value_row_width: usize,
    /// Values at the beginning of such a row that are mixed.
    pub value_width: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Number of tokens.
    pub tokens: usize,
    /// Positions of the batch that the tokens are part of.
    pub positions: Positions<'a>,
    /// Tokens of the batch before these.
    pub first: usize,
    /// Most positions that a token attends to (sliding window).
    pub window: Option<usize>,
    /// `[n_head_kv * group]`: a score per head beside those of the positions.
    pub sinks: Option<View<'a>>,
}

impl Attend<'_> {
    /// Panics if a size is not supported, or a buffer is too short.
    fn check(&self, out: View<'_>) {
        let heads = self.n_head_kv * self.group;
        let past = self.positions.past + self.first;
        let cache = |width: usize| {
            self.n_head_kv * self.context * self.kv_type.row_bytes(width as u64) as usize
        };
        assert!(
            self.key_width.is_multiple_of(4) && self.value_row_width.is_multiple_of(4),
            "widths of rows"
        );
        assert!(
            self.key_width <= MAX_KEY && self.value_width <= self.value_row_width,
            "keys of {}",
            self.key_width
        );
        assert!(
            past + self.tokens <= self.context && self.group > 0,
            "{past} + {} of {}",
            self.tokens,
            self.context
        );
        assert!(
            self.keys.len() >= cache(self.key_width)
                && self.values.len() >= cache(self.value_row_width),
            "cached rows"
        );
        assert!(
            self.queries.words() >= self.tokens * heads * self.key_width,
            "queries"
        );
        assert!(
            out.words() >= self.tokens * heads * self.value_width,
            "results of attention"
        );
        assert!(
            self.sinks.is_none_or(|s| s.words() >= heads),
            "a sink per head"
        );
    }

    /// Returns the number of pieces of `len` positions that some of the tokens attend to, from the
    /// first piece of the first token to the last piece of the last token.
    ///
    /// For a single token this is the most at any position of its last piece, so that recorded
    /// launches serve for all of them.
    pub(super) fn pieces(&self, len: usize, first: usize, tokens: usize) -> usize {
        let past = self.positions.past + self.first + first;
        if tokens == 1 {
            let windows = self
                .window
                .map_or(usize::MAX, |window| window.div_ceil(len) + 1);
            return (past + 1).div_ceil(len).min(windows);
        }
        let begin = self
            .window
            .map_or(0, |window| (past + 1).saturating_sub(window))
            / len;
        (past + tokens).div_ceil(len) - begin
    }

    /// Returns how many tokens from `first` on fit into the buffers at once when the context is cut
    /// into pieces of `len` positions, and the number of their pieces.
    pub(super) fn fitting(
        &self,
        buffers: &AttentionBuffers,
        len: usize,
        first: usize,
    ) -> (usize, usize) {
        let heads = self.n_head_kv * self.group;
        let fits = |tokens: usize| {
            self.pieces(len, first, tokens) * tokens * heads
                <= buffers.query_chunks(self.value_width)
        };
        let tokens = (1..=self.tokens - first).rev().find(|n| fits(*n));
        let positions = self.positions.past + self.first + first + 1;
        let tokens = tokens
            .unwrap_or_else(|| panic!("too small buffers for attention to {positions} positions"));
        (tokens, self.pieces(len, first, tokens))
    }
}

/// Returns the arguments that quantize the results of tokens from `first` on.
fn quant_args(a: &Attend<'_>, quants: Option<&Quants>, first: usize) -> [Arg; 3] {
    quants.map_or([Arg::Pointer(0); 3], |quants| {
        let from = first * a.n_head_kv * a.group * a.value_width;
        let (codes, scales, sums) = (
            quants.codes.view(),
            quants.scales.view(),
            quants.sums.view(),
        );
        let codes = codes.part(from..codes.len()).arg();
        [
            codes,
            scales.floats(from / 32..scales.words()).arg(),
            sums.floats(from / 16..sums.words()).arg(),
        ]
    })
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
        tokens: usize,
        positions: Positions<'_>,
        cache: &CacheRows<'_>,
    ) -> Result<(), CudaError> {
        let &CacheRows {
            kv_type,
            at,
            heads,
            context,
            width,
        } = cache;
        let bytes = heads * context * kv_type.row_bytes(width as u64) as usize;
        let past = positions.past;
        assert!(
            width.is_multiple_of(4) && x.words() >= tokens * heads * width,
            "{tokens} x {heads} x {width}"
        );
        assert!(
            past + tokens <= context && at.len() >= bytes,
            "{past} + {tokens} of {context} positions"
        );
        let kernel = match kv_type {
            KvType::F32 => "store_f32",
            KvType::F16 => "store_f16",
            KvType::Q8_0 => "store_q8",
        };
        let args = [
            x.arg(),
            int(width),
            int(context),
            positions.word(),
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
        let (n, past) = (h.tokens, h.positions.past);
        let cache =
            |width: usize| h.n_head_kv * h.context * h.kv_type.row_bytes(width as u64) as usize;
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
            past + n <= h.context,
            "{past} + {n} of {} positions",
            h.context
        );
        assert!(
            h.keys.len() >= cache(h.key_width) && h.values.len() >= cache(h.value_width),
            "cached rows"
        );
        assert!(
            h.norms
                .is_none_or(|n| n.queries.words() >= h.key_width && n.keys.words() >= h.key_width),
            "norms"
        );
        let half = h.turns.map_or(0, |turns| turns.half);
        let fits =
            |turns: RopeTurns<'_>| 2 * half <= h.key_width && turns.values.words() >= 2 * n * half;
        assert!(h.turns.is_none_or(fits), "{n} x {half} turns");
        let kernel = match h.kv_type {
            KvType::F32 => "place_heads_f32",
            KvType::F16 => "place_heads_f16",
            KvType::Q8_0 => "place_heads_q8",
        };
        let args = [
            h.queries.arg(),
            h.new_keys.arg(),
            h.new_values.arg(),
            null_or(h.norms.map(|norms| norms.queries)),
            null_or(h.norms.map(|norms| norms.keys)),
            Arg::Float(h.norms.map_or(0.0, |norms| norms.eps)),
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
            int(h.context),
            h.positions.word(),
            h.keys.arg(),
            h.values.arg(),
        ];
        self.launch(
            kernel,
            [blocks(h.n_head + 2 * h.n_head_kv, 1), few(n), 1],
            128,
            &args,
        )
    }

    /// Computes attention; `out` is `[tokens, n_head_kv * group, value_width]`, and `quants` get
    /// its quantized form, a row per token.
    ///
    /// From [`PROMPT_TOKENS`](super::PROMPT_TOKENS) tokens on, 16-bit floats are multiplied, unless
    /// the keys are too wide for that.
    ///
    /// # Panics
    /// When a width is not a multiple of 4 (of quantized values, of 32), or keys are wider than
    /// [`MAX_KEY`].
    pub fn attend(
        &self,
        a: &Attend<'_>,
        buffers: &AttentionBuffers,
        out: View<'_>,
        quants: Option<&mut Quants>,
    ) -> Result<(), CudaError> {
        let heads = a.n_head_kv * a.group;
        a.check(out);
        let kernel = match a.kv_type {
            KvType::F32 => "attend_f32",
            KvType::F16 => "attend_f16",
            KvType::Q8_0 => "attend_q8",
        };
        let width = heads * a.value_width;
        let quants = quants.map(|quants| {
            assert!(
                a.value_width.is_multiple_of(32),
                "values of {} to quantize",
                a.value_width
            );
            let _ = quants.take_shape(a.tokens, width);
            &*quants
        });
        if let Some(kernel) = prompt_kernel(a) {
            return self.attend_prompt(kernel, a, buffers, out, quants);
        }
        let mut first = 0;
        while first < a.tokens {
            let (tokens, chunks) = a.fitting(buffers, CHUNK, first);
            let queries = a
                .queries
                .floats(first * heads * a.key_width..(first + tokens) * heads * a.key_width);
            let to =
                out.floats(first * heads * a.value_width..(first + tokens) * heads * a.value_width);
            let (mixed, largest, sums) = (
                buffers.mixed.view(),
                buffers.largest.view(),
                buffers.sums.view(),
            );
            // The kernel writes the final result where there is only one chunk.
            let whole = chunks == 1;
            let [q, quant_scale, quant_sums] = quant_args(a, quants.filter(|_| whole), first);
            let args = [
                queries.arg(),
                a.keys.aligned().arg(),
                a.values.aligned().arg(),
                int(a.context),
                int(a.n_head_kv),
                int(a.group),
                int(a.key_width),
                int(a.value_row_width),
                int(a.value_width),
                Arg::Float(a.scale),
                a.positions.word(),
                int(a.first + first),
                int(a.window.unwrap_or(0)),
                mixed.arg(),
                largest.arg(),
                sums.arg(),
                null_or(a.sinks),
                null_or(whole.then_some(to)),
                q,
                quant_scale,
                quant_sums,
            ];
            let grid = [
                blocks(chunks, 1),
                few(a.n_head_kv * a.group.div_ceil(HEADS)),
                few(tokens),
            ];
            self.launch(kernel, grid, 128, &args)?;
            if !whole {
                self.join(a, buffers, first..first + tokens, chunks, to, quants)?;
            }
            first += tokens;
        }
        Ok(())
    }

    /// Combines the results of the context's pieces for some of the tokens.
    pub(super) fn join(
        &self,
        a: &Attend<'_>,
        buffers: &AttentionBuffers,
        tokens: Range<usize>,
        pieces: usize,
        out: View<'_>,
        quants: Option<&Quants>,
    ) -> Result<(), CudaError> {
        let heads = a.n_head_kv * a.group;
        let [mixed, largest, parts] =
            [&buffers.mixed, &buffers.largest, &buffers.sums].map(|b| b.view().arg());
        let [q, scale, sums] = quant_args(a, quants, tokens.start);
        let (pieces, width, sinks) = (int(pieces), int(a.value_width), null_or(a.sinks));
        let args = [
            mixed,
            largest,
            parts,
            pieces,
            width,
            sinks,
            out.arg(),
            q,
            scale,
            sums,
        ];
        self.launch(
            "join_chunks",
            [blocks(heads, 1), few(tokens.len()), 1],
            128,
            &args,
        )
    }
}
