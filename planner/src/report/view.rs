//! Derives what the records and plans of a report say, once for charts, tables, and sentences.

use super::ink::{Ink, tier_inks};
use super::{PlanEntry, Report};
use std::collections::BTreeMap;
use tier_plan_runtime::formats::machine::TierKind;
use tier_plan_runtime::formats::placement::Prediction;
use tier_plan_runtime::formats::profile::Profile;
use tier_plan_runtime::formats::record::LayerRecord;
use tier_plan_runtime::units::show_bytes;

/// A rate over several runs: all tokens by all seconds, and the slowest and fastest run.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Rate {
    pub tok_s: f64,
    pub min: f64,
    pub max: f64,
    pub runs: usize,
}

/// One tier of one plan.
#[derive(Debug, Clone, Default)]
pub(super) struct TierView {
    pub name: String,
    pub emulated: bool,
    /// Bytes the plan may use; unknown without the plan.
    pub budget_bytes: Option<u64>,
    /// Dense groups, pins, slots, KV cache, staging, backing copies; then bytes that records do not
    /// split.
    pub part_bytes: [u64; 7],
    /// Bytes that a decoded token read from the tier, by the records.
    pub read_bytes: Option<f64>,
    /// Seconds that a decoded token waited for the tier, by the records.
    pub busy_s: Option<f64>,
}

/// What fills a tier, in the order of [`TierView::part_bytes`].
pub(super) const PARTS: [(&str, &str, Ink); 7] = [
    ("dense", "dense weights", Ink::Dense),
    ("pinned", "pinned experts", Ink::Pinned),
    ("slots", "expert slots", Ink::Slots),
    ("kv", "key/value cache", Ink::Kv),
    ("staging", "staging buffers", Ink::Staging),
    ("home", "homes of pooled experts", Ink::Home),
    ("unsplit", "planned bytes", Ink::Unsplit),
];

impl TierView {
    pub(super) fn used_bytes(&self) -> u64 {
        self.part_bytes
            .iter()
            .fold(0, |sum, b| sum.saturating_add(*b))
    }
}

/// One plan, its runs, and its prediction.
#[derive(Debug)]
pub(super) struct PlanView<'a> {
    pub entry: &'a PlanEntry,
    pub status: String,
    pub gap: Option<f64>,
    pub predicted: Option<&'a Prediction>,
    pub decode: Option<Rate>,
    pub prompt: Option<Rate>,
    /// Mean seconds to the first token, loading included.
    pub first_token_s: Option<f64>,
    /// Measured / predicted − 1.
    pub error: Option<f64>,
    pub hit_rate: Option<f64>,
    /// Whether any number comes from an emulated tier.
    pub emulated: bool,
    pub tiers: Vec<TierView>,
    /// Means over records, weighted by decoded tokens; counts are summed.
    pub layers: Vec<LayerRecord>,
}

impl PlanView<'_> {
    pub(super) fn name(&self) -> &str {
        &self.entry.name
    }

    pub(super) fn is_baseline(&self) -> bool {
        self.status == "baseline"
    }

    /// Returns the predicted decode rate, if there is a prediction.
    pub(super) fn predicted_tok_s(&self) -> Option<f64> {
        self.predicted
            .map(|p| p.decode_tok_s)
            .filter(|v| v.is_finite() && *v > 0.0)
    }

    /// Returns the decode rate that is predicted with the rates of the runs, all their tokens by all
    /// their seconds; `None` where no run had other rates than planned.
    pub(super) fn observed_tok_s(&self) -> Option<f64> {
        self.entry.observed_tok_s()
    }

    /// Returns the bytes in all tiers but the last, which holds whatever is left.
    pub(super) fn faster_bytes(&self) -> Option<u64> {
        let (_, faster) = self.tiers.split_last()?;
        Some(
            faster
                .iter()
                .map(TierView::used_bytes)
                .fold(0, u64::saturating_add),
        )
    }

    /// Returns the rate that ranks the plan: measured, or else predicted.
    pub(super) fn speed(&self) -> Option<f64> {
        self.decode.map(|d| d.tok_s).or(self.predicted_tok_s())
    }
}

/// Whether plans could have used the same bytes.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Budgets {
    Equal,
    /// What differs, as a clause.
    Differ(String),
    /// The plans themselves are not available.
    Unknown,
}

/// The whole report, derived.
#[derive(Debug)]
pub(super) struct Overview<'a> {
    pub report: &'a Report,
    /// Fastest first: measured plans, then predicted ones, then those with neither.
    pub plans: Vec<PlanView<'a>>,
    /// Names of all tiers, fastest first, with their inks.
    pub tiers: Vec<(String, Ink)>,
    pub emulated: bool,
    pub budgets: Budgets,
}

impl<'a> Overview<'a> {
    pub(super) fn new(report: &'a Report) -> Self {
        let mut plans: Vec<PlanView<'a>> = report.plans.iter().map(view).collect();
        let rank = |p: &PlanView<'_>| (p.decode.is_some(), p.speed().unwrap_or(-1.0));
        plans.sort_by(|a, b| {
            let (a, b) = (rank(a), rank(b));
            b.0.cmp(&a.0).then(b.1.total_cmp(&a.1))
        });
        let mut names: Vec<(String, Option<TierKind>)> = Vec::new();
        // The plan with the most tiers gives the order. A tier that only others have goes where
        // they have it.
        let mut by_tiers: Vec<&PlanView<'_>> = plans.iter().collect();
        by_tiers.sort_by_key(|p| std::cmp::Reverse(p.tiers.len()));
        for plan in by_tiers {
            for (i, tier) in plan.tiers.iter().enumerate() {
                if !names.iter().any(|(n, _)| *n == tier.name) {
                    let kind = kind_of(plan.entry, &tier.name);
                    names.insert(i.min(names.len()), (tier.name.clone(), kind));
                }
            }
        }
        let inks = tier_inks(&names.iter().map(|(_, k)| *k).collect::<Vec<_>>());
        let tiers = names.into_iter().map(|(n, _)| n).zip(inks).collect();
        let emulated = plans.iter().any(|p| p.emulated);
        let budgets = budgets(&plans);
        Overview {
            report,
            plans,
            tiers,
            emulated,
            budgets,
        }
    }

    /// Returns the plan that the report is about: the fastest.
    pub(super) fn best(&self) -> Option<&PlanView<'a>> {
        self.plans.first().filter(|p| p.speed().is_some())
    }

    /// Returns the plan that the best one is compared with: the fastest baseline, or the runner-up
    /// if the best is a baseline itself.
    pub(super) fn rival(&self) -> Option<&PlanView<'a>> {
        let measured = self.best()?.decode.is_some();
        let others = || {
            self.plans
                .iter()
                .skip(1)
                .filter(|p| p.speed().is_some() && p.decode.is_some() == measured)
        };
        let baseline = others().find(|p| p.is_baseline() && !self.plans[0].is_baseline());
        baseline.or_else(|| others().next())
    }

    /// Whether all plans decoded the same tokens, run by run; `None` without two plans to compare.
    pub(super) fn same_output(&self) -> Option<bool> {
        let outputs = |p: &PlanView<'a>| {
            p.entry
                .records
                .iter()
                .map(|r| &r.output)
                .collect::<Vec<_>>()
        };
        let mut all = self
            .plans
            .iter()
            .map(outputs)
            .filter(|o| o.iter().any(|o| !o.is_empty()));
        let first = all.next()?;
        let second = all.next()?;
        Some(first == second && all.all(|o| o == first))
    }

    pub(super) fn ink_of(&self, tier: &str) -> Ink {
        self.tiers
            .iter()
            .find(|(n, _)| n == tier)
            .map_or(Ink::Unsplit, |(_, ink)| *ink)
    }

    /// Returns a plan's name, marked if its tiers are emulated and others' are not.
    pub(super) fn label(&self, plan: &PlanView<'_>) -> String {
        let mixed = self.emulated && self.plans.iter().any(|p| !p.emulated);
        if mixed && plan.emulated {
            format!("{}†", plan.name())
        } else {
            plan.name().to_string()
        }
    }

    /// Returns the label of measured numbers.
    pub(super) fn measured(&self) -> &'static str {
        match (self.emulated, self.plans.iter().all(|p| p.emulated)) {
            (false, _) => "measured",
            (true, true) => "measured on emulated tiers",
            (true, false) => "measured († on emulated tiers)",
        }
    }

    /// Returns the label of predicted numbers.
    pub(super) fn predicted(&self) -> &'static str {
        if self.emulated {
            "predicted from declared (emulated) rates"
        } else {
            "predicted"
        }
    }
}

fn kind_of(entry: &PlanEntry, tier: &str) -> Option<TierKind> {
    let planned = entry
        .placement
        .as_ref()
        .and_then(|p| p.tiers.iter().find(|t| t.tier.name == tier))
        .map(|t| t.tier.kind);
    planned
        .or_else(|| kind_in_record(entry, tier))
        .or(match tier {
            "vram" => Some(TierKind::Vram),
            "dram" => Some(TierKind::Dram),
            "pmem" => Some(TierKind::Pmem),
            "cxl" => Some(TierKind::Cxl),
            "nvme" | "slow" => Some(TierKind::Nvme),
            _ => None,
        })
}

/// Returns the kind that a record gives a tier.
fn kind_in_record(entry: &PlanEntry, tier: &str) -> Option<TierKind> {
    let setups = entry.records.iter().flat_map(|r| &r.setup);
    let found = setups.flat_map(|s| &s.tiers).find(|t| t.name == tier)?;
    let kinds = [
        TierKind::Vram,
        TierKind::Dram,
        TierKind::Pmem,
        TierKind::Cxl,
        TierKind::Nvme,
    ];
    kinds.into_iter().find(|kind| kind.as_str() == found.kind)
}

fn rate(pairs: impl Iterator<Item = (u64, f64)>) -> Option<Rate> {
    let (mut tokens, mut seconds, mut runs) = (0f64, 0f64, 0usize);
    let (mut min, mut max) = (f64::INFINITY, 0f64);
    for (t, s) in pairs.filter(|(t, s)| *t > 0 && s.is_finite() && *s > 0.0) {
        tokens += t as f64;
        seconds += s;
        runs += 1;
        min = min.min(t as f64 / s);
        max = max.max(t as f64 / s);
    }
    (runs > 0).then(|| Rate {
        tok_s: tokens / seconds,
        min,
        max,
        runs,
    })
}

fn view(entry: &PlanEntry) -> PlanView<'_> {
    let records = &entry.records;
    let placement = entry.placement.as_ref();
    let decode = rate(records.iter().map(|r| (r.decode_tokens, r.decode_s)));
    let prompt = rate(records.iter().map(|r| (r.prompt_tokens, r.prompt_s)));
    // The prediction in the runs comes first: a plan file may have been solved again since.
    let predicted = records
        .iter()
        .find_map(|r| r.predicted.as_ref())
        .or(placement.map(|p| &p.predicted));
    let status = records
        .iter()
        .map(|r| r.plan_status.clone())
        .find(|s| !s.is_empty());
    let error = decode
        .zip(predicted)
        .map(|(d, p)| d.tok_s / p.decode_tok_s - 1.0)
        .filter(|e| e.is_finite());
    let first: Vec<f64> = records
        .iter()
        .map(|r| r.first_token_s)
        .filter(|s| s.is_finite() && *s > 0.0)
        .collect();
    let layers = average_layers(entry);
    let hits: u64 = layers
        .iter()
        .map(|l| l.pinned_hits.saturating_add(l.slot_hits))
        .fold(0, u64::saturating_add);
    let all = layers
        .iter()
        .map(|l| l.misses)
        .fold(hits, u64::saturating_add);
    PlanView {
        entry,
        status: status
            .or(placement.map(|p| p.solver.status.clone()))
            .unwrap_or_default(),
        gap: records
            .iter()
            .find_map(|r| r.plan_gap)
            .or(placement.and_then(|p| p.solver.gap)),
        predicted,
        decode,
        prompt,
        first_token_s: (!first.is_empty()).then(|| first.iter().sum::<f64>() / first.len() as f64),
        error,
        hit_rate: (all > 0).then(|| hits as f64 / all as f64),
        emulated: records.iter().any(|r| r.emulated)
            || placement.is_some_and(|p| p.tiers.iter().any(|t| t.tier.emulated))
            || predicted.is_some_and(|p| p.emulated),
        tiers: tiers(entry),
        layers,
    }
}

fn tiers(entry: &PlanEntry) -> Vec<TierView> {
    let mut tiers: Vec<TierView> = match &entry.placement {
        Some(p) => p
            .tiers
            .iter()
            .map(|t| TierView {
                name: t.tier.name.clone(),
                emulated: t.tier.emulated,
                budget_bytes: Some(t.budget_bytes),
                part_bytes: [
                    t.bytes.dense,
                    t.bytes.pinned,
                    t.bytes.slots,
                    t.bytes.kv,
                    t.bytes.staging,
                    t.bytes.home,
                    0,
                ],
                ..TierView::default()
            })
            .collect(),
        None => entry.records.first().map_or_else(Vec::new, |r| {
            let setups = || r.setup.iter().flat_map(|s| &s.tiers);
            let budget = |name: &str| setups().find(|t| t.name == name).map(|t| t.budget_bytes);
            r.tiers
                .iter()
                .map(|t| TierView {
                    name: t.name.clone(),
                    emulated: t.emulated,
                    budget_bytes: budget(&t.name),
                    part_bytes: [0, 0, 0, 0, 0, 0, t.planned_bytes],
                    ..TierView::default()
                })
                .collect()
        }),
    };
    let tokens: u64 = entry
        .records
        .iter()
        .map(|r| r.decode_tokens)
        .fold(0, u64::saturating_add);
    if tokens > 0 {
        for tier in &mut tiers {
            let of = || {
                entry
                    .records
                    .iter()
                    .flat_map(|r| &r.tiers)
                    .filter(|t| t.name == tier.name)
            };
            if of().next().is_some() {
                tier.read_bytes =
                    Some(of().map(|t| t.read_bytes as f64).sum::<f64>() / tokens as f64);
                tier.busy_s = Some(of().map(|t| t.busy_s).sum::<f64>() / tokens as f64);
            }
        }
    }
    tiers
}

fn average_layers(entry: &PlanEntry) -> Vec<LayerRecord> {
    let mut by_layer: BTreeMap<u32, (LayerRecord, f64)> = BTreeMap::new();
    for record in &entry.records {
        let weight = record.decode_tokens as f64;
        for layer in &record.layers {
            let (sum, weights) = by_layer.entry(layer.layer).or_default();
            sum.layer = layer.layer;
            sum.pinned_hits = sum.pinned_hits.saturating_add(layer.pinned_hits);
            sum.slot_hits = sum.slot_hits.saturating_add(layer.slot_hits);
            sum.misses = sum.misses.saturating_add(layer.misses);
            sum.streamed = sum.streamed.saturating_add(layer.streamed);
            sum.missed_bytes = sum.missed_bytes.saturating_add(layer.missed_bytes);
            if layer.dense_s.is_finite() && layer.expert_s.is_finite() {
                sum.dense_s += layer.dense_s.max(0.0) * weight;
                sum.expert_s += layer.expert_s.max(0.0) * weight;
                sum.reading_s += layer.reading_s.max(0.0) * weight;
                sum.waited_s += layer.waited_s.max(0.0) * weight;
                *weights += weight;
            }
        }
    }
    let divide = |(mut sum, weight): (LayerRecord, f64)| {
        if weight > 0.0 {
            sum.dense_s /= weight;
            sum.expert_s /= weight;
            sum.reading_s /= weight;
            sum.waited_s /= weight;
        }
        sum
    };
    by_layer.into_values().map(divide).collect()
}

fn budgets(plans: &[PlanView<'_>]) -> Budgets {
    let is_known =
        |p: &PlanView<'_>| !p.tiers.is_empty() && p.tiers.iter().all(|t| t.budget_bytes.is_some());
    let Some((first, rest)) = plans.split_first() else {
        return Budgets::Unknown;
    };
    if !plans.iter().all(is_known) {
        return Budgets::Unknown;
    }
    for plan in rest {
        let same_tiers = plan.tiers.len() == first.tiers.len()
            && plan
                .tiers
                .iter()
                .zip(&first.tiers)
                .all(|(a, b)| a.name == b.name);
        if !same_tiers {
            return Budgets::Differ(format!(
                "{} and {} have different tiers",
                first.name(),
                plan.name()
            ));
        }
        // The last tier holds every model whole, so its budget decides nothing.
        let last = first.tiers.len().saturating_sub(1);
        for (a, b) in plan.tiers.iter().zip(&first.tiers).take(last) {
            let (of_a, of_b) = (a.budget_bytes.unwrap_or(0), b.budget_bytes.unwrap_or(0));
            if of_a != of_b {
                return Budgets::Differ(format!(
                    "{} may use {} of {} and {} {}",
                    first.name(),
                    show_bytes(of_b),
                    a.name,
                    plan.name(),
                    show_bytes(of_a)
                ));
            }
        }
    }
    Budgets::Equal
}

/// How often each expert was used: `[layer][expert]` shares of tokens, and their phase.
pub(super) struct Usage {
    pub share: Vec<Vec<f64>>,
    pub tokens: u64,
    /// `decoded` or `prompt`.
    pub phase: &'static str,
}

/// Counts a profile's accesses: of decoded tokens, or of prompt tokens where none was decoded.
pub(super) fn usage(profile: &Profile) -> Option<Usage> {
    let (layers, used) = (profile.layers.len(), profile.n_used as usize);
    let row = layers.checked_mul(used)?;
    // Traces name experts by u16, so a larger number cannot be meant.
    if row == 0 || profile.n_expert == 0 || profile.n_expert > 1 << 16 {
        return None;
    }
    let decoded: u64 = profile
        .prompts
        .iter()
        .map(|p| u64::from(p.decode_tokens))
        .sum();
    let mut counts = vec![vec![0u64; profile.n_expert as usize]; layers];
    let mut tokens = 0u64;
    for prompt in &profile.prompts {
        let skip = if decoded > 0 {
            prompt.prompt_tokens as usize
        } else {
            0
        };
        for token in prompt.experts.chunks_exact(row).skip(skip) {
            tokens += 1;
            for (layer, chosen) in counts.iter_mut().zip(token.chunks_exact(used)) {
                for expert in chosen {
                    if let Some(count) = layer.get_mut(usize::from(*expert)) {
                        *count += 1;
                    }
                }
            }
        }
    }
    if tokens == 0 {
        return None;
    }
    let share = counts
        .into_iter()
        .map(|l| l.into_iter().map(|c| c as f64 / tokens as f64).collect())
        .collect();
    Some(Usage {
        share,
        tokens,
        phase: if decoded > 0 { "decoded" } else { "prompt" },
    })
}
