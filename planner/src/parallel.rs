//! Several texts at once: how many, and what is predicted of them.

use crate::cost::steps::{Predictor, StepPrediction};
use crate::hint::HintExt;
use crate::prepared::Prepared;
use crate::profile::Evidence;
use anyhow::{Result, anyhow, ensure};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;
use tier_plan_runtime::formats::placement::Placement;
use tier_plan_runtime::formats::profile;
use tier_plan_runtime::model::kv::CacheRoom;
use tier_plan_runtime::model::shape::{ModelShape, shape_of};

/// How the experts are used, for predictions; or why nothing is predicted.
pub enum Routing {
    /// As this says.
    Known(Evidence),
    /// A sentence for the user, if there is anything to say.
    Unknown(Option<String>),
}

impl Routing {
    /// Returns what steps of a plan are predicted with, if experts' use is known.
    pub fn predictor<'a>(
        &'a self,
        plan: &'a Placement,
        shape: &'a ModelShape,
        at: u32,
    ) -> Option<Predictor<'a>> {
        match self {
            Routing::Known(evidence) => Some(Predictor {
                plan,
                shape,
                evidence,
                at,
            }),
            Routing::Unknown(_) => None,
        }
    }
}

/// Returns how experts are used: as in the profile that the plan was made from, or evenly for a
/// plan that was made without one.
///
/// # Errors
/// When the profile that was asked for cannot be read, or is not the plan's.
pub fn routing(asked: Option<&Path>, model: &Path, prepared: &Prepared<'_>) -> Result<Routing> {
    let plan = prepared.plan();
    if let (Some(path), None) = (asked, &plan.profile) {
        return Err(anyhow!(
            "--routing: {}, expected none, as the plan was made without a profile",
            path.display()
        ))
        .hint("leave --routing out");
    }
    if plan.predicted.decode_tok_s <= 0.0 {
        return Ok(Routing::Unknown(None));
    }
    let shape = shape_of(prepared.gguf(), prepared.spec());
    let Some(wanted) = &plan.profile else {
        return Ok(Routing::Known(Evidence::uniform(&shape)?));
    };
    let (path, asked) = match asked {
        Some(path) => (path.to_path_buf(), true),
        None => {
            let of_auto = prepared.report().and_then(|report| report.profile.clone());
            (
                of_auto.unwrap_or_else(|| model.with_extension("profile")),
                false,
            )
        }
    };
    let found = match profile::read(&path) {
        Ok(profile) => Some(profile),
        Err(error) if asked => return Err(error.into()),
        Err(_) => None,
    };
    match found.filter(|profile| profile.id.hash == wanted.hash) {
        Some(profile) => Ok(Routing::Known(Evidence::new(&shape, Some(&profile))?)),
        None if asked => Err(anyhow!(
            "--routing: {}, expected {wanted}, which the plan was made from",
            path.display()
        ))
        .hint("pass the profile that the plan was made from"),
        None => Ok(Routing::Unknown(Some(format!(
            "nothing predicted for several texts: the plan was made from {wanted}, expected at --routing or at {}",
            path.display()
        )))),
    }
}

/// How many texts go together, and why.
#[derive(Debug, Clone, PartialEq)]
pub struct Chosen {
    /// Texts at once, at least 1.
    pub texts: u32,
    /// A sentence for the user.
    pub why: String,
}

/// Chooses how many texts go together, of the `room` that memory has: those with the most predicted
/// tokens per second within a step of `longest`. Without a prediction that is all of them.
pub fn choose(predictor: Option<&Predictor<'_>>, room: u32, longest: Option<Duration>) -> Chosen {
    let at_once = |n: u32| match n {
        1 => "1 text at once".to_string(),
        n => format!("{n} texts at once"),
    };
    let gap_s = longest.map_or(f64::INFINITY, |longest| longest.as_secs_f64());
    let best = predictor.and_then(|p| Some((p.best_of(room, gap_s)?, p.step(1)?)));
    let Some((best, alone)) = best else {
        return Chosen {
            texts: room,
            why: format!(
                "{}, as many as there is room for; the plan predicts no speed",
                at_once(room)
            ),
        };
    };
    let bound = longest.filter(|_| best.texts < room);
    let bound = bound.map_or(String::new(), |longest| {
        format!(" within {} ms", longest.as_millis())
    });
    Chosen {
        texts: best.texts,
        why: format!(
            "{} of up to {room} that there is room for: the most predicted tokens per second{bound}, \
             {:.2} tok/s with {:.1} ms between two tokens of a text; one alone has {:.2}",
            at_once(best.texts),
            best.tok_s(),
            best.seconds * 1e3,
            alone.tok_s()
        ),
    }
}

/// Checks a number of texts of `context` tokens each, as `option` gave it, and returns it.
///
/// # Errors
/// When it is 0, or a KV cache has no room for as many positions.
pub fn check_texts(option: &str, texts: u32, context: u32) -> Result<u32> {
    ensure!(texts > 0, "{option}: 0 texts at once, expected 1 or more");
    let room = CacheRoom {
        sequences: texts,
        ..CacheRoom::of_one(context)
    };
    let most = u64::from(u32::MAX);
    if room.positions() > most {
        let per_text = room.positions() / u64::from(texts);
        let fit = most / per_text;
        ensure!(
            texts == 1,
            "{option}: {texts} texts of {context} tokens, expected at most {fit}, the positions of a KV cache"
        );
    }
    Ok(texts)
}

/// Returns the numbers of texts that are worth a row: powers of two, and `most` as the last.
pub fn counts(most: u32) -> Vec<u32> {
    let powers = std::iter::successors(Some(1u32), |n| n.checked_mul(2));
    let mut counts: Vec<u32> = powers.take_while(|n| *n < most).collect();
    counts.push(most);
    counts
}

/// Predicts steps of up to `most` texts; nothing for a plan without rates.
pub fn predictions(predictor: &Predictor<'_>, most: u32) -> Vec<StepPrediction> {
    counts(most)
        .into_iter()
        .filter_map(|texts| predictor.step(texts))
        .collect()
}

/// Returns a table of predictions, its head first.
pub fn table(steps: &[StepPrediction]) -> Vec<String> {
    let head = format!(
        "{:>7} {:>10} {:>14} {:>16} {:>22}",
        "texts", "tok/s", "tok/s per text", "ms between two", "distinct experts/layer"
    );
    let row = |step: &StepPrediction| {
        format!(
            "{:>7} {:>10.2} {:>14.2} {:>16.2} {:>22.1}",
            step.texts,
            step.tok_s(),
            1.0 / step.seconds,
            step.seconds * 1e3,
            step.distinct_experts
        )
    };
    std::iter::once(head).chain(steps.iter().map(row)).collect()
}

/// Returns predictions as JSON.
pub fn as_json(steps: &[StepPrediction]) -> Value {
    let each = |step: &StepPrediction| {
        json!({
            "texts": step.texts,
            "predicted_tok_s": step.tok_s(),
            "predicted_tok_s_per_text": 1.0 / step.seconds,
            "predicted_gap_s": step.seconds,
            "predicted_distinct_experts": step.distinct_experts,
        })
    };
    steps.iter().map(each).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_counted_and_refused() {
        assert_eq!(check_texts("--parallel", 4, 1000).ok(), Some(4));
        // One text may be as long as positions can be numbered.
        assert_eq!(check_texts("--parallel", 1, u32::MAX).ok(), Some(1));
        let error = |texts, context| {
            check_texts("--parallel", texts, context)
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            error(0, 10),
            "--parallel: 0 texts at once, expected 1 or more"
        );
        // 67108863 pages of 64 positions.
        assert!(error(67_108_864, 10).contains("expected at most 67108863"));
        assert!(error(u32::MAX, u32::MAX).contains("expected at most"));
    }

    #[test]
    fn without_a_prediction_all_texts_that_fit_go_together() {
        for (room, words) in [
            (1, "1 text at once, as many"),
            (16, "16 texts at once, as many"),
        ] {
            let chosen = choose(None, room, Some(Duration::ZERO));
            assert_eq!(chosen.texts, room);
            assert!(chosen.why.starts_with(words), "{}", chosen.why);
        }
    }

    #[test]
    fn rows_are_powers_of_two_and_the_most() {
        assert_eq!(counts(1), [1]);
        assert_eq!(counts(8), [1, 2, 4, 8]);
        assert_eq!(counts(9), [1, 2, 4, 8, 9]);
        assert_eq!(counts(u32::MAX).len(), 33);
    }
}
