//! Any bytes as what a server gets: bodies of requests and grammars, which are checked or refused in one line, and
//! answers of a model, which have the same parts however they are cut.

use tier_plan_serve::fuzzing;

/// Most bytes of a message. It may quote a part of the body.
const MAX_MESSAGE_BYTES: usize = 2000;

/// Checks one input as all of them.
pub fn check(bytes: &[u8]) {
    for read in fuzzing::BODIES {
        if let Err(bad) = read(bytes) {
            check_message(&bad.message);
        }
    }
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Err(message) = fuzzing::grammar(text)
    {
        assert!(!message.is_empty() && message.len() <= MAX_MESSAGE_BYTES);
    }
    if let [form, cut, text @ ..] = bytes {
        check_answer(*form, *cut, &String::from_utf8_lossy(text));
    }
}

fn check_message(message: &str) {
    assert!(!message.is_empty() && message.len() <= MAX_MESSAGE_BYTES);
    assert!(!message.chars().any(char::is_control), "{message:?}");
}

/// Checks that an answer has the parts that it has as a whole when it comes in pieces.
fn check_answer(form: u8, cut: u8, text: &str) {
    let prompt = if cut & 1 == 0 { "Q" } else { "Q<think>\n" };
    let lengths = [1 + (cut >> 1 & 7), 1 + (cut >> 4)].map(usize::from);
    let mut pieces = Vec::new();
    let mut rest = text;
    for length in lengths.iter().cycle() {
        let at = rest
            .char_indices()
            .nth(*length)
            .map_or(rest.len(), |(at, _)| at);
        let (piece, after) = rest.split_at(at);
        pieces.push(piece);
        rest = after;
        if rest.is_empty() {
            break;
        }
    }
    let whole = fuzzing::parts(form, prompt, &[text]);
    assert_eq!(
        fuzzing::parts(form, prompt, &pieces),
        whole,
        "{text:?} in {pieces:?}"
    );
}
