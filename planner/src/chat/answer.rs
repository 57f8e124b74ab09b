//! Generating an answer and showing it as it comes.

use super::thought::Answer;
use super::{Chat, Stats};
use anyhow::Result;
use std::io::Write;
use std::ops::ControlFlow;
use tier_plan_runtime::engine::generate::{Generated, Limits, Stop, generate};
use tier_plan_runtime::{LogitsMode, RunError};

impl Chat<'_> {
    /// Continues `ids`, which must fit the context, and writes the text as it is generated.
    pub(super) fn answer(&mut self, ids: &[u32], output: &mut impl Write) -> Result<Answer> {
        let same = self
            .held
            .iter()
            .zip(ids)
            .take_while(|(a, b)| a == b)
            .count();
        // At least one token must be processed, for the logits. With recurrent states, what follows
        // a checkpoint is processed again too.
        let mut kept = self.engine.rewind(same.min(ids.len() - 1));
        if kept == 0 {
            kept = self.engine.begin(ids)?;
        }
        self.held.clear();
        self.held.extend_from_slice(ids);
        self.engine.reset_counters();
        // Ctrl-C is polled between batches.
        let slice = self.engine.batch();
        let mut rest = &ids[kept..];
        while rest.len() > slice && !(self.options.signals.interrupted)() {
            let (now, after) = rest.split_at(slice);
            match self.engine.forward(now, LogitsMode::Last) {
                Ok(_) => rest = after,
                Err(RunError::Canceled) => break,
                Err(error) => return Err(error.into()),
            }
        }
        let mut answer = Answer::default();
        let mut n_answer = 0;
        if rest.len() <= slice {
            let generated = self.generate(rest, &mut answer, output)?;
            n_answer = generated.tokens.len();
            self.held.extend(&generated.tokens);
            answer.tokens.clone_from(&generated.tokens);
            match generated.stop {
                Stop::ContextFull => write!(output, "\n(the context is full)")?,
                Stop::Caller | Stop::Canceled => write!(output, "\n(stopped)")?,
                Stop::Limit | Stop::EndToken => {}
            }
        } else {
            write!(output, "(stopped)")?;
        }
        // The last sampled token was not processed, nor the rest after an interruption.
        self.held.truncate(self.engine.n_past());
        self.stats = Some(Stats {
            kept,
            prompt: ids.len() - kept,
            answer: n_answer,
        });
        writeln!(output)?;
        output.flush()?;
        Ok(answer)
    }

    /// Generates the answer to the rest of a prompt, of which no more than a batch is left.
    fn generate(
        &mut self,
        rest: &[u32],
        answer: &mut Answer,
        output: &mut impl Write,
    ) -> Result<Generated> {
        let tokenizer = self.tokenizer;
        let mut learner = self.options.learner.take();
        let mut n_text = 0;
        let options = &self.options;
        let is_end = |token| !options.ignore_eos && tokenizer.is_eog(token);
        let limits = Limits {
            max_tokens: options.max_tokens.unwrap_or(usize::MAX),
            is_end: &is_end,
            draft: options.draft,
        };
        let mut stream = tokenizer.stream();
        let mut screen = options.screen.clone();
        let mut write_error = None;
        let generated = generate(
            self.engine,
            rest,
            &mut self.sampler,
            &limits,
            |engine, token| {
                if let Some(learner) = &mut learner {
                    if n_text == 0 {
                        n_text = engine.n_past();
                        learner.begin(n_text);
                    }
                    learner.see(engine, n_text);
                    n_text += 1;
                }
                let piece = stream.push(token);
                answer.text.push_str(&piece);
                if let Some(mark) = tokenizer.thought_mark(token) {
                    let end = answer.text.len();
                    let start = end.saturating_sub(tokenizer.piece(token).len());
                    answer.marks.push((start..end, mark));
                }
                if let Err(error) = output
                    .write_all(screen.show(&piece).as_bytes())
                    .and_then(|()| output.flush())
                {
                    write_error = Some(error);
                    return ControlFlow::Break(());
                }
                if (options.signals.interrupted)() {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            },
        );
        self.options.learner = learner;
        let generated = generated?;
        if let Some(error) = write_error {
            return Err(error.into());
        }
        let tail = stream.finish();
        write!(output, "{}", screen.show(&tail))?;
        answer.text.push_str(&tail);
        Ok(generated)
    }
}
