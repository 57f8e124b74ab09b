//! exec
pub mod slots;
