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
        let config = SamplerConfig { temperature, top_k, top_p, min_p, repeat_penalty: 1.3, repeat_last_n: 4, seed, ..Default::default() };
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

#[test]
fn biases_come_first_and_tokens_past_the_vocabulary_are_ignored() {
    let bias = |token, bias| LogitBias { token, bias };
    let config = SamplerConfig {
        logit_bias: vec![bias(0, -100.0), bias(2, 1.5), bias(99, 100.0)],
        repeat_penalty: 2.0,
        ..Default::default()
    };
    let mut logits = [9.0, 1.0, 1.0];
    assert_eq!(Sampler::new(config).sample(&mut logits, &[2]), 2);
    // The penalty halves what the bias has made of it.
    assert_eq!(logits, [-91.0, 1.0, 1.25]);
}

#[test]
fn drawn_tokens_are_penalized_by_count_and_by_presence() {
    let config = SamplerConfig {
        presence_penalty: 0.5,
        frequency_penalty: 0.25,
        ..Default::default()
    };
    let mut sampler = Sampler::new(config);
    let logits = [2.0, 1.6, 1.0];
    let mut drawn = Vec::new();
    for _ in 0..5 {
        // The prompt does not count, here token 2.
        drawn.push(sampler.sample(&mut logits.clone(), &[2, 2, 2]));
    }
    // 2.0; 1.6 before 1.25; 1.25; 1.0, the lowest of equals; 1.0 before 0.75.
    assert_eq!(drawn, [0, 1, 0, 0, 2]);
    let mut changed = logits;
    sampler.sample(&mut changed, &[]);
    assert_eq!(
        changed,
        [2.0 - 0.75 - 0.5, 1.6 - 0.25 - 0.5, 1.0 - 0.25 - 0.5]
    );
}

#[test]
fn penalties_and_biases_outside_their_range_are_named() {
    let message = |c: SamplerConfig| c.check().unwrap_err().to_string();
    let presence = SamplerConfig {
        presence_penalty: 2.5,
        ..Default::default()
    };
    assert!(message(presence).starts_with("presence_penalty is 2.5, expected -2 to 2"));
    let frequency = SamplerConfig {
        frequency_penalty: f32::NAN,
        ..Default::default()
    };
    assert!(message(frequency).starts_with("frequency_penalty is NaN"));
    let token = 3;
    let bias = SamplerConfig {
        logit_bias: vec![LogitBias { token, bias: 101.0 }],
        ..Default::default()
    };
    assert!(message(bias).starts_with("logit_bias is 101, expected -100 to 100"));
}

#[test]
fn log_probabilities_are_those_of_the_softmax() {
    let p = [0.1f32, 0.5, 0.15, 0.25];
    let found = log_probabilities(&logs(&p), 2, 3);
    let near = |found: LogProbability, token: u32| {
        assert_eq!(found.token, token);
        // 32-bit logits near 3 carry an error of 2e-7.
        assert!(
            (found.value - p[token as usize].ln()).abs() < 1e-6,
            "{found:?}"
        );
    };
    near(found.chosen, 2);
    assert_eq!(found.top.len(), 3);
    for (found, token) in found.top.iter().zip([1, 3, 2]) {
        near(*found, token);
    }
}

#[test]
fn log_probabilities_of_strange_logits_are_numbers() {
    let impossible = log_probabilities(&[f32::NAN, f32::NEG_INFINITY], 0, 5);
    assert_eq!(impossible.chosen.value, f32::NEG_INFINITY);
    assert_eq!(impossible.top.len(), 2);
    assert_eq!(log_probabilities(&[], 7, 5).top, []);
    let sure = log_probabilities(&[1.0, f32::INFINITY], 1, 0);
    assert_eq!((sure.chosen.value, sure.top.len()), (0.0, 0));
    assert_eq!(
        log_probabilities(&[0.0], 9, 0).chosen.value,
        f32::NEG_INFINITY
    );
    // Of equals the lowest ids, in their order.
    let ids: Vec<u32> = log_probabilities(&[1.0; 9], 0, 3)
        .top
        .iter()
        .map(|t| t.token)
        .collect();
    assert_eq!(ids, [0, 1, 2]);
}

/// Returns the text before the stop string, and whether there was one, of pieces pushed in turn.
fn stopped(stops: &[&str], pieces: &[&str]) -> (String, bool) {
    let mut watch = StopStrings::new(stops.iter().map(ToString::to_string));
    let mut text: String = pieces.iter().map(|piece| watch.push(piece).text).collect();
    text.push_str(&watch.finish());
    (text, watch.is_stopped())
}

#[test]
fn stop_strings_are_found_across_pieces() {
    let found = |text: &str| (text.to_string(), true);
    assert_eq!(stopped(&["END"], &["a E", "N", "D b"]), found("a "));
    assert_eq!(stopped(&["aab"], &["aa", "ab"]), found("a"));
    assert_eq!(stopped(&["é!"], &["caf", "é", "!"]), found("caf"));
    // The first that is complete, and the longest of those that end together.
    assert_eq!(stopped(&["cd", "bcd", "abcde"], &["abcde"]), found("a"));
    assert_eq!(stopped(&["b", ""], &["abab"]), found("a"));
    assert_eq!(stopped(&["END", ""], &["a EN"]), ("a EN".into(), false));
    assert_eq!(stopped(&[], &["a", "b"]), ("ab".into(), false));
}

#[test]
fn text_is_held_back_only_while_it_may_become_a_stop_string() {
    let mut watch = StopStrings::new(["<end>".to_string()]);
    assert_eq!(watch.push("a <e").text, "a ");
    assert_eq!(watch.push("x").text, "<ex");
    assert!(watch.push("<end> b").stopped);
    assert_eq!(
        watch.push("c"),
        Passed {
            text: String::new(),
            stopped: true
        }
    );
    assert_eq!(watch.finish(), "");
}

proptest! {
    #[test]
    fn stop_strings_do_not_depend_on_pieces(
        text in "[abé]{0,20}",
        stops in prop::collection::vec("[abé]{0,4}", 0..4),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
    ) {
        // By search: the least end, of those the least start.
        let ends = |stop: &String| text.find(stop.as_str()).map(|start| (start + stop.len(), start));
        let first = stops.iter().filter(|s| !s.is_empty()).filter_map(ends).min();
        let expected = first.map_or((text.clone(), false), |(_, start)| (text[..start].to_string(), true));
        let chars: Vec<char> = text.chars().collect();
        let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(chars.len() + 1)).collect();
        at.extend([0, chars.len()]);
        at.sort_unstable();
        let pieces: Vec<String> = at.windows(2).map(|w| chars[w[0]..w[1]].iter().collect()).collect();
        let pieces: Vec<&str> = pieces.iter().map(String::as_str).collect();
        let stops: Vec<&str> = stops.iter().map(String::as_str).collect();
        prop_assert_eq!(stopped(&stops, &pieces), expected);
    }
}
