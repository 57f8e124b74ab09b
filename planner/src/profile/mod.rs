//! Profiles: collecting them, and what they say.

pub mod collect;
pub mod prompts;
