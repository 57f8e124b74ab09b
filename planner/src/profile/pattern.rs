//! Supposed routing, for models without a profile: how much a plan depends on what is unknown.
//!
//! Three patterns span what was measured on published models: no favorites and no memory; lasting
//! favorites, which pins catch; and choices that repeat those of the tokens before, which only a
//! cache catches.

use super::drawn;
use super::synthetic::Random;
use super::{Evidence, Judged, LayerEvidence, by_share, check_shape};
use crate::profile::prefetch::Prefetch;
use crate::profile::replay::LayerTrace;
use anyhow::Result;
use std::collections::BTreeMap;
use tier_plan_runtime::model::shape::ModelShape;

/// A pattern of routing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pattern {
    /// Every expert is equally likely, whatever the token before chose.
    Flat,
    /// An expert's popularity falls as a power of its rank (Zipf's law); tokens are independent.
    Zipf,
    /// All experts are alike in the long run, but a token mostly chooses what was chosen recently.
    Bursty,
}

/// Exponent of the popularity by rank: a quarter of 256 experts then takes more than half of the
/// choices. Published measurements range from 10 % for 6 % of the experts to 71 % for 25 %.
const ZIPF: f64 = 0.6;

/// Hit rates of a cache that holds a share of the experts, as published for GLM-5.2.
const CACHED: [(f64, f64); 6] = [
    (0.0, 0.0),
    (0.05, 0.30),
    (0.20, 0.61),
    (0.36, 0.76),
    (0.64, 0.90),
    (1.0, 1.0),
];

/// Tokens that are judged, and tokens that fill the slots first.
const TOKENS: usize = 1024;
const WARM_UP: usize = 256;

impl Pattern {
    /// All patterns, in the order of reports.
    pub const ALL: [Pattern; 3] = [Pattern::Flat, Pattern::Zipf, Pattern::Bursty];

    /// Returns the name used in output.
    pub fn name(self) -> &'static str {
        match self {
            Pattern::Flat => "flat",
            Pattern::Zipf => "zipf",
            Pattern::Bursty => "bursty",
        }
    }

    /// Returns what is supposed, as a clause.
    pub fn words(self) -> &'static str {
        match self {
            Pattern::Flat => "every expert is equally likely",
            Pattern::Zipf => "lasting favorites: popularity falls as rank^-0.6",
            Pattern::Bursty => {
                "no favorites, but tokens repeat: caches of 5, 20, 36, 64 % of the experts hit 30, 61, 76, 90 %"
            }
        }
    }
}

impl Evidence {
    /// Supposes a pattern of routing, equal in every layer of the same counts.
    ///
    /// # Errors
    /// Fails if the model has more experts than are planned for.
    pub fn supposed(shape: &ModelShape, pattern: Pattern) -> Result<Self> {
        if pattern == Pattern::Flat {
            return Self::uniform(shape);
        }
        check_shape(shape)?;
        let mut classes: BTreeMap<(u32, u32), (u32, LayerEvidence)> = BTreeMap::new();
        let mut layers = Vec::with_capacity(shape.experts.len());
        for &layer in &shape.experts {
            let next = classes.len() as u32;
            let (class, of) = classes
                .entry((layer.n_expert, layer.n_used))
                .or_insert_with(|| {
                    let (n_expert, n_used) = (layer.n_expert as usize, layer.n_used as usize);
                    let (share, trace) = match pattern {
                        Pattern::Zipf => {
                            let share = zipf(n_expert, n_used);
                            let trace = drawn::trace(&share, n_used, 0);
                            (share, trace)
                        }
                        _ => (
                            vec![n_used as f64 / n_expert as f64; n_expert],
                            bursty(n_expert, n_used),
                        ),
                    };
                    let order = by_share(&share);
                    let judged = Judged::Recorded(trace);
                    (
                        next,
                        LayerEvidence {
                            shape: layer,
                            order,
                            prompt_share: share.clone(),
                            share,
                            judged,
                            prefetch: Prefetch::default(),
                            class: None,
                        },
                    )
                });
            layers.push(LayerEvidence {
                shape: layer,
                class: Some(*class),
                prefetch: Prefetch::new(shape, &layer, 0.0),
                ..of.clone()
            });
        }
        let notes = vec![format!(
            "no profile: the routing is supposed ({})",
            pattern.words()
        )];
        Ok(Evidence {
            layers,
            notes,
            drawn: true,
        })
    }
}

/// Returns `[n_expert]` shares of tokens that choose each expert, falling as a power of the rank;
/// they sum to `n_used`.
fn zipf(n_expert: usize, n_used: usize) -> Vec<f64> {
    let weight: Vec<f64> = (1..=n_expert)
        .map(|rank| (rank as f64).powf(-ZIPF))
        .collect();
    // The first `certain` experts would be chosen more than once per token. They are always chosen,
    // and the others share the rest.
    let mut certain = 0;
    loop {
        let rest: f64 = weight[certain..].iter().sum();
        let scale = (n_used - certain) as f64 / rest.max(f64::MIN_POSITIVE);
        if certain >= n_used || weight[certain] * scale <= 1.0 {
            let others = weight[certain..].iter().map(|w| (w * scale).min(1.0));
            return std::iter::repeat_n(1.0, certain).chain(others).collect();
        }
        certain += 1;
    }
}

/// Draws tokens whose choices lie as deep among the recently used experts as [`CACHED`] says.
fn bursty(n_expert: usize, n_used: usize) -> LayerTrace {
    let mut random = Random::new(drawn::SEED);
    // Experts, the most recently used first.
    let mut recent: Vec<u16> = (0..n_expert as u16).collect();
    let mut tokens = |count: usize| {
        let mut chosen = Vec::with_capacity(count * n_used);
        for _ in 0..count {
            let from = chosen.len();
            while chosen.len() < from + n_used {
                let expert = recent[(depth(random.unit()) * n_expert as f64) as usize % n_expert];
                if !chosen[from..].contains(&expert) {
                    chosen.push(expert);
                }
            }
            let token = &chosen[from..];
            recent.retain(|e| !token.contains(e));
            recent.splice(0..0, token.iter().rev().copied());
        }
        chosen
    };
    let warm_up = tokens(WARM_UP);
    LayerTrace::made_up(n_expert, n_used, &warm_up, tokens(TOKENS))
}

/// Returns the share of the experts that a cache must hold to hit a share of the choices.
fn depth(hits: f64) -> f64 {
    let at = CACHED
        .iter()
        .position(|(_, h)| *h >= hits)
        .unwrap_or(CACHED.len() - 1)
        .max(1);
    let ((s0, h0), (s1, h1)) = (CACHED[at - 1], CACHED[at]);
    s0 + (s1 - s0) * ((hits - h0) / (h1 - h0)).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::profile::replay::Positions;
    use crate::profile::tests::shape;

    fn trace(evidence: &Evidence) -> &LayerTrace {
        match &evidence.layers[0].judged {
            Judged::Recorded(trace) => trace,
            Judged::Uniform => unreachable!(),
        }
    }

    #[test]
    fn bursty_tokens_hit_as_measured() -> Result<()> {
        let evidence = Evidence::supposed(&shape(256, 8), Pattern::Bursty)?;
        let trace = trace(&evidence);
        let hits = Positions::new(trace, &[false; 256]).hit_curve(256);
        let accesses = (trace.tokens() * trace.n_used()) as f64;
        for (share, want) in CACHED {
            let found = hits[(share * 256.0) as usize] as f64 / accesses;
            // A token's choices are different, which pushes some of them deeper.
            assert!((found - want).abs() < 0.06, "{share}: {found} for {want}");
        }
        // There are no favorites: a quarter of the experts takes little more than its part.
        let mut share = trace.decode_share();
        share.sort_by(|a, b| b.total_cmp(a));
        assert!(share[..64].iter().sum::<f64>() / 8.0 < 0.45);
        Ok(())
    }

    #[test]
    fn zipf_shares_are_shares() -> Result<()> {
        for (n_expert, n_used) in [
            (256, 8),
            (384, 8),
            (8, 2),
            (32, 4),
            (4, 4),
            (1, 1),
            (128, 100),
        ] {
            let share = zipf(n_expert, n_used);
            assert!(
                (share.iter().sum::<f64>() - n_used as f64).abs() < 1e-9,
                "{n_expert} {n_used}"
            );
            assert!(share.iter().all(|s| (0.0..=1.0 + 1e-12).contains(s)));
            assert!(share.windows(2).all(|w| w[0] >= w[1]));
        }
        let quarter: f64 = zipf(256, 8)[..64].iter().sum::<f64>() / 8.0;
        assert!((0.5..0.6).contains(&quarter), "{quarter}");
        Ok(())
    }

    #[test]
    fn every_pattern_suits_every_count() -> Result<()> {
        for (n_expert, n_used) in [(1, 1), (4, 4), (8, 2), (2000, 128)] {
            for pattern in Pattern::ALL {
                let evidence = Evidence::supposed(&shape(n_expert, n_used), pattern)?;
                assert_eq!(evidence.layers.len(), 1);
                assert!(!pattern.words().is_empty() && !pattern.name().is_empty());
            }
        }
        assert!(Evidence::supposed(&shape(20_000, 8), Pattern::Zipf).is_err());
        let dense = ModelShape {
            experts: Vec::new(),
            ..shape(4, 1)
        };
        assert!(
            Evidence::supposed(&dense, Pattern::Bursty)?
                .layers
                .is_empty()
        );
        Ok(())
    }
}
