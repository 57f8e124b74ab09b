//! A step of all texts at work.

use super::{Batch, Finish, Live};
use anyhow::{Result, bail};
use std::time::Instant;
use tier_plan_runtime::RunError;
use tier_plan_runtime::engine::{LogitsMode, Rows};
use tier_plan_runtime::schedule::{StepPlan, TextId, TextOutcome, TextRows};

/// Texts that cannot go on, each with the reason.
type Failures = Vec<(TextId, RunError)>;

impl Batch<'_> {
    /// Takes a step through the engine, and draws the tokens that come of it. A text that cannot go
    /// on is refused; the others are as they would be without it.
    pub(super) fn compute(&mut self, plan: &StepPlan) -> Result<()> {
        let start = Instant::now();
        let mut failed = Failures::new();
        let mut placed = Vec::with_capacity(plan.rows.len());
        for row in &plan.rows {
            match self.place(row.id, row.from) {
                Ok(()) => placed.push(*row),
                Err(error) => failed.push((row.id, error)),
            }
        }
        let Some(outcomes) = self.take(&placed, &mut failed)? else {
            self.summary.interrupted = true;
            self.scheduler.abandoned();
            return Ok(());
        };
        for (id, error) in &failed {
            self.fail(*id, error)?;
        }
        self.keep_whole_pages(plan);
        let took = start.elapsed();
        self.summary.took += took;
        let came: Vec<TextOutcome> = outcomes.iter().map(|o| o.outcome).collect();
        self.scheduler.finished(took, &came);
        outcomes
            .into_iter()
            .filter_map(|drawn| Some((drawn.outcome.id, drawn.finish?)))
            .try_for_each(|(id, finish)| self.end(id, finish))
    }

    /// Takes rows through the engine and draws a token of each text that wants one. Returns `None`
    /// after a signal.
    fn take(&mut self, placed: &[TextRows], failed: &mut Failures) -> Result<Option<Vec<Drawn>>> {
        let mut tokens = Vec::with_capacity(placed.len());
        for row in placed {
            let live = &self.live[&row.id];
            let end = row.from + row.n_tokens;
            let draft = &live.draft[..row.drafts.min(live.draft.len())];
            tokens.push([&live.tokens[row.from..end], draft].concat());
        }
        let mut rows = Vec::with_capacity(placed.len());
        for (row, tokens) in placed.iter().zip(&tokens) {
            let Some(sequence) = self.live[&row.id].sequence else {
                bail!("a text of the step is not in the engine");
            };
            // A draft follows one token alone.
            let has_draft = tokens.len() > row.n_tokens;
            let mode = if has_draft {
                LogitsMode::All
            } else {
                LogitsMode::Last
            };
            rows.push(Rows {
                sequence,
                tokens,
                logits: row.wants_logits.then_some(mode),
            });
        }
        let came = match self.engine.step_apart(&rows) {
            Ok(came) => came,
            Err(RunError::Canceled) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let n_vocab = self.prompts.n_vocab.max(1);
        let (mut drawn, mut wrong) = (Vec::new(), Vec::new());
        for ((row, tokens), logits) in placed.iter().zip(&tokens).zip(came) {
            let logits = match logits {
                Ok(logits) => logits,
                // Without its draft it may go on: the step is computed again.
                Err(_) if tokens.len() > row.n_tokens => {
                    if let Some(live) = self.live.get_mut(&row.id) {
                        live.drafts = false;
                    }
                    continue;
                }
                Err(error) => {
                    failed.push((row.id, error));
                    continue;
                }
            };
            let Some(live) = self.live.get_mut(&row.id).filter(|_| row.wants_logits) else {
                continue;
            };
            let draft = &tokens[row.n_tokens..];
            let came = draw(live, logits.chunks(n_vocab), draft, &mut self.scratch);
            let right = came.new_tokens.saturating_sub(1).min(draft.len());
            self.summary.generated_tokens += came.new_tokens;
            self.summary.drafted_tokens += draft.len();
            self.summary.accepted_tokens += right;
            live.acceptance.count(draft.len(), right);
            if right < draft.len()
                && let Some(sequence) = live.sequence
            {
                wrong.push((row.id, sequence, row.from + row.n_tokens + right));
            }
            drawn.push(Drawn {
                outcome: TextOutcome {
                    id: row.id,
                    new_tokens: came.new_tokens,
                    ended: came.finish.is_some(),
                },
                finish: came.finish,
            });
        }
        for (id, sequence, n) in wrong {
            if let Err(error) = self.engine.truncate_sequence(sequence, n) {
                failed.push((id, error));
            }
        }
        Ok(Some(drawn))
    }

    /// Gives a text its place in the engine, unless it has one.
    fn place(&mut self, id: TextId, from: usize) -> Result<(), RunError> {
        self.make_live(id);
        if let Some(live) = self.live.get_mut(&id)
            && live.sequence.is_none()
            && from == 0
        {
            live.sequence = Some(self.engine.add_sequence()?);
        }
        Ok(())
    }
}

/// What came of a text that wanted a token.
struct Drawn {
    outcome: TextOutcome,
    /// Why it ends, if it does.
    finish: Option<Finish>,
}

/// What was drawn of one text.
struct Came {
    new_tokens: usize,
    finish: Option<Finish>,
}

/// Draws the next token of a text, and those after it as long as they are what was drafted. Each is
/// drawn as it would be without a draft.
fn draw<'l>(
    live: &mut Live<'_>,
    logits: impl Iterator<Item = &'l [f32]>,
    draft: &[u32],
    scratch: &mut Vec<f32>,
) -> Came {
    let before = live.n_new();
    let mut finish = None;
    for (place, logits) in logits.enumerate() {
        finish = live.draw(logits, scratch);
        if finish.is_some() || live.tokens.last() != draft.get(place) {
            break;
        }
    }
    Came {
        new_tokens: live.n_new() - before,
        finish,
    }
}
