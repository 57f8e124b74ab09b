//! Runs language models whose weights are spread over memory tiers by a placement plan.
//!
//! The crate owns the file formats because it consumes plans; it knows nothing of solvers or charts.
//! `docs/ARCHITECTURE.md` shows how the modules fit together.

pub mod cuda;
pub mod engine;
pub mod error;
pub mod experts;
pub mod formats;
pub mod gguf;
pub mod gpu;
pub mod kernels;
pub mod layers;
mod load;
pub mod model;
mod moe;
pub mod options;
pub mod plans;
pub mod quant;
pub mod sampler;
pub mod selftest;
pub mod source_id;
pub mod threads;
pub mod tiers;
pub mod tokenizer;
pub mod units;

pub use engine::{Engine, Wanted};
pub use error::{LoadError, RunError};
pub use gpu::devices::GiveDevice;
pub use model::kv::KvType;
pub use options::{LoadOptions, StreamRates};
