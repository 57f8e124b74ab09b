//! What a file says of a tensor.

use tier_plan_kernels::quant::TensorType;

/// A tensor: where it lies and what it holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// Its name, `blk.0.attn_q.weight`.
    pub name: String,
    /// Lengths, fastest-varying first: `[columns, rows, …]`, 1 to 4 of them, none 0.
    pub dims: Vec<u64>,
    /// Element or block type of the data.
    pub ty: TensorType,
    /// The file of a split model that it lies in, from 0.
    pub part: usize,
    /// First byte in that file.
    pub offset: u64,
    /// Length of the data in bytes.
    pub n_bytes: u64,
    /// `[n_expert]`, where each expert's slice lies, if a file has the experts as tensors apart.
    /// Empty where the data lies in one piece at `offset`.
    pub slices: Vec<SlicePlace>,
}

/// Where one slice of a tensor lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlicePlace {
    /// The file of a split model, from 0.
    pub part: usize,
    /// First byte in that file.
    pub offset: u64,
    /// Length in bytes.
    pub n_bytes: u64,
}

impl TensorInfo {
    /// Returns the values in one row: the first dimension.
    pub fn cols(&self) -> u64 {
        self.dims.first().copied().unwrap_or(1)
    }

    /// Returns the rows: the product of all dimensions but the first.
    pub fn rows(&self) -> u64 {
        // Checked when the file was opened: the product of all dimensions fits.
        self.dims.iter().skip(1).product()
    }

    /// Returns where the slice `index` of `n` equal ones lies.
    ///
    /// # Panics
    /// If the slices lie apart and are not `n`, or there is no such slice.
    pub fn slice(&self, index: usize, n: usize) -> SlicePlace {
        if !self.slices.is_empty() {
            assert_eq!(self.slices.len(), n, "slices of {}", self.name);
            return self.slices[index];
        }
        assert!(index < n, "slice {index} of {n} of {}", self.name);
        let n_bytes = self.n_bytes / n as u64;
        SlicePlace {
            part: self.part,
            offset: self.offset + index as u64 * n_bytes,
            n_bytes,
        }
    }

    /// Returns the number of values.
    pub fn n_elements(&self) -> u64 {
        self.dims.iter().product()
    }
}
