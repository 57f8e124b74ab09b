//! Compares predictions with published measurements, and both with what docs/METHODOLOGY.md says.

use super::{Question, answer};
use crate::catalogue::{self, Known};
use std::path::Path;
use tier_plan_runtime::KvType;
use tier_plan_runtime::formats::SourceId;
use tier_plan_runtime::formats::machine::{Tier, TierKind};
use tier_plan_runtime::model::kv::KvRows;
use tier_plan_runtime::model::shape::{CacheShape, DenseKind, DenseShape, ExpertShape, ModelShape};

/// A published measurement.
struct Point {
    /// Name of its row in the document.
    name: &'static str,
    known: Known,
    machine: &'static str,
    /// Bytes of tiers, where the run used or had less than the machine file says.
    least: &'static [(TierKind, u64)],
    /// Tokens per second.
    published: f64,
    /// Relative error that the prediction for the middle routing may have.
    within: f64,
}

/// A model whose shape is not fully published: its experts, and everything else in lumps.
fn lumps(
    name: &str,
    layers: u32,
    n_expert: u32,
    n_used: u32,
    expert_bytes: u64,
    dense_bytes: u64,
    // Every how many layers one has a KV cache.
    (every, kv): (u32, KvRows),
) -> Known {
    let dense = |layer| DenseShape {
        kind: DenseKind::Attention,
        layer: Some(layer),
        bytes: dense_bytes / u64::from(layers),
        token_bytes: dense_bytes / u64::from(layers),
        macs: dense_bytes / u64::from(layers),
    };
    let expert = |layer| ExpertShape {
        layer,
        n_expert,
        n_used,
        expert_bytes,
        expert_macs: 2 * expert_bytes,
        by_token: false,
    };
    let sizes = ModelShape {
        id: SourceId {
            name: name.into(),
            hash: "0".repeat(32),
        },
        arch: "lumps".into(),
        n_layer: layers,
        hidden: 4096,
        n_vocab: 100_000,
        context: 1 << 17,
        caches: (1..=layers)
            .map(|l| CacheShape {
                rows: if l % every == 0 { vec![kv] } else { Vec::new() },
                state_bytes: 0,
                more_readers: 0,
            })
            .collect(),
        dense: (0..layers).map(dense).collect(),
        experts: (0..layers).map(expert).collect(),
        cpu_only: Vec::new(),
    };
    Known {
        longest_context: sizes.context.into(),
        sizes,
        shape: None,
    }
}

fn points() -> Vec<Point> {
    let shape = |name: &str, quant: &str| catalogue::model(Path::new(name), Some(quant)).unwrap();
    // 43 layers of 256 experts, 6 used: 3.45 GB per token. The other 6.5e9 of 13e9 active
    // parameters are stored in 8 bits.
    let v4 = lumps(
        "deepseek-v4-flash",
        43,
        256,
        6,
        3_450_000_000 / (43 * 6),
        6_500_000_000,
        (
            1,
            KvRows {
                width: 576,
                per_token: 1,
                every: 1,
                queries: 128,
                window: None,
                chosen: None,
            },
        ),
    );
    // 60 layers of 512 experts, 10 used, of 3 * 4096 * 1024 values each; 209 GB for 397e9
    // parameters are 4.2 bits. Of the 17e9 active parameters 9e9 are not routed. Every fourth layer
    // has keys and values.
    let qwen = lumps(
        "qwen3.5-397b",
        60,
        512,
        10,
        6_620_000,
        9_000_000_000 * 42 / 80,
        (
            4,
            KvRows {
                width: 256,
                per_token: 2 * 2,
                every: 1,
                queries: 16,
                window: None,
                chosen: None,
            },
        ),
    );
    vec![
        Point {
            name: "Kimi K2, 2.9 bits, EPYC 9965",
            known: shape("kimi-k2", "q2_k"),
            machine: "epyc-9965",
            least: &[],
            published: 13.39,
            within: 0.15,
        },
        Point {
            name: "DeepSeek V4-Flash, 8 × DDR4 and RTX 5090",
            known: v4,
            machine: "ddr4-8ch-5090",
            // All experts were on the CPU.
            least: &[(TierKind::Vram, 6_800_000_000)],
            published: 24.5,
            within: 0.25,
        },
        Point {
            name: "Kimi K2, Q4, 2 × Xeon 8480+ and RTX 4090",
            known: shape("kimi-k2", "q4_k_m"),
            machine: "xeon-8480x2-4090",
            least: &[],
            published: 14.0,
            within: 0.15,
        },
        Point {
            name: "Kimi K2.5, Optane",
            known: shape("kimi-k2.5", "q4_k_m"),
            machine: "optane-768",
            least: &[],
            published: 4.0,
            within: 0.25,
        },
        Point {
            name: "Qwen3.5-397B, NVMe and RTX 4090",
            known: qwen,
            machine: "desktop-4090-ddr5-nvme",
            // The size of main memory is not published; the other desktop's is assumed.
            least: &[(TierKind::Dram, 64 << 30)],
            published: 5.35,
            within: 0.25,
        },
        Point {
            name: "GLM-5.2, RTX 5090 and gen5 NVMe",
            known: shape("glm-5.2", "q4_k_m"),
            machine: "desktop-5090-gen5",
            least: &[],
            published: 1.23,
            within: 0.40,
        },
    ]
    .into_iter()
    .chain(of_this_season())
    .collect()
}

/// Points of models of 2026, all by shape. Most are beyond the target; the document says why.
fn of_this_season() -> Vec<Point> {
    let point = |name, shape: &str, quant: &str, machine, published, within| Point {
        name,
        known: catalogue::model(Path::new(shape), Some(quant)).unwrap(),
        machine,
        least: &[],
        published,
        within,
    };
    vec![
        point(
            "Kimi K3, MXFP4, 2 × Xeon 6248 and 2 × RTX 6000 Ada",
            "kimi-k3",
            "mxfp4",
            "xeon-6248x2-ada",
            3.0,
            0.20,
        ),
        point(
            "DeepSeek V4-Flash, MXFP4, 4 × Xeon 6252N and RTX 3090",
            "deepseek-v4-flash",
            "mxfp4",
            "xeon-6252n-x4-3090",
            25.07,
            0.65,
        ),
        Point {
            // The middle of 1.85 to 1.99.
            least: &[(TierKind::Dram, 32 << 30)],
            ..point(
                "DeepSeek V4-Flash, MXFP4, RTX 5090 and gen5 NVMe",
                "deepseek-v4-flash",
                "mxfp4",
                "desktop-5090-gen5",
                1.92,
                4.0,
            )
        },
        point(
            "GLM-5.3-Flash, Q4, EPYC 7443P and RTX 3090",
            "glm-5.3-flash",
            "q4_k_m",
            "epyc-7443p-3090",
            28.2,
            0.50,
        ),
        // The middle of 87 to 93.
        point(
            "Qwen3.8-Flash-Next, Q2_0, RTX 5070",
            "qwen3.8-flash-next",
            "q2_0",
            "desktop-5070-ddr5",
            90.0,
            0.40,
        ),
    ]
}

/// Returns the row of the document that begins with a name: published, predicted, least and most.
fn row(page: &str, name: &str) -> [f64; 4] {
    let start = format!("| {name} |");
    let line = page
        .lines()
        .find(|line| line.starts_with(&start))
        .unwrap_or_else(|| panic!("no row {start}"));
    let cells: Vec<&str> = line.split('|').map(str::trim).collect();
    let number = |text: &str| {
        text.trim()
            .parse::<f64>()
            .unwrap_or_else(|_| panic!("'{text}' in {line}"))
    };
    let (low, high) = cells[4].split_once(" to ").unwrap();
    [
        number(cells[2]),
        number(cells[3]),
        number(low),
        number(high),
    ]
}

/// Compares the prediction for a point with its measurement and with the document.
fn check_point(at: usize) {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/METHODOLOGY.md");
    let page = std::fs::read_to_string(page).unwrap();
    let point = points().swap_remove(at);
    let machine = catalogue::machine(Path::new(point.machine)).unwrap();
    let least = |kind| {
        point
            .least
            .iter()
            .find(|(of, _)| *of == kind)
            .map(|(_, bytes)| *bytes)
    };
    let budget = |t: &Tier| least(t.kind).unwrap_or(t.capacity_bytes);
    let budgets = machine.tiers.iter().map(budget).collect();
    let question = Question {
        known: &point.known,
        machine: &machine,
        budgets,
        profile: None,
        context: 4096,
        sequences: 1,
        at: None,
        kv_type: KvType::F16,
        time_limit_s: 3.0,
    };
    let predicted = answer(&question).unwrap().decode_tok_s();
    let [speed, low, high] = predicted;
    println!(
        "{}: {speed:.3} ({low:.3} to {high:.3}), published {}",
        point.name, point.published
    );
    let error = speed / point.published - 1.0;
    assert!(
        error.abs() <= point.within,
        "{}: {speed:.2} is {:+.0} % off",
        point.name,
        error * 100.0
    );
    let stated = row(&page, point.name);
    assert_eq!(stated[0], point.published, "{}", point.name);
    for (stated, predicted) in stated[1..].iter().zip(predicted) {
        let differs = (stated / predicted - 1.0).abs() > 0.02;
        assert!(
            !differs,
            "{}: the page says {stated}, but it is {predicted:.3}",
            point.name
        );
    }
}

/// Tests that predictions are near what was measured and that docs/METHODOLOGY.md says how near,
/// one test per point, so that cores share them.
macro_rules! points_are_near {
    ($($name:ident => $at:literal),* $(,)?) => {
        $(
            #[test]
            fn $name() {
                check_point($at);
            }
        )*

        #[test]
        fn every_point_has_a_test() {
            assert_eq!([$($at),*], *(0..points().len()).collect::<Vec<_>>());
        }
    };
}

points_are_near! {
    kimi_k2_on_epyc_is_near => 0,
    deepseek_v4_flash_on_ddr4_and_a_5090_is_near => 1,
    kimi_k2_on_two_xeons_and_a_4090_is_near => 2,
    kimi_k2_5_on_optane_is_near => 3,
    qwen3_5_on_nvme_and_a_4090_is_near => 4,
    glm_5_2_on_a_5090_and_nvme_is_near => 5,
    kimi_k3_on_two_xeons_is_near => 6,
    deepseek_v4_flash_on_four_xeons_is_as_far_as_stated => 7,
    deepseek_v4_flash_on_a_5090_and_nvme_is_as_far_as_stated => 8,
    glm_5_3_flash_on_epyc_and_a_3090_is_as_far_as_stated => 9,
    qwen3_8_at_two_bits_on_a_5070_is_as_far_as_stated => 10,
}
