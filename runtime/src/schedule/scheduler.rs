//! The scheduler itself: texts in their order, and the step that is computed at the moment.

use super::text::{Queue, Rank, Text, pages};
use super::{
    Limits, MAX_SKIPPED_STEPS, MIN_CHUNK, Pages, Preempt, Request, StepCost, StepPlan, SubmitError,
    TextId, TextOutcome, TextRows, TextState,
};
use std::collections::HashMap;
use std::time::Duration;

/// Decides what each step computes; see the module.
#[derive(Debug, Clone, Default)]
pub struct Scheduler {
    /// Texts that hold pages.
    admitted: Queue,
    preempted: Queue,
    waiting: Queue,
    /// The place of each text in one of the three.
    ranks: HashMap<TextId, Rank>,
    /// What texts without pages share with others, per text.
    shared: HashMap<TextId, Vec<Shared>>,
    cost: StepCost,
    /// Rows of the step that is being computed.
    in_flight: Vec<TextRows>,
    /// Decoding rows among them.
    decode_rows: usize,
    /// Steps in a row that had no room for a prompt that waited.
    skipped: u32,
    submitted: u64,
}

/// Tokens that a text begins with as another does.
#[derive(Debug, Clone, Copy)]
struct Shared {
    with: TextId,
    n_tokens: usize,
}

/// What is left of a step while it is planned.
struct Room {
    /// Pages that were free before anything was taken.
    free: usize,
    /// Pages that are left.
    pages: usize,
    /// Rows that are left.
    rows: usize,
}

impl Scheduler {
    /// Creates a scheduler without texts.
    pub fn new() -> Self {
        Self::default()
    }

    /// Creates a scheduler without texts whose estimate of the time of steps was predicted, so that
    /// the first steps are within [`Limits::max_step`], too.
    pub fn with_cost(cost: StepCost) -> Self {
        Self {
            cost,
            ..Self::default()
        }
    }

    /// Adds a text.
    ///
    /// # Errors
    /// When the request is empty, its name is taken, or even an empty cache could not hold it.
    pub fn submit(&mut self, request: Request, pages_now: Pages) -> Result<(), SubmitError> {
        if request.prompt == 0 {
            return Err(SubmitError::EmptyPrompt);
        }
        if request.max_new == 0 {
            return Err(SubmitError::NoTokens);
        }
        if self.ranks.contains_key(&request.id) {
            return Err(SubmitError::Duplicate(request.id));
        }
        let text = Text::new(&request);
        let positions = text.most_positions();
        let needed = pages(positions);
        if needed > pages_now.total {
            return Err(SubmitError::TooLong {
                positions,
                needed,
                total: pages_now.total,
            });
        }
        let rank = Rank::new(&request, self.submitted);
        self.submitted += 1;
        self.ranks.insert(request.id, rank);
        self.waiting.insert(rank, text);
        Ok(())
    }

    /// Says that the first `n_tokens` of a text without pages are in pages that it can share, or in
    /// pages that were moved away and come back. Returns how many of them count: at least one token
    /// is computed anew. It holds until the text is admitted, so say 0 when those pages go. Has no
    /// effect on texts that hold pages.
    pub fn set_cached(&mut self, id: TextId, n_tokens: usize) -> usize {
        let Some(rank) = self.ranks.get(&id) else {
            return 0;
        };
        let text = self.preempted.get_mut(rank);
        let Some(text) = text.or_else(|| self.waiting.get_mut(rank)) else {
            return 0;
        };
        text.cached = n_tokens.min(text.known - 1);
        text.cached
    }

    /// Says that a text begins with the first `n_tokens` of another, which it can share once they are
    /// computed. While the other is admitted and computes them, the text is not, so that no step
    /// computes them twice. It holds until one of the two is finished; a text may share with several.
    /// Whatever the other has meanwhile, [`set_cached`](Self::set_cached) says what is shared.
    pub fn set_shared(&mut self, id: TextId, with: TextId, n_tokens: usize) {
        let known = |id: &TextId| self.ranks.contains_key(id);
        if id != with && n_tokens > 0 && known(&id) && known(&with) {
            let shared = self.shared.entry(id).or_default();
            shared.push(Shared { with, n_tokens });
        }
    }

    /// Says how many draft rows an admitted text has a use for in the steps to come, at most
    /// [`Limits::max_drafts`] of which it gets.
    pub fn set_drafts(&mut self, id: TextId, n: usize) {
        if let Some(text) = self.admitted_mut(id) {
            text.drafts = n;
        }
    }

    /// Returns the number of running texts.
    pub fn n_running(&self) -> usize {
        self.admitted.values().filter(|t| t.is_running()).count()
    }

    /// Whether a text without pages waits for another that computes what both begin with.
    pub fn is_held(&self, id: TextId) -> bool {
        let rank = self.ranks.get(&id);
        let text = rank.and_then(|rank| self.preempted.get(rank).or(self.waiting.get(rank)));
        text.is_some_and(|text| self.holds(text))
    }

    /// Returns the texts without pages, in the order in which they will be admitted. Those that are
    /// [held](Self::is_held) may come later.
    pub fn upcoming(&self) -> impl Iterator<Item = TextId> {
        let texts = self.preempted.values().chain(self.waiting.values());
        texts.map(|text| text.id)
    }

    /// Returns the number of texts that hold pages.
    pub fn n_admitted(&self) -> usize {
        self.admitted.len()
    }

    /// Returns the state of a text, `None` once it is finished.
    pub fn state(&self, id: TextId) -> Option<TextState> {
        let rank = self.ranks.get(&id)?;
        Some(match self.admitted.get(rank) {
            Some(text) if text.is_running() => TextState::Running,
            Some(text) => TextState::InPrompt { done: text.done },
            None if self.preempted.contains_key(rank) => TextState::Preempted,
            None => TextState::Waiting,
        })
    }

    /// Whether no text is left.
    pub fn is_empty(&self) -> bool {
        self.ranks.is_empty()
    }

    /// Returns the number of texts that are not finished.
    pub fn len(&self) -> usize {
        self.ranks.len()
    }

    /// Returns the estimate of the time of steps.
    pub fn cost(&self) -> &StepCost {
        &self.cost
    }

    /// Removes a text, whose pages can be freed at once. Returns whether there was such a text.
    pub fn cancel(&mut self, id: TextId) -> bool {
        let Some(rank) = self.ranks.remove(&id) else {
            return false;
        };
        for queue in [&mut self.admitted, &mut self.preempted, &mut self.waiting] {
            queue.remove(&rank);
        }
        self.shared.remove(&id);
        self.shared.retain(|_, with| {
            with.retain(|shared| shared.with != id);
            !with.is_empty()
        });
        true
    }

    /// Plans the next step. `pages` are those of the engine at this moment.
    pub fn next_step(&mut self, pages: Pages, limits: &Limits) -> StepPlan {
        let mut plan = StepPlan::default();
        let mut room = Room {
            free: pages.free,
            pages: pages.free,
            rows: limits.max_rows.max(1),
        };
        plan.preempt = self.preempt_for_running(pages.free);
        self.add_running(&mut plan, &mut room);
        self.decode_rows = plan.rows.len();
        // The pages of preempted texts are not free yet, and running texts come first.
        if plan.preempt.is_empty() {
            self.add_drafts(&mut plan, &mut room, limits);
            self.add_prompts(&mut plan, &mut room, limits);
        }
        if plan.rows.is_empty() && plan.preempt.is_empty() {
            self.unblock(&mut plan, pages.free);
        }
        let prompt_rows = plan.rows[self.decode_rows.min(plan.rows.len())..]
            .iter()
            .map(|r| r.n_tokens)
            .sum();
        let decode_rows = plan_rows(&plan.rows[..self.decode_rows]);
        plan.predicted = self.cost.predict(decode_rows, prompt_rows);
        self.in_flight.clone_from(&plan.rows);
        plan
    }

    /// Takes what came of the last step, and how long it took. Texts that wanted logits and have no
    /// outcome are computed again.
    pub fn finished(&mut self, took: Duration, outcomes: &[TextOutcome]) {
        let rows = std::mem::take(&mut self.in_flight);
        let (decoding, prompts) = rows.split_at(self.decode_rows.min(rows.len()));
        let prompt_rows = prompts.iter().map(|r| r.n_tokens).sum();
        self.cost.learn(plan_rows(decoding), prompt_rows, took);
        let outcomes: HashMap<TextId, &TextOutcome> = outcomes.iter().map(|o| (o.id, o)).collect();
        for row in rows {
            let outcome = outcomes.get(&row.id).copied();
            let ends = match (self.admitted_mut(row.id), outcome) {
                // Canceled meanwhile, or nothing came of it.
                (None, _) => false,
                (Some(text), _) if !row.wants_logits => {
                    text.done += row.n_tokens;
                    false
                }
                (Some(_), None) => false,
                (Some(text), Some(outcome)) => {
                    let new = outcome.new_tokens.min(row.drafts + 1).min(text.left);
                    if new > 0 {
                        // The last new token is known and not computed.
                        text.done = text.known - 1 + new;
                        text.known += new;
                    }
                    text.left -= new;
                    outcome.ended || text.left == 0
                }
            };
            if ends {
                self.cancel(row.id);
            }
        }
    }

    /// Forgets the last step, which failed and changed nothing.
    pub fn abandoned(&mut self) {
        self.in_flight.clear();
    }

    /// Returns an admitted text, `None` if it was canceled.
    fn admitted_mut(&mut self, id: TextId) -> Option<&mut Text> {
        self.admitted.get_mut(self.ranks.get(&id)?)
    }

    /// Returns the text to be admitted next: preempted ones come first.
    fn head(&self) -> Option<(&Rank, &Text)> {
        let preempted = self.preempted.first_key_value();
        preempted.or_else(|| self.waiting.first_key_value())
    }

    /// Takes the pages of the last texts until the others can decode.
    fn preempt_for_running(&mut self, free: usize) -> Vec<Preempt> {
        let mut preempted = Vec::new();
        let mut free = free;
        loop {
            let running = self.admitted.values().filter(|t| t.is_running());
            let needed: usize = running.map(|t| t.growth(1)).sum();
            if needed <= free {
                return preempted;
            }
            let Some(preempt) = self.preempt_last() else {
                return preempted;
            };
            free += preempt.pages.len();
            preempted.push(preempt);
        }
    }

    /// Preempts the last text that holds pages, unless it is the only one.
    fn preempt_last(&mut self) -> Option<Preempt> {
        if self.admitted.len() < 2 {
            return None;
        }
        let (rank, mut text) = self.admitted.pop_last()?;
        let preempt = Preempt {
            id: text.id,
            pages: text.own_pages(),
        };
        text.done = 0;
        text.cached = 0;
        self.preempted.insert(rank, text);
        Some(preempt)
    }

    /// Adds the row of every running text that has a page for it.
    fn add_running(&self, plan: &mut StepPlan, room: &mut Room) {
        for text in self.admitted.values().filter(|t| t.is_running()) {
            if room.rows == 0 {
                return;
            }
            if text.growth(1) <= room.pages {
                plan.rows.push(take(text, 1, room));
            }
        }
    }

    /// Lets running texts verify drafts, as far as the step has time.
    fn add_drafts(&self, plan: &mut StepPlan, room: &mut Room, limits: &Limits) {
        for i in 0..plan.rows.len() {
            let text = &self.admitted[&self.ranks[&plan.rows[i].id]];
            let rows = plan_rows(&plan.rows);
            let in_time = |drafts: &usize| {
                *drafts == 0 || self.cost.predict(rows + drafts, 0) <= limits.max_step
            };
            let most = limits.max_drafts.min(text.drafts);
            let most = most.min(text.left - 1).min(room.rows);
            let drafts = (0..=most).rev().find(|drafts| {
                in_time(drafts) && text.growth(1 + drafts) - text.growth(1) <= room.pages
            });
            let drafts = drafts.unwrap_or(0);
            room.pages -= text.growth(1 + drafts) - text.growth(1);
            room.rows -= drafts;
            plan.rows[i].drafts = drafts;
        }
    }

    /// Adds chunks of admitted prompts, then admits texts while there is room.
    fn add_prompts(&mut self, plan: &mut StepPlan, room: &mut Room, limits: &Limits) {
        if self.head().is_none() && self.admitted.values().all(Text::is_running) {
            self.skipped = 0;
            return;
        }
        room.rows = room.rows.min(self.prompt_rows(plan, limits));
        if room.rows == 0 {
            self.skipped = self.skipped.saturating_add(1);
            return;
        }
        self.skipped = 0;
        for text in self.admitted.values().filter(|t| !t.is_running()) {
            let chunk = (text.known - text.done)
                .min(room.rows)
                .min(text.rows_within(room.pages));
            if chunk > 0 {
                plan.rows.push(take(text, chunk, room));
            }
        }
        while room.rows > 0
            && let Some(rank) = self.admit(room, limits)
        {
            let text = &self.admitted[&rank];
            let chunk = (text.known - text.done)
                .min(room.rows)
                .min(text.rows_within(room.pages));
            if chunk == 0 {
                return;
            }
            plan.rows.push(take(text, chunk, room));
        }
    }

    /// Returns how many prompt rows the step has time for.
    fn prompt_rows(&self, plan: &StepPlan, limits: &Limits) -> usize {
        if plan.rows.is_empty() {
            return usize::MAX;
        }
        let rows = self
            .cost
            .prompt_rows_within(plan_rows(&plan.rows), limits.max_step);
        if rows == 0 && self.skipped >= MAX_SKIPPED_STEPS {
            MIN_CHUNK
        } else {
            rows
        }
    }

    /// Admits the next text if its prompt has room, beside what admitted texts are still to get.
    fn admit(&mut self, room: &Room, limits: &Limits) -> Option<Rank> {
        let most = limits.max_texts.min(limits.max_rows).max(1);
        if self.admitted.len() >= most {
            return None;
        }
        let mut upcoming = self.preempted.iter().chain(&self.waiting);
        let (rank, text) = upcoming.find(|(_, text)| !self.holds(text))?;
        if self.missing_for(text, room.free) > 0 {
            return None;
        }
        let rank = *rank;
        let head = self.preempted.remove(&rank);
        let mut text = head.or_else(|| self.waiting.remove(&rank))?;
        text.done = text.cached;
        self.admitted.insert(rank, text);
        Some(rank)
    }

    /// Whether an admitted text is computing more of what a text begins with than is shared already.
    fn holds(&self, text: &Text) -> bool {
        let shared = self.shared.get(&text.id);
        shared.into_iter().flatten().any(|shared| {
            let with = self.ranks.get(&shared.with);
            let with = with.and_then(|rank| self.admitted.get(rank));
            shared.n_tokens > text.cached && with.is_some_and(|with| with.done < shared.n_tokens)
        })
    }

    /// Returns the pages that are missing before a text can be admitted.
    fn missing_for(&self, text: &Text, free: usize) -> usize {
        let admitted = Text {
            done: text.cached,
            ..text.clone()
        };
        let reserved = |sum: usize, t: &Text| sum.saturating_add(t.reserve());
        let needed = self.admitted.values().fold(admitted.reserve(), reserved);
        needed.saturating_sub(free)
    }

    /// Says what has to be free before any text can go on: pages of the last text, or such as the
    /// schedule does not know of.
    fn unblock(&mut self, plan: &mut StepPlan, free: usize) {
        if let Some(preempt) = self.preempt_last() {
            plan.preempt.push(preempt);
            return;
        }
        plan.pages_wanted = match (self.admitted.values().next(), self.head()) {
            (Some(text), _) => text.growth(1).saturating_sub(free).max(1),
            (None, Some((_, text))) => self.missing_for(text, free).max(1),
            (None, None) => 0,
        };
    }
}

/// Returns the rows of texts with their drafts.
fn plan_rows(rows: &[TextRows]) -> usize {
    rows.iter().map(|r| r.n_tokens + r.drafts).sum()
}

/// Takes rows of a text and their pages from the room of a step.
fn take(text: &Text, n_tokens: usize, room: &mut Room) -> TextRows {
    room.rows -= n_tokens;
    room.pages = room.pages.saturating_sub(text.growth(n_tokens));
    TextRows {
        id: text.id,
        from: text.done,
        n_tokens,
        drafts: 0,
        wants_logits: text.done + n_tokens == text.known,
    }
}
