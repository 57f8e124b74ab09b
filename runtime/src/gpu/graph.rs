//! A token through a model all of which is on one GPU: everything is launched without waiting for anything, and what routers
//! chose comes back at the end. The launches are recorded once for each chunk of the context, and replayed: what is
//! different from token to token, its number and its position, lies in the device's memory.

use crate::gpu::{Gpu, RopeTable};
use crate::layers::places::Places;
use tier_plan_cuda::CudaError;
use tier_plan_cuda::experts::PinnedExperts;
use tier_plan_cuda::ops::{CHUNK, Recorded};
use tier_plan_formats::model::shape::ModelShape;
use tier_plan_formats::placement::{Placement, PlanTier, TierIdx};

/// Launches that were recorded.
#[derive(Default)]
pub(super) struct Replay {
    /// All kernels have been launched once, as they must have been before they are recorded.
    warm: bool,
    /// This device records nothing.
    refused: bool,
    /// For positions of a chunk.
    recorded: Option<(usize, Recorded)>,
}

/// A token that stays on the GPU.
pub(crate) struct Token<'a> {
    pub(crate) token: u32,
    /// Its state before the first layer, where the embedding is elsewhere.
    pub(crate) state: Option<&'a [f32]>,
    pub(crate) past: usize,
    /// Room for what routers chose, by layer `n_used` experts and their weights.
    pub(crate) experts: &'a mut [u16],
    pub(crate) weights: &'a mut [f32],
    pub(crate) logits: &'a mut [f32],
}

/// The tier whose GPU has all of a model but perhaps the embedding: every part, and every expert pinned.
pub(crate) fn resident_tier(plan: &Placement, shape: &ModelShape, places: &Places) -> Option<TierIdx> {
    let tier = places.head?;
    let here = |place: crate::layers::places::Place| place == Some(tier);
    let shared = |layer: usize| {
        use tier_plan_formats::model::shape::DenseKind::SharedExpert;
        shape.dense.iter().any(|d| d.kind == SharedExpert && d.layer == u32::try_from(layer).ok())
    };
    let parts = places.layers.iter().enumerate();
    let all_parts = parts.into_iter().all(|(i, l)| here(l.mixer) && here(l.ffn) && (here(l.shared) || !shared(i)));
    let all_experts = plan.layers.iter().zip(&shape.experts).all(|(placed, experts)| {
        placed.pinned.iter().any(|pins| pins.tier == tier && pins.experts.len() == experts.n_expert as usize)
    });
    // Emulated tiers take their time layer by layer.
    let real = plan.tiers.iter().all(|t| !t.tier.emulated);
    (all_parts && all_experts && real && plan.tiers.get(tier).is_some_and(PlanTier::uses_gpu)).then_some(tier)
}

/// The tier whose accelerator a plan keeps all of a model on, but perhaps the embedding: a decoded token stays there from its
/// number to its logits.
pub fn stays_on(plan: &Placement, shape: &ModelShape) -> Option<TierIdx> {
    resident_tier(plan, shape, &Places::new(plan, shape.n_layer as usize))
}

impl Gpu {
    /// Takes a token through the whole model; `experts` are those of its layers, where it has any.
    pub(crate) fn token(
        &mut self,
        mut experts: Option<&mut PinnedExperts>,
        token: Token<'_>,
        ropes: &mut [RopeTable],
    ) -> Result<(), CudaError> {
        let past = token.past;
        self.prepare(past, 1, ropes)?;
        match token.state {
            Some(state) => self.put(0..1, state)?,
            None => self.room.ids.view().write(&token.token.to_ne_bytes())?,
        }
        let embeds = token.state.is_none();
        let chunk = past / CHUNK;
        match &self.replay.recorded {
            Some((recorded_for, recorded)) if *recorded_for == chunk => recorded.replay()?,
            _ if !self.replay.warm || self.replay.refused => {
                self.launch_token(experts.as_deref_mut(), embeds, past)?;
                self.replay.warm = true;
            }
            _ => {
                self.replay.recorded = None;
                let ops = self.ops.clone();
                let recorded = ops.record(|| self.launch_token(experts.as_deref_mut(), embeds, past))?;
                match recorded {
                    Some(recorded) => {
                        recorded.replay()?;
                        self.replay.recorded = Some((chunk, recorded));
                    }
                    None => {
                        self.replay.refused = true;
                        self.launch_token(experts, embeds, past)?;
                    }
                }
            }
        }
        self.room.logits.view().read_f32(token.logits)?;
        let mut choices = std::mem::take(&mut self.answer);
        choices.resize(2 * token.experts.len(), 0.0);
        let read = self.room.record.view().read_f32(&mut choices);
        let mut at = 0;
        let done = read.and_then(|()| {
            for (index, layer) in self.layers.iter().enumerate() {
                let Some(router) = &layer.router else { continue };
                let n = router.routing.n_used;
                self.read_numbers(index, &choices[2 * at..2 * at + n], &mut token.experts[at..at + n])?;
                token.weights[at..at + n].copy_from_slice(&choices[2 * at + n..2 * (at + n)]);
                at += n;
            }
            Ok(())
        });
        self.answer = choices;
        done
    }

    /// Everything of a token from its number, or its first state, to its logits: launches only.
    fn launch_token(
        &mut self,
        mut experts: Option<&mut PinnedExperts>,
        embeds: bool,
        past: usize,
    ) -> Result<(), CudaError> {
        if let Some(table) = self.embedding.as_ref().filter(|_| embeds) {
            let (ids, x) = (self.room.ids.view(), self.state(0..1));
            self.ops.dequantize_chosen(table.ty, table.view(), self.hidden, ids, 1, x)?;
        }
        let (mut at, mut moe_at) = (0, 0);
        // Whether what the last part made is still to be added, by the next part's norm.
        let mut add = false;
        for index in 0..self.layers.len() {
            self.mix(index, 0..1, past, add)?;
            add = true;
            let Some(n) = self.layers[index].router.as_ref().map(|r| r.routing.n_used) else {
                self.block(index, 0..1, false, true)?;
                continue;
            };
            let for_experts = experts.as_deref().is_some_and(|experts| experts.takes_quants(moe_at));
            self.choose(index, 0..1, Some(at), true, for_experts)?;
            add = self.layers[index].ffn.is_some();
            if add {
                self.block(index, 0..1, true, false)?;
            }
            if let Some(experts) = experts.as_deref_mut() {
                let (record, input) = (self.room.record.view(), self.room.answer.view());
                let (which, by) = (record.floats(at..at + n), record.floats(at + n..at + 2 * n));
                experts.add_chosen(moe_at, input, &self.room.quants, which, by, n, self.state(0..1))?;
            }
            at += 2 * n;
            moe_at += 1;
        }
        let Some(head) = &self.head else { unreachable!("the plan has it elsewhere") };
        head.run(&self.ops, &mut self.room, 0..1, self.eps, add)
    }
}
