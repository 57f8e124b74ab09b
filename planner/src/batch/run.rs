//! Answers the requests of a file: as many texts at once as the KV cache has room for.

use super::answer::{Answered, Choice, Finish, refusal};
use super::input::{Input, Line};
use super::live::{Beginning, Live};
use super::output::Output;
use super::prompts::{Encoded, Prompts};
use super::request::{BadLine, Code, Request};
use crate::interrupt::interrupted;
use anyhow::{Result, bail};
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tier_plan_runtime::engine::{LogitsMode, Rows, SequenceId};
use tier_plan_runtime::model::kv;
use tier_plan_runtime::sampler::SamplerConfig;
use tier_plan_runtime::schedule::{
    self, Limits, PAGE, Pages, Scheduler, StepPlan, TextId, TextOutcome,
};
use tier_plan_runtime::{Engine, RunError};

const _: () = assert!(PAGE == kv::PAGE as usize);

/// Longest step. A batch is after throughput, so no step is cut short for the sake of one text.
const MAX_STEP: Duration = Duration::from_secs(3600);

/// Options of a batch.
pub struct Options<'a> {
    /// Name of the model in answers.
    pub model: &'a str,
    /// Sampling options for what requests do not say.
    pub sampling: SamplerConfig,
    /// Most texts at once.
    pub max_texts: usize,
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
                max_step: MAX_STEP,
                max_drafts: 0,
            },
            lines: open.collect(),
            engine,
            prompts,
            input,
            output,
            options,
            scheduler: Scheduler::new(),
            jobs: HashMap::new(),
            wanted: HashMap::new(),
            live: HashMap::new(),
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
            let plan = self.plan()?;
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
        let encoded = match self.prompts.encode(&request)? {
            Ok(encoded) => encoded,
            Err(bad) => return Ok(Err(named(bad))),
        };
        let pages = self.pages();
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
        let job = Job {
            line: line.number,
            choices: vec![None; request.n],
            request,
            encoded,
        };
        self.jobs.insert(line.number, job);
        Ok(Ok(()))
    }

    /// Plans the next step. What is offered to one text may be what another lacks, so less is
    /// offered where nothing could go on.
    fn plan(&mut self) -> Result<StepPlan> {
        let mut most = self.limits.max_texts;
        loop {
            let offered = self.offer_kept(most)?;
            let plan = self.scheduler.next_step(self.pages(), &self.limits);
            self.withdraw(&offered, &plan);
            if plan.pages_wanted == 0 || offered.is_empty() {
                return Ok(plan);
            }
            most = usize::from(offered.len() > 1);
        }
    }

    /// Begins the texts that may be admitted now, `most` of them, with what the engine has kept of
    /// them. Returns them.
    fn offer_kept(&mut self, most: usize) -> Result<Vec<TextId>> {
        let admitted = self.scheduler.n_admitted();
        let places = self.limits.max_texts.saturating_sub(admitted).min(most);
        let offered: Vec<TextId> = self.scheduler.upcoming().take(places).collect();
        for id in &offered {
            self.make_live(*id);
            if let Some(live) = self.live.get_mut(id) {
                let (sequence, n) = self.engine.begin_sequence(&live.tokens)?;
                (live.sequence, live.shared) = (Some(sequence), n);
                self.scheduler.set_cached(*id, n);
            }
        }
        Ok(offered)
    }

    /// Gives back what was offered to texts that were not admitted.
    fn withdraw(&mut self, offered: &[TextId], plan: &StepPlan) {
        for id in offered {
            let Some(live) = self.live.get_mut(id) else {
                continue;
            };
            if plan.rows.iter().any(|row| row.id == *id) {
                self.summary.shared_tokens += live.shared;
                continue;
            }
            if let Some(sequence) = live.sequence.take() {
                self.engine.remove_sequence(sequence);
            }
            self.scheduler.set_cached(*id, 0);
            if live.n_new() == 0 {
                // Its tokens are in the job; many may wait.
                self.live.remove(id);
            }
        }
    }

    /// Keeps texts that fill their pages at the moment for those that wait. Others would copy their
    /// last page with the next token, which the schedule has no page for.
    fn keep_whole_pages(&mut self, plan: &StepPlan) {
        if self.scheduler.upcoming().next().is_none() {
            return;
        }
        for row in &plan.rows {
            let live = self.live.get(&row.id);
            if (row.from + row.n_tokens).is_multiple_of(PAGE)
                && let Some(sequence) = live.and_then(|live| live.sequence)
            {
                self.engine.keep_sequence(sequence);
            }
        }
    }

    /// Frees the pages of preempted texts, which are kept until other texts want them.
    fn release(&mut self, plan: &StepPlan) {
        for preempt in &plan.preempt {
            if let Some(live) = self.live.get_mut(&preempt.id)
                && let Some(sequence) = live.sequence.take()
            {
                self.engine.keep_sequence(sequence);
                self.engine.remove_sequence(sequence);
                self.summary.preempted += 1;
            }
        }
    }

    /// Takes a step through the engine, and draws the tokens that come of it.
    fn compute(&mut self, plan: &StepPlan) -> Result<()> {
        let start = Instant::now();
        for row in &plan.rows {
            self.place(row.id, row.from)?;
        }
        let mut rows = Vec::with_capacity(plan.rows.len());
        for row in &plan.rows {
            let live = &self.live[&row.id];
            let Some(sequence) = live.sequence else {
                bail!("a text of the step is not in the engine");
            };
            rows.push(Rows {
                sequence,
                tokens: &live.tokens[row.from..row.from + row.n_tokens],
                logits: row.wants_logits.then_some(LogitsMode::Last),
            });
        }
        let logits = match self.engine.step(&rows) {
            Ok(logits) => logits,
            Err(RunError::Canceled) => {
                self.summary.interrupted = true;
                self.scheduler.abandoned();
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        drop(rows);
        let (mut outcomes, mut ended) = (Vec::new(), Vec::new());
        let wanted = plan.rows.iter().filter(|row| row.wants_logits);
        let n_vocab = self.prompts.n_vocab.max(1);
        for (row, logits) in wanted.zip(logits.chunks_exact(n_vocab)) {
            let Some(live) = self.live.get_mut(&row.id) else {
                continue;
            };
            let before = live.n_new();
            let finish = live.draw(logits, &mut self.scratch);
            let new_tokens = live.n_new() - before;
            self.summary.generated_tokens += new_tokens;
            outcomes.push(TextOutcome {
                id: row.id,
                new_tokens,
                ended: finish.is_some(),
            });
            ended.extend(finish.map(|finish| (row.id, finish)));
        }
        self.keep_whole_pages(plan);
        let took = start.elapsed();
        self.summary.took += took;
        self.scheduler.finished(took, &outcomes);
        ended
            .into_iter()
            .try_for_each(|(id, finish)| self.end(id, finish))
    }

    /// Gives a text its place in the engine, unless it has one.
    fn place(&mut self, id: TextId, from: usize) -> Result<()> {
        self.make_live(id);
        if let Some(live) = self.live.get_mut(&id)
            && live.sequence.is_none()
            && from == 0
        {
            live.sequence = Some(self.engine.add_sequence()?);
        }
        Ok(())
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

    fn write(&mut self, job: Job) -> Result<()> {
        let choices: Vec<Choice> = job.choices.into_iter().flatten().collect();
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let line = Answered {
            request: &job.request,
            model: self.options.model,
            created: since.map_or(0, |since| since.as_secs()),
            prompt_tokens: job.encoded.tokens.len(),
            choices: &choices,
            piece: &|token| self.prompts.tokenizer.token_bytes(token),
        }
        .line();
        self.output.append(job.line, &line)?;
        self.summary.answered += 1;
        Ok(())
    }
}

/// Returns how many texts the engine takes at once, up to `most`.
fn texts_at_once(engine: &mut Engine, most: usize) -> usize {
    let plan = engine.plan();
    // Where one text has all pages, the last may be smaller than the others.
    if plan.sequences == 1 && !plan.context.is_multiple_of(kv::PAGE) {
        return 1;
    }
    // Recurrent states and the caches of GPUs are for as many texts as planned.
    let texts: Vec<SequenceId> = (0..most)
        .map_while(|_| engine.add_sequence().ok())
        .collect();
    texts.iter().for_each(|id| engine.remove_sequence(*id));
    texts.len().max(1)
}
