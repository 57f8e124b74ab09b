//! The runtime as a library, from outside. One test program, so that it is linked once.

mod fuzz_inputs;
mod golden_arch;
mod golden_arch2;
mod golden_delta;
mod nvrtc;
mod rearrange;
