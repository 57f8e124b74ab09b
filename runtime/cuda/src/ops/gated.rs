//! What experts and other feed-forward blocks are made of, for few rows: gate and up with what stands between them and the
//! last product in one launch, and the last products of a token's experts with their weighted sum in another.

use super::products::row_bytes;
use super::{Input, MATVEC_ROWS, Matrices, Quants, Table, blocks, few, int, null_or};
use crate::device::{Arg, View};
use crate::{CudaError, Ops, source};
use tier_plan_formats::model::spec::Activation;
use tier_plan_kernels::quant::TensorType;

/// Rows of a block, as the kernel has them: a run of its result.
const GATED_ROWS: u32 = 32;

/// Threads of such a block, of which few fill a GPU, where there are many blocks.
const GATED_THREADS: u32 = 256;

/// Blocks that are many.
const MANY_BLOCKS: usize = 128;

/// Gate and up of the same type, for all jobs or by job.
#[derive(Clone, Copy)]
pub enum Pair<'a> {
    /// The same two for every job.
    One([View<'a>; 2]),
    /// Those that `which`, `[jobs]` whole numbers on the device, says; for a number outside the tables there are none, and
    /// the job's result stays as it is.
    Chosen([&'a Table<'a>; 2], View<'a>),
}

/// The first half of feed-forward blocks.
#[derive(Clone, Copy)]
pub struct Gated<'a> {
    /// Of both matrices.
    pub ty: TensorType,
    /// `[n_rows, n_cols]` each.
    pub matrices: Pair<'a>,
    /// Of gate and up, each `[_, n_rows]` with a row for every matrix.
    pub biases: [Option<View<'a>>; 2],
    /// What becomes of the two products.
    pub activation: Activation,
    /// Results.
    pub jobs: usize,
    /// Width of a result.
    pub n_rows: usize,
    /// Width of what goes in.
    pub n_cols: usize,
    /// `[jobs / jobs_per_x, n_cols]`.
    pub x: Input<'a>,
    /// Jobs that a row of `x` has.
    pub jobs_per_x: usize,
}

/// The second half of the experts that tokens chose.
#[derive(Clone, Copy)]
pub struct ChosenSum<'a> {
    /// Of the matrices.
    pub ty: TensorType,
    /// `[n_rows, n_cols]` each.
    pub table: &'a Table<'a>,
    /// `[tokens, n_used]` numbers in the table; one outside it adds nothing.
    pub which: View<'a>,
    /// `[_, n_rows]`, a row for every matrix.
    pub bias: Option<View<'a>>,
    /// `[tokens, n_used]`.
    pub weights: View<'a>,
    /// Tokens.
    pub tokens: usize,
    /// Experts of a token.
    pub n_used: usize,
    /// Width of a result.
    pub n_rows: usize,
    /// Width of what goes in.
    pub n_cols: usize,
    /// `[tokens, n_used, n_cols]`.
    pub x: Input<'a>,
}

impl Ops {
    /// Gate's and up's products, and the activation of them: in 8 bits in `quants`, or, without, in `out`; `[jobs, n_rows]`.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a size does not fit.
    pub fn gated(&self, g: &Gated<'_>, out: View<'_>, quants: Option<&mut Quants>) -> Result<(), CudaError> {
        let &Gated { ty, jobs, n_rows, n_cols, jobs_per_x, .. } = g;
        let bytes = n_rows * row_bytes(ty, n_cols);
        let [gate, up] = match g.matrices {
            Pair::One(both) => both.map(Matrices::One),
            Pair::Chosen(tables, which) => tables.map(|table| Matrices::Chosen(table, which)),
        };
        assert!(gate.count() == up.count(), "as many of both");
        let [of_gate, of_gates, n_table, which] = gate.args(jobs, bytes);
        let [of_up, of_ups, ..] = up.args(jobs, bytes);
        let biased = |bias: &Option<View<'_>>| bias.is_none_or(|b| b.words() >= gate.count() * n_rows);
        assert!(g.biases.iter().all(biased), "biases of {} matrices with {n_rows} rows", gate.count());
        assert!(jobs_per_x > 0 && (quants.is_some() || out.words() >= jobs * n_rows), "{jobs} x {n_rows} results");
        let (clamped, alpha, limit) = match g.activation {
            Activation::Silu => (0, 0.0, 0.0),
            Activation::ClampedSwiglu { alpha, limit } => (1, alpha, limit),
        };
        let [q, scale, sums] = Quants::fill_or_null(quants.map(|quants| (quants, jobs, n_rows)));
        let [x, x_scale, x_sums] = g.x.args(ty, jobs.div_ceil(jobs_per_x), n_cols);
        let [gate_bias, up_bias] = g.biases.map(null_or);
        let (alpha, limit) = (Arg::Float(alpha), Arg::Float(limit));
        let args = [
            of_gate,
            of_gates,
            of_up,
            of_ups,
            n_table,
            which,
            gate_bias,
            up_bias,
            int(n_rows),
            int(n_cols),
            x,
            x_scale,
            x_sums,
            int(jobs_per_x),
            Arg::Int(clamped),
            alpha,
            limit,
            out.arg(),
            q,
            scale,
            sums,
        ];
        let grid = [blocks(n_rows, GATED_ROWS), few(jobs), 1];
        let many = grid[0] as usize * jobs >= MANY_BLOCKS;
        let threads = if many { GATED_THREADS } else { 2 * GATED_THREADS };
        self.launch(source::gated_kernel(ty), grid, threads, &args)
    }

    /// `out[token] = onto[token] + sum over k of weights[token, k] * (w[which[token, k]] . x[token, k] + bias)`, rows of
    /// `n_rows`; `out` may be `onto`.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a size does not fit.
    pub fn chosen_sum(&self, s: &ChosenSum<'_>, onto: Option<View<'_>>, out: View<'_>) -> Result<(), CudaError> {
        let &ChosenSum { ty, tokens, n_used, n_rows, n_cols, .. } = s;
        let matrices = Matrices::Chosen(s.table, s.which);
        let [_, table, n_table, which] = matrices.args(tokens * n_used, n_rows * row_bytes(ty, n_cols));
        assert!(s.bias.is_none_or(|b| b.words() >= matrices.count() * n_rows), "biases of {n_rows} rows");
        assert!(s.weights.words() >= tokens * n_used, "{tokens} x {n_used} weights");
        let fits = |sums: View<'_>| sums.words() >= tokens * n_rows;
        assert!(fits(out) && onto.is_none_or(fits), "{tokens} x {n_rows} sums");
        let [x, x_scale, x_sums] = s.x.args(ty, tokens * n_used, n_cols);
        let args = [
            table,
            n_table,
            which,
            null_or(s.bias),
            s.weights.arg(),
            int(n_used),
            int(n_rows),
            int(n_cols),
            x,
            x_scale,
            x_sums,
            null_or(onto),
            out.arg(),
        ];
        let grid = [blocks(n_rows, MATVEC_ROWS as u32), few(tokens), 1];
        self.launch(source::chosen_sum_kernel(ty), grid, 32 * MATVEC_ROWS as u32, &args)
    }
}
