//! Instruction sets, and [`Kernels`]: the proof that the processor has one.

#![forbid(unsafe_code)]

use std::fmt;
use std::str::FromStr;
use thiserror::Error;

/// An instruction set with kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Isa {
    /// Scalar Rust, compiled for what every processor of the target has.
    Scalar,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL, DQ and VNNI, with all of [`Avx2`](Self::Avx2).
    Avx512,
    /// AMX tiles of 8-bit integers for many tokens, with all of [`Avx512`](Self::Avx512) for the
    /// rest.
    Amx,
    /// NEON with `dotprod`, on little-endian AArch64.
    Neon,
}

impl Isa {
    /// Every instruction set, whether or not this processor has it.
    pub const ALL: [Isa; 5] = [Isa::Scalar, Isa::Avx2, Isa::Avx512, Isa::Amx, Isa::Neon];

    /// Returns the name that options and files use, for example `avx512`.
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

/// A name that is not an instruction set.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("unknown instruction set '{0}': expected scalar, avx2, avx512, amx or neon")]
pub struct UnknownIsa(pub String);

impl FromStr for Isa {
    type Err = UnknownIsa;

    fn from_str(text: &str) -> Result<Self, UnknownIsa> {
        let found = Isa::ALL
            .into_iter()
            .find(|isa| isa.name().eq_ignore_ascii_case(text.trim()));
        found.ok_or_else(|| UnknownIsa(text.to_string()))
    }
}

/// Environment variable that chooses an instruction set.
pub const ISA_VARIABLE: &str = "TIER_PLAN_ISA";

/// The kernels that [`ISA_VARIABLE`] asks for cannot run.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum IsaError {
    /// The value is not a name of an instruction set.
    #[error("{ISA_VARIABLE}: {0}")]
    Unknown(UnknownIsa),
    /// This processor lacks the instruction set, or there are no kernels for the target.
    #[error("{ISA_VARIABLE}: '{isa}' does not run on this processor, expected {available}")]
    Unavailable {
        /// Instruction set that was asked for.
        isa: Isa,
        /// Names of the instruction sets that run here.
        available: String,
    },
}

/// The kernels of one instruction set, which this processor has: a value is the proof.
///
/// ```
/// use tier_plan_kernels::Kernels;
///
/// let kernels = Kernels::best();
/// assert_eq!(kernels.dot(&[1.0, 2.0], &[3.0, 4.0]), 11.0);
/// assert!(Kernels::available().contains(&kernels));
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernels {
    isa: Isa,
}

impl Kernels {
    /// Scalar kernels, which every processor runs.
    pub const SCALAR: Kernels = Kernels { isa: Isa::Scalar };

    /// Returns the fastest kernels of this processor.
    pub fn best() -> Kernels {
        [Isa::Amx, Isa::Avx512, Isa::Avx2, Isa::Neon]
            .into_iter()
            .find_map(Kernels::with_isa)
            .unwrap_or(Kernels::SCALAR)
    }

    /// Returns the kernels that the environment variable [`ISA_VARIABLE`] names; the fastest when
    /// it is unset or empty.
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
            let names: Vec<&str> = Kernels::available()
                .into_iter()
                .map(|k| k.isa().name())
                .collect();
            IsaError::Unavailable {
                isa,
                available: names.join(" or "),
            }
        })
    }

    /// Returns the kernels of an instruction set, or `None` if this processor lacks it.
    pub fn with_isa(isa: Isa) -> Option<Kernels> {
        supported(isa).then_some(Kernels { isa })
    }

    /// Returns the kernels of every instruction set of this processor, scalar first.
    pub fn available() -> Vec<Kernels> {
        Isa::ALL.into_iter().filter_map(Kernels::with_isa).collect()
    }

    /// Returns the instruction set.
    #[inline]
    pub fn isa(self) -> Isa {
        self.isa
    }
}

/// Whether this processor has the instruction set, and there are kernels for it.
#[cfg(target_arch = "x86_64")]
fn supported(isa: Isa) -> bool {
    let avx2 = || {
        is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c")
    };
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
        Isa::Amx => avx512() && crate::x86::amx::available(),
        Isa::Neon => false,
    }
}

#[cfg(target_arch = "aarch64")]
fn supported(isa: Isa) -> bool {
    match isa {
        Isa::Scalar => true,
        Isa::Neon => {
            cfg!(target_endian = "little") && std::arch::is_aarch64_feature_detected!("dotprod")
        }
        _ => false,
    }
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn supported(isa: Isa) -> bool {
    isa == Isa::Scalar
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_instruction_sets() {
        for isa in Isa::ALL {
            assert_eq!(isa.name().parse(), Ok(isa));
        }
        assert!("sse9".parse::<Isa>().is_err());
        #[cfg(not(target_arch = "x86_64"))]
        assert!(Kernels::with_isa(Isa::Avx2).is_none());
        #[cfg(not(target_arch = "aarch64"))]
        assert!(Kernels::with_isa(Isa::Neon).is_none());
        assert_eq!(Kernels::available()[0], Kernels::SCALAR);
    }

    #[test]
    fn a_name_that_cannot_run_is_refused_with_those_that_can() {
        assert_eq!(Kernels::named("Scalar"), Ok(Kernels::SCALAR));
        let unknown = Kernels::named("sse9").unwrap_err().to_string();
        assert_eq!(
            unknown,
            "TIER_PLAN_ISA: unknown instruction set 'sse9': expected scalar, avx2, avx512, amx or neon"
        );
        let foreign = if cfg!(target_arch = "x86_64") {
            "neon"
        } else {
            "avx2"
        };
        let absent = Kernels::named(foreign).unwrap_err().to_string();
        assert!(
            absent.contains(&format!("'{foreign}'")) && absent.contains("expected scalar"),
            "{absent}"
        );
    }
}
