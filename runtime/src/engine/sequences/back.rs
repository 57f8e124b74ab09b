//! Going back to fewer tokens: by itself as far as a text's own pages and states reach, and to
//! checkpoints.

use super::{Sequence, SequenceId, Sequences, find};
use crate::error::RunError;
use crate::layers::pages::{PAGE, pages_for};

impl Sequences {
    /// Ends a step: its checkpoints can be gone back to.
    pub(crate) fn commit(&mut self, id: SequenceId) {
        if let Ok(Sequence {
            checkpoints,
            coming,
            ..
        }) = self.get_mut(id)
        {
            checkpoints.append(coming);
        }
    }

    /// Gives a text with windows a checkpoint at the last full page before its end, where a part of a
    /// prompt ends, in place of the one of the part before. A chat goes back there for its next
    /// message, if what was thought in between is left out.
    pub(crate) fn mark_prompt(&mut self, id: SequenceId) {
        if self.is_recurrent || self.states.windows.is_empty() {
            return;
        }
        let Some(sequence) = find(&mut self.slots, id) else {
            return;
        };
        let at = sequence.n_past() / PAGE * PAGE;
        let is_there = sequence.checkpoints.iter().any(|(n, _)| *n == at);
        if at == 0 || is_there || !self.states.windows.reach(&sequence.windows, at) {
            return;
        }
        let last = sequence.prompt_end.take();
        let last = last.and_then(|last| sequence.checkpoints.iter().position(|(n, _)| *n == last));
        if let Some(last) = last {
            let (_, state) = sequence.checkpoints.remove(last);
            self.states.release(state);
        }
        let Some(state) = self.take_checkpoint() else {
            return;
        };
        if let Some(sequence) = find(&mut self.slots, id) {
            self.states.windows.hold(state, &sequence.windows, at);
            let place = sequence.checkpoints.partition_point(|(n, _)| *n < at);
            sequence.checkpoints.insert(place, (at, state));
            sequence.prompt_end = Some(at);
        }
    }

    /// Takes a text back to `n_past` tokens after a pass that failed halfway.
    pub(crate) fn undo(&mut self, id: SequenceId, n_past: usize) {
        let Ok(sequence) = self.get(id) else { return };
        // Batches before the one that failed may have given back what is wanted now.
        let broken = !self.reaches(sequence, n_past);
        if let Ok(sequence) = self.get_mut(id) {
            sequence.broken = broken;
            sequence.tokens.truncate(n_past);
        }
        self.trim(id);
    }

    /// Gives back what was reserved for tokens that a text does not have.
    pub(crate) fn trim(&mut self, id: SequenceId) {
        let Ok(sequence) = self.get_mut(id) else {
            return;
        };
        let n_past = sequence.n_past();
        let keep = pages_for(n_past).min(sequence.pages.len());
        let pages = sequence.pages.split_off(keep);
        let keep = sequence
            .checkpoints
            .partition_point(|(at, _)| *at <= n_past);
        let checkpoints = sequence.checkpoints.split_off(keep);
        let coming = std::mem::take(&mut sequence.coming);
        let mut windows = std::mem::take(&mut sequence.windows);
        self.states.windows.cut(&mut windows, n_past);
        if let Ok(sequence) = self.get_mut(id) {
            sequence.windows = windows;
        }
        pages.iter().for_each(|page| self.pages.release(*page));
        for (_, state) in checkpoints.iter().chain(&coming) {
            self.states.release(*state);
        }
    }

    /// Has a text forget all tokens but the first `n`; does nothing where there are no more.
    ///
    /// # Errors
    /// When the text can't go back to `n` tokens: a layer has a recurrent state, or its window has
    /// gone on, and `n` is neither 0 nor all tokens nor a checkpoint. Nothing is forgotten then.
    pub(crate) fn truncate(&mut self, id: SequenceId, n: usize) -> Result<(), RunError> {
        let sequence = self.get(id)?;
        let (n_past, broken) = (sequence.n_past(), sequence.broken);
        if n > 0 && !broken && n >= n_past {
            return Ok(());
        }
        if self.nearest_checkpoint(sequence, n) == n {
            self.go_back(id, n)
        } else if broken {
            Err(RunError::Broken)
        } else {
            Err(RunError::CannotRewind { n_past, wanted: n })
        }
    }

    /// Has a text forget tokens until it has `n` or fewer: as many as it can go back to. Returns how
    /// many are left.
    ///
    /// # Errors
    /// When the text is unknown.
    pub(crate) fn rewind(&mut self, id: SequenceId, n: usize) -> Result<usize, RunError> {
        let sequence = self.get(id)?;
        if !sequence.broken && n >= sequence.n_past() {
            return Ok(sequence.n_past());
        }
        let n = self.nearest_checkpoint(sequence, n);
        self.go_back(id, n)?;
        Ok(n)
    }

    /// Returns the largest number of tokens up to `n` that a text can go back to.
    fn nearest_checkpoint(&self, sequence: &Sequence, n: usize) -> usize {
        let last = n.min(sequence.n_past());
        if self.reaches(sequence, last) {
            return last;
        }
        let before = sequence.checkpoints.iter().filter(|(at, _)| *at <= n);
        before.map(|(at, _)| *at).next_back().unwrap_or(0)
    }

    /// Goes back to `n` tokens: a checkpoint, or none.
    fn go_back(&mut self, id: SequenceId, n: usize) -> Result<(), RunError> {
        let sequence = self.get(id)?;
        let own = sequence.state;
        let state = sequence.checkpoints.iter().find(|(at, _)| *at == n);
        let state = state.map(|(_, state)| *state);
        let reaches = self.states.windows.reach(&sequence.windows, n);
        let windows = (!reaches).then(|| self.states.windows.begin_at(state));
        let sequence = self.get_mut(id)?;
        sequence.tokens.truncate(n);
        sequence.broken = false;
        if let Some(windows) = windows {
            let old = std::mem::replace(&mut sequence.windows, windows);
            self.states.windows.release(old);
        }
        let copied = match state {
            Some(state) => self.cache.copy_state(state, own),
            None => {
                let layers = self.cache.layers.iter_mut();
                layers.for_each(|layer| layer.reset(own));
                Ok(())
            }
        };
        if copied.is_err() {
            self.get_mut(id)?.broken = true;
        }
        self.trim(id);
        copied
    }
}
