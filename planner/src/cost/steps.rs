//! Predicts steps of several texts by replaying recorded tokens, and chooses how many texts go
//! together.
//!
//! The texts of a step are stretches of the recorded tokens that begin at equal distances. Their
//! tokens go through each layer's slots together, with the engine's own cache code: so a prediction
//! knows which experts texts share, and how long experts stay in slots. The time of an expert stage
//! is found per step and then averaged. Without recorded tokens, or with too few for so many texts,
//! independent ones are drawn. Where those are too few as well, texts are so many that their
//! expected numbers of experts count, as in [`batch`](super::batch).

use super::batch::{PASS_ROWS, PassStage, Step, Use, dense_step_s, spread};
use super::{BATCH, FixedTimes, prompt};
use crate::profile::replay::LayerTrace;
use crate::profile::{Evidence, Judged, LayerEvidence, drawn};
use std::borrow::Cow;
use std::time::Duration;
use tier_plan_runtime::experts::cache::{Access, SlotCache};
use tier_plan_runtime::formats::placement::{LayerPlacement, PerTier, Pins, Placement, TierIdx};
use tier_plan_runtime::model::shape::ModelShape;
use tier_plan_runtime::schedule::{MIN_CHUNK, RowsTime, StepCost};

/// Fewest tokens of a text's stretch, of a replay that tells anything about slots.
const MIN_STRETCH: usize = 4;

/// Fewest and most steps that fill the slots before steps are counted.
const WARM_UP_STEPS: [usize; 2] = [8, 64];

/// Fewest and most steps that are counted.
const COUNTED_STEPS: [usize; 2] = [32, 256];

/// Least default of the longest step: 20 tokens per second are faster than anyone reads.
const MIN_MAX_STEP: Duration = Duration::from_millis(50);

/// Texts' own steps that the default of the longest step is as long as: half of the time is then
/// left to prompts.
const MAX_STEP_STEPS: f64 = 2.0;

/// A step of several texts, as predicted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StepPrediction {
    /// Texts that each add one token.
    pub texts: u32,
    /// Seconds of the step, which are also those between two tokens of a text.
    pub seconds: f64,
    /// Distinct experts per layer and pass, a mean over the layers with experts.
    pub distinct_experts: f64,
}

impl StepPrediction {
    /// Returns the tokens per second of all texts together.
    pub fn tok_s(&self) -> f64 {
        f64::from(self.texts) / self.seconds
    }
}

/// Which recorded tokens the rows of a step are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tokens {
    /// Of texts that begin at equal distances.
    Apart,
    /// Of one text, one after the other.
    InARow,
}

/// A plan with what its predictions are made from.
#[derive(Debug, Clone, Copy)]
pub struct Predictor<'a> {
    /// The plan; its tiers have the rates.
    pub plan: &'a Placement,
    /// Sizes of the model.
    pub shape: &'a ModelShape,
    /// How the model's experts are used.
    pub evidence: &'a Evidence,
    /// Positions that each text attends to.
    pub at: u32,
}

impl Predictor<'_> {
    /// Predicts a step of `texts` texts; `None` for a plan without measured or declared rates.
    pub fn step(&self, texts: u32) -> Option<StepPrediction> {
        self.step_of(texts, Tokens::Apart)
    }

    /// Predicts a step of one text with `rows` tokens of it: the next one, and a draft of those after
    /// it. They follow each other in the recorded text, so they share experts as such tokens do. The
    /// KV cache is charged once per row, which is an upper limit.
    pub fn draft_step(&self, rows: u32) -> Option<StepPrediction> {
        self.step_of(rows, Tokens::InARow)
    }

    /// Returns the share of drafted tokens that has to be right for a step of `rows` tokens of one
    /// text to bring as many tokens per second as steps of one: the `a` at which
    /// `1 + a + … + a^(rows − 1) = draft_step(rows) / step(1)`. Above 1, no draft of that length pays;
    /// it is infinite then.
    ///
    /// Returns `None` for a plan without measured or declared rates.
    pub fn break_even_acceptance(&self, rows: u32) -> Option<f64> {
        let ratio = self.draft_step(rows)?.seconds / self.step(1)?.seconds;
        Some(break_even(rows, ratio))
    }

    fn step_of(&self, texts: u32, tokens: Tokens) -> Option<StepPrediction> {
        if self.plan.predicted.decode_tok_s <= 0.0 || texts == 0 {
            return None;
        }
        let predicted = self.plan.predicted_at(self.shape, self.at);
        let n_used = |e: &LayerEvidence| f64::from(e.shape.n_used);
        if texts == 1 {
            return Some(StepPrediction {
                texts,
                seconds: predicted.token_s(),
                distinct_experts: mean(self.evidence.layers.iter().map(n_used)),
            });
        }
        let plan = &Placement {
            predicted,
            ..self.plan.clone()
        };
        let step = Step::of_plan(plan, texts);
        let fixed = FixedTimes::of(plan, self.shape);
        let stages = plan.layers.iter().zip(&self.evidence.layers);
        let stages = stages.map(|(layer, evidence)| {
            let stage = PassStage::new(&step, &fixed.tiers, &evidence.shape, plan.staging_tier);
            LayerSteps {
                layer,
                evidence,
                stage,
                n_tiers: fixed.tiers.len(),
                tokens,
            }
            .of(&step)
        });
        let stages: Vec<Stage> = stages.collect();
        let experts_s: f64 = stages.iter().map(|stage| stage.seconds).sum();
        Some(StepPrediction {
            texts,
            seconds: dense_step_s(plan, self.shape, &step) + experts_s,
            distinct_experts: mean(stages.iter().map(|stage| stage.distinct)),
        })
    }

    /// Returns the step with the most predicted tokens per second, of at most `max_texts` texts and
    /// of those that the plan has room for, that lasts at most `max_gap_s`: a text then waits no
    /// longer for its next token. That is a step of one text if none is short enough.
    ///
    /// Returns `None` for a plan without measured or declared rates.
    pub fn best_parallel(&self, max_texts: u32, max_gap_s: f64) -> Option<StepPrediction> {
        self.best_of(max_texts.min(self.plan.sequences), max_gap_s)
    }

    /// Returns the same of at most `most` texts, also where the plan has room for fewer long ones.
    pub fn best_of(&self, most: u32, max_gap_s: f64) -> Option<StepPrediction> {
        let mut best = self.step(1)?;
        for texts in counts_up_to(most.max(1)).skip(1) {
            let step = self.step(texts)?;
            if step.seconds <= max_gap_s && step.tok_s() > best.tok_s() {
                best = step;
            }
        }
        Some(best)
    }
}

impl Predictor<'_> {
    /// Returns the default of the longest step while prompts are read beside `texts` running texts:
    /// `max(2 · step(texts), step(texts + 16), 50 ms)`, where 16 rows are the least chunk of a prompt.
    ///
    /// Returns `None` for a plan without measured or declared rates.
    pub fn max_step(&self, texts: u32) -> Option<Duration> {
        let own = MAX_STEP_STEPS * self.step(texts)?.seconds;
        let with_chunk = self.step(texts.saturating_add(MIN_CHUNK as u32))?.seconds;
        Some(duration(own.max(with_chunk)).max(MIN_MAX_STEP))
    }

    /// Returns the scheduler's estimate before any step is measured: steps of one text and of
    /// `texts`, and chunks of [`MIN_CHUNK`] and of [`BATCH`] rows. A small chunk costs as much as
    /// that many texts more.
    ///
    /// Returns `None` for a plan without measured or declared rates.
    pub fn step_cost(&self, texts: u32) -> Option<StepCost> {
        let many = texts.max(2);
        let seconds = |texts: u32| Some(self.step(texts)?.seconds);
        let chunk = seconds(many.saturating_add(MIN_CHUNK as u32))? - seconds(many)?;
        let point = |rows: u32, seconds| RowsTime {
            rows: rows as usize,
            time: duration(seconds),
        };
        let whole = prompt::batch_s(self.plan, self.shape, self.evidence);
        Some(StepCost::predicted(
            [point(1, seconds(1)?), point(many, seconds(many)?)],
            [point(MIN_CHUNK as u32, chunk), point(BATCH, whole)],
        ))
    }
}

fn duration(seconds: f64) -> Duration {
    Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX)
}

/// Returns the `a` from 0 with `1 + a + … + a^(rows − 1) = ratio`; infinity if it is more than 1.
fn break_even(rows: u32, ratio: f64) -> f64 {
    if ratio <= 1.0 {
        return 0.0;
    }
    if ratio > f64::from(rows) {
        return f64::INFINITY;
    }
    let tokens = |a: f64| (1..rows).fold(1.0, |sum, _| 1.0 + a * sum);
    let (mut low, mut high) = (0.0, 1.0);
    // The sum grows with `a`; 50 halvings leave nothing of the interval.
    for _ in 0..50 {
        let middle = (low + high) / 2.0;
        if tokens(middle) < ratio {
            low = middle;
        } else {
            high = middle;
        }
    }
    high
}

/// Returns the numbers of texts that are tried: each about a fifth more than the one before, and
/// `most` as the last.
fn counts_up_to(most: u32) -> impl Iterator<Item = u32> {
    let next = move |&count: &u32| {
        let more = count.saturating_add((count / 5).max(1)).min(most);
        (count < most).then_some(more)
    };
    std::iter::successors(Some(1), next)
}

fn mean(values: impl ExactSizeIterator<Item = f64>) -> f64 {
    let n = values.len().max(1);
    values.sum::<f64>() / n as f64
}

/// The expert stage of a step in one layer.
struct Stage {
    seconds: f64,
    /// Distinct experts per pass.
    distinct: f64,
}

/// One layer of a plan, whose steps are replayed.
struct LayerSteps<'a> {
    layer: &'a LayerPlacement,
    evidence: &'a LayerEvidence,
    stage: PassStage,
    n_tiers: usize,
    tokens: Tokens,
}

impl LayerSteps<'_> {
    fn of(&self, step: &Step) -> Stage {
        let texts = step.texts as usize;
        let is_enough = |trace: &LayerTrace| trace.tokens() / texts >= MIN_STRETCH;
        let share = match &self.evidence.judged {
            Judged::Recorded(trace) if is_enough(trace) => {
                return self.replayed(trace, texts);
            }
            Judged::Recorded(trace) => Cow::Owned(trace.decode_share()),
            Judged::Uniform => Cow::Borrowed(&self.evidence.share),
        };
        let shape = &self.evidence.shape;
        let drawn = drawn::trace(&share, shape.n_used as usize, shape.layer);
        if is_enough(&drawn) {
            return self.replayed(&drawn, texts);
        }
        let spread = spread(self.layer, self.evidence, step.pass_rows(), self.n_tiers);
        let used = spread
            .pinned
            .iter()
            .fold(spread.pooled, |sum, &on| sum + on);
        Stage {
            seconds: step.passes() * self.stage.seconds(&spread),
            distinct: used.experts,
        }
    }

    /// Replays the steps of texts that are stretches of a trace.
    fn replayed(&self, trace: &LayerTrace, texts: usize) -> Stage {
        let (n_tokens, used) = (trace.tokens(), trace.n_used());
        let stretch = n_tokens / texts;
        let within = |[least, most]: [usize; 2]| stretch.clamp(least, most);
        let (warm_up, counted) = (within(WARM_UP_STEPS), within(COUNTED_STEPS));
        let mut slots = Slots::new(self.layer, trace.n_expert(), self.n_tiers);
        let (mut seconds, mut distinct, mut passes) = (0.0, 0, 0);
        for at in 0..warm_up + counted {
            let token = |row: usize| match self.tokens {
                Tokens::Apart => (row * n_tokens / texts + at) % n_tokens,
                Tokens::InARow => (at * texts + row) % n_tokens,
            };
            let rows: Vec<&[u16]> = (0..texts)
                .map(|text| &trace.decoded()[token(text) * used..][..used])
                .collect();
            for pass in rows.chunks(PASS_ROWS as usize) {
                let taken = slots.take(pass, self.stage.in_place(), self.stage.staging());
                if at >= warm_up {
                    seconds += self
                        .stage
                        .busiest_s(&taken.on, taken.missed, taken.brought_to);
                    distinct += taken.distinct;
                    passes += 1;
                }
            }
        }
        Stage {
            seconds: seconds / counted as f64,
            distinct: distinct as f64 / f64::from(passes.max(1)),
        }
    }
}

/// What a pass does in one layer.
struct Taken {
    /// Use of the experts that compute on each tier.
    on: PerTier<Use>,
    /// Experts that are brought to the tier `brought_to`.
    missed: f64,
    brought_to: TierIdx,
    distinct: usize,
}

/// A layer's pins and slots while steps are replayed.
struct Slots<'a> {
    layer: &'a LayerPlacement,
    cache: SlotCache,
    /// `[n_expert]` tiers of pinned experts.
    pinned_on: Vec<Option<TierIdx>>,
    /// `[n_expert]` rows of the pass that use each expert.
    rows: Vec<u32>,
    n_tiers: usize,
    accesses: Vec<Access>,
}

impl<'a> Slots<'a> {
    fn new(layer: &'a LayerPlacement, n_expert: usize, n_tiers: usize) -> Self {
        let mut pinned_on = vec![None; n_expert];
        for Pins { tier, experts } in &layer.pinned {
            for &expert in experts {
                if let Some(on) = pinned_on.get_mut(expert as usize) {
                    *on = Some(*tier);
                }
            }
        }
        Self {
            layer,
            cache: SlotCache::new(n_expert as u32, layer.slots, layer.policy),
            pinned_on,
            rows: vec![0; n_expert],
            n_tiers,
            accesses: Vec::new(),
        }
    }

    /// Takes the rows of a pass through the slots, as the engine does.
    fn take(&mut self, pass: &[&[u16]], in_place: bool, staging: TierIdx) -> Taken {
        self.rows.fill(0);
        for chosen in pass {
            self.cache.note(chosen.iter().copied().map(u32::from));
            chosen
                .iter()
                .for_each(|&expert| self.rows[usize::from(expert)] += 1);
        }
        // In the order of last use.
        let mut seen = vec![false; self.rows.len()];
        let last_first = pass.iter().rev().flat_map(|chosen| chosen.iter().rev());
        let mut distinct: Vec<u32> = last_first
            .filter(|&&expert| !std::mem::replace(&mut seen[usize::from(expert)], true))
            .map(|&expert| u32::from(expert))
            .collect();
        distinct.reverse();
        let is_pooled = |expert: &&u32| self.pinned_on[**expert as usize].is_none();
        let pooled: Vec<u32> = distinct.iter().filter(is_pooled).copied().collect();
        self.cache.settle(&pooled, &mut self.accesses);
        let mut taken = Taken {
            on: PerTier::from_fn(self.n_tiers, |_| Use::default()),
            missed: 0.0,
            brought_to: self.layer.brought_to(staging),
            distinct: distinct.len(),
        };
        for &expert in &distinct {
            if let Some(tier) = self.pinned_on[expert as usize] {
                taken.on[tier] += Use::counted(self.rows[expert as usize]);
            }
        }
        let home = TierIdx::new(self.n_tiers - 1);
        for (&expert, access) in pooled.iter().zip(&self.accesses) {
            let (tier, is_missed) = match access {
                Access::Hit { .. } => (self.layer.slot_tier, false),
                Access::Fill { .. } => (self.layer.slot_tier, true),
                Access::Staged if in_place => (home, false),
                Access::Staged => (staging, true),
            };
            taken.on[tier] += Use::counted(self.rows[expert as usize]);
            taken.missed += f64::from(u8::from(is_missed));
        }
        taken
    }
}

#[cfg(test)]
#[path = "steps_tests.rs"]
mod tests;
