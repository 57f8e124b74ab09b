//! Finds what to buy next: the same money spent on each tier in turn, and solved again.

use super::sweep::resized;
use super::{Answer, Question, plan_for, supposed};
use anyhow::Result;

/// US dollars to spend where the machine has no price.
const DEFAULT_SPEND_USD: f64 = 500.0;

/// Share of the machine's price to spend.
const SPEND_SHARE: f64 = 0.1;

/// Relative gain of speed below which a purchase does not help.
const MIN_RELATIVE_GAIN: f64 = 0.01;

/// More bytes of one tier.
#[derive(Debug, Clone, PartialEq)]
pub struct Purchase {
    /// Name of the tier.
    pub tier: String,
    /// Bytes that are bought.
    pub bytes: u64,
    /// Price of the bytes in US dollars.
    pub usd: f64,
    /// Predicted tokens per second before, for the middle routing.
    pub before_tok_s: f64,
    /// Predicted tokens per second with the bytes.
    pub tok_s: f64,
}

impl Purchase {
    /// Whether the gain is worth reporting.
    pub fn helps(&self) -> bool {
        self.tok_s > self.before_tok_s * (1.0 + MIN_RELATIVE_GAIN)
    }
}

/// Returns what the same money buys of every tier whose price is known, the best first.
///
/// # Errors
/// Fails if the routing makes no sense for the model.
pub fn purchases(question: &Question<'_>, answer: &Answer) -> Result<Vec<Purchase>> {
    let machine = question.machine;
    let Some(middle) = answer.middle() else {
        return Ok(Vec::new());
    };
    let Some((_, evidence)) = supposed(question)?
        .into_iter()
        .find(|(routing, _)| *routing == middle.routing)
    else {
        return Ok(Vec::new());
    };
    let usd = machine
        .extras
        .price_usd
        .filter(|price| *price > 0.0)
        .map_or(DEFAULT_SPEND_USD, |price| price * SPEND_SHARE);
    let mut found = Vec::new();
    for (at, tier) in machine.tiers.iter().enumerate() {
        let Some(each) = machine
            .extras
            .usd_per_gb
            .get(&tier.name)
            .filter(|each| **each > 0.0)
        else {
            continue;
        };
        let bytes = (usd / each * 1e9) as u64;
        let Some(capacity) = tier
            .capacity_bytes
            .checked_add(bytes)
            .filter(|all| i64::try_from(*all).is_ok())
        else {
            continue;
        };
        let larger = resized(machine, at, capacity);
        let mut budgets = question.budgets.clone();
        budgets[at] = budgets[at].saturating_add(bytes);
        let larger = Question {
            machine: &larger,
            budgets,
            ..question.clone()
        };
        // More bytes always fit, so a failure here is a timeout and no purchase.
        let Ok(plan) = plan_for(&larger, &evidence) else {
            continue;
        };
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
