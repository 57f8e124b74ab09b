//! Guessing which experts the next layer will use: its router, asked about the hidden state before this layer's experts
//! have been added to it.

use super::cpu_context::{CpuContext, add_bias};
use super::router::Router;
use super::weights::DenseWeights;
use tier_plan_formats::model::spec::{Ffn, LayerSpec};
use tier_plan_kernels::Activations;
use tier_plan_kernels::pooled::{MatJob, matmul_all};

/// Buffers of the guess.
#[derive(Default)]
pub(crate) struct RouterPredictor {
    acts: Activations,
    router: Router,
    /// `[tokens, n_used]`.
    experts: Vec<u16>,
    weights: Vec<f32>,
    /// `[n_expert]`.
    seen: Vec<bool>,
    /// The layer with routed experts that a guess for one token is of, by position, until it is scored.
    of: Option<usize>,
}

impl RouterPredictor {
    /// Buffers for batches of up to `rows` tokens.
    pub(crate) fn new(rows: usize, hidden: usize) -> Self {
        Self { acts: Activations::new(rows, hidden), ..Self::default() }
    }

    /// Remembers that the guess to come is for a token alone, in the layer `at` among those with routed experts.
    pub(crate) fn will_be_scored(&mut self, at: usize) {
        self.of = Some(at);
    }

    /// If the last guess was of this layer, how many experts it named and how many of them were `chosen`.
    pub(crate) fn score(&mut self, at: usize, chosen: &[u16]) -> Option<(u64, u64)> {
        self.of.take_if(|of| *of == at)?;
        let right = self.experts.iter().filter(|e| chosen.contains(e)).count();
        Some((self.experts.len() as u64, right as u64))
    }

    /// The experts that `next` would choose for the hidden states that `normed` has become by its norm, `[tokens, hidden]`:
    /// of one token in the router's order, of more in ascending order, each once. `logits` is scratch.
    pub(crate) fn guess(
        &mut self,
        c: CpuContext<'_>,
        weights: &DenseWeights,
        next: &LayerSpec,
        normed: &[f32],
        logits: &mut [f32],
    ) -> impl Iterator<Item = u32> + '_ {
        self.seen.clear();
        self.experts.clear();
        if let Ffn::Moe(moe) = &next.ffn {
            let hidden = moe.router.n_in;
            let n = normed.len() / hidden;
            // As the layer itself will do it.
            self.acts.fill(c.kernels, n, hidden, normed, hidden.is_multiple_of(32));
            let logits = &mut logits[..n * moe.n_expert];
            matmul_all(c.pool, c.kernels, &[MatJob::new(weights.linear(&moe.router), self.acts.view(), logits)]);
            add_bias(logits, weights.bias(&moe.router));
            self.experts.resize(n * moe.n_used, 0);
            self.weights.resize(n * moe.n_used, 0.0);
            let bias = weights.opt_vector(moe.selection_bias);
            let chosen = self.experts.chunks_exact_mut(moe.n_used).zip(self.weights.chunks_exact_mut(moe.n_used));
            for (row, (experts, weights)) in logits.chunks_exact(moe.n_expert).zip(chosen) {
                self.router.route(moe, row, bias, experts, weights);
            }
            self.see(n, moe.n_expert);
        }
        self.guessed()
    }

    /// [`guess`](Self::guess) where `ask` gives the choices of all tokens, `[tokens, n_used]`.
    pub(crate) fn guess_of<E>(
        &mut self,
        ask: impl FnOnce(&mut Vec<u16>) -> Result<(), E>,
        next: &LayerSpec,
    ) -> Result<impl Iterator<Item = u32> + '_, E> {
        self.seen.clear();
        self.experts.clear();
        ask(&mut self.experts)?;
        if let Some(moe) = next.moe() {
            self.see(self.experts.len() / moe.n_used.max(1), moe.n_expert);
        }
        Ok(self.guessed())
    }

    /// Notes which experts are among the choices of several tokens.
    fn see(&mut self, n: usize, n_expert: usize) {
        if n > 1 {
            self.seen.resize(n_expert, false);
            self.experts.iter().for_each(|e| self.seen[usize::from(*e)] = true);
        }
    }

    fn guessed(&self) -> impl Iterator<Item = u32> + '_ {
        let batch = self.seen.iter().enumerate().filter(|(_, seen)| **seen).map(|(e, _)| e as u32);
        let token = if self.seen.is_empty() { &self.experts[..] } else { &[] };
        token.iter().map(|e| u32::from(*e)).chain(batch)
    }
}
