//! Memory tiers at run time: arenas that hold bytes, files that bytes are read from, the memory that there is, and the
//! pacing of emulated tiers.

pub mod arena;
pub mod bandwidth;
pub mod file;
pub mod limits;
pub mod nodes;
pub mod numa;
pub mod pace;
pub mod source;
