//! Pacing of emulated tiers: a stage takes as long as the declared rates of its tiers say.
//!
//! A stage's work runs first, on real memory. Then [`settle`] waits until the declared time has
//! passed since the stage began. Real tiers are not paced. The declared time is what the planner's
//! cost model predicts:
//!
//! - A dense stage takes the layer's fixed overhead, plus bytes over rate of each tier, one after
//!   the other. The KV cache and recurrent state that the stage moves are charged to their tier
//!   alike.
//! - An expert stage takes the longest of its paths, which overlap. An accelerator tier's path is
//!   the launch latency, then bytes over rate. The path of a tier that the CPU computes from is
//!   bytes over rate. The slow tier's path is its latency, then missed bytes over its rate, or over
//!   the rate of the link to their target if that is lower. Where the token alone chose the
//!   experts, their reads began with the dense stage: what that takes at the first tier's rate is
//!   over then.
//! - A token's rows of tables on a drive take its latency once, before bytes over rate.

use crate::cancel::{Cancel, POLL_INTERVAL};
use std::time::{Duration, Instant};
use tier_plan_formats::machine::{Tier, TierKind};
use tier_plan_formats::placement::{PerTier, TierIdx};

/// The last part of a wait, which spins instead of sleeping: sleeping overshoots by tens of
/// microseconds.
const SPIN: Duration = Duration::from_micros(120);

/// Bytes read from each tier in one stage.
///
/// ```
/// use tier_plan_runtime::formats::placement::TierIdx;
/// use tier_plan_runtime::tiers::pace::StageBytes;
///
/// let mut bytes = StageBytes::new(2);
/// bytes.add(TierIdx::new(1), 4096);
/// bytes.add(TierIdx::new(1), 4096);
/// assert_eq!(bytes.by_tier().as_slice(), [0, 8192]);
/// ```
#[derive(Debug, Clone, Default)]
pub struct StageBytes(PerTier<u64>);

impl StageBytes {
    /// Starts at zero bytes for each of `n_tiers` tiers.
    pub fn new(n_tiers: usize) -> Self {
        Self(PerTier::from_fn(n_tiers, |_| 0))
    }

    /// Adds bytes to a tier's count.
    pub fn add(&mut self, tier: TierIdx, bytes: u64) {
        self.0[tier] += bytes;
    }

    /// Returns the counts.
    pub fn by_tier(&self) -> &PerTier<u64> {
        &self.0
    }

    /// Resets all counts to zero.
    pub fn clear(&mut self) {
        self.0.iter_mut().for_each(|bytes| *bytes = 0);
    }
}

impl From<PerTier<u64>> for StageBytes {
    fn from(by_tier: PerTier<u64>) -> Self {
        Self(by_tier)
    }
}

/// Experts of a stage that are read from the last tier.
#[derive(Debug, Clone, Copy)]
pub struct Missed {
    /// Their bytes.
    pub bytes: u64,
    /// The tier that they are brought to.
    pub to: TierIdx,
    /// Bytes of the dense stage that their reads began with, where they were known before it.
    pub ahead_bytes: Option<u64>,
}

/// Computes the declared times of a plan's stages from the rates of its emulated tiers.
#[derive(Debug, Clone)]
pub struct Pacer {
    tiers: PerTier<Tier>,
    layer_overhead: Duration,
    token_overhead: Duration,
}

impl Pacer {
    /// Returns a pacer, or `None` where no tier is emulated.
    pub fn new(
        tiers: &PerTier<Tier>,
        layer_overhead_us: f64,
        token_overhead_us: f64,
    ) -> Option<Self> {
        tiers.iter().any(|t| t.emulated).then(|| Self {
            tiers: tiers.clone(),
            layer_overhead: micros(layer_overhead_us),
            token_overhead: micros(token_overhead_us),
        })
    }

    /// Returns the declared time of reading `bytes` from a tier; zero on real tiers.
    fn transfer(&self, tier: TierIdx, bytes: u64) -> Duration {
        let t = &self.tiers[tier];
        if t.emulated && bytes > 0 {
            seconds(bytes as f64 / (t.read_gbps * 1e9))
        } else {
            Duration::ZERO
        }
    }

    /// Returns the declared time of a layer's dense stage that reads `bytes` of weights, and moves
    /// `cache_bytes` of KV cache and recurrent state on the tier `kv_tier`.
    pub fn dense(&self, bytes: &StageBytes, kv_tier: TierIdx, cache_bytes: u64) -> Duration {
        self.layer_overhead
            + self
                .dense_by_tier(bytes, kv_tier, cache_bytes)
                .iter()
                .sum::<Duration>()
    }

    /// Returns the part of [`dense`](Self::dense) that each tier's bytes take.
    pub fn dense_by_tier(
        &self,
        bytes: &StageBytes,
        kv_tier: TierIdx,
        cache_bytes: u64,
    ) -> PerTier<Duration> {
        let mut times: PerTier<Duration> = bytes
            .0
            .enumerate()
            .map(|(t, b)| self.transfer(t, *b))
            .collect();
        times[kv_tier] += self.transfer(kv_tier, cache_bytes);
        times
    }

    /// Returns the declared time of a token's work outside layers: embedding, the tables on the tier
    /// `table`, and head.
    pub fn outside(&self, bytes: &StageBytes, table: Option<TierIdx>) -> Duration {
        let on_drive = |t: &&Tier| t.emulated && t.kind == TierKind::Nvme;
        let drive = table.map(|tier| &self.tiers[tier]).filter(on_drive);
        let latency = drive.map_or(Duration::ZERO, |t| micros(t.latency_us));
        self.token_overhead + latency + self.sum(bytes)
    }

    fn sum(&self, bytes: &StageBytes) -> Duration {
        bytes
            .0
            .enumerate()
            .map(|(tier, b)| self.transfer(tier, *b))
            .sum()
    }

    /// Returns the declared time of each path of an expert stage, by tier: for the bytes that
    /// experts were `computed` from, and for those that were `missed`.
    pub fn expert_paths(&self, computed: &StageBytes, missed: &Missed) -> PerTier<Duration> {
        let (missed_bytes, to) = (missed.bytes, missed.to);
        let slow = self.tiers.last_idx();
        let is_drive = self.tiers.last().is_some_and(|t| t.kind == TierKind::Nvme);
        let hidden = missed
            .ahead_bytes
            .filter(|_| is_drive && self.tiers.len() > 1)
            .zip(self.tiers.first())
            .map_or(Duration::ZERO, |(bytes, first)| {
                seconds(bytes as f64 / (first.read_gbps * 1e9))
            });
        let link = self.tiers[to]
            .accelerator
            .link_gbps
            .filter(|_| self.tiers[to].emulated && missed_bytes > 0);
        let link = link.map_or(Duration::ZERO, |gbps| {
            seconds(missed_bytes as f64 / (gbps * 1e9))
        });
        let path = |(index, tier): (TierIdx, &Tier)| {
            let bytes = computed.0[index];
            let launches = tier.kind == TierKind::Vram && tier.emulated && bytes > 0;
            let launch = if launches {
                micros(tier.latency_us)
            } else {
                Duration::ZERO
            };
            let compute = launch + self.transfer(index, bytes);
            if Some(index) != slow {
                return compute;
            }
            let latency = if tier.emulated && missed_bytes > 0 {
                micros(tier.latency_us)
            } else {
                Duration::ZERO
            };
            let transfer = latency + self.transfer(index, missed_bytes).max(link);
            compute.max(transfer.saturating_sub(hidden))
        };
        self.tiers.enumerate().map(path).collect()
    }
}

fn micros(us: f64) -> Duration {
    seconds(us * 1e-6)
}

/// Returns a declared time, at most one hour, so that sums stay in range whatever a machine file
/// says.
fn seconds(s: f64) -> Duration {
    Duration::from_secs_f64(s.clamp(0.0, 3600.0))
}

/// Waits until `declared` has passed since `start`, or until `cancel` is requested.
pub fn settle(start: Instant, declared: Duration, cancel: &Cancel) {
    let end = start + declared;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() || cancel.is_requested() {
            return;
        }
        if left > SPIN {
            std::thread::sleep((left - SPIN).min(POLL_INTERVAL))
        } else {
            std::hint::spin_loop()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tier_plan_formats::machine::Accelerator;

    fn tier(kind: TierKind, read_gbps: f64, latency_us: f64, emulated: bool) -> Tier {
        let name = format!("{kind:?}");
        Tier {
            name,
            kind,
            capacity_bytes: 1 << 30,
            read_gbps,
            latency_us,
            emulated,
            unit: None,
            accelerator: Accelerator::default(),
            source: String::new(),
        }
    }

    fn missed(bytes: u64, to: usize) -> Missed {
        Missed {
            bytes,
            to: TierIdx::new(to),
            ahead_bytes: None,
        }
    }

    #[test]
    fn expert_paths_overlap_and_dense_ones_add_up() {
        let tiers = [
            tier(TierKind::Vram, 10.0, 5.0, true),
            tier(TierKind::Dram, 1.0, 0.0, true),
            tier(TierKind::Nvme, 0.1, 40.0, true),
        ];
        let pacer = Pacer::new(&PerTier::from(tiers.clone()), 20.0, 60.0).unwrap();
        let mut bytes = StageBytes::new(3);
        bytes.add(TierIdx::new(0), 100_000); // 10 µs
        bytes.add(TierIdx::new(1), 30_000); // 30 µs
        assert_eq!(
            pacer.dense(&bytes, TierIdx::new(1), 0),
            Duration::from_micros(60)
        );
        assert_eq!(
            pacer.dense(&bytes, TierIdx::new(1), 5_000),
            Duration::from_micros(65)
        );
        assert_eq!(pacer.outside(&bytes, None), Duration::from_micros(100));
        // A table in memory, and one on the drive.
        for (tier, us) in [(1, 100), (2, 140)] {
            let declared = pacer.outside(&bytes, Some(TierIdx::new(tier)));
            assert_eq!(declared, Duration::from_micros(us));
        }
        let micros = |us: [u64; 3]| PerTier::from(us.map(Duration::from_micros));
        assert_eq!(
            pacer.expert_paths(&bytes, &missed(0, 1)),
            micros([15, 30, 0])
        );
        assert_eq!(
            pacer.expert_paths(&bytes, &missed(1_000, 1)),
            micros([15, 30, 50])
        );
        // Reads that began with a dense stage of 10 and of 100 µs.
        for (ahead, us) in [(100_000, 40), (1_000_000, 0)] {
            let ahead = Missed {
                ahead_bytes: Some(ahead),
                ..missed(1_000, 1)
            };
            assert_eq!(pacer.expert_paths(&bytes, &ahead), micros([15, 30, us]));
        }
        // A link that is slower than the reads, where they cross it.
        let [mut vram, dram, slow] = tiers;
        vram.accelerator.link_gbps = Some(0.05);
        let pacer = Pacer::new(&PerTier::from([vram, dram, slow]), 20.0, 60.0).unwrap();
        assert_eq!(
            pacer.expert_paths(&bytes, &missed(1_000, 0)),
            micros([15, 30, 60])
        );
        assert_eq!(
            pacer.expert_paths(&bytes, &missed(1_000, 1)),
            micros([15, 30, 50])
        );
    }

    #[test]
    fn absurd_rates_are_slow_but_stay_in_range() {
        let tiers = PerTier::from([
            tier(TierKind::Vram, 1e-308, 1e308, true),
            tier(TierKind::Nvme, 5e-324, 1e308, true),
        ]);
        let pacer = Pacer::new(&tiers, 1e308, 1e308).unwrap();
        let mut bytes = StageBytes::new(2);
        bytes.add(TierIdx::new(0), u64::MAX);
        bytes.add(TierIdx::new(1), u64::MAX);
        let hour = Duration::from_secs(3600);
        assert_eq!(pacer.dense(&bytes, TierIdx::new(0), u64::MAX), 4 * hour);
        assert_eq!(
            pacer.expert_paths(&bytes, &missed(u64::MAX, 0)),
            PerTier::from([2 * hour, 2 * hour])
        );
    }

    #[test]
    fn real_tiers_are_not_paced() {
        assert!(
            Pacer::new(
                &PerTier::from([tier(TierKind::Dram, 1.0, 0.0, false)]),
                20.0,
                60.0
            )
            .is_none()
        );
    }

    #[test]
    fn settling_never_ends_early() {
        for us in [0, 50, 400] {
            let start = Instant::now();
            settle(start, Duration::from_micros(us), &Cancel::default());
            assert!(start.elapsed() >= Duration::from_micros(us));
        }
    }

    #[test]
    fn a_canceled_wait_ends() {
        let cancel = Cancel::default();
        let start = Instant::now();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(20));
                cancel.request();
            });
            settle(start, Duration::from_secs(60), &cancel);
        });
        assert!((20..5000).contains(&start.elapsed().as_millis()));
    }
}
