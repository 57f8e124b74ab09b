//! Slot policies in the engine: what the replay says of a routing is what the engine counts on it,
//! to the last hit, and no policy changes a token.

use crate::common::{self, demo_machine, demo_model, json, run_in};
use std::sync::Arc;
use tier_plan_planner::profile::prompts::{self, Prompt};
use tier_plan_planner::profile::replay::{LayerTrace, hits};
use tier_plan_planner::session::{Session, tokenizer};
use tier_plan_runtime::LogitsMode;
use tier_plan_runtime::formats::SourceId;
use tier_plan_runtime::formats::machine::TierKind;
use tier_plan_runtime::formats::placement::{self, LayerPlacement, Placement, SlotPolicy};
use tier_plan_runtime::formats::profile::{Profile, PromptTrace, Split};
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::sampler::{Sampler, SamplerConfig};
use tier_plan_testing::is_nightly;

const PROMPT_TOKENS: usize = 40;
const DECODE_TOKENS: usize = 40;

const POLICIES: [SlotPolicy; 4] = [
    SlotPolicy::Lru,
    SlotPolicy::Lfu { half_life: 3 },
    SlotPolicy::Lfu { half_life: 16 },
    SlotPolicy::Adaptive {
        half_life: 64,
        recent_half_life: 2,
        recent_weight: 8,
    },
];

/// What a run under a plan did.
struct Run {
    /// The choices of every token.
    profile: Profile,
    /// `[prompt]` the decoded tokens.
    text: Vec<Vec<u32>>,
    /// `[layer]` pinned hits, slot hits and misses while decoding.
    counted: Vec<[u64; 3]>,
}

/// Runs prompts one after the other and records their routing; slots persist from one to the next.
fn run(gguf: &Arc<Gguf>, plan: &Placement, prompts: &[Prompt]) -> Run {
    let mut session = Session::load(Arc::clone(gguf), plan, Some(2)).unwrap();
    let tokenizer = tokenizer(gguf).unwrap();
    let engine = &mut session.engine;
    let (n_expert, n_used) = engine
        .spec()
        .moe_layers()
        .map(|(_, m)| (m.n_expert, m.n_used))
        .next()
        .unwrap();
    let mut profile = Profile {
        model: gguf.id(),
        layers: plan.layers.iter().map(|l| l.layer).collect(),
        n_expert: n_expert as u32,
        n_used: n_used as u32,
        made: String::new(),
        prompts: Vec::new(),
        counted: None,
        guesses: None,
        id: SourceId {
            name: "run".into(),
            hash: String::new(),
        },
    };
    let mut text = Vec::new();
    for prompt in prompts {
        let mut tokens = tokenizer.encode(&prompt.text, true).unwrap();
        tokens.truncate(PROMPT_TOKENS);
        engine.clear();
        let mut sampler = Sampler::new(SamplerConfig::default());
        let mut logits = engine.forward(&tokens, LogitsMode::Last).unwrap().to_vec();
        let mut experts = engine.routing().experts.clone();
        let mut decoded = Vec::new();
        for _ in 0..DECODE_TOKENS {
            let token = sampler.sample(&mut logits, &tokens);
            decoded.push(token);
            logits = engine.forward(&[token], LogitsMode::Last).unwrap().to_vec();
            experts.extend_from_slice(&engine.routing().experts);
        }
        profile.prompts.push(PromptTrace {
            domain: prompt.domain.clone(),
            name: prompt.name.clone(),
            split: Split::HeldOut,
            prompt_tokens: tokens.len() as u32,
            decode_tokens: DECODE_TOKENS as u32,
            weights: vec![0; experts.len()],
            experts,
        });
        text.push(decoded);
    }
    let layers = &engine.counters().layers;
    Run {
        profile,
        text,
        counted: layers
            .iter()
            .map(|l| [l.pinned_hits, l.slot_hits, l.misses])
            .collect(),
    }
}

fn with(plan: &Placement, policy: impl Fn(&LayerPlacement) -> SlotPolicy) -> Placement {
    let mut plan = plan.clone();
    for layer in &mut plan.layers {
        layer.policy = policy(layer);
    }
    plan
}

/// The plan on a machine whose last tier is memory.
fn in_place(plan: &Placement) -> Placement {
    let mut plan = plan.clone();
    let home = plan.home_tier();
    plan.tiers[home].tier.kind = TierKind::Pmem;
    plan.staging_experts = 0;
    plan.tiers
        .iter_mut()
        .for_each(|tier| tier.bytes.staging = 0);
    plan
}

#[test]
fn the_engine_counts_what_the_replay_does() {
    let folder = tempfile::tempdir().unwrap();
    let (model, machine) = (demo_model(), demo_machine());
    let (model, machine) = (model.to_str().unwrap(), machine.to_str().unwrap());
    let profile = [
        "profile",
        model,
        "-o",
        "demo.profile",
        "--prompt-tokens",
        "48",
        "--decode-tokens",
        "48",
        "--json",
    ];
    json(run_in(folder.path(), &profile));
    let solve = |policy: &str, output: &str| {
        let list = [
            "solve",
            model,
            "-p",
            "demo.profile",
            "-m",
            machine,
            "-o",
            output,
            "--policy",
            policy,
        ];
        let list = [
            &list[..],
            &[
                "--vram",
                "2MiB",
                "--dram",
                "3MiB",
                "--context",
                "128",
                "--json",
            ],
        ]
        .concat();
        let value = json(run_in(folder.path(), &list));
        (placement::read(&folder.path().join(output)).unwrap(), value)
    };
    let (lru, said) = solve("lru", "lru.toml");
    assert!(lru.layers.iter().any(|l| l.slots > 0), "{said:#}");
    assert!(lru.layers.iter().all(|l| l.policy == SlotPolicy::Lru));

    let version = |name: &str| {
        let text = std::fs::read_to_string(folder.path().join(name)).unwrap();
        text.parse::<toml::Table>().unwrap()["version"]
            .as_integer()
            .unwrap()
    };
    assert_eq!(version("lru.toml"), 3, "keys and values are charged");
    let (auto, said) = solve("auto", "auto.toml");
    assert!(auto.solver.objective_s <= lru.solver.objective_s);
    let notes: Vec<&str> = said["notes"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|n| n.as_str())
        .collect();
    assert!(notes.iter().any(|n| n.starts_with("slots ")), "{notes:?}");
    for policy in ["lfu", "adaptive"] {
        let name = format!("{policy}.toml");
        let (plan, said) = solve(policy, &name);
        assert_eq!(version(&name), 3);
        assert_eq!(plan.tiers, lru.tiers, "a policy moves no byte");
        assert!(said["policies"][policy].as_u64().unwrap() > 0, "{said:#}");
    }

    let gguf = Arc::new(Gguf::open(&demo_model()).unwrap());
    let mut texts = prompts::read(&common::root().join("profiles/prompts")).unwrap();
    texts.retain(|p| p.split == Split::HeldOut);
    // All of them at night.
    texts.truncate(if is_nightly() { usize::MAX } else { 3 });
    let plans = POLICIES
        .iter()
        .map(|&policy| with(&lru, |_| policy))
        .chain([auto]);
    // And the same with a last tier that computes in place, where what is refused a slot is not
    // staged.
    let memory = in_place(&lru);
    let plans: Vec<Placement> = plans
        .chain(POLICIES.iter().map(|&policy| with(&memory, |_| policy)))
        .collect();
    let mut expected: Option<(Vec<Vec<u32>>, Vec<u16>)> = None;
    for plan in &plans {
        let run = run(&gguf, plan, &texts);
        let choices: Vec<u16> = run
            .profile
            .prompts
            .iter()
            .flat_map(|p| p.experts.clone())
            .collect();
        let first = expected.get_or_insert_with(|| (run.text.clone(), choices.clone()));
        assert!(
            *first == (run.text, choices),
            "a policy changed what the model does"
        );
        for (at, (layer, counted)) in plan.layers.iter().zip(&run.counted).enumerate() {
            let trace = LayerTrace::new(&run.profile, at, |_| true);
            let mut pinned = vec![false; trace.n_expert()];
            layer
                .pinned
                .iter()
                .flat_map(|pins| &pins.experts)
                .for_each(|&e| pinned[e as usize] = true);
            let all = (trace.tokens() * trace.n_used()) as u64;
            let on_pins: u64 = trace
                .steps()
                .filter(|(_, counted)| *counted)
                .map(|(chosen, _)| {
                    chosen.iter().filter(|&&e| pinned[usize::from(e)]).count() as u64
                })
                .sum();
            let in_slots = hits(&trace, &pinned, layer.slots, layer.policy);
            let mut replayed = [on_pins, in_slots, all - on_pins - in_slots];
            // Without slots what computes where it is mapped is at home there.
            if layer.slots == 0
                && plan
                    .tiers
                    .last()
                    .is_some_and(|t| t.tier.kind != TierKind::Nvme)
            {
                replayed = [all, 0, 0];
            }
            assert_eq!(
                *counted, replayed,
                "layer {} under {}",
                layer.layer, layer.policy
            );
        }
    }
}
