//! Templates in the styles that models come with, and whole conversations with the demo model.

use super::dialect::Dialect;
use super::message::{Message, Role};
use super::template::Template;
use super::thought::Answer;
use super::{Chat, Options, Signals};
use crate::bundled;
use crate::opening::Opening;
use crate::screen::Screen;
use crate::session::Session;
use std::cell::Cell;
use std::time::{Duration, UNIX_EPOCH};
use tier_plan_runtime::sampler::SamplerConfig;

pub(super) const CHATML: &str = "\
{%- if messages[0].role != 'system' %}
    {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
";

pub(super) const LLAMA3: &str = "\
{{ bos_token }}
{%- if not tools is defined %}{% set tools = none %}{% endif %}
{%- set first = messages[0] %}
{%- if first['role'] == 'system' %}
    {%- set system = first['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}{{ 'Tools: ' ~ tools | tojson }}{% endif %}
{{- 'Today: ' + strftime_now('%d %b %Y') + '\\n\\n' + system + '<|eot_id|>' }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}";

pub(super) const DEEPSEEK: &str = "\
{%- set ns = namespace(system='', open=false) -%}
{%- for m in messages if m['role'] == 'system' -%}
{%- set ns.system = ns.system + m['content'] -%}
{%- endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for m in messages -%}
{%- if m['role'] == 'user' %}{% set ns.open = true %}{{ '<User>' + m['content'] }}{% endif -%}
{%- if m['role'] == 'assistant' and m['content'] is not none -%}
{%- set ns.open = false %}{{ '<Assistant>' + m['content'].split('</think>')|last + eos_token }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and ns.open %}{{ '<Assistant><think>\\n' }}{% endif %}";

pub(super) const HARMONY: &str = "\
{%- macro part(role, channel, text) -%}
<|start|>{{ role }}{% if channel %}<|channel|>{{ channel }}{% endif %}<|message|>{{ text }}<|end|>
{%- endmacro -%}
{{ part('system', none, 'Current date: ' ~ strftime_now('%Y-%m-%d')) }}
{%- for m in messages -%}
    {%- if m.role == 'assistant' -%}
        {%- if '<|channel|>' in m.content -%}{{ raise_exception('put thoughts into the thinking field') }}{%- endif -%}
        {%- if loop.last and m.thinking is defined -%}{{ part('assistant', 'analysis', m.thinking) }}{%- endif -%}
        {{ part('assistant', 'final', m.content) }}
    {%- else -%}
        {{ part('developer' if m.role == 'system' else m.role, none, m.content) }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}";

/// A style whose makers know no system message and insist on turns that alternate.
pub(super) const STRICT: &str = "\
{{ bos_token }}{% for m in messages %}
{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% if m['role'] == 'user' %}[INST] {{ m['content'].strip() }} [/INST]{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}
{% endfor %}";

fn render(source: &str, messages: &[Message]) -> anyhow::Result<String> {
    let now = UNIX_EPOCH + Duration::from_secs(1_709_164_800);
    Template::at(source, "<s>", "</s>", Some(now))?.render(messages)
}

pub(super) fn user(text: &str) -> Message {
    Message::new(Role::User, text)
}

pub(super) fn assistant(text: &str) -> Message {
    Message::new(Role::Assistant, text)
}

#[test]
fn chatml() {
    let talk = [
        user("Hi"),
        assistant("<think>\nhm\n</think>\n\nYo"),
        user("Why <b> & 'c'?"),
    ];
    assert_eq!(
        render(CHATML, &talk).unwrap(),
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYo<|im_end|>\n\
         <|im_start|>user\nWhy <b> & 'c'?<|im_end|>\n<|im_start|>assistant\n"
    );
}

#[test]
fn llama3() {
    let talk = [Message::new(Role::System, " Be kind. "), user(" Hi ")];
    assert_eq!(
        render(LLAMA3, &talk).unwrap(),
        "<s><|start_header_id|>system<|end_header_id|>\n\nToday: 29 Feb 2024\n\nBe kind.<|eot_id|>\
         <|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    );
}

#[test]
fn deepseek() {
    let talk = [
        Message::new(Role::System, "S"),
        user("Hi"),
        assistant("Yo"),
        user("So?"),
    ];
    assert_eq!(
        render(DEEPSEEK, &talk).unwrap(),
        "<s>S<User>Hi<Assistant>Yo</s><User>So?<Assistant><think>\n"
    );
}

#[test]
fn harmony() {
    let text = "<|channel|>analysis<|message|>They greet.<|end|><|start|>assistant<|channel|>final<|message|>Hello!";
    let answer = Answer {
        text: text.to_string(),
        ..Answer::default()
    };
    let answer = answer.message("");
    assert_eq!(
        (answer.content.as_str(), answer.thinking.as_deref()),
        ("Hello!", Some("They greet."))
    );
    assert_eq!(
        render(
            HARMONY,
            &[
                Message::new(Role::System, "S"),
                user("Hi"),
                answer,
                user("And?")
            ]
        )
        .unwrap(),
        "<|start|>system<|message|>Current date: 2024-02-29<|end|><|start|>developer<|message|>S<|end|>\
         <|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>Hello!<|end|>\
         <|start|>user<|message|>And?<|end|><|start|>assistant"
    );
    let error = render(HARMONY, &[user("Hi"), assistant("<|channel|>x")])
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("put thoughts into the thinking field") && error.contains("--chat-template"),
        "{error}"
    );
}

#[test]
fn what_is_no_template_is_refused_with_its_line() {
    let error = Template::new("a\n{% for x %}", "", "")
        .err()
        .unwrap()
        .to_string();
    assert!(
        error.contains("line 2") && error.contains("--chat-template FILE"),
        "{error}"
    );
}

/// A template for the demo model, which has none: plain text with names.
const PLAIN: &str = "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}assistant:";

/// The template with the way it takes messages.
pub(super) fn dialect(source: &str, with_system: bool) -> Dialect {
    Dialect::probe(Template::new(source, "<s>", "</s>").unwrap(), with_system).unwrap()
}

fn session(context: u32) -> Session {
    let model = bundled::path("demo/demo.gguf").unwrap();
    Session::open(
        &model,
        Opening {
            context: Some(context),
            threads: Some(1),
            ..Opening::default()
        },
    )
    .unwrap()
}

/// What a conversation writes, and the tokens that are in the context after it.
fn talk(
    context: u32,
    template: Option<&str>,
    input: &str,
    stop_after: Option<usize>,
) -> (String, Vec<u32>) {
    let mut session = session(context);
    let tokenizer = session.tokenizer().unwrap();
    let asked = Cell::new(0);
    let interrupted = || {
        asked.set(asked.get() + 1);
        stop_after.is_some_and(|n| asked.get() > n)
    };
    let waiting = |_| asked.set(0);
    let options = Options {
        template: template.map(|source| dialect(source, false)),
        system: None,
        max_tokens: Some(12),
        sampling: SamplerConfig::default(),
        ignore_eos: true,
        draft: 0,
        prompt: "> ",
        screen: Screen::new(false),
        plan: vec!["the plan".into()],
        learner: None,
        signals: Signals {
            interrupted: &interrupted,
            waiting: &waiting,
        },
    };
    let mut output = Vec::new();
    let mut chat = Chat::new(&mut session.engine, &tokenizer, options);
    chat.talk(&mut input.as_bytes(), &mut output).unwrap();
    let held = chat.held.clone();
    assert_eq!(held.len(), chat.engine.n_past());
    (String::from_utf8(output).unwrap(), held)
}

/// The answers: what stands between a prompt and the next line break.
fn answers(output: &str) -> Vec<&str> {
    output
        .split("> ")
        .skip(1)
        .map(str::trim_end)
        .filter(|a| !a.is_empty())
        .collect()
}

#[test]
fn keeping_the_context_changes_no_answer() {
    let (output, _) = talk(
        512,
        Some(PLAIN),
        "In the beginning\nAnd God said\n/quit\nnever read\n",
        None,
    );
    let said = answers(&output);
    assert_eq!(said.len(), 2, "{output}");
    // The same second turn with nothing kept: processed whole, in a fresh engine.
    let first = talk(512, Some(PLAIN), "In the beginning\n", None).0;
    let first = first.trim_start_matches("> ");
    let first = first.split("\n> ").next().unwrap();
    let whole = format!("user:In the beginning\nassistant:{first}\nuser:And God said\nassistant:");
    let mut session = session(512);
    let tokenizer = session.tokenizer().unwrap();
    let mut output = Vec::new();
    let idle = Signals {
        interrupted: &|| false,
        waiting: &|_| (),
    };
    let options = Options {
        template: None,
        system: None,
        max_tokens: Some(12),
        sampling: SamplerConfig::default(),
        ignore_eos: true,
        draft: 0,
        prompt: "",
        screen: Screen::new(false),
        plan: Vec::new(),
        learner: None,
        signals: idle,
    };
    let mut chat = Chat::new(&mut session.engine, &tokenizer, options);
    chat.turn(&whole, &mut output).unwrap();
    assert_eq!(chat.stats.unwrap().kept, 0);
    assert_eq!(String::from_utf8(output).unwrap().trim_end(), said[1]);
}

#[test]
fn only_what_is_new_is_processed() {
    let (output, _) = talk(
        512,
        Some(PLAIN),
        "In the beginning\n/stats\nAnd God said\n/stats\n",
        None,
    );
    let numbers = |line: &str| -> Vec<usize> {
        line.split(|c: char| !c.is_ascii_digit())
            .filter_map(|n| n.parse().ok())
            .collect()
    };
    let lines: Vec<_> = output
        .lines()
        .filter(|l| l.contains("kept from before"))
        .map(numbers)
        .collect();
    let (first, second) = (&lines[0], &lines[1]);
    assert_eq!(first[1], 0);
    // The first message, and of its answer of 12 tokens all but the last, which was never
    // processed.
    assert_eq!(second[1], first[0] + 11, "{output}");
    assert!(second[0] < second[1], "{output}");
}

#[test]
fn commands_answer_and_the_rest_is_said() {
    let (output, held) = talk(
        512,
        Some(PLAIN),
        "/stats\n\n/help\n/plan\n/nonsense x\n//slash \\\nmore\n/reset\n",
        None,
    );
    assert!(output.contains("No answer yet."));
    assert!(output.contains("/reset  forget the conversation"));
    assert!(output.contains("the plan"));
    assert!(output.contains("Unknown command /nonsense;"));
    assert!(output.contains("The conversation is forgotten."));
    assert!(held.is_empty());
    let (_, held) = talk(
        512,
        Some("{% for m in messages %}{{ m.content }}\n{% endfor %}"),
        "//slash \\\nmore\n",
        None,
    );
    let tokenizer = session(16).tokenizer().unwrap();
    assert!(
        tokenizer.decode(&held).starts_with("/slash \nmore"),
        "{}",
        tokenizer.decode(&held)
    );
}

#[test]
fn an_interruption_stops_the_answer_and_not_the_conversation() {
    let (output, _) = talk(
        512,
        Some(PLAIN),
        "In the beginning\nAnd God said\n",
        Some(3),
    );
    assert_eq!(output.matches("(stopped)").count(), 2, "{output}");
    // A message of more than a batch is not processed to its end.
    let long = "word ".repeat(2400);
    let (output, held) = talk(8192, Some(PLAIN), &format!("{long}\n"), Some(0));
    assert!(output.contains("(stopped)") && held.is_empty(), "{output}");
}

#[test]
fn a_full_context_drops_the_oldest_turns() {
    let input = "one two three four five six seven\n".repeat(8);
    let (output, held) = talk(64, Some(PLAIN), &input, None);
    assert!(output.contains("of the turns left it"), "{output}");
    assert!(held.len() <= 64);
    let (output, _) = talk(
        64,
        Some(PLAIN),
        &format!("{}\nshort\n", "word ".repeat(200)),
        None,
    );
    assert!(output.contains("send a shorter one"), "{output}");
    assert_eq!(
        answers(&output).len(),
        2,
        "the short message is answered: {output}"
    );
}

#[test]
fn without_a_template_text_is_continued() {
    let (output, held) = talk(256, None, "In the beginning\n", None);
    assert!(output.contains("no chat template"));
    let tokenizer = session(16).tokenizer().unwrap();
    assert!(tokenizer.decode(&held).starts_with("In the beginning"));
    let (output, _) = talk(16, None, &format!("{}\n", "word ".repeat(50)), None);
    assert!(output.contains("more than 15 tokens"), "{output}");
}
