//! A step of all texts at work.

use super::text::Live;
use super::{Batcher, Drawn, Event, Step, StepRows};
use crate::engine::{LogitsMode, Rows, SequenceId};
use crate::error::RunError;
use crate::schedule::{StepPlan, TextId, TextOutcome, TextRows};
use std::time::Instant;

/// What came of the rows of a step.
#[derive(Default)]
struct Came {
    texts: Vec<CameText>,
    failed: Vec<(TextId, RunError)>,
    /// Texts whose drafts were wrong, and the tokens that are left of them.
    wrong: Vec<Wrong>,
    drafted: usize,
    accepted: usize,
}

/// What was drawn of a text, in order.
struct CameText {
    id: TextId,
    drawn: Vec<Drawn>,
    new_tokens: usize,
}

/// A text whose draft was wrong.
struct Wrong {
    id: TextId,
    sequence: SequenceId,
    n_left: usize,
}

impl Batcher<'_> {
    /// Takes one step, and reports what came of it. Does nothing where no text is left. A text that
    /// cannot go on is reported and removed; the others are as they would be without it.
    ///
    /// # Errors
    /// When the step fails for all texts. They are as before it.
    pub fn step(&mut self, on_event: &mut dyn FnMut(TextId, Event)) -> Result<Step, RunError> {
        if self.scheduler.is_empty() {
            return Ok(Step::default());
        }
        self.draft();
        self.shared = 0;
        self.rows.clear();
        let plan = self.plan(on_event);
        self.release(&plan);
        let step = Step {
            preempted: plan.preempt.len(),
            shared: self.shared,
            ..Step::default()
        };
        if plan.rows.is_empty() {
            if plan.pages_wanted > 0 {
                self.drop_first(plan.pages_wanted, on_event);
            }
            return Ok(step);
        }
        let start = Instant::now();
        let mut came = Came::default();
        let taken = self.take(&plan, &mut came);
        if taken.is_err() {
            self.scheduler.abandoned();
        }
        // Texts without a place are gone in any case.
        for (id, error) in came.failed.drain(..) {
            self.discard(id);
            on_event(id, Event::Failed(error));
        }
        let is_decode = |row: &&TextRows| row.n_tokens == 1 && row.wants_logits;
        let decode_rows = plan.rows.iter().filter(is_decode).count();
        let step = Step {
            prompt_rows: plan.rows.iter().map(|r| r.n_tokens).sum::<usize>() - decode_rows,
            decode_rows,
            generated: came.texts.iter().map(|text| text.new_tokens).sum(),
            drafted: came.drafted,
            accepted: came.accepted,
            canceled: matches!(taken, Err(RunError::Canceled)),
            ..step
        };
        match taken {
            Ok(()) => self.finish(start, &plan, came, on_event),
            Err(RunError::Canceled) => {}
            Err(error) => return Err(error),
        }
        Ok(Step {
            took: start.elapsed(),
            ..step
        })
    }

    /// Tells the schedule what came of a step, and reports it.
    fn finish(
        &mut self,
        start: Instant,
        plan: &StepPlan,
        came: Came,
        on_event: &mut dyn FnMut(TextId, Event),
    ) {
        self.keep_whole_pages(plan);
        let outcome = |text: &CameText| TextOutcome {
            id: text.id,
            new_tokens: text.new_tokens,
            ended: text.drawn.iter().any(|drawn| drawn.finish.is_some()),
        };
        let outcomes: Vec<TextOutcome> = came.texts.iter().map(outcome).collect();
        self.scheduler.finished(start.elapsed(), &outcomes);
        for (text, outcome) in came.texts.into_iter().zip(&outcomes) {
            if outcome.ended {
                self.remove(text.id);
            }
            for drawn in text.drawn {
                on_event(text.id, Event::Drawn(drawn));
            }
        }
    }

    /// Takes the rows of a step through the engine, and draws tokens of each text that wants one.
    fn take(&mut self, plan: &StepPlan, came: &mut Came) -> Result<(), RunError> {
        let mut placed = Vec::with_capacity(plan.rows.len());
        for row in &plan.rows {
            match self.place(row.id, row.from) {
                Ok(sequence) => placed.push((row, sequence, self.tokens_of(row))),
                Err(error) => came.failed.push((row.id, error)),
            }
        }
        if placed.is_empty() {
            return Ok(());
        }
        let rows = placed.iter().map(|(row, sequence, tokens)| {
            // A draft follows one token alone.
            let has_draft = tokens.len() > row.n_tokens;
            let mode = if has_draft {
                LogitsMode::All
            } else {
                LogitsMode::Last
            };
            Rows {
                sequence: *sequence,
                tokens,
                logits: row.wants_logits.then_some(mode),
            }
        });
        let n_vocab = self.engine.spec().n_vocab.max(1);
        let mut step_rows = self.rows_of(&placed);
        let results = self.engine.step_apart(&rows.collect::<Vec<_>>())?;
        for ((row, sequence, tokens), logits) in placed.iter().zip(results) {
            let draft = &tokens[row.n_tokens..];
            let live = self.texts.get_mut(&row.id).and_then(|e| e.live.as_mut());
            let Some(live) = live else { continue };
            let logits = match logits {
                Ok(logits) => logits,
                // Without its draft it may go on: the step is computed again.
                Err(_) if !draft.is_empty() => {
                    live.drafts = false;
                    step_rows.clear();
                    continue;
                }
                Err(error) => {
                    came.failed.push((row.id, error));
                    step_rows.clear();
                    continue;
                }
            };
            if !row.wants_logits {
                continue;
            }
            let text = draw(
                row.id,
                live,
                logits.chunks(n_vocab),
                draft,
                &mut self.scratch,
            );
            let text = match text {
                Ok(text) => text,
                Err(error) => {
                    came.failed.push((row.id, error));
                    continue;
                }
            };
            let right = text.new_tokens.saturating_sub(1).min(draft.len());
            came.drafted += draft.len();
            came.accepted += right;
            live.acceptance.count(draft.len(), right);
            if right < draft.len() {
                came.wrong.push(Wrong {
                    id: row.id,
                    sequence: *sequence,
                    n_left: row.from + row.n_tokens + right,
                });
            }
            came.texts.push(text);
        }
        for wrong in came.wrong.drain(..) {
            if let Some(rows) = step_rows.iter_mut().find(|rows| rows.id == wrong.id) {
                rows.n_kept = wrong.n_left - rows.from;
            }
            let cut = self.engine.truncate_sequence(wrong.sequence, wrong.n_left);
            if let Err(error) = cut {
                came.failed.push((wrong.id, error));
            }
        }
        self.rows = step_rows;
        Ok(())
    }

    /// Returns the rows of a step as if no draft was wrong.
    fn rows_of(&self, placed: &[(&TextRows, SequenceId, Vec<u32>)]) -> Vec<StepRows> {
        let rows = placed.iter().map(|(row, _, tokens)| StepRows {
            id: row.id,
            n_prompt: self
                .texts
                .get(&row.id)
                .map_or(0, |e| e.options.prompt.len()),
            from: row.from,
            n_computed: tokens.len(),
            n_kept: tokens.len(),
        });
        rows.collect()
    }

    /// Returns the tokens of rows, and their draft.
    fn tokens_of(&self, row: &TextRows) -> Vec<u32> {
        let live = self.texts.get(&row.id).and_then(|e| e.live.as_ref());
        live.map_or_else(Vec::new, |live| {
            let draft = &live.draft[..row.drafts.min(live.draft.len())];
            [&live.tokens[row.from..row.from + row.n_tokens], draft].concat()
        })
    }

    /// Gives a text its place in the engine, unless it has one.
    fn place(&mut self, id: TextId, from: usize) -> Result<SequenceId, RunError> {
        self.make_live(id)?;
        let live = self.texts.get_mut(&id).and_then(|e| e.live.as_mut());
        let live = live.ok_or(RunError::NoText)?;
        match live.sequence {
            Some(sequence) => Ok(sequence),
            None if from == 0 => Ok(*live.sequence.insert(self.engine.add_sequence()?)),
            None => Err(RunError::NoText),
        }
    }

    /// Gives up the first text where the cache has no room for any: something outside the schedule
    /// holds pages.
    fn drop_first(&mut self, wanted: usize, on_event: &mut dyn FnMut(TextId, Event)) {
        let first = self.scheduler.upcoming().next();
        if let Some(id) = first.or_else(|| self.texts.keys().min().copied()) {
            let free = self.pages().free;
            self.cancel(id);
            on_event(id, Event::Failed(RunError::NoPages { wanted, free }));
        }
    }
}

/// Draws the next token of a text, and those after it as long as they are what was drafted. Each is
/// drawn as it would be without a draft.
fn draw<'l>(
    id: TextId,
    live: &mut Live<'_>,
    logits: impl Iterator<Item = &'l [f32]>,
    draft: &[u32],
    scratch: &mut Vec<f32>,
) -> Result<CameText, RunError> {
    let before = live.n_new();
    let mut all = Vec::new();
    for (place, logits) in logits.enumerate() {
        let drawn = live.draw(logits, scratch)?;
        let ends = drawn.finish.is_some();
        all.push(drawn);
        if ends || live.tokens.last() != draft.get(place) {
            break;
        }
    }
    Ok(CameText {
        id,
        drawn: all,
        new_tokens: live.n_new() - before,
    })
}
