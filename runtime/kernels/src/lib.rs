//! What the processor computes: products of weights as they lie in the file with activations, and the small operations
//! between them, for the instruction set that is found when the program runs.
//!
//! A [`Kernels`] value exists only for an instruction set that this processor has, so holding one is the proof that its
//! functions may be called. Every set computes the same sums in nearly the same order; each alone gives the same bits
//! for a row and a token however many rows or tokens are computed with it.
//!
//! On x86-64 there are AVX2 and AVX-512 kernels, and on top of the latter AMX tiles for products with many tokens; on
//! AArch64 products with NEON where the processor has its `dotprod` extension; what else there is runs the plain code. The NEON products were tested under emulation only and never timed.
//!
//! ## Quantised formats
//! Activations are quantised to 8 bits with one scale for each 32 values ([`Activations`]), weights come apart into
//! small codes, scales and minimums (`quant::block`), and a row's product is
//! `sum over 16 or 32 values of (scale * activation scale * integer product - min * activation sum)`.
//! F32, F16 and BF16 weights are multiplied with the activations as they are.

mod activations;
#[macro_use]
mod ops;
mod delta;
mod matmul;
#[cfg(target_arch = "aarch64")]
mod neon;
pub mod pooled;
pub mod quant;
pub mod random;
pub mod reference;
mod rows;
mod scalar;
mod stream;
#[cfg(test)]
mod tests;
pub mod threads;
mod weights;
#[cfg(target_arch = "x86_64")]
mod x86;

pub use activations::{ActView, Activations};
pub use delta::{DeltaStep, MAX_CONV_TAPS, delta_columns};
pub use rows::{StoredRows, q8_row_bytes};
pub use weights::{OutMatrix, Weights, needs_quants};

use std::fmt;
use std::str::FromStr;
use thiserror::Error;

/// An instruction set that kernels are written for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Isa {
    /// Plain Rust, compiled for what every processor of the target has.
    Scalar,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL, DQ and VNNI, with all of [`Avx2`](Self::Avx2).
    Avx512,
    /// AMX tiles of 8-bit integers for many tokens, and all of [`Avx512`](Self::Avx512) for the rest.
    Amx,
    /// NEON with `dotprod`, on little-endian AArch64.
    Neon,
}

impl Isa {
    /// Every instruction set with a name here.
    pub const ALL: [Isa; 5] = [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Amx, Isa::Neon];

    /// The name that options and files use.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Scalar => "scalar",
            Isa::Avx2 => "avx2",
            Isa::Avx512 => "avx512",
            Isa::Amx => "amx",
            Isa::Neon => "neon",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is no instruction set.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("'{0}' is not an instruction set: use scalar, avx2, avx512, amx or neon")]
pub struct UnknownIsa(pub String);

impl FromStr for Isa {
    type Err = UnknownIsa;

    fn from_str(text: &str) -> Result<Self, UnknownIsa> {
        let found = Isa::ALL.into_iter().find(|isa| isa.name().eq_ignore_ascii_case(text.trim()));
        found.ok_or_else(|| UnknownIsa(text.to_string()))
    }
}

/// The environment variable that chooses an instruction set.
pub const ISA_VARIABLE: &str = "TIER_PLAN_ISA";

/// Why the kernels that the environment asks for cannot run.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum IsaError {
    /// Not a name.
    #[error("{ISA_VARIABLE}: {0}")]
    Unknown(UnknownIsa),
    /// Known, but this processor has not got it, or there are no kernels for it.
    #[error("{ISA_VARIABLE}: no kernels for '{isa}' run on this processor: use {available}, or unset the variable")]
    Unavailable {
        /// What was asked for.
        isa: Isa,
        /// What runs here.
        available: String,
    },
}

/// The kernels of one instruction set, which this processor has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernels {
    isa: Isa,
}

impl Kernels {
    /// The plain kernels, which every processor runs.
    pub const SCALAR: Kernels = Kernels { isa: Isa::Scalar };

    /// The fastest kernels of this processor.
    pub fn best() -> Kernels {
        [Isa::Amx, Isa::Avx512, Isa::Avx2, Isa::Neon].into_iter().find_map(Kernels::with_isa).unwrap_or(Kernels::SCALAR)
    }

    /// The kernels that the environment variable [`ISA_VARIABLE`] names; the fastest when it is unset or empty.
    ///
    /// # Errors
    /// When the name is unknown, or this processor cannot run them.
    pub fn from_env() -> Result<Kernels, IsaError> {
        match std::env::var_os(ISA_VARIABLE) {
            Some(name) if !name.is_empty() => Kernels::named(&name.to_string_lossy()),
            _ => Ok(Kernels::best()),
        }
    }

    fn named(name: &str) -> Result<Kernels, IsaError> {
        let isa: Isa = name.parse().map_err(IsaError::Unknown)?;
        Kernels::with_isa(isa).ok_or_else(|| {
            let names: Vec<&str> = Kernels::available().into_iter().map(|k| k.isa().name()).collect();
            IsaError::Unavailable { isa, available: names.join(" or ") }
        })
    }

    /// The kernels of one instruction set, if this processor has it.
    pub fn with_isa(isa: Isa) -> Option<Kernels> {
        supported(isa).then_some(Kernels { isa })
    }

    /// Everything this processor can run, the plain kernels first.
    pub fn available() -> Vec<Kernels> {
        Isa::ALL.into_iter().filter_map(Kernels::with_isa).collect()
    }

    /// The instruction set.
    pub fn isa(self) -> Isa {
        self.isa
    }
}

#[cfg(target_arch = "x86_64")]
fn supported(isa: Isa) -> bool {
    let avx2 =
        || is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c");
    let avx512 = || {
        avx2()
            && is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512vnni")
    };
    match isa {
        Isa::Scalar => true,
        Isa::Avx2 => avx2(),
        Isa::Avx512 => avx512(),
        Isa::Amx => avx512() && x86::amx::permitted(),
        Isa::Neon => false,
    }
}

#[cfg(target_arch = "aarch64")]
fn supported(isa: Isa) -> bool {
    match isa {
        Isa::Scalar => true,
        Isa::Neon => cfg!(target_endian = "little") && std::arch::is_aarch64_feature_detected!("dotprod"),
        _ => false,
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn supported(isa: Isa) -> bool {
    isa == Isa::Scalar
}
