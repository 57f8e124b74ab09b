use super::*;
use std::path::Path;
use tier_plan_runtime::formats::machine::{self, Link};
use tier_plan_runtime::formats::record::{LayerRecord, TierRecord};

fn machine(layer_us: f64) -> Machine {
    let text = format!(
        "format = \"tier-plan machine\"\nversion = 1\nname = \"m\"\nlayer_overhead_us = {layer_us}\ntoken_overhead_us = 50\n\
         [[tier]]\nname = \"vram\"\nkind = \"vram\"\ncapacity = \"8GiB\"\nread_gbps = 500\nlatency_us = 0\nsource = \"test\"\n\
         [[tier]]\nname = \"dram\"\nkind = \"dram\"\ncapacity = \"64GiB\"\nread_gbps = 20\nlatency_us = 0\nsource = \"test\"\n\
         [[tier]]\nname = \"nvme\"\nkind = \"nvme\"\ncapacity = \"1TB\"\nread_gbps = 2\nlatency_us = 0\nsource = \"test\"\n"
    );
    machine::decode(text.as_bytes(), Path::new("m.toml")).unwrap()
}

/// What a machine really is, where it differs from its file.
#[derive(Clone, Copy)]
struct Truth {
    layer_s: f64,
    token_s: f64,
    factors: [f64; 3],
}

const LAYERS: usize = 24;

/// A run of a plan that reads gigabytes per token: dense groups of DRAM, experts of DRAM, experts
/// of the drive. The text made it read `more` times as much of the drive as predicted.
fn record(
    machine: &Machine,
    truth: Truth,
    dense: f64,
    dram: f64,
    nvme: f64,
    more: f64,
) -> RunRecord {
    let predicted = Prediction {
        overhead_s: (machine.token_overhead_us + machine.layer_overhead_us * LAYERS as f64) * 1e-6,
        dense_s: [0.0, dense / 20.0, 0.0].into(),
        expert_s: [0.0, dram / 20.0, nvme / 2.0].into(),
        // Half of the shorter path is hidden.
        expert_critical_s: 0.75 * (dram / 20.0 + nvme / 2.0),
        read_bytes: [0.0, (dense + dram) * 1e9, nvme * 1e9].into(),
        at: 128,
        kv_s: 0.001,
        ..Prediction::default()
    };
    let [_, f_dram, f_nvme] = truth.factors;
    let expert_s = 0.75 * (f_dram * dram / 20.0 + f_nvme * more * nvme / 2.0);
    let dense_s = truth.layer_s * LAYERS as f64 + truth.token_s + f_dram * (dense / 20.0 + 0.001);
    let tokens = 64.0;
    let tier = |name: &str, gb: f64| TierRecord {
        name: name.into(),
        read_bytes: (gb * 1e9 * tokens) as u64,
        ..TierRecord::default()
    };
    RunRecord {
        machine: Some(machine.id.clone()),
        decode_tokens: 64,
        decode_s: tokens * (dense_s + expert_s),
        tiers: vec![
            tier("vram", 0.0),
            tier("dram", dense + dram),
            tier("nvme", nvme * more),
        ],
        layers: (0..LAYERS)
            .map(|l| LayerRecord {
                layer: l as u32,
                expert_s: expert_s / LAYERS as f64,
                ..LayerRecord::default()
            })
            .collect(),
        predicted: Some(predicted),
        ..RunRecord::default()
    }
}

fn records(machine: &Machine, truth: Truth) -> Vec<(String, RunRecord)> {
    [
        (0.2, 0.5, 0.001, 1.0),
        (0.2, 0.45, 0.02, 1.3),
        (0.3, 0.4, 0.06, 0.8),
        (0.1, 0.3, 0.1, 1.0),
        (0.4, 0.2, 0.0, 1.0),
    ]
    .into_iter()
    .map(|(dense, dram, nvme, more)| {
        (
            "r.json".to_string(),
            record(machine, truth, dense, dram, nvme, more),
        )
    })
    .collect()
}

#[test]
fn known_parameters_are_found() {
    let machine = machine(25.0);
    for truth in [
        Truth {
            layer_s: 120e-6,
            token_s: 50e-6,
            factors: [1.0, 1.25, 0.8],
        },
        Truth {
            layer_s: 20e-6,
            token_s: 50e-6,
            factors: [1.0, 0.9, 1.6],
        },
        Truth {
            layer_s: 25e-6,
            token_s: 50e-6,
            factors: [1.0, 1.0, 1.0],
        },
    ] {
        let fit = Fit::new(&machine, &records(&machine, truth)).unwrap();
        assert!(
            (fit.factors[1] / truth.factors[1] - 1.0).abs() < 0.02,
            "{fit:?}"
        );
        assert!(
            (fit.factors[2] / truth.factors[2] - 1.0).abs() < 0.03,
            "{fit:?}"
        );
        assert_eq!(fit.factors[0], 1.0, "no run read it");
        // With one model only the sum of the fixed times can be known.
        let fixed = |layer: f64, token: f64| layer * LAYERS as f64 + token;
        let (found, sought) = (
            fixed(fit.layer_s, fit.token_s),
            fixed(truth.layer_s, truth.token_s),
        );
        assert!((found / sought - 1.0).abs() < 0.06, "{found} {sought}");
        let after = fit.error(|row| Some(row.after_s)).unwrap();
        assert!(
            after < 0.005 && after <= fit.error(|row| Some(row.before_s)).unwrap() + 1e-9,
            "{after}"
        );
        assert!(fit.error(|row| row.left_out_s).unwrap() < 0.02);
    }
}

#[test]
fn runs_that_contradict_each_other_make_nothing_worse() {
    let machine = machine(25.0);
    for seed in 0..40u32 {
        // Each run has noise of its own.
        let weather =
            |run: u32| 0.8 + 0.1 * f64::from((seed.wrapping_mul(7) + run * 3 + seed * run) % 5);
        let records: Vec<_> = (0..4)
            .flat_map(|run| {
                let factor = weather(run);
                let truth = Truth {
                    layer_s: 25e-6 * factor,
                    token_s: 50e-6,
                    factors: [1.0, factor, 2.0 - factor],
                };
                records(&machine, truth).into_iter().nth(run as usize)
            })
            .collect();
        let fit = Fit::new(&machine, &records).unwrap();
        let (left_out, before) = (
            fit.error(|r| r.left_out_s).unwrap(),
            fit.error(|r| Some(r.before_s)).unwrap(),
        );
        assert!(left_out <= before + 1e-12, "{left_out} {before}");
    }
}

#[test]
fn what_the_text_read_is_no_error_of_a_rate() {
    let machine = machine(25.0);
    let truth = Truth {
        layer_s: 25e-6,
        token_s: 50e-6,
        factors: [1.0; 3],
    };
    let fit = Fit::new(&machine, &records(&machine, truth)).unwrap();
    for row in &fit.rows {
        assert!(
            (row.before_s / row.measured_s - 1.0).abs() < 1e-6,
            "{row:?}"
        );
    }
    assert!(
        (fit.rows[1].predicted_s / fit.rows[1].measured_s - 1.0).abs() > 0.03,
        "{:?}",
        fit.rows[1]
    );
    assert!(fit.factors.iter().all(|f| (f - 1.0).abs() < 1e-6));
}

#[test]
fn the_machine_file_says_what_it_was_fitted_to() {
    let mut before = machine(25.0);
    let link = Link {
        to_gbps: 25.0,
        to_pageable_gbps: 9.0,
        from_gbps: 25.0,
        from_pageable_gbps: 9.0,
        contended_gbps: 21.0,
        dram_contended_gbps: 15.0,
    };
    before.extras.links.insert("vram".into(), link);
    let truth = Truth {
        layer_s: 120e-6,
        token_s: 50e-6,
        factors: [1.0, 1.25, 0.8],
    };
    let fit = Fit::new(&before, &records(&before, truth)).unwrap();
    let fitted = fit.machine(&before, "2026-11-22T17:00:00Z");
    // Of 20 GB/s the CPU kept 15 beside transfers, and of 16 it keeps 12.
    let kept = fitted.extras.links["vram"].dram_contended_gbps / fitted.tiers[1].read_gbps;
    assert!((kept - 0.75).abs() < 1e-3, "{kept}");
    let rates: Vec<f64> = fitted.tiers.iter().map(|t| t.read_gbps).collect();
    assert!(
        rates[0] == 500.0 && (rates[1] - 16.0).abs() < 0.4 && (rates[2] - 2.5).abs() < 0.1,
        "{rates:?}"
    );
    assert!(
        fitted.tiers[1]
            .source
            .starts_with("fitted to 5 runs from 20 GB/s; test")
    );
    assert_eq!(fitted.tiers[0].source, "test");
    let calibration = fitted.extras.calibration.clone().unwrap();
    assert_eq!(
        (calibration.records, calibration.when.as_str()),
        (5, "2026-11-22T17:00:00Z")
    );
    assert!(
        calibration.error_before > 0.1 && calibration.error_after < 0.005,
        "{calibration:?}"
    );
    let back = machine::decode(fitted.encode().as_bytes(), Path::new("m.toml")).unwrap();
    assert_eq!(back, fitted);
    // Runs of the plan before say nothing of the file after.
    let error = Fit::new(&fitted, &records(&before, truth))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("r.json: its plan was made for the machine 'm'")
            && error.contains("solve again"),
        "{error}"
    );
}

#[test]
fn runs_that_say_nothing_are_refused() {
    let machine = machine(25.0);
    let truth = Truth {
        layer_s: 25e-6,
        token_s: 50e-6,
        factors: [1.0; 3],
    };
    let refused = |change: &dyn Fn(&mut RunRecord), words: &str| {
        let mut records = records(&machine, truth);
        change(&mut records[2].1);
        let error = Fit::new(&machine, &records).unwrap_err().to_string();
        assert!(error.contains(words), "{words}: {error}");
    };
    refused(&|r| r.emulated = true, "it ran on emulated tiers");
    refused(&|r| r.tiers[1].emulated = true, "it ran on emulated tiers");
    refused(&|r| r.predicted = None, "predicted nothing");
    refused(&|r| r.machine = None, "made for the machine of no name");
    refused(&|r| r.decode_s = 0.0, "decoded nothing");
    refused(&|r| r.decode_tokens = 0, "decoded nothing");
    refused(&|r| r.tiers.truncate(1), "its tiers or the parts");
    refused(
        &|r| r.tiers[0].name = "other".into(),
        "its tiers or the parts",
    );
    refused(&|r| r.layers[0].expert_s = 1e3, "contradicts itself");
    assert!(Fit::new(&machine, &[]).is_err());
    // A machine of declared tiers is no machine to be fitted.
    let text = machine
        .encode()
        .replace("emulated = false", "emulated = true");
    let emulated = machine::decode(text.as_bytes(), Path::new("m.toml")).unwrap();
    let mut records = records(&machine, truth);
    records
        .iter_mut()
        .for_each(|(_, r)| r.machine = Some(emulated.id.clone()));
    assert!(
        Fit::new(&emulated, &records)
            .unwrap_err()
            .to_string()
            .contains("emulated tiers")
    );
}

#[test]
fn expert_stages_of_runs_that_stream_are_taken_as_measured() {
    let machine = machine(25.0);
    let truth = Truth {
        layer_s: 120e-6,
        token_s: 50e-6,
        factors: [1.0; 3],
    };
    // A GPU took half of the experts, and the rest took the CPU longer, which no rate here says.
    let streamed = |factor: f64, streamed: u64| {
        let mut record = record(&machine, truth, 0.0, 0.5, 0.0, 1.0);
        let predicted = record.predicted.as_mut().unwrap();
        predicted.kv_s = 0.0;
        let tokens = record.decode_tokens as f64;
        record.decode_s -= tokens * 0.001;
        for layer in &mut record.layers {
            record.decode_s += tokens * (factor - 1.0) * layer.expert_s;
            layer.expert_s *= factor;
            layer.streamed = streamed;
        }
        ("s.json".to_string(), record)
    };
    // Nothing of main memory is in the equation that is left, so its factor stays.
    let runs = [0.6, 0.8, 1.2, 1.7].map(|factor| streamed(factor, 9));
    let alone = Fit::new(&machine, &runs).unwrap();
    assert!(
        alone.factors.iter().all(|f| (f - 1.0).abs() < 1e-9),
        "{alone:?}"
    );
    let fixed_s = |fit: &Fit| fit.layer_s * LAYERS as f64 + fit.token_s;
    let sought_s = truth.layer_s * LAYERS as f64 + truth.token_s;
    assert!((fixed_s(&alone) / sought_s - 1.0).abs() < 0.05, "{alone:?}");
    for row in &alone.rows {
        assert!((row.after_s / row.measured_s - 1.0).abs() < 0.02, "{row:?}");
    }
    // Beside others they change no rate, and would if they counted as plain.
    let factor = |more: (String, RunRecord)| {
        let mut records = records(&machine, truth);
        records.push(more);
        Fit::new(&machine, &records).unwrap().factors[1]
    };
    assert!((factor(streamed(1.7, 9)) - 1.0).abs() < 0.01);
    assert!((factor(streamed(1.7, 0)) - 1.0).abs() > 0.05);
}

#[test]
fn fixed_times_never_fall_below_nothing() {
    let machine = machine(200.0);
    // Faster than even no fixed time at all would be.
    let truth = Truth {
        layer_s: -10e-6,
        token_s: 0.0,
        factors: [1.0; 3],
    };
    let fit = Fit::new(&machine, &records(&machine, truth)).unwrap();
    assert!(
        fit.layer_s >= 0.0 && fit.token_s >= 0.0 && fit.factors.iter().all(|f| *f > 0.0),
        "{fit:?}"
    );
    assert!(
        fit.error(|row| Some(row.after_s)).unwrap() < 0.02,
        "{fit:?}"
    );
    // One run alone is enough to move, and nothing to leave out.
    let one = Fit::new(&machine, &records(&machine, truth)[..1]).unwrap();
    assert_eq!(one.error(|row| row.left_out_s), None);
}
