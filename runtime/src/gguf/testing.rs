//! Writes GGUF files for tests, right ones and wrong ones.

use super::value::{ArrayValue, Value};
use crate::quant::TensorType;

/// A file to be. Nothing is checked: tests write wrong files too.
#[derive(Debug, Clone)]
pub struct Writer {
    /// Version in the header.
    pub version: u32,
    /// Tensors begin at multiples of it; written only if there is a key for it.
    pub alignment: u64,
    /// Keys and values.
    pub metadata: Vec<(String, Value)>,
    /// Tensors.
    pub tensors: Vec<WriterTensor>,
}

/// A tensor to be.
#[derive(Debug, Clone)]
pub struct WriterTensor {
    /// Name.
    pub name: String,
    /// Lengths, fastest first.
    pub dims: Vec<u64>,
    /// Number of the type.
    pub type_id: u32,
    /// Content.
    pub data: Vec<u8>,
}

impl Default for Writer {
    fn default() -> Self {
        Writer { version: 3, alignment: 32, metadata: Vec::new(), tensors: Vec::new() }
    }
}

impl Writer {
    /// Adds a key.
    pub fn key(mut self, key: &str, value: Value) -> Self {
        self.metadata.push((key.to_string(), value));
        self
    }

    /// Adds a tensor.
    pub fn tensor(mut self, name: &str, ty: TensorType, dims: &[u64], data: Vec<u8>) -> Self {
        self.tensors.push(WriterTensor { name: name.into(), dims: dims.to_vec(), type_id: ty as u32, data });
        self
    }

    /// The header, up to the end of the tensor descriptions.
    pub fn header(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(self.version.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            put_bytes(&mut out, key.as_bytes());
            put_value(&mut out, value);
        }
        let mut offset = 0u64;
        for t in &self.tensors {
            put_bytes(&mut out, t.name.as_bytes());
            out.extend((t.dims.len() as u32).to_le_bytes());
            t.dims.iter().for_each(|d| out.extend(d.to_le_bytes()));
            out.extend(t.type_id.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset = (offset + t.data.len() as u64).next_multiple_of(self.alignment);
        }
        out
    }

    /// The whole file.
    pub fn finish(&self) -> Vec<u8> {
        let mut out = self.header();
        for t in &self.tensors {
            out.resize(out.len().next_multiple_of(self.alignment as usize), 0);
            out.extend(&t.data);
        }
        out
    }
}

/// A string as GGUF has it: length, then bytes.
pub fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend((bytes.len() as u64).to_le_bytes());
    out.extend(bytes);
}

fn put_value(out: &mut Vec<u8>, value: &Value) {
    let mut put = |kind: u32, bytes: &[u8]| {
        out.extend(kind.to_le_bytes());
        out.extend(bytes);
    };
    match value {
        Value::U8(v) => put(0, &v.to_le_bytes()),
        Value::I8(v) => put(1, &v.to_le_bytes()),
        Value::U16(v) => put(2, &v.to_le_bytes()),
        Value::I16(v) => put(3, &v.to_le_bytes()),
        Value::U32(v) => put(4, &v.to_le_bytes()),
        Value::I32(v) => put(5, &v.to_le_bytes()),
        Value::F32(v) => put(6, &v.to_le_bytes()),
        Value::Bool(v) => put(7, &[u8::from(*v)]),
        Value::Str(v) => {
            put(8, &[]);
            put_bytes(out, v.as_bytes());
        }
        Value::Array(a) => {
            put(9, &[]);
            put_array(out, a);
        }
        Value::U64(v) => put(10, &v.to_le_bytes()),
        Value::I64(v) => put(11, &v.to_le_bytes()),
        Value::F64(v) => put(12, &v.to_le_bytes()),
    }
}

fn put_array(out: &mut Vec<u8>, array: &ArrayValue) {
    fn all<T: Copy, const N: usize>(out: &mut Vec<u8>, kind: u32, items: &[T], to: impl Fn(T) -> [u8; N]) {
        out.extend(kind.to_le_bytes());
        out.extend((items.len() as u64).to_le_bytes());
        items.iter().for_each(|&v| out.extend(to(v)));
    }
    match array {
        ArrayValue::U8(a) => all(out, 0, a, u8::to_le_bytes),
        ArrayValue::I8(a) => all(out, 1, a, i8::to_le_bytes),
        ArrayValue::U16(a) => all(out, 2, a, u16::to_le_bytes),
        ArrayValue::I16(a) => all(out, 3, a, i16::to_le_bytes),
        ArrayValue::U32(a) => all(out, 4, a, u32::to_le_bytes),
        ArrayValue::I32(a) => all(out, 5, a, i32::to_le_bytes),
        ArrayValue::F32(a) => all(out, 6, a, f32::to_le_bytes),
        ArrayValue::Bool(a) => all(out, 7, a, |b| [u8::from(b)]),
        ArrayValue::Str(a) => {
            out.extend(8u32.to_le_bytes());
            out.extend((a.len() as u64).to_le_bytes());
            a.iter().for_each(|s| put_bytes(out, s.as_bytes()));
        }
        ArrayValue::U64(a) => all(out, 10, a, u64::to_le_bytes),
        ArrayValue::I64(a) => all(out, 11, a, i64::to_le_bytes),
        ArrayValue::F64(a) => all(out, 12, a, f64::to_le_bytes),
    }
}
