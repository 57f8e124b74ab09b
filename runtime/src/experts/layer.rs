//! One layer's experts: the backing copy of each, the location of its slices in the files and in a
//! buffer, and the slots that the pooled ones share.

use super::cache::SlotCache;
use super::checksums::{Checksums, TensorSlice};
use super::copies::LayerCopy;
use super::ids::{ExpertId, SlotId};
use super::view::{Bias, ExpertView, ViewLinear};
use crate::tiers::arena::ArenaSlice;
use crate::tiers::file::{BandsInBuffer, Extent, Finish, SliceChecksum, Span};
use crate::tiers::source::ALIGN;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::model::Scales;
use tier_plan_formats::model::spec::{ExpertLinear, MoeSpec, TensorId};
use tier_plan_formats::placement::{SlotPolicy, TierIdx};
use tier_plan_kernels::quant::TensorType;
use tier_plan_kernels::{Kernels, RowOrder, Weights};

/// One of the tensors that hold all experts of a layer, of which each expert has a slice.
pub(super) struct Part {
    pub(super) tensor: TensorId,
    ty: TensorType,
    /// Offset of the slice in an expert's [packed](Layout::Packed) bytes.
    pub(super) packed_offset: usize,
    /// Offset of the slice's first page in a buffer of [whole pages](Layout::WholePages).
    page_offset: usize,
    pub(super) slice_bytes: usize,
    /// Bytes per row of interleaved rows; `None` where buffers hold them in the order of the file.
    band_row_bytes: Option<usize>,
    /// Slices of the tensor: one per expert.
    pub(super) n_slices: usize,
}

/// Where one slice of an expert is.
pub(super) struct SliceLocation {
    /// In the files.
    pub(super) extent: Extent,
    pub(super) buffer_offset: usize,
}

/// How an expert's slices are laid out in a buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Layout {
    /// One after the other, without padding.
    Packed,
    /// Each at the same distance from the beginning of a page as in the file, so that direct I/O
    /// reads its pages straight into the buffer.
    WholePages,
}

/// One of an expert's matrices, as indices of its parts.
struct Matrix {
    weight: usize,
    bias: Option<usize>,
    /// `[n_expert]`: factors on the products; empty where there are none.
    scales: Vec<f32>,
    n_out: usize,
    n_in: usize,
}

/// Where the backing copy of an expert is: the one that it keeps for the whole run.
pub(crate) enum ExpertBacking {
    /// In the mapped file, where it computes.
    Mapped,
    /// In a tier's arena, where it computes.
    Pinned {
        tier: TierIdx,
        bytes: ArenaSlice,
        layout: Layout,
    },
    /// In the memory of the GPU of this tier, where it computes.
    Gpu(TierIdx),
    /// On the slow tier. It shares the layer's slots and staging with the other pooled experts.
    Pooled,
}

/// A file that holds each of its experts as one contiguous copy.
struct PackedCopy {
    /// Index of the file.
    part: usize,
    /// `[n_expert]` where each expert begins, if the copy has it.
    offsets: Vec<Option<u64>>,
}

/// All routed experts of one layer.
pub(crate) struct LayerExperts {
    pub(super) parts: Vec<Part>,
    /// Gate, up, and down; or gate and up fused, and down.
    matrices: Vec<Matrix>,
    expert_ffn: usize,
    /// Whether experts have gates.
    is_gated: bool,
    pub(super) expert_bytes: usize,
    /// Bytes of a buffer with room for whole pages.
    pub(super) paged_bytes: usize,
    /// The layout of the layer's experts in slots and staging.
    pub(super) layout: Layout,
    /// `[n_expert]`.
    pub(super) backings: Vec<ExpertBacking>,
    copy: Option<PackedCopy>,
    /// Copies on other drives, which reads are shared with.
    pub(super) copies: Vec<LayerCopy>,
    /// Interleaves what is read into buffers.
    kernels: Kernels,
    pub(super) cache: SlotCache,
    pub(super) policy: SlotPolicy,
    /// `[n_slots]`; `None` while a read into the slot is in flight. Empty where the slots are on a
    /// GPU.
    pub(super) slots: Vec<Option<ArenaSlice>>,
    pub(super) slot_tier: TierIdx,
    pub(super) slots_on_gpu: bool,
}

impl Part {
    /// Returns the order of a matrix's rows in buffers.
    pub(super) fn order_in_buffers(&self) -> RowOrder {
        match self.band_row_bytes {
            Some(_) => RowOrder::Interleaved,
            None => RowOrder::Sequential,
        }
    }

    /// Returns the location of an expert's slice in the model's file.
    pub(super) fn extent(&self, gguf: &Gguf, expert: usize) -> Extent {
        let info = &gguf.tensors()[self.tensor];
        Extent::of_slice(info, expert, self.n_slices)
    }
}

impl LayerExperts {
    /// Makes a layer without slots. `backings` is `[n_expert]`.
    pub(crate) fn new(
        gguf: &Gguf,
        moe: &MoeSpec,
        backings: Vec<ExpertBacking>,
        slot_tier: TierIdx,
    ) -> Self {
        let (mut parts, mut expert_bytes, mut paged_bytes) = (Vec::new(), 0, 0);
        let mut part = |tensor: TensorId| {
            let info = &gguf.tensors()[tensor];
            let slice_bytes = info.n_bytes as usize / moe.n_expert;
            let part = Part {
                tensor,
                ty: info.ty,
                packed_offset: expert_bytes,
                page_offset: paged_bytes,
                slice_bytes,
                band_row_bytes: None,
                n_slices: moe.n_expert,
            };
            expert_bytes += slice_bytes;
            let pages = (0..moe.n_expert).map(|expert| part.extent(gguf, expert).pages_bytes());
            paged_bytes += pages.max().unwrap_or(0);
            parts.push(part);
            parts.len() - 1
        };
        let matrix = |l: &ExpertLinear| {
            let weight = part(l.weight);
            Matrix {
                weight,
                bias: l.bias.map(&mut part),
                scales: Vec::new(),
                n_out: l.n_out,
                n_in: l.n_in,
            }
        };
        let matrices = moe.expert_linears().map(matrix).collect();
        Self {
            expert_bytes,
            paged_bytes,
            layout: Layout::Packed,
            parts,
            matrices,
            expert_ffn: moe.expert_ffn,
            is_gated: moe.has_gate(),
            backings,
            copy: None,
            copies: Vec::new(),
            kernels: Kernels::SCALAR,
            cache: SlotCache::new(moe.n_expert as u32, 0, SlotPolicy::Lru),
            policy: SlotPolicy::Lru,
            slots: Vec::new(),
            slot_tier,
            slots_on_gpu: false,
        }
    }

    /// Gives the experts' matrices their factors.
    pub(crate) fn with_scales(mut self, scales: &Scales) -> Self {
        for matrix in &mut self.matrices {
            let tensor = self.parts[matrix.weight].tensor;
            matrix.scales = scales.of_experts(tensor).unwrap_or_default().to_vec();
        }
        self
    }

    /// Has buffers hold the rows of these matrices interleaved, as the kernels read them.
    pub(crate) fn interleave(&mut self, kernels: Kernels, matrices: &[TensorId]) {
        self.kernels = kernels;
        for matrix in &self.matrices {
            let part = &mut self.parts[matrix.weight];
            if matrices.contains(&part.tensor) {
                part.band_row_bytes = Some(part.slice_bytes / matrix.n_out);
            }
        }
    }

    /// Makes a layer whose experts are all pooled, without slots.
    pub(crate) fn all_pooled(gguf: &Gguf, moe: &MoeSpec) -> Self {
        Self::new(
            gguf,
            moe,
            (0..moe.n_expert).map(|_| ExpertBacking::Pooled).collect(),
            TierIdx::FIRST,
        )
    }

    /// Makes a tier's arena the backing of an expert, whose bytes are [packed](Layout::Packed).
    pub(crate) fn pin(&mut self, expert: usize, tier: TierIdx, bytes: ArenaSlice) {
        self.backings[expert] = ExpertBacking::Pinned {
            tier,
            bytes,
            layout: Layout::Packed,
        };
    }

    /// Makes the GPU of a tier the backing of an expert.
    pub(crate) fn pin_on_gpu(&mut self, expert: usize, tier: TierIdx) {
        self.backings[expert] = ExpertBacking::Gpu(tier);
    }

    /// Makes all experts on the slow tier share the slots or, where there are none and the tier is
    /// mapped, compute where they are.
    pub(super) fn set_homes(&mut self, is_mapped: bool) {
        let in_place = is_mapped && self.cache.n_slots() == 0;
        for backing in &mut self.backings {
            if matches!(backing, ExpertBacking::Mapped | ExpertBacking::Pooled) {
                *backing = if in_place {
                    ExpertBacking::Mapped
                } else {
                    ExpertBacking::Pooled
                };
            }
        }
    }

    pub(super) fn backing(&self, expert: ExpertId) -> &ExpertBacking {
        &self.backings[expert.index()]
    }

    /// Whether the expert is pooled; false for a number that the layer does not have.
    pub(super) fn is_pooled(&self, expert: ExpertId) -> bool {
        matches!(
            self.backings.get(expert.index()),
            Some(ExpertBacking::Pooled)
        )
    }

    /// Returns the slices of all experts that are neither pinned nor on a GPU.
    pub(super) fn mapped_slices(&self) -> impl Iterator<Item = TensorSlice> {
        let is_mapped = |backing: &ExpertBacking| {
            matches!(backing, ExpertBacking::Mapped | ExpertBacking::Pooled)
        };
        let experts = self
            .backings
            .iter()
            .enumerate()
            .filter(move |(_, backing)| is_mapped(backing));
        experts.flat_map(|(expert, _)| {
            self.parts.iter().map(move |part| TensorSlice {
                tensor: part.tensor,
                slice: expert,
            })
        })
    }

    /// Returns the matrices of an expert whose slices are [packed](Layout::Packed) in `bytes`, for
    /// a GPU: without factors, for which GPUs have no kernels.
    pub(crate) fn packed<'a>(&self, bytes: &'a [u8]) -> ExpertView<'a> {
        self.view(None, |part| {
            let slice = &bytes[part.packed_offset..][..part.slice_bytes];
            (slice, RowOrder::Sequential)
        })
    }

    /// Returns the number of experts in the layer.
    pub(crate) fn n_expert(&self) -> usize {
        self.backings.len()
    }

    /// Returns the bytes of one expert, all of its slices together.
    pub(crate) fn expert_bytes(&self) -> usize {
        self.expert_bytes
    }

    /// Returns what the addresses of the layer's slots are multiples of.
    pub(super) fn alignment(&self) -> usize {
        match self.layout {
            Layout::Packed => 1,
            Layout::WholePages => ALIGN,
        }
    }

    /// Returns the bytes of a buffer for any of the layer's experts.
    pub(crate) fn buffer_bytes(&self, layout: Layout) -> usize {
        match layout {
            Layout::Packed => self.expert_bytes,
            Layout::WholePages => self.paged_bytes,
        }
    }

    /// Gives the layer its slots: their buffers, the layout in slots and staging, and the policy
    /// that decides which experts are in them.
    pub(crate) fn set_slots(&mut self, slots: Vec<ArenaSlice>, layout: Layout, policy: SlotPolicy) {
        self.layout = layout;
        self.policy = policy;
        self.cache = SlotCache::new(self.n_expert() as u32, slots.len() as u32, policy);
        self.slots = slots.into_iter().map(Some).collect();
    }

    /// Gives the layer `n` slots in a GPU's memory; `layout` is that of staging.
    pub(crate) fn set_slots_on_gpu(&mut self, n: u32, layout: Layout, policy: SlotPolicy) {
        self.set_slots(Vec::new(), layout, policy);
        self.cache = SlotCache::new(self.n_expert() as u32, n, policy);
        self.slots_on_gpu = true;
    }

    /// Puts an expert's bytes, in a buffer of the tier `from`, into its slot: by exchange where both
    /// buffers have one size and are on one tier. Returns the free buffer.
    pub(super) fn exchange(
        &mut self,
        slot: SlotId,
        mut buffer: ArenaSlice,
        from: TierIdx,
    ) -> ArenaSlice {
        if let Some(target) = &mut self.slots[slot.index()] {
            if target.capacity() == buffer.capacity() && self.slot_tier == from {
                std::mem::swap(target, &mut buffer);
            } else {
                target.copy_from_slice(&buffer);
            }
        }
        buffer
    }

    /// Reads experts from a file that holds each as one contiguous copy. `part` is the file's
    /// index, `offsets` (`[n_expert]`) where the experts begin. `is_pooled` says which of them will
    /// be read into slots and staging.
    pub(crate) fn use_copy(
        &mut self,
        part: usize,
        offsets: &[Option<u64>],
        is_pooled: impl Fn(usize) -> bool,
    ) {
        let copy_bytes = self.expert_bytes.next_multiple_of(ALIGN);
        let has_all =
            (0..offsets.len()).all(|expert| offsets[expert].is_some() || !is_pooled(expert));
        self.paged_bytes = if has_all {
            copy_bytes
        } else {
            self.paged_bytes.max(copy_bytes)
        };
        self.copy = Some(PackedCopy {
            part,
            offsets: offsets.to_vec(),
        });
    }

    /// Returns the location of an expert in the contiguous copy, if that has it.
    pub(super) fn extent_in_copy(&self, expert: usize) -> Option<Extent> {
        let copy = self.copy.as_ref()?;
        let offset = copy.offsets.get(expert).copied().flatten()?;
        Some(Extent {
            part: copy.part,
            offset,
            len: self.expert_bytes,
        })
    }

    /// Returns the reads that bring an expert into a buffer with this layout.
    pub(crate) fn spans(&self, gguf: &Gguf, expert: usize, layout: Layout) -> Vec<Span> {
        let whole_pages = layout == Layout::WholePages;
        if let Some(extent) = self.extent_in_copy(expert) {
            return vec![Span {
                extent,
                at: 0,
                whole_pages,
            }];
        }
        let span = |part: &Part| {
            let SliceLocation {
                extent,
                buffer_offset,
            } = self.slice_location(gguf, part, expert, layout);
            Span {
                extent,
                at: buffer_offset,
                whole_pages,
            }
        };
        self.parts.iter().map(span).collect()
    }

    /// Returns where one of an expert's slices is read from, and where it is in a buffer with this
    /// layout.
    pub(super) fn slice_location(
        &self,
        gguf: &Gguf,
        part: &Part,
        expert: usize,
        layout: Layout,
    ) -> SliceLocation {
        match (self.extent_in_copy(expert), part.extent(gguf, expert)) {
            (Some(copy), Extent { len, .. }) => {
                let extent = Extent {
                    part: copy.part,
                    offset: copy.offset + part.packed_offset as u64,
                    len,
                };
                SliceLocation {
                    extent,
                    buffer_offset: part.packed_offset,
                }
            }
            (None, extent) if layout == Layout::Packed => SliceLocation {
                extent,
                buffer_offset: part.packed_offset,
            },
            (None, extent) => SliceLocation {
                extent,
                buffer_offset: part.page_offset + extent.head(),
            },
        }
    }

    /// Returns what is done with an expert's bytes once they are in a buffer with this layout:
    /// compared with `checksums`, if there are some, and interleaved.
    pub(crate) fn finish(
        &self,
        gguf: &Gguf,
        checksums: Option<&Checksums>,
        expert: usize,
        layout: Layout,
    ) -> Finish {
        let bands = self.parts.iter().filter_map(|part| {
            let at = self
                .slice_location(gguf, part, expert, layout)
                .buffer_offset;
            Some(BandsInBuffer {
                kernels: self.kernels,
                ty: part.ty,
                range: at..at + part.slice_bytes,
                row_bytes: part.band_row_bytes?,
            })
        });
        let bands = bands.collect();
        let checks = self.checks(gguf, checksums, expert, layout);
        Finish { checks, bands }
    }

    /// Returns the checksums that an expert's slices must have in a buffer with this layout; none
    /// without `checksums`.
    fn checks(
        &self,
        gguf: &Gguf,
        checksums: Option<&Checksums>,
        expert: usize,
        layout: Layout,
    ) -> Vec<SliceChecksum> {
        let Some(checksums) = checksums else {
            return Vec::new();
        };
        let check = |part: &Part| {
            let SliceLocation {
                extent,
                buffer_offset,
            } = self.slice_location(gguf, part, expert, layout);
            checksums.slice(gguf, part.tensor, expert, buffer_offset, extent)
        };
        self.parts.iter().map(check).collect()
    }

    /// Returns the matrices of an expert whose slices `slice_of` returns. `expert` says whose
    /// factors they have.
    pub(super) fn view<'a>(
        &self,
        expert: Option<ExpertId>,
        slice_of: impl Fn(&Part) -> (&'a [u8], RowOrder),
    ) -> ExpertView<'a> {
        let linear = |matrix: &Matrix| {
            let (weight, bias) = (
                &self.parts[matrix.weight],
                matrix.bias.map(|part| &self.parts[part]),
            );
            let (bytes, order) = slice_of(weight);
            let weights = Weights::new(weight.ty, bytes, matrix.n_out, matrix.n_in)
                .and_then(|weights| weights.in_order(order))
                .unwrap_or_else(|| {
                    unreachable!("an expert's slices have the sizes that its shape gives")
                });
            let scale = expert.and_then(|expert| matrix.scales.get(expert.index()));
            ViewLinear {
                weights: weights.scaled(scale.copied().unwrap_or(1.0)),
                bias: bias.map(|part| Bias {
                    ty: part.ty,
                    bytes: slice_of(part).0,
                }),
            }
        };
        let is_gated = self.is_gated;
        match self.matrices.as_slice() {
            [gate, up, down] => ExpertView {
                is_gated,
                gate: linear(gate),
                up: linear(up),
                down: linear(down),
            },
            [up, down] if !is_gated => ExpertView {
                is_gated,
                gate: linear(up),
                up: linear(up),
                down: linear(down),
            },
            [gate_up, down] => {
                let fused = linear(gate_up);
                let n = self.expert_ffn;
                ExpertView {
                    is_gated,
                    gate: fused.rows(0, n),
                    up: fused.rows(n, n),
                    down: linear(down),
                }
            }
            _ => unreachable!(
                "an expert has a matrix for gate and up, or one each, and one for down"
            ),
        }
    }
}
