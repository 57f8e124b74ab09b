//! How long a drive was busy, and what it delivered meanwhile.
//!
//! The rate of a drive is bytes over the time in which any read was in flight, so that neither
//! pauses of the program nor the number of reads at once are part of it. Waiting in the queue for a
//! reader is none of the drive's time either.

use std::time::{Duration, Instant};

/// Share of a busy time that is left to bytes at least, where latencies would take all of it.
const MIN_BYTES_SHARE: f64 = 0.1;

/// What reads brought, and how long they took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct DriveUse {
    /// Bytes that were wanted, without the rest of their pages.
    pub bytes: u64,
    /// Time in which any read was in flight.
    pub busy: Duration,
    /// Times that a read began while no other was in flight.
    pub bursts: u64,
}

impl DriveUse {
    /// Returns what came after an earlier moment.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self {
            bytes: self.bytes.saturating_sub(before.bytes),
            busy: self.busy.saturating_sub(before.busy),
            bursts: self.bursts.saturating_sub(before.bursts),
        }
    }

    /// Returns the rate in 10⁹ bytes per second, `bytes / (busy − bursts · latency)`, as `probe`
    /// defines it; `None` where nothing was read.
    pub fn gbps(self, latency_s: f64) -> Option<f64> {
        let busy_s = self.busy.as_secs_f64();
        let waited_s = latency_s.max(0.0) * self.bursts as f64;
        let seconds = (busy_s - waited_s).max(MIN_BYTES_SHARE * busy_s);
        (self.bytes > 0 && seconds > 0.0).then(|| self.bytes as f64 / seconds / 1e9)
    }
}

impl std::ops::AddAssign for DriveUse {
    fn add_assign(&mut self, more: Self) {
        self.bytes = self.bytes.saturating_add(more.bytes);
        self.busy = self.busy.saturating_add(more.busy);
        self.bursts = self.bursts.saturating_add(more.bursts);
    }
}

/// The clock of the reads in flight.
#[derive(Debug, Default)]
pub(super) struct DriveClock {
    done: DriveUse,
    in_flight: usize,
    /// When the first of the reads in flight began.
    since: Option<Instant>,
}

impl DriveClock {
    /// Counts a read that begins.
    pub(super) fn begin(&mut self, now: Instant) {
        if self.in_flight == 0 {
            self.since = Some(now);
            self.done.bursts += 1;
        }
        self.in_flight += 1;
    }

    /// Counts a read that ends and brought `bytes`.
    pub(super) fn end(&mut self, now: Instant, bytes: u64) {
        self.done.bytes = self.done.bytes.saturating_add(bytes);
        self.in_flight = self.in_flight.saturating_sub(1);
        if self.in_flight == 0
            && let Some(since) = self.since.take()
        {
            self.done.busy += now.saturating_duration_since(since);
        }
    }

    /// Returns what was counted, with the time of reads that are in flight.
    pub(super) fn usage(&self, now: Instant) -> DriveUse {
        let open = self
            .since
            .map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        DriveUse {
            busy: self.done.busy + open,
            ..self.done
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_at_once_count_once_and_pauses_do_not() {
        let start = Instant::now();
        let at = |ms: u64| start + Duration::from_millis(ms);
        let mut clock = DriveClock::default();
        assert_eq!(clock.usage(at(5)), DriveUse::default());
        // Two that overlap, a pause, and one that is still in flight.
        clock.begin(at(10));
        clock.begin(at(12));
        clock.end(at(14), 1_000_000);
        assert_eq!(clock.usage(at(15)).busy, Duration::from_millis(5));
        clock.end(at(20), 3_000_000);
        clock.begin(at(100));
        let usage = clock.usage(at(130));
        assert_eq!(usage.busy, Duration::from_millis(40));
        assert_eq!((usage.bytes, usage.bursts), (4_000_000, 2));
        // A read that failed brings nothing.
        clock.end(at(140), 0);
        let last = clock.usage(at(500)).since(usage);
        assert_eq!(last.busy, Duration::from_millis(10));
        assert_eq!((last.bytes, last.bursts), (0, 0));
    }

    #[test]
    fn rates_leave_out_latencies() {
        let usage = DriveUse {
            bytes: 2_000_000,
            busy: Duration::from_millis(2),
            bursts: 5,
        };
        assert_eq!(usage.gbps(0.0), Some(1.0));
        let rate = usage.gbps(200e-6).unwrap();
        assert!((rate - 2.0).abs() < 1e-9, "{rate}");
        // Latencies that would take all of the time.
        let rate = usage.gbps(1.0).unwrap();
        assert!((rate - 10.0).abs() < 1e-9, "{rate}");
        assert_eq!(DriveUse::default().gbps(0.0), None);
        let never = DriveUse {
            busy: Duration::ZERO,
            ..usage
        };
        assert_eq!(never.gbps(0.0), None);
    }

    #[test]
    fn an_end_without_a_beginning_changes_no_time() {
        let mut clock = DriveClock::default();
        clock.end(Instant::now(), 7);
        assert_eq!(clock.usage(Instant::now()).busy, Duration::ZERO);
    }
}
