//! Trials: runs the same prompts under one plan after another.

use crate::conditions::Watch;
use crate::host;
use crate::interrupt::Interrupted;
use crate::profile::Evidence;
use crate::profile::collect::Settings;
use crate::profile::prompts::Prompt;
use crate::profile::replay::{LayerTrace, hit_curve};
use crate::progress;
use crate::report::{HitCurve, PlanEntry};
use crate::session::Session;
use anyhow::{Context, Result, ensure};
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::SystemTime;
use tier_plan_runtime::Engine;
use tier_plan_runtime::engine::generate::{Limits, Stop, generate};
use tier_plan_runtime::engine::measure::{Circumstances, record};
use tier_plan_runtime::formats::placement::{Placement, SlotPolicy};
use tier_plan_runtime::formats::profile::{Profile, Split};
use tier_plan_runtime::formats::record::RunRecord;
use tier_plan_runtime::gguf::Gguf;
use tier_plan_runtime::sampler::{Sampler, SamplerConfig};
use tier_plan_runtime::tokenizer::Tokenizer;
use tier_plan_runtime::units::show_utc;

/// Tokens decoded before counting, so that threads are awake and memory is touched.
const WARM_UP_TOKENS: usize = 8;

/// Model and prompts that plans are tried on.
pub struct Trial<'a> {
    /// The model.
    pub gguf: Arc<Gguf>,
    /// Its tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// Texts to continue.
    pub prompts: Vec<Prompt>,
    /// Settings of the profile, so that predictions concern the same kind of text.
    pub settings: Settings,
    /// Threads.
    pub threads: Option<usize>,
    /// Profile that plans were made from, if they were made from one and it is at hand.
    pub profile: Option<&'a Profile>,
}

impl Trial<'_> {
    /// Runs every prompt under a plan, and returns one record per prompt.
    ///
    /// # Errors
    /// When the plan does not fit, its byte counts are wrong, or a run fails.
    pub fn run(&self, plan: &Placement) -> Result<PlanEntry> {
        let mut session = Session::load(Arc::clone(&self.gguf), plan, self.threads)
            .with_context(|| format!("plan '{}'", plan.name))?;
        for (tier, resident) in plan.tiers.iter().zip(session.engine.resident_bytes()) {
            let (name, planned) = (&tier.tier.name, tier.used_bytes());
            ensure!(
                *resident == planned,
                "tier '{name}' holds {resident} bytes, but plan '{}' says {planned}",
                plan.name
            );
        }
        let loading_s = session.started.elapsed().as_secs_f64();
        let mut entry = PlanEntry {
            name: plan.name.clone(),
            placement: Some(plan.clone()),
            records: Vec::new(),
        };
        if let Some(first) = self.prompts.first() {
            self.one(&mut session, first, WARM_UP_TOKENS, 0.0)?;
        }
        let bar = progress::count("running prompts", self.prompts.len() as u64);
        for prompt in &self.prompts {
            let record = self.one(
                &mut session,
                prompt,
                self.settings.decode_tokens as usize,
                loading_s,
            )?;
            entry.records.push(record);
            bar.inc(1);
        }
        bar.finish_and_clear();
        Ok(entry)
    }

    fn one(
        &self,
        session: &mut Session,
        prompt: &Prompt,
        max_tokens: usize,
        loading_s: f64,
    ) -> Result<RunRecord> {
        let mut tokens = self.tokenizer.encode(&prompt.text, true)?;
        tokens.truncate(self.settings.prompt_tokens as usize);
        session.engine.clear();
        session.engine.reset_counters();
        let is_end = |token| self.tokenizer.is_eog(token);
        let limits = Limits {
            max_tokens,
            is_end: &is_end,
            draft: 0,
        };
        let mut sampler = self.settings.sampler();
        let mut watch: Option<Watch> = None;
        let go_on = |engine: &Engine, _| {
            watch
                .get_or_insert_with(|| Watch::begin(engine))
                .between_tokens(engine);
            ControlFlow::Continue(())
        };
        let generated = generate(&mut session.engine, &tokens, &mut sampler, &limits, go_on)?;
        if generated.stop == Stop::Canceled {
            return Err(Interrupted.into());
        }
        let circumstances = Circumstances {
            when: show_utc(SystemTime::now()),
            host: host::describe(),
            system: host::system(),
            first_token_s: loading_s + generated.first_token.as_secs_f64(),
        };
        let engine = &session.engine;
        let mut record = record(engine, &generated, &circumstances);
        if let Some(mut watch) = watch {
            watch.count_reads(engine);
            let given = watch.end(engine);
            given.add_to(&mut record, engine, || self.evidence(engine));
        }
        Ok(record)
    }

    /// Returns how the experts are used by the evidence that a plan was made from.
    fn evidence(&self, engine: &Engine) -> Option<Evidence> {
        let wanted = engine.plan().profile.as_ref();
        let found = self
            .profile
            .filter(|found| wanted.is_some_and(|wanted| wanted.hash == found.id.hash));
        match (wanted, found) {
            (None, _) => Evidence::uniform(engine.shape()).ok(),
            (Some(_), Some(profile)) => Evidence::new(engine.shape(), Some(profile)).ok(),
            (Some(_), None) => None,
        }
    }

    /// Returns the greedy continuation of the first prompt under a plan.
    ///
    /// # Errors
    /// When there are no prompts, or the run fails.
    pub fn greedy(&self, plan: &Placement, tokens: usize) -> Result<Vec<u32>> {
        let mut session = Session::load(Arc::clone(&self.gguf), plan, self.threads)?;
        let prompt = self
            .prompts
            .first()
            .context("no held-out prompts to continue")?;
        let mut text = self.tokenizer.encode(&prompt.text, true)?;
        text.truncate(self.settings.prompt_tokens as usize);
        let limits = Limits {
            max_tokens: tokens,
            is_end: &|_| false,
            draft: 0,
        };
        let mut sampler = Sampler::new(SamplerConfig::default());
        Ok(
            generate(&mut session.engine, &text, &mut sampler, &limits, |_, _| {
                ControlFlow::Continue(())
            })?
            .tokens,
        )
    }
}

/// Returns the name of the first plan whose text differs from the first plan's.
pub fn first_difference(entries: &[PlanEntry]) -> Option<&str> {
    let (first, rest) = entries.split_first()?;
    let outputs = |e: &PlanEntry| {
        e.records
            .iter()
            .map(|r| r.output.clone())
            .collect::<Vec<_>>()
    };
    let expected = outputs(first);
    rest.iter()
        .find(|e| outputs(e) != expected)
        .map(|e| e.name.as_str())
}

/// Replays the held-out prompts of a profile, and returns hits against slots: by LRU with no pins,
/// and beside each plan's pins by its own policies.
pub fn curves(profile: &Profile, plans: &[&Placement]) -> Vec<HitCurve> {
    let mut curves = Vec::new();
    let most = profile.n_expert as usize;
    let mut add = |label: String, layer: usize, pinned: &[bool], policy| {
        let trace = LayerTrace::new(profile, layer, |p| p.split == Split::HeldOut);
        let pooled = |chosen: &[u16]| chosen.iter().filter(|&&e| !pinned[usize::from(e)]).count();
        let accesses: usize = trace
            .steps()
            .filter(|(_, counted)| *counted)
            .map(|(chosen, _)| pooled(chosen))
            .sum();
        if accesses > 0 {
            let (slots, hits): (Vec<u32>, Vec<u64>) =
                hit_curve(&trace, pinned, most, policy).into_iter().unzip();
            curves.push(HitCurve {
                label,
                layer: profile.layers[layer],
                slots,
                hit_rate: hits.iter().map(|h| *h as f64 / accesses as f64).collect(),
            });
        }
    };
    for layer in 0..profile.layers.len() {
        add(
            "LRU slots alone, held-out prompts".to_string(),
            layer,
            &vec![false; most],
            SlotPolicy::Lru,
        );
    }
    for plan in plans {
        for (layer, placed) in plan.layers.iter().enumerate().take(profile.layers.len()) {
            let mut pinned = vec![false; most];
            for expert in placed.pinned.iter().flat_map(|pins| &pins.experts) {
                if let Some(pinned) = pinned.get_mut(*expert as usize) {
                    *pinned = true;
                }
            }
            let policy = placed.policy;
            let slots = if policy == SlotPolicy::Lru {
                "slots".to_string()
            } else {
                format!("{} slots", policy.name())
            };
            let label = format!(
                "{slots} beside the pins of '{}', held-out prompts",
                plan.name
            );
            add(label, layer, &pinned, policy);
        }
    }
    curves
}
