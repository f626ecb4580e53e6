//! The compressed cache on NVIDIA GPUs.
//!
//! ```text
//! nvrtc    CUDA C++ -> machine code of the card that is there
//! modules  which kernels exist, compiled once and kept on disk
//! device   a card: memory, launches, time
//! graph    launches that are recorded and repeated
//! blas     products of weights and activations, by cuBLASLt
//! model    a model's forward pass on a card
//! layer    a layer's quantizers, blocks and histories on a card; append, decode
//! dense    blocks back to rows
//! prefill  attention of many queries, over fp16 rows and over decoded ones
//! check    every kernel against the CPU, on random input
//! bench    append, decode and prefill against an fp16 cache and the copy bandwidth
//! ```
//!
//! Nothing here is linked: driver and compiler are looked for when a card is asked for, so a program with this crate
//! starts anywhere. Unsafe code only calls them.

pub mod bench;
mod blas;
pub mod check;
mod dense;
pub mod device;
mod error;
mod exact;
mod graph;
pub mod layer;
pub mod model;
pub mod modules;
pub mod nvrtc;
mod pool;
mod prefill;
mod synthetic;
mod tables;

pub use error::CudaError;
