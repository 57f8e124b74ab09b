//! Plans that need no solver: everything in main memory, everything on one GPU, or what fits a
//! budget.

pub mod budget;
pub mod in_memory;
