//! Speculative prefetch. While no demand read is pending, reads the experts that the next layer's
//! router is predicted to select.
//!
//! A prefetch never changes what the slots hold. It is read into staging, and the step that turns
//! out to need the expert claims it, whether the read has landed or is still in flight. Unclaimed
//! prefetches give their buffers back when the step of their layer begins.
//!
//! Predictions are scored whether they are read or not. While fewer than half of the recent ones
//! were right, nothing is prefetched.
//!
//! Where tokens alone choose a layer's experts, the prediction is exact: it is not scored, and as much
//! of it is read as there is staging for, before any layer is computed.

use super::counters::PrefetchCount;
use super::ids::{ExpertId, LayerExpert, SlotId, StepPos};
use super::rearrange::Rearranger;
use super::step::{DeferredMove, ExpertState, LoadTarget, Step};
use super::store::ExpertStore;
use super::warmup::Warmup;
use crate::tiers::arena::ArenaSlice;
use crate::tiers::file::{Completion, Priority, ReadError, ReadTime};

/// Set in the keys of prefetches; a step's own reads have their [position](StepPos::read_key) as
/// key.
const PREFETCH_KEY_BIT: u64 = 1 << 63;

/// Prefetches per decoded token and layer. One takes about as long as the drive is idle in a layer;
/// two and four measured no faster.
const MAX_PREFETCHES_PER_TOKEN: usize = 1;

/// Staging buffers that prefetches and warm-up reads leave free for demand reads.
pub(super) const RESERVED_STAGING_BUFFERS: usize = 2;

/// While accuracy is too low to prefetch, one prediction in this many is still made, so that
/// prefetching can resume.
const TRY_EVERY: u32 = 16;

/// Scored predictions after which older ones lose half their weight.
const ACCURACY_WINDOW: u32 = 256;

/// Accuracy of recent predictions.
#[derive(Default)]
struct Accuracy {
    right: u32,
    wrong: u32,
    /// Calls of [`ExpertStore::wants_prediction`], wrapping.
    rounds: u32,
}

impl Accuracy {
    /// Whether predictions are right often enough to read what they name.
    fn is_sufficient(&self) -> bool {
        self.right >= self.wrong
    }

    fn add(&mut self, is_right: bool) {
        *(if is_right {
            &mut self.right
        } else {
            &mut self.wrong
        }) += 1;
        if self.right + self.wrong > ACCURACY_WINDOW {
            self.right /= 2;
            self.wrong /= 2;
        }
    }
}

enum PrefetchState {
    Reading,
    Landed(StagedExpert),
    /// In flight; the step waits for it at this position.
    Claimed(StepPos),
}

/// A prefetched expert's bytes, and when they were read.
struct StagedExpert {
    bytes: ArenaSlice,
    time: ReadTime,
}

struct Prefetch {
    key: u64,
    target: LayerExpert,
    state: PrefetchState,
}

/// What a prediction is made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Foresight {
    /// What the router would choose for one token.
    Token,
    /// What the router would choose for a batch.
    Batch,
    /// The tokens themselves, which choose the experts without the router.
    Exact,
}

impl Foresight {
    /// Returns that of a router.
    pub(crate) fn of_router(is_batch: bool) -> Self {
        if is_batch { Self::Batch } else { Self::Token }
    }
}

/// The experts that a layer's router is predicted to select.
struct Prediction {
    /// Position of the layer among those with routed experts.
    layer: usize,
    /// The pooled ones without a slot, most likely first.
    experts: Vec<u32>,
    /// How many of them are or were being prefetched.
    n_started: usize,
    from: Foresight,
    /// Whether it is exact, or accuracy was sufficient when it was made.
    is_read: bool,
}

/// Predictions, the prefetches that they started, and their accuracy.
pub(super) struct Prefetcher {
    is_enabled: bool,
    max_per_batch: usize,
    prefetches: Vec<Prefetch>,
    /// Prefetches in flight that no prediction wants any more; their buffers are still to come
    /// back.
    abandoned: usize,
    next_key: u64,
    /// The latest prediction.
    prediction: Option<Prediction>,
    /// The prediction before the latest one, whose layer is about to begin.
    due: Option<Prediction>,
    token_accuracy: Accuracy,
    batch_accuracy: Accuracy,
    count: PrefetchCount,
}

/// A finished read of a step's expert.
pub(super) struct StepRead {
    pub(super) at: StepPos,
    pub(super) buffer: ArenaSlice,
    pub(super) result: Result<(), ReadError>,
    pub(super) time: ReadTime,
}

impl Prefetcher {
    pub(super) fn new(is_enabled: bool, n_staging: usize) -> Self {
        Self {
            is_enabled: is_enabled && n_staging > RESERVED_STAGING_BUFFERS,
            max_per_batch: n_staging.saturating_sub(RESERVED_STAGING_BUFFERS),
            prefetches: Vec::new(),
            abandoned: 0,
            next_key: PREFETCH_KEY_BIT,
            prediction: None,
            due: None,
            token_accuracy: Accuracy::default(),
            batch_accuracy: Accuracy::default(),
            count: PrefetchCount::default(),
        }
    }

    /// Whether a prefetch is in flight, so that its buffer is still to come back.
    pub(super) fn is_reading(&self) -> bool {
        self.abandoned > 0
            || self
                .prefetches
                .iter()
                .any(|p| !matches!(p.state, PrefetchState::Landed(_)))
    }

    /// Returns the accuracy of predictions for batches, or for single tokens.
    fn accuracy(&mut self, is_batch: bool) -> &mut Accuracy {
        if is_batch {
            &mut self.batch_accuracy
        } else {
            &mut self.token_accuracy
        }
    }

    /// Scores the prediction of the layer of a beginning step, and drops those that are no longer
    /// due.
    fn score(&mut self, step: &Step) {
        // A prediction of an earlier layer is left over from a pass that ended early.
        let past = [
            self.due.take(),
            self.prediction
                .take_if(|prediction| prediction.layer <= step.layer),
        ];
        let Some(prediction) = past
            .into_iter()
            .flatten()
            .find(|prediction| prediction.layer == step.layer)
        else {
            return;
        };
        let n_scored = if prediction.is_read {
            prediction.n_started
        } else {
            prediction.experts.len()
        };
        if prediction.from == Foresight::Exact {
            return;
        }
        let accuracy = self.accuracy(prediction.from == Foresight::Batch);
        for expert in &prediction.experts[..n_scored] {
            accuracy.add(step.experts().contains(expert));
        }
    }
}

impl ExpertStore {
    /// Whether a prediction of the next layer's experts, for one token or for a batch, is worth
    /// making.
    pub(crate) fn wants_prediction(&mut self, is_batch: bool) -> bool {
        if !self.prefetcher.is_enabled {
            return false;
        }
        let accuracy = self.prefetcher.accuracy(is_batch);
        accuracy.rounds = accuracy.rounds.wrapping_add(1);
        accuracy.is_sufficient() || accuracy.rounds.is_multiple_of(TRY_EVERY)
    }

    /// Whether experts are prefetched at all.
    pub(crate) fn can_prefetch(&self) -> bool {
        self.prefetcher.is_enabled
    }

    /// Starts to read what was predicted for the next step, while none is under way.
    pub(crate) fn start_predicted(&mut self) {
        if self.files.is_some() {
            self.start_prefetches(None);
        }
    }

    /// Takes a prediction of the experts that the next step, in `layer`, will use: a token's in the
    /// router's order, a batch's in the order in which they compute.
    pub(crate) fn predict(
        &mut self,
        layer: usize,
        experts: impl Iterator<Item = u32>,
        from: Foresight,
    ) {
        let Some(in_layer) = self.layers.get(layer) else {
            return;
        };
        let is_missing =
            |e: &u32| in_layer.is_pooled(ExpertId::new(*e)) && !in_layer.cache.contains(*e);
        let most = match from {
            Foresight::Token => MAX_PREFETCHES_PER_TOKEN,
            Foresight::Batch | Foresight::Exact => self.prefetcher.max_per_batch,
        };
        let experts: Vec<u32> = experts.filter(is_missing).take(most).collect();
        let is_read = match from {
            Foresight::Exact => true,
            from => self
                .prefetcher
                .accuracy(from == Foresight::Batch)
                .is_sufficient(),
        };
        let prediction = Prediction {
            layer,
            experts,
            n_started: 0,
            from,
            is_read,
        };
        self.prefetcher.due = self.prefetcher.prediction.replace(prediction);
    }

    /// Returns the outcomes of prefetches since the last call.
    pub(crate) fn take_prefetch_count(&mut self) -> PrefetchCount {
        std::mem::take(&mut self.prefetcher.count)
    }

    /// Returns the staging buffers that prefetches and warm-up reads hold.
    #[cfg(test)]
    pub(super) fn buffers_ahead(&self) -> usize {
        self.prefetcher.prefetches.len() + self.prefetcher.abandoned + self.warmup.buffers()
    }

    /// Starts prefetches and warm-up reads, once the step has submitted all reads of its own.
    pub(super) fn start_idle_reads(&mut self, step: &Step) {
        if self.files.is_none() || step.next_read < step.states.len() {
            return;
        }
        self.start_prefetches(Some(step.layer));
        self.start_warmup_reads();
    }

    fn start_prefetches(&mut self, under_way: Option<usize>) {
        while self.staging.len() > RESERVED_STAGING_BUFFERS
            && let Some(target) = self.next_target(under_way)
            && let Some(buffer) = self.take_staging(target.layer)
        {
            let key = self.prefetcher.next_key;
            self.prefetcher.next_key = PREFETCH_KEY_BIT | key.wrapping_add(1);
            self.start_read(key, target.layer, target.expert, buffer, Priority::Idle);
            self.prefetcher.prefetches.push(Prefetch {
                key,
                target,
                state: PrefetchState::Reading,
            });
        }
    }

    /// Takes the next expert to prefetch from the latest prediction, unless that is of the layer
    /// whose step is under way.
    fn next_target(&mut self, under_way: Option<usize>) -> Option<LayerExpert> {
        let prediction = self.prefetcher.prediction.as_mut()?;
        if !prediction.is_read || Some(prediction.layer) == under_way {
            return None;
        }
        let expert = ExpertId::new(*prediction.experts.get(prediction.n_started)?);
        prediction.n_started += 1;
        Some(LayerExpert {
            layer: prediction.layer,
            expert,
        })
    }

    /// Gives the beginning step what was prefetched for it, and takes back the buffers of the rest.
    pub(super) fn claim_prefetches(&mut self, step: &mut Step) {
        self.prefetcher.score(step);
        if !self.prefetcher.prefetches.is_empty() || self.warmup.is_reading() {
            self.poll_completions();
        }
        if self.prefetcher.prefetches.is_empty() {
            return;
        }
        let mut claimed = Vec::new();
        let on_gpu = self.layers[step.layer].slots_on_gpu;
        for at in (0..step.states.len()).map(StepPos::new) {
            let (target, deferred) = match *step.state(at) {
                // A GPU's slot is filled from staging as soon as the bytes are there.
                ExpertState::NeedsSlot { slot, after: None } if on_gpu => {
                    (LoadTarget::Slot(slot), None)
                }
                ExpertState::NeedsSlot { slot, after } => {
                    (LoadTarget::Staging, Some(DeferredMove { at, slot, after }))
                }
                ExpertState::NeedsStaging => (LoadTarget::Staging, None),
                _ => continue,
            };
            let wanted = LayerExpert {
                layer: step.layer,
                expert: step.expert(at),
            };
            let Some(i) = self
                .prefetcher
                .prefetches
                .iter()
                .position(|p| p.target == wanted)
            else {
                continue;
            };
            self.prefetcher.count.useful += 1;
            step.deferred.extend(deferred);
            claimed.extend(self.claim(step, at, target, i));
        }
        self.drop_unclaimed(&claimed);
    }

    /// Gives prefetch `i` to the step's expert at a position. Returns its key if it is still in
    /// flight.
    fn claim(&mut self, step: &mut Step, at: StepPos, target: LoadTarget, i: usize) -> Option<u64> {
        let prefetch = &mut self.prefetcher.prefetches[i];
        if let PrefetchState::Reading = prefetch.state {
            prefetch.state = PrefetchState::Claimed(at);
            step.set_state(at, ExpertState::Loading(target));
            step.in_flight += 1;
            return Some(prefetch.key);
        }
        if let PrefetchState::Landed(StagedExpert { bytes, time }) =
            self.prefetcher.prefetches.swap_remove(i).state
        {
            self.prefetcher.count.in_time += 1;
            step.add_read_time(time);
            let state = match target {
                LoadTarget::Staging => ExpertState::Staged(bytes),
                LoadTarget::Slot(slot) => self.fill_from_prefetch(step, at, slot, bytes),
            };
            step.set_state(at, state);
        }
        None
    }

    /// Copies a prefetched expert to its slot on a GPU and frees the buffer.
    fn fill_from_prefetch(
        &mut self,
        step: &Step,
        at: StepPos,
        slot: SlotId,
        bytes: ArenaSlice,
    ) -> ExpertState {
        self.fill_gpu_slot(step.layer, step.expert(at), slot, Some(&bytes));
        self.free_staging(bytes);
        ExpertState::InSlot(slot)
    }

    /// Drops all predictions and their prefetches.
    pub(super) fn drop_predictions(&mut self) {
        (self.prefetcher.prediction, self.prefetcher.due) = (None, None);
        self.drop_unclaimed(&[]);
    }

    /// Drops all prefetches that no step has claimed. Reads with the keys `claimed` become demand
    /// reads.
    fn drop_unclaimed(&mut self, claimed: &[u64]) {
        for prefetch in std::mem::take(&mut self.prefetcher.prefetches) {
            match prefetch.state {
                PrefetchState::Claimed(_) => self.prefetcher.prefetches.push(prefetch),
                PrefetchState::Landed(StagedExpert { bytes, .. }) => {
                    self.prefetcher.count.wasted += 1;
                    self.free_staging(bytes);
                }
                PrefetchState::Reading => {
                    self.prefetcher.count.wasted += 1;
                    self.prefetcher.abandoned += 1;
                }
            }
        }
        if let Some(files) = &self.files {
            files.resolve_idle(claimed);
        }
    }

    /// Takes a finished read. A step's read is returned; all others are put away.
    pub(super) fn take_completion(&mut self, completion: Completion) -> Option<StepRead> {
        if Rearranger::owns(completion.key) {
            self.rearranger.land(completion);
            return None;
        }
        if Warmup::owns(completion.key) {
            self.land_warmup_read(completion);
            return None;
        }
        let Completion {
            key,
            buffer,
            result,
            time,
        } = completion;
        if key & PREFETCH_KEY_BIT == 0 {
            return Some(StepRead {
                at: StepPos::new(key as usize),
                buffer,
                result,
                time,
            });
        }
        let Some(i) = self.prefetcher.prefetches.iter().position(|p| p.key == key) else {
            self.prefetcher.abandoned = self.prefetcher.abandoned.saturating_sub(1);
            self.free_staging(buffer);
            return None;
        };
        if let PrefetchState::Claimed(at) = self.prefetcher.prefetches[i].state {
            self.prefetcher.prefetches.swap_remove(i);
            return Some(StepRead {
                at,
                buffer,
                result,
                time,
            });
        }
        if result.is_ok() {
            self.prefetcher.prefetches[i].state = PrefetchState::Landed(StagedExpert {
                bytes: buffer,
                time,
            });
        } else {
            // If a step needs the expert after all, it reads it again, and a failure reaches its
            // caller.
            self.prefetcher.prefetches.swap_remove(i);
            self.free_staging(buffer);
        }
        None
    }
}
