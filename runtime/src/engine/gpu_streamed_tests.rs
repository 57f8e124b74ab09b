//! Experts of main memory that an emulated GPU computes for tokens, beside the processor.

use super::gpu_slot_tests::{
    DRAM, Layer, VRAM0, VRAM1, counts, load, open, plan, text, without_gpus,
};
use crate::engine::{Engine, LogitsMode};
use crate::plans::in_memory::all_in_memory;
use std::sync::atomic::Ordering;
use tier_plan_formats::machine::TierKind;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::shape::ModelShape;
use tier_plan_formats::placement::{Placement, SlotPolicy, Streaming, TierIdx};
use tier_plan_testing::nmse;

/// Rates with which the GPU takes up to half of the experts.
fn streaming(from: TierIdx, experts: u32) -> Streaming {
    Streaming {
        tier: VRAM0,
        from,
        experts,
        link_gbps: 0.8,
        cpu_share: 1.0,
    }
}

/// A plan whose layers are alike, with experts streamed.
fn streamed_plan(shape: &ModelShape, home: TierKind, layer: Layer, s: Streaming) -> Placement {
    let Layer {
        pinned,
        slots,
        slot_tier,
        policy,
    } = layer;
    let mut plan = plan(shape, home, |_| Layer {
        pinned,
        slots,
        slot_tier,
        policy,
    });
    plan.tiers.iter_mut().for_each(|t| t.tier.latency_us = 0.0);
    plan.tiers[s.from].tier.read_gbps = 1.0;
    plan.streaming = Some(s);
    plan.fill_sums(shape);
    plan.tiers
        .iter_mut()
        .for_each(|t| t.budget_bytes = t.used_bytes());
    plan
}

/// Returns the streamed experts that count as those of decoded tokens.
fn counted(engine: &Engine) -> u64 {
    engine.counters().layers.iter().map(|l| l.streamed).sum()
}

fn pinned(pinned: [u32; 3]) -> Layer {
    Layer {
        pinned,
        slots: 0,
        slot_tier: DRAM,
        policy: SlotPolicy::Lru,
    }
}

/// Compares a plan with the processor alone. Returns how many experts were streamed for the 12
/// tokens of a text.
fn compare(name: &str, home: TierKind, layer: Layer, s: Streaming) -> u64 {
    let (gguf, shape) = open(name);
    let plan = streamed_plan(&shape, home, layer, s);
    let (mut engine, _) = load(&gguf, &plan, 13);
    let got = text(&mut engine);
    let expected = text(&mut load(&gguf, &all_in_memory(&shape, 96, KvType::F32), 13).0);
    let off = nmse(&got, &expected);
    assert!(off < 1e-5, "{name}: {off:e}");
    let streamed = engine.experts_streamed_for_tokens();
    assert_eq!(got != expected, streamed > 0, "{name}: {streamed}");
    assert_eq!(counted(&engine), streamed, "{name}");
    // Where what was read is counted, experts count once.
    let n_used: u64 = shape.experts.iter().map(|e| u64::from(e.n_used)).sum();
    assert!(streamed < 12 * n_used, "{name}");
    // A second run gives the same.
    let (mut again, _) = load(&gguf, &plan, 13);
    assert_eq!(text(&mut again), got, "{name}");
    assert_eq!(counts(&again), counts(&engine), "{name}");
    streamed
}

#[test]
fn pins_of_main_memory_pass_through_a_gpu_for_tokens() {
    // Biases, experts without a gate, weights on what experts read, and a smaller space.
    for name in [
        "arch/qwen3moe.gguf",
        "arch/gpt-oss.gguf",
        "quant/Q4_K_M.gguf",
        "arch2/nemotron_h_moe.gguf",
        "arch2/llama4.gguf",
    ] {
        let (_, shape) = open(name);
        let all = shape.experts[0].n_expert;
        let s = streaming(DRAM, 2);
        let streamed = compare(name, TierKind::Nvme, pinned([0, 0, all]), s);
        let plan = streamed_plan(&shape, TierKind::Nvme, pinned([0, 0, all]), s);
        let each = |e: &tier_plan_formats::model::shape::ExpertShape| {
            let times = plan.stream_times(e.expert_bytes).unwrap();
            u64::from(times.divide(e.n_used, e.n_used, 0).streamed)
        };
        let per_token: u64 = shape.experts.iter().map(each).sum();
        assert_eq!(streamed, 12 * per_token, "{name}");
        let n_used = shape.experts[0].n_used;
        assert_eq!(per_token > 0, n_used > 1, "{name}: {n_used} experts");
    }
}

#[test]
fn mapped_experts_are_streamed_beside_those_of_the_gpu() {
    let home = TierIdx::new(3);
    let streamed = compare(
        "arch/qwen2moe.gguf",
        TierKind::Dram,
        pinned([2, 1, 0]),
        streaming(home, 3),
    );
    assert!(streamed > 12, "{streamed}");
}

#[test]
fn what_is_in_slots_is_streamed_when_nothing_is_read() {
    for (slots, policy) in [(5, SlotPolicy::Lru), (4, SlotPolicy::Lfu { half_life: 8 })] {
        let layer = Layer {
            pinned: [0, 0, 2],
            slots,
            slot_tier: DRAM,
            policy,
        };
        let streamed = compare(
            "arch/qwen3moe.gguf",
            TierKind::Nvme,
            layer,
            streaming(DRAM, 1),
        );
        assert!(streamed > 0, "{slots} slots");
    }
}

#[test]
fn slow_links_and_emulated_gpus_take_nothing() {
    let slow = Streaming {
        link_gbps: 0.01,
        ..streaming(DRAM, 2)
    };
    let name = "arch/qwen3moe.gguf";
    let (gguf, shape) = open(name);
    let layer = || pinned([0, 0, shape.experts[0].n_expert]);
    assert_eq!(compare(name, TierKind::Nvme, layer(), slow), 0);
    let mut plan = streamed_plan(&shape, TierKind::Nvme, layer(), streaming(DRAM, 2));
    let all: Engine = load(&gguf, &plan, 13).0;
    assert_eq!(all.experts_streamed_for_tokens(), 0, "nothing was decoded");
    plan = without_gpus(&plan);
    let error = Engine::load(gguf, &plan, &Default::default(), &mut |_, _| {})
        .err()
        .unwrap();
    assert!(error.to_string().contains("vram"), "{error}");
}

#[test]
fn what_is_streamed_for_a_prompt_of_one_token_is_not_counted() {
    let (gguf, shape) = open("arch/qwen3moe.gguf");
    let layer = pinned([0, 0, shape.experts[0].n_expert]);
    let plan = streamed_plan(&shape, TierKind::Nvme, layer, streaming(DRAM, 2));
    let mut engine = load(&gguf, &plan, 13).0;
    engine.forward(&[7], LogitsMode::Last).unwrap();
    let of_prompt = engine.experts_streamed_for_tokens();
    assert!(of_prompt > 0);
    assert_eq!(counted(&engine), 0);
    engine.forward(&[9], LogitsMode::Last).unwrap();
    let hits = engine.counters().layers.iter().map(|l| l.pinned_hits);
    let n_used: u64 = shape.experts.iter().map(|e| u64::from(e.n_used)).sum();
    assert_eq!(hits.sum::<u64>(), n_used, "streamed experts are hits");
    assert_eq!(counted(&engine), of_prompt);
    engine.reset_counters();
    assert_eq!(counted(&engine), 0);
}

#[test]
fn a_gpu_that_fails_is_an_error_and_the_next_text_is_right() {
    let (gguf, shape) = open("arch/qwen3moe.gguf");
    let layer = pinned([1, 0, shape.experts[0].n_expert - 1]);
    let plan = streamed_plan(&shape, TierKind::Nvme, layer, streaming(DRAM, 2));
    let (mut engine, [device, _]) = load(&gguf, &plan, 13);
    let expected = text(&mut engine);
    for _ in 0..2 {
        engine.clear();
        engine.forward(&[1, 2, 3], LogitsMode::Last).unwrap();
        device.fails.store(true, Ordering::Relaxed);
        let error = engine
            .forward(&[9], LogitsMode::Last)
            .unwrap_err()
            .to_string();
        assert!(error.contains("it was told to fail"), "{error}");
        device.fails.store(false, Ordering::Relaxed);
        engine.clear();
        assert_eq!(text(&mut engine), expected);
    }
}

#[test]
fn experts_go_to_one_gpu_while_another_computes_its_own() {
    let (_, shape) = open("arch/qwen3moe.gguf");
    let all = shape.experts[0].n_expert;
    let s = Streaming {
        tier: VRAM1,
        ..streaming(DRAM, 2)
    };
    let layer = pinned([2, 0, all - 2]);
    assert!(compare("arch/qwen3moe.gguf", TierKind::Nvme, layer, s) > 0);
}
