//! The stand-in driver, compiled once, and programs that run on it.

#[path = "../../runtime/cuda/src/shim/sources.rs"]
mod sources;

use std::collections::BTreeMap;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::LazyLock;
use tempfile::TempDir;
use tier_plan_runtime::cuda::source::{MODULES, headers};

/// Its texts.
const TEXTS: [(&str, &str); 5] = [
    ("state.h", include_str!("state.h")),
    ("work.h", include_str!("work.h")),
    ("cuda.cpp", include_str!("cuda.cpp")),
    ("nvrtc.cpp", include_str!("nvrtc.cpp")),
    ("misuse.cpp", include_str!("misuse.cpp")),
];

/// Seconds that a program may take.
const LONGEST: &str = "300";

/// Returns the folder with the libraries.
fn folder() -> &'static Path {
    static FOLDER: LazyLock<PathBuf> = LazyLock::new(compile);
    &FOLDER
}

fn compile() -> PathBuf {
    let modules: Vec<sources::ModuleText> = MODULES
        .iter()
        .map(|m| (m.name, m.text, m.kernels))
        .collect();
    let kernels = sources::kernels(headers(), &modules, &[]).join(sources::KERNELS_OBJECT);
    let kernels = kernels.to_str().unwrap();
    let mut texts: sources::Texts = TEXTS.map(|(name, text)| (name.into(), text.into())).into();
    texts.push(("table.h".into(), table()));
    let plain = ["-std=c++17", "-O2", "-fPIC", "-Wall", "-Wextra"];
    let commands: [Vec<&str>; 5] = [
        [&plain[..], &["-c", "cuda.cpp", "-o", "cuda.o"]].concat(),
        [
            &plain[..],
            &["-shared", "nvrtc.cpp", "-o", "libnvrtc.so.12"],
        ]
        .concat(),
        // Two names: the one without a number is tried first, lest a real driver has it.
        vec![
            "-shared",
            "-pthread",
            "cuda.o",
            kernels,
            "-o",
            "libcuda.so.1",
        ],
        vec!["-shared", "-pthread", "cuda.o", kernels, "-o", "libcuda.so"],
        vec![
            "-std=c++17",
            "-O1",
            "-Wall",
            "-Wextra",
            "misuse.cpp",
            "-L.",
            "-lcuda",
            "-o",
            "misuse",
        ],
    ];
    sources::build("driver", &texts, &commands.each_ref().map(Vec::as_slice))
}

/// The kernels, and sums of what the compiler must be given.
fn table() -> String {
    let mut text = String::from("#pragma once\n#include \"state.h\"\nextern \"C\" {\n");
    let all = || {
        MODULES
            .iter()
            .flat_map(|m| m.kernels.iter().map(move |k| (m.name, *k)))
    };
    for (_, kernel) in all() {
        writeln!(
            text,
            "int run_{kernel}(void**, const unsigned*);\nconst char* kinds_{kernel}();"
        )
        .unwrap();
    }
    text.push_str("}\nstatic const Kernel KERNELS[] = {\n");
    for (module, kernel) in all() {
        writeln!(
            text,
            "{{\"{module}\", \"{kernel}\", run_{kernel}, kinds_{kernel}}},"
        )
        .unwrap();
    }
    text.push_str("};\nstatic const ModuleText MODULE_TEXTS[] = {\n");
    for module in &MODULES {
        let headers = headers()
            .iter()
            .flat_map(|(name, text)| [*name, text.as_str()]);
        let bytes = [module.name, module.text]
            .into_iter()
            .chain(headers)
            .flat_map(str::bytes);
        let sum = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |sum, b| {
            (sum ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3)
        });
        writeln!(text, "{{\"{}\", {sum:#x}ull}},", module.name).unwrap();
    }
    text.push_str("};\n");
    text
}

/// A folder to work in, with a cache of compiled kernels of its own.
pub struct Place {
    folder: TempDir,
}

/// What the stand-in says at the end of a program.
#[derive(Debug, Default)]
pub struct Report {
    /// What the program did that a driver does not allow.
    pub misuse: Vec<String>,
    /// What it had and did not give back.
    pub leaks: Vec<String>,
    /// Calls by function.
    pub calls: BTreeMap<String, u64>,
    /// Kernels that ran.
    pub kernels: BTreeMap<String, u64>,
}

impl Place {
    pub fn new() -> Self {
        Self {
            folder: tempfile::tempdir().unwrap(),
        }
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Where compiled kernels are kept.
    pub fn kept(&self) -> PathBuf {
        self.path().join("cache/tier-plan/kernels")
    }

    /// Runs the program on the stand-in, with these settings of it.
    pub fn run(&self, settings: &[(&str, &str)], args: &[&str]) -> (Output, Report) {
        self.run_this(Path::new(env!("CARGO_BIN_EXE_tier-plan")), settings, args)
    }

    /// Runs one case of `misuse.cpp`; returns what it found.
    pub fn misuse(&self, settings: &[(&str, &str)], case: &str) -> (i32, Report) {
        let (output, report) = self.run_this(&folder().join("misuse"), settings, &[case]);
        (
            String::from_utf8_lossy(&output.stdout)
                .trim()
                .parse()
                .unwrap(),
            report,
        )
    }

    fn run_this(
        &self,
        program: &Path,
        settings: &[(&str, &str)],
        args: &[&str],
    ) -> (Output, Report) {
        let mut command = Command::new("timeout");
        // What waits for a GPU that never answers would wait for good.
        command.arg(LONGEST).arg(program).stdin(Stdio::null());
        self.set_up(&mut command);
        let output = command
            .envs(settings.iter().copied())
            .args(args)
            .output()
            .unwrap();
        let report = self.report();
        let report = report.unwrap_or_else(|e| panic!("no report ({e}): {output:?}"));
        (output, report)
    }

    /// Has a command run here, on the stand-in.
    pub fn set_up(&self, command: &mut Command) {
        let _ = fs::remove_file(self.path().join("report"));
        let libraries = folder();
        command
            .current_dir(self.path())
            .env_remove("TIER_PLAN_ISA")
            .env_remove("TIER_PLAN_IO")
            .env("LD_LIBRARY_PATH", libraries)
            .env("TIER_PLAN_NVRTC", libraries.join("libnvrtc.so.12"))
            .env("XDG_CACHE_HOME", self.path().join("cache"))
            .env("STAND_IN_REPORT", self.path().join("report"));
    }

    /// Returns what the stand-in said at the end of the last program.
    pub fn report(&self) -> std::io::Result<Report> {
        fs::read_to_string(self.path().join("report")).map(|text| Report::read(&text))
    }

    /// The same of a program that must do nothing wrong, whatever comes of it.
    pub fn clean(&self, settings: &[(&str, &str)], args: &[&str]) -> (Output, Report) {
        let (output, report) = self.run(settings, args);
        assert!(
            report.misuse.is_empty() && report.leaks.is_empty(),
            "{settings:?} {args:?}: {report:#?}\n{output:?}"
        );
        (output, report)
    }
}

impl Report {
    fn read(text: &str) -> Self {
        let mut report = Self::default();
        for line in text.lines() {
            let (what, rest) = line.split_once(' ').unwrap();
            let count = |to: &mut BTreeMap<String, u64>| {
                let (name, n) = rest.split_once(' ').unwrap();
                to.insert(name.into(), n.parse().unwrap());
            };
            match what {
                "misuse" => report.misuse.push(rest.into()),
                "leak" => report.leaks.push(rest.into()),
                "call" => count(&mut report.calls),
                _ => count(&mut report.kernels),
            }
        }
        report
    }

    /// How often a function was called.
    pub fn calls(&self, name: &str) -> u64 {
        self.calls.get(name).copied().unwrap_or(0)
    }
}
