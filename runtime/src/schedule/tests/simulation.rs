//! An engine of counts alone: pages that texts hold and share, and the time that steps take.

use crate::schedule::*;
use std::collections::HashMap;
use std::time::Duration;

/// A request with what will come of it.
#[derive(Debug, Clone, Copy)]
pub struct Job {
    pub request: Request,
    /// Tokens after which the text ends by itself, if fewer than it may have.
    pub length: usize,
    /// The step before which the text is canceled.
    pub cancel_at: Option<usize>,
    /// Index of an earlier job whose prompt begins alike.
    pub shares: Option<usize>,
}

/// The true times of a simulated engine.
#[derive(Debug, Clone, Copy)]
pub struct Times {
    pub fixed: Duration,
    pub per_decode: Duration,
    pub per_prompt: Duration,
}

pub const TIMES: Times = Times {
    fixed: Duration::from_millis(20),
    per_decode: Duration::from_millis(1),
    per_prompt: Duration::from_micros(500),
};

#[derive(Debug, Default)]
struct Sequence {
    /// Numbers of the pages, in order.
    pages: Vec<usize>,
    positions: usize,
}

/// The pages of all texts, with the number of texts that hold each.
pub struct Cache {
    holders: Vec<usize>,
    sequences: HashMap<TextId, Sequence>,
}

impl Cache {
    pub fn new(total: usize) -> Self {
        Self {
            holders: vec![0; total],
            sequences: HashMap::new(),
        }
    }

    pub fn pages(&self) -> Pages {
        Pages {
            free: self.holders.iter().filter(|n| **n == 0).count(),
            total: self.holders.len(),
        }
    }

    fn allocate(&mut self) -> usize {
        let free = self.holders.iter().position(|n| *n == 0);
        let page = free.expect("the schedule takes more pages than there are");
        self.holders[page] = 1;
        page
    }

    fn fork(&mut self, from: Option<TextId>, id: TextId, n: usize) {
        let pages = match from.and_then(|from| self.sequences.get(&from)) {
            Some(donor) => donor.pages[..n.div_ceil(PAGE)].to_vec(),
            None => {
                assert_eq!(n, 0, "no text has what is to be shared");
                Vec::new()
            }
        };
        pages.iter().for_each(|page| self.holders[*page] += 1);
        let positions = n;
        let old = self.sequences.insert(id, Sequence { pages, positions });
        assert!(old.is_none(), "a text is begun twice");
    }

    pub fn release(&mut self, id: TextId) {
        for page in self.sequences.remove(&id).unwrap_or_default().pages {
            self.holders[page] -= 1;
        }
    }

    fn extend(&mut self, id: TextId, from: usize, n: usize) {
        let mut sequence = self.sequences.remove(&id).expect("the text has begun");
        assert_eq!(sequence.positions, from, "a position is lost or doubled");
        if let Some(last) = sequence.pages.last_mut()
            && !from.is_multiple_of(PAGE)
            && self.holders[*last] > 1
        {
            self.holders[*last] -= 1;
            *last = self.allocate();
        }
        sequence.positions += n;
        while sequence.pages.len() * PAGE < sequence.positions {
            sequence.pages.push(self.allocate());
        }
        self.sequences.insert(id, sequence);
    }

    fn truncate(&mut self, id: TextId, n: usize) {
        let sequence = self.sequences.get_mut(&id).expect("the text has begun");
        sequence.positions = n;
        for page in sequence.pages.drain(n.div_ceil(PAGE)..) {
            self.holders[page] -= 1;
        }
    }
}

/// What a simulation saw of one text.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    pub tokens: usize,
    pub first_step: Option<Duration>,
    pub end: Option<Duration>,
    pub preempted: usize,
    /// Times between tokens.
    pub gaps: Vec<Duration>,
    last_token: Option<Duration>,
    canceled: bool,
}

/// A run of jobs through the scheduler.
pub struct Simulation {
    pub scheduler: Scheduler,
    pub cache: Cache,
    pub jobs: Vec<Job>,
    pub seen: Vec<Seen>,
    pub now: Duration,
    pub times: Times,
    pub limits: Limits,
    pub steps: usize,
    /// Time of each step, with its decoding rows and its prompt rows.
    pub took: Vec<(Duration, usize, usize)>,
    /// Draws how many drafts are accepted.
    random: u64,
    submitted: usize,
}

impl Simulation {
    pub fn new(jobs: Vec<Job>, total: usize, limits: Limits) -> Self {
        Self {
            scheduler: Scheduler::new(),
            cache: Cache::new(total),
            seen: vec![Seen::default(); jobs.len()],
            jobs,
            now: Duration::ZERO,
            times: TIMES,
            limits,
            steps: 0,
            took: Vec::new(),
            random: 1,
            submitted: 0,
        }
    }

    /// Runs until every text has ended.
    pub fn run(&mut self) {
        while self.submitted < self.jobs.len() || !self.scheduler.is_empty() {
            self.step();
            assert!(self.steps < 100_000, "no end: {:?}", self.seen);
        }
        assert_eq!(self.cache.pages().free, self.cache.pages().total);
    }

    pub fn step(&mut self) {
        self.submit();
        self.cancel();
        self.offer_prefixes();
        let running = self.running();
        let pages = self.cache.pages();
        let plan = self.scheduler.next_step(pages, &self.limits);
        assert_eq!(plan.pages_wanted, 0, "nothing but texts holds pages");
        for preempt in &plan.preempt {
            self.cache.release(preempt.id);
            self.seen[preempt.id.0 as usize].preempted += 1;
        }
        let has_rows = |id: &TextId| plan.rows.iter().any(|r| r.id == *id);
        if plan.preempt.is_empty() {
            assert!(running.iter().all(has_rows), "a running text has no row");
        }
        self.steps += 1;
        if plan.rows.is_empty() {
            let waits = self.submitted < self.jobs.len();
            assert!(waits || !plan.preempt.is_empty() || self.scheduler.is_empty());
            if plan.preempt.is_empty() && waits {
                self.now = self.now.max(self.jobs[self.submitted].request.arrival);
            }
            return;
        }
        self.compute(&plan, &running);
    }

    fn submit(&mut self) {
        while let Some(job) = self.jobs.get(self.submitted)
            && job.request.arrival <= self.now
        {
            let pages = self.cache.pages();
            self.scheduler.submit(job.request, pages).unwrap();
            if let Some(with) = job.shares {
                let with = self.jobs[with].request.id;
                let shared = self.shared_pages(job.request.id) * PAGE;
                self.scheduler.set_shared(job.request.id, with, shared);
            }
            self.submitted += 1;
        }
    }

    fn cancel(&mut self) {
        for job in &self.jobs[..self.submitted] {
            if job.cancel_at.is_some_and(|at| at <= self.steps)
                && self.scheduler.cancel(job.request.id)
            {
                self.cache.release(job.request.id);
                self.seen[job.request.id.0 as usize].canceled = true;
                assert_eq!(self.scheduler.state(job.request.id), None);
            }
        }
    }

    /// Shares the beginnings of texts that may come next with texts that have them at the moment.
    fn offer_prefixes(&mut self) {
        let upcoming: Vec<TextId> = self.scheduler.upcoming().collect();
        for id in upcoming {
            let donor = self.donor(id);
            let prompt = self.jobs[id.0 as usize].request.prompt;
            let n = donor.map_or(0, |donor| self.cache.sequences[&donor].positions);
            let counted = self.scheduler.set_cached(id, n.min(prompt / 2));
            assert!(counted < prompt);
        }
    }

    /// Returns the whole pages that a text and its donor begin with alike.
    fn shared_pages(&self, id: TextId) -> usize {
        let job = self.jobs[id.0 as usize];
        let prompt = |job: &Job| job.request.prompt;
        let donor = job.shares.map_or(0, |donor| prompt(&self.jobs[donor]));
        (prompt(&job) / 2).min(donor) / PAGE
    }

    fn donor(&self, id: TextId) -> Option<TextId> {
        let donor = self.jobs[self.jobs[id.0 as usize].shares?].request.id;
        self.cache.sequences.contains_key(&donor).then_some(donor)
    }

    fn running(&self) -> Vec<TextId> {
        let ids = self.jobs.iter().map(|job| job.request.id);
        ids.filter(|id| self.scheduler.state(*id) == Some(TextState::Running))
            .collect()
    }

    fn compute(&mut self, plan: &StepPlan, running: &[TextId]) {
        let (mut decode, mut prompt) = (0, 0);
        let mut outcomes = Vec::new();
        // Forks come before any text grows.
        for row in &plan.rows {
            if !self.cache.sequences.contains_key(&row.id) {
                let donor = self.donor(row.id);
                let computed = donor.map_or(usize::MAX, |id| self.cache.sequences[&id].positions);
                let shared = self.shared_pages(row.id) * PAGE;
                assert!(
                    row.from.max(computed) >= shared,
                    "what two texts share is computed twice"
                );
                self.cache.fork(donor, row.id, row.from);
                let seen = &mut self.seen[row.id.0 as usize];
                seen.first_step.get_or_insert(self.now);
            }
        }
        for row in &plan.rows {
            let n = row.n_tokens + row.drafts;
            if running.contains(&row.id) {
                decode += n;
            } else {
                prompt += n;
            }
            self.cache.extend(row.id, row.from, n);
        }
        assert!(decode + prompt <= self.limits.max_rows);
        let fits = plan.predicted <= self.limits.max_step;
        assert!(fits || decode == 0 || prompt <= MIN_CHUNK);
        let took = self.times.fixed
            + self.times.per_decode * decode as u32
            + self.times.per_prompt * prompt as u32;
        self.took.push((took, decode, prompt));
        self.now += took;
        for row in plan.rows.iter().filter(|r| r.wants_logits) {
            outcomes.push(self.outcome(row));
        }
        self.scheduler.finished(took, &outcomes);
        for row in &plan.rows {
            if self.scheduler.state(row.id).is_none() {
                self.cache.release(row.id);
                self.seen[row.id.0 as usize].end = Some(self.now);
            }
        }
    }

    fn outcome(&mut self, row: &TextRows) -> TextOutcome {
        let job = self.jobs[row.id.0 as usize];
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005) + 1;
        let accepted = (self.random >> 33) as usize % (row.drafts + 1);
        let seen = &mut self.seen[row.id.0 as usize];
        // The rows end with the last token that is known.
        let known = row.from + row.n_tokens;
        assert_eq!(known, job.request.prompt + seen.tokens);
        let left = job.length.min(job.request.max_new) - seen.tokens;
        let new_tokens = (1 + accepted).min(left);
        self.cache.truncate(row.id, known - 1 + new_tokens.max(1));
        seen.tokens += new_tokens;
        if let Some(last) = seen.last_token.replace(self.now) {
            seen.gaps.push(self.now - last);
        }
        TextOutcome {
            id: row.id,
            new_tokens,
            ended: seen.tokens == job.length,
        }
    }

    /// Checks that each text has the tokens that it was to have.
    pub fn check_tokens(&self) {
        for (job, seen) in self.jobs.iter().zip(&self.seen) {
            let expected = job.length.min(job.request.max_new);
            assert!(seen.tokens <= expected && (seen.canceled || seen.tokens == expected));
        }
    }
}
