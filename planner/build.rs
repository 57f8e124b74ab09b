//! Tells the program which compiler built it, for `tier-plan doctor`.

use std::process::Command;

fn main() {
    println!("cargo::rerun-if-env-changed=RUSTC");
    let compiler = std::env::var_os("RUSTC").unwrap_or("rustc".into());
    let version = Command::new(compiler).arg("--version").output();
    let version = version.map(|output| output.stdout).unwrap_or_default();
    let version = String::from_utf8_lossy(&version);
    // One line, or nothing where the compiler does not tell.
    println!(
        "cargo::rustc-env=TIER_PLAN_RUSTC={}",
        version.lines().next().unwrap_or_default().trim()
    );
}
