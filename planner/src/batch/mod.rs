//! Batch files: many requests in the format of OpenAI's batch interface, one per line, and their
//! answers, one per line.
//!
//! Requests come from strangers. [`Request::parse`] takes any bytes; [`Input`] holds a place per
//! line and never a whole file. [`Output`] has only whole lines, so that a run that was killed goes
//! on where it ended.

mod answer;
mod input;
mod output;
mod run;
#[cfg(test)]
mod tests;

pub use answer::{line, refusal};
pub use input::{Input, Line};
pub use output::Output;
pub use run::{Batch, Options, Summary};
pub use tier_plan_runtime::batcher::TokenText;
pub use tier_plan_serve::answer::{Answered, Choice, Finish};
pub use tier_plan_serve::grammar::Grammars;
pub use tier_plan_serve::prompts::{Chats, Encoded, Prompts, Unencoded};
pub use tier_plan_serve::request::{
    BadLine, Code, Endpoint, MAX_ID_BYTES, Prompt, Request, Sampling,
};

/// Longest line in bytes, several times what any context holds.
pub const MAX_LINE_BYTES: u64 = 16 << 20;

/// Most lines of a file. Each takes some 100 bytes of memory.
pub const MAX_LINES: usize = 1 << 20;
