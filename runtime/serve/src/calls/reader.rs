//! Reads the text of a call from left to right.

use super::json_end::JsonEnd;
use crate::request::value;
use serde_json::Value;

/// Why a text is no call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// It ends where more is expected: a mark that seemed to end it may be part of a value.
    Ends,
    /// It has another form.
    Other,
}

pub(super) type Read<T> = Result<T, Fault>;

/// A text that is read.
#[derive(Debug, Clone, Copy)]
pub(super) struct Reader<'t> {
    rest: &'t str,
    /// Whether nothing follows the text, so that marks at its end may be missing.
    is_last: bool,
}

impl<'t> Reader<'t> {
    pub fn new(text: &'t str, is_last: bool) -> Self {
        Self {
            rest: text,
            is_last,
        }
    }

    /// Returns how many bytes are left.
    pub fn left(&self) -> usize {
        self.rest.len()
    }

    /// Whether nothing but white space is left.
    pub fn is_empty(&self) -> bool {
        self.rest.trim_start().is_empty()
    }

    /// Skips white space.
    pub fn space(&mut self) {
        self.rest = self.rest.trim_start();
    }

    /// Whether this comes next.
    pub fn is_at(&self, text: &str) -> bool {
        self.rest.starts_with(text)
    }

    /// Skips a text, and returns whether it was there.
    pub fn skip(&mut self, text: &str) -> bool {
        match self.rest.strip_prefix(text) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    /// Skips a text that must be there.
    pub fn expect(&mut self, text: &str) -> Read<()> {
        if self.skip(text) {
            Ok(())
        } else if text.starts_with(self.rest) {
            Err(Fault::Ends)
        } else {
            Err(Fault::Other)
        }
    }

    /// Skips a text that ends something, after white space. It may be missing at the end of all.
    pub fn close(&mut self, text: &str) -> Read<()> {
        self.space();
        if self.is_last && text.starts_with(self.rest.trim_end()) {
            self.rest = "";
            return Ok(());
        }
        self.expect(text)
    }

    /// Returns the text up to `end`, and skips both.
    pub fn until(&mut self, end: &str) -> Read<&'t str> {
        let (text, rest) = self.rest.split_once(end).ok_or(Fault::Ends)?;
        self.rest = rest;
        Ok(text)
    }

    /// Returns the text before the first of some characters.
    pub fn before(&mut self, ends: &[char]) -> Read<&'t str> {
        let at = self.rest.find(ends).ok_or(Fault::Ends)?;
        let (text, rest) = self.rest.split_at(at);
        self.rest = rest;
        Ok(text)
    }

    /// Returns a JSON string.
    pub fn string(&mut self) -> Read<Value> {
        let mut is_escaped = false;
        let end = self.rest.bytes().enumerate().skip(1).find(|(_, byte)| {
            let ends = *byte == b'"' && !is_escaped;
            is_escaped = *byte == b'\\' && !is_escaped;
            ends
        });
        let (end, _) = end.ok_or(Fault::Ends)?;
        let (text, rest) = self.rest.split_at(end + 1);
        let parsed = value::parse(text.as_bytes()).map_err(|_| Fault::Other)?;
        self.rest = rest;
        Ok(parsed)
    }

    /// Returns a JSON object or array, after white space.
    pub fn json(&mut self) -> Read<Value> {
        self.space();
        match self.rest.bytes().next() {
            Some(b'{' | b'[') => {}
            None => return Err(Fault::Ends),
            Some(_) => return Err(Fault::Other),
        }
        let len = JsonEnd::of(self.rest).ok_or(Fault::Ends)?;
        let (text, rest) = self.rest.split_at(len);
        let parsed = value::parse(text.as_bytes()).map_err(|_| Fault::Other)?;
        self.rest = rest;
        Ok(parsed)
    }
}
