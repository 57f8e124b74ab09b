//! Runs language models whose weights are spread over memory tiers by a placement plan.
//!
//! The crate owns the file formats because it consumes plans; it knows nothing of solvers or charts.
//! `docs/ARCHITECTURE.md` shows how the modules fit together.

pub mod check;
pub mod cuda;
pub mod exec;
pub mod formats;
pub mod gguf;
pub mod kernels;
pub mod model;
pub mod quant;
pub mod sampler;
pub mod threads;
pub mod tiers;
pub mod tokenizer;
pub mod units;
