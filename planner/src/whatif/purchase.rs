//! Finds what to buy next: the same money spent on each tier in turn, and solved again.

use super::sweep::resized;
use super::{Answer, Question, Supposed, plan_for, side_by_side};
use tier_plan_runtime::formats::machine::{Machine, Tier};

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
/// The columns that were priced for the answer are where each purchase begins.
pub fn purchases(question: &Question<'_>, answer: &Answer, supposed: &Supposed) -> Vec<Purchase> {
    let Some(middle) = answer.middle() else {
        return Vec::new();
    };
    let Some(routing) = supposed.named(middle.routing) else {
        return Vec::new();
    };
    let extras = &question.machine.extras;
    let price = extras.price_usd.filter(|price| *price > 0.0);
    let usd = price.map_or(DEFAULT_SPEND_USD, |price| price * SPEND_SHARE);
    let offers = offers(question, usd);
    let bought = side_by_side(&offers, |offer| {
        let larger = Question {
            machine: &offer.machine,
            budgets: offer.budgets.clone(),
            ..question.clone()
        };
        // Purchases do not see each other's columns, so that they can be made side by side.
        let plan = plan_for(&larger, &routing.evidence, &routing.pool.clone());
        // More bytes always fit, so a failure here is a timeout and no purchase.
        plan.ok().map(|solved| Purchase {
            tier: offer.tier.clone(),
            bytes: offer.bytes,
            usd,
            before_tok_s: middle.decode_tok_s(),
            tok_s: solved.plan.predicted.decode_tok_s,
        })
    });
    let mut found: Vec<Purchase> = bought.into_iter().flatten().collect();
    found.sort_by(|a, b| b.tok_s.total_cmp(&a.tok_s));
    found
}

/// The machine with more bytes of one tier.
struct Offer {
    tier: String,
    bytes: u64,
    machine: Machine,
    budgets: Vec<u64>,
}

/// Returns what some dollars buy of each tier with a price.
fn offers(question: &Question<'_>, usd: f64) -> Vec<Offer> {
    let machine = question.machine;
    let offer = |(at, tier): (usize, &Tier)| {
        let prices = &machine.extras.usd_per_gb;
        let each = prices.get(&tier.name).filter(|each| **each > 0.0)?;
        let bytes = (usd / each * 1e9) as u64;
        let capacity = tier.capacity_bytes.checked_add(bytes);
        let capacity = capacity.filter(|all| i64::try_from(*all).is_ok())?;
        let mut budgets = question.budgets.clone();
        budgets[at] = budgets[at].saturating_add(bytes);
        Some(Offer {
            tier: tier.name.clone(),
            bytes,
            machine: resized(machine, at, capacity),
            budgets,
        })
    };
    machine.tiers.iter().enumerate().filter_map(offer).collect()
}
