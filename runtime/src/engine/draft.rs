//! Drafts: the next tokens as the text itself suggests, checked together with the token at hand.
//!
//! Where the last few tokens stood earlier in the text, what followed them there may follow again
//! (prompt lookup). A draft costs little more than a token where its rows choose the same experts,
//! and as much as its tokens where they choose others. So [`Payoff`] measures both, times and hits,
//! and drafts are as long as pays. No draft changes the text: a token is only taken from one if it
//! is the token that would have been chosen.

use std::time::Duration;

/// Tokens per draft at most.
pub const MAX_DRAFT: usize = 8;

/// Tokens at the end of a text that are looked for earlier in it.
const GRAM: std::ops::RangeInclusive<usize> = 2..=4;

/// Share of drafted tokens that are taken to be right before any is checked.
const PRIOR_HITS: f64 = 0.6;

/// Steps after which half of what was measured is forgotten.
const MEMORY: f64 = 48.0;

/// Returns what followed the text's last tokens where they stood before, up to `most` tokens. The
/// longest match counts, of several the last.
pub fn look_up(text: &[u32], most: usize) -> &[u32] {
    if most == 0 {
        return &[];
    }
    for n in GRAM.rev() {
        let Some(first) = text.len().checked_sub(n) else {
            continue;
        };
        let gram = &text[first..];
        if let Some(at) = text[..text.len() - 1].windows(n).rposition(|w| w == gram) {
            let next = &text[at + n..];
            return &next[..next.len().min(most)];
        }
    }
    &[]
}

/// A mean that forgets.
#[derive(Debug, Clone, Copy, Default)]
struct Fading {
    sum: f64,
    weight: f64,
}

impl Fading {
    fn fade(&mut self) {
        let kept = 0.5f64.powf(1.0 / MEMORY);
        self.sum *= kept;
        self.weight *= kept;
    }

    fn add(&mut self, value: f64) {
        self.sum += value;
        self.weight += 1.0;
    }

    /// Returns the mean, in which `prior` counts as one value.
    fn mean(&self, prior: f64) -> f64 {
        (self.sum + prior) / (self.weight + 1.0)
    }
}

/// How often drafts were right, by place.
#[derive(Debug, Clone, Default)]
pub struct Acceptance {
    /// Whether the token was right, where those before it were.
    hits: [Fading; MAX_DRAFT],
}

impl Acceptance {
    /// Counts a draft of `drafted` tokens, of which the first `right` were right.
    pub fn count(&mut self, drafted: usize, right: usize) {
        if drafted > 0 {
            self.hits.iter_mut().for_each(Fading::fade);
        }
        for (place, hits) in self.hits[..drafted.min(right + 1).min(MAX_DRAFT)]
            .iter_mut()
            .enumerate()
        {
            hits.add(if place < right { 1.0 } else { 0.0 });
        }
    }

    /// Returns the tokens that a draft of each length brings beyond the one that comes anyway: `Σ aⱼ`,
    /// where `aⱼ` is the share of drafts whose first `j` tokens are right.
    pub fn expected(&self) -> impl Iterator<Item = f64> + '_ {
        let (mut chain, mut sum) = (1.0, 0.0);
        self.hits.iter().map(move |hits| {
            chain *= hits.mean(PRIOR_HITS);
            sum += chain;
            sum
        })
    }
}

/// What drafts have cost and brought so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct Payoff {
    /// By tokens of the draft: seconds of a step.
    times: [Fading; MAX_DRAFT + 1],
    hits: Acceptance,
}

impl Payoff {
    /// Counts a step with a draft of `drafted` tokens, of which the first `right` were right.
    pub(crate) fn count(&mut self, drafted: usize, right: usize, time: Duration) {
        self.times.iter_mut().for_each(Fading::fade);
        self.times[drafted].add(time.as_secs_f64());
        self.hits.count(drafted, right);
    }

    /// Returns the seconds of a step with a draft of `n` tokens. Until it is measured, a token of a
    /// draft is taken to cost half of one that is decoded.
    fn step_s(&self, n: usize) -> f64 {
        let one = self.times[0].mean(self.times[0].sum / self.times[0].weight.max(1e-9));
        let prior = one * (1.0 + 0.5 * n as f64);
        if n == 0 {
            one
        } else {
            self.times[n].mean(prior)
        }
    }

    /// Returns how many of `available` tokens to draft: those with the most expected tokens per
    /// second, or none.
    pub(crate) fn best(&self, available: usize) -> usize {
        if self.times[0].weight < 2.0 {
            // There is nothing to compare with yet.
            return 0;
        }
        let (mut best, mut most) = (0, 1.0 / self.step_s(0));
        for (n, more) in (1..=available).zip(self.hits.expected()) {
            let rate = (1.0 + more) / self.step_s(n);
            if rate > most {
                (best, most) = (n, rate);
            }
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_followed_before_is_proposed() {
        let text = [1, 2, 3, 4, 5, 9, 2, 3, 7, 8, 1, 2, 3];
        assert_eq!(look_up(&text, 8), [4, 5, 9, 2, 3, 7, 8, 1]);
        assert_eq!(look_up(&text, 2), [4, 5]);
        assert_eq!(look_up(&text[..8], 3), [4, 5, 9]);
        // The last of several.
        assert_eq!(look_up(&[1, 2, 5, 1, 2, 6, 1, 2], 1), [6]);
        // A text that repeats one token.
        assert_eq!(look_up(&[4, 4, 4, 4], 8), [4]);
        for none in [&[][..], &[1], &[1, 1], &[1, 2, 3, 4, 5]] {
            assert!(look_up(none, 8).is_empty(), "{none:?}");
        }
    }

    #[test]
    fn expected_tokens_follow_the_hits() {
        let mut hits = Acceptance::default();
        let prior: Vec<f64> = hits.expected().take(2).collect();
        assert!((prior[0] - 0.6).abs() < 1e-9 && (prior[1] - 0.96).abs() < 1e-9);
        (0..400).for_each(|_| hits.count(3, 1));
        let learned: Vec<f64> = hits.expected().collect();
        assert_eq!(learned.len(), MAX_DRAFT);
        // The first is right, the second is not.
        assert!(
            learned[0] > 0.98 && learned[1] - learned[0] < 0.02,
            "{learned:?}"
        );
        hits.count(usize::MAX, usize::MAX - 1);
    }

    #[test]
    fn drafts_are_as_long_as_pays() {
        let ms = Duration::from_millis;
        let mut payoff = Payoff::default();
        assert_eq!(payoff.best(8), 0, "nothing is known yet");
        (0..8).for_each(|_| payoff.count(0, 0, ms(100)));
        assert!(payoff.best(8) > 0);
        assert_eq!(payoff.best(0), 0);
        // Drafts that are right and cheap get longer.
        let mut good = payoff.clone();
        for n in (1..=MAX_DRAFT).cycle().take(64) {
            good.count(n, n, ms(100 + 2 * n as u64));
        }
        assert_eq!(good.best(8), 8);
        assert_eq!(good.best(3), 3);
        // Ones that are wrong end, and so do ones that cost what they bring.
        let mut wrong = payoff.clone();
        (0..32).for_each(|_| wrong.count(2, 0, ms(120)));
        assert_eq!(wrong.best(8), 0);
        let mut dear = payoff.clone();
        for n in (1..=MAX_DRAFT).cycle().take(200) {
            dear.count(n, n, ms(110 * (n as u64 + 1)));
            dear.count(0, 0, ms(100));
        }
        assert_eq!(dear.best(8), 0);
    }
}
