//! Drafts of texts at work, as far as they pay.
//!
//! A step of `R` rows takes `T(R)`, by the scheduler's estimate: predicted at first, then measured, so
//! it knows how many more distinct experts more rows choose. A draft of `n` tokens that brings `e`
//! tokens on average pays where `(R + e) / T(R + n) > R / T(R)`. Texts whose drafts are wrong, and
//! steps to which rows are dear, have none.

use super::Batcher;
use crate::engine::draft::{MAX_DRAFT, look_up};
use crate::schedule::{StepCost, TextState};
use std::time::Duration;

impl Batcher<'_> {
    /// Drafts tokens of running texts, and says how many rows they want.
    pub(super) fn draft(&mut self) {
        if self.limits.max_drafts == 0 {
            return;
        }
        let running = self.scheduler.n_running();
        for (&id, entry) in &mut self.texts {
            let Some(live) = entry.live.as_mut() else {
                continue;
            };
            live.draft.clear();
            if self.scheduler.state(id) != Some(TextState::Running) {
                continue;
            }
            let most = if live.drafts {
                self.limits.max_drafts
            } else {
                0
            };
            let found = look_up(&live.tokens, most);
            let expected = live.acceptance.expected().take(found.len());
            let n = best(self.scheduler.cost(), running, expected);
            live.draft = found[..n].to_vec();
            self.scheduler.set_drafts(id, n);
        }
    }
}

/// Returns the length of the draft with which a step of `running` texts has most tokens per second,
/// given the tokens that each length is expected to bring; 0 if none pays.
fn best(cost: &StepCost, running: usize, expected: impl Iterator<Item = f64>) -> usize {
    if !cost.knows_decoding() {
        // There is nothing to compare with yet.
        return 0;
    }
    let seconds = |rows| {
        cost.predict(rows, 0)
            .max(Duration::from_nanos(1))
            .as_secs_f64()
    };
    let running_tokens = running as f64;
    let (mut best, mut most) = (0, running_tokens / seconds(running));
    for (n, more) in (1..=MAX_DRAFT).zip(expected) {
        let rate = (running_tokens + more) / seconds(running + n);
        if rate > most {
            (best, most) = (n, rate);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::draft::Acceptance;
    use crate::schedule::RowsTime;

    fn cost(fixed_ms: u64, row_ms: u64) -> StepCost {
        let point = |rows: usize| RowsTime {
            rows,
            time: Duration::from_millis(fixed_ms + row_ms * rows as u64),
        };
        StepCost::predicted([point(1), point(9)], [point(16), point(512)])
    }

    fn acceptance(drafted: usize, right: usize) -> Acceptance {
        let mut acceptance = Acceptance::default();
        (0..200).for_each(|_| acceptance.count(drafted, right));
        acceptance
    }

    #[test]
    fn drafts_end_where_rows_cost_what_they_bring() {
        let (good, wrong) = (acceptance(8, 8), acceptance(8, 0));
        // Rows are nearly free.
        assert_eq!(best(&cost(100, 1), 4, good.expected()), 8);
        assert_eq!(best(&cost(100, 1), 4, good.expected().take(3)), 3);
        assert_eq!(best(&cost(100, 1), 4, wrong.expected()), 0);
        // Rows are all that a step costs: no draft brings more than a row.
        assert_eq!(best(&cost(0, 10), 4, good.expected()), 0);
        // One that is right half of the time pays for one text, and not beside thirty.
        let mut half = Acceptance::default();
        (0..400).for_each(|i| half.count(1, i % 2));
        assert_eq!(best(&cost(40, 10), 1, half.expected().take(1)), 1);
        assert_eq!(best(&cost(40, 10), 30, half.expected().take(1)), 0);
        // Nothing is known.
        assert_eq!(best(&StepCost::default(), 1, good.expected()), 0);
    }
}
