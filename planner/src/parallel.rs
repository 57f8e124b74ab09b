//! Several texts at once: how many, and what is predicted of them.

use crate::cost::steps::{Predictor, StepPrediction};
use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tier_plan_runtime::model::kv::CacheRoom;

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
    fn rows_are_powers_of_two_and_the_most() {
        assert_eq!(counts(1), [1]);
        assert_eq!(counts(8), [1, 2, 4, 8]);
        assert_eq!(counts(9), [1, 2, 4, 8, 9]);
        assert_eq!(counts(u32::MAX).len(), 33);
    }
}
