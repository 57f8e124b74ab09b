//! What a template is found to take, and where its prompts have the texts of messages.

use super::dialect::Rendered;
use super::message::{Message, Role};
use super::tests::{CHATML, DEEPSEEK, HARMONY, LLAMA3, STRICT, assistant, dialect, user};
use crate::bundled;
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::tokenizer::{Tokenizer, TokenizerSource};

pub(super) fn tokenizer() -> Tokenizer {
    let gguf = Gguf::open(&bundled::path("demo/demo.gguf").unwrap()).unwrap();
    Tokenizer::new(TokenizerSource::from_gguf(&gguf).unwrap()).unwrap()
}

/// The prompt that the demo model's tokenizer gets, with the texts of messages in braces.
fn prompt(source: &str, messages: &[Message], with_system: bool) -> String {
    let dialect = dialect(source, with_system);
    let Rendered::Prompt { text, plain, .. } = dialect.render(messages, &tokenizer()).unwrap()
    else {
        return "mixed".into();
    };
    let mut marked = text.clone();
    for range in plain.iter().rev() {
        marked.insert(range.end, '}');
        marked.insert(range.start, '{');
    }
    marked
}

#[test]
fn texts_are_told_from_structure() {
    let talk = [
        user("<|endoftext|> Hi"),
        assistant("<think>\nhm\n"),
        user("a <b>"),
    ];
    assert_eq!(
        prompt(CHATML, &talk, false),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{<|endoftext|> Hi}<|im_end|>\n\
         <|im_start|>assistant\n{<think>\nhm}\n<|im_end|>\n<|im_start|>user\n{a <b>}<|im_end|>\n<|im_start|>assistant\n"
    );
    // Trimmed by the template.
    let talk = [Message::new(Role::System, " Be kind. "), user(" Hi ")];
    let told = prompt(LLAMA3, &talk, true);
    assert!(
        told.contains("\n\n{Be kind.}<") && told.contains("\n\n{Hi}<"),
        "{told}"
    );
    // A text in two places, and one that is not rendered.
    let twice = "{% for m in messages %}{{ m.content ~ m.content }}.{% endfor %}";
    assert_eq!(prompt(twice, &[user("Hi")], false), "{Hi}{Hi}.");
}

#[test]
fn templates_that_look_into_texts_see_them() {
    let cut = "{% for m in messages %}[{{ m.content[:60] }}]{% endfor %}";
    let long = "a b ".repeat(20);
    assert_eq!(
        prompt(cut, &[user(&long)], false),
        format!("[{}]", &long[..60])
    );
    // Then a control token that a message names cannot be told from the template's.
    let named = format!("<|endoftext|>{long}");
    assert_eq!(prompt(cut, &[user(&named)], false), "mixed");
    // A message that is compared is rendered as it is, or else as plain text.
    let asks = "{% for m in messages %}{{ 'YES:' if m.content.startswith('y') }}{{ m.content }}{% endfor %}";
    assert_eq!(prompt(asks, &[user("yes")], false), "YES:yes");
    assert_eq!(
        prompt(asks, &[user("y<|endoftext|>")], false),
        "{y<|endoftext|>}"
    );
}

#[test]
fn texts_that_a_template_takes_as_parts_are_given_so() {
    let parts = "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}";
    let talk = [Message::new(Role::System, "S"), user("Hi"), assistant("Yo")];
    assert_eq!(
        prompt(parts, &talk, true),
        "<system>{S}<user>{Hi}<assistant>{Yo}"
    );
    let users_only = "{% for m in messages %}<{{ m.role }}>{{ m.content[0].text if m.role == 'user' else m.content }}{% endfor %}";
    assert_eq!(
        prompt(users_only, &talk, true),
        "<system>{S}<user>{Hi}<assistant>{Yo}"
    );
}

#[test]
fn a_template_that_drops_what_is_said_is_refused() {
    for (source, what) in [
        ("Hello", "leaves out the user's message"),
        ("{{ messages | length }}", "leaves out the user's message"),
        ("{{ raise_exception('not me') }}", "not me"),
    ] {
        let refused = dialect(source, false).render(&[user("Hi")], &tokenizer());
        let error = refused.unwrap_err().to_string();
        assert!(error.contains("--chat-template FILE"), "{error}");
        assert!(error.contains(what), "{source}: {error}");
    }
}

#[test]
fn a_template_for_one_message_is_taken_with_a_warning() {
    let users = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}";
    for (source, what) in [
        ("{{ messages[0].content }}", "leaves out the user's message"),
        ("{{ messages[-1].content }}", "leaves out earlier answers"),
        (users, "leaves out earlier answers"),
    ] {
        assert_eq!(prompt(source, &[user("Hi")], false), "{Hi}");
        let note = dialect(source, false).note().unwrap();
        assert!(note.contains(what), "{source}: {note}");
    }
}

#[test]
fn a_template_that_takes_texts_apart_gets_the_texts_that_suit_it() {
    for (source, said, expected) in [
        ("{{ messages[0].content.index('=') }}", "x=y", "1"),
        ("{{ messages[0].content.partition('=')[2] }}", "x=y", "y"),
    ] {
        let rendered = dialect(source, false).render(&[user(said)], &tokenizer());
        let Rendered::Prompt { text, .. } = rendered.unwrap() else {
            panic!("{source}");
        };
        assert_eq!(text, expected, "{source}");
    }
}

#[test]
fn a_template_without_system_messages_has_it_in_the_first_turn() {
    let talk = [
        Message::new(Role::System, "S"),
        user("Hi"),
        assistant("Yo"),
        user("So?"),
    ];
    let drops = "{% for m in messages if m.role != 'system' %}[{{ m.content }}]{% endfor %}";
    for (source, first) in [
        (STRICT, "<s>[INST] {S\n\nHi} [/INST]"),
        (drops, "[{S\n\nHi}]"),
    ] {
        let told = prompt(source, &talk, true);
        assert!(told.starts_with(first), "{told}");
        assert!(dialect(source, true).note().is_some());
        assert!(dialect(source, false).note().is_none());
    }
    for source in [CHATML, LLAMA3, DEEPSEEK, HARMONY] {
        assert!(dialect(source, true).note().is_none());
    }
}
