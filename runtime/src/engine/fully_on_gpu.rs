//! Decoded tokens, one each of some texts, through a model that is fully on one GPU.

use super::Engine;
use super::batch::{Batch, Phase};
use super::meter::StepExperts;
use super::residual::finish_logits;
use super::sequences::WHOLE;
use crate::error::RunError;
use crate::gpu::Tokens;
use crate::layers::cpu_context::CpuContext;
use crate::layers::index::layers;
use crate::layers::mixer::Segment;
use crate::layers::pages::StateIdx;
use std::collections::BTreeSet;
use std::time::Instant;
use tier_plan_formats::placement::TierIdx;

impl Engine {
    /// Returns the tier whose GPU takes all of a batch through the model without the host, if one
    /// does.
    pub(super) fn gpu_of_step(&mut self, batch: &Batch) -> Option<TierIdx> {
        let is_decoding = batch.single
            || batch.phase == Phase::Decode && batch.spans.iter().all(|span| span.rows.len() == 1);
        let tier = self
            .fully_on_gpu
            .filter(|_| is_decoding && !self.experts.scores_predictions);
        let gpus = &mut self.backends.processors.gpus;
        tier.filter(|tier| batch.len() <= gpus.of(*tier).most_tokens())
    }

    /// Takes a batch with one token per text through a model that is all on the GPU of `tier`.
    pub(super) fn pass_on_gpu(&mut self, tier: TierIdx, batch: &Batch) -> Result<(), RunError> {
        let start = Instant::now();
        let Self {
            model,
            backends,
            experts,
            sequences,
            meter,
            output,
            choices,
            ..
        } = self;
        let (spec, n) = (model.spec(), batch.len());
        let processors = &mut backends.processors;
        let cpu = CpuContext {
            pool: &backends.pool,
            kernels: backends.kernels,
        };
        processors.cpu.name_ngrams(spec, batch);
        if let Some(values) = processors.cpu.ngram_rows(cpu, spec, 0..n) {
            processors.gpus.of(tier).put_ngrams(values)?;
        }
        processors.cpu.read_inputs_ahead(spec, &batch.tokens);
        if let Some(values) = processors.cpu.input_rows(spec, &batch.tokens) {
            processors.gpus.of(tier).put_input_rows(values)?;
        }
        let embeds = processors.gpus.places.embedding == Some(tier);
        let first = output.logits.len();
        output.logits.resize(first + n * spec.n_vocab, 0.0);
        let mut segments: Vec<Segment<'_>> = batch.segments(&(0..n), WHOLE).collect();
        let checkpoints: Vec<(StateIdx, StateIdx)> = segments
            .iter_mut()
            .flat_map(|segment| {
                let state = segment.state;
                let checkpoints = segment.checkpoints.drain(..);
                checkpoints.map(move |(_, to)| (state, to))
            })
            .collect();
        let chosen = batch.offset * choices.per_token..(batch.offset + n) * choices.per_token;
        let tokens = Tokens {
            ids: &batch.tokens,
            states: if embeds {
                None
            } else {
                Some(processors.cpu.embed_tokens(spec, &batch.tokens))
            },
            segments: &segments,
            experts: &mut output.routing.experts[chosen.clone()],
            weights: &mut output.routing.weights[chosen.clone()],
            logits: &mut output.logits[first..],
        };
        processors.gpus.of(tier).full_model()?.tokens(
            experts.store.of_tier(tier),
            tokens,
            &mut sequences.cache.rotations.tables,
        )?;
        let bias = processors.gpus.of(tier).head_bias();
        finish_logits(
            cpu,
            &spec.head,
            bias,
            spec.n_vocab,
            &mut output.logits[first..],
        );
        keep_rows(&mut output.logits, first, spec.n_vocab, &batch.logits);
        for (from, to) in checkpoints {
            sequences.cache.copy_state(from, to)?;
        }
        for span in &batch.spans {
            sequences.advance(span.sequence, &batch.tokens[span.rows.clone()]);
        }
        if batch.phase == Phase::Decode {
            let (store, chosen) = (&experts.store, &output.routing.experts[chosen]);
            let used: Vec<StepExperts<'_>> = layers(spec)
                .filter_map(|layer| {
                    let moe = layer.moe?;
                    let of_tokens = chosen.chunks_exact(choices.per_token);
                    let at = choices.of_layer(moe.index, moe.spec.n_used);
                    let of_layer = of_tokens.flat_map(|token| &token[at.clone()]);
                    let distinct = of_layer.collect::<BTreeSet<_>>().len() as u64;
                    Some(StepExperts {
                        layer,
                        n_used: distinct,
                        bytes: store.expert_bytes(moe.index.get()) * distinct,
                    })
                })
                .collect();
            meter.count_step_on_gpu(start, tier, &used);
        }
        Ok(())
    }
}

/// Keeps the wanted rows of logits, `[rows, n_vocab]` from `first` on.
fn keep_rows(logits: &mut Vec<f32>, first: usize, n_vocab: usize, wanted: &[usize]) {
    for (to, from) in wanted.iter().enumerate() {
        let row = first + from * n_vocab;
        logits.copy_within(row..row + n_vocab, first + to * n_vocab);
    }
    logits.truncate(first + wanted.len() * n_vocab);
}
