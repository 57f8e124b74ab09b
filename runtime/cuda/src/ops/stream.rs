//! Gathering the rows of a batch for an expert, and adding its results to the rows.

use super::{THREADS, blocks, few, int, null_or};
use crate::device::{Arg, View};
use crate::{CudaError, Ops};

impl Ops {
    /// Computes `out[row] = x[which[row]]` for `n` rows of `width`. The indices are not checked.
    pub fn gather_rows(
        &self,
        x: View<'_>,
        which: View<'_>,
        n: usize,
        width: usize,
        out: View<'_>,
    ) -> Result<(), CudaError> {
        assert!(
            which.words() >= n && out.words() >= n * width,
            "{n} rows of {width}"
        );
        let args = [x.arg(), which.arg(), int(width), out.arg()];
        self.launch(
            "gather_rows",
            [blocks(width, THREADS), few(n), 1],
            THREADS,
            &args,
        )
    }

    /// Computes `to[which[row]] += weights[row] * x[row]` for `n` rows of `width`; weights that are
    /// not given are ones. The indices are not checked, and no index may occur twice.
    pub fn add_rows(
        &self,
        x: View<'_>,
        which: View<'_>,
        weights: Option<View<'_>>,
        n: usize,
        width: usize,
        to: View<'_>,
    ) -> Result<(), CudaError> {
        assert!(
            which.words() >= n && x.words() >= n * width,
            "{n} rows of {width}"
        );
        assert!(weights.is_none_or(|w| w.words() >= n), "{n} weights");
        let weights = null_or(weights);
        let args = [x.arg(), which.arg(), weights, int(width), to.arg()];
        self.launch(
            "add_rows",
            [blocks(width, THREADS), few(n), 1],
            THREADS,
            &args,
        )
    }

    /// Sets the first `n` floats to zero.
    pub fn clear(&self, x: View<'_>, n: usize) -> Result<(), CudaError> {
        assert!(x.words() >= n, "{n} values");
        self.launch(
            "clear",
            [blocks(n, THREADS), 1, 1],
            THREADS,
            &[x.arg(), Arg::Long(n as i64)],
        )
    }
}
