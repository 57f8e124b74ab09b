//! Rotation, the cache and attention over it.

use super::prompt_attention::prompt_kernel;
use super::{Quants, blocks, few, int, null_or};
use crate::device::{Arg, Buffer, Device, View};
use crate::{CudaError, Ops};
use std::ops::Range;
use std::sync::Arc;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::spec::RopeKind;

/// Positions of a chunk of the context, as the kernel has it.
pub const CHUNK: usize = 256;

/// Query heads of an attention block, as the kernel has it.
const HEADS: usize = 8;

/// The widest key, as the kernel has it.
pub const MAX_KEY: usize = 640;

/// Positions of a row of tokens: the first one's, which kernels read from a word on the device, so that launches that
/// were recorded serve for other positions.
#[derive(Clone, Copy)]
pub struct Positions<'a> {
    /// Tokens before.
    pub past: usize,
    /// The same as a 32-bit whole number on the device.
    pub on_device: View<'a>,
}

impl Positions<'_> {
    pub(super) fn word(self) -> Arg {
        self.on_device.floats(0..1).arg()
    }
}

/// Heads of new tokens and the cache that they go to.
#[derive(Clone, Copy)]
pub struct Heads<'a> {
    /// `[tokens, n_head, key_width]`.
    pub queries: View<'a>,
    /// `[tokens, n_head_kv, key_width]`.
    pub new_keys: View<'a>,
    /// `[tokens, n_head_kv, value_width]`.
    pub new_values: View<'a>,
    /// Weights of the norms of each head of queries and keys, `[key_width]`, and their epsilon.
    pub norms: Option<(View<'a>, View<'a>, f32)>,
    /// `[tokens, half]` of cosine and sine, which values they turn, and `half`.
    pub turns: Option<(View<'a>, RopeKind, usize)>,
    /// Tokens.
    pub tokens: usize,
    /// Query heads.
    pub n_head: usize,
    /// Heads of keys and values.
    pub n_head_kv: usize,
    /// Values of a query or key.
    pub key_width: usize,
    /// Values of a value.
    pub value_width: usize,
    /// How the cache stores both.
    pub kv_type: KvType,
    /// Positions that there is room for.
    pub context: usize,
    /// Where the tokens are in the text.
    pub positions: Positions<'a>,
    /// `[n_head_kv, context, key_width]`.
    pub keys: View<'a>,
    /// `[n_head_kv, context, value_width]`.
    pub values: View<'a>,
}

/// Room for what attention finds in each chunk of the context.
pub struct AttendRoom {
    pub(super) mixed: Buffer,
    pub(super) largest: Buffer,
    pub(super) sums: Buffer,
}

impl AttendRoom {
    /// Values that `tokens` tokens with so many query heads need that look back at `positions` positions.
    pub fn values(tokens: usize, heads: usize, positions: usize, value_width: usize) -> usize {
        tokens.saturating_mul(heads).saturating_mul(positions.div_ceil(CHUNK)).saturating_mul(value_width)
    }

    /// Bytes of a room for so many values, of at least `least_width` a query and chunk.
    pub fn bytes(values: usize, least_width: usize) -> [usize; 3] {
        let each = (values / least_width.max(1)).saturating_mul(4);
        [values.saturating_mul(4), each, each]
    }

    /// Room for so many values, of at least `least_width` a query and chunk.
    ///
    /// # Errors
    /// When there is not enough memory.
    pub fn new(device: &Arc<dyn Device>, values: usize, least_width: usize) -> Result<Self, CudaError> {
        let [mixed, largest, sums] = Self::bytes(values, least_width);
        Ok(Self {
            mixed: Buffer::new(device, mixed)?,
            largest: Buffer::new(device, largest)?,
            sums: Buffer::new(device, sums)?,
        })
    }

    /// Queries and chunks that there is room for.
    pub(super) fn parts(&self, value_width: usize) -> usize {
        (self.mixed.view().words() / value_width.max(1)).min(self.largest.view().words())
    }
}

/// Attention of tokens to a cache.
#[derive(Clone, Copy)]
pub struct Attend<'a> {
    /// `[tokens, n_head_kv * group, key_width]`.
    pub queries: View<'a>,
    /// `[n_head_kv, context, key_width]`.
    pub keys: View<'a>,
    /// `[n_head_kv, context, value_row_width]`; may be the keys.
    pub values: View<'a>,
    /// How both are stored.
    pub kv_type: KvType,
    /// Positions that there is room for.
    pub context: usize,
    /// Heads of keys and values.
    pub n_head_kv: usize,
    /// Query heads that read each of them.
    pub group: usize,
    /// Values of a key.
    pub key_width: usize,
    /// Values of a row of `values`.
    pub value_row_width: usize,
    /// The first of them, which are mixed.
    pub value_width: usize,
    /// Factor on the scores.
    pub scale: f32,
    /// Tokens, whose rows are stored already.
    pub tokens: usize,
    /// Where they are in the text: at the first of these positions and `first` after it.
    pub positions: Positions<'a>,
    /// Of the tokens at these positions, how many are before these.
    pub first: usize,
    /// Positions that a token sees at most.
    pub window: Option<usize>,
    /// A score a head beside those of the positions, `[n_head_kv * group]`.
    pub sinks: Option<View<'a>>,
}

impl Attend<'_> {
    /// Pieces of `len` positions that some of the tokens look back at, from the first one's first to the last one's last.
    /// For a single token the most at any position of its last piece, so that launches that were recorded serve for all of
    /// them.
    pub(super) fn pieces(&self, len: usize, first: usize, tokens: usize) -> usize {
        let past = self.positions.past + self.first + first;
        if tokens == 1 {
            let windows = self.window.map_or(usize::MAX, |window| window.div_ceil(len) + 1);
            return (past + 1).div_ceil(len).min(windows);
        }
        let begin = self.window.map_or(0, |window| (past + 1).saturating_sub(window)) / len;
        (past + tokens).div_ceil(len) - begin
    }

    /// As many tokens from `first` on as there is room for at once when the context is cut into pieces of `len`
    /// positions, and their pieces.
    pub(super) fn fitting(&self, room: &AttendRoom, len: usize, first: usize) -> (usize, usize) {
        let heads = self.n_head_kv * self.group;
        let fits = |tokens: usize| self.pieces(len, first, tokens) * tokens * heads <= room.parts(self.value_width);
        let tokens = (1..=self.tokens - first).rev().find(|n| fits(*n));
        let positions = self.positions.past + self.first + first + 1;
        let tokens = tokens.unwrap_or_else(|| panic!("no room for attention to {positions} positions"));
        (tokens, self.pieces(len, first, tokens))
    }
}

/// Arguments of what quantises the results of tokens from `first` on.
fn quant_args(a: &Attend<'_>, quants: Option<&Quants>, first: usize) -> [Arg; 3] {
    quants.map_or([Arg::Pointer(0); 3], |quants| {
        let from = first * a.n_head_kv * a.group * a.value_width;
        let (codes, scales, sums) = (quants.codes.view(), quants.scales.view(), quants.sums.view());
        let codes = codes.part(from..codes.len()).arg();
        [codes, scales.floats(from / 32..scales.words()).arg(), sums.floats(from / 16..sums.words()).arg()]
    })
}

impl Ops {
    /// Rotates the first values of every head of `[tokens, heads, head_dim]`; `turns` is `[tokens, half]` of cosine and
    /// sine, prepared on the processor, so that scaling needs no kernel.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a size does not fit.
    pub fn rope(
        &self,
        x: View<'_>,
        turns: View<'_>,
        kind: RopeKind,
        tokens: usize,
        heads: usize,
        head_dim: usize,
        half: usize,
    ) -> Result<(), CudaError> {
        assert!(2 * half <= head_dim && x.words() >= tokens * heads * head_dim, "{tokens} x {heads} x {head_dim}");
        assert!(turns.words() >= 2 * tokens * half, "{tokens} x {half} turns");
        let neighbours = i32::from(kind == RopeKind::Adjacent);
        let args = [x.arg(), turns.arg(), int(head_dim), int(half), Arg::Int(neighbours)];
        self.launch("rope", [blocks(heads, 1), few(tokens), 1], 64, &args)
    }

    /// Stores `[tokens, heads, width]` in a cache `[heads, context, width]` from the first of the positions on.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a size does not fit, or `width` is no multiple of 4.
    pub fn store(
        &self,
        kv_type: KvType,
        x: View<'_>,
        tokens: usize,
        heads: usize,
        width: usize,
        context: usize,
        positions: Positions<'_>,
        cache: View<'_>,
    ) -> Result<(), CudaError> {
        let bytes = heads * context * kv_type.row_bytes(width as u64) as usize;
        let past = positions.past;
        assert!(width.is_multiple_of(4) && x.words() >= tokens * heads * width, "{tokens} x {heads} x {width}");
        assert!(past + tokens <= context && cache.len() >= bytes, "{past} + {tokens} of {context} positions");
        let kernel = match kv_type {
            KvType::F32 => "store_f32",
            KvType::F16 => "store_f16",
            KvType::Q8_0 => "store_q8",
        };
        let args = [x.arg(), int(width), int(context), positions.word(), cache.arg()];
        self.launch(kernel, [blocks(heads, 1), few(tokens), 1], 128, &args)
    }

    /// Norms and rotates the heads of queries and keys, the queries in place, and stores keys and values; one launch.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a size does not fit, or a head is wider than [`MAX_KEY`].
    pub fn place_heads(&self, h: &Heads<'_>) -> Result<(), CudaError> {
        let (n, past) = (h.tokens, h.positions.past);
        let cache = |width: usize| h.n_head_kv * h.context * h.kv_type.row_bytes(width as u64) as usize;
        assert!(h.key_width <= MAX_KEY && h.value_width <= MAX_KEY, "heads of {}, {}", h.key_width, h.value_width);
        assert!(h.queries.words() >= n * h.n_head * h.key_width, "queries");
        assert!(h.new_keys.words() >= n * h.n_head_kv * h.key_width, "keys");
        assert!(h.new_values.words() >= n * h.n_head_kv * h.value_width, "values");
        assert!(past + n <= h.context, "{past} + {n} of {} positions", h.context);
        assert!(h.keys.len() >= cache(h.key_width) && h.values.len() >= cache(h.value_width), "cached rows");
        assert!(h.norms.is_none_or(|(q, k, _)| q.words() >= h.key_width && k.words() >= h.key_width), "norms");
        let half = h.turns.map_or(0, |(_, _, half)| half);
        let turned = h.turns.is_none_or(|(turns, ..)| 2 * half <= h.key_width && turns.words() >= 2 * n * half);
        assert!(turned, "{n} x {half} turns");
        let kernel = match h.kv_type {
            KvType::F32 => "place_heads_f32",
            KvType::F16 => "place_heads_f16",
            KvType::Q8_0 => "place_heads_q8",
        };
        let args = [
            h.queries.arg(),
            h.new_keys.arg(),
            h.new_values.arg(),
            null_or(h.norms.map(|(q, ..)| q)),
            null_or(h.norms.map(|(_, k, _)| k)),
            Arg::Float(h.norms.map_or(0.0, |(_, _, eps)| eps)),
            null_or(h.turns.map(|(turns, ..)| turns)),
            int(half),
            Arg::Int(i32::from(h.turns.is_some_and(|(_, kind, _)| kind == RopeKind::Adjacent))),
            int(h.n_head),
            int(h.n_head_kv),
            int(h.key_width),
            int(h.value_width),
            int(h.context),
            h.positions.word(),
            h.keys.arg(),
            h.values.arg(),
        ];
        self.launch(kernel, [blocks(h.n_head + 2 * h.n_head_kv, 1), few(n), 1], 128, &args)
    }

    /// Attention; `out` is `[tokens, n_head_kv * group, value_width]`, and `quants` get the 8-bit form of that, a row a token.
    /// For [`PROMPT_TOKENS`](super::PROMPT_TOKENS) and more, 16-bit floats are multiplied where the keys are not too wide for
    /// that.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a size does not fit, a width is no multiple of 4 (of values, of 32 where they are quantised), or keys are wider
    /// than [`MAX_KEY`].
    pub fn attend(
        &self,
        a: &Attend<'_>,
        room: &AttendRoom,
        out: View<'_>,
        quants: Option<&mut Quants>,
    ) -> Result<(), CudaError> {
        let heads = a.n_head_kv * a.group;
        let past = a.positions.past + a.first;
        let cache = |width: usize| a.n_head_kv * a.context * a.kv_type.row_bytes(width as u64) as usize;
        assert!(a.key_width.is_multiple_of(4) && a.value_row_width.is_multiple_of(4), "widths of rows");
        assert!(a.key_width <= MAX_KEY && a.value_width <= a.value_row_width, "keys of {}", a.key_width);
        assert!(past + a.tokens <= a.context && a.group > 0, "{past} + {} of {}", a.tokens, a.context);
        assert!(a.keys.len() >= cache(a.key_width) && a.values.len() >= cache(a.value_row_width), "cached rows");
        assert!(a.queries.words() >= a.tokens * heads * a.key_width, "queries");
        assert!(out.words() >= a.tokens * heads * a.value_width, "room for attention");
        assert!(a.sinks.is_none_or(|s| s.words() >= heads), "a sink a head");
        let kernel = match a.kv_type {
            KvType::F32 => "attend_f32",
            KvType::F16 => "attend_f16",
            KvType::Q8_0 => "attend_q8",
        };
        let width = heads * a.value_width;
        let quants = quants.map(|quants| {
            assert!(a.value_width.is_multiple_of(32), "values of {} to quantise", a.value_width);
            let _ = quants.take_shape(a.tokens, width);
            &*quants
        });
        if let Some(kernel) = prompt_kernel(a) {
            return self.attend_prompt(kernel, a, room, out, quants);
        }
        let mut first = 0;
        while first < a.tokens {
            let (tokens, chunks) = a.fitting(room, CHUNK, first);
            let queries = a.queries.floats(first * heads * a.key_width..(first + tokens) * heads * a.key_width);
            let to = out.floats(first * heads * a.value_width..(first + tokens) * heads * a.value_width);
            let (mixed, largest, sums) = (room.mixed.view(), room.largest.view(), room.sums.view());
            // A chunk that is all there is needs no others.
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
            let grid = [blocks(chunks, 1), few(a.n_head_kv * a.group.div_ceil(HEADS)), few(tokens)];
            self.launch(kernel, grid, 128, &args)?;
            if !whole {
                self.join(a, room, first..first + tokens, chunks, to, quants)?;
            }
            first += tokens;
        }
        Ok(())
    }

    /// Puts the pieces of the context together, of some of the tokens.
    pub(super) fn join(
        &self,
        a: &Attend<'_>,
        room: &AttendRoom,
        tokens: Range<usize>,
        pieces: usize,
        out: View<'_>,
        quants: Option<&Quants>,
    ) -> Result<(), CudaError> {
        let heads = a.n_head_kv * a.group;
        let [mixed, largest, parts] = [&room.mixed, &room.largest, &room.sums].map(|b| b.view().arg());
        let [q, scale, sums] = quant_args(a, quants, tokens.start);
        let (pieces, width, sinks) = (int(pieces), int(a.value_width), null_or(a.sinks));
        let args = [mixed, largest, parts, pieces, width, sinks, out.arg(), q, scale, sums];
        self.launch("join_chunks", [blocks(heads, 1), few(tokens.len()), 1], 128, &args)
    }
}
