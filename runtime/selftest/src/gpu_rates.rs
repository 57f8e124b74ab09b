//! What a device gives: its memory, the link to it, launches, products by format, and experts as the engine has them
//! computed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tier_plan_cuda::device::{Buffer, Device, View};
use tier_plan_cuda::experts::{ExpertBytes, ExpertKind, PinnedExperts, Place};
use tier_plan_cuda::gpu::{Pinned, Properties};
use tier_plan_cuda::ops::{Input, Matrices, Quants, Table};
use tier_plan_cuda::{CudaError, Gpu, Ops};
use tier_plan_kernels::needs_quants;
use tier_plan_kernels::quant::TensorType;

/// Width of the hidden state of the experts that are multiplied, and their rows.
const HIDDEN: usize = 2048;
const ROWS: usize = 768;

/// Tokens of a prompt that one expert gets, as on the processor.
const BATCH_TOKENS: usize = 32;

/// How much is done for a figure.
#[derive(Debug, Clone, Copy)]
pub struct Effort {
    /// Bytes that are moved for a rate: more than any cache of a device has.
    pub bytes: usize,
    /// Passes for one figure, after one that is not timed.
    pub passes: usize,
    /// Launches for one figure.
    pub launches: usize,
    /// Stages of experts for one figure.
    pub stages: usize,
}

impl Effort {
    /// What a GPU needs.
    pub const FULL: Effort = Effort { bytes: 256 << 20, passes: 5, launches: 1000, stages: 200 };

    /// What this GPU needs: less bytes where even they are many times its cache.
    pub fn of(gpu: &Properties) -> Effort {
        let bytes = gpu.l2_bytes.saturating_mul(64).clamp(LEAST_BYTES, Self::FULL.bytes);
        Effort { bytes, ..Self::FULL }
    }
}

/// Bytes that are moved for a rate at least: below that, it would be the time of a launch.
const LEAST_BYTES: usize = 256 << 10;

/// Seconds after which a figure has had enough passes.
const LONGEST: f64 = 2.0;

/// Host memory that a device copies to and from, by itself or not.
pub trait HostMemory: Send {
    /// Bytes.
    fn len(&self) -> usize;

    /// Whether there are none.
    fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Copies all of it to the device, and waits.
    ///
    /// # Errors
    /// When the device fails.
    fn send(&mut self, to: View<'_>) -> Result<(), CudaError>;

    /// Fills it from the device.
    ///
    /// # Errors
    /// When the device fails.
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
    /// It.
    pub device: Arc<dyn Device>,
    /// Parts of it that compute side by side.
    pub multiprocessors: u32,
    /// Host memory of [`Effort::bytes`] that it copies from by itself.
    pub pinned: Box<dyn HostMemory>,
    /// How much is done for a figure.
    pub effort: Effort,
}

impl Subject {
    /// A GPU.
    ///
    /// # Errors
    /// When the system has not got the memory.
    pub fn of(gpu: &Arc<Gpu>) -> Result<Self, CudaError> {
        Ok(Self {
            device: Arc::clone(gpu) as _,
            multiprocessors: u32::try_from(gpu.properties().multiprocessors).unwrap_or(1).max(1),
            pinned: Box::new(gpu.pinned(Effort::of(gpu.properties()).bytes)?),
            effort: Effort::of(gpu.properties()),
        })
    }
}

/// Fixed times and rates of a GPU.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Microseconds of a launch, when many are asked for one after the other.
    pub launch_us: f64,
    /// Microseconds from asking for a kernel to knowing that it is done.
    pub round_trip_us: f64,
    /// Reads of the device's memory, 10⁹ bytes a second.
    pub read_gbps: f64,
    /// From the host's pinned and pageable memory to the device.
    pub to_device_gbps: (f64, f64),
    /// From the device to the host's pinned and pageable memory.
    pub from_device_gbps: (f64, f64),
}

/// The link while main memory is read.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Contended {
    /// From the host's pinned memory to the device, 10⁹ bytes a second.
    pub to_device_gbps: f64,
    /// What the processor computed at meanwhile, in the unit of whoever said it.
    pub beside: f64,
}

/// Experts as the engine has them computed.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Experts {
    /// Bytes of one.
    pub expert_bytes: usize,
    /// Experts of one token.
    pub used: usize,
    /// Microseconds from asking for a token's experts to having their results.
    pub token_us: f64,
    /// Products of a batch of a prompt, in 10⁹ floating-point operations a second, the way there and back included.
    pub batch_gflops: f64,
}

/// Seconds of the fastest of several passes; fewer where they are slow.
fn fastest(passes: usize, mut pass: impl FnMut() -> Result<(), CudaError>) -> Result<f64, CudaError> {
    pass()?;
    let (mut best, begun) = (f64::INFINITY, Instant::now());
    for _ in 0..passes.max(1) {
        let start = Instant::now();
        pass()?;
        best = best.min(start.elapsed().as_secs_f64());
        if begun.elapsed().as_secs_f64() > LONGEST {
            break;
        }
    }
    Ok(best.max(1e-9))
}

fn gbps(bytes: usize, seconds: f64) -> f64 {
    bytes as f64 / seconds / 1e9
}

/// Measures a GPU.
///
/// # Errors
/// When it fails, or has not got the memory for it.
pub fn rates(gpu: &Arc<Gpu>) -> Result<Rates, CudaError> {
    rates_of(&mut Subject::of(gpu)?)
}

/// Measures a device.
///
/// # Errors
/// As [`rates`].
pub fn rates_of(subject: &mut Subject) -> Result<Rates, CudaError> {
    let Subject { device, multiprocessors, pinned, effort } = subject;
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
    // What nobody wrote is not to be read.
    pinned.send(memory.view())?;
    let n_blocks = multiprocessors.saturating_mul(8).max(1);
    let sums = Buffer::room_f32(device, 256 * n_blocks as usize)?;
    let read = fastest(effort.passes, || {
        ops.read_all(memory.view(), n_blocks, sums.view())?;
        device.wait()
    })?;
    let mut pageable = vec![1u8; bytes];
    let to_device = (
        fastest(effort.passes, || pinned.send(memory.view()))?,
        fastest(effort.passes, || {
            memory.view().write(&pageable)?;
            device.wait()
        })?,
    );
    let from_device = (
        fastest(effort.passes, || pinned.receive(memory.view()))?,
        fastest(effort.passes, || memory.view().read(&mut pageable))?,
    );
    Ok(Rates {
        launch_us: launches * 1e6 / n as f64,
        round_trip_us: round_trips * 1e6 / n as f64,
        read_gbps: gbps(bytes, read),
        to_device_gbps: (gbps(bytes, to_device.0), gbps(bytes, to_device.1)),
        from_device_gbps: (gbps(bytes, from_device.0), gbps(bytes, from_device.1)),
    })
}

/// Copies from one part of a GPU's memory to another, bytes read and bytes written together, 10⁹ bytes a second.
///
/// # Errors
/// As [`rates`].
pub fn copy_gbps(gpu: &Arc<Gpu>) -> Result<f64, CudaError> {
    let device: Arc<dyn Device> = Arc::clone(gpu) as _;
    copy_gbps_of(&device, Effort::FULL)
}

/// The same of any device.
///
/// # Errors
/// As [`rates`].
pub fn copy_gbps_of(device: &Arc<dyn Device>, effort: Effort) -> Result<f64, CudaError> {
    // What nobody wrote is not to be read.
    let from = Buffer::of_bytes(device, &vec![1; effort.bytes])?;
    let to = Buffer::new(device, effort.bytes)?;
    let seconds = fastest(effort.passes, || {
        to.view().copy_from(from.view())?;
        device.wait()
    })?;
    Ok(gbps(effort.bytes.saturating_mul(2), seconds))
}

/// Says that it is enough, also when something panics before.
struct Enough<'a>(&'a AtomicBool);

impl Drop for Enough<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The link while the processor does what `beside` does, over and over; it returns how fast it was.
///
/// # Errors
/// When the device fails, or has not got the memory for it.
pub fn contended(subject: &mut Subject, beside: &mut dyn FnMut() -> f64) -> Result<Contended, CudaError> {
    let bytes = subject.pinned.len();
    let memory = Buffer::new(&subject.device, bytes)?;
    let (pinned, enough) = (&mut subject.pinned, AtomicBool::new(false));
    let (sent, mut rates) = std::thread::scope(|scope| {
        let sending = scope.spawn(|| {
            let (start, mut times) = (Instant::now(), 0);
            while times == 0 || !enough.load(Ordering::Relaxed) {
                pinned.send(memory.view())?;
                times += 1;
            }
            Ok::<f64, CudaError>(gbps(bytes.saturating_mul(times), start.elapsed().as_secs_f64().max(1e-9)))
        });
        let until = Enough(&enough);
        let rates: Vec<f64> = (0..subject.effort.passes.max(1)).map(|_| beside()).collect();
        drop(until);
        (sending.join(), rates)
    });
    rates.sort_by(f64::total_cmp);
    let to_device_gbps = sent.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
    Ok(Contended { to_device_gbps, beside: rates[rates.len() / 2] })
}

/// Products of one activation with different matrices of a type, in one launch, 10⁹ weight bytes a second.
///
/// # Errors
/// When the device fails.
pub fn products_gbps(device: &Arc<dyn Device>, ty: TensorType) -> Result<f64, CudaError> {
    products(device, ty, Effort::FULL, ROWS, HIDDEN)
}

/// The same of a device to be measured.
///
/// # Errors
/// When the device fails.
pub fn products_of(subject: &Subject, ty: TensorType) -> Result<f64, CudaError> {
    products(&subject.device, ty, subject.effort, ROWS, HIDDEN)
}

fn products(
    device: &Arc<dyn Device>,
    ty: TensorType,
    effort: Effort,
    rows: usize,
    cols: usize,
) -> Result<f64, CudaError> {
    let ops = Ops::new(Arc::clone(device));
    let matrix_bytes = ty.row_bytes((rows * cols) as u64).map_or(usize::MAX, |b| b as usize);
    // Each begins where addresses are round, as allocations do.
    let stride = matrix_bytes.next_multiple_of(256);
    let jobs = (effort.bytes / stride).max(1);
    let memory = Buffer::of_bytes(device, &vec![0x11; jobs * stride])?;
    let views: Vec<_> = (0..jobs).map(|j| Some(memory.view().part(j * stride..j * stride + matrix_bytes))).collect();
    let table = Table::new(device, &views)?;
    let x = Buffer::of_f32(device, &vec![0.5; cols])?;
    let mut quants = Quants::new(device, cols)?;
    ops.quantize(x.view(), 1, cols, &mut quants)?;
    let out = Buffer::room_f32(device, jobs * rows)?;
    let input = if needs_quants(ty) { Input::Quants(&quants) } else { Input::Floats(x.view()) };
    let seconds = fastest(effort.passes, || {
        ops.matvec(ty, Matrices::Table(&table), jobs, rows, cols, input, jobs, out.view())?;
        device.wait()
    })?;
    Ok(gbps(jobs * matrix_bytes, seconds))
}

/// Experts that are all of one kind and format, where nothing else is known: as the processor's are measured.
pub fn common_experts() -> (ExpertKind, usize) {
    let ty = TensorType::Q4_K;
    let activation = tier_plan_formats::model::spec::Activation::Silu;
    (ExpertKind { n_expert: 128, hidden: HIDDEN, ffn: ROWS, gate: ty, up: ty, down: ty, activation }, 8)
}

/// Experts of a kind, of which a token uses `used`: as the engine asks a device for them. None for sizes that a type
/// can't have, or where the device has no room for those of two tokens.
///
/// # Errors
/// When the device fails.
pub fn experts(subject: &Subject, kind: ExpertKind, used: usize) -> Result<Option<Experts>, CudaError> {
    let bytes_of = |ty: TensorType, rows: usize, cols: usize| {
        let row = ty.row_bytes(cols as u64).and_then(|bytes| usize::try_from(bytes).ok());
        row.and_then(|row| row.checked_mul(rows))
    };
    let sizes = [
        bytes_of(kind.gate, kind.ffn, kind.hidden),
        bytes_of(kind.up, kind.ffn, kind.hidden),
        bytes_of(kind.down, kind.hidden, kind.ffn),
    ];
    let [Some(gate), Some(up), Some(down)] = sizes else { return Ok(None) };
    let (effort, expert_bytes) = (subject.effort, gate + up + down);
    let n = (effort.bytes / expert_bytes.max(1)).max(used.saturating_mul(2)).min(kind.n_expert);
    if used == 0 || n < used {
        return Ok(None);
    }
    let largest = vec![0x11u8; gate.max(up).max(down)];
    let one = ExpertBytes { gate: &largest[..gate], up: &largest[..up], down: &largest[..down], biases: None };
    let mut here = PinnedExperts::new(Arc::clone(&subject.device), 1)?;
    let all: Vec<(usize, ExpertBytes<'_>)> = (0..n).map(|expert| (expert, one)).collect();
    match here.add_layer(0, kind, &all, 0, false) {
        Err(CudaError::OutOfMemory { .. }) => return Ok(None),
        done => done?,
    }
    let in_batch = n.min(16);
    let rows = in_batch * BATCH_TOKENS;
    here.reserve(rows.max(used))?;
    let x = vec![0.25f32; kind.hidden];
    let mut out = vec![0.0f32; used * kind.hidden];
    let mut times = Vec::with_capacity(effort.stages.max(1));
    // From one place to the next, so that no cache has them from the last time.
    let (mut first, begun) = (0, Instant::now());
    for stage in 0..=effort.stages.max(1) {
        let chosen: Vec<Place> = (0..used).map(|i| Place::Pinned((first + i) % n)).collect();
        first = (first + used) % n;
        let start = Instant::now();
        here.ask(0, Some(&x), &chosen)?;
        here.fetch(&mut out)?;
        if stage > 0 {
            times.push(start.elapsed());
            if begun.elapsed().as_secs_f64() > LONGEST {
                break;
            }
        }
    }
    times.sort();
    let token_us = times.get(times.len() / 2).copied().unwrap_or(Duration::ZERO).as_secs_f64() * 1e6;
    // A batch in which so many experts have a common number of tokens each.
    let x = vec![0.25f32; rows * kind.hidden];
    let chosen: Vec<Place> = (0..rows).map(|row| Place::Pinned(row / BATCH_TOKENS)).collect();
    let mut out = vec![0.0f32; rows * kind.hidden];
    let seconds = fastest(effort.passes, || {
        here.ask(0, Some(&x), &chosen)?;
        here.fetch(&mut out)
    })?;
    let operations = 2.0 * (3 * kind.hidden * kind.ffn) as f64 * rows as f64;
    Ok(Some(Experts { expert_bytes, used, token_us, batch_gflops: operations / seconds / 1e9 }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use tier_plan_cuda::shim;
    use tier_plan_formats::model::spec::Activation;

    const LITTLE: Effort = Effort { bytes: 1 << 16, passes: 1, launches: 3, stages: 2 };

    /// Memory of the emulated device's host, which is the same.
    struct Host(Vec<u8>);

    impl HostMemory for Host {
        fn len(&self) -> usize {
            self.0.len()
        }

        fn send(&mut self, to: View<'_>) -> Result<(), CudaError> {
            to.write(&self.0)
        }

        fn receive(&mut self, from: View<'_>) -> Result<(), CudaError> {
            from.read(&mut self.0)
        }
    }

    fn subject() -> Subject {
        let pinned = Box::new(Host(vec![3; LITTLE.bytes]));
        Subject { device: shim::shared(), multiprocessors: 1, pinned, effort: LITTLE }
    }

    #[test]
    fn a_device_is_measured_from_end_to_end() {
        let mut subject = subject();
        let r = rates_of(&mut subject).unwrap();
        let all = [r.launch_us, r.round_trip_us, r.read_gbps, r.to_device_gbps.0, r.to_device_gbps.1];
        for value in all.into_iter().chain([r.from_device_gbps.0, r.from_device_gbps.1]) {
            assert!(value.is_finite() && value > 0.0, "{r:?}");
        }
        let copied = copy_gbps_of(&subject.device, LITTLE).unwrap();
        assert!(copied.is_finite() && copied > 0.0, "{copied}");
        let mut passes = 0;
        let mut beside = || {
            passes += 1;
            42.0
        };
        let both = contended(&mut subject, &mut beside).unwrap();
        assert!(both.to_device_gbps > 0.0 && both.beside == 42.0, "{both:?}");
        assert_eq!(passes, 1);
    }

    #[test]
    fn experts_are_timed_as_the_engine_asks_for_them() {
        let subject = subject();
        let q4 = TensorType::Q4_0;
        let activation = Activation::Silu;
        let kind = ExpertKind { n_expert: 6, hidden: 64, ffn: 32, gate: q4, up: q4, down: TensorType::F32, activation };
        let found = experts(&subject, kind, 2).unwrap().unwrap();
        assert_eq!((found.expert_bytes, found.used), (2 * 64 * 32 / 32 * 18 + 4 * 64 * 32, 2));
        assert!(found.token_us > 0.0 && found.batch_gflops > 0.0, "{found:?}");
        assert_eq!(experts(&subject, kind, 7).unwrap(), None, "a token can't use more than there are");
        let odd = ExpertKind { hidden: 63, ..kind };
        assert_eq!(experts(&subject, odd, 2).unwrap(), None);
    }

    #[test]
    fn products_are_timed_for_every_type() {
        let device: Arc<dyn Device> = shim::shared();
        for ty in TensorType::ALL {
            let rate = products(&device, ty, Effort { bytes: 3000, ..LITTLE }, 2, 256).unwrap();
            assert!(rate > 0.0 && rate.is_finite(), "{ty}: {rate}");
        }
    }

    #[test]
    fn a_copy_within_a_device_is_the_same_bytes() {
        let counting = Arc::new(crate::counting::Counting::new(shim::shared()));
        let devices: [Arc<dyn Device>; 2] = [shim::shared(), counting];
        for device in devices {
            let bytes: Vec<u8> = (0..1000).map(|i| (i % 251) as u8).collect();
            let (from, to) = (Buffer::of_bytes(&device, &bytes).unwrap(), Buffer::new(&device, 500).unwrap());
            to.view().copy_from(from.view().part(300..800)).unwrap();
            assert_eq!(to.view().to_bytes().unwrap(), bytes[300..800]);
            to.view().part(0..0).copy_from(from.view().part(0..0)).unwrap();
        }
    }

    #[test]
    fn memory_is_read_to_the_end() {
        let device: Arc<dyn Device> = shim::shared();
        let ops = Ops::new(Arc::clone(&device));
        ops.nothing().unwrap();
        let words: Vec<i32> = (1..=400).collect();
        let memory = Buffer::of_i32(&device, &words).unwrap();
        let sums = Buffer::room_f32(&device, 256).unwrap();
        ops.read_all(memory.view(), 1, sums.view()).unwrap();
        let found: i64 = sums.view().to_i32().unwrap().into_iter().map(i64::from).sum();
        let expected: i64 = words.chunks(4).map(|w| i64::from(w[0] ^ w[1] ^ w[2] ^ w[3])).sum();
        assert_eq!(found, expected);
    }
}
