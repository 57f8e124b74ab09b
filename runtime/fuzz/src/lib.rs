//! What the fuzz targets check, one module per target.
//!
//! Tests of the library and of the program include these modules, too, and replay the inputs in
//! `tests/data/fuzz`.

pub mod batch;
pub mod library;
pub mod serve;
pub mod template;
