//! The stages of a pass on a GPU.

use super::backend::{Buffers, LayerBackend, Stage};
use super::residual::{finish_block, finish_logits};
use super::sequences::WHOLE;
use crate::error::RunError;
use crate::gpu::{FfnInput, Gpu, RoutedRows};
use crate::layers::index::Layer;
use crate::layers::mixer::Segment;
use tier_plan_formats::model::spec::{Ffn, RouterInput};

impl LayerBackend for Gpu {
    fn embed(&mut self, _: &mut Stage<'_>, tokens: &[u32]) -> Result<(), RunError> {
        Ok(self.embedding()?.embed(tokens)?)
    }

    fn mixer(&mut self, stage: &mut Stage<'_>, layer: Layer<'_>) -> Result<(), RunError> {
        let segments: Vec<Segment<'_>> = stage.batch.segments(&stage.rows, WHOLE).collect();
        Ok(Gpu::mixer(self, layer.index.get())?.run(
            stage.rows.clone(),
            &segments,
            &mut stage.cache.rotations.tables,
        )?)
    }

    fn dense_ffn(&mut self, stage: &mut Stage<'_>, layer: Layer<'_>) -> Result<(), RunError> {
        Ok(self.ffn(layer.index.get())?.run(stage.rows.clone())?)
    }

    fn route(&mut self, stage: &mut Stage<'_>, layer: Layer<'_>) -> Result<(), RunError> {
        let Ffn::Moe(moe) = &layer.spec.ffn else {
            return Ok(());
        };
        let (cpu, n, hidden) = (stage.cpu, stage.rows.len(), stage.spec.hidden);
        let choices = stage.rows.start * moe.n_used..stage.rows.end * moe.n_used;
        let buffers = &mut *stage.buffers;
        let (experts, weights) = (
            &mut buffers.experts[choices.clone()],
            &mut buffers.weights[choices],
        );
        let tokens = &stage.batch.tokens[stage.rows.clone()];
        let router = self.router(layer.index.get())?;
        let RoutedRows { normed, latent } =
            router.route(stage.rows.clone(), tokens, experts, weights)?;
        // Experts and the shared expert may be on the CPU.
        buffers.normed[..normed.len()].copy_from_slice(normed);
        if !latent.is_empty() {
            let (acts, width) = (&mut buffers.latent_acts, moe.expert_width());
            let quantize = width.is_multiple_of(32);
            acts.fill_shared(cpu.pool, cpu.kernels, n, width, latent, quantize);
        }
        buffers.acts.fill_shared(
            cpu.pool,
            cpu.kernels,
            n,
            hidden,
            normed,
            hidden.is_multiple_of(32),
        );
        Ok(())
    }

    fn shared_expert(
        &mut self,
        stage: &mut Stage<'_>,
        layer: Layer<'_>,
        routed_here: bool,
    ) -> Result<(), RunError> {
        // A router of other rows has left these, and not the shared expert's.
        let reads_others = layer
            .spec
            .moe()
            .is_some_and(|moe| moe.input_norm.is_some() || moe.router_input != RouterInput::Normed);
        let values = stage.values();
        let Buffers { normed, shared, .. } = &mut *stage.buffers;
        let input = if routed_here && !reads_others {
            FfnInput::Normalized
        } else if stage.spec.streams.is_some() {
            // Only the router's processor reads several streams.
            FfnInput::Given(&normed[..values.len()])
        } else {
            FfnInput::Raw
        };
        let part = self.ffn(layer.index.get())?;
        if layer.spec.sums_experts_apart() {
            let shared = &mut shared[values];
            return Ok(part.take_shared(stage.rows.clone(), input, shared)?);
        }
        Ok(part.run_shared(stage.rows.clone(), input)?)
    }

    fn add_experts(&mut self, stage: &mut Stage<'_>, layer: Layer<'_>) -> Result<(), RunError> {
        let (values, spec, cpu) = (stage.values(), stage.spec, stage.cpu);
        let Buffers { out, shared, .. } = &mut *stage.buffers;
        let out = &mut out[values.clone()];
        let (index, eps, hidden) = (layer.index.get(), spec.norm_eps, spec.hidden);
        if let Some(end) = self.end_of_experts(index) {
            let norm = end.experts_norm.as_deref();
            finish_block(cpu, norm, eps, 1.0, hidden, out);
            if layer.spec.moe().is_some_and(|moe| moe.shared.is_some()) {
                cpu.kernels.add(out, &shared[values]);
            }
            finish_block(cpu, None, eps, end.sum_scale, hidden, out);
            finish_block(cpu, end.norm.as_deref(), eps, end.scale, hidden, out);
        }
        Ok(self.add_sums(index, out)?)
    }

    fn leave_latent(&mut self, stage: &mut Stage<'_>, layer: Layer<'_>) -> Result<(), RunError> {
        let values = stage.values();
        let Some(moe) = layer.spec.moe() else {
            return Ok(());
        };
        let Buffers { out, latent, .. } = &mut *stage.buffers;
        let sums = &latent[..stage.rows.len() * moe.expert_width()];
        let router = self.router(layer.index.get())?;
        Ok(router.leave_latent(sums, &mut out[values])?)
    }

    fn add_latent(&mut self, stage: &mut Stage<'_>, layer: Layer<'_>) -> Result<(), RunError> {
        let index = layer.index.get();
        let (Some(moe), None) = (layer.spec.moe(), self.end_of_experts(index)) else {
            self.leave_latent(stage, layer)?;
            return self.add_experts(stage, layer);
        };
        let n = stage.rows.len();
        let sums = &stage.buffers.latent[..n * moe.expert_width()];
        self.router(index)?.add_latent(sums)?;
        Ok(self.end_layer(index, n)?)
    }

    fn head(&mut self, stage: &mut Stage<'_>, logits: &mut [f32]) -> Result<(), RunError> {
        let (n_vocab, mut rest) = (stage.spec.n_vocab, logits);
        // Rows without wanted logits lie between those of several texts.
        for rows in stage.batch.logits.chunk_by(|a, b| a + 1 == *b) {
            let (of_rows, after) = rest.split_at_mut(rows.len() * n_vocab);
            Gpu::head(self)?.run(rows[0]..rows[0] + rows.len(), of_rows)?;
            finish_logits(
                stage.cpu,
                &stage.spec.head,
                self.head_bias(),
                n_vocab,
                of_rows,
            );
            rest = after;
        }
        Ok(())
    }

    fn predict(
        &mut self,
        stage: &mut Stage<'_>,
        layer: Layer<'_>,
        experts: &mut Vec<u16>,
    ) -> Result<(), RunError> {
        Ok(self
            .router(layer.index.get())?
            .predict(stage.rows.clone(), experts)?)
    }
}
