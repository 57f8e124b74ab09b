//! Where in a text its calls are.

use super::Call;
use super::forms::Form;
use super::reader::Reader;
use crate::request::tools::Tool;
use std::ops::Range;

/// Calls in a text, and the bytes that they are written with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Block {
    pub range: Range<usize>,
    pub calls: Vec<Call>,
}

impl Block {
    /// Finds the first `n` calls of a text from `from` on, which begin outside of the ranges `plain`
    /// and have nothing but white space between them. They are read as those of an answer are.
    pub fn find(
        form: &Form,
        text: &str,
        from: usize,
        plain: &[Range<usize>],
        tools: &[Tool],
        n: usize,
    ) -> Option<Self> {
        if form.is_channels() {
            return None;
        }
        let start = first(form, text, from, plain)?;
        let (mut at, mut calls) = (start, Vec::new());
        while calls.len() < n {
            let rest = text.get(at..)?;
            let is_between =
                |c: char| c.is_whitespace() || (form.is_bare && !calls.is_empty() && c == ';');
            let rest = rest.trim_start_matches(is_between);
            let marks = form.marks.iter().find(|marks| rest.starts_with(marks[0]));
            let marks = match marks {
                Some(marks) => *marks,
                None if form.is_bare && rest.starts_with('{') => ["", ""],
                None => return None,
            };
            let mut reader = Reader::new(rest, false);
            calls.extend((form.body)(&mut reader, marks, tools).ok()?);
            at = text.len() - reader.left();
        }
        (calls.len() == n).then_some(Self {
            range: start..at,
            calls,
        })
    }
}

/// Returns where the first call of a text begins.
fn first(form: &Form, text: &str, from: usize, plain: &[Range<usize>]) -> Option<usize> {
    let rest = text.get(from..)?;
    let space = rest.len() - rest.trim_start().len();
    if form.is_bare && rest[space..].starts_with('{') {
        return Some(from + space);
    }
    let is_plain = |at: &usize| plain.iter().any(|range| range.contains(at));
    let places = form.marks.iter().filter_map(|[open, _]| {
        let mut places = rest.match_indices(open).map(|(at, _)| from + at);
        places.find(|at| !is_plain(at))
    });
    places.min()
}
