//! The machine file that measurements describe.

use super::{CopyRate, Findings, copies};
use std::collections::BTreeMap;
use tier_plan_runtime::formats::SourceId;
use tier_plan_runtime::formats::machine::{Accelerator, Extras, Machine, Tier, TierKind};
use tier_plan_runtime::units::show_bytes;

impl Findings {
    /// Describes the measured machine as a machine file.
    pub fn machine(&self) -> Machine {
        let day = self.when.split('T').next().unwrap_or_default();
        let of = match &self.model {
            Some(model) => format!("the formats that a token of {model} reads"),
            None => "Q4_K".to_string(),
        };
        let compute = rounded(self.compute_gbps);
        // Experts are read while others compute, and a plan's tiers go from fast to slow.
        let own = self.disk.gbps.value.min(self.together.disk_gbps);
        let all = own + self.copies.iter().map(CopyRate::gbps).sum::<f64>();
        let read = rounded(all).min(compute);
        let numa = self
            .numa
            .map(|policy| format!(" and --numa {policy}"))
            .unwrap_or_default();
        let dram = Tier {
            name: "dram".into(),
            kind: TierKind::Dram,
            capacity_bytes: self.dram_bytes,
            read_gbps: compute,
            latency_us: 0.0,
            emulated: false,
            unit: None,
            accelerator: Accelerator::default(),
            source: format!(
                "measured {day}: matvecs of {of} with {} threads and {} kernels{numa}; bare reads {:.1} GB/s; while the drive \
                 is read {:.1} GB/s; capacity: {}",
                self.threads,
                self.isa,
                self.bare_gbps,
                self.together.compute_gbps,
                self.dram_bytes_from
            ),
        };
        let how = if self.disk.direct {
            "with direct I/O"
        } else {
            "through the page cache"
        };
        let slow = Tier {
            name: "nvme".into(),
            kind: TierKind::Nvme,
            capacity_bytes: self.disk_bytes,
            read_gbps: read,
            latency_us: rounded(self.disk.latency_us.value),
            emulated: false,
            unit: None,
            accelerator: Accelerator::default(),
            source: format!(
                "measured {day}: reads of {} {how}, 1 to 8 at once, while the cores compute; alone {:.2} GB/s{}",
                show_bytes(self.disk.piece_bytes),
                self.disk.gbps.value,
                match self.copies.len() {
                    0 => String::new(),
                    n => format!("; with {n} on other drives, all at once"),
                }
            ),
        };
        // Where the environment chose, the next run's may choose otherwise.
        let io = self.disk.io.map(|io| (slow.name.clone(), io.best()));
        let how = format!(
            "matvecs of {of} with {} threads and {} kernels",
            self.threads, self.isa
        );
        let main_memory = self.nodes.iter().map(|node| node.tier(day, &how));
        let mut tiers: Vec<Tier> = main_memory.collect();
        let computing = if tiers.is_empty() {
            "dram".to_string()
        } else {
            tiers[0].name.clone()
        };
        if tiers.is_empty() {
            tiers.push(dram);
        }
        let mut prompt_gflops =
            BTreeMap::from([(computing.clone(), rounded(self.prompt_gflops).max(1e-5))]);
        let few = rounded(self.few_gflops);
        let few_gflops = (few > 0.0)
            .then_some((computing, few))
            .into_iter()
            .collect();
        let mut links = BTreeMap::new();
        for gpu in self
            .gpus
            .found
            .iter()
            .filter(|gpu| gpu.capacity_bytes() > 0)
        {
            let name = if self.gpus.found.len() > 1 {
                format!("vram{}", gpu.device)
            } else {
                "vram".to_string()
            };
            links.insert(name.clone(), gpu.link(compute));
            if let Some(experts) = &gpu.experts {
                prompt_gflops.insert(name.clone(), rounded(experts.batch_gflops).max(1e-5));
            }
            tiers.push(gpu.tier(name, self.fixed.token_us, day));
        }
        let part = |iqr: f64| (iqr * 1e3).round() / 1e3;
        let spread = [
            ("dram", self.compute_iqr),
            (slow.name.as_str(), self.disk.gbps.iqr),
        ];
        let spread = spread
            .into_iter()
            .filter(|(name, _)| *name == slow.name || tiers.iter().any(|t| t.name == *name))
            .map(|(name, iqr)| (name.to_string(), part(iqr)))
            .collect();
        let slow_name = slow.name.clone();
        tiers.sort_by(|a, b| b.read_gbps.total_cmp(&a.read_gbps));
        let slowest = tiers.last().map_or(compute, |t| t.read_gbps);
        tiers.push(Tier {
            read_gbps: slow.read_gbps.min(slowest),
            ..slow
        });
        Machine {
            name: "probed".into(),
            description: format!("measured on {day}: {}", self.host),
            tiers,
            layer_overhead_us: rounded(self.fixed.layer_us),
            token_overhead_us: rounded(self.fixed.token_us),
            extras: Extras {
                prompt_gflops,
                few_gflops,
                spread,
                links,
                io: io.into_iter().collect(),
                copies: (!self.copies.is_empty())
                    .then(|| (slow_name, copies::shares(&self.copies, own)))
                    .into_iter()
                    .collect(),
                watts: self.power.watts,
                watts_source: self.power.watts.map(|_| self.power.how.clone()),
                ..Extras::default()
            },
            id: SourceId {
                name: "probed".into(),
                hash: String::new(),
            },
        }
        .identified()
    }
}

/// Rounds to three or four digits; a positive value never becomes 0.
pub(super) fn rounded(value: f64) -> f64 {
    let digits = if value < 0.1 {
        1e5
    } else if value < 10.0 {
        1e3
    } else {
        1e1
    };
    let short = (value * digits).round() / digits;
    if short > 0.0 { short } else { value.max(0.0) }
}
