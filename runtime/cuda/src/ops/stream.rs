//! Rows of a batch that an expert takes, and adding what it makes of them.

use super::{THREADS, blocks, few, int};
use crate::device::{Arg, View};
use crate::{CudaError, Ops};

impl Ops {
    /// `out[row] = x[which[row]]` for `n` rows of `width`. Each number must be that of a row: nothing looks.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a size does not fit.
    pub fn gather_rows(
        &self,
        x: View<'_>,
        which: View<'_>,
        n: usize,
        width: usize,
        out: View<'_>,
    ) -> Result<(), CudaError> {
        assert!(which.words() >= n && out.words() >= n * width, "{n} rows of {width}");
        let args = [x.arg(), which.arg(), int(width), out.arg()];
        self.launch("gather_rows", [blocks(width, THREADS), few(n), 1], THREADS, &args)
    }

    /// `to[which[row]] += weights[row] * x[row]` for `n` rows of `width`. Each number must be that of a row, and none may be
    /// there twice: nothing looks.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When a size does not fit.
    pub fn add_rows(
        &self,
        x: View<'_>,
        which: View<'_>,
        weights: View<'_>,
        n: usize,
        width: usize,
        to: View<'_>,
    ) -> Result<(), CudaError> {
        assert!(which.words() >= n && weights.words() >= n && x.words() >= n * width, "{n} rows of {width}");
        let args = [x.arg(), which.arg(), weights.arg(), int(width), to.arg()];
        self.launch("add_rows", [blocks(width, THREADS), few(n), 1], THREADS, &args)
    }

    /// Zeros for the first `n` floats.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When there are fewer.
    pub fn clear(&self, x: View<'_>, n: usize) -> Result<(), CudaError> {
        assert!(x.words() >= n, "{n} values");
        self.launch("clear", [blocks(n, THREADS), 1, 1], THREADS, &[x.arg(), Arg::Long(n as i64)])
    }
}
