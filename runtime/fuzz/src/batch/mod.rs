//! Any bytes as a line of a batch file: a request that can be answered, or a refusal of one line.

use tier_plan_planner::batch::{MAX_ID_BYTES, Request, refusal};
use tier_plan_runtime::sampler::SamplerConfig;

/// Most answers to a request, and most log-probabilities of a token beside its own.
const MAX_ANSWERS: usize = 128;
const MAX_TOP_LOGPROBS: usize = 20;
/// Most bytes of a message. It may quote a part of the line.
const MAX_MESSAGE_BYTES: usize = 2000;

/// Checks one input.
pub fn check(bytes: &[u8]) {
    let found = Request::parse(bytes);
    match &found {
        Ok(request) => check_request(request),
        Err(bad) => {
            let message = &bad.message;
            assert!(!message.is_empty() && message.len() <= MAX_MESSAGE_BYTES);
            assert!(!message.chars().any(char::is_control), "{message:?}");
            let line = refusal(7, bad);
            assert!(!line.to_string().contains('\n'));
            assert_eq!(line["error"]["message"], message.as_str());
            assert_eq!(line["custom_id"].as_str(), bad.custom_id.as_deref());
        }
    }
    // Space around a line changes nothing.
    let spaced = Request::parse(&[b" \t", bytes, b"\r\n"].concat());
    match (found, spaced) {
        (Ok(request), Ok(again)) => assert_eq!(request, again),
        (Err(bad), Err(again)) => assert_eq!(bad.code, again.code),
        (found, spaced) => panic!("{found:?} is {spaced:?} with space around it"),
    }
}

fn check_request(request: &Request) {
    assert!((1..=MAX_ID_BYTES).contains(&request.custom_id.len()));
    assert!((1..=MAX_ANSWERS).contains(&request.n));
    assert!(request.max_tokens.is_none_or(|n| n > 0));
    assert!(request.logprobs.is_none_or(|n| n <= MAX_TOP_LOGPROBS));
    assert!(request.stop.iter().all(|stop| !stop.is_empty()));
    let config = request.sampling.over(&SamplerConfig::default());
    config.check().expect("sampling within its ranges");
}
