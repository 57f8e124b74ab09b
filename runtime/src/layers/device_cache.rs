//! What a layer on a GPU keeps of all texts: rows per position, in pages, or recurrent states.

use super::pages::{PAGE, PageIdx, StateIdx};
use std::ops::Range;
use std::sync::Arc;
use tier_plan_cuda::ops::{DeltaSizes, KdaSizes, MambaSizes};
use tier_plan_cuda::{Buffer, CudaError, Device, View};
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::spec::Mixer;

/// A layer's cache in the memory of a GPU. Copies share the memory.
#[derive(Clone)]
pub(crate) struct DeviceCache {
    kv_type: KvType,
    /// `[positions, heads, width]`: keys and values, or latents; then keys of an indexer.
    rows: Vec<Store>,
    /// By text, then those of checkpoints: a convolution's inputs, and matrices.
    states: Vec<Store>,
}

/// Equal parts of a device's memory: positions, or states.
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
}

impl DeviceCache {
    /// Allocates the cache of a mixer that a GPU can run, for texts with `positions` positions and
    /// `n_states` recurrent states in all.
    pub(crate) fn new(
        device: &Arc<dyn Device>,
        mixer: &Mixer,
        kv_type: KvType,
        positions: usize,
        n_states: usize,
    ) -> Result<Self, CudaError> {
        let row = |width: usize| kv_type.row_bytes(width as u64) as usize;
        let rows = match mixer {
            Mixer::Gqa(a) => {
                let kv = [a.key_dim, a.value_dim].map(|width| a.n_head_kv * row(width));
                let index = a.index.as_ref().map(|index| row(index.key_dim));
                kv.into_iter().chain(index).collect()
            }
            Mixer::Mla(a) => {
                let index = a.reach.indexer().map(|indexer| row(indexer.key_dim));
                let latents = [row(a.kv_rank + a.shared_dim)];
                latents.into_iter().chain(index).collect()
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
            _ => Vec::new(),
        };
        let stores = |each: Vec<usize>, parts: usize| -> Result<Vec<Store>, CudaError> {
            let stores = each.into_iter();
            stores.map(|each| Store::new(device, parts, each)).collect()
        };
        Ok(Self {
            kv_type,
            rows: stores(rows, positions)?,
            states: stores(states, n_states)?,
        })
    }

    /// Returns the type of the rows.
    pub(crate) fn kv_type(&self) -> KvType {
        self.kv_type
    }

    /// Returns the rows of keys (or latents), of values, or of the keys of an indexer, which are last.
    pub(crate) fn rows(&self, index: usize) -> View<'_> {
        self.rows[index].buffer.view()
    }

    /// Returns a text's inputs of the convolution (0), or its matrices (1).
    pub(crate) fn state(&self, index: usize, state: StateIdx) -> View<'_> {
        let state = state as usize;
        self.states[index].part(state..state + 1)
    }

    /// Returns whether there are recurrent states.
    pub(super) fn is_recurrent(&self) -> bool {
        !self.states.is_empty()
    }

    /// Returns the bytes of the cache.
    pub(super) fn bytes(&self) -> u64 {
        self.rows.iter().chain(&self.states).map(Store::bytes).sum()
    }

    /// Copies a recurrent state to another.
    pub(crate) fn copy_state(&self, from: StateIdx, to: StateIdx) -> Result<(), CudaError> {
        let mut states = self.states.iter();
        states.try_for_each(|store| store.copy(from as usize, to as usize, 1))
    }

    /// Copies the first `len` positions of a page to another.
    pub(super) fn copy_page(
        &self,
        from: PageIdx,
        to: PageIdx,
        len: usize,
    ) -> Result<(), CudaError> {
        let (from, to) = (from as usize * PAGE, to as usize * PAGE);
        let mut rows = self.rows.iter();
        rows.try_for_each(|store| store.copy(from, to, len))
    }

    /// Returns the parts of the memory that a full page is in.
    fn page(&self, page: PageIdx) -> impl Iterator<Item = View<'_>> {
        let first = page as usize * PAGE;
        let rows = self.rows.iter();
        rows.map(move |store| store.part(first..first + PAGE))
    }

    /// Returns the parts of the memory that a recurrent state is in.
    fn whole_state(&self, state: StateIdx) -> impl Iterator<Item = View<'_>> {
        let state = state as usize;
        let states = self.states.iter();
        states.map(move |store| store.part(state..state + 1))
    }

    /// Returns the bytes of a full page, and of a recurrent state.
    pub(super) fn saved_bytes(&self) -> (usize, usize) {
        let each = |stores: &[Store]| stores.iter().map(|store| store.each).sum::<usize>();
        (PAGE * each(&self.rows), each(&self.states))
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
