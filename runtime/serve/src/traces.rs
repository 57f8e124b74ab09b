//! A profile of real use: which experts the answered texts chose, as calibration prompts are
//! profiled, so that a plan can be made for them. It holds numbers of experts and no tokens.
//!
//! What it takes is bounded: of a text the first [`MAX_TEXT_TOKENS`], and of all texts a random
//! sample (Vitter's algorithm R) once [`MAX_CHOICES`] are held. Tokens that the KV cache had were
//! not computed, so a text's trace begins behind them.
//!
//! Several processes may add to a file. So each adds its new texts to what the file holds when it
//! writes, and holds a lock meanwhile.

use std::collections::{HashMap, HashSet};
use std::fs::{File, Metadata, OpenOptions};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};
use tier_plan_runtime::batcher::StepRows;
use tier_plan_runtime::engine::Routing;
use tier_plan_runtime::formats::FormatError;
use tier_plan_runtime::formats::SourceId;
use tier_plan_runtime::formats::profile::{self, NoProfile, Profile, PromptTrace, Split};
use tier_plan_runtime::model::spec::ModelSpec;
use tier_plan_runtime::schedule::TextId;

#[cfg(test)]
mod tests;

/// Most tokens of a text that are recorded.
const MAX_TEXT_TOKENS: usize = 8192;

/// Most choices of all texts together, of three bytes each: 96 MiB.
const MAX_CHOICES: usize = 32 << 20;

/// Most choices that a plan is made from while the model is served, so that planning takes little
/// memory beside it.
const MAX_PLANNED_CHOICES: usize = 8 << 20;

/// Longest time between two writes of the file, while the engine has nothing to do.
const BETWEEN_WRITES: Duration = Duration::from_secs(30);

/// The domain of all texts.
const DOMAIN: &str = "served";

/// How the profile was made.
const MADE: &str = "texts that tier-plan serve answered";

/// Why a profile of real use cannot be recorded.
#[derive(Debug, thiserror::Error)]
pub enum TracesError {
    /// The model cannot be profiled.
    #[error(transparent)]
    Model(#[from] NoProfile),
    /// The file cannot be read, or is not a profile of the model.
    #[error(transparent)]
    File(#[from] FormatError),
    /// The file is a profile of something else.
    #[error("'{}' was made otherwise ({made}); give another name, so that it is not overwritten", path.display())]
    Other {
        /// The file.
        path: PathBuf,
        /// How it was made.
        made: String,
    },
}

/// A text at work.
struct Open {
    /// Position of the next token that is to be recorded.
    next: usize,
    trace: PromptTrace,
}

/// The choices of texts, and the file that they are written to.
pub struct Traces {
    path: PathBuf,
    profile: Profile,
    open: HashMap<TextId, Open>,
    max_choices: usize,
    n_choices: usize,
    /// Texts that have ended.
    n_ended: u64,
    random: u64,
    is_changed: bool,
    /// Names of texts that are not in the file yet.
    fresh: HashSet<String>,
    /// The file as it was when it was last read or written.
    seen: Option<Seen>,
    written: Instant,
}

/// What tells a file from one that has replaced it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    modified: Option<SystemTime>,
    bytes: u64,
    number: u64,
}

impl Seen {
    /// Returns what there is at a path; `None` where nothing is.
    fn at(path: &Path) -> Option<Self> {
        let found = std::fs::metadata(path).ok()?;
        Some(Self {
            modified: found.modified().ok(),
            bytes: found.len(),
            number: file_number(&found),
        })
    }
}

#[cfg(unix)]
fn file_number(found: &Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::ino(found)
}

#[cfg(not(unix))]
fn file_number(_: &Metadata) -> u64 {
    0
}

/// Waits until no other process adds to a file, and keeps others from it while the result lives.
/// `None` where the system has no locks.
fn lock(path: &Path) -> Option<File> {
    let name = format!(".{}.lock", path.file_name()?.to_string_lossy());
    let mut options = OpenOptions::new();
    let options = options.create(true).truncate(false).write(true);
    let file = options.open(path.with_file_name(name)).ok()?;
    file.lock().ok()?;
    Some(file)
}

/// Returns the number in a text's name; none where it can't be one that was counted.
fn number(prompt: &PromptTrace) -> Option<u64> {
    let number = prompt.name.strip_prefix("text-")?.parse().ok()?;
    (number < 1 << 48).then_some(number)
}

impl Traces {
    /// Opens the file, if it is there, to add to what it holds.
    ///
    /// # Errors
    /// When the model cannot be profiled, or the file is something else than such a profile of it.
    pub fn open(path: &Path, model: SourceId, spec: &ModelSpec) -> Result<Self, TracesError> {
        let mut traces = Self::of_nothing(path, model, spec)?;
        traces.take_in()?;
        Ok(traces)
    }

    /// Takes what the file holds, if it has changed since, and adds the texts that are not in it.
    ///
    /// # Errors
    /// When the file is something else than such a profile of the model.
    fn take_in(&mut self) -> Result<(), TracesError> {
        let path = &self.path;
        let seen = Seen::at(path);
        if seen.is_none() || seen == self.seen {
            return Ok(());
        }
        let found = profile::read(path)?;
        found.check_model(&self.profile.model, path)?;
        if found.made != MADE {
            return Err(TracesError::Other {
                path: path.clone(),
                made: found.made,
            });
        }
        let own = std::mem::replace(&mut self.profile.prompts, found.prompts);
        let fresh = std::mem::take(&mut self.fresh);
        self.seen = seen;
        let prompts = &self.profile.prompts;
        self.n_choices = prompts.iter().map(|p| p.experts.len()).sum();
        // Texts are numbered on, and places drawn anew: else every start would replace the same text.
        let latest = prompts.iter().filter_map(number).max().unwrap_or(0);
        let before = self.n_ended.saturating_sub(fresh.len() as u64);
        self.n_ended = latest.max(prompts.len() as u64).max(before);
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        self.random ^= now.map_or(0, |now| now.as_nanos() as u64) << 1;
        let own = own.into_iter().filter(|trace| fresh.contains(&trace.name));
        own.for_each(|trace| self.add(trace));
        Ok(())
    }

    /// Begins with no texts, whatever the file holds; [`write`](Self::write) adds to that.
    ///
    /// # Errors
    /// When the model cannot be profiled.
    pub fn of_nothing(path: &Path, model: SourceId, spec: &ModelSpec) -> Result<Self, TracesError> {
        Ok(Self {
            path: path.into(),
            profile: Profile::of_model(model, spec, MADE.into())?,
            n_choices: 0,
            n_ended: 0,
            open: HashMap::new(),
            max_choices: MAX_CHOICES,
            random: 0x9e37_79b9_7f4a_7c15,
            is_changed: false,
            fresh: HashSet::new(),
            seen: None,
            written: Instant::now(),
        })
    }

    /// Holds at most this many choices, of three bytes each.
    #[must_use]
    pub fn at_most(self, max_choices: usize) -> Self {
        Self {
            max_choices,
            ..self
        }
    }

    /// Returns the number of texts that are held.
    pub fn n_texts(&self) -> usize {
        self.profile.prompts.len()
    }

    /// Returns the choices of texts that have ended, as many as planning has memory for.
    pub(crate) fn uses(&self) -> Profile {
        let mut left = MAX_PLANNED_CHOICES;
        let fits = |prompt: &&PromptTrace| {
            let size = prompt.experts.len();
            left = left.saturating_sub(size);
            left > 0
        };
        let held = &self.profile;
        let uses = Profile {
            model: held.model.clone(),
            layers: held.layers.clone(),
            n_expert: held.n_expert,
            n_used: held.n_used,
            made: held.made.clone(),
            // The latest first, which say best what is to come.
            prompts: held
                .prompts
                .iter()
                .rev()
                .take_while(fits)
                .cloned()
                .collect(),
            counted: None,
            guesses: None,
            id: held.id.clone(),
        };
        uses.identified()
    }

    /// Records the rows of a step.
    pub fn record(&mut self, (routing, rows): (&Routing, &[StepRows])) {
        let per_token = self.per_token();
        let experts = routing.experts.chunks_exact(per_token);
        let mut tokens = experts.zip(routing.weights.chunks_exact(per_token));
        for row in rows {
            let open = self.open.entry(row.id).or_insert_with(|| Open {
                next: row.from,
                trace: empty(),
            });
            for (place, (experts, weights)) in tokens.by_ref().take(row.n_computed).enumerate() {
                let position = row.from + place;
                // What a text computes once more after it gave up its pages is recorded already.
                let is_new = place < row.n_kept && position == open.next;
                if !is_new || open.trace.tokens() >= MAX_TEXT_TOKENS {
                    continue;
                }
                open.next += 1;
                open.trace.add(experts, weights);
                if position < row.n_prompt {
                    open.trace.prompt_tokens += 1;
                } else {
                    open.trace.decode_tokens += 1;
                }
            }
        }
    }

    fn per_token(&self) -> usize {
        (self.profile.layers.len() * self.profile.n_used as usize).max(1)
    }

    /// Adds a text that has ended to the sample.
    pub fn end(&mut self, id: TextId) {
        if let Some(Open { trace, .. }) = self.open.remove(&id) {
            self.add(trace);
        }
    }

    fn add(&mut self, mut trace: PromptTrace) {
        if trace.tokens() == 0 {
            return;
        }
        self.n_ended += 1;
        trace.name = format!("text-{}", self.n_ended);
        // Plans are judged on texts that they were not made from: from the second text on.
        trace.split = match self.n_ended % 4 {
            2 => Split::HeldOut,
            _ => Split::Train,
        };
        let size = trace.experts.len();
        let name = trace.name.clone();
        let held = &mut self.profile.prompts;
        if self.n_choices + size <= self.max_choices {
            held.push(trace);
            self.n_choices += size;
            self.is_changed = true;
            self.fresh.insert(name);
            return;
        }
        let place = next_random(&mut self.random) % self.n_ended;
        let Some(out) = usize::try_from(place)
            .ok()
            .and_then(|place| held.get_mut(place))
        else {
            return;
        };
        self.n_choices -= out.experts.len();
        *out = trace;
        self.n_choices += size;
        while self.n_choices > self.max_choices && held.len() > 1 {
            let first = held.remove(0);
            self.n_choices -= first.experts.len();
        }
        self.is_changed = true;
        self.fresh.insert(name);
    }

    /// Writes the file if there is something new, and the last time is some while ago. Returns
    /// whether it wrote.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub(crate) fn write_at_rest(&mut self) -> Result<bool, TracesError> {
        let is_due = self.is_changed && self.written.elapsed() >= BETWEEN_WRITES;
        if is_due { self.write() } else { Ok(false) }
    }

    /// Adds the texts that have ended to those in the file, as it is now, if there is something new.
    /// Returns whether there was.
    ///
    /// # Errors
    /// When the file is something else than such a profile of the model, or cannot be written.
    pub fn write(&mut self) -> Result<bool, TracesError> {
        if !self.is_changed {
            return Ok(false);
        }
        self.written = Instant::now();
        let _lock = lock(&self.path);
        self.take_in()?;
        self.profile.write(&self.path)?;
        self.seen = Seen::at(&self.path);
        self.fresh.clear();
        self.is_changed = false;
        Ok(true)
    }
}

fn empty() -> PromptTrace {
    PromptTrace {
        domain: DOMAIN.into(),
        name: String::new(),
        split: Split::Train,
        prompt_tokens: 0,
        decode_tokens: 0,
        experts: Vec::new(),
        weights: Vec::new(),
    }
}

/// Returns the next number of a generator (SplitMix64).
fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
