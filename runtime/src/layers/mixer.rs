//! Mixers, which mix tokens: attention, a delta net or a short convolution. Each kind has one file, with its state of
//! past tokens, its buffers and its computation.

use super::cpu_context::CpuContext;
use super::delta::{DeltaScratch, DeltaState};
use super::gqa::GqaScratch;
use super::indexer::Chosen;
use super::kda::KdaScratch;
use super::kv_rows::{KeyValues, LatentRows, RowStore};
use super::mla::MlaScratch;
use super::pages::{PageIdx, StateIdx};
use super::rope::RopeTable;
use super::short_conv::ShortConvScratch;
use super::weights::DenseWeights;
use super::{delta, gqa, kda, mla, short_conv};
use crate::tiers::nodes::Pages;
use std::ops::Range;
use tier_plan_formats::model::kv::{KvRows, KvType};
use tier_plan_formats::model::shape::mixer_rows;
use tier_plan_formats::model::spec::Mixer;
use tier_plan_kernels::ActView;

/// What one layer's mixer keeps of all texts: KV cache or recurrent states.
pub(crate) enum LayerCache {
    Gqa(KeyValues),
    Mla(LatentRows),
    /// One state per text, then those of checkpoints.
    Delta(Vec<DeltaState>),
    /// The cache is in a GPU's memory.
    OnGpu {
        /// Bytes in the GPU's memory.
        bytes: u64,
        /// Whether a text can go back to fewer tokens.
        rewinds: bool,
    },
}

impl LayerCache {
    /// Makes an empty cache for texts with `positions` positions and `n_states` recurrent states in
    /// all.
    pub(crate) fn new(mixer: &Mixer, kv_type: KvType, positions: usize, n_states: usize) -> Self {
        match mixer {
            Mixer::Gqa(a) => {
                // A layer that shares another's keys and values has none of its own.
                let n_head = if a.shared_kv.is_some() {
                    0
                } else {
                    a.n_head_kv
                };
                let rows = |width| RowStore::new(kv_type, n_head, positions, width);
                Self::Gqa(KeyValues {
                    keys: rows(a.key_dim),
                    values: rows(a.value_dim),
                })
            }
            Mixer::Mla(a) => {
                let rows = |width| RowStore::new(kv_type, 1, positions, width);
                Self::Mla(LatentRows {
                    latents: rows(a.kv_rank + a.shared_dim),
                    index_keys: a.reach.indexer().map(|indexer| rows(indexer.key_dim)),
                })
            }
            Mixer::Kda(k) => Self::Delta((0..n_states).map(|_| kda::new_state(k)).collect()),
            Mixer::Delta(d) => Self::Delta((0..n_states).map(|_| DeltaState::new(d)).collect()),
            Mixer::ShortConv(c) => {
                let state = |_| DeltaState::of_inputs(c.state_values());
                Self::Delta((0..n_states).map(state).collect())
            }
        }
    }

    /// Makes the stand-in of a cache in a GPU's memory, for one text of up to `context` tokens.
    pub(crate) fn on_gpu(mixer: &Mixer, kv_type: KvType, context: usize) -> Self {
        let bytes = |rows: &KvRows| kv_type.row_bytes(rows.width).saturating_mul(rows.per_token);
        let token: u64 = mixer_rows(mixer).iter().map(bytes).sum();
        let bytes = token
            .saturating_mul(context as u64)
            .saturating_add(mixer.state_bytes());
        Self::OnGpu {
            bytes,
            rewinds: mixer.state_bytes() == 0,
        }
    }

    /// Returns the bytes of the cache.
    pub(crate) fn bytes(&self) -> u64 {
        match self {
            Self::OnGpu { bytes, .. } => *bytes,
            Self::Gqa(cache) => cache.keys.bytes() + cache.values.bytes(),
            Self::Mla(rows) => rows.bytes(),
            Self::Delta(states) => states.iter().map(DeltaState::bytes).sum(),
        }
    }

    /// Moves its memory to where `pages` says.
    pub(crate) fn move_to(&self, pages: &Pages) -> std::io::Result<()> {
        match self {
            Self::Gqa(cache) => cache
                .keys
                .move_to(pages)
                .and_then(|()| cache.values.move_to(pages)),
            Self::Mla(rows) => rows.move_to(pages),
            Self::Delta(states) => states.iter().try_for_each(|state| state.move_to(pages)),
            Self::OnGpu { .. } => Ok(()),
        }
    }

    /// Returns whether a text can go back to fewer tokens. Otherwise it can only go back to none.
    pub(crate) fn can_rewind(&self) -> bool {
        match self {
            Self::Gqa(_) | Self::Mla(_) => true,
            Self::Delta(_) => false,
            Self::OnGpu { rewinds, .. } => *rewinds,
        }
    }

    /// Has a recurrent state forget all tokens.
    pub(crate) fn reset(&mut self, state: StateIdx) {
        match self {
            // Rows are written before they are read, and a GPU ignores a recurrent state at
            // position 0.
            Self::Gqa(_) | Self::Mla(_) | Self::OnGpu { .. } => {}
            Self::Delta(states) => states[state as usize].reset(),
        }
    }

    /// Copies a recurrent state to another.
    pub(crate) fn copy_state(&mut self, from: StateIdx, to: StateIdx) {
        if let Self::Delta(states) = self {
            delta::copy_state(states, from, to);
        }
    }

    /// Returns the bytes of a full page, and of a recurrent state.
    pub(crate) fn saved_bytes(&self) -> (usize, usize) {
        match self {
            Self::Gqa(cache) => (cache.keys.page_bytes() + cache.values.page_bytes(), 0),
            Self::Mla(rows) => (rows.page_bytes(), 0),
            Self::Delta(states) => (0, states.first().map_or(0, |s| s.bytes() as usize)),
            Self::OnGpu { .. } => (0, 0),
        }
    }

    /// Appends a full page to `out`.
    pub(crate) fn save_page(&self, page: PageIdx, out: &mut Vec<u8>) {
        match self {
            Self::Gqa(cache) => {
                cache.keys.save_page(page, out);
                cache.values.save_page(page, out);
            }
            Self::Mla(rows) => rows.save_page(page, out),
            Self::Delta(_) | Self::OnGpu { .. } => {}
        }
    }

    /// Takes a full page from the beginning of `bytes`. Returns the rest.
    pub(crate) fn load_page<'b>(&mut self, page: PageIdx, bytes: &'b [u8]) -> &'b [u8] {
        match self {
            Self::Gqa(cache) => {
                let bytes = cache.keys.load_page(page, bytes);
                cache.values.load_page(page, bytes)
            }
            Self::Mla(rows) => rows.load_page(page, bytes),
            Self::Delta(_) | Self::OnGpu { .. } => bytes,
        }
    }

    /// Appends a recurrent state to `out`.
    pub(crate) fn save_state(&self, state: StateIdx, out: &mut Vec<u8>) {
        if let Self::Delta(states) = self {
            states[state as usize].save(out);
        }
    }

    /// Takes a recurrent state from the beginning of `bytes`. Returns the rest.
    pub(crate) fn load_state<'b>(&mut self, state: StateIdx, bytes: &'b [u8]) -> &'b [u8] {
        match self {
            Self::Delta(states) => states[state as usize].load(bytes),
            _ => bytes,
        }
    }

    /// Copies the first `len` positions of a page to another.
    pub(crate) fn copy_page(&mut self, from: PageIdx, to: PageIdx, len: usize) {
        match self {
            Self::Gqa(cache) => {
                cache.keys.copy_page(from, to, len);
                cache.values.copy_page(from, to, len);
            }
            Self::Mla(rows) => rows.copy_page(from, to, len),
            Self::Delta(_) | Self::OnGpu { .. } => {}
        }
    }
}

/// Buffers of the mixers, shared by all layers.
#[derive(Default)]
pub(crate) struct MixerScratch {
    gqa: GqaScratch,
    mla: MlaScratch,
    delta: DeltaScratch,
    short_conv: ShortConvScratch,
    kda: KdaScratch,
    /// What the last indexer chose for the rows of the batch.
    chosen: Chosen,
}

impl MixerScratch {
    /// Grows to batches of `rows` tokens of a layer like `mixer`.
    pub(crate) fn reserve(&mut self, rows: usize, mixer: &Mixer) {
        match mixer {
            Mixer::Gqa(a) => self.gqa.reserve(rows, a),
            Mixer::Mla(a) => self.mla.reserve(rows, a),
            Mixer::Delta(d) => self.delta.reserve(rows, d),
            Mixer::ShortConv(c) => self.short_conv.reserve(rows, c),
            Mixer::Kda(k) => self.kda.reserve(rows, k),
        }
    }
}

/// Bytes of KV cache and recurrent state that a layer's mixer moves.
pub(crate) struct CacheReads {
    rows: Vec<(KvRows, u64)>,
    state_bytes: u64,
}

impl CacheReads {
    pub(crate) fn new(mixer: &Mixer, kv_type: KvType) -> Self {
        let rows = mixer_rows(mixer)
            .into_iter()
            .map(|rows| (rows, kv_type.row_bytes(rows.width)))
            .collect();
        Self {
            rows,
            state_bytes: mixer.state_bytes(),
        }
    }

    /// Returns the bytes for `tokens` tokens, with which the text has `positions`.
    ///
    /// [`CacheShape::moved_bytes`](tier_plan_formats::model::shape::CacheShape::moved_bytes) counts
    /// alike.
    pub(crate) fn bytes(&self, positions: u64, tokens: u64) -> u64 {
        let rows = self
            .rows
            .iter()
            .map(|(rows, bytes)| bytes.saturating_mul(rows.read(positions, tokens)));
        rows.fold(self.state_bytes.saturating_mul(2), u64::saturating_add)
    }
}

/// Neighboring rows of a batch that are consecutive tokens of one text.
#[derive(Debug, Clone)]
pub(crate) struct Segment<'a> {
    pub rows: Range<usize>,
    /// Tokens of the text before these.
    pub past: usize,
    /// The pages of the text, for these tokens too.
    pub pages: &'a [PageIdx],
    /// Which of a layer's recurrent states is the text's.
    pub state: StateIdx,
    /// Rows that checkpoints follow, ascending, with the recurrent states that those go to.
    pub checkpoints: Vec<(usize, StateIdx)>,
}

impl Segment<'_> {
    /// Returns the positions of the rows in the text.
    pub(crate) fn range(&self) -> Range<usize> {
        self.past..self.past + self.rows.len()
    }

    /// Returns the rows, each with its position in the text.
    pub(crate) fn positions(&self) -> impl Iterator<Item = (usize, usize)> + use<> {
        self.rows.clone().zip(self.past..)
    }
}

/// Rows of a batch.
pub(crate) struct MixerInput<'a> {
    /// Normalized hidden states, quantized if a matrix of the mixer needs it.
    pub x: ActView<'a>,
    /// All rows, by text.
    pub segments: &'a [Segment<'a>],
    /// Index in the batch of the first row.
    pub first_row: usize,
    /// Rotations prepared for the rows' positions, where the mixer rotates.
    pub rope: Option<&'a RopeTable>,
    /// Those of the mixer's indexer, where that rotates.
    pub indexer_rope: Option<&'a RopeTable>,
    /// Epsilon of norms inside the mixer.
    pub norm_eps: f32,
}

/// Runs a layer's mixer; `out` is `[tokens, hidden]`.
pub(crate) fn mix(
    c: CpuContext<'_>,
    weights: &DenseWeights,
    mixer: &Mixer,
    input: &MixerInput<'_>,
    cache: &mut LayerCache,
    scratch: &mut MixerScratch,
    out: &mut [f32],
) {
    match (mixer, cache) {
        (Mixer::Gqa(spec), LayerCache::Gqa(cache)) => {
            gqa::run(c, weights, spec, input, cache, &mut scratch.gqa, out);
        }
        (Mixer::Mla(spec), LayerCache::Mla(cache)) => {
            let MixerScratch { mla, chosen, .. } = scratch;
            mla::run(c, weights, spec, input, cache, (mla, chosen), out);
        }
        (Mixer::Delta(spec), LayerCache::Delta(states)) => {
            delta::run(c, weights, spec, input, states, &mut scratch.delta, out);
        }
        (Mixer::Kda(spec), LayerCache::Delta(states)) => {
            kda::run(c, weights, spec, input, states, &mut scratch.kda, out);
        }
        (Mixer::ShortConv(spec), LayerCache::Delta(states)) => {
            short_conv::run(
                c,
                weights,
                spec,
                input,
                states,
                &mut scratch.short_conv,
                out,
            );
        }
        _ => unreachable!("a layer's cache is made for its mixer"),
    }
}
