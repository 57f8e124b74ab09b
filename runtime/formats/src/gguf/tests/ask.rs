//! Typed questions to metadata.

use super::super::testing::Writer;
use super::super::{ArrayValue, Gguf, Value};
use super::says;
use tempfile::TempDir;

fn model() -> (TempDir, Gguf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m.gguf");
    let file = Writer::default()
        .key("u8", Value::U8(7))
        .key("i64", Value::I64(1 << 33))
        .key("negative", Value::I32(-1))
        .key("big", Value::U64(u64::MAX))
        .key("f32", Value::F32(1.5))
        .key("f64", Value::F64(1e-6))
        .key("huge", Value::F64(1e300))
        .key("odd", Value::U32(16_777_217))
        .key("yes", Value::Bool(true))
        .key("text", Value::Str("x".into()))
        .key("u64s", Value::Array(ArrayValue::U64(vec![1, 2, 3])))
        .key("i8s", Value::Array(ArrayValue::I8(vec![-1, 2])))
        .key("f64s", Value::Array(ArrayValue::F64(vec![0.5])))
        .key("bools", Value::Array(ArrayValue::Bool(vec![true])))
        .key("strings", Value::Array(ArrayValue::Str(vec!["a".into()])))
        .key("empty", Value::Array(ArrayValue::U32(vec![])));
    std::fs::write(&path, file.finish()).unwrap();
    let g = Gguf::open(&path).unwrap();
    (dir, g)
}

#[test]
fn answers_convert_where_nothing_is_lost() {
    let (_dir, g) = model();
    assert_eq!(g.u32("u8").unwrap(), 7);
    assert_eq!(g.u64("i64").unwrap(), 1 << 33);
    assert_eq!(g.u64("big").unwrap(), u64::MAX);
    assert_eq!(g.f32("f32").unwrap(), 1.5);
    assert_eq!(g.f32("f64").unwrap(), 1e-6);
    assert_eq!(g.f32("u8").unwrap(), 7.0);
    assert!(g.bool("yes").unwrap());
    assert_eq!(g.str("text").unwrap(), "x");
    assert_eq!(g.u32_array("u64s").unwrap(), [1, 2, 3]);
    assert_eq!(g.i32_array("i8s").unwrap(), [-1, 2]);
    assert_eq!(g.f32_array("f64s").unwrap(), [0.5]);
    assert_eq!(g.bool_array("bools").unwrap(), [true]);
    assert_eq!(g.str_array("strings").unwrap(), ["a"]);
    assert!(g.u32_array("empty").unwrap().is_empty());
}

#[test]
fn what_does_not_fit_is_refused() {
    let (_dir, g) = model();
    let refused: [(&str, String); 12] = [
        ("i64", g.u32("i64").unwrap_err().to_string()),
        ("negative", g.u32("negative").unwrap_err().to_string()),
        ("negative", g.opt_u64("negative").unwrap_err().to_string()),
        ("f32", g.u32("f32").unwrap_err().to_string()),
        ("huge", g.f32("huge").unwrap_err().to_string()),
        ("odd", g.f32("odd").unwrap_err().to_string()),
        ("u8", g.opt_bool("u8").unwrap_err().to_string()),
        ("u8", g.opt_str("u8").unwrap_err().to_string()),
        ("i8s", g.u32_array("i8s").unwrap_err().to_string()),
        ("strings", g.f32_array("strings").unwrap_err().to_string()),
        ("text", g.str_array("text").unwrap_err().to_string()),
        ("yes", g.u32_per_layer("yes", 3).unwrap_err().to_string()),
    ];
    for (key, message) in refused {
        says(
            &message,
            &[&format!("'{key}'"), "expected", "found", "m.gguf"],
        );
    }
    says(
        &g.u32("i64").unwrap_err().to_string(),
        &["an integer from 0 to 4294967295", "i64 8589934592"],
    );
    says(
        &g.u32("strings").unwrap_err().to_string(),
        &["array of 1 strings"],
    );
}

#[test]
fn an_absent_key_is_none_or_an_error_that_names_it() {
    let (_dir, g) = model();
    assert_eq!(g.opt_u32("no.such").unwrap(), None);
    assert_eq!(g.opt_str_array("no.such").unwrap(), None);
    assert_eq!(g.opt_u32_per_layer("no.such", 4).unwrap(), None);
    says(
        &g.u32("no.such").unwrap_err().to_string(),
        &["'no.such' is missing", "an integer", "convert it again"],
    );
}

#[test]
fn one_value_stands_for_every_layer() {
    let (_dir, g) = model();
    assert_eq!(g.u32_per_layer("u8", 3).unwrap(), [7, 7, 7]);
    assert_eq!(g.u32_per_layer("u64s", 3).unwrap(), [1, 2, 3]);
    assert_eq!(
        g.u32_per_layer("u64s", 2).unwrap(),
        [1, 2],
        "entries of trailing blocks are left off"
    );
    let message = g.u32_per_layer("u64s", 4).unwrap_err().to_string();
    says(
        &message,
        &["'u64s'", "array of 4 of them", "array of 3 u64"],
    );
}
