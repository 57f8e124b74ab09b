//! Writes GGUF files for tests, right ones and wrong ones.

use super::value::Value;
pub(crate) use super::write::put_bytes;
use super::write::put_value;
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
