//! The arithmetic of one layer on the CPU: mixers, router, rotary embedding, and the weights that
//! they read.

pub(crate) mod attention;
pub(crate) mod cpu_context;
pub(crate) mod delta;
pub(crate) mod gqa;
pub(crate) mod index;
pub(crate) mod indexer;
pub(crate) mod kda;
pub(crate) mod kv_rows;
pub(crate) mod mixer;
pub(crate) mod mla;
pub mod pages;
pub(crate) mod places;
#[doc(hidden)]
pub mod probe;
pub mod rope;
pub mod router;
pub(crate) mod short_conv;
pub(crate) mod sparse;
pub(crate) mod weights;
