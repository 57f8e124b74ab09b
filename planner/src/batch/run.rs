//! Answers the requests of a file: as many texts at once as the KV cache has room for.

use super::answer::{line, number, refusal};
use super::input::{Input, Line};
use super::output::Output;
use super::{
    Answered, BadLine, Choice, Code, Encoded, Endpoint, Finish, Grammars, Prompts, Request,
    Unencoded,
};
use crate::chat::thought::Answer;
use crate::interrupt::{Interrupted, interrupted};
use anyhow::Result;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tier_plan_runtime::batcher::{self, Batcher, Drawn, Event, TextOptions, TokenText};
use tier_plan_runtime::sampler::SamplerConfig;
use tier_plan_runtime::schedule::{StepCost, TextId};
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
    /// Makes the grammars of answers that must have a form.
    pub grammars: &'a Grammars,
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
    /// Lines that earlier runs have refused.
    pub earlier_refused: usize,
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
    /// Its texts, in order.
    ids: Vec<TextId>,
    request: Request,
    /// Text of the prompt, if a template made it.
    prompt: String,
    prompt_tokens: usize,
    texts: Vec<Text>,
    /// Texts that have not ended.
    open: usize,
}

/// An answer while it comes.
#[derive(Default)]
struct Text {
    answer: Answer,
    tokens: Vec<TokenText>,
    n_new: usize,
    finish: Option<batcher::Finish>,
}

impl Text {
    fn take(&mut self, drawn: Drawn) {
        self.answer.text.push_str(&drawn.text);
        self.answer.marks.extend(drawn.mark);
        self.tokens.extend(drawn.tokens);
        self.n_new = drawn.n_new;
        self.finish = drawn.finish;
    }

    /// Returns the finished answer to a request whose prompt is `prompt` as text.
    fn choice(mut self, request: &Request, prompt: &str) -> Choice {
        let end = self.answer.text.len();
        // A stop string may have cut a mark off.
        self.answer.marks.retain(|(place, _)| place.end <= end);
        let (text, thinking) = match request.endpoint {
            Endpoint::Completions => (self.answer.text, None),
            Endpoint::Chat => {
                let message = self.answer.message(prompt);
                (message.content, message.thinking)
            }
        };
        Choice {
            text,
            thinking,
            calls: Vec::new(),
            finish: match self.finish {
                Some(batcher::Finish::Length) => Finish::Length,
                _ => Finish::Stop,
            },
            n_tokens: self.n_new,
            tokens: request.logprobs.map(|_| self.tokens),
        }
    }
}

/// An answer that is wanted.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    job: usize,
    index: usize,
}

/// A batch at work.
pub struct Batch<'a> {
    batcher: Batcher<'a>,
    prompts: &'a Prompts<'a>,
    input: &'a mut Input,
    output: &'a mut Output,
    options: Options<'a>,
    lines: VecDeque<Line>,
    /// By number, until all answers are there.
    jobs: HashMap<usize, Job>,
    wanted: HashMap<TextId, Wanted>,
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
            earlier_refused: output.n_refused(),
            ..Summary::default()
        };
        let open = all
            .into_iter()
            .filter(|line| !output.has_answer(line.number));
        let batching = batcher::Options {
            max_texts: options.max_texts,
            max_step: Some(options.max_step.unwrap_or(MAX_STEP)),
            max_drafts: options.max_drafts,
            cost: options.cost.clone(),
        };
        Self {
            lines: open.collect(),
            batcher: Batcher::new(engine, prompts.tokenizer, batching),
            prompts,
            input,
            output,
            options,
            jobs: HashMap::new(),
            wanted: HashMap::new(),
            summary,
        }
    }

    /// Returns how many texts are generated at once at most.
    pub fn max_texts(&self) -> usize {
        self.batcher.max_texts()
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
            if self.batcher.is_empty() && self.lines.is_empty() {
                return Ok(());
            }
            self.step()?;
            (self.options.on_step)(&self.summary);
        }
    }

    /// Takes a step, and writes the lines that are finished with it.
    fn step(&mut self) -> Result<()> {
        let mut events = Vec::new();
        let step = self.batcher.step(&mut |id, event| events.push((id, event)));
        for (id, event) in events {
            match event {
                Event::Begun { .. } => {}
                Event::Drawn(drawn) => self.take(id, drawn)?,
                Event::Failed(error) => self.fail(id, &error)?,
            }
        }
        let step = step?;
        self.summary.took += step.took;
        self.summary.preempted += step.preempted;
        self.summary.shared_tokens += step.shared;
        self.summary.generated_tokens += step.generated;
        self.summary.drafted_tokens += step.drafted;
        self.summary.accepted_tokens += step.accepted;
        self.summary.interrupted |= step.canceled;
        Ok(())
    }

    /// Reads lines until enough texts wait.
    fn submit(&mut self) -> Result<()> {
        let enough = 2 * self.max_texts();
        while self.batcher.n_running() + self.batcher.n_waiting() < enough
            && !interrupted()
            && let Some(line) = self.lines.pop_front()
        {
            let begun = match self.input.read(&line)? {
                Ok(request) => self.begin(&line, request)?,
                Err(bad) => Err(bad),
            };
            if let Err(bad) = begun {
                self.refuse(line.number, &bad)?;
            }
        }
        Ok(())
    }

    fn refuse(&mut self, line: usize, bad: &BadLine) -> Result<()> {
        self.output.append(line, &refusal(line, bad))?;
        self.summary.refused += 1;
        Ok(())
    }

    /// Submits the texts of a request.
    fn begin(&mut self, line: &Line, request: Request) -> Result<Result<(), BadLine>> {
        let named = |bad: BadLine| BadLine {
            custom_id: Some(request.custom_id.clone()),
            ..bad
        };
        let Encoded {
            tokens,
            text,
            max_new,
        } = match self.prompts.encode(&request) {
            Ok(encoded) => encoded,
            Err(Unencoded::Bad(bad)) => return Ok(Err(named(bad))),
            Err(Unencoded::Interrupted) => return Err(Interrupted.into()),
        };
        let grammar = match self.options.grammars.of(&request, &text) {
            Ok(grammar) => grammar,
            Err(bad) => return Ok(Err(named(bad))),
        };
        let defaults = &self.options.sampling;
        let prompt_tokens = tokens.len();
        let options = TextOptions {
            prompt: tokens,
            max_new,
            sampling: SamplerConfig {
                seed: request.seed(defaults.seed),
                ..request.sampling.over(defaults)
            },
            stop: request.stop.clone(),
            ignore_eos: request.ignore_eos,
            n_top: request.logprobs,
            shown: Arc::new([]),
            grammar,
        };
        let ids = match self.batcher.submit(&Arc::new(options), request.n) {
            Ok(ids) => ids,
            Err(error) => {
                let bad = BadLine::new(Code::ContextLengthExceeded, error.to_string());
                return Ok(Err(named(bad)));
            }
        };
        for (index, id) in ids.iter().enumerate() {
            let job = line.number;
            self.wanted.insert(*id, Wanted { job, index });
        }
        self.summary.prompt_tokens += prompt_tokens * request.n;
        let job = Job {
            line: line.number,
            open: ids.len(),
            texts: ids.iter().map(|_| Text::default()).collect(),
            ids,
            request,
            prompt: text,
            prompt_tokens,
        };
        self.jobs.insert(line.number, job);
        Ok(Ok(()))
    }

    /// Takes what was drawn of a text, and writes its line if it was the last of it.
    fn take(&mut self, id: TextId, drawn: Drawn) -> Result<()> {
        let Some(&Wanted { job: number, index }) = self.wanted.get(&id) else {
            return Ok(());
        };
        let Some(job) = self.jobs.get_mut(&number) else {
            return Ok(());
        };
        let ends = drawn.finish.is_some();
        job.texts[index].take(drawn);
        if !ends {
            return Ok(());
        }
        self.wanted.remove(&id);
        job.open -= 1;
        if job.open > 0 {
            return Ok(());
        }
        match self.jobs.remove(&number) {
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
        for id in &job.ids {
            self.batcher.discard(*id);
            self.wanted.remove(id);
        }
        let code = match error {
            RunError::Grammar(_) => Code::InvalidRequest,
            RunError::ContextFull { .. } | RunError::NoPages { .. } => Code::ContextLengthExceeded,
            _ => Code::ServerError,
        };
        let bad = BadLine {
            custom_id: Some(job.request.custom_id),
            ..BadLine::new(code, error.to_string())
        };
        self.refuse(job.line, &bad)
    }

    fn write(&mut self, job: Job) -> Result<()> {
        let texts = job.texts.into_iter();
        let choices: Vec<Choice> = texts
            .map(|text| text.choice(&job.request, &job.prompt))
            .collect();
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let answered = Answered {
            request: &job.request,
            model: self.options.model,
            created: since.map_or(0, |since| since.as_secs()),
            prompt_tokens: job.prompt_tokens,
            choices: &choices,
            piece: &|token| self.prompts.tokenizer.token_bytes(token),
            id: &number(&job.request.custom_id),
        };
        self.output.append(job.line, &line(&answered))?;
        self.summary.answered += 1;
        Ok(())
    }
}
