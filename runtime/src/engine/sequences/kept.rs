//! Beginnings of texts that are kept for texts to come: in the cache, and in files.

use super::super::kept_files::{Kept, KeptFiles};
use super::{Cache, Sequence, SequenceId, Sequences, States, WHOLE, find};
use crate::error::RunError;
use crate::layers::pages::{PAGE, StateIdx};

impl Sequences {
    /// Adds a text that begins with what is kept of `tokens`: all but the last of them at most.
    /// Returns how many tokens it has.
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub(crate) fn begin(&mut self, tokens: &[u32]) -> Result<(SequenceId, usize), RunError> {
        let most = tokens.len().saturating_sub(1).min(self.context);
        self.load_kept(tokens, most);
        let needs_checkpoints = self.needs_checkpoints();
        let found = self.prefixes.find(tokens, most, needs_checkpoints);
        let n = found.n;
        let windows = self.states.windows.begin_at(found.state);
        Ok((self.add_with(&tokens[..n], found, windows, true)?, n))
    }

    /// Keeps what a text has so far for later texts that begin with it.
    pub(crate) fn keep(&mut self, id: SequenceId) {
        let Ok(sequence) = self.get(id) else { return };
        let (n_past, state) = (sequence.n_past(), sequence.state);
        if sequence.broken || n_past == 0 {
            return;
        }
        let is_here = |(at, _): &(usize, StateIdx)| *at == n_past;
        let has_checkpoint = sequence.checkpoints.iter().any(is_here);
        if self.has_states
            && !has_checkpoint
            && let Some(copy) = self.take_checkpoint()
        {
            if self.cache.copy_state(state, copy).is_err() {
                self.states.release(copy);
            } else if let Some(sequence) = find(&mut self.slots, id) {
                self.states.windows.hold(copy, &sequence.windows, n_past);
                sequence.checkpoints.push((n_past, copy));
            }
        }
        let slot = &self.slots[id.index as usize];
        if let Some(sequence) = &slot.sequence {
            self.prefixes.keep(
                &sequence.tokens,
                &sequence.pages,
                &sequence.checkpoints,
                (&mut self.pages, &mut self.states),
            );
            if let Some(files) = &mut self.files {
                save_kept(files, sequence, &self.cache, &self.states);
            }
        }
    }

    /// Has kept beginnings go to files too.
    pub(crate) fn keep_in(&mut self, files: KeptFiles) {
        self.files = Some(files);
    }

    /// Returns what is to be said about files, and forgets it.
    pub(crate) fn take_notes(&mut self) -> Vec<String> {
        self.files
            .as_mut()
            .map_or_else(Vec::new, KeptFiles::take_notes)
    }

    /// Reads pages of a text's first `most` tokens that are only in files, and the last states.
    fn load_kept(&mut self, tokens: &[u32], most: usize) {
        let Some(files) = &self.files else { return };
        let known = self.prefixes.find(tokens, most, false);
        let first = known.n / PAGE;
        let is_there = |n: &usize| files.has(Kept::Page, &tokens[..n * PAGE]);
        let whole = tokens.len().min(most) / PAGE;
        let mut end = (first + 1..=whole)
            .take_while(is_there)
            .last()
            .unwrap_or(first);
        let mut state_at = None;
        if self.needs_checkpoints() {
            let has_state = |n: &usize| files.has(Kept::State, &tokens[..n * PAGE]);
            state_at = (1..=end).rev().find(has_state);
            end = state_at.unwrap_or(first);
        }
        let page_bytes = self.page_bytes(WHOLE);
        let mut pages = known.pages[..first.min(known.pages.len())].to_vec();
        // They must not be given up for the new ones.
        pages.iter().for_each(|page| self.pages.share(*page));
        let mut files = self.files.take();
        if let Some(files) = &mut files {
            let beginnings = (pages.len()..end).map(|page| &tokens[..(page + 1) * PAGE]);
            files.read_each(Kept::Page, beginnings, page_bytes, |bytes| {
                let Some(page) = self.take_page(PAGE) else {
                    return false;
                };
                let mut layers = self.cache.of_kind_mut(WHOLE);
                let loaded =
                    layers.try_fold(&bytes[..], |bytes, layer| layer.load_page(page, bytes).ok());
                match loaded {
                    Some(_) => pages.push(page),
                    None => self.pages.release(page),
                }
                loaded.is_some()
            });
        }
        self.files = files;
        let mut states = Vec::new();
        if let Some(at) = state_at.filter(|at| *at <= pages.len())
            && let Some(state) = self.take_checkpoint()
        {
            match self.load_state(state, &tokens[..at * PAGE]) {
                Some(()) => states.push((at * PAGE, state)),
                None => self.states.release(state),
            }
        }
        let tokens = &tokens[..pages.len() * PAGE];
        let pools = (&mut self.pages, &mut self.states);
        self.prefixes.keep(tokens, &pages, &states, pools);
        pages.iter().for_each(|page| self.pages.release(*page));
        states
            .iter()
            .for_each(|(_, state)| self.states.release(*state));
    }

    /// Reads the recurrent states after some tokens, and the pages of windows there, if they are in a
    /// file.
    fn load_state(&mut self, state: StateIdx, tokens: &[u32]) -> Option<()> {
        let held = self.states.windows.held_pages(tokens.len()).enumerate();
        let held = held.map(|(kind, pages)| pages * self.page_bytes(kind + 1));
        let states = self.cache.layers.iter().map(|layer| layer.saved_bytes().1);
        let len = states.chain(held).sum();
        let bytes = self.files.as_mut()?.read(Kept::State, tokens, len)?;
        let pages = self.states.windows.hold_new(state, tokens.len())?;
        let mut layers = self.cache.layers.iter_mut();
        let mut bytes = layers.try_fold(&bytes[..], |bytes, layer| {
            layer.load_state(state, bytes).ok()
        })?;
        for (kind, pages) in pages.iter().enumerate() {
            for page in pages {
                let mut layers = self.cache.of_kind_mut(kind + 1);
                bytes =
                    layers.try_fold(bytes, |bytes, layer| layer.load_page(*page, bytes).ok())?;
            }
        }
        Some(())
    }

    /// Returns the bytes of a full page of all layers of a kind.
    fn page_bytes(&self, kind: usize) -> usize {
        let layers = self.cache.of_kind(kind);
        layers.map(|layer| layer.saved_bytes().0).sum()
    }
}

/// Writes a text's full pages, and the states and windows between them, to files.
fn save_kept(files: &mut KeptFiles, sequence: &Sequence, cache: &Cache, states: &States) {
    for (index, page) in sequence.pages.iter().enumerate() {
        let end = (index + 1) * PAGE;
        if end > sequence.n_past() {
            break;
        }
        let tokens = &sequence.tokens[..end];
        files.write(Kept::Page, tokens, || {
            let mut bytes = Vec::new();
            let mut layers = cache.of_kind(WHOLE);
            layers.try_for_each(|layer| layer.save_page(*page, &mut bytes))?;
            Ok(bytes)
        });
        if let Some((_, state)) = sequence.checkpoints.iter().find(|(at, _)| *at == end) {
            files.write(Kept::State, tokens, || {
                let mut bytes = Vec::new();
                let mut layers = cache.layers.iter();
                layers.try_for_each(|layer| layer.save_state(*state, &mut bytes))?;
                for (kind, pages) in states.windows.held(*state).enumerate() {
                    for page in pages {
                        let mut layers = cache.of_kind(kind + 1);
                        layers.try_for_each(|layer| layer.save_page(*page, &mut bytes))?;
                    }
                }
                Ok(bytes)
            });
        }
    }
}
