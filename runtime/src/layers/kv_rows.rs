//! The KV cache of a layer: rows of keys, values or latents, one per past token, in pages.

use super::pages::{PAGE, PageIdx, pages_for};
use crate::tiers::nodes::Pages;
use half::f16;
use std::ops::Range;
use tier_plan_formats::model::kv::KvType;
use tier_plan_kernels::{Kernels, StoredRows, q8_row_bytes};

/// Rows of one type, `[pages, n_head, PAGE, width]`: heads lie apart within a page, so that a
/// head's rows are one stream there. The last page may be shorter.
pub(crate) struct RowStore {
    data: Data,
    n_head: usize,
    /// Positions of all pages.
    positions: usize,
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
    pub(super) fn new(kv_type: KvType, n_head: usize, positions: usize, width: usize) -> Self {
        let rows = n_head * positions;
        let data = match kv_type {
            KvType::F16 => Data::F16(vec![f16::ZERO; rows * width]),
            KvType::Q8_0 => Data::Q8_0(vec![0; rows * q8_row_bytes(width)]),
            KvType::F32 => Data::F32(vec![0.0; rows * width]),
        };
        Self {
            data,
            n_head,
            positions,
            width,
        }
    }

    /// Returns the values per row.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Returns the positions of a page.
    fn page_len(&self, page: PageIdx) -> usize {
        (self.positions - page as usize * PAGE).min(PAGE)
    }

    /// Returns the index of a head's first row in a page.
    fn first_row(&self, page: PageIdx, head: usize) -> usize {
        page as usize * PAGE * self.n_head + head * self.page_len(page)
    }

    /// Stores the rows of all heads at a position of the text that has these pages, `[n_head,
    /// width]`.
    pub(super) fn store(
        &mut self,
        kernels: Kernels,
        pages: &[PageIdx],
        position: usize,
        rows: &[f32],
    ) {
        let page = pages[position / PAGE];
        for (head, row) in rows.chunks_exact(self.width).enumerate() {
            let at = self.first_row(page, head) + position % PAGE;
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

    /// Returns a head's rows at some positions, `[positions, width]`, of the text that has these
    /// pages. The positions are all in one page.
    pub(super) fn rows(
        &self,
        pages: &[PageIdx],
        head: usize,
        positions: Range<usize>,
    ) -> StoredRows<'_> {
        debug_assert!(
            pages_for(positions.end) <= positions.start / PAGE + 1,
            "rows of one page"
        );
        let first = self.first_row(pages[positions.start / PAGE], head);
        let start = first + positions.start % PAGE;
        let all = match &self.data {
            Data::F16(data) => StoredRows::F16(data),
            Data::Q8_0(data) => StoredRows::Q8(data),
            Data::F32(data) => StoredRows::F32(data),
        };
        all.range(start..start + positions.len(), self.width)
    }

    /// Copies the first `len` positions of a page to another.
    pub(super) fn copy_page(&mut self, from: PageIdx, to: PageIdx, len: usize) {
        for head in 0..self.n_head {
            let (from, to) = (self.first_row(from, head), self.first_row(to, head));
            match &mut self.data {
                Data::F16(data) => copy_rows(data, self.width, from, to, len),
                Data::Q8_0(data) => copy_rows(data, q8_row_bytes(self.width), from, to, len),
                Data::F32(data) => copy_rows(data, self.width, from, to, len),
            }
        }
    }

    /// Returns the elements of a full page, as a range.
    fn page(&self, page: PageIdx, per_row: usize) -> Range<usize> {
        let rows = PAGE * self.n_head * per_row;
        page as usize * rows..(page as usize + 1) * rows
    }

    /// Returns the bytes of a full page.
    pub(super) fn page_bytes(&self) -> usize {
        let per_row = match &self.data {
            Data::F16(_) => 2 * self.width,
            Data::Q8_0(_) => q8_row_bytes(self.width),
            Data::F32(_) => 4 * self.width,
        };
        PAGE * self.n_head * per_row
    }

    /// Appends a full page to `out`, little-endian.
    pub(super) fn save_page(&self, page: PageIdx, out: &mut Vec<u8>) {
        match &self.data {
            Data::F16(data) => {
                let values = &data[self.page(page, self.width)];
                out.extend(values.iter().flat_map(|x| x.to_le_bytes()));
            }
            Data::Q8_0(data) => {
                out.extend_from_slice(&data[self.page(page, q8_row_bytes(self.width))]);
            }
            Data::F32(data) => {
                let values = &data[self.page(page, self.width)];
                out.extend(values.iter().flat_map(|x| x.to_le_bytes()));
            }
        }
    }

    /// Takes a full page from the beginning of `bytes`. Returns the rest.
    pub(super) fn load_page<'b>(&mut self, page: PageIdx, bytes: &'b [u8]) -> &'b [u8] {
        let (bytes, rest) = bytes.split_at(self.page_bytes());
        let (plain, coded) = (
            self.page(page, self.width),
            self.page(page, q8_row_bytes(self.width)),
        );
        match &mut self.data {
            Data::F16(data) => {
                let values = bytes.as_chunks::<2>().0;
                for (to, from) in data[plain].iter_mut().zip(values) {
                    *to = f16::from_le_bytes(*from);
                }
            }
            Data::Q8_0(data) => data[coded].copy_from_slice(bytes),
            Data::F32(data) => {
                let values = bytes.as_chunks::<4>().0;
                for (to, from) in data[plain].iter_mut().zip(values) {
                    *to = f32::from_le_bytes(*from);
                }
            }
        }
        rest
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

/// Copies `len` rows of `width` elements, from row `from` on to row `to` on.
fn copy_rows<T: Copy>(data: &mut [T], width: usize, from: usize, to: usize, len: usize) {
    data.copy_within(from * width..(from + len) * width, to * width);
}

/// The KV cache of one layer.
pub(crate) struct KeyValues {
    /// `[pages, n_head_kv, PAGE, key_dim]`.
    pub(super) keys: RowStore,
    /// `[pages, n_head_kv, PAGE, value_dim]`.
    pub(super) values: RowStore,
}

/// The KV cache of one layer with latent attention.
pub(crate) struct LatentRows {
    /// Rows of latents, each with its shared key part: all heads read the same rows.
    pub(super) latents: RowStore,
    /// Keys of the layer's indexer, if it has one.
    pub(super) index_keys: Option<RowStore>,
}

impl LatentRows {
    pub(super) fn stores(&self) -> impl Iterator<Item = &RowStore> {
        std::iter::once(&self.latents).chain(&self.index_keys)
    }

    pub(super) fn stores_mut(&mut self) -> impl Iterator<Item = &mut RowStore> {
        std::iter::once(&mut self.latents).chain(&mut self.index_keys)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_where_they_were_stored() {
        for kernels in Kernels::available() {
            for kv_type in KvType::ALL {
                for width in [16, 24, 40, 64] {
                    // Three pages, the last of them shorter; a text has them in another order.
                    let (n_head, context, pages) = (3, 2 * PAGE + 3, [1, 0, 2]);
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
                        store.store(kernels, &pages, position, &rows);
                    }
                    let mut buffer: Vec<f32> = Vec::new();
                    for head in 0..n_head {
                        for positions in [0..PAGE, 1..3, PAGE..PAGE + 5, 2 * PAGE..context, 2..2] {
                            let expected: Vec<f32> =
                                positions.clone().flat_map(|p| row(p, head)).collect();
                            buffer.resize(expected.len(), f32::NAN);
                            kernels.widen_rows(
                                store.rows(&pages, head, positions),
                                width,
                                &mut buffer,
                            );
                            assert_eq!(buffer, expected, "{kernels:?} {kv_type} {width} {head}");
                        }
                    }
                    // A copy of the page of the first positions has their rows.
                    store.copy_page(1, 0, 5);
                    for head in 0..n_head {
                        let expected: Vec<f32> = (0..5).flat_map(|p| row(p, head)).collect();
                        buffer.resize(expected.len(), f32::NAN);
                        kernels.widen_rows(store.rows(&[0], head, 0..5), width, &mut buffer);
                        assert_eq!(buffer, expected, "{kernels:?} {kv_type} {width} {head}");
                    }
                }
            }
        }
    }
}
