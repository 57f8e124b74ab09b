//! Measures the rates of a device: memory, link, launches, matvecs by format, and routed experts.
//!
//! Rates in GB/s are 10⁹ bytes per second.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tier_plan_cuda::device::{Buffer, Device, View};
use tier_plan_cuda::experts::{ExpertBytes, ExpertKind, PinnedExperts, Place, RequestedExperts};
use tier_plan_cuda::gpu::{Pinned, Properties};
use tier_plan_cuda::ops::{Input, Matrices, MatrixTable, Matvec, Quants};
use tier_plan_cuda::{CudaError, Gpu, Ops};
use tier_plan_kernels::quant::TensorType;

/// Width of the hidden state of the experts that are measured.
const HIDDEN: usize = 2048;

/// Width between their matrices.
const FFN: usize = 768;

/// Tokens per expert in a batch, the same as for the CPU's measurement.
const BATCH_TOKENS: usize = 32;

/// Extent of a measurement.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Bytes moved for a rate: more than the device's caches hold.
    pub bytes: usize,
    /// Timed passes per figure, after one that is not timed.
    pub passes: usize,
    /// Launches per figure.
    pub launches: usize,
    /// Tokens' experts per figure.
    pub stages: usize,
}

impl Effort {
    /// Extent for any GPU.
    pub const FULL: Effort = Effort {
        bytes: 256 << 20,
        passes: 5,
        launches: 1000,
        stages: 200,
    };

    /// Returns the extent for a GPU: fewer bytes if they are still many times its cache.
    pub fn of(gpu: &Properties) -> Effort {
        let bytes = gpu
            .l2_bytes
            .saturating_mul(64)
            .clamp(MIN_BYTES, Self::FULL.bytes);
        Effort {
            bytes,
            ..Self::FULL
        }
    }
}

/// Fewest bytes moved for a rate; fewer would measure the time of a launch.
const MIN_BYTES: usize = 256 << 10;

/// Seconds after which no more passes are made for a figure.
const MAX_PASSES_S: f64 = 2.0;

/// Host memory that a device copies to and from.
pub trait HostMemory: Send {
    /// Returns the length in bytes.
    fn len(&self) -> usize;

    /// Whether there are no bytes.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies all bytes to the device, and waits.
    fn send(&mut self, to: View<'_>) -> Result<(), CudaError>;

    /// Fills all bytes from the device.
    fn receive(&mut self, from: View<'_>) -> Result<(), CudaError>;
}

impl HostMemory for Pinned {
    fn len(&self) -> usize {
        Pinned::len(self)
    }

    fn send(&mut self, to: View<'_>) -> Result<(), CudaError> {
        Pinned::send(self, to)
    }

    fn receive(&mut self, from: View<'_>) -> Result<(), CudaError> {
        Pinned::receive(self, from)
    }
}

/// A device to be measured.
pub struct Subject {
    /// Device to be measured.
    pub device: Arc<dyn Device>,
    /// Number of streaming multiprocessors.
    pub multiprocessors: u32,
    /// Pinned host memory of [`Effort::bytes`].
    pub pinned: Box<dyn HostMemory>,
    /// Extent of the measurement.
    pub effort: Effort,
}

impl Subject {
    /// Prepares a GPU to be measured.
    ///
    /// # Errors
    /// When host memory can't be pinned.
    pub fn of(gpu: &Arc<Gpu>) -> Result<Self, CudaError> {
        Ok(Self {
            device: Arc::clone(gpu) as _,
            multiprocessors: u32::try_from(gpu.properties().multiprocessors)
                .unwrap_or(1)
                .max(1),
            pinned: Box::new(gpu.pinned(Effort::of(gpu.properties()).bytes)?),
            effort: Effort::of(gpu.properties()),
        })
    }
}

/// Fixed times and rates of a GPU.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Microseconds per launch, of many in a row.
    pub launch_us: f64,
    /// Microseconds from launching a kernel to knowing that it is done.
    pub round_trip_us: f64,
    /// Reads of the device's memory, in GB/s.
    pub read_gbps: f64,
    /// Copies from the host to the device.
    pub to_device: LinkRates,
    /// Copies from the device to the host.
    pub from_device: LinkRates,
}

/// Rates of copies between host and device, in GB/s.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LinkRates {
    /// Of pinned host memory.
    pub pinned_gbps: f64,
    /// Of pageable host memory.
    pub pageable_gbps: f64,
}

/// The rate of the link while the CPU reads main memory.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Contended {
    /// From pinned host memory to the device, in GB/s.
    pub to_device_gbps: f64,
    /// The CPU's rate meanwhile, in the unit of the callback.
    pub beside: f64,
    /// The CPU's rate just before, in the same unit.
    pub alone: f64,
}

impl Contended {
    /// Returns the part of its rate that the CPU keeps during transfers.
    pub fn kept(&self) -> f64 {
        if self.alone > 0.0 {
            (self.beside / self.alone).min(1.0)
        } else {
            1.0
        }
    }
}

/// Measured speed of routed experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Experts {
    /// Bytes per expert.
    pub expert_bytes: usize,
    /// Experts per token.
    pub used: usize,
    /// Microseconds from requesting a token's experts to having their results.
    pub token_us: f64,
    /// GFLOP/s of a prompt's batch, copies to and from the device included.
    pub batch_gflops: f64,
}

/// Returns the seconds of the fastest of several passes; of fewer passes if they are slow.
fn fastest(
    passes: usize,
    mut pass: impl FnMut() -> Result<(), CudaError>,
) -> Result<f64, CudaError> {
    pass()?;
    let (mut best, begun) = (f64::INFINITY, Instant::now());
    for _ in 0..passes.max(1) {
        let start = Instant::now();
        pass()?;
        best = best.min(start.elapsed().as_secs_f64());
        if begun.elapsed().as_secs_f64() > MAX_PASSES_S {
            break;
        }
    }
    Ok(best.max(1e-9))
}

fn gbps(bytes: usize, seconds: f64) -> f64 {
    bytes as f64 / seconds / 1e9
}

/// Measures fixed times and rates of a device.
pub fn measure_rates(subject: &mut Subject) -> Result<Rates, CudaError> {
    let Subject {
        device,
        multiprocessors,
        pinned,
        effort,
    } = subject;
    let ops = Ops::new(Arc::clone(device));
    let n = effort.launches.max(1);
    let launches = fastest(effort.passes, || {
        (0..n).try_for_each(|_| ops.nothing())?;
        device.wait()
    })?;
    let round_trips = fastest(effort.passes, || {
        (0..n).try_for_each(|_| {
            ops.nothing()?;
            device.wait()
        })
    })?;
    let bytes = pinned.len();
    let memory = Buffer::new(device, bytes)?;
    // Uninitialized memory must not be read.
    pinned.send(memory.view())?;
    let n_blocks = multiprocessors.saturating_mul(8).max(1);
    let sums = Buffer::new_f32(device, 256 * n_blocks as usize)?;
    let read = fastest(effort.passes, || {
        ops.read_all(memory.view(), n_blocks, sums.view())?;
        device.wait()
    })?;
    let mut pageable = vec![1u8; bytes];
    let to_device = LinkRates {
        pinned_gbps: gbps(
            bytes,
            fastest(effort.passes, || pinned.send(memory.view()))?,
        ),
        pageable_gbps: gbps(
            bytes,
            fastest(effort.passes, || {
                memory.view().write(&pageable)?;
                device.wait()
            })?,
        ),
    };
    let from_device = LinkRates {
        pinned_gbps: gbps(
            bytes,
            fastest(effort.passes, || pinned.receive(memory.view()))?,
        ),
        pageable_gbps: gbps(
            bytes,
            fastest(effort.passes, || memory.view().read(&mut pageable))?,
        ),
    };
    Ok(Rates {
        launch_us: launches * 1e6 / n as f64,
        round_trip_us: round_trips * 1e6 / n as f64,
        read_gbps: gbps(bytes, read),
        to_device,
        from_device,
    })
}

/// Measures copies within a device's memory in GB/s, bytes read and bytes written together.
pub fn copy_gbps(device: &Arc<dyn Device>, effort: Effort) -> Result<f64, CudaError> {
    // Uninitialized memory must not be read.
    let from = Buffer::of_bytes(device, &vec![1; effort.bytes])?;
    let to = Buffer::new(device, effort.bytes)?;
    let seconds = fastest(effort.passes, || {
        to.view().copy_from(from.view())?;
        device.wait()
    })?;
    Ok(gbps(effort.bytes.saturating_mul(2), seconds))
}

/// Sets a flag when dropped, also by a panic.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Measures the link while the CPU repeats `beside`, which returns its own rate, and that rate without
/// transfers.
pub fn contended(
    subject: &mut Subject,
    beside: &mut dyn FnMut() -> f64,
) -> Result<Contended, CudaError> {
    let bytes = subject.pinned.len();
    let memory = Buffer::new(&subject.device, bytes)?;
    let passes = subject.effort.passes.max(1);
    let mut middle_of_passes = || {
        let mut rates: Vec<f64> = (0..passes).map(|_| beside()).collect();
        rates.sort_by(f64::total_cmp);
        rates[rates.len() / 2]
    };
    let alone = middle_of_passes();
    let (pinned, enough) = (&mut subject.pinned, AtomicBool::new(false));
    let measured = std::thread::scope(|scope| {
        let sending = std::thread::Builder::new().spawn_scoped(scope, || {
            let (start, mut times) = (Instant::now(), 0);
            while times == 0 || !enough.load(Ordering::Relaxed) {
                pinned.send(memory.view())?;
                times += 1;
            }
            Ok::<f64, CudaError>(gbps(
                bytes.saturating_mul(times),
                start.elapsed().as_secs_f64().max(1e-9),
            ))
        })?;
        let until = SetOnDrop(&enough);
        let rate = middle_of_passes();
        drop(until);
        std::io::Result::Ok((sending.join(), rate))
    });
    let (sent, beside) = measured.map_err(|error| CudaError::Call {
        device: subject.device.name().to_string(),
        what: "starting a thread that sends".to_string(),
        why: error.to_string(),
    })?;
    let to_device_gbps = sent.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    Ok(Contended {
        to_device_gbps,
        beside,
        alone,
    })
}

/// Measures matvecs of one token with different matrices of a format in one launch, in GB/s of
/// weights.
pub fn matvec_gbps(subject: &Subject, ty: TensorType) -> Result<f64, CudaError> {
    matvecs(&subject.device, ty, subject.effort, FFN, HIDDEN)
}

fn matvecs(
    device: &Arc<dyn Device>,
    ty: TensorType,
    effort: Effort,
    rows: usize,
    cols: usize,
) -> Result<f64, CudaError> {
    let ops = Ops::new(Arc::clone(device));
    let matrix_bytes = ty
        .row_bytes((rows * cols) as u64)
        .map_or(usize::MAX, |b| b as usize);
    // Aligned like allocations.
    let stride = matrix_bytes.next_multiple_of(256);
    let jobs = (effort.bytes / stride).max(1);
    let memory = Buffer::of_bytes(device, &vec![0x11; jobs * stride])?;
    let views: Vec<_> = (0..jobs)
        .map(|j| Some(memory.view().part(j * stride..j * stride + matrix_bytes)))
        .collect();
    let table = MatrixTable::new(device, &views)?;
    let x = Buffer::of_f32(device, &vec![0.5; cols])?;
    let mut quants = Quants::new(device, cols)?;
    ops.quantize(x.view(), 1, cols, &mut quants)?;
    let out = Buffer::new_f32(device, jobs * rows)?;
    let matvec = Matvec {
        ty,
        matrices: Matrices::Table(&table),
        bias: None,
        jobs,
        n_rows: rows,
        n_cols: cols,
        x: Input::for_type(ty, x.view(), &quants),
        jobs_per_x: jobs,
    };
    let seconds = fastest(effort.passes, || {
        ops.matvec(&matvec, out.view())?;
        device.wait()
    })?;
    Ok(gbps(jobs * matrix_bytes, seconds))
}

/// Returns experts of a common size and format, and their number per token, for a measurement
/// without a model.
pub fn common_experts() -> (ExpertKind, usize) {
    let ty = TensorType::Q4_K;
    let activation = tier_plan_formats::model::spec::Activation::Silu;
    (
        ExpertKind {
            n_expert: 128,
            hidden: HIDDEN,
            ffn: FFN,
            gate: Some(ty),
            up: ty,
            down: ty,
            activation,
            weigh_input: false,
        },
        8,
    )
}

/// Measures experts of a kind, of which a token takes `used`, requested as by the engine. Returns
/// `None` for sizes that a format does not support, or if the device has no memory for two tokens'
/// experts.
pub fn experts(
    subject: &Subject,
    kind: ExpertKind,
    used: usize,
) -> Result<Option<Experts>, CudaError> {
    let bytes_of = |ty: TensorType, rows: usize, cols: usize| {
        let row = ty
            .row_bytes(cols as u64)
            .and_then(|bytes| usize::try_from(bytes).ok());
        row.and_then(|row| row.checked_mul(rows))
    };
    let sizes = [
        kind.gate
            .map_or(Some(0), |gate| bytes_of(gate, kind.ffn, kind.hidden)),
        bytes_of(kind.up, kind.ffn, kind.hidden),
        bytes_of(kind.down, kind.hidden, kind.ffn),
    ];
    let [Some(gate), Some(up), Some(down)] = sizes else {
        return Ok(None);
    };
    let (effort, expert_bytes) = (subject.effort, gate + up + down);
    let n = (effort.bytes / expert_bytes.max(1))
        .max(used.saturating_mul(2))
        .min(kind.n_expert);
    if used == 0 || n < used {
        return Ok(None);
    }
    let largest = vec![0x11u8; gate.max(up).max(down)];
    let one = ExpertBytes {
        gate: kind.gate.map(|_| &largest[..gate]),
        up: &largest[..up],
        down: &largest[..down],
        biases: None,
    };
    let mut store = PinnedExperts::new(Arc::clone(&subject.device), 1)?;
    let pinned: Vec<(usize, ExpertBytes<'_>)> = (0..n).map(|expert| (expert, one)).collect();
    match store.add_layer(0, kind, &pinned, 0, false) {
        Err(CudaError::OutOfMemory { .. }) => return Ok(None),
        done => done?,
    }
    let in_batch = n.min(16);
    let rows = in_batch * BATCH_TOKENS;
    store.reserve(rows.max(used))?;
    let x = vec![0.25f32; kind.hidden];
    let weights = vec![0.5f32; rows.max(used)];
    let mut out = vec![0.0f32; used * kind.hidden];
    let mut times = Vec::with_capacity(effort.stages.max(1));
    // Other experts every time, so that they are in no cache.
    let (mut first, begun) = (0, Instant::now());
    for stage in 0..=effort.stages.max(1) {
        let chosen: Vec<Place> = (0..used).map(|i| Place::Pinned((first + i) % n)).collect();
        first = (first + used) % n;
        let start = Instant::now();
        store.ask(0, Some(&x), requested(&chosen, &weights))?;
        store.fetch(&mut out)?;
        if stage > 0 {
            times.push(start.elapsed());
            if begun.elapsed().as_secs_f64() > MAX_PASSES_S {
                break;
            }
        }
    }
    times.sort();
    let token_us = times
        .get(times.len() / 2)
        .copied()
        .unwrap_or(Duration::ZERO)
        .as_secs_f64()
        * 1e6;
    // A batch in which each expert has a common number of tokens.
    let x = vec![0.25f32; rows * kind.hidden];
    let chosen: Vec<Place> = (0..rows)
        .map(|row| Place::Pinned(row / BATCH_TOKENS))
        .collect();
    let mut out = vec![0.0f32; rows * kind.hidden];
    let seconds = fastest(effort.passes, || {
        store.ask(0, Some(&x), requested(&chosen, &weights))?;
        store.fetch(&mut out)
    })?;
    let matrices = 2 + usize::from(kind.gate.is_some());
    let operations = 2.0 * (matrices * kind.hidden * kind.ffn) as f64 * rows as f64;
    Ok(Some(Experts {
        expert_bytes,
        used,
        token_us,
        batch_gflops: operations / seconds / 1e9,
    }))
}

/// Returns experts with the first of some weights.
fn requested<'a>(places: &'a [Place], weights: &'a [f32]) -> RequestedExperts<'a> {
    RequestedExperts {
        places,
        weights: &weights[..places.len()],
    }
}

#[cfg(test)]
mod tests;
