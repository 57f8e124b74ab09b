//! What a layer on a GPU keeps of all texts: rows per position, in pages, or recurrent states.

use super::pages::{PAGE, PageIdx, StateIdx};
use std::ops::Range;
use std::sync::Arc;
use tier_plan_cuda::ops::{DeltaSizes, KdaSizes, MambaSizes, States};
use tier_plan_cuda::{Buffer, CudaError, Device, View};
use tier_plan_formats::model::kv::{KvRows, KvType};
use tier_plan_formats::model::spec::{Compressor, IndexerSpec, LayerSpec, Mixer};

/// A layer's cache in the memory of a GPU. Copies share the memory.
#[derive(Clone)]
pub(crate) struct DeviceCache {
    kv_type: KvType,
    /// `[positions, heads, width]`: keys and values, or latents, or vectors of blocks of positions; then
    /// keys of an indexer, of positions or of blocks of them.
    rows: Vec<Rows>,
    /// By text, then those of checkpoints: a convolution's inputs or what is kept of blocks that are not
    /// complete, and matrices.
    states: Vec<Store>,
    /// Likewise inputs of the convolution of an n-gram block before the mixer.
    ngram: Option<Store>,
}

/// Rows of positions, or of blocks of positions. Those of blocks are in the page where they end, and a
/// page has as many rows as blocks may end in it.
#[derive(Clone)]
struct Rows {
    store: Store,
    /// Positions that share a row.
    every: usize,
    /// Rows as plans count them. Smaller pages, as in unit tests, have more rows of blocks.
    counted: u64,
}

impl Rows {
    /// Allocates rows of `each` bytes for so many positions, `every` of which share one.
    fn new(
        device: &Arc<dyn Device>,
        positions: usize,
        (each, every): (usize, usize),
    ) -> Result<Self, CudaError> {
        let in_pages = positions / PAGE * PAGE.div_ceil(every);
        let n = in_pages + (positions % PAGE).div_ceil(every);
        let counted = KvRows {
            width: 0,
            per_token: 1,
            every: every as u64,
            queries: 0,
            window: None,
            chosen: None,
        };
        Ok(Self {
            store: Store::new(device, n, each)?,
            every,
            counted: counted.held(positions as u64),
        })
    }

    /// Returns the bytes of all rows, as plans count them.
    fn bytes(&self) -> u64 {
        self.counted * self.store.each as u64
    }

    /// Returns the number of rows of the first `positions` positions of a page.
    fn of(&self, positions: usize) -> usize {
        positions.div_ceil(self.every)
    }

    /// Returns the first row of a page.
    fn first(&self, page: PageIdx) -> usize {
        page as usize * self.of(PAGE)
    }
}

/// Equal parts of a device's memory: rows, or states.
#[derive(Clone)]
struct Store {
    buffer: Arc<Buffer>,
    /// Bytes of a part.
    each: usize,
}

impl Store {
    fn new(device: &Arc<dyn Device>, parts: usize, each: usize) -> Result<Self, CudaError> {
        let buffer = Buffer::new(device, parts.saturating_mul(each))?;
        Ok(Self {
            buffer: Arc::new(buffer),
            each,
        })
    }

    fn part(&self, parts: Range<usize>) -> View<'_> {
        let bytes = parts.start * self.each..parts.end * self.each;
        self.buffer.view().part(bytes)
    }

    /// Copies `n` parts from one place to another.
    fn copy(&self, from: usize, to: usize, n: usize) -> Result<(), CudaError> {
        self.part(to..to + n).copy_from(self.part(from..from + n))
    }

    fn bytes(&self) -> u64 {
        self.buffer.view().len() as u64
    }

    /// Returns the parts as states of 32-bit floats.
    fn states(&self) -> States<'_> {
        States {
            all: self.buffer.view(),
            each: self.each / 4,
        }
    }
}

impl DeviceCache {
    /// Allocates the cache of a layer whose mixer a GPU can run, for texts with `positions` positions
    /// and `n_states` recurrent states in all.
    pub(crate) fn new(
        device: &Arc<dyn Device>,
        layer: &LayerSpec,
        kv_type: KvType,
        positions: usize,
        n_states: usize,
    ) -> Result<Self, CudaError> {
        let row = |width: usize| kv_type.row_bytes(width as u64) as usize;
        let mixer = &layer.mixer;
        // Bytes of a row, and the positions that share it.
        let rows: Vec<(usize, usize)> = match mixer {
            // It reads those of another layer.
            Mixer::Gqa(a) if a.shared_kv.is_some() => Vec::new(),
            Mixer::Gqa(a) => {
                let kv = [a.key_dim, a.value_dim].map(|width| (a.n_head_kv * row(width), 1));
                let index = a.index.as_ref().map(|index| (row(index.key_dim), 1));
                kv.into_iter().chain(index).collect()
            }
            Mixer::Mla(a) => {
                let of_index = |i: &IndexerSpec| (row(i.key_dim), i.selection.block);
                let latents = [(row(a.kv_rank + a.shared_dim), 1)];
                let index = a.reach.indexer().map(of_index);
                latents.into_iter().chain(index).collect()
            }
            Mixer::Compressed(a) => {
                let of_blocks = |c: &Compressor| (row(c.width()), c.ratio);
                a.compressors().map(of_blocks).collect()
            }
            // What no GPU runs is refused when the plan is checked.
            _ => Vec::new(),
        };
        let states = match mixer {
            Mixer::Delta(d) => {
                let sizes = DeltaSizes::from(d);
                vec![4 * sizes.conv_state(), 4 * sizes.matrices()]
            }
            Mixer::Kda(k) => {
                let sizes = KdaSizes::from(k);
                vec![4 * sizes.conv_state(), 4 * sizes.matrices()]
            }
            Mixer::Mamba(m) => {
                let sizes = MambaSizes::from(m);
                vec![4 * sizes.conv_state(), 4 * sizes.matrices()]
            }
            Mixer::ShortConv(c) => vec![4 * c.state_values()],
            Mixer::Mla(a) => {
                let open = a.reach.indexer().map_or(0, IndexerSpec::state_values);
                Vec::from_iter((open > 0).then_some(4 * open))
            }
            Mixer::Compressed(a) => vec![4 * a.state_values()],
            _ => Vec::new(),
        };
        let rows = rows.into_iter();
        let states = states.into_iter();
        // A block of one tap keeps nothing.
        let ngram = layer.residual.ngram.as_ref();
        let ngram = ngram.map(|_| Store::new(device, n_states, 4 * layer.ngram_state_values()));
        Ok(Self {
            ngram: ngram.transpose()?,
            kv_type,
            rows: rows
                .map(|each| Rows::new(device, positions, each))
                .collect::<Result<_, _>>()?,
            states: states
                .map(|each| Store::new(device, n_states, each))
                .collect::<Result<_, _>>()?,
        })
    }

    /// Returns the type of the rows.
    pub(crate) fn kv_type(&self) -> KvType {
        self.kv_type
    }

    /// Returns the rows of keys (or latents, or vectors of blocks), of values, or of the keys of an
    /// indexer, which are last.
    pub(crate) fn rows(&self, index: usize) -> View<'_> {
        self.rows[index].store.buffer.view()
    }

    /// Returns a text's inputs of the convolution, or what is kept of blocks that are not complete (0),
    /// or its matrices (1). A compressed attention has all of its state in the first.
    pub(crate) fn state(&self, index: usize, state: StateIdx) -> View<'_> {
        let state = state as usize;
        self.states[index].part(state..state + 1)
    }

    /// Returns those parts of all texts.
    pub(crate) fn states(&self, index: usize) -> States<'_> {
        self.states[index].states()
    }

    /// Returns all texts' inputs of the convolution of an n-gram block, if the layer has one.
    pub(crate) fn ngram_states(&self) -> Option<States<'_>> {
        self.ngram.as_ref().map(Store::states)
    }

    /// Returns all that is kept of texts as recurrent states.
    fn state_stores(&self) -> impl Iterator<Item = &Store> {
        self.states.iter().chain(&self.ngram)
    }

    /// Returns whether there are recurrent states.
    pub(super) fn is_recurrent(&self) -> bool {
        self.state_stores().next().is_some()
    }

    /// Returns the bytes of the cache.
    pub(super) fn bytes(&self) -> u64 {
        let rows: u64 = self.rows.iter().map(Rows::bytes).sum();
        rows + self.state_stores().map(Store::bytes).sum::<u64>()
    }

    /// Copies a recurrent state to another.
    pub(super) fn copy_state(&self, from: StateIdx, to: StateIdx) -> Result<(), CudaError> {
        self.copy_mixer_state(from, to)?;
        self.copy_ngram_state(from, to)
    }

    /// Copies what the mixer keeps in a recurrent state to another.
    pub(crate) fn copy_mixer_state(&self, from: StateIdx, to: StateIdx) -> Result<(), CudaError> {
        let mut states = self.states.iter();
        states.try_for_each(|store| store.copy(from as usize, to as usize, 1))
    }

    /// Copies what an n-gram block keeps in a recurrent state to another.
    pub(crate) fn copy_ngram_state(&self, from: StateIdx, to: StateIdx) -> Result<(), CudaError> {
        let mut ngram = self.ngram.iter();
        ngram.try_for_each(|store| store.copy(from as usize, to as usize, 1))
    }

    /// Copies the first `len` positions of a page to another.
    pub(super) fn copy_page(
        &self,
        from: PageIdx,
        to: PageIdx,
        len: usize,
    ) -> Result<(), CudaError> {
        let mut rows = self.rows.iter();
        rows.try_for_each(|rows| {
            let (from, to) = (rows.first(from), rows.first(to));
            rows.store.copy(from, to, rows.of(len))
        })
    }

    /// Returns the parts of the memory that a full page is in.
    fn page(&self, page: PageIdx) -> impl Iterator<Item = View<'_>> {
        let rows = self.rows.iter();
        rows.map(move |rows| {
            let first = rows.first(page);
            rows.store.part(first..first + rows.of(PAGE))
        })
    }

    /// Returns the parts of the memory that a recurrent state is in.
    fn whole_state(&self, state: StateIdx) -> impl Iterator<Item = View<'_>> {
        let state = state as usize;
        let states = self.state_stores();
        states.map(move |store| store.part(state..state + 1))
    }

    /// Returns the bytes of a full page, and of a recurrent state.
    pub(super) fn saved_bytes(&self) -> (usize, usize) {
        let of_page = self.rows.iter().map(|rows| rows.of(PAGE) * rows.store.each);
        let of_state = self.state_stores().map(|store| store.each);
        (of_page.sum(), of_state.sum())
    }

    /// Appends a full page to `out`.
    pub(super) fn save_page(&self, page: PageIdx, out: &mut Vec<u8>) -> Result<(), CudaError> {
        save(self.page(page), out)
    }

    /// Takes a full page from the beginning of `bytes`. Returns the rest.
    pub(super) fn load_page<'b>(
        &self,
        page: PageIdx,
        bytes: &'b [u8],
    ) -> Result<&'b [u8], CudaError> {
        load(self.page(page), bytes)
    }

    /// Appends a recurrent state to `out`.
    pub(super) fn save_state(&self, state: StateIdx, out: &mut Vec<u8>) -> Result<(), CudaError> {
        save(self.whole_state(state), out)
    }

    /// Takes a recurrent state from the beginning of `bytes`. Returns the rest.
    pub(super) fn load_state<'b>(
        &self,
        state: StateIdx,
        bytes: &'b [u8],
    ) -> Result<&'b [u8], CudaError> {
        load(self.whole_state(state), bytes)
    }
}

/// Appends what is in parts of a device's memory.
fn save<'a>(mut parts: impl Iterator<Item = View<'a>>, out: &mut Vec<u8>) -> Result<(), CudaError> {
    parts.try_for_each(|part| {
        let first = out.len();
        out.resize(first + part.len(), 0);
        part.read(&mut out[first..])
    })
}

/// Fills parts of a device's memory from the beginning of `bytes`. Returns the rest.
fn load<'a, 'b>(
    mut parts: impl Iterator<Item = View<'a>>,
    bytes: &'b [u8],
) -> Result<&'b [u8], CudaError> {
    parts.try_fold(bytes, |bytes, part| {
        let (values, rest) = bytes.split_at(part.len());
        part.write(values)?;
        Ok(rest)
    })
}
