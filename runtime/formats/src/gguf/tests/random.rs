//! Random files: what is written reads back, and what is broken is refused without a panic or a
//! wild allocation.

use super::super::testing::Writer;
use super::super::{ArrayValue, Header, Value};
use super::fixture;
use proptest::collection::vec;
use proptest::prelude::*;
use std::path::Path;
use tier_plan_kernels::quant::TensorType;

fn decode(bytes: &[u8]) -> Option<Header> {
    match Header::decode(bytes, Path::new("m.gguf")) {
        Ok(header) => Some(header),
        // The message is made too: it must not panic either.
        Err(e) => {
            assert!(e.to_string().len() < 4000 + 6 * bytes.len());
            None
        }
    }
}

fn value() -> impl Strategy<Value = Value> {
    let text = "[a-zß☃]{0,12}";
    prop_oneof![
        any::<u8>().prop_map(Value::U8),
        any::<i8>().prop_map(Value::I8),
        any::<u16>().prop_map(Value::U16),
        any::<i16>().prop_map(Value::I16),
        any::<u32>().prop_map(Value::U32),
        any::<i32>().prop_map(Value::I32),
        any::<u64>().prop_map(Value::U64),
        any::<i64>().prop_map(Value::I64),
        any::<f32>().prop_map(Value::F32),
        any::<f64>().prop_map(Value::F64),
        any::<bool>().prop_map(Value::Bool),
        text.prop_map(Value::Str),
        vec(any::<u8>(), 0..20).prop_map(|a| Value::Array(ArrayValue::U8(a))),
        vec(any::<i8>(), 0..20).prop_map(|a| Value::Array(ArrayValue::I8(a))),
        vec(any::<u16>(), 0..20).prop_map(|a| Value::Array(ArrayValue::U16(a))),
        vec(any::<i16>(), 0..20).prop_map(|a| Value::Array(ArrayValue::I16(a))),
        vec(any::<u32>(), 0..20).prop_map(|a| Value::Array(ArrayValue::U32(a))),
        vec(any::<i32>(), 0..20).prop_map(|a| Value::Array(ArrayValue::I32(a))),
        vec(any::<u64>(), 0..20).prop_map(|a| Value::Array(ArrayValue::U64(a))),
        vec(any::<i64>(), 0..20).prop_map(|a| Value::Array(ArrayValue::I64(a))),
        vec(any::<f32>(), 0..20).prop_map(|a| Value::Array(ArrayValue::F32(a))),
        vec(any::<f64>(), 0..20).prop_map(|a| Value::Array(ArrayValue::F64(a))),
        vec(any::<bool>(), 0..20).prop_map(|a| Value::Array(ArrayValue::Bool(a))),
        vec(text, 0..20).prop_map(|a| Value::Array(ArrayValue::Str(a))),
    ]
}

/// Tensors by type, blocks a row, and further dimensions.
fn tensors() -> impl Strategy<Value = Vec<(TensorType, u64, Vec<u64>)>> {
    let ty = (0..TensorType::ALL.len()).prop_map(|i| TensorType::ALL[i]);
    vec((ty, 1..4u64, vec(1..4u64, 0..=3)), 0..6)
}

prop_compose! {
    fn file()(
        values in vec(value(), 0..8),
        tensors in tensors(),
        align in prop_oneof![Just(None), (3..9u32).prop_map(|p| Some(1u32 << p))],
        version in 2..=3u32,
    ) -> Writer {
        let mut w = Writer { version, ..Writer::default() };
        if let Some(align) = align {
            w.alignment = align.into();
            w = w.key("general.alignment", Value::U32(align));
        }
        for (i, v) in values.into_iter().enumerate() {
            w = w.key(&format!("key.{i}"), v);
        }
        for (i, (ty, blocks, rest)) in tensors.into_iter().enumerate() {
            let mut dims = vec![blocks * ty.block_len() as u64];
            dims.extend(&rest);
            let bytes = blocks * ty.block_bytes() as u64 * rest.iter().product::<u64>();
            w = w.tensor(&format!("tensor.{i}"), ty, &dims, vec![i as u8; bytes as usize]);
        }
        w
    }
}

/// Bytes that the decoded header takes on the heap, at least.
fn heap_bytes(h: &Header) -> usize {
    let value = |v: &Value| match v {
        Value::Str(s) => s.capacity(),
        Value::Array(ArrayValue::Str(a)) => {
            a.capacity() * 24 + a.iter().map(String::capacity).sum::<usize>()
        }
        Value::Array(a) => a.len() * 8,
        _ => 0,
    };
    let keys: usize = h
        .metadata
        .iter()
        .map(|(k, v)| k.capacity() + value(v))
        .sum();
    let tensors: usize = h
        .tensors
        .iter()
        .map(|t| t.name.capacity() + t.dims.capacity() * 8)
        .sum();
    keys + tensors
        + h.metadata.capacity() * size_of::<(String, Value)>()
        + h.tensors.capacity() * size_of::<super::super::TensorInfo>()
}

/// What must hold of every header that is accepted, whatever the bytes.
fn check(h: &Header, bytes: &[u8]) {
    assert!(
        heap_bytes(h) <= 64 * bytes.len(),
        "{} bytes decoded from {}",
        heap_bytes(h),
        bytes.len()
    );
    assert!(h.alignment.is_power_of_two());
    assert!(h.header_bytes <= bytes.len() as u64);
    for t in &h.tensors {
        assert!((1..=4).contains(&t.dims.len()));
        assert_eq!(t.offset % h.alignment, 0);
        assert!(t.offset >= h.header_bytes && t.offset + t.n_bytes <= bytes.len() as u64);
        assert_eq!(
            t.ty.row_bytes(t.cols()).map(|row| row * t.rows()),
            Some(t.n_bytes)
        );
    }
}

/// Equal, NaN to NaN: compared by what a writer makes of them.
fn same_bytes(a: &Writer, metadata: Vec<(String, Value)>) -> bool {
    let b = Writer {
        metadata,
        ..a.clone()
    };
    a.header() == b.header()
}

proptest! {
    #[test]
    fn what_is_written_reads_back(w in file()) {
        let bytes = w.finish();
        let h = decode(&bytes).expect("a right file");
        check(&h, &bytes);
        prop_assert_eq!(h.version, w.version);
        prop_assert_eq!(h.header_bytes, w.header().len() as u64);
        prop_assert!(same_bytes(&w, h.metadata.clone()));
        prop_assert_eq!(h.tensors.len(), w.tensors.len());
        for (t, written) in h.tensors.iter().zip(&w.tensors) {
            prop_assert_eq!(&t.name, &written.name);
            prop_assert_eq!(&t.dims, &written.dims);
            prop_assert_eq!(&bytes[t.offset as usize..][..t.n_bytes as usize], &written.data[..]);
        }
    }

    #[test]
    fn a_cut_file_is_refused(w in file(), cut in any::<prop::sample::Index>()) {
        let bytes = w.finish();
        let keep = cut.index(bytes.len());
        prop_assert!(decode(&bytes[..keep]).is_none());
    }

    #[test]
    fn changed_bytes_do_no_harm(
        w in file(),
        changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        keep in any::<prop::sample::Index>(),
        cut in any::<bool>(),
    ) {
        let mut bytes = w.finish();
        let header = w.header().len();
        for (at, byte) in changes {
            bytes[at.index(header)] = byte;
        }
        if cut {
            bytes.truncate(keep.index(bytes.len()));
        }
        if let Some(h) = decode(&bytes) {
            check(&h, &bytes);
        }
    }

    #[test]
    fn noise_after_the_magic_does_no_harm(noise in vec(any::<u8>(), 0..200), keys in 0..4u8, tensors in 0..4u8) {
        let mut bytes = b"GGUF\x03\0\0\0".to_vec();
        bytes.extend([tensors, 0, 0, 0, 0, 0, 0, 0, keys, 0, 0, 0, 0, 0, 0, 0]);
        bytes.extend(noise);
        if let Some(h) = decode(&bytes) {
            check(&h, &bytes);
        }
    }

    #[test]
    fn noise_does_no_harm(noise in vec(any::<u8>(), 0..600)) {
        decode(&noise);
    }
}

/// Every 64-bit word of a right header, replaced by the numbers that arithmetic goes wrong at.
#[test]
fn extreme_numbers_anywhere_do_no_harm() {
    let right = std::fs::read(fixture("tiny-v3.gguf")).unwrap();
    let header = decode(&right).unwrap().header_bytes as usize;
    let words = [
        0,
        1,
        u64::MAX,
        u64::MAX - 7,
        1 << 63,
        (1 << 63) - 1,
        1 << 32,
        u32::MAX.into(),
        1 << 24,
        1 << 20,
    ];
    for at in 4..header - 8 {
        for word in words {
            let mut bytes = right.clone();
            bytes[at..at + 8].copy_from_slice(&word.to_le_bytes());
            if let Some(h) = decode(&bytes) {
                check(&h, &bytes);
            }
        }
    }
}
