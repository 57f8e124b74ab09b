//! One layer's experts: where each lives, where its slices lie in the files and in a buffer, and the slots they share.

use super::view::{Bias, ExpertView, ViewLinear};
use crate::experts::cache::SlotCache;
use crate::experts::checksums::Checks;
use crate::tiers::arena::Piece;
use crate::tiers::file::{Check, Extent, Span};
use crate::tiers::source::ALIGN;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::model::spec::{ExpertLinear, MoeSpec, TensorId};
use tier_plan_formats::placement::SlotPolicy;
use tier_plan_kernels::Weights;
use tier_plan_kernels::quant::TensorType;

/// One of an expert's tensors: a slice of a tensor of the file that has all experts'.
pub(super) struct Part {
    pub(super) tensor: TensorId,
    ty: TensorType,
    /// Where the slice begins in an expert's packed bytes.
    at: usize,
    /// Where the room of the slice begins in a buffer with room for whole pages.
    page_at: usize,
    pub(super) slice_bytes: usize,
}

/// How an expert's slices lie in a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// One after the other.
    Packed,
    /// Each where its pages of the file are read in place: at the same distance from the beginning of a page as there.
    WholePages,
}

/// One of an expert's matrices, by its parts.
struct Matrix {
    weight: usize,
    bias: Option<usize>,
    n_out: usize,
    n_in: usize,
}

/// Where an expert lives for good.
pub(crate) enum Home {
    /// In place in the mapped file, on this tier.
    Mapped,
    /// In this tier's arena.
    Pinned(usize, Piece),
    /// In a GPU's memory, this tier, where it computes.
    Gpu(usize),
    /// On the slow tier; it passes through slots and staging.
    Pooled,
}

/// One layer's experts.
pub(crate) struct LayerExperts {
    pub(super) parts: Vec<Part>,
    /// Gate, up and down; or gate and up as one, and down.
    matrices: Vec<Matrix>,
    expert_ffn: usize,
    pub(crate) expert_bytes: usize,
    /// Bytes of a buffer with room for whole pages.
    paged_bytes: usize,
    /// How slots and staging hold this layer's experts.
    pub(super) layout: Layout,
    pub(super) homes: Vec<Home>,
    /// Where the experts begin in a copy of them in one piece each: index of that file, and offset by expert.
    copy: Option<(usize, Vec<Option<u64>>)>,
    pub(super) cache: SlotCache,
    /// `None` while a read into the slot is in flight.
    pub(super) slots: Vec<Option<Piece>>,
    pub(super) slot_tier: usize,
    /// The slots are in a GPU's memory.
    pub(super) slots_on_gpu: bool,
}

impl Part {
    /// Where an expert's slice lies in the file.
    fn extent(&self, gguf: &Gguf, expert: usize) -> Extent {
        let info = &gguf.tensors()[self.tensor];
        Extent { part: info.part, offset: info.offset + (expert * self.slice_bytes) as u64, len: self.slice_bytes }
    }
}

impl LayerExperts {
    pub(crate) fn new(gguf: &Gguf, moe: &MoeSpec, homes: Vec<Home>, slot_tier: usize) -> Self {
        let (mut parts, mut expert_bytes, mut paged_bytes) = (Vec::new(), 0, 0);
        let mut part = |tensor: TensorId| {
            let info = &gguf.tensors()[tensor];
            let slice_bytes = info.n_bytes as usize / moe.n_expert;
            let part = Part { tensor, ty: info.ty, at: expert_bytes, page_at: paged_bytes, slice_bytes };
            expert_bytes += slice_bytes;
            let pages = (0..moe.n_expert).map(|expert| part.extent(gguf, expert).pages_bytes());
            paged_bytes += pages.max().unwrap_or(0);
            parts.push(part);
            parts.len() - 1
        };
        let matrix = |l: &ExpertLinear| {
            let weight = part(l.weight);
            Matrix { weight, bias: l.bias.map(&mut part), n_out: l.n_out, n_in: l.n_in }
        };
        let matrices = moe.expert_linears().map(matrix).collect();
        Self {
            expert_bytes,
            paged_bytes,
            layout: Layout::Packed,
            parts,
            matrices,
            expert_ffn: moe.expert_ffn,
            homes,
            copy: None,
            cache: SlotCache::new(moe.n_expert as u32, 0, SlotPolicy::Lru),
            slots: Vec::new(),
            slot_tier,
            slots_on_gpu: false,
        }
    }

    /// Keeps an expert in a tier for good.
    pub(crate) fn pin(&mut self, expert: usize, tier: usize, piece: Piece) {
        self.homes[expert] = Home::Pinned(tier, piece);
    }

    /// Says where an expert is for good.
    pub(crate) fn home(&mut self, expert: usize, home: Home) {
        self.homes[expert] = home;
    }

    /// The matrices of an expert whose slices are in `bytes`, one after the other.
    pub(crate) fn packed<'a>(&self, bytes: &'a [u8]) -> ExpertView<'a> {
        self.view(|part| &bytes[part.at..part.at + part.slice_bytes])
    }

    /// Experts of the layer.
    pub(crate) fn n_expert(&self) -> usize {
        self.homes.len()
    }

    /// Bytes of a buffer for any of the layer's experts.
    pub(crate) fn buffer_bytes(&self, layout: Layout) -> usize {
        match layout {
            Layout::Packed => self.expert_bytes,
            Layout::WholePages => self.paged_bytes,
        }
    }

    /// The buffers that the layer's pooled experts share, how they and staging hold them, and who gets one.
    pub(crate) fn set_slots(&mut self, slots: Vec<Piece>, layout: Layout, policy: SlotPolicy) {
        self.layout = layout;
        self.cache = SlotCache::new(self.homes.len() as u32, slots.len() as u32, policy);
        self.slots = slots.into_iter().map(Some).collect();
    }

    /// The same where the slots are `n` in a GPU's memory; `layout` is that of staging.
    pub(crate) fn set_slots_on_gpu(&mut self, n: u32, layout: Layout, policy: SlotPolicy) {
        self.set_slots(Vec::new(), layout, policy);
        self.cache = SlotCache::new(self.homes.len() as u32, n, policy);
        self.slots_on_gpu = true;
    }

    /// Reads experts from a copy in which each lies in one piece, `part` among the files: `places` is where they begin.
    /// `is_pooled` says which experts will be read into slots and staging.
    pub(crate) fn use_copy(&mut self, part: usize, places: &[Option<u64>], is_pooled: impl Fn(usize) -> bool) {
        let in_copy = self.expert_bytes.next_multiple_of(ALIGN);
        let all = (0..places.len()).all(|expert| places[expert].is_some() || !is_pooled(expert));
        self.paged_bytes = if all { in_copy } else { self.paged_bytes.max(in_copy) };
        self.copy = Some((part, places.to_vec()));
    }

    /// Where an expert's bytes lie in the copy, if it has them.
    fn in_copy(&self, expert: usize) -> Option<Extent> {
        let (part, places) = self.copy.as_ref()?;
        let offset = places.get(expert).copied().flatten()?;
        Some(Extent { part: *part, offset, len: self.expert_bytes })
    }

    /// Where expert `expert` lies in the files, and where its slices go in a buffer.
    pub(crate) fn spans(&self, gguf: &Gguf, expert: usize, layout: Layout) -> Vec<Span> {
        let whole_pages = layout == Layout::WholePages;
        if let Some(extent) = self.in_copy(expert) {
            return vec![Span { extent, at: 0, whole_pages }];
        }
        let span = |part: &Part| {
            let (extent, at) = self.place(gguf, part, expert, layout);
            Span { extent, at, whole_pages }
        };
        self.parts.iter().map(span).collect()
    }

    /// Where one of an expert's slices comes from, and where it begins in a buffer.
    pub(super) fn place(&self, gguf: &Gguf, part: &Part, expert: usize, layout: Layout) -> (Extent, usize) {
        match (self.in_copy(expert), part.extent(gguf, expert)) {
            (Some(copy), Extent { len, .. }) => {
                (Extent { part: copy.part, offset: copy.offset + part.at as u64, len }, part.at)
            }
            (None, extent) if layout == Layout::Packed => (extent, part.at),
            (None, extent) => (extent, part.page_at + extent.head()),
        }
    }

    /// What an expert's slices must be once they lie in a buffer; nothing without `checks`.
    pub(crate) fn checks(&self, gguf: &Gguf, checks: Option<&Checks>, expert: usize, layout: Layout) -> Vec<Check> {
        let Some(checks) = checks else { return Vec::new() };
        let check = |part: &Part| {
            let (extent, at) = self.place(gguf, part, expert, layout);
            checks.slice(gguf, part.tensor, expert, at, extent)
        };
        self.parts.iter().map(check).collect()
    }

    /// The matrices of an expert whose parts are where `bytes_of` says.
    pub(super) fn view<'a>(&self, bytes_of: impl Fn(&Part) -> &'a [u8]) -> ExpertView<'a> {
        let linear = |matrix: &Matrix| {
            let (weight, bias) = (&self.parts[matrix.weight], matrix.bias.map(|at| &self.parts[at]));
            let weights = Weights::new(weight.ty, bytes_of(weight), matrix.n_out, matrix.n_in)
                .unwrap_or_else(|| unreachable!("an expert's slices have the sizes that its shape gives"));
            ViewLinear { weights, bias: bias.map(|part| Bias { ty: part.ty, bytes: bytes_of(part) }) }
        };
        match self.matrices.as_slice() {
            [gate, up, down] => ExpertView { gate: linear(gate), up: linear(up), down: linear(down) },
            [gate_up, down] => {
                let both = linear(gate_up);
                let n = self.expert_ffn;
                ExpertView { gate: both.rows(0, n), up: both.rows(n, n), down: linear(down) }
            }
            _ => unreachable!("an expert has a matrix for gate and up, or one each, and one for down"),
        }
    }
}
