//! Experts of main memory that pass through a device's memory for the tokens of a prompt: while one computes, the next is on
//! its way. The batch's rows go to the device once, and what all these experts add up to comes back once.

use super::device::{Buffer, Device, View};
use super::experts::{ExpertBytes, ExpertKind};
use super::lane::{BUFFERS, Lane};
use super::ops::{Batch, Gated, Input, Matrices, Pair, Quants};
use super::{CudaError, Ops};
use std::sync::Arc;
use tier_plan_kernels::needs_quants;

/// Where a matrix begins in a device's memory: at multiples of this.
const ALIGNED: usize = 256;

/// Rows from which on matrices are multiplied with many at a time.
const MANY: usize = 8;

/// What there is room for.
#[derive(Debug, Clone, Copy, Default)]
pub struct StreamRoom {
    /// Tokens of a batch.
    pub tokens: usize,
    /// Experts that each of them chooses.
    pub n_used: usize,
    /// Rows that an expert takes at once.
    pub rows: usize,
    /// Width of what goes in and comes out.
    pub hidden: usize,
    /// Width inside.
    pub ffn: usize,
    /// Bytes of an expert's matrices.
    pub expert_bytes: usize,
}

impl StreamRoom {
    /// Bytes of a buffer for one expert: its three matrices and biases, each at its place.
    fn expert(&self) -> usize {
        self.expert_bytes + 6 * ALIGNED + 4 * (2 * self.ffn + self.hidden)
    }

    /// Bytes that all of it takes on the device.
    pub fn bytes(&self) -> usize {
        let Self { tokens, n_used, rows, hidden, ffn, .. } = *self;
        // Codes, scales and sums of 8-bit activations are less than half of the floats.
        let floats = 2 * tokens * hidden + 2 * tokens * n_used + rows * (3 * hidden + 3 * ffn);
        4 * floats + BUFFERS * self.expert() + 32 * ALIGNED
    }
}

/// Experts that pass through a device.
pub struct ExpertStream {
    // First, so that its copies have ended when the memory goes.
    lane: Box<dyn Lane>,
    ops: Ops,
    memory: Vec<Buffer>,
    room: StreamRoom,
    x: Buffer,
    out: Buffer,
    /// `[uses]` tokens of the experts one after the other.
    which: Buffer,
    /// `[uses]`.
    weights: Buffer,
    rows: Buffer,
    rows_quants: Quants,
    gate: Buffer,
    up: Buffer,
    inner: Quants,
    results: Buffer,
    /// Buffers take turns.
    next: usize,
    /// Uses that there are, and those of experts that were sent.
    uses: (usize, usize),
    tokens: usize,
}

impl ExpertStream {
    /// Room for batches; `None` where a device has no lane.
    ///
    /// # Errors
    /// When there is not enough memory, or the device fails.
    pub fn new(device: &Arc<dyn Device>, room: StreamRoom) -> Result<Option<Self>, CudaError> {
        let Some(lane) = Arc::clone(device).lane(room.expert())? else { return Ok(None) };
        let floats = |n: usize| Buffer::room_f32(device, n);
        let quants = |n: usize| Quants::new(device, n.next_multiple_of(32));
        let StreamRoom { tokens, n_used, rows, hidden, ffn, .. } = room;
        let stream = Self {
            lane,
            memory: (0..BUFFERS).map(|_| Buffer::new(device, room.expert())).collect::<Result<_, _>>()?,
            x: floats(tokens * hidden)?,
            out: floats(tokens * hidden)?,
            which: floats(tokens * n_used)?,
            weights: floats(tokens * n_used)?,
            rows: floats(rows * hidden)?,
            rows_quants: quants(rows * hidden)?,
            gate: floats(rows * ffn)?,
            up: floats(rows * ffn)?,
            inner: quants(rows * ffn)?,
            results: floats(rows * hidden)?,
            next: 0,
            uses: (0, 0),
            tokens: 0,
            ops: Ops::new(Arc::clone(device)),
            room,
        };
        // Memory is the device's from the moment that it comes to the request for it; the lane is beside that.
        device.wait()?;
        Ok(Some(stream))
    }

    /// Begins a batch: its rows, `[tokens, hidden]`, and the tokens of all experts that will be [sent](Self::send), one
    /// after the other, with their weights. A token is at most once among those of one expert.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When there is no room, or a token has no row.
    pub fn begin(&mut self, hidden: usize, x: &[f32], uses: &[(usize, f32)]) -> Result<(), CudaError> {
        let tokens = x.len() / hidden;
        assert!(hidden == self.room.hidden && uses.iter().all(|(token, _)| *token < tokens), "tokens of {tokens}");
        let which: Vec<u8> = uses.iter().flat_map(|(token, _)| (*token as i32).to_ne_bytes()).collect();
        let weights: Vec<f32> = uses.iter().map(|(_, weight)| *weight).collect();
        self.x.view().write_f32(x)?;
        self.which.view().write(&which)?;
        self.weights.view().write_f32(&weights)?;
        self.ops.clear(self.out.view(), tokens * hidden)?;
        (self.uses, self.tokens) = ((uses.len(), 0), tokens);
        Ok(())
    }

    /// Whether [`send`](Self::send) would not wait.
    ///
    /// # Errors
    /// When the device fails.
    pub fn is_free(&mut self) -> Result<bool, CudaError> {
        self.lane.is_free(self.next)
    }

    /// Sends an expert, with `copy` to the buffer that it goes from, and has it compute the next `n` uses; goes on before
    /// that is done.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When there are fewer uses left, or the expert is larger than there is room for.
    pub fn send(
        &mut self,
        kind: &ExpertKind,
        expert: &ExpertBytes<'_>,
        n: usize,
        copy: &dyn Fn(&mut [u8], &[u8]),
    ) -> Result<(), CudaError> {
        assert!(self.uses.1 + n <= self.uses.0, "{n} uses more of {:?}", self.uses);
        assert!(kind.hidden == self.room.hidden && kind.ffn <= self.room.ffn, "an expert {} wide", kind.ffn);
        let which = self.next;
        let staging = self.lane.staging(which)?;
        let mut end = 0;
        let mut put = |bytes: &[u8]| {
            let range = end..end + bytes.len();
            copy(&mut staging[range.clone()], bytes);
            end = range.end.next_multiple_of(ALIGNED);
            range
        };
        let matrices = [expert.gate, expert.up, expert.down].map(&mut put);
        let biases = expert.biases.map(|biases| {
            biases.map(|bias| {
                let bytes: Vec<u8> = bias.iter().flat_map(|v| v.to_ne_bytes()).collect();
                put(&bytes)
            })
        });
        self.lane.send(which, self.memory[which].view().part(0..end.min(self.room.expert())))?;
        let last = self.uses.1 + n;
        let mut asked = Ok(());
        while asked.is_ok() && self.uses.1 < last {
            let rows = (last - self.uses.1).min(self.room.rows);
            asked = self.compute(kind, &matrices, biases.as_ref(), rows);
            self.uses.1 += rows;
        }
        // Also when something failed: what was asked for before still reads the buffer.
        self.lane.used(which)?;
        self.next = (which + 1) % BUFFERS;
        asked
    }

    /// Asks for the products of the next rows with the expert in the buffer whose turn it is.
    fn compute(
        &mut self,
        kind: &ExpertKind,
        matrices: &[std::ops::Range<usize>; 3],
        biases: Option<&[std::ops::Range<usize>; 3]>,
        n: usize,
    ) -> Result<(), CudaError> {
        let ExpertKind { hidden, ffn, .. } = *kind;
        let (ops, memory, uses) = (&self.ops, self.memory[self.next].view(), self.uses.1..self.uses.1 + n);
        let (which, weights) = (self.which.view().floats(uses.clone()), self.weights.view().floats(uses));
        ops.gather_rows(self.x.view(), which, n, hidden, self.rows.view())?;
        if needs_quants(kind.gate) || needs_quants(kind.up) {
            ops.quantize(self.rows.view(), n, hidden, &mut self.rows_quants)?;
        }
        let bias = |at: usize| biases.map(|biases| memory.part(biases[at].clone()));
        let product = |at: usize, (n_out, n_in): (usize, usize), floats: &Buffer, quants: &Quants, out: View<'_>| {
            let ty = [kind.gate, kind.up, kind.down][at];
            let matrix = memory.part(matrices[at].clone());
            let x = if needs_quants(ty) { Input::Quants(quants) } else { Input::Floats(floats.view()) };
            if n < MANY {
                return ops.biased_matvec(ty, Matrices::One(matrix), bias(at), n, n_out, n_in, x, 1, out);
            }
            ops.matmul(ty, Batch::One(matrix, n), n_out, n_in, x, out)?;
            match bias(at) {
                Some(bias) => ops.add_bias(out, bias, None, n, n_out),
                None => Ok(()),
            }
        };
        let (gate, up) = (self.gate.view(), self.up.view());
        let inner = needs_quants(kind.down).then_some(&mut self.inner);
        if n < MANY && kind.gate == kind.up {
            let quants = &self.rows_quants;
            let gated = Gated {
                ty: kind.gate,
                matrices: Pair::One([0, 1].map(|at: usize| memory.part(matrices[at].clone()))),
                biases: [bias(0), bias(1)],
                activation: kind.activation,
                jobs: n,
                n_rows: ffn,
                n_cols: hidden,
                x: if needs_quants(kind.gate) { Input::Quants(quants) } else { Input::Floats(self.rows.view()) },
                jobs_per_x: 1,
            };
            ops.gated(&gated, gate, inner)?;
        } else {
            product(0, (ffn, hidden), &self.rows, &self.rows_quants, gate)?;
            product(1, (ffn, hidden), &self.rows, &self.rows_quants, up)?;
            ops.activate(kind.activation, gate, up, n, ffn, inner)?;
        }
        product(2, (hidden, ffn), &self.gate, &self.inner, self.results.view())?;
        ops.add_rows(self.results.view(), which, weights, n, hidden, self.out.view())
    }

    /// Waits for what the experts add up to, `[tokens, hidden]`.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When `out` is not as long.
    pub fn finish(&mut self, out: &mut [f32]) -> Result<(), CudaError> {
        assert_eq!(out.len(), self.tokens * self.room.hidden, "results of experts that passed through a device");
        self.out.view().read_f32(out)
    }

    /// Bytes a second at which experts pass, `copy` included, measured over a few.
    ///
    /// # Errors
    /// When the device fails.
    pub fn measure(&mut self, copy: &dyn Fn(&mut [u8], &[u8])) -> Result<f64, CudaError> {
        const PASSES: usize = 8;
        let bytes = vec![1u8; self.room.expert()];
        let mut start = std::time::Instant::now();
        for pass in 0..=PASSES {
            if pass == 1 {
                self.ops.device().wait()?;
                start = std::time::Instant::now();
            }
            let which = pass % BUFFERS;
            copy(self.lane.staging(which)?, &bytes);
            self.lane.send(which, self.memory[which].view())?;
            self.lane.used(which)?;
        }
        self.ops.device().wait()?;
        Ok((PASSES * bytes.len()) as f64 / start.elapsed().as_secs_f64().max(1e-9))
    }
}
