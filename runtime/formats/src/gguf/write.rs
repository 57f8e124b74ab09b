//! Writes GGUF files of version 3: metadata, then tensors whose bytes the caller passes in pieces,
//! so that no file needs to fit memory.

use super::value::{ArrayValue, Value};
use std::io::{self, Write};
use thiserror::Error;
use tier_plan_kernels::quant::TensorType;

/// Tensors begin at multiples of it, which is what readers suppose where no key says otherwise.
const ALIGNMENT: u64 = 32;

/// A tensor that no file can have.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("tensor '{name}' can't have the lengths {dims:?}: {ty} has blocks of {}, and a file fewer than 2⁶⁴ bytes", ty.block_len())]
pub struct BadTensor {
    /// Name of the tensor.
    pub name: String,
    /// Element or block type.
    pub ty: TensorType,
    /// Its lengths, fastest first.
    pub dims: Vec<u64>,
}

/// A tensor to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DraftTensor {
    /// Name of the tensor.
    pub name: String,
    /// Element or block type.
    pub ty: TensorType,
    /// Dimensions, fastest first.
    pub dims: Vec<u64>,
    /// Bytes that it takes.
    pub n_bytes: u64,
}

/// A file to be written.
#[derive(Debug, Clone, Default)]
pub struct Draft {
    metadata: Vec<(String, Value)>,
    tensors: Vec<DraftTensor>,
    /// Bytes of all tensors with what lies between them.
    data_bytes: u64,
}

impl Draft {
    /// Adds a metadata key and its value.
    #[must_use]
    pub fn key(mut self, key: impl Into<String>, value: Value) -> Self {
        self.metadata.push((key.into(), value));
        self
    }

    /// Adds a tensor.
    ///
    /// # Errors
    /// When its rows are no whole blocks of the type, or it is too large.
    pub fn tensor(
        &mut self,
        name: impl Into<String>,
        ty: TensorType,
        dims: &[u64],
    ) -> Result<(), BadTensor> {
        let rows = dims.iter().skip(1).try_fold(1u64, |n, d| n.checked_mul(*d));
        let row = dims.first().and_then(|values| ty.row_bytes(*values));
        let n_bytes = row.zip(rows).and_then(|(row, rows)| row.checked_mul(rows));
        let end = n_bytes.and_then(|n| {
            self.data_bytes
                .checked_add(n)?
                .checked_next_multiple_of(ALIGNMENT)
        });
        let (name, dims) = (name.into(), dims.to_vec());
        let Some((n_bytes, end)) = n_bytes.zip(end) else {
            return Err(BadTensor { name, ty, dims });
        };
        self.data_bytes = end;
        self.tensors.push(DraftTensor {
            name,
            ty,
            dims,
            n_bytes,
        });
        Ok(())
    }

    /// Returns the tensors, in the order of the file.
    pub fn tensors(&self) -> &[DraftTensor] {
        &self.tensors
    }

    /// Returns the bytes of the file.
    pub fn file_bytes(&self) -> u64 {
        (self.header().len() as u64)
            .next_multiple_of(ALIGNMENT)
            .saturating_add(self.data_bytes)
    }

    fn header(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
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
            out.extend((t.ty as u32).to_le_bytes());
            out.extend(offset.to_le_bytes());
            // In range: all of it was added up before.
            offset = (offset + t.n_bytes).next_multiple_of(ALIGNMENT);
        }
        out
    }

    /// Writes the file; `fill` writes the bytes of each tensor, in their order.
    ///
    /// # Errors
    /// When `out` or `fill` fails, or `fill` writes more or fewer bytes than the tensor has.
    pub fn write(
        &self,
        out: &mut dyn Write,
        fill: &mut dyn FnMut(&DraftTensor, &mut dyn Write) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut header = self.header();
        header.resize(header.len().next_multiple_of(ALIGNMENT as usize), 0);
        out.write_all(&header)?;
        for tensor in &self.tensors {
            let mut room = Room {
                out: &mut *out,
                left: tensor.n_bytes,
            };
            fill(tensor, &mut room)?;
            if room.left > 0 {
                let (name, left) = (&tensor.name, room.left);
                return Err(io::Error::other(format!(
                    "the last {left} bytes of tensor '{name}' were not written"
                )));
            }
            let padding = tensor.n_bytes.next_multiple_of(ALIGNMENT) - tensor.n_bytes;
            out.write_all(&[0; ALIGNMENT as usize][..padding as usize])?;
        }
        out.flush()
    }
}

/// Where a tensor's bytes go, and no more than those.
struct Room<'a> {
    out: &'a mut dyn Write,
    left: u64,
}

impl Write for Room<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() as u64 > self.left {
            return Err(io::Error::other(format!(
                "{} bytes for a tensor that has room for {}",
                bytes.len(),
                self.left
            )));
        }
        let written = self.out.write(bytes)?;
        self.left -= written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// Appends a string as GGUF has it: length, then bytes.
pub(crate) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    out.extend((bytes.len() as u64).to_le_bytes());
    out.extend(bytes);
}

/// Appends a value with the number of its kind before it.
pub(super) fn put_value(out: &mut Vec<u8>, value: &Value) {
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
    fn all<T: Copy, const N: usize>(
        out: &mut Vec<u8>,
        kind: u32,
        items: &[T],
        to: impl Fn(T) -> [u8; N],
    ) {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gguf::Gguf;

    #[test]
    fn what_is_written_opens() {
        let strings = ArrayValue::Str(vec!["a".into(), "bc".into()]);
        let mut draft = Draft::default()
            .key("general.architecture", Value::Str("none".into()))
            .key("some.count", Value::U32(7))
            .key("some.words", Value::Array(strings.clone()));
        draft.tensor("first", TensorType::F32, &[3]).unwrap();
        draft
            .tensor("second", TensorType::Q4_0, &[64, 2, 3])
            .unwrap();
        let mut bytes = Vec::new();
        let mut fill = |t: &DraftTensor, out: &mut dyn Write| {
            // In pieces, none of which is the whole.
            let of = t.name.len() as u8;
            (0..t.n_bytes).try_for_each(|i| out.write_all(&[of.wrapping_add(i as u8)]))
        };
        draft.write(&mut bytes, &mut fill).unwrap();
        assert_eq!(bytes.len() as u64, draft.file_bytes());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.gguf");
        std::fs::write(&path, &bytes).unwrap();
        let gguf = Gguf::open(&path).unwrap();
        assert_eq!(gguf.get("some.count"), Some(&Value::U32(7)));
        assert_eq!(gguf.get("some.words"), Some(&Value::Array(strings)));
        for (tensor, draft) in gguf.tensors().iter().zip(draft.tensors()) {
            assert_eq!(
                (&tensor.name, tensor.ty, &tensor.n_bytes),
                (&draft.name, draft.ty, &draft.n_bytes)
            );
            let first = tensor.name.len() as u8;
            let expected: Vec<u8> = (0..tensor.n_bytes)
                .map(|i| first.wrapping_add(i as u8))
                .collect();
            assert_eq!(gguf.bytes(tensor), expected);
        }
        assert_eq!(gguf.tensors().len(), 2);
    }

    #[test]
    fn tensors_that_are_none_and_fills_that_do_not_fit_are_errors() {
        let mut draft = Draft::default();
        let why = draft
            .tensor("odd", TensorType::Q4_K, &[255, 2])
            .unwrap_err()
            .to_string();
        assert!(
            why.contains("'odd'") && why.contains("blocks of 256"),
            "{why}"
        );
        draft
            .tensor("large", TensorType::F32, &[1 << 40, 1 << 40])
            .unwrap_err();
        draft.tensor("none", TensorType::F32, &[]).unwrap_err();
        draft.tensor("right", TensorType::F32, &[2]).unwrap();
        for (len, word) in [(9, "room for"), (7, "were not written")] {
            let mut fill = |_: &DraftTensor, out: &mut dyn Write| out.write_all(&vec![0; len]);
            let why = draft
                .write(&mut Vec::new(), &mut fill)
                .unwrap_err()
                .to_string();
            assert!(why.contains(word), "{why}");
        }
    }
}
