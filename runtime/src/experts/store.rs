//! The expert store: pinned experts, slots shared by the pooled ones, and reads from the slow tier.
//!
//! A layer's accesses are one [`Step`]: all choices are looked up together, reads for what is missing are submitted as
//! far as there are buffers, and each expert can be used once it is [ready](Step::is_ready). Which experts stay in the
//! slots is decided by [`SlotCache`](super::cache::SlotCache) alone, the same code that the planner replays.

use super::layer::{Home, LayerExperts, Layout};
use super::view::ExpertView;

use super::cache::Access;
use super::checksums::Checks;
use super::gpu::OnGpu;
use super::prefetch::{Ahead, Landed};
use super::warmup::Warm;
use crate::tiers::arena::Piece;
use crate::tiers::file::{Arrival, FileTier, ReadError, Urgency};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tier_plan_cuda::CudaError;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::model::spec::TensorId;

/// Reads submitted ahead of the expert that is computing, in a step with more misses than buffers.
const READ_AHEAD: usize = 8;

/// The state of one expert in a step.
pub(crate) enum Use {
    /// Home is where it computes.
    AtHome,
    /// In this slot.
    Slot(usize),
    /// To be read into this slot, but not before the expert at this position of the step, which lies there, is done.
    FillSlot { slot: usize, after: Option<usize> },
    /// To be read into a staging buffer.
    Stage,
    /// Being read; into a slot or into staging.
    Loading(Option<usize>),
    /// In a staging buffer.
    Staged(Piece),
    /// Computed, buffer given back.
    Done,
}

/// One layer's accesses for one token or one batch.
pub(crate) struct Step {
    pub(crate) layer: usize,
    /// In the order they compute and are read.
    pub(crate) experts: Vec<u32>,
    pub(crate) uses: Vec<Use>,
    pub(crate) next_read: usize,
    pub(crate) in_flight: usize,
    /// Experts that compute from staging before they move to their slot: position, slot, position they wait for if the
    /// slot is in use till then.
    pub(crate) late: Vec<(usize, usize, Option<usize>)>,
    /// Computed experts whose bytes wait in staging for a slot: position they wait for, expert, slot, bytes.
    held: Vec<(usize, u32, usize, Piece)>,
    /// Which need no read, whatever was read ahead.
    at_hand: Vec<bool>,
    /// Slots to be read, perhaps again, when the step ends, for want of staging: position, slot.
    reread: Vec<(usize, usize)>,
    /// How many were at home, in a slot, and missing.
    pub(crate) pinned_hits: u64,
    pub(crate) slot_hits: u64,
    pub(crate) misses: u64,
    /// Bytes that misses bring in from the slow tier.
    pub(crate) read_bytes: u64,
    /// Time in which nothing could compute for want of a read.
    pub(crate) waited: Duration,
    /// From the first submission of a read to the end of the last one, those ahead of the step included.
    during: Option<(Instant, Instant)>,
}

impl Step {
    pub(crate) fn layer(&self) -> usize {
        self.layer
    }

    pub(crate) fn experts(&self) -> &[u32] {
        &self.experts
    }

    /// A read of the step lasted so.
    pub(crate) fn was_reading(&mut self, during: (Instant, Instant)) {
        let (began, ended) = self.during.get_or_insert(during);
        (*began, *ended) = ((*began).min(during.0), (*ended).max(during.1));
    }

    /// Time from the first submission of one of its reads, be it ahead of the step, to the end of the last one.
    pub(crate) fn reading(&self) -> Duration {
        self.during.map_or(Duration::ZERO, |(began, ended)| ended - began)
    }

    /// Whether the expert at this position of the step was at home or in a slot when the step began.
    pub(crate) fn was_at_hand(&self, at: usize) -> bool {
        self.at_hand[at]
    }

    /// Whether the expert at this position of the step computes where it lives for good.
    pub(crate) fn is_at_home(&self, at: usize) -> bool {
        matches!(self.uses[at], Use::AtHome)
    }

    /// Whether the expert at this position of the step can compute.
    pub(crate) fn is_ready(&self, at: usize) -> bool {
        matches!(self.uses[at], Use::AtHome | Use::Slot(_) | Use::Staged(_))
    }
}

/// All routed experts of a loaded model.
pub(crate) struct ExpertStore {
    pub(crate) gguf: Arc<Gguf>,
    pub(crate) layers: Vec<LayerExperts>,
    pub(crate) files: Option<FileTier>,
    pub(crate) staging: Vec<Piece>,
    /// Staging buffers, wherever they are.
    pub(crate) n_staging: usize,
    staging_tier: usize,
    mapped_tier: usize,
    accesses: Vec<Access>,
    pooled: Vec<u32>,
    pub(crate) ahead: Ahead,
    pub(crate) warm: Warm,
    /// What every read is compared with.
    checks: Option<Arc<Checks>>,
    pub(crate) gpus: Vec<OnGpu>,
    /// Why an expert could not be copied to its slot.
    pub(crate) gpu_error: Option<CudaError>,
}

impl ExpertStore {
    /// `files` may be absent only where no expert is pooled; `looks_ahead` where they are a real device.
    pub(crate) fn new(
        gguf: Arc<Gguf>,
        layers: Vec<LayerExperts>,
        files: Option<FileTier>,
        staging: Vec<Piece>,
        staging_tier: usize,
        mapped_tier: usize,
        looks_ahead: bool,
    ) -> Self {
        let ahead = Ahead::new(looks_ahead && files.is_some(), staging.len());
        let (accesses, pooled) = (Vec::new(), Vec::new());
        let n_staging = staging.len();
        Self {
            gguf,
            layers,
            files,
            staging,
            n_staging,
            staging_tier,
            mapped_tier,
            accesses,
            pooled,
            ahead,
            warm: Warm::default(),
            checks: None,
            gpus: Vec::new(),
            gpu_error: None,
        }
    }

    /// From now on compares every expert that is read with its checksums.
    pub(crate) fn verify(&mut self, checks: Arc<Checks>) {
        self.checks = Some(checks);
    }

    /// The slices of all experts that are looked at where they are mapped.
    pub(crate) fn in_place(&self) -> Vec<(TensorId, usize)> {
        let in_place = |home: &Home| !matches!(home, Home::Pinned(..) | Home::Gpu(_));
        let experts = |layer: &LayerExperts| {
            let experts = layer.homes.iter().enumerate().filter(|(_, home)| in_place(home)).map(|(expert, _)| expert);
            experts.flat_map(|expert| layer.parts.iter().map(move |part| (part.tensor, expert))).collect::<Vec<_>>()
        };
        self.layers.iter().flat_map(experts).collect()
    }

    /// Starts reading an expert into a buffer.
    pub(crate) fn fetch(&self, key: u64, layer: usize, expert: u32, piece: Piece, urgency: Urgency) {
        let (Some(files), store) = (&self.files, &self.layers[layer]) else { return };
        let spans = store.spans(&self.gguf, expert as usize, store.layout);
        let checks = store.checks(&self.gguf, self.checks.as_deref(), expert as usize, store.layout);
        files.submit_checked(key, &spans, checks, piece, urgency);
    }

    pub(crate) fn expert_bytes(&self, layer: usize) -> u64 {
        self.layers[layer].expert_bytes as u64
    }

    /// Counts the choices of one token, of which all of a step's are counted before it begins.
    pub(crate) fn note(&mut self, layer: usize, chosen: &[u16]) {
        self.layers[layer].cache.note(chosen.iter().copied().map(u32::from));
    }

    /// Looks all `used` experts up, in order of last use, and submits the first reads. They will compute in the order
    /// given by `order`, a permutation of `used`.
    pub(crate) fn begin(&mut self, layer: usize, used: &[u32], order: Vec<u32>) -> Step {
        self.forget_asked();
        let store = &mut self.layers[layer];
        self.pooled.clear();
        self.pooled.extend(used.iter().filter(|e| matches!(store.homes[**e as usize], Home::Pooled)));
        self.accesses.clear();
        store.cache.settle(&self.pooled, &mut self.accesses);
        let mut step = Step {
            layer,
            uses: Vec::with_capacity(order.len()),
            next_read: 0,
            in_flight: 0,
            late: Vec::new(),
            held: Vec::new(),
            at_hand: Vec::new(),
            reread: Vec::new(),
            pinned_hits: (used.len() - self.pooled.len()) as u64,
            slot_hits: 0,
            misses: 0,
            read_bytes: 0,
            waited: Duration::ZERO,
            during: None,
            experts: order,
        };
        for expert in &step.experts {
            let access = self.pooled.iter().position(|p| p == expert).map(|i| &self.accesses[i]);
            step.uses.push(match access {
                None => Use::AtHome,
                Some(Access::Hit { slot }) => Use::Slot(*slot as usize),
                Some(Access::Fill { slot, evicted }) => {
                    let (slot, at) = (*slot as usize, step.uses.len());
                    let after = evicted.and_then(|e| step.experts.iter().position(|used| *used == e));
                    if after.is_some() && self.n_staging == 0 {
                        // On a mapped tier it computes where it lies and moves to its slot when the step ends: there is
                        // no other buffer, and who lies there may be later in the step.
                        step.reread.push((at, slot));
                        Use::AtHome
                    } else {
                        Use::FillSlot { slot, after }
                    }
                }
                // On a mapped tier what gets no slot computes where it lies.
                Some(Access::Staged) if self.n_staging == 0 => Use::AtHome,
                Some(Access::Staged) => Use::Stage,
            });
            match access {
                Some(Access::Hit { .. }) => step.slot_hits += 1,
                Some(Access::Fill { .. } | Access::Staged) => step.misses += 1,
                None => {}
            }
            let moves = matches!(access, Some(Access::Fill { .. }));
            if moves || matches!(step.uses.last(), Some(Use::Stage)) {
                step.read_bytes += store.expert_bytes as u64;
            }
        }
        step.at_hand = (0..step.uses.len()).map(|at| step.is_ready(at)).collect();
        self.take_ahead(&mut step);
        self.submit(&mut step);
        self.read_ahead(&step);
        step
    }

    /// Submits reads in order until buffers or the window run out.
    fn submit(&mut self, step: &mut Step) {
        if self.files.is_none() {
            return;
        }
        while step.next_read < step.uses.len() && step.in_flight < READ_AHEAD.max(self.staging.len()) {
            let at = step.next_read;
            let on_gpu = self.layers[step.layer].slots_on_gpu;
            let (slot, late) = match step.uses[at] {
                Use::FillSlot { slot, after: None } if on_gpu && self.n_staging == 0 => {
                    self.fill(step.layer, step.experts[at], slot, None);
                    step.uses[at] = Use::Slot(slot);
                    step.next_read += 1;
                    continue;
                }
                Use::FillSlot { slot, after: None } => (Some(slot), None),
                // Where an expert computes must not depend on how fast reads are.
                Use::FillSlot { slot, after: Some(after) } if !on_gpu && matches!(step.uses[after], Use::Done) => {
                    (Some(slot), None)
                }
                Use::FillSlot { slot, after: Some(after) } => (None, Some((at, slot, Some(after)))),
                Use::Stage => (None, None),
                _ => {
                    step.next_read += 1;
                    continue;
                }
            };
            let store = &mut self.layers[step.layer];
            let piece = match slot {
                Some(slot) if !on_gpu => store.slots[slot].take(),
                _ => self.staging.pop().map(|mut piece| {
                    piece.truncate(store.buffer_bytes(store.layout));
                    piece
                }),
            };
            let Some(piece) = piece else { return };
            step.late.extend(late);
            self.fetch(at as u64, step.layer, step.experts[at], piece, Urgency::Now);
            step.uses[at] = Use::Loading(slot);
            step.in_flight += 1;
            step.next_read += 1;
        }
    }

    /// Waits for one read of the step and returns the position that it made ready.
    ///
    /// # Errors
    /// When the read failed; the step is given up then, and the store is as good as before.
    pub(crate) fn wait(&mut self, step: &mut Step) -> Result<usize, ReadError> {
        let start = Instant::now();
        loop {
            // A read that ended since the last call may have made room for another.
            self.submit(step);
            let files = self.files.as_ref().ok_or(ReadError::Stopped)?;
            if step.in_flight == 0 && !self.ahead.is_reading() && !self.warm.is_reading() {
                return Err(ReadError::Stopped);
            }
            let arrival = files.wait()?;
            let Some((at, result)) = self.land(step, arrival) else { continue };
            step.waited += start.elapsed();
            if let Err(error) = result {
                self.give_up(step);
                return Err(error);
            }
            return Ok(at);
        }
    }

    /// Puts the buffer of a finished read where it belongs; returns the position it was for, if it was for the step.
    fn land(&mut self, step: &mut Step, arrival: Arrival) -> Option<(usize, Result<(), ReadError>)> {
        let Landed { at, piece, result, during } = self.land_ahead(arrival)?;
        step.was_reading(during);
        step.in_flight -= 1;
        let good = result.is_ok();
        step.uses[at] = match step.uses[at] {
            Use::Loading(Some(slot)) if self.layers[step.layer].slots_on_gpu => {
                if good {
                    self.fill(step.layer, step.experts[at], slot, Some(&piece));
                }
                self.staging.push(whole(piece));
                if good { Use::Slot(slot) } else { Use::Done }
            }
            Use::Loading(Some(slot)) => {
                self.layers[step.layer].slots[slot] = Some(piece);
                if good { Use::Slot(slot) } else { Use::Done }
            }
            _ if good => Use::Staged(piece),
            _ => {
                self.staging.push(whole(piece));
                Use::Done
            }
        };
        Some((at, result))
    }

    /// Ends a step that can't go on: all buffers come back, and slots that do not hold what the cache says are freed.
    pub(crate) fn give_up(&mut self, step: &mut Step) {
        while step.in_flight > 0 {
            let Some(Ok(arrival)) = self.files.as_ref().map(FileTier::wait) else { break };
            // One error is reported; the others of this step have the same cause or will come again.
            let _ = self.land(step, arrival);
        }
        let cache = &mut self.layers[step.layer].cache;
        for (expert, used) in step.experts.iter().zip(&mut step.uses) {
            match std::mem::replace(used, Use::Done) {
                // It lies where the cache says, unless it was to leave.
                Use::Slot(slot) if cache.slot(*expert) == Some(slot as u32) => {}
                Use::Staged(piece) => {
                    cache.forget(*expert);
                    self.staging.push(whole(piece));
                }
                _ => cache.forget(*expert),
            }
        }
        self.staging.extend(step.held.drain(..).map(|(.., piece)| whole(piece)));
        self.forget_asked();
        // Whoever lost its slot to it has none any more, and one error is enough.
        self.gpu_error = None;
        self.forget_ahead();
    }

    /// The matrices and the tier of a ready expert.
    pub(crate) fn view<'a>(&'a self, step: &'a Step, at: usize) -> (ExpertView<'a>, usize) {
        let store = &self.layers[step.layer];
        let expert = step.experts[at] as usize;
        let (bytes, tier): (&[u8], usize) = match &step.uses[at] {
            Use::Slot(slot) => match &store.slots[*slot] {
                Some(piece) => (piece, store.slot_tier),
                None => unreachable!("a slot in use has its buffer"),
            },
            Use::Staged(piece) => (piece, self.staging_tier),
            _ => match &store.homes[expert] {
                Home::Pinned(tier, piece) => (piece, *tier),
                _ => return (self.mapped(store, expert), self.mapped_tier),
            },
        };
        let layout = if matches!(step.uses[at], Use::AtHome) { Layout::Packed } else { store.layout };
        (self.seen(step.layer, step.experts[at], bytes, layout), tier)
    }

    pub(crate) fn mapped<'a>(&'a self, store: &LayerExperts, expert: usize) -> ExpertView<'a> {
        store.view(|part| {
            let all = self.gguf.bytes(&self.gguf.tensors()[part.tensor]);
            &all[expert * part.slice_bytes..(expert + 1) * part.slice_bytes]
        })
    }

    /// Gives back the buffer of a computed expert and submits what was waiting for one.
    pub(crate) fn release(&mut self, step: &mut Step, at: usize) {
        let (layer, expert) = (step.layer, step.experts[at]);
        if let Use::Staged(piece) = std::mem::replace(&mut step.uses[at], Use::Done) {
            match step.late.iter().find(|(late, ..)| *late == at) {
                Some(&(_, slot, after)) if after.is_none_or(|after| matches!(step.uses[after], Use::Done)) => {
                    let free = self.move_to_slot(layer, expert, slot, piece);
                    self.staging.push(free);
                }
                // The last buffers stay free, or reads could not go on.
                Some(&(_, slot, Some(after))) if self.staging.len() > 1 => step.held.push((after, expert, slot, piece)),
                Some(&(_, slot, _)) => {
                    step.reread.push((at, slot));
                    self.staging.push(whole(piece));
                }
                None => self.staging.push(whole(piece)),
            }
        }
        while let Some(i) = step.held.iter().position(|(after, ..)| *after == at) {
            let (_, expert, slot, piece) = step.held.swap_remove(i);
            let free = self.move_to_slot(layer, expert, slot, piece);
            self.staging.push(free);
        }
        self.submit(step);
        self.read_ahead(step);
    }

    /// Ends a step whose experts have all computed: the slots then hold what the cache says.
    ///
    /// # Errors
    /// As [`wait`](Self::wait).
    pub(crate) fn finish(&mut self, step: &mut Step) -> Result<(), ReadError> {
        while let Some((at, slot)) = step.reread.pop() {
            let store = &mut self.layers[step.layer];
            let piece = if store.slots_on_gpu {
                if self.n_staging == 0 {
                    self.fill(step.layer, step.experts[at], slot, None);
                    continue;
                }
                let room = store.buffer_bytes(store.layout);
                self.staging.pop().map(|mut piece| {
                    piece.truncate(room);
                    piece
                })
            } else {
                store.slots[slot].take()
            };
            let Some(piece) = piece else {
                // Nobody has it then.
                self.layers[step.layer].cache.forget(step.experts[at]);
                continue;
            };
            step.uses[at] = Use::Loading(Some(slot));
            step.in_flight += 1;
            self.fetch(at as u64, step.layer, step.experts[at], piece, Urgency::Now);
            self.wait(step)?;
        }
        Ok(())
    }

    /// Fails if a file that experts are read from is not what it was.
    pub(crate) fn check_files(&self) -> Result<(), ReadError> {
        self.files.as_ref().map_or(Ok(()), FileTier::check)
    }
}

/// Moves a computed expert from staging into its slot, by exchange where both are of one size; returns the free buffer.
pub(crate) fn keep(slots: &mut [Option<Piece>], slot: usize, mut piece: Piece) -> Piece {
    if let Some(target) = &mut slots[slot] {
        if target.capacity() == piece.capacity() {
            std::mem::swap(target, &mut piece);
        } else {
            target.copy_from_slice(&piece);
        }
    }
    whole(piece)
}

pub(crate) fn whole(mut piece: Piece) -> Piece {
    piece.restore();
    piece
}
