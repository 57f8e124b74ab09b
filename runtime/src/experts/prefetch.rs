//! Speculative prefetch. While no demand read is pending, reads the experts that the next layer's
//! router is predicted to select.
//!
//! A prefetch never changes which experts have slots. It is read into staging, and the step that
//! turns out to need the expert claims it ([`claim`](super::claim)), whether the read has landed or
//! is still in flight. Unclaimed prefetches give their buffers back when the step of their layer
//! begins.
//!
//! A batch uses most experts of a layer, so that a drive would be idle wherever a layer's reads end
//! before the next layer's begin. What is predicted for a batch is therefore read without a pause
//! after the reads of the step under way, also into the buffers of empty slots: these are lent until
//! the next layer's step begins. After a cold start that is most of the memory of a plan.
//!
//! Predictions are scored whether they are read or not. While fewer than half of the recent ones
//! were right, nothing is prefetched.
//!
//! Where tokens alone choose a layer's experts, the prediction is exact: it is not scored, and as much
//! of it is read as there are buffers for, before any layer is computed. Nor is it scored that a large
//! batch will use all experts of a layer of which no router has been asked.

use super::counters::PrefetchCount;
use super::ids::{ExpertId, LayerExpert, SlotId, StepPos};
use super::rearrange::Rearranger;
use super::step::Step;
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

/// Largest expected share of experts that a batch leaves out for which all of a layer are read before
/// its router is asked.
const MAX_LEFT_OUT: f64 = 0.25;

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

    /// Whether predictions are right so often that their reads may take turns with those of the step
    /// under way: at most one in eight is wrong.
    fn is_high(&self) -> bool {
        self.right / 7 >= self.wrong
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

pub(super) enum PrefetchState {
    Reading,
    Landed(LandedExpert),
    /// In flight; the step waits for it at this position.
    Claimed(StepPos),
}

/// A prefetched expert's bytes, and when they were read.
pub(super) struct LandedExpert {
    /// `None` where they are in the slot that was lent.
    pub(super) staged: Option<ArenaSlice>,
    pub(super) time: ReadTime,
}

pub(super) struct Prefetch {
    pub(super) key: u64,
    pub(super) target: LayerExpert,
    /// The empty slot of the target's layer that lends its buffer; `None` for a staging buffer.
    pub(super) slot: Option<SlotId>,
    pub(super) state: PrefetchState,
}

/// A prefetch in flight that no prediction wants any more; its buffer is still to come back.
pub(super) struct Abandoned {
    pub(super) key: u64,
    pub(super) layer: usize,
    /// As in [`Prefetch`].
    pub(super) slot: Option<SlotId>,
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
    /// The number of tokens, so many that they use most experts.
    Share,
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
    /// That of its reads; `None` where accuracy was too low for any when it was made.
    priority: Option<Priority>,
}

/// Predictions, the prefetches that they started, and their accuracy.
pub(super) struct Prefetcher {
    is_enabled: bool,
    max_staged: usize,
    pub(super) prefetches: Vec<Prefetch>,
    pub(super) abandoned: Vec<Abandoned>,
    next_key: u64,
    /// The latest prediction.
    prediction: Option<Prediction>,
    /// The prediction before the latest one, whose layer is about to begin.
    due: Option<Prediction>,
    token_accuracy: Accuracy,
    batch_accuracy: Accuracy,
    pub(super) count: PrefetchCount,
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
            max_staged: n_staging.saturating_sub(RESERVED_STAGING_BUFFERS),
            prefetches: Vec::new(),
            abandoned: Vec::new(),
            next_key: PREFETCH_KEY_BIT,
            prediction: None,
            due: None,
            token_accuracy: Accuracy::default(),
            batch_accuracy: Accuracy::default(),
            count: PrefetchCount::default(),
        }
    }

    /// Whether there are prefetches, claimed or not, or some whose buffers are still to come back.
    pub(super) fn is_used(&self) -> bool {
        !self.prefetches.is_empty() || !self.abandoned.is_empty()
    }

    /// Forgets all predictions; what was started of them goes on.
    pub(super) fn forget_predictions(&mut self) {
        (self.prediction, self.due) = (None, None);
    }

    /// Whether a prefetch is in flight, so that its buffer is still to come back.
    pub(super) fn is_reading(&self) -> bool {
        !self.abandoned.is_empty()
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
    pub(super) fn score(&mut self, step: &Step) {
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
        let n_scored = match prediction.priority {
            Some(_) => prediction.n_started,
            None => prediction.experts.len(),
        };
        let accuracy = match prediction.from {
            Foresight::Token => &mut self.token_accuracy,
            Foresight::Batch => &mut self.batch_accuracy,
            Foresight::Exact | Foresight::Share => return,
        };
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
    /// Nothing comes of it where experts are not prefetched.
    pub(crate) fn predict(
        &mut self,
        layer: usize,
        experts: impl Iterator<Item = u32>,
        from: Foresight,
    ) {
        let Some(in_layer) = self.layers.get(layer).filter(|_| self.can_prefetch()) else {
            return;
        };
        let is_missing =
            |e: &u32| in_layer.is_pooled(ExpertId::new(*e)) && !in_layer.cache.contains(*e);
        let most = match from {
            Foresight::Token => MAX_PREFETCHES_PER_TOKEN,
            Foresight::Batch | Foresight::Exact | Foresight::Share => {
                self.prefetcher.max_staged + in_layer.cache.unused().len()
            }
        };
        let experts: Vec<u32> = experts.filter(is_missing).take(most).collect();
        let of_router = |accuracy: &Accuracy, often| match accuracy.is_sufficient() {
            true if accuracy.is_high() => Some(often),
            true => Some(Priority::Idle),
            false => None,
        };
        let priority = match from {
            Foresight::Token => of_router(&self.prefetcher.token_accuracy, Priority::Idle),
            Foresight::Batch => of_router(&self.prefetcher.batch_accuracy, Priority::Next),
            Foresight::Exact => Some(Priority::Idle),
            Foresight::Share => Some(Priority::Next),
        };
        let prediction = Prediction {
            layer,
            experts,
            n_started: 0,
            from,
            priority,
        };
        self.prefetcher.due = self.prefetcher.prediction.replace(prediction);
    }

    /// Starts to read a layer's experts in the order of the file where a batch is expected to use most
    /// of those that are missing: if each token chose `n_used` of all experts alike, an expert would
    /// be left out by all of them with the probability `(1 - n_used / n_expert)^n_tokens`. Routers
    /// favor some experts, and a warm layer has those, so most experts must be missing, too.
    pub(crate) fn read_most(&mut self, layer: usize, n_used: usize, n_tokens: usize) {
        let Some(in_layer) = self.layers.get(layer).filter(|_| self.can_prefetch()) else {
            return;
        };
        let n_expert = in_layer.n_expert() as u32;
        let spared = 1.0 - (n_used as f64 / f64::from(n_expert)).min(1.0);
        let left_out = spared.powi(i32::try_from(n_tokens).unwrap_or(i32::MAX));
        let pooled = (0..n_expert).filter(|e| in_layer.is_pooled(ExpertId::new(*e)));
        let missing = pooled.filter(|e| !in_layer.cache.contains(*e)).count();
        if left_out <= MAX_LEFT_OUT && 2 * missing >= n_expert as usize {
            self.predict(layer, 0..n_expert, Foresight::Share);
            self.start_predicted();
        }
    }

    /// Returns the outcomes of prefetches since the last call.
    pub(crate) fn take_prefetch_count(&mut self) -> PrefetchCount {
        std::mem::take(&mut self.prefetcher.count)
    }

    /// Returns the staging buffers that prefetches and warm-up reads hold.
    #[cfg(test)]
    pub(super) fn buffers_ahead(&self) -> usize {
        let slots = self.prefetcher.prefetches.iter().map(|p| p.slot);
        let slots = slots.chain(self.prefetcher.abandoned.iter().map(|a| a.slot));
        slots.filter(Option::is_none).count() + self.warmup.buffers()
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
        while let Some((target, priority)) = self.next_target(under_way)
            && let Some((slot, buffer)) = self.take_prefetch_buffer(target.layer)
        {
            if let Some(prediction) = &mut self.prefetcher.prediction {
                prediction.n_started += 1;
            }
            let key = self.prefetcher.next_key;
            self.prefetcher.next_key = PREFETCH_KEY_BIT | key.wrapping_add(1);
            self.start_read(key, target.layer, target.expert, buffer, priority);
            self.prefetcher.prefetches.push(Prefetch {
                key,
                target,
                slot,
                state: PrefetchState::Reading,
            });
        }
    }

    /// Returns the next expert to prefetch of the latest prediction, unless that is of the layer whose
    /// step is under way.
    fn next_target(&self, under_way: Option<usize>) -> Option<(LayerExpert, Priority)> {
        let prediction = self.prefetcher.prediction.as_ref()?;
        if Some(prediction.layer) == under_way {
            return None;
        }
        let expert = ExpertId::new(*prediction.experts.get(prediction.n_started)?);
        let layer = prediction.layer;
        Some((LayerExpert { layer, expert }, prediction.priority?))
    }

    /// Takes a buffer for the prefetch of an expert of a layer: that of an empty slot, or one of
    /// staging that demand reads can spare.
    fn take_prefetch_buffer(&mut self, layer: usize) -> Option<(Option<SlotId>, ArenaSlice)> {
        if let Some((slot, buffer)) = self.lend_slot(layer) {
            return Some((Some(slot), buffer));
        }
        let can_spare = self.staging.len() > RESERVED_STAGING_BUFFERS;
        let buffer = can_spare.then(|| self.take_staging(layer)).flatten()?;
        Some((None, buffer))
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
        let abandoned = &mut self.prefetcher.abandoned;
        if let Some(i) = abandoned.iter().position(|a| a.key == key) {
            let Abandoned { layer, slot, .. } = abandoned.swap_remove(i);
            self.free_prefetch_buffer(layer, slot, buffer);
            return None;
        }
        let Some(i) = self.prefetcher.prefetches.iter().position(|p| p.key == key) else {
            self.free_staging(buffer);
            return None;
        };
        let Prefetch { target, slot, .. } = self.prefetcher.prefetches[i];
        if let PrefetchState::Claimed(at) = self.prefetcher.prefetches[i].state {
            self.prefetcher.prefetches.swap_remove(i);
            return Some(StepRead {
                at,
                buffer,
                result,
                time,
            });
        }
        if result.is_err() {
            // If a step needs the expert after all, it reads it again, and a failure reaches its
            // caller.
            self.prefetcher.prefetches.swap_remove(i);
            self.free_prefetch_buffer(target.layer, slot, buffer);
            return None;
        }
        let staged = match slot {
            Some(slot) => {
                self.layers[target.layer].slots[slot.index()] = Some(buffer);
                None
            }
            None => Some(buffer),
        };
        self.prefetcher.prefetches[i].state = PrefetchState::Landed(LandedExpert { staged, time });
        None
    }
}
