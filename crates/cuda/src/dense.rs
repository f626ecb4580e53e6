//! Blocks of a history back to rows: for all queries of a prefill step, and for checks.
#![allow(unsafe_code)]

use cudarc::driver::DeviceRepr;

use crate::CudaError;
use crate::device::{Buffer, Device, Queue};
use crate::modules::Build;
use crate::pool::{History, Pool};
use crate::tables::{BLOCK, Tables, Turns};

#[repr(C)]
struct DenseArgs {
    pointers: [u64; 10],
    value_step: f32,
    first_block: u32,
    rows: u32,
    kv_heads: u32,
    heads: u32,
    _end: u32,
}
// SAFETY: plain numbers in the order of kernels/dense.cu, whose structure ends in four bytes of padding.
unsafe impl DeviceRepr for DenseArgs {}

/// Where decoded rows go.
pub(crate) enum DenseOut<'a> {
    /// fp16 `[2][kv_heads][rows][dim]`, keys turned.
    Halves(&'a Buffer, usize),
    /// f32 of the same shape, keys not turned.
    Floats(&'a Buffer, usize),
}

/// Decodes blocks of a history, whose record is on the card, from `first` on into rows, in a queue: what a buffer holds from a
/// byte on.
pub(crate) fn dense(
    device: &Device,
    queue: Queue,
    tables: &Tables,
    pool: &Pool,
    (history, record): (&History, &Buffer),
    turns: &Turns,
    out: DenseOut<'_>,
    first: usize,
    blocks: usize,
    rows: usize,
) -> Result<(), CudaError> {
    // Heads that a block of threads takes one after the other, and its threads.
    let (name, shared, (buffer, from), size, heads, threads) = match out {
        DenseOut::Halves(b, from) => ("dense_rows", 0, (b, from), 2, 4, 2 * tables.dim),
        DenseOut::Floats(b, from) => ("dense", BLOCK * tables.dim * 4, (b, from), 4, 1, 128),
    };
    if buffer.bytes() < from + 2 * tables.channels() * rows * size || first + blocks > history.numbers.len() {
        return Err(CudaError::Append { problem: "fewer blocks or rows than asked for" });
    }
    let f = device.function(&Build::dense(tables.bits, tables.dim), name, shared)?;
    let args = DenseArgs {
        pointers: [
            pool.blocks.at(),
            record.at(),
            tables.key_posts.at(),
            tables.value_posts.at(),
            tables.key_steps.at(),
            tables.value_steps.at(),
            tables.units.at(),
            turns.origins.at(),
            turns.places.at(),
            buffer.at() + from as u64,
        ],
        value_step: tables.value_step,
        first_block: first as u32,
        rows: rows as u32,
        kv_heads: tables.kv_heads as u32,
        heads: heads as u32,
        _end: 0,
    };
    // SAFETY: the argument of both kernels; blocks and rows checked above, rows beyond `rows` are skipped by the kernel; callers
    // within the crate order the queues.
    unsafe { device.launch_in(queue, &f, [blocks, tables.kv_heads.div_ceil(heads), 2], threads, shared, &args) }
}
