//! Beginnings of texts that are kept for texts to come: in the cache, and in files.

use super::super::kept_files::{Kept, KeptFiles};
use super::super::prefixes::Found;
use super::{Sequence, SequenceId, Sequences};
use crate::error::RunError;
use crate::layers::mixer::LayerCache;
use crate::layers::pages::{PAGE, StateIdx};

impl Sequences {
    /// Adds a text that begins with what is kept of `tokens`: all but the last of them at most.
    /// Returns how many tokens it has.
    ///
    /// # Errors
    /// As [`add`](Self::add).
    pub(crate) fn begin(&mut self, tokens: &[u32]) -> Result<(SequenceId, usize), RunError> {
        let most = tokens.len().saturating_sub(1).min(self.context);
        let found = if self.on_gpu {
            Found::default()
        } else {
            self.load_kept(tokens, most);
            self.prefixes.find(tokens, most, !self.can_rewind)
        };
        let n = found.n;
        Ok((self.add_with(&tokens[..n], found, true)?, n))
    }

    /// Keeps what a text has so far for later texts that begin with it.
    pub(crate) fn keep(&mut self, id: SequenceId) {
        let Ok(sequence) = self.get(id) else { return };
        let (n_past, state) = (sequence.n_past(), sequence.state);
        if sequence.broken || self.on_gpu || n_past == 0 {
            return;
        }
        let is_here = |(at, _): &(usize, StateIdx)| *at == n_past;
        let has_checkpoint = sequence.checkpoints.iter().any(is_here);
        if self.has_states
            && !has_checkpoint
            && let Some(copy) = self.take_checkpoint()
        {
            for layer in &mut self.cache.layers {
                layer.copy_state(state, copy);
            }
            if let Ok(sequence) = self.get_mut(id) {
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
                save_kept(files, sequence, &self.cache.layers);
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
        if !self.can_rewind {
            let has_state = |n: &usize| files.has(Kept::State, &tokens[..n * PAGE]);
            state_at = (1..=end).rev().find(has_state);
            end = state_at.unwrap_or(first);
        }
        let (page_bytes, state_bytes) = self.saved_bytes();
        let mut pages = known.pages[..first.min(known.pages.len())].to_vec();
        // They must not be given up for the new ones.
        pages.iter().for_each(|page| self.pages.share(*page));
        while pages.len() < end {
            let prefix = &tokens[..(pages.len() + 1) * PAGE];
            let Some(page) = self.take_page(PAGE) else {
                break;
            };
            let read = |files: &mut KeptFiles| files.read(Kept::Page, prefix, page_bytes);
            let Some(bytes) = self.files.as_mut().and_then(read) else {
                self.pages.release(page);
                break;
            };
            let layers = self.cache.layers.iter_mut();
            layers.fold(&bytes[..], |bytes, layer| layer.load_page(page, bytes));
            pages.push(page);
        }
        let mut states = Vec::new();
        if let Some(at) = state_at.filter(|at| *at <= pages.len())
            && let Some(state) = self.take_checkpoint()
        {
            let prefix = &tokens[..at * PAGE];
            let read = |files: &mut KeptFiles| files.read(Kept::State, prefix, state_bytes);
            match self.files.as_mut().and_then(read) {
                Some(bytes) => {
                    let layers = self.cache.layers.iter_mut();
                    layers.fold(&bytes[..], |bytes, layer| layer.load_state(state, bytes));
                    states.push((at * PAGE, state));
                }
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

    /// Returns the bytes of a full page of all layers, and of their recurrent states.
    fn saved_bytes(&self) -> (usize, usize) {
        let layers = self.cache.layers.iter().map(LayerCache::saved_bytes);
        layers.fold((0, 0), |sum, layer| (sum.0 + layer.0, sum.1 + layer.1))
    }
}

/// Writes a text's full pages, and the states between them, to files.
fn save_kept(files: &mut KeptFiles, sequence: &Sequence, layers: &[LayerCache]) {
    for (index, page) in sequence.pages.iter().enumerate() {
        let end = (index + 1) * PAGE;
        if end > sequence.n_past() {
            break;
        }
        let tokens = &sequence.tokens[..end];
        files.write(Kept::Page, tokens, || {
            let mut bytes = Vec::new();
            layers
                .iter()
                .for_each(|layer| layer.save_page(*page, &mut bytes));
            bytes
        });
        if let Some((_, state)) = sequence.checkpoints.iter().find(|(at, _)| *at == end) {
            files.write(Kept::State, tokens, || {
                let mut bytes = Vec::new();
                layers
                    .iter()
                    .for_each(|layer| layer.save_state(*state, &mut bytes));
                bytes
            });
        }
    }
}
