//! Experts in main memory that are streamed to a device for the tokens of a prompt: while one is
//! computed, the next one is copied. The rows of the batch are copied to the device once, and the
//! sum over all streamed experts is copied back once.

use super::copy_stream::{BUFFERS, CopyStream};
use super::device::{Buffer, Device, View};
use super::experts::{ExpertBytes, ExpertKind};
use super::ops::{BatchMatrices, GateUpMatrices, Gated, Input, Matrices, Matvec, Quants};
use super::{CudaError, Ops};
use std::ops::Range;
use std::sync::Arc;
use tier_plan_kernels::needs_quants;
use tier_plan_kernels::quant::TensorType;

/// Alignment of a matrix in a device's memory, in bytes.
const ALIGNMENT: usize = 256;

/// Rows from which on experts are computed by matmul instead of matvec.
const MATMUL_MIN_ROWS: usize = 8;

/// Sizes of an [`ExpertStream`].
#[derive(Debug, Clone, Copy, Default)]
pub struct StreamSizes {
    /// Most tokens of a batch.
    pub tokens: usize,
    /// Experts per token.
    pub n_used: usize,
    /// Most rows that an expert takes at once.
    pub rows: usize,
    /// Largest width of input and output.
    pub hidden: usize,
    /// Largest width between an expert's matrices.
    pub ffn: usize,
    /// Most bytes of an expert's matrices.
    pub expert_bytes: usize,
}

impl StreamSizes {
    /// Returns the bytes of a buffer for one expert: three matrices and three biases, each aligned.
    fn expert(&self) -> usize {
        self.expert_bytes + 6 * ALIGNMENT + 4 * (2 * self.ffn + self.hidden)
    }

    /// Returns the bytes of all buffers on the device.
    pub fn bytes(&self) -> usize {
        let Self {
            tokens,
            n_used,
            rows,
            hidden,
            ffn,
            ..
        } = *self;
        // Codes, scales and sums of quantized activations are less than half of the floats.
        let floats = 2 * tokens * hidden + 2 * tokens * n_used + rows * (3 * hidden + 3 * ffn);
        4 * floats + BUFFERS * self.expert() + 32 * ALIGNMENT
    }
}

/// A token's use of an expert, with the expert's weight.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Use {
    /// Row of the batch.
    pub token: usize,
    /// Factor on the expert's result.
    pub weight: f32,
}

/// Streams experts to a device.
pub struct ExpertStream {
    // First, so that its copies have ended when the memory is freed.
    copies: Box<dyn CopyStream>,
    ops: Ops,
    memory: Vec<Buffer>,
    sizes: StreamSizes,
    x: Buffer,
    out: Buffer,
    /// `[uses]` tokens, expert after expert.
    which: Buffer,
    /// `[uses]`.
    weights: Buffer,
    rows: Buffer,
    rows_quants: Quants,
    gate: Buffer,
    up: Buffer,
    inner: Quants,
    results: Buffer,
    /// Staging buffer of the next expert; the buffers take turns.
    next: usize,
    /// Uses of the batch.
    n_uses: usize,
    /// Uses of the experts that were sent.
    n_sent: usize,
    /// Tokens of the batch.
    tokens: usize,
    /// Width of the batch's rows.
    hidden: usize,
}

/// Ranges of an expert's matrices and biases in its buffer on the device.
struct SentExpert {
    gate: Option<Range<usize>>,
    up: Range<usize>,
    down: Range<usize>,
    biases: Option<[Range<usize>; 3]>,
    /// Bytes up to the end of the last, padding included.
    end: usize,
}

/// One of an expert's matrices on the device, and what it is multiplied with.
struct Product<'a> {
    ty: TensorType,
    matrix: View<'a>,
    bias: Option<View<'a>>,
    /// Factors on the products before the bias.
    factors: Option<View<'a>>,
    n_rows: usize,
    n_cols: usize,
    x: Input<'a>,
}

impl ExpertStream {
    /// Opens a copy stream and allocates buffers. Returns `None` if the device has no copy streams.
    pub fn new(device: &Arc<dyn Device>, sizes: StreamSizes) -> Result<Option<Self>, CudaError> {
        let Some(copies) = Arc::clone(device).copy_stream(sizes.expert())? else {
            return Ok(None);
        };
        let floats = |n: usize| Buffer::new_f32(device, n);
        let quants = |n: usize| Quants::new(device, n.next_multiple_of(32));
        let StreamSizes {
            tokens,
            n_used,
            rows,
            hidden,
            ffn,
            ..
        } = sizes;
        let stream = Self {
            copies,
            memory: (0..BUFFERS)
                .map(|_| Buffer::new(device, sizes.expert()))
                .collect::<Result<_, _>>()?,
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
            n_uses: 0,
            n_sent: 0,
            tokens: 0,
            hidden: 0,
            ops: Ops::new(Arc::clone(device)),
            sizes,
        };
        // Allocations are ordered in the compute stream, which the copy stream does not wait for.
        device.wait()?;
        Ok(Some(stream))
    }

    /// Begins a batch with its rows, `[tokens, hidden]`, and the uses of all experts that will be
    /// [sent](Self::send), expert after expert. An expert uses a token at most once.
    ///
    /// # Panics
    /// When the batch is larger than the buffers, or a token has no row.
    pub fn begin(&mut self, hidden: usize, x: &[f32], uses: &[Use]) -> Result<(), CudaError> {
        let tokens = x.len() / hidden;
        assert!(
            hidden <= self.sizes.hidden && uses.iter().all(|used| used.token < tokens),
            "tokens of {tokens}"
        );
        let which: Vec<u8> = uses
            .iter()
            .flat_map(|used| (used.token as i32).to_ne_bytes())
            .collect();
        let weights: Vec<f32> = uses.iter().map(|used| used.weight).collect();
        self.x.view().write_f32(x)?;
        self.which.view().write(&which)?;
        self.weights.view().write_f32(&weights)?;
        self.ops.clear(self.out.view(), tokens * hidden)?;
        (self.n_uses, self.n_sent) = (uses.len(), 0);
        (self.tokens, self.hidden) = (tokens, hidden);
        Ok(())
    }

    /// Whether [`send`](Self::send) would return without waiting.
    pub fn is_free(&mut self) -> Result<bool, CudaError> {
        self.copies.is_free(self.next)
    }

    /// Copies an expert to the device and computes the next `n` uses with it; returns before that
    /// is done. `copy` fills the staging buffer.
    ///
    /// # Panics
    /// When fewer uses are left, or the expert is larger than the buffers.
    pub fn send(
        &mut self,
        kind: &ExpertKind,
        expert: &ExpertBytes<'_>,
        n: usize,
        copy: &dyn Fn(&mut [u8], &[u8]),
    ) -> Result<(), CudaError> {
        let sent = self.lay_out(kind, expert, n);
        let staging = self.copies.staging(self.next)?;
        for (range, bytes) in sent.matrices(expert) {
            copy(&mut staging[range], bytes);
        }
        for (range, bias) in sent.biases(expert) {
            let bytes: Vec<u8> = bias.iter().flat_map(|v| v.to_ne_bytes()).collect();
            copy(&mut staging[range], &bytes);
        }
        let memory = self.memory[self.next].view();
        let whole = memory.part(0..sent.end.min(self.sizes.expert()));
        self.copies.send(self.next, whole)?;
        self.compute_sent(kind, &sent, n)
    }

    /// Does what [`send`](Self::send) does with an expert in locked memory, which the device reads where
    /// it lies.
    ///
    /// # Safety
    /// The matrices are in memory that is locked for the device, and stays mapped until the copies are
    /// done. What is written there meanwhile may reach the device or not.
    ///
    /// # Panics
    /// As `send`.
    pub unsafe fn send_locked(
        &mut self,
        kind: &ExpertKind,
        expert: &ExpertBytes<'_>,
        n: usize,
    ) -> Result<(), CudaError> {
        let sent = self.lay_out(kind, expert, n);
        let memory = self.memory[self.next].view();
        // In the order of what computes, so after what read the buffer last.
        for (range, bias) in sent.biases(expert) {
            memory.part(range).write_f32(bias)?;
        }
        let matrices = sent.matrices(expert);
        let copies: Vec<_> = matrices
            .map(|(range, bytes)| (memory.part(range), bytes))
            .collect();
        // SAFETY: the caller's promise.
        unsafe { self.copies.send_locked(self.next, &copies) }?;
        self.compute_sent(kind, &sent, n)
    }

    /// Returns where an expert's matrices and biases go in a buffer.
    fn lay_out(&self, kind: &ExpertKind, expert: &ExpertBytes<'_>, n: usize) -> SentExpert {
        assert!(
            self.n_sent + n <= self.n_uses,
            "{n} uses after {} of {}",
            self.n_sent,
            self.n_uses
        );
        assert!(
            kind.hidden == self.hidden && kind.ffn <= self.sizes.ffn,
            "an expert {} wide",
            kind.ffn
        );
        assert_eq!(expert.gate.is_some(), kind.gate.is_some(), "its gate");
        let mut end = 0;
        let mut put = |len: usize| {
            let range = end..end + len;
            end = range.end.next_multiple_of(ALIGNMENT);
            range
        };
        SentExpert {
            gate: expert.gate.map(|gate| put(gate.len())),
            up: put(expert.up.len()),
            down: put(expert.down.len()),
            biases: expert
                .biases
                .map(|biases| biases.map(|bias| put(size_of_val(bias)))),
            end,
        }
    }

    /// Enqueues the expert in the current buffer for the next `n` uses, as many rows at once as there is
    /// room for, and goes on to the next buffer.
    fn compute_sent(
        &mut self,
        kind: &ExpertKind,
        sent: &SentExpert,
        n: usize,
    ) -> Result<(), CudaError> {
        let last = self.n_sent + n;
        let mut enqueued = Ok(());
        while enqueued.is_ok() && self.n_sent < last {
            let rows = (last - self.n_sent).min(self.sizes.rows);
            enqueued = self.compute(kind, sent, rows);
            self.n_sent += rows;
        }
        // Also after an error: what was enqueued before it still reads the buffer.
        self.copies.used(self.next)?;
        self.next = (self.next + 1) % BUFFERS;
        enqueued
    }

    /// Enqueues the expert in the current buffer for the next `n` uses.
    fn compute(&mut self, kind: &ExpertKind, sent: &SentExpert, n: usize) -> Result<(), CudaError> {
        let ExpertKind { hidden, ffn, .. } = *kind;
        let uses = self.n_sent..self.n_sent + n;
        let ops = &self.ops;
        let which = self.which.view().floats(uses.clone());
        ops.gather_rows(self.x.view(), which, n, hidden, self.rows.view())?;
        if kind.takes_quants() {
            ops.quantize(self.rows.view(), n, hidden, &mut self.rows_quants)?;
        }
        self.gate_up(kind, sent, n)?;
        let (ops, memory) = (&self.ops, self.memory[self.next].view());
        let down = Product {
            ty: kind.down,
            matrix: memory.part(sent.down.clone()),
            bias: sent.bias(2, memory),
            factors: None,
            n_rows: hidden,
            n_cols: ffn,
            x: Input::for_type(kind.down, self.gate.view(), &self.inner),
        };
        let (results, out) = (self.results.view(), self.out.view());
        down.run(ops, n, results)?;
        let which = self.which.view().floats(uses.clone());
        let weights = (!kind.weigh_input).then(|| self.weights.view().floats(uses));
        ops.add_rows(results, which, weights, n, hidden, out)
    }

    /// Computes gate, up, and the activation of the gathered rows, as down takes them.
    fn gate_up(&mut self, kind: &ExpertKind, sent: &SentExpert, n: usize) -> Result<(), CudaError> {
        let (ops, memory) = (&self.ops, self.memory[self.next].view());
        let weights = self.weights.view().floats(self.n_sent..self.n_sent + n);
        let factors = kind.weigh_input.then_some(weights);
        let ExpertKind { hidden, ffn, .. } = *kind;
        let x = |ty| Input::for_type(ty, self.rows.view(), &self.rows_quants);
        let (gate, up) = (self.gate.view(), self.up.view());
        let [gate_bias, up_bias] = [0, 1].map(|i| sent.bias(i, memory));
        let gates = sent.gate.clone().map(|range| memory.part(range));
        let ups = memory.part(sent.up.clone());
        let quants = needs_quants(kind.down).then_some(&mut self.inner);
        if let Some(ty) = kind.one_format().filter(|_| n < MATMUL_MIN_ROWS) {
            let gated = Gated {
                ty,
                matrices: match gates {
                    Some(gates) => GateUpMatrices::One([gates, ups]),
                    None => GateUpMatrices::Up(ups),
                },
                biases: [gate_bias, up_bias],
                factors,
                activation: kind.activation,
                jobs: n,
                n_rows: ffn,
                n_cols: hidden,
                x: x(ty),
                jobs_per_x: 1,
            };
            return ops.gated(&gated, gate, quants);
        }
        let product = |ty, matrix, bias, out| {
            let product = Product {
                ty,
                matrix,
                bias,
                factors,
                n_rows: ffn,
                n_cols: hidden,
                x: x(ty),
            };
            product.run(ops, n, out)
        };
        let up = match kind.gate.zip(gates) {
            Some((ty, gates)) => {
                product(ty, gates, gate_bias, gate)?;
                up
            }
            // The product with up takes the gate's place.
            None => gate,
        };
        product(kind.up, ups, up_bias, up)?;
        ops.activate(kind.activation, gate, up, n, ffn, quants)
    }

    /// Waits for the sum over all experts, `[tokens, hidden]`.
    ///
    /// # Panics
    /// When `out` is not as long.
    pub fn finish(&mut self, out: &mut [f32]) -> Result<(), CudaError> {
        assert_eq!(
            out.len(),
            self.tokens * self.hidden,
            "results of streamed experts"
        );
        self.out.view().read_f32(out)
    }

    /// Measures the rate at which experts are streamed, in bytes per second, `copy` included: that of the
    /// link where it does nothing.
    pub fn measure(&mut self, copy: &dyn Fn(&mut [u8], &[u8])) -> Result<f64, CudaError> {
        const PASSES: usize = 8;
        let bytes = vec![1u8; self.sizes.expert()];
        let mut start = std::time::Instant::now();
        for pass in 0..=PASSES {
            if pass == 1 {
                self.ops.device().wait()?;
                start = std::time::Instant::now();
            }
            let which = pass % BUFFERS;
            copy(self.copies.staging(which)?, &bytes);
            self.copies.send(which, self.memory[which].view())?;
            self.copies.used(which)?;
        }
        self.ops.device().wait()?;
        Ok((PASSES * bytes.len()) as f64 / start.elapsed().as_secs_f64().max(1e-9))
    }
}

impl SentExpert {
    /// Returns the matrices, and where each goes.
    fn matrices<'a>(
        &self,
        expert: &ExpertBytes<'a>,
    ) -> impl Iterator<Item = (Range<usize>, &'a [u8])> + use<'a> {
        let gate = self.gate.clone().zip(expert.gate);
        let others = [
            (self.up.clone(), expert.up),
            (self.down.clone(), expert.down),
        ];
        gate.into_iter().chain(others)
    }

    /// Returns the biases, and where each goes.
    fn biases<'a>(
        &self,
        expert: &ExpertBytes<'a>,
    ) -> impl Iterator<Item = (Range<usize>, &'a [f32])> + use<'a> {
        let ranges = self.biases.clone().into_iter().flatten();
        ranges.zip(expert.biases.into_iter().flatten())
    }

    /// Returns the bias of a matrix: gate, up, or down.
    fn bias<'a>(&self, i: usize, memory: View<'a>) -> Option<View<'a>> {
        let biases = self.biases.as_ref();
        biases.map(|biases| memory.part(biases[i].clone()))
    }
}

impl Product<'_> {
    fn run(&self, ops: &Ops, n: usize, out: View<'_>) -> Result<(), CudaError> {
        let &Product {
            ty,
            matrix,
            bias,
            factors,
            n_rows,
            n_cols,
            x,
        } = self;
        if n < MATMUL_MIN_ROWS {
            let matvec = Matvec {
                ty,
                matrices: Matrices::One(matrix),
                bias: bias.filter(|_| factors.is_none()),
                jobs: n,
                n_rows,
                n_cols,
                x,
                jobs_per_x: 1,
            };
            ops.matvec(&matvec, out)?;
            if factors.is_none() {
                return Ok(());
            }
        } else {
            ops.matmul(ty, BatchMatrices::One(matrix, n), n_rows, n_cols, x, out)?;
        }
        if let Some(factors) = factors {
            ops.scale_rows(out, factors, n, n_rows)?;
        }
        match bias {
            Some(bias) => ops.add_bias(out, bias, None, n, n_rows),
            None => Ok(()),
        }
    }
}
