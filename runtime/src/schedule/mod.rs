//! Continuous batching: which texts contribute which rows to the next step.
//!
//! Pure logic. It knows texts by their lengths alone, and the engine by its free pages, so that a
//! schedule can be tested without a model. It has no clock: the caller measures steps.
//!
//! A text has *known* tokens (prompt and generated) and *done* positions, which are in the KV cache.
//! While more than one known token is not done, the text is in its prompt, also where it is computed
//! again after a preemption. Else it is running, and one row decodes it.
//!
//! # Rules
//!
//! 1. Every running text has its row in every step, while there are pages for it.
//! 2. Chunks of prompts fill the step as far as its predicted time stays within
//!    [`Limits::max_step`]. Where nothing runs, a chunk may fill the batch. After
//!    [`MAX_SKIPPED_STEPS`] steps without room for a chunk, a small one is taken all the same.
//! 3. Texts are admitted in one order: by arrival, where each level of priority counts as an arrival
//!    [`AGING`] earlier. So equal priorities are first in, first out, and no text starves: those
//!    that arrive long enough after it come later, whatever their priority. No text overtakes
//!    another that has no room yet.
//! 4. A text is admitted when there are pages for its prompt, for the rest of the prompts that were
//!    admitted before, and one more for each text that will grow.
//! 5. A text that begins like an admitted one waits while that one computes what they share, see
//!    [`Scheduler::set_shared`]. Later texts may be admitted meanwhile.
//! 6. If pages run out, the last admitted text in that order gives up its pages. It comes back
//!    before any other text is admitted. The first text is never preempted, so there is always
//!    progress.
//!
//! ```
//! use std::time::Duration;
//! use tier_plan_runtime::schedule::{Limits, Pages, Request, Scheduler, TextId, TextOutcome};
//!
//! let mut scheduler = Scheduler::new();
//! let mut pages = Pages { free: 8, total: 8 };
//! let request = Request { id: TextId(1), prompt: 100, max_new: 2, ..Request::default() };
//! scheduler.submit(request, pages)?;
//! let limits = Limits { max_rows: 64, ..Limits::default() };
//!
//! // A batch takes the first 64 tokens; the rest gives the first new one.
//! assert_eq!(scheduler.next_step(pages, &limits).rows[0].n_tokens, 64);
//! scheduler.finished(Duration::from_millis(80), &[]);
//! pages.free -= 1;
//! let plan = scheduler.next_step(pages, &limits);
//! assert!(plan.rows[0].n_tokens == 36 && plan.rows[0].wants_logits);
//! let one = TextOutcome { id: TextId(1), new_tokens: 1, ended: false };
//! scheduler.finished(Duration::from_millis(50), &[one]);
//! assert!(!scheduler.is_empty());
//! # Ok::<(), tier_plan_runtime::schedule::SubmitError>(())
//! ```

mod cost;
mod scheduler;
#[cfg(test)]
mod tests;
mod text;

pub use cost::{RowsTime, StepCost};
pub use scheduler::Scheduler;

use std::ops::Range;
use std::time::Duration;
use thiserror::Error;

/// Positions of a text per page of the KV cache.
pub const PAGE: usize = 64;

/// Waiting time that is worth one level of priority.
pub const AGING: Duration = Duration::from_secs(30);

/// Steps in a row that may have no room for the prompts that wait.
pub const MAX_SKIPPED_STEPS: u32 = 8;

/// Prompt tokens of a chunk that is taken without room for it.
pub const MIN_CHUNK: usize = 16;

/// Name of a text; the caller chooses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct TextId(pub u64);

/// A text to be generated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Request {
    /// Name of the text, of which no other text is being scheduled.
    pub id: TextId,
    /// Tokens of the prompt, at least 1.
    pub prompt: usize,
    /// First tokens of the prompt whose pages another text shares with it.
    pub cached: usize,
    /// Most tokens to generate, at least 1.
    pub max_new: usize,
    /// Urgency: higher first.
    pub priority: i8,
    /// When the request came, since any moment that is equal for all requests.
    pub arrival: Duration,
}

/// Pages of the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pages {
    /// Pages that no text holds.
    pub free: usize,
    /// All pages.
    pub total: usize,
}

/// What a step may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Most rows per step, at least 1: the engine's batch.
    pub max_rows: usize,
    /// Most texts that are in their prompt or running.
    pub max_texts: usize,
    /// Most time of a step with running texts, and so between two tokens of a text.
    pub max_step: Duration,
    /// Most draft rows per running text that speculation wants verified.
    pub max_drafts: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_rows: 512,
            max_texts: 64,
            max_step: Duration::from_millis(250),
            max_drafts: 0,
        }
    }
}

/// The rows of one text in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextRows {
    /// The text.
    pub id: TextId,
    /// Position of the first row. Where it is the first step of the text, or the first after a
    /// preemption, the positions before it are those said to be cached.
    pub from: usize,
    /// Number of rows, without drafts.
    pub n_tokens: usize,
    /// Number of draft rows that may follow. The caller may use fewer.
    pub drafts: usize,
    /// Whether the last known token is among the rows, so that a new one can be drawn.
    pub wants_logits: bool,
}

/// A text that has to give up its pages before the step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Preempt {
    /// The text.
    pub id: TextId,
    /// Those of its pages, counted from its first position, that no other text shares by what the
    /// scheduler was told. They may be moved elsewhere, see [`Scheduler::set_cached`], or dropped.
    pub pages: Range<usize>,
}

/// A step: what to release, then what to compute.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct StepPlan {
    /// Texts that give up their pages first. If there are any and `rows` is empty, ask for another
    /// step once the pages are free.
    pub preempt: Vec<Preempt>,
    /// Rows per text: running texts, then chunks of prompts.
    pub rows: Vec<TextRows>,
    /// Predicted time.
    pub predicted: Duration,
    /// Pages that are missing before any text can go on, because something outside the schedule
    /// holds them, such as prefixes that are kept for later texts.
    pub pages_wanted: usize,
}

/// What came of a text's rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TextOutcome {
    /// The text.
    pub id: TextId,
    /// New tokens: 1, or more where drafts were accepted; 0 where the text ended without one.
    pub new_tokens: usize,
    /// Whether the text ended. It ends also when it has all its tokens.
    pub ended: bool,
}

/// State of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TextState {
    /// Not admitted yet.
    Waiting,
    /// Admitted, with known tokens that are not computed yet.
    InPrompt {
        /// Positions that are computed.
        done: usize,
    },
    /// Generating.
    Running,
    /// Without pages, to be computed again.
    Preempted,
}

/// A request that can't be scheduled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum SubmitError {
    /// A prompt without tokens.
    #[error("the prompt has no tokens, expected 1 or more")]
    EmptyPrompt,
    /// Nothing to generate.
    #[error("0 new tokens requested, expected 1 or more")]
    NoTokens,
    /// A text that no emptied cache could hold.
    #[error(
        "{positions} positions need {needed} pages of the KV cache, {total} available: pass a shorter prompt or fewer new tokens"
    )]
    TooLong {
        /// Positions of the prompt and of all new tokens.
        positions: usize,
        /// Pages that they need.
        needed: usize,
        /// All pages.
        total: usize,
    },
    /// A name that another text has.
    #[error("text {} is scheduled already", .0.0)]
    Duplicate(TextId),
}
