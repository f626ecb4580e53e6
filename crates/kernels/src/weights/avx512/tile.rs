//! Many activations: as AVX2, with tiles of 12 tokens x 32 rows in 24 registers.

use std::arch::x86_64::*;
use std::ops::Range;

use crate::weights::Weight;
use crate::weights::avx2::tile::{Tile, pack, strips};
use crate::weights::product::{DEPTH, Lanes, Sink};

/// Weight rows of a panel.
const WIDTH: usize = 32;
/// Tokens of a tile.
const TOKENS: usize = 12;

/// out[m, rows] of `rows` of w, with `scratch` for their panels.
///
/// # Safety
/// AVX-512 F, BW, DQ, VL; nothing else writes these rows of `out`, whose shape is [m, w.rows].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
pub(in super::super) unsafe fn many(
    w: &Weight,
    rows: Range<usize>,
    x: &[f32],
    m: usize,
    scratch: &mut Vec<Lanes>,
    out: Sink,
) {
    assert_eq!(x.len(), m * w.cols);
    let panels = rows.len().div_ceil(WIDTH);
    for first in (0..w.cols).step_by(DEPTH) {
        let depth = DEPTH.min(w.cols - first);
        let size = 2 * depth.next_multiple_of(8);
        scratch.resize(panels * size, Lanes::ZERO);
        for (p, to) in scratch.chunks_exact_mut(size).enumerate() {
            for side in 0..2 {
                let start = rows.end.min(rows.start + p * WIDTH + side * WIDTH / 2);
                let part = start..rows.end.min(start + WIDTH / 2);
                // SAFETY: the caller has the features.
                unsafe { pack(w, part, first..first + depth, to, 2, side) };
            }
        }
        for strip in strips(m, TOKENS) {
            for (p, panel) in scratch.chunks_exact(size).enumerate() {
                let row = rows.start + p * WIDTH;
                let width = WIDTH.min(rows.end - row);
                let x = &x[strip.start * w.cols + first..];
                // SAFETY: the caller owns these rows of `out`; the strip lies in x.
                unsafe {
                    let y = out.at(strip.start, row);
                    let (x, panel) = (x.as_ptr(), panel.as_ptr().cast());
                    let tile =
                        Tile { x, x_stride: w.cols, panel, depth, y, y_stride: out.stride, width, first: first == 0 };
                    match strip.len() {
                        1 => kernel::<1>(tile),
                        2 => kernel::<2>(tile),
                        3 => kernel::<3>(tile),
                        4 => kernel::<4>(tile),
                        5 => kernel::<5>(tile),
                        6 => kernel::<6>(tile),
                        7 => kernel::<7>(tile),
                        8 => kernel::<8>(tile),
                        9 => kernel::<9>(tile),
                        10 => kernel::<10>(tile),
                        11 => kernel::<11>(tile),
                        _ => kernel::<12>(tile),
                    }
                }
            }
        }
    }
}

/// # Safety
/// AVX-512 F, BW, DQ, VL; x is readable as [M, depth], the panel as [depth][32], y writable as [M, width].
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn kernel<const M: usize>(t: Tile) {
    let mut acc = [[_mm512_setzero_ps(); 2]; M];
    // SAFETY: in the caller's bounds: p < depth, i < M.
    unsafe {
        for p in 0..t.depth {
            let (a, z) = (_mm512_loadu_ps(t.panel.add(WIDTH * p)), _mm512_loadu_ps(t.panel.add(WIDTH * p + 16)));
            for i in 0..M {
                let x = _mm512_set1_ps(*t.x.add(i * t.x_stride + p));
                acc[i] = [_mm512_fmadd_ps(x, a, acc[i][0]), _mm512_fmadd_ps(x, z, acc[i][1])];
            }
        }
    }
    for (i, acc) in acc.into_iter().enumerate() {
        for (j, acc) in acc.into_iter().enumerate() {
            let mask = ((1u64 << t.width.saturating_sub(16 * j).min(16)) - 1) as u16;
            // SAFETY: row i of y, of which `width` columns are ours: the others are masked.
            unsafe {
                let y = t.y.add(i * t.y_stride).wrapping_add(16 * j);
                let old = if t.first { _mm512_setzero_ps() } else { _mm512_maskz_loadu_ps(mask, y) };
                _mm512_mask_storeu_ps(y, mask, _mm512_add_ps(acc, old));
            }
        }
    }
}
