//! The block that comes next, asked for a few lines at a time: blocks lie apart, where no CPU looks ahead by itself, and a
//! burst of requests would wait for the ones before it.

use std::arch::x86_64::*;

use super::super::SideView;

const LINE: usize = 64;

/// Codes of one side that are still to be asked for. What else the side has is few lines, asked for at once.
pub(in super::super) struct Ahead<'a> {
    codes: &'a [u8],
    at: usize,
}

#[inline(always)]
fn ask<const LEVEL: i32>(at: *const u8) {
    // SAFETY: a prefetch changes nothing that a program can see, whatever the address. SSE is part of x86-64.
    unsafe { _mm_prefetch::<LEVEL>(at.cast()) };
}

/// Asks for all lines of a slice, which begins anywhere in one.
#[inline(always)]
fn all(of: &[u8]) {
    let skew = of.as_ptr().addr() % LINE;
    for at in (0..of.len() + skew).step_by(LINE) {
        ask::<_MM_HINT_T0>(of.as_ptr().wrapping_add(at));
    }
}

impl<'a> Ahead<'a> {
    #[inline]
    pub fn of(next: Option<&SideView<'a>>) -> Self {
        let codes = match next {
            Some(SideView::Coded(v)) => {
                let (scale, zero) = v.scales.map_or((&[][..], &[][..]), |s| (s.scale, s.zero));
                let [scale, zero] = [scale, zero].map(bytemuck::cast_slice);
                [v.outliers.places, v.outliers.residuals.as_flattened(), scale, zero].into_iter().for_each(all);
                v.codes
            }
            // Long enough for the CPU to see where it goes.
            Some(SideView::Tile { data }) => bytemuck::cast_slice(&data[..data.len().min(512)]),
            _ => &[],
        };
        Ahead { codes, at: 0 }
    }

    /// Asks for the next `n` lines.
    #[inline(always)]
    pub fn lines(&mut self, n: usize) {
        // A slice begins anywhere in a line: its last byte may lie in one more than its length says.
        let skew = self.codes.as_ptr().addr() % LINE;
        for _ in 0..n {
            if self.at < self.codes.len() + skew {
                ask::<_MM_HINT_T1>(self.codes.as_ptr().wrapping_add(self.at));
                self.at += LINE;
            }
        }
    }

    /// Asks for all that is left.
    #[inline]
    pub fn rest(&mut self) {
        let skew = self.codes.as_ptr().addr() % LINE;
        while self.at < self.codes.len() + skew {
            self.lines(1);
        }
    }
}

/// Lines to ask for beside a unit of `bits`-bit codes: as many as such a unit has, and something for what is not codes.
pub(in super::super) const fn lines_a_unit(bits: u32) -> usize {
    bits as usize / 2 + 1
}
