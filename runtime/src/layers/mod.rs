//! The arithmetic of one layer on the CPU: mixers, router, rotary embedding, the weights that they
//! read, and what layers keep of texts.

pub(crate) mod attend_runs;
pub(crate) mod attention;
pub(crate) mod block_index;
pub(crate) mod choice;
pub(crate) mod chosen;
pub(crate) mod compressed;
pub(crate) mod compressed_index;
pub(crate) mod cpu_context;
pub(crate) mod delta;
pub(crate) mod device_cache;
pub(crate) mod gqa;
pub(crate) mod index;
pub(crate) mod indexer;
pub(crate) mod kda;
pub(crate) mod kv_rows;
pub(crate) mod mamba;
pub(crate) mod mixer;
pub(crate) mod mla;
pub(crate) mod ngram;
pub mod pages;
pub(crate) mod places;
pub(crate) mod pooled_index;
pub(crate) mod pooling;
#[doc(hidden)]
pub mod probe;
pub(crate) mod recurrent;
pub mod rope;
pub mod router;
pub(crate) mod short_conv;
pub(crate) mod sparse;
pub(crate) mod streams;
pub(crate) mod weights;
