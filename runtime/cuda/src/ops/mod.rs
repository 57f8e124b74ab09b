//! The kernels as typed operations: sizes are checked here, once, so that no kernel looks beyond its buffers.

mod attention;
mod delta;
mod gated;
mod products;
mod prompt_attention;
mod small;
mod stream;

pub use attention::{Attend, AttendRoom, CHUNK, Heads, MAX_KEY, Positions};
pub use delta::{Delta, DeltaSizes, MAX_DELTA_HEAD};
pub use gated::{ChosenSum, Gated, Pair};
pub use products::{Batch, Group, Groups, Input, MOST_PARTS, Matrices, Part, Quants, SharedPart, Table};
pub use prompt_attention::PROMPT_TOKENS;
pub use small::{MAX_EXPERTS, MAX_GROUPS, Routing, Strided};

use super::CudaError;
use super::device::{Arg, Device, Grid, Recording, View};
use std::sync::Arc;

/// Threads of a block where nothing asks for another number.
const THREADS: u32 = 256;

/// Rows of a matrix that a block multiplies with few rows of activations, a warp each.
const MATVEC_ROWS: usize = 4;

/// Operations on a device.
#[derive(Clone)]
pub struct Ops {
    device: Arc<dyn Device>,
}

/// Launches that were recorded.
pub struct Recorded(Box<dyn Recording>);

impl Recorded {
    /// Does them again. The buffers that they were given must still be there: what a launch finds at the address of one
    /// that was given back is anything.
    ///
    /// # Errors
    /// When the device fails.
    pub fn replay(&self) -> Result<(), CudaError> {
        // SAFETY: who recorded them keeps their buffers as long as the recording.
        unsafe { self.0.replay() }
    }
}

fn int(value: usize) -> Arg {
    Arg::Int(i32::try_from(value).unwrap_or_else(|_| panic!("{value} is too large for a kernel")))
}

fn null_or(view: Option<View<'_>>) -> Arg {
    view.map_or(Arg::Pointer(0), View::arg)
}

/// Blocks of `threads` for `n` threads.
fn blocks(n: usize, threads: u32) -> u32 {
    let blocks = n.div_ceil(threads as usize);
    u32::try_from(blocks).ok().filter(|b| *b <= i32::MAX as u32).unwrap_or_else(|| panic!("{n} threads"))
}

/// The second or third number of blocks, which can't be as large as the first.
fn few(n: usize) -> u32 {
    assert!(n <= 65_535, "{n} jobs in one launch");
    n as u32
}

impl Ops {
    /// Operations on a device.
    pub fn new(device: Arc<dyn Device>) -> Self {
        Self { device }
    }

    /// The device.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// Records what `launches` launches, without doing it; `None` where that can't be done. All kernels must have been
    /// launched before, and nothing but launches may be asked for meanwhile.
    ///
    /// # Errors
    /// When the device fails, or `launches` does.
    pub fn record(&self, launches: impl FnOnce() -> Result<(), CudaError>) -> Result<Option<Recorded>, CudaError> {
        if !self.device.begin_recording()? {
            return Ok(None);
        }
        let done = launches();
        // Ended whatever became of it.
        let recording = Arc::clone(&self.device).end_recording();
        done?;
        recording.map(|recording| Some(Recorded(recording)))
    }

    fn launch(&self, kernel: &'static str, blocks: [u32; 3], threads: u32, args: &[Arg]) -> Result<(), CudaError> {
        if blocks.contains(&0) {
            return Ok(());
        }
        // SAFETY: every caller in this module passes the kernel's arguments and has checked that its buffers, all of this
        // device, are as long as the kernel goes.
        unsafe { self.device.launch(kernel, Grid { blocks, threads }, args) }
    }

    /// Reads all of a buffer with `n_blocks` blocks.
    ///
    /// # Errors
    /// When the device fails.
    ///
    /// # Panics
    /// When there is no room for a word a thread in `out`.
    pub fn read_all(&self, from: View<'_>, n_blocks: u32, out: View<'_>) -> Result<(), CudaError> {
        assert!(out.words() >= (n_blocks * THREADS) as usize, "{n_blocks} blocks");
        let args = [from.aligned().arg(), Arg::Long((from.len() / 16) as i64), out.arg()];
        self.launch("read_all", [n_blocks, 1, 1], THREADS, &args)
    }

    /// Launches a kernel that does nothing.
    ///
    /// # Errors
    /// When the device fails.
    pub fn nothing(&self) -> Result<(), CudaError> {
        self.launch("nothing", [1, 1, 1], 32, &[])
    }
}
