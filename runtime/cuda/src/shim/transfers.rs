//! Transfers to the emulated GPU, and its copy stream: both copy at once.

use crate::copy_stream::{BUFFERS, CopyStream};
use crate::transfers::{TransferId, TransferOrder, Transfers};
use crate::{CudaError, View};
use std::ops::Range;

/// Copies at once, and is done when it is asked a second time or waited for.
#[derive(Default)]
pub(super) struct ShimTransfers {
    locked: Vec<Range<usize>>,
    n_sent: u64,
    n_asked: u64,
}

impl ShimTransfers {
    /// Whether all of this memory is locked, perhaps in several pieces.
    fn has_locked(&self, range: Range<usize>) -> bool {
        let mut at = range.start;
        while at < range.end {
            let ends = self.locked.iter().filter(|piece| piece.contains(&at));
            match ends.map(|piece| piece.end).max() {
                Some(end) => at = end,
                None => return false,
            }
        }
        true
    }
}

impl Transfers for ShimTransfers {
    unsafe fn lock(&mut self, start: *const u8, len: usize) -> bool {
        self.locked.push(start as usize..start as usize + len);
        true
    }

    unsafe fn send(
        &mut self,
        copies: &[(View<'_>, &[u8])],
        _: TransferOrder,
    ) -> Result<TransferId, CudaError> {
        for (to, bytes) in copies {
            let from = bytes.as_ptr_range();
            assert!(
                self.has_locked(from.start as usize..from.end as usize),
                "a transfer of memory that is not locked"
            );
            to.write(bytes)?;
        }
        self.n_sent += 1;
        Ok(TransferId(self.n_sent - 1))
    }

    fn is_done(&mut self, transfer: TransferId) -> Result<bool, CudaError> {
        let asked_again = transfer.0 < self.n_asked;
        self.n_asked = self.n_asked.max(transfer.0 + 1);
        Ok(asked_again)
    }

    fn wait(&mut self, transfer: TransferId) -> Result<(), CudaError> {
        assert!(transfer.0 < self.n_sent, "what was sent");
        Ok(())
    }
}

/// Sends at once; what was sent must be used before more is.
pub(super) struct ShimLane {
    staging: Vec<Vec<u8>>,
    used: [bool; BUFFERS],
}

impl ShimLane {
    /// Returns a stream with buffers of so many bytes.
    pub(super) fn new(len: usize) -> Self {
        Self {
            staging: vec![vec![0xff; len]; BUFFERS],
            used: [true; BUFFERS],
        }
    }
}

impl CopyStream for ShimLane {
    fn staging(&mut self, which: usize) -> Result<&mut [u8], CudaError> {
        Ok(&mut self.staging[which])
    }

    fn is_free(&mut self, which: usize) -> Result<bool, CudaError> {
        // Every other time, so that whoever asks has something else to do.
        Ok(which == 0)
    }

    fn send(&mut self, which: usize, to: View<'_>) -> Result<(), CudaError> {
        assert!(
            std::mem::replace(&mut self.used[which], false),
            "what was sent last is still to be used"
        );
        to.write(&self.staging[which][..to.len()])
    }

    unsafe fn send_locked(
        &mut self,
        which: usize,
        copies: &[(View<'_>, &[u8])],
    ) -> Result<(), CudaError> {
        assert!(
            std::mem::replace(&mut self.used[which], false),
            "what was sent last is still to be used"
        );
        copies.iter().try_for_each(|(to, bytes)| to.write(bytes))
    }

    fn used(&mut self, which: usize) -> Result<(), CudaError> {
        self.used[which] = true;
        Ok(())
    }
}
