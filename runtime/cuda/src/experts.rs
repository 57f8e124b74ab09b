//! Routed experts in a device's memory, pinned there or in slots, and what they compute: all that a token chose of a layer
//! in one row of launches, which the processor does not wait for.
//!
//! A layer's matrices are one table: the pinned experts by their numbers, then the slots. What a slot holds changes where
//! it lies, so the table never does; and since a device does all in one order, a slot may be filled anew as soon as what
//! it held has been asked for.

use super::device::{Buffer, Device, View};
use super::ops::{Batch, ChosenSum, Gated, Group, Groups, Input, Matrices, Pair, Quants, SharedPart, Table};
use super::{CudaError, Ops};
use std::sync::Arc;
use tier_plan_formats::model::spec::Activation;
use tier_plan_kernels::needs_quants;
use tier_plan_kernels::quant::TensorType;

/// Where a matrix begins in a device's memory: at multiples of this.
const ALIGNED: usize = 256;

/// Rows from which on matrices are multiplied with many at a time.
const MANY: usize = 8;

/// The experts of a layer: their sizes and what they are made of.
#[derive(Debug, Clone, Copy)]
pub struct ExpertKind {
    /// Experts of the layer.
    pub n_expert: usize,
    /// Width of what goes in and comes out.
    pub hidden: usize,
    /// Width inside.
    pub ffn: usize,
    /// Type of `[ffn, hidden]`.
    pub gate: TensorType,
    /// Type of `[ffn, hidden]`.
    pub up: TensorType,
    /// Type of `[hidden, ffn]`.
    pub down: TensorType,
    /// What stands between the products.
    pub activation: Activation,
}

/// One expert as it lies in the file.
#[derive(Debug, Clone, Copy)]
pub struct ExpertBytes<'a> {
    /// `[ffn, hidden]`.
    pub gate: &'a [u8],
    /// `[ffn, hidden]`.
    pub up: &'a [u8],
    /// `[hidden, ffn]`.
    pub down: &'a [u8],
    /// Of gate, `[ffn]`, up, `[ffn]`, and down, `[hidden]`; all or none of a layer's experts have them.
    pub biases: Option<[&'a [f32]; 3]>,
}

/// The room of one expert: where its matrices begin, and bytes of each.
#[derive(Debug, Clone, Copy)]
struct Places {
    at: [usize; 3],
    len: [usize; 3],
    /// All of it, up to where the next one begins.
    all: usize,
}

impl Places {
    fn new(kind: &ExpertKind) -> Self {
        let ExpertKind { hidden, ffn, .. } = *kind;
        let of = |ty: TensorType, rows: usize, cols: usize| {
            let row = ty.row_bytes(cols as u64).unwrap_or_else(|| panic!("rows of {cols} {ty} values"));
            row as usize * rows
        };
        let len = [of(kind.gate, ffn, hidden), of(kind.up, ffn, hidden), of(kind.down, hidden, ffn)];
        let round = |bytes: usize| bytes.next_multiple_of(ALIGNED);
        let at = [0, round(len[0]), round(len[0]) + round(len[1])];
        Self { at, len, all: at[2] + round(len[2]) }
    }

    /// The bytes of one of the matrices of the `i`-th expert.
    fn range(&self, i: usize, matrix: usize) -> std::ops::Range<usize> {
        let start = i * self.all + self.at[matrix];
        start..start + self.len[matrix]
    }
}

/// The experts of one layer.
struct Layer {
    kind: ExpertKind,
    places: Places,
    gate: Table<'static>,
    up: Table<'static>,
    down: Table<'static>,
    /// `[n_expert + slots, _]` of gate, up and down; those of experts that are elsewhere are zeros.
    biases: Option<[Buffer; 3]>,
    /// Which experts are pinned.
    here: Vec<bool>,
    slots: Arc<Buffer>,
    n_slots: usize,
}

impl Layer {
    /// The biases of gate, up or down.
    fn bias(&self, matrix: usize) -> Option<View<'_>> {
        self.biases.as_ref().map(|biases| biases[matrix].view())
    }

    /// Copies an expert to its place in a buffer, and its biases to their row.
    fn put(&self, memory: &Buffer, i: usize, row: usize, expert: &ExpertBytes<'_>) -> Result<(), CudaError> {
        for (matrix, bytes) in [expert.gate, expert.up, expert.down].into_iter().enumerate() {
            let range = self.places.range(i, matrix);
            assert_eq!(range.len(), bytes.len(), "bytes of matrix {matrix} of an expert");
            memory.view().part(range).write(bytes)?;
        }
        if let (Some(all), Some(own)) = (&self.biases, expert.biases) {
            for (all, own) in all.iter().zip(own) {
                all.view().floats(row * own.len()..(row + 1) * own.len()).write_f32(own)?;
            }
        }
        Ok(())
    }
}

/// An expert in a device's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// The pinned expert of this number.
    Pinned(usize),
    /// What this slot holds.
    Slot(usize),
}

/// Experts of a model on one device.
pub struct PinnedExperts {
    ops: Ops,
    layers: Vec<Option<Layer>>,
    room: Room,
    /// Rows that there is room for.
    rows: usize,
    /// Rows that the last one to ask gave.
    given: usize,
    /// Results asked for and not fetched yet.
    asked: usize,
    /// Width of the results.
    hidden: usize,
    /// Bytes of matrices, in slots or pinned, with what lies between them.
    bytes: u64,
}

/// Buffers for what is asked for.
struct Room {
    x: Buffer,
    x_quants: Quants,
    which: Buffer,
    groups: Buffer,
    gate: Buffer,
    up: Buffer,
    inner: Quants,
    out: Buffer,
}

/// Values of the buffers for so many rows.
fn room_sizes(rows: usize, hidden: usize, ffn: usize) -> [usize; 2] {
    [rows.saturating_mul(hidden), rows.saturating_mul(ffn)].map(|n| n.next_multiple_of(32))
}

/// Bytes of the buffers for `rows` uses of experts of a model whose layers are at most so wide.
pub fn workspace_bytes(rows: usize, hidden: usize, ffn: usize) -> u64 {
    let [outer, inner] = room_sizes(rows, hidden, ffn).map(|n| n as u64);
    // Codes, and a scale and two sums for each 32 values.
    let quants = |n: u64| n + n / 32 * 12;
    8 * outer + quants(outer) + 8 * inner + quants(inner) + 4 * (1 + Groups::WORDS as u64) * rows as u64
}

impl Room {
    fn new(device: &Arc<dyn Device>, rows: usize, hidden: usize, ffn: usize) -> Result<Self, CudaError> {
        let [outer, inner] = room_sizes(rows, hidden, ffn);
        Ok(Self {
            x: Buffer::room_f32(device, outer)?,
            x_quants: Quants::new(device, outer)?,
            which: Buffer::room_f32(device, rows)?,
            groups: Buffer::room_f32(device, Groups::WORDS * rows)?,
            gate: Buffer::room_f32(device, inner)?,
            up: Buffer::room_f32(device, inner)?,
            inner: Quants::new(device, inner)?,
            out: Buffer::room_f32(device, outer)?,
        })
    }
}

impl PinnedExperts {
    /// No expert of `n_layers` layers yet, and no room for what is asked for.
    ///
    /// # Errors
    /// When the device fails.
    pub fn new(device: Arc<dyn Device>, n_layers: usize) -> Result<Self, CudaError> {
        let room = Room::new(&device, 0, 0, 0)?;
        let layers = (0..n_layers).map(|_| None).collect();
        Ok(Self { ops: Ops::new(device), layers, room, rows: 0, given: 0, asked: 0, hidden: 0, bytes: 0 })
    }

    /// Copies experts of a layer to the device, `pinned` by number, and makes slots; `with_biases` if the layer's experts
    /// have any.
    ///
    /// # Errors
    /// When there is not enough memory, or the device fails.
    ///
    /// # Panics
    /// When a number or a size is not the layer's.
    pub fn add_layer(
        &mut self,
        layer: usize,
        kind: ExpertKind,
        pinned: &[(usize, ExpertBytes<'_>)],
        n_slots: usize,
        with_biases: bool,
    ) -> Result<(), CudaError> {
        let device = self.ops.device();
        let places = Places::new(&kind);
        let buffer = |n: usize| Ok::<_, CudaError>(Arc::new(Buffer::new(device, n.saturating_mul(places.all))?));
        let (pins, slots) = (buffer(pinned.len())?, buffer(n_slots)?);
        let n = kind.n_expert + n_slots;
        let mut here = vec![false; kind.n_expert];
        let mut tables: [Vec<Option<SharedPart>>; 3] = std::array::from_fn(|_| vec![None; n]);
        for (matrix, table) in tables.iter_mut().enumerate() {
            for (i, (number, _)) in pinned.iter().enumerate() {
                table[*number] = Some((Arc::clone(&pins), places.range(i, matrix)));
                here[*number] = true;
            }
            for slot in 0..n_slots {
                table[kind.n_expert + slot] = Some((Arc::clone(&slots), places.range(slot, matrix)));
            }
        }
        let [gate, up, down] = tables;
        let zeros = |width: usize| Buffer::of_f32(device, &vec![0.0; n * width]);
        let biases = if with_biases { Some([zeros(kind.ffn)?, zeros(kind.ffn)?, zeros(kind.hidden)?]) } else { None };
        let made = Layer {
            kind,
            places,
            gate: Table::owning(device, gate)?,
            up: Table::owning(device, up)?,
            down: Table::owning(device, down)?,
            biases,
            here,
            slots,
            n_slots,
        };
        for (i, (number, expert)) in pinned.iter().enumerate() {
            made.put(&pins, i, *number, expert)?;
        }
        self.bytes += ((pinned.len() + n_slots) * places.all) as u64;
        self.layers[layer] = Some(made);
        Ok(())
    }

    /// Makes room for `rows` results between two times that they are fetched.
    ///
    /// # Errors
    /// When there is not enough memory.
    pub fn reserve(&mut self, rows: usize) -> Result<(), CudaError> {
        let kinds = || self.layers.iter().flatten().map(|l| l.kind);
        let (hidden, ffn) = (kinds().map(|k| k.hidden).max(), kinds().map(|k| k.ffn).max());
        self.room = Room::new(self.ops.device(), rows, hidden.unwrap_or(0), ffn.unwrap_or(0))?;
        self.rows = rows;
        Ok(())
    }

    /// Results that there is room for until they are fetched.
    pub fn room(&self) -> usize {
        self.rows - self.asked
    }

    /// Bytes that matrices take on the device.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Copies an expert into a slot, after all that was asked of the one that it held.
    ///
    /// # Errors
    /// When the device fails; nothing is known of the slot then.
    ///
    /// # Panics
    /// When there is no such slot, or a size is not the layer's.
    pub fn fill(&mut self, layer: usize, slot: usize, expert: &ExpertBytes<'_>) -> Result<(), CudaError> {
        let Some(l) = self.layers.get(layer).and_then(Option::as_ref) else { panic!("layer {layer} on a device") };
        assert!(slot < l.n_slots, "slot {slot} of {}", l.n_slots);
        l.put(&l.slots, slot, l.kind.n_expert + slot, expert)
    }

    /// The matrices that a slot holds, one after the other.
    ///
    /// # Errors
    /// When the device fails.
    #[cfg(any(test, feature = "emulator"))]
    pub fn slot_bytes(&self, layer: usize, slot: usize) -> Result<Vec<u8>, CudaError> {
        let Some(l) = self.layers[layer].as_ref() else { return Ok(Vec::new()) };
        let parts = (0..3).map(|matrix| l.slots.view().part(l.places.range(slot, matrix)).to_bytes());
        Ok(parts.collect::<Result<Vec<_>, _>>()?.concat())
    }

    /// Whether an expert is here.
    pub fn has(&self, layer: usize, expert: usize) -> bool {
        self.layers.get(layer).and_then(Option::as_ref).is_some_and(|l| l.here.get(expert) == Some(&true))
    }

    /// Asks for results: `x` is `[rows, hidden]`, or the rows of the last time, which had the same layer; each row goes
    /// through as many of `experts` as there are for it, the first row's first. [`fetch`](Self::fetch) has the results,
    /// after those that were asked for before.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When an expert is not here, there are not as many for each row, or there is no [room](Self::room).
    pub fn ask(&mut self, layer: usize, x: Option<&[f32]>, experts: &[Place]) -> Result<(), CudaError> {
        if experts.is_empty() {
            return Ok(());
        }
        let Some(l) = self.layers.get(layer).and_then(Option::as_ref) else { panic!("layer {layer} on a device") };
        let ExpertKind { n_expert, hidden, .. } = l.kind;
        let number = |place: &Place| match *place {
            Place::Pinned(expert) if l.here.get(expert) == Some(&true) => expert,
            Place::Slot(slot) if slot < l.n_slots => n_expert + slot,
            _ => panic!("{place:?} of layer {layer} is not on the device"),
        };
        let numbers: Vec<usize> = experts.iter().map(number).collect();
        let rows = x.map_or(self.given, |x| x.len() / hidden);
        let jobs = numbers.len();
        assert!(
            x.is_none_or(|x| x.len() == rows * hidden) && rows > 0 && jobs.is_multiple_of(rows),
            "{jobs} of {rows}"
        );
        assert!(
            jobs <= self.rows - self.asked && rows <= self.rows,
            "{jobs} uses, room for {}",
            self.rows - self.asked
        );
        let (ops, r) = (&self.ops, &mut self.room);
        let which: Vec<u8> = numbers.iter().flat_map(|n| (*n as i32).to_ne_bytes()).collect();
        r.which.view().write(&which)?;
        if let Some(x) = x {
            r.x.view().write_f32(x)?;
            if needs_quants(l.kind.gate) || needs_quants(l.kind.up) {
                ops.quantize(r.x.view(), rows, hidden, &mut r.x_quants)?;
            }
        }
        self.given = rows;
        let results = r.out.view().floats(self.asked * hidden..(self.asked + jobs) * hidden);
        // With rows of their own, neighbours that go through the same expert are multiplied together.
        let mut alike_rows = Vec::new();
        if jobs == rows && jobs >= MANY {
            let mut first = 0;
            for alike in numbers.chunk_by(|a, b| a == b) {
                alike_rows.push(Group { matrix: alike[0], first, tokens: alike.len() });
                first += alike.len();
            }
        }
        let groups = Groups::send(&alike_rows, r.groups.view())?;
        let mut inner = Inner { gate: &r.gate, up: &r.up, quants: &mut r.inner };
        let uses = Uses { which: r.which.view(), jobs, rows, groups };
        first_products(ops, l, &mut inner, r.x.view(), &r.x_quants, uses)?;
        let (gate, quants) = (inner.gate.view(), &*inner.quants);
        product(ops, uses, l, 2, gate, quants, 1, results)?;
        self.asked += jobs;
        self.hidden = hidden;
        Ok(())
    }

    /// Whether the experts of a layer take what goes in in 8 bits.
    pub fn takes_quants(&self, layer: usize) -> bool {
        let kind = self.layers.get(layer).and_then(Option::as_ref).map(|l| l.kind);
        kind.is_some_and(|kind| needs_quants(kind.gate) || needs_quants(kind.up))
    }

    /// Adds to `x`, `[hidden]`, what the experts that `which`, `[n]`, numbers on the device make of `input`, `[hidden]`, each
    /// by its weight of `weights`, `[n]`; `quants` are those of `input`, where they [take](Self::takes_quants) them. Nothing
    /// comes back to the host.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When not all experts of the layer are pinned here, or there is no [room](Self::room).
    pub fn add_chosen(
        &mut self,
        layer: usize,
        input: View<'_>,
        quants: &Quants,
        which: View<'_>,
        weights: View<'_>,
        n: usize,
        x: View<'_>,
    ) -> Result<(), CudaError> {
        let Some(l) = self.layers.get(layer).and_then(Option::as_ref) else { panic!("layer {layer} on a device") };
        assert!(l.here.iter().all(|here| *here) && n <= self.rows, "{n} experts of layer {layer}");
        let ExpertKind { hidden, ffn, down, .. } = l.kind;
        let (ops, r) = (&self.ops, &mut self.room);
        let mut inner = Inner { gate: &r.gate, up: &r.up, quants: &mut r.inner };
        first_products(
            ops,
            l,
            &mut inner,
            input,
            quants,
            Uses { which, jobs: n, rows: 1, groups: Groups::none(which) },
        )?;
        let sum = ChosenSum {
            ty: down,
            table: &l.down,
            which,
            bias: l.bias(2),
            weights,
            tokens: 1,
            n_used: n,
            n_rows: hidden,
            n_cols: ffn,
            x: if needs_quants(down) { Input::Quants(inner.quants) } else { Input::Floats(inner.gate.view()) },
        };
        ops.chosen_sum(&sum, Some(x), x)
    }

    /// Results that were asked for and not fetched yet.
    pub fn asked(&self) -> usize {
        self.asked
    }

    /// Waits for all results that were [asked](Self::ask) for, `[uses, hidden]` in the order of asking.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When `out` is not as long.
    pub fn fetch(&mut self, out: &mut [f32]) -> Result<(), CudaError> {
        assert_eq!(out.len(), self.asked * self.hidden, "results of experts on a device");
        self.asked = 0;
        self.room.out.view().read_f32(out)
    }

    /// Forgets what was asked for.
    pub fn forget(&mut self) {
        self.asked = 0;
    }
}

/// Buffers inside experts.
struct Inner<'a> {
    gate: &'a Buffer,
    up: &'a Buffer,
    quants: &'a mut Quants,
}

/// Which experts take which rows.
#[derive(Clone, Copy)]
struct Uses<'a> {
    /// `[jobs]` numbers in the layer's tables.
    which: View<'a>,
    jobs: usize,
    /// Rows, of which each has as many of the jobs.
    rows: usize,
    /// Neighbours that go through the same expert, or none.
    groups: Groups<'a>,
}

/// What stands before the last products of a layer's experts, in 8 bits or as floats, as those take it: in `inner.quants` or
/// `inner.gate`. `x` is `[rows, hidden]`, and `quants` are those of `x`, where gate or up take them.
fn first_products(
    ops: &Ops,
    l: &Layer,
    inner: &mut Inner<'_>,
    x: View<'_>,
    quants: &Quants,
    uses: Uses<'_>,
) -> Result<(), CudaError> {
    let (Uses { which, jobs, rows, groups }, ExpertKind { ffn, hidden, activation, .. }) = (uses, l.kind);
    let (gate, up, per_x) = (inner.gate.view(), inner.up.view(), jobs / rows);
    let to = needs_quants(l.kind.down).then_some(&mut *inner.quants);
    if groups.is_empty() && l.kind.gate == l.kind.up {
        let gated = Gated {
            ty: l.kind.gate,
            matrices: Pair::Chosen([&l.gate, &l.up], which),
            biases: [l.bias(0), l.bias(1)],
            activation,
            jobs,
            n_rows: ffn,
            n_cols: hidden,
            x: if needs_quants(l.kind.gate) { Input::Quants(quants) } else { Input::Floats(x) },
            jobs_per_x: per_x,
        };
        return ops.gated(&gated, gate, to);
    }
    product(ops, uses, l, 0, x, quants, per_x, gate)?;
    product(ops, uses, l, 1, x, quants, per_x, up)?;
    ops.activate(activation, gate, up, jobs, ffn, to)
}

/// Products of one of the three matrices of each expert, with its bias: `floats` or their `quants`, as the type takes them.
fn product(
    ops: &Ops,
    uses: Uses<'_>,
    l: &Layer,
    at: usize,
    floats: View<'_>,
    quants: &Quants,
    per_x: usize,
    out: View<'_>,
) -> Result<(), CudaError> {
    let (Uses { which, jobs, groups, .. }, ExpertKind { ffn, hidden, .. }) = (uses, l.kind);
    let (ty, table, n_out, n_in) =
        [(l.kind.gate, &l.gate, ffn, hidden), (l.kind.up, &l.up, ffn, hidden), (l.kind.down, &l.down, hidden, ffn)][at];
    let input = if needs_quants(ty) { Input::Quants(quants) } else { Input::Floats(floats) };
    if groups.is_empty() {
        return ops.biased_matvec(ty, Matrices::Chosen(table, which), l.bias(at), jobs, n_out, n_in, input, per_x, out);
    }
    ops.matmul(ty, Batch::Groups(table, groups), n_out, n_in, input, out)?;
    match l.bias(at) {
        Some(bias) => ops.add_bias(out, bias, Some(which), jobs, n_out),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests;
