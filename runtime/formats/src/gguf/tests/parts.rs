//! Split models.

use super::super::testing::Writer;
use super::super::{Gguf, Value};
use super::{fixture, says};
use std::path::{Path, PathBuf};
use tier_plan_kernels::quant::TensorType;

/// Part `no` (from 0) of `count`, with one tensor.
fn part(no: u16, count: u16, total: i32, tensor: &str) -> Vec<u8> {
    Writer::default()
        .key("split.no", Value::U16(no))
        .key("split.count", Value::U16(count))
        .key("split.tensors.count", Value::I32(total))
        .tensor(tensor, TensorType::F32, &[8], vec![no as u8; 32])
        .finish()
}

fn put(dir: &Path, name: &str, bytes: &[u8]) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, bytes).unwrap();
    path
}

fn message(path: &Path) -> String {
    Gguf::open(path).unwrap_err().to_string()
}

#[test]
fn parts_joined_by_bytes_are_no_model() {
    let folder = tempfile::tempdir().unwrap();
    let mut bytes = part(0, 2, 2, "a");
    bytes.extend(part(1, 2, 2, "b"));
    for name in ["m.gguf", "m-00001-of-00002.gguf"] {
        let path = put(folder.path(), name, &bytes);
        let message = message(&path);
        assert!(message.contains("joined by bytes"), "{message}");
    }
}

#[test]
fn any_part_opens_the_whole_model() {
    let mut ids = Vec::new();
    for number in 1..=3 {
        let g = Gguf::open(&fixture(&format!("parts-0000{number}-of-00003.gguf"))).unwrap();
        assert_eq!(g.n_parts(), 3);
        assert_eq!(g.file_bytes(), 192 + 320 + 320);
        assert_eq!(g.path(), fixture("parts-00001-of-00003.gguf"));
        assert_eq!(g.part_path(2), fixture("parts-00003-of-00003.gguf"));
        let at: Vec<_> = g
            .tensors()
            .iter()
            .map(|t| (t.name.as_str(), t.part))
            .collect();
        assert_eq!(at, [("t0", 1), ("t1", 1), ("t2", 2), ("t3", 2)]);
        for (i, t) in g.tensors().iter().enumerate() {
            assert_eq!(t.dims, [8, 2]);
            assert!(
                g.bytes(t)
                    .as_chunks::<4>()
                    .0
                    .iter()
                    .all(|&b| f32::from_le_bytes(b) == i as f32),
                "{}",
                t.name
            );
        }
        ids.push(g.id());
    }
    assert_eq!(ids[0].name, "In parts");
    assert!(ids.iter().all(|id| *id == ids[0]));
}

#[test]
fn a_name_without_general_name_leaves_the_part_off() {
    let dir = tempfile::tempdir().unwrap();
    let first = put(dir.path(), "Big-00001-of-00002.gguf", &part(0, 2, 2, "a"));
    put(dir.path(), "Big-00002-of-00002.gguf", &part(1, 2, 2, "b"));
    assert_eq!(Gguf::open(&first).unwrap().id().name, "Big");
}

#[test]
fn a_missing_part_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let third = put(dir.path(), "m-00003-of-00003.gguf", &part(2, 3, 3, "c"));
    put(dir.path(), "m-00001-of-00003.gguf", &part(0, 3, 3, "a"));
    says(
        &message(&third),
        &[
            "m-00002-of-00003.gguf",
            "part 2 of 3 is missing",
            "download it into the same folder",
        ],
    );
}

#[test]
fn a_part_of_another_place_or_split_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let first = put(dir.path(), "m-00001-of-00002.gguf", &part(0, 2, 2, "a"));
    put(dir.path(), "m-00002-of-00002.gguf", &part(0, 2, 2, "a"));
    says(
        &message(&first),
        &[
            "m-00002-of-00002.gguf",
            "name says part 2 of 2",
            "file says part 1 of 2",
        ],
    );
    put(dir.path(), "m-00002-of-00002.gguf", &part(1, 5, 2, "b"));
    says(
        &message(&first),
        &["m-00002-of-00002.gguf", "file says part 2 of 5"],
    );
    put(
        dir.path(),
        "m-00002-of-00002.gguf",
        &Writer::default().finish(),
    );
    says(
        &message(&first),
        &["m-00002-of-00002.gguf", "part 2 of 2", "another model"],
    );
    put(
        dir.path(),
        "m-00002-of-00002.gguf",
        &part(1, 2, 2, "b")[..150],
    );
    says(&message(&first), &["m-00002-of-00002.gguf", "cut short"]);
}

#[test]
fn a_renamed_part_is_asked_to_take_its_name_back() {
    let dir = tempfile::tempdir().unwrap();
    let renamed = put(dir.path(), "model.gguf", &part(1, 3, 3, "a"));
    says(
        &message(&renamed),
        &["part 2 of 3", "'-00002-of-00003.gguf'"],
    );
    let shifted = put(dir.path(), "m-00001-of-00003.gguf", &part(1, 3, 3, "a"));
    says(
        &message(&shifted),
        &["name says part 1 of 3", "file says part 2 of 3"],
    );
}

#[test]
fn parts_of_two_releases_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let first = put(dir.path(), "m-00001-of-00002.gguf", &part(0, 2, 3, "a"));
    put(dir.path(), "m-00002-of-00002.gguf", &part(1, 2, 3, "b"));
    says(
        &message(&first),
        &["3 tensors", "2 parts hold 2", "download all parts again"],
    );
    put(dir.path(), "m-00002-of-00002.gguf", &part(1, 2, 3, "a"));
    says(
        &message(&first),
        &[
            "tensor 'a'",
            "m-00001-of-00002.gguf",
            "m-00002-of-00002.gguf",
        ],
    );
}

#[test]
fn split_keys_of_the_wrong_kind_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let open = |w: Writer| message(&put(dir.path(), "m-00001-of-00002.gguf", &w.finish()));
    let count = Writer::default().key("split.count", Value::U16(2));
    says(
        &open(count.clone()),
        &["split.count is 2", "split.no is missing"],
    );
    says(
        &open(count.key("split.no", Value::U16(2))),
        &["'split.no'", "from 0 to 1", "u16 2"],
    );
    let text = Writer::default().key("split.count", Value::Str("2".into()));
    says(&open(text), &["'split.count'", "string \"2\""]);
    let many = Writer::default().key("split.count", Value::U64(u64::MAX));
    says(&open(many), &["'split.count'", "99999"]);
}

#[test]
fn a_whole_model_may_be_named_like_a_part() {
    let dir = tempfile::tempdir().unwrap();
    let w = Writer::default()
        .key("split.count", Value::U16(1))
        .key("split.no", Value::U16(0));
    let path = put(dir.path(), "m-00001-of-00001.gguf", &w.finish());
    assert_eq!(Gguf::open(&path).unwrap().n_parts(), 1);
    let path = put(
        dir.path(),
        "m-00002-of-00003.gguf",
        &Writer::default().finish(),
    );
    assert_eq!(Gguf::open(&path).unwrap().n_parts(), 1);
}
