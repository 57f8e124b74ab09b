//! Metadata values, and the questions a model loader asks of them.

/// A metadata value of any kind.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum Value {
    U8(u8),
    I8(i8),
    U16(u16),
    I16(i16),
    U32(u32),
    I32(i32),
    U64(u64),
    I64(i64),
    F32(f32),
    F64(f64),
    Bool(bool),
    /// Bytes that are no UTF-8 (a few tokenizers have them) are replaced by U+FFFD.
    Str(String),
    Array(ArrayValue),
}

/// An array of one kind of value, packed. Arrays of arrays are refused when a file is opened.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)]
pub enum ArrayValue {
    U8(Vec<u8>),
    I8(Vec<i8>),
    U16(Vec<u16>),
    I16(Vec<i16>),
    U32(Vec<u32>),
    I32(Vec<i32>),
    U64(Vec<u64>),
    I64(Vec<i64>),
    F32(Vec<f32>),
    F64(Vec<f64>),
    Bool(Vec<bool>),
    Str(Vec<String>),
}

impl Value {
    /// Returns the integer, whatever its width; `None` for anything that is no integer (floats and
    /// booleans included).
    pub fn as_i128(&self) -> Option<i128> {
        Some(match *self {
            Value::U8(v) => v.into(),
            Value::I8(v) => v.into(),
            Value::U16(v) => v.into(),
            Value::I16(v) => v.into(),
            Value::U32(v) => v.into(),
            Value::I32(v) => v.into(),
            Value::U64(v) => v.into(),
            Value::I64(v) => v.into(),
            _ => return None,
        })
    }

    /// Returns the number as `f32`: an `f64` is rounded if it stays finite, an integer must be
    /// exact.
    pub fn as_f32(&self) -> Option<f32> {
        match *self {
            Value::F32(v) => Some(v),
            Value::F64(v) => narrow(v),
            _ => {
                let integer = self.as_i128()?;
                let float = integer as f32;
                (float as i128 == integer).then_some(float)
            }
        }
    }

    /// Returns the string; `None` for any other kind.
    pub fn as_str(&self) -> Option<&str> {
        if let Value::Str(s) = self {
            Some(s)
        } else {
            None
        }
    }

    /// Returns the array; `None` for any other kind.
    pub fn as_array(&self) -> Option<&ArrayValue> {
        if let Value::Array(a) = self {
            Some(a)
        } else {
            None
        }
    }

    /// Returns the kind of the value and, where it is short, the value: `u32 5`, `array of 3
    /// strings`. For messages.
    pub fn describe(&self) -> String {
        match self {
            Value::U8(v) => format!("u8 {v}"),
            Value::I8(v) => format!("i8 {v}"),
            Value::U16(v) => format!("u16 {v}"),
            Value::I16(v) => format!("i16 {v}"),
            Value::U32(v) => format!("u32 {v}"),
            Value::I32(v) => format!("i32 {v}"),
            Value::U64(v) => format!("u64 {v}"),
            Value::I64(v) => format!("i64 {v}"),
            Value::F32(v) => format!("f32 {v}"),
            Value::F64(v) => format!("f64 {v}"),
            Value::Bool(v) => format!("bool {v}"),
            Value::Str(s) => {
                let short: String = s.chars().take(40).collect();
                let dots = if short.len() < s.len() { "…" } else { "" };
                format!("string {short:?}{dots}")
            }
            Value::Array(a) => format!("array of {} {}", a.len(), a.kind()),
        }
    }
}

impl ArrayValue {
    /// Returns the number of elements.
    pub fn len(&self) -> usize {
        match self {
            ArrayValue::U8(v) => v.len(),
            ArrayValue::I8(v) => v.len(),
            ArrayValue::U16(v) => v.len(),
            ArrayValue::I16(v) => v.len(),
            ArrayValue::U32(v) => v.len(),
            ArrayValue::I32(v) => v.len(),
            ArrayValue::U64(v) => v.len(),
            ArrayValue::I64(v) => v.len(),
            ArrayValue::F32(v) => v.len(),
            ArrayValue::F64(v) => v.len(),
            ArrayValue::Bool(v) => v.len(),
            ArrayValue::Str(v) => v.len(),
        }
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the element kind in words: `u32`, `strings`.
    pub fn kind(&self) -> &'static str {
        match self {
            ArrayValue::U8(_) => "u8",
            ArrayValue::I8(_) => "i8",
            ArrayValue::U16(_) => "u16",
            ArrayValue::I16(_) => "i16",
            ArrayValue::U32(_) => "u32",
            ArrayValue::I32(_) => "i32",
            ArrayValue::U64(_) => "u64",
            ArrayValue::I64(_) => "i64",
            ArrayValue::F32(_) => "f32",
            ArrayValue::F64(_) => "f64",
            ArrayValue::Bool(_) => "bool",
            ArrayValue::Str(_) => "strings",
        }
    }

    /// Returns all elements as integers of type `T`; `None` if they are no integers or one does not
    /// fit.
    pub fn integers<T: TryFrom<i128>>(&self) -> Option<Vec<T>> {
        fn all<S: Copy + Into<i128>, T: TryFrom<i128>>(from: &[S]) -> Option<Vec<T>> {
            from.iter().map(|&v| T::try_from(v.into()).ok()).collect()
        }
        match self {
            ArrayValue::U8(v) => all(v),
            ArrayValue::I8(v) => all(v),
            ArrayValue::U16(v) => all(v),
            ArrayValue::I16(v) => all(v),
            ArrayValue::U32(v) => all(v),
            ArrayValue::I32(v) => all(v),
            ArrayValue::U64(v) => all(v),
            ArrayValue::I64(v) => all(v),
            ArrayValue::F32(_) | ArrayValue::F64(_) | ArrayValue::Bool(_) | ArrayValue::Str(_) => {
                None
            }
        }
    }

    /// Returns all elements as `f32` (an `f64` is rounded if it stays finite); `None` if they are
    /// no floats.
    pub fn floats(&self) -> Option<Vec<f32>> {
        match self {
            ArrayValue::F32(v) => Some(v.clone()),
            ArrayValue::F64(v) => v.iter().map(|&x| narrow(x)).collect(),
            _ => None,
        }
    }
}

/// Rounds to `f32`; `None` where a finite number would become infinite.
fn narrow(v: f64) -> Option<f32> {
    let f = v as f32;
    (f.is_finite() || !v.is_finite()).then_some(f)
}
