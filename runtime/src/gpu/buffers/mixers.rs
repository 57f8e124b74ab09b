//! What mixers take of the buffers.

use super::{BufferSizes, MAX_ATTEND_VALUES, MAX_JOBS, MAX_LATENT_VALUES, MAX_RATINGS};
use tier_plan_cuda::ops::{AttentionBuffers, Choice};
use tier_plan_formats::model::spec::{
    BlockIndex, DeltaInput, GqaSpec, KvUp, Mixer, MlaSpec, OutputGate, Projection,
};

/// Returns the most tokens that latent attention takes at once.
pub(in crate::gpu) fn part_tokens(spec: &MlaSpec) -> usize {
    (MAX_LATENT_VALUES / (spec.n_head * spec.kv_rank)).clamp(1, (MAX_JOBS / spec.n_head).max(1))
}

/// Returns the values that the matrices before an attention make of a row.
pub(super) fn projected_width(a: &GqaSpec) -> usize {
    let values = if a.keys_are_values() { 0 } else { a.v.n_out };
    a.q.n_out + a.k.n_out + values + a.separate_gates()
}

impl BufferSizes {
    pub(super) fn mixer(&mut self, mixer: &Mixer, context: usize) {
        let rows = self.rows;
        let attend = |tokens: usize, heads: usize, width: usize| {
            let one = AttentionBuffers::values(1, heads, context, width);
            AttentionBuffers::values(tokens, heads, context, width).min(one.max(MAX_ATTEND_VALUES))
        };
        let (wanted, width) = match mixer {
            Mixer::Gqa(a) => {
                if a.gated() {
                    self.raw = self.raw.max(rows * a.q.n_out);
                    self.gate = self.gate.max(rows * a.o.n_in);
                }
                if let Some(OutputGate::Separate { linear, .. }) = &a.gate {
                    self.gate = self.gate.max(rows * linear.n_out);
                }
                self.q = self.q.max(rows * a.n_head * a.key_dim);
                self.k = self.k.max(rows * a.k.n_out);
                self.v = self.v.max(rows * a.v.n_out);
                self.mixed = self.mixed.max(rows * a.o.n_in);
                self.inner = self.inner.max(a.o.n_in);
                (attend(rows, a.n_head, a.value_dim), a.value_dim)
            }
            Mixer::Mla(a) => {
                let low = a.q_down.map_or(0, |low| low.down.n_out);
                let part = part_tokens(a).min(rows);
                if let Some(OutputGate::Separate { linear, .. }) = &a.gate {
                    self.gate = self.gate.max(rows * linear.n_out);
                }
                // One head more, as views of the rotated values begin at an offset.
                self.q = self.q.max(rows * a.q.n_out + a.nope_dim + a.shared_dim);
                self.k = self.k.max(rows * a.kv_down.n_out + a.kv_down.n_out);
                self.mixed = self.mixed.max(rows * a.o.n_in);
                self.low = self.low.max(rows * low);
                self.inner = self.inner.max(low).max(a.o.n_in);
                self.nope = self.nope.max(part * a.n_head * a.nope_dim);
                self.latents = self.latents.max(part * a.n_head * a.kv_rank);
                self.raw = self.raw.max(part * a.n_head * (a.kv_rank + a.shared_dim));
                // In a part, each head of a token is a row.
                self.inner = self
                    .inner
                    .max((part * a.n_head * a.nope_dim.max(a.kv_rank)).div_ceil(rows));
                if let KvUp::Fused(_) = a.kv_up {
                    self.absorbed = self.absorbed.max(a.n_head * a.nope_dim * a.kv_rank);
                }
                (attend(part, a.n_head, a.kv_rank), a.kv_rank)
            }
            Mixer::Delta(_) | Mixer::ShortConv(_) | Mixer::Kda(_) | Mixer::Mamba(_) => {
                return self.recurrent(mixer);
            }
            Mixer::Compressed(a) => self.compressed(a, context),
            // It has no parts.
            Mixer::None => return,
        };
        self.attend = self.attend.max(wanted);
        self.attend_width = self.attend_width.min(width);
    }

    /// Grows to what the matrices of attention take whose KV cache is in main memory.
    pub(super) fn projections(&mut self, a: &GqaSpec) {
        let rows = self.rows;
        self.raw = self.raw.max(rows * projected_width(a));
        self.mixed = self.mixed.max(rows * a.o.n_in);
        self.inner = self.inner.max(a.o.n_in);
    }

    /// Grows to what a mixer without attention takes.
    fn recurrent(&mut self, mixer: &Mixer) {
        let rows = self.rows;
        match mixer {
            Mixer::Delta(d) => {
                match d.input {
                    DeltaInput::Split { qkv, gate } => {
                        self.raw = self.raw.max(rows * qkv.n_out);
                        self.gate = self.gate.max(rows * gate.n_out);
                    }
                    DeltaInput::ByKeyHead(fused) => self.raw = self.raw.max(rows * fused.n_out),
                }
                self.q = self.q.max(rows * d.channels());
                self.k = self.k.max(2 * rows * d.n_value_head);
                self.v = self.v.max(2 * rows * d.n_value_head);
                self.mixed = self.mixed.max(rows * d.out.n_in);
                self.inner = self.inner.max(d.out.n_in);
            }
            Mixer::ShortConv(c) => {
                self.raw = self.raw.max(rows * c.input.n_out);
                self.mixed = self.mixed.max(rows * c.out.n_in);
                self.inner = self.inner.max(c.out.n_in);
            }
            Mixer::Kda(k) => {
                let width = k.width();
                let rank = |p: &Projection| p.second.map_or(0, |second| second.n_in);
                let ranks = [&k.decay, &k.gate].map(rank);
                self.raw = self.raw.max(3 * rows * width);
                self.q = self.q.max(3 * rows * width);
                self.k = self.k.max(rows * k.n_head);
                self.v = self.v.max(2 * rows * k.n_head);
                self.gate = self.gate.max(2 * rows * width);
                self.low = self.low.max(rows * (ranks[0] + ranks[1]));
                self.mixed = self.mixed.max(rows * width);
                self.inner = self.inner.max(width).max(ranks[0]).max(ranks[1]);
            }
            Mixer::Mamba(m) => {
                self.raw = self.raw.max(rows * m.input.n_out);
                self.q = self.q.max(rows * m.channels());
                self.v = self.v.max(2 * rows * m.n_head);
                self.mixed = self.mixed.max(rows * m.out.n_in);
                self.inner = self.inner.max(m.out.n_in);
            }
            Mixer::Gqa(_) | Mixer::Mla(_) | Mixer::Compressed(_) | Mixer::None => {}
        }
    }

    /// Grows to what a layer's tokens choose that don't attend to all positions.
    pub(super) fn choices(&mut self, a: &MlaSpec, batch: usize, context: usize) {
        let rows = self.rows;
        let choice = a.reach.selection().map(Choice::from);
        let choice = choice.filter(|choice| choice.may_leave_out(context));
        if let Some(choice) = choice {
            self.chosen = self.chosen.max(batch.saturating_mul(choice.kept));
        }
        let Some(indexer) = a.reach.indexer() else {
            return;
        };
        self.v = self.v.max(rows * indexer.key_dim);
        if indexer.pool.is_some() {
            self.index_k = self.index_k.max(rows * indexer.key_dim);
        }
        if let Some(choice) = choice {
            self.rate(choice.rating_words(context));
            self.raw = self.raw.max(rows * indexer.q.n_out);
            self.index_weights = self.index_weights.max(rows * indexer.n_head);
        }
    }

    /// Grows to the blocks that a layer's tokens choose, if they may.
    pub(super) fn block_choices(&mut self, index: &BlockIndex, context: usize) {
        let (rows, choice) = (self.rows, Choice::from(index));
        self.index_k = self.index_k.max(rows * index.k.n_out);
        if choice.may_leave_out(context) {
            self.index_q = self.index_q.max(rows * index.q.n_out);
            let lists = index.lists();
            self.rate(choice.rating_words(context).saturating_mul(lists));
            let chosen = rows.saturating_mul(lists * choice.kept);
            self.chosen = self.chosen.max(chosen);
        }
    }

    /// Grows to ratings of tokens that have up to `each`.
    pub(super) fn rate(&mut self, each: usize) {
        let all = self.rows.saturating_mul(each);
        self.ratings = self.ratings.max(all.min(each.max(MAX_RATINGS)));
    }
}
