//! Models: what a GGUF file says about its network, and the tensors that network reads.

pub mod shape;
