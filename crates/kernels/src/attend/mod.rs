//! Queries against one block of the cache.
//!
//! A call takes the query rows of one KV head (all heads of its group, for one or more tokens), one block, and
//! a [`State`] that it updates: running maximum m, sum l of exp(score - m) and output o. States of different
//! blocks, threads or machines merge in any order.
//!
//! Two shapes of the same mathematics:
//! - few rows (decode): codes become 16-bit signposts, which are rotated and multiplied as integers, for all rows at
//!   once; a value's per-token scale is folded into the probabilities;
//! - many rows (prefill): the block is dequantized once into a tile `[head_dim, 64]`, rotated, and multiplied
//!   as a matrix.

// Without kernels of its own, a CPU uses what the twin needs.
#![cfg_attr(not(any(target_arch = "x86_64", target_arch = "aarch64")), allow(dead_code, unused))]

mod ahead;
mod by_const;
mod parts;
mod rows;
mod scalar;
mod state;
mod view;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

use std::cell::RefCell;

pub use rows::{PreparedRows, Rows, RowsRoom};
pub use state::State;
pub use view::{BlockView, CodedView, HeadLut, Outliers, SideView, TokenScales, ViewError};

use crate::dispatch::{self, DispatchError, Isa};
use crate::rope::BlockTable;

/// Rows up to which the decode shape is used; from here on dequantizing a whole tile pays.
pub const DECODE_ROWS: usize = 16;

/// Blocks of one call to [`Kernels::attend_all`].
pub const BLOCKS: usize = 4;

thread_local! {
    /// For rows that attend to one block.
    static ROOM: RefCell<RowsRoom> = RefCell::default();
}

/// The attention kernels of one instruction set. A value of this type proves that the CPU has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Kernels(Backend);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Backend {
    Scalar,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "aarch64")]
    Neon,
    /// NEON with the dot product extension and RDM.
    #[cfg(target_arch = "aarch64")]
    NeonDot,
}

impl Kernels {
    /// The best for this CPU, or what `KVQUANT_KERNEL` asks for.
    ///
    /// # Errors
    /// The override is unknown or this CPU lacks it.
    pub fn detect() -> Result<Self, DispatchError> {
        Ok(match dispatch::isa()? {
            #[cfg(target_arch = "x86_64")]
            Isa::Avx512 => Kernels(Backend::Avx512),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => Kernels(Backend::Avx2),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => Kernels(if has_dot() { Backend::NeonDot } else { Backend::Neon }),
            _ => Kernels(Backend::Scalar),
        })
    }

    /// Every backend that this CPU can run, for tests over all of them.
    pub fn available() -> Vec<Self> {
        let mut all = vec![Kernels(Backend::Scalar)];
        #[cfg(target_arch = "x86_64")]
        if Isa::Avx2.is_available() {
            all.push(Kernels(Backend::Avx2));
            if Isa::Avx512.is_available() {
                all.push(Kernels(Backend::Avx512));
            }
        }
        #[cfg(target_arch = "aarch64")]
        if Isa::Neon.is_available() {
            all.push(Kernels(Backend::Neon));
            if has_dot() {
                all.push(Kernels(Backend::NeonDot));
            }
        }
        all
    }

    /// The names of every backend, whatever this CPU has: `scalar`, `avx2`, `avx512`, `neon`, and `neon-dot` with the dot
    /// product extension and RDM.
    pub const NAMES: [&'static str; 5] = ["scalar", "avx2", "avx512", "neon", "neon-dot"];

    /// One of [`NAMES`](Self::NAMES).
    pub fn name(self) -> &'static str {
        match self.0 {
            Backend::Scalar => "scalar",
            #[cfg(target_arch = "x86_64")]
            Backend::Avx2 => "avx2",
            #[cfg(target_arch = "x86_64")]
            Backend::Avx512 => "avx512",
            #[cfg(target_arch = "aarch64")]
            Backend::Neon => "neon",
            #[cfg(target_arch = "aarch64")]
            Backend::NeonDot => "neon-dot",
        }
    }

    /// Dequantizes one side of a block into `tile` `[head_dim, 64]` (channel by channel, tokens along rows).
    /// Places past the block's length hold 0. Bit-exact between backends.
    pub fn dequant(self, side: &SideView<'_>, len: usize, tile: &mut [f32]) {
        assert_eq!(tile.len(), side.head_dim() * view::TOKENS, "tile is [head_dim, 64]");
        match self.0 {
            Backend::Scalar => scalar::dequant(side, len, tile),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: Kernels values with these backends exist only where AVX2, FMA and F16C were detected.
            Backend::Avx2 | Backend::Avx512 => unsafe { avx2::dequant(side, len, tile) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: Kernels values with these backends exist only where NEON was detected.
            Backend::Neon | Backend::NeonDot => unsafe { neon::dequant(side, len, tile) },
        }
    }

    /// Asks for a few lines that are read soon, into the first cache.
    pub fn prefetch_few<T>(self, of: &[T]) {
        match self.0 {
            Backend::Scalar => {
                let _ = of;
            }
            #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
            _ => ahead::prefetch_few(of),
        }
    }

    /// Asks for a whole block, into the second cache.
    pub fn prefetch_lines<T>(self, of: &[T]) {
        match self.0 {
            Backend::Scalar => {
                let _ = of;
            }
            #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
            _ => ahead::prefetch_lines(of),
        }
    }

    /// Attends with `rows` to one block and folds the result into `state`.
    ///
    /// `table` is the rotation inside a block; it is used where the block's keys are kept before RoPE.
    pub fn attend(self, rows: &Rows<'_>, block: &BlockView<'_>, table: &BlockTable, state: &mut State) {
        ROOM.with_borrow_mut(|room| {
            self.attend_all(&mut PreparedRows::new(*rows, room), std::slice::from_ref(block), &[], table, state);
        });
    }

    /// Attends with `rows` to some blocks, to each as [`Kernels::attend`] does; `first_visible` counts in each of them.
    /// [`BLOCKS`] at a time keep a CPU busy; more only take memory. Those that come `next`, as many, are asked for meanwhile.
    pub fn attend_all<'a>(
        self,
        prepared: &mut PreparedRows<'a>,
        blocks: &[BlockView<'a>],
        next: &[BlockView<'_>],
        table: &BlockTable,
        state: &mut State,
    ) {
        let rows = &prepared.rows;
        blocks.iter().for_each(|block| rows.check(block, state));
        if rows.is_empty() || blocks.is_empty() {
            return;
        }
        match self.0 {
            Backend::Scalar => blocks.iter().for_each(|block| scalar::attend(rows, block, table, state)),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a Kernels value with this backend exists only where AVX2, FMA and F16C were detected.
            Backend::Avx2 => unsafe { avx2::attend::<false>(prepared, blocks, next, table, state) },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: a Kernels value with this backend exists only where all that it names was detected.
            Backend::Avx512 => unsafe { avx2::attend::<true>(prepared, blocks, next, table, state) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: a Kernels value with this backend exists only where NEON was detected.
            Backend::Neon => unsafe { neon::attend::<false>(prepared, blocks, next, table, state) },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: a Kernels value with this backend exists only where all that it names was detected.
            Backend::NeonDot => unsafe { neon::attend::<true>(prepared, blocks, next, table, state) },
        }
    }
}

#[cfg(target_arch = "aarch64")]
fn has_dot() -> bool {
    std::arch::is_aarch64_feature_detected!("dotprod") && std::arch::is_aarch64_feature_detected!("rdm")
}

#[cfg(test)]
mod tests;
