//! Batch files: many requests in the format of OpenAI's batch interface, one per line, and their
//! answers, one per line.
//!
//! Requests come from strangers. [`Request::parse`] takes any bytes; [`Input`] holds a place per
//! line and never a whole file. [`Output`] has only whole lines, so that a run that was killed goes
//! on where it ended.

mod answer;
mod fields;
mod input;
mod live;
mod output;
mod prompts;
mod request;
mod run;
#[cfg(test)]
mod tests;
mod unsupported;
mod value;

pub use answer::{Answered, Choice, Finish, TokenText, refusal};
pub use input::{Input, Line};
pub use output::Output;
pub use prompts::Prompts;
pub use request::{BadLine, Code, Endpoint, Prompt, Request, Sampling};
pub use run::{Batch, Options, Summary};

/// Longest line in bytes, several times what any context holds.
pub const MAX_LINE_BYTES: u64 = 16 << 20;

/// Longest name of a request in bytes.
pub const MAX_ID_BYTES: usize = 512;

/// Most lines of a file. Each takes some 100 bytes of memory.
pub const MAX_LINES: usize = 1 << 20;
