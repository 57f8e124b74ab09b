//! Sentences about a solution, or about why there is none.

pub mod infeasible;
pub mod summary;
