//! The kernels as plain C++ for a processor: what is compiled, and how. The emulated device of the runtime's tests and the
//! stand-in driver of the whole program's both take this file; it knows only the texts that it is given.

use std::fmt::Write;
use std::path::Path;
use std::process::Command;

/// What makes a kernel plain C++.
const SHIM: &str = include_str!("shim.h");

/// A module: its file, its text, and the kernels in it.
pub type ModuleText = (&'static str, &'static str, &'static [&'static str]);

/// The file that has all kernels. For each it has `run_NAME`, which takes addresses of arguments and six numbers of blocks
/// and threads, and `kinds_NAME`, the arguments' types in one letter each: `p` a pointer, `i` an `int`, `l` a `long long`
/// and `f` a `float`.
pub const ALL: &str = "all.cpp";

/// Writes the texts and [`ALL`] to a folder.
pub fn write(folder: &Path, headers: &[(&str, String)], modules: &[ModuleText]) {
    let put = |name: &str, text: &str| std::fs::write(folder.join(name), text).unwrap();
    for (name, text) in headers {
        put(name, text);
    }
    put("shim.h", SHIM);
    let mut all = String::from("#include \"base.cuh\"\n");
    for (name, text, kernels) in modules {
        put(name, text);
        writeln!(all, "#include \"{name}\"").unwrap();
        for kernel in *kernels {
            writeln!(
                all,
                "extern \"C\" int run_{kernel}(void** args, const unsigned* dims) {{\n\
                 return shim::launch([](void** a) {{ shim::call({kernel}, a); }}, args, dims); }}\n\
                 extern \"C\" const char* kinds_{kernel}() {{ return shim::kinds({kernel}); }}"
            )
            .unwrap();
        }
    }
    put(ALL, &all);
}

/// The compiler that the system has.
fn compiler() -> String {
    std::env::var("CXX").unwrap_or_else(|_| "c++".into())
}

/// Runs the compiler in a folder; it must succeed, and have nothing to say.
pub fn run_compiler(folder: &Path, args: &[&str]) {
    let compiler = compiler();
    let done = Command::new(&compiler).args(args).current_dir(folder).output().unwrap_or_else(|e| {
        panic!(
            "the tests of GPU kernels need a C++ compiler, and '{compiler}' does not run ({e}): install g++, or set CXX"
        )
    });
    let log = String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{args:?} does not compile as C++: {log}");
    assert!(log.is_empty(), "{args:?} compiles as C++ with warnings: {log}");
}

/// Options for the kernels. No fused products, as in the processor's plain kernels; jumps from one stack to another are
/// meant.
pub const OPTIONS: [&str; 10] = [
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE",
    "-DTIER_PLAN_SHIM",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
];
