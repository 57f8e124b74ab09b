//! Sweeps a tier's size: asks one question for a tier of one size after another.

use super::{Answer, Question, Supposed, answer_supposing};
use anyhow::{Context, Result, bail, ensure};
use tier_plan_runtime::formats::machine::Machine;
use tier_plan_runtime::units::parse_bytes;

/// Sizes that are swept by default.
const DEFAULT_STEPS: usize = 8;

/// Sizes that are swept at most.
const MAX_STEPS: usize = 256;

/// Relative gain of speed from the first to the last size below which there is no knee.
const MIN_RISE: f64 = 0.01;

/// How far a curve must rise above the straight line between its ends to have a knee, as a share of
/// its height.
const MIN_KNEE_HEIGHT: f64 = 0.1;

/// A tier and the sizes to sweep.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Range {
    /// Name of the tier.
    pub tier: String,
    /// Sizes in bytes, ascending.
    pub sizes: Vec<u64>,
}

/// One size with its answer.
#[derive(Debug)]
pub struct Point {
    /// Size of the tier.
    pub bytes: u64,
    /// Answer for this size.
    pub answer: Result<Answer>,
}

/// The answers for all sizes.
#[derive(Debug)]
pub struct Sweep {
    /// Name of the tier.
    pub tier: String,
    /// One point per size, ascending.
    pub points: Vec<Point>,
    /// Position of the point after which more of the tier gains much less.
    pub knee: Option<usize>,
}

impl Range {
    /// Parses `dram=64GiB..512GiB` or `dram=64GiB..512GiB:15`.
    ///
    /// # Errors
    /// Names what was expected.
    pub fn parse(text: &str) -> Result<Range> {
        let shape = || {
            format!(
                "--sweep {text}: write TIER=FROM..TO, or TIER=FROM..TO:STEPS, like dram=64GiB..512GiB:8"
            )
        };
        let (tier, rest) = text.split_once('=').with_context(shape)?;
        let (from, rest) = rest.split_once("..").with_context(shape)?;
        let (to, steps) = match rest.split_once(':') {
            Some((to, steps)) => (to, steps.trim().parse::<usize>().ok().with_context(shape)?),
            None => (rest, DEFAULT_STEPS),
        };
        ensure!(
            (2..=MAX_STEPS).contains(&steps),
            "--sweep {text}: {steps} steps; give 2 to {MAX_STEPS}"
        );
        let size = |size: &str| parse_bytes(size).with_context(|| format!("--sweep {text}"));
        let (from, to) = (size(from)?, size(to)?);
        ensure!(
            from < to,
            "--sweep {text}: the second size must be larger than the first"
        );
        ensure!(
            to <= i64::MAX as u64,
            "--sweep {text}: sizes must be below 8 EiB"
        );
        let step = |i: usize| from + ((to - from) as u128 * i as u128 / (steps as u128 - 1)) as u64;
        Ok(Range {
            tier: tier.trim().to_string(),
            sizes: (0..steps).map(step).collect(),
        })
    }
}

/// Returns the machine with a tier of another size, and a price that follows.
pub(super) fn resized(machine: &Machine, tier: usize, bytes: u64) -> Machine {
    let mut machine = machine.clone();
    let before = machine.tiers[tier].capacity_bytes;
    machine.tiers[tier].capacity_bytes = bytes;
    let each = machine
        .extras
        .usd_per_gb
        .get(&machine.tiers[tier].name)
        .copied();
    machine.extras.price_usd = machine
        .extras
        .price_usd
        .zip(each)
        .map(|(price, each)| (price + (bytes as f64 - before as f64) / 1e9 * each).max(0.0));
    machine.identified()
}

/// Returns the machine and budgets of a question with a tier of another size, if there is such a
/// tier.
pub fn at_size(question: &Question<'_>, tier: &str, bytes: u64) -> Option<(Machine, Vec<u64>)> {
    let at = question.machine.tiers.iter().position(|t| t.name == tier)?;
    let mut budgets = question.budgets.clone();
    *budgets.get_mut(at)? = bytes;
    Some((resized(question.machine, at, bytes), budgets))
}

/// Asks the question for every size, calling `each` after it. A size begins with the columns that
/// were priced for those before.
///
/// # Errors
/// Fails if the machine has no such tier.
pub fn sweep(
    question: &Question<'_>,
    supposed: &Supposed,
    range: &Range,
    mut each: impl FnMut(usize),
) -> Result<Sweep> {
    let tiers = &question.machine.tiers;
    if !tiers.iter().any(|t| t.name == range.tier) {
        let names: Vec<&str> = tiers.iter().map(|t| t.name.as_str()).collect();
        bail!(
            "--sweep {}: machine '{}' has no such tier; its tiers are {}",
            range.tier,
            question.machine.name,
            names.join(", ")
        );
    }
    let mut points: Vec<Point> = Vec::with_capacity(range.sizes.len());
    for (done, &bytes) in range.sizes.iter().enumerate() {
        let Some((machine, budgets)) = at_size(question, &range.tier, bytes) else {
            continue;
        };
        let question = Question {
            machine: &machine,
            budgets,
            ..question.clone()
        };
        points.push(Point {
            bytes,
            answer: answer_supposing(&question, supposed),
        });
        each(done + 1);
    }
    let speeds: Vec<Option<f64>> = points
        .iter()
        .map(|p| p.answer.as_ref().ok().map(|a| a.decode_tok_s()[0]))
        .collect();
    let sizes: Vec<f64> = points.iter().map(|p| p.bytes as f64).collect();
    let knee = knee(&sizes, &speeds);
    Ok(Sweep {
        tier: range.tier.clone(),
        points,
        knee,
    })
}

/// Returns the point farthest above the straight line between the first and the last that fit, if
/// the curve bends.
fn knee(sizes: &[f64], speeds: &[Option<f64>]) -> Option<usize> {
    let with_speed = speeds
        .iter()
        .enumerate()
        .filter_map(|(at, speed)| Some((at, (*speed)?)));
    let points: Vec<(usize, f64)> = with_speed.collect();
    let (&(first, y0), &(last, y1)) = (points.first()?, points.last()?);
    let (x0, x1) = (sizes[first], sizes[last]);
    if points.len() < 3 || y1 <= y0 * (1.0 + MIN_RISE) {
        return None;
    }
    let above = |&(at, y): &(usize, f64)| (y - y0) / (y1 - y0) - (sizes[at] - x0) / (x1 - x0);
    let best = points.iter().max_by(|a, b| above(a).total_cmp(&above(b)))?;
    (above(best) > MIN_KNEE_HEIGHT).then_some(best.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_and_refused() -> Result<()> {
        let range = Range::parse("dram=64GiB..512GiB:8")?;
        assert_eq!((range.tier.as_str(), range.sizes.len()), ("dram", 8));
        assert_eq!(
            (range.sizes[0], range.sizes[1], range.sizes[7]),
            (64 << 30, 128 << 30, 512 << 30)
        );
        assert_eq!(Range::parse("x=1..2:2")?.sizes, [1, 2]);
        assert_eq!(Range::parse("x=0..8TiB")?.sizes.len(), DEFAULT_STEPS);
        for (text, words) in [
            ("dram", "write TIER=FROM..TO"),
            ("dram=64GiB", "write TIER=FROM..TO"),
            ("dram=64GiB..", "is not a size"),
            ("dram=1..2:x", "write TIER=FROM..TO"),
            ("dram=1..2:1", "1 steps; give 2 to 256"),
            ("dram=1..2:1000000000", "give 2 to 256"),
            ("dram=2GiB..1GiB", "must be larger"),
            ("dram=1..1e18GiB", "is not a size"),
        ] {
            let error = Range::parse(text)
                .err()
                .map(|e| format!("{e:#}"))
                .unwrap_or_default();
            assert!(error.contains(words), "{text}: {error}");
        }
        Ok(())
    }

    #[test]
    fn the_knee_is_where_the_curve_bends() {
        let sizes: Vec<f64> = (0..6).map(f64::from).collect();
        let speeds = |s: [f64; 6]| s.map(Some);
        assert_eq!(
            knee(&sizes, &speeds([1.0, 2.0, 3.0, 3.1, 3.2, 3.3])),
            Some(2)
        );
        assert_eq!(knee(&sizes, &speeds([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])), None);
        // Slow at first, then fast at the end: there is no point to stop at before.
        assert_eq!(knee(&sizes, &speeds([1.0, 1.1, 1.2, 1.3, 1.4, 6.0])), None);
        assert_eq!(
            knee(
                &sizes,
                &[None, None, Some(1.0), Some(3.0), Some(3.2), Some(3.3)]
            ),
            Some(3)
        );
        assert_eq!(knee(&sizes, &[None; 6]), None);
        assert_eq!(knee(&sizes, &speeds([2.0; 6])), None);
    }
}
