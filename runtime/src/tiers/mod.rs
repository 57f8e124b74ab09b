//! Memory tiers at run time: arenas that hold bytes, files that bytes are read from, and the pacing of emulated tiers.

pub mod arena;
pub mod bandwidth;
pub mod file;
pub mod pace;
