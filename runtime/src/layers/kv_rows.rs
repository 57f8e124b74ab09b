//! The KV cache of a layer: rows of keys, values or latents, one per past token, in pages.

use super::pages::{PAGE, PageIdx, pages_for};
use super::recurrent::RecurrentState;
use crate::tiers::nodes::Pages;
use crate::tiers::zeroed::Zeroed;
use half::f16;
use std::ops::Range;
use tier_plan_formats::model::kv::{self, KvRows, KvType};
use tier_plan_kernels::{Kernels, StoredRows, q8_row_bytes};

/// Rows of one type, `[pages, n_head, PAGE, width]`: heads lie apart within a page, so that a
/// head's rows are one stream there. The last page may be shorter.
///
/// Where a block of positions shares a row, the row is in the page where the block ends, and a page
/// has as many rows as blocks may end in it.
pub(crate) struct RowStore {
    data: Data,
    n_head: usize,
    width: usize,
    /// Positions that share a row.
    every: usize,
    /// Rows of a head in a full page.
    page_rows: usize,
    /// Index of the page that may be shorter, and the rows of a head there.
    last_page: (usize, usize),
    /// Rows in all, as plans count them.
    counted: u64,
}

enum Data {
    F16(Zeroed<f16>),
    /// Each row by itself, in the 8-bit form of the kernels.
    Q8_0(Zeroed<u8>),
    F32(Zeroed<f32>),
}

impl RowStore {
    /// Makes rows of zeros, `n_head` per position.
    pub(super) fn new(kv_type: KvType, n_head: usize, positions: usize, width: usize) -> Self {
        Self::shared(kv_type, (n_head, 1), positions, width)
    }

    /// Makes rows of zeros, one per `every` positions.
    pub(super) fn of_blocks(kv_type: KvType, positions: usize, width: usize, every: usize) -> Self {
        Self::shared(kv_type, (1, every), positions, width)
    }

    fn shared(
        kv_type: KvType,
        (n_head, every): (usize, usize),
        positions: usize,
        width: usize,
    ) -> Self {
        let page_rows = PAGE.div_ceil(every);
        let last_page = (positions / PAGE, (positions % PAGE).div_ceil(every));
        let rows = n_head * (last_page.0 * page_rows + last_page.1);
        let data = match kv_type {
            KvType::F16 => Data::F16(Zeroed::new(rows * width)),
            KvType::Q8_0 => Data::Q8_0(Zeroed::new(rows * q8_row_bytes(width))),
            KvType::F32 => Data::F32(Zeroed::new(rows * width)),
        };
        let counted = KvRows {
            width: width as u64,
            per_token: n_head as u64,
            every: every as u64,
            queries: 0,
            window: None,
            chosen: None,
        };
        Self {
            data,
            n_head,
            width,
            every,
            page_rows,
            last_page,
            counted: counted.held(positions as u64),
        }
    }

    /// Returns the values per row.
    pub(super) fn width(&self) -> usize {
        self.width
    }

    /// Returns the rows of a head in a page.
    fn page_len(&self, page: PageIdx) -> usize {
        if page as usize == self.last_page.0 {
            self.last_page.1
        } else {
            self.page_rows
        }
    }

    /// Returns the index of a head's first row in a page.
    fn first_row(&self, page: PageIdx, head: usize) -> usize {
        page as usize * self.page_rows * self.n_head + head * self.page_len(page)
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
        debug_assert_eq!(self.every, 1, "rows of positions");
        let page = pages[position / PAGE];
        for (head, row) in rows.chunks_exact(self.width).enumerate() {
            let at = self.first_row(page, head) + position % PAGE;
            self.write(kernels, at, row);
        }
    }

    fn write(&mut self, kernels: Kernels, at: usize, row: &[f32]) {
        match &mut self.data {
            Data::F16(data) => kernels.to_f16(row, &mut data[at * self.width..][..self.width]),
            Data::Q8_0(data) => {
                let bytes = q8_row_bytes(self.width);
                kernels.to_q8(row, &mut data[at * bytes..][..bytes]);
            }
            Data::F32(data) => data[at * self.width..][..self.width].copy_from_slice(row),
        }
    }

    /// Returns the index of the row of a block. Of the blocks that end in a page, the first is the one
    /// that has the page's first position.
    fn block_row(&self, pages: &[PageIdx], block: usize) -> usize {
        let page = ((block + 1) * self.every - 1) / PAGE;
        self.first_row(pages[page], 0) + block - page * PAGE / self.every
    }

    /// Stores the row of a complete block of the text that has these pages, `[width]`.
    pub(super) fn store_block(
        &mut self,
        kernels: Kernels,
        pages: &[PageIdx],
        block: usize,
        row: &[f32],
    ) {
        let at = self.block_row(pages, block);
        self.write(kernels, at, row);
    }

    /// Returns the row of a complete block of the text that has these pages.
    pub(super) fn block(&self, pages: &[PageIdx], block: usize) -> StoredRows<'_> {
        let at = self.block_row(pages, block);
        self.all().range(at..at + 1, self.width)
    }

    fn all(&self) -> StoredRows<'_> {
        match &self.data {
            Data::F16(data) => StoredRows::F16(data),
            Data::Q8_0(data) => StoredRows::Q8(data),
            Data::F32(data) => StoredRows::F32(data),
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
        self.all().range(start..start + positions.len(), self.width)
    }

    /// Copies the first `len` positions of a page to another.
    pub(super) fn copy_page(&mut self, from: PageIdx, to: PageIdx, len: usize) {
        let len = len.div_ceil(self.every);
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
        let rows = self.page_rows * self.n_head * per_row;
        page as usize * rows..(page as usize + 1) * rows
    }

    /// Returns the bytes of a full page.
    pub(super) fn page_bytes(&self) -> usize {
        self.page_rows * self.n_head * self.row_bytes()
    }

    /// Returns the bytes of a row.
    fn row_bytes(&self) -> usize {
        match &self.data {
            Data::F16(_) => 2 * self.width,
            Data::Q8_0(_) => q8_row_bytes(self.width),
            Data::F32(_) => 4 * self.width,
        }
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

    /// Returns the bytes of all rows, as plans count them. Smaller pages, as in unit tests, have more
    /// rows of blocks.
    pub(super) fn bytes(&self) -> u64 {
        let held = match &self.data {
            Data::F16(data) => size_of_val(&data[..]) as u64,
            Data::Q8_0(data) => size_of_val(&data[..]) as u64,
            Data::F32(data) => size_of_val(&data[..]) as u64,
        };
        let counted = self.counted * self.row_bytes() as u64;
        debug_assert!(held == counted || self.every > 1 && PAGE < kv::PAGE as usize);
        counted
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
    /// Keys of the layer's indexer, if it has one: per position, or per block.
    pub(super) index_keys: Option<RowStore>,
    /// Per text, then of checkpoints: keys and gates of a block that is not complete. Empty where an
    /// indexer rates positions by themselves.
    pub(super) open: Vec<RecurrentState>,
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
    fn blocks_have_one_row_each_wherever_they_end() {
        let kernels = Kernels::best();
        for kv_type in KvType::ALL {
            for every in [1, 2, 3, 5, PAGE, PAGE + 3, 3 * PAGE] {
                let positions = 7 * PAGE + 5;
                let mut store = RowStore::of_blocks(kv_type, positions, 32, every);
                let pages = [3, 1, 0, 6, 2, 5, 4, 7];
                let row = |block: usize| -> Vec<f32> {
                    (0..32)
                        .map(|i| {
                            if i == 0 {
                                127.0
                            } else {
                                ((block * 7 + i) % 100) as f32
                            }
                        })
                        .collect()
                };
                let blocks = 0..positions / every;
                blocks
                    .clone()
                    .for_each(|b| store.store_block(kernels, &pages, b, &row(b)));
                let found = |store: &RowStore, pages: &[PageIdx], block: usize| {
                    let mut found = vec![f32::NAN; 32];
                    kernels.widen_rows(store.block(pages, block), 32, &mut found);
                    found
                };
                for block in blocks {
                    assert_eq!(
                        found(&store, &pages, block),
                        row(block),
                        "{kv_type} {every}"
                    );
                }
                // A page that is copied, and one that is saved and loaded, have their blocks' rows.
                let ends = |page: usize, len: usize| {
                    let last = move |block: &usize| (block + 1) * every - 1;
                    (0..positions / every)
                        .filter(move |b| (page * PAGE..page * PAGE + len).contains(&last(b)))
                };
                store.copy_page(1, 4, 6);
                let copied = [3, 4, 0, 6, 2, 5, 4, 7];
                for block in ends(1, 6) {
                    assert_eq!(
                        found(&store, &copied, block),
                        row(block),
                        "{kv_type} {every}"
                    );
                }
                let mut saved = Vec::new();
                store.save_page(6, &mut saved);
                assert_eq!(saved.len(), store.page_bytes());
                assert!(store.load_page(5, &saved).is_empty());
                let loaded = [3, 1, 0, 5, 2, 5, 4, 7];
                for block in ends(3, PAGE) {
                    assert_eq!(
                        found(&store, &loaded, block),
                        row(block),
                        "{kv_type} {every}"
                    );
                }
            }
        }
    }

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
