use super::{counts, llama_cpp};
use crate::catalogue;
use crate::cost::predict;
use crate::profile::Evidence;
use crate::profile::pattern::Pattern;
use crate::profile::synthetic::{self, Routing};
use crate::solve::options::Strategy;
use crate::solve::problem::constraints::Constraints;
use crate::solve::{Options, Problem, solve_with_evidence};
use std::path::Path;
use tier_plan_runtime::KvType;
use tier_plan_runtime::formats::placement::{Placement, Streaming, TierIdx};
use tier_plan_runtime::model::shape::{DenseKind, ModelShape};

fn solved(vram: u64, dram: u64, kv_type: KvType) -> (ModelShape, Evidence, Placement) {
    let shape = catalogue::model(Path::new("qwen3-30b-a3b"), Some("q4_k_m"))
        .unwrap()
        .sizes;
    let machine = catalogue::machine(Path::new("desktop-4090-ddr5-nvme")).unwrap();
    let evidence = Evidence::supposed(&shape, Pattern::Zipf).unwrap();
    let budgets = vec![vram, dram, 2_000_000_000_000];
    let problem = Problem {
        shape: &shape,
        profile: None,
        machine: &machine,
        budgets,
        context: 1024,
        sequences: 1,
        kv_type,
        position: None,
    };
    let options = Options {
        strategy: Strategy::Optimal,
        time_limit_s: 2.0,
        ..Options::default()
    };
    let plan = solve_with_evidence(&problem, &evidence, &options)
        .unwrap()
        .plan;
    (shape, evidence, plan)
}

/// Returns the bytes that a command line puts into VRAM, from its words alone: layers from the end,
/// less what it overrides.
fn vram_bytes(args: &[String], shape: &ModelShape, kv_bytes: u64) -> u64 {
    let after = |flag: &str| {
        args.iter()
            .position(|a| a == flag)
            .and_then(|at| args.get(at + 1))
    };
    let layers: u32 = after("-ngl").unwrap().parse().unwrap();
    let from = shape.n_layer - layers.min(shape.n_layer);
    let on_cpu = match (after("--n-cpu-moe"), after("-ot")) {
        (Some(first), _) => (0..first.parse().unwrap()).collect(),
        (None, Some(expression)) => llama_cpp::layers_of(expression).unwrap(),
        (None, None) if args.iter().any(|a| a == "--cpu-moe") => (0..shape.n_layer).collect(),
        (None, None) => Vec::new(),
    };
    let dense = shape.dense.iter().filter(|d| match d.layer {
        Some(layer) => layer >= from,
        None => d.kind == DenseKind::Head && layers > shape.n_layer,
    });
    let experts = shape
        .experts
        .iter()
        .filter(|e| e.layer >= from && !on_cpu.contains(&e.layer));
    dense.map(|d| d.bytes).sum::<u64>()
        + experts
            .map(|e| e.expert_bytes * u64::from(e.n_expert))
            .sum::<u64>()
        + kv_bytes * u64::from(shape.n_layer - from) / u64::from(shape.n_layer)
}

#[test]
fn a_command_line_says_what_it_was_made_to_say() {
    for (vram, dram, kv_type) in [
        (8 << 30, 64 << 30, KvType::F16),
        (2 << 30, 32 << 30, KvType::Q8_0),
    ] {
        let (shape, evidence, plan) = solved(vram, dram, kv_type);
        let found = llama_cpp::command_line(&plan, &shape, &evidence).unwrap();
        let kv_bytes = kv_type.cache_bytes(&shape, plan.room());
        assert_eq!(vram_bytes(&found.args, &shape, kv_bytes), found.vram_bytes);
        assert!(found.vram_bytes <= vram, "{} of {vram}", found.vram_bytes);
        // Not even one more layer's experts fit: the bytes are used.
        let layer = shape
            .experts
            .iter()
            .map(|e| e.expert_bytes * u64::from(e.n_expert))
            .min()
            .unwrap();
        assert!(
            vram - found.vram_bytes < layer,
            "{} of {vram}",
            found.vram_bytes
        );
        // The coarser placement is never faster. There is a prediction, since everything fits.
        let predicted = found.predicted.unwrap();
        let lost = llama_cpp::loss(&plan, &predicted);
        assert!((0.0..1.0).contains(&lost), "{lost}");
        assert_eq!(
            found.args.iter().any(|a| a == "q8_0"),
            kv_type == KvType::Q8_0
        );
    }
}

#[test]
fn a_cache_that_is_kept_in_main_memory_is_kept_there_by_llama_cpp() {
    let shape = catalogue::model(Path::new("qwen3-30b-a3b"), Some("q4_k_m"))
        .unwrap()
        .sizes;
    let machine = catalogue::machine(Path::new("desktop-4090-ddr5-nvme")).unwrap();
    let evidence = Evidence::supposed(&shape, Pattern::Zipf).unwrap();
    let kv_type = KvType::F16;
    let problem = Problem {
        shape: &shape,
        profile: None,
        machine: &machine,
        budgets: vec![8 << 30, 64 << 30, 2_000_000_000_000],
        context: 32_768,
        sequences: 1,
        kv_type,
        position: None,
    };
    // llama.cpp takes layers from the end, where the plan has eight on the processor.
    let fix = ["dram:cache", "vram:attention:0-39", "dram:attention:40-47"];
    let fix = fix.map(String::from);
    let options = Options {
        strategy: Strategy::Optimal,
        time_limit_s: 2.0,
        constraints: Constraints::parse(&fix, &[], &shape, &machine).unwrap(),
        ..Options::default()
    };
    let plan = solve_with_evidence(&problem, &evidence, &options)
        .unwrap()
        .plan;
    assert_eq!(plan.host_kv, (0..40).collect::<Vec<_>>());
    let found = llama_cpp::command_line(&plan, &shape, &evidence).unwrap();
    assert!(found.args.contains(&"--no-kv-offload".to_string()));
    assert_eq!(found.gpu_layers, 40);
    assert_eq!(vram_bytes(&found.args, &shape, 0), found.vram_bytes);
    // So a token reads keys and values from where the plan has them.
    let (found, planned) = (found.predicted.unwrap().kv_s, plan.predicted.kv_s);
    assert!((found / planned - 1.0).abs() < 1e-9, "{found} {planned}");
    // Where a GPU has some of it, llama.cpp puts all of it there.
    let mut some = plan.clone();
    some.host_kv.pop();
    some.fill_sums(&shape);
    some.tiers[TierIdx::FIRST].budget_bytes += 64 << 20;
    some.predicted = predict(&some, &shape, &evidence);
    (some.solver.objective_s, some.solver.bound_s) = (some.predicted.token_s(), None);
    let found = llama_cpp::command_line(&some, &shape, &evidence).unwrap();
    assert!(!found.args.contains(&"--no-kv-offload".to_string()));
    let says = |note: &String| note.contains("the KV cache of 39 layers");
    assert!(found.notes.iter().any(says), "{:?}", found.notes);
}

#[test]
fn several_gpus_share_the_layers() {
    let shape = catalogue::model(Path::new("qwen3-30b-a3b"), Some("q4_k_m"))
        .unwrap()
        .sizes;
    let mut machine = catalogue::machine(Path::new("desktop-4090-ddr5-nvme")).unwrap();
    let mut second = machine.tiers[0].clone();
    second.name = "second".into();
    machine.tiers.insert(1, second);
    let evidence = Evidence::supposed(&shape, Pattern::Zipf).unwrap();
    let vram = [6 << 30, 3 << 30];
    let budgets = vec![vram[0], vram[1], 64 << 30, 2_000_000_000_000];
    let kv_type = KvType::F16;
    let problem = Problem {
        shape: &shape,
        profile: None,
        machine: &machine,
        budgets,
        context: 1024,
        sequences: 1,
        kv_type,
        position: None,
    };
    let options = Options {
        strategy: Strategy::Optimal,
        time_limit_s: 2.0,
        ..Options::default()
    };
    let plan = solve_with_evidence(&problem, &evidence, &options)
        .unwrap()
        .plan;
    let found = llama_cpp::command_line(&plan, &shape, &evidence).unwrap();
    let split = found
        .args
        .iter()
        .position(|a| a == "--tensor-split")
        .and_then(|at| found.args.get(at + 1))
        .unwrap();
    let counts: Vec<u32> = split.split(',').map(|n| n.parse().unwrap()).collect();
    assert_eq!(counts.iter().sum::<u32>(), found.gpu_layers);
    assert!(counts[0] > counts[1] && counts[1] > 0, "{counts:?}");
    // What each GPU holds, from the words alone.
    let (mut from, mut all) = (shape.n_layer - found.gpu_layers.min(shape.n_layer), 0);
    for (count, budget) in counts.iter().zip(vram) {
        let mine = from..from + count;
        let dense = shape.dense.iter().filter(|d| match d.layer {
            Some(layer) => mine.contains(&layer),
            None => d.kind == DenseKind::Head && mine.contains(&shape.n_layer),
        });
        let experts = shape
            .experts
            .iter()
            .filter(|e| mine.contains(&e.layer) && found.expert_layers.contains(&e.layer));
        let caches = shape
            .caches
            .iter()
            .enumerate()
            .filter(|(l, _)| mine.contains(&(*l as u32)));
        let bytes = dense.map(|d| d.bytes).sum::<u64>()
            + experts
                .map(|e| e.expert_bytes * u64::from(e.n_expert))
                .sum::<u64>()
            + caches
                .map(|(_, c)| c.bytes(kv_type, plan.room()))
                .sum::<u64>();
        assert!(bytes <= budget, "{bytes} of {budget}");
        (from, all) = (from + count, all + bytes);
    }
    assert_eq!(all, found.vram_bytes);
    assert!(found.predicted.is_some());
}

#[test]
fn what_fits_nowhere_is_not_predicted() {
    let (shape, evidence, plan) = solved(4 << 30, 4 << 30, KvType::F16);
    let found = llama_cpp::command_line(&plan, &shape, &evidence).unwrap();
    assert_eq!(found.predicted, None);
    assert!(
        found.notes.iter().any(|n| n.contains("page cache")),
        "{:?}",
        found.notes
    );
}

#[test]
fn all_on_the_gpu_overrides_nothing() {
    let (shape, evidence, plan) = solved(23 << 30, 64 << 30, KvType::F16);
    let found = llama_cpp::command_line(&plan, &shape, &evidence).unwrap();
    assert_eq!(found.args, ["-c", "1024", "-fit", "off", "-ngl", "49"]);
    let mut several = plan.clone();
    (several.context, several.sequences) = (256, 4);
    let several = llama_cpp::command_line(&several, &shape, &evidence).unwrap();
    assert_eq!(several.args[..4], ["-c", "1024", "-np", "4"]);
    // What it has a GPU compute beside the CPU, llama.cpp does not.
    let mut streamed = plan.clone();
    streamed.streaming = Some(Streaming {
        tier: TierIdx::FIRST,
        from: TierIdx::new(1),
        experts: 2,
        link_gbps: 20.0,
        cpu_share: 1.0,
    });
    streamed.fill_sums(&shape);
    streamed.tiers[TierIdx::FIRST].budget_bytes += 64 << 20;
    streamed.predicted = predict(&streamed, &shape, &evidence);
    let seconds = streamed.predicted.token_s();
    (streamed.solver.objective_s, streamed.solver.bound_s) = (seconds, None);
    let same = llama_cpp::command_line(&streamed, &shape, &evidence).unwrap();
    assert_eq!(
        (same.args, same.predicted),
        (found.args.clone(), found.predicted.clone())
    );
    assert!(
        same.notes
            .iter()
            .any(|note| note.contains("streamed experts"))
    );
    // The plan may still compute a few experts beside the GPU.
    let lost = llama_cpp::loss(&plan, &found.predicted.unwrap());
    assert!((-1e-9..0.1).contains(&lost), "{lost}");
}

#[test]
fn expressions_name_their_layers() {
    let of = |text: &str| llama_cpp::layers_of(text);
    assert_eq!(
        of(r"blk\.(3|14)\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU"),
        Some(vec![3, 14])
    );
    assert_eq!(
        of(r"blk\.(x)\.ffn_(up|down|gate|gate_up)_(ch|)exps=CPU"),
        None
    );
    assert_eq!(of("exps=CPU"), None);
    assert_eq!(llama_cpp::quoted(r"blk\.(3)"), r"'blk\.(3)'");
    assert_eq!(llama_cpp::quoted("it's"), r"'it'\''s'");
    assert_eq!(llama_cpp::quoted("--n-cpu-moe"), "--n-cpu-moe");
}

#[test]
fn counts_come_back() {
    let shape = catalogue::model(Path::new("glm-4.5-air"), None)
        .unwrap()
        .sizes;
    let routing = Routing {
        skew: 0.9,
        repeat: 0.3,
        prompts: 2,
        prompt_tokens: 3,
        decode_tokens: 5,
        seed: 3,
    };
    let profile = synthetic::profile(&shape, &routing);
    let table = counts::counts(&shape, &profile).unwrap();
    assert_eq!(counts::from_json(&counts::to_json(&table)).unwrap(), table);
    // One row per layer of the model; the leading dense layers have zeros.
    assert_eq!(table.len(), shape.n_layer as usize);
    let used = u64::from(shape.experts[0].n_used);
    for (layer, row) in table.iter().enumerate() {
        let routed = shape.experts.iter().any(|e| e.layer as usize == layer);
        assert_eq!(row.len(), shape.experts[0].n_expert as usize);
        assert_eq!(
            row.iter().sum::<u64>(),
            if routed {
                profile.n_tokens(None, None) * used
            } else {
                0
            }
        );
    }
    assert!(table[0].iter().all(|n| *n == 0) && table[1].iter().any(|n| *n > 0));
    for bad in [
        r#"{"counts": []}"#,
        r#"{"logical_count": [[1], [1, 2]]}"#,
        r#"{"logical_count": [[-1]]}"#,
    ] {
        assert!(
            counts::from_json(&serde_json::from_str(bad).unwrap()).is_err(),
            "{bad}"
        );
    }
}

#[test]
fn models_that_a_table_cannot_say_are_refused() {
    let dense = catalogue::model(Path::new("llama-3.1-405b"), None)
        .unwrap()
        .sizes;
    let shape = catalogue::model(Path::new("glm-4.5-air"), None)
        .unwrap()
        .sizes;
    let routing = Routing {
        skew: 0.9,
        repeat: 0.3,
        prompts: 1,
        prompt_tokens: 1,
        decode_tokens: 1,
        seed: 3,
    };
    let profile = synthetic::profile(&shape, &routing);
    assert!(
        counts::counts(&dense, &profile)
            .unwrap_err()
            .to_string()
            .contains("no routed experts")
    );
}
