//! A single token through a model that is fully on one GPU.

use super::Engine;
use super::batch::{Batch, Phase};
use super::meter::TokenExperts;
use super::sequences::WHOLE;
use crate::error::RunError;
use crate::gpu::Token;
use crate::layers::index::layers;
use std::time::Instant;
use tier_plan_formats::placement::TierIdx;

impl Engine {
    /// Takes a call's single token through a model that is all on the GPU of `tier`.
    pub(super) fn pass_on_gpu(&mut self, tier: TierIdx, batch: &Batch) -> Result<(), RunError> {
        let start = Instant::now();
        let Self {
            model,
            backends,
            experts,
            sequences,
            meter,
            output,
            ..
        } = self;
        let (spec, id) = (model.spec(), batch.tokens[0]);
        let processors = &mut backends.processors;
        let embeds = processors.gpus.places.embedding == Some(tier);
        output.logits.resize(spec.n_vocab, 0.0);
        let Some(mut segment) = batch.segments(&(0..1), WHOLE).next() else {
            return Ok(());
        };
        let checkpoints = std::mem::take(&mut segment.checkpoints);
        let own = segment.state;
        let token = Token {
            token: id,
            state: if embeds {
                None
            } else {
                Some(processors.cpu.embed_token(spec, id))
            },
            segment,
            experts: &mut output.routing.experts,
            weights: &mut output.routing.weights,
            logits: &mut output.logits,
        };
        processors.gpus.of(tier).full_model()?.token(
            experts.store.of_tier(tier),
            token,
            &mut sequences.cache.rotations.tables,
        )?;
        if batch.logits.is_empty() {
            output.logits.clear();
        }
        for (_, checkpoint) in checkpoints {
            sequences.cache.copy_state(own, checkpoint)?;
        }
        sequences.advance(batch.spans[0].sequence, &batch.tokens);
        if batch.phase == Phase::Decode {
            let store = &experts.store;
            let used = layers(spec).filter_map(|layer| {
                let moe = layer.moe?;
                let n_used = moe.spec.n_used as u64;
                Some(TokenExperts {
                    layer,
                    n_used,
                    bytes: store.expert_bytes(moe.index.get()) * n_used,
                })
            });
            meter.count_token_on_gpu(start, tier, used);
        }
        Ok(())
    }
}
