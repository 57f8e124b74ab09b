//! Runs language models whose weights are spread over memory tiers by a placement plan.
//!
//! The crate owns the file formats because it consumes plans; it knows nothing of solvers or charts.
//! `docs/ARCHITECTURE.md` shows how the modules fit together.

pub mod engine;
pub mod error;
pub mod experts;
pub mod gpu;
pub mod layers;
mod load;
mod moe;
pub mod options;
pub mod plans;
pub mod sampler;
pub mod tiers;
pub mod tokenizer;

pub use engine::{Engine, LogitsMode};
pub use error::{LoadError, RunError};
pub use gpu::devices::GiveDevice;
pub use options::{LoadOptions, StreamRates};
pub use tier_plan_cuda as cuda;
pub use tier_plan_formats as formats;
pub use tier_plan_formats::model::kv::KvType;
pub use tier_plan_formats::{gguf, model, units};
pub use tier_plan_kernels as kernels;
pub use tier_plan_kernels::{quant, threads};
