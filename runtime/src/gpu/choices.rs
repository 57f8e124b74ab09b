//! What an indexer on a GPU chose for layers elsewhere, and the reverse.

use super::Gpu;
use crate::layers::chosen::ChosenRows;
use tier_plan_cuda::{CudaError, View};

impl Gpu {
    /// Returns what the last indexer chose for some rows of the batch, `[rows, kept]` blocks; zeros for
    /// rows that choose all.
    ///
    /// # Errors
    /// When a block is beyond its row: a failing device may answer anything.
    pub(crate) fn choices(&self, rows: ChosenRows<'_>) -> Result<Vec<u32>, CudaError> {
        let view = self.lists(rows);
        let mut bytes = vec![0; view.len()];
        view.read(&mut bytes)?;
        let words = bytes.as_chunks().0.iter().map(|b| u32::from_ne_bytes(*b));
        let mut blocks: Vec<u32> = words.collect();
        for (list, seen) in blocks.chunks_exact_mut(rows.kept()).zip(rows.seen) {
            if !rows.is_listed(*seen) {
                list.fill(0);
                continue;
            }
            let visible = rows.selection.visible(*seen);
            if let Some(beyond) = list.iter().find(|block| **block as usize >= visible) {
                return Err(CudaError::Call {
                    device: self.work.ops.device().name().into(),
                    what: "choosing positions".into(),
                    why: format!("it chose number {beyond} of {visible}"),
                });
            }
        }
        Ok(blocks)
    }

    /// Takes what an indexer elsewhere chose for some rows of the batch, `[rows, kept]` blocks.
    pub(crate) fn put_choices(
        &self,
        rows: ChosenRows<'_>,
        blocks: &[u32],
    ) -> Result<(), CudaError> {
        let bytes: Vec<u8> = blocks.iter().flat_map(|b| b.to_ne_bytes()).collect();
        self.lists(rows).write(&bytes)
    }

    /// Returns the lists of some rows of the batch.
    fn lists(&self, rows: ChosenRows<'_>) -> View<'_> {
        let (first, n) = (rows.first_row, rows.seen.len());
        let lists = self.work.buffers.chosen.view();
        lists.floats(first * rows.kept()..(first + n) * rows.kept())
    }
}
