//! Evidence about a model's routing, in the form that the planner works with.
//!
//! Plans are chosen on the prompts of the train split and judged on the held-out ones, and this
//! module keeps the two apart. Nothing here knows of tiers or time.

pub mod collect;
pub mod drawn;
pub mod imatrix;
pub mod pattern;
pub mod prefetch;
pub mod prompts;
pub mod replay;
pub mod stats;
pub mod synthetic;

use anyhow::{Result, bail, ensure};
use prefetch::Prefetch;
use replay::LayerTrace;
use tier_plan_runtime::formats::profile::{Profile, Split};
use tier_plan_runtime::model::shape::{ExpertShape, ModelShape};

/// Tokens that plans are judged on.
#[derive(Debug, Clone)]
pub enum Judged {
    /// No profile: every expert is equally likely and tokens are independent.
    Uniform,
    /// Recorded tokens, which are replayed.
    Recorded(LayerTrace),
}

/// Evidence about one layer's routing.
#[derive(Debug, Clone)]
pub struct LayerEvidence {
    /// Sizes of the layer.
    pub shape: ExpertShape,
    /// `[n_expert]` experts by falling use in the train split's decoded tokens; ties by number.
    pub order: Vec<u32>,
    /// `[n_expert]` share of the train split's decoded tokens that choose each expert; sums to
    /// `n_used`.
    pub share: Vec<f64>,
    /// `[n_expert]` share of judged prompt tokens that choose each expert; sums to `n_used`.
    pub prompt_share: Vec<f64>,
    /// Tokens that plans are judged on.
    pub judged: Judged,
    /// How good prefetching is.
    pub prefetch: Prefetch,
    /// Layers of one class are used alike: all of the above but the sizes is equal in each of them.
    pub class: Option<u32>,
}

impl LayerEvidence {
    /// Whether all that is known of a layer is known of another one, too.
    pub fn is_like(&self, other: &LayerEvidence) -> bool {
        let sizes = |shape: ExpertShape| ExpertShape { layer: 0, ..shape };
        self.class.is_some()
            && self.class == other.class
            && sizes(self.shape) == sizes(other.shape)
            && self.prefetch == other.prefetch
    }
}

/// Evidence about a model's routing.
#[derive(Debug, Clone)]
pub struct Evidence {
    /// One entry per layer with routed experts, ascending.
    pub layers: Vec<LayerEvidence>,
    /// What the reader of a plan should know about the evidence, in sentences.
    pub notes: Vec<String>,
    /// Whether the judged tokens were drawn from counts, not recorded.
    pub drawn: bool,
}

/// Returns the experts by falling share, ties by number.
fn by_share(share: &[f64]) -> Vec<u32> {
    let mut order: Vec<u32> = (0..share.len() as u32).collect();
    order.sort_by(|&a, &b| {
        share[b as usize]
            .total_cmp(&share[a as usize])
            .then(a.cmp(&b))
    });
    order
}

impl Evidence {
    /// Assumes that every expert is equally likely.
    pub fn uniform(shape: &ModelShape) -> Result<Self> {
        check_shape(shape)?;
        let model = shape;
        let layers = model
            .experts
            .iter()
            .map(|&shape| {
                let share = vec![
                    f64::from(shape.n_used) / f64::from(shape.n_expert);
                    shape.n_expert as usize
                ];
                LayerEvidence {
                    shape,
                    order: by_share(&share),
                    prompt_share: share.clone(),
                    share,
                    judged: Judged::Uniform,
                    prefetch: Prefetch::new(model, &shape, 0.0),
                    class: Some(0),
                }
            })
            .collect();
        let notes = if shape.experts.is_empty() {
            Vec::new()
        } else {
            vec!["no profile: every expert is taken to be equally likely".to_string()]
        };
        Ok(Evidence {
            layers,
            notes,
            drawn: false,
        })
    }

    /// Makes evidence of a profile with recorded tokens.
    ///
    /// # Errors
    /// Fails if the profile is of another model, or its traces do not fit its own sizes.
    pub fn recorded(shape: &ModelShape, profile: &Profile) -> Result<Self> {
        check_shape(shape)?;
        check_profile(shape, profile)?;
        let decoded = |split| {
            profile
                .prompts
                .iter()
                .filter(|p| p.split == split)
                .any(|p| p.decode_tokens > 0)
        };
        let (train, held_out) = (decoded(Split::Train), decoded(Split::HeldOut));
        let mut notes = Vec::new();
        let (choose, judge) = match (train, held_out) {
            (true, true) => (Split::Train, Split::HeldOut),
            (true, false) => {
                notes.push(
                    "the profile has no held-out decoded tokens: plans are judged on the prompts they were \
                            chosen on, so expect less"
                        .to_string(),
                );
                (Split::Train, Split::Train)
            }
            (false, true) => {
                notes.push(
                    "the profile has no train decoded tokens: plans are chosen on the prompts they are judged \
                            on, so expect less"
                        .to_string(),
                );
                (Split::HeldOut, Split::HeldOut)
            }
            (false, false) if shape.experts.is_empty() => (Split::Train, Split::HeldOut),
            (false, false) => bail!(
                "the profile of '{}' holds no decoded tokens; make one with `tier-plan profile --decode-tokens 128`",
                profile.model.name
            ),
        };
        let layers = shape
            .experts
            .iter()
            .enumerate()
            .map(|(at, &layer)| {
                let share = LayerTrace::new(profile, at, |p| p.split == choose).decode_share();
                let trace = LayerTrace::new(profile, at, |p| p.split == judge);
                LayerEvidence {
                    shape: layer,
                    order: by_share(&share),
                    prompt_share: trace.prompt_share().unwrap_or_else(|| trace.decode_share()),
                    share,
                    judged: Judged::Recorded(trace),
                    prefetch: prefetch(shape, profile, at),
                    class: None,
                }
            })
            .collect();
        Ok(Evidence {
            layers,
            notes,
            drawn: false,
        })
    }

    /// Makes evidence of counts without an order: plans are judged on tokens drawn from them.
    ///
    /// # Errors
    /// Fails if the counts are of another model.
    pub fn counted(shape: &ModelShape, profile: &Profile, counted: &[Vec<u64>]) -> Result<Self> {
        check_shape(shape)?;
        check_profile(shape, profile)?;
        let layers = shape
            .experts
            .iter()
            .zip(counted)
            .map(|(&layer, counts)| {
                let share = drawn::shares(counts, layer.n_used);
                let trace = drawn::trace(&share, layer.n_used as usize, layer.layer);
                LayerEvidence {
                    shape: layer,
                    order: by_share(&share),
                    prompt_share: share.clone(),
                    share,
                    judged: Judged::Recorded(trace),
                    prefetch: Prefetch::new(shape, &layer, 0.0),
                    class: None,
                }
            })
            .collect();
        let notes = vec![format!(
            "the profile has only marginal counts of prompt processing: plans are judged on {} independent tokens drawn \
             from them (seed {}), not on recorded ones. Decoding uses other experts than prompts do, so expect less of \
             pins; text repeats itself, so expect more of slots",
            drawn::TOKENS,
            drawn::SEED
        )];
        Ok(Evidence {
            layers,
            notes,
            drawn: true,
        })
    }

    /// Makes evidence of the profile if there is one, else assumes uniform routing.
    pub fn new(shape: &ModelShape, profile: Option<&Profile>) -> Result<Self> {
        match profile {
            Some(profile) => match &profile.counted {
                Some(counted) if !shape.experts.is_empty() => {
                    Self::counted(shape, profile, counted)
                }
                _ => Self::recorded(shape, profile),
            },
            None => Self::uniform(shape),
        }
    }
}

/// Returns the accuracy of predictions recorded for the layer at position `at`.
fn prefetch(shape: &ModelShape, profile: &Profile, at: usize) -> Prefetch {
    let accuracy = profile
        .guesses
        .as_ref()
        .and_then(|all| all.get(at))
        .map_or(0.0, |g| g.right as f64 / g.made.max(1) as f64);
    Prefetch::new(shape, &shape.experts[at], accuracy)
}

fn check_shape(shape: &ModelShape) -> Result<()> {
    for e in &shape.experts {
        ensure!(
            e.n_used >= 1 && e.n_used <= e.n_expert && e.n_expert <= 1 << 14 && e.n_used <= 128,
            "layer {} of '{}' has {} experts of which a token uses {}: expected 1 ≤ used ≤ experts ≤ 16384 and at \
             most 128 used",
            e.layer,
            shape.id.name,
            e.n_expert,
            e.n_used
        );
    }
    Ok(())
}

fn check_profile(shape: &ModelShape, profile: &Profile) -> Result<()> {
    ensure!(
        profile.is_unbound() || profile.model.hash == shape.id.hash,
        "the profile is of model '{}' ({}), but the model is '{}' ({}); profile this model",
        profile.model.name,
        profile.model.hash,
        shape.id.name,
        shape.id.hash
    );
    let layers: Vec<u32> = shape.experts.iter().map(|e| e.layer).collect();
    ensure!(
        layers == profile.layers,
        "the profile of '{}' has {} layers with experts, the model {}; profile the model again",
        profile.model.name,
        profile.layers.len(),
        layers.len()
    );
    for e in &shape.experts {
        ensure!(
            e.n_expert == profile.n_expert && e.n_used == profile.n_used,
            "layer {} has {} experts with {} used, the profile says {} with {}; profile the model again",
            e.layer,
            e.n_expert,
            e.n_used,
            profile.n_expert,
            profile.n_used
        );
    }
    check_traces(profile)
}

/// Checks a profile's traces against its own sizes.
///
/// # Errors
/// Names the prompt whose choices are too few, too many, repeated or out of range.
pub fn check_traces(profile: &Profile) -> Result<()> {
    ensure!(
        profile.n_expert <= 1 << 14 && profile.n_used <= profile.n_expert,
        "the profile has {} experts of which a token uses {}; at most 16384 are planned for",
        profile.n_expert,
        profile.n_used
    );
    let used = profile.n_used as usize;
    for prompt in &profile.prompts {
        let tokens = u64::from(prompt.prompt_tokens) + u64::from(prompt.decode_tokens);
        let expected =
            (profile.layers.len() as u64 * u64::from(profile.n_used)).saturating_mul(tokens);
        ensure!(
            prompt.experts.len() as u64 == expected,
            "prompt '{}/{}' of the profile has {} choices where {expected} were expected; profile the model again",
            prompt.domain,
            prompt.name,
            prompt.experts.len()
        );
        if used == 0 {
            continue;
        }
        for chosen in prompt.experts.chunks_exact(used) {
            let sound = chosen
                .iter()
                .enumerate()
                .all(|(at, &e)| u32::from(e) < profile.n_expert && !chosen[..at].contains(&e));
            ensure!(
                sound,
                "prompt '{}/{}' of the profile has a token that chose {chosen:?}: expected {used} different experts \
                 below {}; profile the model again",
                prompt.domain,
                prompt.name,
                profile.n_expert
            );
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use tier_plan_runtime::formats::SourceId;
    use tier_plan_runtime::formats::profile::PromptTrace;

    pub(crate) fn id(name: &str) -> SourceId {
        SourceId {
            name: name.to_string(),
            hash: "0".repeat(32),
        }
    }

    /// `(split, prompt tokens, [token][layer] choices)`.
    pub(crate) type Prompt = (Split, usize, Vec<Vec<Vec<u16>>>);

    /// Makes a profile of prompts, with domains `a` and `b` by turns.
    pub(crate) fn profile_of(
        n_expert: u32,
        n_used: u32,
        n_layer: u32,
        prompts: &[Prompt],
    ) -> Profile {
        let prompts = prompts
            .iter()
            .enumerate()
            .map(|(at, (split, first, tokens))| {
                let experts: Vec<u16> = tokens.iter().flatten().flatten().copied().collect();
                PromptTrace {
                    domain: ["a", "b"][at % 2].to_string(),
                    name: at.to_string(),
                    split: *split,
                    prompt_tokens: *first as u32,
                    decode_tokens: (tokens.len() - first) as u32,
                    weights: vec![0; experts.len()],
                    experts,
                }
            })
            .collect();
        Profile {
            model: id("m"),
            layers: (0..n_layer).collect(),
            n_expert,
            n_used,
            made: String::new(),
            prompts,
            counted: None,
            guesses: None,
            id: id("p"),
        }
    }

    pub(crate) fn shape(n_expert: u32, n_used: u32) -> ModelShape {
        let experts = ExpertShape {
            layer: 0,
            n_expert,
            n_used,
            expert_bytes: 10,
            expert_macs: 10,
            by_token: false,
        };
        ModelShape {
            id: id("m"),
            arch: "test".to_string(),
            n_layer: 1,
            hidden: 1,
            n_vocab: 1,
            context: 1,
            caches: Vec::new(),
            dense: Vec::new(),
            experts: vec![experts],
            cpu_only: Vec::new(),
        }
    }

    #[test]
    fn the_order_comes_from_train_and_the_judgement_from_held_out() -> Result<()> {
        let train = vec![vec![vec![0, 1]], vec![vec![2, 1]], vec![vec![2, 1]]];
        let held_out = vec![vec![vec![0, 2]]];
        let profile = profile_of(
            3,
            2,
            1,
            &[(Split::Train, 1, train), (Split::HeldOut, 0, held_out)],
        );
        let evidence = Evidence::recorded(&shape(3, 2), &profile)?;
        let layer = &evidence.layers[0];
        assert_eq!(
            (&layer.order[..], &layer.share[..]),
            (&[1, 2, 0][..], &[0.0, 1.0, 1.0][..])
        );
        let Judged::Recorded(trace) = &layer.judged else {
            bail!("not recorded")
        };
        assert_eq!(
            (trace.tokens(), trace.decode_share()),
            (1, vec![1.0, 0.0, 1.0])
        );
        assert!(evidence.notes.is_empty());
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let good = profile_of(3, 2, 1, &[(Split::Train, 0, vec![vec![vec![0, 1]]])]);
        let one = Evidence::recorded(&shape(3, 2), &good);
        assert!(one.is_ok_and(|e| e.notes.len() == 1));
        let refused = |profile: &Profile, word: &str| {
            let error = Evidence::recorded(&shape(3, 2), profile)
                .err()
                .map(|e| e.to_string());
            assert!(
                error.as_ref().is_some_and(|e| e.contains(word)),
                "{word}: {error:?}"
            );
        };
        let mut bad = good.clone();
        bad.prompts[0].experts[1] = 3;
        refused(&bad, "different experts");
        bad.prompts[0].experts[1] = 0;
        refused(&bad, "different experts");
        let mut bad = good.clone();
        bad.prompts[0].decode_tokens = 2;
        refused(&bad, "4 were expected");
        let mut bad = good.clone();
        bad.model.hash = "1".repeat(32);
        refused(&bad, "is of model");
        let mut bad = good.clone();
        bad.layers = vec![7];
        refused(&bad, "layers");
        let mut bad = good.clone();
        bad.n_used = 1;
        refused(&bad, "with 1");
        let mut bad = good;
        bad.prompts.clear();
        refused(&bad, "no decoded tokens");
    }
}
