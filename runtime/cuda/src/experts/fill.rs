//! Filling slots and shared buffers, from memory that is copied first or read where it lies.

use super::layer::{Layer, Spot};
use super::slots::SlotTransfers;
use super::{ExpertBytes, PinnedExperts, Place};
use crate::CudaError;
use crate::device::View;
use crate::transfers::{TransferId, TransferOrder};
use std::sync::Arc;

/// Returns a layer, and one of its places that are filled.
fn spot_of(layers: &[Option<Layer>], layer: usize, place: Place) -> (&Layer, Spot<'_>) {
    let Some(l) = layers.get(layer).and_then(Option::as_ref) else {
        panic!("layer {layer} on a device")
    };
    let Some(spot) = l.spot(place) else {
        panic!("{place:?} of layer {layer} can't be filled")
    };
    (l, spot)
}

impl PinnedExperts {
    /// Has slots and shared buffers filled beside what the device computes, where that is supported and
    /// there are any.
    ///
    /// # Errors
    /// When the device refuses a stream.
    pub fn open_transfers(&mut self) -> Result<(), CudaError> {
        let is_filled = |l: &&Layer| l.n_slots > 0 || l.n_shared() > 0;
        let with_slots = self.layers.iter().flatten().filter(is_filled);
        let Some(stride) = with_slots.map(|l| l.layout.stride).max() else {
            return Ok(());
        };
        if let Some(stream) = Arc::clone(self.ops.device()).transfers()? {
            // Allocations are ordered in the compute stream, which transfers do not wait for.
            self.ops.device().wait()?;
            self.transfers = Some(SlotTransfers::new(stream, stride));
        }
        Ok(())
    }

    /// Locks host memory that slots or shared buffers are [filled from](Self::fill_in_place), until this
    /// value is dropped. Returns whether they can be.
    ///
    /// # Safety
    /// The memory is mapped, and stays so until this value is dropped.
    pub unsafe fn lock(&mut self, start: *const u8, len: usize) -> bool {
        let transfers = self.transfers.as_mut();
        // SAFETY: the caller's promise.
        transfers.is_some_and(|transfers| unsafe { transfers.stream.lock(start, len) })
    }

    /// Copies an expert into a slot. The bytes may be overwritten when this returns.
    ///
    /// # Errors
    /// After an error, the content of the slot is undefined.
    ///
    /// # Panics
    /// When there is no such slot, or a size is not that of the layer.
    pub fn fill(
        &mut self,
        layer: usize,
        slot: usize,
        expert: &ExpertBytes<'_>,
        order: TransferOrder,
    ) -> Result<(), CudaError> {
        let Self {
            layers, transfers, ..
        } = self;
        let (l, spot) = spot_of(layers, layer, Place::Slot(slot));
        match transfers {
            Some(transfers) => {
                l.put_biases(spot.entry, expert)?;
                transfers.send_copy(l, spot, expert, order)
            }
            // The device works in order, so this comes after what was asked of the previous expert.
            None => l.put(spot, expert),
        }
    }

    /// Copies an expert into a slot from [locked](Self::lock) memory, which is read until the
    /// transfer is done.
    ///
    /// # Errors
    /// As [`fill`](Self::fill).
    ///
    /// # Safety
    /// The bytes of the matrices are locked, stay, and are not written until the transfer is done.
    ///
    /// # Panics
    /// As [`fill`](Self::fill), and when no memory was locked.
    pub unsafe fn fill_in_place(
        &mut self,
        layer: usize,
        slot: usize,
        expert: &ExpertBytes<'_>,
        order: TransferOrder,
    ) -> Result<TransferId, CudaError> {
        let Self {
            layers, transfers, ..
        } = self;
        let (l, spot) = spot_of(layers, layer, Place::Slot(slot));
        let Some(transfers) = transfers else {
            panic!("a device that copies in place")
        };
        // Nothing may fail once the bytes are on their way.
        l.put_biases(spot.entry, expert)?;
        let copies: Vec<(View<'_>, &[u8])> = l.copies(spot, expert).collect();
        // SAFETY: the caller's promise.
        unsafe { transfers.stream.send(&copies, order) }
    }

    /// Copies experts into the first shared buffers from [locked](Self::lock) memory, as one transfer
    /// that waits for nothing. What was asked of experts in these buffers has been
    /// [fetched](Self::fetch).
    ///
    /// # Errors
    /// As [`fill`](Self::fill).
    ///
    /// # Safety
    /// As [`fill_in_place`](Self::fill_in_place).
    ///
    /// # Panics
    /// When there are fewer buffers, a size is not that of the layer, or no memory was locked.
    pub unsafe fn fill_shared(
        &mut self,
        layer: usize,
        experts: &[ExpertBytes<'_>],
    ) -> Result<TransferId, CudaError> {
        let Self {
            layers, transfers, ..
        } = self;
        let Some(transfers) = transfers else {
            panic!("a device that copies in place")
        };
        let mut copies: Vec<(View<'_>, &[u8])> = Vec::with_capacity(3 * experts.len());
        for (i, expert) in experts.iter().enumerate() {
            let (l, spot) = spot_of(layers, layer, Place::Shared(i));
            l.put_biases(spot.entry, expert)?;
            copies.extend(l.copies(spot, expert));
        }
        // SAFETY: the caller's promise.
        unsafe { transfers.stream.send(&copies, TransferOrder::AtOnce) }
    }

    /// Returns how many experts of a layer can be [pinned](Self::pin) where others were.
    pub fn n_free_pins(&self, layer: usize) -> usize {
        self.layer(layer).map_or(0, Layer::n_free_pins)
    }

    /// Gives up the pin of an expert, if it has one. What was asked of it before is computed.
    ///
    /// # Errors
    /// When the device fails. The expert is not pinned then either.
    pub fn unpin(&mut self, layer: usize, expert: usize) -> Result<(), CudaError> {
        let l = self.layers.get_mut(layer).and_then(Option::as_mut);
        l.map_or(Ok(()), |l| l.unpin(expert))
    }

    /// Pins an expert where another of its layer [was](Self::unpin). The bytes may be overwritten when this
    /// returns.
    ///
    /// # Errors
    /// After an error it is not pinned.
    ///
    /// # Panics
    /// When it is pinned already, there is [no memory](Self::n_free_pins) for it, or a size is not that of
    /// the layer.
    pub fn pin(
        &mut self,
        layer: usize,
        expert: usize,
        bytes: &ExpertBytes<'_>,
    ) -> Result<(), CudaError> {
        let Some(l) = self.layers.get_mut(layer).and_then(Option::as_mut) else {
            panic!("layer {layer} on a device")
        };
        l.pin(expert, bytes)
    }

    /// Waits until everything is done that was asked of the device.
    pub fn wait(&self) -> Result<(), CudaError> {
        self.ops.device().wait()
    }

    /// Returns whether a transfer is done.
    pub fn is_filled(&mut self, transfer: TransferId) -> Result<bool, CudaError> {
        let transfers = self.transfers.as_mut();
        transfers.map_or(Ok(true), |transfers| transfers.stream.is_done(transfer))
    }

    /// Waits until a transfer is done.
    pub fn wait_filled(&mut self, transfer: TransferId) -> Result<(), CudaError> {
        let transfers = self.transfers.as_mut();
        transfers.map_or(Ok(()), |transfers| transfers.stream.wait(transfer))
    }

    /// Returns the matrices of the expert in a place: gate, up, down.
    ///
    /// # Panics
    /// When there is no such place.
    #[cfg(any(test, feature = "emulator"))]
    pub fn bytes_in(&self, layer: usize, place: Place) -> Result<Vec<u8>, CudaError> {
        let Some(l) = self.layer(layer) else {
            panic!("layer {layer} on a device")
        };
        l.bytes_in(place)
    }
}
