//! Names of tensor types that files carry and that no kernel here reads: withdrawn ones, and those
//! of other engines, each of which has numbers of its own.

use tier_plan_kernels::quant::TensorType;

/// Repacked types of ik_llama.cpp have the number of the type that they repack plus this.
const REPACKED: u32 = 200;

/// Weights of ik_llama.cpp.
const IK_LLAMA: [(u32, &str); 19] = [
    (133, "Q6_0"),
    (134, "IQ1_BN"),
    (135, "IQ2_BN"),
    (137, "IQ2_K"),
    (138, "IQ3_K"),
    (139, "IQ4_K"),
    (140, "IQ5_K"),
    (141, "IQ6_K"),
    (144, "IQ4_KS"),
    (145, "IQ2_KS"),
    (146, "IQ4_KSS"),
    (151, "Q8_KV"),
    (152, "IQ5_KS"),
    (153, "IQ2_KT"),
    (154, "IQ3_KT"),
    (155, "IQ4_KT"),
    (156, "IQ3_KS"),
    (157, "IQ2_KL"),
    (158, "IQ1_KT"),
];

/// Weights of ROCmFPX, a fork of llama.cpp for AMD GPUs.
const ROCMFPX: [(u32, &str); 7] = [
    (100, "Q4_0_ROCMFP4"),
    (101, "Q4_0_ROCMFP4_FAST"),
    (102, "Q6_0_ROCMFPX"),
    (103, "Q8_0_ROCMFPX"),
    (104, "Q3_0_ROCMFPX"),
    (107, "Q2_0_ROCMFPX"),
    (108, "Q4_0_ROCMI4"),
];

/// Returns a type's name and origin as they follow its number in a message, ` (IQ4_K of
/// ik_llama.cpp)`; empty where it is unknown.
pub(super) fn named(type_id: u32) -> String {
    let of = |list: &[(u32, &'static str)], id: u32| {
        let found = list.iter().find(|(number, _)| *number == id);
        found.map(|(_, name)| *name)
    };
    match type_id {
        4 | 5 => " (the withdrawn Q4_2 or Q4_3)".into(),
        9 => " (Q8_1, a type of activations)".into(),
        15 => " (Q8_K, a type of activations)".into(),
        31..=33 => " (a withdrawn repacked Q4_0)".into(),
        36 => " (I2_S of bitnet.cpp, or a withdrawn repacked IQ4_NL)".into(),
        37 | 38 => " (a withdrawn repacked IQ4_NL)".into(),
        45 => " (TQ3_1S of TurboQuant)".into(),
        46 => " (TQ4_1S of TurboQuant)".into(),
        100..=132 => match of(&ROCMFPX, type_id) {
            Some(name) => format!(" ({name} of ROCmFPX)"),
            None => String::new(),
        },
        133..REPACKED => match of(&IK_LLAMA, type_id) {
            Some(name) => format!(" ({name} of ik_llama.cpp)"),
            None => " (a type of ik_llama.cpp)".into(),
        },
        REPACKED..=399 => {
            let packed = type_id - REPACKED;
            let ours = TensorType::from_id(packed).ok().map(TensorType::name);
            match ours.or(of(&IK_LLAMA, packed)) {
                Some(name) => format!(" (a repacked {name} of ik_llama.cpp)"),
                None => " (a repacked type of ik_llama.cpp)".into(),
            }
        }
        _ => String::new(),
    }
}
