//! The buffers of forward passes on a GPU, all allocated when a model is loaded.

mod compressed;
mod mixers;

pub(super) use mixers::part_tokens;

use super::Most;
use super::full::most_texts;
use super::router::ROW_ALIGNMENT;
use super::stream_buffers::{StreamBuffers, StreamSizes};
use crate::layers::pages::PAGE;
use crate::layers::places::Places;
use crate::layers::rope::tables;
use std::sync::Arc;
use tier_plan_cuda::ops::{AttentionBuffers, BatchPositions, CacheSize, Quants};
use tier_plan_cuda::{Buffer, CudaError, Device};
use tier_plan_formats::model::spec::{Ffn, Mixer, ModelSpec};
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

/// Returns the most rows whose logits are computed at once.
pub(super) fn logit_rows(n_vocab: usize, rows: usize) -> usize {
    (MAX_LOGITS / n_vocab.max(1)).clamp(1, rows.max(1))
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
