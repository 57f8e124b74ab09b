//! What texts begin with: kept texts, and texts at work that begin alike.

use super::Batch;
use std::cmp::Reverse;
use tier_plan_runtime::engine::SequenceId;
use tier_plan_runtime::schedule::{PAGE, StepPlan, TextId};

/// Most texts that a text is known to begin alike with: the first ones of those that share most.
const MAX_SHARERS: usize = 4;

/// A text that another begins alike with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sharer {
    with: TextId,
    /// Tokens of whole pages that both begin with.
    n_tokens: usize,
}

/// Returns how many tokens of whole pages two prompts begin with. The last token is computed by each.
fn whole_pages_alike(tokens: &[u32], others: &[u32]) -> usize {
    let alike = tokens.iter().zip(others).take_while(|(a, b)| a == b);
    alike.count().min(tokens.len().saturating_sub(1)) / PAGE * PAGE
}

impl Batch<'_> {
    /// Plans the next step. What is offered to one text may be what another lacks, so less is
    /// offered where nothing could go on.
    pub(super) fn plan(&mut self) -> StepPlan {
        let mut most = self.limits.max_texts;
        loop {
            let offered = self.offer_kept(most);
            let plan = self.scheduler.next_step(self.pages(), &self.limits);
            self.withdraw(&offered, &plan);
            if plan.pages_wanted == 0 || offered.is_empty() {
                return plan;
            }
            most = usize::from(offered.len() > 1);
        }
    }

    /// Begins the texts that may be admitted now, `most` of them, with what the engine has kept of
    /// them. Returns them.
    fn offer_kept(&mut self, most: usize) -> Vec<TextId> {
        let admitted = self.scheduler.n_admitted();
        let places = self.limits.max_texts.saturating_sub(admitted).min(most);
        let upcoming = self.scheduler.upcoming();
        let upcoming = upcoming.filter(|id| !self.scheduler.is_held(*id));
        let mut offered: Vec<TextId> = upcoming.take(places).collect();
        // A text without a place for it yet begins with nothing.
        offered.retain(|id| self.offer(*id));
        offered
    }

    /// Begins a text with what the engine has of it: what is kept, or what a text at work shares with
    /// it. Returns whether there was a place for it.
    fn offer(&mut self, id: TextId) -> bool {
        self.make_live(id);
        let sharer = self.nearest_sharer(id);
        let Some(live) = self.live.get_mut(&id) else {
            return false;
        };
        let Ok(mut begun) = self.engine.begin_sequence(&live.tokens) else {
            return false;
        };
        if let Some((of, n)) = sharer
            && n > begun.1
            && let Ok(forked) = self.engine.fork(of, n)
        {
            self.engine.remove_sequence(begun.0);
            begun = (forked, n);
        }
        (live.sequence, live.shared) = (Some(begun.0), begun.1);
        self.scheduler.set_cached(id, begun.1);
        true
    }

    /// Returns the text in the engine that has most of what a text shares with it, and how much, in
    /// whole pages: the last page of a text at work changes.
    fn nearest_sharer(&self, id: TextId) -> Option<(SequenceId, usize)> {
        let sharers = self.sharers.get(&id)?.iter();
        let placed = sharers.filter_map(|sharer| {
            let sequence = self.live.get(&sharer.with)?.sequence?;
            let n = self.engine.n_past_of(sequence).min(sharer.n_tokens);
            Some((sequence, n / PAGE * PAGE))
        });
        placed.max_by_key(|(_, n)| *n).filter(|(_, n)| *n > 0)
    }

    /// Notes with which texts the `n` new ones of a request begin alike, so that none computes what
    /// another does at the same time.
    pub(super) fn note_sharers(&mut self, first: TextId, n: usize, tokens: &[u32]) {
        // With recurrent states, only what is kept can be shared.
        if !self.engine.forks_anywhere() {
            return;
        }
        let jobs = self.jobs.values().map(|job| Sharer {
            with: job.first,
            n_tokens: whole_pages_alike(tokens, &job.encoded.tokens),
        });
        let mut sharers: Vec<Sharer> = jobs.filter(|sharer| sharer.n_tokens > 0).collect();
        sharers.sort_unstable_by_key(|sharer| (Reverse(sharer.n_tokens), sharer.with));
        sharers.truncate(MAX_SHARERS);
        for id in (first.0..).map(TextId).take(n) {
            let mut sharers = sharers.clone();
            if id != first {
                let n_tokens = whole_pages_alike(tokens, tokens);
                sharers.push(Sharer {
                    with: first,
                    n_tokens,
                });
            }
            for sharer in &sharers {
                self.scheduler.set_shared(id, sharer.with, sharer.n_tokens);
            }
            if !sharers.is_empty() {
                self.sharers.insert(id, sharers);
            }
        }
    }

    /// Gives back what was offered to texts that were not admitted.
    fn withdraw(&mut self, offered: &[TextId], plan: &StepPlan) {
        for id in offered {
            let Some(live) = self.live.get_mut(id) else {
                continue;
            };
            if plan.rows.iter().any(|row| row.id == *id) {
                self.summary.shared_tokens += live.shared;
                continue;
            }
            if let Some(sequence) = live.sequence.take() {
                self.engine.remove_sequence(sequence);
            }
            self.scheduler.set_cached(*id, 0);
            if live.n_new() == 0 {
                // Its tokens are in the job; many may wait.
                self.live.remove(id);
            }
        }
    }

    /// Keeps texts that fill their pages at the moment for those that wait. Others would copy their
    /// last page with the next token, which the schedule has no page for.
    pub(super) fn keep_whole_pages(&mut self, plan: &StepPlan) {
        if self.scheduler.upcoming().next().is_none() {
            return;
        }
        for row in &plan.rows {
            let live = self.live.get(&row.id);
            // What is left of a draft counts, too.
            if let Some(sequence) = live.and_then(|live| live.sequence)
                && self.engine.n_past_of(sequence).is_multiple_of(PAGE)
            {
                self.engine.keep_sequence(sequence);
            }
        }
    }

    /// Frees the pages of preempted texts, which are kept until other texts want them.
    pub(super) fn release(&mut self, plan: &StepPlan) {
        for preempt in &plan.preempt {
            if let Some(live) = self.live.get_mut(&preempt.id)
                && let Some(sequence) = live.sequence.take()
            {
                self.engine.keep_sequence(sequence);
                self.engine.remove_sequence(sequence);
                self.summary.preempted += 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_pages_are_shared_but_never_the_last_token() {
        let tokens: Vec<u32> = (0..300).collect();
        assert_eq!(whole_pages_alike(&tokens, &tokens[..200]), 192);
        assert_eq!(whole_pages_alike(&tokens[..192], &tokens), 128);
        assert_eq!(whole_pages_alike(&tokens[..193], &tokens), 192);
        assert_eq!(whole_pages_alike(&tokens, &tokens[1..]), 0);
        assert_eq!(whole_pages_alike(&[], &tokens), 0);
    }
}
