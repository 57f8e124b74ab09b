//! Compiles every GPU kernel with NVRTC, which needs no GPU, for the architectures that people
//! have. Ignored unless asked for, since NVRTC is a large download: `.ci/nvrtc` fetches it and runs
//! this.

use tier_plan_runtime::cuda::source::{MODULES, most_threads};
use tier_plan_runtime::cuda::{Compiler, Version};

/// Turing, Ampere (A100; GeForce), Ada, Hopper, Blackwell.
const CAPABILITIES: [(i32, i32); 6] = [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0)];

/// Registers that a thread of a kernel may take so that three blocks of 128 threads fit a
/// multiprocessor.
const MOST_REGISTERS: u32 = 168;

/// Registers of a multiprocessor, for the threads of at least one block.
const REGISTERS: u32 = 1 << 16;

/// The architectures to compile for. What a compiler makes differs little from one to the next, so
/// that it is asked for the oldest and the newest; `.ci/nightly` has it make all.
fn capabilities() -> Vec<(i32, i32)> {
    if tier_plan_testing::is_nightly() {
        return CAPABILITIES.into();
    }
    vec![CAPABILITIES[0], CAPABILITIES[CAPABILITIES.len() - 1]]
}

#[test]
#[ignore = "needs NVRTC; .ci/nvrtc fetches it"]
fn every_kernel_compiles_for_every_architecture() {
    let compiler = Compiler::find().unwrap();
    let known = compiler.architectures().unwrap();
    println!("NVRTC {}: architectures {known:?}", compiler.version());
    for (major, minor) in capabilities() {
        let arch = 10 * major + minor;
        assert!(
            known.contains(&arch),
            "this NVRTC makes no code for sm_{arch}"
        );
        for module in &MODULES {
            let compiled = compiler.compile(module, Version { major, minor }).unwrap();
            let has = |name: &str| {
                compiled
                    .image
                    .windows(name.len())
                    .any(|w| w == name.as_bytes())
            };
            assert!(
                compiled.image.starts_with(b"\x7fELF"),
                "{} for sm_{arch} is no machine code",
                module.name
            );
            let entries: Vec<(&str, u32, u32)> = entries(&compiled.log);
            for kernel in module.kernels {
                assert!(
                    has(kernel),
                    "{kernel} is missing from {} for sm_{arch}",
                    module.name
                );
                let entry = entries.iter().find(|(name, ..)| name == kernel);
                let (_, registers, spilled) =
                    entry.unwrap_or_else(|| panic!("nothing about {kernel}: {}", compiled.log));
                let most = MOST_REGISTERS.min(REGISTERS / most_threads(kernel));
                assert!(
                    *registers <= most,
                    "{kernel} takes {registers} registers on sm_{arch}"
                );
                assert_eq!(
                    *spilled, 0,
                    "{kernel} keeps registers in memory on sm_{arch}"
                );
                if arch == 86 {
                    println!("sm_86 {kernel}: {registers} registers");
                }
            }
        }
    }
}

/// From the assembler's report: kernels, the registers of each, and bytes of registers kept in
/// memory.
fn entries(log: &str) -> Vec<(&str, u32, u32)> {
    let number_before = |line: &str, what: &str| -> Option<u32> {
        line.split_once(what)?
            .0
            .split_whitespace()
            .next_back()?
            .parse()
            .ok()
    };
    let (mut found, mut name, mut spilled) = (Vec::new(), "", 0);
    for line in log.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            name = rest.split('\'').next().unwrap_or_default();
        }
        if let Some(bytes) = number_before(line, " bytes spill stores") {
            spilled = bytes;
        }
        if let Some((_, rest)) = line.split_once("Used ")
            && let Some(registers) = number_before(rest, " registers")
        {
            found.push((name, registers, spilled));
        }
    }
    found
}
