//! A text that joins others: the time between two tokens of those while its prompt is read.

use super::parallel::percentile;
use super::{BenchArgs, greedy, prompt};
use anyhow::{Result, bail};
use serde_json::{Value, json};
use std::fmt;
use std::time::{Duration, Instant};
use tier_plan_runtime::Engine;
use tier_plan_runtime::engine::{LogitsMode, Rows, SequenceId};
use tier_plan_runtime::schedule::{
    Limits, Pages, Request, Scheduler, StepCost, StepPlan, TextId, TextOutcome, TextState,
};

/// What was measured while the last of some texts joined the others.
pub(super) struct Joining {
    texts: u32,
    /// Most time of a step that was asked for.
    longest: Duration,
    /// Seconds of the steps with a token of the others and a part of the prompt.
    gaps_s: Vec<f64>,
    prompt_tok_s: f64,
}

impl Joining {
    pub(super) fn as_json(&self) -> Value {
        json!({
            "texts": self.texts,
            "max_step_s": self.longest.as_secs_f64(),
            "gap_p95_s": percentile(&self.gaps_s, 0.95),
            "gap_max_s": percentile(&self.gaps_s, 1.0),
            "steps": self.gaps_s.len(),
            "prompt_tok_s": self.prompt_tok_s,
        })
    }
}

impl fmt::Display for Joining {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |share| percentile(&self.gaps_s, share) * 1e3;
        write!(
            f,
            "the last of {} texts joins in {} steps of up to {} ms: gap p95 {:.2} ms, at most {:.2} ms, prompt {:.2} tok/s",
            self.texts,
            self.gaps_s.len(),
            self.longest.as_millis(),
            ms(0.95),
            ms(1.0),
            self.prompt_tok_s
        )
    }
}

/// One text of the measurement.
struct Text {
    sequence: SequenceId,
    tokens: Vec<u32>,
}

/// Texts at work, by the number in their names.
struct Texts<'a> {
    engine: &'a mut Engine,
    scheduler: Scheduler,
    texts: Vec<Text>,
    limits: Limits,
}

/// Has `texts - 1` texts begin, then one more, in steps of `longest` by the first estimate `cost`.
///
/// # Errors
/// When a pass fails.
pub(super) fn measure(
    engine: &mut Engine,
    args: &BenchArgs,
    texts: u32,
    (longest, cost): (Duration, Option<StepCost>),
) -> Result<Joining> {
    let n_vocab = engine.spec().n_vocab;
    let mut work = Texts {
        limits: Limits {
            max_rows: engine.batch().max(texts as usize),
            max_texts: texts as usize,
            max_step: longest,
            max_drafts: 0,
        },
        scheduler: Scheduler::with_cost(cost.unwrap_or_default()),
        texts: Vec::with_capacity(texts as usize),
        engine,
    };
    let last = TextId(u64::from(texts) - 1);
    for text in 0..texts - 1 {
        work.add(
            prompt(n_vocab, text, args.n_prompt.max(1)),
            args.n_gen.max(1),
        )?;
    }
    let running = |work: &Texts<'_>| {
        let mut states = (0..last.0).map(|id| work.scheduler.state(TextId(id)));
        states.all(|state| state != Some(TextState::Waiting) && !in_prompt(state))
    };
    while !running(&work) {
        work.step()?;
    }
    work.add(
        prompt(n_vocab, texts - 1, args.n_prompt.max(1)),
        args.n_gen.max(1),
    )?;
    let (mut gaps_s, started) = (Vec::new(), Instant::now());
    while matches!(work.scheduler.state(last), Some(TextState::Waiting))
        || in_prompt(work.scheduler.state(last))
    {
        let (took, others) = work.step()?;
        if others > 1 {
            gaps_s.push(took.as_secs_f64());
        }
    }
    let seconds = started.elapsed().as_secs_f64();
    for text in &work.texts {
        work.engine.remove_sequence(text.sequence);
    }
    Ok(Joining {
        texts,
        longest,
        gaps_s,
        prompt_tok_s: f64::from(args.n_prompt.max(1)) / seconds,
    })
}

fn in_prompt(state: Option<TextState>) -> bool {
    matches!(state, Some(TextState::InPrompt { .. }))
}

impl Texts<'_> {
    fn pages(&self) -> Pages {
        let pages = self.engine.pages();
        Pages {
            free: pages.free,
            total: pages.total,
        }
    }

    fn add(&mut self, tokens: Vec<u32>, max_new: u32) -> Result<()> {
        let request = Request {
            id: TextId(self.texts.len() as u64),
            prompt: tokens.len(),
            max_new: max_new as usize,
            ..Request::default()
        };
        self.scheduler.submit(request, self.pages())?;
        let sequence = self.engine.add_sequence()?;
        self.texts.push(Text { sequence, tokens });
        Ok(())
    }

    /// Takes a step. Returns its time, and how many texts it had rows of.
    fn step(&mut self) -> Result<(Duration, usize)> {
        let started = Instant::now();
        let plan = self.scheduler.next_step(self.pages(), &self.limits);
        if plan.rows.is_empty() {
            bail!("the KV cache lacks pages for {} texts", self.texts.len());
        }
        let outcomes = self.compute(&plan)?;
        let took = started.elapsed();
        self.scheduler.finished(took, &outcomes);
        Ok((took, plan.rows.len()))
    }

    fn compute(&mut self, plan: &StepPlan) -> Result<Vec<TextOutcome>> {
        let rows: Vec<Rows<'_>> = plan
            .rows
            .iter()
            .map(|row| {
                let text = &self.texts[row.id.0 as usize];
                Rows {
                    sequence: text.sequence,
                    tokens: &text.tokens[row.from..row.from + row.n_tokens],
                    logits: row.wants_logits.then_some(LogitsMode::Last),
                }
            })
            .collect();
        let n_vocab = self.engine.spec().n_vocab;
        let logits = self.engine.step(&rows)?;
        let next: Vec<u32> = logits.chunks(n_vocab).map(greedy).collect();
        drop(rows);
        let wanted = plan.rows.iter().filter(|row| row.wants_logits);
        let outcomes = wanted.zip(next).map(|(row, token)| {
            self.texts[row.id.0 as usize].tokens.push(token);
            TextOutcome {
                id: row.id,
                new_tokens: 1,
                ended: false,
            }
        });
        Ok(outcomes.collect())
    }
}
