//! The CUDA C++ source of the kernels by module, for NVRTC and for the GPU emulator.

use std::fmt::{Display, LowerHex, Write};
use std::sync::LazyLock;
use tier_plan_kernels::quant::TensorType;
use tier_plan_kernels::quant::grids;

/// A translation unit: kernels that are compiled together.
#[derive(Debug)]
pub struct Module {
    /// File name, `ops.cu`.
    pub name: &'static str,
    /// Source text in CUDA C++.
    pub text: &'static str,
    /// Names of its kernels.
    pub kernels: &'static [&'static str],
}

/// Lists the kernel of a whole family of formats, then the kernels of each format.
macro_rules! format_kernels {
    ($family:literal: $($format:literal)*) => {
        &[
            concat!("matvecs_", $family),
            $(
                concat!("matvec_", $format),
                concat!("gated_", $format),
                concat!("chosen_sum_", $format),
                concat!("matmul_", $format),
                concat!("dequantize_", $format)
            ),*
        ]
    };
}

/// All modules with kernels.
pub static MODULES: [Module; 21] = [
    Module {
        name: "ops.cu",
        text: include_str!("kernels/ops.cu"),
        kernels: &[
            "quantize",
            "rms_norm",
            "rope",
            "store_f32",
            "store_f16",
            "store_q8",
            "place_heads_f32",
            "place_heads_f16",
            "place_heads_q8",
            "add_norm",
            "activate",
            "gate",
            "scale",
            "copy_rows",
            "scale_rows",
            "matvec_transposed",
            "add",
            "add_bias",
            "sigmoid_gate",
            "read_all",
            "nothing",
        ],
    },
    Module {
        name: "router.cu",
        text: include_str!("kernels/router.cu"),
        kernels: &["route"],
    },
    Module {
        name: "attention.cu",
        text: include_str!("kernels/attention.cu"),
        kernels: &["attend_f32", "attend_f16", "attend_q8", "join_chunks"],
    },
    Module {
        name: "prompt_attention.cu",
        text: include_str!("kernels/prompt_attention.cu"),
        kernels: &[
            "prompt_attend_f32",
            "prompt_attend_f16",
            "prompt_attend_q8",
            "prompt_attend_wide_f32",
            "prompt_attend_wide_f16",
            "prompt_attend_wide_q8",
            "prompt_attend_latent_f32",
            "prompt_attend_latent_f16",
            "prompt_attend_latent_q8",
        ],
    },
    Module {
        name: "sparse_attention.cu",
        text: include_str!("kernels/sparse_attention.cu"),
        kernels: &["attend_chosen_f32", "attend_chosen_f16", "attend_chosen_q8"],
    },
    Module {
        name: "index.cu",
        text: include_str!("kernels/index.cu"),
        kernels: &[
            "place_index_f32",
            "place_index_f16",
            "place_index_q8",
            "rate_f32",
            "rate_f16",
            "rate_q8",
            "pool_index_f32",
            "pool_index_f16",
            "pool_index_q8",
            "choose_blocks",
        ],
    },
    Module {
        name: "block_index.cu",
        text: include_str!("kernels/block_index.cu"),
        kernels: &[
            "rate_best_f32",
            "rate_best_f16",
            "rate_best_q8",
            "mean_keys_f32",
            "mean_keys_f16",
            "mean_keys_q8",
        ],
    },
    Module {
        name: "compressed.cu",
        text: include_str!("kernels/compressed.cu"),
        kernels: &[
            "place_compressed",
            "pool_blocks_f32",
            "pool_blocks_f16",
            "pool_blocks_q8",
            "attend_compressed_f32",
            "attend_compressed_f16",
            "attend_compressed_q8",
            "keep_compressed",
            "turn_back",
            "ungroup",
        ],
    },
    Module {
        name: "delta.cu",
        text: include_str!("kernels/delta.cu"),
        kernels: &[
            "delta_convolve",
            "delta_recur_32",
            "delta_recur_64",
            "delta_recur_128",
            "delta_recur_256",
            "delta_gate",
        ],
    },
    Module {
        name: "kda.cu",
        text: include_str!("kernels/kda.cu"),
        kernels: &[
            "kda_convolve",
            "kda_recur_32",
            "kda_recur_64",
            "kda_recur_128",
            "kda_recur_256",
        ],
    },
    Module {
        name: "mamba.cu",
        text: include_str!("kernels/mamba.cu"),
        kernels: &[
            "mamba_convolve",
            "mamba_recur_32",
            "mamba_recur_64",
            "mamba_recur_128",
            "mamba_recur_256",
            "mamba_gate",
        ],
    },
    Module {
        name: "short_conv.cu",
        text: include_str!("kernels/short_conv.cu"),
        kernels: &["short_conv", "short_conv_keep"],
    },
    Module {
        name: "ngram.cu",
        text: include_str!("kernels/ngram.cu"),
        kernels: &["ngram_gate", "ngram_convolve", "ngram_keep"],
    },
    Module {
        name: "inputs.cu",
        text: include_str!("kernels/inputs.cu"),
        kernels: &["token_inputs"],
    },
    Module {
        name: "streams.cu",
        text: include_str!("kernels/streams.cu"),
        kernels: &[
            "streams_read_gated",
            "streams_read_bank",
            "streams_read_mean",
            "streams_norm",
            "streams_squash",
            "streams_read_low_rank",
            "streams_write",
            "streams_write_bank",
            "streams_spread",
        ],
    },
    Module {
        name: "stream.cu",
        text: include_str!("kernels/stream.cu"),
        kernels: &["gather_rows", "add_rows", "clear"],
    },
    Module {
        name: "float.cu",
        text: include_str!("kernels/float.cu"),
        kernels: format_kernels!("float": "F32" "F16" "BF16"),
    },
    Module {
        name: "small.cu",
        text: include_str!("kernels/small.cu"),
        kernels: format_kernels!("small": "Q4_0" "Q4_1" "Q5_0" "Q5_1" "Q8_0" "IQ4_NL" "MXFP4"),
    },
    Module {
        name: "k.cu",
        text: include_str!("kernels/k.cu"),
        kernels: format_kernels!("k": "Q2_K" "Q3_K" "Q4_K" "Q5_K" "Q6_K" "IQ4_XS"),
    },
    Module {
        name: "iq.cu",
        text: include_str!("kernels/iq.cu"),
        kernels: format_kernels!("iq": "IQ2_XXS" "IQ2_XS" "IQ2_S" "IQ3_XXS" "IQ3_S" "IQ1_S" "IQ1_M"),
    },
    Module {
        name: "compact.cu",
        text: include_str!("kernels/compact.cu"),
        kernels: format_kernels!("compact": "Q1_0" "Q2_0" "TQ1_0" "TQ2_0" "NVFP4"),
    },
];

/// Returns the most threads that a block of a kernel has. A multiprocessor has 65,536 registers for
/// them, so this bounds the registers of each.
pub fn most_threads(kernel: &str) -> u32 {
    let has_large_blocks = ["gated_", "pool_blocks_", "choose_blocks"];
    match has_large_blocks.iter().any(|name| kernel.starts_with(name)) {
        true => 512,
        false => 256,
    }
}

/// Returns the headers that modules include, as pairs of name and text.
pub fn headers() -> &'static [(&'static str, String)] {
    static HEADERS: LazyLock<Vec<(&'static str, String)>> = LazyLock::new(|| {
        vec![
            ("base.cuh", include_str!("kernels/base.cuh").to_string()),
            (
                "formats.cuh",
                include_str!("kernels/formats.cuh").to_string(),
            ),
            ("matmul.cuh", include_str!("kernels/matmul.cuh").to_string()),
            (
                "products.cuh",
                include_str!("kernels/products.cuh").to_string(),
            ),
            ("matvec.cuh", include_str!("kernels/matvec.cuh").to_string()),
            ("small.cuh", include_str!("kernels/small.cuh").to_string()),
            ("k.cuh", include_str!("kernels/k.cuh").to_string()),
            ("iq.cuh", include_str!("kernels/iq.cuh").to_string()),
            (
                "compact.cuh",
                include_str!("kernels/compact.cuh").to_string(),
            ),
            ("halves.cuh", include_str!("kernels/halves.cuh").to_string()),
            ("rows.cuh", include_str!("kernels/rows.cuh").to_string()),
            ("delta.cuh", include_str!("kernels/delta.cuh").to_string()),
            ("runs.cuh", include_str!("kernels/runs.cuh").to_string()),
            ("place.cuh", include_str!("kernels/place.cuh").to_string()),
            ("choice.cuh", include_str!("kernels/choice.cuh").to_string()),
            ("attend.cuh", include_str!("kernels/attend.cuh").to_string()),
            ("grids.cuh", grids_header()),
        ]
    });
    &HEADERS
}

/// Returns the module that contains a kernel.
pub fn module_of(kernel: &str) -> Option<&'static Module> {
    MODULES.iter().find(|m| m.kernels.contains(&kernel))
}

/// Returns the matvec kernel of a format.
pub fn matvec_kernel(ty: TensorType) -> &'static str {
    kernel_of("matvec_", ty)
}

/// Returns the matmul kernel of a format, for many tokens.
pub fn matmul_kernel(ty: TensorType) -> &'static str {
    kernel_of("matmul_", ty)
}

/// Returns the kernel that fuses gate, up and activation, for matrices of a format.
pub fn gated_kernel(ty: TensorType) -> &'static str {
    kernel_of("gated_", ty)
}

/// Returns the kernel that fuses down and the weighted sum over a token's experts, for a format.
pub fn chosen_sum_kernel(ty: TensorType) -> &'static str {
    kernel_of("chosen_sum_", ty)
}

/// Returns the kernel that multiplies several matrices of one family of formats (those of a
/// module), and the format's index in the family.
pub fn family(ty: TensorType) -> (&'static str, usize) {
    let matvec = matvec_kernel(ty);
    let kernels = MODULES
        .iter()
        .map(|m| m.kernels)
        .find(|kernels| kernels.contains(&matvec))
        .unwrap_or_default();
    let number = kernels
        .iter()
        .filter(|kernel| kernel.starts_with("matvec_"))
        .position(|kernel| *kernel == matvec);
    let several = kernels.iter().find(|kernel| kernel.starts_with("matvecs_"));
    several
        .copied()
        .zip(number)
        .unwrap_or_else(|| panic!("{ty} has no kernel for several matrices"))
}

/// Returns the kernel that dequantizes rows of a format.
pub fn dequantize_kernel(ty: TensorType) -> &'static str {
    kernel_of("dequantize_", ty)
}

fn kernel_of(prefix: &str, ty: TensorType) -> &'static str {
    let named = |kernel: &&&'static str| kernel.strip_prefix(prefix) == Some(ty.name());
    let kernel = MODULES.iter().flat_map(|m| m.kernels).find(named);
    kernel.unwrap_or_else(|| panic!("{ty} has no kernel {prefix}"))
}

/// Returns the grids of the CPU kernels as C++ arrays.
fn grids_header() -> String {
    let mut text = String::from("#pragma once\n#include \"base.cuh\"\n");
    table(&mut text, "u64", "IQ2_XXS_GRID", "ull", &grids::IQ2_XXS);
    table(&mut text, "u64", "IQ2_XS_GRID", "ull", &grids::IQ2_XS);
    table(&mut text, "u64", "IQ2_S_GRID", "ull", &grids::IQ2_S);
    table(&mut text, "u32", "IQ3_XXS_GRID", "u", &grids::IQ3_XXS);
    table(&mut text, "u32", "IQ3_S_GRID", "u", &grids::IQ3_S);
    table(&mut text, "u64", "IQ1_GRID", "ull", &grids::IQ1);
    text
}

fn table<T: LowerHex + Display>(
    text: &mut String,
    ty: &str,
    name: &str,
    suffix: &str,
    values: &[T],
) {
    // Writing to a string can't fail.
    let _ = write!(text, "TABLE {ty} {name}[{}] = {{", values.len());
    for value in values {
        let _ = write!(text, "{value:#x}{suffix},");
    }
    text.push_str("};\n");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_has_its_kernels_and_names_are_unique() {
        for ty in TensorType::ALL {
            assert_eq!(matvec_kernel(ty), format!("matvec_{ty}"));
            assert_eq!(gated_kernel(ty), format!("gated_{ty}"));
            assert_eq!(chosen_sum_kernel(ty), format!("chosen_sum_{ty}"));
            assert_eq!(matmul_kernel(ty), format!("matmul_{ty}"));
            assert_eq!(dequantize_kernel(ty), format!("dequantize_{ty}"));
        }
        assert_eq!(family(TensorType::Q2_K), ("matvecs_k", 0));
        assert_eq!(family(TensorType::MXFP4), ("matvecs_small", 6));
        assert_eq!(family(TensorType::F16), ("matvecs_float", 1));
        assert_eq!(family(TensorType::NVFP4), ("matvecs_compact", 4));
        let mut names: Vec<&str> = MODULES.iter().flat_map(|m| m.kernels).copied().collect();
        let n_names = names.len();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), n_names);
        assert!(names.into_iter().all(|name| module_of(name).is_some()));
    }

    #[test]
    fn every_include_is_a_header() {
        let texts = MODULES
            .iter()
            .map(|m| m.text)
            .chain(headers().iter().map(|(_, text)| text.as_str()));
        for line in texts
            .flat_map(str::lines)
            .filter_map(|line| line.strip_prefix("#include "))
        {
            let name = line.trim_matches('"');
            assert!(
                name == "shim.h" || headers().iter().any(|(header, _)| *header == name),
                "{line}"
            );
        }
    }
}
