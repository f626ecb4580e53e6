//! Many activations: weight rows are dequantized once into panels `[k][16 rows]`, and a kernel holds a tile of 6
//! tokens x 16 rows in 12 registers. Activations are read where they lie: a strip of 6 x [`DEPTH`] stays in L1.
//!
//! Tried and rejected: dequantized rows through the `gemm` crate, which reaches 84 % of what the FMA units can do
//! at 512 tokens and 65 % at 64 (two Zen 4 cores); panels reach 95 % and 86 %.

use std::arch::x86_64::*;
use std::ops::Range;

use super::dequant;
use crate::weights::Weight;
use crate::weights::product::{DEPTH, Lanes, Sink};

/// Weight rows of a panel.
pub(in super::super) const WIDTH: usize = 16;
/// Tokens of a tile.
const TOKENS: usize = 6;
/// Columns that are dequantized before they are transposed: a whole block of every type.
const PIECE: usize = 256;

/// out[m, rows] of `rows` of w, with `scratch` for their panels.
///
/// # Safety
/// AVX2, FMA and F16C; nothing else writes these rows of `out`, whose shape is [m, w.rows].
#[target_feature(enable = "avx2,fma,f16c")]
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
        let size = depth.next_multiple_of(8);
        scratch.resize(panels * size, Lanes::ZERO);
        for (p, to) in scratch.chunks_exact_mut(size).enumerate() {
            let rows = rows.start + p * WIDTH..rows.end.min(rows.start + (p + 1) * WIDTH);
            // SAFETY: the caller has the features.
            unsafe { pack(w, rows, first..first + depth, to, 1, 0) };
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
                        _ => kernel::<6>(tile),
                    }
                }
            }
        }
    }
}

/// 0..m in strips of at most `most` whose lengths differ by at most one.
pub(in super::super) fn strips(m: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let n = m.div_ceil(most);
    (0..n).map(move |i| i * m / n..(i + 1) * m / n)
}

/// Rows x columns of w to `to[column * step + offset]`: up to 16 rows, absent ones are 0. Columns are padded to a
/// multiple of 8.
///
/// # Safety
/// AVX2, FMA and F16C.
#[target_feature(enable = "avx2,fma,f16c")]
pub(in super::super) unsafe fn pack(
    w: &Weight,
    rows: Range<usize>,
    cols: Range<usize>,
    to: &mut [Lanes],
    step: usize,
    offset: usize,
) {
    let (block, size) = w.ty.block();
    let mut piece = [[0.0f32; PIECE]; 8];
    for half in 0..2 {
        let rows = (rows.start + 8 * half).min(rows.end)..(rows.start + 8 * half + 8).min(rows.end);
        if rows.len() < 8 {
            piece = [[0.0; PIECE]; 8];
        }
        for start in cols.clone().step_by(PIECE) {
            let n = PIECE.min(cols.end - start);
            for (piece, row) in piece.iter_mut().zip(rows.clone()) {
                let bytes = &w.row(row)[start / block * size..][..n / block * size];
                // SAFETY: the caller has the features.
                unsafe { dequant(w.ty, bytes, &mut piece[..n]) };
            }
            for at in (0..n).step_by(8) {
                let columns = transpose([0, 1, 2, 3, 4, 5, 6, 7].map(|r| {
                    // SAFETY: at + 8 <= PIECE, since `at` is a multiple of 8 below PIECE.
                    unsafe { _mm256_loadu_ps(piece[r].as_ptr().add(at)) }
                }));
                for (j, column) in columns.into_iter().enumerate() {
                    let lanes = &mut to[(start - cols.start + at + j) * step + offset].0[8 * half..][..8];
                    // SAFETY: 8 writable floats.
                    unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), column) };
                }
            }
        }
    }
}

#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
fn transpose(r: [__m256; 8]) -> [__m256; 8] {
    let pair = |i: usize| (_mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]), _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]));
    let ((a0, a1), (b0, b1), (c0, c1), (d0, d1)) = (pair(0), pair(1), pair(2), pair(3));
    let four = |a, b| (_mm256_shuffle_ps::<0x44>(a, b), _mm256_shuffle_ps::<0xee>(a, b));
    let ((e0, e1), (e2, e3)) = (four(a0, b0), four(a1, b1));
    let ((f0, f1), (f2, f3)) = (four(c0, d0), four(c1, d1));
    let low = |a, b| _mm256_permute2f128_ps::<0x20>(a, b);
    let high = |a, b| _mm256_permute2f128_ps::<0x31>(a, b);
    [low(e0, f0), low(e1, f1), low(e2, f2), low(e3, f3), high(e0, f0), high(e1, f1), high(e2, f2), high(e3, f3)]
}

/// One tile's operands.
pub(in super::super) struct Tile {
    pub x: *const f32,
    pub x_stride: usize,
    /// `[depth][panel width]`
    pub panel: *const f32,
    pub depth: usize,
    pub y: *mut f32,
    pub y_stride: usize,
    /// Columns of y to write.
    pub width: usize,
    /// Whether y is written without being read.
    pub first: bool,
}

/// # Safety
/// AVX2, FMA and F16C; x is readable as [M, depth], the panel as [depth][16], y writable as [M, width].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn kernel<const M: usize>(t: Tile) {
    let mut acc = [[_mm256_setzero_ps(); 2]; M];
    // SAFETY: in the caller's bounds: p < depth, i < M.
    unsafe {
        for p in 0..t.depth {
            let (a, z) = (_mm256_loadu_ps(t.panel.add(WIDTH * p)), _mm256_loadu_ps(t.panel.add(WIDTH * p + 8)));
            for i in 0..M {
                let x = _mm256_broadcast_ss(&*t.x.add(i * t.x_stride + p));
                acc[i] = [_mm256_fmadd_ps(x, a, acc[i][0]), _mm256_fmadd_ps(x, z, acc[i][1])];
            }
        }
    }
    for (i, acc) in acc.into_iter().enumerate() {
        // SAFETY: row i of y, of which `width` columns are ours.
        unsafe {
            let y = t.y.add(i * t.y_stride);
            if t.width == WIDTH {
                for (j, acc) in acc.into_iter().enumerate() {
                    let old = if t.first { _mm256_setzero_ps() } else { _mm256_loadu_ps(y.add(8 * j)) };
                    _mm256_storeu_ps(y.add(8 * j), _mm256_add_ps(acc, old));
                }
            } else {
                let mut edge = [0.0f32; WIDTH];
                _mm256_storeu_ps(edge.as_mut_ptr(), acc[0]);
                _mm256_storeu_ps(edge.as_mut_ptr().add(8), acc[1]);
                for (j, v) in edge[..t.width].iter().enumerate() {
                    *y.add(j) = if t.first { *v } else { *y.add(j) + v };
                }
            }
        }
    }
}
