//! The whole program on a stand-in for the driver of GPUs (tests/driver): a library of the driver's
//! functions, compiled here, that does everything as late as the driver's documentation allows,
//! refuses what that refuses, and tells at the end what was done wrong and what was not given back.
//! Kernels run on the processor.

mod case;
mod served;

pub(crate) use case::{Case, tokens};

use crate::common::{self, check_refusal, demo_model, json, root, stdout, succeeded};
use crate::driver::{Place, Report};
use case::{linked, machine};
use serde_json::{Value, json as value};
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use tier_plan_planner::session::tokenizer;
use tier_plan_runtime::cuda::source::MODULES;
use tier_plan_runtime::gguf::Gguf;
use tier_plan_testing::is_nightly;

/// Text for the bundled model.
const PROMPT: &str = "And it came to pass in those days, that there went out a decree from Caesar";

/// Largest normalized mean squared error of a token's logits from the processor's: with 16-bit
/// weights sums have another order, with quantized ones activations are rounded otherwise, too. It
/// was 5e-7 and 2e-4.
const SMALL_ERROR: f64 = 5e-6;
const SMALL_ERROR_QUANTIZED: f64 = 1e-3;
/// In the bundled model two experts may be nearly tied, so that a token gets the other one. It was
/// 6e-3.
const SMALL_ERROR_OF_TIES: f64 = 2e-2;

/// Copies golden values of a few models to a folder, and returns its path. At night it is that of
/// all of them; the emulated device of the library's tests computes all every time.
fn golden_values(place: &Place) -> PathBuf {
    let all = root().join("tests/data");
    if is_nightly() {
        return all;
    }
    let few = place.path().join("golden");
    for model in ["arch/gpt-oss", "arch/qwen3next", "quant/Q4_K_M"] {
        for kind in ["gguf", "json", "logits"] {
            let name = format!("{model}.{kind}");
            fs::create_dir_all(few.join(&name).parent().unwrap()).unwrap();
            fs::copy(all.join(&name), few.join(&name)).unwrap();
        }
    }
    few
}

#[test]
fn selftest_finds_every_kernel_well_and_measures() {
    let place = Place::new();
    let golden = golden_values(&place);
    let golden = ["--golden", golden.to_str().unwrap()];
    let (output, report) = place.clean(
        &[("STAND_IN_DEVICES", "2")],
        &[
            &["selftest", "--gpu", "--device", "1", "--json"],
            &golden[..],
        ]
        .concat(),
    );
    let found = json(output);
    assert_eq!(
        (&found["gpu"]["name"], &found["gpu"]["capability"]),
        (&"Stand-in 1".into(), &"8.6".into())
    );
    let checks = found["checks"].as_array().unwrap();
    assert!(
        checks.iter().all(|check| check["well"] == true),
        "{checks:#?}"
    );
    for whole in ["demo, all of it", "demo, experts in main memory"] {
        assert!(
            checks
                .iter()
                .any(|check| check["kernel"] == whole && check["values"].as_u64() > Some(0)),
            "{whole}"
        );
    }
    for rate in [
        "launch_us",
        "round_trip_us",
        "read_gbps",
        "to_device_pinned_gbps",
        "from_device_pageable_gbps",
    ] {
        assert!(
            found["measured"][rate].as_f64() > Some(0.0),
            "{rate}: {}",
            found["measured"]
        );
    }
    for kernel in MODULES.iter().flat_map(|m| m.kernels) {
        assert!(report.kernels.contains_key(*kernel), "{kernel} never ran");
    }
    assert!(report.calls("cuGraphLaunch") > 0, "{report:?}");
}

#[test]
fn selftest_tells_what_a_gpu_that_fails_says() {
    let place = Place::new();
    let (output, _) = place.clean(
        &[("STAND_IN_FAULT", "kernel:9:700")],
        &["selftest", "--gpu"],
    );
    let line = check_refusal(&output, &["comparisons failed", "cannot be trusted"]);
    let said = stdout(&output);
    assert!(
        said.contains("GPU 0: Stand-in 0, compute capability 8.6")
            && said.contains("ILLEGAL_ADDRESS"),
        "{said}{line}"
    );
    assert!(!said.contains("a launch and the way back"), "{said}");
}

#[test]
fn a_model_that_is_all_on_a_gpu_is_recorded_and_replayed() {
    let case = Case::small(&["64MiB"], "64MiB", "64");
    assert_eq!(case.solved["tiers"][1]["pinned_bytes"], 0);
    assert!(
        case.bytes(0, "pinned") > 0 && case.bytes(0, "kv") > 0,
        "{}",
        case.solved
    );
    let (answer, report) = case.on_gpu(&[], &tokens(30), 8);
    case.agrees(&tokens(30), &answer, SMALL_ERROR);
    assert!(
        report.calls("cuGraphLaunch") >= 5 && report.calls("cuGraphInstantiateWithFlags") == 1,
        "{report:?}"
    );
    // Without memory pools.
    let (again, report) = case.on_gpu(&[("STAND_IN_POOLS", "0")], &tokens(30), 8);
    assert!(report.calls("cuMemAlloc_v2") > 0 && report.calls("cuMemAllocAsync") == 0);
    assert!(again == answer);
    // An architecture that the compiler knows only an older one of: what it makes then is for the
    // driver to finish.
    let newer = [("STAND_IN_CAPABILITY", "100"), ("STAND_IN_ARCHS", "90")];
    assert!(case.on_gpu(&newer, &tokens(30), 8).0 == answer);
}

#[test]
fn inputs_of_tokens_reach_a_gpu_before_each_token() {
    let model = root().join("tests/data/arch2/gemma4.gguf");
    let case = Case::new(model, &["64MiB"], "64MiB", "96");
    let (first, report) = case.on_gpu(&[], &tokens(30), 12);
    // Scores are not scaled, so that the 16 bits of a prompt's attention show more. It was 6e-6.
    case.agrees(&tokens(30), &first, 4.0 * SMALL_ERROR);
    assert!(report.calls("cuGraphLaunch") > 8, "{report:?}");
    let (late, _) = case.on_gpu(&[("STAND_IN_ORDER", "late")], &tokens(30), 12);
    assert!(late == first);
}

#[test]
fn a_quantized_model_on_a_gpu_computes_what_the_processor_does() {
    for vram in ["64MiB", "450KiB"] {
        let case = Case::new(
            root().join("tests/data/quant/Q4_K_M.gguf"),
            &[vram],
            "64MiB",
            "160",
        );
        let (answer, _) = case.on_gpu(&[], &tokens(120), 12);
        case.agrees(&tokens(120), &answer, SMALL_ERROR_QUANTIZED);
    }
}

#[test]
fn the_bundled_model_on_a_gpu_says_what_its_logits_do() {
    let case = Case::new(demo_model(), &["64MiB"], "64MiB", "64");
    let tokenizer = tokenizer(&Arc::new(Gguf::open(&demo_model()).unwrap())).unwrap();
    let ids = tokenizer.encode(PROMPT, true).unwrap();
    let (answer, _) = case.on_gpu(&[], &ids, 8);
    case.agrees(&ids, &answer, SMALL_ERROR_OF_TIES);
    let model = case.model.to_str().unwrap();
    let list = [
        "run",
        model,
        "-p",
        PROMPT,
        "--ignore-eos",
        "--json",
        "--plan",
        "plan.toml",
        "-n",
        "8",
    ];
    let (output, report) = case.place.clean(&[], &list);
    assert_eq!(json(output)["text"], tokenizer.decode(&answer.greedy));
    assert!(report.calls("cuGraphLaunch") >= 5, "{report:?}");
}

#[test]
fn several_texts_at_once_say_on_a_gpu_what_they_say_on_the_processor() {
    let place = Place::new();
    let (model, folder) = (demo_model(), place.path().to_path_buf());
    let model = model.to_str().unwrap();
    let requests = [
        PROMPT,
        "And he said unto them",
        "In the beginning",
        PROMPT,
        "Now when",
    ];
    let lines = requests.iter().enumerate().map(|(id, prompt)| {
        let body = value!({"prompt": prompt, "max_tokens": 12, "temperature": 0});
        let line = value!({"custom_id": id.to_string(), "method": "POST", "url": "/v1/completions", "body": body});
        format!("{line}\n")
    });
    fs::write(folder.join("in.jsonl"), lines.collect::<String>()).unwrap();
    let answers = |vram: &[&str], plan: &str| {
        fs::write(folder.join("machine.toml"), machine(vram, "64MiB")).unwrap();
        let solve = [
            "solve",
            model,
            "-m",
            "machine.toml",
            "-o",
            plan,
            "--context",
            "64",
            "--parallel",
            "3",
            "--json",
        ];
        let solved = json(common::run_in(&folder, &solve));
        let kv_on_gpu = vram
            .iter()
            .enumerate()
            .all(|(tier, _)| solved["tiers"][tier]["kv_bytes"].as_u64() > Some(0));
        assert!(kv_on_gpu, "{solved}");
        let _ = fs::remove_file(folder.join("out.jsonl"));
        let batch = [
            "batch",
            model,
            "in.jsonl",
            "-o",
            "out.jsonl",
            "--plan",
            plan,
        ];
        let report = if vram.is_empty() {
            succeeded(common::run_in(&folder, &batch));
            Report::default()
        } else {
            let (output, report) = place.clean(&[], &batch);
            succeeded(output);
            report
        };
        let out = fs::read_to_string(folder.join("out.jsonl")).unwrap();
        let mut texts: Vec<(String, String)> = out
            .lines()
            .map(|line| {
                let line: Value = serde_json::from_str(line).unwrap();
                let text = &line["response"]["body"]["choices"][0]["text"];
                let id = line["custom_id"].as_str().unwrap();
                (
                    id.into(),
                    text.as_str().unwrap_or_else(|| panic!("{line}")).into(),
                )
            })
            .collect();
        texts.sort();
        (texts, report)
    };
    let (on_gpu, report) = answers(&["64MiB"], "plan.toml");
    assert!(report.calls("cuLaunchKernel") > 0, "{report:?}");
    let (on_processor, _) = answers(&[], "processor.toml");
    assert_eq!(on_gpu.len(), requests.len());
    assert_eq!(on_gpu, on_processor);
    assert_eq!(on_gpu[0].1, on_gpu[3].1);
}

#[test]
fn a_machine_with_a_gpu_is_probed_and_planned_for() {
    let place = Place::new();
    let model = root().join("tests/data/arch/qwen3moe.gguf");
    let model = model.to_str().unwrap();
    let probe = ["probe", "--quick", "--model", model, "--json"];
    let (output, _) = place.clean(&[], &probe);
    let found = json(output);
    let gpu = &found["gpus"][0];
    assert_eq!(gpu["name"], "Stand-in 0", "{found}");
    let machine = fs::read_to_string(place.path().join("machine.toml")).unwrap();
    for figure in [
        "link_gbps",
        "layer_us",
        "resident_layer_us",
        "prompt_gflops",
    ] {
        assert!(
            machine.contains(&format!("{figure} = ")),
            "{figure}: {machine}"
        );
    }
    let solve = ["solve", model, "-m", "machine.toml", "--json"];
    let solved = json(common::run_in(place.path(), &solve));
    let tiers = solved["tiers"].as_array().unwrap();
    assert!(tiers.iter().any(|tier| tier["name"] == "vram"), "{solved}");
}

#[test]
fn where_a_chunk_of_the_context_ends_launches_are_recorded_anew() {
    let case = Case::small(&["64MiB"], "64MiB", "300");
    let (answer, report) = case.on_gpu(&[], &tokens(240), 30);
    case.agrees(&tokens(240), &answer, SMALL_ERROR);
    assert_eq!(answer.greedy.len(), 30);
    assert_eq!(report.calls("cuGraphInstantiateWithFlags"), 2);
}

#[test]
fn compiled_kernels_are_kept() {
    let case = Case::small(&["64MiB"], "64MiB", "64");
    let run = |settings: &[(&str, &str)]| case.on_gpu(settings, &tokens(10), 3);
    let (first, report) = run(&[]);
    let kept = || {
        fs::read_dir(case.place.kept())
            .unwrap()
            .map(|f| f.unwrap().path())
            .collect::<Vec<_>>()
    };
    let modules = report.calls("cuModuleLoadData");
    assert!(modules > 2, "{modules}");
    // The first that is missing has all compiled, beside each other.
    assert_eq!(kept().len(), MODULES.len());
    let (second, _) = run(&[("TIER_PLAN_NVRTC", "/nowhere/libnvrtc.so")]);
    assert!(first == second);
    // What is not whole is made again.
    for file in kept() {
        let bytes = fs::read(&file).unwrap();
        fs::write(&file, &bytes[..bytes.len() - 1]).unwrap();
    }
    let (third, _) = run(&[]);
    assert!(first == third);
    // What another driver is asked about is kept beside it.
    run(&[("STAND_IN_VERSION", "13000"), ("STAND_IN_NVRTC", "13")]);
    assert_eq!(kept().len(), 2 * MODULES.len());
    // Where nothing can be kept, no module is compiled twice in a run.
    let list = case.place.path().join("compiled");
    let nowhere = [
        ("XDG_CACHE_HOME", "/proc/nowhere"),
        ("STAND_IN_COMPILED", list.to_str().unwrap()),
    ];
    let (fourth, _) = run(&nowhere);
    assert!(first == fourth);
    let compiled = fs::read_to_string(&list).unwrap();
    assert_eq!(compiled.lines().count(), MODULES.len(), "{compiled}");
}

#[test]
fn parts_on_a_gpu_say_the_same_in_every_order_of_streams() {
    let case = Case::small(&["300KiB"], "64MiB", "200");
    assert!(
        case.bytes(0, "dense") > 0 && case.bytes(1, "pinned") > 0,
        "{}",
        case.solved
    );
    let (first, _) = case.on_gpu(&[], &tokens(150), 12);
    case.agrees(&tokens(150), &first, SMALL_ERROR);
    for order in ["late", "copies-first", "computing-first"] {
        let (answer, report) = case.on_gpu(&[("STAND_IN_ORDER", order)], &tokens(150), 12);
        // Experts passed through the GPU beside what it computed.
        assert!(
            report.calls("cuStreamWaitEvent") > 20,
            "{order}: {report:?}"
        );
        assert!(answer == first, "{order}");
    }
}

#[test]
fn slots_on_a_gpu_are_filled_while_it_computes() {
    let case = Case::with(
        root().join("tests/data/arch/qwen3moe.gguf"),
        &["250KiB"],
        "150KiB",
        "200",
        &["--strategy", "lru-only"],
    );
    assert!(
        case.bytes(0, "slot") > 0 && case.bytes(0, "pinned") == 0,
        "{}",
        case.solved
    );
    let (first, _) = case.on_gpu(&[], &tokens(40), 20);
    case.agrees(&tokens(40), &first, SMALL_ERROR);
    for order in ["late", "copies-first", "computing-first"] {
        let (answer, report) = case.on_gpu(&[("STAND_IN_ORDER", order)], &tokens(40), 20);
        // Staging, and what it gets from slots in main memory in exchange.
        assert!(report.calls("cuMemHostRegister_v2") > 1, "{report:?}");
        assert_eq!(
            report.calls("cuMemHostRegister_v2"),
            report.calls("cuMemHostUnregister")
        );
        // Each fill is waited for by what computes with it.
        assert!(
            report.calls("cuStreamWaitEvent") > 20,
            "{order}: {report:?}"
        );
        assert!(answer == first, "{order}");
    }
    // Where the driver locks no memory of the program, the bytes are copied first.
    let refused = [("STAND_IN_FAULT", "cuMemHostRegister_v2:1:801")];
    let (answer, _) = case.on_gpu(&refused, &tokens(40), 20);
    assert!(answer == first);
    let list = case.arguments(&tokens(40), 20);
    let list: Vec<&str> = list.iter().map(String::as_str).collect();
    // The second fails one of the stream's events, which leaves the stream to be given back.
    for (fault, what) in [
        ("cuEventRecord:9:719", "copying beside what it computes"),
        ("cuEventCreate:3:2", "an event"),
    ] {
        let (output, _) = case.place.clean(&[("STAND_IN_FAULT", fault)], &list);
        check_refusal(&output, &[what]);
    }
}

/// Where a GPU has nothing but slots, no other work comes before they are filled for the first time.
#[test]
fn slots_are_allocated_before_they_are_filled() {
    let text = machine(&["300KiB"], "250KiB");
    // The GPU is the slower one, so that all else is in main memory.
    let (first, drive) = (
        text.find("[[tier]]"),
        text.find("[[tier]]\nname = \"nvme\""),
    );
    let dram = text.find("[[tier]]\nname = \"dram\"");
    let (first, dram, drive) = (first.unwrap(), dram.unwrap(), drive.unwrap());
    let gpu = text[first..dram].replacen("read_gbps = 500", "read_gbps = 0.3", 1);
    let text = [&text[..first], &text[dram..drive], &gpu, &text[drive..]].concat();
    let model = root().join("tests/data/arch/qwen3moe.gguf");
    let case = Case::on(model, &text, "96", &["--strategy", "lru-only"]);
    assert!(
        case.bytes(1, "slot") > 0 && case.bytes(1, "dense") == 0,
        "{}",
        case.solved
    );
    for order in ["late", "copies-first", "computing-first"] {
        let (answer, _) = case.on_gpu(&[("STAND_IN_ORDER", order)], &tokens(20), 12);
        case.agrees(&tokens(20), &answer, SMALL_ERROR);
    }
}

#[test]
fn experts_of_main_memory_are_computed_on_a_gpu_beside_the_processor() {
    // In memory of the program, and in the mapped file.
    for has_drive in [true, false] {
        let model = root().join("tests/data/arch/qwen3moe.gguf");
        let case = Case::on(model, &linked("300KiB", has_drive), "96", &[]);
        let plan = fs::read_to_string(case.place.path().join("plan.toml")).unwrap();
        let streams = "streaming = { tier = \"gpu0\", from = \"dram\", experts = 1, ";
        assert!(plan.contains(streams), "{plan}");
        assert!(case.bytes(0, "staging") > 0, "{}", case.solved);
        let model = case.model.to_str().unwrap();
        let limit = ["--time-limit", "0.5"];
        let explain = ["explain", "plan.toml", "--model", model, limit[0], limit[1]];
        let said = stdout(&succeeded(common::run_in(case.place.path(), &explain)));
        let words = "Up to 1 of a layer's experts are streamed from dram to gpu0 for a token";
        assert!(said.contains(words), "{said}");
        let (first, _) = case.on_gpu(&[], &tokens(20), 20);
        case.agrees(&tokens(20), &first, SMALL_ERROR);
        for order in ["late", "copies-first", "computing-first"] {
            let (answer, report) = case.on_gpu(&[("STAND_IN_ORDER", order)], &tokens(20), 20);
            assert!(report.calls("cuMemHostRegister_v2") > 0, "{report:?}");
            // What computes with streamed experts waits for them, and only that.
            let waits = report.calls("cuStreamWaitEvent");
            assert!(waits > 30, "{order}: {report:?}");
            assert!(answer == first, "{order}");
        }
        // A prompt's pass through the GPU, too, from where they lie.
        let (first, _) = case.on_gpu(&[], &tokens(60), 4);
        case.agrees(&tokens(60), &first, SMALL_ERROR);
        for order in ["late", "copies-first", "computing-first"] {
            let (answer, report) = case.on_gpu(&[("STAND_IN_ORDER", order)], &tokens(60), 4);
            assert!(report.kernels.contains_key("add_rows"), "{report:?}");
            assert!(answer == first, "{order}");
        }
        let model = case.model.to_str().unwrap();
        let bench = format!("bench {model} --plan plan.toml -p 8 -n 4 -r 1");
        let mut bench: Vec<&str> = bench.split(' ').collect();
        let (output, _) = case.place.clean(&[], &bench);
        let words = "experts of main memory per decoded token were streamed to a GPU";
        assert!(stdout(&succeeded(output)).contains(words));
        bench.push("--json");
        let (output, _) = case.place.clean(&[], &bench);
        assert!(json(output)["streamed_per_token"].as_f64() > Some(0.9));
        // Where the driver locks no memory of experts, the processor computes them. Staging comes first.
        let fault = format!("cuMemHostRegister_v2:{}:801", 1 + u32::from(has_drive));
        let refused = [("STAND_IN_FAULT", fault.as_str())];
        let (answer, report) = case.on_gpu(&refused, &tokens(20), 20);
        assert!(report.calls("cuStreamWaitEvent") < 20, "{report:?}");
        case.agrees(&tokens(20), &answer, SMALL_ERROR);
        let list = case.arguments(&tokens(20), 20);
        let list: Vec<&str> = list.iter().map(String::as_str).collect();
        let (output, _) = case
            .place
            .clean(&[("STAND_IN_FAULT", "cuEventRecord:9:719")], &list);
        check_refusal(&output, &["copying beside what it computes"]);
    }
}

#[test]
fn the_processor_attends_to_a_cache_that_is_kept_off_a_gpu() {
    let model = root().join("tests/data/arch/qwen3moe.gguf");
    let case = Case::with(model, &["1MiB"], "64MiB", "200", &["--fix", "dram:cache"]);
    let plan = fs::read_to_string(case.place.path().join("plan.toml")).unwrap();
    assert!(plan.contains("\nhost_kv = \"0-2\"\n"), "{plan}");
    assert!(
        case.bytes(0, "kv") == 0 && case.bytes(1, "kv") > 0 && case.bytes(1, "dense") == 0,
        "{}",
        case.solved
    );
    let model = case.model.to_str().unwrap();
    let limit = ["--time-limit", "0.5"];
    let explain = ["explain", "plan.toml", "--model", model, limit[0], limit[1]];
    let said = stdout(&succeeded(common::run_in(case.place.path(), &explain)));
    let words = "The KV cache of layers 0-2 is on dram: a GPU multiplies their matrices";
    assert!(said.contains(words), "{said}");
    let (first, _) = case.on_gpu(&[], &tokens(70), 20);
    case.agrees(&tokens(70), &first, SMALL_ERROR);
    for order in ["late", "copies-first", "computing-first"] {
        let (answer, _) = case.on_gpu(&[("STAND_IN_ORDER", order)], &tokens(70), 20);
        assert!(answer == first, "{order}");
    }
}

#[test]
fn a_plan_without_streaming_is_made_where_that_is_asked_for() {
    let model = root().join("tests/data/arch/qwen3moe.gguf");
    let case = Case::on(model, &linked("300KiB", true), "96", &["--no-streaming"]);
    let plan = fs::read_to_string(case.place.path().join("plan.toml")).unwrap();
    assert!(!plan.contains("streaming"), "{plan}");
}

#[test]
fn two_gpus_share_a_model() {
    let case = Case::small(&["200KiB", "150KiB"], "2MiB", "96");
    assert!(
        case.bytes(0, "used") > 0 && case.bytes(1, "used") > 0,
        "{}",
        case.solved
    );
    let two = [("STAND_IN_DEVICES", "2")];
    let (answer, _) = case.on_gpu(&two, &tokens(70), 16);
    case.agrees(&tokens(70), &answer, SMALL_ERROR);
    let model = case.model.to_str().unwrap();
    let bench = [
        "bench",
        model,
        "--plan",
        "plan.toml",
        "-p",
        "40",
        "-n",
        "4",
        "-r",
        "2",
        "--json",
    ];
    let (output, _) = case.place.clean(&two, &bench);
    assert!(json(output)["decode_tok_s"].as_f64() > Some(0.0));
    // The second is not there.
    let (output, _) = case.place.clean(&[], &bench);
    check_refusal(
        &output,
        &["no GPU number 1, it has 1", "CUDA_VISIBLE_DEVICES"],
    );
}
