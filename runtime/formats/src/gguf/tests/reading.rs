//! Right files, written by the reference package (`tests/data/gguf/make.py`).

use super::super::{Advice, ArrayValue, Gguf, Value};
use super::{fixture, repository};
use std::fmt::Write;
use tier_plan_kernels::quant::TensorType;

fn f32s(bytes: &[u8]) -> Vec<f32> {
    bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|&b| f32::from_le_bytes(b))
        .collect()
}

#[test]
fn the_bundled_model_lies_where_the_reference_reader_says() {
    let g = Gguf::open(&repository("profiles/demo/demo.gguf")).unwrap();
    let mut listed = String::new();
    for t in g.tensors() {
        let dims: Vec<String> = t.dims.iter().map(u64::to_string).collect();
        writeln!(
            listed,
            "{}\t{}\t{}\t{}\t{}",
            t.name,
            dims.join("x"),
            t.ty,
            t.offset,
            t.n_bytes
        )
        .unwrap();
        assert_eq!(g.bytes(t).len() as u64, t.n_bytes);
    }
    let reference = std::fs::read_to_string(fixture("demo.tensors.tsv")).unwrap();
    assert_eq!(listed, reference.replace("\r\n", "\n"));
}

#[test]
fn the_bundled_model_has_the_published_id() {
    let g = Gguf::open(&repository("profiles/demo/demo.gguf")).unwrap();
    let id = g.id();
    assert_eq!(id.name, "tier-plan demo");
    // As make.py computes it with another implementation of the hash.
    assert_eq!(id.hash, "8d83d5d15f7a770be807538e045a2b3f");
    assert_eq!(g.n_parts(), 1);
    assert_eq!(g.file_bytes(), std::fs::metadata(g.path()).unwrap().len());
    assert_eq!(g.str_array("tokenizer.ggml.tokens").unwrap().len(), 4096);
}

#[test]
fn every_kind_of_value_reads() {
    for name in ["tiny-v2.gguf", "tiny-v3.gguf"] {
        let g = Gguf::open(&fixture(name)).unwrap();
        let strings = |a: &[&str]| ArrayValue::Str(a.iter().map(|s| s.to_string()).collect());
        let expected = [
            ("general.architecture", Value::Str("tiny".into())),
            ("general.name", Value::Str("A tiny model".into())),
            ("general.alignment", Value::U32(64)),
            ("v.u8", Value::U8(200)),
            ("v.i8", Value::I8(-100)),
            ("v.u16", Value::U16(60_000)),
            ("v.i16", Value::I16(-30_000)),
            ("v.u32", Value::U32(4_000_000_000)),
            ("v.i32", Value::I32(-2_000_000_000)),
            ("v.u64", Value::U64(18_000_000_000_000_000_000)),
            ("v.i64", Value::I64(-9_000_000_000_000_000_000)),
            ("v.f32", Value::F32(0.5)),
            ("v.f64", Value::F64(0.25)),
            ("v.bool", Value::Bool(true)),
            ("v.str", Value::Str("Grüße".into())),
            ("a.str", Value::Array(strings(&["a", "", "ß"]))),
            ("a.i32", Value::Array(ArrayValue::I32(vec![1, -2, 3]))),
            ("a.f32", Value::Array(ArrayValue::F32(vec![0.5, -1.5]))),
            ("a.bool", Value::Array(ArrayValue::Bool(vec![true, false]))),
        ];
        let found: Vec<_> = g
            .metadata()
            .iter()
            .map(|(k, v)| (k.as_str(), v.clone()))
            .collect();
        assert_eq!(found, expected, "{name}");
    }
}

#[test]
fn tensors_are_found_and_read() {
    let g = Gguf::open(&fixture("tiny-v3.gguf")).unwrap();
    let t = g.tensor("f32").unwrap();
    assert_eq!(
        (t.dims.as_slice(), t.ty, t.part),
        ([5, 3].as_slice(), TensorType::F32, 0)
    );
    assert_eq!((t.cols(), t.rows(), t.n_elements()), (5, 3, 15));
    assert_eq!(
        f32s(g.bytes(t)),
        (0..15).map(|i| i as f32).collect::<Vec<_>>()
    );
    let t = g.tensor("q8").unwrap();
    assert_eq!(
        (t.dims.as_slice(), t.ty, t.n_bytes),
        ([64, 2, 4].as_slice(), TensorType::Q8_0, 544)
    );
    assert_eq!(t.offset % 64, 0);
    assert!(
        g.bytes(t)
            .iter()
            .enumerate()
            .all(|(i, &b)| usize::from(b) == i % 251)
    );
    assert!(g.tensor("q4").is_none());
}

#[test]
fn hints_may_be_given_for_any_range() {
    let g = Gguf::open(&fixture("tiny-v3.gguf")).unwrap();
    for advice in [
        Advice::Normal,
        Advice::Random,
        Advice::Sequential,
        Advice::WillNeed,
    ] {
        g.advise_all(advice);
        for t in g.tensors() {
            g.advise(t, 0, t.n_bytes, advice);
            g.advise(t, 7, u64::MAX, advice);
            g.advise(t, u64::MAX, u64::MAX, advice);
        }
    }
}

#[test]
fn one_name_or_length_more_makes_another_id() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = std::fs::read(fixture("tiny-v3.gguf")).unwrap();
    let hash = |name: &str, bytes: &[u8]| {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes).unwrap();
        Gguf::open(&path).unwrap().id().hash
    };
    let original = hash("a.gguf", &bytes);
    assert_eq!(original.len(), 32);
    assert_eq!(
        hash("b.gguf", &bytes),
        original,
        "the file's name is no part of the hash"
    );
    let mut weights = bytes.clone();
    *weights.last_mut().unwrap() ^= 1;
    assert_eq!(
        hash("c.gguf", &weights),
        original,
        "weights are not read for the hash"
    );
    let mut header = bytes.clone();
    let at = header.windows(4).position(|w| w == b"v.u8").unwrap();
    header[at] = b'w';
    assert_ne!(hash("d.gguf", &header), original);
    let mut longer = bytes;
    longer.push(0);
    assert_ne!(hash("e.gguf", &longer), original);
}

#[test]
fn a_copy_in_memory_has_the_same_bytes() {
    let mapped = Gguf::open(&repository("profiles/demo/demo.gguf")).unwrap();
    for threads in [1, 3] {
        let mut copied = Gguf::open(mapped.path()).unwrap();
        let mut told = 0;
        copied
            .copy_to_memory(threads, &mut |done, total| {
                told = done * u64::from(done <= total)
            })
            .unwrap();
        assert_eq!(told, mapped.file_bytes());
        assert!(copied.is_copied() && !mapped.is_copied());
        for (a, b) in copied.tensors().iter().zip(mapped.tensors()) {
            assert_eq!(copied.bytes(a), mapped.bytes(b), "{}", a.name);
        }
    }
}

#[test]
fn a_file_that_changed_is_not_copied() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    std::fs::copy(repository("profiles/demo/demo.gguf"), &path).unwrap();
    let mut gguf = Gguf::open(&path).unwrap();
    // Longer: a mapping of a shortened file would end this process.
    std::fs::OpenOptions::new()
        .append(true)
        .open(&path)
        .unwrap()
        .set_len(gguf.file_bytes() + 1)
        .unwrap();
    let error = gguf
        .copy_to_memory(2, &mut |_, _| ())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("model.gguf") && error.contains("changed"),
        "{error}"
    );
    assert!(!gguf.is_copied());
}
