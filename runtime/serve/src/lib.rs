//! Serves a loaded model over HTTP, in the protocols of OpenAI and Anthropic.
//!
//! Three kinds of work are apart. One thread runs connections ([`http`], on tokio). Bodies are checked
//! and tokenized beside it, a few at once. The thread that calls [`Server::work`] owns the engine and
//! takes its steps ([`work`]): as many texts at once as there is room for. Requests reach it through a
//! queue with a bounded number of [places](state::State), answers come back through a channel per
//! request that has room for all of its tokens, so that a slow reader never holds up a step. Where a
//! reader is gone, its texts end before the next step.
//!
//! All input is a stranger's: no body and no header makes it panic or take memory without bound.
//!
//! [`request`], [`prompts`], [`grammar`], and [`answer`] are OpenAI's interface apart from HTTP;
//! batches use them, too.
#![forbid(unsafe_code)]

// The checks of the fuzz target call the crate by its name.
#[cfg(test)]
extern crate self as tier_plan_serve;

pub mod answer;
mod anthropic;
mod ask;
mod calls;
mod error;
#[doc(hidden)]
pub mod fuzzing;
pub mod grammar;
mod http;
mod job;
mod live;
mod llama;
mod log;
mod metrics;
mod openai;
mod openapi;
mod outcomes;
mod page;
mod plan;
pub mod prompts;
pub mod request;
mod responses;
mod sampled;
mod sse;
mod state;
mod thought;
mod traces;
mod truth;
mod utilities;
mod whole;
mod work;

pub use http::Server;
pub use page::TOKENS as PAGE_TOKENS;
pub use plan::{Question, Replan, Replanned};
pub use state::{Config, Limits, Security, Setup};
pub use traces::{Traces, TracesError};
pub use whole::{Parts, split};
pub use work::Summary;
