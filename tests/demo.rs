//! The demo's folder is whole or not there.

use crate::common::{listing, piped, send, stdout, succeeded, tier_plan};
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

/// Starts the demo, waits until it has written something, and sends it a signal.
fn ended_by(signal: &str, folder: &Path) -> Option<i32> {
    let mut demo = tier_plan();
    demo.current_dir(folder)
        .args(["demo", "-o", "out", "-n", "2"]);
    let mut child = piped(&mut demo);
    let start = Instant::now();
    while listing(folder).len() < 3 {
        assert!(start.elapsed() < Duration::from_secs(60));
        assert!(child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(10));
    }
    send(signal, &child);
    let status = child.wait_with_output().unwrap().status;
    assert!(!folder.join("out").exists(), "{signal}");
    status.code()
}

#[test]
fn a_demo_leaves_its_folder_whole_or_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    assert_eq!(ended_by("-KILL", folder), None);
    assert!(!listing(folder).is_empty());
    // By the signal itself where no stage catches it, and then what is left is removed by the next.
    assert!(matches!(ended_by("-INT", folder), None | Some(130)));
    let mut demo = tier_plan();
    demo.current_dir(folder)
        .args(["demo", "-o", "out", "-n", "2"]);
    let said = stdout(&succeeded(demo.output().unwrap()));
    assert!(said.contains("-o out/demo.profile") && said.contains("profile: out/demo.profile"));
    assert!(!said.contains(".tier-plan-"), "{said}");
    let inside = fs::read_dir(folder).unwrap().count();
    assert_eq!(inside, 1, "{:?}", listing(folder));
    for path in listing(&folder.join("out")) {
        if path.is_file() {
            let bytes = fs::read(&path).unwrap();
            assert!(
                !String::from_utf8_lossy(&bytes).contains(".tier-plan-"),
                "{path:?}"
            );
        }
    }
    for file in ["demo.profile", "plans/optimal.toml", "report/index.html"] {
        assert!(folder.join("out").join(file).is_file(), "{file}");
    }
}
