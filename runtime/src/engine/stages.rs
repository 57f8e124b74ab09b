//! The parts of a pass that are not routed experts, each where its weights are: on the processor, or on a GPU. The hidden
//! state of a batch is in one place at a time and goes to where the next part is.

use crate::engine::{Engine, Wanted};
use crate::error::RunError;
use crate::gpu::FfnInput;
use crate::layers::compute::{Compute, add_bias};
use crate::layers::mixer::{MixerInput, mix};
use crate::layers::places::Place;
use crate::moe::{dense_ffn, shared_expert};
use std::ops::Range;
use tier_plan_formats::model::spec::Ffn;
use tier_plan_kernels::needs_quants;
use tier_plan_kernels::pooled::{MatJob, matmul_all};
use tier_plan_kernels::quant::dequantize_row;

impl Engine {
    /// Takes rows of the hidden state to where the next part is.
    fn bring(&mut self, rows: Range<usize>, from: Place, to: Place) -> Result<(), RunError> {
        if from == to {
            return Ok(());
        }
        let x = &mut self.scratch.x[rows.start * self.spec.hidden..rows.end * self.spec.hidden];
        if let Some(from) = from {
            self.gpus.of(from).take(rows.clone(), x)?;
        }
        if let Some(to) = to {
            self.gpus.of(to).put(rows, x)?;
        }
        Ok(())
    }

    /// The hidden state of a batch as it comes into the first layer; says where it is.
    pub(crate) fn embed(&mut self, tokens: &[u32]) -> Result<Place, RunError> {
        if let Some(tier) = self.gpus.places.embedding {
            self.gpus.of(tier).embedding()?.embed(tokens)?;
            return Ok(Some(tier));
        }
        let hidden = self.spec.hidden;
        let table = self.weights.matrix(self.spec.embedding, self.spec.n_vocab, hidden);
        for (token, row) in tokens.iter().zip(self.scratch.x.chunks_exact_mut(hidden)) {
            if let Some(bytes) = table.row(*token as usize) {
                dequantize_row(table.ty(), bytes, row);
            }
        }
        Ok(None)
    }

    /// Everything of a layer but its routed experts: attention, then the dense block, or the router's choices and the
    /// shared expert. `rows` are those of the batch that it takes, at most a micro-batch, and are at `place`; says where
    /// they are then.
    pub(crate) fn dense_stage(&mut self, index: usize, rows: Range<usize>, place: Place) -> Result<Place, RunError> {
        let at = self.gpus.places.layers[index];
        self.bring(rows.clone(), place, at.mixer)?;
        match at.mixer {
            Some(tier) => {
                let past = self.n_past + rows.start;
                self.gpus.of(tier).mixer(index)?.run(rows.clone(), past, &mut self.ropes)?;
            }
            None => self.mixer_here(index, rows.clone()),
        }
        self.bring(rows.clone(), at.mixer, at.ffn)?;
        let (has_experts, has_shared) = match &self.spec.layers[index].ffn {
            Ffn::Dense(_) => (false, false),
            Ffn::Moe(moe) => (true, moe.shared.is_some()),
        };
        if !has_experts {
            match at.ffn {
                Some(tier) => self.gpus.of(tier).ffn(index)?.run(rows, FfnInput::Raw)?,
                None => self.dense_block_here(index, rows),
            }
            return Ok(at.ffn);
        }
        match at.ffn {
            Some(tier) => self.route_on_gpu(tier, index, rows.clone())?,
            None => self.route_here(index, rows.clone()),
        }
        if !has_shared {
            return Ok(at.ffn);
        }
        self.bring(rows.clone(), at.ffn, at.shared)?;
        match at.shared {
            Some(tier) => {
                let input = if at.ffn == at.shared { FfnInput::Normalized } else { FfnInput::Raw };
                self.gpus.of(tier).ffn(index)?.run(rows, input)?;
            }
            None => self.shared_here(index, rows),
        }
        Ok(at.shared)
    }

    /// Adds what routed experts made of the first `n` tokens to the hidden state, where it is.
    pub(crate) fn add_experts(&mut self, n: usize, place: Place) -> Result<(), RunError> {
        let len = n * self.spec.hidden;
        match place {
            Some(tier) => self.gpus.of(tier).add(&self.scratch.out[..len])?,
            None => self.kernels.add(&mut self.scratch.x[..len], &self.scratch.out[..len]),
        }
        Ok(())
    }

    fn mixer_here(&mut self, index: usize, rows: Range<usize>) {
        let c = Compute { pool: &self.pool, kernels: self.kernels };
        let (spec, weights, s) = (&self.spec, &self.weights, &mut self.scratch);
        let layer = &spec.layers[index];
        let (n, past) = (rows.len(), self.n_past + rows.start);
        let len = n * spec.hidden;
        let x = &mut s.x[rows.start * spec.hidden..][..len];
        for rope in &mut self.ropes {
            rope.prepare(past, n);
        }
        norm_rows(c, x, weights.vector(layer.mixer_norm), spec.norm_eps, &mut s.normed[..len]);
        s.acts.fill_shared(c.pool, c.kernels, n, spec.hidden, &s.normed[..len], self.mixer_quants[index]);
        let input = MixerInput {
            x: s.acts.view(),
            past,
            rope: self.layer_rope[index].map(|at| &self.ropes[at]),
            norm_eps: spec.norm_eps,
        };
        let out = &mut s.out[..len];
        mix(c, weights, &layer.mixer, &input, &mut self.states[index], &mut s.mixer, out);
        c.kernels.add(x, out);
    }

    fn dense_block_here(&mut self, index: usize, rows: Range<usize>) {
        let c = Compute { pool: &self.pool, kernels: self.kernels };
        let (spec, weights, s) = (&self.spec, &self.weights, &mut self.scratch);
        let layer = &spec.layers[index];
        let Ffn::Dense(ffn) = &layer.ffn else { return };
        let len = rows.len() * spec.hidden;
        let x = &mut s.x[rows.start * spec.hidden..][..len];
        norm_rows(c, x, weights.vector(layer.ffn_norm), spec.norm_eps, &mut s.normed[..len]);
        let quantize = [&ffn.gate, &ffn.up].iter().any(|l| needs_quants(weights.ty(l.weight)));
        s.acts.fill_shared(c.pool, c.kernels, rows.len(), spec.hidden, &s.normed[..len], quantize);
        let out = &mut s.out[..len];
        dense_ffn(c, weights, ffn, s.acts.view(), &mut s.ffn, out);
        c.kernels.add(x, out);
    }

    fn route_here(&mut self, index: usize, rows: Range<usize>) {
        let c = Compute { pool: &self.pool, kernels: self.kernels };
        let (spec, weights, s) = (&self.spec, &self.weights, &mut self.scratch);
        let layer = &spec.layers[index];
        let Ffn::Moe(moe) = &layer.ffn else { return };
        let n = rows.len();
        let len = n * spec.hidden;
        let x = &s.x[rows.start * spec.hidden..][..len];
        norm_rows(c, x, weights.vector(layer.ffn_norm), spec.norm_eps, &mut s.normed[..len]);
        // Quantised whatever the router's type: the experts of a single token read the same activations.
        s.acts.fill_shared(c.pool, c.kernels, n, spec.hidden, &s.normed[..len], spec.hidden.is_multiple_of(32));
        let logits = &mut s.router_logits[..n * moe.n_expert];
        matmul_all(c.pool, c.kernels, &[MatJob::new(weights.linear(&moe.router), s.acts.view(), logits)]);
        add_bias(logits, weights.bias(&moe.router));
        let bias = weights.opt_vector(moe.selection_bias);
        let choices = rows.start * moe.n_used..rows.end * moe.n_used;
        let chosen = s.experts[choices.clone()].chunks_exact_mut(moe.n_used);
        let chosen = chosen.zip(s.weights[choices].chunks_exact_mut(moe.n_used));
        for (row, (experts, expert_weights)) in logits.chunks_exact(moe.n_expert).zip(chosen) {
            s.router.route(moe, row, bias, experts, expert_weights);
        }
        s.expert_acts.append(s.acts.view(), self.expert_floats[index]);
    }

    /// A GPU's router: its choices, and what experts on the processor read.
    fn route_on_gpu(&mut self, tier: usize, index: usize, rows: Range<usize>) -> Result<(), RunError> {
        let c = Compute { pool: &self.pool, kernels: self.kernels };
        let (hidden, s) = (self.spec.hidden, &mut self.scratch);
        let Ffn::Moe(moe) = &self.spec.layers[index].ffn else { return Ok(()) };
        let (n, choices) = (rows.len(), rows.start * moe.n_used..rows.end * moe.n_used);
        let router = self.gpus.of(tier).router(index)?;
        let normed = router.route(rows, &mut s.experts[choices.clone()], &mut s.weights[choices])?;
        s.normed[..normed.len()].copy_from_slice(normed);
        s.acts.fill_shared(c.pool, c.kernels, n, hidden, normed, hidden.is_multiple_of(32));
        s.expert_acts.append(s.acts.view(), self.expert_floats[index]);
        Ok(())
    }

    /// The shared expert; its activations are those that the router had.
    fn shared_here(&mut self, index: usize, rows: Range<usize>) {
        let c = Compute { pool: &self.pool, kernels: self.kernels };
        let (spec, weights, s) = (&self.spec, &self.weights, &mut self.scratch);
        let Some(shared) = spec.layers[index].moe().and_then(|moe| moe.shared.as_ref()) else { return };
        let len = rows.len() * spec.hidden;
        let (x, out) = (&mut s.x[rows.start * spec.hidden..][..len], &mut s.out[..len]);
        shared_expert(c, weights, shared, s.acts.view(), &s.normed[..len], &mut s.ffn, out);
        c.kernels.add(x, out);
    }

    /// Logits of the last token of a batch of `n`, or of all.
    pub(crate) fn head(&mut self, n: usize, wanted: Wanted, place: Place) -> Result<(), RunError> {
        let wanted = if wanted == Wanted::All { 0..n } else { n - 1..n };
        let to = self.gpus.places.head;
        self.bring(wanted.clone(), place, to)?;
        let before = self.logits.len();
        self.logits.resize(before + wanted.len() * self.spec.n_vocab, 0.0);
        match to {
            Some(tier) => Ok(self.gpus.of(tier).head()?.run(wanted, &mut self.logits[before..])?),
            None => {
                self.head_here(wanted, before);
                Ok(())
            }
        }
    }

    fn head_here(&mut self, wanted: Range<usize>, mut at: usize) {
        let c = Compute { pool: &self.pool, kernels: self.kernels };
        let (spec, weights, s) = (&self.spec, &self.weights, &mut self.scratch);
        let hidden = spec.hidden;
        let output = weights.matrix(spec.output, spec.n_vocab, hidden);
        for first in wanted.clone().step_by(self.micro_batch) {
            let x = &s.x[first * hidden..wanted.end.min(first + self.micro_batch) * hidden];
            let rows = x.len() / hidden;
            let normed = &mut s.normed[..x.len()];
            norm_rows(c, x, weights.vector(spec.output_norm), spec.norm_eps, normed);
            s.acts.fill_shared(c.pool, c.kernels, rows, hidden, normed, needs_quants(weights.ty(spec.output)));
            let logits = &mut self.logits[at..at + rows * spec.n_vocab];
            matmul_all(c.pool, c.kernels, &[MatJob::new(output, s.acts.view(), logits)]);
            at += rows * spec.n_vocab;
        }
    }

    /// Tells the expert store what the layer after `index` seems to need, where that is of use: of a batch, what its
    /// last tokens need.
    pub(crate) fn look_ahead(
        &mut self,
        index: usize,
        moe_at: usize,
        n: usize,
        batch: bool,
        place: Place,
    ) -> Result<(), RunError> {
        let (Ffn::Moe(_), Some(next)) = (&self.spec.layers[index].ffn, self.spec.layers.get(index + 1)) else {
            return Ok(());
        };
        // The next layer's router must be where the hidden state is.
        let there = self.gpus.places.layers[index + 1].ffn == place;
        if !matches!(next.ffn, Ffn::Moe(_)) || !there {
            return Ok(());
        }
        let of_use = self.experts.wants_guess(batch);
        if !of_use && (batch || !self.scores_guesses) {
            return Ok(());
        }
        let c = Compute { pool: &self.pool, kernels: self.kernels };
        let s = &mut self.scratch;
        let hidden = self.spec.hidden;
        let rows = n.min(self.micro_batch);
        if !batch {
            s.foresight.will_be_scored(moe_at + 1);
        }
        if let Some(tier) = place {
            let router = self.gpus.of(tier).router(index + 1)?;
            let guess = s.foresight.guess_of(|experts| router.predict(n - rows..n, experts), next)?;
            if of_use {
                self.experts.expect(moe_at + 1, guess, batch);
            }
            return Ok(());
        }
        let (x, len) = (&s.x[(n - rows) * hidden..n * hidden], rows * hidden);
        // What experts add up is not there yet, so its buffer is free.
        norm_rows(c, x, self.weights.vector(next.ffn_norm), self.spec.norm_eps, &mut s.out[..len]);
        let guess = s.foresight.guess(c, &self.weights, next, &s.out[..len], &mut s.router_logits);
        if of_use {
            self.experts.expect(moe_at + 1, guess, batch);
        }
        Ok(())
    }

    /// Counts how many of the guessed experts of a decoded token's layer it chose.
    pub(crate) fn score_guess(&mut self, at: usize, index: usize) {
        let Ffn::Moe(moe) = &self.spec.layers[index].ffn else { return };
        if let Some((guessed, right)) = self.scratch.foresight.score(at, &self.scratch.experts[..moe.n_used]) {
            self.counters.layers[at].guessed += guessed;
            self.counters.layers[at].guessed_right += right;
        }
    }
}

pub(crate) fn norm_rows(c: Compute<'_>, x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let width = weight.len();
    c.pool.for_each_slice(out, width, |row, out| c.kernels.rms_norm(&x[row * width..][..width], weight, eps, out));
}
