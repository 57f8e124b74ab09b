//! The buffers of forward passes on a GPU, all allocated when a model is loaded.

mod compressed;

use super::Most;
use super::full::most_texts;
use super::router::ROW_ALIGNMENT;
use super::stream_buffers::{StreamBuffers, StreamSizes};
use crate::layers::pages::PAGE;
use crate::layers::places::Places;
use crate::layers::rope::tables;
use std::sync::Arc;
use tier_plan_cuda::ops::{AttentionBuffers, BatchPositions, CacheSize, Choice, Quants};
use tier_plan_cuda::{Buffer, CudaError, Device};
use tier_plan_formats::model::spec::{
    BlockIndex, DeltaInput, Ffn, GqaSpec, KvUp, Mixer, MlaSpec, ModelSpec, OutputGate, Projection,
};
use tier_plan_formats::placement::TierIdx;

/// Most values of attention's workspace, unless one token needs more: 64 MiB.
const MAX_ATTEND_VALUES: usize = 16 << 20;

/// Most logits that are computed at once, unless one token has more: 16 MiB.
const MAX_LOGITS: usize = 4 << 20;

/// Most values in the space of the latents that are computed at once: 16 MiB. Fewer in tests, so
/// that batches have several parts.
const MAX_LATENT_VALUES: usize = if cfg!(test) { 512 } else { 4 << 20 };

/// Most ratings that are held at once, unless one token has more: 16 MiB.
const MAX_RATINGS: usize = if cfg!(test) { 1024 } else { 4 << 20 };

/// Most jobs per launch.
const MAX_JOBS: usize = 65_535;

/// Granularity of allocations in bytes.
const ALLOCATION_UNIT: usize = 256;

/// Number of values of each buffer: the most that any part on this GPU needs.
#[derive(Debug, Clone, Default)]
pub(crate) struct BufferSizes {
    x: usize,
    /// Of several residual streams.
    streams: StreamSizes,
    rows: usize,
    hidden: usize,
    n_used: usize,
    n_expert: usize,
    /// Largest width of latent experts' rows.
    latent: usize,
    raw: usize,
    q: usize,
    k: usize,
    v: usize,
    gate: usize,
    mixed: usize,
    /// Sums of routed experts under a norm of their own.
    sums: usize,
    inner: usize,
    ffn: usize,
    low: usize,
    nope: usize,
    latents: usize,
    absorbed: usize,
    index_weights: usize,
    index_q: usize,
    index_k: usize,
    ratings: usize,
    chosen: usize,
    ngrams: usize,
    /// Tokens' inputs for every layer.
    inputs: usize,
    /// What those of some rows are made of.
    input_rows: usize,
    logits: usize,
    /// Words of the tokens' positions and pages.
    positions: usize,
    /// Choices in all layers for the tokens of a step that stays on the GPU.
    record: usize,
    attend: usize,
    /// Smallest width of attention's values.
    attend_width: usize,
    turns: Vec<usize>,
}

/// Returns the most tokens that latent attention takes at once.
pub(super) fn part_tokens(spec: &MlaSpec) -> usize {
    (MAX_LATENT_VALUES / (spec.n_head * spec.kv_rank)).clamp(1, (MAX_JOBS / spec.n_head).max(1))
}

/// Returns the most rows whose logits are computed at once.
pub(super) fn logit_rows(n_vocab: usize, rows: usize) -> usize {
    (MAX_LOGITS / n_vocab.max(1)).clamp(1, rows.max(1))
}

/// Returns the values that the matrices before an attention make of a row.
pub(super) fn projected_width(a: &GqaSpec) -> usize {
    let gates = match &a.gate {
        Some(OutputGate::Separate { linear, .. }) => linear.n_out,
        Some(OutputGate::WithQueries) | None => 0,
    };
    let values = if a.keys_are_values() { 0 } else { a.v.n_out };
    a.q.n_out + a.k.n_out + values + gates
}

impl BufferSizes {
    /// Computes the sizes for the parts of `spec` on the GPU of a tier.
    pub(super) fn new(spec: &ModelSpec, places: &Places, tier: TierIdx, most: Most) -> Self {
        let Most {
            batch,
            rows,
            context,
            ..
        } = most;
        let hidden = spec.hidden;
        let mut s = Self {
            x: batch * spec.residual_width(),
            streams: StreamSizes::new(spec, places, tier, most),
            rows,
            hidden,
            n_used: 1,
            // There may be more texts than planned, as long as there are pages.
            positions: BatchPositions::words(rows, rows, context, PAGE),
            attend_width: usize::MAX,
            ..Self::default()
        };
        s.turns = tables(spec)
            .0
            .into_iter()
            .map(|rope| rope.dims / 2 * 2 * rows)
            .collect();
        let here = |place| place == Some(tier);
        for (layer, at) in spec.layers.iter().zip(&places.layers) {
            if here(at.mixer) {
                if layer.residual.ngram.is_some() {
                    s.ngrams = rows * hidden;
                }
                match &layer.mixer {
                    Mixer::Gqa(a) if at.host_kv => s.projections(a),
                    mixer => s.mixer(mixer, context),
                }
                match &layer.mixer {
                    Mixer::Mla(a) => s.choices(a, batch, context),
                    Mixer::Gqa(a) => {
                        let index = a.index.iter();
                        index.for_each(|index| s.block_choices(index, context));
                    }
                    _ => {}
                }
            }
            match &layer.ffn {
                Ffn::Dense(ffn) if here(at.ffn) => s.ffn = s.ffn.max(ffn.up.n_out),
                Ffn::Moe(moe) => {
                    if here(at.ffn) {
                        if moe.output_norm.is_some() {
                            s.sums = rows * hidden;
                        }
                        s.record += 2 * moe.n_used * most_texts(rows);
                        (s.n_expert, s.n_used) =
                            (s.n_expert.max(moe.n_expert), s.n_used.max(moe.n_used));
                        if moe.latent.is_some() {
                            s.latent = s.latent.max(moe.expert_width());
                        }
                    }
                    if let Some(shared) = moe.shared.filter(|_| here(at.shared)) {
                        s.ffn = s.ffn.max(shared.ffn.up.n_out);
                    }
                }
                Ffn::Dense(_) | Ffn::None => {}
            }
        }
        if let Some(own) = spec.token_inputs.filter(|_| here(places.head)) {
            let width = own.proj.n_out;
            (s.inputs, s.input_rows) = (batch * width, rows * width);
            s.ffn = s.ffn.max(own.dim);
        }
        if here(places.head) {
            s.logits = logit_rows(spec.n_vocab, rows) * spec.n_vocab;
        }
        s
    }

    fn mixer(&mut self, mixer: &Mixer, context: usize) {
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
    fn projections(&mut self, a: &GqaSpec) {
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
    fn choices(&mut self, a: &MlaSpec, batch: usize, context: usize) {
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
    fn block_choices(&mut self, index: &BlockIndex, context: usize) {
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
    fn rate(&mut self, each: usize) {
        let all = self.rows.saturating_mul(each);
        self.ratings = self.ratings.max(all.min(each.max(MAX_RATINGS)));
    }

    fn quants(values: usize) -> [usize; 3] {
        let values = values.next_multiple_of(32);
        [values, values / 8, values / 4]
    }

    fn answer(&self) -> usize {
        let choices = 2 * self.rows * self.n_used;
        self.rows * self.hidden + choices + ROW_ALIGNMENT + self.rows * self.latent
    }

    fn quants_in(&self) -> usize {
        self.rows * self.hidden.max(self.latent)
    }

    fn inner(&self) -> usize {
        let most = self.rows * self.inner.max(self.ffn).max(self.latent);
        most.max(self.streams.quantized())
    }

    /// Returns the bytes of all buffers.
    pub(crate) fn bytes(&self) -> u64 {
        let (rows, hidden) = (self.rows, self.hidden);
        let floats = [
            self.x,
            rows * hidden,
            self.answer(),
            rows * self.n_expert,
            rows,
            rows,
            self.positions,
            self.raw,
            self.q,
            self.k,
            self.v,
            self.gate,
            self.mixed,
            self.sums,
            rows * self.ffn,
            rows * self.ffn,
            self.low,
            self.nope,
            self.latents,
            self.absorbed,
            self.index_weights,
            self.index_q,
            self.index_k,
            self.ratings,
            self.chosen,
            self.ngrams,
            self.inputs,
            self.input_rows,
            self.input_rows,
            self.logits,
            self.record,
        ];
        let floats = floats
            .into_iter()
            .chain(self.streams.all())
            .chain(self.turns.iter().copied())
            .map(|values| 4 * values);
        let quants = Self::quants(self.quants_in())
            .into_iter()
            .chain(Self::quants(self.inner()));
        let attend = AttentionBuffers::bytes(self.attend, self.attend_width.min(self.attend));
        let buffers = floats.chain(quants).chain(attend);
        buffers
            .map(|bytes| bytes.max(1).next_multiple_of(ALLOCATION_UNIT) as u64)
            .sum()
    }
}

/// The buffers. Buffers without a comment are `[rows, width]` of the layer's values of that name.
pub(super) struct GpuBuffers {
    /// `[batch, streams, hidden]` hidden state.
    pub(super) x: Buffer,
    pub(super) streams: StreamBuffers,
    /// `[rows, hidden]` result of a part, to be added to the hidden state, or values of n-grams.
    pub(super) out: Buffer,
    /// `[n, hidden]` normalized state of `n` rows, then `[n, n_used]` chosen experts, then their
    /// weights and what latent experts read, so that the CPU reads all of it at once.
    pub(super) answer: Buffer,
    pub(super) router_logits: Buffer,
    /// `[rows]` tokens.
    pub(super) ids: Buffer,
    /// `[rows]` factor on the queries of each token.
    pub(super) factors: Buffer,
    /// Positions of the rows, and the pages of their texts.
    pub(super) positions: BatchPositions,
    /// Results that are still to be reordered.
    pub(super) raw: Buffer,
    pub(super) q: Buffer,
    pub(super) k: Buffer,
    pub(super) v: Buffer,
    pub(super) gate: Buffer,
    pub(super) mixed: Buffer,
    /// `[rows, hidden]` sums of routed experts under a norm of their own.
    pub(super) sums: Buffer,
    pub(super) ffn_gate: Buffer,
    pub(super) ffn_up: Buffer,
    pub(super) low: Buffer,
    pub(super) nope: Buffer,
    pub(super) latents: Buffer,
    /// `[n_head, nope, kv_rank]` dequantized projections of a layer from latents to keys.
    pub(super) absorbed: Buffer,
    /// `[rows, heads of an indexer]` weights of their ratings.
    pub(super) index_weights: Buffer,
    /// Queries of an index of blocks.
    pub(super) index_q: Buffer,
    /// Keys of an index of blocks, or gates on the keys of an indexer.
    pub(super) index_k: Buffer,
    /// `[tokens, lists, positions or blocks]` ratings of an indexer.
    pub(super) ratings: Buffer,
    /// `[batch, lists, kept]` positions or blocks that tokens attend to, as the last indexer chose
    /// them.
    pub(super) chosen: Buffer,
    /// `[rows, hidden]` what tokens' n-grams are in their table.
    pub(super) ngrams: Buffer,
    /// `[layers, batch, dim]` what tokens have as inputs for every layer.
    pub(super) inputs: Buffer,
    /// `[rows, layers, dim]` what tokens' inputs are in their table.
    pub(super) input_rows: Buffer,
    /// `[rows, layers, dim]` products of embeddings with the projection of inputs.
    pub(super) input_products: Buffer,
    pub(super) logits: Buffer,
    /// Routers' choices for tokens that stay on the GPU: by layer, the experts of all tokens and then
    /// their weights.
    pub(super) record: Buffer,
    /// Rotations by rope table, `[rows, pairs]` of cosine and sine.
    pub(super) turns: Vec<Buffer>,
    /// Quantized form of the normalized state, or of what latent experts read.
    pub(super) quants: Quants,
    /// Quantized input of a part's last product.
    pub(super) inner: Quants,
    pub(super) attend: AttentionBuffers,
}

impl GpuBuffers {
    pub(super) fn new(
        device: &Arc<dyn Device>,
        s: &BufferSizes,
        cache: CacheSize,
    ) -> Result<Self, CudaError> {
        let floats = |values: usize| Buffer::new_f32(device, values);
        let (rows, hidden) = (s.rows, s.hidden);
        Ok(Self {
            x: floats(s.x)?,
            streams: StreamBuffers::new(device, &s.streams)?,
            out: floats(rows * hidden)?,
            answer: floats(s.answer())?,
            router_logits: floats(rows * s.n_expert)?,
            ids: floats(rows)?,
            factors: floats(rows)?,
            positions: BatchPositions::new(device, s.positions, cache)?,
            raw: floats(s.raw)?,
            q: floats(s.q)?,
            k: floats(s.k)?,
            v: floats(s.v)?,
            gate: floats(s.gate)?,
            mixed: floats(s.mixed)?,
            sums: floats(s.sums)?,
            ffn_gate: floats(rows * s.ffn)?,
            ffn_up: floats(rows * s.ffn)?,
            low: floats(s.low)?,
            nope: floats(s.nope)?,
            latents: floats(s.latents)?,
            absorbed: floats(s.absorbed)?,
            index_weights: floats(s.index_weights)?,
            index_q: floats(s.index_q)?,
            index_k: floats(s.index_k)?,
            ratings: floats(s.ratings)?,
            chosen: floats(s.chosen)?,
            ngrams: floats(s.ngrams)?,
            inputs: floats(s.inputs)?,
            input_rows: floats(s.input_rows)?,
            input_products: floats(s.input_rows)?,
            logits: floats(s.logits)?,
            record: floats(s.record)?,
            turns: s
                .turns
                .iter()
                .map(|values| floats(*values))
                .collect::<Result<_, _>>()?,
            quants: Quants::new(device, s.quants_in().next_multiple_of(32))?,
            inner: Quants::new(device, s.inner().next_multiple_of(32))?,
            attend: AttentionBuffers::new(device, s.attend, s.attend_width.min(s.attend))?,
        })
    }
}
