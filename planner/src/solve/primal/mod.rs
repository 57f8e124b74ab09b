//! Heuristics and exact searches that turn dual prices into an integer choice of columns.
//!
//! [`rounding`] and [`greedy`] construct choices, and [`exchange`] improves them. [`label_setting`]
//! and [`mip`] find better ones or prove that there are none.

pub mod choice;
pub mod exchange;
pub mod greedy;
pub mod label_setting;
pub mod mip;
pub mod rounding;
