//! How fast a text is decoded within a window.

use std::time::{Duration, Instant};

/// Steps that decoded, and the time from the first one's start to the last one's end: an answer
/// begins and ends within a window, and what is idle then is not its speed.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Decoding {
    pub steps: usize,
    from: Option<Instant>,
    took: Duration,
}

impl Decoding {
    /// Counts a step that has ended.
    pub fn count(&mut self, took: Duration, now: Instant) {
        let from = *self
            .from
            .get_or_insert(now.checked_sub(took).unwrap_or(now));
        self.steps += 1;
        self.took = now.saturating_duration_since(from);
    }

    /// Returns the tokens per second of one text: it has one per step.
    pub fn text_tok_s(&self) -> Option<f64> {
        let seconds = self.took.as_secs_f64();
        (self.steps > 0 && seconds > 0.0).then(|| self.steps as f64 / seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_speed_of_a_text_leaves_out_what_is_idle_around_it() {
        let mut decoding = Decoding::default();
        assert_eq!(decoding.text_tok_s(), None);
        let start = Instant::now() + Duration::from_secs(100);
        for step in 1..=5 {
            let took = Duration::from_millis(8);
            decoding.count(took, start + Duration::from_millis(10) * step);
        }
        // From 2 ms to 50 ms.
        let speed = decoding.text_tok_s().unwrap();
        assert!((speed - 5.0 / 0.048).abs() < 1e-6, "{speed}");
    }
}
