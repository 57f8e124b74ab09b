//! Pages and states for tokens that a text is about to take.

use super::{SequenceId, Sequences, WHOLE};
use crate::error::RunError;
use crate::layers::pages::{PAGE, PageIdx, pages_for};

impl Sequences {
    /// Gives a text the pages for `n` more tokens, none of them shared where those tokens go, and
    /// states for the checkpoints on the way.
    ///
    /// # Errors
    /// When the text is unknown or unusable, would be too long, too few pages are free, or a GPU
    /// fails; the text is as before then.
    pub(crate) fn reserve(&mut self, id: SequenceId, n: usize) -> Result<(), RunError> {
        let (context, sequence) = (self.context, self.get(id)?);
        if sequence.broken {
            return Err(RunError::Broken);
        }
        let (n_past, had) = (sequence.n_past(), sequence.pages.len());
        let wanted = n_past.saturating_add(n);
        if wanted > context {
            return Err(RunError::ContextFull { wanted, context });
        }
        let is_own = |page: &PageIdx| !self.pages.is_shared(*page);
        let missing: Vec<usize> = (n_past / PAGE..pages_for(wanted))
            .filter(|index| !sequence.pages.get(*index).is_some_and(is_own))
            .collect();
        let mut new = Vec::with_capacity(missing.len());
        for index in &missing {
            let Some(page) = self.take_page((context - index * PAGE).min(PAGE)) else {
                new.iter().for_each(|(_, page)| self.pages.release(*page));
                return Err(RunError::NoPages {
                    wanted: missing.len(),
                    free: self.pages().free,
                });
            };
            new.push((*index, page));
        }
        let mut new = new.into_iter();
        while let Some((index, taken)) = new.next() {
            if index >= had {
                self.get_mut(id)?.pages.push(taken);
                continue;
            }
            let shared = std::mem::replace(&mut self.get_mut(id)?.pages[index], taken);
            let len = n_past.saturating_sub(index * PAGE).min(PAGE);
            if let Err(error) = self.cache.copy_page(WHOLE, shared, taken, len) {
                // The page that is shared still has what the text needs.
                self.get_mut(id)?.pages[index] = shared;
                self.pages.release(taken);
                new.for_each(|(_, page)| self.pages.release(page));
                return Err(error);
            }
            self.pages.release(shared);
        }
        self.reserve_checkpoints(id, n_past, wanted)
    }

    fn reserve_checkpoints(
        &mut self,
        id: SequenceId,
        n_past: usize,
        wanted: usize,
    ) -> Result<(), RunError> {
        let Some(spacing) = self.spacing else {
            return Ok(());
        };
        for at in (1..=wanted / spacing).map(|i| i * spacing) {
            if at <= n_past {
                continue;
            }
            let Some(state) = self.take_checkpoint() else {
                break;
            };
            self.get_mut(id)?.coming.push((at, state));
        }
        Ok(())
    }

    /// Gives texts the pages of windows for the tokens of the batch at hand, and takes back what no
    /// token to come sees.
    ///
    /// # Errors
    /// When a text is unknown. Pages are as many as the plan's texts want.
    pub(crate) fn reserve_windows(
        &mut self,
        parts: impl Iterator<Item = (SequenceId, usize)>,
    ) -> Result<(), RunError> {
        if self.states.windows.is_empty() {
            return Ok(());
        }
        for sequence in self.slots.iter_mut().filter_map(|s| s.sequence.as_mut()) {
            self.states.windows.narrow(&mut sequence.windows);
        }
        for (id, n) in parts {
            let past = self.get(id)?.n_past();
            let mut lists = std::mem::take(&mut self.get_mut(id)?.windows);
            let copies = self.states.windows.reserve(&mut lists, past, n);
            self.get_mut(id)?.windows = lists;
            let copies = copies.ok_or(RunError::NoPages {
                wanted: pages_for(n),
                free: 0,
            })?;
            for copy in copies {
                let kind = copy.kind + 1;
                self.cache.copy_page(kind, copy.from, copy.to, copy.len)?;
            }
        }
        Ok(())
    }
}
