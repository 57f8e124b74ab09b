//! Attention over the KV cache.

use super::positions::Positions;
use super::prompt_attention::prompt_kernel;
use super::{Quants, blocks, few, int, null_or};
use crate::device::{Arg, Buffer, Device, View};
use crate::{CudaError, Ops};
use std::ops::Range;
use std::sync::Arc;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::spec::WindowKind;

/// Positions per chunk of the context; the kernel has the same constant.
pub const CHUNK: usize = 256;

/// Query heads per attention block; the kernel has the same constant.
pub(super) const HEADS: usize = 8;

/// Widest key; the kernel has the same constant.
pub use tier_plan_formats::model::gpu::MAX_KEY;

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
    /// `[positions of the cache, n_head_kv, key_width]`.
    pub keys: View<'a>,
    /// `[positions of the cache, n_head_kv, value_row_width]`; may be the keys.
    pub values: View<'a>,
    /// Storage type of both.
    pub kv_type: KvType,
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
    /// Scores `s` become `cap * tanh(s / cap)`.
    pub softcap: Option<f32>,
    /// The tokens, of any number of texts.
    pub positions: Positions<'a>,
    /// Most positions that a token attends to.
    pub window: Option<usize>,
    /// Where a window begins.
    pub window_kind: WindowKind,
    /// `[n_head_kv * group]`: a score per head beside those of the positions.
    pub sinks: Option<View<'a>>,
}

impl Attend<'_> {
    /// Panics if a size is not supported, or a buffer is too short.
    pub(super) fn check(&self, out: View<'_>) {
        let heads = self.n_head_kv * self.group;
        let tokens = self.positions.tokens();
        let cache = |width: usize| {
            self.positions.capacity()
                * self.n_head_kv
                * self.kv_type.row_bytes(width as u64) as usize
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
        assert!(self.group > 0, "no queries");
        assert!(
            self.keys.len() >= cache(self.key_width)
                && self.values.len() >= cache(self.value_row_width),
            "cached rows"
        );
        assert!(
            self.queries.words() >= tokens * heads * self.key_width,
            "queries"
        );
        assert!(
            out.words() >= tokens * heads * self.value_width,
            "results of attention"
        );
        assert!(
            self.window != Some(0) && self.softcap != Some(0.0),
            "a window or a cap of 0"
        );
        assert!(
            self.sinks.is_none_or(|s| s.words() >= heads),
            "a sink per head"
        );
    }

    /// Returns the first position that the token at a position attends to.
    fn first_seen(&self, position: usize) -> usize {
        self.window.map_or(0, |window| match self.window_kind {
            WindowKind::Sliding => (position + 1).saturating_sub(window),
            WindowKind::Chunked => position / window * window,
        })
    }

    /// Returns the window as the kernels take it.
    pub(super) fn window_arg(&self) -> Arg {
        let window = i32::try_from(self.window.unwrap_or(0)).unwrap_or(i32::MAX);
        Arg::Int(match self.window_kind {
            WindowKind::Sliding => window,
            WindowKind::Chunked => -window,
        })
    }

    /// Returns the cap as the kernels take it.
    pub(super) fn cap_arg(&self) -> Arg {
        Arg::Float(self.softcap.unwrap_or(0.0))
    }

    /// Returns the number of chunks that a token attends to.
    ///
    /// With `one_token_each` of all texts, this is the most at any position of the token's last chunk,
    /// so that recorded launches serve for all of them.
    fn chunks(&self, token: usize, one_token_each: bool) -> usize {
        let position = self.positions.of(token);
        let earliest = if one_token_each {
            position / CHUNK * CHUNK
        } else {
            position
        };
        position / CHUNK + 1 - self.first_seen(earliest) / CHUNK
    }

    /// Returns the number of pieces of `len` positions from the first that the first of consecutive
    /// tokens attends to, to the last of the last token.
    pub(super) fn pieces(&self, len: usize, tokens: &Range<usize>) -> usize {
        let (first, last) = (
            self.positions.of(tokens.start),
            self.positions.of(tokens.end - 1),
        );
        (last + 1).div_ceil(len) - self.first_seen(first) / len
    }

    /// Returns how many of these tokens fit into the buffers at once, and the most pieces of one of
    /// them; `pieces` has those of the tokens from the first to another.
    pub(super) fn fitting(
        &self,
        buffers: &AttentionBuffers,
        tokens: &Range<usize>,
        mut pieces: impl FnMut(usize) -> usize,
    ) -> (usize, usize) {
        let heads = self.n_head_kv * self.group;
        let room = buffers.query_chunks(self.value_width);
        let (mut fitting, mut most) = (0, 0);
        for token in tokens.clone() {
            let wanted = most.max(pieces(token));
            if wanted * (fitting + 1) * heads > room {
                break;
            }
            (fitting, most) = (fitting + 1, wanted);
        }
        let position = self.positions.of(tokens.start);
        assert!(
            fitting > 0,
            "too small buffers for attention to {} positions",
            position + 1
        );
        (fitting, most)
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
    /// Computes attention; `out` is `[tokens, n_head_kv * group, value_width]`, and `quants` get
    /// its quantized form, a row per token.
    ///
    /// For [`PROMPT_TOKENS`](super::PROMPT_TOKENS) tokens of one text and more, 16-bit floats are
    /// multiplied, unless the keys are too wide for that.
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
        a.check(out);
        let tokens = a.positions.tokens();
        let quants = quants.map(|quants| {
            assert!(
                a.value_width.is_multiple_of(32),
                "values of {} to quantize",
                a.value_width
            );
            let _ = quants.take_shape(tokens, a.n_head_kv * a.group * a.value_width);
            &*quants
        });
        // Texts with few tokens each are taken together.
        let mut done = 0;
        for run in a.positions.runs() {
            if let Some(kernel) = prompt_kernel(a, run.len()) {
                self.attend_few(a, done..run.start, buffers, out, quants)?;
                self.attend_prompt(kernel, a, run.clone(), buffers, out, quants)?;
                done = run.end;
            }
        }
        self.attend_few(a, done..tokens, buffers, out, quants)
    }

    /// Computes attention of some of the tokens, one by one.
    fn attend_few(
        &self,
        a: &Attend<'_>,
        tokens: Range<usize>,
        buffers: &AttentionBuffers,
        out: View<'_>,
        quants: Option<&Quants>,
    ) -> Result<(), CudaError> {
        let heads = a.n_head_kv * a.group;
        let kernel = match a.kv_type {
            KvType::F32 => "attend_f32",
            KvType::F16 => "attend_f16",
            KvType::Q8_0 => "attend_q8",
        };
        let one_token_each = a.positions.runs().all(|run| run.len() == 1);
        let mut first = tokens.start;
        while first < tokens.end {
            let rest = first..tokens.end;
            let (n, chunks) = a.fitting(buffers, &rest, |token| a.chunks(token, one_token_each));
            let queries = a
                .queries
                .floats(first * heads * a.key_width..(first + n) * heads * a.key_width);
            let to = out.floats(first * heads * a.value_width..(first + n) * heads * a.value_width);
            let (mixed, largest, sums) = (
                buffers.mixed.view(),
                buffers.largest.view(),
                buffers.sums.view(),
            );
            // The kernel writes the final result where there is only one chunk.
            let whole = chunks == 1;
            let [q, quant_scale, quant_sums] = quant_args(a, quants.filter(|_| whole), first);
            let [positions, begins, tables, page_bits] = a.positions.part(first..first + n).args();
            let args = [
                queries.arg(),
                a.keys.aligned().arg(),
                a.values.aligned().arg(),
                int(a.n_head_kv),
                int(a.group),
                int(a.key_width),
                int(a.value_row_width),
                int(a.value_width),
                Arg::Float(a.scale),
                a.cap_arg(),
                positions,
                begins,
                tables,
                page_bits,
                a.window_arg(),
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
                few(n),
            ];
            self.launch(kernel, grid, 128, &args)?;
            if !whole {
                self.join(a, buffers, first..first + n, chunks, to, quants)?;
            }
            first += n;
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
