//! Fields of a JSON object, with errors that name the field, what it is, and what is expected.

use super::{BadLine, Code};
use serde_json::{Map, Value};
use std::ops::RangeInclusive;
use tier_plan_runtime::printable::printable;

/// Most characters of a value that an error shows.
const MAX_SHOWN_CHARS: usize = 60;

#[cfg(test)]
thread_local! {
    /// Places of the fields that this thread looked for.
    pub(crate) static READ: std::cell::RefCell<std::collections::BTreeSet<String>> =
        const { std::cell::RefCell::new(std::collections::BTreeSet::new()) };
}

/// An object of a line with its place in it, such as `body`. Null counts as absent.
#[derive(Clone, Copy)]
pub(crate) struct Fields<'a> {
    object: &'a Map<String, Value>,
    path: &'a str,
}

impl<'a> Fields<'a> {
    pub fn new(object: &'a Map<String, Value>, path: &'a str) -> Self {
        Self { object, path }
    }

    /// Returns a field that is there.
    pub fn get(&self, name: &str) -> Option<&'a Value> {
        #[cfg(test)]
        READ.with_borrow_mut(|read| read.insert(self.place(name)));
        self.object.get(name).filter(|value| !value.is_null())
    }

    /// Returns the name of a field with its place.
    pub fn place(&self, name: &str) -> String {
        if self.path.is_empty() {
            name.to_string()
        } else {
            format!("{}.{name}", self.path)
        }
    }

    /// Returns the error of a field that is not as expected.
    pub fn bad(&self, name: &str, expected: &str) -> BadLine {
        bad(&self.place(name), self.get(name), expected)
    }

    pub fn text(&self, name: &str) -> Result<Option<&'a str>, BadLine> {
        let as_text = |value: &'a Value| value.as_str().ok_or_else(|| self.bad(name, "a string"));
        self.get(name).map(as_text).transpose()
    }

    pub fn flag(&self, name: &str) -> Result<Option<bool>, BadLine> {
        let as_flag = |value: &Value| {
            value
                .as_bool()
                .ok_or_else(|| self.bad(name, "true or false"))
        };
        self.get(name).map(as_flag).transpose()
    }

    pub fn number(&self, name: &str) -> Result<Option<f32>, BadLine> {
        let as_number = |value: &Value| match value.as_f64() {
            Some(number) => Ok(number as f32),
            None => Err(self.bad(name, "a number")),
        };
        self.get(name).map(as_number).transpose()
    }

    pub fn count(
        &self,
        name: &str,
        range: RangeInclusive<usize>,
    ) -> Result<Option<usize>, BadLine> {
        let as_count = |value: &Value| {
            let count = whole(value).and_then(|n| usize::try_from(n).ok());
            count.filter(|n| range.contains(n)).ok_or_else(|| {
                let (least, most) = range.clone().into_inner();
                self.bad(name, &format!("a whole number from {least} to {most}"))
            })
        };
        self.get(name).map(as_count).transpose()
    }
}

/// Returns the error of a value, or of one that is missing.
pub(crate) fn bad(place: &str, found: Option<&Value>, expected: &str) -> BadLine {
    let found = found.map_or("missing".to_string(), shown);
    BadLine::new(
        Code::InvalidRequest,
        format!("{place}: {found}, expected {expected}"),
    )
}

/// Returns a whole number; some programs write them as `4.0`.
pub(crate) fn whole(value: &Value) -> Option<i128> {
    let float = || {
        let float = value.as_f64()?;
        (float.fract() == 0.0 && float.abs() < (1u64 << 53) as f64).then_some(float as i128)
    };
    let exact = value.as_u64().map(i128::from);
    exact.or(value.as_i64().map(i128::from)).or_else(float)
}

/// Returns a value as an error shows it.
pub(crate) fn shown(value: &Value) -> String {
    match value {
        Value::Array(_) => "an array".to_string(),
        Value::Object(_) => "an object".to_string(),
        Value::String(text) if text.chars().nth(MAX_SHOWN_CHARS).is_some() => {
            let start: String = text.chars().take(MAX_SHOWN_CHARS).collect();
            format!("\"{}…\"", printable(&start))
        }
        Value::String(text) => format!("\"{}\"", printable(text)),
        other => other.to_string(),
    }
}
