//! What to buy next: the same money spent on each tier in turn, and solved again.

use super::sweep::resized;
use super::{Answer, Question, plan_for, supposed};
use anyhow::Result;

/// Spent where the machine has no price, in US dollars.
const USUAL_USD: f64 = 500.0;

/// The part of the machine's price that is spent.
const PART: f64 = 0.1;

/// A gain below this is none.
const NOTICEABLE: f64 = 0.01;

/// More of one tier.
#[derive(Debug, Clone, PartialEq)]
pub struct Purchase {
    /// The tier.
    pub tier: String,
    /// Bytes more of it.
    pub bytes: u64,
    /// What they cost, in US dollars.
    pub usd: f64,
    /// Predicted tokens a second before, at the middle of the routings.
    pub before_tok_s: f64,
    /// And with them.
    pub tok_s: f64,
}

impl Purchase {
    /// Whether it is worth saying.
    pub fn helps(&self) -> bool {
        self.tok_s > self.before_tok_s * (1.0 + NOTICEABLE)
    }
}

/// For every tier whose price is known, what the same money buys; the best first. Nothing where no price is known.
///
/// # Errors
/// When the routing makes no sense for the model.
pub fn purchases(question: &Question<'_>, answer: &Answer) -> Result<Vec<Purchase>> {
    let machine = question.machine;
    let Some(middle) = answer.middle() else { return Ok(Vec::new()) };
    let Some((_, evidence)) = supposed(question)?.into_iter().find(|(routing, _)| *routing == middle.routing) else {
        return Ok(Vec::new());
    };
    let usd = machine.extras.price_usd.filter(|price| *price > 0.0).map_or(USUAL_USD, |price| price * PART);
    let mut found = Vec::new();
    for (at, tier) in machine.tiers.iter().enumerate() {
        let Some(each) = machine.extras.usd_per_gb.get(&tier.name).filter(|each| **each > 0.0) else { continue };
        let bytes = (usd / each * 1e9) as u64;
        let Some(capacity) = tier.capacity_bytes.checked_add(bytes).filter(|all| i64::try_from(*all).is_ok()) else {
            continue;
        };
        let larger = resized(machine, at, capacity);
        let mut budgets = question.budgets.clone();
        budgets[at] = budgets[at].saturating_add(bytes);
        let larger = Question { machine: &larger, budgets, ..question.clone() };
        // What does not fit any more is no purchase; more room always fits.
        let Ok(plan) = plan_for(&larger, &evidence) else { continue };
        found.push(Purchase {
            tier: tier.name.clone(),
            bytes,
            usd,
            before_tok_s: middle.decode_tok_s(),
            tok_s: plan.plan.predicted.decode_tok_s,
        });
    }
    found.sort_by(|a, b| b.tok_s.total_cmp(&a.tok_s));
    Ok(found)
}
