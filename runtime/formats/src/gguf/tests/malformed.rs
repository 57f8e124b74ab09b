//! Wrong files, each with what its message must say.

use super::super::testing::{Writer, WriterTensor, put_bytes};
use super::super::{Gguf, GgufError, Header, Value};
use super::{fixture, says};
use std::path::Path;
use tier_plan_kernels::quant::TensorType;

fn message(bytes: &[u8]) -> String {
    Header::decode(bytes, Path::new("m.gguf"))
        .unwrap_err()
        .to_string()
}

/// A header with these counts and this body.
fn raw(n_tensors: u64, n_keys: u64, body: &[u8]) -> Vec<u8> {
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend(n_tensors.to_le_bytes());
    out.extend(n_keys.to_le_bytes());
    out.extend(body);
    out
}

/// One key with a value of these raw bytes, padded so that counts look plausible.
fn raw_value(kind: u32, value: &[u8]) -> Vec<u8> {
    let mut body = Vec::new();
    put_bytes(&mut body, b"k");
    body.extend(kind.to_le_bytes());
    body.extend(value);
    raw(0, 1, &body)
}

fn tensor(name: &str, type_id: u32, dims: &[u64], bytes: usize) -> Writer {
    let mut w = Writer::default();
    w.tensors.push(WriterTensor {
        name: name.into(),
        dims: dims.to_vec(),
        type_id,
        data: vec![0; bytes],
    });
    w
}

#[test]
fn other_kinds_of_files_are_recognized() {
    let mut tar = vec![b'a'; 512];
    tar[257..262].copy_from_slice(b"ustar");
    let mut safetensors = 20u64.to_le_bytes().to_vec();
    safetensors.extend(b"{\"__metadata__\":{}}    ");
    let cases: [(&[u8], &[&str]); 14] = [
        (b"", &["is empty", "download"]),
        (b"PK\x03\x04rest", &["ZIP", "PyTorch", "convert"]),
        (&safetensors, &["safetensors", "convert"]),
        (b"\n<!DOCTYPE html><html>", &["web page", "direct link"]),
        (b"<HTML>", &["web page"]),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4815162342\n",
            &["Git LFS pointer", "4815162342 bytes", "git lfs pull"],
        ),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            &["Git LFS pointer", "git lfs pull"],
        ),
        (b"\x1f\x8b\x08", &["gzip", "unpack"]),
        (&tar, &["tar archive"]),
        (b"tjgg\x01\0\0\0", &["GGJT", "before GGUF", "convert"]),
        (b"FUGG\0\0\0\x03", &["big-endian", "little-endian"]),
        (&[0; 64], &["zeros", "download"]),
        (b"Entry not found", &["text that begins", "Entry not found"]),
        (
            b"\xde\xad\xbe\xef\x01\x02",
            &["[de, ad, be, ef]", "not with 'GGUF'"],
        ),
    ];
    for (bytes, pieces) in cases {
        let m = message(bytes);
        says(&m, &["m.gguf: not a GGUF model"]);
        says(&m, pieces);
    }
}

#[test]
fn other_versions_are_refused_by_number() {
    let version = |v: u32| {
        message(
            &Writer {
                version: v,
                ..Writer::default()
            }
            .finish(),
        )
    };
    says(&version(1), &["version 1", "versions 2 and 3", "convert"]);
    says(
        &version(4),
        &["version 4", "versions 2 and 3", "update tier-plan"],
    );
    says(&version(0), &["version is 0"]);
    let e = Gguf::open(&fixture("tiny-big-endian.gguf")).unwrap_err();
    says(
        &e.to_string(),
        &[
            "tiny-big-endian.gguf",
            "version 3 in big-endian byte order",
            "little-endian",
        ],
    );
}

#[test]
fn a_cut_file_says_how_much_is_missing() {
    let whole = std::fs::read(fixture("tiny-v3.gguf")).unwrap();
    // The last tensor ends before the padding at the end of the file.
    let end = Header::decode(&whole, Path::new("m.gguf"))
        .unwrap()
        .tensors
        .last()
        .map(|t| t.offset + t.n_bytes)
        .unwrap();
    for (keep, pieces) in [
        (
            end - 1,
            ["tensor 'q8' reaches to byte", " 1 bytes are missing"],
        ),
        (
            end - 300,
            ["tensor 'q8' reaches to byte", " 300 bytes are missing"],
        ),
        (500, ["at least", "are missing"]),
        (60, ["claims 19 metadata keys", "at least"]),
        (
            20,
            ["number of metadata keys", "at least 4 bytes are missing"],
        ),
        (6, ["version", "at least 2 bytes are missing"]),
        (2, ["magic", "at least 2 bytes are missing"]),
    ] {
        let m = message(&whole[..keep as usize]);
        says(
            &m,
            &[
                "m.gguf: the file is cut short",
                &format!("only {keep} bytes"),
                "download it again",
            ],
        );
        says(&m, &pieces);
    }
    assert!(
        Header::decode(&whole[..end as usize], Path::new("m.gguf")).is_ok(),
        "padding at the end is not needed"
    );
}

#[test]
fn wild_counts_are_refused_before_anything_is_allocated() {
    says(
        &message(&raw(1 << 60, 0, &[])),
        &["claims 1152921504606846976 tensors", "at most 1048576"],
    );
    says(
        &message(&raw(0, u64::MAX, &[])),
        &["claims 18446744073709551615 metadata keys", "at most"],
    );
    says(
        &message(&raw(1 << 20, 0, &[])),
        &[
            "claims 1048576 tensors",
            "at least 26214400 bytes are missing",
        ],
    );
    // An array of 2^62 f32, one of 2^24 f64, one of 2^24 strings, a string of 2^63 bytes.
    let array = |kind: u32, n: u64| [&kind.to_le_bytes()[..], &n.to_le_bytes()[..]].concat();
    says(
        &message(&raw_value(9, &array(6, 1 << 62))),
        &[
            "'k' claims 4611686018427387904 elements",
            "at most 16777216",
        ],
    );
    says(
        &message(&raw_value(9, &array(12, 1 << 24))),
        &["value of 'k'", "at least 134217728 bytes are missing"],
    );
    says(
        &message(&raw_value(9, &array(8, 1 << 24))),
        &["16777216 strings in 'k'", "at least 134217728 bytes"],
    );
    says(
        &message(&raw_value(8, &(1u64 << 63).to_le_bytes())),
        &["value of 'k'", "9223372036854775808 bytes long"],
    );
    says(
        &message(&raw_value(8, &u64::MAX.to_le_bytes())),
        &["value of 'k'", "18446744073709551615 bytes long"],
    );
}

#[test]
fn keys_must_be_clean_and_unique() {
    let named = |name: &[u8]| {
        let mut body = Vec::new();
        put_bytes(&mut body, name);
        body.extend([0; 16]);
        message(&raw(0, 1, &body))
    };
    says(
        &named(b""),
        &["name of metadata key 0", "0 bytes long", "1 to 65535"],
    );
    says(&named(b"a\xffb"), &["name of metadata key 0", "not UTF-8"]);
    says(
        &named(b"a\x1b[2J"),
        &["name of metadata key 0", "control characters", "\\u{1b}"],
    );
    says(
        &named(&[b'a'; 70_000]),
        &["name of metadata key 0", "70000 bytes long"],
    );
    let twice = Writer::default()
        .key("a.b", Value::U8(1))
        .key("a.b", Value::U8(2));
    says(
        &message(&twice.finish()),
        &["metadata key 'a.b' appears twice", "damaged"],
    );
}

#[test]
fn values_must_have_a_known_kind() {
    says(
        &message(&raw_value(13, &[0; 8])),
        &["value of 'k' has type 13", "0 to 12"],
    );
    says(
        &message(&raw_value(9, &[99, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])),
        &["array of type 99", "0 to 12"],
    );
    says(
        &message(&raw_value(9, &[9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])),
        &["'k' is an array of arrays"],
    );
}

#[test]
fn values_need_not_be_utf8() {
    let header = Header::decode(
        &raw_value(8, b"\x03\0\0\0\0\0\0\0a\xffb"),
        Path::new("m.gguf"),
    )
    .unwrap();
    assert_eq!(
        header.metadata,
        [("k".to_string(), Value::Str("a\u{fffd}b".into()))]
    );
}

#[test]
fn the_alignment_must_be_a_sane_power_of_two() {
    for (bad, shown) in [
        (Value::U32(0), "u32 0"),
        (Value::U32(4), "u32 4"),
        (Value::U32(48), "u32 48"),
        (Value::U64(1 << 40), "u64 1099511627776"),
        (Value::I32(-32), "i32 -32"),
        (Value::F32(32.0), "f32 32"),
        (Value::Str("32".into()), "string \"32\""),
    ] {
        let m = message(&Writer::default().key("general.alignment", bad).finish());
        says(
            &m,
            &["general.alignment", "power of two from 8 to 1048576", shown],
        );
    }
}

#[test]
fn an_unknown_tensor_type_names_tensor_number_and_what_is_read() {
    for (id, shown) in [
        (9, "9 (Q8_1, a type of activations)"),
        (
            36,
            "36 (I2_S of bitnet.cpp, or a withdrawn repacked IQ4_NL)",
        ),
        (100, "100 (Q4_0_ROCMFP4 of ROCmFPX)"),
        (139, "139 (IQ4_K of ik_llama.cpp)"),
        (150, "150 (a type of ik_llama.cpp)"),
        (212, "212 (a repacked Q4_K of ik_llama.cpp)"),
        (344, "344 (a repacked IQ4_KS of ik_llama.cpp)"),
    ] {
        says(
            &message(&tensor("blk.3.ffn_up_exps.weight", id, &[64], 36).finish()),
            &[
                &format!("'blk.3.ffn_up_exps.weight' has type {shown}"),
                "Q4_K",
                "NVFP4",
                "choose another quantization",
            ],
        );
    }
    says(
        &message(&tensor("t", 1000, &[64], 36).finish()),
        &["'t' has type 1000,"],
    );
}

#[test]
fn dimensions_must_make_sense() {
    let f32 = TensorType::F32 as u32;
    let q4k = TensorType::Q4_K as u32;
    for (type_id, dims, pieces) in [
        (f32, vec![1; 5], ["'t' has 5 dimensions", "1 to 4"]),
        (f32, vec![8, 0], ["'t' has dimensions [8, 0]", "is 0"]),
        (
            q4k,
            vec![255, 2],
            ["rows of 255 values", "256 values in a block of Q4_K"],
        ),
        (
            f32,
            vec![1 << 32, 1 << 32],
            ["'t' has dimensions", "too large"],
        ),
        (
            f32,
            vec![1 << 31, 1 << 31, 1 << 31, 1 << 31],
            ["'t' has dimensions", "too large"],
        ),
        (f32, vec![u64::MAX], ["'t' has dimensions", "too large"]),
        // Fewer than 2^63 bytes, but more values than that.
        (
            TensorType::IQ1_S as u32,
            vec![1 << 32, 1 << 32],
            ["'t' has dimensions", "too large"],
        ),
        (
            TensorType::F16 as u32,
            vec![1 << 62],
            ["'t' has dimensions", "too large"],
        ),
    ] {
        says(&message(&tensor("t", type_id, &dims, 64).finish()), &pieces);
    }
    // 2^62 values of less than a byte each: no overflow, so the file is cut short.
    let m = message(&tensor("t", TensorType::IQ1_S as u32, &[1 << 62], 64).finish());
    says(
        &m,
        &["last tensor 't' reaches to byte", "bytes are missing"],
    );
}

#[test]
fn a_tensor_without_dimensions_is_one_number() {
    let header = Header::decode(&tensor("t", 0, &[], 4).finish(), Path::new("m.gguf")).unwrap();
    assert_eq!(
        (header.tensors[0].dims.as_slice(), header.tensors[0].n_bytes),
        ([1].as_slice(), 4)
    );
}

#[test]
fn tensors_must_lie_in_the_file_apart_and_aligned() {
    let two = || tensor("a", 0, &[8], 32).tensor("b", TensorType::F32, &[8], vec![0; 32]);
    // The second offset is the last number of the header.
    let moved = |offset: u64| {
        let w = two();
        let (end, mut bytes) = (w.header().len(), w.finish());
        bytes[end - 8..end].copy_from_slice(&offset.to_le_bytes());
        bytes
    };
    assert!(Header::decode(&moved(32), Path::new("m.gguf")).is_ok());
    says(
        &message(&moved(33)),
        &["'b': offset 33 is not a multiple", "alignment 32"],
    );
    says(
        &message(&moved(0)),
        &["'a' and 'b' lie on top of each other"],
    );
    says(
        &message(&moved(64)),
        &["'b' reaches to byte", " 32 bytes are missing"],
    );
    says(
        &message(&moved(u64::MAX - 31)),
        &["'b' has offset 18446744073709551584", "beyond any file"],
    );
}

#[test]
fn tensor_names_are_unique_and_clean() {
    let twice = tensor("a", 0, &[8], 32).tensor("a", TensorType::F32, &[8], vec![0; 32]);
    says(&message(&twice.finish()), &["tensor 'a' appears twice"]);
    says(
        &message(&tensor("", 0, &[8], 32).finish()),
        &["name of tensor 0", "0 bytes long"],
    );
    says(
        &message(&tensor("a\nb", 0, &[8], 32).finish()),
        &["name of tensor 0", "control characters"],
    );
    says(
        &message(&tensor(&"x".repeat(2000), 0, &[8], 32).finish()),
        &["name of tensor 0", "2000 bytes long"],
    );
}

#[test]
fn what_is_no_file_is_said_to_be_none() {
    let dir = tempfile::tempdir().unwrap();
    let absent = dir.path().join("absent.gguf");
    assert!(matches!(Gguf::open(&absent), Err(GgufError::Io { .. })));
    says(
        &Gguf::open(&absent).unwrap_err().to_string(),
        &["absent.gguf"],
    );
    says(
        &Gguf::open(dir.path()).unwrap_err().to_string(),
        &["folder", "name the .gguf file"],
    );
    #[cfg(unix)]
    says(
        &Gguf::open(Path::new("/dev/null")).unwrap_err().to_string(),
        &["/dev/null", "not a regular file"],
    );
    let empty = dir.path().join("empty.gguf");
    std::fs::write(&empty, []).unwrap();
    says(
        &Gguf::open(&empty).unwrap_err().to_string(),
        &["empty.gguf", "is empty"],
    );
}
