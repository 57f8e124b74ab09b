//! The expert store: routed experts by tier, the slots that pooled experts share, and their reads.
//!
//! - [`cache`] decides which experts are in a layer's slots. It works on integers, and the planner
//!   replays it.
//! - `store` moves the bytes as the cache says; `step` is one layer's accesses to it.
//! - `prefetch` and `warmup` read experts before a router selects them; `claim` gives a step what was
//!   read for it.
//! - `rearrange` moves pins and slots to where another plan wants them, between steps.
//! - `gpu` computes experts and fills slots on GPUs; `streamed` has them compute experts of main memory.
//! - [`pack`] and [`checksums`] make and use the files beside a model that speed up and verify
//!   reads.
//!
//! The store knows nothing of tokens, routers, or how an expert computes; that is the business of
//! `moe`.

pub mod cache;
pub mod checksums;
mod claim;
#[cfg(test)]
mod claim_tests;
pub mod copies;
pub mod counters;
mod gpu;
mod ids;
pub(crate) mod layer;
pub mod pack;
mod pins;
pub(crate) mod prefetch;
pub(crate) mod rearrange;
#[cfg(test)]
pub(crate) mod rearrange_tests;
mod resident;
mod step;
pub(crate) mod store;
pub(crate) mod streamed;
#[cfg(test)]
mod tests;
pub(crate) mod view;
mod warmup;
