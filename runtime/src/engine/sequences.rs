//! The texts of an engine: how long each is, its pages of keys and values, and its recurrent states.

use crate::error::{LoadError, RunError};
use crate::layers::mixer::LayerCache;
use crate::layers::pages::{PAGE, PageIdx, PagePool, pages_for};
use crate::layers::places::Places;
use crate::layers::rope::Rotations;
use crate::layers::weights::DenseWeights;
use crate::tiers::arena::ArenaError;
use crate::tiers::nodes;
use tier_plan_formats::model::spec::{Mixer, ModelSpec};
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
    /// Pages that no text uses.
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
    /// Pages of the positions so far, and perhaps of some after them.
    pages: Vec<PageIdx>,
    /// Which of each layer's recurrent states is the text's.
    state: usize,
    /// Tokens that all layers hold.
    n_past: usize,
    /// Whether a pass failed halfway in states that can't go back.
    broken: bool,
}

impl Sequence {
    pub(crate) fn pages(&self) -> &[PageIdx] {
        &self.pages
    }

    pub(crate) fn state(&self) -> usize {
        self.state
    }

    pub(crate) fn n_past(&self) -> usize {
        self.n_past
    }
}

/// A place for a text.
#[derive(Debug, Default)]
struct Slot {
    generation: u32,
    sequence: Option<Sequence>,
}

/// All texts, and the memory that they share out.
pub(crate) struct Sequences {
    pub(crate) cache: Cache,
    slots: Vec<Slot>,
    pool: PagePool,
    free_states: Vec<usize>,
    /// Tokens that a text may have.
    context: usize,
    /// Whether texts can go back to fewer tokens.
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
        let (context, texts) = (plan.context as usize, plan.sequences as usize);
        let positions = plan.room().positions() as usize;
        let placed = spec.layers.iter().zip(&places.layers);
        let layers: Vec<LayerCache> = placed
            .map(|(layer, place)| match place.mixer {
                Some(_) => LayerCache::on_gpu(&layer.mixer, plan.kv_type, context),
                None => LayerCache::new(&layer.mixer, plan.kv_type, positions, texts),
            })
            .collect();
        for (cache, tier) in layers.iter().zip(plan.cache_tiers(spec.layers.len())) {
            let tier = &plan.tiers[tier].tier;
            let pages = nodes::Pages::of_tier(tier);
            cache
                .move_to(&pages)
                .map_err(|source| ArenaError::refused(&tier.name, &pages, source))?;
        }
        Ok(Self {
            slots: Vec::new(),
            pool: PagePool::new(positions),
            free_states: (0..texts).rev().collect(),
            context,
            can_rewind: layers.iter().all(LayerCache::can_rewind),
            has_states: spec
                .layers
                .iter()
                .any(|layer| matches!(layer.mixer, Mixer::Delta(_))),
            on_gpu: places.layers.iter().any(|place| place.mixer.is_some()),
            cache: Cache {
                layers,
                rotations: Rotations::new(spec, weights),
            },
        })
    }

    /// Returns the bytes of every layer's cache.
    pub(crate) fn bytes(&self) -> impl Iterator<Item = u64> + '_ {
        self.cache.layers.iter().map(LayerCache::bytes)
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
            free: self.pool.free(),
            total: self.pool.total(),
        }
    }

    /// Adds an empty text.
    ///
    /// # Errors
    /// When all recurrent states are in use, or a GPU holds the cache of another text.
    pub(crate) fn add(&mut self) -> Result<SequenceId, RunError> {
        let n_texts = self.slots.iter().filter(|s| s.sequence.is_some()).count();
        if self.on_gpu && n_texts > 0 {
            return Err(RunError::OneTextOnGpu);
        }
        let state = if self.has_states {
            self.free_states.pop().ok_or(RunError::TooManyTexts {
                texts: self.n_states(),
            })?
        } else {
            0
        };
        for layer in &mut self.cache.layers {
            layer.reset(state);
        }
        let sequence = Sequence {
            pages: Vec::new(),
            state,
            n_past: 0,
            broken: false,
        };
        let index = self
            .slots
            .iter()
            .position(|slot| slot.sequence.is_none())
            .unwrap_or_else(|| {
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

    fn n_states(&self) -> usize {
        let states = |layer: &LayerCache| match layer {
            LayerCache::Delta(states) => Some(states.len()),
            _ => None,
        };
        self.cache.layers.iter().find_map(states).unwrap_or(0)
    }

    /// Adds a text with the first `n` tokens of another, whose pages it shares.
    ///
    /// # Errors
    /// As [`add`](Self::add); when the text is unknown or unusable, has fewer tokens, or has
    /// recurrent states of another number of tokens.
    pub(crate) fn fork(&mut self, of: SequenceId, n: usize) -> Result<SequenceId, RunError> {
        let from = self.get(of)?;
        if from.broken {
            return Err(RunError::Broken);
        }
        if n > from.n_past || n < from.n_past && n > 0 && !self.can_rewind {
            return Err(RunError::CannotRewind {
                n_past: from.n_past,
                wanted: n,
            });
        }
        let (pages, state) = (from.pages[..pages_for(n)].to_vec(), from.state);
        let fork = self.add()?;
        for page in &pages {
            self.pool.share(*page);
        }
        let to = self.get_mut(fork)?;
        (to.pages, to.n_past) = (pages, n);
        let to = to.state;
        if n > 0 {
            for layer in &mut self.cache.layers {
                layer.copy_state(state, to);
            }
        }
        Ok(fork)
    }

    /// Removes a text; does nothing if it is gone already.
    pub(crate) fn remove(&mut self, id: SequenceId) {
        let Some(slot) = self.slots.get_mut(id.index as usize) else {
            return;
        };
        if slot.generation != id.generation {
            return;
        }
        let Some(sequence) = slot.sequence.take() else {
            return;
        };
        slot.generation = slot.generation.wrapping_add(1);
        for page in sequence.pages {
            self.pool.release(page);
        }
        if self.has_states {
            self.free_states.push(sequence.state);
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

    /// Gives a text the pages for `n` more tokens, none of them shared where those tokens go.
    ///
    /// # Errors
    /// When the text is unknown or unusable, would be too long, or too few pages are free; nothing
    /// is changed then.
    pub(crate) fn reserve(&mut self, id: SequenceId, n: usize) -> Result<(), RunError> {
        let (context, sequence) = (self.context, self.get(id)?);
        if sequence.broken {
            return Err(RunError::Broken);
        }
        let (n_past, had) = (sequence.n_past, sequence.pages.len());
        let wanted = n_past.saturating_add(n);
        if wanted > context {
            return Err(RunError::ContextFull { wanted, context });
        }
        let is_own = |page: &PageIdx| !self.pool.is_shared(*page);
        let missing: Vec<usize> = (n_past / PAGE..pages_for(wanted))
            .filter(|index| !sequence.pages.get(*index).is_some_and(is_own))
            .collect();
        let mut new = Vec::with_capacity(missing.len());
        for index in &missing {
            let Some(page) = self.pool.take((context - index * PAGE).min(PAGE)) else {
                new.iter().for_each(|(_, page)| self.pool.release(*page));
                return Err(RunError::NoPages {
                    wanted: missing.len(),
                    free: self.pool.free(),
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
            self.pool.release(shared);
        }
        Ok(())
    }

    /// Counts `n` tokens that have gone through all layers.
    pub(crate) fn advance(&mut self, id: SequenceId, n: usize) {
        if let Ok(sequence) = self.get_mut(id) {
            sequence.n_past += n;
        }
    }

    /// Takes a text back to `n_past` tokens after a pass that failed halfway.
    pub(crate) fn undo(&mut self, id: SequenceId, n_past: usize) {
        let can_rewind = self.can_rewind;
        if let Ok(sequence) = self.get_mut(id) {
            sequence.broken = !can_rewind;
            sequence.n_past = n_past;
        }
        self.trim(id);
    }

    /// Gives back the pages after a text's last token.
    pub(crate) fn trim(&mut self, id: SequenceId) {
        let Ok(sequence) = self.get_mut(id) else {
            return;
        };
        let keep = pages_for(sequence.n_past).min(sequence.pages.len());
        for page in sequence.pages.split_off(keep) {
            self.pool.release(page);
        }
    }

    /// Has a text forget all tokens but the first `n`; does nothing where there are no more.
    ///
    /// # Errors
    /// When a layer has a recurrent state and `n` is neither 0 nor all tokens, or that state is
    /// unusable after a failed pass; nothing is forgotten then.
    pub(crate) fn truncate(&mut self, id: SequenceId, n: usize) -> Result<(), RunError> {
        let can_rewind = self.can_rewind;
        let sequence = self.get_mut(id)?;
        if n == 0 {
            (sequence.n_past, sequence.broken) = (0, false);
            let state = sequence.state;
            for layer in &mut self.cache.layers {
                layer.reset(state);
            }
            self.trim(id);
            return Ok(());
        }
        if sequence.broken {
            return Err(RunError::Broken);
        }
        if n >= sequence.n_past {
            return Ok(());
        }
        if !can_rewind {
            return Err(RunError::CannotRewind {
                n_past: sequence.n_past,
                wanted: n,
            });
        }
        sequence.n_past = n;
        self.trim(id);
        Ok(())
    }
}
