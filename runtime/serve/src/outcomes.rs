//! How requests ended, in five classes of status.

use crate::ask::CLIENT_LEFT;
use serde_json::{Value, json};
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts of requests since the start.
#[derive(Debug, Default)]
pub(crate) struct Outcomes {
    /// With a status below 400.
    answered: AtomicU64,
    /// With a status from 400 to 499 that the other fields do not count.
    refused: AtomicU64,
    /// With status 429.
    queue_full: AtomicU64,
    /// Whose client left before it had its answer.
    abandoned: AtomicU64,
    /// With a status of 500 or more.
    failed: AtomicU64,
}

impl Outcomes {
    /// Counts a request that has ended.
    pub fn count(&self, status: u16) {
        let of_class = match status {
            0..400 => &self.answered,
            429 => &self.queue_full,
            CLIENT_LEFT => &self.abandoned,
            400..500 => &self.refused,
            500.. => &self.failed,
        };
        of_class.fetch_add(1, Ordering::Relaxed);
    }

    /// Returns the counts under their names.
    pub fn json(&self) -> Value {
        let n = |of: &AtomicU64| of.load(Ordering::Relaxed);
        json!({
            "answered": n(&self.answered),
            "refused": n(&self.refused),
            "queue_full": n(&self.queue_full),
            "abandoned": n(&self.abandoned),
            "failed": n(&self.failed),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_has_one_class() {
        let outcomes = Outcomes::default();
        for status in [200, 302, 400, 404, 401, 429, 499, 500, 501, 503, 599] {
            outcomes.count(status);
        }
        let expected = json!({
            "answered": 2, "refused": 3, "queue_full": 1, "abandoned": 1, "failed": 4,
        });
        assert_eq!(outcomes.json(), expected);
    }
}
