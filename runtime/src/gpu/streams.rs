//! Several residual streams on a GPU: what blocks and the head read of them, and how results are
//! written back. The arithmetic is that of `layers/streams.rs`.

use super::buffers::GpuBuffers;
use super::matrix::{GpuLoader, Matrix, of_rows, product, products};
use super::stream_buffers::StreamBuffers;
use super::workspace::{Output, Purpose, Residual, Workspace};
use std::ops::Range;
use tier_plan_cuda::ops::{GatedValues, Injected, StreamGates, StreamRows, StreamsOut};
use tier_plan_cuda::{Buffer, CudaError, Ops};
use tier_plan_formats::model::spec::{
    BankConnection, Connection as ConnectionSpec, GatedConnection, StreamsEnd, TensorId,
};

/// What a block or the head reads: the hidden state under a norm, or a mixture of its streams.
pub(super) struct BlockInput {
    connection: Option<Connection>,
    /// None where streams have a norm of their own.
    norm: Option<Buffer>,
}

/// How streams are read.
enum Connection {
    Gated(Gated),
    LowRank(LowRank),
    Bank { spec: BankConnection, score: Buffer },
    Mean,
}

/// Weights for whole streams.
struct Gated {
    spec: GatedConnection,
    gates: Matrix,
    base: Buffer,
    scale: Buffer,
}

/// Weights for every value, of low rank.
struct LowRank {
    /// `[streams, hidden]`.
    norm: Buffer,
    down: Matrix,
    up: Matrix,
    inject: Option<Matrix>,
}

/// How a block's result is written back.
#[derive(Debug, Clone, Copy, Default)]
pub(super) enum WriteBack {
    /// It is added to the hidden state.
    #[default]
    Add,
    /// By the weights in the buffers; streams may be mixed with each other.
    Weights { mixes: bool },
    /// To the first stream, which may join a bank.
    Bank(BankConnection),
}

impl WriteBack {
    /// Returns how a block between several streams writes back, if it is one.
    pub(super) fn of(connection: Option<&ConnectionSpec>) -> Self {
        match connection {
            None => WriteBack::Add,
            Some(ConnectionSpec::Gated(gated)) => WriteBack::Weights {
                mixes: gated.sinkhorn.is_some(),
            },
            Some(ConnectionSpec::LowRank(_)) => WriteBack::Weights { mixes: false },
            Some(ConnectionSpec::Bank(bank)) => WriteBack::Bank(*bank),
        }
    }
}

impl BlockInput {
    /// Loads what a block reads.
    ///
    /// # Errors
    /// When the device fails, or no kernel computes it.
    pub(super) fn new(
        loader: &GpuLoader<'_>,
        connection: Option<&ConnectionSpec>,
        norm: TensorId,
    ) -> Result<Self, CudaError> {
        let has_norm = connection.is_none_or(ConnectionSpec::has_block_norm);
        Ok(Self {
            connection: connection.map(|c| Connection::new(loader, c)).transpose()?,
            norm: loader.opt_vector(has_norm.then_some(norm))?,
        })
    }

    /// Loads what the head reads.
    ///
    /// # Errors
    /// When the device fails, or no kernel computes it.
    pub(super) fn of_head(
        loader: &GpuLoader<'_>,
        end: Option<&StreamsEnd>,
        norm: TensorId,
    ) -> Result<Self, CudaError> {
        let connection = match end.map(StreamsEnd::connection) {
            None => None,
            Some(None) => Some(Connection::Mean),
            Some(Some(spec)) => Some(Connection::new(loader, &spec)?),
        };
        let has_norm = end.is_none_or(StreamsEnd::has_output_norm);
        Ok(Self {
            connection,
            norm: loader.opt_vector(has_norm.then_some(norm))?,
        })
    }

    /// Adds what is pending to rows, and leaves what the block reads of them in `buffers.answer`.
    pub(super) fn read(
        &self,
        work: &mut Workspace,
        rows: Range<usize>,
        residual: Residual,
        output: Output,
        purpose: Purpose,
    ) -> Result<(), CudaError> {
        let connection = match (&self.connection, &self.norm) {
            (None, Some(norm)) => return work.norm(norm, rows, residual, output),
            (None, None) => return Err(work.missing("the norm of a block")),
            (Some(connection), _) => connection,
        };
        work.complete(rows.clone(), residual)?;
        match (connection, &self.norm) {
            (Connection::LowRank(low), _) => low.read(work, rows, output, purpose),
            (_, None) => Err(work.missing("the norm of a block")),
            (Connection::Gated(gated), Some(norm)) => gated.read(work, norm, rows, output, purpose),
            (Connection::Bank { spec, score }, Some(norm)) => {
                if purpose == Purpose::Block {
                    work.back = WriteBack::Bank(*spec);
                }
                let Reading { ops, of, out, .. } = reading(work, norm, rows, output);
                ops.read_bank(of, spec, score.view(), out)
            }
            (Connection::Mean, Some(norm)) => {
                let Reading { ops, of, out, .. } = reading(work, norm, rows, output);
                ops.read_mean(of, out)
            }
        }
    }
}

impl Connection {
    fn new(loader: &GpuLoader<'_>, spec: &ConnectionSpec) -> Result<Self, CudaError> {
        match spec {
            ConnectionSpec::Gated(gated) => Ok(Self::Gated(Gated {
                spec: *gated,
                gates: loader.linear(&gated.gates)?,
                base: loader.vector(gated.base)?,
                scale: loader.vector(gated.scale)?,
            })),
            ConnectionSpec::Bank(bank) => Ok(Self::Bank {
                spec: *bank,
                score: loader.vector(bank.score)?,
            }),
            ConnectionSpec::LowRank(low) => {
                let inject = low.inject.as_ref();
                Ok(Self::LowRank(LowRank {
                    norm: loader.vector(low.norm)?,
                    down: loader.linear(&low.down)?,
                    up: loader.linear(&low.up)?,
                    inject: inject.map(|l| loader.linear(l)).transpose()?,
                }))
            }
        }
    }
}

impl Gated {
    fn read(
        &self,
        work: &mut Workspace,
        norm: &Buffer,
        rows: Range<usize>,
        output: Output,
        purpose: Purpose,
    ) -> Result<(), CudaError> {
        let (n, width) = (rows.len(), work.streams * work.hidden);
        let (x, eps, ops) = (work.state(rows.clone()), work.eps, work.ops.clone());
        let StreamBuffers { wide, gates, .. } = &work.buffers.streams;
        let (wide, gates) = (wide.view(), gates.view());
        ops.rms_norm(x, None, n, width, eps, wide)?;
        let inner = &mut work.buffers.inner;
        if self.gates.takes_quants() {
            ops.quantize(wide, n, width, inner)?;
        }
        product(&ops, &self.gates, n, wide, inner, gates)?;
        // Those of the head have no weights for writing back.
        let writes = purpose == Purpose::Block && self.spec.gates.n_out > work.streams;
        let mixes = self.spec.sinkhorn.is_some();
        if writes {
            work.back = WriteBack::Weights { mixes };
        }
        let Reading {
            ops,
            of,
            out,
            buffers,
        } = reading(work, norm, rows.clone(), output);
        let by = StreamGates {
            spec: self.spec,
            gates: buffers.gates.view(),
            base: self.base.view(),
            scale: self.scale.view(),
            back: writes.then(|| buffers.weights(&rows, of.n, mixes)),
        };
        ops.read_gated(of, &by, out)
    }
}

impl LowRank {
    fn read(
        &self,
        work: &mut Workspace,
        rows: Range<usize>,
        output: Output,
        purpose: Purpose,
    ) -> Result<(), CudaError> {
        let Workspace {
            ops,
            buffers,
            hidden,
            streams,
            eps,
            back,
            ..
        } = work;
        let GpuBuffers {
            x,
            answer,
            inner,
            quants,
            streams: buffers,
            ..
        } = buffers;
        let (n, streams, rank) = (rows.len(), *streams, self.down.n_out);
        let of = |x| StreamRows {
            x,
            rows: n,
            n: streams,
            width: *hidden,
        };
        let width = streams * *hidden;
        let (wide, low, gates) = (
            buffers.wide.view(),
            buffers.low.view(),
            buffers.value_gates.view(),
        );
        let x = of(of_rows(x.view(), &rows, width));
        ops.norm_streams(x, self.norm.view(), *eps, wide)?;
        let mut readers = vec![(&self.down, low)];
        let writes = self.inject.as_ref().filter(|_| purpose == Purpose::Block);
        readers.extend(writes.map(|inject| (inject, buffers.gates.view())));
        if readers.iter().any(|(matrix, _)| matrix.takes_quants()) {
            ops.quantize(wide, n, width, inner)?;
        }
        products(ops, &readers, n, wide, inner)?;
        ops.squash_streams(low, streams, n * rank)?;
        if self.up.takes_quants() {
            ops.quantize(low, n, rank, inner)?;
        }
        product(ops, &self.up, n, low, inner, gates)?;
        if writes.is_some() {
            *back = WriteBack::Weights { mixes: false };
        }
        let values = GatedValues {
            gates,
            back: writes.map(|_| Injected {
                products: buffers.gates.view(),
                post: of_rows(buffers.post.view(), &rows, streams),
            }),
        };
        let quants = (output == Output::Quantized).then_some(quants);
        ops.read_low_rank(of(wide), &values, answer.view(), quants)
    }
}

/// What reading rows of streams takes.
struct Reading<'w> {
    ops: &'w Ops,
    of: StreamRows<'w>,
    out: StreamsOut<'w, 'w>,
    buffers: &'w StreamBuffers,
}

/// Prepares to read rows of streams to `buffers.answer`.
fn reading<'w>(
    work: &'w mut Workspace,
    norm: &'w Buffer,
    rows: Range<usize>,
    output: Output,
) -> Reading<'w> {
    let (n, width) = (work.streams, work.streams * work.hidden);
    let buffers = &mut work.buffers;
    let quants = (output == Output::Quantized).then_some(&mut buffers.quants);
    Reading {
        ops: &work.ops,
        of: StreamRows {
            x: of_rows(buffers.x.view(), &rows, width),
            rows: rows.len(),
            n,
            width: work.hidden,
        },
        out: StreamsOut {
            norm: norm.view(),
            eps: work.eps,
            out: buffers.answer.view(),
            quants,
        },
        buffers: &buffers.streams,
    }
}

impl Workspace {
    /// Adds `buffers.out`, results of a block that has read rows, to these rows of the hidden state.
    pub(super) fn add_out(&self, rows: Range<usize>) -> Result<(), CudaError> {
        let (out, n) = (self.buffers.out.view(), self.streams);
        let of = StreamRows {
            x: self.state(rows.clone()),
            rows: rows.len(),
            n,
            width: self.hidden,
        };
        match &self.back {
            WriteBack::Add => self.ops.add(of.x, out, rows.len() * self.hidden),
            WriteBack::Weights { mixes } => {
                let weights = self.buffers.streams.weights(&rows, n, *mixes);
                self.ops.write_streams(of, out, weights)
            }
            WriteBack::Bank(bank) => self.ops.write_bank(of, out, bank),
        }
    }

    /// Adds to rows of the hidden state what is still to be added.
    pub(super) fn complete(&self, rows: Range<usize>, residual: Residual) -> Result<(), CudaError> {
        match residual {
            Residual::Pending => self.add_out(rows),
            Residual::None => Ok(()),
        }
    }

    /// Sets all streams of rows to `buffers.out`.
    pub(super) fn spread(&self, rows: Range<usize>) -> Result<(), CudaError> {
        let to = StreamRows {
            x: self.state(rows.clone()),
            rows: rows.len(),
            n: self.streams,
            width: self.hidden,
        };
        self.ops.spread(self.buffers.out.view(), to)
    }
}
