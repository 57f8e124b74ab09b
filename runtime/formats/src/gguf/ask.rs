//! Typed questions to the metadata: an answer of the wrong kind is an error that names key,
//! expectation and finding.

use super::{ArrayValue, Gguf, GgufError, Value};

macro_rules! required {
    ($($(#[$doc:meta])* $name:ident = $opt:ident($($arg:ident: $ty:ty),*) -> $out:ty, $expected:literal;)*) => {$(
        $(#[$doc])*
        ///
        /// # Errors
        /// The key is missing, or has a value of the wrong kind.
        pub fn $name(&self, key: &str $(, $arg: $ty)*) -> Result<$out, GgufError> {
            self.$opt(key $(, $arg)*)?.ok_or_else(|| self.missing(key, $expected))
        }
    )*};
}

/// Integers are converted among their widths where the value fits; floats are never taken for
/// integers. The `opt_` questions give `None` only where the key is absent: present with a wrong
/// kind is an error there too.
impl Gguf {
    required! {
        /// An integer from 0 to 2³² − 1.
        u32 = opt_u32() -> u32, "an integer";
        /// An integer from 0 to 2⁶⁴ − 1.
        u64 = opt_u64() -> u64, "an integer";
        /// A number; `f64` is rounded, an integer must be exact.
        f32 = opt_f32() -> f32, "a number";
        /// A boolean, of one byte that is 0 or 1.
        bool = opt_bool() -> bool, "a bool";
        /// A string of valid UTF-8.
        str = opt_str() -> &str, "a string";
        /// One integer a layer. A single integer in the file stands for all of `n_layer`; an array
        /// may be longer than `n_layer` (it then covers trailing prediction blocks), never shorter.
        u32_per_layer = opt_u32_per_layer(n_layer: u32) -> Vec<u32>, "an integer or one per layer";
        /// An array of strings.
        str_array = opt_str_array() -> &[String], "an array of strings";
        /// An array of floats.
        f32_array = opt_f32_array() -> Vec<f32>, "an array of floats";
        /// An array of integers that fit `i32`.
        i32_array = opt_i32_array() -> Vec<i32>, "an array of integers";
        /// An array of integers that fit `u32`.
        u32_array = opt_u32_array() -> Vec<u32>, "an array of integers";
        /// An array of truth values.
        bool_array = opt_bool_array() -> &[bool], "an array of bools";
    }

    /// Returns an integer from 0 to 2³² − 1, if the key is there.
    pub fn opt_u32(&self, key: &str) -> Result<Option<u32>, GgufError> {
        self.ask(key, "an integer from 0 to 4294967295", |v| {
            v.as_i128()?.try_into().ok()
        })
    }

    /// Returns an integer from 0 to 2⁶⁴ − 1, if the key is there.
    pub fn opt_u64(&self, key: &str) -> Result<Option<u64>, GgufError> {
        self.ask(key, "an integer from 0 to 18446744073709551615", |v| {
            v.as_i128()?.try_into().ok()
        })
    }

    /// Returns a number, if the key is there.
    pub fn opt_f32(&self, key: &str) -> Result<Option<f32>, GgufError> {
        self.ask(key, "a number", Value::as_f32)
    }

    /// Returns a truth value, if the key is there.
    pub fn opt_bool(&self, key: &str) -> Result<Option<bool>, GgufError> {
        self.ask(key, "a bool", |v| {
            if let Value::Bool(b) = v {
                Some(*b)
            } else {
                None
            }
        })
    }

    /// Returns a string, if the key is there.
    pub fn opt_str(&self, key: &str) -> Result<Option<&str>, GgufError> {
        self.ask(key, "a string", Value::as_str)
    }

    /// One integer a layer, if the key is there; see [`Gguf::u32_per_layer`].
    pub fn opt_u32_per_layer(
        &self,
        key: &str,
        n_layer: u32,
    ) -> Result<Option<Vec<u32>>, GgufError> {
        let expected = format!("an integer, or an array of {n_layer} of them (one per layer)");
        let n = n_layer as usize;
        self.ask(key, &expected, |v| match v {
            Value::Array(a) => {
                let mut all = a.integers()?;
                all.truncate(n);
                (all.len() == n).then_some(all)
            }
            one => u32::try_from(one.as_i128()?).ok().map(|one| vec![one; n]),
        })
    }

    /// Returns an array of strings, if the key is there.
    pub fn opt_str_array(&self, key: &str) -> Result<Option<&[String]>, GgufError> {
        self.ask(key, "an array of strings", |v| match v {
            Value::Array(ArrayValue::Str(a)) => Some(a.as_slice()),
            _ => None,
        })
    }

    /// Returns an array of floats, if the key is there.
    pub fn opt_f32_array(&self, key: &str) -> Result<Option<Vec<f32>>, GgufError> {
        self.ask(key, "an array of floats", |v| v.as_array()?.floats())
    }

    /// Returns an array of floats or of integers, which are rounded, if the key is there.
    pub fn opt_number_array(&self, key: &str) -> Result<Option<Vec<f32>>, GgufError> {
        self.ask(key, "an array of numbers", |v| {
            let array = v.as_array()?;
            let rounded = |v: Vec<i64>| v.into_iter().map(|v| v as f32).collect();
            array.floats().or_else(|| array.integers().map(rounded))
        })
    }

    /// Returns an array of integers that fit `i32`, if the key is there.
    pub fn opt_i32_array(&self, key: &str) -> Result<Option<Vec<i32>>, GgufError> {
        self.ask(
            key,
            "an array of integers from -2147483648 to 2147483647",
            |v| v.as_array()?.integers(),
        )
    }

    /// Returns an array of integers that fit `u32`, if the key is there.
    pub fn opt_u32_array(&self, key: &str) -> Result<Option<Vec<u32>>, GgufError> {
        self.ask(key, "an array of integers from 0 to 4294967295", |v| {
            v.as_array()?.integers()
        })
    }

    /// Returns an array of truth values, if the key is there.
    pub fn opt_bool_array(&self, key: &str) -> Result<Option<&[bool]>, GgufError> {
        self.ask(key, "an array of bools", |v| match v {
            Value::Array(ArrayValue::Bool(a)) => Some(a.as_slice()),
            _ => None,
        })
    }

    fn ask<'a, T>(
        &'a self,
        key: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>, GgufError> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        read(value).map(Some).ok_or_else(|| GgufError::WrongValue {
            path: self.path().to_path_buf(),
            key: key.to_string(),
            expected: expected.to_string(),
            found: value.describe(),
        })
    }

    fn missing(&self, key: &str, expected: &str) -> GgufError {
        GgufError::MissingKey {
            path: self.path().to_path_buf(),
            key: key.to_string(),
            expected: expected.to_string(),
        }
    }
}
