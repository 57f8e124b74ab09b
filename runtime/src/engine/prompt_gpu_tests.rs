//! Prompts on an emulated GPU, in batches that are large enough for its kernels of many tokens.

use super::gpu_tests::{ALL, Experts, open, plan};
use crate::engine::{Engine, LogitsMode};
use crate::options::{LoadOptions, StreamRates};
use crate::plans::in_memory::all_in_memory;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use tier_plan_cuda::copy_stream::CopyStream;
use tier_plan_cuda::device::{Arg, Grid};
use tier_plan_cuda::transfers::Transfers;
use tier_plan_cuda::{CudaError, Device, View, shim};
use tier_plan_formats::gguf::Gguf;
use tier_plan_formats::model::describe;
use tier_plan_formats::model::kv::KvType;
use tier_plan_formats::model::shape::DenseKind;
use tier_plan_formats::placement::{Pins, Placement, Streaming, TierIdx};
use tier_plan_testing::nmse;

fn load(gguf: &Arc<Gguf>, plan: &Placement, options: &LoadOptions) -> Engine {
    let give = |_: usize| Ok(shim::shared() as Arc<dyn Device>);
    Engine::load_on(Arc::clone(gguf), plan, options, Some(&give), &mut |_, _| {}).unwrap()
}

fn options(batch: usize) -> LoadOptions {
    LoadOptions {
        threads: Some(2),
        batch: Some(batch),
        ..LoadOptions::default()
    }
}

/// Logits of a prompt of several batches, and of tokens after it; and the experts that its tokens
/// chose.
fn text(engine: &mut Engine) -> (Vec<f32>, Vec<u16>) {
    let n_vocab = engine.spec().n_vocab as u32;
    let tokens: Vec<u32> = (0..90).map(|i| (i * 37 + 5) % n_vocab).collect();
    let mut all = engine.forward(&tokens, LogitsMode::All).unwrap().to_vec();
    let choices = engine.routing().experts.clone();
    for i in 0..2 {
        all.extend_from_slice(
            engine
                .forward(&[(i * 11 + 3) % n_vocab], LogitsMode::Last)
                .unwrap(),
        );
    }
    (all, choices)
}

#[test]
fn attention_of_prompts_in_16_bits_gives_the_same_text() {
    // Plain heads, windows with sinks, heads whose norms are their own, latents that later tokens
    // choose among, and a whole model of 16-bit floats.
    for (name, kv_type) in [
        ("arch/qwen3moe", KvType::F16),
        ("arch/gpt-oss", KvType::Q8_0),
        ("arch/glm4moe", KvType::F32),
        ("arch/qwen2moe", KvType::F16),
        ("arch/llama-dense", KvType::F16),
        ("arch2/glm-dsa", KvType::F16),
        ("quant/BF16", KvType::F16),
    ] {
        let (gguf, shape) = open(&format!("{name}.gguf"));
        let of = (128, kv_type);
        let mut engine = load(
            &gguf,
            &plan(&shape, of, ALL, true, Experts::Gpu),
            &options(64),
        );
        let (got, chosen) = text(&mut engine);
        let (expected, choices) = text(&mut load(
            &gguf,
            &all_in_memory(&shape, of.0, kv_type),
            &options(64),
        ));
        assert_ne!(got, expected, "{name}");
        // Where two experts are nearly as good, a token may choose the other one, and all that
        // follow it see that.
        let tokens = got.len() / engine.spec().n_vocab;
        let each = shape
            .experts
            .iter()
            .map(|e| e.n_used as usize)
            .sum::<usize>()
            .max(1);
        let other = chosen
            .chunks(each)
            .zip(choices.chunks(each))
            .position(|(a, b)| a != b);
        let alike = other.unwrap_or(tokens) * engine.spec().n_vocab;
        assert!(
            alike >= 8 * engine.spec().n_vocab,
            "{name}: token {other:?} chose others"
        );
        // What is off by a share of 2e-4 puts some 8-bit codes of activations on the other side of
        // where they round, each by a whole step, which is 100 times as much: the mean square of it
        // is some 5e-6 a product. Other causes stay below 1e-5 (`gpu_tests`).
        let off = nmse(&got[..alike], &expected[..alike]);
        assert!(off < 1e-4, "{name}: {off:e}");
        let launched = shim::shared().launched();
        let kernel = match kv_type {
            KvType::F32 => "prompt_attend_f32",
            KvType::F16 => "prompt_attend_f16",
            KvType::Q8_0 => "prompt_attend_q8",
        };
        assert!(launched.contains(kernel), "{name}: {launched:?}");
    }
}

#[test]
fn experts_of_main_memory_pass_through_a_gpu_for_prompts() {
    let rates = |link_gbps, processor_gflops| {
        Some(StreamRates {
            link_gbps,
            processor_gflops,
        })
    };
    // Float and quantized experts, fused ones with biases, shared experts beside them, experts in a
    // smaller space and without a gate, and weights on what experts read.
    for name in [
        "arch/qwen3moe",
        "arch/gpt-oss",
        "arch/qwen2moe",
        "quant/Q4_K_M",
        "arch2/nemotron_h_moe",
        "arch2/llama4",
    ] {
        let (gguf, shape) = open(&format!("{name}.gguf"));
        let of = (128, KvType::F16);
        // Attention stays on the processor, so that nothing else is off.
        let plan = plan(
            &shape,
            of,
            |kind, _| kind != DenseKind::Attention,
            false,
            Experts::Memory,
        );
        let run = |stream| {
            let mut engine = load(
                &gguf,
                &plan,
                &LoadOptions {
                    stream,
                    ..options(64)
                },
            );
            let got = text(&mut engine);
            (got, engine.experts_streamed())
        };
        let ((without, choices), passed) = run(rates(0.0, 1.0));
        assert_eq!(passed, 0, "{name}");
        // The plan has no rate of products, and so nothing to choose by.
        assert_eq!(run(None).1, 0, "{name}");
        // A link that is never worth it, one that always is, and one in between.
        assert_eq!(
            run(rates(1e-9, 1e9)),
            ((without.clone(), choices.clone()), 0),
            "{name}"
        );
        let ((got, chosen), all) = run(rates(1e9, 1e-9));
        // Of the prompt's two batches, the second is too small.
        let most = shape.experts.iter().map(|e| u64::from(e.n_expert)).sum();
        assert!(all > 0 && all <= most, "{name}: {all}");
        assert_ne!(got, without, "{name}");
        assert!(
            nmse(&got, &without) < 1e-5,
            "{name}: {:e}",
            nmse(&got, &without)
        );
        assert_eq!(chosen, choices, "{name}");
        assert_eq!(run(rates(1e9, 1e-9)).0.0, got, "{name}");
        let e = &shape.experts[0];
        // As long for the bytes of an expert as for products of half its uses.
        let uses = 64 * u64::from(e.n_used) / u64::from(e.n_expert);
        let spec = describe(&gguf).unwrap();
        let macs = spec.moe_layers().map(|(_, moe)| {
            let matrices = 2 + usize::from(moe.has_gate());
            (matrices * moe.expert_width() * moe.expert_ffn) as u64
        });
        let macs = macs.max().unwrap_or(0);
        let gflops = (uses / 2 * 2 * macs) as f64 / e.expert_bytes as f64;
        let ((got, _), some) = run(rates(1.0, gflops.max(1e-3)));
        assert!(some > 0 && some < all, "{name}: {some} of {all}");
        assert!(
            nmse(&got, &without) < 1e-5,
            "{name}: {:e}",
            nmse(&got, &without)
        );
        let (here, _) = text(&mut load(
            &gguf,
            &all_in_memory(&shape, of.0, of.1),
            &options(64),
        ));
        assert!(nmse(&got, &here) < 1e-5, "{name}: {:e}", nmse(&got, &here));
    }
}

/// The emulated device, where adding up what experts made fails when it is told to, and what streams send
/// is counted.
struct Watched {
    of: Arc<shim::Shim>,
    fails: AtomicBool,
    /// Bytes that it says are free once something was allocated.
    free: AtomicUsize,
    has_some: AtomicBool,
    sends: Arc<Sends>,
}

/// Copies of staging buffers, and of memory that is locked.
#[derive(Default)]
struct Sends {
    staged: AtomicUsize,
    locked: AtomicUsize,
}

/// A copy stream that counts.
struct Counting(Box<dyn CopyStream>, Arc<Sends>);

impl CopyStream for Counting {
    fn staging(&mut self, which: usize) -> Result<&mut [u8], CudaError> {
        self.0.staging(which)
    }
    fn is_free(&mut self, which: usize) -> Result<bool, CudaError> {
        self.0.is_free(which)
    }
    fn send(&mut self, which: usize, to: View<'_>) -> Result<(), CudaError> {
        self.1.staged.fetch_add(1, Ordering::Relaxed);
        self.0.send(which, to)
    }
    unsafe fn send_locked(
        &mut self,
        which: usize,
        copies: &[(View<'_>, &[u8])],
    ) -> Result<(), CudaError> {
        self.1.locked.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { self.0.send_locked(which, copies) }
    }
    fn used(&mut self, which: usize) -> Result<(), CudaError> {
        self.0.used(which)
    }
}

impl Watched {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            of: shim::shared(),
            fails: AtomicBool::new(false),
            free: AtomicUsize::new(1 << 40),
            has_some: AtomicBool::new(false),
            sends: Arc::default(),
        })
    }
}

impl Device for Watched {
    fn name(&self) -> &str {
        "a failing GPU"
    }
    fn free_bytes(&self) -> Result<usize, CudaError> {
        match self.has_some.load(Ordering::Relaxed) {
            true => Ok(self.free.load(Ordering::Relaxed)),
            false => self.of.free_bytes(),
        }
    }
    fn allocate(&self, len: usize) -> Result<u64, CudaError> {
        self.has_some.store(true, Ordering::Relaxed);
        self.of.allocate(len)
    }
    unsafe fn free(&self, at: u64) {
        // SAFETY: the caller's promise.
        unsafe { self.of.free(at) };
    }
    unsafe fn write(&self, to: u64, bytes: &[u8]) -> Result<(), CudaError> {
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
        if kernel == "add_rows" && self.fails.load(Ordering::Relaxed) {
            return Err(CudaError::Call {
                device: "a failing GPU".into(),
                what: kernel.into(),
                why: "it was told to".into(),
            });
        }
        // SAFETY: the caller's promise.
        unsafe { self.of.launch(kernel, grid, args) }
    }
    fn wait(&self) -> Result<(), CudaError> {
        self.of.wait()
    }
    fn transfers(self: Arc<Self>) -> Result<Option<Box<dyn Transfers>>, CudaError> {
        Arc::clone(&self.of).transfers()
    }

    fn copy_stream(self: Arc<Self>, len: usize) -> Result<Option<Box<dyn CopyStream>>, CudaError> {
        let stream = Arc::clone(&self.of).copy_stream(len)?;
        let counting = |stream| Box::new(Counting(stream, Arc::clone(&self.sends))) as Box<_>;
        Ok(stream.map(counting))
    }
}

#[test]
fn a_gpu_that_fails_while_experts_pass_fails_the_request_alone() {
    let (gguf, shape) = open("arch/qwen3moe.gguf");
    let of = (128, KvType::F16);
    let stream = Some(StreamRates {
        link_gbps: 1e9,
        processor_gflops: 1e-9,
    });
    let device = Watched::new();
    let give = |_: usize| Ok(Arc::clone(&device) as Arc<dyn Device>);
    let plan = plan(&shape, of, ALL, true, Experts::Memory);
    let options = LoadOptions {
        stream,
        ..options(64)
    };
    let mut engine = Engine::load_on(
        Arc::clone(&gguf),
        &plan,
        &options,
        Some(&give),
        &mut |_, _| {},
    )
    .unwrap();
    let first = text(&mut engine);
    engine.clear();
    device.fails.store(true, Ordering::Relaxed);
    let tokens: Vec<u32> = (0..40).collect();
    let error = engine
        .forward(&tokens, LogitsMode::Last)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("a failing GPU: add_rows failed: it was told to"),
        "{error}"
    );
    device.fails.store(false, Ordering::Relaxed);
    engine.clear();
    assert_eq!(text(&mut engine), first);
}

#[test]
fn a_gpu_that_is_full_is_named_and_the_processor_computes() {
    let (gguf, shape) = open("arch/qwen3moe.gguf");
    let plan = plan(&shape, (128, KvType::F16), ALL, true, Experts::Memory);
    let load = |free: usize| {
        let device = Watched::new();
        device.free.store(free, Ordering::Relaxed);
        let give = |_: usize| Ok(Arc::clone(&device) as Arc<dyn Device>);
        let options = LoadOptions {
            stream: Some(StreamRates {
                link_gbps: 1e9,
                processor_gflops: 1e-9,
            }),
            ..options(64)
        };
        let gguf = Arc::clone(&gguf);
        let mut engine =
            Engine::load_on(gguf, &plan, &options, Some(&give), &mut |_, _| {}).unwrap();
        let tokens: Vec<u32> = (0..40).collect();
        engine.forward(&tokens, LogitsMode::Last).unwrap();
        engine
    };
    let full = load(5);
    let [gpu] = full.gpus_without_room_to_stream() else {
        panic!("{:?}", full.gpus_without_room_to_stream())
    };
    assert_eq!((gpu.tier, gpu.free), (TierIdx::FIRST, 5));
    assert_eq!(full.experts_streamed(), 0);
    // As many bytes as it says are enough.
    let enough = load(gpu.needed as usize);
    assert_eq!(enough.gpus_without_room_to_stream(), []);
    assert!(enough.experts_streamed() > 0);
}

#[test]
fn experts_that_a_gpu_can_read_pass_without_a_copy() {
    // Biases, experts without a gate, and quantized ones; mapped experts and pins.
    for (name, pins) in [
        ("arch/gpt-oss", false),
        ("arch2/nemotron_h_moe", false),
        ("quant/Q4_K_M", true),
    ] {
        let (gguf, shape) = open(&format!("{name}.gguf"));
        let dense = |kind, _| kind != DenseKind::Attention;
        let experts = match pins {
            true => Experts::File,
            false => Experts::Memory,
        };
        let mut copied = plan(&shape, (128, KvType::F16), dense, false, experts);
        for (layer, of) in copied.layers.iter_mut().zip(&shape.experts) {
            if pins {
                layer.slots = 0;
                let (tier, experts) = (TierIdx::new(1), (0..of.n_expert).collect());
                layer.pinned = vec![Pins { tier, experts }];
            }
        }
        copied.fill_sums(&shape);
        let tiers = copied.tiers.iter_mut();
        tiers.for_each(|tier| tier.budget_bytes = 1 << 30);
        let mut locked = copied.clone();
        locked.streaming = Some(Streaming {
            tier: TierIdx::FIRST,
            from: TierIdx::new(1),
            experts: 2,
            link_gbps: 1.0,
            cpu_share: 1.0,
        });
        locked.fill_sums(&shape);
        let run = |plan: &Placement| {
            let device = Watched::new();
            let give = |_: usize| Ok(Arc::clone(&device) as Arc<dyn Device>);
            let stream = Some(StreamRates {
                link_gbps: 1e9,
                processor_gflops: 1e-9,
            });
            let options = LoadOptions {
                stream,
                ..options(64)
            };
            let gguf = Arc::clone(&gguf);
            let loaded = Engine::load_on(gguf, plan, &options, Some(&give), &mut |_, _| {});
            let mut engine = loaded.unwrap();
            let n_vocab = engine.spec().n_vocab as u32;
            let tokens: Vec<u32> = (0..64).map(|i| (i * 37 + 5) % n_vocab).collect();
            let logits = engine.forward(&tokens, LogitsMode::All).unwrap().to_vec();
            let sent = |n: &AtomicUsize| n.load(Ordering::Relaxed) as u64;
            let Sends { staged, locked } = &*device.sends;
            let streamed = engine.experts_streamed();
            (logits, streamed, [sent(staged), sent(locked)])
        };
        let ((expected, n, of_copied), (got, also, of_locked)) = (run(&copied), run(&locked));
        assert!(n > 0 && n == also, "{name}: {n} and {also}");
        assert_eq!((of_copied, of_locked), ([n, 0], [0, n]), "{name}");
        assert_eq!(got, expected, "{name}");
    }
}
