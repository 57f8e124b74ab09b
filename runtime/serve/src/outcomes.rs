//! How requests ended: the one count of them, by path and status, which the metrics and the live view
//! show.

use crate::ask::CLIENT_LEFT;
use crate::metrics::locked;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::Mutex;

/// Status of a request that found the queue full.
const QUEUE_FULL: u16 = 429;

/// What is counted apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    path: &'static str,
    status: u16,
}

/// Counts of requests since the start.
#[derive(Debug, Default)]
pub(crate) struct Outcomes {
    counts: Mutex<BTreeMap<Kind, u64>>,
}

impl Outcomes {
    /// Counts a request that has ended.
    pub fn count(&self, path: &'static str, status: u16) {
        let mut counts = locked(&self.counts);
        *counts.entry(Kind { path, status }).or_default() += 1;
    }

    /// Returns the number of requests whose status is of a class.
    fn of(&self, class: impl Fn(u16) -> bool) -> u64 {
        let counts = locked(&self.counts);
        let of_class = counts.iter().filter(|(kind, _)| class(kind.status));
        of_class.map(|(_, n)| n).sum()
    }

    /// Returns the counts of five classes of status under their names.
    pub fn json(&self) -> Value {
        let is_other = |status| ![QUEUE_FULL, CLIENT_LEFT].contains(&status);
        json!({
            "answered": self.of(|status| status < 400),
            "refused": self.of(|status| (400..500).contains(&status) && is_other(status)),
            "queue_full": self.of(|status| status == QUEUE_FULL),
            "abandoned": self.of(|status| status == CLIENT_LEFT),
            "failed": self.of(|status| status >= 500),
        })
    }
}

impl Collector for Outcomes {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let rejected = ConstCounter::new(self.of(|status| status == QUEUE_FULL));
        let help = "Requests that found the queue full.";
        let metric = encoder.encode_descriptor("rejected", help, None, MetricType::Counter)?;
        rejected.encode(metric)?;
        let counts = locked(&self.counts);
        if counts.is_empty() {
            return Ok(());
        }
        let help = "Requests answered, by path and status.";
        let mut metric = encoder.encode_descriptor("requests", help, None, MetricType::Counter)?;
        for (Kind { path, status }, n) in counts.iter() {
            let labels = [
                ("path", (*path).to_string()),
                ("status", status.to_string()),
            ];
            ConstCounter::new(*n).encode(metric.encode_family(&labels)?)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_has_one_class() {
        let outcomes = Outcomes::default();
        for status in [200, 302, 400, 404, 401, 429, 499, 500, 501, 503, 599] {
            outcomes.count("/a", status);
        }
        outcomes.count("/b", 200);
        let expected = json!({
            "answered": 3, "refused": 3, "queue_full": 1, "abandoned": 1, "failed": 4,
        });
        assert_eq!(outcomes.json(), expected);
    }
}
