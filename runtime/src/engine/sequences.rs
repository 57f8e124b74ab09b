//! The texts of an engine: their tokens, their pages of keys and values, and their recurrent states.
//!
//! A text with recurrent states can't go back by itself. So copies of them are made while it grows,
//! as many as the plan has room for: checkpoints, which it can go back to.

mod kept;

use super::kept_files::KeptFiles;
use super::prefixes::{Found, Prefixes};
use crate::error::{LoadError, RunError};
use crate::layers::mixer::LayerCache;
use crate::layers::pages::{PAGE, PageIdx, PagePool, Pool, StateIdx, pages_for};
use crate::layers::places::Places;
use crate::layers::rope::Rotations;
use crate::layers::weights::DenseWeights;
use crate::tiers::arena::ArenaError;
use crate::tiers::nodes;
use tier_plan_formats::model::spec::ModelSpec;
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

/// What layers keep of past tokens, and the rotations of the rows at hand.
pub(crate) struct Cache {
    /// By layer.
    pub(crate) layers: Vec<LayerCache>,
    pub(crate) rotations: Rotations,
}

/// One text.
#[derive(Debug)]
pub(crate) struct Sequence {
    /// Tokens that all layers hold.
    tokens: Vec<u32>,
    /// Pages of the tokens, and perhaps of some more.
    pages: Vec<PageIdx>,
    /// Which of each layer's recurrent states is the text's.
    state: StateIdx,
    /// Recurrent states that the text can go back to, by the number of tokens, ascending.
    checkpoints: Vec<(usize, StateIdx)>,
    /// The same, for those that the step at hand makes.
    coming: Vec<(usize, StateIdx)>,
    /// Whether a pass failed halfway in states that can't go back.
    broken: bool,
}

impl Sequence {
    pub(crate) fn pages(&self) -> &[PageIdx] {
        &self.pages
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
    states: Pool,
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
    /// Whether texts can go back to any number of tokens.
    can_rewind: bool,
    /// Whether a layer has recurrent states.
    has_states: bool,
    /// Whether a layer's cache is in a GPU's memory, which holds one text.
    on_gpu: bool,
}

impl Sequences {
    /// Makes the memory of the texts that a plan is for, on the tiers that it names. There are no
    /// texts yet.
    ///
    /// # Errors
    /// When a NUMA node refuses the memory.
    pub(crate) fn new(
        spec: &ModelSpec,
        plan: &Placement,
        places: &Places,
        weights: &DenseWeights,
    ) -> Result<Self, LoadError> {
        let (context, room) = (plan.context as usize, plan.room());
        let (positions, n_states) = (room.positions() as usize, room.states() as usize);
        let placed = spec.layers.iter().zip(&places.layers);
        let layers: Vec<LayerCache> = placed
            .map(|(layer, place)| match place.mixer {
                Some(_) => LayerCache::on_gpu(layer, plan.kv_type, context),
                None => LayerCache::new(layer, plan.kv_type, positions, n_states),
            })
            .collect();
        for (cache, tier) in layers.iter().zip(plan.cache_tiers(spec.layers.len())) {
            let tier = &plan.tiers[tier].tier;
            let pages = nodes::Pages::of_tier(tier);
            cache
                .move_to(&pages)
                .map_err(|source| ArenaError::refused(&tier.name, &pages, source))?;
        }
        let (checkpoints, has_states) =
            (plan.checkpoints as usize, layers.iter().any(LayerCache::is_recurrent));
        Ok(Self {
            slots: Vec::new(),
            pages: PagePool::new(positions),
            states: Pool::new(n_states),
            prefixes: Prefixes::default(),
            files: None,
            history: spec.ngrams.as_ref().map_or(0, |table| table.n - 1),
            context,
            most_texts: plan.sequences as usize,
            spacing: (has_states && checkpoints > 0)
                .then(|| (context / checkpoints).next_multiple_of(PAGE).max(PAGE)),
            can_rewind: layers.iter().all(LayerCache::can_rewind),
            has_states,
            on_gpu: places.layers.iter().any(|place| place.mixer.is_some()),
            cache: Cache {
                layers,
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

    /// Returns whether texts can go back to any number of tokens.
    pub(crate) fn can_rewind(&self) -> bool {
        self.can_rewind
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

    /// Adds an empty text.
    ///
    /// # Errors
    /// When all recurrent states are in use, or a GPU holds the cache of another text.
    pub(crate) fn add(&mut self) -> Result<SequenceId, RunError> {
        let n_texts = self.n_texts();
        if self.on_gpu && n_texts > 0 {
            return Err(RunError::OneTextOnGpu);
        }
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
            state,
            checkpoints: Vec::new(),
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
    /// As [`add`](Self::add); when the text is unknown or unusable, has fewer tokens, or has
    /// recurrent states of another number of tokens and no checkpoint there.
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
        if n > n_past || n > 0 && !self.can_rewind && state.is_none() {
            return Err(RunError::CannotRewind { n_past, wanted: n });
        }
        let tokens = from.tokens[..n].to_vec();
        let found = Found {
            n,
            pages: from.pages[..pages_for(n)].to_vec(),
            state: state.filter(|_| self.has_states),
        };
        self.add_with(&tokens, found, false)
    }

    /// Adds a text with these tokens, whose pages and states it shares. A state that is `kept` is
    /// its checkpoint too.
    fn add_with(
        &mut self,
        tokens: &[u32],
        found: Found,
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
                return Err(error);
            }
        };
        let sequence = self.get_mut(id)?;
        (sequence.tokens, sequence.pages) = (tokens.to_vec(), pages);
        let own = sequence.state;
        if let Some(state) = state {
            if kept {
                sequence.checkpoints.push((n, state));
            } else {
                self.states.release(state);
            }
            for layer in &mut self.cache.layers {
                layer.copy_state(state, own);
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
        self.slots
            .get_mut(id.index as usize)
            .filter(|slot| slot.generation == id.generation)
            .and_then(|slot| slot.sequence.as_mut())
            .ok_or(RunError::NoText)
    }

    /// Gives a text the pages for `n` more tokens, none of them shared where those tokens go, and
    /// states for the checkpoints on the way.
    ///
    /// # Errors
    /// When the text is unknown or unusable, would be too long, or too few pages are free; nothing
    /// is changed then.
    pub(crate) fn reserve(&mut self, id: SequenceId, n: usize) -> Result<(), RunError> {
        let (context, sequence) = (self.context, self.get(id)?);
        if sequence.broken {
            return Err(RunError::Broken);
        }
        let (n_past, had) = (sequence.n_past(), sequence.pages.len());
        let wanted = n_past.saturating_add(n);
        if wanted > context {
            return Err(RunError::ContextFull { wanted, context });
        }
        let is_own = |page: &PageIdx| !self.pages.is_shared(*page);
        let missing: Vec<usize> = (n_past / PAGE..pages_for(wanted))
            .filter(|index| !sequence.pages.get(*index).is_some_and(is_own))
            .collect();
        let mut new = Vec::with_capacity(missing.len());
        for index in &missing {
            let Some(page) = self.take_page((context - index * PAGE).min(PAGE)) else {
                new.iter().for_each(|(_, page)| self.pages.release(*page));
                return Err(RunError::NoPages {
                    wanted: missing.len(),
                    free: self.pages().free,
                });
            };
            new.push((*index, page));
        }
        for (index, taken) in new {
            if index >= had {
                self.get_mut(id)?.pages.push(taken);
                continue;
            }
            let shared = std::mem::replace(&mut self.get_mut(id)?.pages[index], taken);
            let len = n_past.saturating_sub(index * PAGE).min(PAGE);
            for layer in &mut self.cache.layers {
                layer.copy_page(shared, taken, len);
            }
            self.pages.release(shared);
        }
        self.reserve_checkpoints(id, n_past, wanted)
    }

    fn reserve_checkpoints(
        &mut self,
        id: SequenceId,
        n_past: usize,
        wanted: usize,
    ) -> Result<(), RunError> {
        let Some(spacing) = self.spacing else {
            return Ok(());
        };
        for at in (1..=wanted / spacing).map(|i| i * spacing) {
            if at <= n_past {
                continue;
            }
            let Some(state) = self.take_checkpoint() else {
                break;
            };
            self.get_mut(id)?.coming.push((at, state));
        }
        Ok(())
    }

    /// Adds tokens that have gone through all layers.
    pub(crate) fn advance(&mut self, id: SequenceId, tokens: &[u32]) {
        if let Ok(sequence) = self.get_mut(id) {
            sequence.tokens.extend_from_slice(tokens);
        }
    }

    /// Ends a step: its checkpoints can be gone back to.
    pub(crate) fn commit(&mut self, id: SequenceId) {
        if let Ok(Sequence {
            checkpoints,
            coming,
            ..
        }) = self.get_mut(id)
        {
            checkpoints.append(coming);
        }
    }

    /// Takes a text back to `n_past` tokens after a pass that failed halfway.
    pub(crate) fn undo(&mut self, id: SequenceId, n_past: usize) {
        let can_rewind = self.can_rewind;
        if let Ok(sequence) = self.get_mut(id) {
            sequence.broken = !can_rewind;
            sequence.tokens.truncate(n_past);
        }
        self.trim(id);
    }

    /// Gives back what was reserved for tokens that a text does not have.
    pub(crate) fn trim(&mut self, id: SequenceId) {
        let Ok(sequence) = self.get_mut(id) else {
            return;
        };
        let n_past = sequence.n_past();
        let keep = pages_for(n_past).min(sequence.pages.len());
        let pages = sequence.pages.split_off(keep);
        let keep = sequence
            .checkpoints
            .partition_point(|(at, _)| *at <= n_past);
        let checkpoints = sequence.checkpoints.split_off(keep);
        let coming = std::mem::take(&mut sequence.coming);
        pages.iter().for_each(|page| self.pages.release(*page));
        for (_, state) in checkpoints.iter().chain(&coming) {
            self.states.release(*state);
        }
    }

    /// Has a text forget all tokens but the first `n`; does nothing where there are no more.
    ///
    /// # Errors
    /// When a layer has a recurrent state, and `n` is neither 0 nor all tokens nor a checkpoint;
    /// nothing is forgotten then.
    pub(crate) fn truncate(&mut self, id: SequenceId, n: usize) -> Result<(), RunError> {
        let sequence = self.get(id)?;
        let (n_past, broken) = (sequence.n_past(), sequence.broken);
        if n > 0 && !broken && n >= n_past {
            return Ok(());
        }
        if self.nearest_checkpoint(sequence, n) == n {
            self.go_back(id, n)
        } else if broken {
            Err(RunError::Broken)
        } else {
            Err(RunError::CannotRewind { n_past, wanted: n })
        }
    }

    /// Has a text forget tokens until it has `n` or fewer: as many as it can go back to. Returns how
    /// many are left.
    ///
    /// # Errors
    /// When the text is unknown.
    pub(crate) fn rewind(&mut self, id: SequenceId, n: usize) -> Result<usize, RunError> {
        let sequence = self.get(id)?;
        if !sequence.broken && n >= sequence.n_past() {
            return Ok(sequence.n_past());
        }
        let n = self.nearest_checkpoint(sequence, n);
        self.go_back(id, n)?;
        Ok(n)
    }

    /// Returns the largest number of tokens up to `n` that a text can go back to.
    fn nearest_checkpoint(&self, sequence: &Sequence, n: usize) -> usize {
        if self.can_rewind {
            return n.min(sequence.n_past());
        }
        let before = sequence.checkpoints.iter().filter(|(at, _)| *at <= n);
        before.map(|(at, _)| *at).next_back().unwrap_or(0)
    }

    /// Goes back to `n` tokens: a checkpoint, or none.
    fn go_back(&mut self, id: SequenceId, n: usize) -> Result<(), RunError> {
        let sequence = self.get_mut(id)?;
        sequence.tokens.truncate(n);
        sequence.broken = false;
        let own = sequence.state;
        let state = sequence.checkpoints.iter().find(|(at, _)| *at == n);
        let state = state.map(|(_, state)| *state);
        for layer in &mut self.cache.layers {
            match state {
                Some(state) => layer.copy_state(state, own),
                None => layer.reset(own),
            }
        }
        self.trim(id);
        Ok(())
    }
}
