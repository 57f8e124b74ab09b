//! Pins on emulated GPUs that become those of other experts of their layers: before a text, the model is
//! one that was loaded so; within a text, it stays right.

use super::gpu_slot_tests::{self, DRAM, Layer, VRAM0, VRAM1, load, open, text};
use super::gpu_tests;
use crate::engine::{Engine, LogitsMode, RearrangeError, Rearranged};
use crate::experts::rearrange_tests::check_pins_on_gpus;
use crate::plans::in_memory::all_in_memory;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::machine::TierKind;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::shape::ModelShape;
use tier_plan_formats::placement::{Placement, SlotPolicy, Streaming, TierIdx};
use tier_plan_testing::{Random, nmse};

fn layer(pinned: [u32; 3], slots: u32, slot_tier: TierIdx) -> Layer {
    Layer {
        pinned,
        slots,
        slot_tier,
        policy: SlotPolicy::Lru,
    }
}

/// Returns a plan whose last tier has room for all experts, as it has in plans of the solver.
fn plan(shape: &ModelShape, home: TierKind, layer_of: impl Fn(usize) -> Layer) -> Placement {
    let mut plan = gpu_slot_tests::plan(shape, home, layer_of);
    let home = plan.home_tier();
    plan.tiers[home].budget_bytes = 1 << 30;
    plan
}

/// Returns a plan with as many pins of other experts on every tier.
fn other(plan: &Placement, shape: &ModelShape, random: &mut Random) -> Placement {
    let mut other = plan.clone();
    other.name = "other".into();
    for (placed, of) in other.layers.iter_mut().zip(&shape.experts) {
        let mut experts: Vec<u32> = (0..of.n_expert).collect();
        for pins in &mut placed.pinned {
            for pinned in &mut pins.experts {
                *pinned = experts.swap_remove(random.below(experts.len() as u64) as usize);
            }
            pins.experts.sort_unstable();
        }
    }
    other.fill_sums(shape);
    other
}

/// Comes to the end of what moves.
fn finish(engine: &mut Engine) -> Rearranged {
    while engine.rearranging().is_some() {
        engine.continue_rearranging();
        std::thread::sleep(std::time::Duration::from_micros(50));
    }
    engine.rearranged().unwrap()
}

/// Rearranges a model a few times before texts, and compares it with one that is loaded so.
fn compare(name: &str, plan: &Placement, shape: &ModelShape) {
    let (gguf, _) = open(name);
    let mut random = Random(7);
    let (mut engine, _) = load(&gguf, plan, 13);
    let held = engine.resident_bytes().clone();
    let exact = plan.streaming.is_none();
    for round in 0..3 {
        let wanted = other(plan, shape, &mut random);
        engine.rearrange(wanted.clone()).unwrap();
        let ended = finish(&mut engine);
        let Rearranged {
            total_bytes,
            done_bytes,
            failed_pins,
            left_pins,
            left_slots,
        } = ended;
        assert_eq!((failed_pins, left_pins, left_slots), (0, 0, 0), "{name}");
        assert!(total_bytes > 0 && done_bytes == total_bytes, "{ended:?}");
        assert_eq!(engine.plan().layers, wanted.layers, "{name}");
        assert_eq!(*engine.resident_bytes(), held, "{name}");
        check_pins_on_gpus(&engine.experts.store);

        engine.clear();
        let got = text(&mut engine);
        let expected = text(&mut load(&gguf, &wanted, 13).0);
        let off = nmse(&got, &expected);
        // What slots hold says what is read, and so what is streamed, and what a GPU computes at once.
        let is_new = round == 0 && exact;
        assert!(
            off < 1e-5 && (got == expected || !is_new),
            "{name}: {off:e}"
        );
    }
    let streamed = engine.experts_streamed_for_tokens();
    assert_eq!(streamed > 0, !exact, "{name}");
}

#[test]
fn a_rearranged_model_is_as_one_that_was_loaded_so() {
    for (name, home, pinned, slots, slot_tier) in [
        // Experts in main memory, in slots there, and on a drive come to two GPUs.
        ("arch/qwen3moe.gguf", TierKind::Nvme, [2, 1, 1], 2, DRAM),
        // Biases.
        ("arch/gpt-oss.gguf", TierKind::Nvme, [1, 1, 1], 0, DRAM),
        // What is mapped, without a pin or slot elsewhere.
        ("arch/gpt-oss.gguf", TierKind::Pmem, [2, 0, 0], 0, DRAM),
        ("quant/Q4_K_M.gguf", TierKind::Pmem, [1, 2, 1], 2, DRAM),
        // Slots beside pins of the same GPU, and of another.
        ("arch/qwen3moe.gguf", TierKind::Nvme, [1, 1, 1], 3, VRAM0),
        ("arch/qwen3moe.gguf", TierKind::Pmem, [1, 0, 2], 2, VRAM1),
        // No gates.
        (
            "arch2/nemotron_h_moe.gguf",
            TierKind::Nvme,
            [2, 0, 1],
            0,
            DRAM,
        ),
    ] {
        let (_, shape) = open(name);
        let plan = plan(&shape, home, |_| layer(pinned, slots, slot_tier));
        compare(name, &plan, &shape);
    }
}

#[test]
fn what_is_streamed_is_streamed_from_new_places() {
    let name = "arch/qwen3moe.gguf";
    let (_, shape) = open(name);
    let mut plan = plan(&shape, TierKind::Nvme, |_| layer([1, 0, 4], 0, DRAM));
    plan.tiers.iter_mut().for_each(|t| t.tier.latency_us = 0.0);
    plan.tiers[DRAM].tier.read_gbps = 1.0;
    plan.streaming = Some(Streaming {
        tier: VRAM0,
        from: DRAM,
        experts: 2,
        link_gbps: 0.8,
        cpu_share: 1.0,
    });
    plan.fill_sums(&shape);
    let tiers = plan.tiers.iter_mut();
    tiers.for_each(|t| t.budget_bytes = t.used_bytes());
    compare(name, &plan, &shape);
}

#[test]
fn a_text_goes_on_while_experts_change_places_on_gpus() {
    for (home, slots, slot_tier) in [
        (TierKind::Nvme, 2, DRAM),
        (TierKind::Nvme, 3, VRAM0),
        (TierKind::Pmem, 0, DRAM),
    ] {
        let name = "arch/qwen3moe.gguf";
        let (gguf, shape) = open(name);
        let plan = plan(&shape, home, |_| layer([2, 1, 1], slots, slot_tier));
        let in_memory = all_in_memory(&shape, 96, KvType::F32);
        let (mut engine, _) = load(&gguf, &plan, 13);
        let (mut expected, _) = load(&gguf, &in_memory, 13);
        let mut random = Random(8);
        let n_vocab = engine.spec().n_vocab as u32;
        let mut wanted = plan.clone();
        for i in 0..40 {
            if engine.rearranging().is_none() {
                wanted = other(&plan, &shape, &mut random);
                engine.rearrange(wanted.clone()).unwrap();
            }
            let token = [(i * i * 11 + 3) % n_vocab];
            let got = engine.forward(&token, LogitsMode::Last).unwrap().to_vec();
            let off = nmse(&got, expected.forward(&token, LogitsMode::Last).unwrap());
            assert!(off < 1e-5, "token {i}: {off:e}");
        }
        finish(&mut engine);
        assert_eq!(engine.plan().layers, wanted.layers);
        check_pins_on_gpus(&engine.experts.store);
    }
}

#[test]
fn a_layer_has_no_more_experts_on_a_gpu_than_it_began_with() {
    let (gguf, shape) = open("arch/qwen3moe.gguf");
    let pins = |n: [u32; 2]| {
        let mut plan = plan(&shape, TierKind::Pmem, |i| layer([n[i % 2], 0, 0], 0, DRAM));
        // Both have room for either.
        plan.tiers[VRAM0].budget_bytes = 1 << 30;
        plan
    };
    let (mut engine, _) = load(&gguf, &pins([2, 1]), 13);
    let message = |refused: Result<(), RearrangeError>| refused.unwrap_err().to_string();
    let refused = message(engine.rearrange(pins([1, 2])));
    let named =
        "has 2 pins and 0 slots of layer 1 on tier 'vram0', where the loaded model has 1 pins";
    assert!(refused.contains(named), "{refused}");
    let mut with_slots = pins([2, 1]);
    (with_slots.layers[1].slots, with_slots.layers[1].slot_tier) = (2, VRAM0);
    with_slots.fill_sums(&shape);
    let refused = message(engine.rearrange(with_slots));
    assert!(
        refused.contains("1 pins and 2 slots of layer 1"),
        "{refused}"
    );
    let mut emulated = pins([2, 1]);
    emulated.tiers[VRAM0].tier.emulated = true;
    let refused = message(engine.rearrange(emulated));
    assert!(refused.contains("another set of tiers"), "{refused}");
    engine.rearrange(pins([2, 1])).unwrap();
    assert_eq!(finish(&mut engine), Rearranged::default());
    // Fewer, and as many as before again.
    for n in [1, 0, 2] {
        let wanted = pins([n, n.min(1)]);
        engine.rearrange(wanted.clone()).unwrap();
        assert_eq!(finish(&mut engine).failed_pins, 0);
        assert_eq!(engine.plan().layers, wanted.layers);
        check_pins_on_gpus(&engine.experts.store);
    }
}

#[test]
fn what_a_failing_gpu_loses_is_computed_elsewhere() {
    for home in [TierKind::Nvme, TierKind::Pmem] {
        let (gguf, shape) = open("arch/qwen3moe.gguf");
        let plan = plan(&shape, home, |_| layer([2, 0, 1], 0, DRAM));
        let in_memory = all_in_memory(&shape, 96, KvType::F32);
        let expected = text(&mut load(&gguf, &in_memory, 13).0);
        let (mut engine, [device, _]) = load(&gguf, &plan, 13);
        engine
            .rearrange(other(&plan, &shape, &mut Random(9)))
            .unwrap();
        device.fails.store(true, Ordering::Relaxed);
        let ended = finish(&mut engine);
        assert!(ended.failed_pins > 0, "{ended:?}");
        device.fails.store(false, Ordering::Relaxed);
        let off = nmse(&text(&mut engine), &expected);
        assert!(off < 1e-5, "{off:e}");
        // The plan says what is there, and its places can be used again.
        let on_gpu = |plan: &Placement| plan.tiers[VRAM0].bytes.pinned;
        assert!(on_gpu(engine.plan()) < on_gpu(&plan));
        let again = other(&plan, &shape, &mut Random(10));
        engine.rearrange(again.clone()).unwrap();
        assert_eq!(finish(&mut engine).failed_pins, 0);
        assert_eq!(engine.plan().layers, again.layers);
        check_pins_on_gpus(&engine.experts.store);
    }
}

/// Loads a copy of a model, and returns the file's path, too.
fn load_copy(folder: &tempfile::TempDir, plan: &Placement) -> (Engine, std::path::PathBuf) {
    let path = folder.path().join("model.gguf");
    let data = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../tests/data/arch/qwen3moe.gguf"
    );
    std::fs::copy(data, &path).unwrap();
    let gguf = Arc::new(Gguf::open(&path).unwrap());
    (load(&gguf, plan, 13).0, path)
}

#[test]
fn a_file_that_was_cut_short_is_not_looked_at() {
    let (_, shape) = open("arch/qwen3moe.gguf");
    for home in [TierKind::Nvme, TierKind::Pmem] {
        let folder = tempfile::tempdir().unwrap();
        let plan = plan(&shape, home, |_| layer([2, 0, 1], 0, DRAM));
        let (mut engine, path) = load_copy(&folder, &plan);
        std::fs::File::create(&path).unwrap();
        let mut wanted = plan.clone();
        for placed in &mut wanted.layers {
            // One that is on the last tier, and one that is in main memory.
            let [on_gpu, in_memory] = &mut placed.pinned[..] else {
                panic!("pins on two tiers")
            };
            on_gpu.experts = vec![0, in_memory.experts[0]];
            in_memory.experts.clear();
        }
        wanted.fill_sums(&shape);
        engine.rearrange(wanted.clone()).unwrap();
        let error = engine.forward(&[1], LogitsMode::Last).unwrap_err();
        assert!(error.to_string().contains("changed"), "{error}");
        // Between texts, too.
        let ended = finish(&mut engine);
        assert_eq!(
            ended.failed_pins,
            2 * shape.experts.len() as u64,
            "{ended:?}"
        );
        assert_eq!(ended.done_bytes, 0);
    }
}

#[test]
fn what_two_gpus_exchange_is_read_anew() {
    let (gguf, shape) = open("arch/qwen3moe.gguf");
    for home in [TierKind::Nvme, TierKind::Pmem] {
        let plan = plan(&shape, home, |_| layer([1, 2, 0], 0, DRAM));
        let (mut engine, _) = load(&gguf, &plan, 13);
        let mut wanted = plan.clone();
        for placed in &mut wanted.layers {
            let [first, second] = &mut placed.pinned[..] else {
                panic!("pins on two tiers")
            };
            std::mem::swap(&mut first.experts[0], &mut second.experts[0]);
            second.experts.sort_unstable();
        }
        engine.rearrange(wanted.clone()).unwrap();
        assert_eq!(finish(&mut engine).failed_pins, 0);
        assert_eq!(engine.plan().layers, wanted.layers);
        check_pins_on_gpus(&engine.experts.store);
        let expected = text(&mut load(&gguf, &wanted, 13).0);
        assert_eq!(text(&mut engine), expected);
    }
}

#[test]
fn a_model_that_is_fully_on_a_gpu_stays_there() {
    let (gguf, shape) = open("arch/qwen3moe.gguf");
    let of = (96, KvType::F32);
    let mut plan = gpu_tests::plan(&shape, of, gpu_tests::ALL, true, gpu_tests::Experts::Gpu);
    let home = plan.home_tier();
    plan.tiers[home].budget_bytes = 1 << 30;
    let mut engine = gpu_tests::load(&gguf, &plan, 13);
    let mut wanted = plan.clone();
    wanted.layers[1].pinned[0].experts.pop();
    wanted.fill_sums(&shape);
    let refused = engine.rearrange(wanted).unwrap_err().to_string();
    let named = "all pins of a model that is fully on it";
    assert!(refused.contains(named), "{refused}");
    engine.rearrange(plan).unwrap();
    assert_eq!(finish(&mut engine), Rearranged::default());
    text(&mut engine);
}
