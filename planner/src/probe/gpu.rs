//! Measures GPUs: their memory under the kernels that will run, and the link to the host.

use super::power::Part;
use super::{RESERVE_DIVISOR, rounded};
use crate::bundled;
use crate::interrupt::interrupted;
use std::sync::Arc;
use std::time::Duration;
use tier_plan_runtime::cuda::experts::ExpertKind;
use tier_plan_runtime::cuda::nvml::Nvml;
use tier_plan_runtime::cuda::{CudaError, Device, Gpu};
use tier_plan_runtime::formats::machine::{Accelerator, Link, Tier, TierKind};
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::spec::{ModelSpec, MoeSpec};
use tier_plan_runtime::quant::TensorType;
use tier_plan_runtime::units::show_bytes;
use tier_plan_selftest::gpu_rates::{
    Contended, Experts, Rates, Subject, common_experts, contended, experts, matvec_gbps,
    measure_rates,
};
use tier_plan_selftest::speed::{Effort, Setup, Timed, time};

/// Tokens that measure fixed times.
const LAYERS: Effort = Effort {
    prompt: 1,
    decode: 160,
    warm: 8,
    rounds: 3,
    limit: Duration::from_secs(2),
};

/// The work that a GPU is measured with.
#[derive(Debug, Clone)]
pub struct Work {
    /// Formats with their share of the bytes per token.
    pub formats: Vec<(TensorType, f64)>,
    /// The experts that the GPU would compute, and how many of them one token uses.
    pub experts: (ExpertKind, usize),
    /// Human-readable description of the work.
    pub of: String,
}

impl Work {
    /// Returns the work to measure where no model is known: Q4_K experts of a common size.
    pub fn common() -> Self {
        Self {
            formats: vec![(TensorType::Q4_K, 1.0)],
            experts: common_experts(),
            of: "Q4_K".into(),
        }
    }

    /// Returns the work of a model whose bytes per token have the shares `formats`.
    pub fn of_model(gguf: &Gguf, spec: &ModelSpec, formats: &[(TensorType, f64)]) -> Self {
        let experts = spec
            .moe_layers()
            .next()
            .map(|(_, moe)| (kind(gguf, moe), moe.n_used));
        Self {
            formats: formats.to_vec(),
            experts: experts.unwrap_or_else(common_experts),
            of: format!("the formats that a token of {} reads", gguf.id().name),
        }
    }
}

fn kind(gguf: &Gguf, moe: &MoeSpec) -> ExpertKind {
    let types: Vec<TensorType> = moe
        .expert_linears()
        .map(|l| gguf.tensors()[l.weight].ty)
        .collect();
    // Gate and up may be one matrix.
    let first = types.first().copied().unwrap_or(TensorType::F32);
    let last = types.last().copied().unwrap_or(first);
    ExpertKind {
        n_expert: moe.n_expert,
        hidden: moe.expert_width(),
        ffn: moe.expert_ffn,
        gate: moe.has_gate().then_some(first),
        up: if types.len() > 2 { types[1] } else { first },
        down: last,
        activation: moe.activation,
        weigh_input: moe.weigh_input,
    }
}

/// What one GPU delivers.
#[derive(Debug, Clone, PartialEq)]
pub struct GpuRate {
    /// Product name.
    pub name: String,
    /// The driver's device number.
    pub device: u32,
    /// Whether the GPU is emulated by the CPU.
    pub emulated: bool,
    /// Bytes of VRAM.
    pub total_bytes: u64,
    /// Bytes of VRAM that were free before anything was measured.
    pub free_bytes: u64,
    /// Launch time, round trip, and bare rates.
    pub rates: Rates,
    /// Rates of the link while main memory is read; `beside` is the CPU's rate meanwhile, in 10⁹
    /// bytes per second.
    pub contended: Contended,
    /// Matvec rate per format, in 10⁹ bytes per second.
    pub products: Vec<(TensorType, f64)>,
    /// Mean of the matvec rates, weighted by each format's share.
    pub compute_gbps: f64,
    /// Times of one token's experts, if a few experts fit the measurement's memory.
    pub experts: Option<Experts>,
    /// Fixed times per layer, or why they were not measured.
    pub layers: Result<Layers, String>,
    /// Human-readable description of the work.
    pub of: String,
    /// Power limit.
    pub power: Part,
}

/// Fixed times of layers on a GPU. The bundled model is used, because its bytes hardly count.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Layers {
    /// Extra time of a dense stage on the GPU compared with the CPU, in microseconds: launches, and
    /// the router's choices on their way back.
    pub layer_us: f64,
    /// Time per token with the whole model on the GPU, less its bytes at the GPU's rate, in
    /// microseconds.
    pub resident_token_us: f64,
    /// Layers of the bundled model.
    pub n_layer: u32,
}

impl Layers {
    /// Compares the same tokens on three placements: the model fully on a GPU that reads at
    /// `gpu_gbps`, with experts in main memory, and without a GPU.
    fn new(resident: &Timed, hybrid: &Timed, processor: &Timed, gpu_gbps: f64) -> Self {
        let n_layer = resident.layers.max(1);
        let more_s = (hybrid.dense_s - processor.dense_s) / f64::from(n_layer);
        let bytes = resident.token_bytes + resident.cache_bytes as f64;
        Self {
            layer_us: (more_s * 1e6).max(0.0),
            resident_token_us: (resident.token_s * 1e6 - bytes / gpu_gbps.max(1e-9) / 1e3).max(0.0),
            n_layer,
        }
    }

    fn measure(device: &Arc<dyn Device>, gpu_gbps: f64) -> Result<Self, String> {
        let model = || -> anyhow::Result<Arc<Gguf>> {
            Ok(Arc::new(Gguf::open(&bundled::path("demo/demo.gguf")?)?))
        };
        let gguf = model().map_err(|error| format!("{error:#}"))?;
        let timed =
            |place| time(&gguf, place, LAYERS, &interrupted).map_err(|error| error.to_string());
        let (resident, hybrid) = (
            timed(Setup::FullyOnGpu(device))?,
            timed(Setup::ExpertsInMemory(device))?,
        );
        Ok(Self::new(&resident, &hybrid, &timed(Setup::Cpu)?, gpu_gbps))
    }
}

/// The GPUs of this machine.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Gpus {
    /// Measured GPUs.
    pub found: Vec<GpuRate>,
    /// Why there is no GPU, or why one was skipped.
    pub missing: Vec<String>,
}

/// Measures every GPU. `beside` runs one pass over main memory and returns its rate in 10⁹ bytes
/// per second.
pub fn measure_all(work: &Work, beside: &mut dyn FnMut() -> f64) -> Gpus {
    let (mut gpus, nvml) = (Gpus::default(), Nvml::find());
    for ordinal in 0.. {
        let gpu = match Gpu::open(ordinal) {
            Ok(gpu) => gpu,
            // The end of the list. Only a machine without any GPU reports this as missing.
            Err(CudaError::NoDevice { .. }) if ordinal > 0 => break,
            Err(
                error @ (CudaError::NoDriver
                | CudaError::StubDriver
                | CudaError::OldDriver { .. }
                | CudaError::NoDevice { .. }),
            ) => {
                gpus.missing.push(error.to_string());
                break;
            }
            Err(error) => {
                gpus.missing
                    .push(format!("GPU {ordinal} was left out: {error}"));
                // A failed driver call may fail for every following device too.
                if matches!(error, CudaError::Call { .. }) {
                    break;
                } else {
                    continue;
                }
            }
        };
        match measure_gpu(&gpu, &nvml, work, beside) {
            Ok(found) => gpus.found.push(found),
            Err(error) => gpus.missing.push(format!(
                "GPU {ordinal} ({}) was left out: {error}",
                gpu.properties().name
            )),
        }
    }
    gpus
}

fn measure_gpu(
    gpu: &Arc<Gpu>,
    nvml: &Result<Nvml, CudaError>,
    work: &Work,
    beside: &mut dyn FnMut() -> f64,
) -> Result<GpuRate, CudaError> {
    let p = gpu.properties();
    // Free memory is read first, so that it includes only what the driver itself takes for this
    // process.
    let free_bytes = gpu.free_bytes()? as u64;
    let power = match nvml {
        Ok(nvml) => gpu
            .pci()
            .and_then(|pci| nvml.read(&pci))
            .map(|reading| reading.limit_watts),
        Err(error) => Err(CudaError::Call {
            device: p.name.clone(),
            what: "asking for its power limit".into(),
            why: error.to_string(),
        }),
    };
    let power = match power {
        Ok(watts) => {
            let how = if watts.is_some() {
                "limit read from the driver"
            } else {
                "the driver knows no limit"
            };
            Part {
                name: p.name.clone(),
                watts,
                how: how.into(),
            }
        }
        Err(error) => Part {
            name: p.name.clone(),
            watts: None,
            how: error.to_string(),
        },
    };
    let device = u32::try_from(p.ordinal).unwrap_or(u32::MAX);
    let about = About {
        name: p.name.clone(),
        device,
        emulated: false,
        total_bytes: p.total_bytes as u64,
        free_bytes,
    };
    let mut found = measure(&mut Subject::of(gpu)?, about, power, work, beside)?;
    found.layers = Layers::measure(&(Arc::clone(gpu) as Arc<dyn Device>), found.compute_gbps);
    Ok(found)
}

/// Properties of a device that are known before it is measured.
struct About {
    name: String,
    device: u32,
    emulated: bool,
    total_bytes: u64,
    free_bytes: u64,
}

fn measure(
    subject: &mut Subject,
    about: About,
    power: Part,
    work: &Work,
    beside: &mut dyn FnMut() -> f64,
) -> Result<GpuRate, CudaError> {
    let rates = measure_rates(subject)?;
    let mut products = Vec::new();
    for (ty, _) in &work.formats {
        products.push((*ty, matvec_gbps(subject, *ty)?));
    }
    let seconds: f64 = work
        .formats
        .iter()
        .zip(&products)
        .map(|((_, share), (_, rate))| share / rate.max(1e-9))
        .sum();
    let shares: f64 = work.formats.iter().map(|(_, share)| share).sum();
    let (kind, used) = work.experts;
    let experts = experts(subject, kind, used)?;
    let contended = contended(subject, beside)?;
    let About {
        name,
        device,
        emulated,
        total_bytes,
        free_bytes,
    } = about;
    Ok(GpuRate {
        name,
        device,
        emulated,
        total_bytes,
        free_bytes,
        rates,
        contended,
        products,
        compute_gbps: if shares > 0.0 {
            shares / seconds.max(1e-12)
        } else {
            rates.read_gbps
        },
        experts,
        layers: Err("only a GPU of this machine computes a whole model".into()),
        of: work.of.clone(),
        power,
    })
}

impl GpuRate {
    /// Returns the bytes that a plan may use: free memory less a reserve for kernels and their
    /// buffers.
    pub fn capacity_bytes(&self) -> u64 {
        // The reserve is half of main memory's, since no other programs and no page cache live
        // there.
        let kept = self.total_bytes / (2 * RESERVE_DIVISOR);
        self.free_bytes.saturating_sub(kept) >> 20 << 20
    }

    /// Returns the time of a token's experts less their bytes at the GPU's rate, in microseconds,
    /// and at least one round trip.
    pub fn latency_us(&self) -> f64 {
        let beyond = |e: &Experts| {
            e.token_us - (e.used * e.expert_bytes) as f64 / self.compute_gbps.max(1e-9) / 1e3
        };
        self.experts
            .as_ref()
            .map_or(0.0, beyond)
            .max(self.rates.round_trip_us)
    }

    /// Returns fixed times and link rate for the machine file; `token_us` is the CPU's fixed time
    /// per token.
    fn accelerator(&self, token_us: f64) -> Accelerator {
        let layers = self.layers.as_ref().ok().filter(|_| !self.emulated);
        let resident =
            |l: &Layers| (l.resident_token_us - token_us).max(0.0) / f64::from(l.n_layer.max(1));
        Accelerator {
            // Slots are filled from memory that the GPU does not read by itself.
            link_gbps: Some(rounded(self.rates.to_device.pageable_gbps)),
            layer_us: layers.map(|l| rounded(l.layer_us)),
            resident_layer_us: layers.map(|l| rounded(resident(l))),
        }
    }

    /// Describes the GPU's memory as a tier; `token_us` is the CPU's fixed time per token.
    pub fn tier(&self, name: String, token_us: f64, day: &str) -> Tier {
        let who = if self.emulated {
            format!("{}, which is emulated", self.name)
        } else {
            self.name.clone()
        };
        Tier {
            name,
            kind: TierKind::Vram,
            capacity_bytes: self.capacity_bytes(),
            read_gbps: rounded(self.compute_gbps),
            latency_us: rounded(self.latency_us()),
            emulated: self.emulated,
            unit: Some(self.device),
            accelerator: self.accelerator(token_us),
            source: format!(
                "measured {day} on {who}: matvecs of {}; bare reads {:.1} GB/s; latency: a token's experts, beyond their \
                 bytes; a launch {:.1} µs, there and back {:.1} µs; capacity: {} free of {}, less 1/{}",
                self.of,
                self.rates.read_gbps,
                self.rates.launch_us,
                self.rates.round_trip_us,
                show_bytes(self.free_bytes),
                show_bytes(self.total_bytes),
                2 * RESERVE_DIVISOR
            ),
        }
    }

    /// Describes the link for the machine file, where main memory has `dram_gbps` without transfers.
    pub fn link(&self, dram_gbps: f64) -> Link {
        let (to, from) = (self.rates.to_device, self.rates.from_device);
        Link {
            to_gbps: rounded(to.pinned_gbps),
            to_pageable_gbps: rounded(to.pageable_gbps),
            from_gbps: rounded(from.pinned_gbps),
            from_pageable_gbps: rounded(from.pageable_gbps),
            contended_gbps: rounded(self.contended.to_device_gbps),
            dram_contended_gbps: rounded(dram_gbps * self.contended.kept()),
        }
    }
}
