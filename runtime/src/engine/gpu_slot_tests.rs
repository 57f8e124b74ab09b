//! Experts on several GPUs, pinned and in slots, on emulated devices: against the processor alone,
//! and against the same plan with the tiers emulated in main memory.

use crate::engine::{Engine, LogitsMode};
use crate::options::LoadOptions;
use crate::plans::in_memory::all_in_memory;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use tier_plan_cuda::device::{Arg, Grid};
use tier_plan_cuda::transfers::Transfers;
use tier_plan_cuda::{CudaError, Device, shim};
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::machine::TierKind;
use tier_plan_formats::model::kv::{CacheRoom, KvType};
use tier_plan_formats::model::shape::ModelShape;
use tier_plan_formats::model::{describe, shape::shape_of};
use tier_plan_formats::placement::{PerTier, Pins, Placement, SlotPolicy, TierIdx};
use tier_plan_testing::nmse;

pub(super) const VRAM0: TierIdx = TierIdx::new(0);
pub(super) const VRAM1: TierIdx = TierIdx::new(1);
pub(super) const DRAM: TierIdx = TierIdx::new(2);

/// What a plan does with a layer: experts pinned by tier, and slots.
pub(super) struct Layer {
    pub(super) pinned: [u32; 3],
    pub(super) slots: u32,
    pub(super) slot_tier: TierIdx,
    pub(super) policy: SlotPolicy,
}

pub(super) fn open(name: &str) -> (Arc<Gguf>, ModelShape) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/data")
        .join(name);
    let gguf = Arc::new(Gguf::open(&path).unwrap());
    let shape = shape_of(&gguf, &describe(&gguf).unwrap());
    (gguf, shape)
}

/// Two GPUs, main memory with all that is dense, and pooled experts on `home`. Pinned are the last
/// experts, of which a few are on each tier, so that a layer's pooled experts begin with 0.
pub(super) fn plan(
    shape: &ModelShape,
    home: TierKind,
    layer_of: impl Fn(usize) -> Layer,
) -> Placement {
    let mut plan = all_in_memory(shape, 96, KvType::F32);
    let all = plan.tiers[TierIdx::FIRST].clone();
    let mut tiers = PerTier::from_fn(4, |_| all.clone());
    let kinds = [TierKind::Vram, TierKind::Vram, TierKind::Dram, home];
    for (t, (name, kind)) in tiers
        .iter_mut()
        .zip(["vram0", "vram1", "dram", "home"].into_iter().zip(kinds))
    {
        (t.tier.name, t.tier.kind, t.tier.read_gbps) = (name.into(), kind, 1e6);
    }
    (plan.kv_tier, plan.staging_tier) = (DRAM, DRAM);
    plan.dense.iter_mut().for_each(|d| d.tier = DRAM);
    for (i, (layer, of)) in plan.layers.iter_mut().zip(&shape.experts).enumerate() {
        let wanted = layer_of(i);
        let mut last = of.n_expert;
        for (tier, n) in TierIdx::first(3).zip(wanted.pinned).filter(|(_, n)| *n > 0) {
            layer.pinned.push(Pins {
                tier,
                experts: (last - n..last).collect(),
            });
            last -= n;
        }
        (layer.slots, layer.slot_tier, layer.policy) =
            (wanted.slots, wanted.slot_tier, wanted.policy);
        if home == TierKind::Nvme {
            plan.staging_experts = plan.staging_experts.max(of.n_used + 1);
        }
    }
    plan.tiers = tiers;
    plan.fill_sums(shape);
    plan.tiers
        .iter_mut()
        .for_each(|t| t.budget_bytes = t.used_bytes());
    plan
}

/// The same with GPUs that are emulated in main memory.
pub(super) fn without_gpus(plan: &Placement) -> Placement {
    let mut plan = plan.clone();
    plan.tiers
        .iter_mut()
        .filter(|t| t.tier.kind == TierKind::Vram)
        .for_each(|t| t.tier.emulated = true);
    plan
}

/// A device that counts its launches, and fails when told to.
pub(super) struct Watched {
    of: Arc<shim::Shim>,
    launches: AtomicUsize,
    pub(super) fails: AtomicBool,
}

impl Watched {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            of: shim::shared(),
            launches: AtomicUsize::new(0),
            fails: AtomicBool::new(false),
        })
    }

    fn works(&self, what: &str) -> Result<(), CudaError> {
        if !self.fails.load(Ordering::Relaxed) {
            return Ok(());
        }
        Err(CudaError::Call {
            device: "a device".into(),
            what: what.into(),
            why: "it was told to fail".into(),
        })
    }
}

impl Device for Watched {
    fn name(&self) -> &str {
        "a device that is watched"
    }
    fn free_bytes(&self) -> Result<usize, CudaError> {
        self.of.free_bytes()
    }
    fn allocate(&self, len: usize) -> Result<u64, CudaError> {
        self.of.allocate(len)
    }
    unsafe fn free(&self, at: u64) {
        // SAFETY: the caller's promise.
        unsafe { self.of.free(at) };
    }
    unsafe fn write(&self, to: u64, bytes: &[u8]) -> Result<(), CudaError> {
        self.works("a copy")?;
        // SAFETY: the caller's promise.
        unsafe { self.of.write(to, bytes) }
    }
    unsafe fn read(&self, from: u64, bytes: &mut [u8]) -> Result<(), CudaError> {
        // SAFETY: the caller's promise.
        unsafe { self.of.read(from, bytes) }
    }
    unsafe fn launch(
        &self,
        kernel: &'static str,
        grid: Grid,
        args: &[Arg],
    ) -> Result<(), CudaError> {
        self.works(kernel)?;
        self.launches.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { self.of.launch(kernel, grid, args) }
    }
    fn wait(&self) -> Result<(), CudaError> {
        self.of.wait()
    }
    fn transfers(self: Arc<Self>) -> Result<Option<Box<dyn Transfers>>, CudaError> {
        Arc::clone(&self.of).transfers()
    }
}

pub(super) type Devices = [Arc<Watched>; 2];

pub(super) fn load(gguf: &Arc<Gguf>, plan: &Placement, batch: usize) -> (Engine, Devices) {
    let devices = [Watched::new(), Watched::new()];
    let options = LoadOptions {
        threads: Some(2),
        batch: Some(batch),
        ..LoadOptions::default()
    };
    let give = |number: usize| Ok(Arc::clone(&devices[number]) as Arc<dyn Device>);
    let engine = Engine::load_on(
        Arc::clone(gguf),
        plan,
        &options,
        Some(&give),
        &mut |_, _| {},
    )
    .unwrap();
    let planned: Vec<u64> = plan.tiers.iter().map(|t| t.used_bytes()).collect();
    assert_eq!(engine.resident_bytes().as_slice(), planned);
    (engine, devices)
}

/// Logits of a prompt in several batches, and of tokens after it.
pub(super) fn text(engine: &mut Engine) -> Vec<f32> {
    let n_vocab = engine.spec().n_vocab as u32;
    let tokens: Vec<u32> = (0..40).map(|i| (i * 37 + 5) % n_vocab).collect();
    let mut all = engine.forward(&tokens, LogitsMode::All).unwrap().to_vec();
    for i in 0..12 {
        all.extend_from_slice(
            engine
                .forward(&[(i * i * 11 + 3) % n_vocab], LogitsMode::Last)
                .unwrap(),
        );
    }
    all
}

/// Pinned hits, slot hits, misses and missed bytes by layer, and bytes of the prompt.
pub(super) fn counts(engine: &Engine) -> (Vec<[u64; 4]>, u64) {
    let c = engine.counters();
    (
        c.layers
            .iter()
            .map(|l| [l.pinned_hits, l.slot_hits, l.misses, l.missed_bytes])
            .collect(),
        c.prompt_missed_bytes,
    )
}

/// Compares a plan with the processor alone, and with GPUs that are emulated; says how often each
/// device launched.
fn compare(name: &str, home: TierKind, layer_of: impl Fn(usize) -> Layer) -> [usize; 2] {
    let (gguf, shape) = open(name);
    let plan = plan(&shape, home, layer_of);
    let (mut engine, devices) = load(&gguf, &plan, 13);
    let got = text(&mut engine);
    let expected = text(&mut load(&gguf, &all_in_memory(&shape, 96, KvType::F32), 13).0);
    assert_ne!(
        got, expected,
        "{name}: the same bits would mean that the processor computed everything"
    );
    let off = nmse(&got, &expected);
    assert!(off < 1e-5, "{name}: {off:e}");
    let (mut emulated, unused) = load(&gguf, &without_gpus(&plan), 13);
    assert_eq!(text(&mut emulated), expected, "{name}");
    assert_eq!(counts(&engine), counts(&emulated), "{name}");
    assert!(
        unused
            .iter()
            .all(|device| device.launches.load(Ordering::Relaxed) == 0)
    );
    // A second run, in which other reads are faster, gives the same.
    let (mut again, _) = load(&gguf, &plan, 13);
    assert_eq!(text(&mut again), got, "{name}");
    devices.map(|device| device.launches.load(Ordering::Relaxed))
}

const LRU: SlotPolicy = SlotPolicy::Lru;

#[test]
fn slots_on_a_gpu_give_the_same_text_and_hits() {
    for (name, slots) in [
        ("arch/qwen3moe.gguf", 3),
        ("arch/gpt-oss.gguf", 4),
        ("quant/Q4_K_M.gguf", 3),
        ("arch2/nemotron_h_moe.gguf", 3),
        ("arch2/llama4.gguf", 2),
    ] {
        let [first, second] = compare(name, TierKind::Nvme, |_| Layer {
            pinned: [0; 3],
            slots,
            slot_tier: VRAM0,
            policy: LRU,
        });
        assert!(
            first > 0 && second == 0,
            "{name}: {first} and {second} launches"
        );
    }
}

#[test]
fn few_slots_and_many_experts_at_once_give_the_same_text_and_hits() {
    // A batch uses more experts than there are slots, so that some move to slots which others still
    // use.
    for slots in [1, 2] {
        compare("arch/qwen3moe.gguf", TierKind::Nvme, |_| Layer {
            pinned: [0; 3],
            slots,
            slot_tier: VRAM1,
            policy: LRU,
        });
    }
}

#[test]
fn experts_on_a_mapped_tier_go_to_slots_on_a_gpu() {
    for slots in [2, 5] {
        compare("arch/gpt-oss.gguf", TierKind::Pmem, |_| Layer {
            pinned: [0; 3],
            slots,
            slot_tier: VRAM0,
            policy: LRU,
        });
    }
}

#[test]
fn two_gpus_and_main_memory_share_experts() {
    for name in [
        "arch/qwen3moe.gguf",
        "arch/qwen2moe.gguf",
        "quant/Q5_0.gguf",
        "arch2/nemotron_h_moe-puzzle.gguf",
    ] {
        let launches = compare(name, TierKind::Nvme, |_| Layer {
            pinned: [2, 1, 1],
            slots: 2,
            slot_tier: DRAM,
            policy: LRU,
        });
        assert!(launches.iter().all(|n| *n > 0), "{name}: {launches:?}");
    }
}

#[test]
fn layers_differ_in_where_pins_and_slots_are() {
    let policies = [LRU, SlotPolicy::Lfu { half_life: 8 }];
    let launches = compare("arch/qwen3moe.gguf", TierKind::Nvme, |layer| {
        match layer % 3 {
            // Slots on the GPU that also has pins, on the other one, and in main memory.
            0 => Layer {
                pinned: [1, 0, 1],
                slots: 3,
                slot_tier: VRAM0,
                policy: policies[0],
            },
            1 => Layer {
                pinned: [1, 0, 0],
                slots: 2,
                slot_tier: VRAM1,
                policy: policies[1],
            },
            _ => Layer {
                pinned: [0, 2, 0],
                slots: 2,
                slot_tier: DRAM,
                policy: policies[1],
            },
        }
    });
    assert!(launches.iter().all(|n| *n > 0), "{launches:?}");
}

#[test]
fn a_batch_that_a_gpu_has_no_room_for_goes_through_it_in_parts() {
    let (gguf, shape) = open("arch/olmoe.gguf");
    let n_used = shape.experts[0].n_used;
    let long = 640 / n_used + 40;
    let all = shape.experts[0].n_expert;
    let mut plan = plan(&shape, TierKind::Nvme, |_| Layer {
        pinned: [all, 0, 0],
        slots: 0,
        slot_tier: DRAM,
        policy: LRU,
    });
    let mut plain = all_in_memory(&shape, 96, KvType::F32);
    for plan in [&mut plan, &mut plain] {
        plan.context = long;
        let kv = KvType::F32.cache_bytes(&shape, CacheRoom::of_one(long));
        let tier = &mut plan.tiers[plan.kv_tier];
        tier.bytes.kv = kv;
        tier.budget_bytes = tier.used_bytes();
    }
    let run = |plan: &Placement| {
        let (mut engine, _) = load(&gguf, plan, long as usize);
        let n_vocab = engine.spec().n_vocab as u32;
        let tokens: Vec<u32> = (0..long).map(|i| (i * 37 + 5) % n_vocab).collect();
        engine.forward(&tokens, LogitsMode::Last).unwrap().to_vec()
    };
    let off = nmse(&run(&plan), &run(&plain));
    assert!(off < 1e-5, "{off:e}");
}

#[test]
fn a_gpu_that_fails_is_an_error_and_leaves_no_wrong_expert_in_a_slot() {
    for home in [TierKind::Nvme, TierKind::Pmem] {
        let (gguf, shape) = open("arch/qwen3moe.gguf");
        let plan = plan(&shape, home, |_| Layer {
            pinned: [1, 0, 0],
            slots: 3,
            slot_tier: VRAM0,
            policy: LRU,
        });
        let (mut engine, [device, _]) = load(&gguf, &plan, 13);
        let expected = text(&mut engine);
        for _ in 0..2 {
            engine.clear();
            device.fails.store(true, Ordering::Relaxed);
            let error = engine
                .forward(&[1, 2, 3, 4, 5], LogitsMode::Last)
                .unwrap_err()
                .to_string();
            assert!(error.contains("it was told to fail"), "{error}");
            let error = engine
                .forward(&[9], LogitsMode::Last)
                .unwrap_err()
                .to_string();
            assert!(error.contains("it was told to fail"), "{error}");
            device.fails.store(false, Ordering::Relaxed);
            let off = nmse(&text(&mut engine), &expected);
            assert!(off < 1e-5, "{off:e}");
        }
    }
}
