//! Models whose layers several GPUs share, or a GPU and the processor: each has the keys and values
//! of its own layers. The devices are emulated, and each refuses what lies in another's memory.

use super::gpu_tests::open;
use crate::engine::{Engine, LogitsMode};
use crate::options::LoadOptions;
use crate::plans::in_memory::all_in_memory;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use tier_plan_cuda::device::{Arg, Grid};
use tier_plan_cuda::{CudaError, Device, shim};
use tier_plan_formats::machine::TierKind;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::shape::{DenseKind, ModelShape};
use tier_plan_formats::placement::{Pins, Placement, TierIdx};
use tier_plan_testing::{is_nightly, nmse};

/// Tiers of the plans here.
const GPU0: TierIdx = TierIdx::new(0);
const GPU1: TierIdx = TierIdx::new(1);
const DRAM: TierIdx = TierIdx::new(2);

/// The emulated device, which knows what is in its memory.
struct Own {
    shim: Arc<shim::Shim>,
    name: String,
    free: usize,
    /// Lengths of buffers by their beginnings.
    buffers: Mutex<BTreeMap<u64, usize>>,
    launches: Mutex<usize>,
}

impl Own {
    fn new(number: usize, free: usize) -> Arc<Self> {
        let name = format!("GPU {number}");
        Arc::new(Self {
            shim: shim::shared(),
            name,
            free,
            buffers: Mutex::default(),
            launches: Mutex::default(),
        })
    }

    fn check(&self, at: u64) {
        let buffers = self.buffers.lock().unwrap();
        let before = buffers.range(..=at).next_back();
        // A view of nothing may begin where a buffer ends.
        let mine = at == 0 || before.is_some_and(|(first, len)| at <= first + *len as u64);
        assert!(
            mine,
            "{} was given an address that is not its own",
            self.name
        );
    }
}

impl Device for Own {
    fn name(&self) -> &str {
        &self.name
    }
    fn free_bytes(&self) -> Result<usize, CudaError> {
        Ok(self.free)
    }
    fn allocate(&self, len: usize) -> Result<u64, CudaError> {
        let at = self.shim.allocate(len)?;
        self.buffers.lock().unwrap().insert(at, len);
        Ok(at)
    }
    unsafe fn free(&self, at: u64) {
        self.buffers.lock().unwrap().remove(&at);
        // SAFETY: the caller's promise.
        unsafe { self.shim.free(at) };
    }
    unsafe fn write(&self, to: u64, bytes: &[u8]) -> Result<(), CudaError> {
        self.check(to);
        // SAFETY: the caller's promise.
        unsafe { self.shim.write(to, bytes) }
    }
    unsafe fn read(&self, from: u64, bytes: &mut [u8]) -> Result<(), CudaError> {
        self.check(from);
        // SAFETY: the caller's promise.
        unsafe { self.shim.read(from, bytes) }
    }
    unsafe fn launch(
        &self,
        kernel: &'static str,
        grid: Grid,
        args: &[Arg],
    ) -> Result<(), CudaError> {
        *self.launches.lock().unwrap() += 1;
        for arg in args {
            if let Arg::Pointer(at) = arg {
                self.check(*at);
            }
        }
        // SAFETY: the caller's promise.
        unsafe { self.shim.launch(kernel, grid, args) }
    }
    fn wait(&self) -> Result<(), CudaError> {
        self.shim.wait()
    }
}

/// A plan for two GPUs and main memory: where each dense group is, and each layer's experts.
fn plan(
    shape: &ModelShape,
    (context, kv_type): (u32, KvType),
    dense: impl Fn(DenseKind, Option<u32>) -> TierIdx,
    experts: impl Fn(u32) -> TierIdx,
) -> Placement {
    let mut plan = all_in_memory(shape, context, kv_type);
    for name in ["gpu-b", "gpu-a"] {
        let mut gpu = plan.tiers[TierIdx::new(0)].clone();
        (gpu.tier.name, gpu.tier.kind, gpu.budget_bytes) = (name.into(), TierKind::Vram, 1 << 40);
        (gpu.tier.capacity_bytes, gpu.tier.unit) = (1 << 40, None);
        plan.tiers = [gpu].into_iter().chain(plan.tiers).collect();
    }
    (plan.staging_tier, plan.kv_tier) = (DRAM, DRAM);
    let dense_groups = plan.dense.iter_mut();
    dense_groups.for_each(|d| match d.kind {
        DenseKind::TokenTable => d.tier = DRAM,
        kind => d.tier = dense(kind, d.layer),
    });
    for (layer, of) in plan.layers.iter_mut().zip(&shape.experts) {
        (layer.slot_tier, layer.pinned) = (DRAM, Vec::new());
        let tier = experts(layer.layer);
        if tier != DRAM {
            layer.pinned.push(Pins {
                tier,
                experts: (0..of.n_expert).collect(),
            });
        }
    }
    plan.fill_sums(shape);
    plan
}

/// Prompts of several batches and tokens between them, as a conversation has.
fn text(engine: &mut Engine) -> Vec<f32> {
    let n_vocab = engine.spec().n_vocab as u32;
    let mut all = Vec::new();
    for turn in 0..2 {
        let tokens: Vec<u32> = (0..21 - 3 * turn)
            .map(|i| (i * 37 + 5 + turn) % n_vocab)
            .collect();
        all.extend_from_slice(engine.forward(&tokens, LogitsMode::All).unwrap());
        for i in 0..3 {
            all.extend_from_slice(
                engine
                    .forward(&[(i * 11 + 3) % n_vocab], LogitsMode::Last)
                    .unwrap(),
            );
        }
    }
    all
}

/// Compares a plan with the processor alone; says how often each GPU launched.
fn compare(name: &str, of: (u32, KvType), make: impl Fn(&ModelShape) -> Placement) -> [usize; 2] {
    let (gguf, shape) = open(name);
    let devices = [Own::new(0, usize::MAX), Own::new(1, usize::MAX)];
    let options = LoadOptions {
        threads: Some(2),
        batch: Some(13),
        ..LoadOptions::default()
    };
    let give = |number: usize| Ok(Arc::clone(&devices[number]) as Arc<dyn Device>);
    let load = |plan: &Placement| {
        let engine = Engine::load_on(
            Arc::clone(&gguf),
            plan,
            &options,
            Some(&give),
            &mut |_, _| {},
        )
        .unwrap();
        let planned: Vec<u64> = plan.tiers.iter().map(|t| t.used_bytes()).collect();
        assert_eq!(engine.resident_bytes().as_slice(), planned, "{name}");
        engine
    };
    let mut engine = load(&make(&shape));
    let got = text(&mut engine);
    let mut plain = load(&all_in_memory(&shape, of.0, of.1));
    let expected = text(&mut plain);
    assert_ne!(
        got, expected,
        "{name}: the same bits would mean that the processor computed everything"
    );
    let off = nmse(&got, &expected);
    assert!(off < 1e-5, "{name}: {off:e}");
    assert_eq!(engine.routing().experts, plain.routing().experts, "{name}");
    // Going back, as a conversation does that is edited: every layer has what it had, wherever that
    // is.
    if engine.truncate(9).is_ok() {
        plain.truncate(9).unwrap();
        let again = engine.forward(&[7, 8], LogitsMode::All).unwrap().to_vec();
        let off = nmse(&again, plain.forward(&[7, 8], LogitsMode::All).unwrap());
        assert!(off < 1e-5, "{name}: {off:e}");
    }
    engine.clear();
    assert_eq!(text(&mut engine), got, "{name}");
    drop(engine);
    devices.map(|device| {
        assert!(device.buffers.lock().unwrap().is_empty());
        *device.launches.lock().unwrap()
    })
}

#[test]
fn two_gpus_share_the_layers_of_a_model() {
    for name in [
        "arch/qwen3moe",
        "arch/gpt-oss",
        "arch/llama-dense",
        "arch/deepseek-v3",
        "arch/kimi-k2",
        "arch2/nemotron_h_moe",
        "arch2/qwen4exp",
    ] {
        let kv_types = [KvType::F32, KvType::Q8_0];
        for kv_type in &kv_types[..if is_nightly() { 2 } else { 1 }] {
            let of = (64, *kv_type);
            let launches = compare(&format!("{name}.gguf"), of, |shape| {
                let gpu = |layer: u32| {
                    if layer < shape.n_layer / 2 {
                        GPU0
                    } else {
                        GPU1
                    }
                };
                let dense = |kind, layer: Option<u32>| match (kind, layer) {
                    (DenseKind::Embedding, _) => DRAM,
                    (_, None) => GPU1,
                    (_, Some(layer)) => gpu(layer),
                };
                let plan = plan(shape, of, dense, gpu);
                assert!(
                    plan.tiers.iter().take(2).all(|t| t.bytes.kv > 0)
                        && plan.tiers[DRAM].bytes.kv == 0
                );
                plan
            });
            assert!(launches.iter().all(|n| *n > 0), "{name}: {launches:?}");
        }
    }
}

#[test]
fn a_gpu_has_the_attention_of_some_layers() {
    for name in [
        "arch/qwen3moe",
        "arch/glm4moe",
        "arch/gpt-oss",
        "arch/deepseek-v3",
        "arch/kimi-k2",
    ] {
        let of = (64, KvType::F16);
        let launches = compare(&format!("{name}.gguf"), of, |shape| {
            // The last layer as `-ngl` would have it, its router and experts not.
            let last = shape.n_layer - 1;
            let attention = |kind, layer| kind == DenseKind::Attention && layer == Some(last);
            let plan = plan(
                shape,
                of,
                |kind, layer| if attention(kind, layer) { GPU0 } else { DRAM },
                |_| DRAM,
            );
            assert!(plan.tiers[GPU0].bytes.kv > 0 && plan.tiers[DRAM].bytes.kv > 0);
            plan
        });
        assert!(launches[0] > 0 && launches[1] == 0, "{name}: {launches:?}");
    }
}

#[test]
fn attention_goes_from_place_to_place() {
    // GPU, processor, other GPU, and routers one further; layers with recurrent state stay. The
    // caches of both GPUs are with them, or with the processor's where they can be.
    for (name, host_kv) in [
        ("arch/qwen2moe", false),
        ("arch/kimi-k2", false),
        ("arch/qwen3next", false),
        ("arch2/nemotron_h_moe", false),
        ("arch/qwen2moe", true),
        ("arch/gpt-oss", true),
        ("arch/qwen3next", true),
    ] {
        let of = (64, KvType::F16);
        compare(&format!("{name}.gguf"), of, |shape| {
            let place = |layer: Option<u32>, more: u32| {
                [GPU0, DRAM, GPU1][(layer.unwrap_or(0) + more) as usize % 3]
            };
            let dense = |kind, layer: Option<u32>| match kind {
                DenseKind::Attention => {
                    let stays = layer.is_some_and(|l| shape.caches[l as usize].state_bytes > 0);
                    if stays { DRAM } else { place(layer, 0) }
                }
                _ => place(layer, 1),
            };
            let mut plan = plan(shape, of, dense, |layer| place(Some(layer), 2));
            let on_gpu = plan.dense.iter();
            let on_gpu = on_gpu.filter(|d| d.kind == DenseKind::Attention && d.tier != DRAM);
            let mut layers: Vec<u32> = on_gpu.filter_map(|d| d.layer).collect();
            layers.retain(|layer| host_kv && shape.caches[*layer as usize].can_be_apart());
            layers.sort_unstable();
            assert_eq!(!layers.is_empty(), host_kv, "{name}");
            plan.host_kv = layers;
            plan.fill_sums(shape);
            plan
        });
    }
}

#[test]
fn what_an_indexer_chose_comes_to_where_it_is_attended_to() {
    // The second layer attends to what the first one's indexer chose, 12 positions of up to 45.
    for (first, second) in [(GPU0, DRAM), (DRAM, GPU0), (GPU0, GPU1), (GPU1, GPU1)] {
        for kv_type in [KvType::F32, KvType::F16] {
            let of = (64, kv_type);
            compare("arch2/glm-dsa.gguf", of, |shape| {
                let dense = |kind, layer| match (kind, layer) {
                    (DenseKind::Attention, Some(0)) => first,
                    (DenseKind::Attention, Some(1)) => second,
                    _ => DRAM,
                };
                plan(shape, of, dense, |_| DRAM)
            });
        }
    }
}

#[test]
fn each_gpu_has_room_for_its_own() {
    let (gguf, shape) = open("arch/qwen3moe.gguf");
    let of = (4096, KvType::F16);
    let all = plan(
        &shape,
        of,
        |_, layer| if layer.is_some() { GPU0 } else { DRAM },
        |_| DRAM,
    );
    let half = plan(
        &shape,
        of,
        |_, layer| layer.map_or(DRAM, |l| if l % 2 == 0 { GPU0 } else { GPU1 }),
        |_| DRAM,
    );
    assert_eq!(
        all.tiers[GPU0].bytes.kv,
        half.tiers[GPU0].bytes.kv + half.tiers[GPU1].bytes.kv
    );
    let loads = |plan: &Placement, free: usize| {
        let give = |number: usize| Ok(Own::new(number, free) as Arc<dyn Device>);
        Engine::load_on(
            Arc::clone(&gguf),
            plan,
            &LoadOptions::default(),
            Some(&give),
            &mut |_, _| {},
        )
        .map(|_| ())
    };
    let error = loads(&all, 1000).unwrap_err().to_string();
    let needed = error
        .split("needs ")
        .nth(1)
        .and_then(|rest| rest.split(' ').next())
        .unwrap();
    let needed: usize = needed.parse().unwrap();
    loads(&all, needed).unwrap();
    // A little less, and only half of it fits.
    let error = loads(&all, needed - 1).unwrap_err().to_string();
    assert!(error.contains("of tier 'gpu-a', and GPU 0 has"), "{error}");
    loads(&half, needed - 1).unwrap();
}
