//! What of an answer is thought, what is content, and what are calls of tools, while it comes.
//!
//! Models mark thoughts with tokens of their own, with tags that are ordinary text, or with the
//! channels of gpt-oss. A tag counts at the start of an answer only, so that an answer may speak of
//! it. Nothing is given out that later text could make part of a mark, so that what is given out
//! never has to be taken back: a stream and a whole answer are equal.

use crate::calls::forms::Form;
use crate::calls::{Call, Parser, Part, add};
use crate::request::tools::Tool;
use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use tier_plan_runtime::tokenizer::ThoughtMark;

/// Marks of thoughts that models spell with tokens of ordinary text.
pub(crate) const THOUGHT_TAGS: [[&str; 2]; 8] = [
    ["<think>", "</think>"],
    ["[THINK]", "[/THINK]"],
    ["<thinking>", "</thinking>"],
    ["<thought>", "</thought>"],
    ["<reasoning>", "</reasoning>"],
    ["<|begin_of_thought|>", "<|end_of_thought|>"],
    ["<|START_THINKING|>", "<|END_THINKING|>"],
    ["◁think▷", "◁/think▷"],
];

/// What an answer in channels begins with.
const CHANNEL_STARTS: [&str; 2] = ["<|channel|>", "<|start|>assistant<|channel|>"];

/// What begins a channel's header, ends it, and ends the channel.
const CHANNEL: &str = "<|channel|>";
const MESSAGE: &str = "<|message|>";
const CHANNEL_ENDS: [&str; 5] = ["<|end|>", "<|return|>", "<|call|>", "<|start|>", CHANNEL];

/// What the prompt of a chat in channels ends with. The role may have a recipient.
const ROLE: &str = "<|start|>assistant";

/// What a header has before the name of a tool.
const RECIPIENT: &str = "to=";

/// What may come before an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Before {
    Nothing,
    /// The rest of a thought, which this mark ends.
    Open(&'static str),
    /// A thought between these marks, or nothing.
    Maybe([&'static str; 2]),
    /// A thought in a channel of its own, or nothing.
    Channels,
}

/// Returns what may come before the answer to a prompt, of a model whose vocabulary `has` some marks.
pub(crate) fn before(prompt: &str, is_channels: bool, has: impl Fn(&str) -> bool) -> Before {
    if is_channels {
        return Before::Channels;
    }
    if let Some([_, close]) = opened(prompt) {
        return Before::Open(close);
    }
    let known = THOUGHT_TAGS
        .into_iter()
        .find(|marks| marks.iter().all(|mark| has(mark)));
    // A thought that the template has ended is not begun again.
    let ended = known.filter(|[_, close]| prompt.trim_end().ends_with(close));
    match (known, ended) {
        (Some(marks), None) => Before::Maybe(marks),
        _ => Before::Nothing,
    }
}

/// Returns the marks of a thought that a prompt opens at its end.
fn opened(prompt: &str) -> Option<[&'static str; 2]> {
    let end = prompt.trim_end();
    THOUGHT_TAGS
        .into_iter()
        .find(|[open, _]| end.ends_with(open))
}

/// The tools of an answer, and how the model calls them.
#[derive(Debug, Clone)]
pub(crate) struct CallOptions {
    pub form: &'static Form,
    pub tools: Arc<[Tool]>,
    /// Whether calls after the first are left out.
    pub only_one: bool,
}

/// What is in a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Channel {
    Thought,
    Content,
    Call,
}

/// Where in an answer the text is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// At the start, where a tag may come.
    Start,
    /// In a thought, which a token or this tag ends.
    Thought(Option<&'static str>),
    /// In the answer itself.
    Content,
    /// Between channels.
    Between,
    /// In the header of a channel.
    Header,
    Channel(Channel),
}

/// Splits an answer that comes in pieces.
#[derive(Debug, Clone)]
pub(crate) struct Splitter {
    at: At,
    /// Text that is not decided yet.
    held: String,
    /// Bytes of the answer before `held`.
    done: usize,
    marks: VecDeque<(Range<usize>, ThoughtMark)>,
    thinking: Trimmed,
    content: Trimmed,
    /// Whether there was a thought, so that white space around the content is dropped.
    has_thought: bool,
    /// Whether the prompt ends with the role of a message in channels.
    after_role: bool,
    /// Text between channels, where a recipient may be.
    role: String,
    /// The call in the channel at hand.
    call: Call,
    options: Option<CallOptions>,
    parser: Option<Parser>,
}

/// A text without white space at its ends, as it comes.
#[derive(Debug, Clone, Default)]
struct Trimmed {
    has_begun: bool,
    space: String,
}

impl Trimmed {
    fn push(&mut self, text: &str, onto: &mut String) {
        for c in text.chars() {
            if c.is_whitespace() {
                if self.has_begun {
                    self.space.push(c);
                }
            } else {
                onto.push_str(&self.space);
                self.space.clear();
                self.has_begun = true;
                onto.push(c);
            }
        }
    }
}

impl Splitter {
    /// Creates a splitter for an answer to `prompt`, the text that a chat template made. Some
    /// templates open the thought there.
    pub fn new(prompt: &str, options: Option<CallOptions>) -> Self {
        let end = prompt.trim_end();
        let parser = options
            .as_ref()
            .filter(|options| !options.form.is_channels());
        let parser = parser
            .map(|options| Parser::new(options.form, Arc::clone(&options.tools), options.only_one));
        let opened = opened(prompt);
        Self {
            at: opened.map_or(At::Start, |[_, close]| At::Thought(Some(close))),
            held: String::new(),
            done: 0,
            marks: VecDeque::new(),
            thinking: Trimmed::default(),
            content: Trimmed::default(),
            has_thought: opened.is_some(),
            after_role: end.ends_with(ROLE),
            role: String::new(),
            call: Call {
                id: None,
                name: String::new(),
                arguments: String::new(),
            },
            options,
            parser,
        }
    }

    /// Whether the text is in a thought.
    pub fn is_in_thought(&self) -> bool {
        matches!(self.at, At::Thought(_) | At::Channel(Channel::Thought))
    }

    /// Takes the next piece of the answer, and where the token at hand is in the whole if it marks a
    /// thought. Returns what is certain.
    pub fn push(&mut self, text: &str, mark: Option<(Range<usize>, ThoughtMark)>) -> Vec<Part> {
        self.held.push_str(text);
        self.marks.extend(mark);
        let mut parts = Vec::new();
        while self.advance(&mut parts, false) {}
        parts
    }

    /// Ends the answer, and returns what was held back.
    pub fn finish(&mut self) -> Vec<Part> {
        let mut parts = Vec::new();
        while self.advance(&mut parts, true) {}
        if self.at == At::Channel(Channel::Call) {
            self.end_call(&mut parts);
        }
        if self.at == At::Between && !self.has_thought {
            // It was no role.
            let text = std::mem::take(&mut self.role);
            self.add_content(text, &mut parts);
        }
        if let Some(parser) = &mut self.parser {
            parser.finish(&mut parts);
        }
        parts
    }

    /// Decides on some of the text that is held. Returns whether it may decide on more.
    fn advance(&mut self, parts: &mut Vec<Part>, is_end: bool) -> bool {
        // Up to the next token that marks a thought, text is what it is.
        let until = self.marks.front().map(|(place, _)| place.clone());
        let until = until.map(|place| {
            let start = place.start.saturating_sub(self.done);
            start..place.end.saturating_sub(self.done)
        });
        if let Some(place) = &until
            && place.start == 0
        {
            if place.end > self.held.len() {
                // Cut off by a stop string.
                if is_end {
                    self.marks.clear();
                    self.drop(self.held.len());
                }
                return false;
            }
            let end = self.held.ceil_char_boundary(place.end);
            self.drop(end);
            let mark = self.marks.pop_front().map(|(_, mark)| mark);
            self.cross(mark);
            return true;
        }
        let end = until.map(|place| place.start);
        let is_whole = is_end || end.is_some_and(|end| end <= self.held.len());
        let n = end.map_or(self.held.len(), |end| end.min(self.held.len()));
        let n = self.held.floor_char_boundary(n);
        if n == 0 {
            if is_end && !self.held.is_empty() {
                self.marks.clear();
                return true;
            }
            return false;
        }
        self.decide(parts, n, is_whole)
    }

    /// Decides on text of the first `n` bytes that are held, after which something else comes if it
    /// `is_whole`.
    fn decide(&mut self, parts: &mut Vec<Part>, n: usize, is_whole: bool) -> bool {
        match self.at {
            At::Start => self.start(n, is_whole),
            At::Thought(close) => {
                self.has_thought = true;
                let ends: &[&'static str] = match &close {
                    Some(close) => std::slice::from_ref(close),
                    None => &[],
                };
                self.until(parts, n, is_whole, ends, At::Content)
            }
            At::Content => self.until(parts, n, is_whole, &[], At::Content),
            At::Between => self.until(parts, n, is_whole, &[CHANNEL], At::Header),
            At::Header => self.header(n, is_whole),
            At::Channel(channel) => {
                let found = first(&self.held[..n], &CHANNEL_ENDS);
                let next = match found {
                    Some((_, CHANNEL)) => At::Header,
                    _ => At::Between,
                };
                let goes_on = self.until(parts, n, is_whole, &CHANNEL_ENDS, next);
                if channel == Channel::Call && self.at == next {
                    self.end_call(parts);
                }
                goes_on
            }
        }
    }

    /// Looks for a tag at the start of an answer.
    fn start(&mut self, n: usize, is_whole: bool) -> bool {
        let text = &self.held[..n];
        let trimmed = text.trim_start();
        let space = text.len() - trimmed.len();
        if trimmed.is_empty() && is_whole && !self.marks.is_empty() {
            // White space before a thought.
            self.drop(n);
            return true;
        }
        let recipient = self.after_role.then_some(RECIPIENT);
        let tags = THOUGHT_TAGS
            .iter()
            .map(|[open, _]| *open)
            .chain(CHANNEL_STARTS);
        let tags = tags.chain(recipient);
        if let Some([open, close]) = THOUGHT_TAGS
            .iter()
            .find(|[open, _]| trimmed.starts_with(open))
        {
            self.at = At::Thought(Some(close));
            self.drop(space + open.len());
        } else if let Some(start) = CHANNEL_STARTS.iter().find(|s| trimmed.starts_with(**s)) {
            self.at = At::Header;
            self.has_thought = true;
            self.drop(space + start.len());
        } else if recipient.is_some_and(|recipient| trimmed.starts_with(recipient)) {
            self.at = At::Between;
        } else if !is_whole && tags.into_iter().any(|tag| tag.starts_with(trimmed)) {
            return false;
        } else {
            self.at = At::Content;
        }
        true
    }

    /// Looks for the end of a channel's header.
    fn header(&mut self, n: usize, is_whole: bool) -> bool {
        let text = &self.held[..n];
        let (header, used) = match text.split_once(MESSAGE) {
            Some((header, _)) => (header, header.len() + MESSAGE.len()),
            None if is_whole => (text, n),
            None => return false,
        };
        let name = header.split_whitespace().next();
        let channel = match name {
            Some("final" | "commentary") => Channel::Content,
            _ => Channel::Thought,
        };
        let header = format!("{} {header}", std::mem::take(&mut self.role));
        let recipient = self.recipient(&header);
        self.has_thought = true;
        self.at = At::Channel(recipient.as_ref().map_or(channel, |_| Channel::Call));
        self.call.name = recipient.unwrap_or_default();
        self.drop(used);
        true
    }

    /// Returns the tool that a header names, if the request has it.
    fn recipient(&self, header: &str) -> Option<String> {
        let options = self
            .options
            .as_ref()
            .filter(|options| options.form.is_channels())?;
        let mut words = header.split(|c: char| c.is_whitespace() || c == '<');
        let name = words.find_map(|word| word.strip_prefix(RECIPIENT))?;
        let name = name.strip_prefix("functions.").unwrap_or(name);
        let tool = options.tools.iter().find(|tool| tool.name == name)?;
        Some(tool.name.clone())
    }

    /// Gives out the call of a channel that has ended, or its text if it is none.
    fn end_call(&mut self, parts: &mut Vec<Part>) {
        let text = std::mem::take(&mut self.call.arguments);
        let arguments = match text.trim() {
            "" => "{}",
            text => text,
        };
        match crate::request::value::parse(arguments.as_bytes()) {
            Ok(arguments @ serde_json::Value::Object(_)) => parts.push(Part::Call(Call {
                arguments: arguments.to_string(),
                ..self.call.clone()
            })),
            _ => self.add_content(text, parts),
        }
    }

    fn add_content(&mut self, text: String, parts: &mut Vec<Part>) {
        match &mut self.parser {
            Some(parser) => parser.push(&text, parts),
            None => add(parts, Part::Content(text)),
        }
    }

    /// Gives out text up to the first of `ends`, and what can't be the beginning of one.
    fn until(
        &mut self,
        parts: &mut Vec<Part>,
        n: usize,
        is_whole: bool,
        ends: &[&'static str],
        next: At,
    ) -> bool {
        let text = &self.held[..n];
        if let Some((place, end)) = first(text, ends) {
            let used = place + end.len();
            self.give(parts, place);
            self.drop(used - place);
            self.at = next;
            return true;
        }
        let kept = if is_whole { 0 } else { begun(text, ends) };
        self.give(parts, n - kept);
        n > kept && is_whole
    }

    /// Gives out the first `n` bytes.
    fn give(&mut self, parts: &mut Vec<Part>, n: usize) {
        let text: String = self.held.drain(..n).collect();
        self.done += n;
        match self.at {
            At::Thought(_) | At::Channel(Channel::Thought) => {
                let mut trimmed = String::new();
                self.thinking.push(&text, &mut trimmed);
                add(parts, Part::Thinking(trimmed));
            }
            At::Content | At::Channel(Channel::Content) if self.has_thought => {
                let mut trimmed = String::new();
                self.content.push(&text, &mut trimmed);
                self.add_content(trimmed, parts);
            }
            At::Content | At::Channel(Channel::Content) => self.add_content(text, parts),
            At::Channel(Channel::Call) => self.call.arguments.push_str(&text),
            At::Between => self.role.push_str(&text),
            At::Start | At::Header => {}
        }
    }

    fn drop(&mut self, n: usize) {
        self.held.drain(..n);
        self.done += n;
    }

    /// Crosses a token that marks a thought.
    fn cross(&mut self, mark: Option<ThoughtMark>) {
        self.at = match (mark, self.at) {
            (Some(ThoughtMark::Opens), At::Start | At::Content) => {
                self.has_thought = true;
                At::Thought(None)
            }
            (Some(ThoughtMark::Closes), At::Thought(_)) => At::Content,
            (Some(ThoughtMark::Closes), At::Start) => At::Content,
            (_, at) => at,
        };
    }
}

/// Returns the first of `ends` in a text, and where it is.
fn first<'e>(text: &str, ends: &[&'e str]) -> Option<(usize, &'e str)> {
    let found = ends.iter().filter_map(|end| Some((text.find(end)?, *end)));
    found.min_by_key(|(place, _)| *place)
}

/// Returns the length of the longest end of a text that one of `ends` begins with.
fn begun(text: &str, ends: &[&str]) -> usize {
    let longest = |end: &&str| {
        let cuts = end.char_indices().map(|(i, _)| i).rev();
        cuts.into_iter().find(|i| text.ends_with(&end[..*i]))
    };
    ends.iter().filter_map(longest).max().unwrap_or(0)
}

#[cfg(test)]
#[path = "thought_tests.rs"]
mod tests;
