//! What is missing, too old, too small, or fails on the stand-in for the driver of GPUs, and what the
//! stand-in itself finds.

use crate::common::{check_refusal, demo_model, succeeded};
use crate::driver::Place;
use crate::gpu_driver::{Case, tokens};

/// A refusal of `selftest --gpu`, with settings of the stand-in.
fn refused(settings: &[(&str, &str)], more: &[&str], words: &[&str]) {
    let (output, _) = Place::new().clean(settings, &[&["selftest", "--gpu"], more].concat());
    check_refusal(&output, words);
}

#[test]
fn what_is_missing_or_too_old_is_named_with_the_mend() {
    refused(
        &[("STAND_IN_VERSION", "11080")],
        &[],
        &[
            "interface of CUDA 11.8",
            "12.0 or newer",
            "update the driver",
        ],
    );
    refused(
        &[("STAND_IN_DEVICES", "0")],
        &[],
        &["no GPU number 0, it has 0", "CUDA_VISIBLE_DEVICES"],
    );
    refused(
        &[("STAND_IN_DEVICES", "2")],
        &["--device", "3"],
        &["no GPU number 3, it has 2"],
    );
    refused(
        &[("STAND_IN_CAPABILITY", "70")],
        &[],
        &["Stand-in 0", "capability 7.0", "7.5 (Turing) or newer"],
    );
    refused(
        &[("STAND_IN_FAULT", "cuDriverGetVersion:1:34")],
        &[],
        &["stub", "LD_LIBRARY_PATH", "install the driver"],
    );
    refused(
        &[("STAND_IN_FAULT", "cuInit:1:999")],
        &[],
        &["GPU 0: starting the driver failed"],
    );
    let missing = [("TIER_PLAN_NVRTC", "/nowhere/libnvrtc.so")];
    refused(
        &missing,
        &[],
        &[
            "NVRTC was not found (/nowhere/libnvrtc.so",
            "nvidia-cuda-nvrtc",
            "TIER_PLAN_NVRTC",
        ],
    );
    refused(
        &[("STAND_IN_NVRTC", "11")],
        &[],
        &["expected 12.0 or newer", "libnvrtc.so"],
    );
    let newer = [
        "loading the kernels of ops.cu",
        "NVRTC 13.4",
        "newer than the driver",
        "update the driver",
    ];
    refused(&[("STAND_IN_NVRTC", "13")], &[], &newer);
    refused(
        &[("STAND_IN_COMPILES", "0")],
        &[],
        &["ops.cu do not compile for sm_86", "no text is well today"],
    );
    refused(
        &[
            ("STAND_IN_ARCHS", "75"),
            ("STAND_IN_FAULT", "cuModuleLoadData:1:218"),
        ],
        &[],
        &["loading the kernels of ops.cu"],
    );
}

#[test]
fn a_gpu_without_room_is_refused_with_the_numbers() {
    let case = Case::small(&["64MiB"], "64MiB", "64");
    let run = case.arguments(&tokens(1), 1);
    let run: Vec<&str> = run.iter().map(String::as_str).collect();
    let (output, report) = case.place.clean(&[("STAND_IN_MEMORY", "104857600")], &run);
    check_refusal(
        &output,
        &[
            "Stand-in 0 has 88080384 free",
            "134217728 for the driver",
            "smaller --budget gpu0",
        ],
    );
    assert_eq!(report.calls("cuMemAllocAsync"), 0);
}

#[test]
fn whatever_fails_ends_the_program_with_an_error() {
    faults_end_the_program(&Case::small(&["64MiB"], "64MiB", "64"));
}

#[test]
fn whatever_fails_ends_the_program_in_the_bundled_model_too() {
    // Twenty runs of several seconds each.
    if tier_plan_testing::is_nightly() {
        faults_end_the_program(&Case::new(demo_model(), &["64MiB"], "64MiB", "64"));
    }
}

/// Runs a model with a fault at each kind of driver call: the program must end with an error that
/// says what failed.
fn faults_end_the_program(case: &Case) {
    let run = case.arguments(&tokens(2), 9);
    let run: Vec<&str> = run.iter().map(String::as_str).collect();
    let list = [
        ("cuDevicePrimaryCtxRetain:1:2", "opening it"),
        ("cuStreamCreate:1:2", "a stream"),
        ("cuMemPoolSetAttribute:1:1", "its memory pool"),
        ("cuMemGetInfo_v2:1:999", "free memory"),
        // Once is not enough: what is free may lie in pieces.
        (
            "cuMemAllocAsync:20:2,cuMemAllocAsync:21:2",
            "is out of memory",
        ),
        ("cuMemAllocAsync:20:719", "allocating"),
        ("cuMemHostAlloc:1:2", "pinning host memory"),
        ("cuEventCreate:2:2", "pinning host memory"),
        ("cuMemcpyHtoDAsync_v2:30:214", "copying"),
        ("cuMemcpyDtoHAsync_v2:1:719", "copying"),
        ("cuModuleGetFunction:3:500", "finding kernel"),
        ("cuLaunchKernel:40:719", "launching"),
        ("cuStreamSynchronize:4:214", "what was asked of it"),
        ("kernel:25:700", "what was asked of it"),
        ("kernel:250:719", "what was asked of it"),
        ("cuStreamBeginCapture_v2:1:1", "recording launches"),
        (
            "cuGraphInstantiateWithFlags:1:2",
            "preparing recorded launches",
        ),
        ("cuGraphLaunch:3:719", "recorded launches"),
    ];
    for (fault, what) in list {
        let (output, _) = case.place.clean(&[("STAND_IN_FAULT", fault)], &run);
        check_refusal(&output, &[what]);
    }
    // One that another try mends, and one that costs nothing but memory.
    for fault in ["cuMemAllocAsync:20:2", "cuModuleUnload:1:999"] {
        let (output, _) = case.place.run(&[("STAND_IN_FAULT", fault)], &run);
        succeeded(output);
    }
}

#[test]
fn the_stand_in_finds_what_is_wrong() {
    let place = Place::new();
    // What the case finds, and what the report says: nothing, or this.
    let cases: [(&str, &str, i32, &str); 20] = [
        ("late", "well", 7, ""),
        ("late", "not waited", 1, ""),
        ("late", "taken late", 9, ""),
        (
            "late",
            "another stream",
            0,
            "misuse cuMemFreeHost: a copy is still to come",
        ),
        ("copies-first", "another stream", 1, ""),
        ("late", "after an event", 5, ""),
        (
            "late",
            "too early",
            0,
            "misuse cuMemcpyHtoDAsync: memory that its stream has not come to",
        ),
        (
            "late",
            "beyond",
            1,
            "misuse cuMemcpyHtoDAsync_v2: 64 bytes that are not inside",
        ),
        (
            "late",
            "written beyond",
            0,
            "misuse something wrote beyond a buffer of 64",
        ),
        (
            "late",
            "given back",
            1,
            "misuse cuMemcpyHtoDAsync_v2: memory that was given back",
        ),
        (
            "late",
            "written after",
            0,
            "misuse 64 bytes were written to after they were given back",
        ),
        (
            "late",
            "recorded",
            901,
            "misuse cuStreamSynchronize in a recording",
        ),
        (
            "late",
            "pinned recorded",
            901,
            "misuse cuMemHostAlloc while launches are recorded",
        ),
        (
            "late",
            "locked in part",
            1,
            "misuse cuMemcpyHtoDAsync: host memory that is locked in part",
        ),
        (
            "late",
            "pinned too soon",
            0,
            "misuse cuMemFreeHost: a copy is still to come",
        ),
        (
            "late",
            "legacy",
            400,
            "misuse cuMemcpyHtoDAsync_v2: a handle that is none",
        ),
        (
            "late",
            "no start",
            3,
            "misuse cuDevicePrimaryCtxRetain before cuInit",
        ),
        (
            "late",
            "no context",
            201,
            "misuse cuStreamCreate without a context",
        ),
        ("late", "leak", 0, "leak 64 bytes of a device"),
        ("late", "leak", 0, "leak 64 bytes of pinned memory"),
    ];
    for (order, case, found, said) in cases {
        let (got, report) = place.misuse(&[("STAND_IN_ORDER", order)], case);
        let misuse = report.misuse.iter().map(|text| format!("misuse {text}"));
        let all: Vec<String> = misuse
            .chain(report.leaks.iter().map(|text| format!("leak {text}")))
            .collect();
        assert_eq!(got, found, "{order} {case}: {all:?}");
        let as_expected = if said.is_empty() {
            all.is_empty()
        } else {
            all.iter().any(|text| text.starts_with(said))
        };
        assert!(as_expected, "{order} {case}: {all:?}");
    }
}
