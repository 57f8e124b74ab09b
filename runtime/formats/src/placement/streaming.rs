//! Experts of main memory that a GPU computes for a token, so that both end together.

use super::{Placement, TierIdx};
use crate::machine::Tier;

/// How experts of main memory are streamed to a GPU while the CPU computes the others of a token.
///
/// Both read main memory, so each is slower than alone.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Streaming {
    /// The GPU's tier.
    pub tier: TierIdx,
    /// The tier that the experts are in: main memory.
    pub from: TierIdx,
    /// Most experts of a layer that are streamed for a token: that many buffers are on the GPU, each
    /// as large as the largest expert of the model.
    pub experts: u32,
    /// Rate over the link while the CPU computes, in 10⁹ bytes per second.
    pub link_gbps: f64,
    /// Part of the rate of `from` that the CPU keeps meanwhile, above 0 and at most 1.
    pub cpu_share: f64,
}

/// How a token's experts of one layer are divided.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Division {
    /// Experts of main memory that the GPU computes.
    pub streamed: u32,
    /// Seconds until the CPU has computed the others.
    pub cpu_s: f64,
    /// Seconds until the GPU has computed these, and its own.
    pub gpu_s: f64,
}

impl Division {
    /// Returns the seconds until both are done.
    pub fn seconds(self) -> f64 {
        self.cpu_s.max(self.gpu_s)
    }
}

/// What a layer's experts take where some are streamed, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StreamTimes {
    /// The CPU for an expert while nothing is streamed.
    alone_s: f64,
    /// The CPU for an expert during a transfer.
    beside_s: f64,
    /// An expert's transfer.
    link_s: f64,
    /// The GPU for an expert.
    gpu_s: f64,
    /// The GPU's launches.
    launch_s: f64,
    /// Most experts that are streamed.
    most: u32,
}

impl StreamTimes {
    /// Returns the times of experts of `bytes` bytes. `tier` and `from` are the tiers of the same
    /// names, as experts compute on them.
    pub fn new(streaming: &Streaming, tier: &Tier, from: &Tier, bytes: u64) -> Self {
        let seconds = |gbps: f64| bytes as f64 / (gbps * 1e9);
        StreamTimes {
            alone_s: seconds(from.read_gbps),
            beside_s: seconds(from.read_gbps * streaming.cpu_share),
            link_s: seconds(streaming.link_gbps),
            gpu_s: seconds(tier.read_gbps),
            launch_s: tier.latency_us * 1e-6,
            most: streaming.experts,
        }
    }

    /// Divides a token's experts: `in_memory` in main memory, up to `sendable` of which can be
    /// streamed, and `on_gpu` on the GPU. The fewest are streamed with which both are done first.
    ///
    /// A GPU computes its own experts while others are on their way, and these once all have come.
    pub fn divide(&self, in_memory: u32, sendable: u32, on_gpu: u32) -> Division {
        let own_s = f64::from(on_gpu) * self.gpu_s;
        let launched = |seconds: f64| seconds + self.launch_s;
        let mut best = Division {
            streamed: 0,
            cpu_s: f64::from(in_memory) * self.alone_s,
            gpu_s: if on_gpu > 0 { launched(own_s) } else { 0.0 },
        };
        for streamed in 1..=self.most.min(sendable).min(in_memory) {
            let n = f64::from(streamed);
            let division = Division {
                streamed,
                cpu_s: f64::from(in_memory - streamed) * self.beside_s,
                gpu_s: launched(own_s.max(n * self.link_s) + n * self.gpu_s),
            };
            if division.seconds() < best.seconds() {
                best = division;
            }
        }
        best
    }

    /// Returns the least part of a token's expert stage that is left when experts are streamed,
    /// however many are in main memory and on the GPU of the `n_used` that a token chooses.
    pub fn least_part(&self, n_used: u32) -> f64 {
        let plain = StreamTimes { most: 0, ..*self };
        let part = |in_memory: u32, on_gpu: u32| {
            let divided = self.divide(in_memory, in_memory, on_gpu).seconds();
            divided / plain.divide(in_memory, 0, on_gpu).seconds()
        };
        let in_memory = 1..=n_used;
        let parts = in_memory.flat_map(|n| (0..=n_used - n).map(move |on_gpu| part(n, on_gpu)));
        parts.fold(1.0, f64::min)
    }
}

impl Placement {
    /// Returns the times of a layer's experts of `bytes` bytes, if the plan streams any.
    pub fn stream_times(&self, bytes: u64) -> Option<StreamTimes> {
        let streaming = self.streaming.as_ref()?;
        let (tier, from) = (
            self.tiers.get(streaming.tier)?,
            self.tiers.get(streaming.from)?,
        );
        Some(StreamTimes::new(streaming, &tier.tier, &from.tier, bytes))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(alone: f64, beside: f64, link: f64, most: u32) -> StreamTimes {
        StreamTimes {
            alone_s: alone,
            beside_s: beside,
            link_s: link,
            gpu_s: 0.1,
            launch_s: 0.05,
            most,
        }
    }

    #[test]
    fn both_sides_end_as_nearly_together_as_whole_experts_allow() {
        let t = times(1.0, 1.2, 3.0, 8);
        // 8 experts alone take 8.0; with two streamed the CPU takes 7.2 and the GPU 6.25.
        let division = t.divide(8, 8, 0);
        assert_eq!(division.streamed, 2);
        assert!((division.cpu_s - 7.2).abs() < 1e-9 && (division.gpu_s - 6.25).abs() < 1e-9);
        let least = (1..=8).map(|n| t.divide(n, n, 0).seconds() / f64::from(n));
        let least = least.fold(f64::INFINITY, f64::min);
        assert_eq!(t.least_part(8), least);
        assert!(least < 1.0 && division.seconds() >= 8.0 * least);
        // No way of dividing is shorter.
        for (in_memory, on_gpu) in [(0, 3), (1, 0), (3, 0), (8, 0), (6, 40), (20, 4)] {
            let best = t.divide(in_memory, in_memory, on_gpu);
            for most in 0..=8 {
                let other = times(1.0, 1.2, 3.0, most).divide(in_memory, in_memory, on_gpu);
                assert!(
                    best.seconds() <= other.seconds(),
                    "{in_memory} {on_gpu} {most}"
                );
            }
        }
    }

    #[test]
    fn what_does_not_pay_is_not_streamed() {
        // The link takes from the CPU as much as it brings.
        let t = times(1.0, 2.0, 2.0, 4);
        assert_eq!(t.divide(8, 8, 0).streamed, 0);
        assert_eq!(t.least_part(8), 1.0);
        // Two experts: one on each side would end later than both on the CPU.
        assert_eq!(times(1.0, 1.2, 3.0, 4).divide(2, 2, 0).streamed, 0);
        // The GPU is busy with its own.
        assert_eq!(times(1.0, 1.2, 3.0, 4).divide(8, 8, 100).streamed, 0);
        // Only one can be sent, and none at all.
        assert_eq!(times(1.0, 1.1, 3.0, 4).divide(8, 1, 0).streamed, 1);
        assert_eq!(times(1.0, 1.1, 3.0, 4).divide(8, 0, 0).streamed, 0);
    }
}
