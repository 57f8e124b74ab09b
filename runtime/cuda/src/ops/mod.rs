//! Typed operations: the kernels behind functions that check every size once, so that no kernel
//! accesses memory outside of its buffers.
//!
//! Shapes in the documentation are row-major. A *job* is one row of results of a matvec.
//! *Quantized* activations are [`Quants`]: 8-bit codes with a scale per 32 values.

mod attention;
mod block_index;
mod choice;
mod compressed;
mod delta;
mod gated;
mod heads;
mod index;
mod inputs;
mod kda;
mod mamba;
mod ngram;
mod open_blocks;
mod operands;
mod positions;
mod products;
mod prompt_attention;
mod runs;
mod short_conv;
mod small;
mod sparse_attention;
mod stream;
mod streams;

pub use attention::{Attend, AttentionBuffers, CHUNK, MAX_KEY};
pub use block_index::{BlockQueries, MeanKeys};
pub use choice::{Choice, OpenBlock, Reached};
pub use compressed::{
    AttendCompressed, CompressedRows, FarRows, IndexHeads, TurnBack, compressed_chunks,
};
pub use delta::{Delta, DeltaSizes, MAX_DELTA_HEAD};
pub use gated::{ChosenSum, GateUpMatrices, Gated};
pub use heads::{CacheRows, HeadNorms, Heads, RopeTurns};
pub use index::{BlockKeys, IndexQueries, IndexRows, PooledRows};
pub use inputs::TokenInputs;
pub use kda::{Kda, KdaSizes};
pub use mamba::{MAX_MAMBA_STATE, Mamba, MambaSizes};
pub use ngram::{NgramConv, NgramGate};
pub use open_blocks::{BlockSizes, Frequencies, KeepCompressed, OpenRows, PoolBlocks};
pub use operands::{
    BatchMatrices, FusedMatvec, Input, Matrices, MatrixTable, Matvec, Quants, SharedView,
    TokenGroup, TokenGroups, TransposedMatvec,
};
pub use positions::{BatchPositions, CacheSize, Positions, TextTokens};
pub use products::MAX_FUSED;
pub use prompt_attention::PROMPT_TOKENS;
pub use runs::{States, TextRuns};
pub use short_conv::ShortConv;
pub use small::{
    AddNorm, ChosenByToken, MAX_EXPERTS, MAX_GROUPS, RouterLogits, RouterSpec, Strided,
};
pub use sparse_attention::ChosenBlocks;
pub use streams::{
    GatedValues, Injected, MAX_MIXED_STREAMS, MAX_STREAMS, StreamGates, StreamRows, StreamWeights,
    StreamsOut,
};

use super::CudaError;
use super::device::{Arg, Device, Grid, Recording, View};
use std::sync::Arc;

/// Threads per block of kernels without a number of their own.
const THREADS: u32 = 256;

/// Matrix rows per block of a matvec, one per warp.
const MATVEC_ROWS: usize = 4;

/// Most blocks in y or z of a launch.
const MAX_BLOCKS_YZ: usize = 65_535;

/// Operations on a device.
#[derive(Clone)]
pub struct Ops {
    device: Arc<dyn Device>,
}

/// Launches that were recorded by [`Ops::record`].
pub struct Recorded(Box<dyn Recording>);

impl Recorded {
    /// Executes the launches again. The buffers that they were given must still be allocated: a
    /// launch accesses their addresses unchecked.
    pub fn replay(&self) -> Result<(), CudaError> {
        // SAFETY: the owner of the recording keeps the buffers as long as the recording.
        unsafe { self.0.replay() }
    }
}

fn int(value: usize) -> Arg {
    Arg::Int(i32::try_from(value).unwrap_or_else(|_| panic!("{value} is too large for a kernel")))
}

fn null_or(view: Option<View<'_>>) -> Arg {
    view.map_or(Arg::Pointer(0), View::arg)
}

/// Returns the number of blocks of `threads` that cover `n` threads.
fn blocks(n: usize, threads: u32) -> u32 {
    let blocks = n.div_ceil(threads as usize);
    u32::try_from(blocks)
        .ok()
        .filter(|b| *b <= i32::MAX as u32)
        .unwrap_or_else(|| panic!("{n} threads"))
}

/// Checks a number of blocks in y or z, which is limited to [`MAX_BLOCKS_YZ`].
fn few(n: usize) -> u32 {
    assert!(n <= MAX_BLOCKS_YZ, "{n} jobs in one launch");
    n as u32
}

impl Ops {
    /// Makes the operations of a device.
    pub fn new(device: Arc<dyn Device>) -> Self {
        Self { device }
    }

    /// Returns the device that the operations run on.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// Records what `launches` launches, without executing it. Returns `None` if unsupported. All
    /// kernels must have been launched before, and `launches` may do nothing but launch.
    ///
    /// # Errors
    /// When `launches` fails.
    pub fn record(
        &self,
        launches: impl FnOnce() -> Result<(), CudaError>,
    ) -> Result<Option<Recorded>, CudaError> {
        if !self.device.begin_recording()? {
            return Ok(None);
        }
        let launched = launches();
        // The recording is ended even if a launch failed.
        let recording = Arc::clone(&self.device).end_recording();
        launched?;
        recording.map(|recording| Some(Recorded(recording)))
    }

    fn launch(
        &self,
        kernel: &'static str,
        blocks: [u32; 3],
        threads: u32,
        args: &[Arg],
    ) -> Result<(), CudaError> {
        if blocks.contains(&0) {
            return Ok(());
        }
        // SAFETY: every caller in this module passes the kernel's arguments and has checked that
        // its buffers, all of this device, are as long as the kernel reaches.
        unsafe { self.device.launch(kernel, Grid { blocks, threads }, args) }
    }

    /// Reads a whole buffer with `n_blocks` blocks, to measure bandwidth. `out` has a word per
    /// thread.
    pub fn read_all(&self, from: View<'_>, n_blocks: u32, out: View<'_>) -> Result<(), CudaError> {
        assert!(
            out.words() >= (n_blocks * THREADS) as usize,
            "{n_blocks} blocks"
        );
        let args = [
            from.aligned().arg(),
            Arg::Long((from.len() / 16) as i64),
            out.arg(),
        ];
        self.launch("read_all", [n_blocks, 1, 1], THREADS, &args)
    }

    /// Launches an empty kernel, to measure the time of a launch.
    pub fn nothing(&self) -> Result<(), CudaError> {
        self.launch("nothing", [1, 1, 1], 32, &[])
    }
}
