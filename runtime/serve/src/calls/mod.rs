//! Calls of tools in an answer, while it comes.
//!
//! Models write calls in the form that they were trained on ([`forms`]). What may be the beginning of
//! a call is held back, so that no reader sees half a mark. A call is given out when it is whole.
//! What begins like a call and is none is given out as text: nothing is lost. All of it depends on
//! the text alone, not on how it is cut, so a stream and a whole answer are equal.

pub(crate) mod block;
mod bodies;
pub(crate) mod forms;
mod gemma;
mod json_end;
mod reader;
#[cfg(test)]
mod tests;
pub(crate) mod typed;

use crate::request::tools::Tool;
use forms::{End, Form, Marks};
use json_end::JsonEnd;
use reader::{Fault, Reader};
use std::sync::Arc;

/// Most bytes between a mark and the JSON after it: a name and an identifier.
const MAX_HEAD_BYTES: usize = 512;

/// A call of a tool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Call {
    /// The name that the model gave the call.
    pub id: Option<String>,
    /// Name of the tool.
    pub name: String,
    /// The arguments, a JSON object as text.
    pub arguments: String,
}

/// A piece of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// Reasoning.
    Thinking(String),
    /// The answer itself.
    Content(String),
    /// A call.
    Call(Call),
}

/// Where in an answer the text is.
#[derive(Debug, Clone, Copy)]
enum At {
    /// Where a call without a mark may begin.
    Start,
    Text,
    /// In what may be a call, between these marks; a call without one has empty marks.
    Call(Marks, Scan),
}

/// How far the text of a call has been looked at.
#[derive(Debug, Clone, Copy, Default)]
struct Scan {
    /// Bytes that have no end of the call in them.
    done: usize,
    json: Option<JsonEnd>,
}

/// Finds the calls in a text that comes in pieces.
#[derive(Debug, Clone)]
pub(crate) struct Parser {
    form: &'static Form,
    tools: Arc<[Tool]>,
    /// Whether calls after the first are left out.
    only_one: bool,
    at: At,
    /// Text that is not decided yet.
    held: String,
    /// White space that is dropped if a call follows.
    space: String,
    n_calls: usize,
}

impl Parser {
    /// Creates a parser of answers in a form, to a request with these tools.
    pub fn new(form: &'static Form, tools: Arc<[Tool]>, only_one: bool) -> Self {
        Self {
            form,
            tools,
            only_one,
            at: if form.is_bare { At::Start } else { At::Text },
            held: String::new(),
            space: String::new(),
            n_calls: 0,
        }
    }

    /// Takes the next piece of an answer's content, and gives out what is certain.
    pub fn push(&mut self, text: &str, onto: &mut Vec<Part>) {
        self.held.push_str(text);
        while self.advance(false, onto) {}
    }

    /// Ends the answer, and gives out what was held back.
    pub fn finish(&mut self, onto: &mut Vec<Part>) {
        while self.advance(true, onto) {}
        if self.n_calls == 0 {
            add_content(onto, &std::mem::take(&mut self.space));
        }
    }

    /// Decides on some of the text that is held. Returns whether it may decide on more.
    fn advance(&mut self, is_end: bool, onto: &mut Vec<Part>) -> bool {
        match self.at {
            At::Start => self.start(is_end),
            At::Text => self.text(is_end, onto),
            At::Call(marks, scan) => match self.form.end {
                End::Mark => self.marked(marks, scan, is_end, onto),
                End::Json => self.json(marks, scan, is_end, onto),
                End::Channel => {
                    self.at = At::Text;
                    true
                }
            },
        }
    }

    /// Looks for a call without a mark.
    fn start(&mut self, is_end: bool) -> bool {
        // Calls are apart by semicolons.
        let is_between = |c: char| c.is_whitespace() || (self.n_calls > 0 && c == ';');
        let text = self.held.trim_start_matches(is_between);
        let may_be_mark = self
            .form
            .marks
            .iter()
            .any(|[open, _]| open.starts_with(text));
        if text.starts_with('{') {
            self.at = At::Call(["", ""], Scan::default());
        } else if is_end || !may_be_mark {
            self.at = At::Text;
        } else {
            return false;
        }
        true
    }

    /// Looks for a mark.
    fn text(&mut self, is_end: bool, onto: &mut Vec<Part>) -> bool {
        let marks = self.form.marks.iter();
        let found = marks
            .clone()
            .filter_map(|marks| Some((self.held.find(marks[0])?, marks)));
        if let Some((place, marks)) = found.min_by_key(|(place, _)| *place) {
            self.give(place, onto);
            self.at = At::Call(*marks, Scan::default());
            return true;
        }
        let begun = marks.map(|[open, _]| begun(&self.held, open)).max();
        let kept = if is_end { 0 } else { begun.unwrap_or(0) };
        self.give(self.held.len() - kept, onto);
        false
    }

    /// Looks for the mark that ends a call.
    fn marked(&mut self, marks: Marks, scan: Scan, is_end: bool, onto: &mut Vec<Part>) -> bool {
        let [open, close] = marks;
        let mut done = scan.done.max(open.len());
        loop {
            let found = self.held[done..]
                .find(close)
                .map(|at| done + at + close.len());
            let Some(end) = found else {
                if is_end {
                    return self.decide(marks, self.held.len(), true, onto);
                }
                let kept = begun(&self.held[done..], close);
                let done = self.held.len() - kept;
                self.at = At::Call(marks, Scan { done, json: None });
                return false;
            };
            match self.read(marks, end, false) {
                // The mark is in a value.
                Err(Fault::Ends) => done = end,
                read => return self.settle(read.ok(), marks, end, onto),
            }
        }
    }

    /// Looks for the end of a call that is JSON.
    fn json(&mut self, marks: Marks, scan: Scan, is_end: bool, onto: &mut Vec<Part>) -> bool {
        let mut scan = scan;
        let mut json = match scan.json {
            Some(json) => json,
            None => match self.json_start(marks[0].len()) {
                Some(start) => {
                    scan.done = start;
                    JsonEnd::default()
                }
                None if is_end || self.held.len() > marks[0].len() + MAX_HEAD_BYTES => {
                    return self.settle(None, marks, self.held.len(), onto);
                }
                None => return false,
            },
        };
        let end = self.held.as_bytes()[scan.done..]
            .iter()
            .position(|byte| json.take(*byte));
        if let Some(at) = end {
            let end = scan.done + at + 1;
            return self.decide(marks, end, false, onto);
        }
        if is_end {
            return self.settle(None, marks, self.held.len(), onto);
        }
        let (done, json) = (self.held.len(), Some(json));
        self.at = At::Call(marks, Scan { done, json });
        false
    }

    /// Returns where the JSON after a mark begins, if it has come.
    fn json_start(&self, mark: usize) -> Option<usize> {
        let text = self.held[mark..].trim_start();
        let start = self.held.len() - text.len();
        if text.starts_with('[') {
            return Some(start);
        }
        text.find('{').map(|at| start + at)
    }

    /// Reads the first `end` bytes as calls.
    fn read(&self, marks: Marks, end: usize, is_last: bool) -> Result<Vec<Call>, Fault> {
        let mut reader = Reader::new(&self.held[..end], is_last);
        let calls = (self.form.body)(&mut reader, marks, &self.tools)?;
        if reader.is_empty() && !calls.is_empty() {
            Ok(calls)
        } else {
            Err(Fault::Other)
        }
    }

    fn decide(&mut self, marks: Marks, end: usize, is_last: bool, onto: &mut Vec<Part>) -> bool {
        let read = self.read(marks, end, is_last);
        self.settle(read.ok(), marks, end, onto)
    }

    /// Gives out the calls that the first `end` bytes are, or the mark as text if they are none.
    fn settle(
        &mut self,
        calls: Option<Vec<Call>>,
        marks: Marks,
        end: usize,
        onto: &mut Vec<Part>,
    ) -> bool {
        self.at = At::Text;
        let Some(calls) = calls else {
            // What follows the mark may have another one.
            let n = if marks[0].is_empty() {
                end
            } else {
                marks[0].len()
            };
            self.give(n, onto);
            return true;
        };
        self.held.drain(..end);
        self.space.clear();
        for call in calls {
            self.n_calls += 1;
            if self.n_calls == 1 || !self.only_one {
                onto.push(Part::Call(call));
            }
        }
        if self.form.is_bare {
            self.at = At::Start;
        }
        true
    }

    /// Gives out the first `n` bytes as text, but for white space at their end.
    fn give(&mut self, n: usize, onto: &mut Vec<Part>) {
        let text: String = self.held.drain(..n).collect();
        let core = text.trim_end();
        if !core.is_empty() {
            let space = std::mem::take(&mut self.space);
            add_content(onto, &space);
            add_content(onto, core);
        }
        self.space.push_str(&text[core.len()..]);
    }
}

/// Adds text to the content at the end of some parts.
fn add_content(parts: &mut Vec<Part>, text: &str) {
    add(parts, Part::Content(text.to_string()));
}

/// Adds a part to others; texts of one kind become one.
pub(crate) fn add(parts: &mut Vec<Part>, part: Part) {
    match (parts.last_mut(), part) {
        (_, Part::Thinking(text) | Part::Content(text)) if text.is_empty() => {}
        (Some(Part::Thinking(before)), Part::Thinking(text))
        | (Some(Part::Content(before)), Part::Content(text)) => before.push_str(&text),
        (_, part) => parts.push(part),
    }
}

/// Returns the length of the longest end of a text that a mark begins with.
fn begun(text: &str, mark: &str) -> usize {
    let mut cuts = mark.char_indices().map(|(i, _)| i).rev();
    cuts.find(|i| text.ends_with(&mark[..*i])).unwrap_or(0)
}
