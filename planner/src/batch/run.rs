//! Answers the requests of a file: as many texts at once as the KV cache has room for.

mod drafts;
mod offers;
mod step;

use super::answer::{line, number, refusal};
use super::input::{Input, Line};
use super::live::{Beginning, Live};
use super::output::Output;
use super::{Answered, BadLine, Choice, Code, Encoded, Finish, Prompts, Request, Unencoded};
use crate::interrupt::{Interrupted, interrupted};
use anyhow::{Result, bail};
use offers::Sharer;
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tier_plan_runtime::batcher::texts_at_once;
use tier_plan_runtime::engine::draft::MAX_DRAFT;
use tier_plan_runtime::sampler::SamplerConfig;
use tier_plan_runtime::schedule::{self, Limits, Pages, Scheduler, StepCost, TextId};
use tier_plan_runtime::{Engine, RunError};

/// Longest step unless one is asked for. A batch is after throughput, so no step is cut short for the
/// sake of one text.
const MAX_STEP: Duration = Duration::from_secs(3600);

/// Options of a batch.
pub struct Options<'a> {
    /// Name of the model in answers.
    pub model: &'a str,
    /// Sampling options for what requests do not say.
    pub sampling: SamplerConfig,
    /// Most texts at once.
    pub max_texts: usize,
    /// Most time between two tokens of a text while prompts are read, if that matters.
    pub max_step: Option<Duration>,
    /// Most tokens per draft; 0 for no drafts. A model with recurrent states, or on a GPU, has none.
    pub max_drafts: usize,
    /// The first estimate of the time of steps, if they were predicted.
    pub cost: Option<StepCost>,
    /// Called after every step with the counts so far.
    pub on_step: &'a mut dyn FnMut(&Summary),
}

/// What a batch has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// Lines of the input that are not empty.
    pub lines: usize,
    /// Lines that earlier runs have answered or refused.
    pub earlier: usize,
    /// Lines answered.
    pub answered: usize,
    /// Lines refused with an error.
    pub refused: usize,
    /// Tokens of prompts, each answer's counted.
    pub prompt_tokens: usize,
    /// Tokens that were not computed, since the KV cache had them of other texts, or of the same one
    /// before it was preempted.
    pub shared_tokens: usize,
    /// Tokens generated.
    pub generated_tokens: usize,
    /// Tokens drafted.
    pub drafted_tokens: usize,
    /// Drafted tokens that were right.
    pub accepted_tokens: usize,
    /// How often a text gave up its pages for others.
    pub preempted: usize,
    /// Whether a signal ended the batch early.
    pub interrupted: bool,
    /// Time of all steps.
    pub took: Duration,
}

/// A request with the answers to it.
struct Job {
    line: usize,
    /// Its first text; the others follow it.
    first: TextId,
    request: Request,
    encoded: Encoded,
    choices: Vec<Option<Choice>>,
}

/// An answer that is wanted.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    job: usize,
    index: usize,
}

/// A batch at work.
pub struct Batch<'a> {
    engine: &'a mut Engine,
    prompts: &'a Prompts<'a>,
    input: &'a mut Input,
    output: &'a mut Output,
    options: Options<'a>,
    limits: Limits,
    scheduler: Scheduler,
    lines: VecDeque<Line>,
    /// By number, until all answers are there.
    jobs: HashMap<usize, Job>,
    wanted: HashMap<TextId, Wanted>,
    live: HashMap<TextId, Live<'a>>,
    /// Texts with which unfinished ones begin alike.
    sharers: HashMap<TextId, Vec<Sharer>>,
    next_id: u64,
    scratch: Vec<f32>,
    summary: Summary,
}

impl<'a> Batch<'a> {
    /// Prepares the answers to all lines of `input` that have none in `output`.
    pub fn new(
        engine: &'a mut Engine,
        prompts: &'a Prompts<'a>,
        input: &'a mut Input,
        output: &'a mut Output,
        options: Options<'a>,
    ) -> Self {
        let all = input.in_order();
        let summary = Summary {
            lines: all.len(),
            earlier: output.n_answered(),
            ..Summary::default()
        };
        let open = all
            .into_iter()
            .filter(|line| !output.has_answer(line.number));
        let max_texts = texts_at_once(engine, options.max_texts);
        Self {
            limits: Limits {
                max_rows: engine.batch().max(max_texts),
                max_texts,
                max_step: options.max_step.unwrap_or(MAX_STEP),
                max_drafts: if engine.repeats() {
                    options.max_drafts.min(MAX_DRAFT)
                } else {
                    0
                },
            },
            lines: open.collect(),
            engine,
            prompts,
            input,
            output,
            scheduler: Scheduler::with_cost(options.cost.clone().unwrap_or_default()),
            options,
            jobs: HashMap::new(),
            wanted: HashMap::new(),
            live: HashMap::new(),
            sharers: HashMap::new(),
            next_id: 0,
            scratch: Vec::new(),
            summary,
        }
    }

    /// Returns how many texts are generated at once at most.
    pub fn max_texts(&self) -> usize {
        self.limits.max_texts
    }

    /// Answers all lines, or as many as there are before a signal.
    ///
    /// # Errors
    /// When a file can't be read or written, or a pass fails. Whole answers are kept.
    pub fn run(mut self) -> Result<Summary> {
        let done = self.work();
        // What was answered before an error is kept, too.
        let synced = self.output.sync();
        done?;
        synced?;
        Ok(self.summary)
    }

    fn work(&mut self) -> Result<()> {
        loop {
            if interrupted() {
                self.summary.interrupted = true;
                return Ok(());
            }
            self.submit()?;
            if self.scheduler.is_empty() && self.lines.is_empty() {
                return Ok(());
            }
            self.draft();
            let plan = self.plan();
            self.release(&plan);
            if !plan.rows.is_empty() {
                self.compute(&plan)?;
            } else if plan.pages_wanted > 0 {
                bail!(
                    "the KV cache lacks {} pages for any text",
                    plan.pages_wanted
                );
            }
            (self.options.on_step)(&self.summary);
        }
    }

    fn pages(&self) -> Pages {
        let pages = self.engine.pages();
        Pages {
            free: pages.free,
            total: pages.total,
        }
    }

    /// Reads lines until enough texts wait.
    fn submit(&mut self) -> Result<()> {
        let enough = 2 * self.limits.max_texts;
        while self.scheduler.len() < enough
            && !interrupted()
            && let Some(line) = self.lines.pop_front()
        {
            let begun = match self.input.read(&line)? {
                Ok(request) => self.begin(&line, request)?,
                Err(bad) => Err(bad),
            };
            if let Err(bad) = begun {
                self.output
                    .append(line.number, &refusal(line.number, &bad))?;
                self.summary.refused += 1;
            }
        }
        Ok(())
    }

    /// Submits the texts of a request.
    fn begin(&mut self, line: &Line, request: Request) -> Result<Result<(), BadLine>> {
        let named = |bad: BadLine| BadLine {
            custom_id: Some(request.custom_id.clone()),
            ..bad
        };
        let encoded = match self.prompts.encode(&request) {
            Ok(encoded) => encoded,
            Err(Unencoded::Bad(bad)) => return Ok(Err(named(bad))),
            Err(Unencoded::Interrupted) => return Err(Interrupted.into()),
        };
        let pages = self.pages();
        let first = TextId(self.next_id);
        for index in 0..request.n {
            let id = TextId(self.next_id);
            let text = schedule::Request {
                id,
                prompt: encoded.tokens.len(),
                max_new: encoded.max_new,
                ..schedule::Request::default()
            };
            // All are alike, so the first is refused or none.
            if let Err(error) = self.scheduler.submit(text, pages) {
                let bad = BadLine::new(Code::ContextLengthExceeded, error.to_string());
                return Ok(Err(named(bad)));
            }
            self.next_id += 1;
            let job = line.number;
            self.wanted.insert(id, Wanted { job, index });
        }
        self.summary.prompt_tokens += encoded.tokens.len() * request.n;
        self.note_sharers(first, request.n, &encoded.tokens);
        let job = Job {
            line: line.number,
            first,
            choices: vec![None; request.n],
            request,
            encoded,
        };
        self.jobs.insert(line.number, job);
        Ok(Ok(()))
    }

    /// Makes a text that waits ready to be generated.
    fn make_live(&mut self, id: TextId) {
        let Some(Wanted { job, index }) = self.wanted.get(&id) else {
            return;
        };
        let (prompts, job) = (self.prompts, &self.jobs[job]);
        let defaults = &self.options.sampling;
        self.live.entry(id).or_insert_with(|| {
            let beginning = Beginning {
                tokenizer: prompts.tokenizer,
                prompt: job.encoded.tokens.clone(),
                max_new: job.encoded.max_new,
                index: *index,
                defaults,
            };
            Live::new(&job.request, beginning)
        });
    }

    /// Takes a finished text out of the engine, and writes its line if it was the last of it.
    fn end(&mut self, id: TextId, finish: Finish) -> Result<()> {
        self.sharers.remove(&id);
        let (Some(live), Some(wanted)) = (self.live.remove(&id), self.wanted.remove(&id)) else {
            return Ok(());
        };
        if let Some(sequence) = live.sequence {
            self.engine.keep_sequence(sequence);
            self.engine.remove_sequence(sequence);
        }
        let Some(job) = self.jobs.get_mut(&wanted.job) else {
            return Ok(());
        };
        let endpoint = job.request.endpoint;
        job.choices[wanted.index] = Some(live.finish(finish, endpoint, &job.encoded.text));
        if job.choices.iter().any(Option::is_none) {
            return Ok(());
        }
        match self.jobs.remove(&wanted.job) {
            Some(job) => self.write(job),
            None => Ok(()),
        }
    }

    /// Refuses the line of a text that cannot go on, and ends all texts of the line.
    fn fail(&mut self, id: TextId, error: &RunError) -> Result<()> {
        let wanted = self.wanted.get(&id).copied();
        let Some(job) = wanted.and_then(|wanted| self.jobs.remove(&wanted.job)) else {
            return Ok(());
        };
        for id in (job.first.0..).map(TextId).take(job.choices.len()) {
            self.scheduler.cancel(id);
            self.sharers.remove(&id);
            self.wanted.remove(&id);
            let sequence = self.live.remove(&id).and_then(|live| live.sequence);
            if let Some(sequence) = sequence {
                self.engine.remove_sequence(sequence);
            }
        }
        let bad = BadLine {
            custom_id: Some(job.request.custom_id),
            ..BadLine::new(Code::ServerError, error.to_string())
        };
        self.output.append(job.line, &refusal(job.line, &bad))?;
        self.summary.refused += 1;
        Ok(())
    }

    fn write(&mut self, job: Job) -> Result<()> {
        let choices: Vec<Choice> = job.choices.into_iter().flatten().collect();
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let answered = Answered {
            request: &job.request,
            model: self.options.model,
            created: since.map_or(0, |since| since.as_secs()),
            prompt_tokens: job.encoded.tokens.len(),
            choices: &choices,
            piece: &|token| self.prompts.tokenizer.token_bytes(token),
            id: &number(&job.request.custom_id),
        };
        self.output.append(job.line, &line(&answered))?;
        self.summary.answered += 1;
        Ok(())
    }
}
