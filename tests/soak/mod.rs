//! Random clients for as long as one likes: nothing fails, no page is lost, nothing grows, and each text is the one
//! that its prompt has alone.
//!
//! The clients come and go as those of a server would: short and long prompts, some of which begin alike, greedy and
//! drawn texts, forks, and cancellations at any moment. There are too few pages for all of them, so texts are
//! preempted. An hour, as `.ci/nightly` does:
//!
//! ```text
//! SOAK_MINUTES=60 SOAK_MODEL=model.gguf cargo test --release -p tier-plan-planner --test all soak::random -- --ignored --nocapture
//! ```
//!
//! Without variables it is a minute of the bundled model.

#[cfg(target_os = "linux")]
mod serve;
mod setup;

use crate::common::demo_model;
use setup::{load, minutes, open, resident_bytes};
use std::collections::HashMap;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use tier_plan_runtime::Engine;
use tier_plan_runtime::engine::generate::{self, generate};
use tier_plan_runtime::engine::{LogitsMode, Rows, SequenceId};
use tier_plan_runtime::sampler::{Sampler, SamplerConfig};
use tier_plan_runtime::schedule::{
    Limits, PAGE, Pages, Request, Scheduler, StepPlan, TextId, TextOutcome,
};
use tier_plan_runtime::units::show_bytes;
use tier_plan_testing::Random;

/// Texts that are wanted at the same time.
const CLIENTS: usize = 16;

/// Texts of full length that the KV cache has room for.
const ROOM: u32 = 3;
const CONTEXT: u32 = 512;

/// Tokens that several prompts begin with.
const BEGINNINGS: [usize; 4] = [0, 70, 130, 200];
const MAX_SUFFIX: u64 = 100;

/// Tokens of an answer: more than the page that admission leaves to each text, so that pages run out.
const MAX_NEW: usize = 160;

/// Distinct prompts, each with a greedy text and drawn ones.
const PROMPTS: usize = 32;
const SEEDS: [Option<u64>; 3] = [None, Some(1), Some(2)];

/// Memory that may come after the first tenth: what an allocator keeps in fragments, and huge pages that the system
/// makes of what lies beside memory in use.
const GROWTH: u64 = 24 << 20;

/// What is asked for: a prompt, and how its text is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Asked {
    prompt: usize,
    seed: usize,
}

impl Asked {
    fn index(self) -> usize {
        self.prompt * SEEDS.len() + self.seed
    }

    fn sampler(self) -> Sampler {
        Sampler::new(match SEEDS[self.seed] {
            None => SamplerConfig::default(),
            Some(seed) => SamplerConfig {
                temperature: 0.9,
                seed,
                ..SamplerConfig::default()
            },
        })
    }
}

struct Text {
    asked: Asked,
    /// The prompt and what was drawn.
    tokens: Vec<u32>,
    sampler: Sampler,
    sequence: Option<SequenceId>,
    /// The text that it was forked from.
    origin: Option<TextId>,
    /// New tokens with which the client goes away.
    cancel_at: usize,
}

#[derive(Debug, Default)]
struct Counts {
    texts: usize,
    canceled: usize,
    forked: usize,
    preempted: usize,
    shared_tokens: usize,
    steps: usize,
}

struct Soak {
    engine: Engine,
    scheduler: Scheduler,
    draw: Random,
    prompts: Vec<Vec<u32>>,
    /// By [`Asked::index`]: the longest text so far.
    seen: Vec<Vec<u32>>,
    texts: HashMap<TextId, Text>,
    next_id: u64,
    max_texts: usize,
    counts: Counts,
    scratch: Vec<f32>,
}

impl Soak {
    fn new(mut engine: Engine) -> Self {
        let mut draw = Random(11);
        let n_vocab = engine.spec().n_vocab as u64;
        let mut tokens =
            |n: usize| -> Vec<u32> { (0..n).map(|_| draw.below(n_vocab) as u32).collect() };
        let beginnings = BEGINNINGS.map(&mut tokens);
        let suffix = |i: usize| 1 + (i as u64 * 37 % MAX_SUFFIX) as usize;
        let prompts = (0..PROMPTS)
            .map(|i| [&beginnings[i % BEGINNINGS.len()][..], &tokens(suffix(i))].concat())
            .collect();
        let places: Vec<SequenceId> = (0..CLIENTS)
            .map_while(|_| engine.add_sequence().ok())
            .collect();
        places.iter().for_each(|id| engine.remove_sequence(*id));
        Self {
            engine,
            scheduler: Scheduler::new(),
            draw,
            prompts,
            seen: vec![Vec::with_capacity(MAX_NEW); PROMPTS * SEEDS.len()],
            texts: HashMap::new(),
            next_id: 0,
            max_texts: places.len(),
            counts: Counts::default(),
            scratch: Vec::new(),
        }
    }

    fn pages(&self) -> Pages {
        let pages = self.engine.pages();
        Pages {
            free: pages.free,
            total: pages.total,
        }
    }

    /// Takes texts of full length through the engine, then many single tokens, so that all pages and
    /// slots are in use once.
    fn warm_up(&mut self) {
        let tokens = self.prompts.concat();
        let tokens = &tokens[..CONTEXT as usize];
        let ids: Vec<SequenceId> = (0..self.max_texts.min(ROOM as usize))
            .map(|_| self.engine.add_sequence().unwrap())
            .collect();
        let rows = |sequence: &SequenceId| Rows {
            sequence: *sequence,
            tokens,
            logits: Some(LogitsMode::Last),
        };
        let rows: Vec<Rows<'_>> = ids.iter().map(rows).collect();
        self.engine.step(&rows).unwrap();
        drop(rows);
        ids.iter().for_each(|id| self.engine.remove_sequence(*id));
        let id = self.engine.add_sequence().unwrap();
        for token in tokens.iter() {
            let rows = Rows {
                sequence: id,
                tokens: &[*token],
                logits: Some(LogitsMode::Last),
            };
            self.engine.step(&[rows]).unwrap();
        }
        self.engine.remove_sequence(id);
    }

    /// Lets clients come, fork, and go away, each at times.
    fn clients(&mut self) {
        let mut ids: Vec<TextId> = self.texts.keys().copied().collect();
        ids.sort_unstable();
        while self.texts.len() < CLIENTS && self.draw.below(3) > 0 {
            let any = self.draw.below(2 * CLIENTS as u64) as usize;
            if let Some(id) = ids.get(any) {
                self.fork(*id);
                continue;
            }
            let asked = Asked {
                prompt: self.draw.below(PROMPTS as u64) as usize,
                seed: self.draw.below(SEEDS.len() as u64) as usize,
            };
            let tokens = self.prompts[asked.prompt].clone();
            self.submit(asked, tokens, None);
        }
        for id in ids {
            if self.draw.below(1000) == 0 {
                self.cancel(id);
            }
        }
    }

    fn submit(&mut self, asked: Asked, tokens: Vec<u32>, origin: Option<TextId>) {
        let id = TextId(self.next_id);
        let left = MAX_NEW - (tokens.len() - self.prompts[asked.prompt].len());
        let request = Request {
            id,
            prompt: tokens.len(),
            max_new: left,
            priority: self.draw.below(3) as i8 - 1,
            ..Request::default()
        };
        self.scheduler.submit(request, self.pages()).unwrap();
        for (other, text) in &self.texts {
            let common = tokens.iter().zip(&text.tokens);
            let common = common.take_while(|(a, b)| a == b).count();
            let pages = common.min(tokens.len() - 1) / PAGE;
            self.scheduler.set_shared(id, *other, pages * PAGE);
        }
        let text = Text {
            asked,
            tokens,
            sampler: asked.sampler(),
            sequence: None,
            origin,
            cancel_at: match self.draw.below(6) {
                0 => 1 + self.draw.below(MAX_NEW as u64) as usize,
                _ => usize::MAX,
            },
        };
        self.texts.insert(id, text);
        self.next_id += 1;
        self.counts.texts += 1;
    }

    /// Goes on with a greedy text a second time. Its tokens are those of the first.
    fn fork(&mut self, id: TextId) {
        let text = &self.texts[&id];
        let (asked, n) = (text.asked, text.tokens.len());
        let left = MAX_NEW.saturating_sub(n - self.prompts[asked.prompt].len());
        if SEEDS[asked.seed].is_none() && left > 0 {
            let tokens = text.tokens.clone();
            self.submit(asked, tokens, Some(id));
            self.counts.forked += 1;
        }
    }

    fn cancel(&mut self, id: TextId) {
        assert!(self.scheduler.cancel(id));
        self.end(id);
        self.counts.canceled += 1;
    }

    /// Removes a text, and compares it with others to the same question.
    fn end(&mut self, id: TextId) {
        let text = self.texts.remove(&id).unwrap();
        if let Some(sequence) = text.sequence {
            self.engine.keep_sequence(sequence);
            self.engine.remove_sequence(sequence);
        }
        let new = &text.tokens[self.prompts[text.asked.prompt].len()..];
        let seen = &mut self.seen[text.asked.index()];
        let common = new.len().min(seen.len());
        assert_eq!(new[..common], seen[..common], "{:?}", text.asked);
        seen.extend_from_slice(&new[common..]);
    }

    /// Plans a step, and offers texts that wait what there is of them. What is offered to one may be
    /// what another lacks, so less is offered where nothing could go on.
    fn plan(&mut self) -> StepPlan {
        let limits = Limits {
            max_rows: self.engine.batch(),
            max_texts: self.max_texts,
            max_step: Duration::from_millis(2 + self.draw.below(60)),
            max_drafts: 0,
        };
        let mut most = self.max_texts.saturating_sub(self.scheduler.n_admitted());
        loop {
            let upcoming = self.scheduler.upcoming();
            let upcoming = upcoming.filter(|id| !self.scheduler.is_held(*id));
            let offered: Vec<TextId> = upcoming.take(most).collect();
            offered.iter().for_each(|id| self.offer(*id));
            let plan = self.scheduler.next_step(self.pages(), &limits);
            for id in &offered {
                let text = self.texts.get_mut(id).unwrap();
                if let Some(row) = plan.rows.iter().find(|row| row.id == *id) {
                    self.counts.shared_tokens += row.from;
                } else {
                    self.engine.remove_sequence(text.sequence.take().unwrap());
                    self.scheduler.set_cached(*id, 0);
                }
            }
            if plan.pages_wanted == 0 {
                return plan;
            }
            assert!(!offered.is_empty(), "no text can go on: {plan:?}");
            most = usize::from(offered.len() > 1);
        }
    }

    /// Begins a text with what its origin has, or with what is kept.
    fn offer(&mut self, id: TextId) {
        let text = &self.texts[&id];
        let origin = text
            .origin
            .and_then(|origin| self.texts.get(&origin)?.sequence);
        let n = origin.map_or(0, |origin| self.engine.n_past_of(origin));
        let n = n.min(text.tokens.len() - 1) / PAGE * PAGE;
        // A text with recurrent states can be forked at checkpoints only.
        let forked = origin.filter(|_| n > 0);
        let forked = forked.and_then(|origin| Some((self.engine.fork(origin, n).ok()?, n)));
        let (sequence, n) = match forked {
            Some(forked) => forked,
            None => self.engine.begin_sequence(&text.tokens).unwrap(),
        };
        self.texts.get_mut(&id).unwrap().sequence = Some(sequence);
        self.scheduler.set_cached(id, n);
    }

    fn step(&mut self) {
        let plan = self.plan();
        for preempt in &plan.preempt {
            let text = self.texts.get_mut(&preempt.id).unwrap();
            let sequence = text.sequence.take().unwrap();
            self.engine.keep_sequence(sequence);
            self.engine.remove_sequence(sequence);
            self.counts.preempted += 1;
        }
        if plan.rows.is_empty() {
            return;
        }
        let start = Instant::now();
        let outcomes = self.compute(&plan);
        self.scheduler.finished(start.elapsed(), &outcomes);
        self.counts.steps += 1;
        for outcome in outcomes {
            let id = outcome.id;
            if outcome.ended {
                self.end(id);
                continue;
            }
            let text = &self.texts[&id];
            let new = text.tokens.len() - self.prompts[text.asked.prompt].len();
            if new >= text.cancel_at {
                self.cancel(id);
            }
        }
    }

    fn compute(&mut self, plan: &StepPlan) -> Vec<TextOutcome> {
        let mut rows = Vec::with_capacity(plan.rows.len());
        for row in &plan.rows {
            let place = &mut self.texts.get_mut(&row.id).unwrap().sequence;
            let sequence = *place.get_or_insert_with(|| self.engine.add_sequence().unwrap());
            assert_eq!(self.engine.n_past_of(sequence), row.from, "{row:?}");
        }
        for row in &plan.rows {
            let text = &self.texts[&row.id];
            rows.push(Rows {
                sequence: text.sequence.unwrap(),
                tokens: &text.tokens[row.from..row.from + row.n_tokens],
                logits: row.wants_logits.then_some(LogitsMode::Last),
            });
        }
        let came = self.engine.step_apart(&rows).unwrap();
        drop(rows);
        let mut outcomes = Vec::new();
        for (row, logits) in plan.rows.iter().zip(came) {
            let logits = logits.unwrap();
            if !row.wants_logits {
                continue;
            }
            let text = self.texts.get_mut(&row.id).unwrap();
            self.scratch.clear();
            self.scratch.extend_from_slice(logits);
            let token = text.sampler.sample(&mut self.scratch, &text.tokens);
            text.tokens.push(token);
            let n_prompt = self.prompts[text.asked.prompt].len();
            outcomes.push(TextOutcome {
                id: row.id,
                new_tokens: 1,
                ended: text.tokens.len() - n_prompt == MAX_NEW,
            });
        }
        self.keep_whole_pages(plan);
        outcomes
    }

    /// Keeps texts that fill their pages at the moment for those that wait.
    fn keep_whole_pages(&mut self, plan: &StepPlan) {
        for row in &plan.rows {
            if (row.from + row.n_tokens).is_multiple_of(PAGE) {
                let sequence = self.texts[&row.id].sequence.unwrap();
                self.engine.keep_sequence(sequence);
            }
        }
    }

    /// Compares every text with the one that its prompt has alone, in an engine with all in memory.
    fn check_alone(&self, engine: &mut Engine) {
        for (prompt, tokens) in self.prompts.iter().enumerate() {
            for seed in 0..SEEDS.len() {
                let asked = Asked { prompt, seed };
                let seen = &self.seen[asked.index()];
                let limits = generate::Limits {
                    max_tokens: seen.len(),
                    is_end: &|_| false,
                    draft: 0,
                };
                engine.clear();
                let go_on = |_: &Engine, _| ControlFlow::Continue(());
                let mut sampler = asked.sampler();
                let alone = generate(engine, tokens, &mut sampler, &limits, go_on).unwrap();
                assert_eq!(alone.tokens, *seen, "{asked:?}");
            }
        }
    }
}

#[test]
#[ignore = "a minute or more, see the module"]
fn random_clients_neither_fail_nor_lose_a_page_nor_grow() {
    let path = std::env::var_os("SOAK_MODEL").map_or_else(demo_model, PathBuf::from);
    let gguf = open(&path);
    let mut soak = Soak::new(load(&gguf, false));
    soak.warm_up();
    let time = Duration::from_secs_f64(60.0 * minutes());
    let (start, mut said) = (Instant::now(), Instant::now());
    let (mut settled, mut most) = (0, 0);
    loop {
        let is_over = start.elapsed() >= time;
        if !is_over {
            soak.clients();
        } else if soak.scheduler.is_empty() {
            break;
        }
        if !soak.scheduler.is_empty() {
            soak.step();
        }
        if soak.counts.steps.is_multiple_of(64) {
            let now = resident_bytes();
            let early = start.elapsed() < time / 10;
            settled = if early { now.max(settled) } else { settled };
            most = now.max(most);
        }
        if said.elapsed() > Duration::from_secs(60) {
            said = Instant::now();
            let seconds = start.elapsed().as_secs();
            println!("{seconds} s: {:?}, {}", soak.counts, show_bytes(most));
        }
    }
    println!(
        "{:?}: {} after a tenth of the time, {} at most",
        soak.counts,
        show_bytes(settled),
        show_bytes(most)
    );
    assert!(soak.texts.is_empty());
    let pages = soak.engine.pages();
    assert_eq!(pages.free, pages.total, "a page is lost");
    assert!(
        most <= settled + GROWTH,
        "{} became {}",
        show_bytes(settled),
        show_bytes(most)
    );
    let Counts {
        texts,
        canceled,
        forked,
        preempted,
        shared_tokens,
        ..
    } = soak.counts;
    assert!(texts > CLIENTS, "{texts} texts");
    if time >= Duration::from_secs(60) {
        let each = [canceled, forked, shared_tokens];
        assert!(each.iter().all(|n| *n > 0), "{each:?}");
        // With recurrent states there are no more texts than there are pages for.
        let is_short = soak.max_texts > ROOM as usize;
        assert!(preempted > 0 || !is_short, "no text is preempted");
    }
    soak.check_alone(&mut load(&gguf, true));
}
