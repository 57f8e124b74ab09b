//! The form of Gemma 4 and FunctionGemma: `call:NAME{key:value,key:value}`. Keys are bare, strings are
//! between two marks, and other values are as in JSON.

use super::Call;
use super::bodies::with_object;
use super::reader::{Fault, Read, Reader};
use crate::request::tools::Tool;
use crate::request::value;
use serde_json::{Map, Value};

/// Deepest nesting of values.
const MAX_DEPTH: usize = 64;

/// Reads a call of Gemma 4.
pub(super) fn gemma4(reader: &mut Reader<'_>, marks: [&str; 2], _: &[Tool]) -> Read<Vec<Call>> {
    call(reader, marks, "<|\"|>")
}

/// Reads a call of FunctionGemma.
pub(super) fn function_gemma(
    reader: &mut Reader<'_>,
    marks: [&str; 2],
    _: &[Tool],
) -> Read<Vec<Call>> {
    call(reader, marks, "<escape>")
}

fn call(reader: &mut Reader<'_>, [open, close]: [&str; 2], quote: &str) -> Read<Vec<Call>> {
    reader.expect(open)?;
    reader.space();
    reader.expect("call:")?;
    let name = reader.before(&['{'])?;
    let arguments = read_value(reader, quote, MAX_DEPTH)?;
    reader.close(close)?;
    Ok(vec![with_object(name, arguments)?])
}

fn read_value(reader: &mut Reader<'_>, quote: &str, left: usize) -> Read<Value> {
    let left = left.checked_sub(1).ok_or(Fault::Other)?;
    reader.space();
    if reader.skip(quote) {
        return Ok(reader.until(quote)?.into());
    }
    if reader.skip("{") {
        let mut fields = Map::new();
        while !ends(reader, "}")? {
            let key = if reader.skip(quote) {
                reader.until(quote)?
            } else {
                reader.before(&[':'])?.trim().trim_matches('"')
            };
            reader.space();
            reader.expect(":")?;
            fields.insert(key.to_string(), read_value(reader, quote, left)?);
        }
        return Ok(fields.into());
    }
    if reader.skip("[") {
        let mut items = Vec::new();
        while !ends(reader, "]")? {
            let before = reader.left();
            items.push(read_value(reader, quote, left)?);
            // What ends an object ends no list.
            if reader.left() == before {
                return Err(Fault::Other);
            }
        }
        return Ok(items.into());
    }
    if reader.is_at("\"") {
        return reader.string();
    }
    let bare = reader.before(&[',', '}', ']'])?.trim();
    Ok(value::parse(bare.as_bytes()).unwrap_or_else(|_| bare.into()))
}

/// Whether a list of values ends here; skips what is between two values.
fn ends(reader: &mut Reader<'_>, close: &str) -> Read<bool> {
    reader.space();
    reader.skip(",");
    reader.space();
    match reader.skip(close) {
        true => Ok(true),
        false if reader.is_empty() => Err(Fault::Ends),
        false => Ok(false),
    }
}
