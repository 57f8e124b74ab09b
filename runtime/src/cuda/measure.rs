//! What a device gives: its memory, the link to it, launches, and products by format.

use super::device::{Buffer, Device};
use super::ops::{Input, Matrices, Quants, Table};
use super::{CudaError, Gpu, Ops};
use crate::kernels::needs_quants;
use crate::quant::TensorType;
use std::sync::Arc;
use std::time::Instant;

/// Bytes that are moved for a rate: more than any cache of a device has.
const BYTES: usize = 256 << 20;

/// Passes for one figure, of which the best counts, after one that is not timed.
const PASSES: usize = 5;

/// Launches for one figure.
const LAUNCHES: usize = 1000;

/// Width of the hidden state of the experts that are multiplied, and their rows.
const HIDDEN: usize = 2048;
const ROWS: usize = 768;

/// Fixed times and rates of a GPU.
#[derive(Debug, Clone)]
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

/// Seconds of the fastest of several passes.
fn fastest(mut pass: impl FnMut() -> Result<(), CudaError>) -> Result<f64, CudaError> {
    pass()?;
    let mut best = f64::INFINITY;
    for _ in 0..PASSES {
        let start = Instant::now();
        pass()?;
        best = best.min(start.elapsed().as_secs_f64());
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
    let device: Arc<dyn Device> = Arc::clone(gpu) as _;
    let ops = Ops::new(Arc::clone(&device));
    let launches = fastest(|| {
        (0..LAUNCHES).try_for_each(|_| ops.nothing())?;
        device.wait()
    })?;
    let round_trips = fastest(|| {
        (0..LAUNCHES).try_for_each(|_| {
            ops.nothing()?;
            device.wait()
        })
    })?;
    let memory = Buffer::new(&device, BYTES)?;
    let n_blocks = 8 * gpu.properties().multiprocessors.max(1) as u32;
    let sums = Buffer::room_f32(&device, 256 * n_blocks as usize)?;
    let read = fastest(|| {
        ops.read_all(memory.view(), n_blocks, sums.view())?;
        device.wait()
    })?;
    let mut pinned = gpu.pinned(BYTES)?;
    let mut pageable = vec![1u8; BYTES];
    let to_device = (
        fastest(|| pinned.send(memory.view()))?,
        fastest(|| {
            memory.view().write(&pageable)?;
            device.wait()
        })?,
    );
    let from_device = (fastest(|| pinned.receive(memory.view()))?, fastest(|| memory.view().read(&mut pageable))?);
    Ok(Rates {
        launch_us: launches * 1e6 / LAUNCHES as f64,
        round_trip_us: round_trips * 1e6 / LAUNCHES as f64,
        read_gbps: gbps(BYTES, read),
        to_device_gbps: (gbps(BYTES, to_device.0), gbps(BYTES, to_device.1)),
        from_device_gbps: (gbps(BYTES, from_device.0), gbps(BYTES, from_device.1)),
    })
}

/// Products of one activation with different matrices of a type, in one launch, 10⁹ weight bytes a second.
///
/// # Errors
/// When the device fails.
pub fn products_gbps(device: &Arc<dyn Device>, ty: TensorType) -> Result<f64, CudaError> {
    products(device, ty, BYTES, ROWS, HIDDEN)
}

fn products(
    device: &Arc<dyn Device>,
    ty: TensorType,
    bytes: usize,
    rows: usize,
    cols: usize,
) -> Result<f64, CudaError> {
    let ops = Ops::new(Arc::clone(device));
    let matrix_bytes = ty.row_bytes((rows * cols) as u64).map_or(usize::MAX, |b| b as usize);
    // Each begins where addresses are round, as allocations do.
    let stride = matrix_bytes.next_multiple_of(256);
    let jobs = (bytes / stride).max(1);
    let memory = Buffer::of_bytes(device, &vec![0x11; jobs * stride])?;
    let views: Vec<_> = (0..jobs).map(|j| Some(memory.view().part(j * stride..j * stride + matrix_bytes))).collect();
    let table = Table::new(device, &views)?;
    let x = Buffer::of_f32(device, &vec![0.5; cols])?;
    let mut quants = Quants::new(device, cols)?;
    ops.quantize(x.view(), 1, cols, &mut quants)?;
    let out = Buffer::room_f32(device, jobs * rows)?;
    let input = if needs_quants(ty) { Input::Quants(&quants) } else { Input::Floats(x.view()) };
    let seconds = fastest(|| {
        ops.matvec(ty, Matrices::Table(&table), jobs, rows, cols, input, jobs, out.view())?;
        device.wait()
    })?;
    Ok(gbps(jobs * matrix_bytes, seconds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::shim;

    #[test]
    fn products_are_timed_for_every_type() {
        let device: Arc<dyn Device> = shim::shared();
        for ty in TensorType::ALL {
            let rate = products(&device, ty, 3000, 2, 256).unwrap();
            assert!(rate > 0.0 && rate.is_finite(), "{ty}: {rate}");
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
