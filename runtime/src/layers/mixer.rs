//! Mixers, which mix tokens: attention, a delta net or a short convolution. Each kind has one file, with its state of
//! past tokens, its buffers and its computation.

use super::block_index::IndexedCache;
use super::chosen::{Chosen, ChosenRows};
use super::compressed::{CompressedCache, CompressedScratch, CompressedStores};
use super::cpu_context::CpuContext;
use super::delta::DeltaScratch;
use super::device_cache::DeviceCache;
use super::gqa::{GqaCache, GqaScratch, ProjectedRows};
use super::kda::KdaScratch;
use super::kv_rows::{KeyValues, LatentRows, RowStore};
use super::mamba::MambaScratch;
use super::mla::MlaScratch;
use super::pages::{PageIdx, StateIdx};
use super::recurrent::{RecurrentState, copy_state};
use super::rope::RopeTable;
use super::short_conv::ShortConvScratch;
use super::weights::DenseWeights;
use super::{compressed, delta, gqa, kda, mamba, mla, short_conv};
use crate::tiers::nodes::Pages;
use std::ops::Range;
use tier_plan_cuda::CudaError;
use tier_plan_formats::model::kv::{KvRows, KvType};
use tier_plan_formats::model::shape::mixer_rows;
use tier_plan_formats::model::spec::{GqaSpec, IndexerSpec, LayerSpec, Mixer, ModelSpec};
use tier_plan_kernels::ActView;

/// What one layer keeps of all texts: KV cache, recurrent states, or both.
pub(crate) enum LayerCache {
    Gqa(KeyValues),
    /// Keys and values, and the keys of the index that chooses among them.
    Indexed(IndexedCache),
    Mla(LatentRows),
    /// One state per text, then those of checkpoints.
    Delta(Vec<RecurrentState>),
    /// Rows of near tokens and of compressed far ones, and the rows of open blocks.
    Compressed(CompressedCache),
    /// Nothing: the layer does not mix tokens.
    Nothing,
    /// The cache is in a GPU's memory.
    OnGpu(DeviceCache),
}

impl LayerCache {
    /// Makes an empty cache for texts with `positions` positions and `n_states` recurrent states in
    /// all.
    pub(crate) fn new(
        layer: &LayerSpec,
        kv_type: KvType,
        positions: usize,
        n_states: usize,
    ) -> Self {
        let ngram = layer.ngram_state_values();
        let states = |state: &dyn Fn() -> RecurrentState| (0..n_states).map(|_| state()).collect();
        match &layer.mixer {
            Mixer::Gqa(a) => {
                // A layer that shares another's keys and values has none of its own.
                let n_head = if a.shared_kv.is_some() {
                    0
                } else {
                    a.n_head_kv
                };
                let rows = |width| RowStore::new(kv_type, n_head, positions, width);
                let kv = KeyValues {
                    keys: rows(a.key_dim),
                    values: rows(a.value_dim),
                };
                match &a.index {
                    None => Self::Gqa(kv),
                    Some(index) => Self::Indexed(IndexedCache {
                        kv,
                        index: RowStore::new(kv_type, 1, positions, index.key_dim),
                    }),
                }
            }
            Mixer::Mla(a) => {
                let rows = |width| RowStore::new(kv_type, 1, positions, width);
                let open = a.reach.indexer().map_or(0, IndexerSpec::state_values);
                let index = |indexer: &IndexerSpec| {
                    let block = indexer.selection.block;
                    RowStore::of_blocks(kv_type, positions, indexer.key_dim, block)
                };
                Self::Mla(LatentRows {
                    latents: rows(a.kv_rank + a.shared_dim),
                    index_keys: a.reach.indexer().map(index),
                    open: if open > 0 {
                        states(&|| RecurrentState::new(open, 0, ngram))
                    } else {
                        Vec::new()
                    },
                })
            }
            Mixer::Delta(d) => Self::Delta(states(&|| delta::new_state(d, ngram))),
            Mixer::Kda(k) => Self::Delta(states(&|| kda::new_state(k, ngram))),
            Mixer::ShortConv(c) => {
                Self::Delta(states(&|| RecurrentState::new(c.state_values(), 0, ngram)))
            }
            Mixer::Mamba(m) => Self::Delta(states(&|| mamba::new_state(m, ngram))),
            Mixer::Compressed(a) => Self::Compressed(CompressedCache {
                stores: CompressedStores::new(a, kv_type, positions),
                states: states(&|| RecurrentState::new(a.state_values(), 0, ngram)),
            }),
            Mixer::None => Self::Nothing,
        }
    }

    /// Returns the stores of rows per token.
    fn stores(&self) -> Vec<&RowStore> {
        match self {
            Self::Gqa(kv) => vec![&kv.keys, &kv.values],
            Self::Indexed(cache) => vec![&cache.kv.keys, &cache.kv.values, &cache.index],
            Self::Mla(rows) => rows.stores().collect(),
            Self::Compressed(cache) => cache.stores.all(),
            Self::Delta(_) | Self::Nothing | Self::OnGpu(_) => Vec::new(),
        }
    }

    fn stores_mut(&mut self) -> Vec<&mut RowStore> {
        match self {
            Self::Gqa(kv) => vec![&mut kv.keys, &mut kv.values],
            Self::Indexed(IndexedCache { kv, index }) => {
                vec![&mut kv.keys, &mut kv.values, index]
            }
            Self::Mla(rows) => rows.stores_mut().collect(),
            Self::Compressed(cache) => cache.stores.all_mut(),
            Self::Delta(_) | Self::Nothing | Self::OnGpu(_) => Vec::new(),
        }
    }

    /// Returns the recurrent states.
    fn states(&self) -> &[RecurrentState] {
        match self {
            Self::Delta(states) => states,
            Self::Compressed(cache) => &cache.states,
            Self::Mla(rows) => &rows.open,
            _ => &[],
        }
    }

    pub(crate) fn states_mut(&mut self) -> &mut [RecurrentState] {
        match self {
            Self::Delta(states) => states,
            Self::Compressed(cache) => &mut cache.states,
            Self::Mla(rows) => &mut rows.open,
            _ => &mut [],
        }
    }

    /// Returns whether it has recurrent states of its own. Then a text can only go back to none of its
    /// tokens, or to a checkpoint.
    pub(crate) fn is_recurrent(&self) -> bool {
        match self {
            Self::Delta(_) | Self::Compressed(_) => true,
            Self::Mla(rows) => !rows.open.is_empty(),
            Self::OnGpu(cache) => cache.is_recurrent(),
            Self::Gqa(_) | Self::Indexed(_) | Self::Nothing => false,
        }
    }

    /// Returns the bytes of the cache.
    pub(crate) fn bytes(&self) -> u64 {
        if let Self::OnGpu(cache) = self {
            return cache.bytes();
        }
        let rows: u64 = self.stores().into_iter().map(RowStore::bytes).sum();
        rows + self.states().iter().map(RecurrentState::bytes).sum::<u64>()
    }

    /// Moves its memory to where `pages` says.
    pub(crate) fn move_to(&self, pages: &Pages) -> std::io::Result<()> {
        let mut stores = self.stores().into_iter();
        stores.try_for_each(|store| store.move_to(pages))?;
        self.states()
            .iter()
            .try_for_each(|state| state.move_to(pages))
    }

    /// Has a recurrent state forget all tokens. Rows are written before they are read, and a GPU
    /// ignores a recurrent state at position 0.
    pub(crate) fn reset(&mut self, state: StateIdx) {
        if let Some(state) = self.states_mut().get_mut(state as usize) {
            state.reset();
        }
    }

    /// Copies a recurrent state to another.
    ///
    /// # Errors
    /// When a GPU that has the cache fails; so do the other functions that return one.
    pub(crate) fn copy_state(&mut self, from: StateIdx, to: StateIdx) -> Result<(), CudaError> {
        if let Self::OnGpu(cache) = self {
            return cache.copy_state(from, to);
        }
        let states = self.states_mut();
        if !states.is_empty() {
            copy_state(states, from, to);
        }
        Ok(())
    }

    /// Returns the bytes of a full page, and of a recurrent state.
    pub(crate) fn saved_bytes(&self) -> (usize, usize) {
        if let Self::OnGpu(cache) = self {
            return cache.saved_bytes();
        }
        let page = self.stores().into_iter().map(RowStore::page_bytes).sum();
        (
            page,
            self.states().first().map_or(0, |s| s.bytes() as usize),
        )
    }

    /// Appends a full page to `out`.
    pub(crate) fn save_page(&self, page: PageIdx, out: &mut Vec<u8>) -> Result<(), CudaError> {
        if let Self::OnGpu(cache) = self {
            return cache.save_page(page, out);
        }
        for store in self.stores() {
            store.save_page(page, out);
        }
        Ok(())
    }

    /// Takes a full page from the beginning of `bytes`. Returns the rest.
    pub(crate) fn load_page<'b>(
        &mut self,
        page: PageIdx,
        bytes: &'b [u8],
    ) -> Result<&'b [u8], CudaError> {
        if let Self::OnGpu(cache) = self {
            return cache.load_page(page, bytes);
        }
        let stores = self.stores_mut().into_iter();
        Ok(stores.fold(bytes, |bytes, store| store.load_page(page, bytes)))
    }

    /// Appends a recurrent state to `out`.
    pub(crate) fn save_state(&self, state: StateIdx, out: &mut Vec<u8>) -> Result<(), CudaError> {
        if let Self::OnGpu(cache) = self {
            return cache.save_state(state, out);
        }
        if let Some(state) = self.states().get(state as usize) {
            state.save(out);
        }
        Ok(())
    }

    /// Takes a recurrent state from the beginning of `bytes`. Returns the rest.
    pub(crate) fn load_state<'b>(
        &mut self,
        state: StateIdx,
        bytes: &'b [u8],
    ) -> Result<&'b [u8], CudaError> {
        if let Self::OnGpu(cache) = self {
            return cache.load_state(state, bytes);
        }
        Ok(match self.states_mut().get_mut(state as usize) {
            Some(state) => state.load(bytes),
            None => bytes,
        })
    }

    /// Copies the first `len` positions of a page to another.
    pub(crate) fn copy_page(
        &mut self,
        from: PageIdx,
        to: PageIdx,
        len: usize,
    ) -> Result<(), CudaError> {
        if let Self::OnGpu(cache) = self {
            return cache.copy_page(from, to, len);
        }
        for store in self.stores_mut() {
            store.copy_page(from, to, len);
        }
        Ok(())
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
    mamba: MambaScratch,
    compressed: CompressedScratch,
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
            Mixer::Mamba(m) => self.mamba.reserve(rows, m),
            Mixer::Compressed(a) => self.compressed.reserve(rows, a),
            Mixer::None => {}
        }
    }
}

impl MixerScratch {
    /// Returns where `n` rows of grouped-query attention go that are projected elsewhere.
    pub(crate) fn projected(&mut self, n: usize, spec: &GqaSpec) -> ProjectedRows<'_> {
        self.gqa.projected(n, spec)
    }

    /// Returns what the last indexer chose for some rows of the batch, `[rows, kept]` blocks.
    pub(crate) fn choices(&self, rows: ChosenRows<'_>) -> Vec<u32> {
        self.chosen.to_rows(rows)
    }

    /// Drops what indexers chose.
    pub(crate) fn forget_choices(&mut self) {
        self.chosen.clear();
    }

    /// Returns the positions in all lists.
    #[cfg(test)]
    pub(crate) fn n_chosen(&self) -> usize {
        self.chosen.n_positions()
    }

    /// Takes what an indexer elsewhere chose for some rows of the batch, `[rows, kept]` blocks.
    pub(crate) fn put_choices(&mut self, rows: ChosenRows<'_>, blocks: &[u32]) {
        self.chosen.take_rows(rows, blocks);
    }
}

/// Bytes of KV cache and recurrent state that a layer's mixer moves.
pub(crate) struct CacheReads {
    rows: Vec<(KvRows, u64)>,
    state_bytes: u64,
}

impl CacheReads {
    /// Makes those of a layer, which may read the rows that another one holds.
    pub(crate) fn new(spec: &ModelSpec, layer: &LayerSpec, kv_type: KvType) -> Self {
        let owner = layer.kv_owner().and_then(|owner| spec.layers.get(owner));
        let rows = mixer_rows(&owner.unwrap_or(layer).mixer)
            .into_iter()
            .map(|rows| (rows, kv_type.row_bytes(rows.width)))
            .collect();
        Self {
            rows,
            state_bytes: layer.state_bytes(),
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
    /// Returns the rows in parts, each up to the next checkpoint, with the recurrent state that it
    /// goes to.
    pub(crate) fn parts(&self) -> impl Iterator<Item = (Range<usize>, Option<StateIdx>)> {
        let mut start = self.rows.start;
        let checkpoints = self.checkpoints.iter().map(|(end, to)| (*end, Some(*to)));
        let ends = checkpoints.chain([(self.rows.end, None)]);
        ends.map(move |(end, to)| (std::mem::replace(&mut start, end)..end, to))
    }

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
        (Mixer::Gqa(spec), LayerCache::Gqa(kv)) => {
            let cache = GqaCache { kv, index: None };
            gqa::run(c, weights, spec, input, cache, &mut scratch.gqa, out);
        }
        (Mixer::Gqa(spec), LayerCache::Indexed(IndexedCache { kv, index })) => {
            let index = Some(index);
            let cache = GqaCache { kv, index };
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
        (Mixer::Mamba(spec), LayerCache::Delta(states)) => {
            mamba::run(c, weights, spec, input, states, &mut scratch.mamba, out);
        }
        (Mixer::Compressed(spec), LayerCache::Compressed(cache)) => {
            compressed::run(c, weights, spec, input, cache, &mut scratch.compressed, out);
        }
        _ => unreachable!("a layer's cache is made for its mixer"),
    }
}

/// Computes grouped-query attention of `n` rows that were projected elsewhere to the keys and values
/// of a layer's cache, to which theirs are added. Returns what the last matrix takes, `[rows,
/// o.n_in]`; `input.x` is not looked at.
pub(crate) fn attend_projected<'s>(
    c: CpuContext<'_>,
    weights: &DenseWeights,
    spec: &GqaSpec,
    (input, n): (&MixerInput<'_>, usize),
    cache: &mut LayerCache,
    scratch: &'s mut MixerScratch,
) -> &'s [f32] {
    let LayerCache::Gqa(kv) = cache else {
        unreachable!("plans keep only plain keys and values off a GPU, which loading checks")
    };
    gqa::attend_projected(c, weights, spec, (input, n), kv, &mut scratch.gqa)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tier_plan_formats::gguf::Gguf;
    use tier_plan_formats::model::describe;
    use tier_plan_formats::model::shape::shape_of;
    use tier_plan_testing::data;

    /// What the engine charges layer by layer is what the sizes of the model say, where layers read
    /// the rows of others too.
    #[test]
    fn cache_reads_are_those_of_the_shape() {
        for (file, sharing) in [
            ("arch2/gemma4", 3),
            ("arch2/gemma3", 0),
            ("arch/gpt-oss", 0),
        ] {
            let gguf = Gguf::open(&data(&format!("{file}.gguf"))).unwrap();
            let spec = describe(&gguf).unwrap();
            let caches = shape_of(&gguf, &spec).caches;
            let readers: u64 = caches.iter().map(|cache| cache.more_readers).sum();
            assert_eq!(readers, sharing, "{file}");
            for (positions, tokens) in [(5, 1), (100, 1), (100, 7)] {
                let reads = spec.layers.iter();
                let reads = reads.map(|layer| CacheReads::new(&spec, layer, KvType::F16));
                let read: u64 = reads.map(|reads| reads.bytes(positions, tokens)).sum();
                let moved = caches.iter();
                let moved = moved.map(|cache| cache.moved_bytes(KvType::F16, positions, tokens));
                assert_eq!(read, moved.sum::<u64>(), "{file}, {positions}");
                assert!(read > 0);
            }
        }
    }
}
