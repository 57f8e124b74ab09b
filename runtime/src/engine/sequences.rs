//! The texts of an engine: their tokens, their pages of keys and values, and their recurrent states.
//!
//! A text with recurrent states can't go back by itself. So copies of them are made while it grows,
//! as many as the plan has room for: checkpoints, which it can go back to. The same holds for layers
//! with a sliding window, where a text has gone on further than its pages reach.

mod back;
mod cache;
mod kept;
mod reserve;
mod windows;

pub(crate) use cache::Cache;
pub(crate) use windows::{States, WindowPages};

use super::kept_files::KeptFiles;
use super::prefixes::{Found, Prefixes};
use crate::error::{LoadError, RunError};
use crate::gpu::devices::Devices;
use crate::layers::device_cache::DeviceCache;
use crate::layers::mixer::LayerCache;
use crate::layers::pages::{PAGE, PageIdx, PagePool, StateIdx, pages_for};
use crate::layers::places::Places;
use crate::layers::rope::Rotations;
use crate::layers::weights::DenseWeights;
use crate::tiers::arena::ArenaError;
use crate::tiers::nodes;
use std::sync::Arc;
use tier_plan_cuda::Device;
use tier_plan_formats::model::kv::CacheRoom;
use tier_plan_formats::model::shape::cache_shape;
use tier_plan_formats::model::spec::{LayerSpec, ModelSpec};
use tier_plan_formats::placement::Placement;

/// The name of a text in an engine. It names no other text once this one is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SequenceId {
    index: u32,
    generation: u32,
}

#[cfg(test)]
impl SequenceId {
    pub(crate) fn for_tests() -> Self {
        Self {
            index: 0,
            generation: 0,
        }
    }
}

/// Pages of the KV cache, each of [`PAGE`] positions of one text or of several that share them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pages {
    /// Pages that no text uses. Kept beginnings of texts may be there; they go when pages are wanted.
    pub free: usize,
    /// All pages.
    pub total: usize,
}

/// The kind of layers that hold all positions of a text.
pub(crate) const WHOLE: usize = 0;

/// One text.
#[derive(Debug)]
pub(crate) struct Sequence {
    /// Tokens that all layers hold.
    tokens: Vec<u32>,
    /// Pages of the tokens, and perhaps of some more.
    pages: Vec<PageIdx>,
    /// By kind of window: pages of the last tokens.
    windows: Vec<WindowPages>,
    /// Which of each layer's recurrent states is the text's.
    state: StateIdx,
    /// Recurrent states that the text can go back to, by the number of tokens, ascending.
    checkpoints: Vec<(usize, StateIdx)>,
    /// Which of them was made where a prompt ended.
    prompt_end: Option<usize>,
    /// The same, for those that the step at hand makes.
    coming: Vec<(usize, StateIdx)>,
    /// Whether a pass failed halfway in states that can't go back.
    broken: bool,
}

impl Sequence {
    /// Returns the pages by position, by kind of layers.
    pub(crate) fn pages(&self) -> impl Iterator<Item = &[PageIdx]> {
        let windows = self.windows.iter().map(WindowPages::by_position);
        std::iter::once(&self.pages[..]).chain(windows)
    }

    pub(crate) fn state(&self) -> StateIdx {
        self.state
    }

    pub(crate) fn n_past(&self) -> usize {
        self.tokens.len()
    }

    /// Returns up to `n` of the text's last tokens.
    pub(crate) fn last_tokens(&self, n: usize) -> &[u32] {
        &self.tokens[self.tokens.len().saturating_sub(n)..]
    }

    /// Returns the checkpoints that the step at hand makes, by the number of tokens.
    pub(crate) fn coming_checkpoints(&self) -> &[(usize, StateIdx)] {
        &self.coming
    }
}

/// A place for a text.
#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    sequence: Option<Sequence>,
}

/// All texts, the memory that they share out, and what is kept of earlier ones.
pub(crate) struct Sequences {
    pub(crate) cache: Cache,
    slots: Vec<Slot>,
    pages: PagePool,
    states: States,
    prefixes: Prefixes,
    /// Where kept beginnings go too.
    files: Option<KeptFiles>,
    /// Past tokens that the next one's n-grams reach back to.
    history: usize,
    /// Tokens that a text may have.
    context: usize,
    /// Texts that there are recurrent states for.
    most_texts: usize,
    /// Tokens between checkpoints, where there are any.
    spacing: Option<usize>,
    /// Whether a layer has recurrent states, which can't go back.
    is_recurrent: bool,
    /// Whether texts have states and checkpoints that this engine keeps.
    has_states: bool,
}

impl Sequences {
    /// Makes the memory of the texts that a plan is for, on the tiers that it names. There are no
    /// texts yet.
    ///
    /// # Errors
    /// When a NUMA node or a GPU refuses the memory.
    pub(crate) fn new(
        spec: &ModelSpec,
        plan: &Placement,
        places: &Places,
        weights: &DenseWeights,
        devices: &Devices,
    ) -> Result<Self, LoadError> {
        let (context, room) = (plan.context as usize, plan.room());
        let (positions, n_states) = (room.positions() as usize, room.states() as usize);
        let (kinds, windows) = kinds(spec, room, places);
        let placed = spec.layers.iter().zip(&places.layers).zip(&kinds);
        let on_gpu = |device: &Arc<dyn Device>, layer: &LayerSpec| {
            DeviceCache::new(device, layer, plan.kv_type, positions, n_states)
                .map(LayerCache::OnGpu)
                .map_err(|source| LoadError::Gpu {
                    plan: plan.name.clone(),
                    source,
                })
        };
        let layers: Vec<LayerCache> = placed
            .map(|((layer, place), kind)| {
                let positions = match kind {
                    &WHOLE => positions,
                    kind => windows[kind - 1].1,
                };
                match place.cache().and_then(|tier| devices.of(tier)) {
                    Some(device) => on_gpu(device, layer),
                    None => Ok(LayerCache::new(layer, plan.kv_type, positions, n_states)),
                }
            })
            .collect::<Result<_, _>>()?;
        for (cache, tier) in layers.iter().zip(plan.cache_tiers(spec.layers.len())) {
            let tier = &plan.tiers[tier].tier;
            let pages = nodes::Pages::of_tier(tier);
            cache
                .move_to(&pages)
                .map_err(|source| ArenaError::refused(&tier.name, &pages, source))?;
        }
        let has_states = layers.iter().any(LayerCache::is_recurrent) || !windows.is_empty();
        let checkpoints = plan.checkpoints as usize;
        Ok(Self {
            slots: Vec::new(),
            pages: PagePool::new(positions),
            states: States::new(if has_states { n_states } else { 0 }, &windows),
            prefixes: Prefixes::default(),
            files: None,
            history: spec.ngrams.as_ref().map_or(0, |table| table.n - 1),
            context,
            most_texts: plan.sequences as usize,
            spacing: (has_states && checkpoints > 0)
                .then(|| (context / checkpoints).next_multiple_of(PAGE).max(PAGE)),
            is_recurrent: layers.iter().any(LayerCache::is_recurrent),
            has_states,
            cache: Cache {
                layers,
                kinds,
                rotations: Rotations::new(spec, weights, context),
            },
        })
    }

    /// Returns the bytes of every layer's cache.
    pub(crate) fn bytes(&self) -> impl Iterator<Item = u64> + '_ {
        self.cache.layers.iter().map(LayerCache::bytes)
    }

    /// Returns how many past tokens the next one's n-grams reach back to.
    pub(crate) fn history(&self) -> usize {
        self.history
    }

    /// Returns whether texts can go back to where they were before the last batch, at least.
    pub(crate) fn can_take_back(&self) -> bool {
        !self.is_recurrent
    }

    /// Returns whether texts begin, and go back, where checkpoints are.
    pub(crate) fn needs_checkpoints(&self) -> bool {
        self.is_recurrent || !self.states.windows.is_empty()
    }

    /// Returns the windows of the layers that hold no more, in words.
    pub(crate) fn windows(&self) -> String {
        self.states.windows.words()
    }

    /// Returns whether a text can go back to its first `n` tokens without a checkpoint.
    fn reaches(&self, sequence: &Sequence, n: usize) -> bool {
        !self.is_recurrent && self.states.windows.reach(&sequence.windows, n)
    }

    /// Returns how many tokens a text may have.
    pub(crate) fn context(&self) -> usize {
        self.context
    }

    /// Lets texts have at most `tokens` tokens; the memory stays as planned.
    pub(crate) fn limit(&mut self, tokens: usize) {
        self.context = self.context.min(tokens);
    }

    pub(crate) fn pages(&self) -> Pages {
        Pages {
            free: self.pages.free() + self.prefixes.idle_pages(&self.pages),
            total: self.pages.total(),
        }
    }

    fn n_texts(&self) -> usize {
        self.slots.iter().filter(|s| s.sequence.is_some()).count()
    }

    /// Returns the pages in use by kind of window, and the window of each.
    #[cfg(test)]
    pub(crate) fn window_pages_in_use(&self) -> Vec<(usize, usize)> {
        self.states.windows.in_use()
    }

    /// Gives up all that is kept.
    #[cfg(test)]
    pub(crate) fn forget_kept(&mut self) {
        let (pages, states) = (&mut self.pages, &mut self.states);
        while self.prefixes.give_up_page(pages, states) || self.prefixes.give_up_state(states) {}
    }

    /// Adds an empty text.
    ///
    /// # Errors
    /// When all recurrent states are in use.
    pub(crate) fn add(&mut self) -> Result<SequenceId, RunError> {
        let n_texts = self.n_texts();
        let state = if self.has_states {
            let texts = self.most_texts;
            let state = if n_texts < texts {
                self.take_state(0)
            } else {
                None
            };
            state.ok_or(RunError::TooManyTexts { texts })?
        } else {
            0
        };
        for layer in &mut self.cache.layers {
            layer.reset(state);
        }
        let sequence = Sequence {
            tokens: Vec::new(),
            pages: Vec::new(),
            windows: self.states.windows.none(),
            state,
            checkpoints: Vec::new(),
            prompt_end: None,
            coming: Vec::new(),
            broken: false,
        };
        let free = self.slots.iter().position(|slot| slot.sequence.is_none());
        let index = free.unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        });
        let slot = &mut self.slots[index];
        slot.sequence = Some(sequence);
        Ok(SequenceId {
            index: index as u32,
            generation: slot.generation,
        })
    }

    /// Takes a recurrent state, and leaves `reserved` to others. Kept ones are given up for it.
    fn take_state(&mut self, reserved: usize) -> Option<StateIdx> {
        while self.states.free() <= reserved {
            if !self.prefixes.give_up_state(&mut self.states) {
                return None;
            }
        }
        self.states.take()
    }

    /// Takes a recurrent state for a checkpoint, if there is one beside those of texts to come.
    fn take_checkpoint(&mut self) -> Option<StateIdx> {
        self.take_state(self.most_texts - self.n_texts().min(self.most_texts))
    }

    /// Takes a page for `len` positions at most. Kept ones are given up for it.
    fn take_page(&mut self, len: usize) -> Option<PageIdx> {
        loop {
            if let Some(page) = self.pages.take(len) {
                return Some(page);
            }
            if !self
                .prefixes
                .give_up_page(&mut self.pages, &mut self.states)
            {
                return None;
            }
        }
    }

    /// Adds a text with the first `n` tokens of another, whose pages it shares.
    ///
    /// # Errors
    /// As [`add`](Self::add); when the text is unknown or unusable, has fewer tokens, or can't go
    /// back to so many and has no checkpoint there.
    pub(crate) fn fork(&mut self, of: SequenceId, n: usize) -> Result<SequenceId, RunError> {
        let from = self.get(of)?;
        if from.broken {
            return Err(RunError::Broken);
        }
        let n_past = from.n_past();
        let state = match n {
            _ if n == n_past => Some(from.state),
            _ => from
                .checkpoints
                .iter()
                .find(|(at, _)| *at == n)
                .map(|(_, state)| *state),
        };
        let reaches = n == n_past || self.reaches(from, n);
        if n > n_past || n > 0 && !reaches && state.is_none() {
            return Err(RunError::CannotRewind { n_past, wanted: n });
        }
        let tokens = from.tokens[..n].to_vec();
        let found = Found {
            n,
            pages: from.pages[..pages_for(n)].to_vec(),
            state: state.filter(|_| self.has_states),
        };
        let windows = if n > 0 && reaches {
            let lists = from.windows.clone();
            self.states.windows.share(&lists, n)
        } else {
            self.states.windows.begin_at(found.state.filter(|_| n > 0))
        };
        self.add_with(&tokens, found, windows, false)
    }

    /// Adds a text with these tokens, whose pages and states it shares; it is one more user of
    /// `windows` already. A state that is `kept` is its checkpoint too.
    fn add_with(
        &mut self,
        tokens: &[u32],
        found: Found,
        windows: Vec<WindowPages>,
        kept: bool,
    ) -> Result<SequenceId, RunError> {
        let Found { n, pages, state } = found;
        // They must not be given up meanwhile.
        pages.iter().for_each(|page| self.pages.share(*page));
        state.iter().for_each(|state| self.states.share(*state));
        let id = match self.add() {
            Ok(id) => id,
            Err(error) => {
                pages.iter().for_each(|page| self.pages.release(*page));
                state.iter().for_each(|state| self.states.release(*state));
                self.states.windows.release(windows);
                return Err(error);
            }
        };
        let sequence = self.get_mut(id)?;
        (sequence.tokens, sequence.pages) = (tokens.to_vec(), pages);
        sequence.windows = windows;
        let own = sequence.state;
        if let Some(state) = state {
            if kept {
                sequence.checkpoints.push((n, state));
            } else {
                self.states.release(state);
            }
            if let Err(error) = self.cache.copy_state(state, own) {
                self.remove(id);
                return Err(error);
            }
        }
        Ok(id)
    }

    /// Removes a text; does nothing if it is gone already.
    pub(crate) fn remove(&mut self, id: SequenceId) {
        let slot = self.slots.get_mut(id.index as usize);
        let Some(slot) = slot.filter(|slot| slot.generation == id.generation) else {
            return;
        };
        let Some(sequence) = slot.sequence.take() else {
            return;
        };
        slot.generation = slot.generation.wrapping_add(1);
        for page in sequence.pages {
            self.pages.release(page);
        }
        self.states.windows.release(sequence.windows);
        for (_, state) in sequence.checkpoints.into_iter().chain(sequence.coming) {
            self.states.release(state);
        }
        if self.has_states {
            self.states.release(sequence.state);
        }
    }

    /// Returns a text.
    ///
    /// # Errors
    /// When it was removed.
    pub(crate) fn get(&self, id: SequenceId) -> Result<&Sequence, RunError> {
        self.slots
            .get(id.index as usize)
            .filter(|slot| slot.generation == id.generation)
            .and_then(|slot| slot.sequence.as_ref())
            .ok_or(RunError::NoText)
    }

    fn get_mut(&mut self, id: SequenceId) -> Result<&mut Sequence, RunError> {
        find(&mut self.slots, id).ok_or(RunError::NoText)
    }

    /// Adds tokens that have gone through all layers.
    pub(crate) fn advance(&mut self, id: SequenceId, tokens: &[u32]) {
        let Some(sequence) = find(&mut self.slots, id) else {
            return;
        };
        let n_before = sequence.n_past();
        sequence.tokens.extend_from_slice(tokens);
        let now = n_before + 1..=sequence.n_past();
        for (at, state) in sequence.coming.iter().filter(|(at, _)| now.contains(at)) {
            self.states.windows.hold(*state, &sequence.windows, *at);
        }
    }
}

/// Returns a text, if it was not removed.
fn find(slots: &mut [Slot], id: SequenceId) -> Option<&mut Sequence> {
    slots
        .get_mut(id.index as usize)
        .filter(|slot| slot.generation == id.generation)
        .and_then(|slot| slot.sequence.as_mut())
}

/// Returns the kind of each layer, and of kinds after [`WHOLE`] their windows with the positions
/// that their layers hold.
fn kinds(spec: &ModelSpec, room: CacheRoom, places: &Places) -> (Vec<usize>, Vec<(usize, usize)>) {
    let mut windows: Vec<(usize, usize)> = Vec::new();
    let mut kind = |window: u64, positions: u64| {
        let of = (window as usize, positions as usize);
        let known = windows.iter().position(|w| *w == of).unwrap_or_else(|| {
            windows.push(of);
            windows.len() - 1
        });
        known + 1
    };
    let kinds = spec
        .layers
        .iter()
        .zip(&places.layers)
        .map(|(layer, place)| {
            let window = cache_shape(layer).window();
            match window.filter(|_| place.cache().is_none()) {
                Some(window) => room
                    .window_positions(window)
                    .map_or(WHOLE, |positions| kind(window, positions)),
                None => WHOLE,
            }
        });
    let kinds = kinds.collect();
    (kinds, windows)
}
