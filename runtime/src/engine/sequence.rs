//! The state of one text: its length, its keys and values or recurrent states, and its rotations.

use crate::error::{LoadError, RunError};
use crate::layers::mixer::MixerState;
use crate::layers::places::Places;
use crate::layers::rope::{RopeTable, rope_tables};
use crate::layers::weights::DenseWeights;
use crate::tiers::arena::ArenaError;
use crate::tiers::nodes::Pages;
use tier_plan_formats::model::spec::ModelSpec;
use tier_plan_formats::placement::Placement;

/// One text in the engine. Weights, buffers and experts are shared by all texts; nothing here is.
pub(crate) struct Sequence {
    /// By layer.
    pub(crate) states: Vec<MixerState>,
    /// One per way in which layers rotate, with the rotations of the last batch's positions.
    pub(crate) ropes: Vec<RopeTable>,
    /// By layer: index into `ropes`.
    pub(crate) rope_of_layer: Vec<Option<usize>>,
    /// Tokens that all states hold.
    n_past: usize,
    /// Tokens that the states may hold.
    capacity: usize,
    /// Whether a pass failed halfway in states that can't go back.
    broken: bool,
}

impl Sequence {
    /// Makes an empty text with room for the plan's context, its states on the tiers that the plan
    /// names.
    ///
    /// # Errors
    /// When a NUMA node refuses the pages.
    pub(crate) fn new(
        spec: &ModelSpec,
        plan: &Placement,
        places: &Places,
        weights: &DenseWeights,
    ) -> Result<Self, LoadError> {
        let capacity = plan.context as usize;
        let layers = spec.layers.iter().zip(&places.layers);
        let states: Vec<MixerState> = layers
            .map(|(layer, place)| match place.mixer {
                Some(_) => MixerState::on_gpu(&layer.mixer, plan.kv_type, capacity),
                None => MixerState::new(&layer.mixer, plan.kv_type, capacity),
            })
            .collect();
        for (state, tier) in states.iter().zip(plan.cache_tiers(spec.layers.len())) {
            let tier = &plan.tiers[tier].tier;
            let pages = Pages::of_tier(tier);
            state
                .move_to(&pages)
                .map_err(|source| ArenaError::refused(&tier.name, &pages, source))?;
        }
        let (ropes, rope_of_layer) = rope_tables(spec, weights);
        Ok(Self {
            states,
            ropes,
            rope_of_layer,
            n_past: 0,
            capacity,
            broken: false,
        })
    }

    pub(crate) fn n_past(&self) -> usize {
        self.n_past
    }

    pub(crate) fn capacity(&self) -> usize {
        self.capacity
    }

    /// Lets the text have at most `tokens` tokens; its memory stays as planned.
    pub(crate) fn limit(&mut self, tokens: usize) {
        self.capacity = self.capacity.min(tokens);
    }

    /// Checksums that `n` more tokens can be added.
    ///
    /// # Errors
    /// When there is no room for them, or an earlier pass left the states unusable.
    pub(crate) fn check_room(&self, n: usize) -> Result<(), RunError> {
        if self.broken {
            return Err(RunError::Broken);
        }
        let wanted = self.n_past + n;
        if wanted > self.capacity {
            return Err(RunError::ContextFull {
                wanted,
                context: self.capacity,
            });
        }
        Ok(())
    }

    /// Counts `n` tokens that have gone through all layers.
    pub(crate) fn advance(&mut self, n: usize) {
        self.n_past += n;
    }

    /// Goes back to `n_past` tokens after a pass that failed halfway.
    pub(crate) fn undo(&mut self, n_past: usize) {
        self.broken = !self.can_rewind();
        self.n_past = n_past;
    }

    /// Forgets all tokens but the first `n`; does nothing where there are no more.
    ///
    /// # Errors
    /// When a layer has a recurrent state and `n` is neither 0 nor all tokens, or that state is
    /// unusable after a failed pass; nothing is forgotten then.
    pub(crate) fn truncate(&mut self, n: usize) -> Result<(), RunError> {
        if n == 0 {
            self.clear();
            return Ok(());
        }
        if self.broken {
            return Err(RunError::Broken);
        }
        if n >= self.n_past {
            return Ok(());
        }
        if !self.can_rewind() {
            return Err(RunError::CannotRewind {
                n_past: self.n_past,
                wanted: n,
            });
        }
        self.n_past = n;
        Ok(())
    }

    /// Forgets all tokens.
    pub(crate) fn clear(&mut self) {
        self.states.iter_mut().for_each(MixerState::reset);
        self.n_past = 0;
        self.broken = false;
    }

    fn can_rewind(&self) -> bool {
        self.states.iter().all(MixerState::can_rewind)
    }
}
