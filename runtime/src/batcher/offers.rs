//! What texts begin with: kept texts, and texts at work that begin alike.

use super::{Batcher, Event};
use crate::engine::SequenceId;
use crate::schedule::{PAGE, StepPlan, TextId};
use std::cmp::Reverse;

/// Most texts that a text is known to begin alike with: the first ones of those that share most.
const MAX_SHARERS: usize = 4;

/// A text that another begins alike with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sharer {
    pub with: TextId,
    /// Tokens of whole pages that both begin with.
    pub n_tokens: usize,
}

/// Returns how many tokens of whole pages two prompts begin with. The last token is computed by each.
fn whole_pages_alike(tokens: &[u32], others: &[u32]) -> usize {
    let alike = tokens.iter().zip(others).take_while(|(a, b)| a == b);
    alike.count().min(tokens.len().saturating_sub(1)) / PAGE * PAGE
}

impl Batcher<'_> {
    /// Plans the next step. What is offered to one text may be what another lacks, so less is
    /// offered where nothing could go on.
    pub(super) fn plan(&mut self, on_event: &mut dyn FnMut(TextId, Event)) -> StepPlan {
        let mut most = self.limits.max_texts;
        loop {
            let offered = self.offer_kept(most);
            let plan = self.scheduler.next_step(self.pages(), &self.limits);
            self.settle(&offered, &plan, on_event);
            if plan.pages_wanted == 0 || offered.is_empty() {
                return plan;
            }
            most = usize::from(offered.len() > 1);
        }
    }

    /// Begins the texts that may be admitted now, `most` of them, with what the engine has of them.
    /// Returns them.
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

    /// Begins a text with what is kept, or with what a text at work shares with it. Returns whether
    /// there was a place for it.
    fn offer(&mut self, id: TextId) -> bool {
        if self.make_live(id).is_err() {
            return false;
        }
        let sharer = self.nearest_sharer(id);
        let Some(live) = self
            .texts
            .get_mut(&id)
            .and_then(|entry| entry.live.as_mut())
        else {
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
        let sharers = self.texts.get(&id)?.sharers.iter();
        let placed = sharers.filter_map(|sharer| {
            let sequence = self.sequence(sharer.with)?;
            let n = self.engine.n_past_of(sequence).min(sharer.n_tokens);
            Some((sequence, n / PAGE * PAGE))
        });
        placed.max_by_key(|(_, n)| *n).filter(|(_, n)| *n > 0)
    }

    /// Returns the unfinished texts that a new prompt begins alike with, so that none computes what
    /// another does at the same time.
    pub(super) fn sharers_of(&self, prompt: &[u32]) -> Vec<Sharer> {
        // With recurrent states, only what is kept can be shared.
        if prompt.len() <= PAGE || !self.engine.forks_anywhere() {
            return Vec::new();
        }
        let alike = self.texts.iter().map(|(id, entry)| Sharer {
            with: *id,
            n_tokens: whole_pages_alike(prompt, &entry.options.prompt),
        });
        let mut sharers: Vec<Sharer> = alike.filter(|sharer| sharer.n_tokens > 0).collect();
        sharers.sort_unstable_by_key(|sharer| (Reverse(sharer.n_tokens), sharer.with));
        sharers.truncate(MAX_SHARERS);
        sharers
    }

    /// Reports the texts that a plan begins, and gives back what was offered to others.
    fn settle(
        &mut self,
        offered: &[TextId],
        plan: &StepPlan,
        on_event: &mut dyn FnMut(TextId, Event),
    ) {
        for id in offered {
            let Some(entry) = self.texts.get_mut(id) else {
                continue;
            };
            let Some(live) = entry.live.as_mut() else {
                continue;
            };
            if plan.rows.iter().any(|row| row.id == *id) {
                self.shared += live.shared;
                if !std::mem::replace(&mut entry.has_begun, true) {
                    let cached = live.shared;
                    on_event(*id, Event::Begun { cached });
                }
                continue;
            }
            if let Some(sequence) = live.sequence.take() {
                self.engine.remove_sequence(sequence);
            }
            self.scheduler.set_cached(*id, 0);
            if live.n_new() == 0 {
                // Its tokens are in its options, which the texts of a request share; many may wait.
                entry.live = None;
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
            if let Some(sequence) = self.sequence(row.id)
                && self.engine.n_past_of(sequence).is_multiple_of(PAGE)
            {
                self.engine.keep_sequence(sequence);
            }
        }
    }

    /// Frees the pages of preempted texts, which are kept until other texts want them.
    pub(super) fn release(&mut self, plan: &StepPlan) {
        for preempt in &plan.preempt {
            let live = self.live_mut(preempt.id);
            if let Some(sequence) = live.and_then(|live| live.sequence.take()) {
                self.engine.keep_sequence(sequence);
                self.engine.remove_sequence(sequence);
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
