//! Making an engine from a model and a plan.

use super::Engine;
use super::backend::{Backends, Buffers, Processors};
use super::batch::{Choices, Output};
use super::cpu::Cpu;
use super::experts::Experts;
use super::meter::Meter;
use super::predictor::RouterPredictor;
use super::rearrange::Rearrangement;
use super::sequences::Sequences;
use crate::error::LoadError;
use crate::gpu::devices::GiveDevice;
use crate::gpu::rows::{GpuRows, gpu_row_values, gpu_rows};
use crate::gpu::{Gpus, KeptByLayers, full_gpu_tier};
use crate::layers::places::Places;
use crate::load::{Loaded, load};
use crate::moe::offload::{StreamSetup, Streams};
use crate::options::{LoadOptions, Progress, batches};
use std::sync::Arc;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::model::Model;
use tier_plan_formats::model::spec::{Ffn, LayerSpec};
use tier_plan_formats::placement::Placement;
use tier_plan_kernels::threads::{ThreadPool, physical_cores};
use tier_plan_kernels::{Kernels, needs_quants};

impl Engine {
    /// Loads a model as `plan` says. `progress` is told how many bytes of how many are in place.
    ///
    /// # Errors
    /// When the plan is for another model, contradicts itself or does not fit; when memory or the
    /// file fail.
    pub fn load(
        gguf: Arc<Gguf>,
        plan: &Placement,
        options: &LoadOptions,
        progress: Progress<'_>,
    ) -> Result<Self, LoadError> {
        Self::load_on(gguf, plan, options, None, progress)
    }

    /// [`load`](Self::load) with other devices in the place of the plan's GPUs: `give` is asked for
    /// each by its number.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_on(
        gguf: Arc<Gguf>,
        plan: &Placement,
        options: &LoadOptions,
        give: Option<GiveDevice<'_>>,
        progress: Progress<'_>,
    ) -> Result<Self, LoadError> {
        let kernels = Kernels::from_env()?;
        let model = Model::from_gguf(gguf)?;
        let (spec, shape) = (model.spec(), model.shape());
        let plan = &plan.clone().with_tables_of(shape);
        let Loaded {
            weights,
            experts: mut store,
            devices,
            mut memory,
        } = load(&model, plan, options, give, kernels, progress)?;
        store.cancel = options.cancel.clone();
        let places = Places::new(plan, spec.layers.len());
        let sequences = Sequences::new(spec, plan, &places, &weights, &devices)?;
        for (bytes, tier) in sequences.bytes().zip(plan.cache_tiers(spec.layers.len())) {
            memory.resident_bytes[tier] += bytes;
        }
        let fully_on_gpu = full_gpu_tier(plan, shape, &places);
        let gpus = Gpus::new(
            spec,
            plan,
            options,
            &weights,
            &devices,
            places,
            KeptByLayers {
                caches: &sequences.cache.layers,
                ropes: &sequences.cache.rotations.of_layer,
                tables: &sequences.cache.rotations.tables,
            },
        )?;
        let mut pool = match &options.shards {
            Some(shards) => shards.pool(options.threads),
            None => ThreadPool::new(options.threads.unwrap_or_else(physical_cores)),
        };
        pool.give_up_when(options.cancel.flag());
        let (batch, micro_batch) = batches(options, plan.room());
        let streams = Streams::new(&StreamSetup {
            spec,
            shape,
            plan,
            options,
            devices: &devices,
            places: &gpus.places,
            batch,
            rows: micro_batch,
            pool: &pool,
            store: &store,
        })?;
        let floats = |layer: &LayerSpec| match &layer.ffn {
            // A GPU quantizes them itself.
            Ffn::Moe(_) if store.n_gpus() > 0 || streams.any() => true,
            Ffn::Moe(moe) => moe
                .expert_linears()
                .any(|l| !needs_quants(weights.ty(l.weight))),
            Ffn::Dense(_) | Ffn::None => false,
        };
        let expert_floats = spec.layers.iter().map(floats).collect();
        let gpu_rows = if store.n_gpus() > 0 {
            GpuRows::new(gpu_rows(spec), gpu_row_values(spec))
        } else {
            GpuRows::default()
        };
        let cpu = Cpu::new(spec, weights, batch, micro_batch);
        let buffers = Buffers::new(spec, batch, micro_batch);
        let predictor = RouterPredictor::default();
        Ok(Self {
            meter: Meter::new(&model, plan, &options.cancel),
            cancel: options.cancel.clone(),
            plan: plan.clone(),
            backends: Backends {
                pool,
                kernels,
                processors: Processors { cpu, gpus },
                buffers,
                expert_floats,
            },
            experts: Experts {
                store,
                streams,
                gpu_rows,
                predictor,
                scores_predictions: false,
            },
            sequences,
            own: None,
            output: Output::default(),
            choices: Choices::new(model.spec()),
            memory,
            batch,
            fully_on_gpu,
            rearrangement: Rearrangement::default(),
            model,
        })
    }
}
