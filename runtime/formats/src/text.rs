//! Pieces of TOML text. The writers lay their files out by hand: a serializer would not group
//! ranges, align short tables on a line, or keep a readable order.

use thiserror::Error;

/// Quotes a basic string with everything escaped that TOML asks for, always on one line.
pub(super) fn quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c.is_control() => out.push_str(&format!("\\u{:04X}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// Formats the shortest decimal that reads back as the same number.
pub(super) fn float(x: f64) -> String {
    if x.is_nan() {
        "nan".into()
    } else {
        format!("{x:?}")
    }
}

/// A number that no file may hold.
#[derive(Debug, Clone, PartialEq, Error)]
pub enum BadNumber {
    /// Not finite, or negative.
    #[error("{what} is {found}, but must be a finite number that is not negative")]
    Amount {
        /// Key of the number.
        what: String,
        /// Value that was found.
        found: f64,
    },
    /// Not finite, or not above 0.
    #[error("{what} is {found}, but must be a positive finite number of {unit}")]
    Rate {
        /// Key of the number.
        what: String,
        /// Value that was found.
        found: f64,
        /// Unit that is expected.
        unit: &'static str,
    },
    /// More bytes than a TOML integer can hold.
    #[error("{what} is {bytes} bytes, which is more than the format can hold (8 EiB)")]
    Bytes {
        /// Key of the number.
        what: String,
        /// Value that was found.
        bytes: u64,
    },
}

impl From<BadNumber> for String {
    fn from(bad: BadNumber) -> String {
        bad.to_string()
    }
}

/// Fails unless the number is finite and not negative.
pub(super) fn check_amount(what: &str, found: f64) -> Result<(), BadNumber> {
    if found.is_finite() && found >= 0.0 {
        Ok(())
    } else {
        Err(BadNumber::Amount {
            what: what.into(),
            found,
        })
    }
}

/// Fails unless the number is finite and above 0.
pub(super) fn check_rate(what: &str, found: f64, unit: &'static str) -> Result<(), BadNumber> {
    if found.is_finite() && found > 0.0 {
        Ok(())
    } else {
        Err(BadNumber::Rate {
            what: what.into(),
            found,
            unit,
        })
    }
}

/// Fails if the size cannot be written as a TOML integer.
pub(super) fn check_bytes(what: &str, bytes: u64) -> Result<(), BadNumber> {
    if i64::try_from(bytes).is_ok() {
        Ok(())
    } else {
        Err(BadNumber::Bytes {
            what: what.into(),
            bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(serde::Deserialize)]
    struct One<T> {
        x: T,
    }

    proptest! {
        #[test]
        fn strings_read_back(text in "\\PC{0,20}|[\\x00-\\x7f]{0,20}|.{0,20}") {
            let one: One<String> = toml::from_str(&format!("x = {}", quote(&text))).unwrap();
            prop_assert_eq!(one.x, text);
        }

        #[test]
        fn floats_read_back(x in proptest::num::f64::NORMAL | proptest::num::f64::SUBNORMAL | proptest::num::f64::ZERO) {
            let one: One<f64> = toml::from_str(&format!("x = {}", float(x))).unwrap();
            prop_assert_eq!(one.x.to_bits(), x.to_bits());
        }
    }
}
