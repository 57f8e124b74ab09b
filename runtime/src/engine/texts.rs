//! What programs do with the texts of an engine, apart from computing them.

use super::kept_files::KeptFiles;
use super::{Engine, Pages, SequenceId};
use crate::error::{LoadError, RunError};
use crate::layers::pages::PAGE;
use std::path::Path;

impl Engine {
    /// Adds an empty text.
    ///
    /// # Errors
    /// When the plan has no recurrent state left for it.
    pub fn add_sequence(&mut self) -> Result<SequenceId, RunError> {
        self.sequences.add()
    }

    /// Adds a text that begins with the first `n` tokens of another. The two share memory until
    /// they differ.
    ///
    /// # Errors
    /// As [`add_sequence`](Self::add_sequence); when the text is unknown, has fewer tokens, or has
    /// recurrent states or windows that have gone on, and `n` is neither 0 nor all its tokens nor a
    /// checkpoint.
    pub fn fork(&mut self, of: SequenceId, n: usize) -> Result<SequenceId, RunError> {
        self.sequences.fork(of, n)
    }

    /// Returns whether a text can be [forked](Self::fork) at any number of its tokens. With recurrent
    /// states or windows that is possible at checkpoints only.
    pub fn forks_anywhere(&self) -> bool {
        !self.sequences.needs_checkpoints()
    }

    /// Adds a text that begins with as many of `tokens` as are [kept](Self::keep_sequence): all but
    /// the last at most, so that there are logits to ask for. Returns how many it has.
    ///
    /// # Errors
    /// As [`add_sequence`](Self::add_sequence).
    pub fn begin_sequence(&mut self, tokens: &[u32]) -> Result<(SequenceId, usize), RunError> {
        self.sequences.begin(tokens)
    }

    /// Keeps what a text has so far for [texts to come](Self::begin_sequence) that begin with it,
    /// even after it is removed, until other texts want its memory.
    pub fn keep_sequence(&mut self, id: SequenceId) {
        self.sequences.keep(id);
    }

    /// Has kept texts go to a folder too, of up to `most_bytes`, so that they survive the program. It
    /// is made if it is missing. A file there that is damaged is removed and never used.
    ///
    /// # Errors
    /// When the folder can't be made or listed.
    pub fn keep_in(&mut self, folder: &Path, most_bytes: u64) -> Result<(), LoadError> {
        let mut depends_on = format!(
            "model {} cache {} kernels {} pages of {PAGE}",
            self.shape().id.hash,
            self.plan.kv_type,
            self.backends.kernels.isa().name()
        );
        let context = self.plan.context as usize;
        if self.spec().rotates_for_long_contexts(context) {
            depends_on = format!("{depends_on} for long contexts");
        }
        let windows = self.sequences.windows();
        if !windows.is_empty() {
            depends_on = format!("{depends_on} windows {windows}");
        }
        if let Some(gpus) = self.gpu_parts() {
            depends_on = format!("{depends_on} {gpus}");
        }
        let files = KeptFiles::open(folder, most_bytes, depends_on)?;
        self.sequences.keep_in(files);
        Ok(())
    }

    /// Returns what a GPU computes of the model, in words: sums are rounded in another order there,
    /// and rows of its layers lie otherwise.
    fn gpu_parts(&self) -> Option<String> {
        let places = &self.backends.processors.gpus.places;
        if !places.any() && self.experts.store.n_gpus() == 0 {
            return None;
        }
        let layers = places.layers.iter().zip(&self.spec().layers).enumerate();
        let mixers = layers.filter_map(|(layer, (at, spec))| {
            let on_gpu = at.mixer.is_some() && spec.has_mixer();
            let host_kv = if at.host_kv { " on the host" } else { "" };
            on_gpu.then(|| format!("{layer}{host_kv}"))
        });
        let mixers: Vec<String> = mixers.collect();
        if mixers.is_empty() {
            return Some("GPU".into());
        }
        Some(format!("GPU with attention of {}", mixers.join(",")))
    }

    /// Returns one sentence on files of kept texts that could not be used or written, if there were
    /// some since the last call.
    pub fn take_kept_notes(&mut self) -> Vec<String> {
        self.sequences.take_notes()
    }

    /// Removes a text, whose memory is free at once; does nothing if it was removed before.
    pub fn remove_sequence(&mut self, id: SequenceId) {
        self.sequences.remove(id);
    }

    /// Returns the number of tokens of a text, 0 if it was removed.
    pub fn n_past_of(&self, id: SequenceId) -> usize {
        self.sequences
            .get(id)
            .map_or(0, |sequence| sequence.n_past())
    }

    /// Has a text forget all tokens but the first `n`; does nothing where there are no more.
    ///
    /// # Errors
    /// As [`truncate`](Self::truncate), and when the text was removed.
    pub fn truncate_sequence(&mut self, id: SequenceId, n: usize) -> Result<(), RunError> {
        self.sequences.truncate(id, n)
    }

    /// Has a text forget tokens until it has `n` or fewer, and returns how many it has then. That is
    /// `n`, unless a layer has recurrent states, or a window that has gone on: then it is the last
    /// checkpoint before.
    ///
    /// # Errors
    /// When the text was removed.
    pub fn rewind_sequence(&mut self, id: SequenceId, n: usize) -> Result<usize, RunError> {
        self.sequences.rewind(id, n)
    }

    /// Returns how much of the KV cache is free.
    pub fn pages(&self) -> Pages {
        self.sequences.pages()
    }

    /// Begins the engine's own text, if it is empty, with as many of `tokens` as are kept: all but
    /// the last at most. Returns how many tokens it has then.
    ///
    /// # Errors
    /// As [`add_sequence`](Self::add_sequence).
    pub fn begin(&mut self, tokens: &[u32]) -> Result<usize, RunError> {
        if self.n_past() > 0 {
            return Ok(0);
        }
        self.clear();
        let (own, n) = self.sequences.begin(tokens)?;
        self.own = Some(own);
        Ok(n)
    }

    /// Keeps what the engine's own text has so far for texts to come.
    pub fn keep(&mut self) {
        if let Some(own) = self.own {
            self.sequences.keep(own);
        }
    }

    /// Returns the number of tokens in the context of the engine's own text.
    pub fn n_past(&self) -> usize {
        self.own.map_or(0, |own| self.n_past_of(own))
    }

    /// Returns how many tokens the context of a text may hold.
    pub fn context(&self) -> usize {
        self.sequences.context()
    }

    /// Lets the context of each text hold fewer tokens than planned; its memory stays as planned.
    pub fn limit_context(&mut self, context: u32) {
        self.sequences.limit(context as usize);
    }

    /// Forgets all tokens of the engine's own text but the first `n`; does nothing where there are
    /// no more.
    ///
    /// # Errors
    /// When a layer has one recurrent state for all past tokens, or a window that has gone on, and
    /// `n` is neither 0 nor all tokens nor a checkpoint. Nothing is forgotten then.
    pub fn truncate(&mut self, n: usize) -> Result<(), RunError> {
        self.own
            .map_or(Ok(()), |own| self.sequences.truncate(own, n))
    }

    /// Forgets tokens of the engine's own text as [`rewind_sequence`](Self::rewind_sequence) does.
    pub fn rewind(&mut self, n: usize) -> usize {
        let rewind = |own| self.sequences.rewind(own, n).unwrap_or(0);
        self.own.map_or(0, rewind)
    }

    /// Forgets all tokens of the engine's own text.
    pub fn clear(&mut self) {
        if let Some(own) = self.own.take() {
            self.sequences.remove(own);
        }
    }
}
