//! Memory of the process that runs a model, budgets of a plan's tiers, and where experts come from.

use super::value::file_or_yes;
use crate::auto::Auto;
use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use std::path::{Path, PathBuf};
use tier_plan_runtime::formats::machine::Machine;
use tier_plan_runtime::units::{parse_bytes, show_bytes};

/// The plan of a run, or the memory that a run without one may use.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Memory")]
pub struct MemoryArgs {
    /// Placement plan that `tier-plan solve` wrote [default: everything in main memory, or as much
    /// as fits]
    #[arg(long, value_name = "FILE")]
    pub plan: Option<PathBuf>,
    /// Memory of the whole process; experts that don't fit are read from the file on demand
    /// [default: free memory, or the cgroup limit]
    #[arg(long, alias = "dram", value_name = "SIZE", conflicts_with = "plan")]
    pub memory: Option<String>,
    /// Profile to choose pinned experts from when memory is short
    #[arg(short = 'P', long, value_name = "FILE", conflicts_with = "plan")]
    pub profile: Option<PathBuf>,
    /// Use the memory-mapped weights instead of a copy in huge pages: starts at once, runs slower
    #[arg(long, conflicts_with_all = ["plan", "memory"])]
    pub mmap: bool,
    /// Measure the machine once, solve for a plan, keep both for the next start, and learn from use
    #[arg(long, conflicts_with_all = ["plan", "mmap"])]
    pub auto: bool,
    #[command(flatten)]
    #[allow(missing_docs)]
    pub how: PlanningArgs,
}

/// How a plan is made without being asked for.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Memory")]
pub struct PlanningArgs {
    /// With --auto: machine file, or the name of a bundled machine, to plan for [default: measured once]
    #[arg(long, value_name = "FILE")]
    pub machine: Option<PathBuf>,
    /// With --auto: measure the machine again
    #[arg(long, conflicts_with = "machine")]
    pub probe: bool,
    /// With --auto: do not record which experts texts choose
    #[arg(long)]
    pub no_learn: bool,
}

impl MemoryArgs {
    /// Returns whether and how a plan is made without being asked for.
    ///
    /// # Errors
    /// When an option would have no effect.
    pub fn auto(&self) -> Result<Option<Auto<'_>>> {
        let PlanningArgs {
            machine,
            probe,
            no_learn,
        } = &self.how;
        if !self.auto {
            // A machine may be a setting for other commands.
            ensure!(
                !probe,
                "--probe: no effect without --auto, expected it, too"
            );
            return Ok(None);
        }
        Ok(Some(Auto {
            machine: machine.as_deref(),
            probe: *probe,
            learn: !no_learn,
        }))
    }

    /// Returns the bytes of `--memory`.
    ///
    /// # Errors
    /// When it is not a size.
    pub fn bytes(&self) -> Result<Option<u64>> {
        let parse = |size| parse_bytes(size).with_context(|| format!("--memory {size}"));
        self.memory.as_deref().map(parse).transpose()
    }
}

/// Budgets of tiers.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Memory")]
pub struct BudgetArgs {
    /// Budget of a tier, such as `vram=11GiB`; repeatable [default: the tier's capacity]
    #[arg(short, long, value_name = "TIER=SIZE", value_delimiter = ',')]
    pub budget: Vec<String>,
    /// Budget of the tier named vram
    #[arg(long, value_name = "SIZE")]
    pub vram: Option<String>,
    /// Budget of the tier named dram
    #[arg(long, value_name = "SIZE")]
    pub dram: Option<String>,
}

impl BudgetArgs {
    /// Returns the `[tiers]` bytes that a plan may use of each tier.
    ///
    /// # Errors
    /// When a budget is malformed, names an unknown tier, or exceeds its capacity.
    pub fn bytes(&self, machine: &Machine) -> Result<Vec<u64>> {
        let mut given = Vec::new();
        for text in &self.budget {
            let Some((tier, size)) = text.split_once('=') else {
                bail!("--budget {text}: no size, expected TIER=SIZE such as dram=11GiB");
            };
            given.push(GivenBudget {
                tier: tier.trim(),
                size,
                flag: format!("--budget {text}"),
            });
        }
        for (tier, size) in [("vram", &self.vram), ("dram", &self.dram)] {
            if let Some(size) = size {
                given.push(GivenBudget {
                    tier,
                    size,
                    flag: format!("--{tier} {size}"),
                });
            }
        }
        let mut budgets: Vec<Option<u64>> = vec![None; machine.tiers.len()];
        for GivenBudget {
            tier: name,
            size,
            flag,
        } in given
        {
            let Some(at) = machine.tiers.iter().position(|t| t.name == name) else {
                let names: Vec<&str> = machine.tiers.iter().map(|t| t.name.as_str()).collect();
                bail!(
                    "{flag}: machine '{}' has no tier '{name}', expected one of {}",
                    machine.name,
                    names.join(", ")
                );
            };
            let bytes = parse_bytes(size).with_context(|| flag.clone())?;
            let capacity = machine.tiers[at].capacity_bytes;
            ensure!(
                bytes <= capacity,
                "{flag}: tier '{name}' holds {}, expected that or less",
                show_bytes(capacity)
            );
            ensure!(
                budgets[at].is_none(),
                "{flag}: tier '{name}' has two budgets, expected one"
            );
            budgets[at] = Some(bytes);
        }
        Ok(budgets
            .iter()
            .zip(&machine.tiers)
            .map(|(b, tier)| b.unwrap_or(tier.capacity_bytes))
            .collect())
    }
}

/// One budget as given.
struct GivenBudget<'a> {
    tier: &'a str,
    size: &'a str,
    /// Option and value, for errors.
    flag: String,
}

/// Whether to compare what is read with checksums.
#[derive(Debug, Default, Args)]
pub struct VerifyArgs {
    /// Verify everything that is read against checksums in FILE [default FILE: MODEL.sums, created
    /// if missing]
    #[arg(
        long,
        value_name = "FILE",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "1",
        value_parser = file_or_yes,
        help_heading = "Storage"
    )]
    // The full path keeps clap from reading the inner option as "given without a value".
    pub verify: Option<std::option::Option<PathBuf>>,
}

impl VerifyArgs {
    /// Returns the checksum file, if one is named, where verification is asked for.
    pub fn asked(&self) -> Option<Option<&Path>> {
        self.verify.as_ref().map(Option::as_deref)
    }
}

/// Where experts come from that are read on demand, and what the slots begin with.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Storage")]
pub struct StoreArgs {
    #[command(flatten)]
    #[allow(missing_docs)]
    pub verify: VerifyArgs,
    /// Read experts from this copy that `tier-plan pack` made [default: MODEL.experts, if it
    /// exists]
    #[arg(long, value_name = "FILE")]
    pub pack: Option<PathBuf>,
    /// Fill the slots with the experts that FILE lists, if it exists, and write it at exit
    #[arg(long, value_name = "FILE")]
    pub slots: Option<PathBuf>,
    /// Fill empty slots with the experts that this profile shows as most used
    #[arg(long, value_name = "PROFILE")]
    pub warm: Option<PathBuf>,
}

#[cfg(test)]
mod tests {
    use crate::cmd::{Command, parse_alone};
    use anyhow::{Result, bail};
    use tier_plan_runtime::formats::SourceId;
    use tier_plan_runtime::formats::machine::{Accelerator, Machine, Tier, TierKind};

    fn asked(flags: &[&str]) -> Result<Vec<u64>> {
        let tier = |name: &str, kind, capacity_bytes| Tier {
            name: name.to_string(),
            kind,
            capacity_bytes,
            read_gbps: 1.0,
            latency_us: 0.0,
            emulated: false,
            unit: None,
            accelerator: Accelerator::default(),
            source: String::new(),
        };
        let machine = Machine {
            name: "m".to_string(),
            description: String::new(),
            tiers: vec![
                tier("dram", TierKind::Dram, 1 << 30),
                tier("slow", TierKind::Nvme, 1 << 40),
            ],
            layer_overhead_us: 0.0,
            token_overhead_us: 0.0,
            extras: Default::default(),
            id: SourceId {
                name: "m".to_string(),
                hash: String::new(),
            },
        };
        let line = [
            &["tier-plan", "solve", "model.gguf", "-M", "machine.toml"],
            flags,
        ]
        .concat();
        match parse_alone(line.into_iter().map(Into::into))? {
            Command::Solve(args) => args.budget.bytes(&machine),
            _ => bail!("not solve"),
        }
    }

    #[test]
    fn budgets_are_read_and_refused() -> Result<()> {
        assert_eq!(asked(&[])?, [1 << 30, 1 << 40]);
        assert_eq!(asked(&["--dram", "3MiB"])?, [3 << 20, 1 << 40]);
        assert_eq!(
            asked(&["-b", "slow=1GiB", "--budget", "dram=0"])?,
            [0, 1 << 30]
        );
        let refused = |flags: &[&str], word: &str| {
            let error = asked(flags)
                .err()
                .map(|e| format!("{e:#}"))
                .unwrap_or_default();
            assert!(error.contains(word), "{word}: {error}");
        };
        refused(
            &["--vram", "1GiB"],
            "has no tier 'vram', expected one of dram, slow",
        );
        refused(&["--dram", "2GiB"], "holds 1.00 GiB");
        refused(&["--dram", "1MiB", "-b", "dram=2MiB"], "expected one");
        refused(&["-b", "dram"], "TIER=SIZE");
        refused(&["--dram", "much"], "is not a size");
        Ok(())
    }
}
