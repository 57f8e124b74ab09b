//! The table of forms. The text of a model's chat template says which one the model was trained on.

use super::Call;
use super::bodies;
use super::gemma;
use super::reader::{Read, Reader};
use crate::request::tools::Tool;

/// Reads the text between two marks, which it includes.
type Body = fn(&mut Reader<'_>, [&str; 2], &[Tool]) -> Read<Vec<Call>>;

/// Where the text of a call ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    /// With its second mark.
    Mark,
    /// With its JSON.
    Json,
    /// In channels, which [`thought`](crate::thought) tells apart.
    Channel,
}

/// A pair of marks around calls.
pub(crate) type Marks = [&'static str; 2];

/// A form of calls.
pub(crate) struct Form {
    /// Name, for errors.
    pub name: &'static str,
    /// Texts that the template has, all of them.
    signs: &'static [&'static str],
    /// The marks around calls. Where models forget the outer ones, the inner ones follow.
    pub(super) marks: &'static [Marks],
    pub(super) end: End,
    pub(super) body: Body,
    /// Marks within calls that a vocabulary may have as control tokens, which are no text otherwise.
    pub inner: &'static [&'static str],
    /// Whether an answer that begins with a bracket may be a call without a mark.
    pub(super) is_bare: bool,
    /// What ends a single call.
    pub one: &'static [&'static str],
    /// How calls are written, if an answer can be made to have them.
    pub frame: Option<Frame>,
}

impl std::fmt::Debug for Form {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name)
    }
}

/// How arguments are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Arguments {
    /// As a JSON object.
    Object,
    /// One by one, each between two texts in which `{key}` is its name. Strings have no quotes.
    Each(Marks),
}

/// The texts around calls, for an answer that must call. `{name}` is the tool, and `{number}` any
/// number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Frame {
    /// Around all calls.
    pub all: Marks,
    /// Around the arguments of each.
    pub each: Marks,
    /// Between two calls; a form without it has one call.
    pub between: Option<&'static str>,
    pub arguments: Arguments,
}

const HERMES: [&str; 2] = ["<tool_call>", "</tool_call>"];

const HERMES_FRAME: Frame = Frame {
    all: ["", ""],
    each: [
        "<tool_call>\n{\"name\": \"{name}\", \"arguments\": ",
        "}\n</tool_call>",
    ],
    between: Some("\n"),
    arguments: Arguments::Object,
};

/// Calls in an array between two marks.
const fn array(all: Marks) -> Option<Frame> {
    Some(Frame {
        all,
        each: ["{\"name\": \"{name}\", \"arguments\": ", "}"],
        between: Some(", "),
        ..HERMES_FRAME
    })
}

/// A form with everything that most have alike.
const PLAIN: Form = Form {
    name: "",
    signs: &[],
    marks: &[HERMES],
    end: End::Mark,
    body: bodies::json,
    inner: &[],
    is_bare: false,
    one: &["</tool_call>"],
    frame: Some(HERMES_FRAME),
};

/// The form of DeepSeek V3.1.
const DEEPSEEK: Form = Form {
    name: "DeepSeek",
    signs: &["<｜tool▁calls▁begin｜>"],
    marks: &[["<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"]],
    body: bodies::deepseek,
    inner: &[
        "<｜tool▁call▁begin｜>",
        "<｜tool▁sep｜>",
        "<｜tool▁call▁end｜>",
    ],
    one: &["<｜tool▁call▁end｜>"],
    frame: Some(Frame {
        all: ["<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"],
        each: [
            "<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>",
            "<｜tool▁call▁end｜>",
        ],
        between: Some(""),
        arguments: Arguments::Object,
    }),
    ..PLAIN
};

/// The form of Mistral before it had a mark for arguments.
const MISTRAL: Form = Form {
    name: "Mistral",
    signs: &["[TOOL_CALLS]"],
    marks: &[["[TOOL_CALLS]", ""]],
    end: End::Json,
    body: bodies::mistral,
    inner: &["[CALL_ID]", "[ARGS]"],
    one: &[],
    frame: array(["[TOOL_CALLS][", "]"]),
    ..PLAIN
};

/// The form of Llama 3.1.
const LLAMA: Form = Form {
    name: "Llama 3",
    signs: &["<|python_tag|>"],
    marks: &[["<|python_tag|>", ""]],
    end: End::Json,
    body: bodies::bare,
    is_bare: true,
    one: &[],
    frame: Some(Frame {
        each: ["{\"name\": \"{name}\", \"parameters\": ", "}"],
        between: None,
        ..HERMES_FRAME
    }),
    ..PLAIN
};

/// All forms, special ones first.
static FORMS: [Form; 24] = [
    Form {
        name: "gpt-oss",
        signs: &["<|channel|>", "<|call|>"],
        marks: &[],
        end: End::Channel,
        one: &["<|call|>"],
        frame: Some(Frame {
            each: [
                "<|channel|>commentary to=functions.{name} <|constrain|>json<|message|>",
                "",
            ],
            between: None,
            ..HERMES_FRAME
        }),
        ..PLAIN
    },
    Form {
        name: "DeepSeek V3.2",
        signs: &["｜DSML｜"],
        marks: &[
            ["<｜DSML｜function_calls>", "</｜DSML｜function_calls>"],
            ["<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"],
        ],
        body: bodies::dsml,
        inner: &["｜DSML｜"],
        one: &["</｜DSML｜invoke>"],
        frame: None,
        ..PLAIN
    },
    Form {
        name: "DeepSeek V3",
        signs: &["<｜tool▁calls▁begin｜>", "```json"],
        frame: Some(Frame {
            all: ["<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"],
            each: [
                "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n",
                "\n```<｜tool▁call▁end｜>",
            ],
            between: Some("\n"),
            arguments: Arguments::Object,
        }),
        ..DEEPSEEK
    },
    DEEPSEEK,
    Form {
        name: "Kimi K2",
        signs: &["<|tool_calls_section_begin|>"],
        marks: &[["<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"]],
        body: bodies::kimi,
        inner: &[
            "<|tool_call_begin|>",
            "<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
        ],
        one: &["<|tool_call_end|>"],
        frame: Some(Frame {
            all: ["<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"],
            each: [
                "<|tool_call_begin|>functions.{name}:{number}<|tool_call_argument_begin|>",
                "<|tool_call_end|>",
            ],
            between: Some(""),
            arguments: Arguments::Object,
        }),
        ..PLAIN
    },
    Form {
        name: "MiniMax M2",
        signs: &["<minimax:tool_call>"],
        marks: &[["<minimax:tool_call>", "</minimax:tool_call>"]],
        body: bodies::invokes,
        one: &["</invoke>"],
        frame: Some(Frame {
            all: ["<minimax:tool_call>\n", "</minimax:tool_call>"],
            each: ["<invoke name=\"{name}\">\n", "</invoke>\n"],
            between: Some(""),
            arguments: Arguments::Each(["<parameter name=\"{key}\">", "</parameter>\n"]),
        }),
        ..PLAIN
    },
    Form {
        name: "Seed-OSS",
        signs: &["<seed:tool_call>"],
        marks: &[
            ["<seed:tool_call>", "</seed:tool_call>"],
            ["<function=", "</function>"],
        ],
        body: bodies::functions,
        one: &["</function>"],
        frame: Some(Frame {
            each: [
                "<seed:tool_call>\n<function={name}>\n",
                "</function>\n</seed:tool_call>",
            ],
            arguments: Arguments::Each(["<parameter={key}>", "</parameter>\n"]),
            ..HERMES_FRAME
        }),
        ..PLAIN
    },
    Form {
        name: "Qwen3-Coder",
        signs: &["<tool_call>", "<function="],
        marks: &[HERMES, ["<function=", "</function>"]],
        body: bodies::functions,
        one: &["</function>"],
        frame: Some(Frame {
            each: [
                "<tool_call>\n<function={name}>\n",
                "</function>\n</tool_call>",
            ],
            arguments: Arguments::Each(["<parameter={key}>\n", "\n</parameter>\n"]),
            ..HERMES_FRAME
        }),
        ..PLAIN
    },
    Form {
        name: "Functionary",
        signs: &["<function="],
        marks: &[["<function=", "</function>"]],
        body: bodies::functions,
        one: &["</function>"],
        frame: Some(Frame {
            each: ["<function={name}>", "</function>"],
            between: Some(""),
            ..HERMES_FRAME
        }),
        ..PLAIN
    },
    Form {
        name: "GLM",
        signs: &["<arg_key>"],
        body: bodies::pairs,
        frame: Some(Frame {
            each: ["<tool_call>{name}\n", "</tool_call>"],
            arguments: Arguments::Each(["<arg_key>{key}</arg_key>\n<arg_value>", "</arg_value>\n"]),
            ..HERMES_FRAME
        }),
        ..PLAIN
    },
    Form {
        name: "Mistral 11",
        signs: &["[TOOL_CALLS]", "[ARGS]"],
        frame: Some(Frame {
            each: ["[TOOL_CALLS]{name}[ARGS]", ""],
            between: Some(""),
            ..HERMES_FRAME
        }),
        ..MISTRAL
    },
    MISTRAL,
    Form {
        name: "Gemma 4",
        signs: &["<|tool_call>", "<tool_call|>"],
        marks: &[["<|tool_call>", "<tool_call|>"]],
        body: gemma::gemma4,
        inner: &["<|\"|>"],
        one: &["<tool_call|>"],
        frame: None,
        ..PLAIN
    },
    Form {
        name: "FunctionGemma",
        signs: &["<start_function_call>"],
        marks: &[["<start_function_call>", "<end_function_call>"]],
        body: gemma::function_gemma,
        inner: &["<escape>"],
        one: &["<end_function_call>"],
        frame: None,
        ..PLAIN
    },
    Form {
        name: "Command R",
        signs: &["<|START_ACTION|>"],
        marks: &[["<|START_ACTION|>", "<|END_ACTION|>"]],
        one: &["<|END_ACTION|>"],
        frame: None,
        ..PLAIN
    },
    Form {
        name: "Phi-4",
        signs: &["<|tool_call|>", "<|/tool_call|>"],
        marks: &[["<|tool_call|>", "<|/tool_call|>"]],
        one: &["<|/tool_call|>"],
        frame: array(["<|tool_call|>[", "]<|/tool_call|>"]),
        ..PLAIN
    },
    Form {
        name: "Granite 3",
        signs: &["<|tool_call|>"],
        marks: &[["<|tool_call|>", ""]],
        end: End::Json,
        one: &[],
        frame: array(["<|tool_call|>[", "]"]),
        ..PLAIN
    },
    Form {
        name: "Nemotron",
        signs: &["<TOOLCALL>"],
        marks: &[["<TOOLCALL>", "</TOOLCALL>"]],
        one: &["</TOOLCALL>"],
        frame: array(["<TOOLCALL>[", "]</TOOLCALL>"]),
        ..PLAIN
    },
    Form {
        name: "LongCat",
        signs: &["<longcat_tool_call>"],
        marks: &[["<longcat_tool_call>", "</longcat_tool_call>"]],
        one: &["</longcat_tool_call>"],
        frame: Some(Frame {
            each: [
                "<longcat_tool_call>\n{\"name\": \"{name}\", \"arguments\": ",
                "}\n</longcat_tool_call>",
            ],
            ..HERMES_FRAME
        }),
        ..PLAIN
    },
    Form {
        name: "MiniMax M1",
        signs: &["<tool_calls>"],
        marks: &[["<tool_calls>", "</tool_calls>"]],
        one: &["</tool_calls>"],
        frame: Some(Frame {
            all: ["<tool_calls>\n", "\n</tool_calls>"],
            each: ["{\"name\": \"{name}\", \"arguments\": ", "}"],
            ..HERMES_FRAME
        }),
        ..PLAIN
    },
    Form {
        name: "Hermes",
        signs: &["<tool_call>"],
        ..PLAIN
    },
    LLAMA,
    Form {
        name: "Llama 3.2",
        signs: &["\"parameters\": dictionary of argument name"],
        ..LLAMA
    },
    Form {
        name: "functions",
        signs: &["<function_calls>", "<invoke name="],
        marks: &[["<function_calls>", "</function_calls>"]],
        body: bodies::invokes,
        one: &["</invoke>"],
        frame: None,
        ..PLAIN
    },
];

/// Returns the form of calls of a model with this template, if it is known.
pub(crate) fn of_template(source: &str) -> Option<&'static Form> {
    let has_all = |form: &&Form| form.signs.iter().all(|sign| source.contains(sign));
    FORMS.iter().find(has_all)
}

/// Returns a form, of a number of any size.
pub(crate) fn numbered(number: usize) -> &'static Form {
    &FORMS[number % FORMS.len()]
}

impl Form {
    /// Returns the texts that must be seen in an answer, though a vocabulary may have them as control
    /// tokens.
    pub fn shown(&self) -> impl Iterator<Item = &'static str> {
        let marks = self.marks.iter().flatten();
        marks
            .chain(self.inner)
            .copied()
            .filter(|mark| !mark.is_empty())
    }

    /// Whether calls are in channels.
    pub fn is_channels(&self) -> bool {
        self.end == End::Channel
    }

    #[cfg(test)]
    pub fn named(name: &str) -> &'static Self {
        FORMS.iter().find(|form| form.name == name).unwrap()
    }
}
