//! Filling slots beside what the device computes.

use super::ExpertBytes;
use super::layer::{Layer, Spot};
use crate::CudaError;
use crate::device::View;
use crate::transfers::{TransferId, TransferOrder, Transfers};
use std::ops::Range;

/// Buffers for experts that are copied before they are sent: one is filled while another is on its
/// way.
const BOUNCE_BUFFERS: usize = 2;

/// A stream that fills slots, with buffers for what can't be sent from where it is.
///
/// The stream comes first: it is dropped, and its transfers have ended, before the buffers are.
pub(super) struct SlotTransfers {
    pub(super) stream: Box<dyn Transfers>,
    bounce: Vec<BounceBuffer>,
    /// The buffer that is filled next.
    next: usize,
    /// Bytes of a buffer.
    len: usize,
}

/// Granularity of locked memory in bytes.
const PAGE: usize = 4096;

/// Locked memory that an expert is copied to.
struct BounceBuffer {
    bytes: Vec<u8>,
    /// The whole pages within the bytes, which nothing else lies in.
    pages: Range<usize>,
    /// What was last sent from it.
    sent: Option<TransferId>,
}

impl SlotTransfers {
    /// Fills slots of up to `len` bytes. Buffers are made when they are wanted.
    pub(super) fn new(stream: Box<dyn Transfers>, len: usize) -> Self {
        Self {
            stream,
            bounce: Vec::new(),
            next: 0,
            len,
        }
    }

    /// Copies an expert, and sends the copy to a slot.
    pub(super) fn send_copy(
        &mut self,
        layer: &Layer,
        spot: Spot<'_>,
        expert: &ExpertBytes<'_>,
        order: TransferOrder,
    ) -> Result<(), CudaError> {
        let copies: Vec<(View<'_>, &[u8])> = layer.copies(spot, expert).collect();
        if self.bounce.len() < BOUNCE_BUFFERS {
            self.next = self.bounce.len();
            let bytes = vec![0u8; self.len.next_multiple_of(PAGE) + PAGE];
            let first = bytes.as_ptr().align_offset(PAGE);
            let pages = first..first + self.len.next_multiple_of(PAGE);
            let locked = &bytes[pages.clone()];
            // SAFETY: the buffer is never moved or freed while the stream lives, which is dropped
            // first.
            let is_locked = unsafe { self.stream.lock(locked.as_ptr(), locked.len()) };
            if !is_locked {
                let mut copies = copies.into_iter();
                copies.try_for_each(|(to, bytes)| to.write(bytes))?;
                // A later transfer to the slot might overtake the writes.
                return layer.slots.device().wait();
            }
            self.bounce.push(BounceBuffer {
                bytes,
                pages,
                sent: None,
            });
        }
        let buffer = &mut self.bounce[self.next];
        self.next = (self.next + 1) % BOUNCE_BUFFERS;
        if let Some(sent) = buffer.sent {
            self.stream.wait(sent)?;
        }
        let mut rest = &mut buffer.bytes[buffer.pages.clone()];
        let mut parts: Vec<(View<'_>, &[u8])> = Vec::with_capacity(copies.len());
        for (to, bytes) in copies {
            let (part, after) = rest.split_at_mut(bytes.len());
            part.copy_from_slice(bytes);
            parts.push((to, part));
            rest = after;
        }
        // SAFETY: the buffer is locked, and not written before the transfer is done.
        buffer.sent = Some(unsafe { self.stream.send(&parts, order) }?);
        Ok(())
    }
}
