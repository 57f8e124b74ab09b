//! Jinja as Hugging Face runs it: the sandbox of Jinja2 with `trim_blocks`, `lstrip_blocks`, loop
//! controls, and `{% generation %}`.
//!
//! minijinja interprets templates; what it does differently from Jinja2 is made up for here.
//! [`source`] rewrites the few things that it cannot be configured for, and the other modules have
//! Python's methods, filters, tests, and texts of values.

mod args;
mod date;
mod filters;
mod globals;
mod json;
mod lines;
mod methods;
mod numbers;
mod printf;
mod source;
#[cfg(test)]
mod tests;
mod token;
mod words;
pub mod worker;

use super::message::value_of;
use super::template::Surroundings;
use crate::printable::printable;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{AutoEscape, Environment, Error, ErrorKind, escape_formatter};
use std::time::SystemTime;

/// Most steps of rendering, enough for thousands of turns. A step is an instruction or a byte.
const FUEL: u64 = 200_000_000;
/// Name that errors and the environment know the template by.
const NAME: &str = "chat template";

/// A template that is ready to render.
pub(super) struct Compiled(Environment<'static>);

impl Compiled {
    /// Compiles `source`, with `now` in UTC instead of the local time if it is given.
    ///
    /// # Errors
    /// What is wrong with the template, as the rest of a sentence.
    pub(super) fn new(source: &str, now: Option<SystemTime>) -> Result<Self, String> {
        let mut environment = environment(now);
        environment
            .add_template_owned(NAME, source::prepare(source))
            .map_err(|error| reason("can't be read", &error))?;
        Ok(Self(environment))
    }

    /// Has renderings end after `fuel` steps.
    fn with_fuel(mut self, fuel: u64) -> Self {
        self.0.set_fuel(Some(fuel));
        self
    }

    /// Renders a conversation up to where the model should answer.
    ///
    /// # Errors
    /// Why the template rejects it, as the rest of a sentence.
    pub(super) fn render(
        &self,
        messages: Vec<Value>,
        around: &Surroundings,
        bos: &str,
        eos: &str,
    ) -> Result<String, String> {
        let tools = match around.tools.as_slice() {
            [] => Value::from(()),
            tools => Value::from(tools.iter().map(value_of).collect::<Vec<Value>>()),
        };
        let own = [
            ("messages", Value::from(messages)),
            ("add_generation_prompt", Value::from(true)),
            ("bos_token", Value::from(bos)),
            ("eos_token", Value::from(eos)),
            ("tools", tools),
            ("documents", Value::from(())),
        ];
        let more = around.variables.iter();
        let more = more.map(|(name, value)| (name.as_str(), value_of(value)));
        let values = Value::from_pairs(more.chain(own));
        self.0
            .get_template(NAME)
            .and_then(|template| template.render(values))
            .map_err(|error| reason("failed", &error))
    }
}

/// Makes an environment with what templates expect of Jinja2 and Python.
fn environment(now: Option<SystemTime>) -> Environment<'static> {
    let mut environment = Environment::new();
    let mut syntax = SyntaxConfig::builder();
    syntax.trim_blocks(true).lstrip_blocks(true);
    // The delimiters are the default ones, which are valid.
    environment.set_syntax(syntax.build().unwrap_or_default());
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(methods::call);
    environment.set_formatter(|out, state, value| {
        if matches!(state.auto_escape(), AutoEscape::None) && words::differs(value) {
            out.write_str(&words::text(value)?).map_err(Error::from)
        } else {
            escape_formatter(out, state, value)
        }
    });
    filters::add(&mut environment);
    lines::add(&mut environment);
    numbers::add(&mut environment);
    globals::add(&mut environment, now);
    environment
}

/// Returns why a template fails, in one bounded line.
fn reason(what: &str, error: &Error) -> String {
    let line = error
        .line()
        .map(|line| format!(", line {line}"))
        .unwrap_or_default();
    let detail = match error.kind() {
        ErrorKind::OutOfFuel => "it takes too many steps".to_string(),
        kind => error
            .detail()
            .map_or_else(|| kind.to_string(), str::to_string),
    };
    format!("{what}{line}: {}", printable(&detail))
}

/// Makes the error of a template that asks for what is not possible.
fn invalid(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}
