//! Hyper-connections: blocks that read several residual streams and write back to all of them.

use super::{Quants, THREADS, blocks, few, int, null_or};
use crate::device::{Arg, View};
use crate::{CudaError, Ops};
use tier_plan_formats::model::spec::{BankConnection, GatedConnection};

/// Most streams, and most that are mixed with each other; the kernels have the same constants.
pub use tier_plan_formats::model::gpu::{MAX_MIXED_STREAMS, MAX_STREAMS};

/// Rows of streams, `[rows, n, width]`.
#[derive(Clone, Copy)]
pub struct StreamRows<'a> {
    /// The streams.
    pub x: View<'a>,
    /// Rows.
    pub rows: usize,
    /// Streams per row, at most [`MAX_STREAMS`].
    pub n: usize,
    /// Values per stream.
    pub width: usize,
}

impl StreamRows<'_> {
    /// Panics if the buffer is too short, or there are too many streams.
    fn check(&self) {
        let Self { rows, n, width, .. } = *self;
        assert!((1..=MAX_STREAMS).contains(&n), "{n} streams");
        assert!(
            self.x.words() >= rows * n * width,
            "{rows} rows of {n} streams of {width}"
        );
    }

    /// Returns the blocks of kernels with a thread per value of a row.
    fn grid(&self) -> [u32; 3] {
        [blocks(self.width, THREADS), few(self.rows), 1]
    }
}

/// Where what is read goes, and the norm that follows.
pub struct StreamsOut<'a, 'q> {
    /// `[width]`.
    pub norm: View<'a>,
    /// Epsilon of all norms.
    pub eps: f32,
    /// `[rows, width]`.
    pub out: View<'a>,
    /// Its quantized form.
    pub quants: Option<&'q mut Quants>,
}

impl StreamsOut<'_, '_> {
    /// Checks the sizes, and returns the arguments of the kernels.
    fn args(self, of: StreamRows<'_>) -> [Arg; 6] {
        assert!(
            self.norm.words() >= of.width && self.out.words() >= of.rows * of.width,
            "{} rows of {}",
            of.rows,
            of.width
        );
        let [q, scale, sums] = Quants::fill_or_null(self.quants, of.rows, of.width);
        let (norm, eps) = (self.norm.arg(), Arg::Float(self.eps));
        [norm, eps, self.out.arg(), q, scale, sums]
    }
}

/// Weights for writing results back.
#[derive(Clone, Copy)]
pub struct StreamWeights<'a> {
    /// `[rows, n]`.
    pub post: View<'a>,
    /// `[rows, n, n]`: what a stream (first) gives to another; `None` where all stay as they are.
    pub mix: Option<View<'a>>,
}

impl StreamWeights<'_> {
    fn check(&self, of: StreamRows<'_>) {
        let StreamRows { rows, n, .. } = of;
        let mixes = |mix: &View<'_>| n <= MAX_MIXED_STREAMS && mix.words() >= rows * n * n;
        assert!(
            self.post.words() >= rows * n && self.mix.as_ref().is_none_or(mixes),
            "weights of {rows} rows of {n} streams"
        );
    }
}

/// Normalized streams, and a gate for each of their values.
#[derive(Clone, Copy)]
pub struct GatedValues<'a> {
    /// `[rows, n, width]`.
    pub gates: View<'a>,
    /// `[rows, n]`: what factors on the result are made of, and where these go.
    pub back: Option<Injected<'a>>,
}

/// What a connection injects, and the factors that are made of it.
#[derive(Clone, Copy)]
pub struct Injected<'a> {
    /// `[rows, n]`.
    pub products: View<'a>,
    /// `[rows, n]`.
    pub post: View<'a>,
}

/// The gates of rows, and what makes weights of them.
#[derive(Clone, Copy)]
pub struct StreamGates<'a> {
    /// The connection that they belong to.
    pub spec: GatedConnection,
    /// `[rows, gates]`.
    pub gates: View<'a>,
    /// `[gates]`.
    pub base: View<'a>,
    /// A value per kind of gate, `[1]` to `[3]`.
    pub scale: View<'a>,
    /// Where the weights for writing back go, if that follows.
    pub back: Option<StreamWeights<'a>>,
}

impl Ops {
    /// Reads streams by weights for whole streams.
    pub fn read_gated(
        &self,
        of: StreamRows<'_>,
        by: &StreamGates<'_>,
        out: StreamsOut<'_, '_>,
    ) -> Result<(), CudaError> {
        of.check();
        let (n, n_gates) = (of.n, by.spec.gates.n_out);
        let rounds = by.spec.sinkhorn.map_or(0, |sinkhorn| sinkhorn.rounds);
        let mixes = by.back.is_some() && rounds > 0;
        let (kinds, least) = match (by.back.is_some(), mixes) {
            (false, _) => (1, n),
            (true, false) => (2, 2 * n),
            (true, true) => (3, 2 * n + n * n),
        };
        assert!(
            n_gates >= least
                && by.gates.words() >= of.rows * n_gates
                && by.base.words() >= n_gates
                && by.scale.words() >= kinds,
            "{n_gates} gates of {n} streams"
        );
        if let Some(back) = &by.back {
            back.check(of);
            assert!(back.mix.is_some() || !mixes, "no room for a matrix");
        }
        let [norm, eps, to, q, scale, sums] = out.args(of);
        let args = [
            of.x.arg(),
            by.gates.arg(),
            int(n_gates),
            int(n),
            int(of.width),
            by.base.arg(),
            by.scale.arg(),
            Arg::Float(by.spec.epsilon),
            Arg::Float(by.spec.post_scale),
            Arg::Float(by.spec.post_offset),
            int(rounds),
            norm,
            eps,
            to,
            q,
            scale,
            sums,
            null_or(by.back.map(|back| back.post)),
            null_or(by.back.and_then(|back| back.mix)),
        ];
        let grid = [blocks(of.rows, 1), 1, 1];
        self.launch("streams_read_gated", grid, THREADS, &args)
    }

    /// Reads the first stream and those of a bank. `score` is `[width]`.
    pub fn read_bank(
        &self,
        of: StreamRows<'_>,
        bank: &BankConnection,
        score: View<'_>,
        out: StreamsOut<'_, '_>,
    ) -> Result<(), CudaError> {
        of.check();
        assert!(
            bank.n_bank < of.n && score.words() >= of.width,
            "{bank:?} of {} streams",
            of.n
        );
        let [norm, eps, to, q, scale, sums] = out.args(of);
        let args = [
            of.x.arg(),
            score.arg(),
            int(bank.n_bank),
            int(of.n),
            int(of.width),
            norm,
            eps,
            to,
            q,
            scale,
            sums,
        ];
        let grid = [blocks(of.rows, 1), 1, 1];
        self.launch("streams_read_bank", grid, THREADS, &args)
    }

    /// Normalizes each stream by itself; `norm` is `[n, width]`, and `out` as long as the streams.
    pub fn norm_streams(
        &self,
        of: StreamRows<'_>,
        norm: View<'_>,
        eps: f32,
        out: View<'_>,
    ) -> Result<(), CudaError> {
        of.check();
        let values = of.rows * of.n * of.width;
        assert!(
            norm.words() >= of.n * of.width && out.words() >= values,
            "{} streams of {}",
            of.n,
            of.width
        );
        let (n, width) = (int(of.n), int(of.width));
        let args = [of.x.arg(), norm.arg(), n, width, Arg::Float(eps), out.arg()];
        let grid = [blocks(of.rows * of.n, 1), 1, 1];
        self.launch("streams_norm", grid, THREADS, &args)
    }

    /// Computes `x = silu(x / n)` for `count` values.
    pub fn squash_streams(&self, x: View<'_>, n: usize, count: usize) -> Result<(), CudaError> {
        assert!(x.words() >= count && n > 0, "{count} values");
        let grid = [blocks(count, THREADS), 1, 1];
        self.launch(
            "streams_squash",
            grid,
            THREADS,
            &[x.arg(), int(n), int(count)],
        )
    }

    /// Reads normalized streams by a weight for every value, to `out`, `[rows, width]`, also
    /// quantized. No norm follows.
    pub fn read_low_rank(
        &self,
        of: StreamRows<'_>,
        by: &GatedValues<'_>,
        out: View<'_>,
        quants: Option<&mut Quants>,
    ) -> Result<(), CudaError> {
        of.check();
        let StreamRows { rows, n, width, .. } = of;
        let injects =
            |back: &Injected<'_>| back.products.words().min(back.post.words()) >= rows * n;
        assert!(
            by.gates.words() >= rows * n * width
                && out.words() >= rows * width
                && by.back.as_ref().is_none_or(injects),
            "gates of {rows} rows of {n} streams of {width}"
        );
        let [q, scale, sums] = Quants::fill_or_null(quants, rows, width);
        let args = [
            of.x.arg(),
            by.gates.arg(),
            null_or(by.back.map(|back| back.products)),
            int(n),
            int(width),
            out.arg(),
            q,
            scale,
            sums,
            null_or(by.back.map(|back| back.post)),
        ];
        let grid = [blocks(rows, 1), 1, 1];
        self.launch("streams_read_low_rank", grid, THREADS, &args)
    }

    /// Reads the mean of streams.
    pub fn read_mean(&self, of: StreamRows<'_>, out: StreamsOut<'_, '_>) -> Result<(), CudaError> {
        of.check();
        let [norm, eps, to, q, scale, sums] = out.args(of);
        let (n, width) = (int(of.n), int(of.width));
        let args = [of.x.arg(), n, width, norm, eps, to, q, scale, sums];
        let grid = [blocks(of.rows, 1), 1, 1];
        self.launch("streams_read_mean", grid, THREADS, &args)
    }

    /// Writes results of a block, `[rows, width]`, back to streams.
    pub fn write_streams(
        &self,
        of: StreamRows<'_>,
        result: View<'_>,
        by: StreamWeights<'_>,
    ) -> Result<(), CudaError> {
        of.check();
        by.check(of);
        assert!(result.words() >= of.rows * of.width, "results");
        let (n, width) = (int(of.n), int(of.width));
        let (post, mix) = (by.post.arg(), null_or(by.mix));
        let args = [of.x.arg(), result.arg(), post, mix, n, width];
        self.launch("streams_write", of.grid(), THREADS, &args)
    }

    /// Adds results of a block, `[rows, width]`, to the first stream; or has them take its place,
    /// which joins the bank then.
    pub fn write_bank(
        &self,
        of: StreamRows<'_>,
        result: View<'_>,
        bank: &BankConnection,
    ) -> Result<(), CudaError> {
        of.check();
        assert!(result.words() >= of.rows * of.width, "results");
        assert!(!bank.banks || bank.n_bank + 1 < of.n, "{bank:?}");
        let slot = if bank.banks {
            int(bank.n_bank)
        } else {
            Arg::Int(-1)
        };
        let args = [of.x.arg(), result.arg(), slot, int(of.n), int(of.width)];
        self.launch("streams_write_bank", of.grid(), THREADS, &args)
    }

    /// Makes all streams of rows the row of `from`, `[rows, width]`.
    pub fn spread(&self, from: View<'_>, to: StreamRows<'_>) -> Result<(), CudaError> {
        to.check();
        assert!(from.words() >= to.rows * to.width, "rows to spread");
        let args = [from.arg(), to.x.arg(), int(to.n), int(to.width)];
        self.launch("streams_spread", to.grid(), THREADS, &args)
    }
}
