//! Lower bounds on the cost of every choice, and the dual prices that they come with.
//!
//! [`lagrangian`] bounds the choices of listed columns. [`pricing`] adds columns off the grid, by
//! [`local_descent`], and bounds all of them by [`branch_and_bound`], layer by layer.

pub mod branch_and_bound;
pub mod lagrangian;
pub mod local_descent;
pub mod pricing;
