//! `tier-plan selftest` as a whole program.

use crate::common::{self, json, refused, run_in};
use tier_plan_runtime::cuda::{CudaError, Gpu};
use tier_plan_runtime::kernels::Kernels;
use tier_plan_runtime::quant::TensorType;

#[test]
fn every_instruction_set_is_compared_for_every_type() {
    let folder = tempfile::tempdir().unwrap();
    let found = json(run_in(folder.path(), &["selftest", "--json"]));
    let checks = found["checks"].as_array().unwrap();
    for kernels in Kernels::available()
        .into_iter()
        .filter(|k| *k != Kernels::SCALAR)
    {
        for ty in TensorType::ALL {
            let (on, kernel) = (kernels.isa().to_string(), format!("products, {ty}"));
            let row = checks
                .iter()
                .find(|c| c["on"] == on.as_str() && c["kernel"] == kernel.as_str());
            let row = row.unwrap_or_else(|| panic!("{on} {kernel} is missing"));
            assert!(
                row["well"] == true && row["values"].as_u64() > Some(0),
                "{row}"
            );
        }
    }
    assert!(
        found["gpu"].is_null() && found["measured"].is_null(),
        "{found}"
    );
}

#[test]
fn without_a_driver_it_says_what_is_missing() {
    if !matches!(Gpu::open(0), Err(CudaError::NoDriver)) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    refused(
        folder.path(),
        &["selftest", "--gpu"],
        &["no NVIDIA driver", "libcuda.so.1", "install the driver"],
    );
}

#[test]
fn what_is_for_gpus_needs_one() {
    let folder = tempfile::tempdir().unwrap();
    for args in [
        &["selftest", "--quick"][..],
        &["selftest", "--peer", "llama-bench"],
        &["selftest", "-o", "here"],
    ] {
        let output = run_in(folder.path(), args);
        let err = common::stderr(&output);
        assert!(
            output.status.code() == Some(2) && err.contains("--gpu"),
            "{args:?}: {err}"
        );
    }
    let output = run_in(
        folder.path(),
        &["selftest", "--gpu", "--quick", "--model", "a.gguf"],
    );
    assert!(
        common::stderr(&output).contains("cannot be used with"),
        "{}",
        common::stderr(&output)
    );
    assert_eq!(common::listing(folder.path()).len(), 0);
}
