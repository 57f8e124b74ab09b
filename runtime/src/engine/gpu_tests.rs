//! Engines whose experts are partly on a GPU, which is emulated on the processor: the kernels are
//! those of a real one.

use crate::engine::{Engine, LogitsMode};
use crate::error::LoadError;
use crate::options::LoadOptions;
use crate::plans::in_memory::{all_in_memory, all_on_gpu};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use tier_plan_cuda::device::{Arg, Grid, Recording};
use tier_plan_cuda::{CudaError, Device, shim};
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::machine::TierKind;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::shape::{DenseKind, ModelShape};
use tier_plan_formats::model::{describe, shape::shape_of};
use tier_plan_formats::placement::{DensePlacement, Pins, Placement, TierIdx, Violation};
use tier_plan_testing::{models, nmse};

pub(crate) fn data(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/data")
        .join(name)
}

/// Everything in main memory but for every second expert, which a GPU has.
pub(crate) fn half_on_gpu(shape: &ModelShape, context: u32) -> Placement {
    let mut plan = all_in_memory(shape, context, KvType::F32);
    let mut vram = plan.tiers[TierIdx::new(0)].clone();
    vram.tier.name = "vram".into();
    vram.tier.kind = TierKind::Vram;
    for (layer, experts) in plan.layers.iter_mut().zip(&shape.experts) {
        let pinned: Vec<u32> = (0..experts.n_expert).filter(|e| e % 2 == 1).collect();
        layer.pinned.push(Pins {
            tier: TierIdx::new(0),
            experts: pinned,
        });
    }
    plan.tiers = [vram].into_iter().chain(plan.tiers).collect();
    plan.kv_tier = TierIdx::new(1);
    plan.staging_tier = TierIdx::new(1);
    plan.dense.iter_mut().for_each(|d| d.tier = TierIdx::new(1));
    plan.layers
        .iter_mut()
        .for_each(|l| l.slot_tier = TierIdx::new(1));
    plan.fill_sums(shape);
    plan
}

pub(crate) fn open(name: &str) -> (Arc<Gguf>, ModelShape) {
    let gguf = Arc::new(Gguf::open(&data(name)).unwrap());
    let shape = shape_of(&gguf, &describe(&gguf).unwrap());
    (gguf, shape)
}

/// Logits of a prompt, and of three tokens after it.
fn logits(engine: &mut Engine, n_vocab: u32) -> Vec<f32> {
    let tokens: Vec<u32> = (0..40).map(|i| (i * 37 + 5) % n_vocab).collect();
    let mut all = engine.forward(&tokens, LogitsMode::All).unwrap().to_vec();
    for i in 0..3 {
        all.extend_from_slice(
            engine
                .forward(&[(i * 11 + 3) % n_vocab], LogitsMode::Last)
                .unwrap(),
        );
    }
    all
}

#[test]
fn experts_on_a_gpu_give_the_same_text() {
    // Float and quantized experts, fused and split, with biases and without, shared experts beside
    // them.
    for name in [
        "arch/qwen3moe.gguf",
        "arch/gpt-oss.gguf",
        "arch/qwen2moe.gguf",
        "quant/Q4_K_M.gguf",
        "quant/Q5_0.gguf",
    ] {
        let (gguf, shape) = open(name);
        let options = LoadOptions {
            threads: Some(2),
            batch: Some(23),
            ..LoadOptions::default()
        };
        let plan = half_on_gpu(&shape, 64);
        let device: Arc<dyn Device> = shim::shared();
        let load = |plan: &Placement| {
            let give = |_: usize| Ok(Arc::clone(&device));
            Engine::load_on(
                Arc::clone(&gguf),
                plan,
                &options,
                Some(&give),
                &mut |_, _| {},
            )
            .unwrap()
        };
        let mut engine = load(&plan);
        let planned: Vec<u64> = plan.tiers.iter().map(|t| t.used_bytes()).collect();
        assert_eq!(engine.resident_bytes().as_slice(), planned, "{name}");
        let n_vocab = engine.spec().n_vocab as u32;
        let got = logits(&mut engine, n_vocab);
        let expected = logits(&mut load(&all_in_memory(&shape, 64, KvType::F32)), n_vocab);
        // Their order of sums is another, so the same bits would mean that the processor computed
        // everything.
        assert_ne!(got, expected, "{name}");
        let square = |v: f32| f64::from(v) * f64::from(v);
        let off: f64 = got.iter().zip(&expected).map(|(a, b)| square(a - b)).sum();
        let nmse = off / expected.iter().map(|v| square(*v)).sum::<f64>();
        // Codes of 8-bit activations may round to the other side where sums differ in their last
        // bits.
        assert!(nmse < 1e-5, "{name}: {nmse:e}");
    }
}

/// Where the experts of a plan are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Experts {
    /// Every one on the GPU.
    Gpu,
    /// In main memory.
    Memory,
    /// In the file, with slots in main memory.
    File,
}

/// A plan with the dense groups that `on_gpu` names on a GPU. Tables of tokens stay in main memory.
pub(crate) fn plan(
    shape: &ModelShape,
    (context, kv_type): (u32, KvType),
    on_gpu: impl Fn(DenseKind, Option<u32>) -> bool,
    kv_on_gpu: bool,
    experts: Experts,
) -> Placement {
    let mut plan = all_in_memory(shape, context, kv_type);
    let mut vram = plan.tiers[TierIdx::new(0)].clone();
    (vram.tier.name, vram.tier.kind) = ("vram".into(), TierKind::Vram);
    plan.tiers = [vram].into_iter().chain(plan.tiers).collect();
    (plan.staging_tier, plan.kv_tier) = (TierIdx::new(1), TierIdx::new(usize::from(!kv_on_gpu)));
    for d in &mut plan.dense {
        let on_gpu = d.kind != DenseKind::TokenTable && on_gpu(d.kind, d.layer);
        d.tier = TierIdx::new(usize::from(!on_gpu));
    }
    for (layer, of) in plan.layers.iter_mut().zip(&shape.experts) {
        layer.slot_tier = TierIdx::new(1);
        match experts {
            Experts::Memory => {}
            Experts::Gpu => {
                layer.pinned.push(Pins {
                    tier: TierIdx::new(0),
                    experts: (0..of.n_expert).collect(),
                });
            }
            Experts::File => {
                layer.slots = of.n_used;
                plan.staging_experts = plan.staging_experts.max(of.n_used);
            }
        }
    }
    if experts == Experts::File {
        let mut file = plan.tiers[TierIdx::new(1)].clone();
        (file.tier.name, file.tier.kind) = ("file".into(), TierKind::Nvme);
        plan.tiers = plan.tiers.into_iter().chain([file]).collect();
    }
    plan.fill_sums(shape);
    plan
}

/// Keeps the KV cache of layers off the GPU that has their attention, where it can be apart and `pick`
/// says so. Returns how many layers that are.
pub(crate) fn keep_kv_on_host(
    plan: &mut Placement,
    shape: &ModelShape,
    pick: impl Fn(u32) -> bool,
) -> usize {
    let on_gpu = |d: &&DensePlacement| d.kind == DenseKind::Attention && d.tier == TierIdx::FIRST;
    let layers = plan.dense.iter().filter(on_gpu).filter_map(|d| d.layer);
    let apart = |layer: &u32| shape.caches[*layer as usize].can_be_apart() && pick(*layer);
    let mut layers: Vec<u32> = layers.filter(apart).collect();
    layers.sort_unstable();
    if !layers.is_empty() {
        (plan.host_kv, plan.kv_tier) = (layers, TierIdx::new(1));
    }
    plan.fill_sums(shape);
    plan.host_kv.len()
}

/// An engine on the emulated GPU, whose memory holds what the plan says.
pub(crate) fn load(gguf: &Arc<Gguf>, plan: &Placement, batch: usize) -> Engine {
    let options = LoadOptions {
        threads: Some(2),
        batch: Some(batch),
        ..LoadOptions::default()
    };
    let give = |_: usize| Ok(shim::shared() as Arc<dyn Device>);
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
    engine
}

/// Logits of a prompt that takes several batches, and of tokens after it.
fn text(engine: &mut Engine) -> Vec<f32> {
    let n_vocab = engine.spec().n_vocab as u32;
    let tokens: Vec<u32> = (0..21).map(|i| (i * 37 + 5) % n_vocab).collect();
    let mut all = engine.forward(&tokens, LogitsMode::All).unwrap().to_vec();
    for i in 0..3 {
        all.extend_from_slice(
            engine
                .forward(&[(i * 11 + 3) % n_vocab], LogitsMode::Last)
                .unwrap(),
        );
    }
    all
}

pub(super) fn compare(name: &str, of: (u32, KvType), make: impl Fn(&ModelShape) -> Placement) {
    let (gguf, shape) = open(name);
    compare_plans(
        name,
        &gguf,
        [all_in_memory(&shape, of.0, of.1), make(&shape)],
    );
}

/// Compares what a model says by a plan without GPUs and by another.
pub(crate) fn compare_plans(name: &str, gguf: &Arc<Gguf>, plans: [Placement; 2]) {
    let kv_type = plans[0].kv_type;
    let mut engine = load(gguf, &plans[1], 13);
    let got = text(&mut engine);
    let mut plain = load(gguf, &plans[0], 13);
    let expected = text(&mut plain);
    let what = format!("{name} {kv_type}");
    // The same bits would mean that the processor computed everything.
    assert_ne!(got, expected, "{what}");
    let off = nmse(&got, &expected);
    assert!(off < 1e-5, "{what}: {off:e}");
    assert_eq!(engine.routing().experts, plain.routing().experts, "{what}");
    // What is forgotten leaves no trace.
    let n_vocab = engine.spec().n_vocab;
    let rewinds = engine.truncate(9).is_ok();
    engine.forward(&[7, 8], LogitsMode::Last).unwrap();
    engine.clear();
    assert_eq!(text(&mut engine), got, "{what}");
    if !rewinds {
        return;
    }
    engine.truncate(20).unwrap();
    let again = engine
        .forward(&[(20 * 37 + 5) % n_vocab as u32], LogitsMode::Last)
        .unwrap();
    assert!(
        nmse(again, &expected[20 * n_vocab..21 * n_vocab]) < 1e-5,
        "{what}"
    );
}

pub(crate) const ALL: fn(DenseKind, Option<u32>) -> bool = |_, _| true;

#[test]
fn a_whole_model_on_a_gpu_gives_the_same_text() {
    for name in models("arch") {
        let of = (64, KvType::F32);
        compare(&format!("arch/{name}.gguf"), of, |shape| {
            plan(shape, of, ALL, true, Experts::Gpu)
        });
    }
}

#[test]
fn quantized_models_on_a_gpu_give_the_same_text() {
    for (name, kv_type) in [
        ("Q4_K_M", KvType::F16),
        ("Q5_0", KvType::Q8_0),
        ("BF16", KvType::F16),
    ] {
        let of = (64, kv_type);
        compare(&format!("quant/{name}.gguf"), of, |shape| {
            plan(shape, of, ALL, true, Experts::Gpu)
        });
    }
}

#[test]
fn latents_are_stored_in_every_type() {
    for kv_type in [KvType::F16, KvType::Q8_0] {
        let of = (64, kv_type);
        compare("arch/kimi-k2.gguf", of, |shape| {
            plan(shape, of, ALL, true, Experts::Memory)
        });
    }
}

#[test]
fn experts_stay_where_they_are_when_the_rest_is_on_a_gpu() {
    let of = (64, KvType::F32);
    for name in [
        "arch/qwen3moe.gguf",
        "arch/qwen2moe.gguf",
        "arch/deepseek-v3.gguf",
        "arch/qwen35moe.gguf",
        "arch2/nemotron_h_moe.gguf",
    ] {
        for experts in [Experts::Memory, Experts::File] {
            compare(name, of, |shape| plan(shape, of, ALL, true, experts));
        }
    }
}

#[test]
fn parts_of_a_layer_may_be_apart() {
    let of = (64, KvType::F16);
    let odd = |layer: Option<u32>| layer.is_some_and(|l| l % 2 == 1);
    for name in [
        "arch/qwen2moe.gguf",
        "arch/glm4moe.gguf",
        "arch/kimi-k2.gguf",
        "arch/qwen3next.gguf",
        "arch2/nemotron_h_moe.gguf",
    ] {
        // Attention there, routers and blocks of every second layer, the head here.
        let with_attention = |kind, layer| match kind {
            DenseKind::Attention => true,
            DenseKind::Router | DenseKind::DenseFfn => odd(layer),
            DenseKind::SharedExpert => !odd(layer),
            DenseKind::Embedding | DenseKind::TokenTable => true,
            DenseKind::Head => false,
        };
        compare(name, of, |shape| {
            plan(shape, of, with_attention, true, Experts::Memory)
        });
        // The other way round.
        let without = |kind, layer| !with_attention(kind, layer);
        compare(name, of, |shape| {
            plan(shape, of, without, false, Experts::Gpu)
        });
    }
}

pub(super) fn refused(gguf: &Arc<Gguf>, plan: &Placement, free: usize) -> LoadError {
    let give = |_: usize| Ok(Arc::new(Watched::new(free)) as Arc<dyn Device>);
    let loaded = Engine::load_on(
        Arc::clone(gguf),
        plan,
        &LoadOptions::default(),
        Some(&give),
        &mut |_, _| {},
    );
    loaded.map(|_| ()).unwrap_err()
}

/// The emulated device, with so many bytes free; counts launches, reads, writes and recordings.
pub(crate) struct Watched {
    shim: Arc<shim::Shim>,
    free: usize,
    counts: Mutex<[usize; 4]>,
}

impl Watched {
    pub(crate) fn new(free: usize) -> Self {
        Self {
            shim: shim::shared(),
            free,
            counts: Mutex::default(),
        }
    }

    fn count(&self, what: usize) {
        self.counts.lock().unwrap()[what] += 1;
    }

    /// What happened since the last time.
    pub(crate) fn take(&self) -> [usize; 4] {
        std::mem::take(&mut *self.counts.lock().unwrap())
    }
}

impl Device for Watched {
    fn name(&self) -> &str {
        "a small GPU"
    }
    fn free_bytes(&self) -> Result<usize, CudaError> {
        Ok(self.free)
    }
    fn allocate(&self, len: usize) -> Result<u64, CudaError> {
        self.shim.allocate(len)
    }
    unsafe fn free(&self, at: u64) {
        // SAFETY: the caller's promise.
        unsafe { self.shim.free(at) };
    }
    unsafe fn write(&self, to: u64, bytes: &[u8]) -> Result<(), CudaError> {
        self.count(2);
        // SAFETY: the caller's promise.
        unsafe { self.shim.write(to, bytes) }
    }
    unsafe fn read(&self, from: u64, bytes: &mut [u8]) -> Result<(), CudaError> {
        self.count(1);
        // SAFETY: the caller's promise.
        unsafe { self.shim.read(from, bytes) }
    }
    unsafe fn launch(
        &self,
        kernel: &'static str,
        grid: Grid,
        args: &[Arg],
    ) -> Result<(), CudaError> {
        self.count(0);
        // SAFETY: the caller's promise.
        unsafe { self.shim.launch(kernel, grid, args) }
    }
    fn wait(&self) -> Result<(), CudaError> {
        self.shim.wait()
    }
    fn begin_recording(&self) -> Result<bool, CudaError> {
        self.count(3);
        self.shim.begin_recording()
    }
    fn end_recording(self: Arc<Self>) -> Result<Box<dyn Recording>, CudaError> {
        Arc::clone(&self.shim).end_recording()
    }
}

#[test]
fn what_a_gpu_cannot_run_is_refused() {
    let of = (64, KvType::F16);
    let (gguf, shape) = open("arch/qwen3moe.gguf");
    let but_one = |kind, layer| (kind, layer) != (DenseKind::Attention, Some(1));
    let error = refused(
        &gguf,
        &plan(&shape, of, but_one, true, Experts::Memory),
        usize::MAX,
    )
    .to_string();
    assert!(
        error.contains("kv_cache of layer 1")
            && error.contains("the CPU computes the layer's attention"),
        "{error}"
    );
    let mut split = plan(&shape, of, but_one, false, Experts::Memory);
    split.tiers[TierIdx::new(0)].bytes.kv -= 64;
    split.tiers[TierIdx::new(1)].bytes.kv += 64;
    let error = refused(&gguf, &split, usize::MAX).to_string();
    assert!(
        error.contains("tier 'vram' has") && error.contains("bytes for the KV cache"),
        "{error}"
    );
    let mut slots = plan(&shape, of, ALL, true, Experts::Memory);
    slots.tiers[TierIdx::new(0)].bytes.staging = 1;
    slots.tiers[TierIdx::new(0)].budget_bytes = u64::MAX;
    assert!(
        matches!(refused(&gguf, &slots, usize::MAX), LoadError::Plan { violation, .. } if matches!(*violation, Violation::PoolOnGpu { .. }))
    );
}

#[test]
fn a_gpu_that_is_too_small_is_refused_before_anything_is_copied() {
    let (gguf, shape) = open("arch/qwen3moe.gguf");
    let of = (64, KvType::F16);
    let plan = plan(&shape, of, ALL, true, Experts::Gpu);
    let LoadError::GpuFull {
        needed,
        weights,
        cache,
        work,
        reserve,
        free,
        ..
    } = refused(&gguf, &plan, 1000)
    else {
        panic!("it was not refused for its size")
    };
    let vram = &plan.tiers[TierIdx::new(0)];
    assert_eq!(
        (weights, cache, free),
        (vram.bytes.dense + vram.bytes.pinned, vram.bytes.kv, 1000)
    );
    assert_eq!(needed, weights + cache + work + reserve);
    assert!(work > 0);
    let error = refused(&gguf, &plan, needed as usize - 1).to_string();
    assert!(
        error.contains(&format!("needs {needed} bytes")) && error.contains("a small GPU"),
        "{error}"
    );
}

#[test]
fn a_token_of_a_model_on_one_gpu_is_replayed() {
    // Windows of 8 positions, and none.
    for (name, with_embedding) in [("arch/gpt-oss.gguf", true), ("arch/kimi-k2.gguf", false)] {
        let (gguf, shape) = open(name);
        let of = (280, KvType::F16);
        let here = |kind, _| with_embedding || kind != DenseKind::Embedding;
        let plan = plan(&shape, of, here, true, Experts::Gpu);
        let device = Arc::new(Watched::new(usize::MAX));
        let give = |_: usize| Ok(Arc::clone(&device) as Arc<dyn Device>);
        let options = LoadOptions {
            threads: Some(2),
            batch: Some(64),
            ..LoadOptions::default()
        };
        let mut engine = Engine::load_on(
            Arc::clone(&gguf),
            &plan,
            &options,
            Some(&give),
            &mut |_, _| {},
        )
        .unwrap();
        let mut plain = load(&gguf, &all_in_memory(&shape, of.0, of.1), 64);
        // Up to a little before the end of a chunk.
        let n_vocab = shape.n_vocab;
        let prompt: Vec<u32> = (0..252).map(|i| (i * 37 + 5) % n_vocab).collect();
        engine.forward(&prompt, LogitsMode::Last).unwrap();
        plain.forward(&prompt, LogitsMode::Last).unwrap();
        for i in 0..9 {
            device.take();
            let token = (i * 11 + 3) % n_vocab;
            let got = engine.forward(&[token], LogitsMode::Last).unwrap().to_vec();
            let [launches, reads, writes, recordings] = device.take();
            assert_eq!(reads, 2, "logits and choices");
            // Position, token or state, rotations of each kind, and a factor for queries at most.
            assert!(writes <= 5, "{writes} writes");
            // Launched, then recorded, and again where a chunk begins.
            let records = [1, 5].contains(&i);
            assert_eq!(recordings, usize::from(records), "token {i}");
            assert_eq!(
                launches > 0,
                [0, 4].contains(&i) || records,
                "token {i}: {launches} launches"
            );
            let expected = plain.forward(&[token], LogitsMode::Last).unwrap();
            let off = nmse(&got, expected);
            assert!(off < 1e-5, "{name}, token {i}: {off:e}");
            assert_eq!(
                engine.routing().experts,
                plain.routing().experts,
                "{name}, token {i}"
            );
        }
        // It is counted as if it had been taken through the layers one by one.
        let counters = engine.counters();
        let used: u64 = shape.experts.iter().map(|e| u64::from(e.n_used)).sum();
        assert_eq!(
            counters.layers.iter().map(|l| l.pinned_hits).sum::<u64>(),
            9 * used
        );
        let read: u64 = counters.read_bytes.iter().sum();
        assert_eq!(read, plain.counters().read_bytes.iter().sum::<u64>());
        assert!(
            counters.decode_tokens == 9
                && counters.busy[TierIdx::FIRST] > std::time::Duration::ZERO
        );
        // Back to positions that were seen before.
        engine.truncate(200).unwrap();
        plain.truncate(200).unwrap();
        let got = engine.forward(&[1], LogitsMode::Last).unwrap().to_vec();
        assert!(nmse(&got, plain.forward(&[1], LogitsMode::Last).unwrap()) < 1e-5);
    }
}

#[test]
fn a_layer_is_few_launches() {
    let gguf = Arc::new(Gguf::open(&data("../../profiles/demo/demo.gguf")).unwrap());
    let shape = shape_of(&gguf, &describe(&gguf).unwrap());
    let plan = all_on_gpu(&shape, 300, KvType::F16);
    let device = Arc::new(Watched::new(usize::MAX));
    let give = |_: usize| Ok(Arc::clone(&device) as Arc<dyn Device>);
    let options = LoadOptions {
        threads: Some(1),
        ..LoadOptions::default()
    };
    let mut engine = Engine::load_on(
        Arc::clone(&gguf),
        &plan,
        &options,
        Some(&give),
        &mut |_, _| {},
    )
    .unwrap();
    let mut launches = |tokens: &[u32]| {
        device.take();
        engine.forward(tokens, LogitsMode::Last).unwrap();
        device.take()[0]
    };
    // Beside the layers the embedding, the last norm and the head.
    let n_layer = shape.n_layer as usize;
    assert_eq!(launches(&[5]), 10 * n_layer + 3);
    launches(&[7; 255]);
    assert_eq!(
        launches(&[5]),
        11 * n_layer + 3,
        "with chunks of the context to put together"
    );
}
