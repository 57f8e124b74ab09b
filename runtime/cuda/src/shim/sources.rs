//! The kernels as plain C++ for a processor: what is compiled, and how. The emulated device of the
//! runtime's tests and the stand-in driver of the whole program's both take this file; it knows
//! only the texts that it is given.

use std::env;
use std::ffi::OsStr;
use std::fmt::Write;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What makes a kernel plain C++.
const SHIM: &str = include_str!("shim.h");
/// What checks the memory that kernels access.
const SANITIZER: &str = include_str!("sanitizer.h");

/// A module: its file, its text, and the kernels in it.
pub type ModuleText = (&'static str, &'static str, &'static [&'static str]);

/// File names and texts.
pub type Texts = Vec<(String, String)>;

/// The file that has all kernels. For each it has `run_NAME`, which takes addresses of arguments
/// and six numbers of blocks and threads, and `kinds_NAME`, the arguments' types in one letter
/// each: `p` a pointer, `i` an `int`, `l` a `long long` and `f` a `float`.
const ALL: &str = "all.cpp";

/// The object file of the kernels, in the folder that [`kernels`] returns.
pub const KERNELS_OBJECT: &str = "kernels.o";
/// The library of the kernels, in the folder that [`kernels`] returns.
pub const KERNELS_LIBRARY: &str = "kernels.so";

/// Returns the texts of the kernels with [`ALL`].
fn texts(headers: &[(&str, String)], modules: &[ModuleText]) -> Texts {
    let mut texts: Texts = headers
        .iter()
        .map(|(name, text)| (name.to_string(), text.clone()))
        .collect();
    texts.push(("shim.h".into(), SHIM.into()));
    texts.push(("sanitizer.h".into(), SANITIZER.into()));
    let mut all = String::from(
        "#include \"base.cuh\"\n#define EXPORTED extern \"C\" __attribute__((visibility(\"default\")))\n",
    );
    for (name, text, kernels) in modules {
        texts.push((name.to_string(), text.to_string()));
        writeln!(all, "#include \"{name}\"").unwrap();
        for kernel in *kernels {
            writeln!(
                all,
                "EXPORTED int run_{kernel}(void** args, const unsigned* dims) {{\n\
                 return shim::launch([](void** a) {{ shim::call({kernel}, a); }}, args, dims); }}\n\
                 EXPORTED const char* kinds_{kernel}() {{ return shim::kinds({kernel}); }}"
            )
            .unwrap();
        }
    }
    texts.push((ALL.into(), all));
    texts
}

/// Returns the folder with the kernels, compiled with these options beside those of all.
pub fn kernels(
    headers: &[(&str, String)],
    modules: &[ModuleText],
    options: &[&'static str],
) -> PathBuf {
    let compile = [&OPTIONS[..], options, &["-c", ALL, "-o", KERNELS_OBJECT]].concat();
    build(
        "kernels",
        &texts(headers, modules),
        &[
            &compile,
            &["-shared", KERNELS_OBJECT, "-o", KERNELS_LIBRARY],
        ],
    )
}

/// Returns a folder in which the compiler was run on these texts, with each of these lists of
/// arguments. What was built before from the same texts by the same compiler is taken as it is,
/// whichever test program built it.
pub fn build<S: AsRef<OsStr> + Hash>(name: &str, texts: &Texts, commands: &[&[S]]) -> PathBuf {
    let mut key = DefaultHasher::new();
    (texts, commands, compiler_version()).hash(&mut key);
    let home = target_folder().join("kernels-as-cpp");
    let folder = home.join(format!("{name}-{:016x}", key.finish()));
    fs::create_dir_all(&home).unwrap();
    // Held while one test program builds: the others wait and find it there.
    let lock = File::create(home.join(format!("{name}.lock"))).unwrap();
    lock.lock().unwrap();
    if !folder.exists() {
        let unfinished = home.join(format!("{name}.unfinished"));
        let _ = fs::remove_dir_all(&unfinished);
        fs::create_dir(&unfinished).unwrap();
        for (name, text) in texts {
            fs::write(unfinished.join(name), text).unwrap();
        }
        commands
            .iter()
            .for_each(|args| run_compiler(&unfinished, args));
        fs::rename(&unfinished, &folder).unwrap();
    }
    folder
}

/// Returns the folder that Cargo builds in.
fn target_folder() -> PathBuf {
    let program = env::current_exe().unwrap();
    let marked = program
        .ancestors()
        .find(|folder| folder.join("CACHEDIR.TAG").exists());
    marked.or(program.parent()).unwrap().to_path_buf()
}

/// The compiler that the system has.
fn compiler() -> String {
    env::var("CXX").unwrap_or_else(|_| "c++".into())
}

fn compiler_version() -> Vec<u8> {
    let done = Command::new(compiler()).arg("--version").output();
    done.map(|done| done.stdout).unwrap_or_default()
}

/// Runs the compiler in a folder; it must succeed, and have nothing to say.
fn run_compiler<S: AsRef<OsStr>>(folder: &Path, args: &[S]) {
    let compiler = compiler();
    let args: Vec<&OsStr> = args.iter().map(AsRef::as_ref).collect();
    let done = Command::new(&compiler).args(&args).current_dir(folder).output().unwrap_or_else(|e| {
        panic!(
            "the tests of GPU kernels need a C++ compiler, and '{compiler}' does not run ({e}): install g++, or set CXX"
        )
    });
    let log = String::from_utf8_lossy(&done.stderr);
    assert!(
        done.status.success(),
        "{args:?} does not compile as C++: {log}"
    );
    assert!(
        log.is_empty(),
        "{args:?} compiles as C++ with warnings: {log}"
    );
}

/// Options for the kernels. No fused products, as in the processor's plain kernels; jumps from one
/// stack to another are meant. Variables are hidden, so that every copy of the library that is
/// loaded has its own.
const OPTIONS: [&str; 11] = [
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-U_FORTIFY_SOURCE",
    "-DTIER_PLAN_SHIM",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
];
