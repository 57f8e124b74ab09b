//! Generates many texts of an engine together: continuous batching for programs that serve.
//!
//! A [`Batcher`] owns what texts at work need beside the engine: a sampler, a decoder, and stop
//! strings each. [`crate::schedule`] decides which rows a step computes. A text begins with
//! what the engine has kept of it, or with what a text at work shares with it. It is kept when it
//! ends. A text has the same logits to the bit in any company, and a sampler of its own, so that its
//! tokens depend on its options alone.

mod drafts;
mod guide;
mod offers;
mod step;
#[cfg(test)]
mod tests;
mod text;

pub use guide::{Grammar, Guide};
pub use text::{Drawn, Finish, TextOptions, TokenText};

use crate::engine::draft::MAX_DRAFT;
use crate::engine::{Routing, SequenceId};
use crate::error::RunError;
use crate::schedule::{
    self, Limits, PAGE, Pages, Scheduler, StepCost, SubmitError, TextId, TextState,
};
use crate::tokenizer::Tokenizer;
use crate::{Engine, model::kv};
use guide::{Guided, Masks};
use offers::Sharer;
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use text::Live;

const _: () = assert!(PAGE == kv::PAGE as usize);

/// What happened to a text.
#[derive(Debug)]
pub enum Event {
    /// It was admitted for the first time.
    Begun {
        /// Tokens of the prompt that were not computed, since the KV cache had them.
        cached: usize,
    },
    /// A token was drawn.
    Drawn(Drawn),
    /// It cannot go on, and is gone.
    Failed(RunError),
}

/// What a step did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Step {
    /// Time of the step.
    pub took: Duration,
    /// Rows of prompts.
    pub prompt_rows: usize,
    /// Texts that decoded a token.
    pub decode_rows: usize,
    /// Texts that gave up their pages.
    pub preempted: usize,
    /// Tokens of texts that were admitted and not computed, since the KV cache had them.
    pub shared: usize,
    /// Tokens drawn.
    pub generated: usize,
    /// Tokens drafted.
    pub drafted: usize,
    /// Drafted tokens that were right.
    pub accepted: usize,
    /// Whether it was canceled; nothing has changed then.
    pub canceled: bool,
}

/// Rows of a text in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StepRows {
    /// The text.
    pub id: TextId,
    /// Tokens of its prompt.
    pub n_prompt: usize,
    /// Position of the first row.
    pub from: usize,
    /// Rows that were computed.
    pub n_computed: usize,
    /// Those of them that are the text's; the others are a draft that was wrong.
    pub n_kept: usize,
}

/// A text in the batcher, as programs show it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextStatus {
    /// The text.
    pub id: TextId,
    /// What it is doing.
    pub state: TextState,
    /// Tokens of the prompt.
    pub n_prompt: usize,
    /// Tokens generated.
    pub n_new: usize,
}

/// How texts are generated together.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Most texts at once.
    pub max_texts: usize,
    /// Most time between two tokens of a text, as far as prompts of others are concerned; `None` is
    /// the schedule's own.
    pub max_step: Option<Duration>,
    /// Most tokens per draft; 0 for no drafts. A model with recurrent states, or on a GPU, has none.
    pub max_drafts: usize,
    /// The first estimate of the time of steps, if they were predicted.
    pub cost: Option<StepCost>,
}

/// A text: what was asked for, and its work once it has begun.
struct Entry<'a> {
    options: Arc<TextOptions>,
    seed: u64,
    live: Option<Live<'a>>,
    has_begun: bool,
    /// Texts with which it begins alike.
    sharers: Vec<Sharer>,
}

/// Texts that are generated together.
pub struct Batcher<'a> {
    engine: &'a mut Engine,
    tokenizer: &'a Tokenizer,
    limits: Limits,
    scheduler: Scheduler,
    texts: HashMap<TextId, Entry<'a>>,
    started: Instant,
    next_id: u64,
    /// Tokens shared by the texts that the step at hand admits.
    shared: usize,
    /// Rows of the last step, unless a text failed in it.
    rows: Vec<StepRows>,
    scratch: Vec<f32>,
    /// Once a text has a grammar.
    masks: Option<Masks>,
}

impl<'a> Batcher<'a> {
    /// Creates a batcher without texts.
    pub fn new(engine: &'a mut Engine, tokenizer: &'a Tokenizer, options: Options) -> Self {
        let max_texts = texts_at_once(engine, options.max_texts);
        Self {
            limits: Limits {
                max_rows: engine.batch().max(max_texts),
                max_texts,
                max_step: options.max_step.unwrap_or(Limits::default().max_step),
                max_drafts: if engine.repeats() {
                    options.max_drafts.min(MAX_DRAFT)
                } else {
                    0
                },
            },
            engine,
            tokenizer,
            scheduler: Scheduler::with_cost(options.cost.unwrap_or_default()),
            texts: HashMap::new(),
            started: Instant::now(),
            next_id: 0,
            shared: 0,
            rows: Vec::new(),
            scratch: Vec::new(),
            masks: None,
        }
    }

    /// Returns how many texts are generated at once at most.
    pub fn max_texts(&self) -> usize {
        self.limits.max_texts
    }

    /// Returns the engine.
    pub fn engine(&mut self) -> &mut Engine {
        self.engine
    }

    /// Returns the experts that the rows of the last step chose, and these rows in their order: none
    /// where a text failed in it.
    pub fn routing(&self) -> (&Routing, &[StepRows]) {
        (self.engine.routing(), &self.rows)
    }

    /// Returns the pages of the KV cache.
    pub fn pages(&self) -> Pages {
        let pages = self.engine.pages();
        Pages {
            free: pages.free,
            total: pages.total,
        }
    }

    /// Whether no text is left.
    pub fn is_empty(&self) -> bool {
        self.scheduler.is_empty()
    }

    /// Returns the number of texts at work.
    pub fn n_running(&self) -> usize {
        self.scheduler.n_admitted()
    }

    /// Returns the number of texts that wait, preempted ones included.
    pub fn n_waiting(&self) -> usize {
        self.scheduler.len() - self.scheduler.n_admitted()
    }

    /// Adds `n` texts that differ in their seeds, and returns their names, which are consecutive.
    ///
    /// # Errors
    /// When even an empty cache could not hold one. Then none is added.
    pub fn submit(
        &mut self,
        options: &Arc<TextOptions>,
        n: usize,
    ) -> Result<Vec<TextId>, SubmitError> {
        let pages = self.pages();
        let first = self.next_id;
        let mut ids = Vec::with_capacity(n);
        for index in 0..n as u64 {
            let id = TextId(first + index);
            let request = schedule::Request {
                id,
                prompt: options.prompt.len(),
                max_new: options.max_new,
                arrival: self.started.elapsed(),
                ..schedule::Request::default()
            };
            // All are alike, so the first is refused or none.
            self.scheduler.submit(request, pages)?;
            let entry = Entry {
                options: Arc::clone(options),
                seed: options.sampling.seed.wrapping_add(index),
                live: None,
                has_begun: false,
                sharers: self.sharers_of(&options.prompt),
            };
            for sharer in &entry.sharers {
                self.scheduler.set_shared(id, sharer.with, sharer.n_tokens);
            }
            self.texts.insert(id, entry);
            ids.push(id);
        }
        self.next_id = first + n as u64;
        Ok(ids)
    }

    /// Ends a text, if there is one of that name. What is computed of it is kept.
    pub fn cancel(&mut self, id: TextId) {
        self.scheduler.cancel(id);
        self.remove(id);
    }

    /// Ends a text, if there is one of that name, and keeps nothing of it: its state can't be trusted.
    pub fn discard(&mut self, id: TextId) {
        self.scheduler.cancel(id);
        if let Some(sequence) = self.sequence(id) {
            self.engine.remove_sequence(sequence);
        }
        self.texts.remove(&id);
    }

    /// Returns the texts by name.
    pub fn statuses(&self) -> Vec<TextStatus> {
        let status = |(id, entry): (&TextId, &Entry<'_>)| {
            Some(TextStatus {
                id: *id,
                state: self.scheduler.state(*id)?,
                n_prompt: entry.options.prompt.len(),
                n_new: entry.live.as_ref().map_or(0, Live::n_new),
            })
        };
        let mut all: Vec<TextStatus> = self.texts.iter().filter_map(status).collect();
        all.sort_unstable_by_key(|status| status.id);
        all
    }

    fn sequence(&self, id: TextId) -> Option<SequenceId> {
        self.texts.get(&id)?.live.as_ref()?.sequence
    }

    fn live_mut(&mut self, id: TextId) -> Option<&mut Live<'a>> {
        self.texts.get_mut(&id)?.live.as_mut()
    }

    /// Makes a text that waits ready to be generated.
    ///
    /// # Errors
    /// When it has a grammar, and the system refuses the thread of masks.
    fn make_live(&mut self, id: TextId) -> Result<(), RunError> {
        let Some(entry) = self.texts.get_mut(&id) else {
            return Ok(());
        };
        if entry.live.is_none() {
            let guided = match &entry.options.grammar {
                None => None,
                Some(grammar) => {
                    let masks = match &self.masks {
                        Some(masks) => masks.clone(),
                        None => self.masks.insert(Masks::start()?).clone(),
                    };
                    Some(Guided::new(grammar, masks))
                }
            };
            let mut live = Live::new(&entry.options, entry.seed, self.tokenizer);
            live.guided = guided;
            entry.live = Some(live);
        }
        Ok(())
    }

    /// Takes a text out of the engine, which keeps what is computed of it.
    fn remove(&mut self, id: TextId) {
        if let Some(sequence) = self.sequence(id) {
            self.engine.keep_sequence(sequence);
            self.engine.remove_sequence(sequence);
        }
        self.texts.remove(&id);
    }
}

/// Returns how many texts an engine takes at once, up to `most`.
pub fn texts_at_once(engine: &mut Engine, most: usize) -> usize {
    let plan = engine.plan();
    // Where one text has all pages, the last may be smaller than the others.
    if plan.sequences == 1 && !plan.context.is_multiple_of(kv::PAGE) {
        return 1;
    }
    // Recurrent states are for as many texts as planned.
    let texts: Vec<SequenceId> = (0..most)
        .map_while(|_| engine.add_sequence().ok())
        .collect();
    texts.iter().for_each(|id| engine.remove_sequence(*id));
    texts.len().max(1)
}
