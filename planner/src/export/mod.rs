//! Plans and profiles as input of other engines.
//!
//! Only formats whose reader has been examined: llama.cpp's command line, and the expert counts
//! that SGLang's load balancer and ktransformers' `frequency` placement start from.

pub mod counts;
pub mod llama_cpp;
pub mod shell;

#[cfg(test)]
mod tests;
