//! Attention to chosen blocks of positions of the KV cache.

use super::attention::{Attend, AttentionBuffers, CHUNK, HEADS};
use super::choice::Choice;
use super::{blocks, few, int, null_or};
use crate::device::{Arg, View};
use crate::{CudaError, Ops};
use std::ops::Range;
use tier_plan_formats::model::kv::KvType;

/// The blocks of positions that tokens attend to.
#[derive(Clone, Copy)]
pub struct ChosenBlocks<'a> {
    /// `[tokens, per_token, kept]` blocks of each token's text. Those of tokens that see no more than
    /// `kept` are not read: they attend to all.
    pub lists: View<'a>,
    /// Lists of a token: one for all heads, or one per head of keys and values.
    pub per_token: usize,
    /// What a token chose.
    pub choice: Choice,
}

impl Ops {
    /// Computes attention of tokens to the blocks that were chosen for them; `out` is `[tokens,
    /// n_head_kv * group, value_width]`.
    ///
    /// # Panics
    /// When there is a window, or for the reasons of [`attend`](Self::attend).
    pub fn attend_chosen(
        &self,
        a: &Attend<'_>,
        chosen: ChosenBlocks<'_>,
        buffers: &AttentionBuffers,
        out: View<'_>,
    ) -> Result<(), CudaError> {
        a.check(out);
        chosen.choice.check();
        let (tokens, most) = (a.positions.tokens(), chosen.choice.most());
        let plain = a.window.is_none() && a.softcap.is_none();
        let lists = chosen.per_token;
        assert!(
            plain && (lists == 1 || lists == a.n_head_kv),
            "{lists} lists of a token"
        );
        let per_token = lists * chosen.choice.kept;
        assert!(
            chosen.lists.words() >= tokens * per_token,
            "{tokens} x {per_token} blocks"
        );
        let alone = a.positions.runs().all(|run| run.len() == 1);
        // The most at any position of a token's chunk, as in `Attend::chunks`.
        let chunks = |token: usize| {
            let seen = a.positions.of(token) + 1;
            let seen = if alone {
                seen.next_multiple_of(CHUNK)
            } else {
                seen
            };
            seen.min(most).div_ceil(CHUNK)
        };
        let mut first = 0;
        while first < tokens {
            let (n, chunks) = a.fitting(buffers, &(first..tokens), chunks);
            self.attend_lists(a, chosen, first..first + n, chunks, (buffers, out))?;
            first += n;
        }
        Ok(())
    }

    /// Computes attention of some of the tokens, whose lists have up to so many chunks.
    fn attend_lists(
        &self,
        a: &Attend<'_>,
        chosen: ChosenBlocks<'_>,
        tokens: Range<usize>,
        chunks: usize,
        (buffers, out): (&AttentionBuffers, View<'_>),
    ) -> Result<(), CudaError> {
        let (heads, n) = (a.n_head_kv * a.group, tokens.len());
        let of_tokens =
            |view: View<'_>, each: usize| view.floats(tokens.start * each..tokens.end * each).arg();
        let to =
            out.floats(tokens.start * heads * a.value_width..tokens.end * heads * a.value_width);
        let kernel = match a.kv_type {
            KvType::F32 => "attend_chosen_f32",
            KvType::F16 => "attend_chosen_f16",
            KvType::Q8_0 => "attend_chosen_q8",
        };
        // The kernel writes the final result where there is only one chunk.
        let whole = chunks == 1;
        let [mixed, largest, sums] =
            [&buffers.mixed, &buffers.largest, &buffers.sums].map(|b| b.view().arg());
        let [positions, begins, tables, page_bits] = a.positions.part(tokens.clone()).args();
        let [block, open, kept] = chosen.choice.args();
        let args = [
            of_tokens(a.queries, heads * a.key_width),
            a.keys.aligned().arg(),
            a.values.aligned().arg(),
            int(a.n_head_kv),
            int(a.group),
            int(a.key_width),
            int(a.value_row_width),
            int(a.value_width),
            Arg::Float(a.scale),
            positions,
            begins,
            tables,
            page_bits,
            of_tokens(chosen.lists, chosen.per_token * chosen.choice.kept),
            int(chosen.per_token),
            block,
            open,
            kept,
            mixed,
            largest,
            sums,
            null_or(a.sinks),
            null_or(whole.then_some(to)),
        ];
        let grid = [
            blocks(chunks, 1),
            few(a.n_head_kv * a.group.div_ceil(HEADS)),
            few(n),
        ];
        self.launch(kernel, grid, 128, &args)?;
        if whole {
            return Ok(());
        }
        self.join(a, buffers, tokens, chunks, to, None)
    }
}
