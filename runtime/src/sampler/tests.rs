use super::*;
use proptest::prelude::*;

fn warm() -> SamplerConfig {
    SamplerConfig {
        temperature: 1.0,
        ..Default::default()
    }
}

/// Returns the share of `n` draws that each of `logits` has.
fn shares(config: SamplerConfig, logits: &[f32], recent: &[u32], n: u32) -> Vec<f64> {
    let mut sampler = Sampler::new(config);
    let mut counts = vec![0u32; logits.len()];
    for _ in 0..n {
        counts[sampler.sample(&mut logits.to_vec(), recent) as usize] += 1;
    }
    counts
        .iter()
        .map(|c| f64::from(*c) / f64::from(n))
        .collect()
}

fn assert_near(found: &[f64], expected: &[f64]) {
    // Five standard deviations of 40 000 draws are at most 0.0125.
    let near = found
        .iter()
        .zip(expected)
        .all(|(f, e)| (f - e).abs() < 0.0125);
    assert!(
        near && found.len() == expected.len(),
        "{found:?} is not {expected:?}"
    );
}

fn logs(shares: &[f32]) -> Vec<f32> {
    shares.iter().map(|p| p.ln() + 3.0).collect()
}

#[test]
fn random_numbers_are_the_published_ones() {
    // First outputs for the state 1, 2, 3, 4, from the reference implementation's
    // documentation.
    let mut r = Random([1, 2, 3, 4]);
    assert_eq!(
        [r.next(), r.next(), r.next()],
        [41_943_041, 58_720_359, 3_588_806_011_781_223]
    );
    // SplitMix64 of 0.
    assert_eq!(Random::new(0).0[0], 0xE220_A839_7B1D_CDAF);
}

#[test]
fn greedy_takes_the_lowest_of_equals() {
    let mut s = Sampler::new(SamplerConfig::default());
    assert_eq!(s.sample(&mut [1.0, 7.0, 7.0, f32::NAN], &[]), 1);
    assert_eq!(s.sample(&mut [f32::NAN, -3.0], &[]), 1);
    assert_eq!(s.sample(&mut [f32::NAN, f32::NEG_INFINITY], &[]), 0);
    assert_eq!(s.sample(&mut [], &[]), 0);
    assert_eq!(s.sample(&mut [0.0, f32::INFINITY], &[]), 1);
}

#[test]
fn draws_have_the_shares_of_the_softmax() {
    let p = [0.5, 0.2, 0.2, 0.1];
    assert_near(
        &shares(warm(), &logs(&p.map(|x| x as f32)), &[], 40_000),
        &p,
    );
    // Temperature 2 takes the square root of the shares.
    let roots = p.map(f64::sqrt);
    let sum: f64 = roots.iter().sum();
    let hot = SamplerConfig {
        temperature: 2.0,
        ..warm()
    };
    assert_near(
        &shares(hot, &logs(&p.map(|x| x as f32)), &[], 40_000),
        &roots.map(|r| r / sum),
    );
}

#[test]
fn each_filter_keeps_what_it_says() {
    let logits = logs(&[0.1, 0.5, 0.15, 0.25]);
    let top_k = SamplerConfig { top_k: 2, ..warm() };
    assert_near(
        &shares(top_k, &logits, &[], 40_000),
        &[0.0, 2.0 / 3.0, 0.0, 1.0 / 3.0],
    );
    let top_p = SamplerConfig {
        top_p: 0.6,
        ..warm()
    };
    assert_near(
        &shares(top_p, &logits, &[], 40_000),
        &[0.0, 2.0 / 3.0, 0.0, 1.0 / 3.0],
    );
    let one = SamplerConfig {
        top_p: 0.01,
        ..warm()
    };
    assert_near(&shares(one, &logits, &[], 100), &[0.0, 1.0, 0.0, 0.0]);
    let min_p = SamplerConfig {
        min_p: 0.28,
        ..warm()
    };
    assert_near(
        &shares(min_p, &logits, &[], 40_000),
        &[0.0, 0.5 / 0.9, 0.15 / 0.9, 0.25 / 0.9],
    );
    // Top-p looks at what top-k left: of 2/3 and 1/3 the first is enough for 0.6.
    let both = SamplerConfig {
        top_k: 2,
        top_p: 0.6,
        ..warm()
    };
    assert_near(&shares(both, &logits, &[], 100), &[0.0, 1.0, 0.0, 0.0]);
    // Filters come before the temperature, so a hot draw is among the same tokens.
    let hot = SamplerConfig {
        top_p: 0.6,
        temperature: 50.0,
        ..warm()
    };
    let found = shares(hot, &logits, &[], 4000);
    assert!(
        found[0] == 0.0 && found[2] == 0.0 && found[3] > 0.45,
        "{found:?}"
    );
}

#[test]
fn recent_tokens_are_penalized_once_and_only_as_far_back_as_asked() {
    let config = SamplerConfig {
        repeat_penalty: 2.0,
        repeat_last_n: 2,
        ..Default::default()
    };
    let mut logits = [4.0, -1.0, 3.0, 3.5];
    assert_eq!(
        Sampler::new(config.clone()).sample(&mut logits, &[3, 0, 0]),
        3
    );
    assert_eq!(logits, [2.0, -1.0, 3.0, 3.5]);
    Sampler::new(config).sample(&mut logits, &[1, 99]);
    assert_eq!(logits, [2.0, -2.0, 3.0, 3.5]);
}

#[test]
fn a_seed_is_a_text() {
    let text = |seed| {
        let mut s = Sampler::new(SamplerConfig { seed, ..warm() });
        (0..50)
            .map(|_| s.sample(&mut [0.0; 100], &[]))
            .collect::<Vec<_>>()
    };
    assert_eq!(text(7), text(7));
    assert_ne!(text(7), text(8));
}

#[test]
fn bad_options_are_named() {
    let ok = SamplerConfig {
        temperature: 0.8,
        top_k: 40,
        top_p: 0.95,
        min_p: 0.05,
        ..Default::default()
    };
    assert_eq!(ok.check(), Ok(()));
    let message = |c: SamplerConfig| c.check().unwrap_err().to_string();
    assert!(
        message(SamplerConfig {
            temperature: -0.1,
            ..ok.clone()
        })
        .starts_with("temperature is -0.1, expected 0")
    );
    assert!(
        message(SamplerConfig {
            temperature: f32::NAN,
            ..ok.clone()
        })
        .contains("temperature is NaN")
    );
    assert!(
        message(SamplerConfig {
            top_p: 0.0,
            ..ok.clone()
        })
        .contains("top_p")
    );
    assert!(
        message(SamplerConfig {
            min_p: 1.5,
            ..ok.clone()
        })
        .contains("min_p")
    );
    assert!(
        message(SamplerConfig {
            repeat_penalty: 0.0,
            ..ok
        })
        .contains("repeat_penalty")
    );
}

proptest! {
    #[test]
    fn any_input_gives_a_possible_token(
        logits in prop::collection::vec(prop_oneof![any::<f32>(), Just(f32::NAN), -5f32..5.0], 1..40),
        (temperature, top_k, top_p, min_p) in (0f32..3.0, 0usize..50, 0.01f32..=1.0, 0f32..=1.0),
        recent in prop::collection::vec(0u32..50, 0..9),
        seed in any::<u64>(),
    ) {
        let config = SamplerConfig { temperature, top_k, top_p, min_p, repeat_penalty: 1.3, repeat_last_n: 4, seed };
        prop_assert_eq!(config.check(), Ok(()));
        let mut changed = logits.clone();
        let id = Sampler::new(config).sample(&mut changed, &recent) as usize;
        prop_assert!(id < logits.len());
        let possible = |l: f32| !l.is_nan() && l > f32::NEG_INFINITY;
        prop_assert!(possible(changed[id]) || !changed.iter().any(|l| possible(*l)));
        // Never outside the top k.
        let better = changed.iter().filter(|l| **l > changed[id]).count();
        prop_assert!(top_k == 0 || temperature == 0.0 || better < top_k);
    }
}
