//! Any bytes as the body of a request over HTTP: checked, or refused in one line.

/// Most bytes of a message. It may quote a part of the body.
const MAX_MESSAGE_BYTES: usize = 2000;

/// Checks one input as the body of each kind of request.
pub fn check(bytes: &[u8]) {
    for read in tier_plan_serve::BODIES {
        if let Err(bad) = read(bytes) {
            let message = &bad.message;
            assert!(!message.is_empty() && message.len() <= MAX_MESSAGE_BYTES);
            assert!(!message.chars().any(char::is_control), "{message:?}");
        }
    }
}
