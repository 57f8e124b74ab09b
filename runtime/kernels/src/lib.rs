//! CPU kernels of a transformer over GGUF weights: dequantization, matmul and matvec, and the small
//! operations between them, chosen at run time for the processor's instruction set.
//!
//! ```
//! use tier_plan_kernels::pooled::{MatJob, matmul_all};
//! use tier_plan_kernels::quant::TensorType;
//! use tier_plan_kernels::threads::ThreadPool;
//! use tier_plan_kernels::{Activations, Kernels, Weights, needs_quants};
//!
//! let kernels = Kernels::best();
//! let pool = ThreadPool::new(2);
//!
//! // A [3, 32] matrix in Q8_0: per row a scale of 1.0 (0x3c00) and 32 codes, all 1, 2 and 3.
//! let rows = [1u8, 2, 3].map(|code| [&[0x00, 0x3c], &[code; 32][..]].concat()).concat();
//! let weights = Weights::new(TensorType::Q8_0, &rows, 3, 32).expect("three rows of one block");
//!
//! // Two tokens, in the 8-bit form that quantized weights are multiplied with.
//! let x: Vec<f32> = [[1.0; 32], [-2.0; 32]].concat();
//! let mut acts = Activations::new(2, 32);
//! acts.fill(kernels, 2, 32, &x, needs_quants(weights.ty()));
//!
//! let mut out = [0.0; 6];
//! matmul_all(&pool, kernels, &[MatJob::new(weights, acts.view(), &mut out)]);
//! assert_eq!(out, [32.0, 64.0, 96.0, -64.0, -128.0, -192.0]);
//! ```
//!
//! # Instruction sets
//!
//! A [`Kernels`] value exists only for an instruction set that this processor has, so holding one
//! proves that its functions may be called. There are kernels for AVX2, for AVX-512 (with VBMI,
//! where the processor has it, for formats with grids), and for AMX tiles on top of AVX-512
//! (prompts); on AArch64 matmul kernels for NEON with `dotprod`. Everything else runs scalar Rust.
//! The NEON kernels were tested under emulation only and never timed.
//!
//! All sets compute the same sums in nearly the same order. Within one set, the result for a weight
//! row and a token has the same bits however many rows or tokens are computed with it.
//!
//! # Quantized formats
//!
//! A weight is `scale * code - min` with a small integer code ([`quant`]). Activations are
//! quantized to 8 bits with one scale per 32 values ([`Activations`]). So most of a dot product is
//! integer arithmetic:
//!
//! ```text
//! sum over runs of 16 or 32 values:
//!     scale * act_scale * (integer dot of the codes) - min * (act_scale * sum of the act codes)
//! ```
//!
//! F32, F16 and BF16 weights are multiplied with the activations as they are.
//!
//! # Where things are
//!
//! | module | content |
//! |---|---|
//! | [`quant`] | block formats: sizes, layouts, scalar dequantization |
//! | `activations` | 8-bit activations and their layout |
//! | `matmul`, `panel` | how a matmul is cut into panels, and the loops of a panel |
//! | `bands` | weight rows in another order, which AVX2, AVX-512, and AMX read faster |
//! | `scalar`, `x86`, `neon` | the dot products of each instruction set |
//! | `rows`, `delta`, `ops` | attention rows, gated delta net, and element-wise operations |
//! | [`pooled`], [`threads`] | matmuls spread over a thread pool |
//! | [`scoped`] | threads that the caller stands in for where the system allows none |
//! | [`mod@reference`], [`random`] | what tests compare with, and reproducible data for them |

mod activations;
#[macro_use]
mod ops;
mod bands;
mod cores;
mod delta;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod float_panel;
mod isa;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod lanes;
mod matmul;
#[cfg(target_arch = "aarch64")]
mod neon;
mod panel;
pub mod pooled;
pub mod quant;
pub mod random;
pub mod reference;
mod rows;
mod scalar;
pub mod scoped;
pub mod shards;
mod stream;
#[cfg(test)]
mod tests;
pub mod threads;
mod weights;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use activations::{ActView, Activations, Q8Row};
pub use bands::{BAND_ROWS, RowOrder};
pub use delta::{ChannelDeltaStep, DeltaStep, MAX_CONV_TAPS, delta_columns};
pub use isa::{ISA_VARIABLE, Isa, IsaError, Kernels, UnknownIsa};
pub use rows::{RowBlock, StoredRows, q8_row_bytes};
pub use weights::{OutMatrix, Weights, needs_quants};
