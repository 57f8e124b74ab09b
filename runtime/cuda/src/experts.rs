//! Routed experts in a device's memory, pinned, in slots, or in buffers that all layers share. What a
//! token chose of them in a layer is computed in one sequence of launches, which the CPU does not wait for.
//!
//! The matrices of a layer form one table: the experts by index if any is pinned, then the slots, then the
//! shared buffers. Filling a slot or a buffer changes memory, and not the table. A pin that is given up, or
//! filled anew, changes both. What computes comes after the fills before it. A fill that is ordered after
//! what computes may follow as soon as the expert that the slot held was enqueued.

mod fill;
mod layer;
mod slots;

use super::device::{Buffer, Device, View};
use super::ops::{ChosenSum, Input, Quants, TokenGroup, TokenGroups};
use super::{CudaError, Ops};
use layer::{Activations, ExpertLayout, Fillable, Inner, Layer, Part, SharedBuffers, Uses};
use slots::SlotTransfers;
use std::sync::Arc;
use tier_plan_formats::model::spec::Activation;
use tier_plan_kernels::needs_quants;
use tier_plan_kernels::quant::TensorType;

/// Rows from which on experts are computed by matmul instead of matvec.
const MATMUL_MIN_ROWS: usize = 8;

/// Sizes and formats of a layer's experts.
#[derive(Debug, Clone, Copy)]
pub struct ExpertKind {
    /// Experts of the layer.
    pub n_expert: usize,
    /// Width of input and output.
    pub hidden: usize,
    /// Width between the matrices.
    pub ffn: usize,
    /// Format of `[ffn, hidden]`; `None` without a gate.
    pub gate: Option<TensorType>,
    /// Format of `[ffn, hidden]`.
    pub up: TensorType,
    /// Format of `[hidden, ffn]`.
    pub down: TensorType,
    /// Function that combines gate and up.
    pub activation: Activation,
    /// Whether an expert's weight multiplies what it reads instead of what it returns.
    pub weigh_input: bool,
}

impl ExpertKind {
    /// Whether gate or up take quantized activations.
    pub fn takes_quants(&self) -> bool {
        needs_quants(self.up) || self.gate.is_some_and(needs_quants)
    }

    /// Returns the bytes that an expert takes in a device's memory, padding included.
    pub fn device_bytes(&self) -> usize {
        ExpertLayout::new(self).stride
    }

    /// Returns the format of gate and up, where they have one.
    pub(super) fn one_format(&self) -> Option<TensorType> {
        self.gate
            .is_none_or(|gate| gate == self.up)
            .then_some(self.up)
    }
}

/// Bytes of one expert as in the model file.
#[derive(Debug, Clone, Copy)]
pub struct ExpertBytes<'a> {
    /// `[ffn, hidden]`; `None` without a gate.
    pub gate: Option<&'a [u8]>,
    /// `[ffn, hidden]`.
    pub up: &'a [u8],
    /// `[hidden, ffn]`.
    pub down: &'a [u8],
    /// Biases of gate, `[ffn]`, up, `[ffn]`, and down, `[hidden]`: for all experts of a layer or
    /// none. That of a gate that is missing has no meaning.
    pub biases: Option<[&'a [f32]; 3]>,
}

/// Where an expert is in a device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Pinned; the index of the expert.
    Pinned(usize),
    /// In a slot, by its index.
    Slot(usize),
    /// For the moment in a [shared buffer](PinnedExperts::share_buffers), by its index.
    Shared(usize),
}

/// Experts for rows of activations.
#[derive(Clone, Copy)]
pub struct RequestedExperts<'a> {
    /// Where they are. Each row takes equally many, the first row the first ones.
    pub places: &'a [Place],
    /// The experts' weights, which are read only where they multiply what experts
    /// [read](ExpertKind::weigh_input).
    pub weights: &'a [f32],
}

/// Experts that a token chose, on the device.
#[derive(Clone, Copy)]
pub struct ChosenExperts<'a> {
    /// `[hidden]`.
    pub input: View<'a>,
    /// Quantized `input`, where the layer's experts [take](PinnedExperts::takes_quants) it.
    pub quants: &'a Quants,
    /// `[tokens, n_used]` indices of experts.
    pub which: View<'a>,
    /// `[tokens, n_used]`.
    pub weights: View<'a>,
    /// Number of tokens.
    pub tokens: usize,
    /// Chosen experts per token.
    pub n_used: usize,
}

/// Experts of a model on one device.
pub struct PinnedExperts {
    ops: Ops,
    layers: Vec<Option<Layer>>,
    shared: Option<SharedBuffers>,
    buffers: ExpertBuffers,
    /// Rows of the buffers.
    rows: usize,
    /// Rows of activations in the buffers since the last [`ask`](Self::ask) that had any.
    given: usize,
    /// Results that were asked for and not fetched yet.
    asked: usize,
    /// Width of the results.
    hidden: usize,
    /// Bytes of matrices, pinned or in slots, with padding.
    bytes: u64,
    /// How slots are filled, where not by the device in its order.
    transfers: Option<SlotTransfers>,
}

/// Buffers of requests and their results.
struct ExpertBuffers {
    x: Buffer,
    x_quants: Quants,
    which: Buffer,
    weights: Buffer,
    groups: Buffer,
    gate: Buffer,
    up: Buffer,
    inner: Quants,
    out: Buffer,
}

/// Returns the numbers of values of the buffers for `rows` rows: of width `hidden`, and of width
/// `ffn`.
fn buffer_values(rows: usize, hidden: usize, ffn: usize) -> [usize; 2] {
    [rows.saturating_mul(hidden), rows.saturating_mul(ffn)].map(|n| n.next_multiple_of(32))
}

/// Returns the bytes of the buffers for `rows` rows, where `hidden` and `ffn` are the largest of
/// all layers.
pub fn workspace_bytes(rows: usize, hidden: usize, ffn: usize) -> u64 {
    let [outer, inner] = buffer_values(rows, hidden, ffn).map(|n| n as u64);
    // Codes, and a scale and two sums per 32 values.
    let quants = |n: u64| n + n / 32 * 12;
    8 * outer
        + quants(outer)
        + 8 * inner
        + quants(inner)
        + 4 * (2 + TokenGroups::WORDS as u64) * rows as u64
}

impl ExpertBuffers {
    fn new(
        device: &Arc<dyn Device>,
        rows: usize,
        hidden: usize,
        ffn: usize,
    ) -> Result<Self, CudaError> {
        let [outer, inner] = buffer_values(rows, hidden, ffn);
        Ok(Self {
            x: Buffer::new_f32(device, outer)?,
            x_quants: Quants::new(device, outer)?,
            which: Buffer::new_f32(device, rows)?,
            weights: Buffer::new_f32(device, rows)?,
            groups: Buffer::new_f32(device, TokenGroups::WORDS * rows)?,
            gate: Buffer::new_f32(device, inner)?,
            up: Buffer::new_f32(device, inner)?,
            inner: Quants::new(device, inner)?,
            out: Buffer::new_f32(device, outer)?,
        })
    }
}

impl PinnedExperts {
    /// Makes a store for the experts of `n_layers` layers: empty, and with no rows
    /// [reserved](Self::reserve).
    pub fn new(device: Arc<dyn Device>, n_layers: usize) -> Result<Self, CudaError> {
        let buffers = ExpertBuffers::new(&device, 0, 0, 0)?;
        let layers = (0..n_layers).map(|_| None).collect();
        Ok(Self {
            ops: Ops::new(device),
            layers,
            shared: None,
            buffers,
            rows: 0,
            given: 0,
            asked: 0,
            hidden: 0,
            bytes: 0,
            transfers: None,
        })
    }

    /// Allocates `n` buffers that experts of all layers use by turns, each of `len` bytes: the most
    /// [bytes](ExpertKind::device_bytes) that an expert of them needs. Only layers that are added
    /// later have these.
    pub fn share_buffers(&mut self, n: usize, len: usize) -> Result<(), CudaError> {
        let shared = SharedBuffers::new(self.ops.device(), n, len)?;
        self.bytes += shared.bytes() as u64;
        self.shared = Some(shared);
        Ok(())
    }

    /// Copies the pinned experts of a layer to the device, as pairs of index and bytes, and
    /// allocates its slots. `with_biases` says whether the layer's experts have biases.
    ///
    /// # Panics
    /// When an index or a size is not that of the layer.
    pub fn add_layer(
        &mut self,
        layer: usize,
        kind: ExpertKind,
        pinned: &[(usize, ExpertBytes<'_>)],
        n_slots: usize,
        with_biases: bool,
    ) -> Result<(), CudaError> {
        let added = Layer::new(
            self.ops.device(),
            kind,
            pinned,
            Fillable {
                n_slots,
                shared: self.shared.as_ref(),
            },
            with_biases,
        )?;
        self.bytes += ((pinned.len() + n_slots) * added.layout.stride) as u64;
        self.layers[layer] = Some(added);
        Ok(())
    }

    /// Allocates buffers for `rows` results between two calls of [`fetch`](Self::fetch).
    pub fn reserve(&mut self, rows: usize) -> Result<(), CudaError> {
        let kinds = || self.layers.iter().flatten().map(|l| l.kind);
        let (hidden, ffn) = (
            kinds().map(|k| k.hidden).max(),
            kinds().map(|k| k.ffn).max(),
        );
        self.buffers = ExpertBuffers::new(
            self.ops.device(),
            rows,
            hidden.unwrap_or(0),
            ffn.unwrap_or(0),
        )?;
        self.rows = rows;
        Ok(())
    }

    /// Returns how many results can be asked for until they are fetched.
    pub fn free_rows(&self) -> usize {
        self.rows - self.asked
    }

    /// Returns the bytes of matrices on the device.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    fn layer(&self, layer: usize) -> Option<&Layer> {
        self.layers.get(layer).and_then(Option::as_ref)
    }

    /// Whether an expert is pinned here.
    pub fn has(&self, layer: usize, expert: usize) -> bool {
        self.layer(layer).is_some_and(|l| l.has(expert))
    }

    /// Enqueues experts for rows of activations; [`fetch`](Self::fetch) returns the results, after
    /// those that were asked for before.
    ///
    /// `x` is `[rows, hidden]`; `None` takes the rows of the previous call for the same layer.
    ///
    /// # Panics
    /// When an expert is not here, the rows do not take equally many, or there are too few [free
    /// rows](Self::free_rows).
    pub fn ask(
        &mut self,
        layer: usize,
        x: Option<&[f32]>,
        experts: RequestedExperts<'_>,
    ) -> Result<(), CudaError> {
        if experts.places.is_empty() {
            return Ok(());
        }
        let Some(l) = self.layers.get(layer).and_then(Option::as_ref) else {
            panic!("layer {layer} on a device")
        };
        let ExpertKind {
            hidden,
            weigh_input,
            ..
        } = l.kind;
        let entry = |place: &Place| match (*place, l.spot(*place)) {
            (Place::Pinned(expert), _) if l.has(expert) => expert,
            (_, Some(spot)) => spot.entry,
            _ => panic!("{place:?} of layer {layer} is not on the device"),
        };
        let entries: Vec<usize> = experts.places.iter().map(entry).collect();
        let rows = x.map_or(self.given, |x| x.len() / hidden);
        let jobs = entries.len();
        let whole_rows = x.is_none_or(|x| x.len() == rows * hidden);
        assert!(
            whole_rows && rows > 0 && jobs.is_multiple_of(rows),
            "{jobs} of {rows}"
        );
        let free = self.rows - self.asked;
        assert!(
            jobs <= free && rows <= self.rows,
            "{jobs} uses, {free} free rows"
        );
        let (ops, b) = (&self.ops, &mut self.buffers);
        let which: Vec<u8> = entries
            .iter()
            .flat_map(|entry| (*entry as i32).to_ne_bytes())
            .collect();
        b.which.view().write(&which)?;
        if weigh_input {
            assert_eq!(experts.weights.len(), jobs, "weights of experts");
            b.weights.view().write_f32(experts.weights)?;
        }
        if let Some(x) = x {
            b.x.view().write_f32(x)?;
            if l.kind.takes_quants() {
                ops.quantize(b.x.view(), rows, hidden, &mut b.x_quants)?;
            }
        }
        self.given = rows;
        let results = b
            .out
            .view()
            .floats(self.asked * hidden..(self.asked + jobs) * hidden);
        let groups = if jobs == rows {
            consecutive_groups(&entries)
        } else {
            Vec::new()
        };
        let groups = TokenGroups::send(&groups, b.groups.view())?;
        let mut inner = Inner {
            gate: &b.gate,
            up: &b.up,
            quants: &mut b.inner,
        };
        let uses = Uses {
            which: b.which.view(),
            factors: weigh_input.then(|| b.weights.view()),
            jobs,
            rows,
            groups,
        };
        l.inner(
            ops,
            &mut inner,
            Activations {
                floats: b.x.view(),
                quants: &b.x_quants,
            },
            uses,
        )?;
        let x = Activations {
            floats: inner.gate.view(),
            quants: inner.quants,
        };
        l.product(ops, Part::Down, uses, x, 1, results)?;
        self.asked += jobs;
        self.hidden = hidden;
        Ok(())
    }

    /// Whether the experts of a layer take quantized input.
    pub fn takes_quants(&self, layer: usize) -> bool {
        self.layer(layer).is_some_and(|l| l.kind.takes_quants())
    }

    /// Computes the weighted sums of what the tokens' experts make, on top of `onto` where given,
    /// `[tokens, hidden]`; `out` may be `onto`. Nothing is copied to the host.
    ///
    /// # Panics
    /// When not all experts of the layer are pinned here, or there are too few
    /// [free rows](Self::free_rows).
    pub fn sum_chosen(
        &mut self,
        layer: usize,
        chosen: &ChosenExperts<'_>,
        onto: Option<View<'_>>,
        out: View<'_>,
    ) -> Result<(), CudaError> {
        let &ChosenExperts {
            input,
            quants,
            which,
            weights,
            tokens,
            n_used,
        } = chosen;
        let jobs = tokens * n_used;
        let Some(l) = self.layers.get(layer).and_then(Option::as_ref) else {
            panic!("layer {layer} on a device")
        };
        assert!(
            l.has_all() && jobs <= self.rows,
            "{jobs} experts of layer {layer}"
        );
        let ExpertKind {
            hidden,
            ffn,
            down,
            weigh_input,
            ..
        } = l.kind;
        let (ops, b) = (&self.ops, &mut self.buffers);
        let mut inner = Inner {
            gate: &b.gate,
            up: &b.up,
            quants: &mut b.inner,
        };
        let uses = Uses {
            which,
            factors: weigh_input.then_some(weights),
            jobs,
            rows: tokens,
            groups: TokenGroups::none(which),
        };
        l.inner(
            ops,
            &mut inner,
            Activations {
                floats: input,
                quants,
            },
            uses,
        )?;
        let sum = ChosenSum {
            ty: down,
            table: &l.down,
            which,
            bias: l.bias(Part::Down),
            weights: (!weigh_input).then_some(weights),
            tokens,
            n_used,
            n_rows: hidden,
            n_cols: ffn,
            x: Input::for_type(down, inner.gate.view(), inner.quants),
        };
        ops.chosen_sum(&sum, onto, out)
    }

    /// Returns the number of results that were asked for and not fetched yet.
    pub fn asked(&self) -> usize {
        self.asked
    }

    /// Waits for all results that were [asked](Self::ask) for, `[asked, hidden]` in the order of
    /// the requests.
    ///
    /// # Panics
    /// When `out` is not as long.
    pub fn fetch(&mut self, out: &mut [f32]) -> Result<(), CudaError> {
        assert_eq!(
            out.len(),
            self.asked * self.hidden,
            "results of experts on a device"
        );
        self.asked = 0;
        self.buffers.out.view().read_f32(out)
    }

    /// Drops the results that were asked for.
    pub fn forget(&mut self) {
        self.asked = 0;
    }
}

/// Returns the runs of equal table entries, which are multiplied together; none for few rows.
fn consecutive_groups(entries: &[usize]) -> Vec<TokenGroup> {
    let mut groups = Vec::new();
    if entries.len() >= MATMUL_MIN_ROWS {
        let mut first = 0;
        for run in entries.chunk_by(|a, b| a == b) {
            groups.push(TokenGroup {
                matrix: run[0],
                first,
                tokens: run.len(),
            });
            first += run.len();
        }
    }
    groups
}

#[cfg(test)]
mod tests;
