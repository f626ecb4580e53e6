//! AVX-512 (F, BW, DQ, VL) with VNNI: the integer form of few rows, as AVX2 has it, with these departures:
//! - all 64 tokens of a channel's codes in one vector;
//! - `vpdpwssd` multiplies and adds in one instruction.
//!
//! fp16 blocks, softmax and many rows run AVX2's code: there the memory or the multipliers are the limit, which 512-bit
//! vectors do not move.

mod mix;
mod score;
mod unpack;

pub(super) use mix::coded as mix;
pub(super) use score::coded as score;
