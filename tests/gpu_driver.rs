//! The whole program on a stand-in for the driver of GPUs (tests/driver): a library of the driver's functions, compiled
//! here, that does everything as late as the driver's documentation allows, refuses what that refuses, and tells at the end
//! what was done wrong and what was not given back. Kernels run on the processor.
#![cfg(target_os = "linux")]

mod common;
mod driver;

use common::{check_refusal, demo_model, json, stdout, succeeded};
use driver::{Place, Report};
use serde_json::Value;
use std::fs;
use tier_plan_runtime::cuda::source::MODULES;

const PROMPT: &str = "And it came to pass in those days, that there went out a decree from Caesar";

/// A machine with GPUs of so much memory. Its main memory is slow, lest a plan leaves something there that a GPU has room
/// for, and so is its processor at prompts, so that experts pass through a GPU.
fn machine(vram: &[&str], dram: &str) -> String {
    let mut text = String::from(
        "format = \"tier-plan machine\"\nversion = 3\nname = \"stand-in\"\ndescription = \"\"\nlayer_overhead_us = 20\n\
         token_overhead_us = 60\n",
    );
    for (n, capacity) in vram.iter().enumerate() {
        text += &format!(
            "[[tier]]\nname = \"gpu{n}\"\nkind = \"vram\"\ncapacity = \"{capacity}\"\nread_gbps = 500\nlatency_us = 5\n\
             prompt_gflops = 900\ndevice = {n}\nsource = \"stood in for\"\n"
        );
    }
    text + &format!(
        "[[tier]]\nname = \"dram\"\nkind = \"dram\"\ncapacity = \"{dram}\"\nread_gbps = 0.5\nlatency_us = 900\n\
         prompt_gflops = 0.01\nsource = \"assumed\"\n[[tier]]\nname = \"nvme\"\nkind = \"nvme\"\ncapacity = \"1GiB\"\n\
         read_gbps = 0.1\nlatency_us = 2000\nsource = \"assumed\"\n"
    )
}

/// Makes a plan for GPUs of so much memory; returns what `solve` says.
fn solve(place: &Place, vram: &[&str], dram: &str, context: &str) -> Value {
    fs::write(place.path().join("machine.toml"), machine(vram, dram)).unwrap();
    let model = demo_model();
    let list =
        ["solve", model.to_str().unwrap(), "-m", "machine.toml", "-o", "plan.toml", "--context", context, "--json"];
    json(common::run_in(place.path(), &list))
}

/// What the demo says with a plan, on the stand-in.
fn run_plan(place: &Place, settings: &[(&str, &str)], more: &[&str]) -> (Value, Report) {
    let model = demo_model();
    let list = ["run", model.to_str().unwrap(), "-p", PROMPT, "--ignore-eos", "--threads", "2", "--json"];
    let (output, report) = place.clean(settings, &[&list[..], &["--plan", "plan.toml"], more].concat());
    (json(output), report)
}

/// What it says without a GPU.
fn on_the_processor(place: &Place, tokens: &str) -> Value {
    let model = demo_model();
    let list = ["run", model.to_str().unwrap(), "-p", PROMPT, "--ignore-eos", "--threads", "2", "--json", "-n", tokens];
    json(common::run_in(place.path(), &list))
}

/// The beginning that two texts have in common, in bytes.
fn common_bytes(a: &Value, b: &Value) -> usize {
    let (a, b) = (a["text"].as_str().unwrap(), b["text"].as_str().unwrap());
    a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count()
}

/// Bytes of a kind on a tier of a solved plan.
fn bytes(solved: &Value, tier: usize, kind: &str) -> u64 {
    solved["tiers"][tier][format!("{kind}_bytes")].as_u64().unwrap()
}

#[test]
fn selftest_finds_every_kernel_well_and_measures() {
    let place = Place::new();
    let (output, report) = place.clean(&[("STAND_IN_DEVICES", "2")], &["selftest", "--gpu", "--device", "1", "--json"]);
    let found = json(output);
    assert_eq!((&found["gpu"]["name"], &found["gpu"]["capability"]), (&"Stand-in 1".into(), &"8.6".into()));
    let checks = found["checks"].as_array().unwrap();
    assert!(checks.iter().all(|check| check["well"] == true), "{checks:#?}");
    for whole in ["demo, all of it", "demo, experts in main memory"] {
        assert!(checks.iter().any(|check| check["kernel"] == whole && check["values"].as_u64() > Some(0)), "{whole}");
    }
    for rate in ["launch_us", "round_trip_us", "read_gbps", "to_device_pinned_gbps", "from_device_pageable_gbps"] {
        assert!(found["measured"][rate].as_f64() > Some(0.0), "{rate}: {}", found["measured"]);
    }
    for kernel in MODULES.iter().flat_map(|m| m.kernels) {
        assert!(report.kernels.contains_key(*kernel), "{kernel} never ran");
    }
    assert!(report.calls("cuGraphLaunch") > 0, "{report:?}");
}

#[test]
fn selftest_tells_what_a_gpu_that_fails_says() {
    let place = Place::new();
    let (output, _) = place.clean(&[("STAND_IN_FAULT", "kernel:9:700")], &["selftest", "--gpu"]);
    let line = check_refusal(&output, &["comparisons failed", "can't be trusted"]);
    let said = stdout(&output);
    assert!(
        said.contains("GPU 0: Stand-in 0, compute capability 8.6") && said.contains("ILLEGAL_ADDRESS"),
        "{said}{line}"
    );
    assert!(!said.contains("a launch and the way back"), "{said}");
}

#[test]
fn a_model_that_is_all_on_a_gpu_is_recorded_and_replayed() {
    let place = Place::new();
    let solved = solve(&place, &["64MiB"], "64MiB", "64");
    assert_eq!(solved["tiers"][1]["pinned_bytes"], 0);
    assert!(bytes(&solved, 0, "pinned") > 0 && bytes(&solved, 0, "kv") > 0, "{solved}");
    let plain = on_the_processor(&place, "8");
    let (said, report) = run_plan(&place, &[], &["-n", "8"]);
    assert!(common_bytes(&said, &plain) >= 10, "{}\n{}", said["text"], plain["text"]);
    assert!(report.calls("cuGraphLaunch") >= 5 && report.calls("cuGraphInstantiateWithFlags") == 1, "{report:?}");
    // Without memory pools.
    let (again, report) = run_plan(&place, &[("STAND_IN_POOLS", "0")], &["-n", "4"]);
    assert!(report.calls("cuMemAlloc_v2") > 0 && report.calls("cuMemAllocAsync") == 0);
    assert_eq!(common_bytes(&said, &again), again["text"].as_str().unwrap().len());
    // An architecture that the compiler knows only an older one of: what it makes then is for the driver to finish.
    let newer = [("STAND_IN_CAPABILITY", "100"), ("STAND_IN_ARCHS", "90")];
    let (again, _) = run_plan(&place, &newer, &["-n", "4"]);
    assert_eq!(common_bytes(&said, &again), again["text"].as_str().unwrap().len());
}

#[test]
fn where_a_chunk_of_the_context_ends_launches_are_recorded_anew() {
    let place = Place::new();
    let model = common::root().join("tests/data/arch/qwen3moe.gguf");
    let model = model.to_str().unwrap();
    fs::write(place.path().join("machine.toml"), machine(&["64MiB"], "64MiB")).unwrap();
    let list = ["solve", model, "-m", "machine.toml", "-o", "plan.toml", "--context", "300"];
    succeeded(common::run_in(place.path(), &list));
    let tokens: Vec<String> = (0..240).map(|i| (i * 37 % 90 + 1).to_string()).collect();
    let tokens = tokens.join(",");
    let list = ["logits", model, "--tokens", &tokens, "-o", "logits.bin", "--greedy", "30"];
    let plain = json(common::run_in(place.path(), &list));
    let (output, report) = place.clean(&[], &[&list[..], &["--plan", "plan.toml"]].concat());
    let ids = json(output);
    let (ids, plain) = (ids.as_array().unwrap(), plain.as_array().unwrap());
    assert_eq!((ids.len(), &ids[..4]), (30, &plain[..4]));
    assert_eq!(report.calls("cuGraphInstantiateWithFlags"), 2);
}

#[test]
fn compiled_kernels_are_kept() {
    let place = Place::new();
    solve(&place, &["64MiB"], "64MiB", "64");
    let (first, report) = run_plan(&place, &[], &["-n", "3"]);
    let kept = || fs::read_dir(place.kept()).unwrap().map(|f| f.unwrap().path()).collect::<Vec<_>>();
    let modules = report.calls("cuModuleLoadData");
    assert!(modules > 2 && kept().len() == modules as usize, "{modules} {:?}", kept());
    let (second, _) = run_plan(&place, &[("TIER_PLAN_NVRTC", "/nowhere/libnvrtc.so")], &["-n", "3"]);
    assert_eq!(first["text"], second["text"]);
    // What is not whole is made again.
    for file in kept() {
        let bytes = fs::read(&file).unwrap();
        fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
    }
    let (third, _) = run_plan(&place, &[], &["-n", "3"]);
    assert_eq!(first["text"], third["text"]);
    // What another driver is asked about is kept beside it.
    run_plan(&place, &[("STAND_IN_VERSION", "13000"), ("STAND_IN_NVRTC", "13")], &["-n", "3"]);
    assert_eq!(kept().len(), 2 * modules as usize);
}

#[test]
fn parts_on_a_gpu_say_the_same_in_every_order_of_streams() {
    let place = Place::new();
    let solved = solve(&place, &["5MiB"], "64MiB", "128");
    assert!(bytes(&solved, 0, "dense") > 0 && bytes(&solved, 1, "pinned") > 0, "{solved}");
    let long = PROMPT.repeat(2);
    let plain = {
        let model = demo_model();
        let list =
            ["run", model.to_str().unwrap(), "-p", &long, "--ignore-eos", "--threads", "2", "--json", "-n", "12"];
        json(common::run_in(place.path(), &list))
    };
    let mut texts = Vec::new();
    for order in ["late", "copies-first", "computing-first"] {
        let model = demo_model();
        let list = ["run", model.to_str().unwrap(), "-p", &long, "--ignore-eos", "--threads", "2", "--json"];
        let list = [&list[..], &["--plan", "plan.toml", "-n", "12"]].concat();
        let (output, report) = place.clean(&[("STAND_IN_ORDER", order)], &list);
        let said = json(output);
        assert!(common_bytes(&said, &plain) >= 20, "{order}: {}\n{}", said["text"], plain["text"]);
        // Experts passed through the GPU beside what it computed.
        assert!(report.calls("cuStreamWaitEvent") > 20, "{order}: {report:?}");
        texts.push(said["text"].clone());
    }
    assert!(texts.iter().all(|text| *text == texts[0]), "{texts:#?}");
}

#[test]
fn two_gpus_share_a_model() {
    let place = Place::new();
    let solved = solve(&place, &["5MiB", "4MiB"], "2MiB", "96");
    assert!(bytes(&solved, 0, "used") > 0 && bytes(&solved, 1, "used") > 0, "{solved}");
    let plain = on_the_processor(&place, "16");
    let (said, _) = run_plan(&place, &[("STAND_IN_DEVICES", "2")], &["-n", "16"]);
    assert!(common_bytes(&said, &plain) >= 20, "{}\n{}", said["text"], plain["text"]);
    let model = demo_model();
    let bench = ["bench", model.to_str().unwrap(), "--plan", "plan.toml", "-p", "40", "-n", "4", "-r", "2", "--json"];
    let (output, _) = place.clean(&[("STAND_IN_DEVICES", "2")], &bench);
    assert!(json(output)["decode_tok_s"].as_f64() > Some(0.0));
    // The second is not there.
    let run = ["run", model.to_str().unwrap(), "--plan", "plan.toml", "-p", "x", "-n", "1"];
    let (output, _) = place.clean(&[], &run);
    check_refusal(&output, &["no GPU number 1, it has 1", "CUDA_VISIBLE_DEVICES"]);
}

/// A refusal of `selftest --gpu`, with settings of the stand-in.
fn refused(settings: &[(&str, &str)], more: &[&str], words: &[&str]) {
    let (output, _) = Place::new().clean(settings, &[&["selftest", "--gpu"], more].concat());
    check_refusal(&output, words);
}

#[test]
fn what_is_missing_or_too_old_is_named_with_the_mend() {
    refused(&[("STAND_IN_VERSION", "11080")], &[], &["interface of CUDA 11.8", "12.0 or newer", "update the driver"]);
    refused(&[("STAND_IN_DEVICES", "0")], &[], &["no GPU number 0, it has 0", "CUDA_VISIBLE_DEVICES"]);
    refused(&[("STAND_IN_DEVICES", "2")], &["--device", "3"], &["no GPU number 3, it has 2"]);
    refused(&[("STAND_IN_CAPABILITY", "70")], &[], &["Stand-in 0", "capability 7.0", "7.5 (Turing) or newer"]);
    refused(&[("STAND_IN_FAULT", "cuDriverGetVersion:1:34")], &[], &["stub", "LD_LIBRARY_PATH", "install the driver"]);
    refused(&[("STAND_IN_FAULT", "cuInit:1:999")], &[], &["GPU 0: starting the driver failed"]);
    let missing = [("TIER_PLAN_NVRTC", "/nowhere/libnvrtc.so")];
    refused(&missing, &[], &["NVRTC was not found (/nowhere/libnvrtc.so", "nvidia-cuda-nvrtc", "TIER_PLAN_NVRTC"]);
    refused(&[("STAND_IN_NVRTC", "11")], &[], &["expected 12.0 or newer", "libnvrtc.so"]);
    let newer = ["loading the kernels of ops.cu", "NVRTC 13.4", "newer than the driver", "update the driver"];
    refused(&[("STAND_IN_NVRTC", "13")], &[], &newer);
    refused(&[("STAND_IN_COMPILES", "0")], &[], &["ops.cu do not compile for sm_86", "no text is well today"]);
    refused(
        &[("STAND_IN_ARCHS", "75"), ("STAND_IN_FAULT", "cuModuleLoadData:1:218")],
        &[],
        &["loading the kernels of ops.cu"],
    );
}

#[test]
fn a_gpu_without_room_is_refused_with_the_numbers() {
    let place = Place::new();
    solve(&place, &["64MiB"], "64MiB", "64");
    let model = demo_model();
    let run = ["run", model.to_str().unwrap(), "--plan", "plan.toml", "-p", "x", "-n", "1"];
    let (output, report) = place.clean(&[("STAND_IN_MEMORY", "104857600")], &run);
    check_refusal(&output, &["Stand-in 0 has 88080384 free", "134217728 for the driver", "smaller budget"]);
    assert_eq!(report.calls("cuMemAllocAsync"), 0);
}

#[test]
fn whatever_fails_ends_the_program_with_an_error() {
    let place = Place::new();
    solve(&place, &["64MiB"], "64MiB", "64");
    let model = demo_model();
    let run = ["run", model.to_str().unwrap(), "--plan", "plan.toml", "-p", "x", "-n", "9", "--ignore-eos"];
    let list = [
        ("cuDevicePrimaryCtxRetain:1:2", "opening it"),
        ("cuStreamCreate:1:2", "a stream"),
        ("cuMemPoolSetAttribute:1:1", "its memory pool"),
        ("cuMemGetInfo_v2:1:999", "free memory"),
        // Once is not enough: what is free may lie in pieces.
        ("cuMemAllocAsync:20:2,cuMemAllocAsync:21:2", "is out of memory"),
        ("cuMemAllocAsync:20:719", "allocating"),
        ("cuMemHostAlloc:1:2", "pinning host memory"),
        ("cuEventCreate:2:2", "pinning host memory"),
        ("cuMemcpyHtoDAsync_v2:30:214", "copying"),
        ("cuMemcpyDtoHAsync_v2:1:719", "copying"),
        ("cuModuleGetFunction:3:500", "finding kernel"),
        ("cuLaunchKernel:40:719", "launching"),
        ("cuStreamSynchronize:4:214", "what was asked of it"),
        ("kernel:25:700", "what was asked of it"),
        ("kernel:400:719", "what was asked of it"),
        ("cuStreamBeginCapture_v2:1:1", "recording launches"),
        ("cuGraphInstantiateWithFlags:1:2", "preparing recorded launches"),
        ("cuGraphLaunch:3:719", "recorded launches"),
    ];
    for (fault, what) in list {
        let (output, _) = place.clean(&[("STAND_IN_FAULT", fault)], &run);
        check_refusal(&output, &[what]);
    }
    // One that another try mends, and one that costs nothing but memory.
    for fault in ["cuMemAllocAsync:20:2", "cuModuleUnload:1:999"] {
        let (output, _) = place.run(&[("STAND_IN_FAULT", fault)], &run);
        succeeded(output);
    }
}

#[test]
fn the_stand_in_finds_what_is_wrong() {
    let place = Place::new();
    // What the case finds, and what the report says: nothing, or this.
    let cases: [(&str, &str, i32, &str); 19] = [
        ("late", "well", 7, ""),
        ("late", "not waited", 1, ""),
        ("late", "taken late", 9, ""),
        ("late", "another stream", 0, "misuse cuMemFreeHost: a copy is still to come"),
        ("copies-first", "another stream", 1, ""),
        ("late", "after an event", 5, ""),
        ("late", "too early", 0, "misuse cuMemcpyHtoDAsync: memory that its stream has not come to"),
        ("late", "beyond", 1, "misuse cuMemcpyHtoDAsync_v2: 64 bytes that are not inside"),
        ("late", "written beyond", 0, "misuse something wrote beyond a buffer of 64"),
        ("late", "given back", 1, "misuse cuMemcpyHtoDAsync_v2: memory that was given back"),
        ("late", "written after", 0, "misuse 64 bytes were written to after they were given back"),
        ("late", "recorded", 901, "misuse cuStreamSynchronize in a recording"),
        ("late", "pinned recorded", 901, "misuse cuMemHostAlloc while launches are recorded"),
        ("late", "pinned too soon", 0, "misuse cuMemFreeHost: a copy is still to come"),
        ("late", "legacy", 400, "misuse cuMemcpyHtoDAsync_v2: a handle that is none"),
        ("late", "no start", 3, "misuse cuDevicePrimaryCtxRetain before cuInit"),
        ("late", "no context", 201, "misuse cuStreamCreate without a context"),
        ("late", "leak", 0, "leak 64 bytes of a device"),
        ("late", "leak", 0, "leak 64 bytes of pinned memory"),
    ];
    for (order, case, found, said) in cases {
        let (got, report) = place.misuse(&[("STAND_IN_ORDER", order)], case);
        let misuse = report.misuse.iter().map(|text| format!("misuse {text}"));
        let all: Vec<String> = misuse.chain(report.leaks.iter().map(|text| format!("leak {text}"))).collect();
        assert_eq!(got, found, "{order} {case}: {all:?}");
        let as_expected = if said.is_empty() { all.is_empty() } else { all.iter().any(|text| text.starts_with(said)) };
        assert!(as_expected, "{order} {case}: {all:?}");
    }
}
