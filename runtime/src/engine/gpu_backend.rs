//! The stages of a pass on a GPU.

use super::backend::{LayerBackend, Stage};
use crate::error::RunError;
use crate::gpu::Gpu;
use crate::layers::index::Layer;
use tier_plan_formats::model::spec::Ffn;

impl LayerBackend for Gpu {
    fn embed(&mut self, _: &mut Stage<'_>, tokens: &[u32]) -> Result<(), RunError> {
        Ok(Gpu::embed(self, tokens)?)
    }

    fn mixer(&mut self, stage: &mut Stage<'_>, layer: Layer<'_>) -> Result<(), RunError> {
        let past = stage.past();
        Ok(Gpu::mixer(self, layer.index.get(), stage.rows.clone(), past, &mut stage.sequence.ropes)?)
    }

    fn dense_ffn(&mut self, stage: &mut Stage<'_>, layer: Layer<'_>) -> Result<(), RunError> {
        Ok(self.ffn(layer.index.get(), stage.rows.clone(), false)?)
    }

    fn route(&mut self, stage: &mut Stage<'_>, layer: Layer<'_>) -> Result<(), RunError> {
        let Ffn::Moe(moe) = &layer.spec.ffn else { return Ok(()) };
        let (cpu, n, hidden) = (stage.cpu, stage.rows.len(), stage.spec.hidden);
        let choices = stage.rows.start * moe.n_used..stage.rows.end * moe.n_used;
        let buffers = &mut *stage.buffers;
        let (experts, weights) = (&mut buffers.experts[choices.clone()], &mut buffers.weights[choices]);
        let normed = Gpu::route(self, layer.index.get(), stage.rows.clone(), experts, weights)?;
        // Experts and the shared expert may be on the CPU.
        buffers.normed[..normed.len()].copy_from_slice(normed);
        buffers.acts.fill_shared(cpu.pool, cpu.kernels, n, hidden, normed, hidden.is_multiple_of(32));
        Ok(())
    }

    fn shared_expert(&mut self, stage: &mut Stage<'_>, layer: Layer<'_>, routed_here: bool) -> Result<(), RunError> {
        Ok(self.ffn(layer.index.get(), stage.rows.clone(), routed_here)?)
    }

    fn add_experts(&mut self, stage: &mut Stage<'_>) -> Result<(), RunError> {
        Ok(self.add(&stage.buffers.out[stage.values()])?)
    }

    fn head(&mut self, stage: &mut Stage<'_>, logits: &mut [f32]) -> Result<(), RunError> {
        Ok(Gpu::head(self, stage.rows.clone(), logits)?)
    }

    fn predict(&mut self, stage: &mut Stage<'_>, layer: Layer<'_>, experts: &mut Vec<u16>) -> Result<(), RunError> {
        Ok(self.guess(layer.index.get(), stage.rows.clone(), experts)?)
    }
}
