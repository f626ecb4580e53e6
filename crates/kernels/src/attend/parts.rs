//! The steps of [`Kernels::attend_all`] for few rows, one by one: for tests and benchmarks of each.

// Without kernels of its own, a CPU has the twin's steps only.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use std::cell::RefCell;

#[cfg(target_arch = "x86_64")]
use super::avx2::decode;
#[cfg(target_arch = "aarch64")]
use super::neon::decode;
use super::rows::Row;
use super::view::BlockView;
use super::{Backend, Kernels, Rows, scalar};
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use super::{PreparedRows, ROOM};
use crate::rope::BlockTable;

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
thread_local! {
    static SCRATCH: RefCell<decode::Scratch> = RefCell::default();
}

/// Calls a step of this CPU's backends: `false` and `true` are the const argument of the lesser and the greater one.
macro_rules! by_backend {
    ($kernels:expr, $scalar:expr, |$s:ident, $greater:ident| $call:expr) => {
        match $kernels.0 {
            Backend::Scalar => $scalar,
            #[cfg(target_arch = "x86_64")]
            Backend::Avx2 => by_backend!(false, |$s, $greater| $call),
            #[cfg(target_arch = "x86_64")]
            Backend::Avx512 => by_backend!(true, |$s, $greater| $call),
            #[cfg(target_arch = "aarch64")]
            Backend::Neon => by_backend!(false, |$s, $greater| $call),
            #[cfg(target_arch = "aarch64")]
            Backend::NeonDot => by_backend!(true, |$s, $greater| $call),
        }
    };
    ($value:expr, |$s:ident, $greater:ident| $call:expr) => {
        SCRATCH.with_borrow_mut(|$s| {
            const $greater: bool = $value;
            // SAFETY: a Kernels value with a backend exists only where all that it names was detected.
            unsafe { $call }
        })
    };
}

impl Kernels {
    /// Scores `[blocks, rows, 64]` of rows against keys, before any softmax; -inf where a row does not see a token.
    pub fn scores(self, rows: &Rows<'_>, blocks: &[BlockView<'_>], table: &BlockTable, scores: &mut [Row]) {
        assert!(blocks.iter().all(|b| b.head_dim() == rows.head_dim), "rows and blocks agree on head_dim");
        assert_eq!(scores.len(), blocks.len() * rows.len(), "one row of scores a row and block");
        by_backend!(
            self,
            blocks.iter().zip(scores.chunks_mut(rows.len())).for_each(|(b, to)| scalar::scores(rows, b, table, to)),
            |s, GREATER| ROOM.with_borrow_mut(|room| {
                decode::scores::<GREATER>(s, &mut PreparedRows::new(*rows, room), blocks, &[], table, scores)
            })
        );
    }

    /// Adds what weights `[blocks, rows, 64]`, 0 past a block's end, make of values to `out` `[rows, head_dim]`.
    pub fn outputs(self, weights: &[Row], blocks: &[BlockView<'_>], out: &mut [f32]) {
        let d = blocks.first().map_or(1, BlockView::head_dim);
        assert!(blocks.iter().all(|b| b.head_dim() == d), "blocks agree on head_dim");
        let rows = out.len() / d;
        assert_eq!(weights.len(), blocks.len() * rows, "one row of weights a row and block");
        by_backend!(
            self,
            blocks.iter().zip(weights.chunks(rows)).for_each(|(b, weights)| scalar::outputs(weights, b, out)),
            |s, GREATER| decode::outputs::<GREATER>(s, blocks, &[], weights, d, out)
        );
    }
}
