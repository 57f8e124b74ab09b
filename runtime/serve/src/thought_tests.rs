use super::*;
use proptest::prelude::*;

/// The parts of an answer that comes in pieces of `n` characters, in which these texts are
/// tokens.
fn split(text: &str, prompt: &str, tokens: &[(&str, ThoughtMark)], n: usize) -> Parts {
    let mut whole = Parts::default();
    for part in split_with(None, text, prompt, tokens, n) {
        match part {
            Part::Thinking(text) => whole.thinking += &text,
            Part::Content(text) => whole.content += &text,
            Part::Call(call) => panic!("{call:?}"),
        }
    }
    whole
}

fn split_with(
    options: Option<CallOptions>,
    text: &str,
    prompt: &str,
    tokens: &[(&str, ThoughtMark)],
    n: usize,
) -> Vec<Part> {
    let mut splitter = Splitter::new(prompt, options);
    let mut whole = Vec::new();
    let mut gather = |parts: Vec<Part>| {
        parts.into_iter().for_each(|part| add(&mut whole, part));
    };
    let (mut done, mut rest) = (0, text);
    while !rest.is_empty() {
        let token = tokens.iter().find(|(token, _)| rest.starts_with(token));
        let next = tokens.iter().filter_map(|(token, _)| rest[1..].find(token));
        let most = next.min().map_or(rest.len(), |i| i + 1);
        let cut = rest.char_indices().nth(n).map_or(rest.len(), |(i, _)| i);
        let (len, mark) = match token {
            Some((token, mark)) => (token.len(), Some((done..done + token.len(), *mark))),
            None => (rest.floor_char_boundary(cut.min(most)).max(1), None),
        };
        gather(splitter.push(&rest[..len], mark));
        (done, rest) = (done + len, &rest[len..]);
    }
    gather(splitter.finish());
    whole
}

/// Texts of an answer.
#[derive(Debug, PartialEq, Eq, Default)]
struct Parts {
    thinking: String,
    content: String,
}

fn parts(content: &str, thinking: &str) -> Parts {
    Parts {
        thinking: thinking.into(),
        content: content.into(),
    }
}

/// A text, its prompt, the texts that are tokens, and the parts.
type Case<'a> = (&'a str, &'a str, &'a [(&'a str, ThoughtMark)], Parts);

#[test]
fn thoughts_are_told_apart_however_they_are_cut() {
    use ThoughtMark::{Closes, Opens};
    let tokens: &[(&str, ThoughtMark)] = &[("[THINK]", Opens), ("[/THINK]", Closes)];
    let cases: &[Case<'_>] = &[
        (
            "<think>\nHm.\n</think>\n\nYes.\n",
            "",
            &[],
            parts("Yes.", "Hm."),
        ),
        ("Hm.</think>Yes.", "Q<think>\n", &[], parts("Yes.", "Hm.")),
        ("◁think▷Hm.◁/think▷Yes.", "", &[], parts("Yes.", "Hm.")),
        ("<think>Hm", "", &[], parts("", "Hm")),
        (
            "A <think> b </think> c ",
            "Q",
            &[],
            parts("A <think> b </think> c ", ""),
        ),
        (" Yes. ", "Q", &[], parts(" Yes. ", "")),
        ("<thin", "Q", &[], parts("<thin", "")),
        ("", "Q", &[], parts("", "")),
        (
            "[THINK]Greet.[/THINK]Hello!",
            "",
            tokens,
            parts("Hello!", "Greet."),
        ),
        (
            "Well, [THINK]hm[/THINK]yes.",
            "",
            tokens,
            parts("Well, yes.", "hm"),
        ),
        ("[THINK]Hm", "", tokens, parts("", "Hm")),
        (
            "<|channel|>analysis<|message|>They greet.<|end|><|start|>assistant<|channel|>final<|message|>Hello!<|return|>",
            "",
            &[],
            parts("Hello!", "They greet."),
        ),
        (
            "It writes <|channel|>.",
            "",
            &[],
            parts("It writes <|channel|>.", ""),
        ),
    ];
    for (text, prompt, tokens, expected) in cases {
        for n in 1..=text.len().max(1) {
            assert_eq!(split(text, prompt, tokens, n), *expected, "{text:?} by {n}");
        }
    }
}

fn channels() -> Option<CallOptions> {
    Some(CallOptions {
        form: Form::named("gpt-oss"),
        tools: Arc::new([Tool {
            name: "now".into(),
            description: None,
            parameters: serde_json::json!({}),
            strict: false,
        }]),
        only_one: false,
    })
}

#[test]
fn a_channel_with_a_recipient_is_a_call() {
    let call = |arguments: &str| {
        Part::Call(Call {
            id: None,
            name: "now".into(),
            arguments: arguments.into(),
        })
    };
    let thought = || Part::Thinking("Time?".into());
    let content = |text: &str| Part::Content(text.into());
    let analysis = "<|channel|>analysis<|message|>Time?<|end|><|start|>assistant";
    for (text, expected) in [
        (
            format!(
                "{analysis}<|channel|>commentary to=functions.now <|constrain|>json<|message|>{{\"a\":1}}"
            ),
            vec![thought(), call("{\"a\":1}")],
        ),
        (
            format!("{analysis} to=functions.now<|channel|>commentary json<|message|>{{}}<|call|>"),
            vec![thought(), call("{}")],
        ),
        (
            " to=functions.now<|channel|>commentary json<|message|>".into(),
            vec![call("{}")],
        ),
        (
            format!("{analysis}<|channel|>commentary to=functions.other<|message|>{{}}"),
            vec![thought(), content("{}")],
        ),
        (
            format!("{analysis}<|channel|>commentary to=functions.now<|message|>{{\"a\":"),
            vec![thought(), content("{\"a\":")],
        ),
        ("to=nobody".into(), vec![content("to=nobody")]),
        ("plain".into(), vec![content("plain")]),
    ] {
        for n in 1..=text.len() {
            let split = split_with(channels(), &text, "<|start|>assistant", &[], n);
            assert_eq!(split, expected, "{text} by {n}");
        }
    }
}

#[test]
fn calls_come_after_a_thought() {
    let options = CallOptions {
        form: Form::named("Hermes"),
        ..channels().unwrap()
    };
    let text =
        "<think>Time?</think>\n\nLet me see.\n<tool_call>\n{\"name\": \"now\"}\n</tool_call>";
    let expected = [
        Part::Thinking("Time?".into()),
        Part::Content("Let me see.".into()),
        Part::Call(Call {
            id: None,
            name: "now".into(),
            arguments: "{}".into(),
        }),
    ];
    for n in 1..=text.len() {
        assert_eq!(
            split_with(Some(options.clone()), text, "", &[], n),
            expected,
            "by {n}"
        );
    }
}

proptest! {
    #[test]
    fn cuts_change_nothing(
        pieces in prop::collection::vec(prop::sample::select(vec!["<think>", "</think>", "<", "a", " ", "é",
            "<|channel|>", "<|message|>", "<|end|>", "final", "analysis"]), 0..12),
        n in 1usize..9,
        opened in any::<bool>(),
    ) {
        let text = pieces.concat();
        let prompt = if opened { "<think>" } else { "" };
        prop_assert_eq!(split(&text, prompt, &[], n), split(&text, prompt, &[], usize::MAX));
    }
}
