//! The experts of one layer in a device's memory, and their matrix products.

use super::{ExpertBytes, ExpertKind, Place};
use crate::device::{Buffer, Device, View};
use crate::ops::{
    BatchMatrices, GateUpMatrices, Gated, Input, Matrices, MatrixTable, Matvec, Quants, SharedView,
    TokenGroups,
};
use crate::{CudaError, Ops};
use std::ops::Range;
use std::sync::Arc;
use tier_plan_kernels::needs_quants;
use tier_plan_kernels::quant::TensorType;

/// Alignment of a matrix in a device's memory, in bytes.
const ALIGNMENT: usize = 256;

/// The matrices of an expert, in the order in which they are stored. A gate may be missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Gate,
    Up,
    Down,
}

impl Part {
    const ALL: [Part; 3] = [Part::Gate, Part::Up, Part::Down];
}

/// Layout of one expert in memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct ExpertLayout {
    /// First byte of each matrix.
    offsets: [usize; 3],
    /// Bytes of each matrix; none of a gate that is missing.
    lens: [usize; 3],
    /// Bytes from the beginning of one expert to the next.
    pub(super) stride: usize,
}

impl ExpertLayout {
    pub(super) fn new(kind: &ExpertKind) -> Self {
        let ExpertKind { hidden, ffn, .. } = *kind;
        let bytes = |ty: TensorType, rows: usize, cols: usize| {
            let row = ty
                .row_bytes(cols as u64)
                .unwrap_or_else(|| panic!("rows of {cols} {ty} values"));
            row as usize * rows
        };
        let lens = [
            kind.gate.map_or(0, |gate| bytes(gate, ffn, hidden)),
            bytes(kind.up, ffn, hidden),
            bytes(kind.down, hidden, ffn),
        ];
        let aligned = lens.map(|len| len.next_multiple_of(ALIGNMENT));
        let offsets = [0, aligned[0], aligned[0] + aligned[1]];
        Self {
            offsets,
            lens,
            stride: aligned.iter().sum(),
        }
    }

    /// Returns the bytes of a matrix of expert `i`.
    pub(super) fn range(&self, i: usize, part: Part) -> Range<usize> {
        let start = i * self.stride + self.offsets[part as usize];
        start..start + self.lens[part as usize]
    }
}

/// The experts of one layer.
pub(super) struct Layer {
    pub(super) kind: ExpertKind,
    pub(super) layout: ExpertLayout,
    gate: Option<MatrixTable<'static>>,
    up: MatrixTable<'static>,
    pub(super) down: MatrixTable<'static>,
    /// `[entries, width]` of gate, up and down; without meaning for experts that are elsewhere.
    biases: Option<[Buffer; 3]>,
    /// Memory of the pinned experts.
    pins: Arc<Buffer>,
    /// Place of each expert among the pinned ones, `[n_expert]`; `None` for those that are elsewhere.
    pin_of: Vec<Option<usize>>,
    /// Places of pins that were given up.
    free_pins: Vec<usize>,
    pub(super) slots: Arc<Buffer>,
    pub(super) n_slots: usize,
    /// Entry of the first slot in the tables: experts by index come before, if any is pinned.
    first_slot: usize,
    shared: Option<SharedBuffers>,
}

/// Buffers for experts of any layer.
#[derive(Clone)]
pub(super) struct SharedBuffers {
    memory: Arc<Buffer>,
    n: usize,
    /// Bytes of each.
    len: usize,
}

impl SharedBuffers {
    pub(super) fn new(device: &Arc<dyn Device>, n: usize, len: usize) -> Result<Self, CudaError> {
        let memory = Arc::new(Buffer::new(device, n.saturating_mul(len))?);
        Ok(Self { memory, n, len })
    }

    pub(super) fn bytes(&self) -> usize {
        self.n * self.len
    }
}

/// What of a layer is filled again and again.
pub(super) struct Fillable<'a> {
    pub(super) n_slots: usize,
    pub(super) shared: Option<&'a SharedBuffers>,
}

/// A place that is filled again and again.
#[derive(Clone, Copy)]
pub(super) struct Spot<'a> {
    /// Memory of one expert.
    memory: View<'a>,
    /// Entry in the layer's tables.
    pub(super) entry: usize,
}

impl Layer {
    /// Copies the pinned experts to the device, and allocates slots.
    pub(super) fn new(
        device: &Arc<dyn Device>,
        kind: ExpertKind,
        pinned: &[(usize, ExpertBytes<'_>)],
        Fillable { n_slots, shared }: Fillable<'_>,
        with_biases: bool,
    ) -> Result<Self, CudaError> {
        let layout = ExpertLayout::new(&kind);
        let buffer = |n: usize| {
            Ok::<_, CudaError>(Arc::new(Buffer::new(
                device,
                n.saturating_mul(layout.stride),
            )?))
        };
        let (pins, slots) = (buffer(pinned.len())?, buffer(n_slots)?);
        let n_shared = shared.map_or(0, |shared| shared.n);
        let first_slot = if pinned.is_empty() { 0 } else { kind.n_expert };
        let (n, has_gate) = (first_slot + n_slots + n_shared, kind.gate.is_some());
        let mut pin_of = vec![None; kind.n_expert];
        let mut tables: [Vec<Option<SharedView>>; 3] = std::array::from_fn(|_| vec![None; n]);
        for (part, table) in Part::ALL.into_iter().zip(&mut tables) {
            let view = |buffer: &Arc<Buffer>, i| SharedView {
                buffer: Arc::clone(buffer),
                range: layout.range(i, part),
            };
            for (i, (expert, _)) in pinned.iter().enumerate() {
                table[*expert] = Some(view(&pins, i));
                pin_of[*expert] = Some(i);
            }
            for slot in 0..n_slots {
                table[first_slot + slot] = Some(view(&slots, slot));
            }
            for (i, shared) in shared.iter().flat_map(|s| (0..s.n).map(move |i| (i, s))) {
                let range = layout.range(0, part);
                assert!(layout.stride <= shared.len, "bytes of a shared buffer");
                table[first_slot + n_slots + i] = Some(SharedView {
                    buffer: Arc::clone(&shared.memory),
                    range: i * shared.len + range.start..i * shared.len + range.end,
                });
            }
        }
        let [gate, up, down] = tables;
        let zeros = |width: usize| Buffer::of_f32(device, &vec![0.0; n * width]);
        let biases = if with_biases {
            Some([zeros(kind.ffn)?, zeros(kind.ffn)?, zeros(kind.hidden)?])
        } else {
            None
        };
        let layer = Self {
            kind,
            layout,
            gate: has_gate
                .then(|| MatrixTable::owning(device, gate))
                .transpose()?,
            up: MatrixTable::owning(device, up)?,
            down: MatrixTable::owning(device, down)?,
            biases,
            pins,
            pin_of,
            free_pins: Vec::new(),
            slots,
            n_slots,
            first_slot,
            shared: shared.cloned(),
        };
        for (expert, bytes) in pinned {
            layer.put(layer.spot_of_pin(*expert), bytes)?;
        }
        Ok(layer)
    }

    /// Whether an expert is pinned here.
    pub(super) fn has(&self, expert: usize) -> bool {
        self.pin_of.get(expert).is_some_and(Option::is_some)
    }

    /// Whether all experts are pinned here.
    pub(super) fn has_all(&self) -> bool {
        self.pin_of.iter().all(Option::is_some)
    }

    /// Returns the place of a pinned expert.
    fn spot_of_pin(&self, expert: usize) -> Spot<'_> {
        let Some(pin) = self.pin_of.get(expert).copied().flatten() else {
            panic!("expert {expert} is not pinned")
        };
        Spot {
            memory: self.part_of(&self.pins, pin * self.layout.stride),
            entry: expert,
        }
    }

    /// Returns how many more experts can be pinned.
    pub(super) fn n_free_pins(&self) -> usize {
        self.free_pins.len()
    }

    /// Gives up the pin of an expert, if it has one.
    pub(super) fn unpin(&mut self, expert: usize) -> Result<(), CudaError> {
        let pin = self.pin_of.get_mut(expert).and_then(Option::take);
        self.free_pins.extend(pin);
        match pin {
            Some(_) => self.name_pin(expert),
            None => Ok(()),
        }
    }

    /// Pins an expert where there was another. After an error it is not pinned.
    pub(super) fn pin(&mut self, expert: usize, bytes: &ExpertBytes<'_>) -> Result<(), CudaError> {
        assert!(!self.has(expert), "expert {expert} is pinned already");
        let Some(pin) = self.free_pins.pop() else {
            panic!("no memory for one more pin")
        };
        self.pin_of[expert] = Some(pin);
        let spot = self.spot_of_pin(expert);
        let copied = self.put(spot, bytes).and_then(|()| self.name_pin(expert));
        if copied.is_err() {
            self.pin_of[expert] = None;
            self.free_pins.push(pin);
        }
        copied
    }

    /// Makes an expert's entry in the tables its pin, or none.
    fn name_pin(&self, expert: usize) -> Result<(), CudaError> {
        let spot = self.has(expert).then(|| self.spot_of_pin(expert));
        let tables = [self.gate.as_ref(), Some(&self.up), Some(&self.down)];
        for (part, table) in Part::ALL.into_iter().zip(tables) {
            if let Some(table) = table {
                let matrix = spot.map(|spot| spot.memory.part(self.layout.range(0, part)));
                table.replace(expert, matrix)?;
            }
        }
        Ok(())
    }

    /// Returns the number of shared buffers.
    pub(super) fn n_shared(&self) -> usize {
        self.shared.as_ref().map_or(0, |shared| shared.n)
    }

    /// Returns the memory of one expert.
    fn part_of<'a>(&self, buffer: &'a Buffer, first: usize) -> View<'a> {
        buffer.view().part(first..first + self.layout.stride)
    }

    /// Returns a place that is filled again and again, if the layer has it.
    pub(super) fn spot(&self, place: Place) -> Option<Spot<'_>> {
        let (slots, stride) = (self.first_slot, self.layout.stride);
        match (place, &self.shared) {
            (Place::Slot(slot), _) if slot < self.n_slots => Some(Spot {
                memory: self.part_of(&self.slots, slot * stride),
                entry: slots + slot,
            }),
            (Place::Shared(i), Some(shared)) if i < shared.n => Some(Spot {
                memory: self.part_of(&shared.memory, i * shared.len),
                entry: slots + self.n_slots + i,
            }),
            _ => None,
        }
    }

    /// Returns the biases of a matrix for all table entries.
    pub(super) fn bias(&self, part: Part) -> Option<View<'_>> {
        self.biases
            .as_ref()
            .map(|biases| biases[part as usize].view())
    }

    /// Returns the matrices of the expert in a place: gate, up, down.
    #[cfg(any(test, feature = "emulator"))]
    pub(super) fn bytes_in(&self, place: Place) -> Result<Vec<u8>, CudaError> {
        let spot = match place {
            Place::Pinned(expert) => Some(self.spot_of_pin(expert)),
            _ => self.spot(place),
        };
        let Some(Spot { memory, .. }) = spot else {
            panic!("{place:?} is not on the device")
        };
        let bytes = |part| memory.part(self.layout.range(0, part)).to_bytes();
        // Those of a gate that is missing are none.
        Ok(Part::ALL
            .map(bytes)
            .into_iter()
            .collect::<Result<Vec<_>, _>>()?
            .concat())
    }

    /// Copies an expert to a place, and its biases to the place's entry in the tables.
    pub(super) fn put(&self, spot: Spot<'_>, expert: &ExpertBytes<'_>) -> Result<(), CudaError> {
        for (part, bytes) in self.parts_of(expert) {
            let range = self.layout.range(0, part);
            assert_eq!(range.len(), bytes.len(), "bytes of {part:?} of an expert");
            spot.memory.part(range).write(bytes)?;
        }
        self.put_biases(spot.entry, expert)
    }

    /// Returns where the matrices of an expert go in a place, and their bytes.
    pub(super) fn copies<'a>(
        &'a self,
        spot: Spot<'a>,
        expert: &ExpertBytes<'a>,
    ) -> impl Iterator<Item = (View<'a>, &'a [u8])> {
        let to = move |(part, bytes)| (spot.memory.part(self.layout.range(0, part)), bytes);
        self.parts_of(expert).map(to)
    }

    /// Returns the matrices of an expert.
    fn parts_of<'a>(
        &self,
        expert: &ExpertBytes<'a>,
    ) -> impl Iterator<Item = (Part, &'a [u8])> + use<'a> {
        let has_gate = self.kind.gate.is_some();
        assert_eq!(expert.gate.is_some(), has_gate, "the gate of an expert");
        let gate = expert.gate.map(|gate| (Part::Gate, gate));
        let others = [(Part::Up, expert.up), (Part::Down, expert.down)];
        gate.into_iter().chain(others)
    }

    /// Copies the biases of an expert to table entry `entry`.
    pub(super) fn put_biases(
        &self,
        entry: usize,
        expert: &ExpertBytes<'_>,
    ) -> Result<(), CudaError> {
        if let (Some(tables), Some(biases)) = (&self.biases, expert.biases) {
            for (table, bias) in tables.iter().zip(biases) {
                table
                    .view()
                    .floats(entry * bias.len()..(entry + 1) * bias.len())
                    .write_f32(bias)?;
            }
        }
        Ok(())
    }

    /// Computes gate, up and the activation: quantized in `inner.quants` or as floats in
    /// `inner.gate`, as down takes them.
    pub(super) fn inner(
        &self,
        ops: &Ops,
        inner: &mut Inner<'_>,
        x: Activations<'_>,
        uses: Uses<'_>,
    ) -> Result<(), CudaError> {
        let (jobs, jobs_per_x) = (uses.jobs, uses.jobs / uses.rows);
        let ExpertKind {
            ffn,
            hidden,
            activation,
            ..
        } = self.kind;
        let (gate, up) = (inner.gate.view(), inner.up.view());
        let quants = needs_quants(self.kind.down).then_some(&mut *inner.quants);
        if let Some(ty) = self.kind.one_format().filter(|_| uses.groups.is_empty()) {
            let gated = Gated {
                ty,
                matrices: match &self.gate {
                    Some(gates) => GateUpMatrices::Chosen([gates, &self.up], uses.which),
                    None => GateUpMatrices::ChosenUp(&self.up, uses.which),
                },
                biases: [self.bias(Part::Gate), self.bias(Part::Up)],
                factors: uses.factors,
                activation,
                jobs,
                n_rows: ffn,
                n_cols: hidden,
                x: x.input(ty),
                jobs_per_x,
            };
            return ops.gated(&gated, gate, quants);
        }
        let up = match &self.gate {
            Some(_) => {
                self.product(ops, Part::Gate, uses, x, jobs_per_x, gate)?;
                up
            }
            // The product with up takes the gate's place.
            None => gate,
        };
        self.product(ops, Part::Up, uses, x, jobs_per_x, up)?;
        ops.activate(activation, gate, up, jobs, ffn, quants)
    }

    /// Multiplies one of the matrices of each expert, and adds its bias: of gate and up after the
    /// experts' factors.
    pub(super) fn product(
        &self,
        ops: &Ops,
        part: Part,
        uses: Uses<'_>,
        x: Activations<'_>,
        jobs_per_x: usize,
        out: View<'_>,
    ) -> Result<(), CudaError> {
        let ExpertKind { ffn, hidden, .. } = self.kind;
        let Uses { which, jobs, .. } = uses;
        let (ty, table) = match (part, self.kind.gate, &self.gate) {
            (Part::Gate, Some(ty), Some(table)) => (ty, table),
            (Part::Gate, ..) => unreachable!("experts with a gate"),
            (Part::Up, ..) => (self.kind.up, &self.up),
            (Part::Down, ..) => (self.kind.down, &self.down),
        };
        let ((n_rows, n_cols), factors) = if part == Part::Down {
            ((hidden, ffn), None)
        } else {
            ((ffn, hidden), uses.factors)
        };
        let (x, bias) = (x.input(ty), self.bias(part));
        if uses.groups.is_empty() {
            let matvec = Matvec {
                ty,
                matrices: Matrices::Chosen(table, which),
                bias: bias.filter(|_| factors.is_none()),
                jobs,
                n_rows,
                n_cols,
                x,
                jobs_per_x,
            };
            ops.matvec(&matvec, out)?;
            if factors.is_none() {
                return Ok(());
            }
        } else {
            let matrices = BatchMatrices::Groups(table, uses.groups);
            ops.matmul(ty, matrices, n_rows, n_cols, x, out)?;
        }
        if let Some(factors) = factors {
            ops.scale_rows(out, factors, jobs, n_rows)?;
        }
        match bias {
            Some(bias) => ops.add_bias(out, bias, Some(which), jobs, n_rows),
            None => Ok(()),
        }
    }
}

/// Activations in both forms; the quantized form is filled only where a matrix takes it.
#[derive(Clone, Copy)]
pub(super) struct Activations<'a> {
    pub(super) floats: View<'a>,
    pub(super) quants: &'a Quants,
}

impl<'a> Activations<'a> {
    pub(super) fn input(self, ty: TensorType) -> Input<'a> {
        Input::for_type(ty, self.floats, self.quants)
    }
}

/// Buffers between the matrices of an expert.
pub(super) struct Inner<'a> {
    pub(super) gate: &'a Buffer,
    pub(super) up: &'a Buffer,
    pub(super) quants: &'a mut Quants,
}

/// Assignment of rows to experts.
#[derive(Clone, Copy)]
pub(super) struct Uses<'a> {
    /// `[jobs]` indices in the layer's tables.
    pub(super) which: View<'a>,
    /// Factors on the products with gate and up, `[jobs]`.
    pub(super) factors: Option<View<'a>>,
    pub(super) jobs: usize,
    /// Rows of activations, each with `jobs / rows` jobs.
    pub(super) rows: usize,
    /// Consecutive jobs with the same expert; none for few rows.
    pub(super) groups: TokenGroups<'a>,
}
