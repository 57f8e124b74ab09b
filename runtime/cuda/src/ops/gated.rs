//! Fused kernels of feed-forward blocks for few rows: gate, up and activation in one launch, and
//! down with the weighted sum over a token's experts in another.

use super::operands::row_bytes;
use super::{Input, MATVEC_ROWS, Matrices, MatrixTable, Quants, blocks, few, int, null_or};
use crate::device::{Arg, View};
use crate::{CudaError, Ops, source};
use tier_plan_formats::model::spec::Activation;
use tier_plan_kernels::quant::TensorType;

/// Matrix rows per block: a run of 32 quantized results. The kernel has the same constant.
const GATED_ROWS: u32 = 32;

/// Threads per block where there are at least [`MANY_BLOCKS`] blocks; twice as many where there are
/// fewer, so that they still fill a GPU.
const GATED_THREADS: u32 = 256;

/// Number of blocks from which on [`GATED_THREADS`] fill a GPU.
const MANY_BLOCKS: usize = 128;

/// Gate and up of one format: one pair for all jobs, or one of several per job. Blocks without a
/// gate have only up.
#[derive(Clone, Copy)]
pub enum GateUpMatrices<'a> {
    /// One pair for every job.
    One([View<'a>; 2]),
    /// One matrix for every job, without a gate.
    Up(View<'a>),
    /// Job `i` takes the pair whose index is `which[i]`, `[jobs]` integers on the device. For an
    /// index outside of the tables, the result stays as it is.
    Chosen([&'a MatrixTable<'a>; 2], View<'a>),
    /// Job `i` takes the matrix whose index is `which[i]`, as above, without a gate.
    ChosenUp(&'a MatrixTable<'a>, View<'a>),
}

impl<'a> GateUpMatrices<'a> {
    /// Returns the gates, if there are any, and the others.
    fn split(self) -> (Option<Matrices<'a>>, Matrices<'a>) {
        match self {
            Self::One([gate, up]) => (Some(Matrices::One(gate)), Matrices::One(up)),
            Self::Up(up) => (None, Matrices::One(up)),
            Self::Chosen([gates, ups], which) => {
                let gates = Matrices::Chosen(gates, which);
                (Some(gates), Matrices::Chosen(ups, which))
            }
            Self::ChosenUp(ups, which) => (None, Matrices::Chosen(ups, which)),
        }
    }
}

/// Gate, up and activation of feed-forward blocks.
#[derive(Clone, Copy)]
pub struct Gated<'a> {
    /// Format of both matrices.
    pub ty: TensorType,
    /// `[n_rows, n_cols]` each.
    pub matrices: GateUpMatrices<'a>,
    /// Biases of gate and up, `[matrices, n_rows]` each.
    pub biases: [Option<View<'a>>; 2],
    /// Factors on both products before the biases, `[jobs]`.
    pub factors: Option<View<'a>>,
    /// Function that combines the two products.
    pub activation: Activation,
    /// Number of rows of results.
    pub jobs: usize,
    /// Rows of a matrix: the width of a result.
    pub n_rows: usize,
    /// Columns of a matrix.
    pub n_cols: usize,
    /// `[jobs / jobs_per_x, n_cols]`.
    pub x: Input<'a>,
    /// Consecutive jobs that share a row of `x`.
    pub jobs_per_x: usize,
}

/// Down of the experts that tokens chose, and the weighted sum over them.
#[derive(Clone, Copy)]
pub struct ChosenSum<'a> {
    /// Format of the matrices.
    pub ty: TensorType,
    /// `[n_rows, n_cols]` each.
    pub table: &'a MatrixTable<'a>,
    /// `[tokens, n_used]` indices in the table; an index outside of it adds nothing.
    pub which: View<'a>,
    /// `[matrices, n_rows]`.
    pub bias: Option<View<'a>>,
    /// `[tokens, n_used]`, or ones.
    pub weights: Option<View<'a>>,
    /// Rows of the sums.
    pub tokens: usize,
    /// Experts per token.
    pub n_used: usize,
    /// Rows of a matrix: the width of a sum.
    pub n_rows: usize,
    /// Columns of a matrix.
    pub n_cols: usize,
    /// `[tokens, n_used, n_cols]`.
    pub x: Input<'a>,
}

impl Ops {
    /// Computes the activation of the products with gate and up, `[jobs, n_rows]`: quantized in
    /// `quants` if given, otherwise as floats in `out`.
    pub fn gated(
        &self,
        g: &Gated<'_>,
        out: View<'_>,
        quants: Option<&mut Quants>,
    ) -> Result<(), CudaError> {
        let &Gated {
            ty,
            jobs,
            n_rows,
            n_cols,
            jobs_per_x,
            ..
        } = g;
        let bytes = n_rows * row_bytes(ty, n_cols);
        let (gate, up) = g.matrices.split();
        assert!(
            gate.is_none_or(|gate| gate.count() == up.count()),
            "as many of both"
        );
        assert!(
            gate.is_some() || g.activation == Activation::SquaredRelu,
            "{:?} without a gate",
            g.activation
        );
        let no_gate = [Arg::Pointer(0); 4];
        let [one_gate, gates, ..] = gate.map_or(no_gate, |gate| gate.args(jobs, bytes));
        let [one_up, ups, n_table, which] = up.args(jobs, bytes);
        let biased =
            |bias: &Option<View<'_>>| bias.is_none_or(|b| b.words() >= up.count() * n_rows);
        assert!(
            g.biases.iter().all(biased),
            "biases of {} matrices with {n_rows} rows",
            up.count()
        );
        assert!(
            g.factors.is_none_or(|factors| factors.words() >= jobs),
            "{jobs} factors"
        );
        assert!(
            jobs_per_x > 0 && (quants.is_some() || out.words() >= jobs * n_rows),
            "{jobs} x {n_rows} results"
        );
        let [activation, first, second] = Self::activation_args(g.activation);
        let [q, scale, sums] = Quants::fill_or_null(quants, jobs, n_rows);
        let [x, x_scale, x_sums] = g.x.args(ty, jobs.div_ceil(jobs_per_x), n_cols);
        let [gate_bias, up_bias] = g.biases.map(null_or);
        let args = [
            one_gate,
            gates,
            one_up,
            ups,
            n_table,
            which,
            gate_bias,
            up_bias,
            null_or(g.factors),
            int(n_rows),
            int(n_cols),
            x,
            x_scale,
            x_sums,
            int(jobs_per_x),
            activation,
            first,
            second,
            out.arg(),
            q,
            scale,
            sums,
        ];
        let grid = [blocks(n_rows, GATED_ROWS), few(jobs), 1];
        let many = grid[0] as usize * jobs >= MANY_BLOCKS;
        let threads = if many {
            GATED_THREADS
        } else {
            2 * GATED_THREADS
        };
        self.launch(source::gated_kernel(ty), grid, threads, &args)
    }

    /// Computes `out[t] = onto[t] + sum over k of weights[t, k] * (w[which[t, k]] . x[t, k] +
    /// bias)` for each token `t`, in rows of `n_rows`; `out` may be `onto`.
    pub fn chosen_sum(
        &self,
        s: &ChosenSum<'_>,
        onto: Option<View<'_>>,
        out: View<'_>,
    ) -> Result<(), CudaError> {
        let &ChosenSum {
            ty,
            tokens,
            n_used,
            n_rows,
            n_cols,
            ..
        } = s;
        let matrices = Matrices::Chosen(s.table, s.which);
        let [_, table, n_table, which] =
            matrices.args(tokens * n_used, n_rows * row_bytes(ty, n_cols));
        assert!(
            s.bias
                .is_none_or(|b| b.words() >= matrices.count() * n_rows),
            "biases of {n_rows} rows"
        );
        assert!(
            s.weights.is_none_or(|w| w.words() >= tokens * n_used),
            "{tokens} x {n_used} weights"
        );
        let fits = |sums: View<'_>| sums.words() >= tokens * n_rows;
        assert!(
            fits(out) && onto.is_none_or(fits),
            "{tokens} x {n_rows} sums"
        );
        let [x, x_scale, x_sums] = s.x.args(ty, tokens * n_used, n_cols);
        let args = [
            table,
            n_table,
            which,
            null_or(s.bias),
            null_or(s.weights),
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
        self.launch(
            source::chosen_sum_kernel(ty),
            grid,
            32 * MATVEC_ROWS as u32,
            &args,
        )
    }
}
