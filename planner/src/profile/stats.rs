//! Measures whether pinning can pay: how unevenly experts are used, and how much of that holds for
//! unseen text.

use super::{check_traces, drawn};
use crate::profile::replay::{LayerTrace, Positions};
use anyhow::Result;
use tier_plan_runtime::formats::profile::{Profile, Split};

/// Shares of a layer's experts at which hit rates are measured.
pub const SHARES: [f64; 3] = [0.10, 0.25, 0.50];

/// Skew of the routing of decoded tokens, averaged over the layers.
#[derive(Debug, Clone, PartialEq)]
pub struct Skew {
    /// Domain of the prompts, or `None` for all.
    pub domain: Option<String>,
    /// Decoded held-out tokens that it was measured on. With counts alone, the prompt tokens
    /// counted.
    pub tokens: u64,
    /// Whether the choices are those of other prompts than the favorites were chosen on.
    pub held_out: bool,
    /// Whether only counts are known. Pins are then measured on the choices that the favorites were
    /// chosen by, and slots on tokens drawn from the counts.
    pub counted: bool,
    /// Share of experts for each of [`SHARES`], rounded up to whole ones. Uniform routing would hit
    /// this often.
    pub uniform: [f64; 3],
    /// Share of held-out choices that hit the experts most used in the train prompts.
    pub caught: [f64; 3],
    /// Share of held-out choices that hit in as many slots, with nothing pinned.
    pub cached: [f64; 3],
    /// Experts that would give the same entropy if used evenly: 2 to the power of the entropy in
    /// bits.
    pub effective_experts: f64,
}

/// Consequence of a skew for a plan.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Skewed: the favorites of the train prompts are favorites of other prompts too.
    Skewed,
    /// Local: tokens use what the tokens before them used, whatever the favorites are.
    Local,
    /// Flat: neither pins nor slots pay.
    Flat,
}

impl Verdict {
    /// Returns the name used in output.
    pub fn name(self) -> &'static str {
        match self {
            Verdict::Skewed => "skewed",
            Verdict::Local => "local",
            Verdict::Flat => "flat",
        }
    }
}

/// Hit rate below which favorites are not worth a plan, as a multiple of the uniform one.
const NOTEWORTHY: f64 = 1.2;

impl Skew {
    /// Returns the verdict, from the quarter of the experts.
    pub fn verdict(&self) -> Verdict {
        let (uniform, caught, cached) = (self.uniform[1], self.caught[1], self.cached[1]);
        if caught.max(cached) < NOTEWORTHY * uniform {
            Verdict::Flat
        } else if caught >= cached {
            Verdict::Skewed
        } else {
            Verdict::Local
        }
    }

    /// Returns the verdict in a sentence or two.
    pub fn words(&self) -> String {
        let percent = |share: f64| format!("{:.0} %", share * 100.0);
        let (uniform, caught, cached) = (
            percent(self.uniform[1]),
            percent(self.caught[1]),
            percent(self.cached[1]),
        );
        if self.counted {
            let figures = format!(
                "{uniform} of the experts take {caught} of the counted choices; as many cache slots would hit {cached} of \
                 independent ones"
            );
            return match self.verdict() {
                Verdict::Flat => {
                    format!(
                        "flat: {figures}. Pinning will not help; what a cache does only a recorded profile shows."
                    )
                }
                _ => format!(
                    "skewed: {figures}. Pinning the favorites pays, if decoding has the same ones."
                ),
            };
        }
        let figures = if self.held_out {
            format!(
                "{uniform} of the experts, chosen on the train prompts, take {caught} of the choices of held-out ones; as \
                 many cache slots hit {cached}"
            )
        } else {
            format!(
                "{uniform} of the experts take {caught} of the choices of the prompts that they were chosen on, which no \
                 other text will reach; as many cache slots hit {cached}"
            )
        };
        match self.verdict() {
            Verdict::Skewed => format!("skewed: {figures}. Pinning the favorites pays."),
            Verdict::Local => {
                format!("local: {figures}. What was used last says more than what is used most.")
            }
            Verdict::Flat => {
                format!("flat: {figures}. Pinning will not help; only more fast memory will.")
            }
        }
    }
}

/// Returns the skew over all prompts, then that of each domain with held-out tokens.
///
/// Domains come in the profile's order. Without a held-out split the train prompts are judged on
/// themselves.
///
/// # Errors
/// Fails if the profile's traces do not fit its own sizes.
pub fn skews(profile: &Profile) -> Result<Vec<Skew>> {
    check_traces(profile)?;
    if let Some(counted) = &profile.counted {
        return Ok(vec![skew_of_counts(profile, counted)]);
    }
    let mut domains: Vec<&str> = Vec::new();
    for prompt in &profile.prompts {
        if !domains.contains(&prompt.domain.as_str()) {
            domains.push(&prompt.domain);
        }
    }
    let of_domain = if domains.len() > 1 {
        domains
    } else {
        Vec::new()
    };
    let all = std::iter::once(None).chain(of_domain.into_iter().map(Some));
    Ok(all.filter_map(|domain| skew(profile, domain)).collect())
}

fn skew(profile: &Profile, domain: Option<&str>) -> Option<Skew> {
    let decoded = |split| {
        profile
            .prompts
            .iter()
            .any(|p| p.split == split && p.decode_tokens > 0)
    };
    let judge = if decoded(Split::HeldOut) {
        Split::HeldOut
    } else {
        Split::Train
    };
    let choose = if decoded(Split::Train) {
        Split::Train
    } else {
        Split::HeldOut
    };
    let of_domain = |name: &str| domain.is_none_or(|d| d == name);
    let n_expert = profile.n_expert as usize;
    let counts = SHARES.map(|share| (share * n_expert as f64).ceil() as usize);
    let mut sum = Skew {
        domain: domain.map(str::to_string),
        tokens: 0,
        held_out: decoded(Split::HeldOut) && decoded(Split::Train),
        counted: false,
        uniform: counts.map(|count| count as f64 / n_expert.max(1) as f64),
        caught: [0.0; 3],
        cached: [0.0; 3],
        effective_experts: 0.0,
    };
    let n_layer = profile.layers.len();
    for layer in 0..n_layer {
        // The favorites are those of all train prompts: a plan is made for all domains at once.
        let order =
            super::by_share(&LayerTrace::new(profile, layer, |p| p.split == choose).decode_share());
        let trace = LayerTrace::new(profile, layer, |p| p.split == judge && of_domain(&p.domain));
        let accesses = (trace.tokens() * trace.n_used()) as f64;
        if accesses == 0.0 {
            return None;
        }
        let share = trace.decode_share();
        let hits = Positions::new(&trace, &vec![false; n_expert]).hit_curve(n_expert);
        for (at, &count) in counts.iter().enumerate() {
            let caught: f64 = order[..count].iter().map(|&e| share[e as usize]).sum();
            sum.caught[at] += caught / trace.n_used() as f64 / n_layer as f64;
            sum.cached[at] += hits[count] as f64 / accesses / n_layer as f64;
        }
        let entropy: f64 = share
            .iter()
            .map(|s| s / trace.n_used() as f64)
            .filter(|&p| p > 0.0)
            .map(|p| -p * p.log2())
            .sum();
        sum.effective_experts += entropy.exp2() / n_layer as f64;
        sum.tokens = trace.tokens() as u64;
    }
    (n_layer > 0).then_some(sum)
}

/// Returns the skew of counts alone.
fn skew_of_counts(profile: &Profile, counted: &[Vec<u64>]) -> Skew {
    let n_expert = profile.n_expert as usize;
    let sizes = SHARES.map(|share| (share * n_expert as f64).ceil() as usize);
    let mut sum = Skew {
        domain: None,
        tokens: u64::MAX,
        held_out: false,
        counted: true,
        uniform: sizes.map(|size| size as f64 / n_expert.max(1) as f64),
        caught: [0.0; 3],
        cached: [0.0; 3],
        effective_experts: 0.0,
    };
    let n_layer = counted.len() as f64;
    for (counts, &layer) in counted.iter().zip(&profile.layers) {
        let uses = counts.iter().sum::<u64>().max(1) as f64;
        let share = drawn::shares(counts, profile.n_used);
        let trace = drawn::trace(&share, profile.n_used as usize, layer);
        let hits = Positions::new(&trace, &vec![false; n_expert]).hit_curve(n_expert);
        let order = super::by_share(&share);
        for (at, &size) in sizes.iter().enumerate() {
            let caught: u64 = order[..size].iter().map(|&e| counts[e as usize]).sum();
            sum.caught[at] += caught as f64 / uses / n_layer;
            sum.cached[at] +=
                hits[size] as f64 / (trace.tokens() * trace.n_used()).max(1) as f64 / n_layer;
        }
        let entropy: f64 = counts
            .iter()
            .map(|&c| c as f64 / uses)
            .filter(|&p| p > 0.0)
            .map(|p| -p * p.log2())
            .sum();
        sum.effective_experts += entropy.exp2() / n_layer;
        sum.tokens = sum
            .tokens
            .min((uses / f64::from(profile.n_used)).round() as u64);
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::synthetic::{Routing, profile};
    use crate::profile::tests::{profile_of, shape};

    fn verdict(skew: f64, repeat: f64) -> Result<Verdict> {
        let routing = Routing {
            skew,
            repeat,
            prompts: 8,
            prompt_tokens: 8,
            decode_tokens: 200,
            seed: 3,
        };
        let skews = skews(&profile(&shape(64, 4), &routing))?;
        assert_eq!(skews.len(), 3);
        assert!(skews[0].words().starts_with(skews[0].verdict().name()));
        assert!(skews[0].held_out && skews[0].words().contains("of held-out ones"));
        Ok(skews[0].verdict())
    }

    #[test]
    fn verdicts_tell_kinds_of_routing_apart() -> Result<()> {
        assert_eq!(verdict(0.0, 0.0)?, Verdict::Flat);
        assert_eq!(verdict(0.0, 0.8)?, Verdict::Local);
        assert_eq!(verdict(0.6, 0.0)?, Verdict::Skewed);
        Ok(())
    }

    #[test]
    fn favorites_that_were_not_tested_are_not_called_tested() -> Result<()> {
        let train = vec![vec![vec![0, 1]], vec![vec![0, 2]], vec![vec![0, 1]]];
        for split in [Split::Train, Split::HeldOut] {
            let skews = skews(&profile_of(8, 2, 1, &[(split, 0, train.clone())]))?;
            let words = skews[0].words();
            assert!(
                !skews[0].held_out
                    && words.contains("that they were chosen on")
                    && !words.contains("held-out"),
                "{words}"
            );
        }
        Ok(())
    }

    #[test]
    fn figures_are_counted_by_hand() -> Result<()> {
        let train = vec![vec![vec![0, 1]], vec![vec![0, 2]]];
        let held_out = vec![
            vec![vec![0, 3]],
            vec![vec![3, 0]],
            vec![vec![1, 2]],
            vec![vec![0, 1]],
        ];
        let skews = skews(&profile_of(
            4,
            2,
            1,
            &[(Split::Train, 0, train), (Split::HeldOut, 0, held_out)],
        ))?;
        let all = &skews[0];
        // Of 8 choices expert 0 has 3 and expert 1 has 2; two slots hit both of the second token
        // and one of the last.
        assert_eq!((all.tokens, all.uniform), (4, [0.25, 0.25, 0.5]));
        assert_eq!(all.caught, [0.375, 0.375, 0.625]);
        assert_eq!(all.cached[2], (2.0 + 1.0) / 8.0);
        let entropy = -[3.0, 2.0, 1.0, 2.0f64]
            .iter()
            .map(|n| n / 8.0 * (n / 8.0).log2())
            .sum::<f64>();
        assert!((all.effective_experts - entropy.exp2()).abs() < 1e-12);
        Ok(())
    }
}
