//! Tells the crate whether the demo model is there, which packages on crates.io leave out.

use std::path::Path;

const MODEL: &str = "demo/demo.gguf";

fn main() {
    println!("cargo::rustc-check-cfg=cfg(demo_model)");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={MODEL}");
    if Path::new(MODEL).is_file() {
        println!("cargo::rustc-cfg=demo_model");
    }
}
