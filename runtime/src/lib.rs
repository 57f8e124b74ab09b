//! Runs mixture-of-experts language models whose weights are spread over memory tiers.
//!
//! A [placement plan](formats::placement::Placement) says where every tensor of a model lives: in
//! GPU memory, in main memory, or on a drive. [`Engine::load`] puts the tensors there, and
//! [`Engine::forward`] takes tokens through the layers. Each dense part of a layer computes where
//! its weights are. Routed experts that are on a drive are read when a router chooses them, or are
//! prefetched, and stay in slots. The plan changes the speed and never the result: sums have a
//! fixed order, so that the CPU's logits are the same to the bit under every plan.
//!
//! Plans come from a solver, which this crate knows nothing of, or from [`plans`], which needs
//! none.
//!
//! # Example
//!
//! Loads the demo model with everything in main memory, and continues a text greedily.
//!
//! ```
//! use std::ops::ControlFlow;
//! use tier_plan_runtime::engine::generate::{Limits, generate};
//! use tier_plan_runtime::model::Model;
//! use tier_plan_runtime::plans::in_memory::all_in_memory;
//! use tier_plan_runtime::sampler::{Sampler, SamplerConfig};
//! use tier_plan_runtime::tokenizer::{Tokenizer, TokenizerSource};
//! use tier_plan_runtime::{Engine, KvType, LoadOptions};
//!
//! let model = Model::open("../profiles/demo/demo.gguf".as_ref())?;
//! let tokenizer = Tokenizer::new(TokenizerSource::from_gguf(model.gguf())?)?;
//! let plan = all_in_memory(model.shape(), 128, KvType::F16);
//! let mut engine = Engine::load(model.gguf().clone(), &plan, &LoadOptions::default(), &mut |_, _| ())?;
//!
//! let prompt = tokenizer.encode("Once upon a time", true)?;
//! let mut greedy = Sampler::new(SamplerConfig::default());
//! let limits = Limits { max_tokens: 8, is_end: &|token| tokenizer.is_eog(token), draft: 0 };
//! let generated = generate(&mut engine, &prompt, &mut greedy, &limits, |_, _| ControlFlow::Continue(()))?;
//! assert!(!tokenizer.decode(&generated.tokens).is_empty());
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Modules
//!
//! [`engine`] has the pass; [`experts`] the store of routed experts with its slot cache; [`tiers`]
//! memory, files and the pacing of emulated tiers; [`gpu`] the parts of a model on GPUs;
//! [`tokenizer`] and [`sampler`] the way from text to tokens and back; [`schedule`] decides which of
//! many texts a pass computes, and [`batcher`] generates them. `docs/ARCHITECTURE.md` shows how they fit together.
#![deny(unsafe_code)]

pub mod batcher;
pub mod cancel;
pub mod engine;
pub mod error;
pub mod experts;
pub mod gpu;
pub mod layers;
mod load;
mod moe;
pub mod options;
// Limits processes, handles signals, and asks for the local time.
#[allow(unsafe_code)]
pub mod os;
pub mod plans;
pub mod printable;
pub mod sampler;
pub mod schedule;
// Maps memory, binds it to NUMA nodes, and reads files with direct I/O.
#[allow(unsafe_code)]
pub mod tiers;
pub mod tokenizer;

pub use cancel::Cancel;
pub use engine::{Engine, LogitsMode};
pub use error::{LoadError, RunError};
pub use gpu::devices::GiveDevice;
pub use load::bands::copy_to_memory;
pub use moe::offload::FullGpu;
pub use options::{LoadOptions, StreamRates};
pub use tier_plan_cuda as cuda;
pub use tier_plan_formats as formats;
pub use tier_plan_formats::model::kv::KvType;
pub use tier_plan_formats::{gguf, model, units};
pub use tier_plan_kernels as kernels;
pub use tier_plan_kernels::{quant, threads};
