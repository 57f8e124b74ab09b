//! Arguments of methods and filters, by place or by name as in Python.

use super::invalid;
use minijinja::Error;
use minijinja::value::{Kwargs, Rest, Value};

/// Makes the error of a call of `name` without an argument that it needs.
pub(super) fn missing(name: &str) -> Error {
    invalid(format!("{name}: an argument is missing"))
}

/// Returns the arguments of a filter as those of a method are: the named ones last, in one value.
pub(super) fn all(args: Rest<Value>, named: Kwargs) -> Vec<Value> {
    let mut all = args.0;
    all.push(Value::from(named));
    all
}

/// Assigns the arguments of a call of `name` to parameters.
pub(super) fn bind<const N: usize>(
    name: &str,
    args: &[Value],
    parameters: [&str; N],
) -> Result<[Option<Value>; N], Error> {
    let (args, named) = match args.split_last() {
        Some((last, args)) if last.is_kwargs() => (args, Some(Kwargs::try_from(last.clone())?)),
        _ => (args, None),
    };
    if args.len() > N {
        return Err(invalid(format!(
            "{name}: {} arguments, expected at most {N}",
            args.len()
        )));
    }
    let mut bound = [const { None }; N];
    for (place, value) in bound.iter_mut().zip(args) {
        *place = Some(value.clone());
    }
    if let Some(named) = named {
        for (place, parameter) in bound.iter_mut().zip(parameters) {
            if named.has(parameter) {
                *place = Some(named.get(parameter)?);
            }
        }
        named.assert_all_used()?;
    }
    Ok(bound)
}

/// Returns an argument that must be a text.
pub(super) fn string<'a>(name: &str, value: &'a Option<Value>) -> Result<&'a str, Error> {
    let value = value.as_ref().ok_or_else(|| missing(name))?;
    value.as_str().ok_or_else(|| {
        invalid(format!(
            "{name}: a value of type {}, expected a string",
            value.kind()
        ))
    })
}

/// Returns a text that may be left out or none.
pub(super) fn optional<'a>(name: &str, value: &'a Option<Value>) -> Result<Option<&'a str>, Error> {
    match value {
        Some(given) if !given.is_none() => string(name, value).map(Some),
        _ => Ok(None),
    }
}

/// Returns an integer that may be left out or none.
pub(super) fn integer(name: &str, value: &Option<Value>) -> Result<Option<i64>, Error> {
    match value {
        Some(value) if !value.is_none() => i64::try_from(value.clone()).map(Some).map_err(|_| {
            let kind = value.kind();
            invalid(format!("{name}: a {kind}, expected an integer"))
        }),
        _ => Ok(None),
    }
}

/// Returns a size that may be left out or none. Negative ones are taken for 0.
pub(super) fn size(name: &str, value: &Option<Value>) -> Result<Option<usize>, Error> {
    Ok(integer(name, value)?.map(|n| usize::try_from(n).unwrap_or(0)))
}

/// Returns whether an argument is there and true.
pub(super) fn flag(value: &Option<Value>) -> bool {
    value.as_ref().is_some_and(Value::is_true)
}
