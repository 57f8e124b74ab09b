//! Functions of Jinja2 and of transformers.

use super::date::strftime;
use super::{invalid, printf, words};
use minijinja::value::{Kwargs, Object, Rest, Value, ValueKind};
use minijinja::{Environment, Error, State};
use minijinja_contrib::globals::{cycler, joiner};
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use tier_plan_runtime::os::{local_time, utc_time};

/// Name of the function that `%` is rewritten to.
pub(super) const PERCENT: &str = "__percent__";
/// Name of the function that lets a macro take any arguments.
pub(super) const VARIADIC: &str = "__variadic__";

/// Longest message of a template's own error that is kept.
const MAX_MESSAGE_BYTES: usize = 64 << 10;

/// Adds the functions. `now` is the time in UTC instead of the local one.
pub(super) fn add(environment: &mut Environment<'static>, now: Option<SystemTime>) {
    environment.remove_global("debug");
    environment.add_function(
        "raise_exception",
        |message: &Value| -> Result<Value, Error> {
            Err(invalid(words::head(message, MAX_MESSAGE_BYTES)))
        },
    );
    environment.add_function("strftime_now", move |format: &str| match now {
        Some(now) => {
            let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
            strftime(format, &utc_time(i64::try_from(seconds).unwrap_or(0)))
        }
        None => strftime(format, &local_time(SystemTime::now())),
    });
    environment.add_function("dict", dict);
    environment.add_function("cycler", |items: Rest<Value>| cycler(items.to_vec()));
    environment.add_function("joiner", joiner);
    environment.add_function(PERCENT, printf::percent);
    environment.add_function(VARIADIC, |inner: Value| Value::from_object(Variadic(inner)));
}

/// Makes a mapping of another or of pairs, with named arguments added.
fn dict(args: Rest<Value>, named: Kwargs) -> Result<Value, Error> {
    let mut pairs = Vec::new();
    if args.len() > 1 {
        return Err(invalid("dict: more than one mapping"));
    }
    for given in args.iter() {
        let is_map = given.kind() == ValueKind::Map;
        for item in given.try_iter()? {
            pairs.push(if is_map {
                let value = given.get_item(&item)?;
                (item, value)
            } else {
                (item.get_item_by_index(0)?, item.get_item_by_index(1)?)
            });
        }
    }
    for name in named.args() {
        pairs.push((Value::from(name), named.get(name)?));
    }
    Ok(Value::from_pairs(pairs))
}

/// A macro whose body names `varargs` or `kwargs`, its last two parameters. It takes arguments that
/// it has no parameters for.
#[derive(Debug)]
struct Variadic(Value);

impl Object for Variadic {
    fn call(self: &Arc<Self>, state: &mut State<'_, '_>, args: &[Value]) -> Result<Value, Error> {
        let mut names: Vec<Value> = self.0.get_attr("arguments")?.try_iter()?.collect();
        names.truncate(names.len().saturating_sub(2));
        let (args, named) = match args.split_last() {
            Some((last, args)) if last.is_kwargs() => (args, Some(Kwargs::try_from(last.clone())?)),
            _ => (args, None),
        };
        let (placed, more) = args.split_at(args.len().min(names.len()));
        let mut passed = vec![("varargs".to_string(), Value::from(more.to_vec()))];
        let mut rest = Vec::new();
        for name in named.iter().flat_map(Kwargs::args) {
            let value: Value = named
                .as_ref()
                .map_or(Ok(Value::UNDEFINED), |n| n.get(name))?;
            let known = name == "caller" || names.iter().any(|n| n.as_str() == Some(name));
            if known { &mut passed } else { &mut rest }.push((name.to_string(), value));
        }
        passed.push(("kwargs".to_string(), Value::from_pairs(rest)));
        let mut all = placed.to_vec();
        all.push(Value::from(passed.into_iter().collect::<Kwargs>()));
        self.0.call(state, &all)
    }

    fn get_value(self: &Arc<Self>, key: &Value) -> Option<Value> {
        self.0.get_item(key).ok()
    }
}
