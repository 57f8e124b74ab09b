//! Routed experts that are pinned in a device's memory, and what they compute: all that a token chose of a layer in one
//! row of launches, which the processor does not wait for.

use super::device::{Buffer, Device};
use super::ops::{Batch, Group, Input, Matrices, Quants, SharedPart, Table};
use super::{CudaError, Ops};
use crate::kernels::needs_quants;
use crate::model::spec::Activation;
use crate::quant::TensorType;
use std::sync::Arc;

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

/// The pinned experts of one layer.
struct Layer {
    kind: ExpertKind,
    gate: Table<'static>,
    up: Table<'static>,
    down: Table<'static>,
    /// `[n_expert, _]` of gate, up and down; those of experts that are elsewhere are zeros.
    biases: Option<[Buffer; 3]>,
    here: Vec<bool>,
}

/// Pinned experts of a model on one device.
pub struct PinnedExperts {
    ops: Ops,
    layers: Vec<Option<Layer>>,
    room: Room,
    /// Results asked for and not fetched yet, `[jobs, hidden]`.
    asked: usize,
}

/// Buffers, as large as the largest use so far.
struct Room {
    x: Buffer,
    x_quants: Quants,
    which: Buffer,
    gate: Buffer,
    up: Buffer,
    inner: Quants,
    out: Buffer,
    sizes: [usize; 3],
}

impl Room {
    /// For `x` values that go in, `inner` inside, and `out` that come out.
    fn new(device: &Arc<dyn Device>, sizes: [usize; 3], jobs: usize) -> Result<Self, CudaError> {
        let [x, inner, out] = sizes;
        Ok(Self {
            x: Buffer::room_f32(device, x)?,
            x_quants: Quants::new(device, x.next_multiple_of(32))?,
            which: Buffer::room_f32(device, jobs)?,
            gate: Buffer::room_f32(device, inner)?,
            up: Buffer::room_f32(device, inner)?,
            inner: Quants::new(device, inner.next_multiple_of(32))?,
            out: Buffer::room_f32(device, out)?,
            sizes,
        })
    }
}

impl PinnedExperts {
    /// No expert of `n_layers` layers yet.
    ///
    /// # Errors
    /// When the device fails.
    pub fn new(device: Arc<dyn Device>, n_layers: usize) -> Result<Self, CudaError> {
        let room = Room::new(&device, [0; 3], 0)?;
        Ok(Self { ops: Ops::new(device), layers: (0..n_layers).map(|_| None).collect(), room, asked: 0 })
    }

    /// Copies experts of a layer to the device, `experts` by number.
    ///
    /// # Errors
    /// When there is not enough memory, or the device fails.
    ///
    /// # Panics
    /// When a number or a size is not the layer's.
    pub fn pin(
        &mut self,
        layer: usize,
        kind: ExpertKind,
        experts: &[(usize, ExpertBytes<'_>)],
    ) -> Result<(), CudaError> {
        let device = self.ops.device();
        let round = |bytes: &[u8]| bytes.len().next_multiple_of(ALIGNED);
        let sizes = experts.iter().map(|(_, e)| round(e.gate) + round(e.up) + round(e.down));
        let memory = Arc::new(Buffer::new(device, sizes.sum())?);
        let mut tables: [Vec<Option<SharedPart>>; 3] = std::array::from_fn(|_| vec![None; kind.n_expert]);
        let widths = [kind.ffn, kind.ffn, kind.hidden];
        let with_biases = experts.iter().any(|(_, e)| e.biases.is_some());
        let mut biases = widths.map(|width| vec![0.0f32; if with_biases { kind.n_expert * width } else { 0 }]);
        let mut here = vec![false; kind.n_expert];
        let mut at = 0;
        for (number, expert) in experts {
            for (table, bytes) in tables.iter_mut().zip([expert.gate, expert.up, expert.down]) {
                let range = at..at + bytes.len();
                memory.view().part(range.clone()).write(bytes)?;
                table[*number] = Some((Arc::clone(&memory), range));
                at += round(bytes);
            }
            for ((all, width), own) in biases.iter_mut().zip(widths).zip(expert.biases.into_iter().flatten()) {
                all[number * width..(number + 1) * width].copy_from_slice(own);
            }
            here[*number] = true;
        }
        let [gate, up, down] = tables;
        let biases = match with_biases {
            false => None,
            true => {
                let [g, u, d] = &biases;
                Some([Buffer::of_f32(device, g)?, Buffer::of_f32(device, u)?, Buffer::of_f32(device, d)?])
            }
        };
        self.layers[layer] = Some(Layer {
            kind,
            gate: Table::owning(device, gate)?,
            up: Table::owning(device, up)?,
            down: Table::owning(device, down)?,
            biases,
            here,
        });
        Ok(())
    }

    /// Whether an expert is here.
    pub fn has(&self, layer: usize, expert: usize) -> bool {
        self.layers.get(layer).and_then(Option::as_ref).is_some_and(|l| l.here.get(expert) == Some(&true))
    }

    /// Asks for results: `x` is `[rows, hidden]`, and each row goes through as many of `experts` as there are for it, the
    /// first row's first. [`fetch`](Self::fetch) has them.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When an expert is not here, or there are not as many for each row.
    pub fn ask(&mut self, layer: usize, x: &[f32], experts: &[usize]) -> Result<(), CudaError> {
        self.asked = 0;
        if experts.is_empty() {
            return Ok(());
        }
        assert!(experts.iter().all(|e| self.has(layer, *e)), "experts {experts:?} of layer {layer}");
        let Some(l) = self.layers[layer].as_ref() else { return Ok(()) };
        let ExpertKind { hidden, ffn, .. } = l.kind;
        let (rows, jobs) = (x.len() / hidden, experts.len());
        assert!(rows > 0 && x.len() == rows * hidden && jobs.is_multiple_of(rows), "{jobs} uses of {rows} rows");
        let wanted = [x.len(), jobs * ffn, jobs * hidden];
        if self.room.sizes.iter().zip(wanted).any(|(have, wanted)| *have < wanted)
            || self.room.which.view().words() < jobs
        {
            let sizes = std::array::from_fn(|i| self.room.sizes[i].max(wanted[i]));
            let most = self.room.which.view().words().max(jobs);
            self.room = Room::new(self.ops.device(), sizes, most)?;
        }
        let (ops, r) = (&self.ops, &mut self.room);
        r.x.view().write_f32(x)?;
        let numbers: Vec<u8> = experts.iter().flat_map(|e| (*e as i32).to_ne_bytes()).collect();
        r.which.view().write(&numbers)?;
        if needs_quants(l.kind.gate) || needs_quants(l.kind.up) {
            ops.quantize(r.x.view(), rows, hidden, &mut r.x_quants)?;
        }
        // With rows of their own, neighbours that go through the same expert are multiplied together.
        let mut groups = Vec::new();
        if jobs == rows && jobs >= MANY {
            let mut first = 0;
            for alike in experts.chunk_by(|a, b| a == b) {
                groups.push(Group { matrix: alike[0], first, tokens: alike.len() });
                first += alike.len();
            }
        }
        let product = |ty, table, n_out, n_in, floats: &Buffer, quants: &Quants, per_x, out: &Buffer| {
            if !needs_quants(ty) {
                let chosen = Matrices::Chosen(table, r.which.view());
                return ops.matvec(ty, chosen, jobs, n_out, n_in, Input::Floats(floats.view()), per_x, out.view());
            }
            if !groups.is_empty() {
                return ops.matmul(ty, Batch::Groups(table, &groups), n_out, n_in, quants, out.view());
            }
            let chosen = Matrices::Chosen(table, r.which.view());
            ops.matvec(ty, chosen, jobs, n_out, n_in, Input::Quants(quants), per_x, out.view())
        };
        product(l.kind.gate, &l.gate, ffn, hidden, &r.x, &r.x_quants, jobs / rows, &r.gate)?;
        product(l.kind.up, &l.up, ffn, hidden, &r.x, &r.x_quants, jobs / rows, &r.up)?;
        let bias = |which: usize, values: &Buffer, width: usize| match &l.biases {
            Some(biases) => ops.add_bias(values.view(), biases[which].view(), Some(r.which.view()), jobs, width),
            None => Ok(()),
        };
        bias(0, &r.gate, ffn)?;
        bias(1, &r.up, ffn)?;
        ops.activate(l.kind.activation, r.gate.view(), r.up.view(), jobs * ffn)?;
        if needs_quants(l.kind.down) {
            ops.quantize(r.gate.view(), jobs, ffn, &mut r.inner)?;
        }
        product(l.kind.down, &l.down, hidden, ffn, &r.gate, &r.inner, 1, &r.out)?;
        bias(2, &r.out, hidden)?;
        self.asked = jobs * hidden;
        Ok(())
    }

    /// Waits for the results of the last [`ask`](Self::ask), `[uses, hidden]`.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When `out` is not as long.
    pub fn fetch(&mut self, out: &mut [f32]) -> Result<(), CudaError> {
        assert_eq!(out.len(), self.asked, "results of experts on a device");
        self.asked = 0;
        self.room.out.view().read_f32(out)
    }
}
