//! Grammars that were compiled last. Thousands of requests may have one schema.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use tier_plan_runtime::batcher::Grammar;

/// Most grammars that are kept. What one takes when compiled is bounded by the compiler.
pub(super) const MAX_KEPT: usize = 32;

/// Most bytes of their texts.
const MAX_KEPT_BYTES: usize = 1 << 20;

/// A compiled grammar, or what is wrong with it: wrong ones come again, too.
type Outcome = Result<Grammar, String>;

/// See the module.
#[derive(Default)]
pub(super) struct Compiled {
    /// With their texts, the one used last at the end.
    kept: Mutex<VecDeque<(String, Outcome)>>,
}

impl Compiled {
    /// Returns the grammar with this text, compiled by `compile` unless it is kept.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn get(&self, lark: String, compile: impl FnOnce(&str) -> Outcome) -> Outcome {
        if let Some(outcome) = self.find(&lark) {
            return outcome;
        }
        // Others go on meanwhile. Where two compile one grammar at once, either is right.
        let outcome = compile(&lark);
        self.keep(lark, outcome.clone());
        outcome
    }

    fn find(&self, lark: &str) -> Option<Outcome> {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let at = kept.iter().position(|(text, _)| text == lark)?;
        let found = kept.remove(at)?;
        let outcome = found.1.clone();
        kept.push_back(found);
        Some(outcome)
    }

    fn keep(&self, lark: String, outcome: Outcome) {
        if lark.len() > MAX_KEPT_BYTES {
            return;
        }
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|(text, _)| *text != lark);
        kept.push_back((lark, outcome));
        let mut bytes: usize = kept.iter().map(|(text, _)| text.len()).sum();
        while kept.len() > MAX_KEPT || bytes > MAX_KEPT_BYTES {
            let gone = kept.pop_front();
            bytes -= gone.map_or(bytes, |(text, _)| text.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    #[test]
    fn the_last_ones_are_kept_within_their_bounds() {
        let compiled = Compiled::default();
        let asked = RefCell::new(Vec::new());
        let get = |lark: &str| {
            let compile = |text: &str| {
                asked.borrow_mut().push(text.to_string());
                Err(format!("{} bytes", text.len()))
            };
            assert_eq!(
                compiled.get(lark.to_string(), compile).unwrap_err(),
                format!("{} bytes", lark.len())
            );
            asked.take().len()
        };
        for _ in 0..2 {
            // Used again and again, it stays, whatever comes between.
            for number in 0..2 * MAX_KEPT {
                assert_eq!(get(&format!("other {number}")), 1);
                assert_eq!(get("stays"), usize::from(number == 0));
            }
            assert_eq!(get(&"long".repeat(MAX_KEPT_BYTES / 4)), 1);
            assert_eq!(get(&"long".repeat(MAX_KEPT_BYTES / 4)), 0);
            // It left no room.
            assert_eq!(get("other 0"), 1);
            assert_eq!(get(&"longer".repeat(MAX_KEPT_BYTES)), 1);
            assert_eq!(get(&"longer".repeat(MAX_KEPT_BYTES)), 1);
            assert_eq!(get("other 0"), 0);
            for number in 1..=MAX_KEPT {
                assert_eq!(get(&format!("other {number}")), 1);
            }
        }
    }
}
