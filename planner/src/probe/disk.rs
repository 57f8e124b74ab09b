//! The slow tier under the readers: pieces as large as an expert's, past the page cache, as many at once as a layer of
//! a token misses.

use super::Measured;
use crate::session::{catch_interrupts, interrupted};
use anyhow::{Context, Result, bail, ensure};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::spec::ModelSpec;
use tier_plan_runtime::tiers::arena::{Arena, ArenaSlice};
use tier_plan_runtime::tiers::file::{Extent, FileTier, Priority, ReadMode, Span};
use tier_plan_runtime::tiers::source::ALIGN;

/// Experts asked for at once, one number after the other.
const BURSTS: [usize; 4] = [1, 2, 4, 8];

/// Bytes of the file that is written where there is no model.
const FILE_BYTES: usize = 1 << 30;

/// Bytes of an expert in it: three slices.
const SLICE_BYTES: usize = 864 << 10;

/// Small reads, for the latency.
const SMALL_READS: usize = 100;

/// What a drive gives.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DiskRate {
    /// Rate beyond the latency, in 10⁹ bytes a second.
    pub gbps: Measured,
    /// One read of a page, in microseconds.
    pub latency_us: Measured,
    /// Reads went past the page cache.
    pub direct: bool,
    /// Bytes of a piece, about.
    pub piece_bytes: u64,
    /// Rates by how many pieces were asked for at once, latency included.
    pub bursts: [(usize, f64); BURSTS.len()],
}

/// Files with experts in them.
pub struct Disk {
    files: FileTier,
    /// The slices of each expert.
    experts: Vec<Vec<Extent>>,
    buffers: Vec<ArenaSlice>,
    /// Where the random choices are.
    state: u64,
}

impl Disk {
    /// A model's own experts.
    ///
    /// # Errors
    /// When its files can't be read.
    pub fn of_model(gguf: &Gguf, spec: &ModelSpec) -> Result<Self> {
        let paths: Vec<PathBuf> = (0..gguf.n_parts()).map(|part| gguf.part_path(part).to_path_buf()).collect();
        let mut experts = Vec::new();
        for (_, moe) in spec.moe_layers() {
            let slice = |id: usize, expert: usize| {
                let tensor = &gguf.tensors()[id];
                let len = tensor.n_bytes as usize / moe.n_expert;
                Extent { part: tensor.part, offset: tensor.offset + (expert * len) as u64, len }
            };
            experts.extend((0..moe.n_expert).map(|e| moe.expert_tensors().map(|id| slice(id, e)).collect()));
        }
        Self::of(FileTier::open(&paths, ReadMode::from_env()?)?, experts)
    }

    /// A file of 1 GiB in a folder. Nobody else sees it for long: its name goes as soon as it is written.
    ///
    /// # Errors
    /// When the folder can't be written to, or has not got the room.
    pub fn of_folder(folder: &Path) -> Result<Self> {
        let file = Temporary::new(folder)?;
        file.fill()
            .with_context(|| format!("writing {} to {}", super::show_bytes(FILE_BYTES as u64), folder.display()))?;
        let files = FileTier::open(std::slice::from_ref(&file.path), ReadMode::from_env()?)?;
        let slice = |at: usize| Extent { part: 0, offset: at as u64, len: SLICE_BYTES };
        // Like a file of tensors, which has an expert's slices far apart, not at the beginning of pages.
        let third = FILE_BYTES / 3;
        let n = (third - ALIGN) / SLICE_BYTES;
        let experts = (0..n).map(|e| (0..3).map(|part| slice(part * third + 32 + e * SLICE_BYTES)).collect()).collect();
        Self::of(files, experts)
    }

    fn of(files: FileTier, experts: Vec<Vec<Extent>>) -> Result<Self> {
        let room = experts.iter().map(|e| e.iter().map(Extent::pages_bytes).sum()).max().unwrap_or(0);
        ensure!(room > 0, "the model's experts have no bytes");
        let most = BURSTS.into_iter().max().unwrap_or(1);
        let mut arena = Arena::new("buffers of experts", (room * most) as u64)?;
        let buffers = (0..most).map(|_| arena.take(room)).collect::<Result<_, _>>()?;
        Ok(Self { files, experts, buffers, state: 0x2545_f491_4f6c_dd1d })
    }

    fn random(&mut self, below: usize) -> usize {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state % below.max(1) as u64) as usize
    }

    /// Reads for about so long.
    ///
    /// # Errors
    /// When a read fails.
    pub fn measure(&mut self, time: Duration) -> Result<DiskRate> {
        let latency_us = self.latency_us()?;
        let latency = latency_us.value * 1e-6;
        let start = Instant::now();
        let (mut rounds, mut bytes_in_all, mut experts) = (Vec::new(), 0, 0);
        let mut bursts = BURSTS.map(|n| (n, 0.0, 0.0));
        while rounds.is_empty() || start.elapsed() < time {
            // A round's rate is what a layer gets, whichever of these numbers it misses.
            let mut slowness = 0.0;
            for (n, bytes_of, seconds_of) in &mut bursts {
                let (bytes, seconds) = self.burst(*n)?;
                slowness += (seconds - latency).max(seconds * 0.1) / bytes / BURSTS.len() as f64;
                *bytes_of += bytes;
                *seconds_of += seconds;
                bytes_in_all += bytes as u64;
                experts += *n as u64;
            }
            rounds.push(1e-9 / slowness);
        }
        Ok(DiskRate {
            gbps: Measured::of_many(&rounds),
            latency_us,
            direct: self.files.is_direct(),
            piece_bytes: bytes_in_all / experts.max(1),
            bursts: bursts.map(|(n, bytes, seconds)| (n, bytes / seconds.max(1e-9) / 1e9)),
        })
    }

    /// Reads so many experts at once; their bytes and the seconds.
    fn burst(&mut self, n: usize) -> Result<(f64, f64)> {
        let mut bytes = 0;
        let start = Instant::now();
        let mut submitted = 0;
        for key in 0..n {
            let expert = self.random(self.experts.len());
            let Some(buffer) = self.buffers.pop() else { break };
            let mut room = 0;
            let spans: Vec<Span> = self.experts[expert]
                .iter()
                .map(|&extent| {
                    let span = Span { extent, at: room + extent.head(), whole_pages: true };
                    room += extent.pages_bytes();
                    bytes += extent.len;
                    span
                })
                .collect();
            self.files.submit(key as u64, &spans, buffer, Priority::Demand);
            submitted += 1;
        }
        let mut failed = None;
        for _ in 0..submitted {
            let completion = self.files.wait()?;
            self.buffers.push(completion.buffer);
            failed = failed.or(completion.result.err());
        }
        let seconds = start.elapsed().as_secs_f64();
        failed.map_or(Ok((bytes as f64, seconds.max(1e-9))), |error| Err(error.into()))
    }

    /// One page at a time.
    fn latency_us(&mut self) -> Result<Measured> {
        let mut times = Vec::with_capacity(SMALL_READS);
        for _ in 0..SMALL_READS {
            let expert = self.random(self.experts.len());
            let Some(&Extent { part, offset, .. }) = self.experts[expert].first() else { break };
            let extent = Extent { part, offset: offset / ALIGN as u64 * ALIGN as u64, len: ALIGN };
            let Some(buffer) = self.buffers.pop() else { break };
            let start = Instant::now();
            let read = self.files.read(&[Span { extent, at: 0, whole_pages: true }], buffer)?;
            times.push(start.elapsed().as_secs_f64() * 1e6);
            self.buffers.push(read);
        }
        Ok(Measured::of_many(&times))
    }
}

/// A file that goes when this does.
struct Temporary {
    path: PathBuf,
    file: File,
}

impl Temporary {
    fn new(folder: &Path) -> Result<Self> {
        let path = folder.join(format!(".tier-plan-probe-{}.partial", std::process::id()));
        let file = OpenOptions::new().write(true).create_new(true).open(&path);
        let file = file.with_context(|| format!("making a file of 1 GiB to measure with: {}", path.display()))?;
        Ok(Self { path, file })
    }

    /// Writes bytes that no file system makes shorter, all the way to the drive.
    fn fill(&self) -> Result<()> {
        let catching = catch_interrupts();
        let mut block = vec![0u8; 4 << 20];
        let mut state = 0x0123_4567_89ab_cdefu64;
        for _ in 0..FILE_BYTES / block.len() {
            for eight in block.chunks_exact_mut(8) {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                eight.copy_from_slice(&state.to_le_bytes());
            }
            (&self.file).write_all(&block)?;
            if interrupted() {
                bail!("interrupted");
            }
        }
        drop(catching);
        Ok(self.file.sync_all()?)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // It may have been moved away; there is nobody to tell.
        let _ = std::fs::remove_file(&self.path);
    }
}
