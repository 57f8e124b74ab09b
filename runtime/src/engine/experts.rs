//! The routed experts of a pass: running a layer's, and prefetching what the next layer is
//! predicted to use.

use super::backend::{Backends, TextRows};
use super::batch::Batch;
use super::predictor::RouterPredictor;
use crate::error::RunError;
use crate::experts::prefetch::Foresight;
use crate::experts::store::{ExpertStore, Step};
use crate::gpu::rows::GpuRows;
use crate::layers::cpu_context::CpuContext;
use crate::layers::index::{Layer, MoeLayer};
use crate::layers::places::Place;
use crate::moe::MoeRun;
use crate::moe::offload::Streams;
use crate::moe::routing::BatchRouting;
use crate::tiers::pace::StageBytes;
use tier_plan_formats::model::spec::ModelSpec;

/// The routed experts of all layers.
pub(crate) struct Experts {
    /// GPUs that experts of main memory are streamed to for prompts. They are dropped before the store,
    /// whose memory they may be reading.
    pub(crate) streams: Streams,
    pub(crate) store: ExpertStore,
    /// Rows on their way to GPUs that have experts, and back.
    pub(crate) gpu_rows: GpuRows,
    pub(crate) predictor: RouterPredictor,
    /// Whether decoded tokens' predictions are scored even where nothing is prefetched.
    pub(crate) scores_predictions: bool,
}

impl Experts {
    /// Computes the experts that a layer's router chose for a batch, into `out` of the shared
    /// buffers. Counts in `computed` the bytes that are read of each tier.
    ///
    /// # Errors
    /// When an expert can't be read, or a GPU fails.
    pub(crate) fn run(
        &mut self,
        layer: MoeLayer<'_>,
        batch: &Batch,
        backends: &mut Backends,
        computed: &mut StageBytes,
    ) -> Result<Step, RunError> {
        let Backends {
            pool,
            kernels,
            processors,
            buffers,
            ..
        } = backends;
        let (n_used, hidden) = (layer.spec.n_used, layer.spec.expert_width());
        let choices = batch.len() * n_used;
        computed.clear();
        let out = match layer.spec.latent {
            Some(_) => &mut buffers.latent,
            None => &mut buffers.out,
        };
        let run = MoeRun {
            cpu: CpuContext {
                pool,
                kernels: *kernels,
            },
            store: &mut self.store,
            layer,
            x: buffers.expert_acts.view(),
            routing: BatchRouting {
                experts: &buffers.experts[..choices],
                weights: &buffers.weights[..choices],
                n_used,
            },
            scratch: &mut processors.cpu.ffn,
            gpu_rows: &mut self.gpu_rows,
            streams: &mut self.streams,
            out: &mut out[..batch.len() * hidden],
            computed,
        };
        if batch.single {
            run.token()
        } else {
            run.batch()
        }
    }

    /// Compares a decoded token's prediction for a layer with what its router chose: returns how
    /// many experts were predicted, and how many of them were chosen.
    pub(crate) fn score(&mut self, layer: MoeLayer<'_>, backends: &Backends) -> Option<(u64, u64)> {
        self.predictor
            .score(layer.index, &backends.buffers.experts[..layer.spec.n_used])
    }

    /// Starts to read the experts of the next layer where tokens alone choose them, and those of a
    /// layer of which no router was asked where a batch will use most of them.
    ///
    /// # Errors
    /// When a GPU fails.
    pub(crate) fn read_known(
        &mut self,
        spec: &ModelSpec,
        next: Layer<'_>,
        on: TextRows<'_>,
        place: Place,
        backends: &mut Backends,
    ) -> Result<(), RunError> {
        if next.chooses_by_token() {
            self.prefetch(spec, next, on, place, backends)?;
            self.store.start_predicted();
        } else if let Some(moe) = next.moe.filter(|_| !on.batch.single) {
            let (layer, n_used) = (moe.index.get(), moe.spec.n_used);
            self.store.read_most(layer, n_used, on.batch.len());
        }
        Ok(())
    }

    /// Predicts the experts of the layer after `layer`, and has the store prefetch them while
    /// nothing that is needed is being read. A batch is predicted by its last tokens.
    ///
    /// # Errors
    /// When a GPU fails.
    pub(crate) fn prefetch(
        &mut self,
        spec: &ModelSpec,
        next: Layer<'_>,
        on: TextRows<'_>,
        place: Place,
        backends: &mut Backends,
    ) -> Result<(), RunError> {
        let batch = on.batch;
        let Some(moe) = next.moe.filter(|_| backends.can_predict(next, place)) else {
            return Ok(());
        };
        let is_exact = next.chooses_by_token();
        let wanted = if is_exact {
            self.store.can_prefetch()
        } else {
            self.store.wants_prediction(!batch.single)
        };
        let scored = batch.single && self.scores_predictions;
        if !wanted && !scored {
            return Ok(());
        }
        if batch.single {
            self.predictor.will_be_scored(moe.index);
        }
        let n = batch.len();
        let rows = n - n.min(backends.buffers.micro_batch)..n;
        backends.predict(spec, next, rows, on, self.predictor.begin())?;
        if wanted {
            let predicted = self.predictor.predicted(moe.spec.n_used, moe.spec.n_expert);
            let from = match is_exact {
                true => Foresight::Exact,
                false => Foresight::of_router(!batch.single),
            };
            self.store.predict(moe.index.get(), predicted, from);
        }
        Ok(())
    }
}
