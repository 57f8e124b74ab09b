//! Decodes the header of one GGUF file: counts, metadata, tensor descriptions. Knows nothing of
//! split models or maps.
//!
//! The file may be anything. So nothing is believed before it is compared with the bytes that are
//! there: a count reserves no more memory than the rest of the file could fill, and every range is
//! checked with overflow in mind.

use super::error::GgufError;
use super::foreign::foreign;
use super::tensor::TensorInfo;
use super::value::{ArrayValue, Value};
use std::collections::HashSet;
use std::path::Path;
use tier_plan_kernels::quant::TensorType;

/// Tensors in one file; the largest published models have some thousands.
pub const MAX_TENSORS: u64 = 1 << 20;
/// Metadata keys in one file.
pub const MAX_KEYS: u64 = 1 << 20;
/// Elements in one metadata array; the largest vocabularies have some hundred thousand.
pub const MAX_ARRAY: u64 = 1 << 24;
/// Bytes of a header. Real ones are below 100 MB.
pub const MAX_HEADER_BYTES: u64 = 1 << 30;
/// Bytes of a metadata key, by the format's definition.
const MAX_KEY_BYTES: u64 = 65_535;
/// Bytes of a tensor name; the format says 64, tolerance costs nothing.
const MAX_NAME_BYTES: u64 = 1024;
const DEFAULT_ALIGNMENT: u64 = 32;

/// The decoded header of one file.
#[derive(Debug, Clone, PartialEq)]
pub struct Header {
    /// Format version, 2 or 3.
    pub version: u32,
    /// Every tensor begins at a multiple of this, in bytes.
    pub alignment: u64,
    /// Bytes from the start of the file to the end of the last tensor description.
    pub header_bytes: u64,
    /// Keys and values in file order, no key twice.
    pub metadata: Vec<(String, Value)>,
    /// Tensors in file order, no name twice, each wholly inside the file; `part` is 0.
    pub tensors: Vec<TensorInfo>,
}

impl Header {
    /// Decodes the header of a whole file; `path` is for messages only. Looks at no tensor data.
    pub fn decode(bytes: &[u8], path: &Path) -> Result<Header, GgufError> {
        let magic = &bytes[..bytes.len().min(4)];
        if magic.is_empty() || !b"GGUF".starts_with(magic) {
            return Err(foreign(bytes, path));
        }
        let mut r = Reader { bytes, at: 0, path };
        r.take(4, "the magic number 'GGUF'")?;
        let version = read_version(&mut r)?;

        let n_tensors = r.u64("the number of tensors")?;
        let n_keys = r.u64("the number of metadata keys")?;
        // The least a key takes: length, one byte of name, type, one byte of value. A tensor
        // likewise.
        r.plausible(n_keys, 8 + 1 + 4 + 1, MAX_KEYS, "metadata keys")?;
        r.plausible(n_tensors, 8 + 1 + 4 + 4 + 8, MAX_TENSORS, "tensors")?;

        let mut metadata: Vec<(String, Value)> = Vec::with_capacity(r.room(n_keys, 14));
        let mut seen = HashSet::with_capacity(r.room(n_keys, 14));
        for i in 0..n_keys {
            let key = r.name(MAX_KEY_BYTES, || format!("the name of metadata key {i}"))?;
            let value = r.value(&key)?;
            if !seen.insert(key.clone()) {
                return Err(r.damaged(format!("metadata key '{key}' appears twice")));
            }
            metadata.push((key, value));
        }
        let alignment = alignment(&metadata, &r)?;

        let mut raw = Vec::with_capacity(r.room(n_tensors, 25));
        seen.clear();
        for i in 0..n_tensors {
            let name = r.name(MAX_NAME_BYTES, || format!("the name of tensor {i}"))?;
            raw.push(r.tensor(&name, alignment)?);
            if !seen.insert(name.clone()) {
                return Err(r.damaged(format!("tensor '{name}' appears twice")));
            }
        }
        let header_bytes = r.at as u64;
        let mut tensors = raw;
        place(&mut tensors, header_bytes, alignment, &r)?;
        Ok(Header {
            version,
            alignment,
            header_bytes,
            metadata,
            tensors,
        })
    }

    /// Returns the value of a key.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.metadata.iter().find(|(k, _)| k == key).map(|(_, v)| v)
    }
}

fn read_version(r: &mut Reader<'_>) -> Result<u32, GgufError> {
    let version = r.u32("the version")?;
    let what = match version {
        2 | 3 => return Ok(version),
        0 => return Err(r.damaged("the version is 0, but versions start at 1")),
        1 => {
            "GGUF version 1, but this program reads versions 2 and 3; convert the model again with a current converter"
                .to_string()
        }
        v if v & 0xffff == 0 => format!(
            "GGUF version {} in big-endian byte order, but this program reads little-endian files; \
             use a little-endian file of this model, or convert it again",
            v.swap_bytes()
        ),
        v => format!("GGUF version {v}, but this program reads versions 2 and 3; update tier-plan"),
    };
    Err(GgufError::Version {
        path: r.path.to_path_buf(),
        what,
    })
}

fn alignment(metadata: &[(String, Value)], r: &Reader<'_>) -> Result<u64, GgufError> {
    let Some((_, value)) = metadata.iter().find(|(k, _)| k == "general.alignment") else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    value
        .as_i128()
        .and_then(|v| u64::try_from(v).ok())
        .filter(|v| v.is_power_of_two() && (8..=1 << 20).contains(v))
        .ok_or_else(|| {
            let found = value.describe();
            r.damaged(format!(
                "general.alignment: expected a power of two from 8 to 1048576, found {found}"
            ))
        })
}

/// Turns offsets within the data section into offsets within the file, and checks them against the
/// file and each other.
fn place(
    tensors: &mut [TensorInfo],
    header_bytes: u64,
    alignment: u64,
    r: &Reader<'_>,
) -> Result<(), GgufError> {
    let file_bytes = r.bytes.len() as u64;
    // Cannot overflow: the header lies in memory and the alignment is at most 1 MiB.
    let data_start = header_bytes.next_multiple_of(alignment);
    let mut last: Option<(u64, &str)> = None;
    for t in tensors.iter_mut() {
        let start = data_start.checked_add(t.offset);
        let end = start.and_then(|s| s.checked_add(t.n_bytes));
        let (Some(start), Some(end)) = (start, end) else {
            let (name, offset) = (&t.name, t.offset);
            return Err(r.damaged(format!(
                "tensor '{name}' has offset {offset}, beyond any file"
            )));
        };
        t.offset = start;
        if last.is_none_or(|(furthest, _)| end > furthest) {
            last = Some((end, &t.name));
        }
    }
    if let Some((end, name)) = last
        && end > file_bytes
    {
        return Err(GgufError::Truncated {
            path: r.path.to_path_buf(),
            what: format!("its last tensor '{name}' reaches to byte {end}"),
            file_bytes,
            missing: end - file_bytes,
            at_least: false,
        });
    }
    let mut order: Vec<&TensorInfo> = tensors.iter().collect();
    order.sort_by_key(|t| t.offset);
    for pair in order.windows(2) {
        if pair[0].offset + pair[0].n_bytes > pair[1].offset {
            let (a, b) = (&pair[0].name, &pair[1].name);
            return Err(r.damaged(format!("tensors '{a}' and '{b}' lie on top of each other")));
        }
    }
    Ok(())
}

/// A position in the file, from which checked pieces are taken.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    path: &'a Path,
}

impl<'a> Reader<'a> {
    fn damaged(&self, what: impl Into<String>) -> GgufError {
        GgufError::damaged(self.path, what)
    }

    fn remaining(&self) -> u64 {
        (self.bytes.len() - self.at) as u64
    }

    /// Returns how many elements to reserve for a count that the file claims: never more than the
    /// rest of the file, or 64 Ki, could hold. Beyond that a vector grows as elements are decoded.
    fn room(&self, count: u64, least_bytes: u64) -> usize {
        count.min(self.remaining() / least_bytes).min(1 << 16) as usize
    }

    /// Refuses a count that is over the limit, or that the rest of the file can't hold.
    fn plausible(
        &self,
        count: u64,
        least_bytes: u64,
        limit: u64,
        of: &str,
    ) -> Result<(), GgufError> {
        if count > limit {
            return Err(self.damaged(format!(
                "the header claims {count} {of}, but at most {limit} are read"
            )));
        }
        // Cannot overflow: the limit is far below 2^32 and an element far below 2^16 bytes.
        let needed = count * least_bytes;
        let remaining = self.remaining();
        if needed > remaining {
            let what = format!(
                "the header claims {count} {of}, which take at least {needed} bytes from byte {}",
                self.at
            );
            return Err(self.cut(what, needed - remaining));
        }
        Ok(())
    }

    fn cut(&self, what: String, missing: u64) -> GgufError {
        let file_bytes = self.bytes.len() as u64;
        GgufError::Truncated {
            path: self.path.to_path_buf(),
            what,
            file_bytes,
            missing,
            at_least: true,
        }
    }

    /// Takes the next `n` bytes.
    fn take(&mut self, n: u64, what: &str) -> Result<&'a [u8], GgufError> {
        let end = (self.at as u64)
            .checked_add(n)
            .filter(|&end| end <= MAX_HEADER_BYTES);
        let Some(end) = end else {
            return Err(self.damaged(format!(
                "{what} (at byte {}) is {n} bytes long, which makes a header of more than {MAX_HEADER_BYTES} bytes",
                self.at
            )));
        };
        let missing = end.saturating_sub(self.bytes.len() as u64);
        if missing > 0 {
            return Err(self.cut(format!("{what} reaches to byte {end}"), missing));
        }
        // In range: `end` is at most the length of a slice.
        let piece = &self.bytes[self.at..end as usize];
        self.at = end as usize;
        Ok(piece)
    }

    fn fixed<const N: usize>(&mut self, what: &str) -> Result<[u8; N], GgufError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64, what)?);
        Ok(out)
    }

    fn u32(&mut self, what: &str) -> Result<u32, GgufError> {
        self.fixed(what).map(u32::from_le_bytes)
    }

    fn u64(&mut self, what: &str) -> Result<u64, GgufError> {
        self.fixed(what).map(u64::from_le_bytes)
    }

    /// Takes the bytes of a string: a length as `u64`, then that many bytes.
    fn string(&mut self, what: &str) -> Result<&'a [u8], GgufError> {
        let len = self.u64(what)?;
        self.take(len, what)
    }

    /// Takes a key or a tensor name: not empty, not long, UTF-8, without control characters.
    fn name(&mut self, limit: u64, what: impl Fn() -> String) -> Result<String, GgufError> {
        let start = self.at;
        let len = self.u64(&what())?;
        if len == 0 || len > limit {
            let what = what();
            return Err(self.damaged(format!(
                "{what} (at byte {start}) is {len} bytes long; expected 1 to {limit}"
            )));
        }
        let bytes = self.take(len, &what())?;
        match std::str::from_utf8(bytes) {
            Ok(name) if !name.contains(char::is_control) => Ok(name.to_string()),
            Ok(name) => Err(self.damaged(format!(
                "{} (at byte {start}) holds control characters: {name:?}",
                what()
            ))),
            Err(_) => {
                let shown: String = String::from_utf8_lossy(bytes).chars().take(40).collect();
                Err(self.damaged(format!(
                    "{} (at byte {start}) is not UTF-8: {shown:?}",
                    what()
                )))
            }
        }
    }

    fn value(&mut self, key: &str) -> Result<Value, GgufError> {
        let what = format!("the value of '{key}'");
        let kind = self.u32(&what)?;
        Ok(match kind {
            0 => Value::U8(self.fixed::<1>(&what)?[0]),
            1 => Value::I8(i8::from_le_bytes(self.fixed(&what)?)),
            2 => Value::U16(u16::from_le_bytes(self.fixed(&what)?)),
            3 => Value::I16(i16::from_le_bytes(self.fixed(&what)?)),
            4 => Value::U32(u32::from_le_bytes(self.fixed(&what)?)),
            5 => Value::I32(i32::from_le_bytes(self.fixed(&what)?)),
            6 => Value::F32(f32::from_le_bytes(self.fixed(&what)?)),
            7 => Value::Bool(self.fixed::<1>(&what)?[0] != 0),
            8 => Value::Str(String::from_utf8_lossy(self.string(&what)?).into_owned()),
            9 => Value::Array(self.array(key, &what)?),
            10 => Value::U64(u64::from_le_bytes(self.fixed(&what)?)),
            11 => Value::I64(i64::from_le_bytes(self.fixed(&what)?)),
            12 => Value::F64(f64::from_le_bytes(self.fixed(&what)?)),
            _ => {
                return Err(self.damaged(format!(
                    "{what} has type {kind}; expected a type from 0 to 12"
                )));
            }
        })
    }

    fn array(&mut self, key: &str, what: &str) -> Result<ArrayValue, GgufError> {
        let kind = self.u32(what)?;
        let count = self.u64(what)?;
        if count > MAX_ARRAY {
            return Err(self.damaged(format!(
                "'{key}' claims {count} elements, but at most {MAX_ARRAY} are read"
            )));
        }
        Ok(match kind {
            0 => ArrayValue::U8(self.numbers(count, what, u8::from_le_bytes)?),
            1 => ArrayValue::I8(self.numbers(count, what, i8::from_le_bytes)?),
            2 => ArrayValue::U16(self.numbers(count, what, u16::from_le_bytes)?),
            3 => ArrayValue::I16(self.numbers(count, what, i16::from_le_bytes)?),
            4 => ArrayValue::U32(self.numbers(count, what, u32::from_le_bytes)?),
            5 => ArrayValue::I32(self.numbers(count, what, i32::from_le_bytes)?),
            6 => ArrayValue::F32(self.numbers(count, what, f32::from_le_bytes)?),
            7 => ArrayValue::Bool(self.numbers(count, what, |[b]| b != 0)?),
            8 => {
                self.plausible(count, 8, MAX_ARRAY, &format!("strings in '{key}'"))?;
                let mut strings = Vec::with_capacity(self.room(count, 8));
                for _ in 0..count {
                    strings.push(String::from_utf8_lossy(self.string(what)?).into_owned());
                }
                ArrayValue::Str(strings)
            }
            9 => {
                return Err(self.damaged(format!(
                    "{what} is an array of arrays, which no model needs"
                )));
            }
            10 => ArrayValue::U64(self.numbers(count, what, u64::from_le_bytes)?),
            11 => ArrayValue::I64(self.numbers(count, what, i64::from_le_bytes)?),
            12 => ArrayValue::F64(self.numbers(count, what, f64::from_le_bytes)?),
            _ => {
                return Err(self.damaged(format!(
                    "{what} is an array of type {kind}; expected a type from 0 to 12"
                )));
            }
        })
    }

    /// Takes `count` numbers of `N` bytes each. Allocates only once their bytes are there.
    fn numbers<const N: usize, T>(
        &mut self,
        count: u64,
        what: &str,
        from: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>, GgufError> {
        // Cannot overflow: the count is at most MAX_ARRAY.
        let bytes = self.take(count * N as u64, what)?;
        let (whole, _) = bytes.as_chunks::<N>();
        Ok(whole.iter().map(|&b| from(b)).collect())
    }

    /// Takes one tensor's description. Its `offset` is still relative to the data section.
    fn tensor(&mut self, name: &str, alignment: u64) -> Result<TensorInfo, GgufError> {
        let what = format!("the description of tensor '{name}'");
        let n_dims = self.u32(&what)?;
        if n_dims > 4 {
            return Err(self.damaged(format!(
                "tensor '{name}' has {n_dims} dimensions; expected 1 to 4"
            )));
        }
        let mut dims = Vec::with_capacity(4);
        for _ in 0..n_dims {
            dims.push(self.u64(&what)?);
        }
        if dims.is_empty() {
            // A lone number.
            dims.push(1);
        }
        let type_id = self.u32(&what)?;
        let offset = self.u64(&what)?;
        let ty = TensorType::from_id(type_id).map_err(|_| GgufError::UnsupportedType {
            path: self.path.to_path_buf(),
            tensor: name.to_string(),
            type_id,
            supported: TensorType::ALL.map(TensorType::name).join(", "),
        })?;
        let n_bytes = tensor_bytes(&dims, ty)
            .map_err(|why| self.damaged(format!("tensor '{name}' {why}")))?;
        if !offset.is_multiple_of(alignment) {
            return Err(self.damaged(format!(
                "tensor '{name}': offset {offset} is not a multiple of the alignment {alignment}"
            )));
        }
        Ok(TensorInfo {
            name: name.to_string(),
            dims,
            ty,
            part: 0,
            offset,
            n_bytes,
            slices: Vec::new(),
        })
    }
}

/// Returns the bytes of a tensor, or what is wrong with its dimensions.
fn tensor_bytes(dims: &[u64], ty: TensorType) -> Result<u64, String> {
    if dims.contains(&0) {
        return Err(format!("has dimensions {dims:?}, one of which is 0"));
    }
    let cols = dims.first().copied().unwrap_or(1);
    let block = ty.block_len();
    if !cols.is_multiple_of(block as u64) {
        return Err(format!(
            "has rows of {cols} values, not a multiple of the {block} values in a block of {ty}"
        ));
    }
    let elements = dims.iter().try_fold(1u64, |n, &d| n.checked_mul(d));
    let rows = dims[1..].iter().try_fold(1u64, |n, &d| n.checked_mul(d));
    let bytes = ty
        .row_bytes(cols)
        .zip(rows)
        .and_then(|(row, rows)| row.checked_mul(rows));
    // Signed sizes are what memory and files are counted in elsewhere.
    bytes
        .zip(elements)
        .filter(|&(b, n)| i64::try_from(b).is_ok() && i64::try_from(n).is_ok())
        .map(|(b, _)| b)
        .ok_or_else(|| format!("has dimensions {dims:?}, whose product is too large for any file"))
}
