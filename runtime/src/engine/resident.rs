//! A token of a model that is all on one GPU.

use crate::engine::Engine;
use crate::error::RunError;
use crate::gpu::Token;
use crate::tiers::pace::StageBytes;
use std::time::Instant;
use tier_plan_formats::model::spec::Ffn;
use tier_plan_kernels::quant::dequantize_row;

impl Engine {
    /// Takes a lone token through a model that is all on the GPU of `tier`.
    pub(crate) fn resident_pass(&mut self, tier: usize, token: u32, decoding: bool) -> Result<(), RunError> {
        let start = Instant::now();
        let hidden = self.spec.hidden;
        let state = match self.gpus.places.embedding == Some(tier) {
            true => None,
            false => {
                let table = self.weights.matrix(self.spec.embedding, self.spec.n_vocab, hidden);
                let row = &mut self.scratch.x[..hidden];
                if let Some(bytes) = table.row(token as usize) {
                    dequantize_row(table.ty(), bytes, row);
                }
                Some(&*row)
            }
        };
        self.logits.resize(self.spec.n_vocab, 0.0);
        let (experts, weights) = (&mut self.routing.experts[..], &mut self.routing.weights[..]);
        let token = Token { token, state, past: self.n_past, experts, weights, logits: &mut self.logits };
        self.gpus.of(tier).full_model()?.token(self.experts.of_tier(tier), token, &mut self.ropes)?;
        self.n_past += 1;
        if decoding {
            self.count_resident(tier, start);
        }
        Ok(())
    }

    /// Counts a decoded token: its time is shared out by bytes, as nothing was waited for in between.
    fn count_resident(&mut self, tier: usize, start: Instant) {
        let time = start.elapsed();
        let mut all = StageBytes::new(self.plan().tiers.len());
        all.add(self.embedding_tier, self.embedding_row_bytes() as u64);
        all.add(self.head_tier, self.head_bytes());
        let (mut moe_at, mut parts) = (0, Vec::with_capacity(self.counters.layers.len()));
        for (layer, dense) in self.spec.layers.iter().zip(&self.dense_bytes) {
            dense.by_tier().iter().enumerate().for_each(|(tier, bytes)| all.add(tier, *bytes));
            if let Ffn::Moe(moe) = &layer.ffn {
                let experts = self.experts.expert_bytes(moe_at) * moe.n_used as u64;
                all.add(tier, experts);
                parts.push((dense.by_tier().iter().sum::<u64>(), experts, moe.n_used as u64));
                moe_at += 1;
            }
        }
        let sum: u64 = all.by_tier().iter().sum();
        let share = |bytes: u64| time.mul_f64(bytes as f64 / sum.max(1) as f64);
        for (layer, (dense, experts, used)) in self.counters.layers.iter_mut().zip(parts) {
            layer.pinned_hits += used;
            layer.dense += share(dense);
            layer.experts += share(experts);
        }
        self.counters.charge(&all, time);
    }
}
