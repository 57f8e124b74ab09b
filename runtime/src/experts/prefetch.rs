//! Reading ahead of the router: while nothing that is needed is being read, what the next layer seems to need.
//!
//! A guess never changes what slots hold: it is read into staging, and the step that turns out to need it takes it over,
//! read or still being read. Others give their buffer back. Guesses are scored whether they are read or not; while fewer
//! than half are right, nothing is read.

use super::layer::Home;
use super::store::{ExpertStore, Step, Use, whole};
use super::warmup::Warm;
use crate::experts::counters::AheadCount;
use crate::tiers::arena::Piece;
use crate::tiers::file::{Arrival, ReadError, Urgency};
use std::time::Instant;

/// Set in the keys of reads ahead; those of a step are positions.
const AHEAD: u64 = 1 << 63;

/// Experts read ahead for a token: one lasts about as long as the drive is idle in a layer, and two or four measured no
/// better.
const FOR_A_TOKEN: usize = 1;

/// Buffers that a batch's guesses leave for what is surely needed.
pub(crate) const LEFT_FREE: usize = 2;

/// While guesses don't pay, every so-manieth is made all the same, to see whether they would.
const TRY_EVERY: u32 = 16;

/// Guesses that the score remembers, about.
const REMEMBERED: u32 = 256;

/// How good guesses of one kind have been of late.
#[derive(Default)]
struct Score {
    right: u32,
    wrong: u32,
    turns: u32,
}

impl Score {
    fn pays(&self) -> bool {
        self.right >= self.wrong
    }

    fn add(&mut self, right: bool) {
        *(if right { &mut self.right } else { &mut self.wrong }) += 1;
        if self.right + self.wrong > REMEMBERED {
            self.right /= 2;
            self.wrong /= 2;
        }
    }
}

enum State {
    Reading,
    Ready(Piece, (Instant, Instant)),
    /// Being read; the step waits for it at this position.
    Claimed(usize),
}

struct Entry {
    key: u64,
    layer: usize,
    expert: u32,
    state: State,
}

/// What the next layer is expected to need.
struct Guess {
    layer: usize,
    experts: Vec<u32>,
    /// How many of them are being read.
    started: usize,
    batch: bool,
    pays: bool,
}

/// See the module.
pub(crate) struct Ahead {
    on: bool,
    most: usize,
    entries: Vec<Entry>,
    /// Reads whose guess was given up and whose buffer is to come back.
    orphans: usize,
    next_key: u64,
    guess: Option<Guess>,
    /// The guess before that, whose layer is about to begin.
    due: Option<Guess>,
    /// Of tokens and of batches.
    scores: [Score; 2],
    count: AheadCount,
}

/// A finished read of a step.
pub(crate) struct Landed {
    pub at: usize,
    pub piece: Piece,
    pub result: Result<(), ReadError>,
    pub during: (Instant, Instant),
}

impl Ahead {
    pub(super) fn new(on: bool, staging: usize) -> Self {
        Self {
            on: on && staging > LEFT_FREE,
            most: staging.saturating_sub(LEFT_FREE),
            entries: Vec::new(),
            orphans: 0,
            next_key: AHEAD,
            guess: None,
            due: None,
            scores: Default::default(),
            count: AheadCount::default(),
        }
    }

    /// Whether a buffer is still to come back.
    pub(super) fn is_reading(&self) -> bool {
        self.orphans > 0 || self.entries.iter().any(|e| !matches!(e.state, State::Ready(..)))
    }
}

impl ExpertStore {
    /// Whether a guess of the next layer's experts would be of use, for one token or for a batch.
    pub(crate) fn wants_guess(&mut self, batch: bool) -> bool {
        if !self.ahead.on {
            return false;
        }
        let score = &mut self.ahead.scores[usize::from(batch)];
        score.turns = score.turns.wrapping_add(1);
        score.pays() || score.turns.is_multiple_of(TRY_EVERY)
    }

    /// Takes a guess of the experts that the next step, in `layer`, will use: a token's in the router's order, a
    /// batch's in the order they compute.
    pub(crate) fn expect(&mut self, layer: usize, guessed: impl Iterator<Item = u32>, batch: bool) {
        let Some(store) = self.layers.get(layer) else { return };
        let missing = |e: &u32| matches!(store.homes[*e as usize], Home::Pooled) && !store.cache.contains(*e);
        let most = if batch { self.ahead.most } else { FOR_A_TOKEN };
        let experts: Vec<u32> = guessed.filter(missing).take(most).collect();
        let pays = self.ahead.scores[usize::from(batch)].pays();
        self.ahead.due = self.ahead.guess.replace(Guess { layer, experts, started: 0, batch, pays });
    }

    /// What became of the guesses that were read, since the last call.
    pub(crate) fn take_ahead_count(&mut self) -> AheadCount {
        std::mem::take(&mut self.ahead.count)
    }

    /// Staging buffers that guesses have.
    #[cfg(test)]
    pub(super) fn buffers_ahead(&self) -> usize {
        self.ahead.entries.len() + self.ahead.orphans + self.warm.buffers()
    }

    /// Starts reads of what is expected, once the step has all its own under way.
    pub(super) fn read_ahead(&mut self, step: &Step) {
        if self.files.is_none() || step.next_read < step.uses.len() {
            return;
        }
        self.guesses_ahead(step);
        self.read_warm();
    }

    fn guesses_ahead(&mut self, step: &Step) {
        while self.staging.len() > LEFT_FREE
            && let Some(guess) = self.ahead.guess.as_mut().filter(|guess| guess.pays && guess.layer != step.layer)
            && let Some(&expert) = guess.experts.get(guess.started)
            && let Some(mut piece) = self.staging.pop()
        {
            guess.started += 1;
            let layer = guess.layer;
            let store = &self.layers[layer];
            piece.truncate(store.buffer_bytes(store.layout));
            let key = self.ahead.next_key;
            self.ahead.next_key = AHEAD | key.wrapping_add(1);
            self.fetch(key, layer, expert, piece, Urgency::Idle);
            self.ahead.entries.push(Entry { key, layer, expert, state: State::Reading });
        }
    }

    /// Gives the beginning step what was read ahead for it, and takes back the buffers of what was not.
    pub(super) fn take_ahead(&mut self, step: &mut Step) {
        // A guess that is neither of this layer nor of a later one has been left over from a pass that ended early.
        let guesses = [self.ahead.due.take(), self.ahead.guess.take_if(|guess| guess.layer <= step.layer)];
        if let Some(guess) = guesses.into_iter().flatten().find(|guess| guess.layer == step.layer) {
            let judged = if guess.pays { guess.started } else { guess.experts.len() };
            let score = &mut self.ahead.scores[usize::from(guess.batch)];
            guess.experts[..judged].iter().for_each(|expert| score.add(step.experts.contains(expert)));
        }
        if !self.ahead.entries.is_empty() || self.warm.is_reading() {
            self.land_quietly();
        }
        if self.ahead.entries.is_empty() {
            return;
        }
        let mut wanted = Vec::new();
        let on_gpu = self.layers[step.layer].slots_on_gpu;
        for at in 0..step.uses.len() {
            let mut into = None;
            let late = match step.uses[at] {
                // To a GPU's slot it is copied at once.
                Use::FillSlot { slot, after: None } if on_gpu => {
                    into = Some(slot);
                    None
                }
                Use::FillSlot { slot, after } => Some((at, slot, after)),
                Use::Stage => None,
                _ => continue,
            };
            let is_it = |e: &Entry| e.layer == step.layer && e.expert == step.experts[at];
            let Some(i) = self.ahead.entries.iter().position(is_it) else { continue };
            self.ahead.count.right += 1;
            step.late.extend(late);
            if let State::Reading = self.ahead.entries[i].state {
                self.ahead.entries[i].state = State::Claimed(at);
                wanted.push(self.ahead.entries[i].key);
                step.uses[at] = Use::Loading(into);
                step.in_flight += 1;
            } else if let State::Ready(piece, during) = self.ahead.entries.swap_remove(i).state {
                self.ahead.count.in_time += 1;
                step.was_reading(during);
                step.uses[at] = match into {
                    None => Use::Staged(piece),
                    Some(slot) => {
                        self.fill(step.layer, step.experts[at], slot, Some(&piece));
                        self.staging.push(whole(piece));
                        Use::Slot(slot)
                    }
                };
            }
        }
        self.drop_unclaimed(&wanted);
    }

    /// Gives up all guesses.
    pub(super) fn forget_ahead(&mut self) {
        (self.ahead.guess, self.ahead.due) = (None, None);
        self.drop_unclaimed(&[]);
    }

    /// Takes back the buffers of all reads ahead but those with the keys `wanted`, which are wanted now.
    fn drop_unclaimed(&mut self, wanted: &[u64]) {
        for entry in std::mem::take(&mut self.ahead.entries) {
            match entry.state {
                State::Claimed(_) => self.ahead.entries.push(entry),
                State::Ready(piece, _) => {
                    self.ahead.count.wrong += 1;
                    self.staging.push(whole(piece));
                }
                State::Reading => {
                    self.ahead.count.wrong += 1;
                    self.ahead.orphans += 1;
                }
            }
        }
        if let Some(files) = &self.files {
            files.settle_idle(wanted);
        }
    }

    /// Takes a finished read: a step's is returned, others are put away.
    pub(super) fn land_ahead(&mut self, arrival: Arrival) -> Option<Landed> {
        if Warm::has(arrival.key) {
            self.land_warm(arrival);
            return None;
        }
        let Arrival { key, piece, result, during } = arrival;
        if key & AHEAD == 0 {
            return Some(Landed { at: key as usize, piece, result, during });
        }
        let Some(i) = self.ahead.entries.iter().position(|e| e.key == key) else {
            self.ahead.orphans = self.ahead.orphans.saturating_sub(1);
            self.staging.push(whole(piece));
            return None;
        };
        if let State::Claimed(at) = self.ahead.entries[i].state {
            self.ahead.entries.swap_remove(i);
            return Some(Landed { at, piece, result, during });
        }
        if result.is_ok() {
            self.ahead.entries[i].state = State::Ready(piece, during);
        } else {
            // If it is needed after all, it is read again, and fails where somebody can be told.
            self.ahead.entries.swap_remove(i);
            self.staging.push(whole(piece));
        }
        None
    }
}
