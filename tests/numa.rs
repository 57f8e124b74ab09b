//! Weights striped over NUMA nodes, here emulated ones.

use crate::common::{demo_model, json, run_in, stderr, stdout, succeeded};

#[test]
fn the_text_does_not_depend_on_numa_nodes() {
    let temporary = tempfile::tempdir().unwrap();
    let model = demo_model();
    let model = model.to_str().unwrap();
    let run = |more: &[&str]| {
        let list = [
            "run",
            model,
            "-p",
            "Once upon a time",
            "-n",
            "24",
            "-t",
            "3",
        ];
        succeeded(run_in(temporary.path(), &[&list[..], more].concat()))
    };
    let plain = run(&[]);
    for nodes in ["2", "3"] {
        let sharded = run(&["--numa", &format!("shard:{nodes}")]);
        assert_eq!(stdout(&sharded), stdout(&plain), "{nodes} nodes");
        let note = format!("divided as on {nodes} emulated nodes");
        assert!(stderr(&sharded).contains(&note), "{}", stderr(&sharded));
    }
    // Within a budget, slots are filled while the text is written.
    let tight = run(&["--numa", "shard:2", "--memory", "43MiB"]);
    assert_eq!(stdout(&tight), stdout(&plain));
}

#[test]
fn bench_counts_what_other_nodes_read() {
    let temporary = tempfile::tempdir().unwrap();
    let model = demo_model();
    let model = model.to_str().unwrap();
    let bench = ["bench", model, "-p", "8", "-n", "8", "-r", "1", "-t", "2"];
    let sharded = [&bench[..], &["--numa", "shard:2", "--json"]].concat();
    let numa = json(run_in(temporary.path(), &sharded))["numa"].clone();
    assert_eq!(
        (&numa["nodes"], &numa["emulated"]),
        (&2.into(), &true.into())
    );
    let [all, remote] = ["read_bytes", "remote_bytes"].map(|key| numa[key].as_u64().unwrap());
    assert!(all > 0 && remote < all, "{numa}");
    assert!(numa["share_in_place"].is_null());
    let plain = json(run_in(
        temporary.path(),
        &[&bench[..], &["--json"]].concat(),
    ));
    assert!(plain["numa"].is_null());
    let wrong = run_in(temporary.path(), &["bench", model, "--numa", "shard:1"]);
    assert_eq!(wrong.status.code(), Some(2));
    assert!(stderr(&wrong).contains("expected `interleave`, `shard`"));
}
