//! Feed-forward blocks: dense ones, and the routed experts of a layer for one token or for a batch.
//!
//! A layer's experts are in up to three places. The CPU computes those in main memory, and those
//! that are read from a drive once they arrive. A GPU computes those that lie in its memory. For
//! prompts, and for single tokens where a plan says so, a GPU also takes experts of main memory that are
//! streamed to it. All work at the same time; sums have a fixed order, so that no plan changes a result.

mod batch;
mod cpu;
mod experts;
pub(crate) mod ffn;
pub(crate) mod gpu;
pub(crate) mod offload;
pub(crate) mod routing;
mod token;

use crate::error::RunError;
use crate::experts::store::{ExpertStore, Step};
use crate::gpu::rows::GpuRows;
use crate::layers::cpu_context::CpuContext;
use crate::layers::index::MoeLayer;
use crate::tiers::pace::StageBytes;
use ffn::FfnScratch;
use offload::Streams;
use routing::{BatchRouting, TokensByExpert};
use tier_plan_formats::placement::TierIdx;
use tier_plan_kernels::ActView;

/// The routed experts of one layer, for the tokens of a batch.
pub(crate) struct MoeRun<'a> {
    pub(crate) cpu: CpuContext<'a>,
    pub(crate) store: &'a mut ExpertStore,
    pub(crate) layer: MoeLayer<'a>,
    /// `[tokens, hidden]`: normed rows.
    pub(crate) x: ActView<'a>,
    pub(crate) routing: BatchRouting<'a>,
    pub(crate) scratch: &'a mut FfnScratch,
    /// Rows on their way to GPUs that have experts, and back.
    pub(crate) gpu_rows: &'a mut GpuRows,
    /// GPUs that experts of main memory are streamed to for prompts.
    pub(crate) streams: &'a mut Streams,
    /// `[tokens, hidden]`: weighted sums of the experts.
    pub(crate) out: &'a mut [f32],
    /// Bytes of the experts that were computed, by the tier that they were read from.
    pub(crate) computed: &'a mut StageBytes,
}

impl MoeRun<'_> {
    /// Computes the experts of a single token.
    ///
    /// # Errors
    /// When an expert can't be read, or a GPU fails.
    pub(crate) fn token(self) -> Result<Step, RunError> {
        token::run(self)
    }

    /// Groups a batch's tokens by expert, and begins the layer's step with all experts that any chose.
    fn begin(&mut self) -> (TokensByExpert, Step) {
        let (layer, routing) = (self.layer.index.get(), self.routing);
        let tokens = TokensByExpert::new(&routing, self.layer.spec.n_expert);
        routing
            .experts
            .chunks_exact(routing.n_used.max(1))
            .for_each(|chosen| self.store.note(layer, chosen));
        let by_last_use = tokens.by_last_use(&routing);
        let step = self.store.begin(layer, &by_last_use, tokens.present());
        (tokens, step)
    }

    /// Computes the experts of a batch, each once for all tokens that chose it.
    ///
    /// # Errors
    /// As [`token`](Self::token).
    pub(crate) fn batch(mut self) -> Result<Step, RunError> {
        if !self.store.has_experts_on_gpus() && !self.streams.any() {
            cpu::run(&mut self)
        } else {
            batch::run(&mut self)
        }
    }

    /// Counts an expert that is computed from `tier`.
    fn count(&mut self, tier: TierIdx) {
        self.computed
            .add(tier, self.store.expert_bytes(self.layer.index.get()));
    }
}
