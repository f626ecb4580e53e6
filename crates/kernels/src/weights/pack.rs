//! A file's matrix to panels, once, when a model is loaded; and back to f32.

use rayon::prelude::*;

use super::Weight;
use super::file::{Block, FileWeight};
use super::floats::Lanes;
use super::layout::{self, BLOCK, Layout, Line, ROWS, SUPER, Scales};
use crate::dispatch::{self, DispatchError};
use crate::memory::Lines;

/// Panels: codes or floats, and scales; drawn in `layout`.
#[derive(Debug)]
pub(super) struct Packed {
    codes: Lines,
    scales: Lines,
    /// Lines of codes and of scales of a panel.
    lines: (usize, usize),
}

impl Packed {
    /// Codes and scales of a panel.
    #[inline(always)]
    pub fn panel(&self, i: usize) -> (&[Line], &[Line]) {
        let (codes, scales) = self.lines;
        (&self.codes[i * codes..][..codes], &self.scales[i * scales..][..scales])
    }

    pub fn bytes(&self) -> usize {
        64 * (self.codes.len() + self.scales.len())
    }
}

impl FileWeight {
    /// The matrix as kernels take it; every value stays as it is, bit for bit. Rows are filled up to a multiple of 16
    /// with zeros. Panels are packed in parallel.
    ///
    /// # Errors
    /// `KVQUANT_KERNEL` can't be followed.
    pub fn pack(&self) -> Result<Weight, DispatchError> {
        let isa = dispatch::isa()?;
        let panels = self.rows.div_ceil(ROWS);
        let (lines, scale_lines) = layout::panel_lines(self.ty, self.cols);
        let mut p = Packed {
            codes: Lines::zeros(panels * lines),
            scales: Lines::zeros(panels * scale_lines),
            lines: (lines, scale_lines),
        };
        match layout::layout(self.ty) {
            Some(l) => p
                .codes
                .par_chunks_mut(lines)
                .zip(p.scales.par_chunks_mut(scale_lines))
                .enumerate()
                .for_each(|(i, (codes, scales))| self.panel(&l, i, codes, Line::bytes_mut(scales))),
            None => p.codes.par_chunks_mut(lines).enumerate().for_each(|(i, to)| self.floats(i, Line::bytes_mut(to))),
        }
        Ok(Weight { rows: self.rows, cols: self.cols, ty: self.ty, packed: p.into(), isa })
    }

    fn floats(&self, panel: usize, to: &mut [u8]) {
        let size = self.ty.block().1;
        for r in 0..ROWS.min(self.rows - panel * ROWS) {
            for (c, b) in self.row(panel * ROWS + r).chunks_exact(size).enumerate() {
                to[(c * ROWS + r) * size..][..size].copy_from_slice(b);
            }
        }
    }

    fn panel(&self, l: &Layout, panel: usize, codes: &mut [Line], scales: &mut [u8]) {
        let (weights, bytes) = self.ty.block();
        let mut block = Block::EMPTY;
        for r in 0..ROWS.min(self.rows - panel * ROWS) {
            for (i, b) in self.row(panel * ROWS + r).chunks_exact(bytes).enumerate() {
                block.read(self.ty, b);
                let first = i * weights / BLOCK;
                for (j, of) in block.codes[..weights].as_chunks::<BLOCK>().0.iter().enumerate() {
                    place_codes(l, of, r, &mut codes[(first + j) * l.bits()..][..l.bits()]);
                }
                let at = if weights == BLOCK { first } else { first / SUPER };
                place_scales(l, &block, r, &mut scales[at * l.scale_stride()..][..l.scale_stride()]);
            }
        }
    }
}

/// A row's codes of one block.
fn place_codes(l: &Layout, codes: &[u8; BLOCK], r: usize, to: &mut [Line]) {
    for (k, four) in codes.as_chunks::<4>().0.iter().enumerate() {
        let (line, shift) = Layout::place(l.low, k);
        for (to, c) in to[line].0[4 * r..][..4].iter_mut().zip(four) {
            *to |= (c & ((1u16 << l.low) - 1) as u8) << shift;
        }
        if l.high > 0 {
            let (line, shift) = Layout::place(l.high, k);
            for (to, c) in to[l.low + line].0[4 * r..][..4].iter_mut().zip(four) {
                *to |= (c >> l.low) << shift;
            }
        }
    }
}

/// A row's scales of one block or super-block.
fn place_scales(l: &Layout, b: &Block, r: usize, to: &mut [u8]) {
    to[2 * r..][..2].copy_from_slice(&b.d.to_le_bytes());
    if l.min() {
        to[32 + 2 * r..][..2].copy_from_slice(&b.m.to_le_bytes());
    }
    match l.scales {
        Scales::Half | Scales::HalfMin => {}
        Scales::Signed => (0..2 * SUPER).for_each(|g| to[32 + 16 * g + r] = b.scales[g]),
        Scales::NibblesMin => (0..2 * SUPER).for_each(|g| to[64 + 16 * g + r] = b.scales[g]),
        Scales::BytesMin => {
            for g in 0..SUPER {
                (to[64 + 32 * g + r], to[64 + 32 * g + 16 + r]) = (b.scales[g], b.mins[g]);
            }
        }
    }
}

/// The twin of dequantization: columns `first..first + out.len()` of a panel as `[column][16 rows]`; whole blocks
/// where there are codes.
pub(super) fn dequant_panel(w: &Weight, panel: usize, first: usize, out: &mut [Lanes]) {
    let (codes, scales) = w.packed.panel(panel);
    let Some(l) = layout::layout(w.ty) else {
        let size = w.ty.block().1;
        let floats = Line::bytes(codes)[first * ROWS * size..].chunks_exact(size);
        out.iter_mut().flat_map(|l| &mut l.0).zip(floats).for_each(|(o, b)| *o = layout::float(w.ty, b));
        return;
    };
    let scales = Line::bytes(scales);
    for (i, out) in out.as_chunks_mut::<BLOCK>().0.iter_mut().enumerate() {
        let b = first / BLOCK + i;
        let block = &codes[b * l.bits()..][..l.bits()];
        for r in 0..ROWS {
            for g in 0..l.groups() {
                let scale = l.scale(scales, b, g, r);
                let width = BLOCK / l.groups();
                for c in g * width..(g + 1) * width {
                    out[c].0[r] = l.weight(block, scale, r, c);
                }
            }
        }
    }
}

/// One row as f32.
pub(super) fn dequant_row(w: &Weight, row: usize, out: &mut [f32]) {
    let ((codes, scales), r) = (w.packed.panel(row / ROWS), row % ROWS);
    let Some(l) = layout::layout(w.ty) else {
        let size = w.ty.block().1;
        let floats = Line::bytes(codes).chunks_exact(size).skip(r).step_by(ROWS);
        out.iter_mut().zip(floats).for_each(|(o, b)| *o = layout::float(w.ty, b));
        return;
    };
    let scales = Line::bytes(scales);
    let width = BLOCK / l.groups();
    for (at, out) in out.chunks_exact_mut(width).enumerate() {
        let (b, g) = (at / l.groups(), at % l.groups());
        let scale = l.scale(scales, b, g, r);
        let block = &codes[b * l.bits()..][..l.bits()];
        for (c, o) in out.iter_mut().enumerate() {
            *o = l.weight(block, scale, r, g * width + c);
        }
    }
}
