//! Predicts what a model would do on a machine, without either.
//!
//! Without a profile it is unknown how the experts are used. So a plan is made for each supposed
//! pattern of routing, and the answer is the range over them. The middle one is named first.
//! Everything here is predicted.

pub mod purchase;
pub mod sweep;

use crate::catalogue::Known;
use crate::cost::steps::{Predictor, StepPrediction};
use crate::cost::token_s;
use crate::json::tier_json;
use crate::parallel;
use crate::profile::Evidence;
use crate::profile::pattern::Pattern;
use crate::solve::options::{Depth, Strategy};
use crate::solve::{ColumnPool, Options, Problem, Solution, solve_with_pool};
use anyhow::Result;
use purchase::Purchase;
use serde_json::{Value, json};
use tier_plan_runtime::KvType;
use tier_plan_runtime::formats::machine::{Machine, TierKind};
use tier_plan_runtime::formats::placement::Placement;
use tier_plan_runtime::formats::profile::Profile;
use tier_plan_runtime::kernels::scoped::spawn_or_run;

/// A question: which model, on which machine, within which budgets.
#[derive(Debug, Clone)]
pub struct Question<'a> {
    /// Model, or a shape of one.
    pub known: &'a Known,
    /// Machine with its tiers.
    pub machine: &'a Machine,
    /// `[tiers]` bytes that the plan may use.
    pub budgets: Vec<u64>,
    /// Recorded routing, if there is any.
    pub profile: Option<&'a Profile>,
    /// Context length in tokens.
    pub context: u32,
    /// Texts at once that the KV cache is planned for.
    pub sequences: u32,
    /// Position that predictions are for; half of the context when `None`.
    pub at: Option<u32>,
    /// Type that keys and values are stored in.
    pub kv_type: KvType,
    /// Seconds that each plan may take.
    pub time_limit_s: f64,
}

/// A plan for one pattern of routing.
#[derive(Debug, Clone, PartialEq)]
pub struct Case {
    /// A pattern's name, `profile`, or `dense` for a model without experts.
    pub routing: &'static str,
    /// Plan for this routing.
    pub plan: Placement,
    /// Steps of up to as many texts as are asked about; none where that is one.
    pub steps: Vec<StepPrediction>,
    /// Notes of the solver about the plan.
    pub notes: Vec<String>,
}

impl Case {
    /// Returns the predicted tokens per second while decoding.
    pub fn decode_tok_s(&self) -> f64 {
        self.plan.predicted.decode_tok_s
    }
}

/// Answer to a question: the range of predictions, and what it costs.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// One case per pattern of routing, the slowest first.
    pub cases: Vec<Case>,
    /// Watts while decoding, if known.
    pub watts: Option<f64>,
    /// Price of the machine in US dollars, if known.
    pub price_usd: Option<f64>,
    /// Seconds that loading takes, where the rate of the drive is known.
    pub load_s: Option<f64>,
}

/// Bottleneck: what most of a token's time goes to.
#[derive(Debug, Clone, PartialEq)]
pub struct Bound {
    /// Name of the tier, or `overheads`.
    pub by: String,
    /// Seconds per token of its reads, those that overlap others included.
    pub seconds: f64,
    /// Seconds as a share of a token's time.
    pub share: f64,
}

impl Answer {
    /// Returns the case to name first: the one in the middle, the slower of two.
    pub fn middle(&self) -> Option<&Case> {
        self.cases.get(self.cases.len().saturating_sub(1) / 2)
    }

    /// Returns tokens per second: the middle case, the slowest, and the fastest.
    pub fn decode_tok_s(&self) -> [f64; 3] {
        let speed = |case: Option<&Case>| case.map_or(0.0, Case::decode_tok_s);
        [
            speed(self.middle()),
            speed(self.cases.first()),
            speed(self.cases.last()),
        ]
    }

    /// Returns the joules per token at the middle speed.
    pub fn joules_per_token(&self) -> Option<f64> {
        let [speed, ..] = self.decode_tok_s();
        self.watts
            .filter(|_| speed > 0.0)
            .map(|watts| watts / speed)
    }

    /// Returns the tokens per second per thousand dollars, at the middle speed.
    pub fn tok_s_per_1000_usd(&self) -> Option<f64> {
        self.price_usd
            .filter(|price| *price > 0.0)
            .map(|price| self.decode_tok_s()[0] / price * 1000.0)
    }
}

/// Returns the bottleneck of a plan.
pub fn bound(plan: &Placement) -> Bound {
    let predicted = &plan.predicted;
    let total = token_s(predicted).max(f64::MIN_POSITIVE);
    let tiers = plan
        .tiers
        .enumerate()
        .zip(predicted.dense_s.iter().zip(&predicted.expert_s));
    let cache = plan.kv_s_by_tier();
    let of_tiers = tiers
        .map(|((at, tier), (dense, expert))| (tier.tier.name.clone(), dense + expert + cache[at]));
    let all = std::iter::once(("overheads".to_string(), predicted.overhead_s)).chain(of_tiers);
    let (by, seconds) = all.max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or_default();
    Bound {
        by,
        seconds,
        share: seconds / total,
    }
}

/// The patterns of routing to suppose, each with the columns that were priced for it.
///
/// Questions may share them that differ by budgets and by the capacities of tiers.
#[derive(Debug, Clone)]
pub struct Supposed {
    routings: Vec<Routing>,
}

/// A pattern of routing.
#[derive(Debug, Clone)]
struct Routing {
    name: &'static str,
    evidence: Evidence,
    pool: ColumnPool,
}

impl Supposed {
    /// Supposes every pattern of routing; only the profile, if there is one.
    ///
    /// # Errors
    /// Fails if the routing makes no sense for the model.
    pub fn new(question: &Question<'_>) -> Result<Self> {
        let shape = &question.known.sizes;
        let named = if let Some(profile) = question.profile {
            vec![("profile", Evidence::new(shape, Some(profile))?)]
        } else if shape.experts.is_empty() {
            vec![("dense", Evidence::uniform(shape)?)]
        } else {
            let of = |pattern: Pattern| Ok((pattern.name(), Evidence::supposed(shape, pattern)?));
            Pattern::ALL.into_iter().map(of).collect::<Result<_>>()?
        };
        let routing = |(name, evidence)| Routing {
            name,
            evidence,
            pool: ColumnPool::default(),
        };
        Ok(Supposed {
            routings: named.into_iter().map(routing).collect(),
        })
    }

    fn named(&self, name: &str) -> Option<&Routing> {
        self.routings.iter().find(|routing| routing.name == name)
    }
}

/// Solves for one pattern of routing. Slots keep LRU, since nothing is recorded to learn from.
fn plan_for(question: &Question<'_>, evidence: &Evidence, pool: &ColumnPool) -> Result<Solution> {
    let problem = Problem {
        shape: &question.known.sizes,
        profile: question.profile,
        machine: question.machine,
        budgets: question.budgets.clone(),
        context: question.context,
        sequences: question.sequences,
        kv_type: question.kv_type,
        position: question.at,
    };
    let options = Options {
        strategy: Strategy::Optimal,
        time_limit_s: question.time_limit_s,
        depth: Depth::Quick,
        ..Options::default()
    };
    solve_with_pool(&problem, evidence, pool, &options)
}

/// Answers a question.
///
/// # Errors
/// Fails if there is no plan: the model does not fit the budgets, or the machine file makes no
/// sense.
pub fn answer(question: &Question<'_>) -> Result<Answer> {
    answer_supposing(question, &Supposed::new(question)?)
}

/// Answers a question for patterns of routing, which keep what was priced for them.
///
/// # Errors
/// As [`answer`].
pub fn answer_supposing(question: &Question<'_>, supposed: &Supposed) -> Result<Answer> {
    let machine = question.machine;
    let cases = side_by_side(&supposed.routings, |routing| case_of(question, routing));
    let mut cases = cases.into_iter().collect::<Result<Vec<_>>>()?;
    cases.sort_by(|a, b| a.decode_tok_s().total_cmp(&b.decode_tok_s()));
    let mut answer = Answer {
        cases,
        watts: machine.extras.watts,
        price_usd: machine.extras.price_usd,
        load_s: None,
    };
    answer.load_s = answer.middle().and_then(|case| load_s(&case.plan, machine));
    Ok(answer)
}

/// Answers a question for one pattern of routing.
fn case_of(question: &Question<'_>, routing: &Routing) -> Result<Case> {
    let Routing {
        name,
        evidence,
        pool,
    } = routing;
    let solved = plan_for(question, evidence, pool)?;
    let predictor = Predictor {
        plan: &solved.plan,
        shape: &question.known.sizes,
        evidence,
        at: solved.plan.predicted.at,
    };
    let steps = match question.sequences {
        1 => Vec::new(),
        most => parallel::predictions(&predictor, most),
    };
    Ok(Case {
        routing: name,
        steps,
        plan: solved.plan,
        notes: solved.notes,
    })
}

/// Returns what `each` makes of every item, in their order, with a thread for each of them.
///
/// Items are a few solves of a second or less, so that threads beyond the cores cost nothing.
fn side_by_side<I: Sync, T: Send>(items: &[I], each: impl Fn(&I) -> T + Sync) -> Vec<T> {
    let each = &each;
    let mut made: Vec<Option<T>> = items.iter().map(|_| None).collect();
    std::thread::scope(|scope| {
        for (item, made) in items.iter().zip(&mut made) {
            spawn_or_run(scope, move || *made = Some(each(item)));
        }
    });
    made.into_iter().flatten().collect()
}

/// Returns the seconds to fill the tiers.
///
/// What lies on a last tier that keeps its contents is there already. Everything else comes from
/// that tier, or from a drive whose rate the machine file has.
fn load_s(plan: &Placement, machine: &Machine) -> Option<f64> {
    let last = machine.tiers.last()?;
    let keeps = matches!(last.kind, TierKind::Nvme | TierKind::Pmem);
    let rate = machine
        .extras
        .load_gbps
        .or(keeps.then_some(last.read_gbps))?;
    let upto = plan.tiers.len() - usize::from(keeps);
    let bytes: u64 = plan
        .tiers
        .iter()
        .take(upto)
        .map(|t| t.bytes.dense + t.bytes.pinned + t.bytes.home)
        .sum();
    Some(bytes as f64 / (rate * 1e9))
}

/// Returns purchases as JSON.
pub fn purchases_json(purchases: &[Purchase]) -> Value {
    let each = |p: &Purchase| {
        json!({
            "tier": p.tier,
            "bytes": p.bytes,
            "usd": p.usd,
            "decode_tok_s_before": p.before_tok_s,
            "decode_tok_s": p.tok_s,
            "helps": p.helps(),
        })
    };
    purchases.iter().map(each).collect()
}

/// Returns an answer as JSON.
pub fn as_json(question: &Question<'_>, answer: &Result<Answer>) -> Value {
    let mut value = json!({
        "model": question.known.sizes.id.name,
        "machine": question.machine.name,
        "context": question.context,
        "predicted": true,
        "emulated": question.machine.tiers.iter().any(|t| t.emulated),
        "fits": answer.is_ok(),
        "weight_bytes": question.known.sizes.weight_bytes(),
        "token_bytes": question.known.sizes.token_bytes(),
        "efficiency": question.machine.extras.efficiency,
    });
    let answer = match answer {
        Ok(answer) => answer,
        Err(error) => {
            value["reason"] = json!(format!("{error:#}"));
            return value;
        }
    };
    let Some(middle) = answer.middle() else {
        return value;
    };
    let [speed, low, high] = answer.decode_tok_s();
    let bound = bound(&middle.plan);
    let (solver, predicted) = (&middle.plan.solver, &middle.plan.predicted);
    value["decode_tok_s"] = json!(speed);
    value["decode_tok_s_low"] = json!(low);
    value["decode_tok_s_high"] = json!(high);
    value["routing"] = json!(middle.routing);
    value["gap"] = json!(solver.gap);
    value["status"] = json!(solver.status);
    value["backend"] = json!(solver.backend);
    value["bound_by"] = json!(bound.by);
    value["bound_by_s"] = json!(bound.seconds);
    value["bound_by_share"] = json!(bound.share);
    // Reads alone give an upper limit. With a rate of arithmetic, the figure is a prediction.
    let has_products = !predicted.prompt_gflops.is_empty();
    value["prompt_tok_s_limit"] = json!(predicted.prompt_tok_s);
    value["prompt_tok_s"] = json!(has_products.then_some(predicted.prompt_tok_s));
    value["at"] = json!(predicted.at);
    value["kv_type"] = json!(question.kv_type.name());
    value["kv_s"] = json!(predicted.kv_s);
    value["hit_rate"] = json!(predicted.hit_rate);
    value["load_s"] = json!(answer.load_s);
    value["watts"] = json!(answer.watts);
    value["joules_per_token"] = json!(answer.joules_per_token());
    value["price_usd"] = json!(answer.price_usd);
    value["tok_s_per_1000_usd"] = json!(answer.tok_s_per_1000_usd());
    value["overhead_s"] = json!(predicted.overhead_s);
    value["tiers"] = middle
        .plan
        .tiers
        .enumerate()
        .map(|(at, t)| {
            let mut value = tier_json(t);
            value["kind"] = json!(t.tier.kind.as_str());
            value["read_gbps"] = json!(t.tier.read_gbps);
            value["read_bytes_per_token"] = json!(predicted.read_bytes.get(at));
            value["dense_s"] = json!(predicted.dense_s.get(at));
            value["expert_s"] = json!(predicted.expert_s.get(at));
            value
        })
        .collect();
    value["parallel"] = parallel::as_json(&middle.steps);
    value["cases"] = answer
        .cases
        .iter()
        .map(|case| {
            json!({
                "routing": case.routing,
                "decode_tok_s": case.decode_tok_s(),
                "hit_rate": case.plan.predicted.hit_rate,
                "gap": case.plan.solver.gap,
                "status": case.plan.solver.status,
            })
        })
        .collect();
    value
}

#[cfg(test)]
mod points;
#[cfg(test)]
mod tests;
