use super::*;
use crate::catalogue;
use std::path::Path;
use tier_plan_runtime::formats::machine;

fn machine_of(extras: &str, tiers: &[(&str, &str, f64)]) -> Machine {
    let mut text = format!(
        "format = \"tier-plan machine\"\nversion = 1\nname = \"m\"\nlayer_overhead_us = 10\ntoken_overhead_us = 100\n{extras}\n"
    );
    for (kind, capacity, rate) in tiers {
        text += &format!(
            "[[tier]]\nname = \"{kind}\"\nkind = \"{kind}\"\ncapacity = \"{capacity}\"\nread_gbps = {rate}\nlatency_us = 0\n\
             source = \"test\"\n"
        );
    }
    machine::decode(text.as_bytes(), Path::new("m.toml")).unwrap()
}

fn ask<'a>(known: &'a Known, machine: &'a Machine) -> Question<'a> {
    let budgets = machine.tiers.iter().map(|t| t.capacity_bytes).collect();
    Question {
        known,
        machine,
        budgets,
        profile: None,
        context: 1024,
        sequences: 1,
        at: None,
        kv_type: KvType::F16,
        time_limit_s: 2.0,
    }
}

fn known(name: &str, quant: &str) -> Known {
    catalogue::model(Path::new(name), Some(quant)).unwrap()
}

#[test]
fn one_tier_is_its_bytes_over_its_rate() -> Result<()> {
    let extras = "efficiency = 0.5\nload_gbps = 2\nwatts = 300\nprice_usd = 4000";
    let machine = machine_of(extras, &[("dram", "2TiB", 100.0)]);
    for name in ["llama-3.1-405b", "mixtral-8x7b"] {
        let known = known(name, "q4_k_m");
        let answer = answer(&ask(&known, &machine))?;
        let sizes = &known.sizes;
        let cache = 512 * KvType::F16.token_bytes(sizes);
        let seconds =
            100e-6 + f64::from(sizes.n_layer) * 10e-6 + (sizes.token_bytes() + cache) as f64 / 50e9;
        for case in &answer.cases {
            assert!(
                (case.decode_tok_s() * seconds - 1.0).abs() < 1e-9,
                "{name} {}",
                case.routing
            );
            assert_eq!(case.plan.solver.status, "optimal");
        }
        let [speed, low, high] = answer.decode_tok_s();
        assert!(low <= speed && speed <= high);
        assert!((answer.load_s.unwrap() - sizes.weight_bytes() as f64 / 2e9).abs() < 1e-6);
        assert!((answer.joules_per_token().unwrap() - 300.0 * seconds).abs() < 1e-6);
        assert!((answer.tok_s_per_1000_usd().unwrap() - 0.25 / seconds).abs() < 1e-9);
        let bound = bound(&answer.cases[0].plan);
        assert_eq!(bound.by, "dram");
        assert!((bound.seconds - (sizes.token_bytes() + cache) as f64 / 50e9).abs() < 1e-9);
    }
    Ok(())
}

#[test]
fn more_is_known_the_narrower_the_range() -> Result<()> {
    let known = known("qwen3-30b-a3b", "q4_k_m");
    let machine = machine_of("", &[("dram", "8GiB", 50.0), ("nvme", "100GB", 5.0)]);
    let question = ask(&known, &machine);
    let found = answer(&question)?;
    let routings: std::collections::BTreeSet<&str> =
        found.cases.iter().map(|c| c.routing).collect();
    assert_eq!(
        routings.into_iter().collect::<Vec<_>>(),
        ["bursty", "flat", "zipf"]
    );
    let [speed, low, high] = found.decode_tok_s();
    // Flat routing is the worst there is for pins and slots alike.
    assert_eq!(found.cases[0].routing, "flat");
    assert!(low < speed && speed < high, "{low} {speed} {high}");
    assert_eq!(bound(&found.cases[0].plan).by, "nvme");
    let value = as_json(&question, &Ok(found));
    for key in [
        "decode_tok_s",
        "decode_tok_s_low",
        "decode_tok_s_high",
        "gap",
        "status",
        "bound_by",
        "prompt_tok_s_limit",
        "load_s",
    ] {
        assert!(!value[key].is_null(), "{key}: {value}");
    }
    assert_eq!(value["tiers"].as_array().map(Vec::len), Some(2));
    assert_eq!(
        (value["fits"].as_bool(), value["predicted"].as_bool()),
        (Some(true), Some(true))
    );
    assert!(
        value["watts"].is_null()
            && value["price_usd"].is_null()
            && value["joules_per_token"].is_null()
    );
    // Every plan was solved to a small gap, and its own check was passed on the way.
    for case in value["cases"].as_array().unwrap() {
        assert!(case["gap"].as_f64().unwrap() < 0.02, "{case}");
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_an_answer_too() {
    let known = known("kimi-k2.5", "q4_k_m");
    let machine = machine_of("", &[("vram", "80GB", 1565.0), ("dram", "64GiB", 50.0)]);
    let question = ask(&known, &machine);
    let value = as_json(&question, &answer(&question));
    assert_eq!(value["fits"].as_bool(), Some(false));
    let reason = value["reason"].as_str().unwrap();
    assert!(
        reason.contains("are 578 GiB, but all tiers together have 139 GiB left"),
        "{reason}"
    );
    assert!(value.get("decode_tok_s").is_none());
}

#[test]
fn a_sweep_rises_bends_and_costs_more() -> Result<()> {
    let known = known("qwen3-30b-a3b", "q4_k_m");
    let mut machine = machine_of(
        "price_usd = 1000",
        &[("dram", "8GiB", 50.0), ("nvme", "100GB", 5.0)],
    );
    machine.extras.usd_per_gb.insert("dram".into(), 2.0);
    let range = sweep::Range::parse("dram=512MiB..40GiB:6")?;
    let mut steps = Vec::new();
    let question = ask(&known, &machine);
    let supposed = Supposed::new(&question)?;
    let swept = sweep::sweep(&question, &supposed, &range, |done| steps.push(done))?;
    assert_eq!(steps, [1, 2, 3, 4, 5, 6]);
    assert!(
        swept.points[0].answer.is_err(),
        "attention alone is larger than the first size"
    );
    let fit: Vec<&Answer> = swept
        .points
        .iter()
        .filter_map(|p| p.answer.as_ref().ok())
        .collect();
    assert_eq!(fit.len(), 5);
    let speeds: Vec<f64> = fit.iter().map(|a| a.decode_tok_s()[0]).collect();
    assert!(speeds.windows(2).all(|w| w[1] >= w[0] * 0.99), "{speeds:?}");
    // At 17.5 GiB and more everything is in DRAM, so the curve bends there at the latest.
    assert!(
        swept
            .knee
            .is_some_and(|knee| swept.points[knee].bytes < 26 << 30),
        "{:?} {speeds:?}",
        swept.knee
    );
    let price = fit.last().and_then(|a| a.price_usd).unwrap();
    assert!(
        (price - (1000.0 + 2.0 * ((40u64 << 30) as f64 - (8u64 << 30) as f64) / 1e9)).abs() < 1e-6
    );
    let other = sweep::Range::parse("vram=1GiB..2GiB")?;
    let error = sweep::sweep(&question, &supposed, &other, |_| ())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("no such tier; its tiers are dram, nvme"),
        "{error}"
    );
    Ok(())
}

#[test]
fn the_same_money_goes_where_it_brings_most() -> Result<()> {
    let known = known("qwen3-30b-a3b", "q4_k_m");
    let mut machine = machine_of(
        "price_usd = 2000",
        &[
            ("vram", "4GiB", 800.0),
            ("dram", "6GiB", 50.0),
            ("nvme", "100GB", 5.0),
        ],
    );
    machine
        .extras
        .usd_per_gb
        .extend([("dram".to_string(), 20.0), ("nvme".to_string(), 0.1)]);
    let question = ask(&known, &machine);
    let supposed = Supposed::new(&question)?;
    let found = answer_supposing(&question, &supposed)?;
    let bought = purchase::purchases(&question, &found, &supposed);
    // A tenth of the price on each tier that has one.
    let names: Vec<&str> = bought.iter().map(|p| p.tier.as_str()).collect();
    assert_eq!(names, ["dram", "nvme"]);
    assert_eq!((bought[0].usd, bought[0].bytes), (200.0, 10_000_000_000));
    assert!(bought[0].helps() && !bought[1].helps(), "{bought:?}");
    let (larger, budgets) = sweep::at_size(&question, "dram", (6 << 30) + 10_000_000_000).unwrap();
    let again = answer(&Question {
        machine: &larger,
        budgets,
        ..question.clone()
    })?;
    let middle = found.middle().unwrap().routing;
    let expected = again
        .cases
        .iter()
        .find(|c| c.routing == middle)
        .unwrap()
        .decode_tok_s();
    // A purchase begins with the answer's columns; solved alone, it shows the same digits.
    assert!(
        (bought[0].tok_s / expected - 1.0).abs() < 3e-4,
        "{} {expected}",
        bought[0].tok_s
    );
    machine.extras.usd_per_gb.clear();
    let question = ask(&known, &machine);
    assert_eq!(purchase::purchases(&question, &found, &supposed), []);
    Ok(())
}
