//! Rotation, the cache and attention over it.

use super::prompt_attention::prompt_kernel;
use super::{blocks, few, int, null_or};
use crate::cuda::device::{Arg, Buffer, Device, View};
use crate::cuda::{CudaError, Ops};
use crate::model::kv::KvType;
use crate::model::spec::RopeKind;
use std::sync::Arc;

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
    pub(super) fn pieces(&self, len: usize, first: usize, tokens: usize) -> usize {
        let past = self.positions.past + self.first + first;
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

    /// Attention; `out` is `[tokens, n_head_kv * group, value_width]`. For [`PROMPT_TOKENS`] and more, 16-bit floats are
    /// multiplied where the keys are not too wide for that.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a size does not fit, a width is no multiple of 4, or keys are wider than [`MAX_KEY`].
    pub fn attend(&self, a: &Attend<'_>, room: &AttendRoom, out: View<'_>) -> Result<(), CudaError> {
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
        if let Some(kernel) = prompt_kernel(a) {
            return self.attend_prompt(kernel, a, room, out);
        }
        let kernel = match a.kv_type {
            KvType::F32 => "attend_f32",
            KvType::F16 => "attend_f16",
            KvType::Q8_0 => "attend_q8",
        };
        let mut first = 0;
        while first < a.tokens {
            let (tokens, chunks) = a.fitting(room, CHUNK, first);
            let queries = a.queries.floats(first * heads * a.key_width..(first + tokens) * heads * a.key_width);
            let to = out.floats(first * heads * a.value_width..(first + tokens) * heads * a.value_width);
            let (mixed, largest, sums) = (room.mixed.view(), room.largest.view(), room.sums.view());
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
            ];
            let grid = [blocks(chunks, 1), few(a.n_head_kv * a.group.div_ceil(HEADS)), few(tokens)];
            self.launch(kernel, grid, 128, &args)?;
            self.join(a, room, tokens, chunks, to)?;
            first += tokens;
        }
        Ok(())
    }

    /// Puts the pieces of the context together, of so many tokens.
    pub(super) fn join(
        &self,
        a: &Attend<'_>,
        room: &AttendRoom,
        tokens: usize,
        pieces: usize,
        out: View<'_>,
    ) -> Result<(), CudaError> {
        let [mixed, largest, sums] = [&room.mixed, &room.largest, &room.sums].map(|b| b.view().arg());
        let args = [mixed, largest, sums, int(pieces), int(a.value_width), null_or(a.sinks), out.arg()];
        self.launch("join_chunks", [blocks(a.n_head_kv * a.group, 1), few(tokens), 1], 128, &args)
    }
}
