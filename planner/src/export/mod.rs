//! Plans and profiles in the words of other engines.
//!
//! Only formats whose reader has been looked at: llama.cpp's command line, and the counts that SGLang's load balancer
//! and the `frequency` placement of ktransformers begin from.

pub mod counts;
pub mod llama_cpp;

#[cfg(test)]
mod tests;
