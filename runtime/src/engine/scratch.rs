//! The buffers of a pass.

use crate::layers::mixer::MixerScratch;
use crate::layers::prefetch_router::RouterPredictor;
use crate::layers::router::Router;
use crate::moe::FfnScratch;
use crate::tiers::pace::StageBytes;
use tier_plan_formats::model::spec::{Ffn, ModelSpec};
use tier_plan_kernels::Activations;

/// Buffers of a pass: those of a batch, and those of a micro-batch.
pub(crate) struct Scratch {
    /// `[batch, hidden]` the hidden state.
    pub(crate) x: Vec<f32>,
    /// `[batch, hidden]` what is added to it.
    pub(crate) out: Vec<f32>,
    /// `[batch, hidden]` what the routed experts read.
    pub(crate) expert_acts: Activations,
    /// `[batch, n_used]`.
    pub(crate) experts: Vec<u16>,
    /// `[batch, n_used]`.
    pub(crate) weights: Vec<f32>,
    /// `[micro-batch, hidden]`, and so on.
    pub(crate) normed: Vec<f32>,
    pub(crate) acts: Activations,
    pub(crate) router_logits: Vec<f32>,
    pub(crate) router: Router,
    pub(crate) foresight: RouterPredictor,
    pub(crate) mixer: MixerScratch,
    pub(crate) ffn: FfnScratch,
    pub(crate) computed: StageBytes,
}

impl Scratch {
    pub(crate) fn new(spec: &ModelSpec, batch: usize, micro_batch: usize, n_tiers: usize) -> Self {
        let hidden = spec.hidden;
        let mut mixer = MixerScratch::default();
        let (mut ffn, mut n_expert, mut n_used) = (0, 0, 1);
        for layer in &spec.layers {
            mixer.reserve(micro_batch, &layer.mixer);
            match &layer.ffn {
                Ffn::Dense(f) => ffn = ffn.max(f.gate.n_out),
                Ffn::Moe(m) => {
                    ffn = ffn.max(m.expert_ffn).max(m.shared.map_or(0, |shared| shared.ffn.gate.n_out));
                    n_expert = n_expert.max(m.n_expert);
                    n_used = n_used.max(m.n_used);
                }
            }
        }
        Self {
            x: vec![0.0; batch * hidden],
            out: vec![0.0; batch * hidden],
            expert_acts: Activations::new(batch, hidden),
            experts: vec![0; batch * n_used],
            weights: vec![0.0; batch * n_used],
            normed: vec![0.0; micro_batch * hidden],
            acts: Activations::new(micro_batch, hidden),
            router_logits: vec![0.0; micro_batch * n_expert],
            router: Router::default(),
            foresight: RouterPredictor::new(micro_batch, hidden),
            mixer,
            ffn: FfnScratch::new(micro_batch, hidden, ffn, n_used),
            computed: StageBytes::new(n_tiers),
        }
    }
}
