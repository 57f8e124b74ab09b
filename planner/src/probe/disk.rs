//! Measures the slow tier with the engine's own readers: direct I/O, expert-sized reads, and as
//! many at once as a layer of one token misses.

use super::{MAX_TRUSTED_SPREAD, Measured};
use crate::interrupt::{Interrupted, catch_interrupts, interrupted};
use crate::opening::naming;
use anyhow::{Context, Result, ensure};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use tier_plan_runtime::experts::copies::{ExpertFiles, places};
use tier_plan_runtime::formats::machine::DriveIo;
use tier_plan_runtime::formats::safely::{Synced, Temporary};
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::model::spec::ModelSpec;
use tier_plan_runtime::tiers::arena::{Arena, ArenaSlice};
use tier_plan_runtime::tiers::file::{Extent, FileTier, Priority, ReadMode, Span};
use tier_plan_runtime::tiers::limits::file_system_space;
use tier_plan_runtime::tiers::source::ALIGN;
use tier_plan_runtime::units::show_bytes;

/// Experts requested at once, one burst size after the other.
const BURSTS: [usize; 4] = [1, 2, 4, 8];

/// Most experts requested at once.
const MAX_BURST: usize = 8;

/// Bytes of the file that is written where no model is given.
const FILE_BYTES: usize = 1 << 30;

/// Bytes of one of the three slices of an expert in that file.
const SLICE_BYTES: usize = 864 << 10;

/// Page-sized reads for one latency figure.
const SMALL_READS: usize = 100;

/// Gain of the page cache over direct I/O, as a factor, from which on it is used: it takes memory and
/// time of the cores, which such a measurement does not count.
const MIN_BUFFERED_GAIN: f64 = 1.05;

/// Fewest bursts per way of reading.
const MIN_ROUNDS: usize = 5;

/// Rates of the two ways of reading a drive, in 10⁹ bytes per second.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct IoRates {
    /// With direct I/O.
    pub direct_gbps: f64,
    /// Through the page cache, from which the bytes are dropped.
    pub buffered_gbps: f64,
}

impl IoRates {
    /// Returns the way to read.
    pub fn best(&self) -> DriveIo {
        if self.buffered_gbps > MIN_BUFFERED_GAIN * self.direct_gbps {
            DriveIo::Buffered
        } else {
            DriveIo::Direct
        }
    }
}

/// Rate and latency of a drive.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DiskRate {
    /// Rate after the latency is subtracted, in 10⁹ bytes per second.
    pub gbps: Measured,
    /// Time of one page-sized read, in microseconds.
    pub latency_us: Measured,
    /// Whether reads used direct I/O.
    pub direct: bool,
    /// Both ways of reading, where either was possible and `TIER_PLAN_IO` asked for neither.
    pub io: Option<IoRates>,
    /// Mean bytes per expert.
    pub piece_bytes: u64,
    /// Rates by the number of experts requested at once, latency included.
    pub bursts: [BurstRate; BURSTS.len()],
}

/// The rate of reads that are requested together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BurstRate {
    /// Experts requested at once.
    pub experts: usize,
    /// 10⁹ bytes per second.
    pub gbps: f64,
}

impl DiskRate {
    /// Returns warnings about a drive that is read through `path`.
    pub(super) fn doubts(&self, path: &Path) -> Vec<String> {
        let mut doubts = Vec::new();
        if self.gbps.spread > MAX_TRUSTED_SPREAD {
            doubts.push(format!(
                "reads of the drive differ by {:.0} %",
                self.gbps.spread * 100.0
            ));
        }
        if !self.direct && self.io.is_none() {
            doubts.push(format!(
                "the file system of {} has no direct I/O, so what was measured may be the page cache",
                path.display()
            ));
        }
        doubts
    }
}

/// Bytes and time of a number of reads.
#[derive(Debug, Clone, Copy, Default)]
struct Burst {
    bytes: f64,
    seconds: f64,
}

/// Open files, to be read in the ways that are possible.
struct Opened {
    files: FileTier,
    /// The files once more, to be read through the page cache; none where it is settled how they are
    /// read.
    buffered: Option<FileTier>,
}

impl Opened {
    fn new(paths: &[PathBuf]) -> Result<Self> {
        let files = FileTier::open(paths, ReadMode::from_env()?)?;
        let is_settled = std::env::var_os("TIER_PLAN_IO").is_some() || !files.is_direct();
        let buffered = (!is_settled).then(|| FileTier::open(paths, ReadMode::Buffered));
        Ok(Self {
            files,
            buffered: buffered.transpose()?,
        })
    }
}

/// Places of experts in files, and the buffers to read them into.
struct Experts {
    /// `[expert][slice]`.
    extents: Vec<Vec<Extent>>,
    buffers: Vec<ArenaSlice>,
    /// State of a xorshift generator that picks experts.
    state: u64,
}

/// Files that contain experts.
pub struct Disk {
    opened: Opened,
    /// Found when it was measured how to read.
    io: Option<IoRates>,
    experts: Experts,
}

impl Disk {
    /// Opens a model's own experts.
    ///
    /// # Errors
    /// When its files cannot be read.
    pub fn of_model(gguf: &Gguf, spec: &ModelSpec) -> Result<Self> {
        let paths: Vec<PathBuf> = (0..gguf.n_parts())
            .map(|part| gguf.part_path(part).to_path_buf())
            .collect();
        Self::of(Opened::new(&paths)?, places(gguf, spec))
    }

    /// Opens the experts of a copy of the model, which is read as runs read it.
    ///
    /// # Errors
    /// When it cannot be read, or is of another model.
    pub fn of_copy(gguf: &Gguf, spec: &ModelSpec, path: &Path) -> Result<Self> {
        let copy = ExpertFiles::open(gguf, spec, path, 0.0).map_err(|e| naming(path, e))?;
        let opened = Opened {
            files: FileTier::open(&copy.paths(), ReadMode::from_env_or(None)?)?,
            buffered: None,
        };
        Self::of(opened, copy.places(gguf, spec))
    }

    /// Checks that [`of_folder`](Self::of_folder) has a folder to write to and space in it.
    ///
    /// # Errors
    /// When the folder is not writable or has too little space.
    pub fn check_folder(folder: &Path) -> Result<()> {
        Self::temporary(folder)?;
        if let Some(space) = file_system_space(folder) {
            ensure!(
                FILE_BYTES as u64 <= space.free_bytes,
                "--slow-dir {}: the drive is measured with a file of {}, but {} are free there",
                folder.display(),
                show_bytes(FILE_BYTES as u64),
                show_bytes(space.free_bytes)
            );
        }
        Ok(())
    }

    fn temporary(folder: &Path) -> Result<Temporary> {
        Temporary::create(folder).with_context(|| {
            format!(
                "making a file of {} to measure with in {}",
                show_bytes(FILE_BYTES as u64),
                folder.display()
            )
        })
    }

    /// Writes a file of 1 GiB into a folder and opens it. The file's name is removed as soon as the
    /// file is open, so it disappears with the process.
    ///
    /// # Errors
    /// When the folder is not writable or has too little space.
    pub fn of_folder(folder: &Path) -> Result<Self> {
        let file = Self::temporary(folder)?;
        fill(file.file()).with_context(|| {
            format!(
                "writing {} to {}",
                show_bytes(FILE_BYTES as u64),
                folder.display()
            )
        })?;
        let files = Opened::new(&[file.path().to_path_buf()])?;
        let slice = |at: usize| Extent {
            part: 0,
            offset: at as u64,
            len: SLICE_BYTES,
        };
        // As in a file of tensors, the slices of an expert are far apart and do not begin at a
        // page.
        let third = FILE_BYTES / 3;
        let n = (third - ALIGN) / SLICE_BYTES;
        let experts = (0..n)
            .map(|e| {
                (0..3)
                    .map(|part| slice(part * third + 32 + e * SLICE_BYTES))
                    .collect()
            })
            .collect();
        Self::of(files, experts)
    }

    fn of(opened: Opened, extents: Vec<Vec<Extent>>) -> Result<Self> {
        let room = extents
            .iter()
            .map(|e| e.iter().map(Extent::pages_bytes).sum())
            .max()
            .unwrap_or(0);
        ensure!(room > 0, "the model's experts have no bytes");
        let mut arena = Arena::new("buffers of experts", (room * MAX_BURST) as u64)?;
        let buffers = (0..MAX_BURST)
            .map(|_| arena.take(room))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            opened,
            io: None,
            experts: Experts {
                extents,
                buffers,
                state: 0x2545_f491_4f6c_dd1d,
            },
        })
    }

    /// Settles how the drive is read from now on: measures both ways by turns for about `time`, and
    /// takes the faster one. Has no effect where it is settled.
    ///
    /// # Errors
    /// When a read fails.
    pub fn choose_io(&mut self, time: Duration) -> Result<()> {
        let Some(buffered) = self.opened.buffered.take() else {
            return Ok(());
        };
        let (mut direct, mut cached) = (Vec::new(), Vec::new());
        let start = Instant::now();
        while direct.len() < MIN_ROUNDS || start.elapsed() < time {
            for (files, rates) in [(&self.opened.files, &mut direct), (&buffered, &mut cached)] {
                let picked = self.experts.pick(MAX_BURST);
                // Earlier uses of the file may have left these bytes in the page cache, and this read
                // drops them.
                self.experts.read(&buffered, &picked)?;
                let Burst { bytes, seconds } = self.experts.read(files, &picked)?;
                rates.push(bytes / seconds / 1e9);
            }
        }
        let io = IoRates {
            direct_gbps: Measured::of_many(&direct).value,
            buffered_gbps: Measured::of_many(&cached).value,
        };
        if io.best() == DriveIo::Buffered {
            self.opened.files = buffered;
        }
        self.io = Some(io);
        Ok(())
    }

    /// Reads random experts for about `time` and returns the rates.
    ///
    /// # Errors
    /// When a read fails.
    pub fn measure(&mut self, time: Duration) -> Result<DiskRate> {
        let latency_us = self.latency_us()?;
        let latency = latency_us.value * 1e-6;
        let start = Instant::now();
        let (mut rounds, mut total_bytes, mut total_experts) = (Vec::new(), 0.0, 0);
        let mut totals = [Burst::default(); BURSTS.len()];
        // A drive that is shared is measured for up to twice as long.
        let most = |rounds: &[f64]| {
            if Measured::is_stable(rounds) {
                time
            } else {
                2 * time
            }
        };
        while rounds.is_empty() || start.elapsed() < most(&rounds) {
            // A round's rate is what a layer gets if it misses each of these counts equally often.
            let mut slowness = 0.0;
            for (n, total) in BURSTS.into_iter().zip(&mut totals) {
                let Burst { bytes, seconds } = self.burst(n)?;
                slowness += (seconds - latency).max(seconds * 0.1) / bytes / BURSTS.len() as f64;
                total.bytes += bytes;
                total.seconds += seconds;
                total_bytes += bytes;
                total_experts += n as u64;
            }
            rounds.push(1e-9 / slowness);
        }
        let mut bursts = BURSTS.map(|experts| BurstRate { experts, gbps: 0.0 });
        for (burst, total) in bursts.iter_mut().zip(&totals) {
            burst.gbps = total.bytes / total.seconds.max(1e-9) / 1e9;
        }
        Ok(DiskRate {
            gbps: Measured::of_many(&rounds),
            latency_us,
            direct: self.opened.files.is_direct(),
            io: self.io,
            piece_bytes: total_bytes as u64 / total_experts.max(1),
            bursts,
        })
    }

    /// Reads `n` random experts at once.
    fn burst(&mut self, n: usize) -> Result<Burst> {
        let picked = self.experts.pick(n);
        self.experts.read(&self.opened.files, &picked)
    }

    /// Times single reads of one page.
    fn latency_us(&mut self) -> Result<Measured> {
        let mut times = Vec::with_capacity(SMALL_READS);
        for _ in 0..SMALL_READS {
            let expert = self.experts.random();
            let Some(&Extent { part, offset, .. }) = self.experts.extents[expert].first() else {
                break;
            };
            let extent = Extent {
                part,
                offset: offset / ALIGN as u64 * ALIGN as u64,
                len: ALIGN,
            };
            let Some(buffer) = self.experts.buffers.pop() else {
                break;
            };
            let start = Instant::now();
            let read = self.opened.files.read(
                &[Span {
                    extent,
                    at: 0,
                    whole_pages: true,
                }],
                buffer,
            )?;
            times.push(start.elapsed().as_secs_f64() * 1e6);
            self.experts.buffers.push(read);
        }
        Ok(Measured::of_many(&times))
    }
}

impl Experts {
    fn random(&mut self) -> usize {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state % self.extents.len().max(1) as u64) as usize
    }

    /// Returns `n` random experts.
    fn pick(&mut self, n: usize) -> Vec<usize> {
        (0..n).map(|_| self.random()).collect()
    }

    /// Reads experts at once, at most as many as there are buffers.
    fn read(&mut self, files: &FileTier, picked: &[usize]) -> Result<Burst> {
        let mut bytes = 0;
        let start = Instant::now();
        let mut submitted = 0;
        for (key, expert) in picked.iter().enumerate() {
            let Some(buffer) = self.buffers.pop() else {
                break;
            };
            let mut room = 0;
            let spans: Vec<Span> = self.extents[*expert]
                .iter()
                .map(|&extent| {
                    let span = Span {
                        extent,
                        at: room + extent.head(),
                        whole_pages: true,
                    };
                    room += extent.pages_bytes();
                    bytes += extent.len;
                    span
                })
                .collect();
            files.submit(key as u64, &spans, buffer, Priority::Demand);
            submitted += 1;
        }
        let mut failed = None;
        for _ in 0..submitted {
            let completion = files.wait()?;
            self.buffers.push(completion.buffer);
            failed = failed.or(completion.result.err());
        }
        let seconds = start.elapsed().as_secs_f64();
        match failed {
            None => Ok(Burst {
                bytes: bytes as f64,
                seconds: seconds.max(1e-9),
            }),
            Some(error) => Err(error.into()),
        }
    }
}

/// Writes incompressible bytes and syncs them to the drive.
fn fill(mut file: &File) -> Result<()> {
    let _catching = catch_interrupts();
    let mut block = vec![0u8; 4 << 20];
    let mut state = 0x0123_4567_89ab_cdefu64;
    let mut synced = Synced::default();
    for n in 1..=FILE_BYTES / block.len() {
        for eight in block.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            eight.copy_from_slice(&state.to_le_bytes());
        }
        file.write_all(&block)?;
        synced.after(file, (n * block.len()) as u64)?;
        if interrupted() {
            return Err(Interrupted.into());
        }
    }
    Ok(file.sync_all()?)
}
