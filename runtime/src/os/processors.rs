//! How much of the processors' time this process gets, and who has the rest.
//!
//! Linux counts for every thread how long it ran and how long it was ready to run but waited for a
//! processor (`schedstat`). It counts what a hypervisor took (*steal* in `/proc/stat`), and for how
//! long any thread of the machine waited (`/proc/pressure/cpu`). A [`Reading`] has the counters of a
//! moment, and [`Usage::between`] what two of them say about the time between.
//!
//! # The share of the processors
//! One thread, the caller, begins every loop and waits for its end, so nothing gets done while it is
//! kept off its processor. A worker that is kept off only lacks in a loop: the others do its part
//! (see the pool of `tier-plan-kernels`). So tokens get `s_0 · (1 + Σ s_i) / n · (1 − σ)` of what `n`
//! threads could do, where a thread has the share `s_i` of the time that it asks for, `s_0` is that
//! of the caller, and a hypervisor takes `σ` of the busy time.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Instant;

/// Least part of a window that a thread must have been running or ready for to say anything about
/// the processors' share.
const MIN_ACTIVE_SHARE: f64 = 0.02;

/// Shortest time between two readings that they say anything about, in seconds.
const MIN_WINDOW_S: f64 = 1e-6;

/// Ticks per second of the counters in `/proc/stat`, which Linux fixes for programs (`USER_HZ`).
const TICKS_PER_S: f64 = 100.0;

/// How long a thread ran, and how long it was ready and waited, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ThreadTime {
    /// Time on a processor.
    pub ran_ns: u64,
    /// Time on a run queue, ready but not running.
    pub waited_ns: u64,
}

/// Ticks of all processors since the machine started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MachineTicks {
    /// Ticks that programs and the system used.
    pub busy: u64,
    /// Ticks without work.
    pub idle: u64,
    /// Ticks that a hypervisor gave to other machines while there was work.
    pub stolen: u64,
}

/// The counters of a moment, as far as the system has them.
#[derive(Debug, Clone, Default)]
pub struct Reading {
    at: Option<Instant>,
    /// Number of the thread that reads, which is the one that begins loops.
    caller: Option<u32>,
    /// By thread number.
    threads: BTreeMap<u32, ThreadTime>,
    machine: Option<MachineTicks>,
    /// Ticks of this process, with those of threads that have ended.
    own: Option<u64>,
    /// Microseconds in which any thread of the machine waited for a processor.
    pressure_us: Option<u64>,
    /// Times that a thread of this process was taken off a processor against its will.
    preempted: Option<u64>,
}

impl Reading {
    /// Reads the counters of this process and of the machine.
    pub fn now() -> Self {
        Self::of(Path::new("/proc"))
    }

    /// Reads the counters below a folder that stands for `/proc`.
    fn of(proc: &Path) -> Self {
        let text = |path: &str| fs::read_to_string(proc.join(path)).unwrap_or_default();
        let (mut threads, mut preempted) = (BTreeMap::new(), None);
        let tasks = fs::read_dir(proc.join("self/task")).into_iter().flatten();
        for task in tasks.flatten() {
            let name = task.file_name();
            let Some(id) = name.to_str().and_then(|id| id.parse::<u32>().ok()) else {
                continue;
            };
            // A thread may end between the two looks at it.
            let file = |name: &str| fs::read_to_string(task.path().join(name)).unwrap_or_default();
            if let Some(time) = thread_time(&file("schedstat")) {
                threads.insert(id, time);
            }
            if let Some(times) = preemptions(&file("status")) {
                preempted = Some(preempted.unwrap_or(0u64).saturating_add(times));
            }
        }
        let own = fs::read_link(proc.join("thread-self")).unwrap_or_default();
        let own = own.file_name().and_then(|name| name.to_str());
        Self {
            at: Some(Instant::now()),
            caller: own.and_then(|id| id.parse().ok()),
            threads,
            machine: machine_ticks(&text("stat")),
            own: process_ticks(&text("self/stat")),
            pressure_us: pressure_us(&text("pressure/cpu")),
            preempted,
        }
    }
}

/// Parses a `schedstat`: nanoseconds on a processor, nanoseconds on a run queue, time slices.
pub fn thread_time(text: &str) -> Option<ThreadTime> {
    let mut fields = text.split_ascii_whitespace();
    let mut next = || fields.next()?.parse::<u64>().ok();
    Some(ThreadTime {
        ran_ns: next()?,
        waited_ns: next()?,
    })
}

/// Parses the line of all processors in `/proc/stat`: `cpu user nice system idle iowait irq softirq
/// steal guest guest_nice`. The last two are part of `user` and `nice`; old systems have fewer.
pub fn machine_ticks(text: &str) -> Option<MachineTicks> {
    let line = text.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let fields: Vec<u64> = line
        .split_ascii_whitespace()
        .map_while(|field| field.parse().ok())
        .collect();
    let [user, nice, system, idle, more @ ..] = fields.as_slice() else {
        return None;
    };
    let more = |at: usize| more.get(at).copied().unwrap_or(0);
    let sum = |parts: &[u64]| {
        parts
            .iter()
            .fold(0u64, |sum, part| sum.saturating_add(*part))
    };
    Some(MachineTicks {
        busy: sum(&[*user, *nice, *system, more(1), more(2)]),
        idle: sum(&[*idle, more(0)]),
        stolen: more(3),
    })
}

/// Parses a process's `stat`: returns the ticks that its threads ran, `utime` and `stime`. The name
/// of the program before them may have spaces and brackets.
pub fn process_ticks(text: &str) -> Option<u64> {
    let (_, fields) = text.rsplit_once(')')?;
    let mut times = fields.split_ascii_whitespace().skip(11);
    let mut next = || times.next()?.parse::<u64>().ok();
    Some(next()?.saturating_add(next()?))
}

/// Parses `/proc/pressure/cpu`: returns the `total` of its line `some`, in microseconds.
pub fn pressure_us(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("some "))?;
    let total = line
        .split_ascii_whitespace()
        .find_map(|field| field.strip_prefix("total="))?;
    total.parse().ok()
}

/// Parses a thread's `status`: returns how often it was taken off a processor against its will.
pub fn preemptions(text: &str) -> Option<u64> {
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("nonvoluntary_ctxt_switches:"))?;
    line.trim().parse().ok()
}

/// Who had the processors between two moments. What the system does not count is `None`.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Usage {
    /// Seconds between the moments.
    pub seconds: f64,
    /// Share of the time that tokens got of what the compute threads asked for, above 0 and at most
    /// 1; see the [module](self).
    pub share: Option<f64>,
    /// Part of the machine's busy time that a hypervisor took.
    pub stolen: Option<f64>,
    /// Processors that other programs used, on average.
    pub others: Option<f64>,
    /// Processors of the machine.
    pub processors: Option<f64>,
    /// Part of the time in which any thread of the machine waited for a processor.
    pub pressure: Option<f64>,
    /// Times per second that a thread of this process was taken off a processor against its will.
    pub preempted_per_s: Option<f64>,
}

impl Usage {
    /// Compares two readings. `n_threads` threads compute: those that ran or waited most.
    pub fn between(before: &Reading, after: &Reading, n_threads: usize) -> Self {
        let (Some(from), Some(to)) = (before.at, after.at) else {
            return Self::default();
        };
        let seconds = to.saturating_duration_since(from).as_secs_f64();
        Self::of(before, after, n_threads, seconds)
    }

    fn of(before: &Reading, after: &Reading, n_threads: usize, seconds: f64) -> Self {
        if seconds < MIN_WINDOW_S {
            return Self::default();
        }
        let threads = differences(before, after);
        let own = before.own.zip(after.own);
        let own = own.map(|(before, after)| after.saturating_sub(before) as f64);
        let machine = before.machine.zip(after.machine).map(|(before, after)| {
            let more = |of: fn(&MachineTicks) -> u64| of(&after).saturating_sub(of(&before)) as f64;
            [more(|m| m.busy), more(|m| m.idle), more(|m| m.stolen)]
        });
        let stolen = machine
            .filter(|[busy, _, stolen]| busy + stolen > 0.0)
            .map(|[busy, _, stolen]| stolen / (busy + stolen));
        let per_s = |before: Option<u64>, after: Option<u64>| {
            let (before, after) = before.zip(after)?;
            Some(after.saturating_sub(before) as f64 / seconds)
        };
        Self {
            seconds,
            share: share(&threads, after.caller, n_threads, seconds)
                .map(|share| (share * (1.0 - stolen.unwrap_or(0.0))).max(f64::MIN_POSITIVE)),
            stolen,
            others: machine
                .zip(own)
                .map(|([busy, ..], own)| (busy - own).max(0.0) / TICKS_PER_S / seconds),
            processors: machine
                .map(|ticks| (ticks.iter().sum::<f64>() / TICKS_PER_S / seconds).round())
                .filter(|n| *n >= 1.0),
            pressure: per_s(before.pressure_us, after.pressure_us)
                .map(|us_per_s| (us_per_s * 1e-6).min(1.0)),
            preempted_per_s: per_s(before.preempted, after.preempted),
        }
    }
}

/// Returns what each thread of the second reading ran and waited since the first.
fn differences(before: &Reading, after: &Reading) -> BTreeMap<u32, ThreadTime> {
    let since = |(id, now): (&u32, &ThreadTime)| {
        // A thread that is new has counted from 0, and so has one whose number was given again.
        let then = before.threads.get(id).copied().unwrap_or_default();
        let is_same = then.ran_ns <= now.ran_ns && then.waited_ns <= now.waited_ns;
        let then = if is_same { then } else { ThreadTime::default() };
        let time = ThreadTime {
            ran_ns: now.ran_ns - then.ran_ns,
            waited_ns: now.waited_ns - then.waited_ns,
        };
        (*id, time)
    };
    after.threads.iter().map(since).collect()
}

/// Returns the share of the time that tokens get, without what a hypervisor takes: that of the
/// caller, times the mean presence of the `n_threads` threads while it runs. Workers are those of the
/// other threads that ran or waited most; one that hardly did either had nothing to do.
fn share(
    threads: &BTreeMap<u32, ThreadTime>,
    caller: Option<u32>,
    n_threads: usize,
    seconds: f64,
) -> Option<f64> {
    let active = |t: &ThreadTime| t.ran_ns as f64 + t.waited_ns as f64;
    let mut known: Vec<(u32, ThreadTime)> = threads
        .iter()
        .map(|(id, time)| (*id, *time))
        .filter(|(_, time)| active(time) >= MIN_ACTIVE_SHARE * seconds * 1e9)
        .collect();
    known.sort_by(|(_, a), (_, b)| active(b).total_cmp(&active(a)));
    let first = known.iter().position(|(id, _)| Some(*id) == caller);
    let first = (!known.is_empty()).then(|| known.remove(first.unwrap_or(0)))?;
    let of = |(_, time): &(u32, ThreadTime)| time.ran_ns as f64 / active(time);
    let workers = n_threads.max(1) - 1;
    let lacking: f64 = known
        .iter()
        .take(workers)
        .map(|worker| 1.0 - of(worker))
        .sum();
    Some(of(&first) * (1.0 - lacking / (workers + 1) as f64))
}

#[cfg(test)]
#[path = "processors_tests.rs"]
mod tests;
