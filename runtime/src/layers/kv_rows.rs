//! The KV cache of a layer: rows of keys, values or latents, one per past token.

use crate::tiers::nodes::Pages;
use half::f16;
use std::ops::Range;
use tier_plan_formats::model::kv::KvType;
use tier_plan_kernels::{Kernels, StoredRows, q8_row_bytes};

/// Rows of one type, `[n_head, context, width]`: heads lie apart, so that a head's rows are one
/// stream.
pub(crate) struct RowStore {
    data: Data,
    context: usize,
    width: usize,
}

enum Data {
    F16(Vec<f16>),
    /// Each row by itself, in the 8-bit form of the kernels.
    Q8_0(Vec<u8>),
    F32(Vec<f32>),
}

impl RowStore {
    /// Makes rows of zeros, `n_head` per position.
    pub(super) fn new(kv_type: KvType, n_head: usize, context: usize, width: usize) -> Self {
        let rows = n_head * context;
        let data = match kv_type {
            KvType::F16 => Data::F16(vec![f16::ZERO; rows * width]),
            KvType::Q8_0 => Data::Q8_0(vec![0; rows * q8_row_bytes(width)]),
            KvType::F32 => Data::F32(vec![0.0; rows * width]),
        };
        Self {
            data,
            context,
            width,
        }
    }

    /// Returns the values per row.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Stores the rows of all heads at a position, `[n_head, width]`.
    pub(super) fn store(&mut self, kernels: Kernels, position: usize, rows: &[f32]) {
        for (head, row) in rows.chunks_exact(self.width).enumerate() {
            let at = head * self.context + position;
            match &mut self.data {
                Data::F16(data) => kernels.to_f16(row, &mut data[at * self.width..][..self.width]),
                Data::Q8_0(data) => {
                    let bytes = q8_row_bytes(self.width);
                    kernels.to_q8(row, &mut data[at * bytes..][..bytes]);
                }
                Data::F32(data) => data[at * self.width..][..self.width].copy_from_slice(row),
            }
        }
    }

    /// Returns a head's rows at some positions, `[positions, width]`.
    pub(super) fn rows(&self, head: usize, positions: Range<usize>) -> StoredRows<'_> {
        let first = head * self.context;
        let all = match &self.data {
            Data::F16(data) => StoredRows::F16(data),
            Data::Q8_0(data) => StoredRows::Q8(data),
            Data::F32(data) => StoredRows::F32(data),
        };
        all.range(first + positions.start..first + positions.end, self.width)
    }

    /// Moves its pages to where `pages` says.
    pub(super) fn move_to(&self, pages: &Pages) -> std::io::Result<()> {
        match &self.data {
            Data::F16(data) => pages.move_here(data),
            Data::Q8_0(data) => pages.move_here(data),
            Data::F32(data) => pages.move_here(data),
        }
    }

    /// Returns the bytes of all rows.
    pub(super) fn bytes(&self) -> u64 {
        match &self.data {
            Data::F16(data) => size_of_val(data.as_slice()) as u64,
            Data::Q8_0(data) => size_of_val(data.as_slice()) as u64,
            Data::F32(data) => size_of_val(data.as_slice()) as u64,
        }
    }
}

/// The KV cache of one layer.
pub(crate) struct KeyValues {
    /// `[n_head_kv, context, key_dim]`.
    pub(super) keys: RowStore,
    /// `[n_head_kv, context, value_dim]`.
    pub(super) values: RowStore,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_where_they_were_stored() {
        for kernels in Kernels::available() {
            for kv_type in KvType::ALL {
                for width in [16, 24, 40, 64] {
                    let (n_head, context) = (3, 5);
                    let mut store = RowStore::new(kv_type, n_head, context, width);
                    let expected = kv_type.row_bytes(width as u64) * (n_head * context) as u64;
                    assert_eq!(store.bytes(), expected, "{kv_type} {width}");
                    // Whole numbers up to 127 are exact in all types.
                    let value = |position: usize, head: usize, i: usize| match i % 32 {
                        0 => 127.0,
                        i => ((position * 31 + head * 7 + i) % 100) as f32,
                    };
                    let row = |position, head| (0..width).map(move |i| value(position, head, i));
                    for position in 0..context {
                        let rows: Vec<f32> =
                            (0..n_head).flat_map(|head| row(position, head)).collect();
                        store.store(kernels, position, &rows);
                    }
                    let mut buffer: Vec<f32> = Vec::new();
                    for head in 0..n_head {
                        for positions in [0..context, 1..3, 4..5, 2..2] {
                            let expected: Vec<f32> =
                                positions.clone().flat_map(|p| row(p, head)).collect();
                            buffer.resize(expected.len(), f32::NAN);
                            kernels.widen_rows(store.rows(head, positions), width, &mut buffer);
                            assert_eq!(buffer, expected, "{kernels:?} {kv_type} {width} {head}");
                        }
                    }
                }
            }
        }
    }
}
