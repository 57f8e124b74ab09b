//! A step of all texts at work.

use super::{Batcher, Drawn, Event, Step};
use crate::engine::{LogitsMode, Rows};
use crate::error::RunError;
use crate::schedule::{StepPlan, TextId, TextOutcome, TextRows};
use std::time::Instant;

/// What came of the rows of a step.
#[derive(Default)]
struct Came {
    drawn: Vec<(TextId, Drawn)>,
    failed: Vec<(TextId, RunError)>,
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
        let plan = self.plan(on_event);
        self.release(&plan);
        let preempted = plan.preempt.len();
        if plan.rows.is_empty() {
            if plan.pages_wanted > 0 {
                self.drop_first(plan.pages_wanted, on_event);
            }
            return Ok(Step {
                preempted,
                ..Step::default()
            });
        }
        let start = Instant::now();
        let mut came = Came::default();
        let mut placed = Vec::with_capacity(plan.rows.len());
        for row in &plan.rows {
            match self.place(row.id, row.from) {
                Ok(()) => placed.push(*row),
                Err(error) => came.failed.push((row.id, error)),
            }
        }
        let taken = self.take(&placed, &mut came);
        if taken.is_err() {
            self.scheduler.abandoned();
        }
        // Texts without a place are gone in any case.
        for (id, error) in came.failed.drain(..) {
            self.discard(id);
            on_event(id, Event::Failed(error));
        }
        let canceled = match taken {
            Ok(()) => false,
            Err(RunError::Canceled) => true,
            Err(error) => return Err(error),
        };
        if !canceled {
            self.finish(start, &plan, came, on_event);
        }
        let is_decode = |row: &&TextRows| row.n_tokens == 1 && row.wants_logits;
        let decode_rows = plan.rows.iter().filter(is_decode).count();
        Ok(Step {
            took: start.elapsed(),
            prompt_rows: plan.rows.iter().map(|r| r.n_tokens).sum::<usize>() - decode_rows,
            decode_rows,
            preempted,
            canceled,
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
        let outcome = |(id, drawn): &(TextId, Drawn)| TextOutcome {
            id: *id,
            // An end token is not one of the text's.
            new_tokens: usize::from(drawn.finish != Some(super::Finish::EndToken)),
            ended: drawn.finish.is_some(),
        };
        let outcomes: Vec<TextOutcome> = came.drawn.iter().map(outcome).collect();
        self.scheduler.finished(start.elapsed(), &outcomes);
        for (id, drawn) in came.drawn {
            if drawn.finish.is_some() {
                self.remove(id);
            }
            on_event(id, Event::Drawn(drawn));
        }
    }

    /// Takes rows through the engine and draws a token of each text that wants one.
    fn take(&mut self, placed: &[TextRows], came: &mut Came) -> Result<(), RunError> {
        let mut rows = Vec::with_capacity(placed.len());
        let mut taken = Vec::with_capacity(placed.len());
        for row in placed {
            let live = self
                .texts
                .get(&row.id)
                .and_then(|entry| entry.live.as_ref());
            let Some((live, sequence)) = live.and_then(|live| Some((live, live.sequence?))) else {
                continue;
            };
            rows.push(Rows {
                sequence,
                tokens: &live.tokens[row.from..row.from + row.n_tokens],
                logits: row.wants_logits.then_some(LogitsMode::Last),
            });
            taken.push(row);
        }
        if rows.is_empty() {
            return Ok(());
        }
        let results = self.engine.step_apart(&rows)?;
        drop(rows);
        for (row, logits) in taken.into_iter().zip(results) {
            match logits {
                Err(error) => came.failed.push((row.id, error)),
                Ok(logits) if row.wants_logits => {
                    let live = self.texts.get_mut(&row.id).and_then(|e| e.live.as_mut());
                    if let Some(live) = live {
                        came.drawn
                            .push((row.id, live.draw(logits, &mut self.scratch)));
                    }
                }
                Ok(_) => {}
            }
        }
        Ok(())
    }

    /// Gives a text its place in the engine, unless it has one.
    fn place(&mut self, id: TextId, from: usize) -> Result<(), RunError> {
        self.make_live(id);
        if let Some(live) = self.texts.get_mut(&id).and_then(|e| e.live.as_mut())
            && live.sequence.is_none()
            && from == 0
        {
            live.sequence = Some(self.engine.add_sequence()?);
        }
        Ok(())
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
