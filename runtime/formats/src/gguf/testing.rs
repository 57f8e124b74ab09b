//! Writes GGUF files for tests, right ones and wrong ones.

use super::value::Value;
pub(crate) use super::write::put_bytes;
use super::write::put_value;
use super::{Gguf, TensorInfo};
use tier_plan_kernels::quant::TensorType;

/// A file to be. Nothing is checked: tests write wrong files too.
#[derive(Debug, Clone)]
pub struct Writer {
    /// Version in the header.
    pub version: u32,
    /// Tensors begin at multiples of it; written only if there is a key for it.
    pub alignment: u64,
    /// Metadata keys and values, in file order.
    pub metadata: Vec<(String, Value)>,
    /// Tensors, in file order.
    pub tensors: Vec<WriterTensor>,
}

/// A tensor to be.
#[derive(Debug, Clone)]
pub struct WriterTensor {
    /// Name of the tensor.
    pub name: String,
    /// Dimensions, fastest first.
    pub dims: Vec<u64>,
    /// Number of the type.
    pub type_id: u32,
    /// Bytes of the data.
    pub data: Vec<u8>,
}

impl Default for Writer {
    fn default() -> Self {
        Writer {
            version: 3,
            alignment: 32,
            metadata: Vec::new(),
            tensors: Vec::new(),
        }
    }
}

impl Writer {
    /// Takes over the content of a file, to be changed.
    pub fn from_gguf(gguf: &Gguf) -> Self {
        let tensor = |t: &TensorInfo| WriterTensor {
            name: t.name.clone(),
            dims: t.dims.clone(),
            type_id: t.ty as u32,
            data: gguf.bytes(t).to_vec(),
        };
        Writer {
            metadata: gguf.metadata().to_vec(),
            tensors: gguf.tensors().iter().map(tensor).collect(),
            ..Writer::default()
        }
    }

    /// Sets a key, replacing what it held.
    pub fn set(&mut self, key: &str, value: Value) {
        self.metadata.retain(|(k, _)| k != key);
        self.metadata.push((key.into(), value));
    }

    /// Removes a key.
    ///
    /// # Panics
    /// When it is not there.
    pub fn unset(&mut self, key: &str) {
        let before = self.metadata.len();
        self.metadata.retain(|(k, _)| k != key);
        assert_eq!(self.metadata.len() + 1, before, "{key} was there");
    }

    /// Returns a key's `u32`.
    ///
    /// # Panics
    /// When it is not there or of another type.
    pub fn count(&self, key: &str) -> u32 {
        match self.metadata.iter().find(|(k, _)| k == key) {
            Some((_, Value::U32(n))) => *n,
            other => panic!("{key}: {other:?}"),
        }
    }

    /// Removes a tensor and returns it.
    pub fn take(&mut self, name: &str) -> Option<WriterTensor> {
        let at = self.tensors.iter().position(|t| t.name == name)?;
        Some(self.tensors.remove(at))
    }

    /// Joins tensors along their second axis from the end of the file's order, `n` slices each,
    /// into one named `to`.
    pub fn fuse(&mut self, from: &[String], to: &str, axis: usize, n: usize) {
        let parts: Vec<WriterTensor> = from.iter().filter_map(|name| self.take(name)).collect();
        let Some(first) = parts.first() else { return };
        assert_eq!(parts.len(), from.len(), "{from:?}");
        let mut dims = first.dims.clone();
        dims[axis] = parts.iter().map(|p| p.dims[axis]).sum();
        let slice = |part: &WriterTensor, i: usize| {
            let size = part.data.len() / n;
            part.data[i * size..(i + 1) * size].to_vec()
        };
        let data = (0..n)
            .flat_map(|i| parts.iter().flat_map(move |p| slice(p, i)))
            .collect();
        self.tensors.push(WriterTensor {
            name: to.into(),
            dims,
            type_id: first.type_id,
            data,
        });
    }

    /// Adds a metadata key and its value.
    pub fn key(mut self, key: &str, value: Value) -> Self {
        self.metadata.push((key.to_string(), value));
        self
    }

    /// Adds a tensor with its data.
    pub fn tensor(mut self, name: &str, ty: TensorType, dims: &[u64], data: Vec<u8>) -> Self {
        self.tensors.push(WriterTensor {
            name: name.into(),
            dims: dims.to_vec(),
            type_id: ty as u32,
            data,
        });
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

    /// Encodes the whole file.
    pub fn finish(&self) -> Vec<u8> {
        let mut out = self.header();
        for t in &self.tensors {
            out.resize(out.len().next_multiple_of(self.alignment as usize), 0);
            out.extend(&t.data);
        }
        out
    }
}
