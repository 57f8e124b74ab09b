//! Tests of the estimate of the time of steps.

use crate::schedule::{RowsTime, StepCost};
use std::time::Duration;

/// Returns an estimate that has seen steps of these rows, at 7 ms, 3 ms per decoding row, and 4 ms
/// with 0.25 ms per row for prompts.
fn learned(steps: &[(usize, usize)]) -> StepCost {
    let mut cost = StepCost::default();
    for (decode, prompt) in steps {
        let mut micros = 7000 + 3000 * decode;
        if *prompt > 0 {
            micros += 4000 + 250 * prompt;
        }
        cost.learn(*decode, *prompt, Duration::from_micros(micros as u64));
    }
    cost
}

#[test]
fn times_are_learned_from_steps() {
    let mixed: Vec<_> = (0..60)
        .flat_map(|i| [(1 + i % 7, i * 31 % 400), (1 + i % 5, 0)])
        .collect();
    let cost = learned(&mixed);
    for (decode, prompt, micros) in [(1, 0, 10_000), (8, 0, 31_000), (4, 100, 48_000)] {
        let found = cost.predict(decode, prompt).as_micros();
        assert!(
            found.abs_diff(micros) * 20 < micros,
            "{found} is not {micros}"
        );
    }
    let rows = cost.prompt_rows_within(4, Duration::from_millis(48));
    assert!((92..=108).contains(&rows), "{rows}");
    assert_eq!(cost.prompt_rows_within(4, Duration::from_millis(19)), 0);
}

#[test]
fn a_wrong_prediction_of_prompts_is_mended_by_two_steps_of_them() {
    let point = |rows, micros| RowsTime {
        rows,
        time: Duration::from_micros(micros),
    };
    // Prompts are predicted to be nearly all fixed time, and are not.
    let decode = [point(1, 10_000), point(9, 34_000)];
    let mut cost = StepCost::predicted(decode, [point(16, 30_000), point(512, 45_000)]);
    let took = |decode: u64, prompt: u64| {
        let prompt = 4000 + 400 * prompt;
        Duration::from_micros(7000 + 3000 * decode + prompt)
    };
    cost.learn(0, 512, took(0, 512));
    cost.learn(2, 88, took(2, 88));
    for rows in [16, 100, 400] {
        let (found, right) = (cost.predict(3, rows), took(3, rows as u64));
        let differs = found.as_secs_f64() / right.as_secs_f64() - 1.0;
        assert!(differs.abs() < 0.1, "{rows}: {found:?} {right:?}");
    }
}

#[test]
fn steps_of_one_size_give_a_sane_estimate() {
    let cost = learned(&[(4, 64); 40]);
    let found = cost.predict(4, 64).as_micros();
    assert!(found.abs_diff(39_000) < 4000, "{found}");
    // Whatever is measured, no row is free of charge below zero.
    let mut cost = StepCost::default();
    for (rows, ms) in [(1, 100), (100, 1), (1, 100), (100, 1)] {
        cost.learn(rows, 0, Duration::from_millis(ms));
    }
    assert!(cost.predict(100, 0) >= cost.predict(1, 0));
    for rows in [0, usize::MAX] {
        cost.learn(rows, rows, Duration::MAX);
        cost.learn(rows, rows, Duration::ZERO);
    }
    assert!(cost.predict(usize::MAX, usize::MAX) < Duration::MAX);
}
