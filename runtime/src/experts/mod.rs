//! The expert store: routed experts by tier, the slots that layers share, and reads ahead of need.
//!
//! `cache` is the bookkeeping of slots, in integers, which the planner replays; `store` moves the bytes.

pub mod cache;
pub mod checksums;
pub mod counters;
mod gpu;
pub(crate) mod layer;
pub mod pack;
pub(crate) mod prefetch;
pub(crate) mod store;
#[cfg(test)]
mod tests;
pub(crate) mod view;
pub(crate) mod warmup;
