//! Measures which experts a mixture-of-experts model uses, and computes where its tensors should
//! live.
//!
//! This is the library behind the program `tier-plan`. Its stages are functions on domain types, so
//! that tests and benchmarks can call them without files.
#![forbid(unsafe_code)]

#[macro_use]
pub mod print;

pub mod auto;
pub mod batch;
pub mod budget;
pub mod bundled;
pub mod by_token;
pub mod catalogue;
pub mod chat;
pub mod client;
pub mod cmd;
pub mod conditions;
pub mod confirm;
pub mod context;
pub mod cost;
pub mod diff;
pub mod doctor;
pub mod explain;
pub mod export;
pub mod folders;
pub mod hint;
pub mod host;
pub mod hub;
pub mod interrupt;
pub mod json;
pub mod models;
pub mod opening;
pub mod parallel;
pub mod perplexity;
pub mod prepared;
pub mod probe;
pub mod profile;
pub mod progress;
pub mod replan;
pub mod report;
pub mod screen;
pub mod selftest;
pub mod session;
pub mod solve;
pub mod special;
pub mod split_name;
pub mod store;
mod subprocess;
pub mod text;
pub mod top;
pub mod trial;
pub mod verify;
pub mod whatif;

pub use tier_plan_runtime::printable;
