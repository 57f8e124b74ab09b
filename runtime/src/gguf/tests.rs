//! Tests of the whole reader.

use super::*;

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../profiles/demo/demo.gguf")
}

#[test]
fn the_bundled_model_opens() {
    let g = Gguf::open(&demo()).unwrap();
    println!("{:?} {} {}", g.id(), g.n_parts(), g.file_bytes());
    for (k, v) in g.metadata() {
        println!("{k}: {}", v.describe());
    }
    for t in g.tensors() {
        println!("{t:?}");
        assert_eq!(g.bytes(t).len() as u64, t.n_bytes);
    }
}
