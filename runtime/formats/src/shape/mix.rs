//! Which tensor type every matrix has in a named quantization.
//!
//! The rules are those by which llama.cpp chooses types when nothing is overridden, as of its build
//! 11434 and with an importance matrix. Published files with the same name differ where their maker
//! overrode a type.

use tier_plan_kernels::quant::TensorType::{self, *};

/// A named mix of tensor types.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[allow(missing_docs, non_camel_case_types)]
pub enum Mix {
    F16,
    BF16,
    Q8_0,
    Q6_K,
    Q5_K_M,
    Q4_K_M,
    Q4_K_S,
    Q3_K_M,
    Q2_K,
    IQ4_XS,
    IQ3_XXS,
    IQ2_XXS,
    IQ1_M,
    MXFP4,
    NVFP4,
    Q2_0,
    TQ2_0,
    TQ1_0,
    Q1_0,
}

/// What a matrix is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    Embedding,
    Output,
    Query,
    Key,
    Value,
    AttentionOutput,
    FfnGate,
    FfnUp,
    FfnDown,
    ExpertGate,
    ExpertUp,
    ExpertDown,
    /// Any other matrix, by the mix's default.
    Other,
    /// Norms, biases, and routers, which are never quantized.
    Parameters,
}

/// Where a matrix is, as far as the rules look.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub layer: u32,
    pub n_layer: u32,
    pub n_expert: u32,
    /// Query heads that share one key head.
    pub heads_per_kv: u32,
    pub tied: bool,
}

impl Place {
    /// Returns the layers that the `_M` mixes give more bits: the first and the last eighth, and
    /// every third between.
    fn more_bits(&self) -> bool {
        let (i, n) = (self.layer, self.n_layer);
        i < n / 8 || i >= 7 * n / 8 || (i - n / 8) % 3 == 2
    }
}

impl Mix {
    /// Every mix, from the largest to the smallest.
    pub const ALL: [Mix; 19] = [
        Mix::BF16,
        Mix::F16,
        Mix::Q8_0,
        Mix::Q6_K,
        Mix::Q5_K_M,
        Mix::Q4_K_M,
        Mix::NVFP4,
        Mix::Q4_K_S,
        Mix::MXFP4,
        Mix::IQ4_XS,
        Mix::Q3_K_M,
        Mix::IQ3_XXS,
        Mix::Q2_K,
        Mix::Q2_0,
        Mix::IQ2_XXS,
        Mix::TQ2_0,
        Mix::IQ1_M,
        Mix::TQ1_0,
        Mix::Q1_0,
    ];

    /// Its name on the command line, `q4_k_m`.
    pub fn name(self) -> &'static str {
        match self {
            Mix::F16 => "f16",
            Mix::BF16 => "bf16",
            Mix::Q8_0 => "q8_0",
            Mix::Q6_K => "q6_k",
            Mix::Q5_K_M => "q5_k_m",
            Mix::Q4_K_M => "q4_k_m",
            Mix::Q4_K_S => "q4_k_s",
            Mix::Q3_K_M => "q3_k_m",
            Mix::Q2_K => "q2_k",
            Mix::IQ4_XS => "iq4_xs",
            Mix::IQ3_XXS => "iq3_xxs",
            Mix::IQ2_XXS => "iq2_xxs",
            Mix::IQ1_M => "iq1_m",
            Mix::MXFP4 => "mxfp4",
            Mix::NVFP4 => "nvfp4",
            Mix::Q2_0 => "q2_0",
            Mix::TQ2_0 => "tq2_0",
            Mix::TQ1_0 => "tq1_0",
            Mix::Q1_0 => "q1_0",
        }
    }

    /// Returns the mix with this name, without regard to case.
    pub fn from_name(name: &str) -> Option<Mix> {
        Mix::ALL
            .into_iter()
            .find(|mix| mix.name().eq_ignore_ascii_case(name))
    }

    /// Returns the type of a matrix whose rows have `n_in` values; every row is a whole number of
    /// blocks of it.
    pub(super) fn tensor_type(self, role: Role, place: &Place, n_in: u64) -> TensorType {
        let fits = |ty: TensorType| n_in.is_multiple_of(ty.block_len() as u64);
        let wanted = self.wanted(role, place);
        if fits(wanted) {
            return wanted;
        }
        let smaller = match wanted {
            Q2_K | Q3_K | TQ1_0 | TQ2_0 | Q1_0 | Q2_0 | NVFP4 => Q4_0,
            Q4_K => Q5_0,
            Q5_K => Q5_1,
            Q6_K => Q8_0,
            IQ1_S | IQ1_M | IQ2_XXS | IQ2_XS | IQ2_S | IQ3_XXS | IQ3_S | IQ4_XS => IQ4_NL,
            _ => F16,
        };
        if fits(smaller) { smaller } else { F16 }
    }

    /// Returns the type of matrices that no rule is about.
    fn base(self) -> TensorType {
        match self {
            Mix::F16 => F16,
            Mix::BF16 => BF16,
            // What is no expert; the experts have the type that the mix is named after.
            Mix::Q8_0 | Mix::MXFP4 | Mix::NVFP4 => Q8_0,
            Mix::Q6_K => Q6_K,
            Mix::Q5_K_M => Q5_K,
            Mix::Q4_K_M | Mix::Q4_K_S => Q4_K,
            Mix::Q3_K_M => Q3_K,
            Mix::Q2_K => Q2_K,
            Mix::IQ4_XS => IQ4_XS,
            Mix::IQ3_XXS => IQ3_XXS,
            Mix::IQ2_XXS => IQ2_XXS,
            Mix::IQ1_M => IQ1_M,
            Mix::Q2_0 => Q2_0,
            Mix::TQ2_0 => TQ2_0,
            Mix::TQ1_0 => TQ1_0,
            Mix::Q1_0 => Q1_0,
        }
    }

    fn wanted(self, role: Role, place: &Place) -> TensorType {
        let base = self.base();
        match role {
            Role::Parameters => F32,
            Role::Other | Role::Query => {
                if (self, role) == (Mix::IQ3_XXS, Role::Query) {
                    IQ2_S
                } else {
                    base
                }
            }
            Role::ExpertGate | Role::ExpertUp | Role::ExpertDown if self == Mix::MXFP4 => MXFP4,
            Role::ExpertGate | Role::ExpertUp | Role::ExpertDown if self == Mix::NVFP4 => NVFP4,
            Role::FfnGate | Role::FfnUp | Role::ExpertGate | Role::ExpertUp => base,
            _ if matches!(base, F16 | BF16 | Q8_0) => base,
            Role::Output => self.output(),
            Role::Embedding if place.tied => self.output(),
            Role::Embedding => match self {
                Mix::IQ2_XXS | Mix::IQ1_M => Q2_K,
                Mix::IQ3_XXS => IQ3_S,
                Mix::Q2_0 | Mix::TQ1_0 | Mix::TQ2_0 => Q4_K,
                _ => base,
            },
            // Mixes of one or two bits without grids have one type everywhere else.
            _ if matches!(base, Q1_0 | Q2_0 | TQ1_0 | TQ2_0) => base,
            Role::FfnDown | Role::ExpertDown => self.down(place),
            // Mixtral's few attention matrices weigh nothing beside its experts.
            Role::Key | Role::Value if place.n_expert == 8 && !self.is_tiny() => Q8_0,
            Role::Key => match self {
                Mix::IQ3_XXS => IQ2_S,
                Mix::IQ2_XXS | Mix::IQ1_M if place.n_expert == 8 => Q4_K,
                _ => base,
            },
            Role::Value => self.value(place),
            Role::AttentionOutput => match self {
                Mix::IQ2_XXS | Mix::IQ1_M if place.n_expert == 8 => Q5_K,
                Mix::IQ1_M => IQ2_XXS,
                Mix::Q2_K
                | Mix::IQ3_XXS
                | Mix::Q3_K_M
                | Mix::Q4_K_M
                | Mix::Q4_K_S
                | Mix::IQ4_XS
                    if place.n_expert == 8 =>
                {
                    Q5_K
                }
                Mix::Q2_K => Q3_K,
                Mix::IQ3_XXS => IQ3_S,
                Mix::Q3_K_M => Q4_K,
                _ => base,
            },
        }
    }

    fn is_tiny(self) -> bool {
        matches!(self, Mix::IQ2_XXS | Mix::IQ1_M)
    }

    fn output(self) -> TensorType {
        match self {
            Mix::IQ2_XXS | Mix::IQ1_M | Mix::IQ3_XXS => Q5_K,
            _ => Q6_K,
        }
    }

    fn down(self, place: &Place) -> TensorType {
        match self {
            Mix::Q2_K => Q3_K,
            Mix::Q3_K_M if place.layer < place.n_layer / 16 => Q5_K,
            Mix::Q3_K_M => Q4_K,
            Mix::Q4_K_M | Mix::Q5_K_M if place.more_bits() => Q6_K,
            Mix::Q4_K_S if place.layer < place.n_layer / 8 => Q5_K,
            Mix::IQ2_XXS | Mix::IQ1_M if place.layer < place.n_layer / 8 => Q2_K,
            _ => self.base(),
        }
    }

    fn value(self, place: &Place) -> TensorType {
        let grouped = place.heads_per_kv >= 4;
        match self {
            Mix::IQ2_XXS | Mix::IQ1_M if grouped || place.n_expert >= 4 => Q4_K,
            Mix::IQ2_XXS | Mix::IQ1_M => Q2_K,
            Mix::Q2_K | Mix::IQ3_XXS if grouped => Q4_K,
            Mix::Q2_K => Q3_K,
            Mix::Q3_K_M if place.layer < 2 => Q5_K,
            Mix::Q3_K_M => Q4_K,
            Mix::IQ4_XS if grouped => Q5_K,
            Mix::Q4_K_M | Mix::Q5_K_M if place.more_bits() => Q6_K,
            Mix::Q4_K_S if place.layer < 4 => Q5_K,
            _ => self.base(),
        }
    }
}
