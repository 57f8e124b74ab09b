//! Steps in which a text may fail without the others.

use super::batch::{LogitsMode, Phase, Rows};
use super::{Engine, first_not_finite, not_a_number};
use crate::error::RunError;
use std::time::Instant;

/// What came of one text's rows: their logits, `[wanted tokens, n_vocab]`, or why there are none.
pub type RowsOutcome<'a> = Result<&'a [f32], RunError>;

impl Engine {
    /// Takes tokens of several texts through the network together, as [`step`](Self::step) does, but
    /// a text that cannot go on fails alone. Returns what came of each of `rows`, in their order.
    ///
    /// A text fails alone when it is unknown or unusable or there twice, its context or the KV cache
    /// is full, a token is out of range, or its logits are not numbers. It is then as it was before
    /// the step; with recurrent states, only removing or clearing it helps.
    ///
    /// # Errors
    /// When the slow tier fails or the caller canceled. Then all texts are as before the step.
    pub fn step_apart(&mut self, rows: &[Rows<'_>]) -> Result<Vec<RowsOutcome<'_>>, RunError> {
        let Begun {
            going,
            before,
            failed,
        } = self.begin_apart(rows)?;
        let pieces = going.iter().zip(&before);
        let phase = Phase::of_step(pieces.map(|(rows, past)| (rows.tokens.len(), *past)));
        let start = Instant::now();
        if let Err(error) = self.compute_step(&going, phase) {
            for (rows, n_past) in going.iter().zip(before) {
                self.sequences.undo(rows.sequence, n_past);
            }
            return Err(error);
        }
        let bad = self.undo_bad(&going, &before);
        let good: Vec<Rows<'_>> = going
            .iter()
            .zip(&bad)
            .filter_map(|(rows, bad)| bad.is_none().then_some(*rows))
            .collect();
        self.end_step(&good, phase, start);
        Ok(self.outcomes(&going, bad, failed))
    }

    /// Checks every text of a step, and gives it pages, unless it fails.
    fn begin_apart<'r>(&mut self, rows: &[Rows<'r>]) -> Result<Begun<'r>, RunError> {
        self.check_before_step()?;
        let mut begun = Begun {
            going: Vec::with_capacity(rows.len()),
            before: Vec::with_capacity(rows.len()),
            failed: Vec::with_capacity(rows.len()),
        };
        for row in rows {
            let checked = self.check_rows(&begun.going, row).and_then(|n_past| {
                self.sequences.reserve(row.sequence, row.tokens.len())?;
                Ok(n_past)
            });
            begun.failed.push(match checked {
                Ok(n_past) => {
                    begun.going.push(*row);
                    begun.before.push(n_past);
                    None
                }
                Err(error) => Some(error),
            });
        }
        Ok(begun)
    }

    /// Takes back the texts whose logits are not numbers. Returns why, by text.
    fn undo_bad(&mut self, rows: &[Rows<'_>], before: &[usize]) -> Vec<Option<RunError>> {
        let n_vocab = self.spec().n_vocab;
        let mut first = 0;
        let mut bad = Vec::with_capacity(rows.len());
        for (rows, n_past) in rows.iter().zip(before) {
            let last = first + n_wanted(rows);
            let logits = &self.output.logits[first * n_vocab..last * n_vocab];
            let wanted = first_not_finite(logits, n_vocab);
            bad.push(wanted.map(|wanted| {
                self.sequences.undo(rows.sequence, *n_past);
                not_a_number(&[*rows], &[*n_past], wanted)
            }));
            first = last;
        }
        bad
    }

    /// Returns what came of each text: of those that began, and of those that `failed` before.
    fn outcomes(
        &self,
        going: &[Rows<'_>],
        bad: Vec<Option<RunError>>,
        failed: Vec<Option<RunError>>,
    ) -> Vec<RowsOutcome<'_>> {
        let n_vocab = self.spec().n_vocab;
        let mut rest = self.output.logits.as_slice();
        let mut came = going.iter().zip(bad).map(|(rows, bad)| {
            let (logits, others) = rest.split_at(n_wanted(rows) * n_vocab);
            rest = others;
            bad.map_or(Ok(logits), Err)
        });
        let of_each = failed.into_iter().map(|failed| match failed {
            Some(error) => Err(error),
            None => came.next().unwrap_or(Err(RunError::NoText)),
        });
        of_each.collect()
    }
}

/// The texts of a step that have pages for it.
struct Begun<'r> {
    going: Vec<Rows<'r>>,
    /// Tokens that each of them has before.
    before: Vec<usize>,
    /// By text of the step, why it is not among them.
    failed: Vec<Option<RunError>>,
}

/// Returns the tokens whose logits are wanted.
fn n_wanted(rows: &Rows<'_>) -> usize {
    match rows.logits {
        Some(LogitsMode::All) => rows.tokens.len(),
        Some(LogitsMode::Last) => rows.tokens.len().min(1),
        None => 0,
    }
}
