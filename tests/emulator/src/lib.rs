//! Owns an emulated GPU of compute capability 9.0 behind the CUDA driver's own interface: built as `libcuda.so.1`, it
//! runs this project's kernels by interpreting their PTX, and reports what a GPU would let pass or a sanitizer find.
//! It must never know what a kernel computes or what a test expects, and nothing of the project may depend on it: the
//! programs it runs are those that run on a GPU, unchanged.
//! Start at [`driver`]: it loads modules ([`module`]) and launches kernels, a cluster of CTAs at a time ([`block`]).
//!
//! What it is for: finding races, missing fences, deadlocks and accesses out of bounds on a machine without a GPU. So
//! whatever the hardware may do early or late happens at a random moment here (`DSV_EMULATOR_SEED` chooses another
//! order), and memory nobody wrote holds NaN. What it is not: fast, or a model of time.

mod block;
mod copies;
mod decode;
mod driver;
mod execute;
mod float;
mod launch;
mod memory;
mod module;
mod parse;
mod product;
mod tensor_map;
mod warp;

#[cfg(test)]
mod tests;
